//! Pure: schedules whose number of steps grows with the logarithm of the world size.

use crate::chunk::segments;
use crate::{Action, Place, Schedule, StepId};
use gradwire_transport::{Rank, WorldSize};

/// Binomial-tree broadcast from `root`.
pub fn broadcast(rank: Rank, world_size: WorldSize, root: Rank, len: usize, segment: usize) -> Schedule {
    let n = world_size.get();
    let place = (rank.0 + n - root.0) % n;
    let at = |place: u32| Rank((place + root.0) % n);
    // A rank's parent differs from it in its lowest set bit; its children in the bits below that.
    let low = if place == 0 { n.next_power_of_two() } else { 1 << place.trailing_zeros() };
    let mut schedule = Schedule::default();
    for span in segments(Place::Output, 0..len, segment) {
        let got = (place != 0).then(|| schedule.push(Action::Recv { from: at(place - low), span }, [None, None]));
        let mut bit = low >> 1;
        while bit > 0 {
            if place + bit < n {
                schedule.push(Action::Send { to: at(place + bit), span }, [got, None]);
            }
            bit >>= 1;
        }
    }
    schedule
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
