//! Pure: the sends to one peer that have not ended, and the order in which their ends are told: within each tag, that of
//! posting.

use crate::slab::{Slab, TagMap};
use crate::{Completion, Envelope, PostError, RegionSlice, SendLoan, Tag, TransportError};
use std::collections::VecDeque;
use std::ops::Deref;

/// Empty queues kept for later.
const SPARE: usize = 64;

/// The bytes of a message that is to be sent.
pub(crate) enum Cargo {
    Slice(RegionSlice),
    Loan(SendLoan),
}

impl Cargo {
    /// The posted slice; `None` for a loan, which goes back to its wire.
    pub(crate) fn into_slice(self) -> Option<RegionSlice> {
        match self {
            Self::Slice(slice) => Some(slice),
            Self::Loan(_) => None,
        }
    }
}

/// The refusal of a slice that was posted.
///
/// # Panics
/// For a loan: those are posted by themselves.
pub(crate) fn refused((error, cargo): (TransportError, Cargo)) -> PostError<RegionSlice> {
    let slice = cargo.into_slice().expect("a slice was posted");
    PostError { error, slice }
}

impl Deref for Cargo {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Slice(slice) => slice,
            Self::Loan(loan) => loan,
        }
    }
}

struct Flight {
    to: Envelope,
    ended: Option<(Option<RegionSlice>, Option<TransportError>)>,
}

/// Sends under way.
#[derive(Default)]
pub(crate) struct Flights {
    flights: Slab<Flight>,
    tags: TagMap<VecDeque<u64>>,
    spare: Vec<VecDeque<u64>>,
}

impl Flights {
    /// Sends that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.flights.len()
    }

    /// Whether a send with `tag` may be told as ended at once.
    pub(crate) fn is_free(&self, tag: Tag) -> bool {
        self.tags.is_empty() || !self.tags.contains_key(&tag)
    }

    /// A send begins; its key.
    pub(crate) fn begin(&mut self, to: Envelope) -> u64 {
        let key = self.flights.insert(Flight { to, ended: None });
        let spare = &mut self.spare;
        self.tags.entry(to.tag).or_insert_with(|| spare.pop().unwrap_or_default()).push_back(key);
        key
    }

    /// To whom send `key` goes.
    pub(crate) fn to(&self, key: u64) -> Option<Envelope> {
        self.flights.get(key).map(|flight| flight.to)
    }

    /// A send has ended; tells it, and those behind it that waited for it.
    pub(crate) fn end(
        &mut self,
        key: u64,
        slice: Option<RegionSlice>,
        error: Option<TransportError>,
        done: &mut Vec<Completion>,
    ) {
        let Some(flight) = self.flights.get_mut(key) else { return };
        let tag = flight.to.tag;
        flight.ended = Some((slice, error));
        let Some(queue) = self.tags.get_mut(&tag) else { return };
        while let Some(&first) = queue.front()
            && self.flights.get(first).is_some_and(|flight| flight.ended.is_some())
        {
            queue.pop_front();
            if let Some(Flight { to, ended: Some((Some(slice), error)) }) = self.flights.remove(first) {
                done.push(match error {
                    None => Completion::Sent { to, slice },
                    Some(error) => Completion::SendFailed { to, slice, error },
                });
            }
        }
        if queue.is_empty()
            && let Some(queue) = self.tags.remove(&tag)
            && self.spare.len() < SPARE
        {
            self.spare.push(queue);
        }
    }
}
