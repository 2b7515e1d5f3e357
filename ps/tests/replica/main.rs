//! Does: kills servers of a simulated cluster at any point, breaks its connections, repeats its messages, and counts.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod pair;
mod script;
mod world;

use gradwire_ps::Mode;
use script::{DENSE, IDS, PUSHES, SCALE};
use world::World;

/// Runs three workers over a cluster with `replicas` copies in which up to `kills` servers die; what each of them saw in the end,
/// and how often a backup followed another without beginning anew.
fn run(seed: u64, mode: Mode, replicas: u32, kills: usize) -> (Vec<Vec<f32>>, usize) {
    let mut world = World::new(seed, mode, replicas);
    let wanted = (kills > 0).then(|| 200 + world.random.below(2500));
    for step in 0..200_000 {
        if Some(step) == wanted {
            world.kills = kills;
        }
        world.step();
        if world.is_done() {
            return (world.clients.into_iter().map(|client| client.seen).collect(), world.turned);
        }
    }
    panic!("seed {seed}, {mode}, {replicas} copies: not done; {}", world.told());
}

#[test]
fn whoever_dies_whenever_every_push_counts_once_and_none_that_was_acknowledged_is_lost() {
    let whole = 3.0 * PUSHES as f32;
    for mode in [Mode::Async, Mode::Sync { workers: 3 }, Mode::Ssp { workers: 3, staleness: 1 }] {
        let mut expected = vec![whole; (DENSE + IDS) as usize];
        if matches!(mode, Mode::Sync { .. }) {
            expected.extend([whole * SCALE; DENSE as usize]);
        }
        for (replicas, kills, seeds) in [(1, 3, 150), (2, 5, 100), (3, 6, 50)] {
            let mut turned = 0;
            for seed in 0..seeds {
                let (all, times) = run(seed, mode, replicas, kills);
                turned += times;
                for seen in all {
                    assert_eq!(seen, expected, "seed {seed}, {mode}, {replicas} copies");
                }
            }
            // Of a chain of two there is none in the middle.
            assert_eq!(turned > 0, replicas > 1, "{turned} turned");
        }
    }
}
