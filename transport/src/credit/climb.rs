//! Pure: finds how many bytes a path holds: the least that may be on their way and still fill it.
//!
//! Bandwidth times round trip is that number, but a round trip cannot be measured where hosts are busy: what a process waits
//! for its core looks like a queue. What tells them apart is the rate: more bytes on their way raise it until the path is
//! full, and then only lengthen the queue. So the budget grows by half while that pays (as in BBR's start, ACM Queue 14(5),
//! 2016), goes back to the least that was as good, and is then tried a little larger and a little smaller in turns, each
//! beside itself, for as long as senders want more than they get.

use std::time::{Duration, Instant};

/// An epoch lasts for this long at least: longer than a scheduler's hiccup.
const LEAST_EPOCH: Duration = Duration::from_millis(4);
/// Budgets that pass before an epoch counts, for what was on its way under another one, and while it counts.
const SKIP: u64 = 2;
const COUNT: u64 = 8;
/// Growth at the start, and the least gain by which it pays; how often it may fail to.
const START_GROWTH: f64 = 1.5;
const START_GAIN: f64 = 1.1;
const START_STALLS: u32 = 2;
/// A budget is as good as the best where it gives this share of its rate.
const AS_GOOD: f64 = 0.985;
/// Steps of a trial, and the pairs of epochs that decide on one.
const STEP: f64 = 1.25;
const PAIRS: u32 = 6;
/// A larger budget is taken where it gives this much, and more in all pairs but one; a smaller one where it costs no more than
/// this. So noise makes the budget smaller rather than larger.
const WORTH: f64 = 1.015;
const CHEAP: f64 = 0.995;

enum Phase {
    /// Growing: rates by budget, and how often in a row growth did not pay.
    Start { tried: Vec<(u64, f64)>, stalls: u32 },
    /// Trying a larger one or a smaller one: epochs so far, the last one's rate, what both have given, and the pairs in which
    /// the tried one gave more.
    Trial { larger: bool, epochs: u32, last: f64, rates: [f64; 2], wins: u32 },
}

impl Phase {
    fn trial(larger: bool) -> Self {
        Self::Trial { larger, epochs: 0, last: 0.0, rates: [0.0; 2], wins: 0 }
    }
}

/// The search.
pub(super) struct Climb {
    budget: u64,
    least: u64,
    most: u64,
    phase: Phase,
    /// When the epoch began to count, and bytes since; bytes that are still to be passed over before.
    epoch: Option<(Instant, u64)>,
    skip: u64,
}

impl Climb {
    pub(super) fn new(least: u64, most: u64) -> Self {
        let (least, most) = (least.max(1), most.max(least).max(1));
        let mut climb = Self {
            budget: least,
            least,
            most,
            phase: Phase::Start { tried: Vec::new(), stalls: 0 },
            epoch: None,
            skip: 0,
        };
        climb.begin();
        climb
    }

    /// From now on at least `least` may be on their way, whatever the path holds; where less was, the search begins there.
    pub(super) fn raise(&mut self, least: u64) {
        if least <= self.least {
            return;
        }
        (self.least, self.most) = (least, self.most.max(least));
        if self.budget < least {
            (self.budget, self.phase) = (least, Phase::Start { tried: Vec::new(), stalls: 0 });
            self.begin();
        }
    }

    /// The budget in force.
    pub(super) fn budget(&self) -> u64 {
        match self.phase {
            Phase::Trial { larger, epochs, .. } if epochs % 2 == 1 => self.stepped(larger),
            _ => self.budget,
        }
    }

    /// `bytes` have come. `wanted`: whether senders want more than the budget lets them; else this says nothing of the path.
    pub(super) fn came(&mut self, bytes: u64, wanted: bool, now: Instant) {
        if !wanted {
            self.begin();
            return;
        }
        if self.skip > 0 {
            self.skip = self.skip.saturating_sub(bytes);
            self.epoch = (self.skip == 0).then_some((now, 0));
            return;
        }
        let (began, so_far) = self.epoch.unwrap_or((now, 0));
        let (so_far, elapsed) = (so_far + bytes, now.saturating_duration_since(began));
        self.epoch = Some((began, so_far));
        if so_far >= COUNT * self.budget() && elapsed >= LEAST_EPOCH {
            self.learn(so_far as f64 / elapsed.as_secs_f64());
            self.begin();
        }
    }

    /// Begins an epoch.
    fn begin(&mut self) {
        (self.epoch, self.skip) = (None, SKIP * self.budget());
    }

    fn stepped(&self, larger: bool) -> u64 {
        let budget = self.budget as f64;
        let stepped = if larger { budget * STEP } else { budget / STEP };
        (stepped as u64).clamp(self.least, self.most)
    }

    /// An epoch has given `rate`.
    fn learn(&mut self, rate: f64) {
        match &mut self.phase {
            Phase::Start { tried, stalls } => {
                let best = tried.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
                *stalls = if rate < best * START_GAIN { *stalls + 1 } else { 0 };
                tried.push((self.budget, rate));
                if *stalls < START_STALLS && self.budget < self.most {
                    self.budget = ((self.budget as f64 * START_GROWTH) as u64).min(self.most);
                    return;
                }
                let best = best.max(rate);
                let good = tried.iter().find(|(_, rate)| *rate >= best * AS_GOOD);
                self.budget = good.map_or(self.budget, |(budget, _)| *budget);
                self.phase = Phase::trial(false);
            }
            Phase::Trial { larger, epochs, last, rates, wins } => {
                let tried = *epochs % 2 == 1;
                rates[usize::from(tried)] += rate;
                *wins += u32::from(tried && rate > *last);
                *last = rate;
                *epochs += 1;
                if *epochs < 2 * PAIRS {
                    return;
                }
                let (larger, gain) = (*larger, rates[1] / rates[0]);
                if if larger { gain > WORTH && *wins + 1 >= PAIRS } else { gain > CHEAP } {
                    self.budget = self.stepped(larger);
                }
                self.phase = Phase::trial(!larger);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds a path that gives `rate` once `holds` bytes are on their way, for some virtual seconds.
    fn feed(climb: &mut Climb, start: Instant, seconds: f64, rate: f64, holds: f64, noise: &mut impl FnMut() -> f64) {
        let (mut at, end) = (0.0, seconds);
        while at < end {
            let bytes = climb.budget() / 4 + 1;
            let now = rate * (climb.budget() as f64 / holds).min(1.0);
            at += bytes as f64 / now * noise();
            climb.came(bytes, true, start + Duration::from_secs_f64(at));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever a path holds, the budget comes to fill it, and not much more; and follows it when it changes.
        #[test]
        fn the_budget_comes_to_what_the_path_holds(
            first in 40_000.0f64..4e6, second in 40_000.0f64..4e6, rate in 1e8f64..2e9, seed: u32,
        ) {
            let mut state = u64::from(seed) | 1;
            let mut noise = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                0.99 + (state >> 40) as f64 / f64::from(1 << 24) * 0.02
            };
            let (mut climb, start) = (Climb::new(16 << 10, 16 << 20), Instant::now());
            // A byte takes a round trip, so an epoch of a large budget takes longer.
            let seconds = 60.0 * (1.0 + 1e9 / rate);
            feed(&mut climb, start, seconds, rate, first, &mut noise);
            let found = climb.budget as f64 / first;
            prop_assert!((0.7..1.7).contains(&found), "{found} of what it holds");
            feed(&mut climb, start + Duration::from_secs_f64(seconds), seconds, rate, second, &mut noise);
            let found = climb.budget as f64 / second;
            prop_assert!((0.7..1.7).contains(&found), "{found} of what it holds now");
        }
    }

    #[test]
    fn a_path_that_nobody_fills_teaches_nothing() {
        let (mut climb, start) = (Climb::new(1000, 1 << 20), Instant::now());
        for ms in 0..1000 {
            climb.came(5000, ms % 7 != 0, start + Duration::from_millis(ms));
        }
        assert_eq!(climb.budget(), 1000);
    }

    #[test]
    fn a_least_that_is_raised_is_kept_and_what_more_a_path_holds_is_found() {
        let (mut climb, start) = (Climb::new(1000, 1 << 20), Instant::now());
        climb.raise(500);
        assert_eq!(climb.budget(), 1000);
        climb.raise(100_000);
        assert_eq!(climb.budget(), 100_000);
        feed(&mut climb, start, 30.0, 1e8, 800_000.0, &mut || 1.0);
        assert!((600_000..=1 << 20).contains(&climb.budget()), "{}", climb.budget());
        feed(&mut climb, start + Duration::from_secs(30), 60.0, 1e8, 3000.0, &mut || 1.0);
        assert!((100_000..200_000).contains(&climb.budget()), "{}", climb.budget());
        climb.raise(3 << 20);
        assert_eq!(climb.budget(), 3 << 20);
        // What had been tried before is too little now, however good it was.
        let mut climb = Climb::new(1000, 1 << 20);
        feed(&mut climb, start, 0.006, 1e8, 500.0, &mut || 1.0);
        climb.raise(100_000);
        for step in 4000..5000 {
            climb.came(25_000, true, start + Duration::from_micros(250 * step));
            assert!(climb.budget() >= 100_000, "{} at step {step}", climb.budget());
        }
    }

    #[test]
    fn the_budget_stays_within_its_bounds() {
        let (mut climb, start) = (Climb::new(1000, 5000), Instant::now());
        for ms in 1..10_000 {
            climb.came(10_000 + 1000 * climb.budget() * ms % 77, true, start + Duration::from_millis(5 * ms));
            assert!((1000..=5000).contains(&climb.budget()));
        }
    }
}
