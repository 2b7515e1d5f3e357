//! Pure: how far each worker has come, and who must wait so that none gets too far ahead of another.

use crate::body::{BadBody, Reader, Writer};
use crate::staleness::CLOCKS_AHEAD;

/// What to do with a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It was counted before.
    Duplicate,
    /// Apply it.
    Now,
    /// Others must come nearer first, or an earlier push of this worker must come.
    Wait,
    /// Too many earlier pushes of this worker have not come: it must come again.
    TooEarly,
}

/// The pushes of each worker to one part of a table with bounded staleness.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Progress {
    staleness: u64,
    pushed: Vec<u64>,
    slowest: u64,
}

impl Progress {
    pub(crate) fn new(workers: u32, staleness: u32) -> Self {
        Self { staleness: staleness.into(), pushed: vec![0; workers as usize], slowest: 0 }
    }

    /// Memory that the pushes of so many workers take.
    pub(crate) const fn bytes(workers: u32) -> u64 {
        8 * workers as u64
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        self.pushed.iter().for_each(|&pushed| out.number(pushed));
    }

    pub(crate) fn decode(from: &mut Reader<'_>, workers: u32, staleness: u32) -> Result<Self, BadBody> {
        // The bytes must be there before memory is taken for them.
        let mut from = Reader(from.bytes(workers as usize * 8)?);
        let pushed = (0..workers).map(|_| from.counter()).collect::<Result<Vec<_>, _>>()?;
        let slowest = pushed.iter().copied().min().unwrap_or(0);
        Ok(Self { staleness: staleness.into(), pushed, slowest })
    }

    /// Pushes that every worker has made.
    pub(crate) fn slowest(&self) -> u64 {
        self.slowest
    }

    /// Pushes of `rank`.
    pub(crate) fn pushed(&self, rank: u32) -> u64 {
        self.pushed[rank as usize]
    }

    /// Whether nobody has pushed anything.
    pub(crate) fn is_untouched(&self) -> bool {
        self.pushed.iter().all(|&pushed| pushed == 0)
    }

    /// What to do with the push of `rank` to `clock`, from 1.
    pub(crate) fn turn(&self, clock: u64, rank: u32) -> Turn {
        match clock.checked_sub(self.pushed(rank) + 1) {
            None => Turn::Duplicate,
            Some(0) if self.may_read(clock - 1) => Turn::Now,
            Some(ahead) if ahead <= CLOCKS_AHEAD => Turn::Wait,
            Some(_) => Turn::TooEarly,
        }
    }

    /// Whether a worker that has made `clock` pushes may read: all others are near enough.
    pub(crate) fn may_read(&self, clock: u64) -> bool {
        clock <= self.slowest.saturating_add(self.staleness)
    }

    /// The next push of `rank` is applied. Whether the slowest have come further.
    pub(crate) fn advance(&mut self, rank: u32) -> bool {
        let pushed = &mut self.pushed[rank as usize];
        *pushed += 1;
        if *pushed != self.slowest + 1 {
            return false;
        }
        let slowest = self.pushed.iter().copied().min().unwrap_or(0);
        std::mem::replace(&mut self.slowest, slowest) != slowest
    }

    /// The workers that keep one who has made `clock` pushes waiting.
    pub(crate) fn missing(&self, clock: u64) -> impl Iterator<Item = u32> + '_ {
        let behind = move |pushed: u64| pushed.saturating_add(self.staleness) < clock;
        (0..).zip(&self.pushed).filter(move |(_, pushed)| behind(**pushed)).map(|(rank, _)| rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_schedule_brings_a_worker_further_ahead_than_the_bound(
            workers in 1u32..5, staleness in 0u32..4, picks in proptest::collection::vec(any::<u32>(), 1..400),
        ) {
            let mut progress = Progress::new(workers, staleness);
            let mut pushed = vec![0u64; workers as usize];
            for pick in picks {
                let rank = pick % workers;
                let clock = pushed[rank as usize] + 1;
                let slowest = *pushed.iter().min().unwrap();
                let may = clock - 1 <= slowest + u64::from(staleness);
                prop_assert_eq!(progress.turn(clock, rank), if may { Turn::Now } else { Turn::Wait });
                prop_assert_eq!(progress.turn(clock + 1, rank), Turn::Wait);
                prop_assert_eq!(progress.turn(clock + CLOCKS_AHEAD + 1, rank), Turn::TooEarly);
                prop_assert_eq!(progress.missing(clock - 1).next().is_none(), may);
                if may {
                    pushed[rank as usize] += 1;
                    let moved = progress.advance(rank);
                    prop_assert_eq!(moved, *pushed.iter().min().unwrap() > slowest);
                    prop_assert_eq!(progress.turn(clock, rank), Turn::Duplicate);
                }
                let (first, last) = (pushed.iter().max().unwrap(), pushed.iter().min().unwrap());
                prop_assert!(first - last <= u64::from(staleness) + 1);
                prop_assert_eq!(progress.slowest(), *last);
            }
        }
    }
}
