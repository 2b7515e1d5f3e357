//! Does: a shard of one sparse table, driven without a wire: what the benchmarks of rows have in common.

use gradwire_ps::header::{Header, Kind};
use gradwire_ps::shard::{Action, Shard};
use gradwire_ps::{
    Combine, DType, Epoch, Initializer, KeyRange, Limits, Mode, SparseSpec, TableId, UpdateRule, open_sparse_body,
};
use gradwire_transport::PeerId;
use std::time::Instant;

/// Numbers of a row.
pub const DIM: usize = 64;

/// A shard that is asked by one client.
pub struct Bench {
    pub shard: Shard,
    out: Vec<Action>,
    sequence: u64,
}

impl Bench {
    pub fn new(spec: &SparseSpec) -> Self {
        let limits = Limits { memory_bytes: 1 << 36, ..Limits::default() };
        let mut bench = Self { shard: Shard::new(limits, 0x5eed), out: Vec::new(), sequence: 0 };
        bench.ask(Kind::Hello, 0, &[]);
        bench.ask(Kind::OpenSparse, 0, &open_sparse_body(spec));
        bench
    }

    pub fn ask(&mut self, kind: Kind, ids: usize, payload: &[u8]) -> Action {
        self.sequence += 1;
        let header = Header {
            table: TableId::of("bench"),
            incarnation: 1,
            epoch: Epoch(1),
            sequence: self.sequence,
            keys: KeyRange { start: 0, end: ids as u64 },
            dtype: Some(DType::F32),
            payload_bytes: payload.len() as u64,
            ..Header::new(kind)
        };
        self.shard.handle(PeerId(0), &header, payload, Instant::now(), &mut self.out);
        let answer = self.out.pop().unwrap();
        let refused = matches!(&answer, Action::Reply { header, .. } if header.kind == Kind::Refused);
        assert!(!refused, "{answer:?}");
        answer
    }

    /// Pushes a row of `gradients` for each of `ids`.
    pub fn push(&mut self, ids: &[u8], gradients: &[u8]) {
        let payload = [&0u32.to_le_bytes()[..], &1u32.to_le_bytes(), ids, gradients].concat();
        self.ask(Kind::SparsePush, ids.len() / 8, &payload);
    }
}

/// The table, without an optimizer.
pub fn spec() -> SparseSpec {
    SparseSpec {
        name: "bench".into(),
        dim: DIM as u64,
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode: Mode::Async,
        combine: Combine::Sum,
        initializer: Initializer::Uniform { low: -0.1, high: 0.1 },
        seed: 1,
        capacity: None,
        eviction: None,
        admission: 1,
        recovery: gradwire_ps::Recovery::None,
        compression: gradwire_ps::Compression::NONE,
        max_grad_norm: None,
        shards: 1,
        shard: 0,
    }
}
