//! Pure: the messages that the peer may write now, by a number of 24 bits that fits beside a count into the word of a write.

use super::registrations::Lease;
use crate::region::Loan;

/// Messages that may be granted at once.
pub(super) const MOST: usize = 1 << 12;
const INDEX: u32 = (1 << 12) - 1;

/// A message that the peer has been told where to write.
#[derive(Debug)]
pub(super) struct Grant {
    /// Its key in the inbox.
    pub(super) inbox: u64,
    /// Length.
    pub(super) bytes: usize,
    /// The registration of a posted slice.
    pub(super) lease: Option<Lease>,
    /// The wire's own memory, for a receive by loan.
    pub(super) loan: Option<Loan>,
    /// Parts that have not come; `None` before the first.
    pub(super) parts_left: Option<u8>,
}

/// All that are granted to one peer.
#[derive(Default)]
pub(super) struct Grants {
    entries: Vec<(u32, Option<Grant>)>,
    free: Vec<u32>,
}

impl Grants {
    /// Keeps `grant`; its key, or `None` where there are as many as there may be.
    pub(super) fn insert(&mut self, grant: Grant) -> Option<u32> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.entries.len() < MOST => {
                self.entries.push((0, None));
                self.entries.len() as u32 - 1
            }
            None => return None,
        };
        let (turn, entry) = &mut self.entries[index as usize];
        *entry = Some(grant);
        Some(*turn << 12 | index)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.len() == self.free.len()
    }

    /// Whether another can be kept.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty() || self.entries.len() < MOST
    }

    /// The grant of `key`.
    pub(super) fn get_mut(&mut self, key: u32) -> Option<&mut Grant> {
        self.entries.get_mut((key & INDEX) as usize).filter(|entry| entry.0 == key >> 12)?.1.as_mut()
    }

    /// Takes the grant of `key` out; the key is void from now on.
    pub(super) fn remove(&mut self, key: u32) -> Option<Grant> {
        let index = key & INDEX;
        let (turn, entry) = self.entries.get_mut(index as usize).filter(|entry| entry.0 == key >> 12)?;
        let grant = entry.take()?;
        *turn = (*turn + 1) & INDEX;
        self.free.push(index);
        Some(grant)
    }

    /// Takes all out.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Grant> + '_ {
        self.free.clear();
        self.entries.drain(..).filter_map(|(_, grant)| grant)
    }
}

/// The word of a write: the key of its message, and in how many parts that comes.
pub(super) fn word(key: u32, parts: u8) -> u32 {
    u32::from(parts) << 24 | key
}

/// The key and the number of parts in a word.
pub(super) fn split(word: u32) -> (u32, u8) {
    (word & 0x00ff_ffff, (word >> 24) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(inbox: u64) -> Grant {
        Grant { inbox, bytes: 1, lease: None, loan: None, parts_left: None }
    }

    #[test]
    fn a_key_is_valid_until_its_grant_is_taken_out() {
        let mut grants = Grants::default();
        let (a, b) = (grants.insert(grant(1)).unwrap(), grants.insert(grant(2)).unwrap());
        assert_eq!(grants.remove(a).unwrap().inbox, 1);
        let c = grants.insert(grant(3)).unwrap();
        assert_ne!(a, c);
        assert!(grants.remove(a).is_none() && grants.get_mut(0x00ff_ffff).is_none());
        assert_eq!(split(word(c, 7)), (c, 7));
        assert_eq!(grants.get_mut(b).unwrap().inbox, 2);
        // A place is used anew any number of times, and its keys stay within 24 bits.
        for round in 0..10_000 {
            let key = grants.insert(grant(round)).unwrap();
            assert!(key < 1 << 24 && grants.remove(key).unwrap().inbox == round);
        }
        assert_eq!(grants.take_all().count(), 2);
    }

    #[test]
    fn there_is_a_bound() {
        let mut grants = Grants::default();
        let keys: Vec<u32> = (0..MOST as u64).map(|at| grants.insert(grant(at)).unwrap()).collect();
        assert!(grants.insert(grant(0)).is_none() && !grants.has_room());
        grants.remove(keys[77]).unwrap();
        assert!(grants.has_room() && grants.insert(grant(0)).is_some());
    }
}
