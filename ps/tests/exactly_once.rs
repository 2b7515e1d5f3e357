//! Does: cuts connections in the middle of everything, and counts: N workers pushing 1.0 K times make N·K, every time.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_ps::{
    Adam, Client, ClientSettings, Codec, Combine, Compression, DType, LocalServers, Mode, Recovery, ServerSettings,
    SparseOptions, SparseTable, TableOptions, UpdateRule,
};
use gradwire_transport::{Config, Region, WireChoice};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const LONG: Option<Duration> = Some(Duration::from_secs(60));

/// Numbers that look random, from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
}

/// Passes bytes on to a server and back, and cuts every connection after a number of bytes that differs each time; one beside
/// shared memory, by which few bytes go, after a time.
struct Cutter {
    address: String,
    cuts: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Cutter {
    fn new(server: &str, seed: u64, (about_bytes, most_cuts): (u64, u64), wire: WireChoice) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (cuts, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (server, counter, flag) = (server.to_owned(), Arc::clone(&cuts), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut random = Random(seed);
            for near in listener.incoming() {
                if flag.load(Ordering::SeqCst) {
                    return;
                }
                let (near, far) = (near.unwrap(), TcpStream::connect(&server).unwrap());
                // Some die in their first request, some late; after enough cuts the rest are left alone.
                let left =
                    if counter.load(Ordering::SeqCst) < most_cuts { 400 + random.below(about_bytes) } else { u64::MAX };
                let left = Arc::new(AtomicU64::new(left));
                if wire == WireChoice::Shm && left.load(Ordering::SeqCst) != u64::MAX {
                    let (end, counter) = (near.try_clone().unwrap(), Arc::clone(&counter));
                    let life = Duration::from_micros(2000 + random.below(15_000));
                    left.store(u64::MAX, Ordering::SeqCst);
                    std::thread::spawn(move || {
                        std::thread::sleep(life);
                        counter.fetch_add(1, Ordering::SeqCst);
                        // Gone already: it is cut anyway.
                        let _ = end.shutdown(Shutdown::Both);
                    });
                }
                for (from, to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    let (left, counter) = (Arc::clone(&left), Arc::clone(&counter));
                    std::thread::spawn(move || pass_on(from, to, &left, &counter));
                }
            }
        });
        Self { address, cuts, stop, thread: Some(thread) }
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, left: &AtomicU64, cuts: &AtomicU64) {
    let mut buffer = vec![0; 8192];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let before =
            left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(read as u64)));
        let room = before.unwrap().min(read as u64) as usize;
        if to.write_all(&buffer[..room]).is_err() {
            break;
        }
        if room < read {
            cuts.fetch_add(1, Ordering::SeqCst);
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

struct Rig {
    cutters: Vec<Cutter>,
    servers: LocalServers,
    wire: WireChoice,
}

impl Rig {
    fn new(shards: u32, seed: u64, about_bytes: u64, most_cuts: u64) -> Self {
        Self::over(WireChoice::Tcp, shards, seed, (about_bytes, most_cuts))
    }

    fn over(wire: WireChoice, shards: u32, seed: u64, cuts: (u64, u64)) -> Self {
        let servers = LocalServers::start(shards, ServerSettings::default()).unwrap();
        let cutter = |(n, address): (usize, &String)| Cutter::new(address, seed + n as u64, cuts, wire);
        Self { cutters: servers.addresses().iter().enumerate().map(cutter).collect(), servers, wire }
    }

    fn client(&self, worker: u32, through_cutters: bool) -> Client {
        let addresses: Vec<String> = match through_cutters {
            true => self.cutters.iter().map(|cutter| cutter.address.clone()).collect(),
            false => self.servers.addresses().to_vec(),
        };
        let default = ClientSettings::default();
        let settings = ClientSettings {
            worker: Some(worker),
            timeout: Duration::from_secs(50),
            reconnect: Duration::from_secs(10),
            transport: Config { wire: self.wire, ..default.transport },
            ..default
        };
        Client::connect(&addresses, settings).unwrap()
    }

    fn cuts(&self) -> u64 {
        self.cutters.iter().map(|cutter| cutter.cuts.load(Ordering::SeqCst)).sum()
    }
}

fn floats(region: &Arc<Region>) -> Vec<f32> {
    let bytes = region.read(0..region.len()).unwrap();
    bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn region(values: impl Iterator<Item = f32>) -> Arc<Region> {
    Region::from_vec(values.flat_map(f32::to_le_bytes).collect())
}

/// `workers` threads that each connect through the cutters; what each of them returns.
fn each_worker<T: Send + 'static>(rig: &Arc<Rig>, workers: u32, cut: bool, run: fn(Client) -> T) -> Vec<T> {
    let threads: Vec<_> = (0..workers)
        .map(|worker| {
            let rig = Arc::clone(rig);
            std::thread::spawn(move || run(rig.client(worker, cut)))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

#[test]
fn asynchronous_pushes_count_once_though_connections_are_cut() {
    for seed in 1..=3 {
        let rig = Arc::new(Rig::new(2, seed, 600_000, 25));
        each_worker(&rig, 3, true, |client| {
            let table = client.dense("ones", &[20_000], DType::F32, TableOptions::default()).unwrap();
            let ones = region((0..20_000).map(|_| 1.0));
            let calls: Vec<_> = (0..40).map(|_| table.push(ones.read(0..80_000).unwrap()).unwrap()).collect();
            calls.iter().for_each(|call| assert!(call.wait(LONG).is_ok()));
        });
        let client = rig.client(9, false);
        let table = client.dense("ones", &[20_000], DType::F32, TableOptions::default()).unwrap();
        let out = Region::zeroed(80_000);
        table.pull(out.write(0..80_000).unwrap()).unwrap().wait(LONG).unwrap();
        assert!(floats(&out).iter().all(|&value| value == 120.0), "seed {seed}");
        assert!(rig.cuts() >= 5, "seed {seed}: only {} cuts", rig.cuts());
    }
}

#[test]
fn pushes_by_shared_memory_count_once_though_the_sockets_beside_it_are_cut() {
    let rig = Arc::new(Rig::over(WireChoice::Shm, 2, 5, (1, 40)));
    each_worker(&rig, 3, true, |client| {
        let table = client.dense("ones", &[200_000], DType::F32, TableOptions::default()).unwrap();
        let ones = region((0..200_000).map(|_| 1.0));
        for _ in 0..30 {
            let calls: Vec<_> = (0..10).map(|_| table.push(ones.read(0..800_000).unwrap()).unwrap()).collect();
            calls.iter().for_each(|call| assert!(call.wait(LONG).is_ok()));
        }
    });
    let client = rig.client(9, false);
    let table = client.dense("ones", &[200_000], DType::F32, TableOptions::default()).unwrap();
    let out = Region::zeroed(800_000);
    table.pull(out.write(0..800_000).unwrap()).unwrap().wait(LONG).unwrap();
    assert!(floats(&out).iter().all(|&value| value == 900.0));
    assert!(rig.cuts() >= 5, "only {} cuts", rig.cuts());
}

/// Ten steps of Adam with a learning rate that changes; the bits of the last value.
fn train(client: Client) -> Vec<u32> {
    let worker = client.worker().unwrap();
    let rule = UpdateRule::Adam(Adam { learning_rate: 0.01, ..Adam::default() });
    let options =
        TableOptions { rule, mode: Mode::Sync { workers: 3 }, combine: Combine::Mean, ..TableOptions::default() };
    let table = client.dense("w", &[30_000], DType::F32, options).unwrap();
    let first = region((0..30_000).map(|n| n as f32 * 1e-4));
    table.init(first.read(0..120_000).unwrap()).unwrap();
    let out = Region::zeroed(120_000);
    for step in 0..10u32 {
        if step % 4 == 3 {
            table.set_learning_rate(0.01 / f64::from(step)).unwrap();
        }
        let gradient =
            region((0..30_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 20) as f32 * (worker as f32 - 0.7)));
        let gradient = gradient.read(0..120_000).unwrap();
        let call = if step % 3 == 0 {
            table.push(gradient).unwrap();
            table.pull(out.write(0..120_000).unwrap())
        } else {
            table.push_pull(gradient, out.write(0..120_000).unwrap())
        };
        assert_eq!(call.unwrap().wait(LONG).unwrap().clock, u64::from(step) + 1);
    }
    client.barrier("trained", 3, LONG).unwrap();
    floats(&out).iter().map(|value| value.to_bits()).collect()
}

#[test]
fn training_over_cut_connections_gives_the_bits_of_training_over_sound_ones() {
    let sound = each_worker(&Arc::new(Rig::new(2, 1, 1, 0)), 3, false, train);
    assert!(sound.iter().all(|bits| *bits == sound[0]));
    for seed in 1..=3 {
        let rig = Arc::new(Rig::new(2, seed, 900_000, 25));
        let cut = each_worker(&rig, 3, true, train);
        assert!(cut.iter().all(|bits| *bits == sound[0]), "seed {seed}");
        assert!(rig.cuts() >= 5, "seed {seed}: only {} cuts", rig.cuts());
    }
}

/// The rows of ids `0..count`.
fn rows(table: &SparseTable, count: u64) -> Vec<f32> {
    let ids = Region::from_vec((0..count).flat_map(u64::to_le_bytes).collect());
    let out = Region::zeroed(count as usize * table.dim() * 4);
    let all = out.write(0..out.len()).unwrap();
    table.pull(&ids.read(0..ids.len()).unwrap(), all).unwrap().wait(LONG).unwrap();
    floats(&out)
}

const SPARSE_DIM: usize = 16;

/// Ones, and sums of two of them, are exact in each; 90 of them are in bfloat16.
fn sparse_options(mode: Mode) -> SparseOptions {
    let compression = Compression { push: Codec::Int8, pull: Codec::Bf16 };
    SparseOptions { mode, compression, ..SparseOptions::default() }
}

/// Pushes ones to ids `0..3000`, every third of them twice in the same push, `times` times.
fn push_ones(client: &Client, mode: Mode, times: usize) {
    let table = client.sparse("rows", SPARSE_DIM, DType::F32, sparse_options(mode)).unwrap();
    let ids: Vec<u64> = (0..3000).chain((0..3000).step_by(3)).collect();
    let ones = region((0..ids.len() * SPARSE_DIM).map(|_| 1.0));
    let ids = Region::from_vec(ids.into_iter().flat_map(u64::to_le_bytes).collect());
    let (ids, ones) = (ids.read(0..ids.len()).unwrap(), ones.read(0..ones.len()).unwrap());
    let calls: Vec<_> = (0..times).map(|_| table.push(&ids, &ones).unwrap()).collect();
    calls.iter().for_each(|call| assert!(call.wait(LONG).is_ok()));
}

#[test]
fn sparse_pushes_count_once_in_every_mode_though_connections_are_cut() {
    let bounded = Mode::Ssp { workers: 3, staleness: 1 };
    for (seed, mode) in [(1, Mode::Async), (2, Mode::Sync { workers: 3 }), (3, bounded)] {
        let rig = Arc::new(Rig::new(2, seed, 400_000, 25));
        let run: fn(Client) = match mode {
            Mode::Async => |client| push_ones(&client, Mode::Async, 15),
            Mode::Sync { .. } => |client| push_ones(&client, Mode::Sync { workers: 3 }, 15),
            _ => |client| push_ones(&client, Mode::Ssp { workers: 3, staleness: 1 }, 15),
        };
        each_worker(&rig, 3, true, run);
        let client = rig.client(2, false);
        let table = client.sparse("rows", SPARSE_DIM, DType::F32, sparse_options(mode)).unwrap();
        for (n, value) in rows(&table, 3000).into_iter().enumerate() {
            let times = if (n / SPARSE_DIM).is_multiple_of(3) { 2.0 } else { 1.0 };
            assert_eq!(value, 45.0 * times, "{mode}, seed {seed}, element {n}");
        }
        assert!(rig.cuts() >= 5, "{mode}: only {} cuts", rig.cuts());
    }
}

const BOUNDED: TableOptions = TableOptions {
    rule: UpdateRule::Sum,
    mode: Mode::Ssp { workers: 3, staleness: 1 },
    combine: Combine::Sum,
    clipped: false,
    recovery: Recovery::None,
    compression: Compression::NONE,
};
/// Ones, and sums of 120 of them, are exact in every codec here.
const COMPRESSED: TableOptions = TableOptions {
    mode: Mode::Sync { workers: 3 },
    compression: Compression { push: Codec::TopK { share: 1.0 }, pull: Codec::Bf16 },
    ..BOUNDED
};

fn push_dense_ones(client: &Client, options: TableOptions) {
    let table = client.dense("ones", &[20_000], DType::F32, options).unwrap();
    let ones = region((0..20_000).map(|_| 1.0));
    let calls: Vec<_> = (0..40).map(|_| table.push(ones.read(0..80_000).unwrap()).unwrap()).collect();
    calls.iter().for_each(|call| assert!(call.wait(LONG).is_ok()));
}

#[test]
fn bounded_and_compressed_pushes_to_a_dense_table_count_once_though_connections_are_cut() {
    for (seed, options) in [(4, BOUNDED), (5, COMPRESSED)] {
        let rig = Arc::new(Rig::new(2, seed, 600_000, 25));
        let run: fn(Client) = match options.mode {
            Mode::Ssp { .. } => |client| push_dense_ones(&client, BOUNDED),
            _ => |client| push_dense_ones(&client, COMPRESSED),
        };
        each_worker(&rig, 3, true, run);
        let client = rig.client(0, false);
        let table = client.dense("ones", &[20_000], DType::F32, options).unwrap();
        let out = Region::zeroed(80_000);
        table.pull(out.write(0..80_000).unwrap()).unwrap().wait(LONG).unwrap();
        assert!(floats(&out).iter().all(|&value| value == 120.0), "{}", options.mode);
        assert!(rig.cuts() >= 5, "{}: only {} cuts", options.mode, rig.cuts());
    }
}
