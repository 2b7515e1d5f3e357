//! Pure: a part's value as its table's codec writes it: made once for each value, whoever asks for it.

use crate::DType;
use crate::codec::Codec;
use crate::kernel::{BLOCK, Real};
use gradwire_transport::{Region, RegionSlice};
use std::sync::Arc;

/// The encoded value, and buffers for the next one.
pub(super) struct Encoded {
    codec: Codec,
    /// Which value the first buffer holds.
    version: Option<u64>,
    /// Two are enough where readers keep up: one is being sent while the other is written.
    buffers: Vec<Arc<Region>>,
}

impl Encoded {
    pub(super) fn new(codec: Codec) -> Self {
        Self { codec, version: None, buffers: Vec::new() }
    }

    /// `value`, of elements of type `dtype`, encoded; `version` tells one value from another.
    pub(super) fn of(&mut self, version: u64, dtype: DType, value: &[u8]) -> RegionSlice {
        let elements = value.len() / dtype.bytes();
        let length = self.codec.bytes(elements).expect("a table that encodes has a codec of a fixed length");
        if self.version != Some(version) {
            let free = self.buffers.iter().position(|buffer| buffer.write(0..length).is_ok());
            let buffer = match free {
                Some(at) => self.buffers.swap_remove(at),
                None => Region::zeroed(length),
            };
            self.buffers.truncate(1);
            {
                let mut to = buffer.write(0..length).expect("nobody else knows this buffer, or has a slice of it");
                encode(self.codec, dtype, value, &mut to);
            }
            self.buffers.insert(0, buffer);
            self.version = Some(version);
        }
        self.buffers[0].read(0..length).expect("a value is written within one call")
    }
}

/// Bytes that encoded values take for each element at most.
pub(super) fn encoded_bytes(codec: Codec) -> u64 {
    // Two buffers of at most two bytes an element.
    if codec == Codec::Whole { 0 } else { 4 }
}

fn encode(codec: Codec, dtype: DType, value: &[u8], to: &mut [u8]) {
    let mut block = [0.0f32; BLOCK];
    let each = codec.bytes(BLOCK).expect("asked before").max(1);
    for (value, to) in value.chunks(BLOCK * dtype.bytes()).zip(to.chunks_mut(each)) {
        let block = &mut block[..value.len() / dtype.bytes()];
        narrow(dtype, value, block);
        codec.encode_values(block, to);
    }
}

/// Elements of any type as `f32`.
pub(crate) fn narrow(dtype: DType, from: &[u8], to: &mut [f32]) {
    match dtype {
        DType::F64 => {
            let numbers = from.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes));
            to.iter_mut().zip(numbers).for_each(|(to, number)| *to = number as f32);
        }
        _ => f32::load(dtype, from, to),
    }
}

/// Writes `f32` as elements of any type.
pub(crate) fn widen(dtype: DType, from: &[f32], to: &mut [u8]) {
    match dtype {
        DType::F64 => {
            let numbers = from.iter().map(|&number| f64::from(number).to_le_bytes());
            to.as_chunks_mut().0.iter_mut().zip(numbers).for_each(|(to, number)| *to = number);
        }
        _ => f32::store(dtype, from, to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_encoded_once_and_stays_while_it_is_being_sent() {
        let value = |number: f32| number.to_le_bytes().repeat(1100);
        let mut encoded = Encoded::new(Codec::Int8);
        let first = encoded.of(1, DType::F32, &value(1.0));
        let again = encoded.of(1, DType::F32, &value(9.0));
        assert_eq!((first.as_ptr(), &first[..]), (again.as_ptr(), &again[..]));
        let before = first.to_vec();
        for version in 2..5 {
            let next = encoded.of(version, DType::F32, &value(version as f32));
            let mut got = vec![0.0; 1100];
            Codec::Int8.decode(&next, &mut got);
            assert_eq!(got, vec![version as f32; 1100]);
            assert_eq!(first[..], before);
        }
        assert!(encoded.buffers.len() <= 2);
    }
}
