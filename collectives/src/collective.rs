//! Pure: the collectives, with what every rank must say the same of.

use crate::Reduction;
use gradwire_transport::Rank;

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Collective {
    /// Everybody gets the reduction of all buffers.
    AllReduce {
        /// How elements are combined.
        op: Reduction,
    },
    /// The root gets the reduction of all buffers; the others' buffers stay as they are.
    Reduce {
        /// How elements are combined.
        op: Reduction,
        /// Who gets it.
        root: Rank,
    },
    /// Everybody gets the root's buffer.
    Broadcast {
        /// Whose.
        root: Rank,
    },
    /// Everybody gets everybody's part.
    AllGather,
    /// Rank i gets the reduction of all ranks' i-th parts.
    ReduceScatter {
        /// How elements are combined.
        op: Reduction,
    },
    /// Rank i gets everybody's i-th part.
    AllToAll,
    /// The root gets everybody's part.
    Gather {
        /// Who gets it.
        root: Rank,
    },
    /// Rank i gets the root's i-th part.
    Scatter {
        /// Whose.
        root: Rank,
    },
    /// Nobody leaves before all have come.
    Barrier,
}

/// The collectives' names, in the order of their codes.
pub(crate) const NAMES: [&str; 9] =
    ["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "barrier"];

impl Collective {
    /// A small number for the kind of collective.
    pub const fn code(&self) -> u8 {
        match self {
            Self::AllReduce { .. } => 0,
            Self::Reduce { .. } => 1,
            Self::Broadcast { .. } => 2,
            Self::AllGather => 3,
            Self::ReduceScatter { .. } => 4,
            Self::AllToAll => 5,
            Self::Gather { .. } => 6,
            Self::Scatter { .. } => 7,
            Self::Barrier => 8,
        }
    }

    /// Whether all ranks send to one at the same time, so that a switch's buffer overflows. Not where all send to all, as in
    /// all-to-all and the direct reduction: each rank waits for grants of all others there, which took 1.2 times as long.
    pub(crate) const fn is_many_to_one(&self) -> bool {
        matches!(self, Self::Gather { .. })
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        NAMES[self.code() as usize]
    }

    /// The one rank that differs from the others, if there is one.
    pub const fn root(&self) -> Option<Rank> {
        match self {
            Self::Reduce { root, .. } | Self::Broadcast { root } | Self::Gather { root } | Self::Scatter { root } => {
                Some(*root)
            }
            _ => None,
        }
    }

    /// How elements are combined, if they are.
    pub const fn reduction(&self) -> Option<Reduction> {
        match self {
            Self::AllReduce { op } | Self::Reduce { op, .. } | Self::ReduceScatter { op } => Some(*op),
            _ => None,
        }
    }
}
