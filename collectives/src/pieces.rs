//! Pure: which bytes of a call's pieces are which rank's.

use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;

/// As much of `range` as lies within `len`.
pub(crate) fn within(range: &Range<usize>, len: usize) -> Range<usize> {
    range.start.min(len)..range.end.min(len)
}

/// `rank`'s part: a piece of its own, or its share of the one piece.
pub(crate) fn part<'a>(pieces: &[&'a [u8]], rank: Rank, world_size: WorldSize) -> &'a [u8] {
    let n = world_size.get() as usize;
    match pieces {
        [all] if n > 1 => &all[all.len() / n * rank.index()..][..all.len() / n],
        pieces => pieces[rank.index()],
    }
}

/// The same, to be written.
pub(crate) fn part_mut<'a>(pieces: &'a mut [&mut [u8]], rank: Rank, world_size: WorldSize) -> &'a mut [u8] {
    let n = world_size.get() as usize;
    if pieces.len() == 1 && n > 1 {
        let len = pieces[0].len() / n;
        return &mut pieces[0][len * rank.index()..][..len];
    }
    &mut *pieces[rank.index()]
}
