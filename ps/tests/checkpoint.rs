//! Does: writes checkpoints while workers train, loses servers, and goes on from them with the same bits.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Adam, Checkpoints, Client, ClientSettings, Codec, Compression, DType, DenseTable, LocalServers, Mode, PsError,
    ServerSettings, SparseOptions, SparseTable, TableOptions, UpdateRule,
};
use gradwire_transport::Region;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const ELEMENTS: usize = 40_000;
const DIM: usize = 8;
const MODE: Mode = Mode::Sync { workers: 2 };

/// A worker with its tables.
struct Worker {
    rank: usize,
    client: Client,
    dense: DenseTable,
    sparse: SparseTable,
}

fn workers(addresses: &[String]) -> Vec<Worker> {
    let rule = UpdateRule::Adam(Adam { learning_rate: 0.01, ..Adam::default() });
    let worker = |rank: usize| {
        let settings = ClientSettings {
            worker: Some(rank as u32),
            reconnect: Duration::from_millis(500),
            timeout: Duration::from_secs(30),
            ..ClientSettings::default()
        };
        let client = Client::connect(addresses, settings).unwrap();
        let options = TableOptions { rule, mode: MODE, ..TableOptions::default() };
        let dense = client.dense("w", &[ELEMENTS], DType::F32, options).unwrap();
        let compression = Compression { push: Codec::Int8, pull: Codec::Bf16 };
        let options = SparseOptions { rule, mode: MODE, compression, ..SparseOptions::default() };
        let sparse = client.sparse("rows", DIM, DType::F32, options).unwrap();
        Worker { rank, client, dense, sparse }
    };
    (0..2).map(worker).collect()
}

fn region(numbers: impl Iterator<Item = f32>) -> gradwire_transport::RegionSlice {
    let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
    let region = Region::zeroed(bytes.len());
    region.write(0..bytes.len()).unwrap().copy_from_slice(&bytes);
    region.read(0..bytes.len()).unwrap()
}

fn ids(ids: impl Iterator<Item = u64>) -> gradwire_transport::RegionSlice {
    let region = Region::from_vec(ids.flat_map(u64::to_le_bytes).collect());
    region.read(0..region.len()).unwrap()
}

impl Worker {
    fn step(&self, step: u64) -> Result<(), PsError> {
        let gradient = region((0..ELEMENTS).map(|n| ((n * 7 + self.rank) % 13) as f32 / (step as f32 + 1.0) - 0.3));
        let ids = ids((0..200).map(|n| (n * (step + self.rank as u64 + 1)) % 777));
        let rows = region((0..200 * DIM).map(|n| (n as f32 / 97.0 - 3.0) / step as f32));
        let one = self.dense.push(gradient)?;
        let two = self.sparse.push(&ids, &rows)?;
        one.wait(None)?;
        two.wait(None).map(|_| ())
    }

    fn values(&self) -> Vec<u8> {
        let region = Region::zeroed(4 * ELEMENTS);
        self.dense.pull(region.write(0..4 * ELEMENTS).unwrap()).unwrap().wait(None).unwrap();
        let rows = Region::zeroed(4 * DIM * 777);
        self.sparse.pull(&ids(0..777), rows.write(0..rows.len()).unwrap()).unwrap().wait(None).unwrap();
        [&region.read(0..region.len()).unwrap()[..], &rows.read(0..rows.len()).unwrap()[..]].concat()
    }
}

fn train(workers: &[Worker], steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        std::thread::scope(|scope| {
            for worker in workers {
                scope.spawn(move || worker.step(step).unwrap());
            }
        });
    }
}

fn settings(folder: &Path) -> ServerSettings {
    let checkpoints = Checkpoints { place: folder.to_str().unwrap().to_owned(), keep: 2 };
    ServerSettings { checkpoints: Some(checkpoints), ..ServerSettings::default() }
}

fn undisturbed(steps: u64) -> Vec<u8> {
    let servers = LocalServers::start(3, ServerSettings::default()).unwrap();
    let workers = workers(servers.addresses());
    train(&workers, 1..=steps);
    workers[0].values()
}

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn training_goes_on_from_a_checkpoint_at_any_number_of_shards_with_the_same_bits() {
    let expected = undisturbed(8);
    let folder = tempfile::tempdir().unwrap();
    let servers = LocalServers::start(3, settings(folder.path())).unwrap();
    let before = workers(servers.addresses());
    train(&before, 1..=5);
    // One worker is ahead: what it has pushed to clock 6 is not in the checkpoint of clock 5.
    before[0].step(6).unwrap();
    let written = before[0].client.snapshot(PATIENCE).unwrap();
    assert_eq!(written.clocks.values().collect::<Vec<_>>(), [&5, &5]);
    assert!(written.bytes > 12 * ELEMENTS as u64, "{written:?}");
    before[1].step(6).unwrap();
    train(&before, 7..=7);
    drop(servers);
    for shards in [1, 2, 3, 5] {
        let (servers, name) = LocalServers::restore(shards, settings(folder.path()), None).unwrap();
        assert_eq!(name.as_ref(), Some(&written.name));
        let after = workers(servers.addresses());
        let next = after[1].dense.clock() + 1;
        assert_eq!((next, after[0].dense.clock()), (6, 5), "clients learn where to go on");
        train(&after, next..=8);
        assert!(after[0].values() == expected, "{shards} shards");
    }
}

#[test]
fn a_snapshot_while_workers_push_comes_from_one_clock() {
    let folder = tempfile::tempdir().unwrap();
    let servers = LocalServers::start(3, settings(folder.path())).unwrap();
    let workers = workers(servers.addresses());
    let watcher = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
    let written = std::thread::scope(|scope| {
        let snapshots = scope.spawn(|| (0..3).map(|_| watcher.snapshot(PATIENCE).unwrap()).collect::<Vec<_>>());
        let mut steps = 0;
        while !snapshots.is_finished() {
            steps += 1;
            train(&workers, steps..=steps);
        }
        snapshots.join().unwrap()
    });
    drop(workers);
    drop(servers);
    let restore = |name: &str| LocalServers::restore(2, settings(folder.path()), Some(name)).map(drop);
    assert!(restore(&written[0].name).is_err(), "only the latest two are kept");
    restore(&written[1].name).unwrap();
    let last = &written[2];
    let clock = last.clocks["w"];
    assert_eq!(last.clocks["rows"], clock);
    let (servers, _) = LocalServers::restore(2, settings(folder.path()), None).unwrap();
    let after = self::workers(servers.addresses());
    assert_eq!(after[0].dense.clock(), clock);
    if clock > 0 {
        assert!(after[0].values() == undisturbed(clock));
    }
}

#[test]
fn a_file_that_was_cut_changed_or_lost_is_named_and_an_earlier_checkpoint_serves() {
    let folder = tempfile::tempdir().unwrap();
    let servers = LocalServers::start(2, settings(folder.path())).unwrap();
    let workers = workers(servers.addresses());
    train(&workers, 1..=1);
    let first = workers[0].client.snapshot(PATIENCE).unwrap();
    train(&workers, 2..=2);
    let second = workers[0].client.snapshot(PATIENCE).unwrap();
    drop(workers);
    drop(servers);
    let restore = |name: Option<&str>| LocalServers::restore(3, settings(folder.path()), name).map(|(_, name)| name);
    let files: Vec<_> =
        std::fs::read_dir(folder.path().join(&second.name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 2 * 4, "{files:?}");
    for (n, file) in files.iter().enumerate() {
        let whole = std::fs::read(file).unwrap();
        let mut changed = whole.clone();
        changed[(whole.len() * (n + 1)) / (files.len() + 1)] ^= 16;
        let longer = [&whole[..], &[0]].concat();
        for bad in [&whole[..whole.len() / 2], &whole[..whole.len() - 1], &changed, &longer, &[]] {
            std::fs::write(file, bad).unwrap();
            let error = restore(Some(&second.name)).unwrap_err().to_string();
            assert!(error.contains(file.file_name().unwrap().to_str().unwrap()), "{error}");
        }
        std::fs::remove_file(file).unwrap();
        assert!(restore(Some(&second.name)).is_err());
        if file.extension().is_some_and(|end| end == "manifest") {
            // Not whole: as if it had never been written.
            assert_eq!(restore(None).unwrap(), Some(first.name.clone()));
        }
        std::fs::write(file, whole).unwrap();
    }
    assert_eq!(restore(None).unwrap(), Some(second.name));
    assert!(restore(Some("../elsewhere")).is_err() && restore(Some("checkpoint-0")).is_err());
}

#[test]
fn who_asks_servers_without_a_folder_is_told_how_to_give_one() {
    let servers = LocalServers::start(1, ServerSettings::default()).unwrap();
    let client = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
    let error = client.snapshot(PATIENCE).unwrap_err().to_string();
    assert!(error.contains("--checkpoint-dir"), "{error}");
}

/// A server of one shard as a process of its own.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"));
        command.args(["serve", "--log", "error", "--json"]).args(arguments);
        command.env_remove("GRADWIRE_TOKEN").env_remove("GRADWIRE_LOG");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let line = BufReader::new(child.stdout.take().unwrap()).lines().next().unwrap().unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        Self { child, address: line["address"].as_str().unwrap().to_owned() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every object that a manifest names is there, as long as it says; how many were looked at. A manifest that goes while it is
/// looked at is being removed, which begins with it.
fn named_objects_are_there(folder: &Path) -> usize {
    let manifests = std::fs::read_dir(folder).unwrap().flatten().flat_map(|entry| {
        let files = std::fs::read_dir(entry.path()).into_iter().flatten().flatten().map(|file| file.path());
        files.filter(|file| file.extension().is_some_and(|end| end == "manifest")).collect::<Vec<_>>()
    });
    let mut seen = 0;
    for manifest in manifests {
        let Ok(text) = std::fs::read_to_string(&manifest) else { continue };
        let told: serde_json::Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
        for object in told["objects"].as_array().unwrap() {
            let file = manifest.with_file_name(object["file"].as_str().unwrap());
            let bytes = file.metadata().map(|data| data.len()).ok();
            let fits = bytes == object["bytes"].as_u64();
            assert!(fits || !manifest.exists(), "{manifest:?} names {object}, and there are {bytes:?} bytes");
            seen += usize::from(fits);
        }
    }
    seen
}

#[test]
fn a_manifest_never_names_what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let servers = LocalServers::start(3, settings(folder.path())).unwrap();
    let workers = workers(servers.addresses());
    let seen = std::thread::scope(|scope| {
        let snapshots = scope.spawn(|| {
            for step in 1..=6 {
                train(&workers, step..=step);
                workers[0].client.snapshot(PATIENCE).unwrap();
            }
        });
        let mut seen = 0;
        while !snapshots.is_finished() {
            seen += named_objects_are_there(folder.path());
        }
        snapshots.join().unwrap();
        seen
    });
    // Two are kept, each of three shards with their clients and two tables.
    assert!(named_objects_are_there(folder.path()) >= 2 * 3 * 3);
    assert!(seen > 0);
    // A shard that was done before the others did not yet know the last one to be whole.
    let folders = std::fs::read_dir(folder.path()).unwrap().count();
    assert!((2..=3).contains(&folders), "{folders} folders of six checkpoints");
}

#[test]
fn a_server_killed_while_it_writes_leaves_no_checkpoint_or_a_whole_one() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let elements = 4 << 20;
    let options = TableOptions { mode: Mode::Sync { workers: 1 }, ..TableOptions::default() };
    let mut clock = 0;
    for round in 0..8u64 {
        let mut server = Process::start(&["--checkpoint-dir", place, "--checkpoint-keep", "2", "--restore", "latest"]);
        let settings = ClientSettings { worker: Some(0), reconnect: Duration::from_secs(2), ..Default::default() };
        let client = Client::connect(std::slice::from_ref(&server.address), settings).unwrap();
        let table = client.dense("w", &[elements], DType::F32, options).unwrap();
        let region = Region::zeroed(4 * elements);
        assert!(table.clock() >= clock, "what was told to be written is there");
        clock = table.clock();
        table.pull(region.write(0..4 * elements).unwrap()).unwrap().wait(None).unwrap();
        let now = region.read(0..4 * elements).unwrap();
        assert!(now.chunks(4).all(|value| value == (clock as f32).to_le_bytes()), "every element is of clock {clock}");
        drop(now);
        let ones = self::region((0..elements).map(|_| 1.0));
        table.push(ones).unwrap().wait(None).unwrap();
        // It is killed at another moment each time, and once not at all before it is done.
        std::thread::scope(|scope| {
            let told = scope.spawn(|| client.snapshot(PATIENCE));
            if round != 3 {
                let moment = Duration::from_millis(1 + 17 * round * round % 120);
                // What is drawn is the moment of the kill, not waited for.
                std::thread::sleep(moment);
                server.child.kill().unwrap();
                server.child.wait().unwrap();
            }
            named_objects_are_there(folder.path());
            if let Ok(written) = told.join().unwrap() {
                clock = written.clocks["w"];
            } else {
                assert_ne!(round, 3);
            }
        });
    }
    assert!(clock > 0);
}

#[test]
fn a_client_of_the_process_before_is_told_that_it_lost_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let first = Process::start(&["--checkpoint-dir", place]);
    let address = first.address.clone();
    let settings = ClientSettings { worker: Some(0), reconnect: Duration::from_secs(20), ..Default::default() };
    let client = Client::connect(std::slice::from_ref(&address), settings).unwrap();
    let table = client.dense("w", &[10], DType::F32, TableOptions::default()).unwrap();
    let push = || table.push(region((0..10).map(|_| 1.0)))?.wait(None);
    push().unwrap();
    let told = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"))
        .args(["snapshot", "--json", "--servers", &address])
        .env_remove("GRADWIRE_TOKEN")
        .output()
        .unwrap();
    assert!(told.status.success(), "{told:?}");
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    assert!(told["bytes"].as_u64().unwrap() > 40 && told["name"].as_str().unwrap().starts_with("checkpoint-"));
    push().unwrap();
    drop(first);
    let _second = Process::start(&["--checkpoint-dir", place, "--restore", "latest", "--listen", &address]);
    match push() {
        Err(PsError::ServerLost { cause, .. }) => assert!(cause.contains("restored from a checkpoint"), "{cause}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_asks_for_one_so_often_goes_on_after_the_servers_were_lost() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_str().unwrap();
    let first = Process::start(&["--checkpoint-dir", place]);
    let address = first.address.clone();
    let client = Client::connect(std::slice::from_ref(&address), ClientSettings::default()).unwrap();
    client.dense("w", &[10], DType::F32, TableOptions::default()).unwrap();
    let mut asking = Command::new(env!("CARGO_BIN_EXE_gradwire-ps"))
        .args(["snapshot", "--json", "--every", "1s", "--servers", &address])
        .env_remove("GRADWIRE_TOKEN")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(asking.stdout.take().unwrap()).lines();
    let mut wrong = BufReader::new(asking.stderr.take().unwrap()).lines();
    assert!(told.next().unwrap().unwrap().contains("checkpoint-"));
    drop(first);
    let error = wrong.next().unwrap().unwrap();
    assert!(error.contains("no checkpoint was written") && error.contains(&address), "{error}");
    let names = || std::fs::read_dir(place).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let before: Vec<String> = names().collect();
    let _second = Process::start(&["--checkpoint-dir", place, "--restore", "latest", "--listen", &address]);
    // What had been written before it was lost may be told of first.
    loop {
        let line: serde_json::Value = serde_json::from_str(&told.next().unwrap().unwrap()).unwrap();
        if !before.iter().any(|name| line["name"] == **name) {
            break;
        }
    }
    asking.kill().unwrap();
    asking.wait().unwrap();
}
