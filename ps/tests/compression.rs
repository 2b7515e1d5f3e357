//! Does: compressed tables over clients and servers of one process: what arrives, what adds up, what is refused.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Client, ClientSettings, Codec, Combine, Compression, DType, DenseTable, LocalServers, Mode, PsError,
    ServerSettings, Sgd, TableOptions, UpdateRule,
};
use gradwire_transport::{Region, RegionSlice};
use std::time::Duration;

const ELEMENTS: usize = 100_003;
const CODECS: [Codec; 4] = [Codec::Bf16, Codec::F16, Codec::Int8, Codec::TopK { share: 0.02 }];

fn client(servers: &LocalServers, worker: u32) -> Client {
    let settings = ClientSettings { worker: Some(worker), timeout: Duration::from_secs(20), ..Default::default() };
    Client::connect(servers.addresses(), settings).unwrap()
}

fn options(workers: u32, push: Codec, pull: Codec) -> TableOptions {
    let rule = UpdateRule::Sgd(Sgd { learning_rate: 1.0, momentum: 0.5, ..Sgd::default() });
    let compression = Compression { push, pull };
    TableOptions { rule, mode: Mode::Sync { workers }, combine: Combine::Mean, compression, ..TableOptions::default() }
}

fn number(step: usize, worker: u32, at: usize) -> f32 {
    let mixed = (at as u64 + 31 * step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(worker)) >> 40;
    (mixed as f32 / (1 << 23) as f32 - 1.0) * if at.is_multiple_of(50) { 8.0 } else { 0.5 }
}

fn gradient(dtype: DType, numbers: impl Iterator<Item = f32>) -> RegionSlice {
    let bytes: Vec<u8> = match dtype {
        DType::F64 => numbers.flat_map(|number| f64::from(number).to_le_bytes()).collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    };
    let length = bytes.len();
    Region::from_vec(bytes).read(0..length).unwrap()
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let one = |bytes: &[u8]| match dtype {
        DType::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        _ => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
    };
    bytes.chunks(dtype.bytes()).map(one).collect()
}

fn pull(table: &DenseTable, whole: bool) -> Vec<f64> {
    let bytes = table.elements() * table.dtype().bytes();
    let out = Region::zeroed(bytes);
    let into = out.write(0..bytes).unwrap();
    let pending = if whole { table.pull_whole(into) } else { table.pull(into) };
    pending.unwrap().wait(None).unwrap();
    floats(table.dtype(), &out.read(0..bytes).unwrap())
}

/// Four steps of three workers, each on a thread; the last values in full, and as they are pulled.
fn train(shards: u32, dtype: DType, push: Codec, value: Codec) -> (Vec<u64>, Vec<u64>) {
    let servers = LocalServers::start(shards, ServerSettings::default()).unwrap();
    let clients: Vec<_> = (0..3).map(|worker| client(&servers, worker)).collect();
    let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let run = |(worker, client): (u32, &Client)| {
            let table = client.dense("w", &[ELEMENTS], dtype, options(3, push, value)).unwrap();
            let out = Region::zeroed(ELEMENTS * dtype.bytes());
            for step in 0..4 {
                let mine = gradient(dtype, (0..ELEMENTS).map(|at| number(step, worker, at)));
                let into = out.write(0..ELEMENTS * dtype.bytes()).unwrap();
                table.push_pull(mine, into).unwrap().wait(None).unwrap();
            }
            let last = floats(dtype, &out.read(0..ELEMENTS * dtype.bytes()).unwrap());
            assert!(pull(&table, false) == last);
            (bits(pull(&table, true)), bits(last))
        };
        let threads: Vec<_> = (0..).zip(&clients).map(|each| scope.spawn(move || run(each))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(results.iter().all(|result| *result == results[0]), "all workers read the same bits");
        results[0].clone()
    })
}

#[test]
fn compressed_training_gives_the_same_bits_in_every_run() {
    for (push, value) in [(Codec::Int8, Codec::Int8), (CODECS[3], Codec::Bf16), (Codec::F16, Codec::F16)] {
        let first = train(2, DType::F32, push, value);
        assert!(train(2, DType::F32, push, value) == first);
    }
    // Sixteen bits an element know no parts, so the number of shards does not matter either.
    assert!(train(1, DType::F64, Codec::Bf16, Codec::F16) == train(3, DType::F64, Codec::Bf16, Codec::F16));
}

#[test]
fn what_a_gradient_loses_comes_with_a_later_one() {
    for codec in CODECS {
        let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
        let client = client(&servers, 0);
        let rule = UpdateRule::Sum;
        let options = TableOptions { rule, ..options(1, codec, Codec::Whole) };
        let table = client.dense("w", &[ELEMENTS], DType::F32, options).unwrap();
        let mut whole = vec![0.0f64; ELEMENTS];
        let steps = 100;
        for step in 0..steps {
            let mine = gradient(DType::F32, (0..ELEMENTS).map(|at| number(step % 5, 0, at)));
            whole.iter_mut().enumerate().for_each(|(at, sum)| *sum += f64::from(number(step % 5, 0, at)));
            table.push(mine).unwrap().wait(None).unwrap();
        }
        let got = pull(&table, false);
        let error = |(got, whole): (&f64, &f64)| (got - whole).abs();
        let worst = got.iter().zip(&whole).map(error).fold(0.0, f64::max);
        // With feedback at most what is kept back now; without, the roundings of a hundred gradients.
        let bound = match codec {
            Codec::Int8 => 0.08,
            Codec::TopK { .. } => 40.0,
            Codec::Bf16 => 100.0 * 8.0 / 256.0,
            _ => 100.0 * 8.0 / 2048.0,
        };
        assert!(worst <= bound, "{codec}: {worst}");
        let status = client.status().unwrap();
        let counted =
            |each: fn(&gradwire_ps::TableStatus) -> u64| status.iter().map(|shard| each(&shard.tables[0])).sum::<u64>();
        let all = (steps * ELEMENTS * 4) as u64;
        assert_eq!(counted(|table| table.pushed_whole_bytes), all);
        assert_eq!(
            (counted(|table| table.pulled_bytes), counted(|table| table.pulled_whole_bytes)),
            (4 * ELEMENTS as u64, 4 * ELEMENTS as u64)
        );
        let share = counted(|table| table.pushed_bytes) as f64 / all as f64;
        let expected = match codec {
            Codec::Int8 => 0.258,
            Codec::TopK { .. } => 0.04,
            _ => 0.5,
        };
        assert!((share - expected).abs() < 0.001, "{codec}: {share}");
    }
}

#[test]
fn a_pull_is_near_the_value_and_its_errors_do_not_add_up() {
    let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
    let client = client(&servers, 0);
    for (value, bound) in [(Codec::Bf16, 8.0 / 256.0), (Codec::F16, 8.0 / 2048.0), (Codec::Int8, 8.0 / 253.0)] {
        let name = value.to_string();
        let options = TableOptions { rule: UpdateRule::Replace, ..options(1, Codec::Whole, value) };
        let table = client.dense(&name, &[ELEMENTS], DType::F64, options).unwrap();
        for step in 0..3 {
            let mine = gradient(DType::F64, (0..ELEMENTS).map(|at| number(step, 0, at)));
            table.push(mine).unwrap().wait(None).unwrap();
            for (at, got) in pull(&table, false).into_iter().enumerate() {
                let exact = f64::from(number(step, 0, at));
                assert!((got - exact).abs() <= bound, "{name}: {got} and {exact}");
            }
            assert!(pull(&table, true).into_iter().enumerate().all(|(at, got)| got == f64::from(number(step, 0, at))));
        }
    }
}

#[test]
fn what_cannot_be_is_refused_and_says_why() {
    let servers = LocalServers::start(1, ServerSettings::default()).unwrap();
    let (one, two) = (client(&servers, 0), client(&servers, 1));
    let open = |client: &Client, push, value| client.dense("w", &[4], DType::F32, options(2, push, value));
    for (push, value) in [
        (Codec::Whole, CODECS[3]),
        (Codec::TopK { share: 0.0 }, Codec::Whole),
        (Codec::TopK { share: f64::NAN }, Codec::Whole),
    ] {
        assert!(matches!(open(&one, push, value), Err(PsError::Invalid { .. })));
    }
    let table = open(&one, Codec::Int8, Codec::Whole).unwrap();
    let refused = open(&two, Codec::Bf16, Codec::Whole).err().unwrap();
    assert!(
        refused.to_string().contains("compression: expected push int8, pull none, got push bf16, pull none"),
        "{refused}"
    );
    let refused = table.push(gradient(DType::F32, [1.0, f32::NAN, 1.0, 1.0].into_iter())).unwrap_err();
    assert!(refused.to_string().contains("element 1 of the gradient is NaN"), "{refused}");
    assert_eq!(table.clock(), 0);
}
