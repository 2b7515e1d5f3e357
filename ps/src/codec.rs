//! Pure: how gradients and values are made shorter to travel, and what of a payload is believed.

mod blocks;
mod top;

use crate::DType;
use crate::body::{BadBody, Reader, Writer};
use crate::kernel::{BLOCK, Real};
use std::fmt;

/// How the elements of a message are written.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Codec {
    /// As they are.
    #[default]
    Whole,
    /// As bfloat16: 2 bytes, to 8 significant bits.
    Bf16,
    /// As IEEE half precision: 2 bytes, to 11 significant bits; magnitudes over 65504 become 65504.
    F16,
    /// As 8-bit numbers, 128 to a scale: about 1.03 bytes. What gradients lose is added to the worker's next one.
    Int8,
    /// The largest `share` of the elements of each part, 8 bytes each. What is left out is added to the worker's next gradient.
    TopK {
        /// More than 0, at most 1; at least one element of each part travels.
        share: f64,
    },
}

/// How a table's gradients, and its values, travel.
///
/// Synchronous results stay the same to the bit whoever comes first. `Int8` and `TopK` see a part at a time, so with them they
/// do depend on the number of shards.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Compression {
    /// Gradients.
    pub push: Codec,
    /// Values; every pull is made from the value in full, so nothing adds up. `TopK` cannot be.
    pub pull: Codec,
}

/// Why a payload is not what its codec says.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub(crate) enum BadPayload {
    #[error("{got} bytes, where {expected} are wanted")]
    Length { expected: usize, got: usize },
    #[error("a scale of {0}")]
    Scale(f32),
    #[error("{kept} elements out of {elements}")]
    Count { kept: usize, elements: usize },
    #[error("element {index} after element {before}, out of {elements}")]
    Index { index: usize, before: usize, elements: usize },
    #[error("element {index} is {value}")]
    Value { index: usize, value: f32 },
}

/// A gradient that a codec cannot carry.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("element {index} of the gradient is {value}, which this compression cannot carry")]
pub(crate) struct NotFinite {
    pub(crate) index: usize,
    pub(crate) value: f32,
}

impl Codec {
    /// The byte that stands for it on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::Whole => 0,
            Self::Bf16 => 1,
            Self::F16 => 2,
            Self::Int8 => 3,
            Self::TopK { .. } => 4,
        }
    }

    /// The largest code there is.
    pub(crate) const LAST: u8 = 4;

    /// Whether what is lost is kept for the next gradient.
    pub const fn feeds_back(self) -> bool {
        matches!(self, Self::Int8 | Self::TopK { .. })
    }

    /// Bytes that `elements` elements take; `None` where that is the table's own business.
    pub(crate) fn bytes(self, elements: usize) -> Option<usize> {
        match self {
            Self::Whole => None,
            Self::Bf16 | Self::F16 => Some(2 * elements),
            Self::Int8 => Some(blocks::bytes(elements)),
            Self::TopK { share } => Some(top::bytes(top::kept(share, elements))),
        }
    }

    pub(crate) fn check(self) -> Result<(), String> {
        match self {
            Self::TopK { share } if !(share > 0.0 && share <= 1.0) => {
                Err(format!("a share of {share}, and it must be more than 0, at most 1"))
            }
            _ => Ok(()),
        }
    }

    /// Writes `values` to `to`, which is as long as [`Codec::bytes`] says. Where there is a `residual`, it is added first, and
    /// then holds what was lost.
    ///
    /// # Errors
    /// For gradients with something that is not finite, or becomes so with the residual, which is then as it was.
    pub(crate) fn encode_gradient(
        self,
        values: &mut [f32],
        residual: &mut [f32],
        to: &mut [u8],
    ) -> Result<(), NotFinite> {
        match self {
            Self::Whole => unreachable!("what travels as it is was never handed over"),
            Self::Bf16 | Self::F16 => self.encode_values(values, to),
            Self::Int8 | Self::TopK { .. } => {
                values.iter_mut().zip(residual.iter()).for_each(|(value, residual)| *value += *residual);
                if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                    return Err(NotFinite { index, value: values[index] });
                }
                if let Self::TopK { share } = self {
                    top::encode(share, values, residual, to);
                } else {
                    blocks::encode(values, to);
                    blocks::decode(to, residual);
                    residual.iter_mut().zip(values.iter()).for_each(|(residual, value)| *residual = *value - *residual);
                }
            }
        }
        Ok(())
    }

    /// Writes values of a table. A block of [`Codec::Int8`] with something that is not finite comes out as no numbers.
    pub(crate) fn encode_values(self, values: &[f32], to: &mut [u8]) {
        match self {
            Self::Bf16 => f32::store(DType::BF16, values, to),
            Self::F16 => {
                let mut block = [0.0; BLOCK];
                for (values, to) in values.chunks(BLOCK).zip(to.chunks_mut(2 * BLOCK)) {
                    let block = &mut block[..values.len()];
                    block.iter_mut().zip(values).for_each(|(block, value)| *block = saturated(*value));
                    f32::store(DType::F16, block, to);
                }
            }
            Self::Int8 => blocks::encode(values, to),
            Self::Whole | Self::TopK { .. } => unreachable!("a table's compression was checked when it was opened"),
        }
    }

    /// Checks a gradient's payload; no field of it is trusted.
    pub(crate) fn check_gradient(self, payload: &[u8], elements: usize) -> Result<(), BadPayload> {
        if let Self::TopK { .. } = self {
            return top::check(payload, elements);
        }
        let expected = self.bytes(elements).unwrap_or(0);
        if payload.len() != expected {
            return Err(BadPayload::Length { expected, got: payload.len() });
        }
        if self == Self::Int8 { blocks::check(payload) } else { Ok(()) }
    }

    /// Reads what was written; `payload` has been checked, or is as long as [`Codec::bytes`] says.
    pub(crate) fn decode(self, payload: &[u8], to: &mut [f32]) {
        match self {
            Self::Bf16 => f32::load(DType::BF16, payload, to),
            Self::F16 => f32::load(DType::F16, payload, to),
            Self::Int8 => blocks::decode(payload, to),
            Self::TopK { .. } => top::decode(payload, to),
            Self::Whole => unreachable!("what travels as it is needs no decoding"),
        }
    }

    pub(crate) fn write(self, out: &mut Writer) {
        out.byte(self.code());
        out.float(if let Self::TopK { share } = self { share } else { 0.0 });
    }

    pub(crate) fn read(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let (code, share) = (from.byte()?, from.float()?);
        Ok(match code {
            0 => Self::Whole,
            1 => Self::Bf16,
            2 => Self::F16,
            3 => Self::Int8,
            4 => Self::TopK { share },
            _ => return Err(BadBody("no such codec")),
        })
    }
}

impl Compression {
    /// Everything travels as it is.
    pub const NONE: Self = Self { push: Codec::Whole, pull: Codec::Whole };

    /// Says what cannot be, if anything.
    pub(crate) fn check(self) -> Result<(), String> {
        if let Codec::TopK { .. } = self.pull {
            return Err("values by top-k, which would leave most of them out".to_owned());
        }
        self.push.check()
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("none"),
            Self::Bf16 => f.write_str("bf16"),
            Self::F16 => f.write_str("fp16"),
            Self::Int8 => f.write_str("int8"),
            Self::TopK { share } => write!(f, "topk({share})"),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "push {}, pull {}", self.push, self.pull)
    }
}

/// The nearest number that half precision holds; what is not finite stays so.
fn saturated(value: f32) -> f32 {
    if value.is_finite() { value.clamp(-65504.0, 65504.0) } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use super::blocks::BLOCK_ELEMENTS;

    const ALL: [Codec; 4] = [Codec::Bf16, Codec::F16, Codec::Int8, Codec::TopK { share: 0.1 }];

    fn numbers() -> impl Strategy<Value = Vec<f32>> {
        let number =
            prop_oneof![-1e4f32..1e4, -1e-6f32..1e-6, Just(0.0f32), Just(-0.0f32), Just(f32::MIN_POSITIVE / 8.0)];
        proptest::collection::vec(number, 1..400)
    }

    proptest! {
        #[test]
        fn what_is_sent_and_what_is_kept_add_up(values in numbers(), before in -1.0f32..1.0) {
            for codec in ALL {
                let mut residual = vec![if codec.feeds_back() { before } else { 0.0 }; values.len()];
                let whole: Vec<f32> = values.iter().zip(&residual).map(|(value, residual)| value + residual).collect();
                let mut bytes = vec![0; codec.bytes(values.len()).unwrap()];
                codec.encode_gradient(&mut values.clone(), &mut residual, &mut bytes).unwrap();
                prop_assert_eq!(codec.check_gradient(&bytes, values.len()), Ok(()));
                let mut got = vec![7.0; values.len()];
                codec.decode(&bytes, &mut got);
                let block = |at: usize| &whole[at / BLOCK_ELEMENTS * BLOCK_ELEMENTS..whole.len().min((at / BLOCK_ELEMENTS + 1) * BLOCK_ELEMENTS)];
                for at in 0..got.len() {
                    let largest = block(at).iter().fold(0.0f32, |most, value| most.max(value.abs()));
                    let bound = match codec {
                        Codec::Bf16 => whole[at].abs() / 256.0,
                        Codec::F16 => whole[at].abs() / 2048.0 + 6e-8,
                        Codec::Int8 => largest / 253.9 + 2e-36,
                        _ => 0.0,
                    };
                    let kept = if codec.feeds_back() { residual[at] } else { 0.0 };
                    if let Codec::TopK { .. } = codec {
                        prop_assert_eq!(got[at] + kept, whole[at]);
                        prop_assert!(got[at] == 0.0 || kept == 0.0);
                    } else {
                        prop_assert!((got[at] - whole[at]).abs() <= bound, "{codec} {at}: {} {}", got[at], whole[at]);
                    }
                    if codec == Codec::Int8 {
                        prop_assert!((got[at] + kept - whole[at]).abs() <= whole[at].abs() * f32::EPSILON);
                    }
                }
            }
        }

        #[test]
        fn a_part_alone_and_within_a_longer_one_has_the_same_bits(values in numbers(), more in numbers()) {
            // Only whole blocks: vector and tail must agree.
            let cut = values.len() / BLOCK_ELEMENTS * BLOCK_ELEMENTS;
            let long: Vec<f32> = values[..cut].iter().chain(&more).copied().collect();
            let mut whole = vec![0; Codec::Int8.bytes(long.len()).unwrap()];
            Codec::Int8.encode_values(&long, &mut whole);
            let mut decoded = vec![0.0; long.len()];
            Codec::Int8.decode(&whole, &mut decoded);
            let mut alone = vec![0; Codec::Int8.bytes(more.len()).unwrap()];
            Codec::Int8.encode_values(&more, &mut alone);
            let mut of_alone = vec![0.0; more.len()];
            Codec::Int8.decode(&alone, &mut of_alone);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&decoded[cut..]), bits(&of_alone));
        }

        #[test]
        fn bytes_of_any_kind_are_refused_or_mean_finite_numbers(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), elements in 1usize..300, forge in any::<bool>(),
        ) {
            for codec in ALL {
                let mut bytes = bytes.clone();
                if forge {
                    bytes.resize(codec.bytes(elements).unwrap(), 0);
                }
                if codec.check_gradient(&bytes, elements).is_ok() {
                    let mut got = vec![0.0; elements];
                    codec.decode(&bytes, &mut got);
                    prop_assert!(!codec.feeds_back() || got.iter().all(|value| value.is_finite()));
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_refused_by_place_and_leaves_the_residual_alone() {
        for codec in [Codec::Int8, Codec::TopK { share: 0.5 }] {
            let mut residual = [1.0, 2.0];
            let mut bytes = vec![0; codec.bytes(2).unwrap()];
            let error = codec.encode_gradient(&mut [0.0, f32::NEG_INFINITY], &mut residual, &mut bytes).unwrap_err();
            assert_eq!((error.index, residual), (1, [1.0, 2.0]));
        }
    }

    #[test]
    fn half_precision_does_not_overflow() {
        let mut bytes = [0; 6];
        Codec::F16.encode_values(&[1e9, -1e9, f32::INFINITY], &mut bytes);
        let mut got = [0.0; 3];
        Codec::F16.decode(&bytes, &mut got);
        assert_eq!(got, [65504.0, -65504.0, f32::INFINITY]);
    }
}
