//! Does: measures what it costs to remember one operation, beside the shortest one that there is: an all-reduce of 8 bytes of two ranks
//! at a shared segment, which remembers itself too, and beside one look at the clock, which an end cannot do without.
//!
//! `cargo bench -p gradwire-collectives --bench recorder` prints first the median of rounds in which all take turns, and one
//! divided by the other; then criterion's own figures, to compare with earlier runs.

#![allow(clippy::unwrap_used)] // A bench that unwraps fails where it should.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Way, call, floats, group, values};
use criterion::Criterion;
use gradwire_collectives::recording::Recording;
use gradwire_collectives::{Collective, Communicator, Reduction, Settings};
use gradwire_transport::Rank;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Rounds of the table, and operations in a turn.
const ROUNDS: usize = 41;
const OPERATIONS: u64 = 100_000;

/// So many all-reduces of 8 bytes, which must give what they should.
fn all_reduce(c: &Communicator, count: u64) -> Duration {
    let buffer = floats([1.0; 2]);
    let start = Instant::now();
    for _ in 0..count {
        c.run(call(Collective::AllReduce { op: Reduction::Avg }, &[], &[&buffer])).unwrap();
    }
    let took = start.elapsed();
    assert_eq!(values(&buffer), [1.0; 2], "an average of ones is one");
    took
}

fn record(recording: &Recording, count: u64) -> Duration {
    let called = Instant::now();
    (0..count).for_each(|number| recording.operation(number, called));
    called.elapsed()
}

fn look_at_clock(count: u64) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        black_box(Instant::now());
    }
    start.elapsed()
}

fn median_ns(mut turns: Vec<Duration>, count: u64) -> f64 {
    turns.sort();
    turns[turns.len() / 2].as_secs_f64() * 1e9 / count as f64
}

fn measure(c: &Communicator, other: &Sender<u64>) {
    let recording = Recording::default();
    let reduce = |count| {
        other.send(count).unwrap();
        all_reduce(c, count)
    };
    let operations = if std::env::args().any(|argument| argument == "--test") { 10 } else { OPERATIONS };
    let measures: [&dyn Fn(u64) -> Duration; 3] = [&|count| record(&recording, count), &look_at_clock, &reduce];
    let mut turns: [Vec<Duration>; 3] = Default::default();
    for _ in 0..ROUNDS {
        turns.iter_mut().zip(measures).for_each(|(turns, measure)| turns.push(measure(operations)));
    }
    let [record_ns, clock_ns, reduce_ns] = turns.map(|turns| median_ns(turns, operations));
    println!("to remember an operation {record_ns:.1} ns, of which a look at the clock (limit) {clock_ns:.1} ns");
    println!("all_reduce of 8 B, 2 ranks, segment {reduce_ns:.0} ns: {:.1} % of it", record_ns / reduce_ns * 100.0);
    let mut criterion = Criterion::default().configure_from_args();
    criterion.bench_function("record", |b| b.iter_custom(|count| record(&recording, count)));
    criterion.bench_function("all_reduce 8 B segment", |b| b.iter_custom(reduce));
    criterion.final_summary();
}

fn main() {
    let (told, hears): (Sender<u64>, Receiver<u64>) = channel();
    let (told, hears) = (Mutex::new(Some(told)), Mutex::new(hears));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    group(2, Way::Segment, Settings { cores, ..Settings::default() }, |c| {
        if c.rank() == Rank(0) {
            let told = told.lock().unwrap().take().unwrap();
            return measure(c, &told);
        }
        // Ends when rank 0 has let go of the other end.
        for count in hears.lock().unwrap().iter() {
            all_reduce(c, count);
        }
    });
}
