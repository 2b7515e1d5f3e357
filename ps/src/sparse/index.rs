//! Pure: which row an id has: many small tables with open addressing, so that growing moves some thousand entries and not all,
//! and so that the memory of a look-up can be asked for before it is needed.

use super::initial::mix;
use crate::kernel;
use std::sync::Arc;

/// Tables that ids are spread over. Each grows by itself, and none so long that requests would notice.
const SEGMENTS: usize = 256;
/// Slots of a segment that holds anything.
const LEAST: usize = 8;
const NONE: u32 = u32::MAX;

/// 12 bytes.
#[derive(Clone, Copy)]
#[repr(Rust, packed(4))]
struct Slot {
    id: u64,
    /// Its row; [`NONE`] where the slot is free.
    row: u32,
}

const FREE: Slot = Slot { id: 0, row: NONE };

/// Slots with linear probing: an entry lies at its home or after it, with no free slot between.
#[derive(Clone, Default)]
struct Segment {
    /// Shared with a copy of the index until it is written.
    slots: Arc<[Slot]>,
    used: usize,
}

/// Rows by id. A clone is cheap: it shares the entries until they change.
#[derive(Clone)]
pub(crate) struct Index {
    /// Known to nobody outside, so that nobody can choose ids that collide.
    key: u64,
    segments: Vec<Segment>,
    rows: u64,
    bytes: u64,
}

impl Index {
    /// `key`: any number that clients do not know.
    pub(crate) fn new(key: u64) -> Self {
        Self { key, segments: (0..SEGMENTS).map(|_| Segment::default()).collect(), rows: 0, bytes: 0 }
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> u64 {
        self.rows
    }

    /// Every id with its row.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        let slots = self.segments.iter().flat_map(|segment| segment.slots.iter());
        slots.filter(|slot| slot.row != NONE).map(|slot| (slot.id, slot.row))
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Asks for the memory that looking for `id` will read.
    #[inline]
    pub(crate) fn prefetch(&self, id: u64) {
        let hash = mix(id ^ self.key);
        let slots = &self.segments[segment(hash)].slots;
        if let Some(slot) = slots.get(home(hash, slots.len())..) {
            kernel::prefetch(&slot[..slot.len().min(1)]);
        }
    }

    /// The row of `id`.
    #[inline]
    pub(crate) fn find(&self, id: u64) -> Option<u32> {
        let hash = mix(id ^ self.key);
        let slots = &self.segments[segment(hash)].slots;
        let at = slots
            .iter()
            .skip(home(hash, slots.len()))
            .chain(slots.iter())
            .find(|slot| slot.row == NONE || slot.id == id);
        at.filter(|slot| slot.row != NONE).map(|slot| slot.row)
    }

    /// Notes that `id`, which has none, has `row`.
    pub(crate) fn insert(&mut self, id: u64, row: u32) {
        let (hash, key) = (mix(id ^ self.key), self.key);
        let Segment { slots, used } = &mut self.segments[segment(hash)];
        // Four fifths full at most, and grown by half: 15 to 23 bytes a row.
        if (*used + 1) * 5 > slots.len() * 4 {
            let mut wider: Arc<[Slot]> = std::iter::repeat_n(FREE, (slots.len() * 3 / 2).max(LEAST)).collect();
            self.bytes += ((wider.len() - slots.len()) * size_of::<Slot>()) as u64;
            let free = Arc::make_mut(&mut wider);
            slots.iter().filter(|slot| slot.row != NONE).for_each(|&slot| place(free, mix(slot.id ^ key), slot));
            *slots = wider;
        }
        place(Arc::make_mut(slots), hash, Slot { id, row });
        *used += 1;
        self.rows += 1;
    }

    /// Forgets `id`.
    pub(crate) fn remove(&mut self, id: u64) -> Option<u32> {
        let (hash, key) = (mix(id ^ self.key), self.key);
        let Segment { slots, used } = &mut self.segments[segment(hash)];
        let length = slots.len();
        let next = |at: usize| if at + 1 == length { 0 } else { at + 1 };
        let mut hole = home(hash, length);
        while slots.get(hole)?.id != id || slots[hole].row == NONE {
            if slots[hole].row == NONE {
                return None;
            }
            hole = next(hole);
        }
        let row = slots[hole].row;
        let slots = Arc::make_mut(slots);
        // What lies behind moves up, unless it would come before its home (Knuth, volume 3, algorithm 6.4R).
        let mut at = next(hole);
        while slots[at].row != NONE {
            let home = home(mix(slots[at].id ^ key), length);
            let passed = if hole <= at { hole < home && home <= at } else { home > hole || home <= at };
            if !passed {
                slots[hole] = slots[at];
                hole = at;
            }
            at = next(at);
        }
        slots[hole] = FREE;
        *used -= 1;
        self.rows -= 1;
        Some(row)
    }
}

/// Writes an entry to the first free slot from its home on. There is one.
fn place(slots: &mut [Slot], hash: u64, entry: Slot) {
    let start = home(hash, slots.len());
    let (before, after) = slots.split_at_mut(start);
    if let Some(slot) = after.iter_mut().chain(before).find(|slot| slot.row == NONE) {
        *slot = entry;
    }
}

#[inline]
fn segment(hash: u64) -> usize {
    hash as usize % SEGMENTS
}

/// Where an entry would lie best, by the upper half of its hash.
#[inline]
fn home(hash: u64, slots: usize) -> usize {
    (((hash >> 32) * slots as u64) >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn it_knows_what_a_map_knows(
            steps in proptest::collection::vec((0u64..3000, any::<bool>()), 1..6000), key in any::<u64>(),
        ) {
            let (mut index, mut map) = (Index::new(key), HashMap::new());
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
            prop_assert!((0..3000).all(|id| index.find(id) == map.get(&id).copied()));
        }

        #[test]
        fn entries_that_share_a_segment_stay_found_when_others_go(picks in proptest::collection::vec(0usize..40, 1..200)) {
            // Ids of one segment only, so that they lie in each other's way.
            let ids: Vec<u64> = (0..).filter(|&id| segment(mix(id)) == 3).take(40).collect();
            let (mut index, mut map) = (Index::new(0), HashMap::new());
            for (row, pick) in (0..).zip(picks) {
                let id = ids[pick];
                match map.remove(&id) {
                    Some(row) => prop_assert_eq!(index.remove(id), Some(row)),
                    None => {
                        index.insert(id, row);
                        map.insert(id, row);
                    }
                }
                prop_assert!(ids.iter().all(|id| index.find(*id) == map.get(id).copied()));
            }
        }
    }

    #[test]
    fn its_bytes_are_counted_and_few() {
        let mut index = Index::new(1);
        (0..200_000).for_each(|id| index.insert(id, id as u32));
        let bytes: usize = index.segments.iter().map(|segment| segment.slots.len() * size_of::<Slot>()).sum();
        assert_eq!(index.bytes(), bytes as u64);
        assert!(index.bytes() <= 24 * 200_000, "{} bytes a row", index.bytes() / 200_000);
    }
}
