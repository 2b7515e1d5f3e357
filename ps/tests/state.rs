//! Does: takes shards apart into bytes after random requests, and makes shards of the bytes: they answer with the same bits.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::header::{Header, Kind};
use gradwire_ps::shard::{Action, Limits, Shard};
use gradwire_ps::shard_map::{MAX_PART_BYTES, parts};
use gradwire_ps::state::{BadState, Builder, MAX_CHUNK_BYTES};
use gradwire_ps::{
    Adagrad, Adam, Combine, Compression, Course, DType, Epoch, Eviction, Ftrl, Initializer, KeyRange, Mode, Recovery,
    Schedule, Sgd, ShardMap, SparseSpec, TableSpec, UpdateRule, WarmUp, open_body, open_sparse_body, rate_body,
    shard_of,
};
use gradwire_transport::PeerId;
use proptest::prelude::*;
use std::time::{Duration, Instant};

const CLIENTS: u64 = 3;
const DIM: u64 = 3;

/// A shard, and the moment it is at.
struct Driven {
    shard: Shard,
    now: Instant,
}

fn rules() -> impl Strategy<Value = UpdateRule> {
    prop_oneof![
        Just(UpdateRule::Sum),
        Just(UpdateRule::Replace),
        Just(UpdateRule::Adam(Adam { learning_rate: 0.1, ..Adam::default() })),
        Just(UpdateRule::Adagrad(Adagrad { learning_rate: 0.1, ..Adagrad::default() })),
        Just(UpdateRule::Ftrl(Ftrl { l1: 0.01, ..Ftrl::default() })),
    ]
}

fn dense_rules() -> impl Strategy<Value = UpdateRule> {
    let momentum = UpdateRule::Sgd(Sgd { learning_rate: 0.1, momentum: 0.9, ..Sgd::default() });
    prop_oneof![rules(), Just(momentum)]
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Sync { workers: 3 }), Just(Mode::Ssp { workers: 3, staleness: 1 }), Just(Mode::Async),]
}

fn dense(rule: UpdateRule, mode: Mode, dtype: DType) -> TableSpec {
    TableSpec {
        name: "w".into(),
        shape: vec![5],
        dtype,
        rule,
        mode,
        combine: Combine::Mean,
        // Where a clock can wait for its scale, some tables do.
        clipped: matches!((mode, rule), (Mode::Sync { .. }, UpdateRule::Adam(_))),
        recovery: Recovery::None,
        compression: Compression::default(),
        shards: 1,
        shard: 0,
        part_elements: 3,
    }
}

fn sparse(rule: UpdateRule, mode: Mode, eviction: Option<Eviction>, admission: u8) -> SparseSpec {
    SparseSpec {
        name: "rows".into(),
        dim: DIM,
        dtype: DType::F32,
        rule,
        mode,
        combine: Combine::Sum,
        recovery: Recovery::None,
        compression: Compression::NONE,
        max_grad_norm: None,
        initializer: Initializer::Uniform { low: -1.0, high: 1.0 },
        seed: 3,
        capacity: eviction.map(|_| 6),
        eviction,
        admission,
        shards: 1,
        shard: 0,
    }
}

fn header(kind: Kind, client: u64, sequence: u64) -> Header {
    Header { client, incarnation: 1, epoch: Epoch(1), sequence, ..Header::new(kind) }
}

impl Driven {
    fn send(&mut self, peer: u64, mut header: Header, payload: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        header.payload_bytes = payload.len() as u64;
        self.shard.handle(PeerId(peer as u32), &header, payload, self.now, &mut out);
        out.into_iter().map(told).collect()
    }

    fn greet(&mut self, attempt: u64, specs: (&TableSpec, &SparseSpec)) -> Vec<String> {
        let mut all = Vec::new();
        for client in 0..CLIENTS {
            all.extend(self.send(client, header(Kind::Hello, client, attempt), &[]));
            let open = Header { table: specs.0.id(), ..header(Kind::Open, client, 0) };
            all.extend(self.send(client, open, &open_body(specs.0)));
            let open = Header { table: specs.1.id(), ..header(Kind::OpenSparse, client, 0) };
            all.extend(self.send(client, open, &open_sparse_body(specs.1)));
        }
        all
    }

    /// Makes the request that `pick` stands for.
    fn step(&mut self, pick: &Pick, (dense, sparse): (&TableSpec, &SparseSpec)) -> Vec<String> {
        self.now += Duration::from_millis(pick.pause_ms);
        let client = pick.client;
        let keys =
            if pick.number.is_multiple_of(2) { KeyRange { start: 0, end: 3 } } else { KeyRange { start: 3, end: 5 } };
        let call = header(Kind::Push, client, pick.clock);
        let on_dense = Header { table: dense.id(), keys, dtype: Some(dense.dtype), clock: pick.clock, ..call };
        match pick.what {
            0 => {
                let gradient = numbers(pick.number, keys.len() as usize, dense.dtype);
                self.send(client, on_dense, &gradient)
            }
            1 => self.send(client, Header { kind: Kind::Pull, clock: 0, ..on_dense }, &[]),
            2 => {
                let rate = Header { kind: Kind::SetRate, ..on_dense };
                self.send(client, rate, &rate_body(&schedule(pick.number)))
            }
            3 | 4 => {
                let ids = ids(pick.number);
                let parts = 1 + u32::from(pick.number.is_multiple_of(3));
                let part = u32::from(pick.number) / 3 % parts;
                let mut payload: Vec<u8> = [part, parts].into_iter().flat_map(u32::to_le_bytes).collect();
                payload.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
                payload.extend(numbers(pick.number, ids.len() * DIM as usize, DType::F32));
                let keys = KeyRange { start: 0, end: ids.len() as u64 };
                let dtype = Some(DType::F32);
                let kind = Kind::SparsePush;
                let sequence = 2 * pick.clock + u64::from(part);
                self.send(client, Header { kind, table: sparse.id(), keys, dtype, sequence, ..on_dense }, &payload)
            }
            5 => {
                let ids: Vec<u8> = (0..9u64).flat_map(u64::to_le_bytes).collect();
                let (keys, dtype) = (KeyRange { start: 0, end: 9 }, Some(DType::F32));
                let kind = Kind::SparsePull;
                self.send(client, Header { kind, table: sparse.id(), keys, dtype, clock: 0, ..call }, &ids)
            }
            7 => self.send(client, Header { kind: Kind::Norm, ..on_dense }, &[]),
            8 => {
                let scale = Header { kind: Kind::Scale, ..on_dense };
                self.send(client, scale, &0.5f64.to_le_bytes())
            }
            6 => self.send(client, Header { kind: Kind::Evicted, table: sparse.id(), clock: 0, ..call }, &[]),
            _ => {
                let init = Header { kind: Kind::Init, clock: 0, ..on_dense };
                self.send(client, init, &numbers(pick.number, keys.len() as usize, dense.dtype))
            }
        }
    }

    /// All connections are lost.
    fn alone(&mut self) {
        (0..CLIENTS).for_each(|client| self.shard.gone(PeerId(client as u32), &mut Vec::new()));
    }
}

fn told(action: Action) -> String {
    match action {
        Action::Reply { to, header, body } => format!("{to:?} {header:?} {body:?}"),
        Action::Value { to, header, slice } => format!("{to:?} {header:?} {:?}", &slice[..]),
        other => format!("{other:?}"),
    }
}

fn schedule(number: u8) -> Schedule {
    let rate = f64::from(number) / 64.0;
    let course = if number.is_multiple_of(2) { Course::Constant(rate) } else { Course::List(vec![rate, 0.5, 0.25]) };
    Schedule { warm_up: number.is_multiple_of(3).then_some(WarmUp { steps: 2, from: 0.5 }), course }
}

fn ids(number: u8) -> Vec<u64> {
    (0..8).filter(|bit| number & 1 << bit != 0).collect()
}

fn numbers(seed: u8, count: usize, dtype: DType) -> Vec<u8> {
    let number = |n: usize| (f64::from(seed) - 100.0) / (3.0 + n as f64);
    let bytes = |n: usize| match dtype {
        DType::F64 => number(n).to_le_bytes().to_vec(),
        DType::F32 => (number(n) as f32).to_le_bytes().to_vec(),
        // The upper half of a float is a bfloat16.
        _ => (number(n) as f32).to_le_bytes()[2..].to_vec(),
    };
    (0..count).flat_map(bytes).collect()
}

#[derive(Clone, Debug)]
struct Pick {
    what: u8,
    client: u64,
    clock: u64,
    number: u8,
    pause_ms: u64,
}

fn picks() -> impl Strategy<Value = Vec<Pick>> {
    let pick = (0u8..10, 0..CLIENTS, 1u64..7, any::<u8>(), 0u64..300);
    let pick = pick.prop_map(|(what, client, clock, number, pause_ms)| Pick { what, client, clock, number, pause_ms });
    proptest::collection::vec(pick, 0..60)
}

fn evictions() -> impl Strategy<Value = Option<Eviction>> {
    let ttl = Eviction::Ttl(Duration::from_secs(2));
    prop_oneof![Just(None), Just(Some(Eviction::Lru)), Just(Some(Eviction::Lfu)), Just(Some(ttl))]
}

fn decoded(chunks: &[Vec<u8>], place: (u32, u32), now: Instant) -> Result<Shard, BadState> {
    let mut builder = Builder::new(Limits::default(), 8, place, now);
    chunks.iter().try_for_each(|chunk| builder.take(chunk))?;
    builder.finish()
}

fn driven(first: &[Pick], specs: (&TableSpec, &SparseSpec)) -> Driven {
    let mut driven = Driven { shard: Shard::new(Limits::default(), 8), now: Instant::now() };
    driven.greet(1, specs);
    first.iter().for_each(|pick| {
        driven.step(pick, specs);
    });
    driven
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn a_shard_made_from_bytes_answers_everything_with_the_same_bits(
        rule in dense_rules(), row_rule in rules(), mode in modes(), row_mode in modes(), eviction in evictions(),
        dtype in prop_oneof![Just(DType::F32), Just(DType::F64), Just(DType::BF16)], admission in 1u8..3,
        first in picks(), then in picks(), away_ms in 0u64..10_000,
    ) {
        let (table, rows) = (dense(rule, mode, dtype), sparse(row_rule, row_mode, eviction, admission));
        let specs = (&table, &rows);
        let mut before = driven(&first, specs);
        let chunks = before.shard.chunks(before.now);
        prop_assert!(chunks.iter().all(|chunk| chunk.len() <= MAX_CHUNK_BYTES));
        before.alone();
        // It is made later, in a process whose clock began elsewhere; meanwhile no time has passed for it.
        let later = before.now + Duration::from_millis(away_ms);
        let mut after = Driven { shard: decoded(&chunks, (0, 1), later).unwrap(), now: later };
        prop_assert_eq!(after.shard.chunks(after.now), chunks.clone());
        let (mut here, mut there) = (before.shard.status(0).sparse, after.shard.status(0).sparse);
        for (here, there) in here.iter_mut().zip(&mut there) {
            // Where a clock has been summed, the memory of its sum is kept for the next one; what is made anew has none yet.
            prop_assert!(there.bytes <= here.bytes);
            (here.bytes, there.bytes) = (0, 0);
        }
        prop_assert_eq!(here, there);
        prop_assert_eq!(before.greet(2, specs), after.greet(2, specs));
        for pick in &then {
            prop_assert_eq!(before.step(pick, specs), after.step(pick, specs));
        }
        prop_assert_eq!(before.shard.chunks(before.now), after.shard.chunks(after.now));
    }

    #[test]
    fn what_is_missing_or_changed_is_refused_or_means_something(
        mode in modes(), row_mode in modes(), first in picks(), at in any::<u32>(), byte in any::<u8>(), cut in any::<u32>(),
    ) {
        let (table, rows) = (dense(UpdateRule::Sum, mode, DType::F32), sparse(UpdateRule::Sum, row_mode, None, 2));
        let mut shard = driven(&first, (&table, &rows)).shard;
        let chunks = shard.chunks(Instant::now());
        let which = at as usize % chunks.len();
        // A whole chunk less, and all of them but the clients and what was evicted, say so.
        let mut fewer = chunks.clone();
        let gone = fewer.remove(which);
        let optional = [1, 7, 8].contains(&gone[1]);
        prop_assert!(optional || decoded(&fewer, (0, 1), Instant::now()).is_err(), "without a chunk of kind {}", gone[1]);
        let mut shorter = chunks.clone();
        let length = cut as usize % shorter[which].len();
        shorter[which].truncate(length);
        prop_assert!(gone[1] == 8 || decoded(&shorter, (0, 1), Instant::now()).is_err());
        let mut changed = chunks;
        let length = changed[which].len();
        changed[which][cut as usize % length] = byte;
        if let Ok(shard) = decoded(&changed, (0, 1), Instant::now()) {
            // Whatever it means, it is driven without a panic.
            let mut driven = Driven { shard, now: Instant::now() };
            driven.greet(2, (&table, &rows));
            first.iter().for_each(|pick| { driven.step(pick, (&table, &rows)); });
        }
    }

    #[test]
    fn bytes_of_any_kind_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100), kind in 0u8..14) {
        let mut builder = Builder::new(Limits::default(), 8, (0, 1), Instant::now());
        let _ = builder.take(&bytes);
        let forged = [&[1, kind][..], &bytes].concat();
        let mut builder = Builder::new(Limits::default(), 8, (0, 1), Instant::now());
        let _ = builder.take(&forged);
    }
}

/// All shards of a table of `elements`, after `clocks` whole clocks of two workers.
fn trained(shards: u32, mode: Mode, clocks: std::ops::RangeInclusive<u64>, into: Option<Vec<Shard>>) -> Vec<Shard> {
    let elements = 40_000;
    let fresh = (0..shards).map(|_| Shard::new(Limits::default(), 8));
    let mut all: Vec<Shard> = into.unwrap_or_else(|| fresh.collect());
    let now = Instant::now();
    for (shard, driven) in (0..).zip(&mut all) {
        let mut out = Vec::new();
        let (table, rows) = cut(shard, shards, mode, elements);
        for client in 0..2 {
            let peer = PeerId(client as u32);
            driven.gone(peer, &mut out);
            let hello = Header { incarnation: *clocks.start() + 1, ..header(Kind::Hello, client, 1) };
            driven.handle(peer, &hello, &[], now, &mut out);
            let me = Header { incarnation: hello.incarnation, ..header(Kind::Open, client, 0) };
            let body = open_body(&table);
            let open = Header { table: table.id(), payload_bytes: body.len() as u64, ..me };
            driven.handle(peer, &open, &body, now, &mut out);
            let body = open_sparse_body(&rows);
            let open = Header { kind: Kind::OpenSparse, table: rows.id(), payload_bytes: body.len() as u64, ..me };
            driven.handle(peer, &open, &body, now, &mut out);
        }
        let range = ShardMap::new(Epoch(1), shards).unwrap().range(elements, shard);
        for (clock, client) in clocks.clone().flat_map(|clock| [(clock, 0), (clock, 1)]) {
            let me = Header { incarnation: *clocks.start() + 1, ..header(Kind::Push, client, clock) };
            for keys in parts(range, table.part_elements) {
                let gradient: Vec<u8> = (keys.start..keys.end)
                    .flat_map(|key| ((key % 97) as f32 / (clock + client) as f32).to_le_bytes())
                    .collect();
                let push = Header { table: table.id(), keys, dtype: Some(DType::F32), clock, ..me };
                let push = Header { payload_bytes: gradient.len() as u64, ..push };
                driven.handle(PeerId(client as u32), &push, &gradient, now, &mut out);
            }
            let mut ids: Vec<u64> = (0..300).map(|n| n * (clock + client) % 400).collect();
            ids.sort_unstable();
            ids.dedup();
            ids.retain(|&id| shard_of(id, shards) == shard);
            let mut payload: Vec<u8> = [0u32, 1].into_iter().flat_map(u32::to_le_bytes).collect();
            payload.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            let row = |id: &u64| (0..DIM).flat_map(|n| ((id + n + clock) as f32).to_le_bytes()).collect::<Vec<_>>();
            payload.extend(ids.iter().flat_map(row));
            let keys = KeyRange { start: shard.into(), end: u64::from(shard) + ids.len() as u64 };
            let push = Header { kind: Kind::SparsePush, table: rows.id(), keys, dtype: Some(DType::F32), clock, ..me };
            let push = Header { payload_bytes: payload.len() as u64, ..push };
            driven.handle(PeerId(client as u32), &push, &payload, now, &mut out);
        }
        let refused =
            out.iter().find(|action| matches!(action, Action::Reply { header, .. } if header.kind == Kind::Refused));
        assert!(refused.is_none(), "{refused:?}");
    }
    all
}

fn cut(shard: u32, shards: u32, mode: Mode, elements: u64) -> (TableSpec, SparseSpec) {
    let adam = UpdateRule::Adam(Adam { learning_rate: 0.1, ..Adam::default() });
    let part_elements = gradwire_ps::shard_map::part_elements(elements, shards, DType::F32, MAX_PART_BYTES);
    let table = TableSpec {
        clipped: false,
        shape: vec![elements],
        shards,
        shard,
        part_elements,
        ..dense(adam, mode, DType::F32)
    };
    (table, SparseSpec { shards, shard, ..sparse(adam, mode, None, 1) })
}

/// Every value and row, whatever shard holds it.
fn contents(all: &mut [Shard], mode: Mode) -> Vec<u8> {
    let shards = all.len() as u32;
    let (mut values, mut rows_told) = (Vec::new(), std::collections::BTreeMap::new());
    for (shard, driven) in (0..).zip(all) {
        let (table, rows) = cut(shard, shards, mode, 40_000);
        let mut out = Vec::new();
        let me = Header { client: 99, incarnation: 1, epoch: Epoch(1), sequence: 1, ..Header::new(Kind::Hello) };
        driven.handle(PeerId(99), &me, &[], Instant::now(), &mut out);
        out.clear();
        let range = ShardMap::new(Epoch(1), shards).unwrap().range(40_000, shard);
        for keys in parts(range, table.part_elements) {
            let pull = Header { kind: Kind::Pull, table: table.id(), keys, dtype: Some(DType::F32), ..me };
            driven.handle(PeerId(99), &pull, &[], Instant::now(), &mut out);
            let Some(Action::Value { slice, .. }) = out.pop() else { panic!("{out:?}") };
            values.extend_from_slice(&slice);
        }
        let ids: Vec<u64> = (0..500).filter(|&id| shard_of(id, shards) == shard).collect();
        let payload: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let keys = KeyRange { start: shard.into(), end: u64::from(shard) + ids.len() as u64 };
        let pull = Header { kind: Kind::SparsePull, table: rows.id(), keys, dtype: Some(DType::F32), ..me };
        let pull = Header { payload_bytes: payload.len() as u64, ..pull };
        driven.handle(PeerId(99), &pull, &payload, Instant::now(), &mut out);
        let Some(Action::Value { slice, .. }) = out.pop() else { panic!("{out:?}") };
        rows_told.extend(ids.into_iter().zip(slice.chunks(4 * DIM as usize).map(<[u8]>::to_vec)));
    }
    values.extend(rows_told.into_values().flatten());
    values
}

#[test]
fn three_shards_cut_anew_into_any_number_go_on_with_the_same_bits() {
    for mode in [Mode::Sync { workers: 2 }, Mode::Ssp { workers: 2, staleness: 1 }, Mode::Async] {
        let chunks: Vec<Vec<u8>> =
            trained(3, mode, 1..=4, None).iter_mut().flat_map(|shard| shard.chunks(Instant::now())).collect();
        let expected = contents(&mut trained(3, mode, 5..=7, Some(trained(3, mode, 1..=4, None))), mode);
        for shards in [1, 2, 3, 5] {
            let made: Result<Vec<Shard>, _> = if shards == 3 {
                // As many as before: each takes its own alone.
                (0..3)
                    .map(|shard| {
                        let mut own = trained(3, mode, 1..=4, None);
                        decoded(&own[shard as usize].chunks(Instant::now()), (shard, 3), Instant::now())
                    })
                    .collect()
            } else {
                (0..shards).map(|shard| decoded(&chunks, (shard, shards), Instant::now())).collect()
            };
            let mut after = trained(shards, mode, 5..=7, Some(made.unwrap()));
            assert!(contents(&mut after, mode) == expected, "{mode} on {shards} shards");
        }
    }
}

#[test]
fn a_shard_that_is_missing_is_noticed() {
    let mode = Mode::Sync { workers: 2 };
    let mut all = trained(3, mode, 1..=2, None);
    let two: Vec<Vec<u8>> = all[..2].iter_mut().flat_map(|shard| shard.chunks(Instant::now())).collect();
    for place in [(0, 1), (1, 2), (4, 5)] {
        let error = decoded(&two, place, Instant::now()).err().unwrap();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
