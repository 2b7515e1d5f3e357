//! Does: looks at a running server as Prometheus and Kubernetes do, starts it from a file, and reads its log.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod running;
// The same etcd that the room of etcd is tested with.
#[path = "../src/etcd/running.rs"]
#[allow(dead_code)] // Not every test needs all of it.
mod running_etcd;

use gradwire_ps::{Client, ClientSettings, DType, Mode, SparseOptions, TableOptions};
use gradwire_transport::Region;
use prometheus_parse::{Scrape, Value};
use running::{Running, command};
use running_etcd::RunningEtcd;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A server with an admin address, and that address.
fn watched(shards: usize, more: &[&str]) -> (Running, String) {
    let mut running = Running::start(shards, &[&["--admin", "127.0.0.1:0"], more].concat());
    let line: serde_json::Value = serde_json::from_str(&running.lines.next().unwrap().unwrap()).unwrap();
    let admin = line["admin"].as_str().unwrap().to_owned();
    (running, admin)
}

/// A coordinator with an admin address: where it is, and that address.
fn watched_coordinator(more: &[&str]) -> (Running, String) {
    let mut all = vec!["coordinate", "--json", "--admin", "127.0.0.1:0"];
    all.extend(more);
    let mut child = command(&all).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = |key: &str| {
        let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        line[key].as_str().unwrap().to_owned()
    };
    let (address, admin) = (said("coordinator"), said("admin"));
    (Running { child, addresses: vec![address], lines }, admin)
}

/// Scrapes until all of these metrics are as expected.
fn await_values(admin: &str, expected: &[(&str, &str, f64)]) {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let seen = scrape(admin);
        let is = |&(name, state, expected): &(&str, &str, f64)| {
            let label = [("state", state)];
            let labels = if state.is_empty() { &[][..] } else { &label };
            value(&seen, &format!("gradwire_coordinator_{name}"), labels) == expected
        };
        if expected.iter().all(is) {
            return;
        }
        assert!(Instant::now() < until, "{expected:?} does not come: {:?}", seen.samples);
        // Nobody tells when a metric changes.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The status line and the body.
fn get(admin: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(admin).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {admin}\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

fn scrape(admin: &str) -> Scrape {
    let (status, body) = get(admin, "/metrics");
    assert!(status.contains("200"), "{status}");
    Scrape::parse(body.lines().map(|line| Ok(line.to_owned()))).unwrap()
}

/// The sum of a metric over all its lines with these labels.
fn value(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
    let fits = |sample: &&prometheus_parse::Sample| {
        sample.metric == name && labels.iter().all(|(label, value)| sample.labels.get(label) == Some(value))
    };
    let number = |sample: &prometheus_parse::Sample| match &sample.value {
        Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => *value,
        Value::Histogram(classes) => classes.last().unwrap().count,
        Value::Summary(_) => unreachable!("there are none"),
    };
    let found: Vec<f64> = scrape.samples.iter().filter(fits).map(number).collect();
    assert!(!found.is_empty(), "there is no {name} with {labels:?} in {:?}", scrape.samples);
    found.iter().sum()
}

#[test]
fn metrics_tell_what_clients_have_done() {
    let (running, admin) = watched(2, &[]);
    let settings = |worker| ClientSettings { worker: Some(worker), ..ClientSettings::default() };
    let client = Client::connect(&running.addresses, settings(0)).unwrap();
    let name = "layer \"0\"\\weight";
    let table = client.dense(name, &[1000], DType::F32, TableOptions::default()).unwrap();
    let rows = client.sparse("rows", 4, DType::F32, SparseOptions::default()).unwrap();
    let (gradient, out) = (Region::zeroed(4000), Region::zeroed(4000));
    for _ in 0..3 {
        table.push(gradient.read(0..4000).unwrap()).unwrap().wait(None).unwrap();
    }
    table.pull(out.write(0..4000).unwrap()).unwrap().wait(None).unwrap();
    let ids = Region::from_vec((0..10u64).flat_map(u64::to_le_bytes).collect());
    rows.push(&ids.read(0..80).unwrap(), &gradient.read(0..160).unwrap()).unwrap().wait(None).unwrap();
    assert!(client.dense(name, &[1001], DType::F32, TableOptions::default()).is_err());
    // One of two workers has pushed: its own fused push and pull waits.
    let options = TableOptions { mode: Mode::Sync { workers: 2 }, ..TableOptions::default() };
    let both = client.dense("both", &[10], DType::F32, options).unwrap();
    let _waits = both.push_pull(gradient.read(0..40).unwrap(), out.write(0..40).unwrap()).unwrap();
    client.status().unwrap();
    let seen = scrape(&admin);
    // As it stands in the text: a quote and a backslash behind a backslash each.
    let table = [("table", r#"layer \"0\"\\weight"#)];
    for (metric, labels, expected) in [
        ("gradwire_up", &[][..], 2.0),
        ("gradwire_clients", &[], 2.0),
        ("gradwire_pushes_total", &table, 6.0),
        ("gradwire_pulls_total", &table, 2.0),
        ("gradwire_pushed_bytes_total", &table, 12_000.0),
        ("gradwire_pulled_bytes_total", &table, 4000.0),
        ("gradwire_duplicates_total", &table, 0.0),
        ("gradwire_pushed_bytes_total", &[("table", "rows")], 2.0 * 8.0 + 10.0 * 8.0 + 160.0),
        ("gradwire_pulled_bytes_total", &[("table", "rows")], 0.0),
        ("gradwire_table_elements", &[("table", "rows")], 10.0),
        ("gradwire_waiting", &[("table", "both")], 2.0),
        ("gradwire_push_seconds", &[], 8.0),
        ("gradwire_pull_seconds", &[], 2.0),
    ] {
        assert_eq!(value(&seen, metric, labels), expected, "{metric}");
    }
    assert!(value(&seen, "gradwire_memory_bytes", &[("shard", "1")]) > 2000.0);
    assert!(value(&seen, "gradwire_client_received_bytes_total", &[("client", "0")]) > 12_000.0);
    assert!(value(&seen, "gradwire_client_idle_seconds", &[("client", "0")]) < 60.0);
}

#[test]
fn health_is_told_and_ends_where_a_shard_does_not_answer() {
    let (running, admin) = watched(1, &[]);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(&admin, path), ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned()));
    }
    assert!(get(&admin, "/").0.contains("404"));
    let mut post = TcpStream::connect(&admin).unwrap();
    post.write_all(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut said = String::new();
    post.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 405"), "{said}");
    let mut noise = TcpStream::connect(&admin).unwrap();
    let _ = noise.write_all(&[0xff; 100_000]);
    assert!(get(&admin, "/healthz").0.contains("200"));
    drop(running);
    assert!(TcpStream::connect(&admin).is_err());
}

#[test]
fn a_file_says_what_flags_say_and_flags_win() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ps.toml");
    let file = path.to_str().unwrap();
    std::fs::write(&path, "shards = 3\ntoken = 'of the file'\nlog = 'warn'\nlog-format = 'json'\ninsecure = true\n")
        .unwrap();
    let good = command(&["config", "--check", file]).output().unwrap();
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    let mut running = Running::start(2, &["--config", file, "--log", "info,gradwire_transport=off"]);
    let token = |token: &str| ClientSettings { token: Some(token.into()), ..ClientSettings::default() };
    assert_eq!(Client::connect(&running.addresses, token("of the file")).unwrap().shards(), 2);
    running.signal("-TERM");
    let (code, _, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said = |text: &str| lines.iter().any(|line| line["fields"]["message"] == text && line["level"] == "INFO");
    assert!(said("serving") && said("a client has connected") && said("stopped"), "{log}");
    assert!(!log.contains("of the file"), "the token is in the log");
}

#[test]
fn a_file_that_is_wrong_is_told_by_line_or_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ps.toml");
    let cases = [
        ("shrads = 2", "did you mean shards?"),
        ("max_memory = '1GiB'", "did you mean max-memory?"),
        ("shards = 'two'", "--shards"),
        ("insecure = 1", "true or false"),
        ("shards = [1]", "string or a whole number"),
        ("shards 2", "line 1"),
        ("listen = '0.0.0.0:7000'", "GRADWIRE_TOKEN"),
        ("tls-cert = '/nowhere.crt'\ntls-key = '/nowhere.key'", "/nowhere.crt"),
        ("config = 'other.toml'", "no such setting"),
    ];
    for (text, said) in cases {
        std::fs::write(&path, text).unwrap();
        let checked = command(&["config", "--check", path.to_str().unwrap()]).output().unwrap();
        let error = String::from_utf8(checked.stderr).unwrap();
        assert!(checked.status.code() == Some(1) && error.contains(said), "{text}: {error}");
    }
    let missing = command(&["serve", "--config", "/nowhere.toml"]).output().unwrap();
    assert!(String::from_utf8(missing.stderr).unwrap().contains("/nowhere.toml"));
}

#[test]
fn a_coordinator_tells_who_is_there_while_servers_join_and_die() {
    let flags = ["--shards", "2", "--log", "warn,gradwire_ps=info", "--log-format", "json"];
    let mut coordinating = watched_coordinator(&flags);
    let (coordinator, admin) = (&mut coordinating.0, &*coordinating.1);
    await_values(admin, &[("up", "", 1.0), ("leads", "", 1.0), ("epoch", "", 0.0), ("replicas", "", 1.0)]);
    await_values(admin, &[("shards", "without_owner", 2.0), ("servers", "spare", 0.0)]);
    let join = ["--coordinator", &coordinator.addresses[0], "--log", "warn"];
    let mut first = Running::start_seats(2, &join);
    await_values(admin, &[("servers", "spare", 1.0), ("spare_seats", "", 2.0), ("shards", "without_owner", 2.0)]);
    let _second = Running::start_seats(2, &join);
    let begun = [("servers", "serving", 2.0), ("servers", "spare", 0.0), ("shards", "whole", 2.0)];
    await_values(admin, &[&begun[..], &[("shards", "without_owner", 0.0), ("fail_overs_total", "", 0.0)]].concat());
    first.child.kill().unwrap();
    let dead = [("servers", "serving", 1.0), ("shards", "short", 2.0), ("shards", "whole", 0.0)];
    await_values(admin, &[&dead[..], &[("fail_overs_total", "", 1.0), ("losses_total", "", 0.0)]].concat());
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(admin, path), ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned()));
    }
    coordinator.signal("-TERM");
    let (code, _, log) = coordinator.end();
    assert_eq!(code, Some(0), "{log}");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said = |text: &str, level: &str| lines.iter().any(|it| it["fields"]["message"] == text && it["level"] == level);
    assert!(said("map", "INFO") && said("a backup is complete", "INFO") && said("stopped", "INFO"), "{log}");
    assert!(said("a server has lost another", "WARN"), "{log}");
}

#[test]
fn of_several_coordinators_one_tells_that_it_leads() {
    let etcd = RunningEtcd::start();
    let endpoint = etcd.endpoint();
    let flags = ["--etcd", &endpoint, "--cluster", "watched", "--log", "warn"];
    let first = watched_coordinator(&flags);
    await_values(&first.1, &[("leads", "", 1.0), ("shards", "without_owner", 1.0)]);
    let second = watched_coordinator(&flags);
    await_values(&second.1, &[("up", "", 1.0), ("leads", "", 0.0)]);
    // It stands by, which is what it is for.
    assert!(get(&second.1, "/readyz").0.contains("200"));
    first.0.signal("-TERM");
    await_values(&second.1, &[("leads", "", 1.0), ("epoch", "", 0.0)]);
}

#[test]
fn a_coordinator_takes_its_flags_from_a_file_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("coordinator.toml");
    let file = path.to_str().unwrap();
    std::fs::write(&path, "shards = 3\nreplicas = 2\nlog = 'debug'\nlog-format = 'json'\n").unwrap();
    let good = command(&["config", "--check", file, "--of", "coordinate"]).output().unwrap();
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    let (mut coordinator, admin) = {
        let mut all = command(&["coordinate", "--config", file, "--json", "--admin", "127.0.0.1:0", "--replicas", "0"]);
        // What the environment says wins over the file, and what means nothing is told.
        let mut child = all.env("GRADWIRE_LOG", "info").env("GRADWIRE_TOKN", "x").spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.next().unwrap().unwrap();
        let line: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let admin = line["admin"].as_str().unwrap().to_owned();
        (Running { child, addresses: Vec::new(), lines }, admin)
    };
    await_values(&admin, &[("replicas", "", 0.0), ("shards", "without_owner", 3.0)]);
    coordinator.signal("-INT");
    let (code, _, log) = coordinator.end();
    assert_eq!(code, Some(0), "{log}");
    let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert!(first["level"] == "WARN", "{log}");
    let said = first["fields"]["message"].as_str().unwrap();
    assert!(said.starts_with("GRADWIRE_TOKN is set") && said.ends_with("did you mean GRADWIRE_TOKEN?"), "{said}");
    for (text, said) in [
        ("shard = 3", "did you mean shards?"),
        ("replicas = 9", "--replicas"),
        ("listen = '0.0.0.0:1'", "GRADWIRE_TOKEN"),
    ] {
        std::fs::write(&path, text).unwrap();
        let checked = command(&["config", "--check", file, "--of", "coordinate"]).output().unwrap();
        let error = String::from_utf8(checked.stderr).unwrap();
        assert!(checked.status.code() == Some(1) && error.contains(said), "{text}: {error}");
    }
}

#[test]
fn a_variable_that_means_nothing_is_told_by_every_command() {
    let asked = command(&["status", "--servers", "127.0.0.1:1"]).env("GRADWIRE_TRANSPROT", "tcp").output().unwrap();
    let error = String::from_utf8(asked.stderr).unwrap();
    assert!(error.starts_with("gradwire-ps: GRADWIRE_TRANSPROT is set, but means nothing"), "{error}");
    assert!(error.contains("did you mean GRADWIRE_TRANSPORT?"), "{error}");
}
