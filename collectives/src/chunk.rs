//! Pure: how a buffer is cut: into one chunk per rank, and a chunk into segments.

use crate::{Place, Span};
use std::ops::Range;

/// Elements to which cuts are rounded, where there are enough: no cache line belongs to two chunks.
const ALIGN: usize = 64;

/// Chunk `index` of `count` of `len` elements; the last ones may be shorter, or empty.
pub fn chunk(len: usize, count: usize, index: usize) -> Range<usize> {
    let even = len.div_ceil(count);
    let size = if even > 4 * ALIGN { even.next_multiple_of(ALIGN) } else { even };
    (index * size).min(len)..((index + 1) * size).min(len)
}

/// The segments of `range` of `place`, of at most `segment` elements each.
pub fn segments(place: Place, range: Range<usize>, segment: usize) -> impl Iterator<Item = Span> + Clone {
    range.clone().step_by(segment.max(1)).map(move |start| Span { place, start, len: segment.min(range.end - start) })
}

/// Where the parts of the given lengths begin and end, one after the other.
pub fn parts(lens: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    lens.iter()
        .map(|len| {
            end += len;
            end - len..end
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_segments_cover_everything_once() {
        for count in 1..=33 {
            for len in [0, 1, count - 1, count, count + 1, 1000, 8192, 100_003] {
                let mut next = 0;
                for index in 0..count {
                    let chunk = chunk(len, count, index);
                    assert_eq!(chunk.start, next);
                    next = chunk.end;
                    let mut at = chunk.start;
                    for span in segments(Place::Output, chunk.clone(), 97) {
                        assert!(span.start == at && span.len > 0 && span.len <= 97);
                        at += span.len;
                    }
                    assert_eq!(at, chunk.end);
                }
                assert_eq!(next, len);
            }
        }
    }
}
