//! Does: asks shards for anything, and makes them from anything: a row of requests, or of chunks, is one input.

use super::{MODES, body, dense, packed_push, rules, seal_header, sparse};
use crate::checkpoint::{FRAME_BYTES, frame, unframe};
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::shard::{Limits, Shard};
use crate::state::Builder;
use crate::tensors::{header, metadata, shard_of_file, tensors};
use crate::{
    Codec, Course, DType, Epoch, Eviction, KeyRange, Mode, Schedule, SparseSpec, TableSpec, UpdateRule, open_body,
    open_sparse_body, rate_body,
};
use gradwire_transport::PeerId;
use gradwire_transport::decoders::Decoder;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What the shards may hold.
const MEMORY_BYTES: u64 = 1 << 20;
/// What reading takes for it: tables are told with a copy of each number, and beside the shard there is a second one, made
/// from it.
const MOST: u64 = 6 * MEMORY_BYTES;
const CLIENTS: u64 = 3;

pub(super) const ALL: [Decoder; 3] = [
    Decoder { seal: seal_requests, ..Decoder::new("requests to a shard", requests, request, (MOST, 16)) },
    Decoder { seal: seal_chunks, ..Decoder::new("chunks of a shard's state", chunks, chunk, (MOST, 16)) },
    Decoder::new("exported file", files, file, (MOST, 64)),
];

fn limits() -> Limits {
    let (memory_bytes, client_bytes) = (MEMORY_BYTES, MEMORY_BYTES / 2);
    Limits {
        memory_bytes,
        client_bytes,
        tables: 8,
        clients: 8,
        waiting: 32,
        patience: Duration::from_secs(60),
        replicas: 0,
        checkpoints: crate::shard::Checkpointing::Never,
    }
}

/// One moment for all inputs: what comes of them does not depend on when they are read.
fn begin() -> Instant {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    *BEGIN.get_or_init(Instant::now)
}

fn greeted(limits: Limits) -> Shard {
    let mut shard = Shard::new(limits, 8);
    for client in 0..CLIENTS {
        let hello = Header { client, incarnation: 1, sequence: 1, ..Header::new(Kind::Hello) };
        shard.handle(PeerId(client as u32), &hello, &[], begin(), &mut Vec::new());
    }
    shard
}

/// A request behind its length.
fn told(out: &mut Vec<u8>, header: Header, payload: &[u8]) {
    let header = Header { payload_bytes: payload.len() as u64, ..header };
    out.extend(((HEADER_BYTES + payload.len()) as u32).to_le_bytes());
    out.extend(header.encode());
    out.extend(payload);
}

fn numbers(count: u64, seed: u64) -> Vec<u8> {
    (0..count).flat_map(|n| ((n + 3 * seed) as f32 / 7.0 - 1.0).to_le_bytes()).collect()
}

fn requests() -> Vec<Vec<u8>> {
    let evictions = [None, Some(Eviction::Lru), Some(Eviction::Ttl(Duration::from_secs(2)))];
    let each = MODES.into_iter().zip(evictions).enumerate();
    let mut all: Vec<_> = each.map(|(n, (mode, eviction))| row(rules()[(n + 1) % 3], mode, eviction)).collect();
    // Tables that cost more than their numbers: as many parts as elements, and as many workers as may be.
    for mode in [Mode::Async, Mode::Sync { workers: 1 << 16 }, Mode::Ssp { workers: 1 << 16, staleness: 1 }] {
        let table = TableSpec { shape: vec![3900], part_elements: 1, ..dense(UpdateRule::Sum, mode) };
        let mut out = Vec::new();
        open(&mut out, 1, &table, &sparse(UpdateRule::Sum, mode, None));
        all.push(out);
    }
    all
}

/// A little training by two workers, on a dense and on a sparse table.
fn row(rule: UpdateRule, mode: Mode, eviction: Option<Eviction>) -> Vec<u8> {
    let (table, rows, mut out) = (dense(rule, mode), sparse(UpdateRule::Sum, mode, eviction), Vec::new());
    for client in 0..2 {
        open(&mut out, client, &table, &rows);
    }
    for clock in 1..4 {
        for client in 0..2 {
            push(&mut out, (client, clock), &table, &rows);
        }
    }
    let me = Header { incarnation: 1, epoch: Epoch(1), sequence: 9, clock: 2, ..Header::new(Kind::Pull) };
    let me = Header { table: table.id(), dtype: Some(DType::F32), ..me };
    told(&mut out, Header { keys: KeyRange { start: 3, end: 5 }, ..me }, &[]);
    let rate = Schedule { warm_up: None, course: Course::Constant(0.25) };
    told(&mut out, Header { kind: Kind::SetRate, clock: 9, ..me }, &rate_body(&rate));
    told(&mut out, Header { kind: Kind::Norm, ..me }, &[]);
    told(&mut out, Header { kind: Kind::Scale, clock: 3, ..me }, &0.5f64.to_le_bytes());
    told(&mut out, Header { kind: Kind::Status, ..me }, &[]);
    told(&mut out, Header { kind: Kind::Barrier, keys: KeyRange { start: 0, end: 2 }, ..me }, &[]);
    let snapshot = body(|out| {
        out.text("checkpoint-1");
        [0, 1, 2, table.id().0, 3, rows.id().0, 3].into_iter().for_each(|number| out.number(number));
    });
    told(&mut out, Header { kind: Kind::Snapshot, ..me }, &snapshot);
    let (ids, keys) = ((0..4u64).flat_map(u64::to_le_bytes).collect::<Vec<u8>>(), KeyRange { start: 0, end: 4 });
    let pull = Header { kind: Kind::SparsePull, table: rows.id(), keys, ..me };
    told(&mut out, pull, &ids);
    told(&mut out, Header { codec: Codec::Bf16.code() << 4, ..pull }, &ids);
    told(&mut out, Header { kind: Kind::Evicted, table: rows.id(), clock: 0, ..me }, &[]);
    out
}

fn open(out: &mut Vec<u8>, client: u64, table: &TableSpec, rows: &SparseSpec) {
    let me = Header { client, incarnation: 1, epoch: Epoch(1), sequence: 1, ..Header::new(Kind::Open) };
    let on_table = Header { table: table.id(), ..me };
    told(out, on_table, &open_body(table));
    told(out, Header { kind: Kind::OpenSparse, table: rows.id(), ..me }, &open_sparse_body(rows));
    told(out, Header { kind: Kind::ClaimInit, ..on_table }, &[]);
    let init = Header { kind: Kind::Init, keys: KeyRange { start: 0, end: 3 }, dtype: Some(DType::F32), ..on_table };
    told(out, init, &numbers(3, client));
    told(out, Header { kind: Kind::EndInit, ..on_table }, &[]);
}

fn push(out: &mut Vec<u8>, (client, clock): (u64, u64), table: &TableSpec, rows: &SparseSpec) {
    let me = Header { client, incarnation: 1, epoch: Epoch(1), sequence: clock, clock, ..Header::new(Kind::PushPull) };
    let me = Header { table: table.id(), dtype: Some(DType::F32), ..me };
    told(out, Header { keys: KeyRange { start: 0, end: 3 }, ..me }, &numbers(3, client));
    told(out, Header { kind: Kind::Push, keys: KeyRange { start: 3, end: 5 }, ..me }, &numbers(2, clock));
    let ids = [client, clock + 1, clock + 4];
    let mut batch: Vec<u8> = [0u32, 1].into_iter().flat_map(u32::to_le_bytes).collect();
    batch.extend(ids.into_iter().flat_map(u64::to_le_bytes));
    batch.extend(numbers(9, clock));
    let keys = KeyRange { start: 0, end: 3 };
    let on_rows = Header { kind: Kind::SparsePush, table: rows.id(), keys, ..me };
    match client {
        0 => told(out, on_rows, &batch),
        _ => told(out, Header { codec: Codec::Int8.code(), ..on_rows }, &packed_push(Codec::Int8)),
    }
}

/// The requests in `bytes`, as they lie.
fn each(mut bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = std::mem::take(&mut bytes).split_first_chunk_mut::<4>()?;
        let (one, rest) = rest.split_at_mut_checked(u32::from_le_bytes(*length) as usize)?;
        bytes = rest;
        Some(one)
    })
}

/// Lengths and checksums of the headers fit.
fn seal_requests(bytes: &mut [u8]) {
    for request in each(bytes) {
        let length = request.len().saturating_sub(HEADER_BYTES) as u64;
        if let Some(place) = request.get_mut(80..88) {
            place.copy_from_slice(&length.to_le_bytes());
        }
        seal_header(request);
    }
}

fn request(bytes: &[u8]) {
    let (mut shard, mut now, mut out) = (greeted(limits()), begin(), Vec::new());
    for request in each(&mut bytes.to_vec()) {
        now += Duration::from_millis(100);
        if let Ok(header) = Header::decode(request) {
            shard.handle(PeerId((header.client % CLIENTS) as u32), &header, &request[HEADER_BYTES..], now, &mut out);
        }
        out.clear();
    }
    assert!(shard.status(0).memory_bytes <= MEMORY_BYTES, "it holds more than it may");
    // Whatever has become of it can be told, and made again.
    let chunks = shard.chunks(now);
    shard.expire(now + Duration::from_secs(3600), &mut out);
    (0..CLIENTS).for_each(|client| shard.gone(PeerId(client as u32), &mut out));
    let mut builder = Builder::new(limits(), 8, (0, 1), now);
    let mut again = chunks.iter().try_for_each(|chunk| builder.take(chunk)).and_then(|()| builder.finish());
    // A client may cut its table for more shards than this one: then others have the rest of it.
    let status = shard.status(0);
    let mut shards =
        status.tables.iter().map(|table| table.spec.shards).chain(status.sparse.iter().map(|t| t.spec.shards));
    if shards.any(|shards| shards != 1) {
        return;
    }
    match &mut again {
        Ok(shard) => assert!(shard.chunks(now) == chunks, "a shard came back as another"),
        Err(error) => assert!(error.to_string().contains("memory"), "a shard's own chunks were refused: {error}"),
    }
}

/// Shards that were asked for what the samples ask.
fn shards() -> Vec<Shard> {
    let asked = |mut requests: Vec<u8>| {
        let mut shard = greeted(limits());
        for request in each(&mut requests) {
            let header = Header::decode(request).expect("it was just made");
            let peer = PeerId(header.client as u32);
            shard.handle(peer, &header, &request[HEADER_BYTES..], begin(), &mut Vec::new());
        }
        shard
    };
    requests().into_iter().map(asked).collect()
}

fn chunks() -> Vec<Vec<u8>> {
    let state = |mut shard: Shard| {
        let mut out = Vec::new();
        shard.chunks(begin()).iter().for_each(|chunk| frame(chunk, &mut out));
        out
    };
    shards().into_iter().map(state).collect()
}

fn files() -> Vec<Vec<u8>> {
    shards().iter_mut().map(exported).collect()
}

fn exported(shard: &mut Shard) -> Vec<u8> {
    let images: Vec<_> = shard.table_ids().into_iter().filter_map(|id| shard.image(id, begin())).collect();
    let clients = shard.members_chunks();
    let mut all = tensors(&images, &clients).expect("no two tables have one name");
    let head = header(&mut all, metadata(&images, "checkpoint-1")).expect("there are few tensors");
    let pieces = all.iter().flat_map(|(_, tensor)| tensor.pieces());
    std::iter::once(head).chain(pieces).collect::<Vec<_>>().concat()
}

fn file(bytes: &[u8]) {
    let builder = Builder::new(limits(), 8, (0, 1), begin());
    if let Ok(mut shard) = shard_of_file(&bytes, builder, begin()) {
        assert!(shard.status(0).memory_bytes <= MEMORY_BYTES, "it holds more than it may");
        let again = Builder::new(limits(), 8, (0, 1), begin());
        assert!(
            shard_of_file(&&*exported(&mut shard), again, begin()).is_ok(),
            "what was taken in does not go out again"
        );
    }
}

/// The checksum of each chunk fits.
fn seal_chunks(mut bytes: &mut [u8]) {
    while let Some((head, rest)) = std::mem::take(&mut bytes).split_first_chunk_mut::<FRAME_BYTES>() {
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some((chunk, rest)) = rest.split_at_mut_checked(length) else { return };
        head[4..].copy_from_slice(&crc32c::crc32c(chunk).to_le_bytes());
        bytes = rest;
    }
}

fn chunk(bytes: &[u8]) {
    for place in [(0, 1), (1, 3)] {
        let (mut builder, mut rest) = (Builder::new(limits(), 8, place, begin()), bytes);
        while let Ok(Some((chunk, taken))) = unframe(rest) {
            if builder.take(chunk).is_err() {
                return;
            }
            rest = &rest[taken..];
        }
        let Ok(mut shard) = builder.finish() else { continue };
        assert!(shard.status(0).memory_bytes <= MEMORY_BYTES, "it holds more than it may");
        drive(&mut shard, place);
    }
}

/// Whatever was made is trained a little.
fn drive(shard: &mut Shard, (own, shards): (u32, u32)) {
    let mut requests = requests().concat();
    for client in 0..CLIENTS {
        let hello = Header { client, incarnation: 1 << 60, sequence: 1, ..Header::new(Kind::Hello) };
        shard.handle(PeerId(client as u32), &hello, &[], begin(), &mut Vec::new());
    }
    for request in each(&mut requests) {
        let mut header = Header::decode(request).expect("it was just made");
        header.incarnation = 1 << 60;
        header.keys.start += u64::from(own * u32::from(shards > 1));
        shard.handle(PeerId(header.client as u32), &header, &request[HEADER_BYTES..], begin(), &mut Vec::new());
    }
    let _ = shard.chunks(begin());
}
