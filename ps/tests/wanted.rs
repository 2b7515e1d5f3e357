//! Does: opens tables that want checkpoints so often: servers take them, or refuse the table; none takes half of one for whole.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod running;

use gradwire_ps::{
    Checkpoints, Client, ClientSettings, DType, DenseTable, LocalServers, PsError, Recovery, ServerSettings,
    SparseOptions, TableOptions,
};
use gradwire_transport::Region;
use running::{Running, command};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

const SECOND: Recovery = Recovery::Checkpoint { every: Some(Duration::from_secs(1)) };
const PATIENCE: Duration = Duration::from_secs(60);

fn settings() -> ClientSettings {
    ClientSettings { reconnect: Duration::from_secs(20), timeout: PATIENCE, ..ClientSettings::default() }
}

fn dense(client: &Client, name: &str, recovery: Recovery) -> Result<DenseTable, PsError> {
    let table = client.dense(name, &[10], DType::F32, TableOptions { recovery, ..TableOptions::default() })?;
    let ones = Region::from_vec(1f32.to_le_bytes().repeat(10));
    table.push(ones.read(0..40).unwrap())?.wait(Some(PATIENCE))?;
    Ok(table)
}

/// The checkpoints in `folder` of which all of so many shards are there.
fn whole(folder: &Path, shards: u32) -> BTreeSet<String> {
    let there = |name: &Path, shard| name.join(format!("shard-{shard}-of-{shards}.manifest")).exists();
    let all = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let all = all.filter(|name| (0..shards).all(|shard| there(name, shard)));
    all.map(|name| name.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Waits until `enough` have been written that are none of `but`.
fn await_more(folder: &Path, shards: u32, but: &BTreeSet<String>, enough: usize) {
    let until = Instant::now() + PATIENCE;
    let mut seen = BTreeSet::new();
    while seen.len() < enough {
        assert!(Instant::now() < until, "{seen:?} are all that was written beside {but:?}");
        seen.extend(whole(folder, shards).into_iter().filter(|name| !but.contains(name)));
        // What is waited for is a file, of which nobody tells.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A coordinator, and where it is. Killed at the end.
struct Coordinator(Child, Vec<String>);

impl Coordinator {
    fn start() -> Self {
        let mut child = command(&["coordinate", "--shards", "2", "--json", "--log", "warn"]).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        Self(child, vec![line["coordinator"].as_str().unwrap().to_owned()])
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_cluster_takes_checkpoints_as_often_as_a_table_wants_and_after_a_fail_over_too() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let coordinator = Coordinator::start();
    let at = &coordinator.1;
    let flags = |place| ["--coordinator", &*at[0], "--checkpoint-dir", place, "--log", "warn"];
    let mut servers: Vec<Running> = (0..2).map(|_| Running::start_seats(2, &flags(place))).collect();
    let client = Client::through(at, settings()).unwrap();
    dense(&client, "careless", Recovery::Checkpoint { every: None }).unwrap();
    dense(&client, "eager", SECOND).unwrap();
    await_more(folder.path(), 2, &BTreeSet::new(), 2);
    // Who asks is the server of shard 0: another one does when it is gone.
    let first = Client::map_of(at, settings()).unwrap().addresses().unwrap().remove(0);
    let mut asking = servers.remove(servers.iter().position(|one| one.addresses.contains(&first)).unwrap());
    asking.child.kill().unwrap();
    asking.child.wait().unwrap();
    let before = whole(folder.path(), 2);
    drop(client);
    let again = Client::through(at, settings()).unwrap();
    for name in ["careless", "eager"] {
        let recovery = if name == "eager" { SECOND } else { Recovery::Checkpoint { every: None } };
        dense(&again, name, recovery).unwrap();
    }
    await_more(folder.path(), 2, &before, 2);
}

#[test]
fn a_table_over_several_processes_that_wants_checkpoints_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let servers = [(); 2].map(|()| Running::start(1, &["--checkpoint-dir", place, "--log", "warn"]));
    let addresses = servers.each_ref().map(|server| server.addresses[0].clone());
    let client = Client::connect(&addresses, settings()).unwrap();
    let rows = SparseOptions { recovery: SECOND, ..SparseOptions::default() };
    let refused = [
        dense(&client, "eager", SECOND).map(drop).unwrap_err(),
        client.sparse("rows", 2, DType::F32, rows).map(drop).unwrap_err(),
    ];
    for (refused, table) in refused.iter().zip(["eager", "rows"]) {
        let said = refused.to_string();
        for part in [table, "checkpoint every 1s", "serve --shards 2", "coordinator", "gradwire-ps snapshot"] {
            assert!(said.contains(part), "{part} is missing in {said}");
        }
    }
    // What it names works: somebody asks both, and nothing is left of what was refused.
    dense(&client, "w", Recovery::Checkpoint { every: None }).unwrap();
    client.snapshot(PATIENCE).unwrap();
    assert_eq!(whole(folder.path(), 2).len(), 1);
    // One process with both shards is asked by itself.
    let both = Running::start(2, &["--checkpoint-dir", place, "--log", "warn"]);
    dense(&Client::connect(&both.addresses, settings()).unwrap(), "eager", SECOND).unwrap();
    await_more(folder.path(), 2, &whole(folder.path(), 2), 2);
}

#[test]
fn servers_that_nobody_asks_by_himself_refuse_a_table_that_wants_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Some(Checkpoints { place: folder.path().to_str().unwrap().to_owned(), keep: 2 });
    let servers = LocalServers::start(2, ServerSettings { checkpoints, ..ServerSettings::default() }).unwrap();
    let client = Client::connect(servers.addresses(), settings()).unwrap();
    let said = dense(&client, "eager", SECOND).map(drop).unwrap_err().to_string();
    assert!(said.contains("table \"eager\"") && said.contains("client.snapshot()"), "{said}");
    dense(&client, "w", Recovery::Checkpoint { every: None }).unwrap();
    client.snapshot(PATIENCE).unwrap();
}

#[test]
fn a_process_with_a_part_of_a_table_writes_no_checkpoint_by_itself_and_pushes_out_none() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let flags = ["--checkpoint-dir", place, "--checkpoint-every", "1s", "--checkpoint-keep", "1", "--log", "info"];
    let mut servers = [(); 2].map(|()| Running::start(1, &flags));
    let addresses = servers.each_ref().map(|server| server.addresses[0].clone());
    let client = Client::connect(&addresses, settings()).unwrap();
    dense(&client, "w", Recovery::None).unwrap();
    let good = client.snapshot(PATIENCE).unwrap().name;
    for server in &mut servers {
        let mut log = BufReader::new(server.child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let told = log.find(|line| line.contains("no checkpoint was written")).unwrap();
        assert!(told.contains("table \"w\"") && told.contains("ask all 2 servers of it"), "{told}");
    }
    assert_eq!(whole(folder.path(), 2), BTreeSet::from([good]));
    assert!(whole(folder.path(), 1).is_empty(), "half a table counts as whole");
    // Who asks one of them by hand is told the same.
    let asked = command(&["snapshot", "--servers", &addresses[1]]).output().unwrap();
    let said = String::from_utf8(asked.stderr).unwrap();
    assert!(asked.status.code() == Some(1) && said.contains("part 1 of 2 of table \"w\""), "{said}");
    let swapped = format!("{},{}", addresses[1], addresses[0]);
    let asked = command(&["snapshot", "--servers", &swapped]).output().unwrap();
    assert!(String::from_utf8(asked.stderr).unwrap().contains("in the order"));
}

#[test]
fn a_table_that_a_server_has_lost_keeps_what_is_left_from_counting_as_whole() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let mut servers = [(); 2].map(|()| Running::start(1, &["--checkpoint-dir", place, "--log", "warn"]));
    let addresses = servers.each_ref().map(|server| server.addresses[0].clone());
    let client = Client::connect(&addresses, settings()).unwrap();
    dense(&client, "w", Recovery::None).unwrap();
    servers[1].child.kill().unwrap();
    servers[1].child.wait().unwrap();
    servers[1] = Running::start(1, &["--checkpoint-dir", place, "--listen", &addresses[1], "--log", "warn"]);
    let asking = Client::connect(&addresses, settings()).unwrap();
    let said = asking.snapshot(PATIENCE).unwrap_err().to_string();
    assert!(said.contains("server 1 of the 2") && said.contains("table \"w\""), "{said}");
    dense(&asking, "w", Recovery::None).unwrap();
    asking.snapshot(PATIENCE).unwrap();
}

#[test]
fn checkpoints_that_are_cut_otherwise_push_none_out() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = || Some(Checkpoints { place: folder.path().to_str().unwrap().to_owned(), keep: 1 });
    let settings_of = || ServerSettings { checkpoints: checkpoints(), ..ServerSettings::default() };
    let write = |shards, times: usize| {
        let servers = LocalServers::start(shards, settings_of()).unwrap();
        let client = Client::connect(servers.addresses(), settings()).unwrap();
        dense(&client, "w", Recovery::None).unwrap();
        (0..times).map(|_| client.snapshot(PATIENCE).unwrap().name).last().unwrap()
    };
    let two = write(2, 2);
    let one = write(1, 3);
    // Three of one shard came later, and only one may be kept: that of two shards is still there.
    assert_eq!((whole(folder.path(), 2), whole(folder.path(), 1)), ([two].into(), [one.clone()].into()));
    let last = write(2, 1);
    assert_eq!((whole(folder.path(), 2), whole(folder.path(), 1)), ([last].into(), [one].into()));
}

#[test]
fn servers_without_a_table_push_out_nothing_of_those_before() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let flags = ["--checkpoint-dir", place, "--checkpoint-every", "1s", "--checkpoint-keep", "1", "--log", "warn"];
    let first = Running::start(1, &flags);
    let client = Client::connect(&first.addresses, settings()).unwrap();
    dense(&client, "w", Recovery::None).unwrap();
    await_more(folder.path(), 1, &BTreeSet::new(), 1);
    drop((client, first));
    let before = whole(folder.path(), 1);
    assert!(!before.is_empty());
    // Started anew, and --restore forgotten.
    let second = Running::start(1, &flags);
    // What is looked at is a stretch of time, not waited for.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(whole(folder.path(), 1), before);
    dense(&Client::connect(&second.addresses, settings()).unwrap(), "w", Recovery::None).unwrap();
    await_more(folder.path(), 1, &before, 1);
}
