//! Pure: the least and the greatest of 16-bit floats, found among whole numbers that are ordered as the floats are.
//!
//! The bits of a float, those of its size turned over where it is negative, are such a number; minus zero comes before zero. Those
//! of NaN lie beyond both infinities: the numbers are shifted by as many as there are of either sign, around the end of what 16
//! bits hold, so that all lie on the side that wins.

use super::kernel::Element;
use half::{bf16, f16};
use std::marker::PhantomData;

/// A 16-bit float.
pub(super) trait Float16 {
    const INFINITY: i16;
    const NAN: i16;
}

impl Float16 for f16 {
    const INFINITY: i16 = f16::INFINITY.to_bits() as i16;
    const NAN: i16 = f16::NAN.to_bits() as i16;
}

impl Float16 for bf16 {
    const INFINITY: i16 = bf16::INFINITY.to_bits() as i16;
    const NAN: i16 = bf16::NAN.to_bits() as i16;
}

/// Elements of type `F` as numbers among which NaN is the least.
pub(super) struct Least<F>(PhantomData<F>);
/// Elements of type `F` as numbers among which NaN is the greatest.
pub(super) struct Greatest<F>(PhantomData<F>);

/// From bits to ordered numbers, and back.
#[inline(always)]
fn turned(bits: i16) -> i16 {
    bits ^ (bits >> 15 & 0x7fff)
}

#[inline(always)]
fn bits<F: Float16>(number: i16) -> [u8; 2] {
    let bits = turned(number);
    (if bits & 0x7fff > F::INFINITY { F::NAN } else { bits }).to_le_bytes()
}

/// The bit patterns of NaN of either sign.
const fn nans<F: Float16>() -> i16 {
    i16::MAX - F::INFINITY
}

impl<F: Float16> Element for Least<F> {
    type Value = i16;
    type Bytes = [u8; 2];

    #[inline(always)]
    fn get(bytes: [u8; 2]) -> i16 {
        turned(i16::from_le_bytes(bytes)).wrapping_add(nans::<F>())
    }

    #[inline(always)]
    fn put(value: i16) -> [u8; 2] {
        bits::<F>(value.wrapping_sub(nans::<F>()))
    }
}

impl<F: Float16> Element for Greatest<F> {
    type Value = i16;
    type Bytes = [u8; 2];

    #[inline(always)]
    fn get(bytes: [u8; 2]) -> i16 {
        turned(i16::from_le_bytes(bytes)).wrapping_sub(nans::<F>())
    }

    #[inline(always)]
    fn put(value: i16) -> [u8; 2] {
        bits::<F>(value.wrapping_add(nans::<F>()))
    }
}
