//! Does: measures what it costs a shard that every push counts once, beside all that it does for a push.
//!
//!     cargo bench -p gradwire-ps --bench exactly_once
//!
//! The protocol has no switch that leaves it out. So what is timed is what it adds on the server: finding a client's window and
//! admitting a number to it (asynchronous tables), or a rank to a clock's ledger (synchronous ones); beside the whole handling of
//! such a push by a shard, without a wire, which would make the whole longer and the share smaller.
#![allow(clippy::unwrap_used)] // A benchmark that unwraps stops where it should.

use gradwire_ps::header::{Header, Kind};
use gradwire_ps::shard::{Action, Shard};
use gradwire_ps::staleness::{ClockLedger, Verdict, Window};
use gradwire_ps::{Combine, Compression, DType, Epoch, KeyRange, Limits, Mode, TableSpec, UpdateRule, open_body};
use gradwire_transport::PeerId;
use std::collections::HashMap;
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 21;
const CALLS: u64 = 2000;
const CLIENTS: u64 = 16;

fn main() {
    println!("one shard, one core, float32, {CLIENTS} workers; pushes without a wire, median of {ROUNDS} rounds");
    println!("{:>8} {:>10} {:>12} {:>14} {:>8}", "table", "bytes", "push ns", "once ns", "share");
    for mode in [Mode::Async, Mode::Sync { workers: CLIENTS as u32 }] {
        let name = if mode == Mode::Async { "async" } else { "sync" };
        let once = if mode == Mode::Async { windows() } else { ledger() };
        for bytes in [64, 4 << 10, 64 << 10, 1 << 20] {
            let push = pushes(mode, bytes);
            println!("{name:>8} {bytes:>10} {push:>12.1} {once:>14.1} {:>7.2}%", 100.0 * once / push);
        }
    }
}

/// The median over rounds of how many nanoseconds each of `calls` calls of a round took.
fn median(calls: u64, mut round: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            round();
            began.elapsed().as_secs_f64() * 1e9 / calls as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

fn windows() -> f64 {
    let (mut windows, mut sequence) = (HashMap::<u64, Window>::new(), 0);
    median(CALLS * CLIENTS, || {
        for _ in 0..CALLS {
            sequence += 1;
            for client in 0..CLIENTS {
                let window = windows.entry(black_box(client)).or_insert(Window::new(1));
                black_box(window.admit(1, black_box(sequence)));
            }
        }
    })
}

fn ledger() -> f64 {
    let (mut ledger, mut clock) = (ClockLedger::new(CLIENTS as u32), 0);
    median(CALLS * CLIENTS, || {
        for _ in 0..CALLS {
            clock += 1;
            for rank in 0..CLIENTS {
                let verdict = ledger.admit(black_box(clock), black_box(rank as u32));
                assert!(matches!(verdict, Verdict::Begin | Verdict::Add));
            }
            ledger.advance();
        }
    })
}

/// A whole push of `bytes`, as a shard handles it. Checked: each is acknowledged, and all count.
fn pushes(mode: Mode, bytes: usize) -> f64 {
    let elements = bytes as u64 / 4;
    let spec = TableSpec {
        recovery: gradwire_ps::Recovery::None,
        name: "bench".into(),
        shape: vec![elements],
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode,
        combine: Combine::Sum,
        clipped: false,
        compression: Compression::default(),
        shards: 1,
        shard: 0,
        part_elements: elements,
    };
    let (mut shard, now, mut out) = (Shard::new(Limits::default(), 1), Instant::now(), Vec::new());
    let request = |kind, client| Header { client, incarnation: 1, epoch: Epoch(1), sequence: 1, ..Header::new(kind) };
    let body = open_body(&spec);
    for client in 0..CLIENTS {
        let peer = PeerId(client as u32);
        shard.handle(peer, &request(Kind::Hello, client), &[], now, &mut out);
        let open = Header { table: spec.id(), payload_bytes: body.len() as u64, ..request(Kind::Open, client) };
        shard.handle(peer, &open, &body, now, &mut out);
    }
    let (payload, keys) = (vec![0; bytes], KeyRange { start: 0, end: elements });
    let calls = (CALLS * 4096 / bytes as u64).clamp(20, CALLS);
    let mut clock = 0;
    let took = median(calls * CLIENTS, || {
        for _ in 0..calls {
            clock += 1;
            for client in 0..CLIENTS {
                let (table, dtype) = (spec.id(), Some(DType::F32));
                let push = Header { table, keys, dtype, clock, sequence: clock, ..request(Kind::Push, client) };
                let push = Header { payload_bytes: bytes as u64, ..push };
                out.clear();
                shard.handle(PeerId(client as u32), &push, &payload, now, &mut out);
                assert!(matches!(&out[..], [Action::Reply { header, .. }] if header.kind == Kind::Done));
            }
        }
    });
    let counted = shard.status(0).tables[0].clock;
    assert_eq!(counted, if mode == Mode::Async { clock * CLIENTS } else { clock });
    took
}
