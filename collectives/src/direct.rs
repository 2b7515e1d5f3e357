//! Pure: schedules in which every rank exchanges with every other, without going through third ones: fewest steps, and sums
//! in rank order, so that 16-bit floats are rounded once and results do not depend on how a buffer is cut.

use crate::chunk::{chunk, segments};
use crate::{Action, Place, Schedule, Span, StepId};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// The other ranks, beginning at the right neighbour, so that not all send to the same one first.
fn others(rank: Rank, world_size: WorldSize) -> impl Iterator<Item = Rank> + Clone {
    let n = world_size.get();
    (1..n).map(move |distance| Rank((rank.0 + distance) % n))
}

fn span(place: Place, range: Range<usize>) -> Span {
    Span { place, start: range.start, len: range.len() }
}

/// All-reduce in place: everybody sends all to everybody and folds all. One step; `n - 1` times the buffer is sent, which for
/// two ranks is as little as a ring sends, in half its steps.
///
/// What is sent is a copy in scratch: a fold must not write what a send still waits to read, behind others in a full queue.
pub fn all_reduce_short(rank: Rank, world_size: WorldSize, len: usize, segment: usize) -> Schedule {
    let mut schedule = Schedule { scratch_len: len, ..Schedule::default() };
    for span in segments(Place::Output, 0..len, segment) {
        let sent = Span { place: Place::Scratch, ..span };
        let copied = Some(schedule.push(Action::Copy { from: span, into: sent }, [None, None]));
        for to in others(rank, world_size) {
            schedule.push(Action::Send { to, span: sent }, [copied, None]);
        }
        schedule.push(Action::FoldAll { own: span, span }, [copied, None]);
    }
    schedule
}

/// All-reduce in place: rank i folds everybody's i-th chunk and sends it to everybody. Two steps; as few bytes as a ring.
pub fn all_reduce(rank: Rank, world_size: WorldSize, len: usize, segment: usize) -> Schedule {
    let cut = |owner: Rank| {
        let range = chunk(len, world_size.get() as usize, owner.index());
        segments(Place::Output, range, segment)
    };
    let mut schedule = Schedule::default();
    let mut sent: Vec<(Rank, Span, StepId)> = Vec::new();
    for to in others(rank, world_size) {
        sent.extend(cut(to).map(|span| (to, span, schedule.push(Action::Send { to, span }, [None, None]))));
    }
    let folded: Vec<(Span, StepId)> =
        cut(rank).map(|span| (span, schedule.push(Action::FoldAll { own: span, span }, [None, None]))).collect();
    for (span, folded) in folded {
        for to in others(rank, world_size) {
            schedule.push(Action::Send { to, span }, [Some(folded), None]);
        }
    }
    for (from, span, sent) in sent {
        schedule.push(Action::Recv { from, span }, [Some(sent), None]);
    }
    schedule
}

/// Reduce in place at the root: rank i folds everybody's i-th chunk in scratch and sends it to the root.
pub fn reduce(rank: Rank, world_size: WorldSize, root: Rank, len: usize, segment: usize) -> Schedule {
    let cut = |place, owner: Rank| {
        let range = chunk(len, world_size.get() as usize, owner.index());
        segments(place, range, segment)
    };
    let mut schedule = Schedule { scratch_len: if rank == root { 0 } else { len }, ..Schedule::default() };
    let mut sent: Vec<(Rank, Span, StepId)> = Vec::new();
    for to in others(rank, world_size) {
        let sends =
            cut(Place::Output, to).map(|span| (to, span, schedule.push(Action::Send { to, span }, [None, None])));
        sent.extend(sends);
    }
    let result = if rank == root { Place::Output } else { Place::Scratch };
    for (own, span) in cut(Place::Output, rank).zip(cut(result, rank)) {
        let folded = schedule.push(Action::FoldAll { own, span }, [None, None]);
        if rank != root {
            schedule.push(Action::Send { to: root, span }, [Some(folded), None]);
        }
    }
    if rank == root {
        for (from, span, sent) in sent {
            schedule.push(Action::Recv { from, span }, [Some(sent), None]);
        }
    }
    schedule
}

/// Reduce-scatter: everybody sends rank i its i-th part of the input, and rank i folds them into the output.
pub fn reduce_scatter(rank: Rank, world_size: WorldSize, parts: &[Range<usize>], segment: usize) -> Schedule {
    let cut = |owner: Rank| segments(Place::Input, parts[owner.index()].clone(), segment);
    let mut schedule = Schedule::default();
    for to in others(rank, world_size) {
        for span in cut(to) {
            schedule.push(Action::Send { to, span }, [None, None]);
        }
    }
    let result = segments(Place::Output, 0..parts[rank.index()].len(), segment);
    for (own, span) in cut(rank).zip(result) {
        schedule.push(Action::FoldAll { own, span }, [None, None]);
    }
    schedule
}

/// Exchange of parts: what goes to each rank lies in the input, what comes from each in the output. Serves all-to-all,
/// all-gather (`give` is the whole input for everybody), gather and scatter (`None` where nothing goes).
///
/// An empty part is a message too, so that who awaits another length sees it.
pub fn exchange(
    rank: Rank,
    world_size: WorldSize,
    give: &[Option<Range<usize>>],
    get: &[Option<Range<usize>>],
    segment: usize,
) -> Schedule {
    let mut schedule = Schedule::default();
    if let (Some(own), Some(into)) = (give[rank.index()].clone(), get[rank.index()].clone())
        && !own.is_empty()
    {
        let (from, into) = (span(Place::Input, own), span(Place::Output, into));
        schedule.push(Action::Copy { from, into }, [None, None]);
    }
    for to in others(rank, world_size) {
        let Some(part) = give[to.index()].clone() else { continue };
        if part.is_empty() {
            schedule.push(Action::SendToken { to }, [None, None]);
        }
        for span in segments(Place::Input, part, segment) {
            schedule.push(Action::Send { to, span }, [None, None]);
        }
    }
    for from in others(rank, world_size) {
        let Some(part) = get[from.index()].clone() else { continue };
        if part.is_empty() {
            schedule.push(Action::RecvToken { from }, [None, None]);
        }
        for span in segments(Place::Output, part, segment) {
            schedule.push(Action::Recv { from, span }, [None, None]);
        }
    }
    schedule
}
