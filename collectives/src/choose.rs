//! Pure: which algorithm for which call: the one that is expected to take the least, of those that may be taken.

use crate::algorithm::{self, Algorithm, AlgorithmError};
use crate::call::Shape;
use crate::chunk::parts;
use crate::cost::World;
use crate::hosts::Hosts;
use crate::plan::Plan;
use crate::{Action, Collective, DType, Place, Reduction, Schedule, Span};
use crate::{bruck, direct, halving_doubling, hierarchical, recursive_doubling, ring, tree};
use gradwire_transport::{LinkCost, LinkCosts, Rank, WorldSize};
use std::ops::Range;

/// Up to here, and to this many ranks, a reduction goes from everybody to everybody: so a rank that calls something else shows
/// at once, to all.
const SHORT_BYTES: usize = 16 << 10;
const SHORT_RANKS: u32 = 8;
/// Bytes of a segment: it stays in the second-level cache between the socket and the sum.
pub(crate) const SEGMENT_BYTES: usize = 128 << 10;

/// Chooses, with the user's wishes in hand.
#[derive(Clone, Debug, Default)]
pub struct Chooser {
    wishes: Vec<(&'static str, Algorithm)>,
    deterministic: bool,
    hosts: Option<Hosts>,
    costs: LinkCosts,
    /// What both come to, made once: calls ask for it.
    world: Option<World>,
}

/// A call, as far as its schedule depends on it.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) collective: &'a Collective,
    pub(crate) dtype: DType,
    pub(crate) shape: &'a Shape,
}

/// What was chosen, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Whether the user wished it.
    pub wished: bool,
    /// What was to be chosen from, with the microseconds that each is expected to take, the least first.
    pub expected_us: Vec<(Algorithm, f64)>,
}

impl Chooser {
    /// A chooser that follows `wishes`: `all_reduce:ring;broadcast:tree`. `deterministic`: floats are combined in the order of
    /// the ranks, always.
    ///
    /// # Errors
    /// `AlgorithmError` for what is not understood, or cannot be.
    pub fn new(wishes: Option<&str>, deterministic: bool) -> Result<Self, AlgorithmError> {
        let wishes = algorithm::parse(wishes.unwrap_or(""), deterministic)?;
        Ok(Self { wishes, deterministic, ..Self::default() })
    }

    /// The same for ranks on `hosts`, whose links cost `costs`.
    pub fn on(self, hosts: Hosts, costs: LinkCosts) -> Self {
        let ranks = hosts.iter().map(<[Rank]>::len).sum();
        let world = Some(World::new(ranks, &hosts, costs, SEGMENT_BYTES));
        Self { hosts: Some(hosts), costs, world, ..self }
    }

    /// Whether `collective` combines elements in the order of the ranks because it was asked to.
    pub fn orders(&self, collective: &Collective, dtype: DType) -> bool {
        self.deterministic && collective.reduction().is_some() && dtype.is_float()
    }

    /// The algorithm for a collective over `bytes` bytes (of a rank's buffer, or part) of `dtype`.
    pub fn algorithm(&self, collective: &Collective, dtype: DType, bytes: usize, world_size: WorldSize) -> Algorithm {
        self.choice(collective, dtype, bytes, world_size).algorithm
    }

    /// The same, with the reasons.
    pub fn choice(&self, collective: &Collective, dtype: DType, bytes: usize, world_size: WorldSize) -> Choice {
        let ranks = world_size.get() as usize;
        let one_host = || World::new(ranks, &Hosts::new(&vec![0; ranks]), self.costs, SEGMENT_BYTES);
        let world = self.world.clone().unwrap_or_else(one_host);
        let possible = algorithm::possible(collective.name());
        // What rounds short floats at every step loses what they have: in rank order they are rounded once.
        let ordered = self.orders(collective, dtype) || dtype.is_short_float() && collective.reduction().is_some();
        let greets = world_size.get() <= SHORT_RANKS && bytes <= SHORT_BYTES && !world.is_mixed();
        let may = |algorithm: &&Algorithm| match algorithm {
            Algorithm::Hierarchical | Algorithm::Leaders if !world.is_mixed() => false,
            algorithm if ordered => algorithm.keeps_order(),
            algorithm if matches!(collective, Collective::AllReduce { .. }) && greets => algorithm.greets(),
            _ => true,
        };
        let expected = |&algorithm: &Algorithm| (algorithm, world.expected_ns(collective, algorithm, bytes) / 1e3);
        let mut expected_us: Vec<(Algorithm, f64)> = possible.iter().filter(may).map(expected).collect();
        expected_us.sort_by(|(_, one), (_, other)| one.total_cmp(other));
        let wish = self.wishes.iter().find(|(name, _)| *name == collective.name()).map(|(_, wish)| *wish);
        let best = expected_us.first().map_or(Algorithm::Direct, |(algorithm, _)| *algorithm);
        Choice { algorithm: wish.unwrap_or(best), wished: wish.is_some(), expected_us }
    }

    /// The ranks' hosts and what links cost, in words.
    pub fn world(&self) -> String {
        let LinkCosts { near, far, measured, .. } = self.costs;
        let words = |cost: LinkCost| {
            let LinkCost { latency_ns, message_ns, byte_ns } = cost;
            format!("{:.1} us + {:.1} us a message + {byte_ns:.3} ns a byte", latency_ns / 1e3, message_ns / 1e3)
        };
        let hosts = self.hosts.as_ref();
        let mut text = hosts.map_or_else(|| "1 host".to_owned(), ToString::to_string);
        if hosts.is_none_or(|hosts| hosts.most() > 1) {
            text += &format!("; inside a host {}", words(near));
        }
        if hosts.is_some_and(|hosts| hosts.count() > 1) {
            text += &format!("; between hosts {}", words(far));
        }
        text + if measured { ", measured" } else { ", assumed" }
            + if self.deterministic { "; deterministic" } else { "" }
    }

    /// Whether an all-to-all of which all parts have `len` elements is packed: such parts fit a segment, also one by one.
    pub(crate) fn packs(&self, dtype: DType, len: usize, world_size: WorldSize) -> bool {
        let bytes = len * dtype.bytes();
        let short = (1..=SEGMENT_BYTES).contains(&bytes);
        short && self.algorithm(&Collective::AllToAll, dtype, bytes, world_size) == Algorithm::Bruck
    }

    /// Whether `peer` may pack, in an all-to-all in which this rank does not: for all that is known here, it may have parts of one
    /// length.
    fn may_pack(&self, asked: Asked<'_>, peer: Rank, world_size: WorldSize) -> bool {
        let Asked { collective, dtype, shape } = asked;
        let len = |lens: &[usize]| lens.get(peer.index()).copied();
        let even = len(&shape.input).filter(|given| len(&shape.output) == Some(*given));
        let alone = *collective == Collective::AllToAll && !shape.packed && !shape.across;
        alone && even.is_some_and(|len| self.packs(dtype, len, world_size))
    }

    /// This rank's part of a call, ready to run.
    pub(crate) fn plan(&self, asked: Asked<'_>, rank: Rank, world_size: WorldSize) -> Plan {
        let across = || self.hosts.as_ref().and_then(|hosts| hosts.across(rank));
        match across().filter(|_| asked.shape.across) {
            None => {
                let members: Vec<Rank> = world_size.ranks().collect();
                let mut plan = Plan::new(self.schedule(asked, rank, world_size), rank.index(), &members);
                plan.links.iter_mut().for_each(|link| link.may_pack = self.may_pack(asked, link.rank, world_size));
                plan
            }
            // To each other they are a group of which each is on a host of its own.
            Some((members, me)) => {
                let size = WorldSize::new(members.len() as u32).expect("a rank is on a host");
                let schedule = self.apart(size).schedule(asked, Rank(me as u32), size);
                Plan::new(schedule, me, &members)
            }
        }
    }

    /// The chooser of a group of `size` ranks, each on a host of its own.
    pub(crate) fn apart(&self, size: WorldSize) -> Self {
        let numbers: Vec<u32> = (0..size.get()).collect();
        self.clone().on(Hosts::new(&numbers), self.costs)
    }

    /// The ranks' hosts, where they are known.
    pub(crate) fn hosts(&self) -> Option<&Hosts> {
        self.hosts.as_ref()
    }

    /// This rank's part of a call.
    fn schedule(&self, Asked { collective, dtype, shape }: Asked<'_>, rank: Rank, world_size: WorldSize) -> Schedule {
        let segment = (SEGMENT_BYTES / dtype.bytes()).max(1);
        let algorithm = self.algorithm(collective, dtype, shape.longest() * dtype.bytes(), world_size);
        let (len, n) = (shape.len, world_size.get() as usize);
        let nothing = || vec![None; n];
        let all = |lens: &[usize]| parts(lens).into_iter().map(Some).collect::<Vec<_>>();
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
            // Of whole parts, so that one alone fits wherever such a message does.
            Collective::AllToAll if shape.packed => {
                bruck::all_to_all(rank, world_size, len, (segment / len.max(1)).max(1) * len)
            }
            Collective::AllToAll => exchange(&all(&shape.input), &all(&shape.output)),
            Collective::Gather { root } => {
                let mut give = nothing();
                give[root.index()] = Some(0..len);
                exchange(&give, &if rank == root { all(&shape.output) } else { nothing() })
            }
            Collective::Scatter { root } => {
                let mut get = nothing();
                get[root.index()] = Some(0..len);
                exchange(&if rank == root { all(&shape.input) } else { nothing() }, &get)
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
            _ => {
                let all: Vec<_> = parts.iter().cloned().map(Some).collect();
                direct::exchange(rank, size, &vec![Some(0..len); parts.len()], &all, segment)
            }
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
mod choices;
#[cfg(test)]
mod tests;
