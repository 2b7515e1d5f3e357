//! Pure: the same where every host has several ranks, as many on each: inside a host first, then between hosts, where each rank has
//! to do with those in its own place on the others, then inside again. So what a rank sends to other hosts, or copies to its own
//! host's memory for that, is its share of what its host sends, and not all of it.
//!
//! Elements are combined in the order of the ranks of each host, then in that of the hosts.

use super::{LINE, Leg, Place, Round, SLACK, Seen, Task, in_rounds, share};
use crate::device::cut::{Side, even, ring_rounds};
use crate::hosts::Hosts;
use crate::{Collective, Reduction};
use gradwire_transport::Rank;
use gradwire_transport::cuda::MOST_SOURCES;
use std::ops::Range;

/// How ranks of different hosts reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Between {
    /// By way of their hosts' memory.
    Staged,
    /// They read each other's slots.
    Direct,
}

/// What one round is made from.
struct Part<'a> {
    seen: Seen<'a>,
    hosts: &'a Hosts,
    /// Bytes of a part of the call, and which of them are this round's.
    len: usize,
    range: Range<usize>,
    /// This rank's host, and its place there.
    at: (usize, usize),
    /// In how many rounds what is staged goes.
    cuts: usize,
}

impl Seen<'_> {
    /// Its rounds on `hosts`, for sets of `set_bytes`. `None` where it is better, or only possible, as if all were alike.
    pub(crate) fn rounds_by_hosts(self, hosts: &Hosts, between: Between, set_bytes: usize) -> Option<Vec<Round>> {
        let (count, each) = (hosts.count(), hosts.most());
        let (.., len) = even(self.collective, (self.input, self.output), self.ranks)?;
        let parts = match (self.collective, between) {
            // Device to device, an average would be divided by the number of hosts.
            (Collective::AllReduce { op: Reduction::Avg }, Between::Direct) => return None,
            (Collective::AllReduce { .. }, _) => 1,
            (Collective::ReduceScatter { .. }, Between::Staged) => self.ranks,
            (Collective::AllGather, Between::Staged) => count,
            _ => return None,
        };
        let most = set_bytes / parts / LINE * LINE;
        let many = each.max(if between == Between::Direct { count } else { 0 });
        let fits = most > 0 && len.is_multiple_of(self.element_bytes) && many <= MOST_SOURCES;
        if hosts.fewest() < each || each < 2 || count < 2 || !fits {
            return None;
        }
        let at = hosts.place(Rank(self.rank as u32));
        // The longest share, and every host's part, or one of this rank's own besides.
        let (staged, longest) = match self.collective {
            Collective::AllReduce { .. } => (1, share(0..most, each, 0).len()),
            _ => (count + 1, most),
        };
        let cuts = ring_rounds(staged, longest.min(len), SLACK)?;
        let round = |start: usize| {
            let part = Part { seen: self, hosts, len, range: start..len.min(start + most), at, cuts };
            match self.collective {
                Collective::AllReduce { .. } => part.all_reduce(between),
                Collective::AllGather => part.all_gather(),
                _ => part.reduce_scatter(),
            }
        };
        Some((0..len).step_by(most).map(round).collect())
    }
}

impl Part<'_> {
    /// The rank in place `place` of host `host`.
    fn rank(&self, host: usize, place: usize) -> usize {
        self.hosts.ranks(host)[place].index()
    }

    /// The ranks of this host.
    fn here(&self) -> impl Iterator<Item = usize> + Clone {
        self.hosts.ranks(self.at.0).iter().map(|rank| rank.index())
    }

    /// The ranks in this one's place, in the order of the hosts.
    fn across(&self) -> impl Iterator<Item = usize> + Clone {
        (0..self.hosts.count()).map(|host| self.rank(host, self.at.1))
    }

    fn piece(&self, side: Side, part: usize) -> Place {
        self.seen.place(side, part, self.len, &self.range)
    }

    /// Part number `number` of a slot that holds several.
    fn nth(&self, rank: usize, number: usize) -> Place {
        let (width, each) = (self.range.len(), self.range.len().next_multiple_of(LINE));
        Place::Slot { rank, range: number * each..number * each + width }
    }

    /// These places between hosts, cut into rounds.
    fn bring(&self, input: &[Place], output: &[Place]) -> Task {
        let (input, output, rounds) = (in_rounds(input, self.cuts), in_rounds(output, self.cuts), self.cuts);
        Task::Across { leg: Leg::BetweenHosts, input, output, rounds }
    }

    /// The owner of a share in each host folds what its host has of it, then has the sum with the owners on other hosts.
    fn all_reduce(&self, between: Between) -> Round {
        let (me, (host, place)) = (self.seen.rank, self.at);
        let (hosts, each) = (self.hosts.count(), self.hosts.most());
        let slot = |rank: usize, range: Range<usize>| Place::Slot { rank, range };
        let own = |place: usize| share(0..self.range.len(), each, place);
        let put = Task::Copy { from: self.piece(Side::Output, 0), to: slot(me, 0..self.range.len()) };
        let given = self.here().map(|rank| slot(rank, own(place))).collect();
        let fold = Task::Fold { from: given, into: slot(me, own(place)), whole: false };
        let take = |(place, rank): (usize, usize)| {
            let range = own(place);
            let to = self.range.start + range.start..self.range.start + range.end;
            Task::Copy { from: slot(rank, range), to: Place::Piece { side: Side::Output, piece: 0, range: to } }
        };
        let taken = self.here().enumerate().map(take).collect();
        if between == Between::Staged {
            return vec![vec![put], vec![fold, self.bring(&[], &[slot(me, own(place))])], taken];
        }
        let of = |host: usize| share(own(place), hosts, host);
        let sums = self.across().map(|rank| slot(rank, of(host))).collect();
        let sum = Task::Fold { from: sums, into: slot(me, of(host)), whole: true };
        let others = self.across().enumerate().filter(|(_, rank)| *rank != me);
        let bring = others.map(|(host, rank)| Task::Copy { from: slot(rank, of(host)), to: slot(me, of(host)) });
        vec![vec![put], vec![fold], vec![sum], bring.collect(), taken]
    }

    /// For every host, its owner's part is folded here by who has the same place.
    fn reduce_scatter(&self) -> Round {
        let (me, place, hosts) = (self.seen.rank, self.at.1, self.hosts.count());
        let all = || (0..self.hosts.most()).flat_map(|place| (0..hosts).map(move |host| (host, place)));
        let put = |(host, place)| Task::Copy {
            from: self.piece(Side::Input, self.rank(host, place)),
            to: self.nth(me, place * hosts + host),
        };
        let fold = |number: usize| Task::Fold {
            from: self.here().map(|rank| self.nth(rank, number)).collect(),
            into: self.nth(me, number),
            whole: false,
        };
        let mine = place * hosts..(place + 1) * hosts;
        let input: Vec<_> = mine.clone().map(|number| self.nth(me, number)).collect();
        let sum = self.bring(&input, &[self.piece(Side::Output, 0)]);
        vec![all().map(put).collect(), mine.map(fold).chain([sum]).collect()]
    }

    /// What a rank gives goes once to every other host.
    fn all_gather(&self) -> Round {
        let (me, hosts) = (self.seen.rank, self.hosts.count());
        let output: Vec<_> = (0..hosts).map(|host| self.nth(me, host)).collect();
        let bring = self.bring(&[self.piece(Side::Input, 0)], &output);
        let take = |(place, rank): (usize, usize)| {
            (0..hosts).map(move |host| Task::Copy {
                from: self.nth(rank, host),
                to: self.piece(Side::Output, self.rank(host, place)),
            })
        };
        vec![vec![bring], self.here().enumerate().flat_map(take).collect()]
    }
}
