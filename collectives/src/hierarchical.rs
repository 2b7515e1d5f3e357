//! Pure: schedules for ranks of several hosts: together inside a host first, where bytes cost little, then between hosts,
//! then inside again. What leaves a host leaves it once, however many ranks it has.

use crate::chunk::segments;
use crate::draft::Draft;
use crate::hosts::Hosts;
use crate::{Place, Schedule, Span, halving_doubling, ring};
use gradwire_transport::Rank;
use std::ops::Range;

/// All-reduce in place, a slice for each of as many ranks a host as the smallest host has: inside each host the owner of a
/// slice combines everybody's; the owners of one slice go round a ring between the hosts, each by its own connections; and
/// they give what they have to the ranks of their hosts.
///
/// Between hosts a host sends `2 * (h - 1) / h` of the buffer, for `h` hosts, and no less is possible.
pub fn all_reduce(rank: Rank, hosts: &Hosts, len: usize, segment: usize, average: bool) -> Schedule {
    let lanes = hosts.fewest();
    let slice = |lane: usize| crate::chunk::chunk(len, lanes, lane);
    by_slices(rank, hosts, (lanes, hosts.count()), slice, segment, |draft, members, me, range| {
        ring::among(draft, members, me, range, segment, average);
    })
}

/// All-reduce in place through one leader a host: fewest messages between hosts, for short buffers.
pub fn all_reduce_by_leaders(rank: Rank, hosts: &Hosts, len: usize, segment: usize, average: bool) -> Schedule {
    by_slices(
        rank,
        hosts,
        (1, 1),
        |_| 0..len,
        segment,
        |draft, members, me, range| {
            halving_doubling::among(draft, members, me, range, segment, average);
        },
    )
}

/// Inside, between, and inside again, for `lanes` owners a host, whose slices are worked on in `count` chunks.
fn by_slices(
    rank: Rank,
    hosts: &Hosts,
    (lanes, count): (usize, usize),
    slice: impl Fn(usize) -> Range<usize>,
    segment: usize,
    between: impl FnOnce(&mut Draft, &[Rank], usize, Range<usize>),
) -> Schedule {
    let (host, place) = hosts.place(rank);
    let here = hosts.ranks(host);
    let near = || here.iter().copied().filter(|&other| other != rank);
    let mut draft = Draft::default();
    // In the order in which the ring between hosts sends them on: the same on all ranks of a host.
    let cut = |lane: usize| {
        let range = slice(lane);
        (0..count).flat_map(move |back| ring::cut(&range, count, (host + count - back % count) % count, segment))
    };
    let owners = || here.iter().take(lanes).enumerate().filter(|(_, owner)| **owner != rank);
    for (lane, &owner) in owners() {
        cut(lane).for_each(|span| draft.send(owner, span));
    }
    if place < lanes {
        for span in cut(place) {
            near().for_each(|other| draft.recv_reduce(other, span));
        }
        let members: Vec<Rank> = hosts.iter().map(|ranks| ranks[place]).collect();
        between(&mut draft, &members, host, slice(place));
        for span in cut(place) {
            near().for_each(|other| draft.send(other, span));
        }
    }
    for (lane, &owner) in owners() {
        cut(lane).for_each(|span| draft.recv(owner, span));
    }
    draft.into_schedule(0)
}

/// Reduce-scatter: for every rank of another host, one rank of this host combines what all here have for it, and sends that.
///
/// Each part enters its host as often as there are other hosts, instead of once from every rank of them.
pub fn reduce_scatter(rank: Rank, hosts: &Hosts, parts: &[Range<usize>], segment: usize, average: bool) -> Schedule {
    let (host, place) = hosts.place(rank);
    let here = hosts.ranks(host);
    let mut draft = Draft::default();
    // Who here combines what goes to number `at` of host `there`.
    let agent = |there: usize, at: usize| if there == host { here[at] } else { here[at % here.len()] };
    let targets = || hosts.iter().enumerate().flat_map(|(there, ranks)| (0..ranks.len()).map(move |at| (there, at)));
    let cut = |place: Place, range: Range<usize>| segments(place, range, segment);
    let part = |there: usize, at: usize| parts[hosts.ranks(there)[at].index()].clone();
    // Parts for other hosts first: they have further to go.
    let far = || targets().filter(|&(there, _)| there != host);
    let near = || targets().filter(|&(there, _)| there == host);
    for (there, at) in far().chain(near()).filter(|&(there, at)| agent(there, at) != rank) {
        cut(Place::Input, part(there, at)).for_each(|span| draft.send(agent(there, at), span));
    }
    let mut scratch_len = 0;
    for (there, at) in far().filter(|&(there, at)| agent(there, at) == rank) {
        let own = cut(Place::Input, part(there, at));
        let sums = cut(Place::Scratch, scratch_len..scratch_len + part(there, at).len());
        for (own, sum) in own.zip(sums) {
            draft.copy(own, sum);
            here.iter().filter(|&&other| other != rank).for_each(|&other| draft.recv_reduce(other, sum));
            draft.send(hosts.ranks(there)[at], sum);
        }
        scratch_len += part(there, at).len();
    }
    let own = parts[rank.index()].clone();
    for (from, sum) in cut(Place::Input, own.clone()).zip(cut(Place::Output, 0..own.len())) {
        draft.copy(from, sum);
        here.iter().filter(|&&other| other != rank).for_each(|&other| draft.recv_reduce(other, sum));
        for (_, ranks) in hosts.iter().enumerate().filter(|(there, _)| *there != host) {
            draft.recv_reduce(ranks[place % ranks.len()], sum);
        }
        if average {
            draft.finish(sum);
        }
    }
    draft.into_schedule(scratch_len)
}

/// All-gather: each part goes once to every other host, where one rank passes it on to the others there.
pub fn all_gather(rank: Rank, hosts: &Hosts, parts: &[Range<usize>], segment: usize) -> Schedule {
    let (host, place) = hosts.place(rank);
    let here = hosts.ranks(host);
    let mut draft = Draft::default();
    let cut = |rank: Rank| segments(Place::Output, parts[rank.index()].clone(), segment);
    let own = parts[rank.index()].clone();
    draft.copy(
        Span { place: Place::Input, start: 0, len: own.len() },
        Span { place: Place::Output, start: own.start, len: own.len() },
    );
    let near = || here.iter().copied().filter(|&other| other != rank);
    let far = || hosts.iter().enumerate().filter(|(there, _)| *there != host).map(|(_, ranks)| ranks);
    for ranks in far() {
        cut(rank).for_each(|span| draft.send(ranks[place % ranks.len()], span));
    }
    for span in cut(rank) {
        near().for_each(|other| draft.send(other, span));
    }
    for other in near() {
        cut(other).for_each(|span| draft.recv(other, span));
    }
    for ranks in far() {
        for (at, &from) in ranks.iter().enumerate() {
            let agent = here[at % here.len()];
            for span in cut(from) {
                if agent == rank {
                    draft.recv(from, span);
                    near().for_each(|other| draft.send(other, span));
                } else {
                    draft.recv(agent, span);
                }
            }
        }
    }
    draft.into_schedule(0)
}

/// Broadcast from `root` down a binomial tree of one rank a host, each of whom then tells its host.
pub fn broadcast(rank: Rank, hosts: &Hosts, root: Rank, len: usize, segment: usize) -> Schedule {
    let ((host, _), (first, _)) = (hosts.place(rank), hosts.place(root));
    let count = hosts.count();
    // The root speaks for its host, the lowest rank for every other.
    let leader = |host: usize| if host == first { root } else { hosts.ranks(host)[0] };
    let named = |place: usize| leader((place + first) % count);
    let place = (host + count - first) % count;
    let low = if place == 0 { count.next_power_of_two() } else { 1 << place.trailing_zeros() };
    let mut draft = Draft::default();
    for span in segments(Place::Output, 0..len, segment) {
        if rank != leader(host) {
            draft.recv(leader(host), span);
            continue;
        }
        if place > 0 {
            draft.recv(named(place - low), span);
        }
        let mut distance = low / 2;
        while distance > 0 {
            if place + distance < count {
                draft.send(named(place + distance), span);
            }
            distance /= 2;
        }
        hosts.ranks(host).iter().filter(|&&other| other != rank).for_each(|&other| draft.send(other, span));
    }
    draft.into_schedule(0)
}
