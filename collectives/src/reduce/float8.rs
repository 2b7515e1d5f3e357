//! Pure: 8-bit floats, computed with as `f32`; rounded to nearest, ties to even.
//!
//! The formats are those of Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433, and of Noune et al.,
//! arXiv:2206.02915 (`fnuz`: no infinity, one NaN, no negative zero). What is too large becomes what PyTorch makes of it:
//! infinity in `e5m2`, the largest number in `e4m3fn`, NaN in the others.

use super::kernel::Element;

/// Where a format keeps what is not finite.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Specials {
    /// As IEEE 754: the highest exponent is infinity and NaN.
    Ieee,
    /// All ones are NaN, there is no infinity.
    Finite,
    /// What would be the negative zero is NaN, there is no infinity.
    FiniteUnsignedZero,
}

/// A format.
pub(super) trait Format {
    const MANTISSA_BITS: u32;
    const BIAS: u32;
    const SPECIALS: Specials;
}

/// An 8-bit float of the format `F`.
pub(super) struct F8<F>(std::marker::PhantomData<F>);

macro_rules! format {
    ($($name:ident, $mantissa:literal, $bias:literal, $specials:expr);*) => {
        $(pub(super) struct $name;

        impl Format for $name {
            const MANTISSA_BITS: u32 = $mantissa;
            const BIAS: u32 = $bias;
            const SPECIALS: Specials = $specials;
        })*
    };
}

format! {
    E4M3Fn, 3, 7, Specials::Finite; E5M2, 2, 15, Specials::Ieee;
    E4M3FnUz, 3, 8, Specials::FiniteUnsignedZero; E5M2FnUz, 2, 16, Specials::FiniteUnsignedZero
}

impl<F: Format> Element for F8<F> {
    type Value = f32;
    type Bytes = [u8; 1];

    #[inline(always)]
    fn get(bytes: [u8; 1]) -> f32 {
        widen(bytes[0].into(), F::MANTISSA_BITS, F::BIAS, F::SPECIALS)
    }

    #[inline(always)]
    fn put(value: f32) -> [u8; 1] {
        [narrow(value, F::MANTISSA_BITS, F::BIAS, F::SPECIALS)]
    }
}

#[inline(always)]
fn widen(code: u32, mantissa_bits: u32, bias: u32, specials: Specials) -> f32 {
    let (sign, rest) = (code >> 7 << 31, code & 0x7f);
    let placed = rest << (23 - mantissa_bits);
    // Below the smallest normal number: its steps above that number, and the number taken away again.
    let lever = (128 - bias) << 23;
    let subnormal = (f32::from_bits(lever | placed) - f32::from_bits(lever)).to_bits();
    let size = if rest >> mantissa_bits == 0 { subnormal } else { placed + ((127 - bias) << 23) };
    let infinity = 0x7f >> mantissa_bits << mantissa_bits;
    let (infinite, nan) = match specials {
        Specials::Ieee => (rest == infinity, rest > infinity),
        Specials::Finite => (false, rest == 0x7f),
        Specials::FiniteUnsignedZero => (false, code == 0x80),
    };
    let size = if infinite { f32::INFINITY.to_bits() } else { size };
    if nan { f32::NAN } else { f32::from_bits(sign | size) }
}

#[inline(always)]
fn narrow(value: f32, mantissa_bits: u32, bias: u32, specials: Specials) -> u8 {
    let bits = value.to_bits();
    let (sign, size) = (bits >> 24 & 0x80, bits & 0x7fff_ffff);
    let dropped = 23 - mantissa_bits;
    let rounded = size + ((1 << (dropped - 1)) - 1) + (size >> dropped & 1);
    let normal = (rounded >> dropped).wrapping_sub((127 - bias) << mantissa_bits);
    // Below the smallest normal number the steps are even: adding what has such steps as its last place rounds to them.
    let lever = f32::from_bits((128 - bias - mantissa_bits + 23) << 23);
    let subnormal = (f32::from_bits(size) + lever).to_bits() - lever.to_bits();
    let code = if size < (128 - bias) << 23 { subnormal } else { normal };
    let (largest, beyond) = match specials {
        Specials::Ieee => ((0x7f >> mantissa_bits << mantissa_bits) - 1, (0x7f >> mantissa_bits) << mantissa_bits),
        Specials::Finite => (0x7e, 0x7e),
        Specials::FiniteUnsignedZero => (0x7f, 0x80),
    };
    let unsigned_zero = matches!(specials, Specials::FiniteUnsignedZero);
    let nan = if unsigned_zero { 0x80 } else { 0x7f };
    let found = if code > largest { beyond } else { code };
    let signed = if unsigned_zero && (found == 0 || found == 0x80) { found } else { sign | found };
    (if value.is_nan() { nan } else { signed }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of each code, as the formats are defined.
    struct Values<F>(std::marker::PhantomData<F>);

    impl<F: Format> Values<F> {
        const ALL: &[f32; 256] = &values(F::MANTISSA_BITS, F::BIAS, F::SPECIALS);
    }

    const fn values(mantissa_bits: u32, bias: u32, specials: Specials) -> [f32; 256] {
        let mut values = [0.0; 256];
        let mut code = 0;
        while code < 256 {
            values[code as usize] = value(code, mantissa_bits, bias, specials);
            code += 1;
        }
        values
    }

    const fn value(code: u32, mantissa_bits: u32, bias: u32, specials: Specials) -> f32 {
        let (sign, rest) = (code >> 7, code & 0x7f);
        let (exponent, mantissa) = (rest >> mantissa_bits, rest & ((1 << mantissa_bits) - 1));
        let highest = exponent == 0x7f >> mantissa_bits;
        let not_finite = match specials {
            Specials::Ieee => highest,
            Specials::Finite => rest == 0x7f,
            Specials::FiniteUnsignedZero => code == 0x80,
        };
        let size = if not_finite && mantissa == 0 && matches!(specials, Specials::Ieee) {
            f32::INFINITY
        } else if not_finite {
            return f32::NAN;
        } else if exponent == 0 {
            mantissa as f32 * f32::from_bits((128 - bias - mantissa_bits) << 23)
        } else {
            f32::from_bits((exponent + 127 - bias) << 23 | mantissa << (23 - mantissa_bits))
        };
        if sign == 1 { -size } else { size }
    }

    /// The nearest code by trying all; of two, the even one.
    fn nearest<F: Format>(value: f32) -> u8 {
        let distance = |code: u8| (f64::from(Values::<F>::ALL[usize::from(code)]) - f64::from(value)).abs();
        let codes = (0..=255u8).filter(|&code| Values::<F>::ALL[usize::from(code)].is_finite());
        codes.min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))).unwrap()
    }

    fn all_values_round_to_the_nearest<F: Format>(largest: f32) {
        for code in 0..=255u8 {
            let value = Values::<F>::ALL[usize::from(code)];
            let got = F8::<F>::get([code]);
            assert!(
                got.to_bits() == value.to_bits() || got.is_nan() && value.is_nan(),
                "{code:#x}: {got}, not {value}"
            );
            let back = F8::<F>::put(value)[0];
            assert!(
                back == code || value.is_nan() && Values::<F>::ALL[usize::from(back)].is_nan(),
                "{code:#x}: {value} {back:#x}"
            );
        }
        assert_eq!(Values::<F>::ALL.iter().filter(|value| value.is_finite()).fold(0.0, |a: f32, b| a.max(*b)), largest);
        // Steps much finer than the format's, and exactly half of them too.
        for step in -60_000..=60_000 {
            for scale in [largest / 60_000.0, 1.0 / 4096.0 / 1024.0, 1.0 / 1024.0] {
                let value = step as f32 * scale;
                if value.abs() <= largest && value != 0.0 {
                    let (got, want) = (F8::<F>::put(value)[0], nearest::<F>(value));
                    let (got_value, want_value) =
                        (Values::<F>::ALL[usize::from(got)], Values::<F>::ALL[usize::from(want)]);
                    assert!(got_value == want_value, "{value}: {got_value}, not {want_value}");
                }
            }
        }
    }

    #[test]
    fn every_value_is_rounded_to_the_nearest_of_its_format() {
        all_values_round_to_the_nearest::<E4M3Fn>(448.0);
        all_values_round_to_the_nearest::<E5M2>(57344.0);
        all_values_round_to_the_nearest::<E4M3FnUz>(240.0);
        all_values_round_to_the_nearest::<E5M2FnUz>(57344.0);
    }

    #[test]
    fn what_is_too_large_becomes_what_pytorch_makes_of_it() {
        for large in [1e9, f32::INFINITY, 65536.0] {
            assert_eq!([F8::<E4M3Fn>::put(large)[0], F8::<E4M3Fn>::put(-large)[0]], [0x7e, 0xfe]);
            assert_eq!([F8::<E5M2>::put(large)[0], F8::<E5M2>::put(-large)[0]], [0x7c, 0xfc]);
            assert_eq!([F8::<E4M3FnUz>::put(large)[0], F8::<E5M2FnUz>::put(-large)[0]], [0x80, 0x80]);
        }
        assert_eq!([F8::<E5M2>::put(f32::NAN)[0], F8::<E5M2>::put(-f32::NAN)[0]], [0x7f, 0x7f]);
        assert_eq!([F8::<E4M3Fn>::put(-0.0)[0], F8::<E4M3FnUz>::put(-0.0)[0]], [0x80, 0]);
    }
}
