//! Pure: the tables of the simulation, and what a worker asks for, one thing after the other.

use gradwire_ps::header::{Header, Kind};
use gradwire_ps::{
    Codec, Combine, Compression, DType, Initializer, KeyRange, Mode, Recovery, SparseSpec, TableId, TableSpec,
    UpdateRule, open_body, open_sparse_body,
};

pub const DENSE: u64 = 2;
pub const PUSHES: u64 = 12;
pub const IDS: u64 = 3;
/// What the gradient of each clock of the clipped table is multiplied by.
pub const SCALE: f32 = 0.5;

/// A request, whether it went before, and whether it was answered.
pub type Asked = (Header, Vec<u8>, bool, bool);

fn dense_spec(mode: Mode, clipped: bool) -> TableSpec {
    let push = if clipped { Codec::Bf16 } else { Codec::Whole };
    TableSpec {
        name: if clipped { "clipped" } else { "dense" }.into(),
        shape: vec![DENSE],
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode,
        combine: Combine::Sum,
        clipped,
        compression: Compression { push, pull: Codec::Whole },
        recovery: Recovery::Replicate { copies: 1 },
        shards: 1,
        shard: 0,
        part_elements: DENSE,
    }
}

fn sparse_spec(mode: Mode) -> SparseSpec {
    SparseSpec {
        name: "sparse".into(),
        dim: 1,
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode,
        combine: Combine::Sum,
        initializer: Initializer::Zeros,
        seed: 0,
        capacity: None,
        eviction: None,
        admission: 1,
        recovery: Recovery::Replicate { copies: 1 },
        compression: Compression::NONE,
        max_grad_norm: None,
        shards: 1,
        shard: 0,
    }
}

fn floats(count: u64) -> Vec<u8> {
    (0..count).flat_map(|_| 1f32.to_le_bytes()).collect()
}

fn ids() -> Vec<u8> {
    (0..IDS).flat_map(u64::to_le_bytes).collect()
}

/// What worker `client` of `mode` asks for: opens, pushes, a pull of each table. Synchronous workers clip one table in each step,
/// whose gradients come encoded.
pub fn script(client: u64, mode: Mode) -> Vec<Asked> {
    let clock = |n: u64| if mode.workers().is_some() { n } else { 0 };
    let dense = Header { table: TableId::of("dense"), dtype: Some(DType::F32), ..Header::new(Kind::Push) };
    let sparse = Header { table: TableId::of("sparse"), ..dense };
    let clipped = Header { table: TableId::of("clipped"), ..dense };
    let clips = matches!(mode, Mode::Sync { .. });
    let all = KeyRange { start: 0, end: DENSE };
    let rows = KeyRange { start: 0, end: IDS };
    let mut out = Vec::new();
    out.push((Header { kind: Kind::Open, ..dense }, open_body(&dense_spec(mode, false))));
    if clips {
        out.push((Header { kind: Kind::Open, ..clipped }, open_body(&dense_spec(mode, true))));
    }
    out.push((Header { kind: Kind::OpenSparse, ..sparse }, open_sparse_body(&sparse_spec(mode))));
    for n in 1..=PUSHES {
        let kind = if n % 3 == 0 { Kind::PushPull } else { Kind::Push };
        out.push((Header { kind, keys: all, clock: clock(n), sequence: n, ..dense }, floats(DENSE)));
        let header = Header { kind: Kind::SparsePush, keys: rows, clock: clock(n), sequence: n, ..sparse };
        let part = [0u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
        out.push((header, [part, ids(), floats(IDS)].concat()));
        if clips {
            let header = Header { keys: all, clock: n, sequence: n, ..clipped };
            out.push((Header { codec: Codec::Bf16.code(), ..header }, 0x3f80u16.to_le_bytes().repeat(DENSE as usize)));
            out.push((Header { kind: Kind::Norm, ..header }, Vec::new()));
            out.push((Header { kind: Kind::Scale, ..header }, f64::from(SCALE).to_le_bytes().to_vec()));
        }
    }
    out.push((
        Header { table: TableId(77), keys: KeyRange { start: 0, end: 3 }, sequence: 900, ..Header::new(Kind::Barrier) },
        Vec::new(),
    ));
    out.push((Header { kind: Kind::Pull, keys: all, clock: clock(PUSHES), sequence: 1000, ..dense }, Vec::new()));
    let pull = Header { kind: Kind::SparsePull, keys: rows, clock: clock(PUSHES), sequence: 1001, ..sparse };
    out.push((pull, ids()));
    if clips {
        out.push((Header { kind: Kind::Pull, keys: all, clock: PUSHES, sequence: 1002, ..clipped }, Vec::new()));
    }
    let sealed = (0..).zip(out).map(|(slot, (header, body))| {
        let (incarnation, payload_bytes) = (1, body.len() as u64);
        (Header { client, incarnation, payload_bytes, slot, ..header }, body, false, false)
    });
    sealed.collect()
}
