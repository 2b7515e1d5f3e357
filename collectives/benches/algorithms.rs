//! Does: measures the algorithms of all-reduce over loopback TCP, ranks as threads: where `choose.rs` has its limits from.
//!
//! `cargo bench -p gradwire-collectives --bench algorithms [-- WORLD...]` prints microseconds of one call, the median of rounds in which
//! the algorithms take turns (one group of ranks each), for every world and size. Loopback, and more ranks than cores in
//! most of it: read it for which algorithm does less work, not for what a network gives.

#![allow(clippy::unwrap_used)] // A bench that unwraps fails where it should.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Way, call, floats, group, values};
use gradwire_collectives::{Collective, Reduction, Settings};
use std::time::Instant;

const ALGORITHMS: [&str; 6] = ["short", "doubling", "halving", "direct", "double_tree", "ring"];
const WORLDS: [u32; 4] = [2, 4, 8, 12];
const BYTES: [usize; 6] = [8, 4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];
/// Times that each algorithm takes its turn.
const ROUNDS: usize = 3;
/// Calls in a turn, half of them to warm up.
const CALLS: usize = 24;

/// Microseconds of one call, by size: the median of a turn on rank 0.
fn turn(world: u32, algorithm: &str) -> Vec<f64> {
    let settings =
        Settings { algorithms: Some(format!("all_reduce:{algorithm}")), cores: cores(), ..Settings::default() };
    let by_rank = group(world, Way::Tcp, settings, |c| {
        let median = |bytes: usize| {
            let buffer = floats(vec![1.0; bytes / 4]);
            let one = || c.run(call(Collective::AllReduce { op: Reduction::Avg }, &[], &[&buffer])).unwrap();
            let mut seconds: Vec<f64> = (0..CALLS)
                .map(|_| {
                    let start = Instant::now();
                    one();
                    start.elapsed().as_secs_f64()
                })
                .skip(CALLS / 2)
                .collect();
            assert!(values(&buffer).iter().all(|value| *value == 1.0), "an average of ones is one");
            seconds.sort_by(f64::total_cmp);
            seconds[seconds.len() / 2] * 1e6
        };
        BYTES.map(median).to_vec()
    });
    by_rank.into_iter().next().unwrap()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn main() {
    if std::env::args().any(|argument| argument == "--test") {
        ALGORITHMS.iter().for_each(|algorithm| assert_eq!(turn(3, algorithm).len(), BYTES.len()));
        return;
    }
    println!("all_reduce of float32 over loopback TCP, ranks are threads on {} cores; us, median", cores());
    print!("{:<6} {:<12}", "ranks", "algorithm");
    BYTES.iter().for_each(|bytes| print!(" {bytes:>9} B"));
    println!();
    let asked: Vec<u32> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    for world in WORLDS.into_iter().filter(|world| asked.is_empty() || asked.contains(world)) {
        let mut all = vec![vec![Vec::new(); BYTES.len()]; ALGORITHMS.len()];
        for _ in 0..ROUNDS {
            for (algorithm, all) in ALGORITHMS.iter().zip(&mut all) {
                all.iter_mut().zip(turn(world, algorithm)).for_each(|(all, us)| all.push(us));
            }
        }
        for (algorithm, all) in ALGORITHMS.iter().zip(&mut all) {
            print!("{world:<6} {algorithm:<12}");
            for us in all {
                us.sort_by(f64::total_cmp);
                print!(" {:>11.1}", us[us.len() / 2]);
            }
            println!();
        }
    }
}
