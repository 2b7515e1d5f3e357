//! Does: float16, computed with as `f32`; rounded to nearest, ties to even, by the processor where it can.

#![allow(unsafe_code)]

use super::kernel::{Kind, Op};
use super::level::Instructions;
use half::f16;

/// Elements of an `f16` buffer that are converted by one instruction.
const WIDE: usize = 8;

/// `WIDE` elements as `f32`.
#[inline(always)]
fn widen<I: Instructions>(halves: &[[u8; 2]; WIDE]) -> [f32; WIDE] {
    #[cfg(target_arch = "x86_64")]
    if I::F16C {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        let mut values = [0.0; WIDE];
        // SAFETY: `halves` are 16 readable bytes; SSE2 is part of x86-64.
        let halves = unsafe { _mm_loadu_si128(halves.as_ptr().cast()) };
        // SAFETY: `I` says that the processor has F16C.
        let singles = unsafe { _mm256_cvtph_ps(halves) };
        // SAFETY: `values` are 32 writable bytes; F16C comes with AVX.
        unsafe { _mm256_storeu_ps(values.as_mut_ptr(), singles) };
        return values;
    }
    halves.map(|half| f16::from_le_bytes(half).to_f32())
}

/// `values` rounded; a NaN becomes the one that all share.
#[inline(always)]
fn narrow<I: Instructions>(values: [f32; WIDE]) -> [[u8; 2]; WIDE] {
    let values = values.map(|value| if value.is_nan() { f32::NAN } else { value });
    #[cfg(target_arch = "x86_64")]
    if I::F16C {
        use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps};
        let mut halves = [[0; 2]; WIDE];
        // SAFETY: `values` are 32 readable bytes; F16C comes with AVX.
        let singles = unsafe { _mm256_loadu_ps(values.as_ptr()) };
        // SAFETY: `I` says that the processor has F16C.
        let rounded = unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(singles) };
        // SAFETY: `halves` are 16 writable bytes; SSE2 is part of x86-64.
        unsafe { _mm_storeu_si128(halves.as_mut_ptr().cast(), rounded) };
        return halves;
    }
    values.map(|value| f16::from_f32(value).to_le_bytes())
}

/// `own ∘ other`, finished. No closure: one would be compiled for a processor without F16C.
#[inline(always)]
fn both<I: Instructions, O: Op<f32>>(
    own: &[[u8; 2]; WIDE],
    other: &[[u8; 2]; WIDE],
    divisor: usize,
) -> [[u8; 2]; WIDE] {
    let (a, b) = (widen::<I>(own), widen::<I>(other));
    narrow::<I>(std::array::from_fn(|i| O::finish(O::apply(a[i], b[i]), divisor)))
}

impl Kind for f16 {
    type Value = f32;
    const BYTES: usize = 2;

    #[inline(always)]
    fn load<I: Instructions>(bytes: &[u8], values: &mut [f32]) {
        let (halves, last) = bytes.as_chunks::<2>().0.as_chunks::<WIDE>();
        let (values, rest) = values.as_chunks_mut::<WIDE>();
        for (values, halves) in values.iter_mut().zip(halves) {
            *values = widen::<I>(halves);
        }
        for (value, half) in rest.iter_mut().zip(last) {
            *value = widen::<I>(&[*half; WIDE])[0];
        }
    }

    #[inline(always)]
    fn combine<I: Instructions, O: Op<f32>>(values: &mut [f32], bytes: &[u8]) {
        let (halves, last) = bytes.as_chunks::<2>().0.as_chunks::<WIDE>();
        let (values, rest) = values.as_chunks_mut::<WIDE>();
        for (values, halves) in values.iter_mut().zip(halves) {
            let more = widen::<I>(halves);
            *values = std::array::from_fn(|i| O::apply(values[i], more[i]));
        }
        for (value, half) in rest.iter_mut().zip(last) {
            *value = O::apply(*value, widen::<I>(&[*half; WIDE])[0]);
        }
    }

    #[inline(always)]
    fn store<I: Instructions, O: Op<f32>>(values: &[f32], bytes: &mut [u8], divisor: usize) {
        let (halves, last) = bytes.as_chunks_mut::<2>().0.as_chunks_mut::<WIDE>();
        let (values, rest) = values.as_chunks::<WIDE>();
        for (values, halves) in values.iter().zip(halves) {
            *halves = narrow::<I>(values.map(|value| O::finish(value, divisor)));
        }
        for (value, half) in rest.iter().zip(last) {
            *half = narrow::<I>([O::finish(*value, divisor); WIDE])[0];
        }
    }

    #[inline(always)]
    fn pair<I: Instructions, O: Op<f32>>(own: &mut [u8], other: &[u8], divisor: usize) -> bool {
        let (own, rest) = own.as_chunks_mut::<2>().0.as_chunks_mut::<WIDE>();
        let (other, last) = other.as_chunks::<2>().0.as_chunks::<WIDE>();
        for (own, other) in own.iter_mut().zip(other) {
            *own = both::<I, O>(own, other, divisor);
        }
        for (own, other) in rest.iter_mut().zip(last) {
            *own = both::<I, O>(&[*own; WIDE], &[*other; WIDE], divisor)[0];
        }
        true
    }
}
