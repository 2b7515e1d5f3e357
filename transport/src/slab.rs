//! Pure: a table whose keys are never valid twice, so that an old key from a peer finds nothing.

use crate::Tag;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Entries by key.
pub(crate) struct Slab<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Keeps `value`; its key.
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            u32::try_from(self.entries.len() - 1).expect("queues are bounded far below 2^32")
        });
        let entry = &mut self.entries[index as usize];
        entry.1 = Some(value);
        u64::from(entry.0) << 32 | u64::from(index)
    }

    /// The entry of `key`.
    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        self.entries.get(index(key)).filter(|entry| u64::from(entry.0) == key >> 32)?.1.as_ref()
    }

    /// The entry of `key`, to be changed.
    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        self.entries.get_mut(index(key)).filter(|entry| u64::from(entry.0) == key >> 32)?.1.as_mut()
    }

    /// Takes the entry of `key` out; the key is void from now on.
    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let entry = self.entries.get_mut(index(key)).filter(|entry| u64::from(entry.0) == key >> 32)?;
        let value = entry.1.take()?;
        entry.0 = entry.0.wrapping_add(1);
        self.free.push(u32::try_from(index(key)).expect("the index came from 32 bits"));
        Some(value)
    }

    /// Takes all entries out; their keys are void from now on.
    pub(crate) fn take_all(&mut self) -> Vec<T> {
        let keys = (0u32..).zip(&self.entries).map(|(index, entry)| u64::from(entry.0) << 32 | u64::from(index));
        let keys: Vec<u64> = keys.collect();
        keys.into_iter().filter_map(|key| self.remove(key)).collect()
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

/// A table by number, in which the entry that was found last is found again at once.
pub(crate) struct Recent<T> {
    /// By number, upwards.
    entries: Vec<(u32, T)>,
    last: usize,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), last: 0 }
    }
}

impl<T> Recent<T> {
    /// Keeps `value` as `number`, in place of what was kept so before.
    pub(crate) fn insert(&mut self, number: u32, value: T) {
        match self.find(number) {
            Ok(at) => self.entries[at].1 = value,
            Err(at) => self.entries.insert(at, (number, value)),
        }
    }

    /// The entry of `number`.
    #[inline]
    pub(crate) fn get(&mut self, number: u32) -> Option<&mut T> {
        if self.entries.get(self.last).is_none_or(|(known, _)| *known != number) {
            self.last = self.find(number).ok()?;
        }
        self.entries.get_mut(self.last).map(|(_, value)| value)
    }

    /// The same, without remembering it.
    pub(crate) fn peek(&self, number: u32) -> Option<&T> {
        self.find(number).ok().map(|at| &self.entries[at].1)
    }

    /// All entries, by number.
    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().map(|(_, value)| value)
    }

    /// All entries, by number, to be changed.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().map(|(_, value)| value)
    }

    /// Whether there is an entry of `number`.
    pub(crate) fn has(&self, number: u32) -> bool {
        self.find(number).is_ok()
    }

    /// Takes the entry of `number` out.
    pub(crate) fn remove(&mut self, number: u32) -> Option<T> {
        self.find(number).ok().map(|at| self.entries.remove(at).1)
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn find(&self, number: u32) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&number, |(known, _)| *known)
    }
}

fn index(key: u64) -> usize {
    (key & u64::from(u32::MAX)) as usize
}

/// A table by tag that hashes in a few cycles, always in the same way.
pub(crate) type TagMap<T> = NumberMap<Tag, T>;

/// The same by any number that nobody else chooses.
pub(crate) type NumberMap<K, T> = HashMap<K, T, BuildHasherDefault<TagHasher>>;

/// Multiplies and folds: tags are counters and bit fields, and come from peers that are trusted with our data.
#[derive(Default)]
pub(crate) struct TagHasher(u64);

impl Hasher for TagHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * 0x9E37_79B9_7F4A_7C15;
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_last_is_not_taken_for_another() {
        let mut table = Recent::default();
        [5, 3, 9].into_iter().for_each(|number| table.insert(number, number * 10));
        for number in [3, 3, 9, 5, 5, 9] {
            assert_eq!(table.get(number), Some(&mut (number * 10)));
        }
        assert_eq!(table.get(4), None);
        assert_eq!((table.has(3), table.has(4), table.len()), (true, false, 3));
        assert_eq!((table.remove(3), table.remove(3)), (Some(30), None));
        assert_eq!(table.get(9), Some(&mut 90));
        table.insert(9, 1);
        assert_eq!(table.get(3), None);
        assert_eq!(table.len(), 2);
        assert_eq!(table.get(9), Some(&mut 1));
    }

    #[test]
    fn a_key_is_valid_until_its_entry_is_taken_out() {
        let mut slab = Slab::default();
        let (a, b) = (slab.insert('a'), slab.insert('b'));
        assert_eq!((slab.get(a), slab.len()), (Some(&'a'), 2));
        *slab.get_mut(b).unwrap() = 'd';
        assert_eq!(slab.remove(a), Some('a'));
        let c = slab.insert('c');
        assert_eq!(slab.remove(a), None);
        assert_eq!((slab.get(a), slab.get(b), slab.get(c)), (None, Some(&'d'), Some(&'c')));
        assert_eq!((slab.get(u64::MAX), slab.len()), (None, 2));
    }
}
