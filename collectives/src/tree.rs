//! Pure: schedules that go up and down a tree: a chain, a binomial tree, or two binary trees at once; and the barrier.

use crate::chunk::chunk;
use crate::draft::Draft;
use crate::{Action, Place, Schedule, Span, StepId};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// Kinds of trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Everybody has one child: every link carries the buffer once.
    Chain,
    /// As deep as the world has doublings, and the root has as many children.
    Binomial,
    /// Two binary trees, each for half of the buffer; who passes on in one only gets in the other (Sanders, Speck and Träff,
    /// 2009, doi:10.1016/j.parco.2009.09.001).
    DoubleBinary,
}

/// This rank's place in a tree, with the elements that go along it.
struct Branch {
    parent: Option<Rank>,
    children: Vec<Rank>,
    range: Range<usize>,
}

/// The place of number `at`'s parent among `n`, where number 0 is the root.
fn parent(kind: Kind, at: usize, n: usize) -> Option<usize> {
    let bit = 1 << at.trailing_zeros().min(usize::BITS - 1);
    match kind {
        _ if at == 0 => None,
        Kind::Chain => Some(at - 1),
        Kind::Binomial => Some(at - bit),
        // In order: odd numbers are leaves, and each bit more is a level up; what would lie beyond the end hangs lower.
        Kind::DoubleBinary => {
            let up = (at - bit) | bit << 1;
            Some(if up < n { up } else { at - bit })
        }
    }
}

/// Where number `at` of the group stands in tree `tree` of two: who is a leaf in one passes on in the other.
fn shifted(at: usize, n: usize, tree: usize) -> usize {
    match tree {
        0 => at,
        _ if n.is_multiple_of(2) => n - 1 - at,
        _ => (at + n - 1) % n,
    }
}

/// The branches of `rank`; a reduction or broadcast has its `root`, an all-reduce does not mind.
fn branches(kind: Kind, rank: Rank, world_size: WorldSize, root: Option<Rank>, len: usize) -> Vec<Branch> {
    let n = world_size.get() as usize;
    let first = root.map_or(0, Rank::index);
    let me = (rank.index() + n - first) % n;
    let named = |at: usize| Rank(((at + first) % n) as u32);
    if kind != Kind::DoubleBinary || n < 3 {
        let kind = if kind == Kind::DoubleBinary { Kind::Chain } else { kind };
        let children = (0..n).rev().filter(|&at| parent(kind, at, n) == Some(me)).map(named).collect();
        return vec![Branch { parent: parent(kind, me, n).map(named), children, range: 0..len }];
    }
    let branch = |tree: usize| {
        let range = chunk(len, 2, tree);
        // With a root, the others make the two trees, and the root stands above both.
        let above = usize::from(root.is_some());
        let m = n - above;
        let number = |place: usize| (0..m).find(|&at| shifted(at, m, tree) == place).map_or(0, |at| at + above);
        let Some(own) = me.checked_sub(above) else {
            return Branch { parent: None, children: vec![named(number(0))], range };
        };
        let place = shifted(own, m, tree);
        let children = (0..m).filter(|&at| parent(kind, at, m) == Some(place)).map(|at| named(number(at))).collect();
        let over = parent(kind, place, m).map(|at| named(number(at)));
        Branch { parent: over.or(root), children, range }
    };
    vec![branch(0), branch(1)]
}

/// Goes through the segments of all branches, each up first and down when it may be back from the root: in one order on all
/// ranks, which is what keeps messages between two ranks in step.
fn walk(branches: &[Branch], segment: usize, lag: usize, mut step: impl FnMut(&Branch, Span, bool)) {
    let cut = |branch: &Branch, at: usize| {
        let start = branch.range.start + at * segment;
        (start < branch.range.end).then(|| Span {
            place: Place::Output,
            start,
            len: segment.min(branch.range.end - start),
        })
    };
    let most = branches.iter().map(|branch| branch.range.len().div_ceil(segment)).max().unwrap_or(0);
    for at in 0..most + lag {
        for branch in branches {
            if let Some(span) = cut(branch, at) {
                step(branch, span, true);
            }
        }
        for branch in branches {
            if let Some(span) = at.checked_sub(lag).and_then(|at| cut(branch, at)) {
                step(branch, span, false);
            }
        }
    }
}

/// Levels of a tree over the world, both ways: how far behind its start a segment comes back.
fn lag(world_size: WorldSize) -> usize {
    2 * world_size.get().ilog2() as usize
}

/// All-reduce in place up and down a tree, in segments; a rank sends twice the buffer at most. `average`: the root divides.
pub fn all_reduce(
    kind: Kind,
    rank: Rank,
    world_size: WorldSize,
    len: usize,
    segment: usize,
    average: bool,
) -> Schedule {
    let mut draft = Draft::default();
    let branches = branches(kind, rank, world_size, None, len);
    walk(&branches, segment, lag(world_size), |Branch { parent, children, .. }, span, up| {
        if up {
            children.iter().for_each(|&child| draft.recv_reduce(child, span));
            parent.iter().for_each(|&parent| draft.send(parent, span));
            if parent.is_none() && average {
                draft.finish(span);
            }
        } else {
            parent.iter().for_each(|&parent| draft.recv(parent, span));
            children.iter().for_each(|&child| draft.send(child, span));
        }
    });
    draft.into_schedule(0)
}

/// Broadcast from `root` down a tree, in segments.
pub fn broadcast(kind: Kind, rank: Rank, world_size: WorldSize, root: Rank, len: usize, segment: usize) -> Schedule {
    let mut draft = Draft::default();
    let branches = branches(kind, rank, world_size, Some(root), len);
    walk(&branches, segment, 0, |Branch { parent, children, .. }, span, up| {
        if !up {
            parent.iter().for_each(|&parent| draft.recv(parent, span));
            children.iter().for_each(|&child| draft.send(child, span));
        }
    });
    draft.into_schedule(0)
}

/// Reduce in place at `root` up a tree, in segments; who passes on makes its sum in scratch. `average`: the root divides.
pub fn reduce(
    kind: Kind,
    rank: Rank,
    world_size: WorldSize,
    root: Rank,
    (len, segment): (usize, usize),
    average: bool,
) -> Schedule {
    let mut draft = Draft::default();
    let branches = branches(kind, rank, world_size, Some(root), len);
    let passes_on = rank != root && branches.iter().any(|branch| !branch.children.is_empty());
    walk(&branches, segment, 0, |Branch { parent, children, .. }, span, up| {
        if !up {
            return;
        }
        let place = if rank == root || children.is_empty() { Place::Output } else { Place::Scratch };
        let sum = Span { place, ..span };
        if place == Place::Scratch {
            draft.copy(span, sum);
        }
        children.iter().for_each(|&child| draft.recv_reduce(child, sum));
        parent.iter().for_each(|&parent| draft.send(parent, sum));
        if parent.is_none() && average {
            draft.finish(sum);
        }
    });
    draft.into_schedule(if passes_on { len } else { 0 })
}

/// Barrier by dissemination (Hensgen, Finkel and Manber, 1988): in round k, a token goes 2^k places to the right.
pub fn barrier(rank: Rank, world_size: WorldSize) -> Schedule {
    let n = world_size.get();
    let mut schedule = Schedule::default();
    let (mut distance, mut got): (u32, Option<StepId>) = (1, None);
    while distance < n {
        schedule.push(Action::SendToken { to: Rank((rank.0 + distance) % n) }, [got, None]);
        got = Some(schedule.push(Action::RecvToken { from: Rank((rank.0 + n - distance) % n) }, [got, None]));
        distance *= 2;
    }
    schedule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_passes_on_in_one_tree_is_a_leaf_of_the_other() {
        for n in 3..=65 {
            let size = WorldSize::new(n).unwrap();
            for root in [None, Some(Rank(n / 2))] {
                let all: Vec<Vec<Branch>> =
                    size.ranks().map(|rank| branches(Kind::DoubleBinary, rank, size, root, 100)).collect();
                for (rank, both) in all.iter().enumerate() {
                    // The top of a tree has one child only.
                    let passes_on = |branch: &Branch| {
                        branch.parent.is_some_and(|up| Some(up) != root) && !branch.children.is_empty()
                    };
                    assert!(!both.iter().all(passes_on), "rank {rank} of {n} passes on in both trees");
                    for (tree, branch) in both.iter().enumerate() {
                        assert!(branch.children.len() <= 2);
                        for child in &branch.children {
                            assert_eq!(
                                all[child.index()][tree].parent,
                                Some(Rank(rank as u32)),
                                "child {child} of {rank}"
                            );
                        }
                    }
                }
                for tree in [0, 1] {
                    let depth = |mut rank: usize| {
                        let mut depth = 0;
                        while let Some(parent) = all[rank][tree].parent {
                            (rank, depth) = (parent.index(), depth + 1);
                        }
                        depth
                    };
                    let deepest = (0..n as usize).map(depth).max().unwrap();
                    assert!(deepest <= n.ilog2() as usize + 2, "{n} ranks in {deepest} levels");
                }
            }
        }
    }
}
