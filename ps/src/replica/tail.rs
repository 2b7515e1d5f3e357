//! Pure: the end of a log that not all who follow have confirmed, for one that has lost whom it followed and comes to us.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// When an entry was done, and the entry.
type Kept = (Instant, Arc<Vec<u8>>);

/// Entries, each the next one's predecessor.
pub(super) struct Tail {
    /// The number of the entry before the first, and when that was done, where it was one.
    before: (u64, Option<Instant>),
    entries: VecDeque<Kept>,
    bytes: usize,
}

impl Tail {
    /// Nothing, after entry `sequence`.
    pub(super) fn after_entry(sequence: u64) -> Self {
        Self { before: (sequence, None), entries: VecDeque::new(), bytes: 0 }
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps entry `sequence`; what it does not follow is forgotten.
    pub(super) fn push(&mut self, sequence: u64, at: Instant, entry: &Arc<Vec<u8>>) {
        if sequence != self.last() + 1 {
            *self = Self::after_entry(sequence - 1);
        }
        self.bytes += entry.len();
        self.entries.push_back((at, Arc::clone(entry)));
    }

    /// Forgets entries up to `sequence`.
    pub(super) fn forget(&mut self, sequence: u64) {
        while self.before.0 < sequence
            && let Some((at, entry)) = self.entries.pop_front()
        {
            self.before = (self.before.0 + 1, Some(at));
            self.bytes -= entry.len();
        }
    }

    /// When entry `sequence` was done, where that is known, and all entries after it; `None` where some are not here.
    pub(super) fn since(&self, sequence: u64) -> Option<(Option<Instant>, Vec<Kept>)> {
        let known = usize::try_from(sequence.checked_sub(self.before.0)?).ok()?;
        let at = match known.checked_sub(1) {
            None => self.before.1,
            Some(at) => Some(self.entries.get(at)?.0),
        };
        Some((at, self.entries.iter().skip(known).cloned().collect()))
    }

    fn last(&self) -> u64 {
        self.before.0 + self.entries.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn whoever_is_not_too_far_behind_finds_what_it_lacks() {
        let (start, entry) = (Instant::now(), |number: u64| Arc::new(vec![number as u8; number as usize]));
        let at = |number: u64| start + Duration::from_secs(number);
        let mut tail = Tail::after_entry(4);
        (5..10).for_each(|number| tail.push(number, at(number), &entry(number)));
        tail.forget(6);
        assert_eq!(tail.bytes(), 7 + 8 + 9);
        assert!(tail.since(5).is_none() && tail.since(10).is_none());
        let numbers = |sequence| {
            let (when, entries) = tail.since(sequence).unwrap();
            (when, entries.iter().map(|(_, entry)| entry.len()).collect::<Vec<_>>())
        };
        assert_eq!(numbers(6), (Some(at(6)), vec![7, 8, 9]));
        assert_eq!(numbers(8), (Some(at(8)), vec![9]));
        assert_eq!(numbers(9), (Some(at(9)), vec![]));
        tail.push(20, at(20), &entry(20));
        assert!(tail.since(9).is_none() && tail.since(19).unwrap().1.len() == 1 && tail.bytes() == 20);
        tail.forget(30);
        assert_eq!((tail.bytes(), tail.since(20).unwrap().1.len()), (0, 0));
    }
}
