//! Does: runs each command of the program as a person would, small, and reads what it tells.

use serde_json::Value;
use std::process::Command;

/// The rows that a command prints with `--json`.
fn rows(arguments: &[&str]) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_gradwire-bench"))
        .args(arguments)
        .arg("--json")
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("rows are text");
    text.lines().map(|line| serde_json::from_str(line).expect("a row is JSON")).collect()
}

fn positive(row: &Value, names: &[&str]) {
    for name in names {
        assert!(row[*name].as_f64().is_some_and(|value| value > 0.0), "{name} of {row}");
    }
}

#[test]
fn many_to_one_counts_every_sender_over_both_wires_and_draws_it() {
    let folder = tempfile::tempdir().unwrap();
    for wire in ["tcp", "shm"] {
        let short = ["--senders", "1,3", "--bytes", "50000", "--seconds", "0.5", "--warm-up", "0.1", "--wire", wire];
        let cc = ["--cc", if wire == "tcp" { "none,credit,plain" } else { "none,credit" }];
        let report = ["--report", folder.path().to_str().unwrap(), "--source", "600k"];
        let rows = rows(&[&["many-to-one"][..], &short, &cc, &report].concat());
        let runs: Vec<_> =
            rows.iter().map(|row| (row["senders"].as_u64().unwrap(), row["cc"].as_str().unwrap())).collect();
        let all = [1, 3].into_iter().flat_map(|n| ["none", "credit", "plain"].map(|cc| (n, cc)));
        assert_eq!(runs, all.filter(|run| wire == "tcp" || run.1 != "plain").collect::<Vec<_>>());
        for row in &rows {
            positive(row, &["goodput_gb_per_s", "jain", "p50_us", "p99_us", "pushes", "seconds"]);
            // One sender has twelve buffers, each of three has four, as many pushes as it may have under way.
            assert_eq!(row["source_bytes"], 600_000);
            let each = row["per_sender"].as_array().unwrap();
            assert_eq!(each.len() as u64, row["senders"].as_u64().unwrap());
            // A busy machine may leave one of them out of so short a time, but not all.
            let sum: f64 = each.iter().map(|one| one["goodput_gb_per_s"].as_f64().unwrap()).sum();
            assert!((sum - row["goodput_gb_per_s"].as_f64().unwrap()).abs() < 1e-9, "{row}");
        }
    }
    let page = std::fs::read_to_string(folder.path().join("index.html")).unwrap();
    assert!(page.contains("TCP over loopback") && page.contains("shared memory") && page.contains("<svg"));
}

#[test]
fn the_parameter_server_is_timed_in_turns_with_an_echo() {
    let rows = rows(&["ps", "--bytes", "4k,300k", "--shards", "2", "--rounds", "10", "--against", "echo"]);
    let names: Vec<&str> = rows.iter().map(|row| row["operation"].as_str().unwrap()).collect();
    assert_eq!(names, ["push", "pull", "push_pull", "push", "pull", "push_pull"]);
    rows.iter()
        .for_each(|row| positive(row, &["p50_us", "p99_us", "goodput_gb_per_s", "against_p50_us", "of_against"]));
}

#[test]
fn a_sparse_table_is_pulled_and_pushed_by_random_ids() {
    let flags = ["--sparse", "5000", "--ids", "20,300", "--dim", "6", "--shards", "2", "--rounds", "10"];
    let rows = rows(&[&["ps"][..], &flags].concat());
    let runs: Vec<_> =
        rows.iter().map(|row| (row["operation"].as_str().unwrap(), row["ids"].as_u64().unwrap())).collect();
    assert_eq!(runs, [("sparse_pull", 20), ("sparse_push", 20), ("sparse_pull", 300), ("sparse_push", 300)]);
    for row in &rows {
        positive(row, &["p50_us", "p99_us", "rows_per_s", "goodput_gb_per_s"]);
        let told = [&row["rows"], &row["dim"], &row["shards"], &row["bytes"]].map(|number| number.as_u64().unwrap());
        assert_eq!(told, [5000, 6, 2, 4 * 6 * row["ids"].as_u64().unwrap()]);
    }
}

#[test]
fn the_parameter_server_is_timed_over_shared_memory_beside_tcp() {
    let flags = ["--bytes", "300k", "--rounds", "10", "--wire", "shm", "--against", "tcp"];
    let rows = rows(&[&["ps"][..], &flags].concat());
    rows.iter().for_each(|row| positive(row, &["p50_us", "against_p50_us", "of_against"]));
    assert!(rows.len() == 3 && rows.iter().all(|row| row["wire"] == "shm" && row["against"] == "tcp"), "{rows:?}");
}

#[test]
fn copies_are_priced_beside_none_and_killed_servers_lose_nothing() {
    let priced = rows(&["recovery", "--bytes", "4k,300k", "--rounds", "10"]);
    let names: Vec<&str> = priced.iter().map(|row| row["operation"].as_str().unwrap()).collect();
    assert_eq!(names, ["push", "pull", "push", "pull"]);
    priced.iter().for_each(|row| positive(row, &["none_p50_us", "p50_us", "price"]));
    let killed = rows(&["recovery", "--kills", "3", "--bytes", "4k", "--pushes", "50"]);
    assert!(killed.len() == 3 && killed.iter().all(|row| row["exact"] == true), "{killed:?}");
}

#[test]
fn pushes_are_timed_with_and_without_a_checkpoint_and_the_checkpoint_is_verified() {
    let rows = rows(&["ps", "--bytes", "3m", "--shards", "2", "--snapshot"]);
    assert_eq!((rows.len(), &rows[0]["tables"]), (1, &1.into()));
    positive(&rows[0], &["snapshot_s", "pushes", "without_p50_us", "p50_us"]);
    assert!(rows[0]["snapshot_bytes"].as_u64() >= Some(3 << 20) && rows[0]["slower"].is_number(), "{rows:?}");
}

#[test]
fn all_reduce_and_memory_have_a_row_for_each_size() {
    let sizes = ["all-reduce", "--ranks", "3", "--wire", "tcp", "--max-bytes", "2048", "--rounds", "10"];
    let rows_of_all_reduce = rows(&sizes);
    let sizes: Vec<u64> = rows_of_all_reduce.iter().map(|row| row["bytes"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [8, 32, 128, 512, 2048]);
    let rows_of_memory = rows(&["memory", "--bytes", "4k", "--rounds", "3"]);
    assert_eq!(rows_of_memory.len(), 5);
    rows_of_all_reduce.iter().chain(&rows_of_memory).for_each(|row| positive(row, &["p50_us", "p99_us"]));
}

#[test]
fn every_collective_has_a_table_of_its_own() {
    let collectives =
        ["reduce-scatter", "all-gather", "broadcast", "reduce", "all-to-all", "gather", "scatter", "all-reduce"];
    for collective in collectives {
        let sizes = ["--ranks", "3", "--min-bytes", "1024", "--max-bytes", "1024", "--rounds", "10"];
        let rows = rows(&[&[collective][..], &sizes, &["--dtype", "bfloat16"]].concat());
        let [row] = &rows[..] else { panic!("{collective}: {rows:?}") };
        assert_eq!((&row["operation"], &row["dtype"]), (&collective.replace('-', "_").into(), &"bfloat16".into()));
        // As many elements for each of three ranks as fit.
        assert!([1020, 1024].contains(&row["bytes"].as_u64().unwrap()), "{row}");
        positive(row, &["p50_us", "p99_us", "busbw_gb_per_s"]);
    }
    positive(&rows(&["barrier", "--ranks", "3", "--rounds", "10"])[0], &["p50_us"]);
}

#[test]
fn a_comparison_is_measured_over_both_wires_and_put_into_a_readme() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    // Gloo has no native calls: gradwire is alone here, which needs no wheels.
    let alone = ["compare", "--layers", "native", "--peers", "gloo", "--bytes", "8,4k", "--rounds", "10"];
    let rows = rows(&[&alone[..], &["--peers-folder", &at("peers"), "--operations", "all-reduce,scatter"]].concat());
    let wires: Vec<&str> = rows.iter().map(|row| row["wire"].as_str().unwrap()).collect();
    assert_eq!(wires, ["shm", "shm", "shm", "shm", "tcp", "tcp", "tcp", "tcp"]);
    rows.iter().for_each(|row| positive(&row["figures"]["gradwire"], &["p50_us", "p99_us"]));
    let told: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(at("rows.jsonl"), told).unwrap();
    std::fs::write(at("README.md"), "Above\n<!-- compare: begin -->\nold\n<!-- compare: end -->\nbelow\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gradwire-bench"))
        .args(["compare", "--from", &at("rows.jsonl"), "--update-readme", &at("README.md"), "--report", &at("report")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let readme = std::fs::read_to_string(at("README.md")).unwrap();
    assert!(readme.starts_with("Above\n") && readme.ends_with("\nbelow\n") && !readme.contains("old"), "{readme}");
    assert!(readme.contains("| all_reduce, 2 ranks, TCP |"), "{readme}");
    assert!(std::fs::read_to_string(at("report/index.html")).unwrap().contains("<svg"));
}

#[test]
fn what_cannot_be_measured_is_refused_with_what_to_do() {
    let cases: [(&[&str], &str); 16] = [
        (&["many-to-one", "--senders", "99"], "give numbers from 1 to 64"),
        (&["many-to-one", "--source", "5g"], "give --source <= 4294967296"),
        (&["many-to-one", "--wire", "shm", "--shape", "1gbit:64kb"], "use --wire tcp"),
        (&["many-to-one", "--wire", "shm", "--cc", "plain"], "use --wire tcp"),
        (&["ps", "--bytes", "3"], "multiples of 4"),
        (&["ps", "--sparse", "1", "--rounds", "100"], "fewer rounds"),
        (&["compare", "--wires", "verbs"], "use --wires shm,tcp"),
        (&["memory", "--rounds", "0"], "at least one round"),
        (&["ps", "--sparse", "9", "--ids", "1000000", "--dim", "65536"], "give fewer --ids"),
        (&["gpu", "--sizes", "0"], "at least 4 bytes"),
        (&["memory", "--report", "/proc/no-folder"], "cannot make /proc/no-folder"),
        (&["ps", "--snapshot", "--rounds", "9"], "cannot be used with '--rounds"),
        (&["recovery", "--kills", "2", "--bytes", "4k,8k"], "give one size with --kills"),
        (&["recovery", "--workers", "2"], "--kills <N>"),
        (&["verbs", "--listen", "127.0.0.1:1", "--report", "x"], "cannot be used with '--report"),
        (&["memory", "--progress", "4000"], "give seconds from 0 to 3600"),
    ];
    for (arguments, remedy) in cases {
        let output = Command::new(env!("CARGO_BIN_EXE_gradwire-bench")).args(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(remedy), "{arguments:?}: {told}");
    }
}
