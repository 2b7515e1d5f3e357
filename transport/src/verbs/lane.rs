//! Pure: what is under way on one queue pair, what the peer has room for, and what must be sent again when the pair breaks.

use std::collections::VecDeque;

/// Work requests between two that ask for a completion: each one costs a poll.
const SIGNAL_EVERY: u64 = 16;
/// Receives of the peer that only a frame of credits may take, so that credits can always be given back.
pub(super) const RESERVED: u64 = 1;

/// What a work request carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carried {
    /// A frame; it lies in the oldest slot that is in use.
    Frame,
    /// Bytes of a message of which more follow.
    Chunk { bytes: usize },
    /// The last bytes of this lane's part of the message `key`.
    Part { key: u64, bytes: usize },
    /// A one-sided write: the message `key`.
    Put { key: u64 },
    /// A one-sided read: the read `key`.
    Get { key: u64 },
    /// Nothing: it asks whether the peer's device is there.
    Probe,
    /// Whether we watch for small frames.
    Word,
}

impl Carried {
    /// Whether it ends a receive of the peer.
    fn takes_receive(self) -> bool {
        matches!(self, Self::Frame | Self::Part { .. })
    }

    /// Payload bytes under way.
    fn bytes(self) -> usize {
        match self {
            Self::Chunk { bytes } | Self::Part { bytes, .. } => bytes,
            Self::Frame | Self::Put { .. } | Self::Get { .. } | Self::Probe | Self::Word => 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Item {
    number: u64,
    /// Which message it is, of those that end receives.
    message: u64,
    carried: Carried,
}

/// One queue pair's state at our end.
#[derive(Debug)]
pub(super) struct Lane {
    /// Its number at our device; `None` while there is none.
    pub(super) queue_pair: Option<u32>,
    /// Receives that are posted.
    pub(super) posted: usize,
    /// Messages that ended receives of ours, since the link began.
    pub(super) received: u64,
    /// Receives that we have told the peer to be posted anew, since the link began.
    pub(super) told: u64,
    /// Payload bytes of writes under way.
    pub(super) writing_bytes: usize,
    depth: u64,
    peer_depth: u64,
    works: u64,
    done: u64,
    signalled: u64,
    sent: u64,
    returned: u64,
    items: VecDeque<Item>,
}

impl Lane {
    /// A lane without a queue pair; `depth`: of its send queue.
    pub(super) fn new(depth: usize) -> Self {
        Self {
            queue_pair: None,
            posted: 0,
            received: 0,
            told: 0,
            writing_bytes: 0,
            depth: depth as u64,
            peer_depth: 0,
            works: 0,
            done: 0,
            signalled: 0,
            sent: 0,
            returned: 0,
            items: VecDeque::new(),
        }
    }

    /// The peer posts so many receives.
    pub(super) fn set_peer_depth(&mut self, depth: u64) {
        self.peer_depth = depth;
    }

    /// Work requests that the send queue has room for.
    pub(super) fn room(&self) -> u64 {
        self.depth - (self.works - self.done)
    }

    /// Receives that the peer has posted and that nothing on its way will take.
    pub(super) fn credits(&self) -> u64 {
        (self.peer_depth + self.returned).saturating_sub(self.sent)
    }

    /// The number of the message that is sent next.
    pub(super) fn next_message(&self) -> u64 {
        self.sent
    }

    /// Receives that we have posted anew and not told the peer.
    pub(super) fn due(&self) -> u64 {
        self.received - self.told
    }

    /// Work is posted: its number, and whether it must ask for a completion.
    #[inline]
    pub(super) fn post(&mut self, carried: Carried, signalled: bool) -> (u64, bool) {
        self.works += 1;
        let signalled = signalled || self.works - self.signalled >= SIGNAL_EVERY;
        if signalled {
            self.signalled = self.works;
        }
        self.items.push_back(Item { number: self.works, message: self.sent, carried });
        self.sent += u64::from(carried.takes_receive());
        self.writing_bytes += carried.bytes();
        (self.works, signalled)
    }

    /// Work request `number` is done, and so are all before it; calls `ended` with each, in order.
    pub(super) fn complete(&mut self, number: u64, mut ended: impl FnMut(Carried)) {
        while let Some(&Item { number: first, carried, .. }) = self.items.front()
            && first <= number
        {
            self.items.pop_front();
            self.writing_bytes -= carried.bytes();
            ended(carried);
        }
        self.done = self.done.max(number);
    }

    /// What work request `number` carries, if it has not ended.
    pub(super) fn carried(&self, number: u64) -> Option<Carried> {
        self.items.iter().find(|item| item.number == number).map(|item| item.carried)
    }

    /// Whether everything posted has ended.
    pub(super) fn is_idle(&self) -> bool {
        self.items.is_empty()
    }

    /// The peer has posted `returned` receives anew since the link began. `None`: more than we have sent.
    pub(super) fn on_credit(&mut self, returned: u64) -> Option<()> {
        if returned > self.sent {
            return None;
        }
        // After a break, frames that go again tell what was so before it.
        self.returned = self.returned.max(returned);
        Some(())
    }

    /// The queue pair has gone, and the peer has received `expected` messages: what was delivered, and what was not, in order.
    /// All receives of the peer will be free on the next pair. `None`: the peer cannot have received so many.
    pub(super) fn rewind(&mut self, expected: u64) -> Option<(Vec<Carried>, Vec<Carried>)> {
        let first = self.items.iter().find(|item| item.carried.takes_receive()).map_or(self.sent, |item| item.message);
        if expected < first || expected > self.sent {
            return None;
        }
        let items = std::mem::take(&mut self.items);
        // What was posted before something that arrived has arrived too, but for reads: their answers may be lost.
        let last =
            items.iter().filter(|item| item.carried.takes_receive() && item.message < expected).map(|item| item.number);
        let last = last.max().unwrap_or(0);
        let arrived = |item: &Item| item.number <= last && !matches!(item.carried, Carried::Get { .. });
        let (delivered, left): (Vec<Item>, Vec<Item>) = items.into_iter().partition(arrived);
        let carried = |items: Vec<Item>| items.into_iter().map(|item| item.carried).collect();
        (self.works, self.done, self.signalled, self.writing_bytes) = (0, 0, 0, 0);
        (self.sent, self.returned) = (expected, expected);
        Some((carried(delivered), carried(left)))
    }

    /// Our receives are all posted anew.
    pub(super) fn reset_receives(&mut self) {
        self.told = self.received;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane() -> Lane {
        let mut lane = Lane::new(100);
        lane.set_peer_depth(8);
        lane
    }

    #[test]
    fn credits_are_what_the_peer_has_posted_less_what_is_on_its_way() {
        let mut lane = lane();
        lane.post(Carried::Frame, false);
        lane.post(Carried::Chunk { bytes: 10 }, false);
        lane.post(Carried::Part { key: 1, bytes: 5 }, true);
        assert_eq!((lane.credits(), lane.room(), lane.writing_bytes), (6, 97, 15));
        assert_eq!(lane.on_credit(3), None, "more than were sent");
        assert_eq!(lane.on_credit(2), Some(()));
        assert_eq!((lane.on_credit(1), lane.credits()), (Some(()), 8), "an old word, told again");
        let mut ended = Vec::new();
        lane.complete(3, |carried| ended.push(carried));
        assert_eq!(ended.len(), 3);
        assert_eq!((lane.room(), lane.writing_bytes, lane.is_idle()), (100, 0, true));
    }

    #[test]
    fn every_sixteenth_asks_for_a_completion_at_least() {
        let mut lane = Lane::new(1000);
        let signals: Vec<bool> = (0..40).map(|at| lane.post(Carried::Frame, at == 5).1).collect();
        let at: Vec<usize> = (0..40).filter(|&at| signals[at]).collect();
        assert_eq!(at, [5, 21, 37]);
    }

    #[test]
    fn a_broken_pair_tells_what_must_go_again() {
        let mut lane = lane();
        lane.post(Carried::Frame, true);
        lane.complete(1, |_| {});
        lane.post(Carried::Frame, false);
        lane.post(Carried::Chunk { bytes: 9 }, false);
        lane.post(Carried::Part { key: 4, bytes: 1 }, true);
        lane.post(Carried::Put { key: 2 }, true);
        lane.post(Carried::Frame, false);
        assert!(lane.rewind(0).is_none() && lane.rewind(5).is_none());
        let (delivered, left) = lane.rewind(3).unwrap();
        assert_eq!(delivered, [Carried::Frame, Carried::Chunk { bytes: 9 }, Carried::Part { key: 4, bytes: 1 }]);
        assert_eq!(left, [Carried::Put { key: 2 }, Carried::Frame]);
        assert_eq!((lane.credits(), lane.room(), lane.is_idle()), (8, 100, true));
        assert_eq!((lane.on_credit(2), lane.credits()), (Some(()), 8), "a frame from before the break tells less");
    }
}
