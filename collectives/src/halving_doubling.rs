//! Pure: all-reduce in twice as many rounds as the world size has doublings, with as few bytes as a ring.

use crate::chunk::{chunk, segments};
use crate::draft::Draft;
use crate::{Place, Schedule, Span};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// All-reduce in place by recursive halving and doubling (Rabenseifner, 2004, doi:10.1007/978-3-540-24685-5_1).
///
/// In each round of the first half, two partners split what they both work on: each sends the half that it gives up and
/// combines the half that it keeps. The second half goes the same way back. Ranks past the largest power of two give all they
/// have to one below it first and get the result from it last; they and their partners send a whole buffer more. `average`:
/// whoever holds a whole sum divides it.
pub fn all_reduce(rank: Rank, world_size: WorldSize, len: usize, segment: usize, average: bool) -> Schedule {
    let mut draft = Draft::default();
    let members: Vec<Rank> = world_size.ranks().collect();
    among(&mut draft, &members, rank.index(), 0..len, segment, average);
    draft.into_schedule(0)
}

/// The same among `members`, of whom this rank is number `me`, of the elements in `range` of the output.
pub fn among(draft: &mut Draft, members: &[Rank], me: usize, range: Range<usize>, segment: usize, average: bool) {
    let n = members.len();
    let most = 1 << n.ilog2();
    let cut = |range: &Range<usize>| segments(Place::Output, range.clone(), segment);
    if me >= most {
        let partner = members[me - most];
        cut(&range).for_each(|span| draft.send(partner, span));
        return cut(&range).for_each(|span| draft.recv(partner, span));
    }
    let extra = members.get(me + most).copied();
    if let Some(extra) = extra {
        cut(&range).for_each(|span| draft.recv_reduce(extra, span));
    }
    // What this rank works on in each round, and what its partner does.
    let mut rounds: Vec<(Rank, Range<usize>, Range<usize>)> = Vec::new();
    let (mut mine, mut distance) = (range.clone(), most / 2);
    while distance > 0 {
        let middle = mine.start + chunk(mine.len(), 2, 0).end;
        let (low, high) = (mine.start..middle, middle..mine.end);
        let (keep, give) = if me & distance == 0 { (low, high) } else { (high, low) };
        let partner = members[me ^ distance];
        cut(&give).for_each(|span| draft.send(partner, span));
        cut(&keep).for_each(|span| draft.recv_reduce(partner, span));
        rounds.push((partner, keep.clone(), give));
        (mine, distance) = (keep, distance / 2);
    }
    if average {
        cut(&mine).for_each(|span: Span| draft.finish(span));
    }
    for (partner, keep, give) in rounds.into_iter().rev() {
        cut(&keep).for_each(|span| draft.send(partner, span));
        cut(&give).for_each(|span| draft.recv(partner, span));
    }
    if let Some(extra) = extra {
        cut(&range).for_each(|span| draft.send(extra, span));
    }
}
