//! Does: compressed sparse tables over clients and servers of one process: what arrives, how many bytes that takes, what is refused.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Adam, Client, ClientSettings, Codec, Combine, Compression, DType, Initializer, LocalServers, Mode, PsError,
    ServerSettings, SparseOptions, SparseTable, UpdateRule,
};
use gradwire_transport::{Region, RegionSlice};
use std::time::Duration;

const DIM: usize = 150;
const IDS: usize = 4_000;
const CODECS: [(Codec, f64); 3] = [(Codec::Bf16, 1.0 / 256.0), (Codec::F16, 1.0 / 2048.0), (Codec::Int8, 1.0 / 253.0)];

fn client(servers: &LocalServers, worker: u32) -> Client {
    let settings = ClientSettings { worker: Some(worker), timeout: Duration::from_secs(20), ..Default::default() };
    Client::connect(servers.addresses(), settings).unwrap()
}

fn options(workers: u32, push: Codec, pull: Codec) -> SparseOptions {
    let compression = Compression { push, pull };
    SparseOptions { mode: Mode::Sync { workers }, compression, ..SparseOptions::default() }
}

fn slice(bytes: Vec<u8>) -> RegionSlice {
    let region = Region::from_vec(bytes);
    region.read(0..region.len()).unwrap()
}

fn ids(ids: impl Iterator<Item = u64>) -> RegionSlice {
    slice(ids.flat_map(u64::to_le_bytes).collect())
}

fn number(step: usize, worker: u32, at: usize) -> f32 {
    let mixed = (at as u64 + 31 * step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(worker)) >> 40;
    mixed as f32 / (1 << 23) as f32 - 1.0
}

fn numbers(dtype: DType, numbers: impl Iterator<Item = f32>) -> RegionSlice {
    slice(match dtype {
        DType::F64 => numbers.flat_map(|number| f64::from(number).to_le_bytes()).collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    })
}

fn pull(table: &SparseTable, of: &RegionSlice) -> Vec<f64> {
    let each = table.dtype().bytes();
    let out = Region::zeroed(of.len() / 8 * table.dim() * each);
    table.pull(of, out.write(0..out.len()).unwrap()).unwrap().wait(None).unwrap();
    let bytes = out.read(0..out.len()).unwrap();
    let one = |bytes: &[u8]| match table.dtype() {
        DType::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        _ => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
    };
    bytes.chunks(each).map(one).collect()
}

/// Bytes of pushes and of pulled values that all servers have counted.
fn travelled(client: &Client) -> (u64, u64) {
    let status = client.status().unwrap();
    let tables = status.iter().flat_map(|shard| &shard.sparse);
    tables.fold((0, 0), |(pushed, pulled), table| (pushed + table.pushed_bytes, pulled + table.pulled_bytes))
}

#[test]
fn rows_arrive_near_what_they_were_both_ways_and_take_as_few_bytes_as_their_codec() {
    for dtype in [DType::F32, DType::F64] {
        for (codec, bound) in CODECS {
            for (push, value) in [(codec, Codec::Whole), (Codec::Whole, codec)] {
                let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
                let client = client(&servers, 0);
                let table = client.sparse("rows", DIM, dtype, options(1, push, value)).unwrap();
                // Every id comes twice, and is summed before it travels.
                let twice = ids((0..IDS as u64).chain(0..IDS as u64));
                let gradient = |at: usize| number(at / (IDS * DIM), 0, at % (IDS * DIM));
                table.push(&twice, &numbers(dtype, (0..2 * IDS * DIM).map(gradient))).unwrap().wait(None).unwrap();
                let got = pull(&table, &ids(0..IDS as u64));
                for (at, got) in got.into_iter().enumerate() {
                    let exact = f64::from(gradient(at)) + f64::from(gradient(at + IDS * DIM));
                    assert!((got - exact).abs() <= 2.0 * bound, "{dtype} {push} {value}: {got} and {exact}");
                }
                let row = |codec: Codec| match codec {
                    Codec::Whole => DIM * dtype.bytes(),
                    Codec::Int8 => DIM + 8,
                    _ => 2 * DIM,
                };
                let (pushed, pulled) = travelled(&client);
                let rows = (IDS * (8 + row(push))) as u64;
                assert!((rows..rows + 1000).contains(&pushed), "{push}: {pushed} bytes, and rows have {rows}");
                assert_eq!(pulled, (IDS * row(value)) as u64, "{value}");
            }
        }
    }
}

/// Four steps of three workers over ids that partly meet; the bits of the rows, in full and as they travel.
fn train(shards: u32, push: Codec, value: Codec) -> Vec<u64> {
    let servers = LocalServers::start(shards, ServerSettings::default()).unwrap();
    let clients: Vec<_> = (0..3).map(|worker| client(&servers, worker)).collect();
    let run = |(worker, client): (u32, &Client)| {
        let rule = UpdateRule::Adam(Adam::default());
        let initializer = Initializer::Normal { mean: 0.0, deviation: 0.1 };
        let options = SparseOptions { rule, initializer, combine: Combine::Mean, ..options(3, push, value) };
        let table = client.sparse("rows", 10, DType::F32, options).unwrap();
        for step in 0..4 {
            let of = ids((0..500).map(|n| (n * (1 + u64::from(worker) + step)) % 700));
            let gradient = numbers(DType::F32, (0..5000).map(|at| number(step as usize, worker, at)));
            table.push(&of, &gradient).unwrap().wait(None).unwrap();
        }
        pull(&table, &ids(0..800)).into_iter().map(f64::to_bits).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..).zip(&clients).map(|each| scope.spawn(move || run(each))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(results.iter().all(|result| *result == results[0]), "all workers read the same bits");
        results[0].clone()
    })
}

#[test]
fn compressed_rows_have_the_same_bits_in_every_run_over_any_number_of_shards() {
    for (push, value) in [(Codec::Int8, Codec::Int8), (Codec::Bf16, Codec::F16)] {
        let first = train(1, push, value);
        assert!(train(3, push, value) == first, "{push} {value}");
        assert!(train(1, Codec::Whole, value) != first, "what is not compressed is another sum");
    }
}

#[test]
fn what_cannot_be_is_refused_and_says_why() {
    let servers = LocalServers::start(1, ServerSettings::default()).unwrap();
    let (one, two) = (client(&servers, 0), client(&servers, 1));
    let open = |client: &Client, dim, push, value| client.sparse("rows", dim, DType::F32, options(2, push, value));
    let top = Codec::TopK { share: 0.1 };
    for (dim, push, value, why) in [
        (4, top, Codec::Whole, "ids have picked the rows already"),
        (4, Codec::Whole, top, "values by top-k"),
        (1, Codec::Int8, Codec::Whole, "what makes its rows shorter"),
        (1, Codec::Whole, Codec::Int8, "what makes its rows shorter"),
    ] {
        let refused = open(&one, dim, push, value).err().unwrap();
        assert!(matches!(refused, PsError::Invalid { .. }) && refused.to_string().contains(why), "{refused}");
    }
    let table = open(&one, 4, Codec::Int8, Codec::Whole).unwrap();
    let refused = open(&two, 4, Codec::Int8, Codec::Bf16).err().unwrap().to_string();
    assert!(refused.contains("compression: expected push int8, pull none, got push int8, pull bf16"), "{refused}");
    let gradient = numbers(DType::F32, [1.0, 1.0, 1.0, 1.0, 1.0, f32::NAN, 1.0, 1.0].into_iter());
    let refused = table.push(&ids([7, 9].into_iter()), &gradient).unwrap_err().to_string();
    assert!(refused.contains("id 9: element 1 of the gradient is NaN"), "{refused}");
    assert_eq!(table.clock(), 0, "nothing was sent");
}
