//! Does: float16 to `f32` and back, by the processor where it can.

#![allow(unsafe_code)]

use super::level::Instructions;
use super::packed::{Half, Halves, LANES, WIDE, Wide};
use half::f16;

/// Ties to even.
#[cfg(target_arch = "x86_64")]
const NEAREST: i32 = std::arch::x86_64::_MM_FROUND_TO_NEAREST_INT;

impl Half for f16 {
    #[inline(always)]
    fn widen<I: Instructions>(halves: &Halves) -> Wide {
        let [lower, upper] = halves.as_chunks().0 else { unreachable!("two registers of values") };
        [widen::<I>(lower), widen::<I>(upper)]
    }

    #[inline(always)]
    fn narrow<I: Instructions>([lower, upper]: Wide) -> Halves {
        let mut halves = [0; 2 * WIDE];
        let [to_lower, to_upper] = halves.as_chunks_mut().0 else { unreachable!("two registers of values") };
        *to_lower = narrow::<I>(lower);
        *to_upper = narrow::<I>(upper);
        halves
    }
}

#[inline(always)]
fn widen<I: Instructions>(halves: &[u8; 2 * LANES]) -> [f32; LANES] {
    let mut values = [0.0; LANES];
    #[cfg(target_arch = "x86_64")]
    if I::F16C {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        for (values, halves) in values.as_chunks_mut::<8>().0.iter_mut().zip(halves.as_chunks::<16>().0) {
            // SAFETY: `halves` are 16 readable bytes; SSE2 is part of x86-64.
            let halves = unsafe { _mm_loadu_si128(halves.as_ptr().cast()) };
            // SAFETY: `I` says that the processor has F16C.
            let singles = unsafe { _mm256_cvtph_ps(halves) };
            // SAFETY: `values` are 32 writable bytes; F16C comes with AVX.
            unsafe { _mm256_storeu_ps(values.as_mut_ptr(), singles) };
        }
        return values;
    }
    for (value, half) in values.iter_mut().zip(halves.as_chunks().0) {
        *value = f16::from_le_bytes(*half).to_f32();
    }
    values
}

/// `values` rounded; a NaN becomes the one that all share.
#[inline(always)]
fn narrow<I: Instructions>(mut values: [f32; LANES]) -> [u8; 2 * LANES] {
    for value in &mut values {
        *value = if value.is_nan() { f32::NAN } else { *value };
    }
    let mut halves = [0; 2 * LANES];
    #[cfg(target_arch = "x86_64")]
    if I::F16C {
        use std::arch::x86_64::{_mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps};
        for (halves, values) in halves.as_chunks_mut::<16>().0.iter_mut().zip(values.as_chunks::<8>().0) {
            // SAFETY: `values` are 32 readable bytes; F16C comes with AVX.
            let singles = unsafe { _mm256_loadu_ps(values.as_ptr()) };
            // SAFETY: `I` says that the processor has F16C.
            let rounded = unsafe { _mm256_cvtps_ph::<NEAREST>(singles) };
            // SAFETY: `halves` are 16 writable bytes; SSE2 is part of x86-64.
            unsafe { _mm_storeu_si128(halves.as_mut_ptr().cast(), rounded) };
        }
        return halves;
    }
    for (half, value) in halves.as_chunks_mut().0.iter_mut().zip(values) {
        *half = f16::from_f32(value).to_le_bytes();
    }
    halves
}
