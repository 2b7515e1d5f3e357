//! Does: runs each command of the program small, and holds what it leaves to one list: what every row says, what a report has,
//! that a run is heard of on stderr and on nothing else.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Each command that runs on any machine, in each of its modes.
const RUNS: [&str; 18] = [
    "all-reduce --ranks 3 --wire tcp --max-bytes 32 --rounds 2000",
    "reduce-scatter --min-bytes 1k --max-bytes 1k --rounds 20000 --dtype bfloat16",
    "all-gather --min-bytes 1k --max-bytes 1k --rounds 20000",
    "broadcast --min-bytes 1k --max-bytes 1k --rounds 20000",
    "reduce --min-bytes 1k --max-bytes 1k --rounds 20000",
    "all-to-all --min-bytes 1k --max-bytes 1k --rounds 20000",
    "gather --min-bytes 1k --max-bytes 1k --rounds 20000",
    "scatter --min-bytes 1k --max-bytes 1k --rounds 20000",
    "barrier --rounds 100000",
    // Gloo has no native calls: gradwire is alone, which needs no wheels.
    "compare --layers native --peers gloo --wires tcp --bytes 8,4k --rounds 10",
    "many-to-one --senders 1,2 --cc credit --bytes 50000 --seconds 0.3 --warm-up 0.1",
    "ps --bytes 4k,64k --rounds 50 --against echo",
    "ps --workers 1,2 --bytes 4k --rounds 10",
    "ps --snapshot --bytes 64k",
    "ps --sparse 3000 --ids 20,200 --dim 4 --rounds 10",
    "recovery --bytes 4k --rounds 50",
    "recovery --kills 2 --bytes 4k --pushes 20",
    "memory --bytes 4k --rounds 20",
];

/// Commands that need a device: tests/gpu.rs runs the one with a double of CUDA's driver, and src/verbs has its row.
const OF_DEVICES: [&str; 2] = ["gpu", "verbs"];

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gradwire-bench")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What every row has: on which host, over what, by how many, of what, how much, and how long.
fn hold(row: &Value) {
    for name in ["host", "wire", "dtype"] {
        assert!(row[name].as_str().is_some_and(|word| !word.is_empty()), "{name} of {row}");
    }
    assert!(row["ranks"].as_u64() >= Some(1), "ranks of {row}");
    // A barrier moves none.
    let least = u64::from(row["operation"] != "barrier");
    assert!(row["bytes"].as_u64() >= Some(least), "bytes of {row}");
    let [p50, p99] = ["p50_us", "p99_us"].map(|name| row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}")));
    assert!(p50 > 0.0 && p99 >= p50, "{row}");
}

/// The rows of a run, whose page in `folder` has a section with the same rows and a picture of each chart.
fn reported(arguments: &str, folder: &Path) -> Vec<Value> {
    let mut words: Vec<&str> = arguments.split(' ').collect();
    words.extend(["--json", "--progress", "0.001", "--report", folder.to_str().unwrap()]);
    let output = run(&words);
    let (told, heard) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{arguments}: {heard}");
    let rows: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!rows.is_empty(), "{arguments} has no rows");
    assert!(heard.lines().any(|line| line.contains(" s: step ")), "{arguments} is not heard of: {heard}");
    let page = std::fs::read_to_string(folder.join("index.html")).unwrap();
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (mut sections, mut pictures, mut kept) = (0, 0, 0);
    for file in files {
        if file.extension().is_some_and(|extension| extension == "png") {
            assert_eq!(&std::fs::read(&file).unwrap()[1..4], b"PNG");
            pictures += 1;
        } else if file.extension().is_some_and(|extension| extension == "json") {
            let section: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            let charts = section["charts"].as_array().unwrap();
            assert!(!charts.is_empty() && charts.iter().all(|chart| page.contains(chart["title"].as_str().unwrap())));
            assert!(page.contains(section["title"].as_str().unwrap()), "{arguments}");
            assert!(section["measured_on"].as_str().unwrap().contains(" cores, Linux "), "{arguments}");
            kept += section["rows"].as_array().unwrap().iter().filter(|row| rows.contains(row)).count();
            sections += charts.len();
        }
    }
    assert!(sections > 0 && (pictures, page.matches("<svg").count()) == (sections, sections), "{arguments}");
    assert_eq!(kept, rows.len(), "{arguments} keeps its rows");
    rows
}

#[test]
fn every_row_of_every_command_says_where_how_and_of_what_and_is_drawn() {
    for arguments in RUNS {
        let folder = tempfile::tempdir().unwrap();
        reported(arguments, folder.path()).iter().for_each(hold);
    }
}

#[test]
fn no_command_is_left_out() {
    let help = text(&run(&["--help"]).stdout);
    let list = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let named = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let commands: BTreeSet<&str> = named.map(|line| line.split_whitespace().next().unwrap()).collect();
    let run = RUNS.map(|arguments| arguments.split(' ').next().unwrap());
    assert_eq!(commands, run.into_iter().chain(OF_DEVICES).chain(["help"]).collect());
}

#[test]
fn who_takes_part_is_counted_alike() {
    let count = |arguments: &str| {
        let words: Vec<&str> = arguments.split(' ').chain(["--json", "--progress", "0"]).collect();
        let output = run(&words);
        assert_eq!(text(&output.stderr), "", "with --progress 0 nothing is said");
        let rows: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        rows.iter().map(|row| row["ranks"].as_u64().unwrap()).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    };
    // One more than send; workers and the process of the servers; workers and the processes of the servers.
    assert_eq!(count("many-to-one --senders 1,2 --cc none --bytes 50000 --seconds 0.2 --warm-up 0"), [2, 3]);
    assert_eq!(count("ps --workers 1,2 --bytes 4k --rounds 10"), [2, 3]);
    assert_eq!(count("recovery --bytes 4k --rounds 10 --copies 2"), [4]);
    assert_eq!(count("recovery --kills 1 --workers 2 --bytes 4k --pushes 20"), [4]);
    assert_eq!(count("all-reduce --ranks 3 --max-bytes 8 --rounds 10"), [3]);
}

#[test]
fn without_an_rdma_device_it_says_so() {
    let output = run(&["verbs", "--json"]);
    // Where there is one, its rows are held to the same.
    if output.status.success() {
        text(&output.stdout).lines().for_each(|line| hold(&serde_json::from_str(line).unwrap()));
    } else {
        let heard = text(&output.stderr);
        assert!(output.stdout.is_empty() && heard.contains("error: "), "{heard}");
        assert!(heard.contains("RDMA device") || heard.contains("libibverbs"), "{heard}");
    }
}

#[test]
fn ranks_that_are_started_apart_leave_one_report_that_of_the_first() {
    let (folder, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, store) = (folder.path().join("0"), format!("file://{}", store.path().display()));
    let start = |rank: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-bench"));
        command.args([
            "all-reduce",
            "--wire",
            "tcp",
            "--max-bytes",
            "32",
            "--rounds",
            "10",
            "--json",
            "--world-size",
            "2",
        ]);
        command.args(["--store", &store, "--rank", rank, "--report"]).arg(folder.path().join(rank));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let [one, other] = [start("0"), start("1")].map(|child| child.wait_with_output().unwrap());
    assert!(one.status.success() && other.status.success(), "{}{}", text(&one.stderr), text(&other.stderr));
    assert_eq!((text(&one.stdout).lines().count(), text(&other.stdout).as_str()), (2, ""));
    let page = std::fs::read_to_string(first.join("index.html")).unwrap();
    assert!(page.contains("all_reduce of float32, 2 ranks by TCP") && page.contains("<svg"), "{page}");
    assert!(first.join("all-reduce-tcp-2-1.png").exists() && !folder.path().join("1").join("index.html").exists());
}
