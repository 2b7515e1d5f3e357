//! Does: sparse tables over TCP and shared memory: the same bits over every number of shards, staleness that is bounded, rows
//! that come and go.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Adagrad, Adam, Client, ClientSettings, Combine, DType, Eviction, Ftrl, Initializer, LocalServers, Mode, PsError,
    Reason, ServerSettings, Sgd, SparseOptions, SparseTable, TableOptions, UpdateRule, shard_of,
};
use gradwire_transport::{Config, Region, RegionSlice, WireChoice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const LONG: Option<Duration> = Some(Duration::from_secs(30));

fn servers(shards: u32) -> LocalServers {
    LocalServers::start(shards, ServerSettings::default()).unwrap()
}

/// Every other worker reaches the servers over TCP, the others share memory with them.
fn client(servers: &LocalServers, worker: Option<u32>) -> Client {
    let default = ClientSettings::default();
    let wire = if worker.is_some_and(|worker| worker % 2 == 1) { WireChoice::Tcp } else { WireChoice::Auto };
    let transport = Config { wire, ..default.transport };
    let settings = ClientSettings { worker, timeout: Duration::from_secs(20), transport, ..default };
    Client::connect(servers.addresses(), settings).unwrap()
}

fn slice(bytes: Vec<u8>) -> RegionSlice {
    let region = Region::from_vec(bytes);
    region.read(0..region.len()).unwrap()
}

fn ids(ids: impl IntoIterator<Item = u64>) -> RegionSlice {
    slice(ids.into_iter().flat_map(u64::to_le_bytes).collect())
}

fn floats(values: impl IntoIterator<Item = f32>) -> RegionSlice {
    slice(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

fn pull(table: &SparseTable, of: &RegionSlice) -> Vec<f32> {
    let out = Region::zeroed(of.len() / 8 * table.dim() * 4);
    table.pull(of, out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
    let bytes = out.read(0..out.len()).unwrap();
    bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Numbers that look random, from a seed.
fn random(seed: u64) -> impl Iterator<Item = u64> {
    (seed..).scan(seed, |state, _| {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        Some(*state >> 33)
    })
}

/// Trains for some clocks on random ids, with duplicates, and another number each time; the bits of the rows.
fn train(shards: u32, workers: u32, rule: UpdateRule, eager: u32) -> Vec<u32> {
    let servers = servers(shards);
    let options = SparseOptions {
        rule,
        mode: Mode::Sync { workers },
        combine: Combine::Mean,
        initializer: Initializer::Normal { mean: 0.0, deviation: 0.1 },
        ..SparseOptions::default()
    };
    let step = move |client: &Client, worker: u32| {
        let table = client.sparse("t", 24, DType::F32, options).unwrap();
        for clock in 0..4u64 {
            if worker != eager {
                // Those who wait for others' values come later than who does not.
                pull(&table, &ids(0..10));
            }
            let mut numbers = random(clock * 100 + u64::from(worker));
            let count = (clock * u64::from(worker) * 700 % 3000) as usize;
            let of = ids(numbers.by_ref().take(count).map(|number| number % 2000));
            let gradients = floats(numbers.take(count * 24).map(|number| (number % 1000) as f32 / 999.0 - 0.45));
            table.push(&of, &gradients).unwrap().wait(LONG).unwrap();
        }
        bits(&pull(&table, &ids(0..2500)))
    };
    let servers = Arc::new(servers);
    let threads: Vec<_> = (0..workers)
        .map(|worker| {
            let servers = Arc::clone(&servers);
            std::thread::spawn(move || step(&client(&servers, Some(worker)), worker))
        })
        .collect();
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(results.iter().all(|result| *result == results[0]), "workers read different rows");
    results.into_iter().next().unwrap()
}

#[test]
fn training_gives_the_same_bits_over_every_number_of_shards_and_whoever_comes_first() {
    for rule in [
        UpdateRule::Sgd(Sgd { learning_rate: 0.1, ..Sgd::default() }),
        UpdateRule::Adam(Adam { learning_rate: 0.01, ..Adam::default() }),
        UpdateRule::Adagrad(Adagrad { row_wise: true, ..Adagrad::default() }),
        UpdateRule::Ftrl(Ftrl { l1: 0.01, ..Ftrl::default() }),
    ] {
        let expected = train(1, 3, rule, 0);
        for shards in 2..=3 {
            assert!(train(shards, 3, rule, shards - 1) == expected, "{rule} over {shards} shards");
        }
    }
}

#[test]
fn every_row_arrives_at_its_place_in_the_call_in_every_type() {
    let servers = servers(3);
    let client = client(&servers, None);
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let table = client.sparse(dtype.name(), 3, dtype, SparseOptions::default()).unwrap();
        let encode = |value: f64| match dtype {
            DType::F32 => (value as f32).to_le_bytes().to_vec(),
            DType::F64 => value.to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f64(value).to_le_bytes().to_vec(),
            _ => half::bf16::from_f64(value).to_le_bytes().to_vec(),
        };
        // Backwards, with one id twice, and one at the end of the range of ids.
        let of: Vec<u64> = (0..100).rev().chain([7, u64::MAX]).collect();
        let rows: Vec<u8> = of.iter().flat_map(|id| [(id % 100) as f64; 3]).flat_map(encode).collect();
        table.push(&ids(of.clone()), &slice(rows.clone())).unwrap().wait(LONG).unwrap();
        let out = Region::zeroed(rows.len());
        table.pull(&ids(of.clone()), out.write(0..rows.len()).unwrap()).unwrap().wait(LONG).unwrap();
        let twice = |id: u64| if id == 7 { 14.0 } else { (id % 100) as f64 };
        let expected: Vec<u8> = of.iter().flat_map(|id| [twice(*id); 3]).flat_map(encode).collect();
        assert_eq!(out.read(0..rows.len()).unwrap()[..], expected, "{dtype}");
        assert!(table.pull(&ids([]), Region::zeroed(1).write(0..0).unwrap()).unwrap().wait(LONG).is_ok());
    }
}

#[test]
fn a_batch_of_many_messages_arrives_whole_over_every_number_of_shards() {
    for shards in [1, 3] {
        let servers = servers(shards);
        let client = client(&servers, Some(0));
        let options = SparseOptions { mode: Mode::Sync { workers: 1 }, ..SparseOptions::default() };
        let table = client.sparse("wide", 700, DType::F32, options).unwrap();
        let of = ids((0..2000).map(|id| id * 977));
        let rows: Vec<f32> = (0..2000 * 700).map(|n| (n % 8191) as f32).collect();
        for _ in 0..2 {
            table.push(&of, &floats(rows.iter().copied())).unwrap().wait(LONG).unwrap();
        }
        assert!(pull(&table, &of).into_iter().zip(&rows).all(|(got, pushed)| got == 2.0 * pushed));
    }
}

#[test]
fn rows_that_are_evicted_are_told_once_and_begin_anew() {
    let servers = servers(2);
    let client = client(&servers, None);
    let options = SparseOptions {
        capacity: Some(20),
        eviction: Some(Eviction::Lru),
        initializer: Initializer::Uniform { low: -1.0, high: 1.0 },
        ..SparseOptions::default()
    };
    let table = client.sparse("few", 2, DType::F32, options).unwrap();
    let first = pull(&table, &ids([3]));
    for id in 0..100 {
        table.push(&ids([id]), &floats([1.0, 1.0])).unwrap().wait(LONG).unwrap();
    }
    let rows: u64 = client.status().unwrap().iter().map(|shard| shard.sparse[0].rows).sum();
    assert_eq!(rows, 20);
    let (evicted, lost) = table.evicted().unwrap();
    assert_eq!((evicted.len(), lost), (80, 0));
    // Each shard has evicted its oldest.
    for shard in 0..2 {
        let of_shard = |id: &u64| shard_of(*id, 2) == shard;
        let expected: Vec<u64> = (0..100).filter(of_shard).collect();
        let told: Vec<u64> = evicted.iter().copied().filter(of_shard).collect();
        assert_eq!(told, expected[..expected.len() - 10]);
    }
    assert_eq!(table.evicted().unwrap(), (vec![], 0));
    assert_eq!(pull(&table, &ids([3])), first);
    assert_ne!(pull(&table, &ids([99])), pull(&client.sparse("few", 2, DType::F32, options).unwrap(), &ids([98])));
}

#[test]
fn rows_live_for_their_time_and_no_longer() {
    let servers = servers(1);
    let client = client(&servers, None);
    let eviction = Some(Eviction::Ttl(Duration::from_millis(200)));
    let table =
        client.sparse("mayflies", 1, DType::F32, SparseOptions { eviction, ..SparseOptions::default() }).unwrap();
    table.push(&ids(0..50), &floats([1.0; 50])).unwrap().wait(LONG).unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(20);
    let mut evicted = 0;
    while evicted < 50 {
        assert!(std::time::Instant::now() < until, "{evicted} of 50 were evicted");
        evicted += table.evicted().unwrap().0.len();
        std::thread::yield_now();
    }
    assert_eq!(pull(&table, &ids(0..50)), [0.0; 50]);
}

#[test]
fn a_full_table_without_eviction_refuses_whole_pushes_and_keeps_what_it_has() {
    let servers = servers(1);
    for mode in [Mode::Async, Mode::Sync { workers: 1 }] {
        let client = client(&servers, Some(0));
        let options = SparseOptions { capacity: Some(10), mode, ..SparseOptions::default() };
        let table = client.sparse(&mode.to_string(), 1, DType::F32, options).unwrap();
        table.push(&ids(0..10), &floats([1.0; 10])).unwrap().wait(LONG).unwrap();
        let error = table.push(&ids(5..15), &floats([1.0; 10])).unwrap().wait(LONG).unwrap_err();
        let PsError::Refused { refusal, .. } = &error else { panic!("{error}") };
        assert_eq!(refusal.reason, Reason::Limit);
        assert!(error.to_string().contains("raise the capacity"), "{error}");
        assert_eq!(
            pull_now(&servers, &mode.to_string(), options, 0..15)[..],
            [[1.0; 10].as_slice(), &[0.0; 5]].concat()
        );
    }
}

/// What somebody who is no worker reads.
fn pull_now(servers: &LocalServers, name: &str, options: SparseOptions, of: std::ops::Range<u64>) -> Vec<f32> {
    pull(&client(servers, None).sparse(name, 1, DType::F32, options).unwrap(), &ids(of))
}

/// Each worker adds 1 to its own row at each clock, as fast as it may, in a race; every read is held against the bound.
fn race(staleness: u32, push_and_read: fn(&Client, u32, u64, Mode) -> Vec<f32>) {
    const WORKERS: u32 = 3;
    const CLOCKS: u64 = 60;
    let mode = Mode::Ssp { workers: WORKERS, staleness };
    let servers = Arc::new(servers(2));
    let made: Arc<Vec<AtomicU64>> = Arc::new((0..WORKERS).map(|_| AtomicU64::new(0)).collect());
    let threads: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (servers, made) = (Arc::clone(&servers), Arc::clone(&made));
            std::thread::spawn(move || {
                let client = client(&servers, Some(worker));
                let mut furthest = 0;
                for clock in 1..=CLOCKS {
                    if worker == 0 && clock % 7 == 0 {
                        // The others run as far ahead as they can: all of them, or as far as the bound.
                        let ahead =
                            |n: &AtomicU64| n.load(Ordering::SeqCst) >= (clock - 1 + u64::from(staleness)).min(CLOCKS);
                        while !made[1..].iter().all(ahead) {
                            std::thread::yield_now();
                        }
                    }
                    made[worker as usize].store(clock - 1, Ordering::SeqCst);
                    let rows = push_and_read(&client, worker, clock, mode);
                    assert_eq!(rows[worker as usize], clock as f32, "a worker reads what it wrote");
                    for other in &rows {
                        let (other, bound) = (*other as u64, u64::from(staleness));
                        assert!(other + bound >= clock, "worker {worker} at {clock} reads {rows:?}");
                        assert!(other <= clock + bound + 1, "worker {worker} at {clock} reads {rows:?}");
                        furthest = furthest.max(clock.abs_diff(other));
                    }
                    made[worker as usize].store(clock, Ordering::SeqCst);
                }
                furthest
            })
        })
        .collect();
    let furthest = threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap();
    // The bound was tried, not only kept.
    assert!(furthest >= u64::from(staleness), "staleness {staleness} was allowed, and only {furthest} was seen");
}

#[test]
fn no_worker_reads_sparse_rows_that_are_staler_than_the_bound() {
    for staleness in [0, 1, 3] {
        race(staleness, |client, worker, clock, mode| {
            let table =
                client.sparse("race", 1, DType::F32, SparseOptions { mode, ..SparseOptions::default() }).unwrap();
            assert_eq!(table.clock(), clock - 1);
            table.push(&ids([worker.into()]), &floats([1.0])).unwrap().wait(LONG).unwrap();
            pull(&table, &ids([0, 1, 2]))
        });
    }
}

#[test]
fn no_worker_reads_a_dense_table_that_is_staler_than_the_bound() {
    for staleness in [0, 1, 3] {
        race(staleness, |client, worker, _, mode| {
            let table =
                client.dense("race", &[3], DType::F32, TableOptions { mode, ..TableOptions::default() }).unwrap();
            let (mut one, out) = ([0.0f32; 3], Region::zeroed(12));
            one[worker as usize] = 1.0;
            table.push(floats(one)).unwrap();
            table.pull(out.write(0..12).unwrap()).unwrap().wait(LONG).unwrap();
            out.read(0..12).unwrap().chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
        });
    }
}

#[test]
fn a_worker_too_far_ahead_hears_who_keeps_it_waiting() {
    let servers = servers(1);
    let settings = ClientSettings { worker: Some(1), timeout: Duration::from_millis(600), ..Default::default() };
    let client = Client::connect(servers.addresses(), settings).unwrap();
    let mode = Mode::Ssp { workers: 3, staleness: 1 };
    let table = client.sparse("lonely", 1, DType::F32, SparseOptions { mode, ..SparseOptions::default() }).unwrap();
    for _ in 0..2 {
        table.push(&ids([5]), &floats([1.0])).unwrap().wait(LONG).unwrap();
    }
    let error = table.push(&ids([5]), &floats([1.0])).unwrap().wait(LONG).unwrap_err();
    assert!(matches!(error, PsError::Timeout { .. }) && error.to_string().contains("worker 0, 2"), "{error}");
    let dense = client.dense("alone", &[1], DType::F32, TableOptions { mode, ..TableOptions::default() }).unwrap();
    for _ in 0..2 {
        dense.push(floats([1.0])).unwrap().wait(LONG).unwrap();
    }
    let out = Region::zeroed(4);
    let error = dense.pull(out.write(0..4).unwrap()).unwrap().wait(LONG).unwrap_err();
    assert!(error.to_string().contains("worker 0, 2"), "{error}");
    // What was refused was not counted.
    assert_eq!(client.status().unwrap()[0].sparse[0].clock, 0);
    assert_eq!(pull_now(&servers, "lonely", SparseOptions { mode, ..SparseOptions::default() }, 5..6), [2.0]);
}

#[test]
fn bad_calls_are_refused_before_anything_is_sent() {
    let servers = servers(1);
    let client = client(&servers, None);
    let table = client.sparse("t", 4, DType::F32, SparseOptions::default()).unwrap();
    let refused = |result: Result<gradwire_ps::Pending, PsError>, why: &str| {
        let error = result.expect_err(why);
        assert!(matches!(error, PsError::Invalid { .. }) && error.to_string().contains(why), "{error}");
    };
    refused(table.push(&slice(vec![0; 9]), &floats([0.0; 4])), "no list of ids");
    refused(table.push(&ids([1, 2]), &floats([0.0; 4])), "2 rows of 4 elements");
    refused(table.push_as(&ids([1]), &slice(vec![0; 32]), DType::F64), "loses bits");
    let mode = Mode::Sync { workers: 2 };
    let sync = client.sparse("s", 4, DType::F32, SparseOptions { mode, ..SparseOptions::default() }).unwrap();
    refused(sync.push(&ids([1]), &floats([0.0; 4])), "connect with a worker");
    for options in [
        SparseOptions { eviction: Some(Eviction::Lfu), ..SparseOptions::default() },
        SparseOptions { admission: 0, ..SparseOptions::default() },
        SparseOptions { rule: UpdateRule::Sgd(Sgd { momentum: 0.9, ..Sgd::default() }), ..SparseOptions::default() },
    ] {
        assert!(matches!(client.sparse("bad", 4, DType::F32, options).err(), Some(PsError::Invalid { .. })));
    }
    client.dense("d", &[4], DType::F32, TableOptions::default()).unwrap();
    let error = client.sparse("d", 4, DType::F32, SparseOptions::default()).err().unwrap();
    assert!(error.to_string().contains("dense and sparse"), "{error}");
}
