//! Pure: the place of a process in its group, and the size of the group.

use std::fmt;

/// Place of a process in its group, from 0 to `world_size - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u32);

/// Number of processes in a group, at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorldSize(u32);

impl WorldSize {
    /// A group of `size` ranks; `None` for a group of nobody.
    pub const fn new(size: u32) -> Option<Self> {
        if size == 0 { None } else { Some(Self(size)) }
    }

    /// The number of ranks.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Every rank of the group, from 0 upwards.
    pub fn ranks(self) -> impl DoubleEndedIterator<Item = Rank> + ExactSizeIterator + Clone {
        (0..self.0).map(Rank)
    }

    /// Whether `rank` is a member.
    pub const fn contains(self, rank: Rank) -> bool {
        rank.0 < self.0
    }
}

impl Rank {
    /// The rank as an index into a table of members.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The neighbour that data moves to in a ring.
    pub const fn right(self, world_size: WorldSize) -> Self {
        Self((self.0 + 1) % world_size.0)
    }

    /// The neighbour that data comes from in a ring.
    pub const fn left(self, world_size: WorldSize) -> Self {
        Self((self.0 + world_size.0 - 1) % world_size.0)
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.0)
    }
}
