//! Pure: what a row holds before anybody has pushed to it: a function of seed, table and id alone, the same on every machine.

use crate::TableId;
use crate::body::{BadBody, Reader, Writer};
use crate::kernel::Real;
use std::fmt;

/// How a row of a sparse table begins.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Initializer {
    /// All 0.
    #[default]
    Zeros,
    /// All the same.
    Constant(f64),
    /// Each element anywhere in `low..high`.
    Uniform {
        /// The least.
        low: f64,
        /// What none reaches, but by rounding.
        high: f64,
    },
    /// Each element normally distributed.
    Normal {
        /// Their mean.
        mean: f64,
        /// Their standard deviation.
        deviation: f64,
    },
}

impl Initializer {
    /// Says what is wrong with the numbers, if anything is.
    pub fn check(&self) -> Result<(), String> {
        let finite = |values: [f64; 2]| values.iter().all(|value| value.is_finite());
        let fine = match *self {
            Self::Zeros => true,
            Self::Constant(value) => value.is_finite(),
            Self::Uniform { low, high } => finite([low, high]) && low <= high && (high - low).is_finite(),
            Self::Normal { mean, deviation } => finite([mean, deviation]) && deviation >= 0.0,
        };
        if fine { Ok(()) } else { Err(format!("{self} is not one: its numbers must be finite, and in order")) }
    }

    /// Writes the first values of row `id`. `key` is that of [`table_key`].
    pub(crate) fn fill<C: Real>(&self, key: u64, id: u64, out: &mut [C]) {
        match *self {
            Self::Zeros => out.fill(C::default()),
            Self::Constant(value) => out.fill(C::of(value)),
            Self::Uniform { low, high } => {
                let row = mix(key ^ mix(id));
                for (n, out) in (0..).zip(out) {
                    *out = C::of(low + (high - low) * fraction(row, n));
                }
            }
            Self::Normal { mean, deviation } => {
                let row = mix(key ^ mix(id));
                for (n, pair) in (0..).zip(out.chunks_mut(2)) {
                    // Box and Muller (1958). From the crate `libm`, since each system's own has other last bits.
                    let length = (-2.0 * libm::log(1.0 - fraction(row, 2 * n))).sqrt();
                    let angle = std::f64::consts::TAU * fraction(row, 2 * n + 1);
                    let both = [libm::cos(angle), libm::sin(angle)];
                    pair.iter_mut().zip(both).for_each(|(out, way)| *out = C::of(mean + deviation * length * way));
                }
            }
        }
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        let (kind, numbers) = match *self {
            Self::Zeros => (0, [0.0, 0.0]),
            Self::Constant(value) => (1, [value, 0.0]),
            Self::Uniform { low, high } => (2, [low, high]),
            Self::Normal { mean, deviation } => (3, [mean, deviation]),
        };
        out.byte(kind);
        numbers.into_iter().for_each(|number| out.float(number));
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let (kind, first, second) = (from.byte()?, from.float()?, from.float()?);
        Ok(match kind {
            0 => Self::Zeros,
            1 => Self::Constant(first),
            2 => Self::Uniform { low: first, high: second },
            3 => Self::Normal { mean: first, deviation: second },
            _ => return Err(BadBody("no such initializer")),
        })
    }
}

impl fmt::Display for Initializer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeros => write!(f, "zeros"),
            Self::Constant(value) => write!(f, "constant({value})"),
            Self::Uniform { low, high } => write!(f, "uniform({low}, {high})"),
            Self::Normal { mean, deviation } => write!(f, "normal({mean}, {deviation})"),
        }
    }
}

/// What tells the rows of one table from those of others.
pub(crate) fn table_key(seed: u64, table: TableId) -> u64 {
    mix(seed ^ mix(table.0))
}

/// Spreads every bit over all others (the finisher of SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
pub(crate) const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The `n`-th number of a row, in `0..1`.
fn fraction(row: u64, n: u64) -> f64 {
    (mix(row.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(initializer: Initializer, seed: u64, id: u64, elements: usize) -> Vec<f32> {
        let mut row = vec![7.0; elements];
        initializer.fill(table_key(seed, TableId::of("t")), id, &mut row);
        row
    }

    #[test]
    fn a_row_is_a_function_of_seed_table_and_id_and_of_nothing_else() {
        let normal = Initializer::Normal { mean: 0.0, deviation: 1.0 };
        assert_eq!(row(normal, 1, 2, 9), row(normal, 1, 2, 9));
        assert_eq!(row(normal, 1, 2, 9)[..4], row(normal, 1, 2, 4));
        assert_ne!(row(normal, 1, 2, 9), row(normal, 1, 3, 9));
        assert_ne!(row(normal, 1, 2, 9), row(normal, 2, 2, 9));
        let mut other = vec![0.0f32; 9];
        normal.fill(table_key(1, TableId::of("u")), 2, &mut other);
        assert_ne!(row(normal, 1, 2, 9), other);
        // These bits must never change: clients and later versions rely on them.
        let bits: Vec<u32> = row(normal, 1, 2, 4).iter().map(|value| value.to_bits()).collect();
        assert_eq!(bits, PINNED);
    }

    const PINNED: [u32; 4] = [0x3f09_ea90, 0xbf70_39e9, 0x3f98_d3de, 0x3ead_b2e6];

    #[test]
    fn the_numbers_lie_as_their_distribution_says() {
        let of_many = |initializer| (0..2000).flat_map(|id| row(initializer, 3, id, 8)).map(f64::from).collect();
        let moments = |values: Vec<f64>| {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt())
        };
        let values: Vec<f64> = of_many(Initializer::Uniform { low: -1.0, high: 3.0 });
        assert!(values.iter().all(|value| (-1.0..3.0).contains(value)));
        let (mean, deviation) = moments(values);
        assert!((mean - 1.0).abs() < 0.05 && (deviation - 4.0 / 12f64.sqrt()).abs() < 0.05);
        let values: Vec<f64> = of_many(Initializer::Normal { mean: 5.0, deviation: 2.0 });
        let within = values.iter().filter(|value| (**value - 5.0).abs() < 2.0).count() as f64 / values.len() as f64;
        assert!((within - 0.6827).abs() < 0.02, "{within}");
        let (mean, deviation) = moments(values);
        assert!((mean - 5.0).abs() < 0.08 && (deviation - 2.0).abs() < 0.08);
        assert_eq!(row(Initializer::Constant(0.5), 1, 1, 2), [0.5, 0.5]);
        assert_eq!(row(Initializer::Zeros, 1, 1, 2), [0.0, 0.0]);
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for bad in [
            Initializer::Constant(f64::NAN),
            Initializer::Uniform { low: 1.0, high: 0.0 },
            Initializer::Uniform { low: f64::MIN, high: f64::MAX },
            Initializer::Normal { mean: 0.0, deviation: -1.0 },
        ] {
            assert!(bad.check().is_err(), "{bad}");
        }
    }
}
