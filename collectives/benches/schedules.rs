//! Does: measures how long it takes to make a schedule, beside a copy of one that is made.
//!
//!     cargo bench -p gradwire-collectives --bench schedules [-- NAME]
//!
//! A group makes the schedule of a call once for each shape and keeps it: this is the price of the first call. The rate is in
//! steps; the copy of the finished steps is what memory allows.

#![allow(clippy::unwrap_used)] // A bench that unwraps fails where it should.

use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire_collectives::schedules::{bruck, direct, halving_doubling, recursive_doubling, ring, tree};
use gradwire_collectives::{Schedule, Step};
use gradwire_transport::{Rank, WorldSize};
use std::hint::black_box;
use std::ops::Range;

/// Elements of a buffer, and of a segment.
const ELEMENTS: usize = 1 << 20;
const SEGMENT: usize = 1 << 16;
const WORLDS: [u32; 3] = [2, 16, 128];

type Make = fn(WorldSize) -> Schedule;

fn parts(world: WorldSize) -> Vec<Range<usize>> {
    let ranks = world.get() as usize;
    (0..ranks).map(|rank| rank * ELEMENTS / ranks..(rank + 1) * ELEMENTS / ranks).collect()
}

const FIRST: Rank = Rank(0);

fn cases() -> [(&'static str, Make); 7] {
    [
        ("all_reduce ring", |world| ring::all_reduce(FIRST, world, ELEMENTS, SEGMENT, false)),
        ("all_reduce halving", |world| halving_doubling::all_reduce(FIRST, world, ELEMENTS, SEGMENT, false)),
        ("all_reduce doubling", |world| recursive_doubling::all_reduce(FIRST, world, ELEMENTS, SEGMENT, false)),
        ("all_reduce direct", |world| direct::all_reduce(FIRST, world, ELEMENTS, SEGMENT)),
        ("all_gather bruck", |world| bruck::all_gather(FIRST, world, &parts(world), SEGMENT)),
        ("all_to_all bruck", |world| bruck::all_to_all(FIRST, world, ELEMENTS / world.get() as usize, SEGMENT)),
        ("barrier", |world| tree::barrier(FIRST, world)),
    ]
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("schedule");
    for world in WORLDS {
        let world = WorldSize::new(world).unwrap();
        for (name, make) in cases() {
            let made = make(world);
            let steps: Vec<Step> = made.steps;
            assert!(!steps.is_empty(), "{name} of {} ranks does something", world.get());
            group.throughput(Throughput::Elements(steps.len() as u64));
            group.bench_function(BenchmarkId::new(name, world.get()), |b| b.iter(|| make(black_box(world))));
            group.bench_function(BenchmarkId::new(format!("{name}, copy (limit)"), world.get()), |b| {
                b.iter(|| black_box(&steps).clone());
            });
        }
    }
    group.finish();
    criterion.final_summary();
}
