//! Does: runs `gradwire-bench gpu` without a driver, and with a double of one: what it tells, not how fast that is.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../../transport/tests/cuda/double.rs"]
mod double;

use double::Double;
use serde_json::Value;
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

#[test]
fn each_way_and_size_has_a_row_that_says_where_and_how_and_is_drawn() {
    let (double, folder) = (Double::new(2), tempfile::tempdir().unwrap());
    let report = folder.path().to_str().unwrap();
    let output = run(&double.path(), &["--shm", "--json", "--progress", "0.001", "--report", report]);
    let heard = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && heard.contains(" s: step 2 of 2, 5242880 bytes"), "{heard}");
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ways: Vec<(&str, &str, &str)> =
        rows.iter().map(|row| ["way", "wire", "dtype"].map(|name| row[name].as_str().unwrap()).into()).collect();
    let all = [
        ("staged", "shm", "float32"),
        ("lent", "device", "float32"),
        ("host", "shm", "float32"),
        ("copies", "memory", "bytes"),
        ("copy", "memory", "bytes"),
        ("sum", "memory", "float32"),
    ];
    assert_eq!(ways, [&all[..], &all].concat());
    for (row, bytes) in rows.iter().zip([4096; 6].into_iter().chain([5 << 20; 6])) {
        assert_eq!([&row["ranks"], &row["bytes"], &row["rounds"]], [2, bytes, 2].map(Value::from).each_ref(), "{row}");
        assert!(!row["host"].as_str().unwrap().is_empty() && row["device"] == "Double 0", "{row}");
        let [p50, p99] = ["p50_us", "p99_us"].map(|name| row[name].as_f64().unwrap());
        assert!(p50 > 0.0 && p99 >= p50, "{row}");
        assert_eq!(
            row["device_gb_per_s"].is_number(),
            ["copy", "sum"].contains(&row["way"].as_str().unwrap()),
            "{row}"
        );
    }
    let page = std::fs::read_to_string(folder.path().join("index.html")).unwrap();
    assert!(page.contains("all-reduce of float32 on Double 0, 2 ranks by shared memory"), "{page}");
    assert_eq!(page.matches("<svg").count(), 3);
    assert!(folder.path().join("gpu-2-shm-3.png").exists());
}
