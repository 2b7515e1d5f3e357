//! Pure: everything of this crate that reads bytes from elsewhere, by name: for those who feed it what nobody should send.

mod shards;

use crate::body::{BadBody, Reader, Writer};
use crate::checkpoint::{Manifest, Object, name_at};
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::rally;
use crate::schedule::{rates_body, read_rates};
use crate::sparse::Packing;
use crate::unpacking::Unpacking;
use crate::{
    Adagrad, Adam, ClientStatus, Codec, Combine, Compression, Course, DType, Epoch, Eviction, Ftrl, Initializer,
    KeyRange, Mode, Reason, Refusal, Role, Schedule, ShardStatus, SparseSpec, SparseStatus, Standing, TableId,
    TableSpec, TableStatus, UpdateRule, WarmUp, open_body, open_sparse_body, rate_body,
};
use gradwire_transport::decoders::Decoder;
use std::time::Duration;

/// Elements of the part that gradients are unpacked for.
const ELEMENTS: u64 = 200;

/// All of this crate.
pub fn all() -> Vec<Decoder> {
    let mut all = vec![
        Decoder { seal: seal_header, ..Decoder::new("header", headers, header, (0, 0)) },
        Decoder::new("dense table", tables, table, (16 << 10, 4)),
        Decoder::new("sparse table", sparse_tables, sparse_table, (16 << 10, 4)),
        Decoder::new("schedule of learning rates", schedules, schedule, (4 << 10, 8)),
        Decoder::new("learning rates given again", given_rates, given_rate, (4 << 10, 8)),
        Decoder::new("offer of what was pulled", offers, offer, (4 << 10, 4)),
        Decoder::new("refusal", refusals, refusal, (4 << 10, 4)),
        Decoder::new("status", statuses, status, (64 << 10, 64)),
        Decoder::new("compressed gradient", gradients, gradient, (8 << 10, 0)),
        Decoder::new("compressed rows", packed_rows, packed, (8 << 10, 8)),
        Decoder { seal: seal_manifest, ..Decoder::new("manifest", manifests, manifest, (16 << 10, 64)) },
    ];
    all.extend(shards::ALL);
    all
}

fn headers() -> Vec<Vec<u8>> {
    let push = Header { client: 3, incarnation: 1, clock: 9, sequence: 4, codec: 0x33, ..Header::new(Kind::Push) };
    let keys = KeyRange { start: 1 << 39, end: (1 << 39) + 7 };
    let pull = Header { kind: Kind::SparsePull, keys, dtype: Some(DType::F32), wait_ms: 5, ..push };
    [push, pull, push.reply(Kind::Refused)].map(|header| header.encode().to_vec()).to_vec()
}

fn seal_header(bytes: &mut [u8]) {
    if let Some((body, [a, b, c, d, ..])) = bytes.split_at_mut_checked(HEADER_BYTES - 4) {
        [*a, *b, *c, *d] = crc32c::crc32c(body).to_le_bytes();
    }
}

fn header(bytes: &[u8]) {
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(&header.encode()[..], &bytes[..HEADER_BYTES]);
        assert!(header.keys.start <= header.keys.end, "keys that end before they begin were taken");
    }
}

/// Reads a body that is nothing but a `T`.
fn whole<T>(bytes: &[u8], read: impl Fn(&mut Reader<'_>) -> Result<T, BadBody>) -> Option<T> {
    let mut from = Reader(bytes);
    let value = read(&mut from).ok()?;
    from.end().is_ok().then_some(value)
}

fn dense(rule: UpdateRule, mode: Mode) -> TableSpec {
    TableSpec {
        recovery: crate::Recovery::None,
        name: "w".into(),
        shape: vec![5],
        dtype: DType::F32,
        rule,
        mode,
        combine: Combine::Mean,
        clipped: matches!((mode, rule), (Mode::Sync { .. }, UpdateRule::Adam(_))),
        compression: Compression::default(),
        shards: 1,
        shard: 0,
        part_elements: 3,
    }
}

fn sparse(rule: UpdateRule, mode: Mode, eviction: Option<Eviction>) -> SparseSpec {
    SparseSpec {
        recovery: crate::Recovery::None,
        compression: Compression { push: Codec::Int8, pull: Codec::Bf16 },
        max_grad_norm: None,
        name: "rows".into(),
        dim: 3,
        dtype: DType::F32,
        rule,
        mode,
        combine: Combine::Sum,
        initializer: Initializer::Uniform { low: -1.0, high: 1.0 },
        seed: 3,
        capacity: eviction.map(|_| 6),
        eviction,
        admission: 2,
        shards: 1,
        shard: 0,
    }
}

const MODES: [Mode; 3] = [Mode::Sync { workers: 2 }, Mode::Ssp { workers: 2, staleness: 1 }, Mode::Async];

fn rules() -> [UpdateRule; 4] {
    let adagrad = Adagrad { initial: 0.5, row_wise: true, ..Adagrad::default() };
    [
        UpdateRule::Sum,
        UpdateRule::Adam(Adam::default()),
        UpdateRule::Ftrl(Ftrl::default()),
        UpdateRule::Adagrad(adagrad),
    ]
}

fn tables() -> Vec<Vec<u8>> {
    let compression = Compression { push: Codec::TopK { share: 0.25 }, pull: Codec::Int8 };
    let pairs = rules().into_iter().zip(MODES.into_iter().cycle());
    pairs.map(|(rule, mode)| open_body(&TableSpec { compression, ..dense(rule, mode) })).collect()
}

fn table(bytes: &[u8]) {
    if let Some(spec) = whole(bytes, TableSpec::decode).filter(|spec| spec.check().is_ok()) {
        let again = whole(&open_body(&spec), TableSpec::decode);
        assert_eq!(again.as_ref(), Some(&spec));
        assert!(spec.elements().is_some() && spec.disagreement(&spec).is_none());
    }
}

fn sparse_tables() -> Vec<Vec<u8>> {
    let ttl = Some(Eviction::Ttl(Duration::from_secs(2)));
    let pairs = rules().into_iter().zip(MODES.into_iter().cycle()).zip([None, Some(Eviction::Lru), ttl, None]);
    pairs.map(|((rule, mode), eviction)| open_sparse_body(&sparse(rule, mode, eviction))).collect()
}

fn sparse_table(bytes: &[u8]) {
    if let Some(spec) = whole(bytes, SparseSpec::decode).filter(|spec| spec.check().is_ok()) {
        let again = whole(&open_sparse_body(&spec), SparseSpec::decode);
        assert_eq!(again.as_ref(), Some(&spec));
        assert!(spec.disagreement(&spec).is_none());
    }
}

fn schedules() -> Vec<Vec<u8>> {
    let list = Course::List(vec![0.5, 0.25, 0.125]);
    let warm_up = Some(WarmUp { steps: 2, from: 0.5 });
    let both = [Schedule { warm_up: None, course: Course::Constant(0.5) }, Schedule { warm_up, course: list }];
    both.map(|schedule| rate_body(&schedule)).to_vec()
}

fn schedule(bytes: &[u8]) {
    if let Some(schedule) = whole(bytes, Schedule::decode).filter(|schedule| schedule.check().is_ok()) {
        assert_eq!(whole(&rate_body(&schedule), Schedule::decode).as_ref(), Some(&schedule));
        let rates = [0, 1, 1 << 20, u64::MAX].map(|step| schedule.at(step));
        assert!(rates.iter().all(|rate| rate.is_finite()), "{schedule:?} has rates {rates:?}");
    }
}

fn given_rates() -> Vec<Vec<u8>> {
    vec![rates_body(&[(3, Schedule::from(0.5)), (9, Course::List(vec![0.5, 0.25]).into())])]
}

fn given_rate(bytes: &[u8]) {
    if let Ok(rates) = read_rates(bytes) {
        let again = read_rates(&rates_body(&rates)).map(|again| again.len());
        assert_eq!(again, Ok(rates.len()));
    }
}

fn offers() -> Vec<Vec<u8>> {
    vec![rally::offer_body([(TableId(7), 3), (TableId(8), rally::NOTHING)].into_iter())]
}

fn offer(bytes: &[u8]) {
    if let Ok(offer) = rally::read_offer(bytes) {
        assert_eq!(rally::offer_body(offer.into_iter()), bytes);
    }
}

fn refusals() -> Vec<Vec<u8>> {
    let refusal = Refusal::new(Reason::Limit, "table \"w\"", "memory", "at most 5", "7");
    vec![refusal.encode()]
}

fn refusal(bytes: &[u8]) {
    if let Ok(refusal) = Refusal::decode(3, bytes) {
        assert_eq!(Refusal::decode(3, &refusal.encode()).as_ref(), Ok(&refusal));
    }
}

fn statuses() -> Vec<Vec<u8>> {
    vec![one_status().encode()]
}

/// A status with something of everything.
pub(crate) fn one_status() -> ShardStatus {
    let table = TableStatus {
        spec: dense(UpdateRule::Sum, Mode::Async),
        elements: 5,
        bytes: 20,
        clock: 1,
        pushes: 2,
        pulls: 3,
        duplicates: 4,
        waiting: 5,
        pushed_bytes: 6,
        pushed_whole_bytes: 7,
        pulled_bytes: 8,
        pulled_whole_bytes: 9,
    };
    let rows = SparseStatus {
        spec: sparse(UpdateRule::Sum, Mode::Async, Some(Eviction::Lru)),
        rows: 6,
        bytes: 100,
        clock: 1,
        pushes: 2,
        pulls: 3,
        duplicates: 4,
        waiting: 5,
        evicted: 6,
        unadmitted: 7,
        pushed_bytes: 8,
        pulled_bytes: 9,
    };
    let client = ClientStatus {
        client: 3,
        host: "héron".into(),
        pid: 7,
        address: "10.0.0.7:5".into(),
        received_bytes: 5,
        sent_bytes: 6,
    };
    let standing = Standing { role: Role::Primary, shard: 3, epoch: Epoch(4), log: 9, backup: Some(7) };
    let (tables, sparse, clients) = (vec![table; 2], vec![rows; 2], vec![client; 3]);
    ShardStatus { memory_bytes: 1, memory_limit_bytes: 2, standing, tables, sparse, clients }
}

fn status(bytes: &[u8]) {
    if let Ok(status) = ShardStatus::decode(bytes) {
        assert_eq!(ShardStatus::decode(&status.encode()).map(|status| status.encode()), Ok(status.encode()));
    }
}

const CODECS: [Codec; 4] = [Codec::Bf16, Codec::F16, Codec::Int8, Codec::TopK { share: 0.1 }];

/// Each begins with the number of its codec.
fn gradients() -> Vec<Vec<u8>> {
    let encoded = |codec: Codec| {
        let mut values: Vec<f32> = (0..ELEMENTS).map(|n| n as f32 - 99.0).collect();
        let mut residual = vec![0.0; values.len()];
        let mut out = vec![0; 1 + codec.bytes(values.len()).unwrap_or(0)];
        out[0] = codec.code();
        let kept = codec.encode_gradient(&mut values, &mut residual, &mut out[1..]);
        kept.expect("all of them are finite");
        out
    };
    CODECS.map(encoded).to_vec()
}

fn gradient(bytes: &[u8]) {
    let Some((&code, payload)) = bytes.split_first() else { return };
    let push = CODECS[usize::from(code) % CODECS.len()];
    let compression = Compression { push, pull: Codec::Whole };
    let (shape, part_elements) = (vec![ELEMENTS], ELEMENTS);
    let spec = TableSpec { shape, part_elements, compression, ..dense(UpdateRule::Sum, Mode::Async) };
    let (keys, dtype) = (KeyRange { start: 0, end: ELEMENTS }, Some(DType::F32));
    let header = Header { codec: push.code(), keys, dtype, ..Header::new(Kind::Push) };
    if let Ok(elements) = Unpacking::default().gradient(&header, payload, &spec) {
        assert_eq!(elements.len() as u64, 4 * ELEMENTS);
    }
}

const ROW_CODECS: [Codec; 3] = [Codec::Bf16, Codec::F16, Codec::Int8];
const ROWS: usize = 3;

/// The payload of a push of some rows to a table of [`sparse`].
fn packed_push(codec: Codec) -> Vec<u8> {
    let mut whole: Vec<u8> = [0u32, 1].into_iter().flat_map(u32::to_le_bytes).collect();
    whole.extend((0..ROWS as u64).flat_map(u64::to_le_bytes));
    whole.extend((0..3 * ROWS).flat_map(|n| (n as f32 - 3.5).to_le_bytes()));
    let mut out = Vec::new();
    Packing::default().pack(codec, (DType::F32, 3), (&whole, ROWS), &mut out).expect("all of them are finite");
    out
}

/// A codec's code, how many rows there are said to be, and the payload.
fn packed_rows() -> Vec<Vec<u8>> {
    ROW_CODECS.map(|codec| [vec![codec.code(), ROWS as u8], packed_push(codec)].concat()).to_vec()
}

fn packed(bytes: &[u8]) {
    let Some((&[code, count], payload)) = bytes.split_first_chunk() else { return };
    let push = ROW_CODECS[usize::from(code) % ROW_CODECS.len()];
    let compression = Compression { push, pull: Codec::Whole };
    let spec = SparseSpec { compression, ..sparse(UpdateRule::Sum, Mode::Async, None) };
    let (keys, dtype) = (KeyRange { start: 0, end: count.into() }, Some(DType::F32));
    let header = Header { codec: push.code(), keys, dtype, ..Header::new(Kind::SparsePush) };
    if let Ok(rows) = Packing::default().unpack(&header, payload, &spec) {
        assert_eq!(rows.len(), 8 + usize::from(count) * (8 + 4 * 3));
    }
}

fn manifests() -> Vec<Vec<u8>> {
    let object = Object { table: "w/\"é\"".into(), file: "a.table".into(), clock: 7, bytes: 1 << 40, crc32c: 9 };
    vec![Manifest { name: name_at(17), shard: 1, shards: 3, objects: vec![object; 2] }.encode().into_bytes()]
}

/// The sum stands, in 8 digits, at the end of the first line.
fn seal_manifest(bytes: &mut [u8]) {
    if let Some(end) = bytes.iter().position(|&byte| byte == b'\n')
        && let (head, [_, told @ ..]) = bytes.split_at_mut(end)
        && let Some(place) = head.len().checked_sub(8)
    {
        head[place..].copy_from_slice(format!("{:08x}", crc32c::crc32c(told)).as_bytes());
    }
}

fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::decode(bytes, &name_at(17), (1, 3)) {
        assert!(manifest.objects.iter().all(|object| !object.file.contains('/')), "a file elsewhere was taken");
        assert_eq!(Manifest::decode(manifest.encode().as_bytes(), &name_at(17), (1, 3)).as_ref(), Ok(&manifest));
    }
}

/// The body that a writer makes.
fn body(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut out = Writer::default();
    write(&mut out);
    out.0
}
