//! Pure: schedules in which data only moves to the right neighbour.

use crate::chunk::{chunk, segments};
use crate::draft::Draft;
use crate::{Action, Place, Schedule, Span, StepId};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// Ring all-reduce in place: a reduce-scatter, then an all-gather, each in `world_size - 1` rounds.
///
/// A rank sends `2 * (n - 1) / n` of the buffer, the least that point-to-point sends allow (Patarasuk and Yuan, JPDC 2009,
/// doi:10.1016/j.jpdc.2008.09.002). `average`: whoever holds a whole sum divides it.
pub fn all_reduce(rank: Rank, world_size: WorldSize, len: usize, segment: usize, average: bool) -> Schedule {
    let mut draft = Draft::default();
    let members: Vec<Rank> = world_size.ranks().collect();
    among(&mut draft, &members, rank.index(), 0..len, segment, average);
    draft.into_schedule(0)
}

/// The same among `members`, of whom this rank is number `me`, of the elements in `range` of the output.
pub fn among(draft: &mut Draft, members: &[Rank], me: usize, range: Range<usize>, segment: usize, average: bool) {
    let n = members.len();
    let (to, from) = (members[(me + 1) % n], members[(me + n - 1) % n]);
    // The chunk `back` places before this rank's.
    let cut = |back: usize| cut(&range, n, (me + 2 * n - back) % n, segment);
    for round in 0..n - 1 {
        cut(round).for_each(|span| draft.send(to, span));
        cut(round + 1).for_each(|span| draft.recv_reduce(from, span));
    }
    if average {
        cut(n - 1).for_each(|span| draft.finish(span));
    }
    for round in 0..n - 1 {
        cut(n - 1 + round).for_each(|span| draft.send(to, span));
        cut(round).for_each(|span| draft.recv(from, span));
    }
}

/// The segments of chunk `index` of `count` of `range` of the output.
pub fn cut(range: &Range<usize>, count: usize, index: usize, segment: usize) -> impl Iterator<Item = Span> + use<> {
    let chunk = chunk(range.len(), count, index);
    segments(Place::Output, range.start + chunk.start..range.start + chunk.end, segment)
}

/// Ring all-gather of parts that lie one after the other in the output; this rank's own is copied from the input.
pub fn all_gather(rank: Rank, world_size: WorldSize, parts: &[Range<usize>], segment: usize) -> Schedule {
    let (n, me) = (world_size.get() as usize, rank.index());
    let (to, from) = (rank.right(world_size), rank.left(world_size));
    let part = |back: usize| segments(Place::Output, parts[(me + n - back) % n].clone(), segment);
    let mut schedule = Schedule::default();
    let own = Span { place: Place::Input, start: 0, len: parts[me].len() };
    let into = Span { place: Place::Output, start: parts[me].start, len: own.len };
    let copied = (own.len > 0).then(|| schedule.push(Action::Copy { from: own, into }, [None, None]));
    let mut ready: Vec<Option<StepId>> = part(0).map(|_| copied).collect();
    for round in 0..n - 1 {
        for (span, &ready) in part(round).zip(&ready) {
            schedule.push(Action::Send { to, span }, [ready, None]);
        }
        ready = part(round + 1).map(|span| Some(schedule.push(Action::Recv { from, span }, [None, None]))).collect();
    }
    schedule
}
