//! Pure: where in what a rank gives the first NaN is.

use crate::call::Call;
use crate::{Collective, DType};
use gradwire_transport::{Rank, Region};
use std::ops::Range;
use std::sync::Arc;

/// Bytes that are looked at as one: as long as they hold no NaN, nobody asks where it is.
const STRIDE: usize = 4096;

/// The bytes of a collective that rank `me` gives, in order.
fn given(call: &Call, me: Rank) -> Vec<(&Arc<Region>, Range<usize>)> {
    let pieces = match call.collective {
        Collective::AllReduce { .. } | Collective::Reduce { .. } => &call.output,
        Collective::Broadcast { root } if root == me => &call.output,
        Collective::Broadcast { .. } | Collective::Barrier => return Vec::new(),
        _ => &call.input,
    };
    pieces.iter().map(|piece| (&piece.region, piece.range.clone())).collect()
}

/// The first NaN of what rank `me` gives in `call`, counted in elements over all its pieces. Memory that another operation is
/// writing has none: the call is refused for it.
pub(crate) fn first_of(call: &Call, me: Rank) -> Option<u64> {
    let mut before = 0;
    for (region, range) in given(call, me) {
        let len = range.len() / call.dtype.bytes();
        if let Some(at) = region.read(range).ok().and_then(|bytes| first(call.dtype, &bytes)) {
            return Some((before + at) as u64);
        }
        before += len;
    }
    None
}

/// The first element of `bytes` that is NaN, or for a complex number has a part that is.
pub fn first(dtype: DType, bytes: &[u8]) -> Option<usize> {
    match dtype {
        DType::F32 => find(bytes, |four| u32::from_le_bytes(four) & 0x7fff_ffff > 0x7f80_0000),
        DType::C64 => find(bytes, |four| u32::from_le_bytes(four) & 0x7fff_ffff > 0x7f80_0000).map(|at| at / 2),
        DType::F64 => find(bytes, |eight| u64::from_le_bytes(eight) << 1 > 0x7ff0 << 49),
        DType::C128 => find(bytes, |eight| u64::from_le_bytes(eight) << 1 > 0x7ff0 << 49).map(|at| at / 2),
        DType::F16 => find(bytes, |two| u16::from_le_bytes(two) & 0x7fff > 0x7c00),
        DType::C32 => find(bytes, |two| u16::from_le_bytes(two) & 0x7fff > 0x7c00).map(|at| at / 2),
        DType::BF16 => find(bytes, |two| u16::from_le_bytes(two) & 0x7fff > 0x7f80),
        DType::F8E4M3Fn => find(bytes, |[byte]| byte & 0x7f == 0x7f),
        DType::F8E5M2 => find(bytes, |[byte]| byte & 0x7f > 0x7c),
        DType::F8E4M3FnUz | DType::F8E5M2FnUz => find(bytes, |[byte]| byte == 0x80),
        _ => None,
    }
}

fn find<const N: usize>(bytes: &[u8], is_nan: impl Fn([u8; N]) -> bool) -> Option<usize> {
    for (at, stride) in bytes.chunks(STRIDE).enumerate() {
        let elements = stride.as_chunks::<N>().0;
        // Without a branch for each, so that many are looked at at once.
        if elements.iter().fold(false, |found, &element| found | is_nan(element)) {
            let within = elements.iter().position(|&element| is_nan(element));
            return within.map(|within| at * (STRIDE / N) + within);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_nan_is_found_wherever_it_is_and_nothing_else_is_one() {
        let nans: [(DType, &[u8]); 10] = [
            (DType::F32, &f32::NAN.to_le_bytes()),
            (DType::F64, &(-f64::NAN).to_le_bytes()),
            (DType::F16, &0x7e00u16.to_le_bytes()),
            (DType::BF16, &0xff81u16.to_le_bytes()),
            (DType::F8E4M3Fn, &[0xff]),
            (DType::F8E5M2, &[0x7d]),
            (DType::F8E4M3FnUz, &[0x80]),
            (DType::F8E5M2FnUz, &[0x80]),
            (DType::C64, &[0, 0, 0, 0, 1, 0, 0x80, 0x7f]),
            (DType::C32, &[0, 0, 1, 0x7c]),
        ];
        for (dtype, nan) in nans {
            for at in [0, 1, 63, 1000, 4999] {
                let mut bytes = vec![0; 5000 * dtype.bytes()];
                assert_eq!(first(dtype, &bytes), None);
                for place in [at, 4999] {
                    bytes[place * nan.len()..][..nan.len()].copy_from_slice(nan);
                }
                assert_eq!(first(dtype, &bytes), Some(at), "{dtype}");
            }
        }
        let all = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(first(DType::F32, &all(&[f32::INFINITY, f32::NEG_INFINITY, f32::MIN, -0.0])), None);
        assert_eq!(first(DType::F64, &f64::NEG_INFINITY.to_le_bytes()), None);
        for (dtype, bytes) in [(DType::F16, 0xfc00u16), (DType::BF16, 0xff80), (DType::F8E5M2, 0x7cfc)] {
            assert_eq!(first(dtype, &bytes.to_le_bytes()), None, "{dtype} infinite");
        }
        assert_eq!(first(DType::I32, &[0xff; 16]), None);
    }
}
