//! Pure: all-reduce in as many rounds as the world size has doublings: for short buffers of many ranks.

use crate::chunk::segments;
use crate::{Action, Place, Schedule, Span, StepId};
use gradwire_transport::{Rank, WorldSize};

/// All-reduce in place by recursive doubling (Thakur, Rabenseifner and Gropp, 2005, doi:10.1177/1094342005051521).
///
/// In round k, ranks that differ in bit k exchange all they have and both combine it; combining commutes to the bit, so
/// both hold the same, and after `log2` rounds all do. Ranks past the largest power of two give theirs to one below it
/// first and get the result from it last. A rank sends the whole buffer once a round.
///
/// What is sent is a copy in scratch: the partner's comes into the buffer without waiting for the send to end, which may
/// itself wait for the partner. `average`: whoever holds the whole sum divides it.
pub fn all_reduce(rank: Rank, world_size: WorldSize, len: usize, segment: usize, average: bool) -> Schedule {
    let n = world_size.get();
    let most = 1 << n.ilog2();
    let spans = || segments(Place::Output, 0..len, segment);
    let mut schedule = Schedule::default();
    if rank.0 >= most {
        let partner = Rank(rank.0 - most);
        let given: Vec<_> =
            spans().map(|span| schedule.push(Action::Send { to: partner, span }, [None, None])).collect();
        for (span, given) in spans().zip(given) {
            schedule.push(Action::Recv { from: partner, span }, [Some(given), None]);
        }
        return schedule;
    }
    let extra = (rank.0 + most < n).then_some(Rank(rank.0 + most));
    // The step after which each segment holds what is to be sent next.
    let mut ready: Vec<Option<StepId>> =
        spans().map(|span| extra.map(|from| schedule.push(Action::RecvReduce { from, span }, [None, None]))).collect();
    // Two copies take turns; the step after which each segment of them may be written again.
    schedule.scratch_len = len * (n.ilog2() as usize).min(2);
    let mut sent: [Vec<Option<StepId>>; 2] = [vec![None; ready.len()], vec![None; ready.len()]];
    for round in 0..n.ilog2() {
        let partner = Rank(rank.0 ^ 1 << round);
        let sent = &mut sent[round as usize % 2];
        for ((span, ready), sent) in spans().zip(&mut ready).zip(sent) {
            let copy = Span { place: Place::Scratch, start: span.start + round as usize % 2 * len, ..span };
            let copied = Some(schedule.push(Action::Copy { from: span, into: copy }, [*ready, *sent]));
            *sent = Some(schedule.push(Action::Send { to: partner, span: copy }, [copied, None]));
            *ready = Some(schedule.push(Action::RecvReduce { from: partner, span }, [copied, None]));
        }
    }
    for (span, mut ready) in spans().zip(ready) {
        if average {
            ready = Some(schedule.push(Action::Finish { span }, [ready, None]));
        }
        if let Some(to) = extra {
            schedule.push(Action::Send { to, span }, [ready, None]);
        }
    }
    schedule
}
