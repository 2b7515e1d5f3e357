//! Does: kills coordinators and etcd itself under workers that push: who serves what outlives both.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../../transport/tests/authority/mod.rs"]
mod authority;
mod running;
// The same etcd that the room of etcd is tested with.
#[path = "../src/etcd/running.rs"]
mod running_etcd;

use authority::Authority;
use gradwire_ps::{Client, ClientSettings, DType, DenseTable, Mode, Recovery, TableOptions};
use gradwire_transport::Region;
use running_etcd::{EtcdFiles, RunningEtcd};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Option<Duration> = Some(Duration::from_secs(60));
const ELEMENTS: usize = 1000;

/// A process of the binary that has told its address. Killed at the end.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut command = running::command(arguments);
        let mut child =
            command.args(["--json", "--log", "info"]).stderr(std::process::Stdio::inherit()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let address = line.get("address").or_else(|| line.get("coordinator")).unwrap();
        Self { child, address: address.as_str().unwrap().to_owned() }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn terminate(&mut self) {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn coordinator(etcd: &RunningEtcd, listen: &str) -> Process {
    Process::start(&["coordinate", "--listen", listen, "--etcd", &etcd.endpoint(), "--cluster", "test"])
}

fn server(coordinators: &str) -> Process {
    Process::start(&["serve", "--shards", "1", "--coordinator", coordinators])
}

fn table(coordinators: &str) -> (Client, DenseTable) {
    let at: Vec<String> = coordinators.split(',').map(str::to_owned).collect();
    let (reconnect, timeout) = (Duration::from_secs(40), Duration::from_secs(50));
    let client = Client::through(&at, ClientSettings { reconnect, timeout, ..ClientSettings::default() }).unwrap();
    let options =
        TableOptions { mode: Mode::Async, recovery: Recovery::Replicate { copies: 1 }, ..TableOptions::default() };
    let table = client.dense("ones", &[ELEMENTS], DType::F32, options).unwrap();
    (client, table)
}

fn push(table: &DenseTable) {
    let ones = Region::from_vec(1f32.to_le_bytes().repeat(ELEMENTS));
    table.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG).unwrap();
}

fn assert_all(table: &DenseTable, expected: f32) {
    let out: Arc<Region> = Region::from_vec(vec![0; ELEMENTS * 4]);
    table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
    let all = out.read(0..out.len()).unwrap();
    assert!(all.as_chunks().0.iter().all(|&bytes| f32::from_le_bytes(bytes) == expected));
}

#[test]
fn another_coordinator_goes_on_where_one_dies() {
    let etcd = RunningEtcd::start();
    let mut first = coordinator(&etcd, "127.0.0.1:0");
    let mut second = coordinator(&etcd, "127.0.0.1:0");
    let both = format!("{},{}", first.address, second.address);
    let mut servers = [server(&both), server(&both)];
    let (_client, ones) = table(&both);
    push(&ones);
    // Whichever led: the other one does in the end, and knows who serves what.
    first.kill();
    push(&ones);
    servers[0].kill();
    push(&ones);
    let _third = server(&both);
    let again = coordinator(&etcd, &first.address);
    // A signal gives the lead back: nobody waits for a lease.
    second.terminate();
    assert_all(&table(&both).1, 3.0);
    servers[1].kill();
    push(&ones);
    assert_all(&ones, 4.0);
    drop(again);
}

#[test]
fn etcd_may_be_gone_for_a_while_and_stops_no_push() {
    let mut etcd = RunningEtcd::start();
    let only = coordinator(&etcd, "127.0.0.1:0");
    let mut servers = [server(&only.address), server(&only.address)];
    let (_client, ones) = table(&only.address);
    push(&ones);
    etcd.kill();
    push(&ones);
    // Nobody may decide that the other one takes over, until etcd is there again.
    servers[0].kill();
    etcd.restart();
    push(&ones);
    assert_all(&ones, 3.0);
    let mut other = running::command(&["coordinate", "--shards", "7", "--etcd", &etcd.endpoint(), "--cluster", "test"]);
    let mut other = other.spawn().unwrap();
    drop(only);
    let mut log = String::new();
    other.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(!other.wait().unwrap().success());
    assert!(
        log.contains("has 1 shards with 1 copies of each, and its coordinator is to have 7 with 1: see --shards"),
        "{log}"
    );
}

#[test]
fn a_coordinator_that_answers_nothing_keeps_nobody_from_the_next() {
    let etcd = RunningEtcd::start();
    // It takes connections, and says nothing: as a host that is gone, for who has not noticed.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let live = coordinator(&etcd, "127.0.0.1:0");
    let both = format!("{},{}", silent.local_addr().unwrap(), live.address);
    let mut servers = [server(&both), server(&both)];
    let (_client, ones) = table(&both);
    push(&ones);
    servers[0].kill();
    push(&ones);
    assert_all(&ones, 2.0);
}

#[test]
fn a_drain_outlives_the_coordinator_that_heard_it() {
    let etcd = RunningEtcd::start();
    let mut first = coordinator(&etcd, "127.0.0.1:0");
    let mut second = coordinator(&etcd, "127.0.0.1:0");
    let both = format!("{},{}", first.address, second.address);
    let servers = [server(&both), server(&both)];
    let (_client, ones) = table(&both);
    push(&ones);
    let at: Vec<String> = both.split(',').map(str::to_owned).collect();
    let patient = || ClientSettings { timeout: Duration::from_secs(50), ..ClientSettings::default() };
    Client::drain(&at, &servers[1].address, patient()).unwrap();
    // Whichever led, another one does in the end.
    first.kill();
    let _again = coordinator(&etcd, &first.address);
    second.kill();
    let third = server(&both);
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < until, "the third server does not become the backup");
        std::thread::sleep(Duration::from_millis(100));
        let Ok(map) = Client::map_of(&at, patient()) else { continue };
        let seats = &map.shards[0];
        let mut all = seats.primary.iter().chain(&seats.backups).chain(&seats.candidate);
        assert!(all.all(|who| who.address != servers[1].address), "{seats:?}");
        if seats.backups.iter().any(|who| who.address == third.address) {
            break;
        }
    }
    push(&ones);
    assert_all(&ones, 2.0);
}

#[test]
fn coordinators_reach_an_etcd_that_speaks_tls_and_asks_who_they_are() {
    let authority = Authority::new();
    let (cert, key) = authority.sign(&["127.0.0.1"], 2200);
    let etcd = RunningEtcd::start_with(EtcdFiles { cert, key, ca: authority.ca() });
    let (cert, key) = authority.sign(&["coordinator.example"], 2200);
    let [ca, cert, key] = [authority.ca(), cert, key].map(|file| file.to_str().unwrap().to_owned());
    let (endpoint, other) = (etcd.endpoint(), Authority::new());
    let stranger = other.ca();
    assert!(endpoint.starts_with("https://"));
    let with = |more: &[&str]| {
        let flags = ["coordinate", "--listen", "127.0.0.1:0", "--cluster", "test", "--etcd", &endpoint];
        flags.iter().chain(more).map(|&flag| flag.to_owned()).collect::<Vec<String>>()
    };
    let start = |flags: &[String]| Process::start(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    let known = with(&["--etcd-ca", &ca, "--etcd-cert", &cert, "--etcd-key", &key]);
    let mut first = start(&known);
    let second = start(&known);
    let both = format!("{},{}", first.address, second.address);
    let _servers = [server(&both), server(&both)];
    let (_client, ones) = table(&both);
    push(&ones);
    first.kill();
    push(&ones);
    assert_all(&table(&second.address).1, 2.0);
    // Who trusts another authority, and who cannot prove itself, leads nothing and says why.
    for (flags, why) in [
        (with(&["--etcd-ca", stranger.to_str().unwrap(), "--etcd-cert", &cert, "--etcd-key", &key]), "certificate"),
        (with(&["--etcd-ca", &ca]), "ertificate"),
    ] {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut refused = running::command(&flags).args(["--log", "info"]).spawn().unwrap();
        let mut log = BufReader::new(refused.stderr.take().unwrap()).lines().map_while(Result::ok);
        let told = log.find(|line| line.contains("no etcd answers"));
        refused.kill().unwrap();
        refused.wait().unwrap();
        assert!(told.as_ref().is_some_and(|line| line.contains(why) && line.contains(&endpoint)), "{told:?}");
    }
}
