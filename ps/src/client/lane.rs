//! Pure: in which order requests about one part may go, so that what they do does not depend on how fast they travel.

use crate::staleness::{CLOCKS_AHEAD, WINDOW};
use std::collections::VecDeque;

/// Pushes of one client to an asynchronous part that may be unacknowledged, well within what a server remembers.
const ASYNC_PUSHES: u64 = WINDOW / 2;

/// The requests of one client about one part.
///
/// A pull goes once the pushes before it have gone. A push to a synchronous table waits for the pulls before it, so that a
/// pull sent again over a new connection can still be answered with the value of its own clock, and never runs further
/// ahead of other workers than servers keep contributions.
#[derive(Debug, Default)]
pub(super) struct Lane {
    waiting: VecDeque<(u32, bool, bool)>,
    pushes: u64,
    pulls: u64,
}

impl Lane {
    /// A request that pushes, pulls or both is to go when it may.
    pub(super) fn enter(&mut self, slot: u32, pushes: bool, pulls: bool) {
        self.waiting.push_back((slot, pushes, pulls));
    }

    /// The next request that may go now.
    pub(super) fn next(&mut self, synchronous: bool) -> Option<u32> {
        let &(slot, pushes, pulls) = self.waiting.front()?;
        let most = if synchronous { CLOCKS_AHEAD } else { ASYNC_PUSHES };
        if pushes && (self.pushes >= most || (synchronous && self.pulls > 0)) {
            return None;
        }
        self.waiting.pop_front();
        self.pushes += u64::from(pushes);
        self.pulls += u64::from(pulls);
        Some(slot)
    }

    /// A request that went has been answered, or given up.
    pub(super) fn leave(&mut self, pushes: bool, pulls: bool) {
        self.pushes -= u64::from(pushes);
        self.pulls -= u64::from(pulls);
    }

    /// A request that has not gone is given up.
    pub(super) fn forget(&mut self, slot: u32) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|&(other, ..)| other != slot);
        self.waiting.len() < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synchronous_push_waits_for_earlier_pulls_and_for_earlier_acknowledgements() {
        let mut lane = Lane::default();
        lane.enter(1, true, true);
        lane.enter(2, true, false);
        assert_eq!((lane.next(true), lane.next(true)), (Some(1), None));
        lane.leave(true, true);
        assert_eq!(lane.next(true), Some(2));
        lane.enter(3, true, false);
        lane.enter(4, true, false);
        lane.enter(5, false, true);
        assert_eq!((lane.next(true), lane.next(true)), (Some(3), None));
        lane.leave(true, false);
        assert_eq!((lane.next(true), lane.next(true)), (Some(4), Some(5)));
        assert!(!lane.forget(5));
    }

    #[test]
    fn an_asynchronous_push_waits_only_for_the_window() {
        let mut lane = Lane::default();
        for slot in 0..=ASYNC_PUSHES as u32 {
            lane.enter(slot, true, true);
        }
        for slot in 0..ASYNC_PUSHES as u32 {
            assert_eq!(lane.next(false), Some(slot));
        }
        assert_eq!(lane.next(false), None);
        assert!(lane.forget(ASYNC_PUSHES as u32));
    }
}
