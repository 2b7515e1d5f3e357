//! Does: clients and servers of one process over TCP and shared memory: every type and size, every failure that a
//! user meets.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Adam, Client, ClientSettings, Combine, DType, DenseTable, Limits, LocalServers, Mode, PsError, Reason,
    ServerSettings, Sgd, TableOptions, UpdateRule,
};
use gradwire_transport::{Config, Region, WireChoice};
use half::{bf16, f16};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

const LONG: Option<Duration> = Some(Duration::from_secs(30));

fn servers(shards: u32) -> LocalServers {
    LocalServers::start(shards, ServerSettings::default()).unwrap()
}

fn client(servers: &LocalServers, worker: Option<u32>) -> Client {
    Client::connect(servers.addresses(), settings(worker)).unwrap()
}

/// Every other worker reaches the servers over TCP, the others share memory with them.
fn settings(worker: Option<u32>) -> ClientSettings {
    let default = ClientSettings::default();
    let wire = if worker.is_some_and(|worker| worker % 2 == 1) { WireChoice::Tcp } else { WireChoice::Auto };
    ClientSettings {
        transport: Config { wire, ..default.transport },
        worker,
        timeout: Duration::from_secs(20),
        reconnect: Duration::from_millis(400),
        ..default
    }
}

fn sync(workers: u32, rule: UpdateRule) -> TableOptions {
    TableOptions { rule, mode: Mode::Sync { workers }, combine: Combine::Sum, ..TableOptions::default() }
}

fn encode(dtype: DType, values: impl Iterator<Item = f64>) -> Arc<Region> {
    let one = |value: f64| match dtype {
        DType::F32 => (value as f32).to_le_bytes().to_vec(),
        DType::F64 => value.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        _ => bf16::from_f64(value).to_le_bytes().to_vec(),
    };
    Region::from_vec(values.flat_map(one).collect())
}

fn decode(dtype: DType, region: &Arc<Region>) -> Vec<f64> {
    let bytes = region.read(0..region.len()).unwrap();
    let one = |bytes: &[u8]| match dtype {
        DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
        DType::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        DType::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
    };
    bytes.chunks(dtype.bytes()).map(one).collect()
}

fn all(region: &Arc<Region>) -> gradwire_transport::RegionSlice {
    region.read(0..region.len()).unwrap()
}

fn all_mut(region: &Arc<Region>) -> gradwire_transport::RegionSliceMut {
    region.write(0..region.len()).unwrap()
}

fn pull(table: &DenseTable) -> Vec<f64> {
    let region = Region::zeroed(table.elements() * table.dtype().bytes());
    table.pull(all_mut(&region)).unwrap().wait(LONG).unwrap();
    decode(table.dtype(), &region)
}

/// Small whole numbers, exact in every type, that tell an element's place.
fn places(elements: usize, worker: u32) -> impl Iterator<Item = f64> {
    (0..elements).map(move |n| (n % 31) as f64 + f64::from(worker))
}

#[test]
fn every_type_and_size_arrives_whole_over_every_number_of_servers_and_clients() {
    for shards in 1..=3 {
        let servers = servers(shards);
        for workers in 1..=3u32 {
            let clients: Vec<_> = (0..workers).map(|worker| client(&servers, Some(worker))).collect();
            for dtype in DType::ALL {
                for elements in [0, 1, 5, 1023, 100_003] {
                    let name = format!("{dtype}/{elements}/{workers}");
                    let rule = UpdateRule::Replace;
                    let calls: Vec<_> = clients
                        .iter()
                        .zip(0..)
                        .map(|(client, worker)| {
                            let table = client.dense(&name, &[elements], dtype, sync(workers, rule)).unwrap();
                            let gradient = encode(dtype, places(elements, worker));
                            let out = Region::zeroed(gradient.len());
                            let pending = table.push_pull(all(&gradient), all_mut(&out)).unwrap();
                            (pending, gradient, out)
                        })
                        .collect();
                    let expected: Vec<f64> = places(elements, 0)
                        .map(|n| f64::from(workers) * n + f64::from(workers * (workers - 1) / 2))
                        .collect();
                    for (pending, _, out) in calls {
                        pending.wait(LONG).unwrap();
                        assert!(decode(dtype, &out) == expected, "{name} over {shards} shards");
                    }
                }
            }
        }
    }
}

#[test]
fn a_large_table_goes_out_and_back_at_once() {
    let servers = servers(2);
    let elements = (8 << 20) / 4;
    let clients = [client(&servers, Some(0)), client(&servers, Some(1))];
    let options = TableOptions { combine: Combine::Mean, ..sync(2, UpdateRule::Sum) };
    let tables = [0, 1].map(|n: usize| clients[n].dense("large", &[2, elements / 2], DType::F32, options).unwrap());
    for clock in 1..=4 {
        let calls = [0, 1].map(|n: usize| {
            let gradient = encode(DType::F32, places(elements, n as u32 * 2));
            let out = Region::zeroed(elements * 4);
            (tables[n].push_pull(all(&gradient), all_mut(&out)).unwrap(), out)
        });
        for (pending, out) in calls {
            assert_eq!(pending.wait(LONG).unwrap().clock, clock);
            let expected: Vec<f64> = places(elements, 1).map(|n| n * clock as f64).collect();
            assert!(decode(DType::F32, &out) == expected);
        }
    }
}

#[test]
fn training_gives_the_same_bits_whatever_the_number_of_shards() {
    let rule = UpdateRule::Adam(Adam { learning_rate: 0.01, weight_decay: 0.1, ..Adam::default() });
    let mut results = Vec::new();
    for shards in [1, 2, 3] {
        let servers = servers(shards);
        let clients: Vec<_> = (0..3).map(|worker| client(&servers, Some(worker))).collect();
        let threads: Vec<_> = clients
            .into_iter()
            .zip(0..)
            .map(|(client, worker)| {
                std::thread::spawn(move || {
                    let table = client.dense("w", &[777], DType::F32, sync(3, rule)).unwrap();
                    let first = encode(DType::F32, places(777, 3));
                    table.init(all(&first)).unwrap();
                    let out = Region::zeroed(777 * 4);
                    for step in 0..5 {
                        if step == 3 {
                            table.set_learning_rate(0.1).unwrap();
                        }
                        let gradient =
                            encode(DType::F32, (0..777).map(|n| f64::from(n * 7919 % 613 + worker) * 1.37e-3));
                        table.push_pull(all(&gradient), all_mut(&out)).unwrap().wait(LONG).unwrap();
                    }
                    decode(DType::F32, &out)
                })
            })
            .collect();
        results.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
    }
    assert!(results.iter().all(|result| *result == results[0]));
    assert!(results[0] != places(777, 3).collect::<Vec<_>>());
}

#[test]
fn asynchronous_pushes_of_many_threads_all_count() {
    let servers = servers(2);
    let client = Arc::new(client(&servers, None));
    let table = client.dense("ones", &[3000], DType::F64, TableOptions::default()).unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let table = table.clone();
            std::thread::spawn(move || {
                let ones = encode(DType::F64, (0..3000).map(|_| 1.0));
                let calls: Vec<_> = (0..50).map(|_| table.push(all(&ones)).unwrap()).collect();
                calls.iter().for_each(|call| {
                    call.wait(LONG).unwrap();
                });
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(pull(&table), vec![200.0; 3000]);
}

#[test]
fn a_call_tells_its_end_without_anybody_waiting() {
    let servers = servers(1);
    let client = client(&servers, None);
    let table = client.dense("w", &[10], DType::F32, TableOptions::default()).unwrap();
    let ones = encode(DType::F32, (0..10).map(|_| 1.0));
    let (tell, told) = mpsc::channel();
    let pending = table.push(all(&ones)).unwrap();
    pending.on_done(Box::new(move |result| tell.send(result.is_ok()).unwrap()));
    assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(true));
    assert!(pending.is_done());
    let (tell, told) = mpsc::channel();
    pending.on_done(Box::new(move |result| tell.send(result.is_ok()).unwrap()));
    assert_eq!(told.try_recv(), Ok(true));
}

#[test]
fn a_shorter_gradient_is_widened_and_a_longer_one_refused() {
    let servers = servers(1);
    let client = client(&servers, None);
    let table = client.dense("w", &[4], DType::F32, TableOptions::default()).unwrap();
    let short = encode(DType::BF16, places(4, 0));
    table.push_as(all(&short), DType::BF16).unwrap().wait(LONG).unwrap();
    assert_eq!(pull(&table), [0.0, 1.0, 2.0, 3.0]);
    let long = encode(DType::F64, places(4, 0));
    assert!(matches!(table.push_as(all(&long), DType::F64), Err(PsError::Invalid { .. })));
    assert!(matches!(table.push(all(&long)), Err(PsError::Invalid { .. })));
    let out = Region::zeroed(16);
    let held = out.read(3..4).unwrap();
    assert!(out.write(0..16).is_err());
    drop(held);
    assert!(matches!(table.pull(out.write(0..12).unwrap()), Err(PsError::Invalid { .. })));
}

#[test]
fn who_describes_a_table_otherwise_is_told_what_differs() {
    let servers = servers(2);
    let (one, two) = (client(&servers, Some(0)), client(&servers, Some(1)));
    let sgd = |momentum| UpdateRule::Sgd(Sgd { momentum, ..Sgd::default() });
    one.dense("w", &[4, 2], DType::F32, sync(2, sgd(0.9))).unwrap();
    let cases = [
        (vec![2usize, 4], DType::F32, sync(2, sgd(0.9)), "shape", "[4, 2]", "[2, 4]"),
        (vec![4, 2], DType::F64, sync(2, sgd(0.9)), "dtype", "float32", "float64"),
        (vec![4, 2], DType::F32, sync(3, sgd(0.9)), "mode", "sync(2 workers)", "sync(3 workers)"),
    ];
    for (shape, dtype, options, what, expected, got) in cases {
        match two.dense("w", &shape, dtype, options) {
            Err(PsError::Refused { refusal, .. }) => {
                assert_eq!(refusal.reason, Reason::Mismatch);
                assert_eq!((&*refusal.subject, &*refusal.what), ("table \"w\"", what));
                assert_eq!((&*refusal.expected, &*refusal.got), (expected, got));
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{what} was not compared"),
        }
    }
    let table = two.dense("w", &[4, 2], DType::F32, sync(2, sgd(0.9))).unwrap();
    assert_eq!(table.shape(), [4, 2]);
    let reader = client(&servers, None);
    let table = reader.dense("w", &[4, 2], DType::F32, sync(2, sgd(0.9))).unwrap();
    let gradient = encode(DType::F32, places(8, 0));
    assert!(matches!(table.push(all(&gradient)), Err(PsError::Invalid { .. })));
    assert_eq!(pull(&table), [0.0; 8]);
}

#[test]
fn one_client_writes_the_first_values_and_the_others_find_them() {
    let servers = servers(2);
    let threads: Vec<_> = (0..3)
        .map(|worker| {
            let client = client(&servers, Some(worker));
            std::thread::spawn(move || {
                let table = client.dense("w", &[50_000], DType::F32, sync(3, UpdateRule::Sum)).unwrap();
                let values = encode(DType::F32, places(50_000, worker));
                let mine = table.init(all(&values)).unwrap();
                (mine, worker, pull(&table))
            })
        })
        .collect();
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let winners: Vec<_> = results.iter().filter(|(mine, ..)| *mine).collect();
    assert_eq!(winners.len(), 1);
    let expected: Vec<f64> = places(50_000, winners[0].1).collect();
    assert!(results.iter().all(|(.., value)| *value == expected));
}

#[test]
fn a_wrong_token_is_an_authentication_error_and_off_loopback_one_is_needed() {
    let secret = ServerSettings { token: Some("right".into()), ..Default::default() };
    let servers = LocalServers::start(1, secret).unwrap();
    for token in [None, Some("wrong".to_owned())] {
        let error = Client::connect(servers.addresses(), ClientSettings { token, ..settings(None) }).err().unwrap();
        assert!(
            matches!(&error, PsError::Authentication { address, .. } if *address == servers.addresses()[0]),
            "{error}"
        );
    }
    let token = Some("right".to_owned());
    Client::connect(servers.addresses(), ClientSettings { token, ..settings(None) }).unwrap();
    let open = ServerSettings { listen: "0.0.0.0:0".parse().unwrap(), ..Default::default() };
    let error = LocalServers::start(1, open).err().unwrap();
    assert!(matches!(&error, PsError::Invalid { .. }) && error.to_string().contains("GRADWIRE_TOKEN"), "{error}");
}

#[test]
fn a_server_that_stops_in_a_push_is_named_in_bounded_time() {
    let mut servers = servers(2);
    let address = servers.addresses()[1].clone();
    let client = client(&servers, Some(0));
    let table = client.dense("w", &[4 << 20], DType::F32, sync(2, UpdateRule::Sum)).unwrap();
    let gradient = Region::zeroed(16 << 20);
    let out = Region::zeroed(16 << 20);
    // The other worker never pushes, so this is still under way when the server goes.
    let pending = table.push_pull(all(&gradient), all_mut(&out)).unwrap();
    let begun = Instant::now();
    servers.stop_shard(1);
    match pending.wait(LONG) {
        Err(PsError::ServerLost { shard: 1, address: told, .. }) => assert_eq!(told, address),
        other => panic!("{other:?}"),
    }
    assert!(begun.elapsed() < Duration::from_secs(3), "it took {:?}", begun.elapsed());
    assert!(gradient.write(0..16 << 20).is_ok() && out.write(0..16 << 20).is_ok(), "the buffers are ours again");
    let again = table.push(all(&gradient)).unwrap().wait(LONG);
    assert!(matches!(again, Err(PsError::ServerLost { shard: 1, .. })), "{again:?}");
}

#[test]
fn a_server_that_was_never_there_is_named() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Client::connect(&[free.to_string()], settings(None)).err().unwrap();
    assert!(matches!(&error, PsError::ServerLost { shard: 0, address, .. } if *address == free.to_string()), "{error}");
    assert!(matches!(Client::connect(&[], settings(None)), Err(PsError::Invalid { .. })));
}

#[test]
fn who_waits_for_a_worker_that_does_not_come_is_told_which() {
    let servers = servers(1);
    let patient = ClientSettings { timeout: Duration::from_millis(300), ..settings(Some(1)) };
    let client = Client::connect(servers.addresses(), patient).unwrap();
    let table = client.dense("w", &[4], DType::F32, sync(3, UpdateRule::Sum)).unwrap();
    let (gradient, out) = (Region::zeroed(16), Region::zeroed(16));
    let pending = table.push_pull(all(&gradient), all_mut(&out)).unwrap();
    assert!(matches!(pending.wait(Some(Duration::from_millis(1))), Err(PsError::Timeout { .. })));
    let error = pending.wait(LONG).unwrap_err();
    assert!(matches!(&error, PsError::Timeout { what, .. } if what.contains("worker 0, 2")), "{error}");
    assert!(out.write(0..16).is_ok());
    let error = client.barrier("end", 2, Some(Duration::from_millis(200))).unwrap_err();
    assert!(matches!(&error, PsError::Timeout { what, .. } if what.contains("only client 1")), "{error}");
}

#[test]
fn a_barrier_lets_all_go_at_once_round_after_round() {
    let servers = servers(2);
    let threads: Vec<_> = (0..3)
        .map(|worker| {
            let client = client(&servers, Some(worker));
            std::thread::spawn(move || {
                let table = client.dense("w", &[1], DType::F32, TableOptions::default()).unwrap();
                let one = encode(DType::F32, std::iter::once(1.0));
                for round in 1..=5 {
                    table.push(all(&one)).unwrap().wait(LONG).unwrap();
                    client.barrier("pushed", 3, LONG).unwrap();
                    assert_eq!(pull(&table), [f64::from(3 * round)]);
                    client.barrier("pulled", 3, LONG).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn tables_may_be_used_in_another_order_by_each_worker() {
    let servers = servers(2);
    let threads: Vec<_> = (0..2)
        .map(|worker| {
            let client = client(&servers, Some(worker));
            std::thread::spawn(move || {
                let mut order: Vec<usize> = (0..40).collect();
                if worker == 1 {
                    order.reverse();
                }
                let calls: Vec<_> = order
                    .into_iter()
                    .map(|n| {
                        let table =
                            client.dense(&format!("t{n}"), &[20_000], DType::F32, sync(2, UpdateRule::Sum)).unwrap();
                        let gradient = encode(DType::F32, places(20_000, n as u32));
                        let out = Region::zeroed(80_000);
                        (table.push_pull(all(&gradient), all_mut(&out)).unwrap(), out, n)
                    })
                    .collect();
                for (call, out, n) in calls {
                    call.wait(LONG).unwrap();
                    assert!(decode(DType::F32, &out) == places(20_000, n as u32).map(|x| 2.0 * x).collect::<Vec<_>>());
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn status_tells_of_tables_and_clients() {
    let servers = servers(2);
    let client = client(&servers, Some(0));
    let table = client.dense("w", &[11], DType::F32, sync(1, UpdateRule::Sum)).unwrap();
    table.push(all(&Region::zeroed(44))).unwrap().wait(LONG).unwrap();
    let status = client.status().unwrap();
    assert_eq!(status.len(), 2);
    let elements: u64 = status.iter().map(|shard| shard.tables[0].elements).sum();
    assert_eq!((elements, status[1].tables[0].clock, &*status[1].tables[0].spec.name), (11, 1, "w"));
    assert_eq!((status[0].clients[0].client, status[0].clients[0].pid), (0, std::process::id()));
    assert!(status[0].memory_bytes > 0 && status[0].clients[0].received_bytes > 0);
}

#[test]
fn a_closed_client_ends_its_calls_and_takes_no_more() {
    let servers = servers(1);
    let client = client(&servers, Some(0));
    let table = client.dense("w", &[4], DType::F32, sync(2, UpdateRule::Sum)).unwrap();
    let (gradient, out) = (Region::zeroed(16), Region::zeroed(16));
    let pending = table.push_pull(all(&gradient), all_mut(&out)).unwrap();
    client.close();
    assert!(matches!(pending.wait(LONG), Err(PsError::Closed)));
    assert!(matches!(table.push(all(&gradient)), Err(PsError::Closed)));
    assert!(out.write(0..16).is_ok());
}

#[test]
fn a_second_process_of_a_worker_takes_its_place() {
    let servers = servers(1);
    let old = client(&servers, Some(0));
    let table = old.dense("w", &[4], DType::F32, sync(1, UpdateRule::Sum)).unwrap();
    table.push(all(&Region::zeroed(16))).unwrap().wait(LONG).unwrap();
    let new = client(&servers, Some(0));
    let again = new.dense("w", &[4], DType::F32, sync(1, UpdateRule::Sum)).unwrap();
    assert_eq!(again.clock(), 1, "it goes on where the first was");
    let error = table.push(all(&Region::zeroed(16))).unwrap().wait(LONG).unwrap_err();
    assert!(matches!(&error, PsError::Refused { refusal, .. } if refusal.reason == Reason::Superseded), "{error}");
    again.push(all(&Region::zeroed(16))).unwrap().wait(LONG).unwrap();
}

#[test]
fn a_push_that_finds_no_room_goes_again_until_there_is_some() {
    // Room for the table, and for none of the gradients that have to wait for their turn.
    let limits = Limits { memory_bytes: 1000 * 12 + 1304 + 100, ..Limits::default() };
    let servers = LocalServers::start(1, ServerSettings { limits, ..ServerSettings::default() }).unwrap();
    let tables: Vec<_> = (0..3)
        .map(|worker| {
            let client = client(&servers, Some(worker));
            let table = client.dense("w", &[1000], DType::F32, sync(3, UpdateRule::Sum)).unwrap();
            (client, table)
        })
        .collect();
    let gradients: Vec<_> = (0..3).map(|worker| encode(DType::F32, places(1000, worker))).collect();
    let last = tables[2].1.push(all(&gradients[2])).unwrap();
    assert!(matches!(last.wait(Some(Duration::from_millis(50))), Err(PsError::Timeout { .. })));
    for worker in 0..2 {
        tables[worker].1.push(all(&gradients[worker])).unwrap().wait(LONG).unwrap();
    }
    last.wait(LONG).unwrap();
    assert_eq!(pull(&tables[2].1), places(1000, 1).map(|n| 3.0 * n).collect::<Vec<_>>());
}
