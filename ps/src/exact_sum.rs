//! Pure: sums without rounding, so that their bits do not depend on the order of adding, nor on how many shards add.

use crate::body::{BadBody, Reader, Writer};

/// Bits that a limb holds once its carries are moved on.
const LIMB_BITS: usize = 32;
/// Limbs for every `f64` there is, and for 2^64 of the largest.
const LIMBS: usize = 68;
/// Numbers added before carries are moved on: each adds less than 2^32 to a limb.
const BETWEEN_CARRIES: u32 = 1 << 30;

/// A sum of `f64` that are at least 0, exactly (in the manner of Neal's superaccumulator, arXiv:1505.05571).
///
/// A number is a whole multiple of 2^-1074. Limb `n` counts 2^(32 n - 1074).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExactSum {
    limbs: [u64; LIMBS],
    added: u32,
    /// Something infinite, and something that is no number, was added.
    infinite: bool,
    nan: bool,
}

impl Default for ExactSum {
    fn default() -> Self {
        Self { limbs: [0; LIMBS], added: 0, infinite: false, nan: false }
    }
}

impl ExactSum {
    /// Adds `value`, which is at least 0 or not finite.
    #[inline(always)]
    pub(crate) fn add(&mut self, value: f64) {
        let bits = value.to_bits();
        let exponent = (bits >> 52) as usize & 0x7ff;
        if exponent == 0x7ff {
            self.nan |= value.is_nan();
            self.infinite |= !value.is_nan();
            return;
        }
        // Subnormal numbers lie where those of exponent 1 do, without their leading bit.
        let fraction = (bits & ((1 << 52) - 1)) | u64::from(exponent > 0) << 52;
        let place = exponent.max(1) - 1;
        let shifted = u128::from(fraction) << (place % LIMB_BITS);
        let at = &mut self.limbs[place / LIMB_BITS..place / LIMB_BITS + 3];
        at[0] += shifted as u64 & 0xffff_ffff;
        at[1] += (shifted >> 32) as u64 & 0xffff_ffff;
        at[2] += (shifted >> 64) as u64;
        self.added += 1;
        if self.added == BETWEEN_CARRIES {
            self.carry();
        }
    }

    /// Adds all of `other`.
    pub(crate) fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        other.carry();
        self.carry();
        self.limbs.iter_mut().zip(other.limbs).for_each(|(limb, more)| *limb += more);
        self.infinite |= other.infinite;
        self.nan |= other.nan;
        self.carry();
    }

    fn carry(&mut self) {
        let mut carry = 0;
        for limb in &mut self.limbs {
            let sum = *limb + carry;
            *limb = sum & 0xffff_ffff;
            carry = sum >> LIMB_BITS;
        }
        self.added = 0;
    }

    /// The sum as `f64`: a function of its exact value alone, within two units in the last place of it.
    pub(crate) fn value(&self) -> f64 {
        if self.nan {
            return f64::NAN;
        }
        if self.infinite {
            return f64::INFINITY;
        }
        let mut sum = self.clone();
        sum.carry();
        let Some(top) = sum.limbs.iter().rposition(|&limb| limb != 0) else { return 0.0 };
        // Four limbs hold at least 97 bits of it: more than a number has.
        let lowest = top.saturating_sub(3);
        let digits =
            sum.limbs[lowest..=top].iter().rev().fold(0u128, |digits, &limb| digits << LIMB_BITS | u128::from(limb));
        let power = i32::try_from(lowest * LIMB_BITS).expect("limbs are few") - 1074;
        libm::ldexp(digits as f64, power)
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        let mut sum = self.clone();
        sum.carry();
        out.byte(u8::from(self.infinite) | u8::from(self.nan) << 1);
        let used = sum.limbs.iter().enumerate().filter(|(_, limb)| **limb != 0);
        out.number(used.clone().count() as u64);
        for (at, limb) in used {
            out.byte(u8::try_from(at).expect("limbs are few"));
            out.number(*limb);
        }
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let flags = from.byte()?;
        if flags > 3 {
            return Err(BadBody("a sum has other flags"));
        }
        let mut sum = Self { infinite: flags & 1 != 0, nan: flags & 2 != 0, ..Self::default() };
        for _ in 0..from.count(9)? {
            let at = usize::from(from.byte()?);
            let limb = sum.limbs.get_mut(at).ok_or(BadBody("a sum has too many limbs"))?;
            *limb = from.number()?;
            if *limb > 0xffff_ffff {
                return Err(BadBody("a limb of a sum is too large"));
            }
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(values: &[f64]) -> ExactSum {
        let mut sum = ExactSum::default();
        values.iter().for_each(|&value| sum.add(value));
        sum
    }

    fn round_trip(sum: &ExactSum) -> ExactSum {
        let mut out = Writer::default();
        sum.encode(&mut out);
        for cut in 0..out.0.len() {
            assert!(ExactSum::decode(&mut Reader(&out.0[..cut])).is_err());
        }
        ExactSum::decode(&mut Reader(&out.0)).unwrap()
    }

    #[test]
    fn one_number_is_itself_and_what_cancels_in_floats_stays() {
        for value in [0.0, 5e-324, f64::MIN_POSITIVE, 1.0, 0.1, 1e300, f64::MAX, 3.5e-310] {
            assert_eq!(round_trip(&of(&[value])).value().to_bits(), value.to_bits(), "{value}");
        }
        assert_eq!(of(&[1e200, 1.0, 1.0]).value(), 1e200);
        assert_eq!(of(&[9007199254740992.0, 1.0, 1.0]).value(), 9007199254740994.0);
        assert_eq!(of(&[f64::MAX, f64::MAX]).value(), f64::INFINITY);
        assert!(of(&[1.0, f64::INFINITY]).value() == f64::INFINITY);
        assert!(of(&[f64::INFINITY, f64::NAN]).value().is_nan());
    }

    proptest! {
        #[test]
        fn every_order_and_every_cut_gives_the_same_bits(
            bits in proptest::collection::vec(any::<u64>(), 0..60), cut in any::<prop::sample::Index>(), turn in 0usize..60,
        ) {
            let values: Vec<f64> =
                bits.iter().map(|bits| f64::from_bits(bits >> 1)).filter(|value| value.is_finite()).collect();
            let whole = of(&values).value();
            let mut turned = values.clone();
            if !turned.is_empty() {
                turned.rotate_left(turn % values.len());
            }
            let (low, high) = turned.split_at(cut.index(turned.len() + 1));
            let mut merged = round_trip(&of(high));
            merged.merge(&round_trip(&of(low)));
            prop_assert_eq!(merged.value().to_bits(), whole.to_bits());
        }

        #[test]
        fn a_sum_is_that_of_integers(values in proptest::collection::vec(0u64..1 << 53, 0..200)) {
            let exact: u128 = values.iter().map(|&value| u128::from(value)).sum();
            let floats: Vec<f64> = values.iter().map(|&value| value as f64).collect();
            prop_assert_eq!(of(&floats).value(), exact as f64);
        }
    }
}
