//! Pure: how a rank waits for the others of its host: it spins for a while, then yields its core, and at last sleeps.
//!
//! Two ranks that the system has put on one core while another is free meet at the first yield of every other wait: the one
//! spins in vain, yields, and the other runs. As neither sleeps, the system may leave them there for good; 8 bytes take 110 us
//! then, which is twice the spinning. So who meets the others like that again and again spins little and looks for another core.

use std::time::{Duration, Instant};

/// Turns of spinning with a core for each rank: some 30 us.
const SPINS: u32 = 2000;
/// Turns of spinning where ranks share cores: more would keep the others from their work.
const FEW_SPINS: u32 = 1;
/// Meetings at the first yield, one after the other, that are no chance any more.
const MEETINGS: u32 = 4;
/// How many more until another core is tried again: where none is free, that only costs.
const AGAIN: u32 = 64;

/// When a wait is over, whoever is missing.
#[derive(Clone, Copy, Debug)]
pub enum Deadline {
    /// Then.
    At(Instant),
    /// So long after the first look at the clock, which comes some 30 us after the wait began: short waits need no clock.
    In(Duration),
}

impl Deadline {
    /// When it is, seen `now`.
    pub(super) fn seen(&mut self, now: Instant) -> Instant {
        let at = match *self {
            Self::At(at) => at,
            Self::In(wait) => now + wait,
        };
        *self = Self::At(at);
        at
    }

    /// When it is, where that is settled.
    pub fn settled(&self) -> Option<Instant> {
        match *self {
            Self::At(at) => Some(at),
            Self::In(_) => None,
        }
    }
}

/// How long to spin, and when to look for another core.
#[derive(Debug)]
pub(super) struct Patience {
    spins: u32,
    meetings: u32,
}

impl Patience {
    /// Of one of `ranks` on `cores`.
    pub(super) fn new(ranks: usize, cores: usize) -> Self {
        Self { spins: if ranks <= cores { SPINS } else { FEW_SPINS }, meetings: 0 }
    }

    /// Turns to spin before yielding.
    pub(super) fn spins(&self) -> u32 {
        if self.meetings < MEETINGS { self.spins } else { FEW_SPINS }
    }

    /// Whether it is time to leave this core for another.
    pub(super) fn moves(&self) -> bool {
        self.meetings >= MEETINGS && (self.meetings - MEETINGS).is_multiple_of(AGAIN)
    }

    /// A wait ended while spinning (0), or after so many yields. Where all were there before it began, nothing is
    /// known: ranks on one core find each other there every other time.
    pub(super) fn waited(&mut self, pauses: u32) {
        let met = pauses == 1 && self.spins == SPINS;
        self.meetings = if met { self.meetings.saturating_add(1) } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_meets_the_others_at_every_first_yield_spins_little_and_moves_now_and_then() {
        let mut patience = Patience::new(2, 2);
        let mut moved = Vec::new();
        for meeting in 0..MEETINGS + AGAIN + 1 {
            assert_eq!(patience.spins(), if meeting < MEETINGS { SPINS } else { FEW_SPINS });
            moved.extend(patience.moves().then_some(meeting));
            patience.waited(1);
        }
        assert_eq!(moved, [MEETINGS, MEETINGS + AGAIN]);
        for end in [0, 2] {
            patience.waited(end);
            assert!(!patience.moves() && patience.spins() == SPINS);
            (0..MEETINGS).for_each(|_| patience.waited(1));
            assert!(patience.moves());
        }
    }

    #[test]
    fn where_ranks_outnumber_cores_nobody_moves() {
        let mut patience = Patience::new(3, 2);
        for _ in 0..100 {
            patience.waited(1);
            assert!(!patience.moves() && patience.spins() == FEW_SPINS);
        }
    }

    #[test]
    fn a_deadline_is_settled_by_the_first_look_at_the_clock() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut deadline = Deadline::In(second);
        assert_eq!(deadline.settled(), None);
        assert_eq!(deadline.seen(now), now + second);
        assert_eq!(deadline.seen(now + second), now + second);
        assert_eq!(deadline.settled(), Some(now + second));
    }
}
