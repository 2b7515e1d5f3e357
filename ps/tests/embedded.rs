//! Does: servers that carry their coordinator: each in turn is killed while workers push ones, and every push counts once.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod running;
// The same etcd that the room of etcd is tested with.
#[path = "../src/etcd/running.rs"]
#[allow(dead_code)] // Not every test needs all of it.
mod running_etcd;

use gradwire_ps::{Client, ClientSettings, ClusterMap, DType, DenseTable, Mode, Recovery, Seating, TableOptions};
use gradwire_transport::Region;
use running::{Running, command};
use running_etcd::RunningEtcd;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LONG: Option<Duration> = Some(Duration::from_secs(60));
const ELEMENTS: usize = 20_000;
const WORKERS: u32 = 3;
const QUIET: [&str; 2] = ["--log", "error"];

fn settings(worker: Option<u32>) -> ClientSettings {
    let (reconnect, timeout) = (Duration::from_secs(40), Duration::from_secs(50));
    ClientSettings { worker, reconnect, timeout, ..ClientSettings::default() }
}

fn table(client: &Client) -> DenseTable {
    let recovery = Recovery::Replicate { copies: 1 };
    let options = TableOptions { mode: Mode::Async, recovery, ..TableOptions::default() };
    client.dense("ones", &[ELEMENTS], DType::F32, options).unwrap()
}

/// Workers that push ones until they are told to stop.
struct Load {
    at: Vec<String>,
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Load {
    fn begin(at: &[&str]) -> Self {
        let at: Vec<String> = at.iter().map(|&at| at.to_owned()).collect();
        let (done, stop): (Arc<AtomicU64>, Arc<AtomicBool>) = Default::default();
        let workers = (0..WORKERS).map(|worker| {
            let client = Client::through(&at, settings(Some(worker))).unwrap();
            let (done, stop) = (Arc::clone(&done), Arc::clone(&stop));
            std::thread::spawn(move || {
                let (table, ones) = (table(&client), Region::from_vec(1f32.to_le_bytes().repeat(ELEMENTS)));
                while !stop.load(Ordering::SeqCst) {
                    table.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG).unwrap();
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        });
        let workers = workers.collect();
        Self { at, done, stop, workers }
    }

    /// Waits for so many pushes more.
    fn go_on(&self, pushes: u64) {
        let wanted = self.done.load(Ordering::SeqCst) + pushes;
        await_that("pushes go on", || self.done.load(Ordering::SeqCst) >= wanted);
    }

    /// Ends it: all pushes are there, and none twice.
    fn end_exact(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.workers.into_iter().for_each(|worker| worker.join().unwrap());
        let client = Client::through(&self.at, settings(None)).unwrap();
        let (table, out) = (table(&client), Region::zeroed(ELEMENTS * 4));
        table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
        let expected = self.done.load(Ordering::SeqCst) as f32;
        let all = out.read(0..out.len()).unwrap();
        let wrong = all.as_chunks().0.iter().filter(|&&bytes| f32::from_le_bytes(bytes) != expected).count();
        assert_eq!(wrong, 0, "{wrong} of {ELEMENTS} differ from {expected}");
    }
}

/// Nobody tells when another process has got so far: it is asked again and again.
fn await_that(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(50);
    while !is() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn kill(server: &mut Running) {
    server.child.kill().unwrap();
    server.child.wait().unwrap();
}

fn map_of(at: &str) -> ClusterMap {
    let all: Vec<String> = at.split(',').map(str::to_owned).collect();
    Client::map_of(&all, settings(None)).unwrap()
}

fn joining(seats: usize, at: &str) -> Running {
    Running::start_seats(seats, &["--coordinator", at, QUIET[0], QUIET[1]])
}

/// A server that carries a coordinator of clusters of two shards, at `at`.
fn carrying(at: &str, more: &[&str]) -> (Running, String) {
    Running::start_carrying(2, &[&["--coordinate", at, "--cluster-shards", "2"], more].concat())
}

/// What an admin address answers: the status, and the body.
fn get(admin: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(admin).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {admin}\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().to_owned(), body.to_owned())
}

fn admin_of(server: &mut Running) -> String {
    let line: serde_json::Value = serde_json::from_str(&server.lines.next().unwrap().unwrap()).unwrap();
    line["admin"].as_str().unwrap().to_owned()
}

#[test]
fn another_server_than_the_one_that_carries_the_coordinator_may_be_killed() {
    let (first, at) = carrying("127.0.0.1:0", &QUIET);
    let mut other = joining(2, &at);
    let load = Load::begin(&[&at]);
    load.go_on(20);
    kill(&mut other);
    load.go_on(20);
    // A new one gets copies.
    let third = joining(2, &at);
    await_that("copies come", || map_of(&at).shards.iter().all(|shard| !shard.backups.is_empty()));
    load.go_on(20);
    // What it serves is handed over; its coordinator stays.
    let drain = ["drain", "--coordinator", &at, "--server", &first.addresses[0]];
    let said = command(&drain).output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let led = map_of(&at).addresses().unwrap();
    assert!(led.iter().all(|address| third.addresses.contains(address)), "{led:?}");
    load.go_on(20);
    load.end_exact();
}

#[test]
fn the_server_that_carries_it_may_be_killed_and_the_other_takes_over_once_it_is_back() {
    let (mut first, at) = carrying("127.0.0.1:0", &QUIET);
    let other = joining(2, &at);
    let load = Load::begin(&[&at]);
    load.go_on(20);
    let before = map_of(&at);
    let led = before.addresses().unwrap();
    assert!(led.iter().any(|address| first.addresses.contains(address)), "{led:?} {:?}", first.addresses);
    kill(&mut first);
    // Nobody decides now. What was in its memory is gone: only the other one can have what was pushed.
    let (mut again, same) = carrying(&at, &["--admin", "127.0.0.1:0", QUIET[0], QUIET[1]]);
    assert_eq!(same, at);
    load.go_on(20);
    let map = map_of(&at);
    assert!(map.epoch > before.epoch);
    let led = map.addresses().unwrap();
    assert!(led.iter().all(|address| other.addresses.contains(address)), "{led:?} {:?}", other.addresses);
    let metrics = get(&admin_of(&mut again), "/metrics").1;
    assert!(metrics.contains("\ngradwire_coordinator_fail_overs_total 1\n"), "{metrics}");
    load.end_exact();
}

#[test]
fn without_copies_too_a_server_that_lived_keeps_its_shard_though_the_one_with_the_coordinator_begins_anew() {
    let alone = ["--replicas", "0", "--log", "error"];
    let (mut first, at) = carrying("127.0.0.1:0", &alone);
    let other = joining(2, &at);
    await_that("the cluster begins", || map_of(&at).addresses().is_some());
    let of_other = |map: &ClusterMap| {
        let all = map.shards.iter().map(|shard| shard.primary.clone());
        all.map(|who| who.filter(|who| other.addresses.contains(&who.address))).collect::<Vec<_>>()
    };
    let before = of_other(&map_of(&at));
    assert!(before.iter().flatten().count() == 1, "{before:?}");
    kill(&mut first);
    // It is the first to join itself, with room for all shards.
    let _again = carrying(&at, &alone);
    await_that("the coordinator knows a map", || !map_of(&at).shards.is_empty());
    assert_eq!(of_other(&map_of(&at)), before);
}

#[test]
fn one_that_is_told_to_end_hands_over_first_and_takes_its_coordinator_with_it() {
    for signal in ["-TERM", "-INT"] {
        let (mut first, at) = carrying("127.0.0.1:0", &[]);
        let _other = joining(2, &at);
        let load = Load::begin(&[&at]);
        load.go_on(20);
        first.signal(signal);
        let (code, _, log) = first.end();
        assert_eq!(code, Some(0), "{log}");
        for said in ["all shards are handed over", "stopped", "the cluster's only coordinator"] {
            assert!(log.contains(said), "{said} is missing in {log}");
        }
        assert!(TcpStream::connect(&at).is_err(), "it still listens");
        load.go_on(20);
        // Who counts asks where the shards are.
        let _again = carrying(&at, &QUIET);
        load.end_exact();
    }
}

/// Addresses that were free a moment ago.
fn free<const N: usize>() -> [String; N] {
    let taken = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    taken.map(|listener| listener.local_addr().unwrap().to_string())
}

#[test]
fn with_etcd_each_server_carries_one_and_whichever_leads_may_be_killed() {
    let etcd = RunningEtcd::start();
    let (endpoint, at) = (etcd.endpoint(), free::<3>());
    let all = at.join(",");
    let each = |at: &String| {
        let more = ["--coordinator", &all, "--etcd", &endpoint, "--cluster", "test", "--admin", "127.0.0.1:0"];
        let (mut server, _) = carrying(at, &[&more[..], &QUIET].concat());
        let admin = admin_of(&mut server);
        (server, admin)
    };
    let mut servers: Vec<(Running, String)> = at.iter().map(each).collect();
    let load = Load::begin(&at.each_ref().map(String::as_str));
    load.go_on(20);
    // Copies that are on their way to the third are no matter: of the two that are left, one has each shard.
    for round in 0..2 {
        let leads =
            |(_, admin): &(Running, String)| get(admin, "/metrics").1.contains("gradwire_coordinator_leads 1\n");
        await_that("one leads", || servers.iter().any(leads));
        let leader = servers.iter().position(leads).unwrap();
        let (mut dead, _) = servers.remove(leader);
        let before = map_of(&all);
        let its = dead.addresses.clone();
        let has = |who: &Seating| its.contains(&who.address);
        let parts = before.shards.iter().flat_map(|shard| shard.primary.iter().chain(&shard.backups));
        assert!(parts.filter(|who| has(who)).count() > 0, "it has no part: {before:?}");
        kill(&mut dead);
        load.go_on(20);
        let led = map_of(&all).shards;
        assert!(led.iter().all(|shard| !shard.primary.as_ref().is_some_and(has)), "{led:?}");
        if round == 0 {
            // It comes back, and gets copies before the next one dies.
            servers.push(each(&at[leader]));
            let whole =
                |(_, admin): &(Running, String)| get(admin, "/metrics").1.contains("shards{state=\"whole\"} 2\n");
            await_that("copies come", || servers.iter().any(whole));
        }
    }
    load.end_exact();
}

#[test]
fn one_admin_address_tells_of_both_and_a_coordinator_alone_ends_no_server() {
    let etcd = RunningEtcd::start();
    let (endpoint, [at, other]) = (etcd.endpoint(), free());
    let both = format!("{at},{other}");
    let more = ["--coordinator", &both, "--etcd", &endpoint, "--cluster", "admin", "--admin", "127.0.0.1:0"];
    let (mut first, _) = carrying(&at, &[&more[..], &["--replicas", "0", "--log", "warn"]].concat());
    let admin = admin_of(&mut first);
    await_that("shards are led", || get(&admin, "/metrics").1.contains("shards{state=\"whole\"} 2\n"));
    let metrics = get(&admin, "/metrics").1;
    for line in
        ["gradwire_up{shard=\"1\"} 1", "gradwire_coordinator_up 1", "gradwire_coordinator_servers{state=\"serving\"} 1"]
    {
        assert!(metrics.contains(&format!("{line}\n")), "{line} is missing in\n{metrics}");
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(&admin, path), ("200".to_owned(), "ok\n".to_owned()));
    }
    // The next to lead is told other flags than the cluster has: its coordinator ends, and says why.
    let flags = ["--coordinate", &other, "--cluster-shards", "7", "--replicas", "0", "--log", "warn"];
    let (mut second, _) = Running::start_carrying(1, &[&more[..], &flags].concat());
    let admin = admin_of(&mut second);
    kill(&mut first);
    await_that("it ends", || get(&admin, "/metrics").1.contains("gradwire_coordinator_up 0\n"));
    assert_eq!(get(&admin, "/readyz"), ("503".to_owned(), "no answer from the coordinator\n".to_owned()));
    assert_eq!(get(&admin, "/healthz"), ("200".to_owned(), "ok\n".to_owned()));
    assert!(get(&admin, "/metrics").1.contains("gradwire_up{shard=\"0\"} 1\n"));
    kill(&mut second);
    let mut log = String::new();
    second.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    let said = ["the coordinator has ended", "has 2 shards with 0 copies of each", "--cluster-shards"];
    assert!(said.iter().all(|part| log.contains(part)) && !log.contains("only coordinator"), "{log}");
}

#[test]
fn it_says_at_once_what_its_death_means_and_loudly_where_there_are_copies() {
    for (replicas, level, waits) in [("1", "WARN", true), ("0", "INFO", false)] {
        let (mut server, at) = carrying("127.0.0.1:0", &["--replicas", replicas, "--drain-timeout", "1s"]);
        server.signal("-TERM");
        let (_, _, log) = server.end();
        let said: Vec<&str> = log.lines().filter(|line| line.contains("the cluster's only coordinator")).collect();
        assert_eq!(said.len(), 1, "{log}");
        let said = said[0];
        assert!(said.contains(level) && said.contains(&at), "{said}");
        assert_eq!(said.contains("with --etcd every server may carry one"), waits, "{said}");
    }
    let help = String::from_utf8(command(&["serve", "--help"]).output().unwrap().stdout).unwrap();
    for said in ["--coordinate <", "--cluster-shards <", "--replicas <", "--etcd <", "no backup takes over"] {
        assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains(said), "{said} is missing in\n{help}");
    }
}

/// What a command says that ends at once, and in failure.
fn refusal(arguments: &[&str]) -> String {
    let mut child = command(arguments).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code().map(|code| code > 0), Some(true), "{arguments:?} goes on, or succeeds");
    String::from_utf8(ended.stderr).unwrap()
}

#[test]
fn flags_that_do_not_go_together_are_refused_with_what_to_do() {
    let etcd = ["--etcd", "http://127.0.0.1:1"];
    let at = ["--coordinate", "127.0.0.1:7000"];
    let mut cases = vec![
        (
            at.to_vec(),
            vec!["--coordinator", "127.0.0.1:7000"],
            "leave --coordinator out, or let several agree by --etcd",
        ),
        (
            at.to_vec(),
            vec!["--coordinator", "127.0.0.1:7001"],
            "leave --coordinator out, or let several agree by --etcd",
        ),
        (at.to_vec(), etcd.to_vec(), "this one among them as 127.0.0.1:7000"),
        (
            at.to_vec(),
            [&etcd[..], &["--coordinator", "127.0.0.1:7001"]].concat(),
            "this one among them as 127.0.0.1:7000",
        ),
        (
            at.to_vec(),
            [&etcd[..], &["--advertise", "ps1.example", "--coordinator", "127.0.0.1:7000"]].concat(),
            "this one among them as ps1.example:7000",
        ),
        (vec!["--coordinate", "127.0.0.1:0"], etcd.to_vec(), "choose one"),
        (vec!["--coordinate", "10.0.0.1:7000"], vec![], "GRADWIRE_TOKEN"),
        (vec!["--coordinate", "0.0.0.0:7000"], vec!["--token", "x"], "--advertise"),
        (at.to_vec(), vec!["--checkpoint-dir", "/nowhere", "--checkpoint-every", "10m"], "gradwire-ps snapshot"),
        (at.to_vec(), vec!["--checkpoint-dir", "/nowhere", "--restore", "a", "--replicas", "0"], "--replicas 1"),
        (at.to_vec(), vec!["--cluster-shards", "5000"], "4096"),
    ];
    for alone in [&["--replicas", "2"][..], &["--cluster-shards", "2"], &etcd] {
        cases.push((alone.to_vec(), vec![], "--coordinate"));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ps.toml");
    for (first, more, said) in cases {
        let flags = [first, more].concat();
        let error = refusal(&[&["serve"], &flags[..]].concat());
        assert!(error.contains(said), "{flags:?}: {error}");
        // A file says so before anything is started.
        let keys: String = flags.chunks(2).map(|pair| format!("{} = {:?}\n", &pair[0][2..], pair[1])).collect();
        std::fs::write(&path, &keys).unwrap();
        let error = refusal(&["config", "--check", path.to_str().unwrap()]);
        assert!(error.contains(said), "{keys}: {error}");
    }
    // In the environment it is there for coordinators, if any.
    let mut server = command(&["serve", "--json"]);
    let mut child = server.env("GRADWIRE_ETCD", "http://127.0.0.1:1").spawn().unwrap();
    let line = BufReader::new(child.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(line.contains("\"shard\":0"), "{line}");
}

#[test]
fn a_file_and_certificates_do_for_both() {
    let file = |name: &str| format!("{}/../python/tests/tls/{name}", env!("CARGO_MANIFEST_DIR"));
    let (ca, cert, key) = (file("ca.crt"), file("end.crt"), file("end.key"));
    let sealed = ["--tls-cert", &*cert, "--tls-key", &key, "--tls-ca", &ca, "--tls-client-ca", &ca];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ps.toml");
    std::fs::write(&path, "coordinate = '127.0.0.1:0'\ncluster-shards = 1\nreplicas = 1\ntoken = 's3cret'\n").unwrap();
    let (_first, at) = Running::start_carrying(1, &[&["--config", path.to_str().unwrap()], &sealed[..]].concat());
    let others = ["--coordinator", &at, "--token", "s3cret"];
    let _second = Running::start_seats(1, &[&others[..], &sealed].concat());
    let ask = |more: &[&str]| {
        let said = command(&[&["status", "--coordinator", &at], more].concat()).output().unwrap();
        String::from_utf8(if said.status.success() { said.stdout } else { said.stderr }).unwrap()
    };
    let known = [&["--token", "s3cret"], &sealed[..6]].concat();
    await_that("both have joined", || ask(&known).contains("missing: nothing"));
    assert!(ask(&["--token", "s3cret"]).contains("TLS"));
    assert!(ask(&[&["--token", "other"], &sealed[..6]].concat()).contains("GRADWIRE_TOKEN"));
}
