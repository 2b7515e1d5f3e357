//! Pure: what is stored under which name, and which elements of it.

use std::fmt;
use std::ops::Range;

/// Longest name of a table in bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// A table on the wire: a hash of its name, so that nobody has to hand out numbers.
///
/// Servers keep the name as well, and refuse a second name with the same hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u64);

impl TableId {
    /// The id of the table called `name` (FNV-1a, 64 bits).
    pub fn of(name: &str) -> Self {
        Self(
            name.bytes()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)),
        )
    }
}

/// Elements `start..end` of a table, counted over the whole table and not within a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct KeyRange {
    /// First element.
    pub start: u64,
    /// One past the last element.
    pub end: u64,
}

impl KeyRange {
    /// Number of elements.
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Where these elements lie in a buffer that holds the whole table, `element_bytes` each.
    pub fn bytes(self, element_bytes: usize) -> Range<usize> {
        let at = |element: u64| usize::try_from(element).expect("the table is in memory") * element_bytes;
        at(self.start)..at(self.end)
    }
}

impl fmt::Display for KeyRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "elements {}..{}", self.start, self.end)
    }
}
