//! Pure: 8-bit numbers with a scale for each block, which lies before its numbers.
//!
//! Every loop runs over whole slices with integer maxima and one addition, so that the compiler makes vectors of it.

use super::BadPayload;

/// Elements that share a scale.
pub(crate) const BLOCK_ELEMENTS: usize = 128;
/// Bytes of a full block.
const BLOCK_BYTES: usize = SCALE_BYTES + BLOCK_ELEMENTS;
const SCALE_BYTES: usize = 4;
/// The largest code; -128 is not used by us, so that both signs reach as far.
const MOST: f32 = 127.0;
/// Added to a number of magnitude up to 2^22, it leaves the nearest whole number in the low bits, ties to even.
const ROUNDER: f32 = 12_582_912.0;
/// A larger scale could decode to infinity.
const LARGEST_SCALE: f32 = f32::MAX / 128.0;
const INFINITE: u32 = 0x7f80_0000;

pub(super) fn bytes(elements: usize) -> usize {
    elements + SCALE_BYTES * elements.div_ceil(BLOCK_ELEMENTS)
}

/// Writes `values`. A block with something that is not finite gets a scale that is no number.
pub(super) fn encode(values: &[f32], to: &mut [u8]) {
    for (values, to) in values.chunks(BLOCK_ELEMENTS).zip(to.chunks_mut(BLOCK_BYTES)) {
        // Magnitudes are ordered as their bits are.
        let largest = values.iter().fold(0, |most, value| (value.to_bits() & 0x7fff_ffff).max(most));
        let (scale, inverse) = scale_of(largest);
        let (head, codes) = to.split_at_mut(SCALE_BYTES);
        head.copy_from_slice(&scale.to_le_bytes());
        for (code, value) in codes.iter_mut().zip(values) {
            *code = (*value * inverse + ROUNDER).to_bits() as u8;
        }
    }
}

pub(super) fn decode(payload: &[u8], to: &mut [f32]) {
    for (to, block) in to.chunks_mut(BLOCK_ELEMENTS).zip(payload.chunks(BLOCK_BYTES)) {
        let (head, codes) = block.split_at(SCALE_BYTES);
        let scale = scale_at(head);
        to.iter_mut().zip(codes).for_each(|(to, code)| *to = f32::from(*code as i8) * scale);
    }
}

/// Checks the scales; the length has been.
pub(super) fn check(payload: &[u8]) -> Result<(), BadPayload> {
    let mut scales = payload.chunks(BLOCK_BYTES).map(|block| scale_at(&block[..SCALE_BYTES]));
    let bad = scales.find(|scale| !(0.0..=LARGEST_SCALE).contains(scale));
    bad.map_or(Ok(()), |scale| Err(BadPayload::Scale(scale)))
}

fn scale_at(head: &[u8]) -> f32 {
    f32::from_le_bytes([head[0], head[1], head[2], head[3]])
}

/// The scale of a block whose largest magnitude has these bits, and what its elements are multiplied by.
fn scale_of(largest: u32) -> (f32, f32) {
    if largest >= INFINITE {
        return (f32::NAN, 0.0);
    }
    let largest = f32::from_bits(largest);
    let scale = largest / MOST;
    // So small a block is 0: its inverse would be infinite.
    if scale < f32::MIN_POSITIVE { (0.0, 0.0) } else { (scale, MOST / largest) }
}
