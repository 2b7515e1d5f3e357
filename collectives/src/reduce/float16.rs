//! Pure: 16-bit floats, computed with as `f32`; rounded to nearest, ties to even.

use super::kernel::{BLOCK, Kind, Op};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

impl Kind for bf16 {
    type Value = f32;
    const BYTES: usize = 2;

    #[inline(always)]
    fn load(bytes: &[u8], values: &mut [f32]) {
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
    }

    #[inline(always)]
    fn store(values: &[f32], bytes: &mut [u8]) {
        for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
            let bits = value.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            // A NaN must not be rounded to infinity: keep its top and make it quiet.
            let bits = if value.is_nan() { bits >> 16 | 0x40 } else { rounded };
            *bytes = (bits as u16).to_le_bytes();
        }
    }

    #[inline(always)]
    fn divide(value: f32, by: usize) -> f32 {
        value / by as f32
    }

    #[inline(always)]
    fn pair<O: Op<f32>>(own: &mut [u8], other: &[u8]) -> bool {
        for (own, other) in own.as_chunks_mut::<2>().0.iter_mut().zip(other.as_chunks::<2>().0) {
            let (mut a, mut b) = ([0.0], [0.0]);
            Self::load(own, &mut a);
            Self::load(other, &mut b);
            Self::store(&[O::apply(a[0], b[0])], own);
        }
        true
    }
}

impl Kind for f16 {
    type Value = f32;
    const BYTES: usize = 2;

    fn load(bytes: &[u8], values: &mut [f32]) {
        let mut block = [f16::ZERO; BLOCK];
        let block = &mut block[..values.len()];
        for (half, bytes) in block.iter_mut().zip(bytes.as_chunks().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        block.convert_to_f32_slice(values);
    }

    fn store(values: &[f32], bytes: &mut [u8]) {
        let mut block = [f16::ZERO; BLOCK];
        let block = &mut block[..values.len()];
        block.convert_from_f32_slice(values);
        for (half, bytes) in block.iter().zip(bytes.as_chunks_mut().0) {
            *bytes = half.to_le_bytes();
        }
    }

    fn divide(value: f32, by: usize) -> f32 {
        value / by as f32
    }

    fn pair<O: Op<f32>>(_own: &mut [u8], _other: &[u8]) -> bool {
        false
    }
}
