//! Pure: how ranks carry a call out by memory of their devices which all of them reach: what each copies and folds in every round,
//! and when all take a step.
//!
//! Every rank lends the others a slot of two sets. A round's first phase puts what this rank gives into one set of its own slot;
//! after a step of all the others read it. The next round has the other set, and before a set is written anew two rounds later,
//! all have taken the first step of the round between, so have read what they wanted of it. Reductions fold in the order of the
//! ranks, and only one rank makes each element of what several get: the same bits on all.

pub(super) mod brought;
pub(super) mod hierarchy;

use crate::Collective;
use crate::chunk::chunk;
use crate::device::cut::{Side, even};
use gradwire_transport::Rank;
use gradwire_transport::cuda::MOST_SOURCES;
use std::ops::Range;

/// Bytes of a set: long enough that what a step takes is little beside what a device does between two.
pub(crate) const SET_BYTES: usize = 16 << 20;
/// Sets of a slot.
pub(crate) const SETS: usize = 2;
/// Parts begin on such borders: a multiple of every element's length, and of what a kernel reads at once.
pub(crate) const LINE: usize = 64;

/// Bytes of this rank's tensors, or of a rank's slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Piece { side: Side, piece: usize, range: Range<usize> },
    Slot { rank: usize, range: Range<usize> },
}

impl Place {
    /// Share number `index` of `count` of it.
    fn share(&self, count: usize, index: usize) -> Self {
        match self {
            Self::Piece { side, piece, range } => {
                Self::Piece { side: *side, piece: *piece, range: share(range.clone(), count, index) }
            }
            Self::Slot { rank, range } => Self::Slot { rank: *rank, range: share(range.clone(), count, index) },
        }
    }
}

/// What a device does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Copy {
        from: Place,
        to: Place,
    },
    /// Places of several ranks, in their order; `whole`: of all ranks, so that an average divides here.
    Fold {
        from: Vec<Place>,
        into: Place,
        whole: bool,
    },
    /// A collective over these places by way of the host: in `rounds` rounds, on every rank as many, each over as many of the places,
    /// in their order. What the device was given in this phase is done before.
    Across {
        leg: Leg,
        input: Vec<Place>,
        output: Vec<Place>,
        rounds: usize,
    },
}

/// What goes by way of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// The call's own collective, among the ranks in this one's place on their hosts.
    BetweenHosts,
    /// An all-to-all or an all-gather of all ranks, by which what is to be folded comes to a device, or goes from it.
    Come,
    Go,
}

impl Task {
    /// Whether what it folds, if it does, is of all ranks.
    pub(crate) fn is_whole(&self) -> bool {
        !matches!(self, Self::Fold { whole: false, .. })
    }
}

/// What this rank's device does in each phase; all take a step between two.
pub(crate) type Round = Vec<Vec<Task>>;

/// A call, as rank `rank` of `ranks` sees it.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) collective: &'a Collective,
    pub(crate) element_bytes: usize,
    /// Bytes of each piece.
    pub(crate) input: &'a [usize],
    pub(crate) output: &'a [usize],
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

impl Seen<'_> {
    /// Its rounds, for sets of `set_bytes`. `None` where not every rank knows all lengths, or there are too many ranks.
    pub(crate) fn rounds(self, set_bytes: usize) -> Option<Vec<Round>> {
        let (.., len) = even(self.collective, (self.input, self.output), self.ranks)?;
        // No rank reads more than a set's bytes of the others in a phase.
        let parts = match self.collective {
            Collective::ReduceScatter { .. } | Collective::AllToAll | Collective::AllGather => self.ranks,
            _ => 1,
        };
        let most = set_bytes / parts / LINE * LINE;
        if most == 0 || len % self.element_bytes != 0 || self.ranks > MOST_SOURCES {
            return None;
        }
        let round = |start: usize| self.round(len, start..len.min(start + most));
        Some((0..len).step_by(most).map(round).collect())
    }

    fn round(self, len: usize, range: Range<usize>) -> Round {
        let (me, n, width) = (self.rank, self.ranks, range.len());
        let place = |side: Side, part: usize| self.place(side, part, len, &range);
        let (input, output) = (|part| place(Side::Input, part), |part| place(Side::Output, part));
        let slot = |rank: usize| Place::Slot { rank, range: 0..width };
        // Where slots hold a part for each rank, each begins on a border.
        let each = width.next_multiple_of(LINE);
        let for_rank = |rank: usize, to: usize| Place::Slot { rank, range: to * each..to * each + width };
        let copy = |from: Place, to: Place| Task::Copy { from, to };
        let only = |is: bool, task: Task| if is { vec![task] } else { vec![] };
        let all = || (0..n).map(slot).collect();
        match self.collective {
            Collective::AllReduce { .. } | Collective::Reduce { .. } => {
                let root = self.collective.root().map(Rank::index);
                let takes = root.is_none_or(|root| root == me);
                let put = vec![copy(output(0), slot(me))];
                // Of two, who gets the result folds all of it: as many bytes, a step less.
                if n == 2 {
                    return vec![put, only(takes, Task::Fold { from: all(), into: output(0), whole: true })];
                }
                let own = |rank: usize| share(0..width, n, rank);
                let of = |rank: usize, range: Range<usize>| Place::Slot { rank, range };
                let fold = Task::Fold {
                    from: (0..n).map(|rank| of(rank, own(me))).collect(),
                    into: of(me, own(me)),
                    whole: true,
                };
                let take = |rank: usize| {
                    let Range { start, end } = own(rank);
                    let to =
                        Place::Piece { side: Side::Output, piece: 0, range: range.start + start..range.start + end };
                    copy(of(rank, start..end), to)
                };
                vec![put, vec![fold], if takes { (0..n).map(take).collect() } else { vec![] }]
            }
            Collective::Broadcast { root } => {
                let root = root.index();
                vec![only(root == me, copy(output(0), slot(root))), only(root != me, copy(slot(root), output(0)))]
            }
            Collective::AllGather => {
                let others = (0..n).filter(|rank| *rank != me);
                let take = others.map(|rank| copy(slot(rank), output(rank))).collect();
                vec![vec![copy(input(0), slot(me)), copy(input(0), output(me))], take]
            }
            Collective::ReduceScatter { .. } => {
                let put = (0..n).map(|to| copy(input(to), for_rank(me, to))).collect();
                let from = (0..n).map(|rank| for_rank(rank, me)).collect();
                vec![put, vec![Task::Fold { from, into: output(0), whole: true }]]
            }
            // All-to-all; others are not even.
            _ => {
                let put = (0..n).map(|to| copy(input(to), for_rank(me, to))).collect();
                vec![put, (0..n).map(|rank| copy(for_rank(rank, me), output(rank))).collect()]
            }
        }
    }

    /// The round's bytes of a part: one after the other in one piece, or each in a piece of its own.
    fn place(self, side: Side, part: usize, len: usize, range: &Range<usize>) -> Place {
        let pieces = if side == Side::Input { self.input } else { self.output };
        let (piece, first) = if pieces.len() == 1 { (0, part * len) } else { (part, 0) };
        Place::Piece { side, piece, range: first + range.start..first + range.end }
    }
}

/// How much longer one share may be than another: cuts are rounded, and the last one has what is left.
pub(crate) const SLACK: usize = 65 * LINE;

/// Share number `index` of `count` of a range, on borders within it.
fn share(range: Range<usize>, count: usize, index: usize) -> Range<usize> {
    let lines = chunk(range.len().div_ceil(LINE), count, index);
    let at = |line: usize| range.start + (line * LINE).min(range.len());
    at(lines.start)..at(lines.end)
}

/// `places` cut into `rounds` rounds: as many of each.
fn in_rounds(places: &[Place], rounds: usize) -> Vec<Place> {
    (0..rounds).flat_map(|number| places.iter().map(move |place| place.share(rounds, number))).collect()
}

#[cfg(test)]
mod tests;
