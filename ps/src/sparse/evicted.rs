//! Pure: the ids that were evicted last, in their order: a ring that readers follow, each with a number of its own.

use crate::body::{BadBody, Reader, Writer};
use std::collections::VecDeque;

/// Ids that are kept for readers. Who comes later than this is told how many it has missed.
pub(crate) const KEPT: usize = 1 << 16;

/// Evicted ids, numbered from 0.
#[derive(Clone, Default)]
pub(crate) struct Evicted {
    ids: VecDeque<u64>,
    /// Number of the next one.
    next: u64,
}

impl Evicted {
    pub(crate) fn push(&mut self, id: u64) {
        if self.ids.len() == KEPT {
            self.ids.pop_front();
        }
        self.ids.push_back(id);
        self.next += 1;
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.number(self.next);
        out.number(self.ids.len() as u64);
        self.ids.iter().for_each(|&id| out.number(id));
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let next = from.counter()?;
        let count = from.count(8)?;
        if count > KEPT || count as u64 > next {
            return Err(BadBody("it keeps more evicted ids than there were"));
        }
        Ok(Self { next, ids: (0..count).map(|_| from.number()).collect::<Result<_, _>>()? })
    }

    /// How many there have been.
    pub(crate) fn count(&self) -> u64 {
        self.next
    }

    /// The ids from number `from` on, at most `most`: how many before them are lost, the ids, and the number after them.
    pub(crate) fn since(&self, from: u64, most: usize) -> (u64, Vec<u64>, u64) {
        let oldest = self.next - self.ids.len() as u64;
        let start = from.clamp(oldest, self.next);
        let ids: Vec<u64> = self.ids.iter().skip((start - oldest) as usize).take(most).copied().collect();
        let next = start + ids.len() as u64;
        (start.saturating_sub(from), ids, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_each_id_once_and_hears_what_it_missed() {
        let mut evicted = Evicted::default();
        (0..5).for_each(|id| evicted.push(id));
        assert_eq!(evicted.since(0, 3), (0, vec![0, 1, 2], 3));
        assert_eq!(evicted.since(3, 3), (0, vec![3, 4], 5));
        assert_eq!(evicted.since(5, 3), (0, vec![], 5));
        (5..5 + KEPT as u64).for_each(|id| evicted.push(id));
        assert_eq!(evicted.since(3, 2), (2, vec![5, 6], 7));
        assert_eq!(evicted.since(u64::MAX, 2), (0, vec![], evicted.count()));
    }
}
