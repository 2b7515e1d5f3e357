//! Does: measures a shard of a sparse table on one core: memory a row, rows read and updated a second, beside the machine's limit.
//!
//!     cargo bench -p gradwire-ps --bench sparse [-- ROWS]
//!
//! The shard is driven without a wire: what is timed is all that a server does between a request and its answer. The limit
//! is a copy of as many rows of the same length from random places of a plain array, whose places are known beforehand.
#![allow(clippy::unwrap_used)] // A benchmark that unwraps stops where it should.

mod common;

use common::{Bench, DIM, spec};
use gradwire_ps::header::Kind;
use gradwire_ps::shard::Action;
use gradwire_ps::{Adagrad, Eviction, SparseSpec, UpdateRule};
use std::hint::black_box;

/// Ids of a call, and of each of the messages that a client cuts it into.
const CALL: usize = 4096;
const MESSAGE: usize = 1024;
const ROUNDS: usize = 21;
const CALLS: usize = 100;

fn main() {
    let rows = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(10_000_000u64);
    println!("one shard, one core, float32, dim {DIM}, {rows} rows; requests without a wire, time on the core");
    let adagrad = UpdateRule::Adagrad(Adagrad { row_wise: true, ..Adagrad::default() });
    for (name, rule, eviction) in [
        ("no state", UpdateRule::Sum, None),
        ("row-wise Adagrad", adagrad, None),
        ("row-wise Adagrad, LRU", adagrad, Some(Eviction::Lru)),
    ] {
        let capacity = eviction.map(|_| rows);
        measure(name, &SparseSpec { rule, eviction, capacity, ..spec() }, rows);
    }
}

fn measure(name: &str, spec: &SparseSpec, rows: u64) {
    let mut bench = Bench::new(spec);
    let before = resident_bytes();
    let began = on_core_ns();
    let gradients = 0.5f32.to_le_bytes().repeat(MESSAGE * DIM);
    for start in (0..rows).step_by(MESSAGE) {
        let ids: Vec<u8> = (start..rows.min(start + MESSAGE as u64)).flat_map(u64::to_le_bytes).collect();
        bench.push(&ids, &gradients[..ids.len() / 8 * DIM * 4]);
    }
    let made = on_core_ns() - began;
    let state = if spec.rule == UpdateRule::Sum { 0 } else { 1 };
    let (raw, counted) = ((DIM + state) * 4, bench.shard.status(0).memory_bytes);
    let (resident, rows_f) = (resident_bytes() - before, rows as f64);
    println!(
        "{name}: {raw} raw bytes a row; resident {:.1} ({:.3} x), counted {:.1}; made at {:.2} M rows/s",
        resident as f64 / rows_f,
        resident as f64 / rows_f / raw as f64,
        counted as f64 / rows_f,
        rows_f / made as f64 * 1e3,
    );
    verify(&mut bench, rows, spec);
    let flat = vec![1.0f32; rows as usize * DIM];
    let mut random = Random(7);
    let (mut pulls, mut copies, mut pushes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let calls: Vec<Vec<u64>> = (0..CALLS).map(|_| random.ids(rows)).collect();
        let payloads: Vec<Vec<u8>> =
            calls.iter().map(|ids| ids.iter().flat_map(|id| id.to_le_bytes()).collect()).collect();
        pulls.push(timed(|| payloads.iter().for_each(|ids| pull(&mut bench, ids))));
        copies.push(timed(|| calls.iter().for_each(|ids| copy(&flat, ids))));
        let gradients = &gradients;
        pushes.push(timed(|| {
            for ids in payloads.iter().flat_map(|ids| ids.chunks(MESSAGE * 8)) {
                bench.push(ids, &gradients[..ids.len() / 8 * DIM * 4]);
            }
        }));
    }
    let [pulled, copied, pushed] = [pulls, copies, pushes].map(median);
    println!(
        "{name}: pull of {CALL} random ids: {pulled:.2} M rows/s; limit, a plain copy: {copied:.2} ({:.2} of it)",
        pulled / copied
    );
    println!("{name}: push to {CALL} random ids: {pushed:.2} M rows/s");
}

/// What was pushed is read, of some rows, before anything is timed.
fn verify(bench: &mut Bench, rows: u64, spec: &SparseSpec) {
    let mut fresh = Bench::new(spec);
    for id in [0, 1, rows / 2, rows - 1] {
        let value = |bench: &mut Bench| match bench.ask(Kind::SparsePull, 1, &id.to_le_bytes()) {
            Action::Value { slice, .. } => f32::from_le_bytes(slice[..4].try_into().unwrap()),
            other => panic!("{other:?}"),
        };
        let (begun, pushed) = (value(&mut fresh), value(bench));
        let step = if spec.rule == UpdateRule::Sum { 0.5 } else { -0.01 };
        assert!((pushed - begun - step).abs() < 1e-6, "row {id}: {begun} became {pushed}");
    }
}

fn pull(bench: &mut Bench, ids: &[u8]) {
    for ids in ids.chunks(MESSAGE * 8) {
        black_box(bench.ask(Kind::SparsePull, ids.len() / 8, ids));
    }
}

fn copy(flat: &[f32], ids: &[u64]) {
    let mut out = [0.0f32; MESSAGE * DIM];
    for ids in ids.chunks(MESSAGE) {
        for (to, &id) in out.chunks_mut(DIM).zip(ids) {
            to.copy_from_slice(&flat[id as usize * DIM..][..DIM]);
        }
        black_box(&mut out);
    }
}

/// M rows a second of this thread's time on its core, so that what else runs on the machine takes none of it.
fn timed(run: impl FnOnce()) -> f64 {
    let began = on_core_ns();
    run();
    (CALL * CALLS) as f64 / (on_core_ns() - began).max(1) as f64 * 1e3
}

fn on_core_ns() -> u64 {
    // Only a switch of tasks brings the count up to date.
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// The median, in M rows/s.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Random(u64);

impl Random {
    /// A call's ids as they arrive: different, and within each message ascending.
    fn ids(&mut self, rows: u64) -> Vec<u64> {
        let mut ids: Vec<u64> = Vec::with_capacity(2 * CALL);
        while ids.len() < CALL {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ids.push((self.0 >> 16) % rows);
            if ids.len() == CALL {
                ids.sort_unstable();
                ids.dedup();
            }
        }
        ids
    }
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
