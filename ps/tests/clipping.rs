//! Does: clips gradients by the norm over several tables on several servers, and compares bits and numbers.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Adam, Client, ClientSettings, Combine, Compression, DType, DenseTable, LocalServers, Mode, PsError, ServerSettings,
    Sgd, TableOptions, UpdateRule,
};
use gradwire_transport::{Region, RegionSlice};
use std::time::Duration;

const SHAPES: [usize; 4] = [1, 777, 100_003, 3];

fn client(servers: &LocalServers, worker: u32, timeout: Duration) -> Client {
    let settings = ClientSettings { worker: Some(worker), timeout, ..Default::default() };
    Client::connect(servers.addresses(), settings).unwrap()
}

fn options(workers: u32, rule: UpdateRule) -> TableOptions {
    TableOptions {
        rule,
        mode: Mode::Sync { workers },
        combine: Combine::Mean,
        clipped: true,
        compression: Compression::default(),
    }
}

fn open(client: &Client, dtype: DType, options: TableOptions) -> Vec<DenseTable> {
    let name = |elements: usize| format!("{dtype}/{elements}");
    SHAPES.iter().map(|&elements| client.dense(&name(elements), &[elements], dtype, options).unwrap()).collect()
}

/// A gradient of numbers that no order but one would sum to the same bits.
fn number(step: u64, worker: u32, at: usize) -> f32 {
    let mixed = (at as u64 + 7 * step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(worker)) >> 40;
    (mixed as f32 / 1e6 - 8.0) * f32::powi(10.0, (at % 7) as i32 - 3)
}

fn gradient(dtype: DType, step: u64, worker: u32, elements: usize) -> RegionSlice {
    let numbers = (0..elements).map(|at| number(step, worker, at));
    let bytes: Vec<u8> = match dtype {
        DType::F64 => numbers.flat_map(|number| f64::from(number).to_le_bytes()).collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    };
    let length = bytes.len();
    Region::from_vec(bytes).read(0..length).unwrap()
}

fn value(table: &DenseTable) -> Vec<u8> {
    let bytes = table.elements() * table.dtype().bytes();
    let out = Region::zeroed(bytes);
    table.pull(out.write(0..bytes).unwrap()).unwrap().wait(None).unwrap();
    out.read(0..bytes).unwrap().to_vec()
}

/// Three steps of three workers: the bits of all values, and the norms that each worker was told.
fn train(shards: u32, dtype: DType, late: u32) -> (Vec<Vec<u8>>, Vec<Vec<u64>>) {
    let servers = LocalServers::start(shards, ServerSettings::default()).unwrap();
    let rule = UpdateRule::Adam(Adam { learning_rate: 0.1, ..Adam::default() });
    let clients: Vec<_> = (0..3).map(|worker| client(&servers, worker, Duration::from_secs(20))).collect();
    std::thread::scope(|scope| {
        let run = |(worker, client): (u32, &Client)| {
            let tables = open(client, dtype, options(3, rule));
            let mut norms = Vec::new();
            for step in 1..=3 {
                let mut order: Vec<&DenseTable> = tables.iter().collect();
                if worker == late {
                    // In another order of tables, and after everybody else had time to begin.
                    order.reverse();
                }
                let push = |table: &DenseTable| table.push(gradient(dtype, step, worker, table.elements())).unwrap();
                let pushes: Vec<_> = order.iter().map(|table| push(table)).collect();
                norms.push(client.clip(&order, 5.0).unwrap().to_bits());
                assert!(pushes.iter().all(|push| push.wait(None).is_ok()));
            }
            (tables.iter().map(value).collect::<Vec<_>>(), norms)
        };
        let threads: Vec<_> = (0..).zip(&clients).map(|each| scope.spawn(move || run(each))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(results.iter().all(|result| result.0 == results[0].0));
        (results[0].0.clone(), results.into_iter().map(|result| result.1).collect())
    })
}

#[test]
fn clipped_training_gives_the_same_bits_whatever_the_number_of_shards_and_the_order() {
    for dtype in [DType::F32, DType::F64] {
        let (values, norms) = train(1, dtype, 0);
        assert!(norms.iter().all(|norm| *norm == norms[0]));
        for (shards, late) in [(2, 1), (3, 2), (5, 0)] {
            assert!(train(shards, dtype, late) == (values.clone(), norms.clone()), "{shards} shards");
        }
    }
}

#[test]
fn a_norm_is_that_of_the_mean_and_what_is_within_it_stays_as_it_is() {
    let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
    let rule = UpdateRule::Sgd(Sgd { learning_rate: 1.0, ..Sgd::default() });
    let clients = [0, 1].map(|worker| client(&servers, worker, Duration::from_secs(20)));
    let tables = clients.each_ref().map(|client| open(client, DType::F64, options(2, rule)));
    let mut expected: Vec<Vec<f64>> = SHAPES.iter().map(|&elements| vec![0.0; elements]).collect();
    for (step, most) in [(1, 5.0), (2, 1e9), (3, 0.0)] {
        for (worker, tables) in (0..).zip(&tables) {
            tables
                .iter()
                .for_each(|table| drop(table.push(gradient(DType::F64, step, worker, table.elements())).unwrap()));
        }
        let mean = |at| (f64::from(number(step, 0, at)) + f64::from(number(step, 1, at))) / 2.0;
        let squares: f64 = SHAPES.iter().flat_map(|&elements| (0..elements).map(mean)).map(|mean| mean * mean).sum();
        let norm = squares.sqrt();
        for (client, tables) in clients.iter().zip(&tables) {
            // The second worker asks when the clock has been applied already.
            let told = client.clip(&tables.iter().collect::<Vec<_>>(), most).unwrap();
            assert!((told - norm).abs() <= 1e-12 * norm, "{told} and {norm}");
        }
        let scale = (most / (norm + 1e-6)).min(1.0);
        for (expected, table) in expected.iter_mut().zip(&tables[1]) {
            expected.iter_mut().enumerate().for_each(|(at, value)| *value -= mean(at) * scale);
            for (expected, got) in expected.iter().zip(value(table).chunks(8)) {
                let got = f64::from_le_bytes(got.try_into().unwrap());
                assert!((got - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{got} and {expected}");
            }
        }
    }
}

#[test]
fn who_clips_what_cannot_be_clipped_is_told() {
    let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
    let quick = Duration::from_millis(700);
    let (one, two) = (client(&servers, 0, quick), client(&servers, 1, quick));
    let plain = TableOptions { clipped: false, ..options(2, UpdateRule::Sum) };
    let table = one.dense("plain", &[4], DType::F32, plain).unwrap();
    assert!(matches!(one.clip(&[&table], 1.0), Err(PsError::Invalid { .. })));
    let asynchronous = TableOptions { mode: Mode::Async, ..options(2, UpdateRule::Sum) };
    assert!(matches!(one.dense("async", &[4], DType::F32, asynchronous), Err(PsError::Invalid { .. })));
    let tables = [&one, &two].map(|client| client.dense("w", &[40], DType::F32, options(2, UpdateRule::Sum)).unwrap());
    assert!(matches!(one.clip(&[&tables[0]], 1.0), Err(PsError::Invalid { .. })), "nothing was pushed");
    let push = |worker: u32| drop(tables[worker as usize].push(gradient(DType::F32, 1, worker, 40)).unwrap());
    push(0);
    assert!(matches!(one.clip(&[&tables[0]], f64::NAN), Err(PsError::Invalid { .. })));
    match one.clip(&[&tables[0]], 1.0) {
        Err(PsError::Timeout { what, .. }) => assert!(what.contains("nothing from worker 1"), "{what}"),
        other => panic!("{other:?}"),
    }
    push(1);
    one.clip(&[&tables[0]], 1.0).unwrap();
    let refused = two.clip(&[&tables[1]], 2.0).unwrap_err();
    assert!(refused.to_string().contains("do all workers clip the same"), "{refused}");
    two.clip(&[&tables[1]], 1.0).unwrap();
}
