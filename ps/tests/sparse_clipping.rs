//! Does: sparse tables that clip each push by the norm of its rows: over all shards, after duplicates are summed.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Client, ClientSettings, Codec, Compression, DType, LocalServers, Mode, PsError, ServerSettings, SparseOptions,
    SparseTable,
};
use gradwire_transport::{Region, RegionSlice};
use std::time::Duration;

const MOST: f64 = 2.0;

fn client(servers: &LocalServers, worker: Option<u32>) -> Client {
    let settings = ClientSettings { worker, timeout: Duration::from_secs(20), ..Default::default() };
    Client::connect(servers.addresses(), settings).unwrap()
}

fn slice(bytes: Vec<u8>) -> RegionSlice {
    let region = Region::from_vec(bytes);
    region.read(0..region.len()).unwrap()
}

fn ids(ids: &[u64]) -> RegionSlice {
    slice(ids.iter().flat_map(|id| id.to_le_bytes()).collect())
}

fn push(table: &SparseTable, of: &[u64], rows: &[f32]) {
    let rows = slice(rows.iter().flat_map(|value| value.to_le_bytes()).collect());
    table.push(&ids(of), &rows).unwrap().wait(None).unwrap();
}

fn pull(table: &SparseTable, of: &[u64]) -> Vec<f32> {
    let out = Region::zeroed(of.len() * table.dim() * 4);
    table.pull(&ids(of), out.write(0..out.len()).unwrap()).unwrap().wait(None).unwrap();
    let bytes = out.read(0..out.len()).unwrap();
    bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn options() -> SparseOptions {
    SparseOptions { max_grad_norm: Some(MOST), ..SparseOptions::default() }
}

/// Pushes 500 rows of which one id comes twice; what they are, and what they would be without the limit.
fn pushed(shards: u32, size: f32) -> (Vec<f32>, Vec<f32>) {
    let servers = LocalServers::start(shards, ServerSettings::default()).unwrap();
    let client = client(&servers, None);
    let table = client.sparse("rows", 3, DType::F32, options()).unwrap();
    let of: Vec<u64> = (0..500).chain([7]).collect();
    let rows: Vec<f32> = (0..501 * 3).map(|n| ((n % 11) as f32 - 4.0) * size).collect();
    push(&table, &of, &rows);
    let mut whole = rows[..1500].to_vec();
    whole[21..24].iter_mut().zip(&rows[1500..]).for_each(|(sum, more)| *sum += more);
    (pull(&table, &of[..500]), whole)
}

fn norm(rows: &[f32]) -> f64 {
    rows.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn the_norm_is_that_of_all_rows_over_all_shards_with_duplicates_summed() {
    let (one, whole) = pushed(1, 0.5);
    assert!(norm(&whole) > 10.0 * MOST);
    assert!((norm(&one) - MOST).abs() < 1e-5, "{}", norm(&one));
    let scale = (MOST / (norm(&whole) + 1e-6)) as f32;
    assert!(one.iter().zip(&whole).all(|(got, value)| got.to_bits() == (value * scale + 0.0).to_bits()));
    let (three, _) = pushed(3, 0.5);
    assert!(one.iter().zip(&three).all(|(one, other)| one.to_bits() == other.to_bits()), "whatever the shards");
}

#[test]
fn a_push_that_is_short_enough_is_left_alone() {
    let (got, whole) = pushed(2, 1.0 / 1024.0);
    assert!(norm(&whole) < MOST);
    assert_eq!(got, whole);
}

#[test]
fn each_worker_s_own_push_is_clipped_before_it_is_compressed_and_summed() {
    let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
    let compression = Compression { push: Codec::F16, pull: Codec::Whole };
    let options = SparseOptions { mode: Mode::Sync { workers: 2 }, compression, ..options() };
    let run = |worker: u32| {
        let client = client(&servers, Some(worker));
        let table = client.sparse("rows", 2, DType::F32, options).unwrap();
        // Far over what 16 bits hold, and short enough.
        let rows = if worker == 0 { [3e6, 0.0, 0.0, 4e6] } else { [0.0, 0.5, 0.25, 0.0] };
        push(&table, &[1, 2], &rows);
        pull(&table, &[1, 2])
    };
    let got = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        (run(0), other.join().unwrap())
    });
    assert_eq!(got.0, got.1);
    for (got, wanted) in got.0.iter().zip([1.2, 0.5, 0.25, 1.6]) {
        assert!((got - wanted).abs() < 1e-3, "{got} {wanted}");
    }
}

#[test]
fn what_is_no_limit_or_another_one_is_refused() {
    let servers = LocalServers::start(1, ServerSettings::default()).unwrap();
    let (one, two) = (client(&servers, None), client(&servers, None));
    let open = |client: &Client, most| {
        client.sparse("rows", 4, DType::F32, SparseOptions { max_grad_norm: Some(most), ..options() })
    };
    for most in [-1.0, f64::NAN, f64::INFINITY, 0.0] {
        let refused = open(&one, most).err().unwrap();
        assert!(matches!(refused, PsError::Invalid { .. }) && refused.to_string().contains("largest norm"));
    }
    open(&one, 1.0).unwrap();
    let refused = open(&two, 2.0).err().unwrap().to_string();
    assert!(refused.contains("largest norm: expected 1, got 2"), "{refused}");
}
