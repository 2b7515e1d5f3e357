//! Does: measures what a shard does with a push of rows, by update rule, beside a copy of as many bytes.
//!
//!     cargo bench -p gradwire-ps --bench rows [-- NAME]
//!
//! 1,024 rows that lie in the cache: arithmetic and bookkeeping, not the memory's latency, which `--bench sparse` has. Bytes are
//! those of gradients, of values and of state, each counted as often as it is read or written.
#![allow(clippy::unwrap_used)] // A bench that unwraps fails where it should.

mod common;

use common::{Bench, DIM, spec};
use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire_ps::{Adagrad, Adam, Ftrl, Sgd, SparseSpec, UpdateRule};
use std::hint::black_box;

const ROWS: usize = 1024;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("rows");
    let ids: Vec<u8> = (0..ROWS as u64).flat_map(u64::to_le_bytes).collect();
    let gradients = 0.001f32.to_le_bytes().repeat(ROWS * DIM);
    // The numbers of state that a row has for each of its own.
    let rules = [
        ("sum", UpdateRule::Sum, 0),
        ("SGD", UpdateRule::Sgd(Sgd::default()), 0),
        ("Adagrad", UpdateRule::Adagrad(Adagrad::default()), 1),
        ("row-wise Adagrad", UpdateRule::Adagrad(Adagrad { row_wise: true, ..Adagrad::default() }), 0),
        ("Adam", UpdateRule::Adam(Adam::default()), 2),
        ("FTRL", UpdateRule::Ftrl(Ftrl::default()), 2),
    ];
    for (name, rule, state) in rules {
        let bytes = ROWS * DIM * 4 * (1 + 2 + 2 * state);
        let mut bench = Bench::new(&SparseSpec { rule, ..spec() });
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::new("push", name), |b| {
            b.iter(|| bench.push(black_box(&ids), &gradients));
        });
        let (from, mut to) = (vec![1u8; bytes / 2], vec![0u8; bytes / 2]);
        group.bench_function(BenchmarkId::new("copy (limit)", name), |b| {
            b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
        });
    }
    group.finish();
    criterion.final_summary();
}
