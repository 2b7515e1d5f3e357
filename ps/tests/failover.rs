//! Does: kills real servers of a cluster while workers push ones, and counts: N workers pushing K times make N·K, every time.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_ps::{
    Client, ClientSettings, Codec, Compression, DType, Mode, PsError, Recovery, SparseOptions, TableOptions,
};
use gradwire_transport::Region;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const LONG: Option<Duration> = Some(Duration::from_secs(60));
const WORKERS: u32 = 3;
const ELEMENTS: usize = 20_000;
const ROWS: u64 = 500;
const DIM: usize = 4;

/// A process of the binary, killed at the end. Its log is kept for who looks why a test failed.
struct Process(Child);

impl Process {
    /// Starts it; the addresses that it prints.
    fn start(lines: usize, arguments: &[&str]) -> (Self, Vec<String>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"));
        command.args(arguments).env_remove("GRADWIRE_TOKEN").env_remove("GRADWIRE_LOG");
        command.args(["--json", "--token", "s3cret", "--log", "warn"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines().take(lines);
        let address = |line: std::io::Result<String>| {
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            let address = line.get("address").or_else(|| line.get("coordinator")).unwrap();
            address.as_str().unwrap().to_owned()
        };
        let addresses = said.map(address).collect();
        (Self(child), addresses)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A coordinator and servers of two seats each.
struct House {
    copies: u32,
    coordinator: Process,
    at: Vec<String>,
    servers: Vec<Process>,
}

impl House {
    fn new(servers: usize) -> Self {
        Self::with_copies(1, servers)
    }

    fn with_copies(copies: u32, servers: usize) -> Self {
        let replicas = copies.to_string();
        let (coordinator, at) = Process::start(1, &["coordinate", "--shards", "2", "--replicas", &replicas]);
        let mut house = Self { copies, coordinator, at, servers: Vec::new() };
        (0..servers).for_each(|_| house.add_server());
        house
    }

    fn add_server(&mut self) {
        let (server, _) = Process::start(2, &["serve", "--shards", "2", "--coordinator", &self.at[0]]);
        self.servers.push(server);
    }

    fn client(&self, worker: Option<u32>) -> Client {
        Client::through(&self.at, settings(worker)).unwrap()
    }
}

fn settings(worker: Option<u32>) -> ClientSettings {
    ClientSettings {
        token: Some("s3cret".into()),
        worker,
        reconnect: Duration::from_secs(20),
        timeout: Duration::from_secs(50),
        ..ClientSettings::default()
    }
}

fn region(count: usize) -> Arc<Region> {
    Region::from_vec(1f32.to_le_bytes().repeat(count))
}

fn floats(region: &Arc<Region>) -> Vec<f32> {
    let all = region.read(0..region.len()).unwrap();
    all.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn ids() -> Arc<Region> {
    Region::from_vec((0..ROWS).flat_map(u64::to_le_bytes).collect())
}

fn dense(mode: Mode) -> TableOptions {
    TableOptions { mode, recovery: Recovery::Replicate { copies: 1 }, ..TableOptions::default() }
}

fn sparse(mode: Mode) -> SparseOptions {
    // Small integers are exact in both.
    let compression = Compression { push: Codec::Bf16, pull: Codec::F16 };
    SparseOptions { mode, recovery: Recovery::Replicate { copies: 1 }, compression, ..SparseOptions::default() }
}

/// Pushes ones to both tables `times` times; the longest that one push took.
fn push_ones(client: &Client, (mode, copies): (Mode, u32), times: usize, done: &AtomicU64) -> Duration {
    let recovery = Recovery::Replicate { copies };
    let table = client.dense("ones", &[ELEMENTS], DType::F32, TableOptions { recovery, ..dense(mode) }).unwrap();
    let rows = client.sparse("rows", DIM, DType::F32, SparseOptions { recovery, ..sparse(mode) }).unwrap();
    let (ones, ids, gradients) = (region(ELEMENTS), ids(), region(ROWS as usize * DIM));
    let mut longest = Duration::ZERO;
    for _ in 0..times {
        let began = Instant::now();
        let first = table.push(ones.read(0..ones.len()).unwrap()).unwrap();
        let ids = ids.read(0..ids.len()).unwrap();
        let second = rows.push(&ids, &gradients.read(0..gradients.len()).unwrap()).unwrap();
        first.wait(LONG).unwrap();
        second.wait(LONG).unwrap();
        longest = longest.max(began.elapsed());
        done.fetch_add(1, Ordering::SeqCst);
    }
    client.barrier("pushed", WORKERS, LONG).unwrap();
    longest
}

/// What the tables hold.
fn values(client: &Client, (mode, copies): (Mode, u32)) -> (Vec<f32>, Vec<f32>) {
    let recovery = Recovery::Replicate { copies };
    let table = client.dense("ones", &[ELEMENTS], DType::F32, TableOptions { recovery, ..dense(mode) }).unwrap();
    let rows = client.sparse("rows", DIM, DType::F32, SparseOptions { recovery, ..sparse(mode) }).unwrap();
    let (out, of_rows, ids) = (region(ELEMENTS), region(ROWS as usize * DIM), ids());
    table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
    let into = of_rows.write(0..of_rows.len()).unwrap();
    rows.pull(&ids.read(0..ids.len()).unwrap(), into).unwrap().wait(LONG).unwrap();
    (floats(&out), floats(&of_rows))
}

/// Kills servers `victims` of a house after `after` pushes of all workers; how long the longest push took.
fn kill(mut house: House, mode: Mode, times: usize, victims: &[usize], after: u64) -> Duration {
    let (done, copies) = (Arc::new(AtomicU64::new(0)), house.copies);
    let begun = Instant::now();
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (client, done) = (house.client(Some(worker)), Arc::clone(&done));
            std::thread::spawn(move || push_ones(&client, (mode, copies), times, &done))
        })
        .collect();
    while done.load(Ordering::SeqCst) < after {
        assert!(begun.elapsed() < Duration::from_secs(50), "no push ends");
        std::thread::yield_now();
    }
    victims.iter().for_each(|&victim| house.servers[victim].0.kill().unwrap());
    let longest = workers.into_iter().map(|worker| worker.join().unwrap()).max().unwrap();
    let expected = (WORKERS as usize * times) as f32;
    let (dense, sparse) = values(&house.client(Some(0)), (mode, copies));
    for (what, values) in [("dense", dense), ("sparse", sparse)] {
        let wrong = values.iter().filter(|&&value| value != expected).count();
        assert_eq!(wrong, 0, "{mode}, {what}: {wrong} of {} differ from {expected}", values.len());
    }
    longest
}

#[test]
fn pushes_count_once_though_a_server_is_killed_whatever_the_mode() {
    let bounded = Mode::Ssp { workers: WORKERS, staleness: 1 };
    // More than a test needs are asked for by who measures: GRADWIRE_KILLS=50 cargo test --test failover count -- --nocapture
    let kills = std::env::var("GRADWIRE_KILLS").map_or(4, |kills| kills.parse().unwrap());
    let mut pauses = Vec::new();
    for n in 0..kills {
        let mode = [Mode::Async, Mode::Sync { workers: WORKERS }, bounded][n % 3];
        // Either server, anywhere between the first pushes and the last ones, without an order.
        let mixed = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        pauses.push(kill(House::new(2), mode, 40, &[(mixed >> 60) as usize % 2], 1 + (mixed >> 40) % 110));
    }
    pauses.sort_unstable();
    println!("{kills} kills, all exact; longest push: median {:?}, worst {:?}", pauses[kills / 2], pauses[kills - 1]);
}

#[test]
fn with_two_copies_two_servers_may_die_at_once() {
    for (n, victims) in [[0, 1], [1, 2], [2, 0]].iter().enumerate() {
        let mode = [Mode::Async, Mode::Sync { workers: WORKERS }, Mode::Ssp { workers: WORKERS, staleness: 1 }][n];
        kill(House::with_copies(2, 3), mode, 30, victims, 5 + 20 * n as u64);
    }
}

#[test]
fn a_table_of_two_copies_is_refused_where_there_is_one() {
    let house = House::new(2);
    let client = house.client(Some(0));
    let options = TableOptions { recovery: Recovery::Replicate { copies: 2 }, ..TableOptions::default() };
    let error = client.dense("ones", &[ELEMENTS], DType::F32, options).err().unwrap();
    assert!(matches!(error, PsError::Refused { .. }) && error.to_string().contains("--replicas 2"), "{error}");
}

#[test]
fn a_new_server_gets_a_copy_and_takes_over_in_its_turn_until_none_of_the_first_is_left() {
    let mut house = House::new(2);
    let client = house.client(Some(0));
    let mode = Mode::Sync { workers: 1 };
    let table = client.dense("ones", &[ELEMENTS], DType::F32, dense(mode)).unwrap();
    let rows = client.sparse("rows", DIM, DType::F32, sparse(mode)).unwrap();
    let (ones, ids, gradients) = (region(ELEMENTS), ids(), region(ROWS as usize * DIM));
    let push = || {
        table.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG).unwrap();
        let (ids, gradients) = (ids.read(0..ids.len()).unwrap(), gradients.read(0..gradients.len()).unwrap());
        rows.push(&ids, &gradients).unwrap().wait(LONG).unwrap();
    };
    for round in 0..3 {
        push();
        house.servers[round].kill();
        push();
        house.add_server();
        let begun = Instant::now();
        while client.status().unwrap().iter().any(|shard| shard.standing.lag().is_none()) {
            assert!(begun.elapsed() < Duration::from_secs(30), "no backup comes");
            std::thread::yield_now();
        }
    }
    let (dense, sparse) = values(&house.client(Some(0)), (mode, 1));
    assert!(dense.iter().chain(&sparse).all(|&value| value == 6.0));
}

#[test]
fn status_shows_who_serves_what_and_who_would_take_over() {
    let house = House::new(2);
    house.client(None);
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"));
    let said = command.args(["status", "--token", "s3cret", "--coordinator", &house.at[0]]).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    for word in ["PRIMARY", "BACKUPS HAVE", "LOG", "missing: nothing", "shard 1 at 127.0.0.1:"] {
        assert!(said.contains(word), "{word} is missing in\n{said}");
    }
}

#[test]
fn a_coordinator_may_die_and_come_back_and_stops_no_push() {
    let mut house = House::new(2);
    let client = house.client(Some(0));
    let table = client.dense("ones", &[ELEMENTS], DType::F32, dense(Mode::Async)).unwrap();
    let ones = region(ELEMENTS);
    let push = || table.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG).unwrap();
    push();
    house.coordinator.kill();
    push();
    let (anew, _) = Process::start(1, &["coordinate", "--shards", "2", "--listen", &house.at[0]]);
    house.coordinator = anew;
    // Once a server has told it, it knows who serves what.
    let late = house.client(None);
    house.servers[0].kill();
    push();
    let out = region(ELEMENTS);
    let table = late.dense("ones", &[ELEMENTS], DType::F32, dense(Mode::Async)).unwrap();
    table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
    assert!(floats(&out).iter().all(|&value| value == 3.0));
}

#[test]
fn a_table_without_a_copy_is_lost_by_name_and_one_with_a_copy_needs_servers_that_have_backups() {
    let mut house = House::new(2);
    let client = house.client(Some(0));
    let plain = client.dense("plain", &[ELEMENTS], DType::F32, TableOptions::default()).unwrap();
    let ones = region(ELEMENTS);
    let push = || plain.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG);
    push().unwrap();
    house.servers[0].kill();
    let error = push().unwrap_err();
    assert!(matches!(&error, PsError::ServerLost { cause, .. } if cause.contains("without the tables")), "{error}");
    let (_alone, at) = Process::start(1, &["serve"]);
    let settings = ClientSettings { token: Some("s3cret".into()), ..ClientSettings::default() };
    let client = Client::connect(&at, settings).unwrap();
    let error = client.dense("w", &[4], DType::F32, dense(Mode::Async)).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("--coordinator"), "{error}");
}

#[test]
fn a_server_that_is_told_to_end_hands_over_and_no_request_fails() {
    let mut house = House::new(2);
    let done = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let worker = {
        let (client, done, stop) = (house.client(Some(0)), Arc::clone(&done), Arc::clone(&stop));
        std::thread::spawn(move || push_alone(&client, &stop, &done))
    };
    let wait_for = |pushes: u64| {
        let begun = Instant::now();
        while done.load(Ordering::SeqCst) < pushes {
            assert!(begun.elapsed() < Duration::from_secs(50), "no push ends");
            std::thread::yield_now();
        }
    };
    // One by a signal, one by the command, each once its shards have copies: in the end none of the first two has any.
    wait_for(1);
    let terminated = house.servers[0].0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &terminated]).status().unwrap().success());
    assert!(house.servers[0].0.wait().unwrap().success());
    let after = |pushes: u64| wait_for(done.load(Ordering::SeqCst) + pushes);
    after(20);
    house.add_server();
    let client = house.client(None);
    let second = Client::map_of(&house.at, settings(None)).unwrap().addresses().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"));
    command.args(["drain", "--token", "s3cret", "--coordinator", &house.at[0], "--server", &second[0]]);
    let said = command.output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let third = Client::map_of(&house.at, settings(None)).unwrap().addresses().unwrap();
    assert!(third.iter().all(|address| !second.contains(address)), "{second:?} {third:?}");
    after(20);
    house.servers[1].kill();
    after(20);
    stop.store(true, Ordering::SeqCst);
    worker.join().unwrap();
    let expected = done.load(Ordering::SeqCst) as f32;
    let (out, table) = (region(ELEMENTS), client.dense("ones", &[ELEMENTS], DType::F32, dense(Mode::Async)).unwrap());
    table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
    assert!(floats(&out).iter().all(|&value| value == expected));
    let nobody = Client::drain(&house.at, "127.0.0.1:1", settings(None)).unwrap_err();
    assert!(nobody.to_string().contains("one of 127.0.0.1:"), "{nobody}");
}

/// Pushes ones until it is told to stop; every push must succeed.
fn push_alone(client: &Client, stop: &AtomicBool, done: &AtomicU64) {
    let table = client.dense("ones", &[ELEMENTS], DType::F32, dense(Mode::Async)).unwrap();
    let ones = region(ELEMENTS);
    while !stop.load(Ordering::SeqCst) {
        table.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG).unwrap();
        done.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_server_that_stops_without_a_word_is_replaced_and_does_no_harm_when_it_goes_on() {
    let house = House::new(2);
    let client = house.client(Some(0));
    let table = client.dense("ones", &[ELEMENTS], DType::F32, dense(Mode::Async)).unwrap();
    let ones = region(ELEMENTS);
    let push = || table.push(ones.read(0..ones.len()).unwrap()).unwrap().wait(LONG).unwrap();
    let signal = |name: &str| {
        let who = house.servers[0].0.id().to_string();
        assert!(Command::new("kill").args([name, &who]).status().unwrap().success());
    };
    push();
    signal("-STOP");
    push();
    signal("-CONT");
    for _ in 0..20 {
        push();
    }
    let out = region(ELEMENTS);
    table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
    assert!(floats(&out).iter().all(|&value| value == 22.0));
}

#[test]
fn a_table_cannot_have_a_copy_where_the_coordinator_keeps_none() {
    let (_coordinator, at) = Process::start(1, &["coordinate", "--replicas", "0"]);
    let (_server, _) = Process::start(1, &["serve", "--coordinator", &at[0]]);
    let client = Client::through(&at, settings(None)).unwrap();
    client.dense("plain", &[4], DType::F32, TableOptions::default()).unwrap();
    let error = client.dense("w", &[4], DType::F32, dense(Mode::Async)).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("--replicas 1"), "{error}");
}

#[test]
fn servers_and_their_coordinator_trust_each_other_by_certificates() {
    let file = |name: &str| format!("{}/../python/tests/tls/{name}", env!("CARGO_MANIFEST_DIR"));
    let (ca, cert, key) = (file("ca.crt"), file("end.crt"), file("end.key"));
    let sealed = ["--tls-cert", &*cert, "--tls-key", &key, "--tls-ca", &ca, "--tls-client-ca", &ca];
    let (_coordinator, at) = Process::start(1, &[&["coordinate"][..], &sealed].concat());
    let serve = [&["serve", "--coordinator", &at[0]][..], &sealed].concat();
    let _servers = [Process::start(1, &serve), Process::start(1, &serve)];
    let ask = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"));
        command.args(["status", "--token", "s3cret", "--coordinator", &at[0]]).args(more);
        let said = command.output().unwrap();
        String::from_utf8(if said.status.success() { said.stdout } else { said.stderr }).unwrap()
    };
    let begun = Instant::now();
    while !ask(&sealed[..6]).contains("missing: nothing") {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", ask(&sealed[..6]));
    }
    assert!(ask(&[]).contains("TLS"), "{}", ask(&[]));
}
