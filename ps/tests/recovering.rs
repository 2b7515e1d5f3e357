//! Does: kills real servers while workers train, and has the workers give their tables again: the same bits as undisturbed.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod running;

use gradwire_ps::{
    Client, ClientSettings, Course, DType, DenseTable, Mode, PsError, Reason, Recovery, Schedule, Sgd, SparseOptions,
    TableOptions, UpdateRule,
};
use gradwire_transport::{Config, Region, RegionSlice, WireChoice};
use running::Running;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const WORKERS: u32 = 3;
/// Of the first table; the second has fewer elements than there are servers.
const ELEMENTS: usize = 30_000;

fn server(address: &str) -> Running {
    Running::start(1, &["--listen", address, "--log", "warn"])
}

/// Worker 0, who is the one behind a gate, goes by sockets: what is in shared memory no gate stops.
fn settings(worker: u32) -> ClientSettings {
    let default = ClientSettings::default();
    let wire = if worker == 0 { WireChoice::Tcp } else { WireChoice::Auto };
    ClientSettings {
        worker: Some(worker),
        reconnect: Duration::from_secs(2),
        timeout: Duration::from_secs(60),
        transport: Config { wire, ..default.transport },
        ..default
    }
}

fn options(rule: UpdateRule) -> TableOptions {
    let mode = Mode::Sync { workers: WORKERS };
    TableOptions { rule, mode, recovery: Recovery::Workers, ..TableOptions::default() }
}

fn read(region: &Arc<Region>) -> RegionSlice {
    region.read(0..region.len()).unwrap()
}

fn floats(region: &Arc<Region>) -> Vec<f32> {
    read(region).as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// A worker's table, the value that it has, and where the next one comes.
struct Weights {
    table: DenseTable,
    value: Arc<Region>,
    fresh: Arc<Region>,
}

impl Weights {
    fn open(client: &Client, name: &str, elements: usize) -> Self {
        let rule = UpdateRule::Sgd(Sgd { learning_rate: 0.05, ..Sgd::default() });
        let table = client.dense(name, &[elements], DType::F32, options(rule)).unwrap();
        let first = Region::from_vec((0..elements).flat_map(|n| (n as f32 / 100.0).to_le_bytes()).collect());
        table.init(read(&first)).unwrap();
        let (value, fresh) = (Region::zeroed(4 * elements), Region::zeroed(4 * elements));
        let weights = Self { table, value, fresh };
        weights.pull();
        weights
    }

    fn pull(&self) {
        self.table.pull(self.value.write(0..self.value.len()).unwrap()).unwrap().wait(None).unwrap();
    }

    /// A gradient that depends on all that was done before.
    fn gradient(&self, rank: u32) -> Arc<Region> {
        let step = self.table.clock() + 1;
        let each = floats(&self.value).into_iter().enumerate();
        let each = each.map(|(n, value)| value * 0.3 + ((n as u64 * step + u64::from(rank)) % 17) as f32 - 8.0);
        Region::from_vec(each.flat_map(f32::to_le_bytes).collect())
    }

    fn take(&self) {
        self.value.write(0..self.value.len()).unwrap().copy_from_slice(&read(&self.fresh));
    }
}

/// Trains; the bits of both tables at the end, and how often it recovered.
fn train(addresses: &[String], rank: u32, steps: u64, done: &AtomicU64) -> (Vec<Vec<f32>>, u32) {
    let client = Client::connect(addresses, settings(rank)).unwrap();
    let all = [Weights::open(&client, "w", ELEMENTS), Weights::open(&client, "one", 1)];
    client.barrier("opened", WORKERS, None).unwrap();
    done.fetch_add(1, Ordering::SeqCst);
    let mut recovered = 0;
    while all.iter().any(|weights| weights.table.clock() < steps) {
        if all[0].table.clock() == steps / 2 {
            let schedule = Schedule::from(Course::Step { rate: 0.02, every: 7, factor: 0.9 });
            let lost = all[0].table.set_schedule(&schedule);
            assert!(matches!(lost, Ok(()) | Err(PsError::ServerLost { .. } | PsError::Recovering { .. })), "{lost:?}");
        }
        // Of a table that is a clock behind the other, only its own step is missing.
        let clock = all.iter().map(|weights| weights.table.clock()).min().unwrap();
        let due: Vec<&Weights> = all.iter().filter(|weights| weights.table.clock() == clock).collect();
        let push = |weights: &Weights| {
            let fresh = weights.fresh.write(0..weights.fresh.len()).unwrap();
            weights.table.push_pull(read(&weights.gradient(rank)), fresh).unwrap()
        };
        let pending: Vec<_> = due.iter().map(|weights| push(weights)).collect();
        let ended: Vec<_> = pending.iter().map(|pending| pending.wait(None)).collect();
        for (weights, ended) in due.iter().zip(&ended) {
            match ended {
                Ok(_) => weights.take(),
                Err(PsError::ServerLost { .. } | PsError::Recovering { .. }) => {}
                Err(other) => panic!("worker {rank}: {other}"),
            }
        }
        if ended.iter().any(Result::is_err) {
            let has: Vec<_> = all.iter().map(|weights| weights.table.pulled()).collect();
            let offers: Vec<_> = all.iter().map(|weights| (&weights.table, read(&weights.value))).collect();
            let clocks = client.recover(&offers).unwrap();
            drop(offers);
            for ((weights, has), clock) in all.iter().zip(has).zip(clocks) {
                if has != Some(clock) {
                    weights.pull();
                }
            }
            recovered += 1;
        }
        done.fetch_add(1, Ordering::SeqCst);
    }
    (all.iter().map(|weights| floats(&weights.value)).collect(), recovered)
}

/// What all workers have in the end, and how often the first recovered, while servers are killed so many times.
fn run(steps: u64, kills: u64) -> (Vec<Vec<f32>>, u32) {
    let mut servers = [server("127.0.0.1:0"), server("127.0.0.1:0")];
    let addresses: Vec<String> = servers.iter().map(|server| server.addresses[0].clone()).collect();
    let (done, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|rank| {
                scope.spawn({
                    let (addresses, done) = (&addresses, &done);
                    move || train(addresses, rank, steps, done)
                })
            })
            .collect();
        let killer = scope.spawn(|| {
            for round in 1..=kills {
                // So that every kill meets training, and some meet the recovery from the one before.
                let until = round * steps * u64::from(WORKERS) / (kills + 2);
                while done.load(Ordering::SeqCst) < until && round % 3 != 0 {
                    assert!(!over.load(Ordering::SeqCst), "training was over before the kills were");
                    std::thread::sleep(Duration::from_millis(1));
                }
                let at = (round % 2) as usize;
                servers[at].child.kill().unwrap();
                servers[at].child.wait().unwrap();
                if round % 4 == 3 {
                    servers[1 - at].child.kill().unwrap();
                    servers[1 - at].child.wait().unwrap();
                    servers[1 - at] = server(&addresses[1 - at]);
                }
                servers[at] = server(&addresses[at]);
            }
        });
        let mut all: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        over.store(true, Ordering::SeqCst);
        killer.join().unwrap();
        assert!(all.iter().all(|(values, _)| *values == all[0].0), "workers have different values");
        all.swap_remove(0)
    })
}

#[test]
fn workers_give_lost_tables_again_and_the_bits_are_those_of_an_undisturbed_training() {
    let (undisturbed, recovered) = run(120, 0);
    assert_eq!(recovered, 0);
    let (values, recovered) = run(120, 8);
    assert!(recovered >= 4, "{recovered} recoveries of 8 kills");
    assert!(values == undisturbed, "recovering changed the result");
}

#[test]
fn what_cannot_be_recovered_so_is_refused_at_the_start() {
    let server = server("127.0.0.1:0");
    let client = Client::connect(&server.addresses, settings(0)).unwrap();
    let refused = client.dense("w", &[4], DType::F32, TableOptions { mode: Mode::Async, ..options(UpdateRule::Sum) });
    let error = refused.err().unwrap();
    assert!(matches!(error, PsError::Invalid { .. }) && error.to_string().contains("at no clock"), "{error}");
    let clipped = TableOptions { clipped: true, ..options(UpdateRule::Sum) };
    let error = client.dense("w", &[4], DType::F32, clipped).err().unwrap();
    assert!(error.to_string().contains("clipped"), "{error}");
    let sparse = SparseOptions { recovery: Recovery::Workers, ..SparseOptions::default() };
    let error = client.sparse("rows", 4, DType::F32, sparse).err().unwrap();
    assert!(error.to_string().contains("none of whom has all rows"), "{error}");

    let other = client.dense("other", &[4], DType::F32, TableOptions::default()).unwrap();
    let values = Region::zeroed(16);
    let error = client.recover(&[(&other, read(&values))]).err().unwrap();
    assert!(error.to_string().contains("recovery=\"none\""), "{error}");
    assert!(matches!(client.recover(&[]), Err(PsError::Invalid { .. })));
}

#[test]
fn who_does_not_come_to_recover_is_named_and_lost_values_are_not_read() {
    let mut first = server("127.0.0.1:0");
    let address = first.addresses[0].clone();
    let impatient = ClientSettings { timeout: Duration::from_secs(2), ..settings(0) };
    let client = Client::connect(&first.addresses, impatient).unwrap();
    let weights = Weights::open(&client, "w", 100);
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let _second = server(&address);
    let lost = weights.table.push(read(&weights.gradient(0))).unwrap().wait(None);
    assert!(
        matches!(&lost, Err(PsError::ServerLost { cause, .. }) if cause.contains("without the tables")),
        "{lost:?}"
    );
    let error = client.recover(&[(&weights.table, read(&weights.value))]).err().unwrap();
    assert!(matches!(&error, PsError::Timeout { what, .. } if what.contains("worker 1, 2")), "{error}");
    // A newcomer finds the table, and that it has no values.
    let newcomer = Client::connect(std::slice::from_ref(&address), settings(1)).unwrap();
    let table = newcomer.dense("w", &[100], DType::F32, weights.table.options()).unwrap();
    match table.pull(weights.fresh.write(0..400).unwrap()).unwrap().wait(None) {
        Err(PsError::Refused { refusal, .. }) => {
            assert_eq!(refusal.reason, Reason::UnknownTable);
            assert!(refusal.to_string().contains("recover"), "{refusal}");
        }
        other => panic!("{other:?}"),
    }
}

/// Passes bytes on between a client and a server, until it is told to cut what there is.
struct Gate {
    address: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
    /// Whether whoever calls is let go.
    shut: Arc<AtomicBool>,
}

impl Gate {
    fn new(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, open) = (listener.local_addr().unwrap().to_string(), Arc::new(Mutex::new(Vec::new())));
        let (server, all) = (server.to_owned(), Arc::clone(&open));
        let shut = Arc::new(AtomicBool::new(false));
        let is_shut = Arc::clone(&shut);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                // While the server is gone, whoever calls is let go.
                let (near, Ok(far)) = (near.unwrap(), TcpStream::connect(&server)) else { continue };
                if is_shut.load(Ordering::SeqCst) {
                    continue;
                }
                let both = || [near.try_clone().unwrap(), far.try_clone().unwrap()];
                all.lock().unwrap().extend(both());
                let ([near, far], [back_from, back_to]) = (both(), both());
                for (mut from, mut to) in [(near, far), (back_to, back_from)] {
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 8192];
                        while let Ok(read @ 1..) = from.read(&mut buffer) {
                            if to.write_all(&buffer[..read]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        Self { address, open, shut }
    }

    fn cut(&self) {
        self.open.lock().unwrap().drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

#[test]
fn a_connection_that_is_cut_after_a_recovery_loses_nothing() {
    let mut first = server("127.0.0.1:0");
    let address = first.addresses[0].clone();
    let gate = Gate::new(&address);
    let client = Client::connect(std::slice::from_ref(&gate.address), settings(0)).unwrap();
    let mode = Mode::Sync { workers: 1 };
    let table = client.dense("w", &[9], DType::F32, TableOptions { mode, ..options(UpdateRule::Sum) }).unwrap();
    let (ones, value) = (Region::from_vec(1f32.to_le_bytes().repeat(9)), Region::zeroed(36));
    let step = || table.push_pull(read(&ones), value.write(0..36).unwrap()).unwrap().wait(None);
    step().unwrap();
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let _second = server(&address);
    assert!(matches!(step(), Err(PsError::ServerLost { .. })));
    assert_eq!(client.recover(&[(&table, read(&value))]).unwrap(), [1]);
    for clock in 2..6 {
        // The same process answers: it has the table.
        gate.cut();
        step().unwrap();
        assert_eq!((table.clock(), floats(&value)), (clock, vec![clock as f32; 9]));
    }
}

/// Two workers, one of whom alone loses the second server for longer than it goes on trying, while the other waits for its
/// push; `late`: or has yet to come, and waits only once the recovery is under way.
fn one_is_cut_off(late: bool) {
    let servers = [server("127.0.0.1:0"), server("127.0.0.1:0")];
    let addresses = servers.each_ref().map(|server| server.addresses[0].clone());
    let gate = Gate::new(&addresses[1]);
    let through = [addresses[0].clone(), gate.address.clone()];
    let reconnect = Duration::from_millis(200);
    let clients = [(0, &through), (1, &addresses)]
        .map(|(rank, addresses)| Client::connect(addresses, ClientSettings { reconnect, ..settings(rank) }).unwrap());
    let mode = Mode::Sync { workers: 2 };
    let table_of = |client: &Client| {
        client.dense("w", &[ELEMENTS], DType::F32, TableOptions { mode, ..options(UpdateRule::Sum) }).unwrap()
    };
    let ones = Region::from_vec(1f32.to_le_bytes().repeat(ELEMENTS));
    let step = |table: &DenseTable, value: &Arc<Region>| {
        table.push_pull(read(&ones), value.write(0..value.len()).unwrap()).unwrap().wait(None)
    };
    let values = [Region::zeroed(4 * ELEMENTS), Region::zeroed(4 * ELEMENTS)];
    let [cut_off, other] = [&clients[0], &clients[1]].map(table_of);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| step(&other, &values[1]).unwrap());
        step(&cut_off, &values[0]).unwrap();
        first.join().unwrap();

        gate.shut.store(true, Ordering::SeqCst);
        gate.cut();
        let waits = scope.spawn(|| {
            if late {
                std::thread::sleep(Duration::from_millis(900));
            }
            let told = step(&other, &values[1]);
            let told = told.map(|_| ()).unwrap_err().to_string();
            assert!(told.contains("worker 0, who has begun to"), "{told}");
            let clocks = clients[1].recover(&[(&other, read(&values[1]))]).unwrap();
            (clocks, step(&other, &values[1]).unwrap().clock)
        });
        assert!(matches!(step(&cut_off, &values[0]), Err(PsError::ServerLost { shard: 1, .. })));
        gate.shut.store(false, Ordering::SeqCst);
        assert_eq!(clients[0].recover(&[(&cut_off, read(&values[0]))]).unwrap(), [1]);
        assert_eq!(step(&cut_off, &values[0]).unwrap().clock, 2);
        assert_eq!(waits.join().unwrap(), (vec![1], 2));
    });
    assert!(
        values.iter().all(|value| floats(value).iter().all(|&value| value == 4.0)),
        "two of two workers at two clocks"
    );
}

#[test]
fn a_worker_that_alone_loses_a_server_calls_the_others_to_recover() {
    one_is_cut_off(false);
    one_is_cut_off(true);
}
