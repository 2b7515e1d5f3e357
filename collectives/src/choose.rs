//! Pure: which algorithm for which call.
//!
//! The limits of all-reduce are from `benches/algorithms.rs`. What one call costs a rank, in messages and in buffers sent:
//! short `n - 1` and `n - 1`, doubling `log2 n` and `log2 n`, direct `2 (n - 1)` and `2 (n - 1) / n`, ring `2 (n - 1)` and
//! `2 (n - 1) / n` to its neighbour only; in series they take 1, `log2 n`, 2 and `2 (n - 1)` steps.

use crate::call::Shape;
use crate::chunk::parts;
use crate::{Action, Collective, DType, Place, Reduction, Schedule, Span, direct, recursive_doubling, ring, tree};
use gradwire_transport::{Rank, WorldSize};

/// A buffer of at most this many bytes is sent whole to everybody, of a few ranks: a step costs more than the bytes.
const SHORT_BYTES: usize = 16 << 10;
/// The most ranks that all send to all.
const SHORT_RANKS: u32 = 8;
/// A buffer of at most this many bytes of more ranks goes by doubling: fewer messages cost less than fewer bytes. For few
/// ranks it is no faster, and a rank that calls another collective shows at once only where all hear from all.
const DOUBLING_BYTES: usize = 64 << 10;
/// From this many bytes on, an all-reduce is bound by its bytes: between two ranks, a step less is worth less than half the
/// sums; among more, a ring's neighbours-only traffic is worth its steps.
const LONG_BYTES: usize = 1 << 20;
/// The same for what is only moved.
const RING_BYTES: usize = 256 << 10;
/// Bytes of a segment: it stays in the second-level cache between the socket and the sum.
const SEGMENT_BYTES: usize = 128 << 10;

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
    /// By a binomial tree.
    Tree,
}

const ALGORITHMS: [(&str, Algorithm); 5] = [
    ("ring", Algorithm::Ring),
    ("direct", Algorithm::Direct),
    ("short", Algorithm::Short),
    ("doubling", Algorithm::Doubling),
    ("tree", Algorithm::Tree),
];

/// What each collective can be made with.
const POSSIBLE: [(&str, &[Algorithm]); 3] = [
    ("all_reduce", &[Algorithm::Ring, Algorithm::Direct, Algorithm::Short, Algorithm::Doubling]),
    ("all_gather", &[Algorithm::Ring, Algorithm::Direct]),
    ("broadcast", &[Algorithm::Ring, Algorithm::Tree]),
];

/// `GRADWIRE_ALGO` cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{entry}` is not understood: write `collective:algorithm`, more than one separated by `;`, with one of {possible}"
)]
pub struct AlgorithmError {
    entry: String,
    possible: String,
}

/// Chooses, with the user's wishes in hand.
#[derive(Clone, Debug, Default)]
pub struct Chooser {
    wishes: Vec<(String, Algorithm)>,
}

impl Chooser {
    /// A chooser that follows `wishes`: `all_reduce:ring;broadcast:tree`.
    ///
    /// # Errors
    /// `AlgorithmError` for what is not understood, or cannot be.
    pub fn new(wishes: Option<&str>) -> Result<Self, AlgorithmError> {
        let entries = wishes.unwrap_or("").split(';').map(str::trim).filter(|entry| !entry.is_empty());
        let wishes = entries.map(|entry| parse(entry).ok_or_else(|| refusal(entry))).collect::<Result<_, _>>()?;
        Ok(Self { wishes })
    }

    /// The algorithm for a collective over `bytes` bytes (of a rank's buffer, or part) of `dtype`.
    pub fn algorithm(&self, collective: &Collective, dtype: DType, bytes: usize, world_size: WorldSize) -> Algorithm {
        if let Some((_, wish)) = self.wishes.iter().find(|(name, _)| name == collective.name()) {
            return *wish;
        }
        let half = dtype.is_short_float();
        let ranks = world_size.get();
        match collective {
            Collective::AllReduce { .. } if ranks == 2 && bytes < LONG_BYTES => Algorithm::Short,
            Collective::AllReduce { .. } if ranks <= SHORT_RANKS && bytes <= SHORT_BYTES => Algorithm::Short,
            // Doubling and a ring round short floats at every step; folding in rank order rounds them once.
            Collective::AllReduce { .. } if half => Algorithm::Direct,
            Collective::AllReduce { .. } if ranks > SHORT_RANKS && bytes <= DOUBLING_BYTES => Algorithm::Doubling,
            Collective::AllReduce { .. } if bytes < LONG_BYTES => Algorithm::Direct,
            Collective::AllReduce { .. } => Algorithm::Ring,
            Collective::AllGather if bytes < RING_BYTES => Algorithm::Direct,
            Collective::AllGather => Algorithm::Ring,
            Collective::Broadcast { .. } if bytes < RING_BYTES => Algorithm::Tree,
            Collective::Broadcast { .. } => Algorithm::Ring,
            _ => Algorithm::Direct,
        }
    }

    /// This rank's part of a call.
    pub(crate) fn schedule(
        &self,
        collective: &Collective,
        dtype: DType,
        shape: &Shape,
        rank: Rank,
        world_size: WorldSize,
    ) -> Schedule {
        let segment = (SEGMENT_BYTES / dtype.bytes()).max(1);
        // Ranks with parts of their own lengths must choose alike: by what all of them know.
        let longest = shape.input.iter().chain(&shape.output).copied().max().unwrap_or(0).max(shape.len);
        let algorithm = self.algorithm(collective, dtype, longest * dtype.bytes(), world_size);
        let alone = world_size.get() == 1;
        let nothing = || vec![0..0; world_size.get() as usize];
        let whole = |len: usize| vec![0..len; world_size.get() as usize];
        match *collective {
            Collective::AllReduce { op } | Collective::Reduce { op, .. } if alone => finish(shape.len, op),
            Collective::AllReduce { op } => match algorithm {
                Algorithm::Ring => ring::all_reduce(rank, world_size, shape.len, segment, op == Reduction::Avg),
                Algorithm::Short => direct::all_reduce_short(rank, world_size, shape.len, segment),
                Algorithm::Doubling => {
                    recursive_doubling::all_reduce(rank, world_size, shape.len, segment, op == Reduction::Avg)
                }
                _ => direct::all_reduce(rank, world_size, shape.len, segment),
            },
            Collective::Reduce { root, .. } => direct::reduce(rank, world_size, root, shape.len, segment),
            Collective::Broadcast { root } => match algorithm {
                Algorithm::Tree => tree::broadcast(rank, world_size, root, shape.len, segment),
                _ => ring::broadcast(rank, world_size, root, shape.len, segment),
            },
            Collective::AllGather => match algorithm {
                Algorithm::Ring => ring::all_gather(rank, world_size, &parts(&shape.output), segment),
                _ => direct::exchange(rank, world_size, &whole(shape.len), &parts(&shape.output), segment),
            },
            Collective::ReduceScatter { op } if alone => copy_and_finish(shape.len, op),
            Collective::ReduceScatter { .. } => direct::reduce_scatter(rank, world_size, &parts(&shape.input), segment),
            Collective::AllToAll => {
                direct::exchange(rank, world_size, &parts(&shape.input), &parts(&shape.output), segment)
            }
            Collective::Gather { root } => {
                let mut give = nothing();
                give[root.index()] = 0..shape.len;
                let get = if rank == root { parts(&shape.output) } else { nothing() };
                direct::exchange(rank, world_size, &give, &get, segment)
            }
            Collective::Scatter { root } => {
                let mut get = nothing();
                get[root.index()] = 0..shape.len;
                let give = if rank == root { parts(&shape.input) } else { nothing() };
                direct::exchange(rank, world_size, &give, &get, segment)
            }
            Collective::Barrier => tree::barrier(rank, world_size),
        }
    }
}

fn finish(len: usize, op: Reduction) -> Schedule {
    let mut schedule = Schedule::default();
    if len > 0 && op == Reduction::Avg {
        schedule.push(Action::Finish { span: Span { place: Place::Output, start: 0, len } }, [None, None]);
    }
    schedule
}

fn copy_and_finish(len: usize, op: Reduction) -> Schedule {
    let mut schedule = Schedule::default();
    let all = |place| Span { place, start: 0, len };
    if len > 0 {
        let copy = Action::Copy { from: all(Place::Input), into: all(Place::Output) };
        let copied = schedule.push(copy, [None, None]);
        if op == Reduction::Avg {
            schedule.push(Action::Finish { span: all(Place::Output) }, [Some(copied), None]);
        }
    }
    schedule
}

fn parse(entry: &str) -> Option<(String, Algorithm)> {
    let (name, algorithm) = entry.split_once(':')?;
    // NCCL writes `allreduce`.
    let squeeze = |name: &str| name.to_lowercase().replace('_', "");
    let (name, possible) = POSSIBLE.iter().find(|(known, _)| squeeze(known) == squeeze(name.trim()))?;
    let (_, algorithm) = ALGORITHMS.iter().find(|(known, _)| *known == algorithm.trim().to_lowercase())?;
    possible.contains(algorithm).then(|| ((*name).to_owned(), *algorithm))
}

fn refusal(entry: &str) -> AlgorithmError {
    let name =
        |algorithm: &Algorithm| ALGORITHMS.iter().find(|(_, known)| known == algorithm).map_or("", |(name, _)| *name);
    let possible = POSSIBLE
        .iter()
        .flat_map(|(collective, all)| all.iter().map(move |algorithm| format!("{collective}:{}", name(algorithm))))
        .collect::<Vec<_>>()
        .join(", ");
    AlgorithmError { entry: entry.to_owned(), possible }
}

#[cfg(test)]
mod tests;
