//! Pure: the algorithms by their names, and which collective can be made with which.

/// An algorithm, by the name that `GRADWIRE_ALGO` knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// To the right neighbour only.
    Ring,
    /// Everybody with everybody, chunk by chunk.
    Direct,
    /// Everybody sends all to everybody.
    Short,
    /// Everything with a partner, twice as far away each round.
    Doubling,
    /// Half of what is left with a partner, and back.
    Halving,
    /// By a binomial tree.
    Tree,
    /// Two binary trees, each for half of the buffer.
    DoubleTree,
    /// From each to the next.
    Chain,
    /// In hops of twice the length each, packed.
    Bruck,
    /// Inside each host, then between hosts by as many ranks of each as there are on all.
    Hierarchical,
    /// Inside each host, then between hosts by one rank of each.
    Leaders,
}

use Algorithm::{Bruck, Chain, Direct, DoubleTree, Doubling, Halving, Hierarchical, Leaders, Ring, Short, Tree};

const NAMES: [(&str, Algorithm); 11] = [
    ("ring", Ring),
    ("direct", Direct),
    ("short", Short),
    ("doubling", Doubling),
    ("halving", Halving),
    ("tree", Tree),
    ("double_tree", DoubleTree),
    ("chain", Chain),
    ("bruck", Bruck),
    ("hierarchical", Hierarchical),
    ("leaders", Leaders),
];

/// What each collective can be made with; of equals the first is taken. Ring and chain are one for a broadcast.
const POSSIBLE: [(&str, &[Algorithm]); 6] = [
    ("all_reduce", &[Direct, Ring, Short, Doubling, Halving, DoubleTree, Hierarchical, Leaders]),
    ("reduce", &[Direct, Tree, DoubleTree, Chain]),
    ("broadcast", &[Ring, Chain, Tree, DoubleTree, Hierarchical]),
    ("all_gather", &[Direct, Ring, Bruck, Hierarchical]),
    ("reduce_scatter", &[Direct, Hierarchical]),
    ("all_to_all", &[Direct, Bruck]),
];

impl Algorithm {
    /// Its name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, known)| *known == self).map_or("", |(name, _)| *name)
    }

    /// Whether elements are combined in the order of the ranks, however the buffer is cut.
    pub fn keeps_order(self) -> bool {
        matches!(self, Direct | Short)
    }

    /// Whether every rank hears from every other.
    pub fn greets(self) -> bool {
        matches!(self, Direct | Short)
    }
}

/// What the collective of a name can be made with; what is not there has one way only.
pub fn possible(collective: &str) -> &'static [Algorithm] {
    POSSIBLE.iter().find(|(known, _)| *known == collective).map_or(&[Direct], |(_, possible)| possible)
}

/// `GRADWIRE_ALGO` cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{entry}` is not understood: write `collective:algorithm`, more than one separated by `;`, with one of {possible}"
)]
pub struct AlgorithmError {
    entry: String,
    possible: String,
}

/// Wishes as `all_reduce:ring;broadcast:tree`, by collective. `deterministic`: only what combines in the order of the ranks.
///
/// # Errors
/// `AlgorithmError` for what is not understood, or cannot be.
pub fn parse(wishes: &str, deterministic: bool) -> Result<Vec<(&'static str, Algorithm)>, AlgorithmError> {
    let may = |(name, algorithm): &(&str, Algorithm)| !deterministic || !combines(name) || algorithm.keeps_order();
    let entries = wishes.split(';').map(str::trim).filter(|entry| !entry.is_empty());
    entries.map(|entry| parse_one(entry).filter(may).ok_or_else(|| refusal(entry, deterministic))).collect()
}

fn combines(collective: &str) -> bool {
    matches!(collective, "all_reduce" | "reduce" | "reduce_scatter")
}

fn parse_one(entry: &str) -> Option<(&'static str, Algorithm)> {
    let (name, algorithm) = entry.split_once(':')?;
    // NCCL writes `allreduce`.
    let squeeze = |name: &str| name.trim().to_lowercase().replace('_', "");
    let (name, possible) = POSSIBLE.iter().find(|(known, _)| squeeze(known) == squeeze(name))?;
    let (_, algorithm) = NAMES.iter().find(|(known, _)| squeeze(known) == squeeze(algorithm))?;
    possible.contains(algorithm).then_some((*name, *algorithm))
}

fn refusal(entry: &str, deterministic: bool) -> AlgorithmError {
    let may = |name: &str, algorithm: &&Algorithm| !deterministic || !combines(name) || algorithm.keeps_order();
    let possible = POSSIBLE
        .iter()
        .flat_map(|(name, all)| {
            all.iter().filter(|one| may(name, one)).map(move |one| format!("{name}:{}", one.name()))
        })
        .collect::<Vec<_>>()
        .join(", ");
    let order = if deterministic { " (deterministic: in the order of the ranks)" } else { "" };
    AlgorithmError { entry: entry.to_owned(), possible: possible + order }
}
