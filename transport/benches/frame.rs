//! Does: measures the codec of frames beside its limits: the checksum of a head alone, and a copy of one.
//!
//!     cargo bench -p gradwire-transport --bench frame [-- NAME]
//!
//! Each frame of 64 KiB or less costs one encoding and one decoding: `codec` over `checksum` is what is ours to gain.

#![allow(clippy::unwrap_used)] // A bench that unwraps fails where it should.

use criterion::{Criterion, Throughput};
use gradwire_transport::Tag;
use gradwire_transport::frame::{HEADER_BYTES, Header, Kind};
use std::hint::black_box;

const MOST: usize = 1 << 30;

fn main() {
    let header =
        Header { kind: Kind::Data, id: 7, tag: Tag(0x1234_5678), note: 1 << 20, total: 16 << 20, length: 64 << 10 };
    let bytes = header.encode();
    assert_eq!(Header::decode(&bytes, MOST).unwrap(), header, "what is timed must be right");
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Bytes(HEADER_BYTES as u64));
    group.bench_function("copy (limit)", |b| {
        let mut copy = [0u8; HEADER_BYTES];
        b.iter(|| {
            copy.copy_from_slice(black_box(&bytes));
            black_box(&copy);
        });
    });
    group.bench_function("checksum (limit)", |b| b.iter(|| crc32c::crc32c(black_box(&bytes[..40]))));
    group.bench_function("encode", |b| b.iter(|| black_box(&header).encode()));
    group.bench_function("decode", |b| b.iter(|| Header::decode(black_box(&bytes), MOST)));
    group.finish();
    criterion.final_summary();
}
