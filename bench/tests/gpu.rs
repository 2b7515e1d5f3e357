//! Does: runs `gradwire-bench gpu` without a driver, and with a double of one: what it tells, not how fast that is.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../../transport/tests/cuda/double.rs"]
mod double;

use double::Double;
use std::path::Path;
use std::process::{Command, Output};

fn run(library: &Path) -> Output {
    let arguments = ["gpu", "--sizes", "4k,5m", "--calls", "2", "--library"];
    Command::new(env!("CARGO_BIN_EXE_gradwire-bench")).args(arguments).arg(library).output().unwrap()
}

#[test]
fn without_a_driver_it_says_so() {
    let output = run(Path::new("/nowhere/libcuda.so.1"));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("error: no CUDA driver: /nowhere/libcuda.so.1"), "{text}");
}

#[test]
fn sums_are_checked_and_each_size_has_a_row() {
    let double = Double::new(2);
    let output = run(&double.path());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        text.starts_with("all-reduce of float32 on Double 0, 2 ranks by loopback TCP, staged through the host"),
        "{text}"
    );
    let rows: Vec<Vec<f64>> =
        text.lines().skip(2).map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect()).collect();
    assert_eq!(rows.iter().map(|row| row[0] as usize).collect::<Vec<_>>(), [4096, 5 << 20]);
    assert!(rows.iter().flatten().all(|value| *value > 0.0));
    assert_eq!(double.held(), [0; 5]);
}
