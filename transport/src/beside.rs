//! Pure: what a wire owes the sockets beside it, and they to it: they tell who is lost, and carry a few words.

use crate::{OneSided, PeerId, PeerName, Tag, TransportError, Wire};
use rustix::fd::BorrowedFd;
use std::time::Instant;

/// What sockets carry for a wire beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Words {
    /// How one end would connect, or connect again.
    Proposal(Vec<u8>),
    /// A frame of a link that has no better way left.
    Frame(Vec<u8>),
    /// Memory that is offered to a peer of this host; as the answer, why it is not taken, or nothing.
    Memory(Vec<u8>),
}

impl Words {
    /// The conversation that all of them are in, so that they keep their order.
    pub(crate) const TAG: Tag = Tag(Tag::CONTROL_BIT | 7);
    /// Longest words, as they travel.
    pub(crate) const MAX_BYTES: usize = 16 << 10;

    /// The words as they travel.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (kind, bytes) = match self {
            Self::Proposal(bytes) => (1, bytes),
            Self::Frame(bytes) => (2, bytes),
            Self::Memory(bytes) => (3, bytes),
        };
        [&[kind], &bytes[..]].concat()
    }

    /// The words in `bytes`; `None` for what are none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (1, rest) => Some(Self::Proposal(rest.to_vec())),
            (2, rest) => Some(Self::Frame(rest.to_vec())),
            (3, rest) => Some(Self::Memory(rest.to_vec())),
            _ => None,
        }
    }
}

/// A wire to some of the peers that sockets reach, better than they do.
pub trait Beside: Wire {
    /// Whether `peer` is on this wire, alive or lost.
    fn has(&self, peer: PeerId) -> bool;

    /// Ends all operations with `peer`, which the sockets have found to be gone; what it had sent is taken first.
    fn detach(&mut self, peer: PeerId, error: TransportError);

    /// Before a sleep on [`Beside::sleep_on`] next to other descriptors. False: there is something to do, so do not sleep.
    /// [`Beside::wake_up`] follows in both cases.
    fn fall_asleep(&mut self) -> bool;

    /// What is readable once there is something to do.
    fn sleep_on(&self) -> BorrowedFd<'_>;

    /// After a sleep.
    fn wake_up(&mut self);

    /// Takes leave of all peers, once what was posted has been delivered. To be called again, and the wire driven, until it
    /// says that nothing is left to do.
    fn leave(&mut self) -> bool;

    /// When this wire wants to be polled though nothing happens.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// This wire as one that reaches into peers' memory.
    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        None
    }

    /// Whether words of its own travel over the sockets.
    fn speaks(&self) -> bool {
        false
    }

    /// Makes a link to `peer`, which the sockets reach; what to tell it, or why there can be none.
    ///
    /// # Errors
    /// The reason, for people.
    fn greet(&mut self, _peer: PeerId, _name: PeerName, _now: Instant) -> Result<Words, String> {
        Err("this wire makes no links by itself".to_owned())
    }

    /// Connects the link to `peer` by its first words; the reason, where that cannot be: the link is forgotten then.
    fn accept(&mut self, _peer: PeerId, _theirs: Words, _now: Instant) -> Option<String> {
        Some("this wire makes no links by itself".to_owned())
    }

    /// Whether it is memory that peers of one host share.
    fn shares(&self) -> bool {
        false
    }

    /// Makes memory for `peer`, to be offered to it. It is attached by [`Beside::attach_offered`].
    ///
    /// # Errors
    /// The reason, for people; so in both that follow.
    fn offer_memory(&mut self) -> Result<Vec<u8>, String> {
        Err("this wire shares no memory".to_owned())
    }

    /// Reaches `peer` by the memory that it offers.
    ///
    /// # Errors
    /// As above.
    fn take_memory(&mut self, _peer: PeerId, _name: PeerName, _offer: &[u8]) -> Result<(), String> {
        Err("this wire shares no memory".to_owned())
    }

    /// Reaches `peer` by the memory that was offered last; it has taken it.
    ///
    /// # Errors
    /// As above.
    fn attach_offered(&mut self, _peer: PeerId, _name: PeerName) -> Result<(), String> {
        Err("this wire shares no memory".to_owned())
    }

    /// Forgets `peer`, as if there had never been a link.
    fn forget(&mut self, _peer: PeerId) {}

    /// The next words to be carried to a peer.
    fn next_words(&mut self) -> Option<(PeerId, Words)> {
        None
    }

    /// The next peer that does not answer this wire. The sockets say by [`Beside::settle`] whether its host is there.
    fn next_doubt(&mut self) -> Option<PeerId> {
        None
    }

    /// Whether the host of `peer` acknowledges what the sockets send to it: then the process rests, and may be waited for.
    fn settle(&mut self, _peer: PeerId, _is_there: bool, _now: Instant) {}

    /// Words of a peer.
    fn hear(&mut self, _peer: PeerId, _words: Words, _now: Instant) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_are_words_that_come_back_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            match Words::decode(&bytes) {
                Some(words) => prop_assert_eq!(words.encode(), bytes),
                None => prop_assert!(!matches!(bytes.first(), Some(1..=3))),
            }
        }
    }
}
