//! Pure: which algorithm for which call.
//!
//! The limits of all-reduce are from `benches/algorithms.rs`. What one call costs a rank, in messages and in buffers sent:
//! short `n - 1` and `n - 1`, doubling `log2 n` and `log2 n`, direct `2 (n - 1)` and `2 (n - 1) / n`, ring `2 (n - 1)` and
//! `2 (n - 1) / n` to its neighbour only; in series they take 1, `log2 n`, 2 and `2 (n - 1)` steps.

use crate::algorithm::{self, Algorithm, AlgorithmError};
use crate::call::Shape;
use crate::chunk::parts;
use crate::hosts::Hosts;
use crate::{Action, Collective, DType, Place, Reduction, Schedule, Span};
use crate::{bruck, direct, halving_doubling, hierarchical, recursive_doubling, ring, tree};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

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
/// The fewest ranks, and the most bytes of a part, for which an all-to-all is packed: fewer messages, each byte sent often.
const BRUCK_RANKS: u32 = 8;
const BRUCK_BYTES: usize = 1 << 10;
/// Bytes of a segment: it stays in the second-level cache between the socket and the sum.
const SEGMENT_BYTES: usize = 128 << 10;

/// Chooses, with the user's wishes in hand.
#[derive(Clone, Debug, Default)]
pub struct Chooser {
    wishes: Vec<(&'static str, Algorithm)>,
    hosts: Option<Hosts>,
}

impl Chooser {
    /// A chooser that follows `wishes`: `all_reduce:ring;broadcast:tree`.
    ///
    /// # Errors
    /// `AlgorithmError` for what is not understood, or cannot be.
    pub fn new(wishes: Option<&str>) -> Result<Self, AlgorithmError> {
        Ok(Self { wishes: algorithm::parse(wishes.unwrap_or(""))?, hosts: None })
    }

    /// The same for ranks on `hosts`.
    pub fn on(self, hosts: Hosts) -> Self {
        Self { hosts: Some(hosts), ..self }
    }

    /// The algorithm for a collective over `bytes` bytes (of a rank's buffer, or part) of `dtype`.
    pub fn algorithm(&self, collective: &Collective, dtype: DType, bytes: usize, world_size: WorldSize) -> Algorithm {
        if let Some((_, wish)) = self.wishes.iter().find(|(name, _)| *name == collective.name()) {
            return *wish;
        }
        let half = dtype.is_short_float();
        let ranks = world_size.get();
        let mixed = self.hosts.as_ref().is_some_and(Hosts::are_mixed);
        match collective {
            Collective::AllReduce { .. } if mixed && !half && bytes <= SHORT_BYTES => Algorithm::Leaders,
            Collective::AllReduce { .. } | Collective::ReduceScatter { .. } if mixed && !half => {
                Algorithm::Hierarchical
            }
            Collective::AllGather | Collective::Broadcast { .. } if mixed => Algorithm::Hierarchical,
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
            Collective::AllToAll if ranks >= BRUCK_RANKS && bytes <= BRUCK_BYTES => Algorithm::Bruck,
            _ => Algorithm::Direct,
        }
    }

    /// Whether an all-to-all of equal parts is packed.
    pub(crate) fn packs(&self, collective: &Collective, dtype: DType, shape: &Shape, world_size: WorldSize) -> bool {
        self.algorithm(collective, dtype, shape.longest() * dtype.bytes(), world_size) == Algorithm::Bruck
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
        let algorithm = self.algorithm(collective, dtype, shape.longest() * dtype.bytes(), world_size);
        let (len, n) = (shape.len, world_size.get() as usize);
        let nothing = || vec![0..0; n];
        let average = collective.reduction() == Some(Reduction::Avg);
        let make = Make { algorithm, hosts: self.hosts.as_ref(), rank, world_size, segment, average };
        let exchange = |give: &[_], get: &[_]| direct::exchange(rank, world_size, give, get, segment);
        match *collective {
            Collective::AllReduce { op } | Collective::Reduce { op, .. } if n == 1 => finish(len, op),
            Collective::AllReduce { .. } => make.all_reduce(len),
            Collective::Reduce { root, .. } => make.reduce(root, len),
            Collective::Broadcast { root } => make.broadcast(root, len),
            Collective::AllGather => make.all_gather(len, &parts(&shape.output)),
            Collective::ReduceScatter { op } if n == 1 => copy_and_finish(len, op),
            Collective::ReduceScatter { .. } => make.reduce_scatter(&parts(&shape.input)),
            Collective::AllToAll if shape.packed => bruck::all_to_all(rank, world_size, len, segment),
            Collective::AllToAll => exchange(&parts(&shape.input), &parts(&shape.output)),
            Collective::Gather { root } => {
                let mut give = nothing();
                give[root.index()] = 0..len;
                exchange(&give, &if rank == root { parts(&shape.output) } else { nothing() })
            }
            Collective::Scatter { root } => {
                let mut get = nothing();
                get[root.index()] = 0..len;
                exchange(&if rank == root { parts(&shape.input) } else { nothing() }, &get)
            }
            Collective::Barrier => tree::barrier(rank, world_size),
        }
    }
}

/// What the schedules of an algorithm are made from.
struct Make<'a> {
    algorithm: Algorithm,
    hosts: Option<&'a Hosts>,
    rank: Rank,
    world_size: WorldSize,
    segment: usize,
    average: bool,
}

impl Make<'_> {
    /// Without knowledge of hosts, all ranks are taken to be on one.
    fn hosts(&self) -> Hosts {
        self.hosts.cloned().unwrap_or_else(|| Hosts::new(&vec![0; self.world_size.get() as usize]))
    }

    fn all_reduce(&self, len: usize) -> Schedule {
        let &Self { rank, world_size: size, segment, average, .. } = self;
        match self.algorithm {
            Algorithm::Ring => ring::all_reduce(rank, size, len, segment, average),
            Algorithm::Short => direct::all_reduce_short(rank, size, len, segment),
            Algorithm::Doubling => recursive_doubling::all_reduce(rank, size, len, segment, average),
            Algorithm::Halving => halving_doubling::all_reduce(rank, size, len, segment, average),
            Algorithm::DoubleTree => tree::all_reduce(tree::Kind::DoubleBinary, rank, size, len, segment, average),
            Algorithm::Hierarchical => hierarchical::all_reduce(rank, &self.hosts(), len, segment, average),
            Algorithm::Leaders => hierarchical::all_reduce_by_leaders(rank, &self.hosts(), len, segment, average),
            _ => direct::all_reduce(rank, size, len, segment),
        }
    }

    fn reduce(&self, root: Rank, len: usize) -> Schedule {
        let &Self { rank, world_size: size, segment, average, .. } = self;
        match tree_of(self.algorithm) {
            Some(kind) => tree::reduce(kind, rank, size, root, (len, segment), average),
            None => direct::reduce(rank, size, root, len, segment),
        }
    }

    fn broadcast(&self, root: Rank, len: usize) -> Schedule {
        let &Self { rank, world_size: size, segment, .. } = self;
        match tree_of(self.algorithm) {
            Some(kind) => tree::broadcast(kind, rank, size, root, len, segment),
            None => hierarchical::broadcast(rank, &self.hosts(), root, len, segment),
        }
    }

    fn all_gather(&self, len: usize, parts: &[Range<usize>]) -> Schedule {
        let &Self { rank, world_size: size, segment, .. } = self;
        match self.algorithm {
            Algorithm::Ring => ring::all_gather(rank, size, parts, segment),
            Algorithm::Bruck => bruck::all_gather(rank, size, parts, segment),
            Algorithm::Hierarchical => hierarchical::all_gather(rank, &self.hosts(), parts, segment),
            _ => direct::exchange(rank, size, &vec![0..len; parts.len()], parts, segment),
        }
    }

    fn reduce_scatter(&self, parts: &[Range<usize>]) -> Schedule {
        let &Self { rank, world_size: size, segment, average, .. } = self;
        match self.algorithm {
            Algorithm::Hierarchical => hierarchical::reduce_scatter(rank, &self.hosts(), parts, segment, average),
            _ => direct::reduce_scatter(rank, size, parts, segment),
        }
    }
}

/// The kind of tree that an algorithm goes by, if it does.
fn tree_of(algorithm: Algorithm) -> Option<tree::Kind> {
    match algorithm {
        Algorithm::Ring | Algorithm::Chain => Some(tree::Kind::Chain),
        Algorithm::Tree => Some(tree::Kind::Binomial),
        Algorithm::DoubleTree => Some(tree::Kind::DoubleBinary),
        _ => None,
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

#[cfg(test)]
mod tests;
