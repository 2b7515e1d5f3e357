//! Does: runs `gradwire-bench gpu` without a driver, and with a double of one: what it tells, not how fast that is.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../../transport/tests/cuda/double.rs"]
mod double;

use double::Double;
use std::path::Path;
use std::process::{Command, Output};

fn run(library: &Path, more: &[&str]) -> Output {
    let arguments = ["gpu", "--sizes", "4k,5m", "--calls", "2", "--library"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-bench"));
    command.args(arguments).arg(library).arg("--nvrtc").arg(library).args(more).output().unwrap()
}

#[test]
fn without_a_driver_it_says_so() {
    let output = run(Path::new("/nowhere/libcuda.so.1"), &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("error: no CUDA driver: /nowhere/libcuda.so.1"), "{text}");
}

#[test]
fn sums_are_checked_and_each_size_has_a_row_in_both_tables() {
    for (more, wire) in [(&[][..], "loopback TCP"), (&["--shm"], "shared memory")] {
        let double = Double::new(2);
        let output = run(&double.path(), more);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let title = format!("all-reduce of float32 on Double 0, 2 ranks by {wire}, staged through the host");
        assert!(text.starts_with(&title), "{text}");
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let numbers =
            |row: &[&str]| row.iter().filter(|word| word.parse::<f64>().is_ok_and(|value| value >= 0.0)).count();
        let columns = if more.is_empty() { [5, 5, 4, 4] } else { [6, 6, 4, 4] };
        for ((row, columns), bytes) in [2, 3, 6, 7].iter().zip(columns).zip(["4096", "5242880", "4096", "5242880"]) {
            assert_eq!((rows[*row][0], numbers(&rows[*row])), (bytes, columns), "{text}");
        }
        assert_eq!(double.held(), [0; 7]);
    }
}
