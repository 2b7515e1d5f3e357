//! Does: drives a shard by hand, in every order, with every duplicate, and looks at what it answers.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::header::{FLAG_AGAIN, Header, Kind};
use gradwire_ps::shard::{Action, Limits, Shard};
use gradwire_ps::shard_map::{MAX_PART_BYTES, part_elements, parts};
use gradwire_ps::{
    Adam, Combine, Compression, DType, Epoch, Eviction, Initializer, KeyRange, Mode, Reason, Refusal, Sgd, ShardMap,
    SparseSpec, TableId, TableSpec, UpdateRule, open_body, open_sparse_body, rate_body,
};
use gradwire_transport::PeerId;
use proptest::prelude::*;
use std::time::{Duration, Instant};

struct Bench {
    shard: Shard,
    now: Instant,
    out: Vec<Action>,
}

fn spec(elements: u64, mode: Mode, rule: UpdateRule) -> TableSpec {
    TableSpec {
        name: "w".into(),
        shape: vec![elements],
        dtype: DType::F32,
        rule,
        mode,
        combine: Combine::Sum,
        clipped: false,
        recovery: gradwire_ps::Recovery::None,
        compression: Compression::default(),
        shards: 1,
        shard: 0,
        part_elements: part_elements(elements, 1, DType::F32, MAX_PART_BYTES),
    }
}

impl Bench {
    fn new(clients: u64) -> Self {
        Self::with(clients, Limits::default())
    }

    fn with(clients: u64, limits: Limits) -> Self {
        let mut bench = Self { shard: Shard::new(limits, 7), now: Instant::now(), out: Vec::new() };
        for client in 0..clients {
            assert!(bench.ask(client, header(Kind::Hello, client), &[]).is_ok());
        }
        bench
    }

    fn send(&mut self, peer: u64, mut header: Header, payload: &[u8]) -> Vec<Action> {
        header.payload_bytes = payload.len() as u64;
        self.shard.handle(PeerId(peer as u32), &header, payload, self.now, &mut self.out);
        std::mem::take(&mut self.out)
    }

    /// Sends a request that is answered at once.
    fn ask(&mut self, peer: u64, header: Header, payload: &[u8]) -> Result<(Header, Vec<u8>), Refusal> {
        let mut actions = self.send(peer, header, payload);
        assert_eq!(actions.len(), 1, "{actions:?}");
        match actions.pop() {
            Some(Action::Reply { to, header, body }) if header.kind == Kind::Refused => {
                assert_eq!(to, PeerId(peer as u32));
                Err(refusal(&header, &body))
            }
            Some(Action::Reply { header, .. }) => Ok((header, Vec::new())),
            Some(Action::Value { header, slice, .. }) => Ok((header, slice.to_vec())),
            other => panic!("{other:?}"),
        }
    }

    fn open(&mut self, peer: u64, spec: &TableSpec) -> Result<u64, Refusal> {
        let header = Header { table: spec.id(), ..header(Kind::Open, peer) };
        self.ask(peer, header, &open_body(spec)).map(|(header, _)| header.clock)
    }

    fn value(&mut self, spec: &TableSpec, clock: u64) -> Vec<f32> {
        let whole = ShardMap::new(Epoch(1), 1).unwrap().range(spec.elements().unwrap(), 0);
        let mut value = Vec::new();
        for keys in parts(whole, spec.part_elements) {
            let (_, bytes) = self.ask(0, Header { clock, ..data(Kind::Pull, 0, keys) }, &[]).unwrap();
            value.extend(floats(&bytes));
        }
        value
    }
}

fn refusal(header: &Header, body: &[u8]) -> Refusal {
    let texts: Vec<String> = {
        let (mut rest, mut texts) = (body, Vec::new());
        while rest.len() >= 2 {
            let length = usize::from(u16::from_le_bytes([rest[0], rest[1]]));
            texts.push(String::from_utf8(rest[2..2 + length].to_vec()).unwrap());
            rest = &rest[2 + length..];
        }
        texts
    };
    let [subject, what, expected, got] = texts.try_into().unwrap();
    Refusal { reason: Reason::of_status(header.status), subject, what, expected, got }
}

fn header(kind: Kind, client: u64) -> Header {
    Header { client, incarnation: 1, epoch: Epoch(1), sequence: 1, ..Header::new(kind) }
}

fn data(kind: Kind, client: u64, keys: KeyRange) -> Header {
    Header { table: TableId::of("w"), keys, dtype: Some(DType::F32), ..header(kind, client) }
}

fn push(client: u64, clock: u64, keys: KeyRange) -> Header {
    Header { clock, sequence: clock, ..data(Kind::Push, client, keys) }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn bytes(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|value| value.to_le_bytes()).collect()
}

const TWO: KeyRange = KeyRange { start: 0, end: 2 };

#[test]
fn every_arrival_order_gives_the_same_bits() {
    // Numbers of such different sizes that another order of summing gives other bits.
    let gradients = [[1.0e8f32, 3.0], [-1.0e8, 1.0e-3], [0.7, 1.0e7], [1.3, -1.0e7]];
    let rule = UpdateRule::Sgd(Sgd { learning_rate: 0.1, momentum: 0.9, ..Sgd::default() });
    let spec = spec(2, Mode::Sync { workers: 4 }, rule);
    let mut results = Vec::new();
    for order in permutations(4) {
        let mut bench = Bench::new(4);
        bench.open(0, &spec).unwrap();
        for clock in 1..=2 {
            for &client in &order {
                bench.send(client, push(client, clock, TWO), &bytes(&gradients[client as usize]));
            }
        }
        results.push(bytes(&bench.value(&spec, 2)));
    }
    assert_eq!(results.len(), 24);
    assert!(results.iter().all(|result| *result == results[0]));
    let sum = gradients.iter().skip(1).fold(gradients[0], |sum, more| [sum[0] + more[0], sum[1] + more[1]]);
    let velocity = sum.map(|sum| sum * 0.9 + sum);
    let expected = [0, 1].map(|n| 0.0 + -0.1 * sum[n] + -0.1 * velocity[n]);
    assert_eq!(results[0], bytes(&expected));
}

fn permutations(n: u64) -> Vec<Vec<u64>> {
    let mut orders = vec![vec![]];
    for next in 0..n {
        orders = orders
            .iter()
            .flat_map(|order: &Vec<u64>| {
                (0..=order.len()).map(move |at| {
                    let mut order = order.clone();
                    order.insert(at, next);
                    order
                })
            })
            .collect();
    }
    orders
}

#[test]
fn a_pull_waits_for_its_clock_and_gets_that_clock_s_value() {
    let mut bench = Bench::new(2);
    let spec = spec(2, Mode::Sync { workers: 2 }, UpdateRule::Sum);
    bench.open(0, &spec).unwrap();
    let both = Header { kind: Kind::PushPull, ..push(1, 1, TWO) };
    assert!(bench.send(1, both, &bytes(&[1.0, 2.0])).is_empty());
    let actions = bench.send(0, push(0, 1, TWO), &bytes(&[10.0, 20.0]));
    assert_eq!(actions.len(), 2);
    let value = actions.iter().find_map(|action| match action {
        Action::Value { to, header, slice } => Some((*to, header.clock, floats(slice))),
        _ => None,
    });
    assert_eq!(value, Some((PeerId(1), 1, vec![11.0, 22.0])));
}

#[test]
fn a_push_ahead_of_others_is_acknowledged_when_its_clock_begins() {
    let mut bench = Bench::new(2);
    let spec = spec(2, Mode::Sync { workers: 2 }, UpdateRule::Sum);
    bench.open(0, &spec).unwrap();
    let one = bytes(&[1.0; 2]);
    assert_eq!(bench.send(0, push(0, 1, TWO), &one).len(), 1);
    assert!(bench.send(0, push(0, 2, TWO), &one).is_empty());
    assert!(bench.send(0, push(0, 3, TWO), &one).is_empty());
    let later = bench.send(0, push(0, 4, TWO), &one);
    assert!(matches!(&later[..], [Action::Reply { header, .. }] if header.kind == Kind::Later));
    assert_eq!(bench.send(1, push(1, 1, TWO), &one).len(), 2, "its own acknowledgement, and that of clock 2");
    assert_eq!(bench.value(&spec, 1), [2.0, 2.0]);
}

#[test]
fn contributions_that_find_no_room_change_nothing_and_may_come_again() {
    let spec = spec(2, Mode::Sync { workers: 3 }, UpdateRule::Sum);
    let each = 2 * 4 + 4;
    let mut bench = Bench::with(3, Limits { memory_bytes: 2 * each + 1304 + 4, ..Limits::default() });
    bench.open(0, &spec).unwrap();
    let later = bench.send(2, push(2, 1, TWO), &bytes(&[4.0; 2]));
    assert!(matches!(&later[..], [Action::Reply { header, .. }] if header.kind == Kind::Later));
    bench.send(1, push(1, 1, TWO), &bytes(&[2.0; 2]));
    bench.send(0, push(0, 1, TWO), &bytes(&[1.0; 2]));
    assert_eq!(bench.send(2, push(2, 1, TWO), &bytes(&[4.0; 2])).len(), 1);
    assert_eq!(bench.value(&spec, 1), [7.0; 2]);
}

#[test]
fn a_table_over_the_limit_is_refused_before_memory_is_taken() {
    let mut bench = Bench::with(1, Limits { memory_bytes: 1 << 20, tables: 1, ..Limits::default() });
    let huge = spec(1 << 57, Mode::Async, UpdateRule::Sum);
    let refusal = bench.open(0, &huge).unwrap_err();
    assert_eq!((refusal.reason, refusal.what.as_str()), (Reason::Limit, "memory"));
    bench.open(0, &spec(2, Mode::Async, UpdateRule::Sum)).unwrap();
    let another = TableSpec { name: "v".into(), ..spec(2, Mode::Async, UpdateRule::Sum) };
    assert_eq!(bench.open(0, &another).unwrap_err().what, "tables");
}

#[test]
fn what_is_wrong_is_refused_by_name_and_the_shard_goes_on() {
    let mut bench = Bench::new(2);
    let table = spec(2, Mode::Sync { workers: 2 }, UpdateRule::Sum);
    bench.open(0, &table).unwrap();
    let shape = bench.open(1, &TableSpec { shape: vec![1, 2], ..table.clone() }).unwrap_err();
    assert_eq!(shape.to_string(), "table \"w\": shape: expected [2], got [1, 2]");
    let one = bytes(&[1.0; 2]);
    let all = KeyRange { start: 0, end: 9 };
    let unknown = Header { table: TableId(5), ..push(0, 1, TWO) };
    let cases = [
        (push(0, 1, all), one.clone(), Reason::Malformed, "keys"),
        (unknown, one.clone(), Reason::UnknownTable, "table"),
        (Header { epoch: Epoch(9), ..push(0, 1, TWO) }, one.clone(), Reason::WrongEpoch, "epoch"),
        (Header { dtype: Some(DType::F64), ..push(0, 1, TWO) }, one.clone(), Reason::Mismatch, "dtype"),
        (Header { dtype: None, ..push(0, 1, TWO) }, one.clone(), Reason::Mismatch, "dtype"),
        (push(0, 1, TWO), bytes(&[1.0]), Reason::Malformed, "payload"),
        (push(0, 0, TWO), one.clone(), Reason::Mismatch, "who pushes"),
        (Header { client: 1, ..push(0, 1, TWO) }, one.clone(), Reason::Malformed, "client"),
        (Header { incarnation: 9, ..push(0, 1, TWO) }, one.clone(), Reason::Malformed, "client"),
        (Header { flags: 2, ..push(0, 1, TWO) }, one.clone(), Reason::Malformed, "payload checksum"),
        (header(Kind::Done, 0), vec![], Reason::Malformed, "kind"),
        (header(Kind::Barrier, 0), vec![], Reason::Malformed, "clients"),
        (data(Kind::SetRate, 0, TWO), rate_body(&0.1.into()), Reason::Mismatch, "update rule"),
        (data(Kind::SetRate, 0, TWO), vec![1], Reason::Malformed, "learning rate"),
        (header(Kind::Open, 0), vec![1, 2, 3], Reason::Malformed, "body"),
    ];
    for (header, payload, reason, what) in cases {
        let refusal = bench.ask(0, header, &payload).unwrap_err();
        assert_eq!((refusal.reason, refusal.what.as_str()), (reason, what), "{refusal}");
    }
    bench.ask(5, push(0, 1, TWO), &one).unwrap_err();
    assert_eq!(bench.value(&table, 0), [0.0; 2]);
}

#[test]
fn first_values_come_from_one_client_and_not_after_pushes() {
    let mut bench = Bench::new(3);
    let table = spec(2, Mode::Async, UpdateRule::Sum);
    bench.open(0, &table).unwrap();
    let claim = |client| data(Kind::ClaimInit, client, TWO);
    let init = |client, sequence| Header { sequence, ..data(Kind::Init, client, TWO) };
    assert_eq!(bench.ask(0, claim(0), &[]).unwrap().0.clock, 1);
    assert_eq!(bench.ask(0, claim(0), &[]).unwrap().0.clock, 1, "asked again, told again");
    assert!(bench.send(1, claim(1), &[]).is_empty());
    assert!(bench.send(2, claim(2), &[]).is_empty());
    bench.ask(0, init(0, 1), &bytes(&[1.0, 1.0])).unwrap();
    // The first dies in the middle: the second begins anew, and what the first still sends counts no more.
    bench.shard.gone(PeerId(0), &mut bench.out);
    assert!(matches!(&bench.out[..], [Action::Reply { to: PeerId(1), header, .. }] if header.clock == 2));
    bench.out.clear();
    bench.ask(1, init(1, 2), &bytes(&[5.0, 6.0])).unwrap();
    bench.ask(1, init(1, 1), &bytes(&[9.0, 9.0])).unwrap();
    let actions = bench.send(1, Header { sequence: 2, ..data(Kind::EndInit, 1, TWO) }, &[]);
    assert_eq!(actions.len(), 2);
    assert!(matches!(&actions[0], Action::Reply { to: PeerId(2), header, .. } if header.clock == 0));
    bench.ask(1, push(1, 1, TWO), &bytes(&[1.0; 2])).unwrap();
    bench.ask(1, init(1, 3), &bytes(&[0.0; 2])).unwrap();
    let (_, value) = bench.ask(1, data(Kind::Pull, 1, TWO), &[]).unwrap();
    assert_eq!(floats(&value), [6.0, 7.0]);
}

#[test]
fn a_learning_rate_holds_from_its_clock_on_whoever_comes_first() {
    let rule = UpdateRule::Sgd(Sgd { learning_rate: 1.0, ..Sgd::default() });
    for order in [[0, 1], [1, 0]] {
        let mut bench = Bench::new(2);
        let table = spec(2, Mode::Sync { workers: 2 }, rule);
        bench.open(0, &table).unwrap();
        let one = bytes(&[1.0; 2]);
        let rate = |bench: &mut Bench, client, clock, rate: f64, flags| {
            let header = Header { clock, flags, sequence: clock, ..data(Kind::SetRate, client, TWO) };
            bench.ask(client, header, &rate_body(&rate.into()))
        };
        for clock in 1..=3 {
            for client in order {
                if clock == 2 {
                    rate(&mut bench, client, 2, 10.0, 0).unwrap();
                }
                bench.send(client, push(client, clock, TWO), &one);
            }
        }
        assert_eq!(bench.value(&table, 3), [-42.0; 2]);
        rate(&mut bench, 0, 2, 10.0, FLAG_AGAIN).unwrap();
        let late = rate(&mut bench, 0, 3, 10.0, 0).unwrap_err();
        assert_eq!(late.what, "clock of a learning rate");
        rate(&mut bench, 0, 4, 0.5, 0).unwrap();
        assert_eq!(rate(&mut bench, 1, 4, 0.25, 0).unwrap_err().reason, Reason::Mismatch);
    }
}

#[test]
fn a_barrier_opens_for_the_last_and_for_who_asks_again() {
    let mut bench = Bench::new(3);
    let at =
        |client, sequence| Header { sequence, keys: KeyRange { start: 0, end: 3 }, ..header(Kind::Barrier, client) };
    assert!(bench.send(0, at(0, 1), &[]).is_empty());
    assert!(bench.send(0, at(0, 1), &[]).is_empty());
    assert!(bench.send(1, at(1, 1), &[]).is_empty());
    let two = Header { keys: TWO, ..at(2, 1) };
    assert_eq!(bench.ask(2, two, &[]).unwrap_err().reason, Reason::Mismatch);
    assert_eq!(bench.send(2, at(2, 1), &[]).len(), 3);
    assert_eq!(bench.send(0, at(0, 1), &[]).len(), 1, "its answer was lost");
    assert!(bench.send(0, at(0, 2), &[]).is_empty(), "the next round");
}

#[test]
fn who_waits_too_long_is_told_who_is_missing() {
    let mut bench = Bench::new(3);
    let table = spec(2, Mode::Sync { workers: 3 }, UpdateRule::Sum);
    bench.open(0, &table).unwrap();
    bench.send(1, push(1, 1, TWO), &bytes(&[1.0; 2]));
    let pull = Header { clock: 1, wait_ms: 100, ..data(Kind::Pull, 1, TWO) };
    assert!(bench.send(1, pull, &[]).is_empty());
    let mut out = Vec::new();
    bench.shard.expire(bench.now + Duration::from_millis(99), &mut out);
    assert!(out.is_empty());
    bench.shard.expire(bench.now + Duration::from_millis(100), &mut out);
    let Some(Action::Reply { header, body, .. }) = out.pop() else { panic!("no answer") };
    let refusal = refusal(&header, &body);
    assert_eq!(refusal.reason, Reason::Waited);
    assert_eq!(refusal.got, "nothing from worker 0, 2");
}

#[test]
fn a_new_connection_and_a_new_process_take_the_place_of_the_old() {
    let mut bench = Bench::new(1);
    let again = Header { sequence: 2, ..header(Kind::Hello, 0) };
    let actions = bench.send(7, again, &[]);
    assert!(matches!(&actions[..], [Action::Close { peer: PeerId(0), .. }, Action::Reply { .. }]));
    assert_eq!(bench.ask(0, data(Kind::Pull, 0, TWO), &[]).unwrap_err().reason, Reason::Malformed);
    let process = Header { incarnation: 2, ..header(Kind::Hello, 0) };
    assert_eq!(bench.send(8, process, &[]).len(), 2);
    assert_eq!(bench.ask(9, again, &[]).unwrap_err().reason, Reason::Superseded);
}

#[test]
fn a_worker_that_starts_anew_goes_on_where_it_was() {
    let mut bench = Bench::new(2);
    let table = spec(2, Mode::Sync { workers: 2 }, UpdateRule::Sum);
    assert_eq!(bench.open(0, &table).unwrap(), 0);
    bench.send(0, push(0, 1, TWO), &bytes(&[1.0; 2]));
    assert_eq!((bench.open(0, &table).unwrap(), bench.open(1, &table).unwrap()), (1, 0));
}

/// Pushes of 1.0 by `clients`, `calls` each, in a random order with repeats; what is left is N·K.
fn ones(mode: Mode, clients: u64, calls: u64, elements: u64, seed: u64) -> (Vec<f32>, TableSpec) {
    let mut bench = Bench::new(clients);
    let table = spec(elements, mode, UpdateRule::Sum);
    bench.open(0, &table).unwrap();
    let whole = KeyRange { start: 0, end: elements };
    let ones = bytes(&vec![1.0; elements as usize]);
    let mut queue: Vec<Header> = (1..=calls)
        .flat_map(|clock| (0..clients).map(move |client| (client, clock)))
        .flat_map(|(client, clock)| parts(whole, table.part_elements).map(move |keys| push(client, clock, keys)))
        .collect();
    let mut state = seed | 1;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for _ in 0..queue.len() / 2 {
        queue.push(queue[random(queue.len())]);
    }
    while !queue.is_empty() {
        let header = queue.swap_remove(random(queue.len()));
        let payload = &ones[..header.keys.len() as usize * 4];
        for action in bench.send(header.client, header, payload) {
            if let Action::Reply { header: reply, .. } = action {
                match reply.kind {
                    Kind::Later => queue.push(header),
                    Kind::Done => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    let clock = if mode == Mode::Async { 0 } else { calls };
    (bench.value(&table, clock), table)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_push_counts_once(clients in 1u64..5, calls in 1u64..6, elements in 1u64..40_000, seed in any::<u64>()) {
        for mode in [Mode::Sync { workers: clients as u32 }, Mode::Async] {
            let (value, table) = ones(mode, clients, calls, elements, seed);
            prop_assert_eq!(value.len() as u64, table.elements().unwrap());
            prop_assert!(value.iter().all(|value| *value == (clients * calls) as f32));
        }
    }

    #[test]
    fn hostile_requests_never_break_a_shard(
        kinds in proptest::collection::vec((0u8..12, any::<[u64; 6]>(), 0u8..6, any::<u8>()), 1..60),
    ) {
        let mut bench = Bench::new(2);
        bench.open(0, &spec(2, Mode::Sync { workers: 2 }, UpdateRule::Sum)).unwrap();
        for (kind, [table, client, clock, sequence, start, count], payload, bits) in kinds {
            let small = |value: u64| if bits & 1 == 0 { value % 4 } else { value };
            let kinds = [Kind::Hello, Kind::Open, Kind::ClaimInit, Kind::Init, Kind::EndInit, Kind::Push, Kind::Pull,
                Kind::PushPull, Kind::SetRate, Kind::Barrier, Kind::Status, Kind::Later];
            let header = Header {
                table: if bits & 2 == 0 { TableId::of("w") } else { TableId(table) },
                client: small(client),
                incarnation: 1 + small(table) % 2,
                epoch: Epoch(1),
                clock: small(clock),
                sequence: small(sequence),
                keys: if bits & 4 == 0 { TWO } else { KeyRange { start: small(start), end: small(start).saturating_add(count) } },
                dtype: DType::of_code(payload),
                ..Header::new(kinds[kind as usize])
            };
            bench.send(client % 3, header, &vec![bits; usize::from(payload) * 2]);
        }
        let hello = Header { incarnation: u64::MAX, client: 9, ..header(Kind::Hello, 9) };
        prop_assert!(bench.ask(9, hello, &[]).is_ok(), "a good client is still served");
    }
}

fn sparse_spec(mode: Mode) -> SparseSpec {
    SparseSpec {
        name: "rows".into(),
        dim: 2,
        dtype: DType::F32,
        rule: UpdateRule::Adam(Adam::default()),
        mode,
        combine: Combine::Mean,
        initializer: Initializer::Normal { mean: 0.0, deviation: 1.0 },
        seed: 0,
        capacity: None,
        eviction: None,
        admission: 1,
        recovery: gradwire_ps::Recovery::None,
        compression: Compression::NONE,
        max_grad_norm: None,
        shards: 1,
        shard: 0,
    }
}

/// A part of a push of ones, or the ids of a pull.
fn sparse_payload(kind: Kind, part: [u32; 2], ids: &[u64]) -> Vec<u8> {
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    match kind {
        Kind::SparsePush => {
            let part: Vec<u8> = part.into_iter().flat_map(u32::to_le_bytes).collect();
            [part, ids.clone(), 1f32.to_le_bytes().repeat(ids.len() / 4)].concat()
        }
        _ => ids,
    }
}

fn sparse_header(kind: Kind, client: u64, clock: u64, ids: u64) -> Header {
    let keys = KeyRange { start: 0, end: ids };
    Header { table: TableId::of("rows"), clock, keys, dtype: Some(DType::F32), ..header(kind, client) }
}

#[test]
fn a_table_that_does_not_fit_is_refused_before_anything_of_it_is_made() {
    let mut bench = Bench::with(1, Limits { memory_bytes: 1 << 20, ..Limits::default() });
    for (capacity, eviction, admission) in
        [(Some(u64::MAX - 1), Some(Eviction::Lru), 1), (Some(1 << 40), Some(Eviction::Lfu), 2), (None, None, 9)]
    {
        let spec = SparseSpec { capacity, eviction, admission, ..sparse_spec(Mode::Async) };
        let header = Header { table: spec.id(), ..header(Kind::OpenSparse, 0) };
        let refusal = bench.ask(0, header, &open_sparse_body(&spec)).unwrap_err();
        assert_eq!((refusal.reason, refusal.what.as_str()), (Reason::Limit, "memory"));
        assert_eq!(bench.shard.status(0).memory_bytes, 0);
    }
}

proptest! {
    #[test]
    fn whatever_is_asked_of_sparse_tables_is_answered_and_memory_comes_back(
        mode in 0usize..3, evicts in any::<bool>(),
        requests in proptest::collection::vec(
            (0u64..3, any::<bool>(), 0u64..6, 0u32..4, 1u32..4, proptest::collection::vec(0u64..50, 0..12), any::<(u8, u16)>()),
            1..120,
        ),
    ) {
        let mode = [Mode::Async, Mode::Sync { workers: 3 }, Mode::Ssp { workers: 3, staleness: 1 }][mode];
        let limits = Limits { memory_bytes: 8 << 20, waiting: 20, ..Limits::default() };
        let mut bench = Bench::with(3, limits);
        let eviction = evicts.then_some(Eviction::Lfu);
        let spec = SparseSpec { capacity: evicts.then_some(7), eviction, ..sparse_spec(mode) };
        let open = Header { table: spec.id(), ..header(Kind::OpenSparse, 0) };
        bench.ask(0, open, &open_sparse_body(&spec)).unwrap();
        let (mut asked, mut answered) = (0, 0);
        for (sequence, (client, pushes, clock, part, parts, mut ids, (at, damage))) in (1..).zip(requests) {
            if damage % 4 != 0 {
                ids.sort_unstable();
                ids.dedup();
            }
            let kind = if pushes { Kind::SparsePush } else { Kind::SparsePull };
            let mut payload = sparse_payload(kind, [part, parts], &ids);
            if damage % 7 == 0 && !payload.is_empty() {
                let at = usize::from(at) % payload.len();
                payload[at] = (damage >> 8) as u8;
            }
            let claimed = if damage % 11 == 0 { u64::from(damage) << 40 } else { ids.len() as u64 };
            let header = Header { sequence, ..sparse_header(kind, client, clock, claimed) };
            asked += 1;
            answered += bench.send(client, header, &payload).len();
        }
        // What still waits is refused once its time is up.
        let much_later = bench.now + Duration::from_secs(7200);
        bench.shard.expire(much_later, &mut bench.out);
        answered += std::mem::take(&mut bench.out).len();
        prop_assert_eq!(asked, answered);
        let status = bench.shard.status(0);
        prop_assert!(status.memory_bytes <= 16 << 20);
        prop_assert_eq!(status.sparse[0].waiting, 0);
        prop_assert!(!evicts || status.sparse[0].rows <= 7);
    }
}
