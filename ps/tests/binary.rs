//! Does: runs the binary as a user does: starts it, asks it, lets it idle, stops it.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod running;

use gradwire_ps::{Client, ClientSettings, Codec, Compression, DType, Mode, PsError, SparseOptions, TableOptions};
use gradwire_transport::Region;
use running::{Running, command};
use std::time::{Duration, Instant};

#[test]
fn it_stops_cleanly_on_both_signals_with_a_client_connected() {
    for signal in ["-TERM", "-INT"] {
        let mut running = Running::start(2, &["--token", "s3cret"]);
        let settings = ClientSettings { token: Some("s3cret".into()), ..ClientSettings::default() };
        let client = Client::connect(&running.addresses, settings).unwrap();
        let table = client.dense("w", &[1000], DType::F32, TableOptions::default()).unwrap();
        table.push(Region::zeroed(4000).read(0..4000).unwrap()).unwrap().wait(None).unwrap();
        running.signal(signal);
        let (code, took, log) = running.end();
        assert_eq!(code, Some(0), "{log}");
        assert!(took < Duration::from_secs(1), "it took {took:?}");
        for said in ["serving", "a client has connected", "stopping", "stopped"] {
            assert!(log.contains(said), "{said} is missing in {log}");
        }
        assert!(!log.contains("s3cret"), "the token is in the log");
    }
}

#[test]
fn an_idle_server_uses_no_processor_with_and_without_clients() {
    let running = Running::start(2, &["--log", "warn"]);
    let client = Client::connect(&running.addresses, ClientSettings::default()).unwrap();
    let table = client.dense("w", &[100_000], DType::F32, TableOptions::default()).unwrap();
    let gradient = Region::zeroed(400_000);
    for _ in 0..5 {
        table.push(gradient.read(0..400_000).unwrap()).unwrap().wait(None).unwrap();
    }
    let measure = || {
        let before = running.cpu_ticks();
        // What is measured is a stretch of time, not waited for.
        std::thread::sleep(Duration::from_secs(1));
        running.cpu_ticks() - before
    };
    assert!(measure() <= 1, "with a client it used more than 1 % of a processor");
    client.close();
    assert!(measure() <= 1, "without one it used more than 1 % of a processor");
}

#[test]
fn a_server_killed_in_a_push_is_named_soon_and_one_started_anew_is_not_taken_for_it() {
    let mut servers = [Running::start(1, &[]), Running::start(1, &[])];
    let addresses: Vec<String> = servers.iter().map(|server| server.addresses[0].clone()).collect();
    let settings =
        ClientSettings { worker: Some(0), reconnect: Duration::from_millis(300), ..ClientSettings::default() };
    let client = Client::connect(&addresses, settings).unwrap();
    let options = TableOptions { mode: Mode::Sync { workers: 2 }, ..TableOptions::default() };
    let table = client.dense("w", &[1 << 20], DType::F32, options).unwrap();
    let (gradient, out) = (Region::zeroed(4 << 20), Region::zeroed(4 << 20));
    let push_pull = || {
        let (gradient, out) = (gradient.read(0..4 << 20).unwrap(), out.write(0..4 << 20).unwrap());
        table.push_pull(gradient, out).unwrap()
    };
    let lost = |error: PsError| match error {
        PsError::ServerLost { shard: 1, address, cause } if address == addresses[1] => cause,
        other => panic!("{other}"),
    };
    let pending = push_pull();
    let begun = Instant::now();
    servers[1].signal("-KILL");
    lost(pending.wait(None).unwrap_err());
    assert!(begun.elapsed() < Duration::from_secs(2), "it took {:?}", begun.elapsed());
    servers[1].end();
    servers[1] = Running::start(1, &["--listen", &addresses[1]]);
    let cause = lost(push_pull().wait(None).unwrap_err());
    assert!(cause.contains("without the tables"), "{cause}");
}

#[test]
fn status_prints_tables_and_clients_for_people_and_programs() {
    let running = Running::start(2, &[]);
    let client = Client::connect(&running.addresses, ClientSettings { worker: Some(3), ..Default::default() }).unwrap();
    client.dense("layer.0/weight", &[10, 7], DType::BF16, TableOptions::default()).unwrap();
    let servers = running.addresses.join(",");
    let text = command(&["status", "--servers", &servers]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    for said in ["layer.0/weight", "[10, 7]", "bfloat16", "async", &running.addresses[1]] {
        assert!(text.contains(said), "{said} is missing in\n{text}");
    }
    let json = command(&["status", "--json", "--servers", &servers]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json[0]["tables"][0]["elements"], 35);
    assert!(json[1]["clients"].as_array().unwrap().iter().any(|client| client["client"] == 3));
}

#[test]
fn status_says_how_tables_travel_and_what_clips_them() {
    let running = Running::start(1, &[]);
    let client = Client::connect(&running.addresses, ClientSettings::default()).unwrap();
    let compression = Compression { push: Codec::Int8, pull: Codec::Bf16 };
    let mode = Mode::Sync { workers: 1 };
    let clipped = TableOptions { mode, clipped: true, compression, ..TableOptions::default() };
    client.dense("clipped", &[10], DType::F32, clipped).unwrap();
    client.dense("plain", &[10], DType::F32, TableOptions::default()).unwrap();
    let both = Compression { push: Codec::F16, pull: Codec::F16 };
    let rows = SparseOptions { max_grad_norm: Some(1.5), compression: both, ..SparseOptions::default() };
    client.sparse("rows", 4, DType::F32, rows).unwrap();
    client.sparse("free", 4, DType::F32, SparseOptions::default()).unwrap();
    let status = |more: &[&str]| {
        let said = command(&[&["status", "--servers", &running.addresses[0]], more].concat()).output().unwrap();
        String::from_utf8(said.stdout).unwrap()
    };
    let text = status(&[]);
    // A cell ends where two spaces begin.
    let cells =
        |line: &str| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect();
    let rows: Vec<Vec<String>> = text.lines().map(cells).collect();
    let cell = |table: &str, column: &str| {
        let at = rows.iter().position(|row| row.get(1).is_some_and(|name| name == table)).unwrap();
        let head = rows[..at].iter().rfind(|row| row.first().is_some_and(|cell| cell == "SHARD")).unwrap();
        assert_eq!(head.len(), rows[at].len(), "{text}");
        rows[at][head.iter().position(|name| name == column).unwrap()].clone()
    };
    for (table, compression, column, clips) in [
        ("clipped", "push int8, pull bf16", "CLIPPED", "yes"),
        ("plain", "none", "CLIPPED", "no"),
        ("rows", "fp16", "MAX GRAD NORM", "1.5"),
        ("free", "none", "MAX GRAD NORM", "none"),
    ] {
        assert_eq!((&*cell(table, "COMPRESSION"), &*cell(table, column)), (compression, clips), "{table}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&status(&["--json"])).unwrap();
    let table = |kind: &str, name: &str| {
        let tables = json[0][kind].as_array().unwrap();
        tables.iter().find(|table| table["name"] == name).unwrap().clone()
    };
    assert_eq!(table("tables", "clipped")["compression"], "push int8, pull bf16");
    assert!(table("tables", "clipped")["clipped"] == true && table("tables", "plain")["clipped"] == false);
    assert!(table("sparse", "rows")["max_grad_norm"] == 1.5 && table("sparse", "free")["max_grad_norm"].is_null());
}

#[test]
fn mistakes_are_told_with_their_remedy() {
    let open = command(&["serve", "--listen", "0.0.0.0:0"]).output().unwrap();
    assert_eq!(open.status.code(), Some(1));
    let said = String::from_utf8(open.stderr).unwrap();
    assert!(said.contains("0.0.0.0:0") && said.contains("GRADWIRE_TOKEN"), "{said}");
    let missing = command(&["serve", "--token-file", "/nowhere/token"]).output().unwrap();
    assert!(String::from_utf8(missing.stderr).unwrap().contains("/nowhere/token"));
    let size = command(&["serve", "--max-memory", "lots"]).output().unwrap();
    assert!(String::from_utf8(size.stderr).unwrap().contains("GiB"));
    let running = Running::start(1, &["--token", "right"]);
    let wrong = command(&["status", "--servers", &running.addresses[0], "--token", "wrong"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert!(said.contains(&running.addresses[0]) && said.contains("GRADWIRE_TOKEN"), "{said}");
    let taken = command(&["serve", "--listen", &running.addresses[0]]).output().unwrap();
    let port = running.addresses[0].rsplit(':').next().unwrap();
    assert!(String::from_utf8(taken.stderr).unwrap().contains(port));
}

#[test]
fn help_teaches_by_example() {
    let help = command(&["--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for said in ["serve", "status", "Examples:", "GRADWIRE_TOKEN"] {
        assert!(help.contains(said), "{said} is missing in\n{help}");
    }
    let serve = command(&["serve", "--help"]).output().unwrap();
    let serve = String::from_utf8(serve.stdout).unwrap();
    for said in ["--listen", "--shards", "--token", "--token-file", "--max-memory", "--insecure", "--log", "--json"] {
        assert!(serve.contains(said), "{said} is missing in\n{serve}");
    }
}
