//! What a shard does where clients come and go, and where memory is short.

use super::*;
use crate::{Combine, Compression, DType, Initializer, KeyRange, Mode, UpdateRule, open_body, open_sparse_body};

/// A table of so many elements, all of it in one part of one shard.
pub(super) fn spec(name: &str, elements: u64, mode: Mode) -> TableSpec {
    TableSpec {
        name: name.into(),
        shape: vec![elements],
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode,
        combine: Combine::Sum,
        clipped: false,
        recovery: Recovery::None,
        compression: Compression::default(),
        shards: 1,
        shard: 0,
        part_elements: elements.min(1 << 18),
    }
}

/// A shard, and one table whose whole share is one part.
struct Bench {
    shard: Shard,
    spec: TableSpec,
}

impl Bench {
    /// With clients from 0 on, each over the connection of its number.
    fn new(clients: u32, limits: Limits, spec: TableSpec) -> Self {
        let mut bench = Self { shard: Shard::new(limits, 1), spec };
        (0..clients).for_each(|client| bench.hello(client, client.into(), 1));
        bench.open(&bench.spec.clone()).unwrap();
        bench
    }

    fn hello(&mut self, peer: u32, client: u64, attempt: u64) {
        let header = Header { client, sequence: attempt, ..Header::new(Kind::Hello) };
        self.ask(peer, header, &[]).unwrap();
    }

    fn open(&mut self, spec: &TableSpec) -> Result<Option<u64>, u16> {
        self.ask(0, Header { table: spec.id(), ..Header::new(Kind::Open) }, &open_body(spec))
    }

    /// A request about the table.
    fn about(&self, kind: Kind, client: u64, sequence: u64) -> Header {
        let (table, keys) = (self.spec.id(), KeyRange { start: 0, end: self.spec.shape[0] });
        Header { table, keys, dtype: Some(DType::F32), client, sequence, ..Header::new(kind) }
    }

    /// The clock of the answer, none where it waits; or the status of a refusal.
    fn ask(&mut self, peer: u32, header: Header, payload: &[u8]) -> Result<Option<u64>, u16> {
        let header = Header { incarnation: 1, epoch: Epoch(1), payload_bytes: payload.len() as u64, ..header };
        let mut out = Vec::new();
        self.shard.handle(PeerId(peer), &header, payload, Instant::now(), &mut out);
        match out.iter().find(|it| matches!(it, Action::Reply { to, .. } if *to == PeerId(peer))) {
            Some(Action::Reply { header, .. }) if header.kind == Kind::Refused => Err(header.status),
            Some(Action::Reply { header, .. }) => Ok(Some(header.clock)),
            _ => Ok(None),
        }
    }

    fn gone(&mut self, peer: u32) {
        self.shard.gone(PeerId(peer), &mut Vec::new());
    }

    fn first(&mut self, peer: u32, client: u64, claim: u64, value: f32) {
        let header = self.about(Kind::Init, client, claim);
        self.ask(peer, header, &value.to_le_bytes()).unwrap();
    }

    fn init(&mut self, peer: u32, client: u64, kind: Kind, claim: u64) -> Option<u64> {
        self.ask(peer, self.about(kind, client, claim), &[]).unwrap()
    }

    fn value(&mut self, client: u32) -> f32 {
        let header = Header { incarnation: 1, epoch: Epoch(1), ..self.about(Kind::Pull, client.into(), 1) };
        let mut out = Vec::new();
        self.shard.handle(PeerId(client), &header, &[], Instant::now(), &mut out);
        let Some(Action::Value { slice, .. }) = out.pop() else { panic!("no value") };
        f32::from_le_bytes(slice[..4].try_into().unwrap())
    }

    /// Whether a copy of it can be made now.
    fn can_be_copied(&mut self) -> bool {
        self.shard.make_ready_to_copy(&mut Vec::new())
    }
}

/// A replicated table of one element, whose first values client 0 has claimed, as number 1, before it was gone.
fn abandoned() -> Bench {
    let spec = TableSpec { recovery: Recovery::Replicate { copies: 1 }, ..spec("w", 1, Mode::Async) };
    let mut bench = Bench::new(2, Limits { replicas: 1, ..Limits::default() }, spec);
    assert_eq!(bench.init(0, 0, Kind::ClaimInit, 1), Some(1));
    assert!(!bench.can_be_copied(), "first values are being written");
    bench.gone(0);
    bench
}

#[test]
fn a_claim_whose_holder_dies_while_nobody_waits_is_the_next_one_s() {
    let mut bench = abandoned();
    assert!(bench.can_be_copied(), "nobody writes any more");
    assert_eq!(bench.init(1, 1, Kind::ClaimInit, 1), Some(2));
    bench.first(1, 1, 2, 5.0);
    assert_eq!(bench.init(1, 1, Kind::EndInit, 2), Some(2));
    assert_eq!(bench.value(1), 5.0);
}

#[test]
fn who_comes_back_goes_on_with_its_claim_and_others_wait_for_it() {
    let mut bench = abandoned();
    bench.hello(7, 0, 2);
    bench.first(7, 0, 1, 3.0);
    assert!(!bench.can_be_copied(), "it writes again");
    assert_eq!(bench.init(1, 1, Kind::ClaimInit, 1), None, "it waits");
    assert_eq!(bench.init(7, 0, Kind::EndInit, 1), Some(1));
    assert_eq!((bench.value(1), bench.can_be_copied()), (3.0, true));
}

#[test]
fn who_comes_back_and_dies_again_is_missed_under_its_new_connection() {
    let mut bench = abandoned();
    bench.hello(7, 0, 2);
    bench.first(7, 0, 1, 3.0);
    bench.gone(7);
    assert_eq!(bench.init(1, 1, Kind::ClaimInit, 1), Some(2));
    // It was not gone for ever: what it still says is of a claim that is over, and it waits for the values that count.
    bench.hello(8, 0, 3);
    bench.first(1, 1, 2, 5.0);
    bench.first(8, 0, 1, 9.0);
    assert_eq!(bench.init(8, 0, Kind::EndInit, 1), None);
    let header = bench.about(Kind::EndInit, 1, 2);
    let header = Header { incarnation: 1, epoch: Epoch(1), ..header };
    let mut out = Vec::new();
    bench.shard.handle(PeerId(1), &header, &[], Instant::now(), &mut out);
    let told = out.iter().map(|it| match it {
        Action::Reply { to, header, .. } => (to.0, header.clock),
        other => panic!("{other:?}"),
    });
    assert_eq!(told.collect::<Vec<_>>(), [(8, 0), (1, 2)]);
    assert_eq!((bench.value(1), bench.init(8, 0, Kind::EndInit, 1)), (5.0, Some(0)), "told again, if asked again");
}

#[test]
fn who_has_lost_its_claim_is_given_no_other_in_its_place() {
    let mut bench = abandoned();
    assert_eq!(bench.init(1, 1, Kind::ClaimInit, 1), Some(2));
    bench.hello(7, 0, 2);
    assert_eq!(bench.init(7, 0, Kind::EndInit, 1), None);
    bench.gone(1);
    bench.hello(9, 1, 2);
    assert_eq!(bench.init(9, 1, Kind::ClaimInit, 1), Some(3), "nobody holds it");
}

/// A table of 1 MiB, in a shard that has room for nothing beside it and three contributions that were held once.
fn crowded() -> Bench {
    let mut bench = Bench::new(5, Limits::default(), spec("w", 1 << 18, Mode::Sync { workers: 5 }));
    let table = bench.shard.memory.used;
    for client in [4, 3, 2, 1, 0] {
        let header = Header { clock: 1, ..bench.about(Kind::Push, client, 1) };
        bench.ask(client as u32, header, &vec![0; 1 << 20]).unwrap();
    }
    assert_eq!(bench.shard.memory.used, table + (3 << 20), "they are kept for the next clock");
    bench.shard.memory.limit = bench.shard.memory.used;
    bench
}

#[test]
fn buffers_that_were_kept_for_contributions_make_way_for_a_table() {
    let mut bench = crowded();
    assert_eq!(bench.open(&spec("more", 300_000, Mode::Async)), Ok(Some(0)));
    assert_eq!(bench.open(&spec("too much", 300_000, Mode::Async)), Err(Reason::Limit as u16));
}

#[test]
fn buffers_that_were_kept_for_contributions_make_way_for_rows() {
    let rows = SparseSpec {
        name: "rows".into(),
        dim: 2,
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode: Mode::Async,
        combine: Combine::Sum,
        initializer: Initializer::Zeros,
        seed: 0,
        capacity: None,
        eviction: None,
        admission: 1,
        recovery: Recovery::None,
        compression: Compression::NONE,
        max_grad_norm: None,
        shards: 1,
        shard: 0,
    };
    let mut bench = crowded();
    bench.shard.memory.limit = u64::MAX;
    let open = Header { table: rows.id(), ..Header::new(Kind::OpenSparse) };
    bench.ask(0, open, &open_sparse_body(&rows)).unwrap();
    bench.shard.memory.limit = bench.shard.memory.used;
    let body = [&[0, 0, 0, 0, 1, 0, 0, 0], &7u64.to_le_bytes()[..], &[0; 8]].concat();
    let keys = KeyRange { start: 0, end: 1 };
    let push = Header { table: rows.id(), keys, ..bench.about(Kind::SparsePush, 0, 2) };
    assert_eq!(bench.ask(0, push, &body), Ok(Some(1)));
    assert_eq!(bench.shard.status(0).sparse[0].rows, 1);
}

/// A request for a checkpoint of these tables at a clock.
fn snapshot(tables: &[&TableSpec], clock: u64) -> Vec<u8> {
    let mut body = Writer::default();
    body.text(&crate::checkpoint::name_at(1));
    [0, 1, tables.len() as u64].into_iter().for_each(|number| body.number(number));
    tables.iter().flat_map(|spec| [spec.id().0, clock]).for_each(|number| body.number(number));
    body.0
}

#[test]
fn a_checkpoint_keeps_the_rate_and_the_scale_of_its_clock_however_long_other_tables_take() {
    let rule = UpdateRule::Sgd(crate::Sgd::default());
    let slow = spec("v", 1, Mode::Sync { workers: 1 });
    let fast = TableSpec { rule, clipped: true, ..spec("w", 1, Mode::Sync { workers: 1 }) };
    let mut bench = Bench::new(1, Limits::default(), fast.clone());
    bench.open(&slow).unwrap();
    let rate = |bench: &mut Bench, clock, rate: f64| {
        let header = Header { clock, ..bench.about(Kind::SetRate, 0, clock) };
        bench.ask(0, header, &crate::rate_body(&rate.into())).unwrap();
    };
    let push = |bench: &mut Bench, table: &TableSpec, clock| {
        let header = Header { clock, table: table.id(), ..bench.about(Kind::Push, 0, clock) };
        bench.ask(0, header, &1f32.to_le_bytes()).unwrap();
    };
    let scale = |bench: &mut Bench, clock, scale: f64| {
        let header = Header { clock, ..bench.about(Kind::Scale, 0, clock) };
        bench.ask(0, header, &scale.to_le_bytes()).unwrap();
    };
    rate(&mut bench, 1, 0.5);
    let mut out = Vec::new();
    let body = snapshot(&[&fast, &slow], 1);
    let header =
        Header { incarnation: 1, epoch: Epoch(1), payload_bytes: body.len() as u64, ..Header::new(Kind::Snapshot) };
    bench.shard.handle(PeerId(0), &header, &body, Instant::now(), &mut out);
    assert!(out.is_empty(), "{out:?}");
    for clock in 1..=3 {
        push(&mut bench, &fast, clock);
        scale(&mut bench, clock, 0.25 * clock as f64);
        rate(&mut bench, clock + 2, 0.125);
    }
    let header = Header { clock: 1, table: slow.id(), ..bench.about(Kind::Push, 0, 1) };
    let header = Header { incarnation: 1, epoch: Epoch(1), payload_bytes: 4, ..header };
    bench.shard.handle(PeerId(0), &header, &[0; 4], Instant::now(), &mut out);
    let Some(Action::Store { cut, .. }) = out.iter().find(|it| matches!(it, Action::Store { .. })) else {
        panic!("{out:?}")
    };
    let mut builder = crate::state::Builder::new(Limits::default(), 2, (0, 1), Instant::now());
    cut.tables.iter().flat_map(crate::state::Image::chunks).for_each(|chunk| builder.take(&chunk).unwrap());
    let mut kept = Bench { shard: builder.finish().unwrap(), spec: fast.clone() };
    let table = &kept.shard.status(0).tables;
    let of_fast = table.iter().find(|table| table.spec.name == fast.name).unwrap();
    assert_eq!((of_fast.clock, of_fast.spec.rule.learning_rate()), (1, Some(0.5)));
    // Who asks late by what clock 1 was multiplied is told of another scale than the one that counted.
    kept.hello(0, 0, 1);
    let header = Header { clock: 1, ..kept.about(Kind::Scale, 0, 1) };
    assert_eq!(kept.ask(0, header, &0.75f64.to_le_bytes()), Err(Reason::Mismatch as u16));
    assert_eq!(kept.ask(0, header, &0.25f64.to_le_bytes()), Ok(Some(1)));
}

/// More than one part of a table remembers clients.
const CROWD: u64 = 5000;

/// Pushes 1 to a table in the order of arrival, as the first call of that client.
fn add(bench: &mut Bench, peer: u32, client: u64) -> Result<Option<u64>, u16> {
    bench.ask(peer, bench.about(Kind::Push, client, 1), &1f32.to_le_bytes())
}

#[test]
fn a_call_of_a_client_that_stays_counts_once_however_many_come_and_go() {
    let mut bench = Bench::new(1, Limits::default(), spec("w", 1, Mode::Async));
    add(&mut bench, 0, 0).unwrap();
    // All others started later than the one that stays.
    for client in 1..CROWD {
        bench.hello(1, client, 1);
        add(&mut bench, 1, client).unwrap();
        bench.gone(1);
    }
    assert_eq!(bench.value(0), CROWD as f32);
    add(&mut bench, 0, 0).unwrap();
    assert_eq!(bench.value(0), CROWD as f32, "it was sent again");
}

#[test]
fn where_more_are_connected_than_can_be_remembered_the_newcomer_is_refused() {
    let limits = Limits { clients: CROWD as usize, ..Limits::default() };
    let mut bench = Bench::new(CROWD as u32, limits, spec("w", 1, Mode::Async));
    let taken = (0..CROWD).filter(|&client| add(&mut bench, client as u32, client).is_ok()).count();
    assert_eq!(taken, 4096);
    assert_eq!(add(&mut bench, 4096, 4096), Err(Reason::Limit as u16));
    add(&mut bench, 0, 0).unwrap();
    assert_eq!(bench.value(0), 4096.0, "nothing counts twice, and nothing of who was refused");
    bench.gone(7);
    add(&mut bench, 4096, 4096).unwrap();
    assert_eq!(bench.value(0), 4097.0, "one that is gone makes room");
}
