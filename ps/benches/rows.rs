//! Does: measures what a shard does with a push of rows, by update rule, beside a copy of as many bytes.
//!
//!     cargo bench -p gradwire-ps --bench rows [-- NAME]
//!
//! 1,024 rows that lie in the cache: arithmetic and bookkeeping, not the memory's latency, which `--bench sparse` has. Bytes are
//! those of gradients, of values and of state, each counted as often as it is read or written.
#![allow(clippy::unwrap_used)] // A bench that unwraps fails where it should.

use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire_ps::header::{Header, Kind};
use gradwire_ps::shard::{Action, Shard};
use gradwire_ps::{
    Adagrad, Adam, Combine, DType, Epoch, Ftrl, Initializer, KeyRange, Limits, Mode, Sgd, SparseSpec, TableId,
    UpdateRule, open_sparse_body,
};
use gradwire_transport::PeerId;
use std::hint::black_box;
use std::time::Instant;

const ROWS: usize = 1024;
const DIM: usize = 64;

struct Table {
    shard: Shard,
    out: Vec<Action>,
    sequence: u64,
}

impl Table {
    fn new(rule: UpdateRule) -> Self {
        let mut table = Self { shard: Shard::new(Limits::default(), 7), out: Vec::new(), sequence: 0 };
        table.ask(Kind::Hello, 0, &[]);
        table.ask(Kind::OpenSparse, 0, &open_sparse_body(&SparseSpec { rule, ..spec() }));
        table
    }

    fn ask(&mut self, kind: Kind, rows: usize, payload: &[u8]) {
        self.sequence += 1;
        let header = Header {
            table: TableId::of("rows"),
            incarnation: 1,
            epoch: Epoch(1),
            sequence: self.sequence,
            keys: KeyRange { start: 0, end: rows as u64 },
            dtype: Some(DType::F32),
            payload_bytes: payload.len() as u64,
            ..Header::new(kind)
        };
        self.shard.handle(PeerId(0), &header, payload, Instant::now(), &mut self.out);
        let answer = self.out.pop().unwrap();
        assert!(matches!(&answer, Action::Reply { header, .. } if header.kind != Kind::Refused), "{answer:?}");
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("rows");
    let ids: Vec<u8> = (0..ROWS as u64).flat_map(u64::to_le_bytes).collect();
    let gradients = 0.001f32.to_le_bytes().repeat(ROWS * DIM);
    let push = [&0u32.to_le_bytes()[..], &1u32.to_le_bytes(), &ids, &gradients].concat();
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
        let mut table = Table::new(rule);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::new("push", name), |b| {
            b.iter(|| table.ask(Kind::SparsePush, ROWS, black_box(&push)));
        });
        let (from, mut to) = (vec![1u8; bytes / 2], vec![0u8; bytes / 2]);
        group.bench_function(BenchmarkId::new("copy (limit)", name), |b| {
            b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
        });
    }
    group.finish();
    criterion.final_summary();
}

fn spec() -> SparseSpec {
    SparseSpec {
        name: "rows".into(),
        dim: DIM as u64,
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode: Mode::Async,
        combine: Combine::Sum,
        initializer: Initializer::Zeros,
        seed: 1,
        capacity: None,
        eviction: None,
        admission: 1,
        recovery: gradwire_ps::Recovery::None,
        shards: 1,
        shard: 0,
    }
}
