//! Pure: how a rank stores what others will read: in its cache, or past it.
//!
//! A line that another core has read is taken back from it before it is written again, and fetched from this core's cache when
//! it is read again. Cores with a cache in common do that at its pace. Between others (of two chiplets, of two sockets) each
//! line takes its own way twice: 64 KiB each way took 34 us on an EPYC, and 7 us where they were stored past the cache; on two
//! cores of one chiplet, 9 and 9; on two threads of one core, 5 and 10. Which cores ranks run on may change at any time, in a
//! virtual machine without a word. So both ways are timed, in a few rounds out of many, and the better one is kept.
//!
//! All ranks of a group count the same rounds, so they try the same way in the same one, and see what it costs to give and to
//! take. Who only gives sees half of it: taken back lines cost the writer most, what was stored past the cache the reader. One
//! way, 64 KiB took 10 us to write in the cache and 2 to read, and 2 and 5 past it; on one core's two threads, 2 and 2, and 4
//! and 5: as reading goes on beside writing, past the cache is better where writing takes less than half as long.

use std::time::Duration;

/// Less is not worth a fence.
const LEAST_BYTES: usize = 1 << 10;
/// Where a class of sizes ends: letters, what stays in the nearest cache, and the rest.
const CLASSES: [usize; 3] = [8 << 10, 64 << 10, usize::MAX];
/// Of so many rounds, some are timed: these, both ways in turns.
const PERIOD: u32 = 2048;
const FIRST: u32 = 16;
const PAIRS: u32 = 4;
/// In so many pairs more than not one way is better.
const MAJORITY: i32 = 2;
/// Past the cache is better where it takes less than the first share of the other way's time, and worse where it takes more than
/// the second: for who gives and takes, and for who only gives.
const BOTH: [f64; 2] = [0.9, 1.1];
const GIVING: [f64; 2] = [0.4, 0.5];

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
pub struct Way {
    /// Past the cache.
    pub past: bool,
    /// Whether it is to be timed.
    pub timed: bool,
}

/// What is known of all.
#[derive(Debug)]
pub struct Storing {
    classes: [Class; CLASSES.len()],
    shares: [f64; 2],
}

impl Storing {
    /// For who gives and takes alike.
    pub fn both() -> Self {
        Self { classes: Default::default(), shares: BOTH }
    }

    /// For who only gives, or sees no more.
    pub fn giving() -> Self {
        Self { classes: Default::default(), shares: GIVING }
    }

    /// How `bytes` are best stored.
    pub fn past(&self, bytes: usize) -> bool {
        bytes >= LEAST_BYTES && self.classes[class(bytes)].past
    }

    /// How the next round, of `bytes`, is stored.
    pub fn next(&mut self, bytes: usize) -> Way {
        if bytes < LEAST_BYTES {
            return Way { past: false, timed: false };
        }
        let class = &mut self.classes[class(bytes)];
        let at = (class.turn % PERIOD).wrapping_sub(FIRST);
        class.turn = class.turn.wrapping_add(1);
        let timed = at < 2 * PAIRS;
        Way { past: if timed { at % 2 == 1 } else { class.past }, timed }
    }

    /// A round that was to be timed has kept this rank busy for so long.
    pub fn took(&mut self, bytes: usize, past: bool, busy: Duration) {
        let class = &mut self.classes[class(bytes)];
        if !past {
            class.ordinary = Some((bytes, busy));
            return;
        }
        // Rounds of different lengths cannot be compared.
        if let Some((_, ordinary)) = class.ordinary.take().filter(|(before, _)| *before == bytes) {
            let ratio = busy.as_secs_f64() / ordinary.as_secs_f64();
            class.score += i32::from(ratio < self.shares[0]) - i32::from(ratio > self.shares[1]);
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
            let mut storing = Storing::both();
            rounds(&mut storing, PERIOD, bytes, [34_000, 7_000]);
            assert!(storing.past(bytes));
            assert_eq!(rounds(&mut storing, PERIOD, bytes, [34_000, 7_000]), PERIOD - PAIRS);
            rounds(&mut storing, PERIOD, bytes, [5_000, 10_000]);
            assert!(!storing.past(bytes), "cores have changed");
            assert_eq!(rounds(&mut storing, PERIOD, bytes, [5_000, 10_000]), PAIRS);
        }
    }

    #[test]
    fn who_only_gives_knows_what_reading_costs() {
        let mut storing = Storing::giving();
        rounds(&mut storing, PERIOD, 65_536, [9_600, 2_200]);
        assert!(storing.past(65_536));
        rounds(&mut storing, PERIOD, 65_536, [4_500, 2_200]);
        assert!(storing.past(65_536), "alike");
        rounds(&mut storing, PERIOD, 65_536, [13_000, 9_200]);
        assert!(!storing.past(65_536));
    }

    #[test]
    fn what_is_alike_changes_nothing() {
        let mut storing = Storing::both();
        rounds(&mut storing, PERIOD, 65_536, [34_000, 7_000]);
        rounds(&mut storing, PERIOD, 65_536, [9_100, 9_000]);
        assert!(storing.past(65_536));
        assert!(!storing.past(8 << 10) && !storing.past(256 << 10), "other lengths have their own");
    }

    #[test]
    fn one_hiccup_decides_nothing() {
        let mut storing = Storing::both();
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
        let mut storing = Storing::both();
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
        let mut storing = Storing::both();
        assert_eq!(rounds(&mut storing, 2 * PERIOD, LEAST_BYTES - 1, [34_000, 7_000]), 0);
        assert!(!storing.past(LEAST_BYTES - 1));
    }
}
