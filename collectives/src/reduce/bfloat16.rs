//! Does: bfloat16, computed with as `f32`; rounded to nearest, ties to even, by the processor where it can.
//!
//! Two neighbours lie in one word of 32 bits: the upper one is an `f32` once the lower half is cleared, the lower one after a
//! shift. So nothing has to cross the lanes of a register, at any level of instructions.

#![allow(unsafe_code)]

use super::level::Instructions;
use super::packed::{Half, Halves, LANES, WIDE, Wide};
use half::bf16;

impl Half for bf16 {
    /// First the lower elements of all words, then the upper ones.
    #[inline(always)]
    fn widen<I: Instructions>(halves: &Halves) -> Wide {
        let words = halves.as_chunks().0;
        let mut values = [[0.0; LANES]; 2];
        for lane in 0..LANES {
            let word = u32::from_le_bytes(words[lane]);
            values[0][lane] = f32::from_bits(word << 16);
            values[1][lane] = f32::from_bits(word & UPPER);
        }
        values
    }

    #[inline(always)]
    fn narrow<I: Instructions>(values: Wide) -> Halves {
        #[cfg(target_arch = "x86_64")]
        if I::BF16
            && let Some(halves) = narrow_at_once(&values)
        {
            return halves;
        }
        let mut halves = [0; 2 * WIDE];
        let words = halves.as_chunks_mut().0;
        for lane in 0..LANES {
            words[lane] = (rounded(values[0][lane]) >> 16 | rounded(values[1][lane]) & UPPER).to_le_bytes();
        }
        halves
    }
}

/// The upper element of a word.
const UPPER: u32 = 0xffff_0000;

/// The value's nearest bfloat16 in the upper half of a word; the lower half is left over.
#[inline(always)]
fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if value.is_nan() { u32::from(bf16::NAN.to_bits()) << 16 } else { rounded }
}

/// The same by one instruction; `None` where an element is not a number or denormal, of which it makes something else.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn narrow_at_once([lower, upper]: &Wide) -> Option<Halves> {
    use std::arch::x86_64::{
        __m512i, _mm512_cvtne2ps_pbh, _mm512_fpclass_ps_mask, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_permutexvar_epi16, _mm512_storeu_si512,
    };
    /// Quiet NaN, denormal, signalling NaN.
    const OTHERS: i32 = 0x01 | 0x20 | 0x80;
    /// Where each element comes from: the lower ones are converted to the first half, the upper ones to the second.
    static PLACES: [u16; WIDE] = {
        let mut places = [0; WIDE];
        let mut at = 0;
        while at < LANES {
            (places[2 * at], places[2 * at + 1]) = (at as u16, (LANES + at) as u16);
            at += 1;
        }
        places
    };
    let mut halves = [0; 2 * WIDE];
    // SAFETY: `lower` is 64 readable bytes; `I::BF16`, which guards the only call, says that the processor has AVX-512.
    let lower = unsafe { _mm512_loadu_ps(lower.as_ptr()) };
    // SAFETY: so is `upper`.
    let upper = unsafe { _mm512_loadu_ps(upper.as_ptr()) };
    // SAFETY: `I::BF16` says that the processor has AVX512DQ.
    let lower_others = unsafe { _mm512_fpclass_ps_mask::<OTHERS>(lower) };
    // SAFETY: as above.
    let upper_others = unsafe { _mm512_fpclass_ps_mask::<OTHERS>(upper) };
    if lower_others | upper_others != 0 {
        return None;
    }
    // SAFETY: `I::BF16` says that the processor has AVX512BF16.
    let both = unsafe { _mm512_cvtne2ps_pbh(upper, lower) };
    // SAFETY: both types are 64 bytes, any of which will do.
    let both: __m512i = unsafe { std::mem::transmute(both) };
    // SAFETY: `PLACES` are 64 readable bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    // SAFETY: `I::BF16` says that the processor has AVX512BW.
    let both = unsafe { _mm512_permutexvar_epi16(places, both) };
    // SAFETY: `halves` are 64 writable bytes.
    unsafe { _mm512_storeu_si512(halves.as_mut_ptr().cast(), both) };
    Some(halves)
}
