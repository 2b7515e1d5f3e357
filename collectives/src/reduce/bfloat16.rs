//! Does: bfloat16, computed with as `f32`; rounded to nearest, ties to even, by the processor where it can.
//!
//! Two neighbours lie in one word of 32 bits: the upper one is an `f32` once the lower half is cleared, the lower one after a
//! shift. So nothing has to cross the lanes of a register, at any level of instructions.

#![allow(unsafe_code)]

use super::kernel::{Element, Kind, Op};
use super::level::Instructions;
use half::bf16;

impl Element for bf16 {
    type Value = f32;
    type Bytes = [u8; 2];

    #[inline(always)]
    fn get(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }

    #[inline(always)]
    fn put(value: f32) -> [u8; 2] {
        ((rounded(value) >> 16) as u16).to_le_bytes()
    }
}

/// The value's nearest bfloat16 in the upper half of a word; the lower half is left over.
#[inline(always)]
fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if value.is_nan() { u32::from(bf16::NAN.to_bits()) << 16 } else { rounded }
}

/// Words that are computed with at a time.
const WIDE: usize = 16;
type Words = [[u8; 4]; WIDE];
/// The lower and the upper elements of some words.
type Halves = [[f32; WIDE]; 2];

#[inline(always)]
fn widen(words: &Words) -> Halves {
    let words = words.map(u32::from_le_bytes);
    [words.map(|word| f32::from_bits(word << 16)), words.map(|word| f32::from_bits(word & 0xffff_0000))]
}

/// The words of rounded elements.
#[inline(always)]
fn narrow<I: Instructions>(halves: Halves) -> Words {
    #[cfg(target_arch = "x86_64")]
    if I::BF16
        && let Some(words) = narrow_at_once(&halves)
    {
        return words;
    }
    let [lower, upper] = halves;
    std::array::from_fn(|i| (rounded(lower[i]) >> 16 | rounded(upper[i]) & 0xffff_0000).to_le_bytes())
}

/// The same by one instruction; `None` where an element is not a number or denormal, of which it makes something else.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn narrow_at_once([lower, upper]: &Halves) -> Option<Words> {
    use std::arch::x86_64::{
        __m512i, _mm512_cvtne2ps_pbh, _mm512_fpclass_ps_mask, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_permutexvar_epi16, _mm512_storeu_si512,
    };
    /// Quiet NaN, denormal, signalling NaN.
    const OTHERS: i32 = 0x01 | 0x20 | 0x80;
    /// Where each element comes from: the lower ones are converted to the first half, the upper ones to the second.
    static PLACES: [u16; 2 * WIDE] = {
        let mut places = [0; 2 * WIDE];
        let mut at = 0;
        while at < WIDE {
            (places[2 * at], places[2 * at + 1]) = (at as u16, (WIDE + at) as u16);
            at += 1;
        }
        places
    };
    let mut words = [[0; 4]; WIDE];
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
    // SAFETY: `words` are 64 writable bytes.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), both) };
    Some(words)
}

/// `own ∘ other`, finished.
#[inline(always)]
fn both<I: Instructions, O: Op<f32>>(own: &Words, other: &Words, divisor: usize) -> Words {
    let ([a, b], [c, d]) = (widen(own), widen(other));
    let of = |one: [f32; WIDE], other: [f32; WIDE]| -> [f32; WIDE] {
        std::array::from_fn(|i| O::finish(O::apply(one[i], other[i]), divisor))
    };
    narrow::<I>([of(a, c), of(b, d)])
}

impl Kind for bf16 {
    type Value = f32;
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<I: Instructions>(bytes: &[u8], values: &mut [f32]) {
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = Self::get(*bytes);
        }
    }

    #[inline(always)]
    fn combine<I: Instructions, O: Op<f32>>(values: &mut [f32], bytes: &[u8]) {
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *value = O::apply(*value, Self::get(*bytes));
        }
    }

    #[inline(always)]
    fn store<I: Instructions, O: Op<f32>>(values: &[f32], bytes: &mut [u8], divisor: usize) {
        for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<2>().0) {
            *bytes = Self::put(O::finish(*value, divisor));
        }
    }

    #[inline(always)]
    fn pair<I: Instructions, O: Op<f32>>(own: &mut [u8], other: &[u8], divisor: usize) -> bool {
        let (own, rest) = own.as_chunks_mut::<{ 4 * WIDE }>();
        let (other, last) = other.as_chunks::<{ 4 * WIDE }>();
        for (own, other) in own.iter_mut().zip(other) {
            let words = |bytes: &[u8; 4 * WIDE]| -> Words { std::array::from_fn(|i| bytes.as_chunks::<4>().0[i]) };
            *own = *both::<I, O>(&words(own), &words(other), divisor).as_flattened().first_chunk().expect("as many");
        }
        for (own, other) in rest.as_chunks_mut::<2>().0.iter_mut().zip(last.as_chunks::<2>().0) {
            *own = Self::put(O::finish(O::apply(Self::get(*own), Self::get(*other)), divisor));
        }
        true
    }
}
