//! Pure: schedules in which data only moves to the right neighbour.

use crate::chunk::{chunk, segments};
use crate::{Action, Place, Schedule, Span, StepId};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// Ring all-reduce in place: a reduce-scatter, then an all-gather, each in `world_size - 1` rounds.
///
/// A rank sends `2 * (n - 1) / n` of the buffer, the least that point-to-point sends allow (Patarasuk and Yuan, JPDC 2009,
/// doi:10.1016/j.jpdc.2008.09.002). `average`: whoever holds a whole sum divides it.
pub fn all_reduce(rank: Rank, world_size: WorldSize, len: usize, segment: usize, average: bool) -> Schedule {
    let (n, me) = (world_size.get() as usize, rank.index());
    let (to, from) = (rank.right(world_size), rank.left(world_size));
    let cut = |back: usize| -> Vec<Span> {
        // The chunk `back` places before this rank's.
        segments(Place::Output, chunk(len, n, (me + 2 * n - back) % n), segment).collect()
    };
    let mut schedule = Schedule::default();
    // The step after which each segment of the chunk that is to be sent next is ready, and those that have sent chunks.
    let mut ready: Vec<Option<StepId>> = vec![None; cut(0).len()];
    let mut sent: Vec<Vec<StepId>> = Vec::new();
    for round in 0..n - 1 {
        let sends = cut(round).into_iter().zip(&ready);
        sent.push(sends.map(|(span, &ready)| schedule.push(Action::Send { to, span }, [ready, None])).collect());
        ready = cut(round + 1)
            .into_iter()
            .map(|span| Some(schedule.push(Action::RecvReduce { from, span }, [None, None])))
            .collect();
    }
    if average {
        let whole = cut(n - 1).into_iter().zip(ready);
        ready = whole.map(|(span, ready)| Some(schedule.push(Action::Finish { span }, [ready, None]))).collect();
    }
    for round in 0..n - 1 {
        let sends = cut(n - 1 + round).into_iter().zip(&ready);
        sends.for_each(|(span, &ready)| {
            schedule.push(Action::Send { to, span }, [ready, None]);
        });
        // What is received here lies where a partial sum was sent from.
        let receives = cut(round).into_iter().zip(&sent[round]);
        ready = receives
            .map(|(span, &sent)| Some(schedule.push(Action::Recv { from, span }, [Some(sent), None])))
            .collect();
    }
    schedule
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

/// Broadcast along the ring from `root`, segment by segment: every link carries the buffer once.
pub fn broadcast(rank: Rank, world_size: WorldSize, root: Rank, len: usize, segment: usize) -> Schedule {
    let (to, from) = (rank.right(world_size), rank.left(world_size));
    let mut schedule = Schedule::default();
    for span in segments(Place::Output, 0..len, segment) {
        let got = (rank != root).then(|| schedule.push(Action::Recv { from, span }, [None, None]));
        if to != root {
            schedule.push(Action::Send { to, span }, [got, None]);
        }
    }
    schedule
}
