//! Pure: the loops over 16-bit floats, which are widened and rounded some registers at a time.

use super::kernel::{Block, Kind, Op};
use super::level::Instructions;
use std::marker::PhantomData;

/// Values in one register, or some.
pub(super) const LANES: usize = 16;
/// Elements that are computed with at a time, and their bytes.
pub(super) const WIDE: usize = 2 * LANES;
pub(super) type Halves = [u8; 2 * WIDE];
/// What they are computed with as. Arrays longer than these would lie in memory.
pub(super) type Wide = [[f32; LANES]; 2];

/// A type of element that becomes `f32` and back.
pub(super) trait Half {
    /// The values, in an order of the type's own.
    fn widen<I: Instructions>(halves: &Halves) -> Wide;
    /// The nearest elements to values in that order, ties to even; a NaN becomes the one that all share.
    fn narrow<I: Instructions>(values: Wide) -> Halves;
}

/// Elements of type `F`, computed with as `f32`.
pub(super) struct Packed<F>(PhantomData<F>);

// Loops and no closures: one that is not inlined is compiled for a processor without these instructions.

#[inline(always)]
fn apply<O: Op<f32>>(a: Wide, b: Wide) -> Wide {
    let mut values = a;
    for half in 0..2 {
        for lane in 0..LANES {
            values[half][lane] = O::apply(a[half][lane], b[half][lane]);
        }
    }
    values
}

#[inline(always)]
fn finish<F: Half, I: Instructions, O: Op<f32>>(mut values: Wide, divisor: usize) -> Halves {
    for lanes in &mut values {
        for value in lanes {
            *value = O::finish(*value, divisor);
        }
    }
    F::narrow::<I>(values)
}

/// Whole runs of elements, and what is left over.
#[inline(always)]
fn runs(bytes: &[u8]) -> (&[Halves], &[u8]) {
    bytes.as_chunks()
}

#[inline(always)]
fn runs_mut(bytes: &mut [u8]) -> (&mut [Halves], &mut [u8]) {
    bytes.as_chunks_mut()
}

/// What is left over, filled up with zeros.
#[inline(always)]
fn padded(rest: &[u8]) -> Halves {
    let mut padded = [0; 2 * WIDE];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

impl<F: Half> Kind for Packed<F> {
    type Value = f32;
    const BYTES: usize = 2;

    #[inline(always)]
    fn alone<I: Instructions, O: Op<f32>>(own: &mut [u8], divisor: usize) {
        let (own, rest) = runs_mut(own);
        for own in own {
            *own = finish::<F, I, O>(F::widen::<I>(own), divisor);
        }
        if !rest.is_empty() {
            let last = finish::<F, I, O>(F::widen::<I>(&padded(rest)), divisor);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }

    #[inline(always)]
    fn pair<I: Instructions, O: Op<f32>>(own: &mut [u8], other: &[u8], divisor: usize) {
        let ((own, rest), (other, other_rest)) = (runs_mut(own), runs(other));
        for (own, other) in own.iter_mut().zip(other) {
            *own = finish::<F, I, O>(apply::<O>(F::widen::<I>(own), F::widen::<I>(other)), divisor);
        }
        if !rest.is_empty() {
            let last = apply::<O>(F::widen::<I>(&padded(rest)), F::widen::<I>(&padded(other_rest)));
            rest.copy_from_slice(&finish::<F, I, O>(last, divisor)[..rest.len()]);
        }
    }

    #[inline(always)]
    fn first<I: Instructions, O: Op<f32>>(values: &mut Block<Self>, one: &[u8], other: &[u8]) {
        let ((one, one_rest), (other, other_rest)) = (runs(one), runs(other));
        let mut values = values.as_chunks_mut().0.as_chunks_mut::<2>().0.iter_mut();
        for ((one, other), values) in one.iter().zip(other).zip(&mut values) {
            *values = apply::<O>(F::widen::<I>(one), F::widen::<I>(other));
        }
        if let Some(values) = values.next() {
            *values = apply::<O>(F::widen::<I>(&padded(one_rest)), F::widen::<I>(&padded(other_rest)));
        }
    }

    #[inline(always)]
    fn next<I: Instructions, O: Op<f32>>(values: &mut Block<Self>, input: &[u8]) {
        let (input, rest) = runs(input);
        let mut values = values.as_chunks_mut().0.as_chunks_mut::<2>().0.iter_mut();
        for (input, values) in input.iter().zip(&mut values) {
            *values = apply::<O>(*values, F::widen::<I>(input));
        }
        if let Some(values) = values.next() {
            *values = apply::<O>(*values, F::widen::<I>(&padded(rest)));
        }
    }

    #[inline(always)]
    fn last<I: Instructions, O: Op<f32>>(values: &Block<Self>, input: &[u8], own: &mut [u8], divisor: usize) {
        let ((own, rest), (input, input_rest)) = (runs_mut(own), runs(input));
        let mut values = values.as_chunks().0.as_chunks::<2>().0.iter();
        for ((own, input), values) in own.iter_mut().zip(input).zip(&mut values) {
            *own = finish::<F, I, O>(apply::<O>(*values, F::widen::<I>(input)), divisor);
        }
        if let Some(values) = values.next() {
            let last = apply::<O>(*values, F::widen::<I>(&padded(input_rest)));
            rest.copy_from_slice(&finish::<F, I, O>(last, divisor)[..rest.len()]);
        }
    }

    #[inline(always)]
    fn last_own<I: Instructions, O: Op<f32>>(values: &Block<Self>, own: &mut [u8], divisor: usize) {
        let (own, rest) = runs_mut(own);
        let mut values = values.as_chunks().0.as_chunks::<2>().0.iter();
        for (own, values) in own.iter_mut().zip(&mut values) {
            *own = finish::<F, I, O>(apply::<O>(*values, F::widen::<I>(own)), divisor);
        }
        if let Some(values) = values.next() {
            let last = apply::<O>(*values, F::widen::<I>(&padded(rest)));
            rest.copy_from_slice(&finish::<F, I, O>(last, divisor)[..rest.len()]);
        }
    }
}
