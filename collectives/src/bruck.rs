//! Pure: exchanges in as many rounds as the world size has doublings, for many ranks with little to say: what is far away
//! travels in several hops, together with all else that goes the same way (Bruck, Ho, Kipnis, Upfal and Weathersby, 1997,
//! doi:10.1109/71.642949).

use crate::chunk::segments;
use crate::draft::Draft;
use crate::{Place, Schedule, Span};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// All-gather of parts of any lengths, which every rank knows.
///
/// Scratch holds the parts in the order in which they lie to the right of this rank; each round doubles how many there are.
pub fn all_gather(rank: Rank, world_size: WorldSize, parts: &[Range<usize>], segment: usize) -> Schedule {
    let (n, me) = (world_size.get() as usize, rank.index());
    let mut draft = Draft::default();
    // Where in scratch the part `distance` places to the right begins.
    let mut begins = vec![0; n + 1];
    for distance in 0..n {
        begins[distance + 1] = begins[distance] + parts[(me + distance) % n].len();
    }
    let scratch = |range: Range<usize>| Span { place: Place::Scratch, start: range.start, len: range.len() };
    draft.copy(Span { place: Place::Input, start: 0, len: parts[me].len() }, scratch(0..begins[1]));
    let mut have = 1;
    while have < n {
        let more = have.min(n - have);
        let (to, from) = (Rank(((me + n - have) % n) as u32), Rank(((me + have) % n) as u32));
        segments(Place::Scratch, 0..begins[more], segment).for_each(|span| draft.send(to, span));
        segments(Place::Scratch, begins[have]..begins[have + more], segment).for_each(|span| draft.recv(from, span));
        have += more;
    }
    for distance in 0..n {
        let part = parts[(me + distance) % n].clone();
        let into = Span { place: Place::Output, start: part.start, len: part.len() };
        draft.copy(scratch(begins[distance]..begins[distance + 1]), into);
    }
    draft.into_schedule(begins[n])
}

/// All-to-all of parts of `len` elements each, in input and output.
///
/// What goes `distance` places to the right is sent on in the rounds of the bits of `distance`, packed with all else that
/// moves in that round: half of the buffer a round.
pub fn all_to_all(rank: Rank, world_size: WorldSize, len: usize, segment: usize) -> Schedule {
    let (n, me) = (world_size.get() as usize, rank.index());
    let mut draft = Draft::default();
    // Where what goes `distance` places lies now.
    let mut held: Vec<Span> =
        (0..n).map(|distance| Span { place: Place::Input, start: (me + distance) % n * len, len }).collect();
    let (mut distance, mut end) = (1, 0);
    while distance < n {
        let moving: Vec<usize> = (0..n).filter(|place| place & distance != 0).collect();
        let (to, from) = (Rank(((me + distance) % n) as u32), Rank(((me + n - distance) % n) as u32));
        let packed = end..end + moving.len() * len;
        let unpacked = packed.end..packed.end + packed.len();
        for (at, &place) in moving.iter().enumerate() {
            draft.copy(held[place], Span { place: Place::Scratch, start: packed.start + at * len, len });
            held[place] = Span { place: Place::Scratch, start: unpacked.start + at * len, len };
        }
        segments(Place::Scratch, packed, segment).for_each(|span| draft.send(to, span));
        segments(Place::Scratch, unpacked.clone(), segment).for_each(|span| draft.recv(from, span));
        (end, distance) = (unpacked.end, distance * 2);
    }
    for (distance, held) in held.into_iter().enumerate() {
        draft.copy(held, Span { place: Place::Output, start: (me + n - distance) % n * len, len });
    }
    draft.into_schedule(end)
}
