//! Pure: how a rank stores what others will read: in its cache, or past it.
//!
//! A line that another core has read is taken back from it before it is written again, and fetched from this core's cache when
//! it is read again. Cores with a cache in common do that at its pace. Between others (of two chiplets, of two sockets) each
//! line takes its own way twice: 64 KiB each way took 34 us on an EPYC, and 7 us where they were stored past the cache; on two
//! cores of one chiplet, 9 and 9; on two threads of one core, 5 and 10. Which cores ranks run on may change at any time, in a
//! virtual machine without a word. So both ways are timed, in a few rounds out of many, and the better one is kept.
//!
//! All ranks count the same rounds, so they try the same way in the same one. What each keeps is its own affair.

use std::time::Duration;

/// Less is not worth a fence.
const LEAST_BYTES: usize = 1 << 10;
/// Where a class of sizes ends: letters, what stays in the nearest cache, and the rest.
const CLASSES: [usize; 3] = [8 << 10, 64 << 10, usize::MAX];
/// Of so many rounds, some are timed: these, both ways in turns.
const PERIOD: u32 = 2048;
const FIRST: u32 = 16;
const PAIRS: u32 = 4;
/// A way is better where it takes less than this share of the other's time, in so many pairs more than not.
const BETTER: f64 = 0.9;
const MAJORITY: i32 = 2;

/// What is known of one class.
#[derive(Clone, Copy, Debug, Default)]
struct Class {
    turn: u32,
    past: bool,
    /// The last round that was timed, where it was stored in the cache: its bytes, and how long it took.
    ordinary: Option<(usize, Duration)>,
    /// Pairs in which storing past the cache was better, less those in which it was worse.
    score: i32,
}

/// How a round is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) past: bool,
    /// Whether it is to be timed.
    pub(super) timed: bool,
}

/// What is known of all.
#[derive(Debug, Default)]
pub(super) struct Storing([Class; CLASSES.len()]);

impl Storing {
    /// How `bytes` are best stored.
    pub(super) fn past(&self, bytes: usize) -> bool {
        bytes >= LEAST_BYTES && self.0[class(bytes)].past
    }

    /// How the next round, of `bytes`, is stored by a rank that both gives and takes.
    pub(super) fn next(&mut self, bytes: usize) -> Way {
        if bytes < LEAST_BYTES {
            return Way { past: false, timed: false };
        }
        let class = &mut self.0[class(bytes)];
        let at = (class.turn % PERIOD).wrapping_sub(FIRST);
        class.turn = class.turn.wrapping_add(1);
        let timed = at < 2 * PAIRS;
        Way { past: if timed { at % 2 == 1 } else { class.past }, timed }
    }

    /// A round that was to be timed has kept this rank busy for so long.
    pub(super) fn took(&mut self, bytes: usize, past: bool, busy: Duration) {
        let class = &mut self.0[class(bytes)];
        if !past {
            class.ordinary = Some((bytes, busy));
            return;
        }
        // Rounds of different lengths cannot be compared.
        if let Some((_, ordinary)) = class.ordinary.take().filter(|(before, _)| *before == bytes) {
            let ratio = busy.as_secs_f64() / ordinary.as_secs_f64();
            class.score += i32::from(ratio < BETTER) - i32::from(ratio > 1.0 / BETTER);
        }
        if (class.turn % PERIOD).wrapping_sub(FIRST) >= 2 * PAIRS {
            if class.score.abs() >= MAJORITY {
                class.past = class.score > 0;
            }
            class.score = 0;
        }
    }
}

fn class(bytes: usize) -> usize {
    CLASSES.iter().position(|end| bytes <= *end).unwrap_or(CLASSES.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of `bytes` that take `ordinary` and `past`; how many of them went past the cache.
    fn rounds(storing: &mut Storing, count: u32, bytes: usize, times: [u64; 2]) -> u32 {
        (0..count)
            .map(|_| {
                let way = storing.next(bytes);
                if way.timed {
                    storing.took(bytes, way.past, Duration::from_nanos(times[usize::from(way.past)]));
                }
                u32::from(way.past)
            })
            .sum()
    }

    #[test]
    fn the_better_way_is_kept_and_the_other_tried_seldom() {
        for bytes in [LEAST_BYTES, 8 << 10, 64 << 10, 256 << 10] {
            let mut storing = Storing::default();
            rounds(&mut storing, PERIOD, bytes, [34_000, 7_000]);
            assert!(storing.past(bytes));
            assert_eq!(rounds(&mut storing, PERIOD, bytes, [34_000, 7_000]), PERIOD - PAIRS);
            rounds(&mut storing, PERIOD, bytes, [5_000, 10_000]);
            assert!(!storing.past(bytes), "cores have changed");
            assert_eq!(rounds(&mut storing, PERIOD, bytes, [5_000, 10_000]), PAIRS);
        }
    }

    #[test]
    fn what_is_alike_changes_nothing() {
        let mut storing = Storing::default();
        rounds(&mut storing, PERIOD, 65_536, [34_000, 7_000]);
        rounds(&mut storing, PERIOD, 65_536, [9_100, 9_000]);
        assert!(storing.past(65_536));
        assert!(!storing.past(8 << 10) && !storing.past(256 << 10), "other lengths have their own");
    }

    #[test]
    fn one_hiccup_decides_nothing() {
        let mut storing = Storing::default();
        for turn in 0..PERIOD {
            let way = storing.next(65_536);
            if way.timed {
                let hiccup = u64::from(turn == FIRST) * 1_000_000;
                storing.took(65_536, way.past, Duration::from_nanos(9_000 + hiccup));
            }
        }
        assert!(!storing.past(65_536));
    }

    #[test]
    fn rounds_of_different_lengths_are_not_compared() {
        let mut storing = Storing::default();
        for turn in 0..2 * PERIOD as usize {
            let bytes = 20_000 + turn * 4;
            let way = storing.next(bytes);
            if way.timed {
                storing.took(bytes, way.past, Duration::from_nanos(if way.past { 1 } else { 1000 }));
            }
        }
        assert!(!storing.past(65_536));
    }

    #[test]
    fn little_is_always_stored_in_the_cache() {
        let mut storing = Storing::default();
        assert_eq!(rounds(&mut storing, 2 * PERIOD, LEAST_BYTES - 1, [34_000, 7_000]), 0);
        assert!(!storing.past(LEAST_BYTES - 1));
    }
}
