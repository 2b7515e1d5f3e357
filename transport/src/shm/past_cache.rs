//! Does: copies past the cache, for results that nobody reads soon, and for what a core without a cache in common reads.

#![allow(unsafe_code)]

/// Copies `src` to `dst` (of the same length) with stores that do not read the destination's lines first: a third less
/// memory traffic for buffers larger than the cache.
pub fn copy_streaming(dst: &mut [u8], src: &[u8]) {
    assert_eq!(dst.len(), src.len(), "a copy keeps the length");
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
        /// A line of the cache, which is written as a whole: half of one would be read first.
        #[repr(align(64))]
        struct Line([__m128i; 4]);
        // SAFETY: every bit pattern is a value of both types.
        let (head, body, tail) = unsafe { dst.align_to_mut::<Line>() };
        let (first, rest) = src.split_at(head.len());
        head.copy_from_slice(first);
        let (middle, last) = rest.split_at(size_of_val(body));
        for (line, bytes) in body.iter_mut().zip(middle.as_chunks::<64>().0) {
            for (slot, bytes) in line.0.iter_mut().zip(bytes.as_chunks::<16>().0) {
                // SAFETY: `bytes` are 16 readable bytes; SSE2 is part of x86-64.
                let value = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
                // SAFETY: `slot` is 16 writable, aligned bytes; SSE2 is part of x86-64.
                unsafe { _mm_stream_si128(slot, value) };
            }
        }
        tail.copy_from_slice(last);
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    dst.copy_from_slice(src);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streaming_copy_copies_whatever_the_alignment() {
        let source: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        for (from, to, len) in [(0, 0, 1000), (1, 3, 900), (5, 0, 0), (7, 9, 17), (0, 15, 1)] {
            let mut target = vec![0; 1100];
            copy_streaming(&mut target[to..to + len], &source[from..from + len]);
            assert_eq!(target[to..to + len], source[from..from + len]);
        }
    }
}
