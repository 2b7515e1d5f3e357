//! Pure: which row an id has: many small hash tables, so that growing moves a few thousand entries and not all of them.

use super::initial::mix;
use hashbrown::HashTable;

/// Tables that ids are spread over. Each grows by itself, and none so long that requests would notice.
const SEGMENTS: usize = 256;

/// 12 bytes: with the table's own byte, 13 for each slot.
#[derive(Clone, Copy)]
#[repr(Rust, packed(4))]
struct Entry {
    id: u64,
    row: u32,
}

/// Rows by id.
pub(crate) struct Index {
    /// Known to nobody outside, so that nobody can choose ids that collide.
    key: u64,
    segments: Vec<HashTable<Entry>>,
    rows: u64,
    bytes: u64,
}

impl Index {
    /// `key`: any number that clients do not know.
    pub(crate) fn new(key: u64) -> Self {
        Self { key, segments: (0..SEGMENTS).map(|_| HashTable::new()).collect(), rows: 0, bytes: 0 }
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> u64 {
        self.rows
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    #[inline]
    fn hash(&self, id: u64) -> u64 {
        mix(id ^ self.key)
    }

    /// The row of `id`.
    #[inline]
    pub(crate) fn find(&self, id: u64) -> Option<u32> {
        let hash = self.hash(id);
        self.segments[segment(hash)].find(hash, |entry| entry.id == id).map(|entry| entry.row)
    }

    /// Notes that `id`, which has none, has `row`.
    pub(crate) fn insert(&mut self, id: u64, row: u32) {
        let (hash, key) = (self.hash(id), self.key);
        let table = &mut self.segments[segment(hash)];
        let before = table.allocation_size();
        table.insert_unique(hash, Entry { id, row }, |entry| mix(entry.id ^ key));
        self.bytes += (table.allocation_size() - before) as u64;
        self.rows += 1;
    }

    /// Forgets `id`.
    pub(crate) fn remove(&mut self, id: u64) -> Option<u32> {
        let hash = self.hash(id);
        let found = self.segments[segment(hash)].find_entry(hash, |entry| entry.id == id).ok()?;
        self.rows -= 1;
        Some(found.remove().0.row)
    }
}

/// By bits that a table of 2^48 entries does not look at.
#[inline]
fn segment(hash: u64) -> usize {
    (hash >> 49) as usize % SEGMENTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn it_knows_what_a_map_knows(steps in proptest::collection::vec((0u64..400, any::<bool>()), 1..2000)) {
            let (mut index, mut map) = (Index::new(9), HashMap::new());
            for (row, (id, remove)) in (0..).zip(steps) {
                if remove {
                    prop_assert_eq!(index.remove(id), map.remove(&id));
                } else if index.find(id).is_none() {
                    index.insert(id, row);
                    map.insert(id, row);
                }
                prop_assert_eq!(index.find(id), map.get(&id).copied());
                prop_assert_eq!(index.len(), map.len() as u64);
            }
        }
    }

    #[test]
    fn an_entry_is_as_short_as_it_says() {
        assert_eq!(size_of::<Entry>(), 12);
    }
}
