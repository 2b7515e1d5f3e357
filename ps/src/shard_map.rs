//! Pure: which shard holds which elements of a table, and into which parts they are cut to travel.

use crate::{DType, KeyRange};

/// The version of a shard map. It grows when keys move; requests carry it, and a server refuses another one's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Longest part in bytes: what one message carries.
pub const MAX_PART_BYTES: usize = 1 << 20;
/// What a part aims at: a few fit the cache together, and a wire sends one without asking first.
const AIM_PART_BYTES: usize = 256 << 10;
/// Parts shorter than this cost more in messages than they win in overlap.
const LEAST_PART_BYTES: usize = 64 << 10;
/// Parts of a shard's range that can be on their way, being summed and on their way back at once.
const OVERLAP: u64 = 4;

/// Who owns which elements: every table is cut into equal contiguous ranges, one a shard, in the order of the shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardMap {
    /// The version of this map.
    pub epoch: Epoch,
    shards: u32,
}

impl ShardMap {
    /// A map over `shards` shards; `None` for no shard.
    pub const fn new(epoch: Epoch, shards: u32) -> Option<Self> {
        if shards == 0 { None } else { Some(Self { epoch, shards }) }
    }

    /// Number of shards.
    pub const fn shards(&self) -> u32 {
        self.shards
    }

    /// The elements that `shard` owns of a table of `elements`. The first shards hold one more where it does not divide.
    pub fn range(&self, elements: u64, shard: u32) -> KeyRange {
        assert!(shard < self.shards, "shard {shard} of {}", self.shards);
        let (each, over) = (elements / u64::from(self.shards), elements % u64::from(self.shards));
        let before = |shard: u64| each * shard + over.min(shard);
        KeyRange { start: before(u64::from(shard)), end: before(u64::from(shard) + 1) }
    }
}

/// Elements of a part for a table of `elements` over `shards`: about a quarter of a shard's range, 64 to 256 KiB.
///
/// A pure function of what all clients know, so that they cut alike. `most_bytes` is what the servers take at once.
pub fn part_elements(elements: u64, shards: u32, dtype: DType, most_bytes: usize) -> u64 {
    let size = dtype.bytes();
    let most = (most_bytes.clamp(size, MAX_PART_BYTES).min(AIM_PART_BYTES) / size) as u64;
    let least = ((LEAST_PART_BYTES / size) as u64).min(most);
    // Whole cache lines, so that no two parts share one.
    let quarter = elements.div_ceil(u64::from(shards.max(1)) * OVERLAP).next_multiple_of((64 / size) as u64);
    quarter.clamp(least, most)
}

/// Cuts `range` into parts of `part_elements`, the last one shorter.
pub fn parts(range: KeyRange, part_elements: u64) -> impl ExactSizeIterator<Item = KeyRange> + Clone {
    let each = part_elements.max(1);
    let count = usize::try_from(range.len().div_ceil(each)).expect("the table is in memory");
    (0..count).map(move |n| {
        let start = range.start + n as u64 * each;
        KeyRange { start, end: range.end.min(start + each) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_element_has_one_owner_and_shards_differ_by_one_at_most() {
        for shards in 1..=9 {
            let map = ShardMap::new(Epoch(1), shards).unwrap();
            for elements in 0..40 {
                let mut next = 0;
                for shard in 0..shards {
                    let range = map.range(elements, shard);
                    assert_eq!(range.start, next);
                    assert!(range.len().abs_diff(elements / u64::from(shards)) <= 1);
                    next = range.end;
                }
                assert_eq!(next, elements);
            }
        }
        assert!(ShardMap::new(Epoch(1), 0).is_none());
    }

    proptest! {
        #[test]
        fn parts_cover_their_range_in_order_and_fit_a_message(
            start in 0u64..1000, len in 0u64..3_000_000, shards in 1u32..9, dtype in 0usize..4, most in 1usize..4_000_000,
        ) {
            let dtype = DType::ALL[dtype];
            let each = part_elements(len, shards, dtype, most);
            prop_assert!(each >= 1 && each as usize * dtype.bytes() <= MAX_PART_BYTES.min(most.max(dtype.bytes())));
            let range = KeyRange { start, end: start + len };
            let mut next = start;
            for part in parts(range, each) {
                prop_assert_eq!(part.start, next);
                prop_assert!(!part.is_empty() && part.len() <= each);
                next = part.end;
            }
            prop_assert_eq!(next, range.end);
        }
    }
}
