//! Pure: how elements are combined. Every kernel gives the same bits on every processor, for every cut of the data.

mod bfloat16;
mod extreme;
mod float16;
mod float8;
mod kernel;
mod level;
mod packed;

use crate::DType;
use extreme::{Greatest, Least};
use float8::F8;
use half::{bf16, f16};
use kernel::{And, Avg, AvgOfPower, Max, Min, Or, Plain, Product, Sum, Xor};
use level::Level;
use packed::Packed;

/// How elements are combined.
///
/// Integers wrap; an average of integers is cut towards zero; what a NaN goes into is NaN, and always the same NaN; 8- and
/// 16-bit floats are computed in `f32`. Booleans: sum, maximum and or are "any", product, minimum and and are "all".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names say it all.
pub enum Reduction {
    Sum,
    Avg,
    Min,
    Max,
    Product,
    BitAnd,
    BitOr,
    BitXor,
}

/// Every reduction, in the order of their codes.
const ALL: [(Reduction, &str); 8] = [
    (Reduction::Sum, "sum"),
    (Reduction::Avg, "avg"),
    (Reduction::Min, "min"),
    (Reduction::Max, "max"),
    (Reduction::Product, "product"),
    (Reduction::BitAnd, "bit-and"),
    (Reduction::BitOr, "bit-or"),
    (Reduction::BitXor, "bit-xor"),
];

impl Reduction {
    /// Its name.
    pub const fn name(self) -> &'static str {
        ALL[self as usize].1
    }

    /// A small number for it.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The reduction of a code.
    pub fn from_code(code: u8) -> Option<Self> {
        ALL.get(usize::from(code)).map(|(op, _)| *op)
    }
}

/// A reduction that means nothing for a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} of {dtype} is not defined", op.name())]
pub struct UnsupportedReduction {
    /// The type.
    pub dtype: DType,
    /// The reduction.
    pub op: Reduction,
}

/// Whether `op` means something for `dtype`.
///
/// # Errors
/// `UnsupportedReduction`: bitwise operations on floats, anything on complex numbers and on 8-bit floats without a mantissa, averages of bools.
pub fn check(dtype: DType, op: Reduction) -> Result<(), UnsupportedReduction> {
    fold(dtype, op, &mut [], 0, &[], None, 2)
}

/// `dst = dst ∘ src`, element by element. Both have the same length, a whole number of elements.
///
/// # Errors
/// As [`check`]; `dst` is as it was.
pub fn reduce_into(dtype: DType, op: Reduction, dst: &mut [u8], src: &[u8]) -> Result<(), UnsupportedReduction> {
    fold(dtype, op, dst, 0, &[src], None, 1)
}

/// `own = inputs[0] ∘ inputs[1] ∘ …`, where `inputs[at]` is `own` itself and `others` are the rest, in rank order.
///
/// 8- and 16-bit floats are combined in `f32` and rounded once. With `Reduction::Avg`, the sum is divided by `divisor` at the end
/// (1: not at all). `copy` gets the result too, in the same pass.
///
/// # Errors
/// As [`check`]; nothing has been written.
pub fn fold(
    dtype: DType,
    op: Reduction,
    own: &mut [u8],
    at: usize,
    others: &[&[u8]],
    copy: Option<&mut [u8]>,
    divisor: usize,
) -> Result<(), UnsupportedReduction> {
    // A division by one is none, but would take its time.
    let op = if op == Reduction::Avg && divisor == 1 { check(dtype, op).map(|()| Reduction::Sum)? } else { op };
    fold_at(Level::widest(), dtype, op, kernel::Job { own, at, others, copy, divisor })
}

fn fold_at(level: Level, dtype: DType, op: Reduction, job: kernel::Job<'_>) -> Result<(), UnsupportedReduction> {
    let len = job.own.len();
    assert!(len.is_multiple_of(dtype.bytes()), "{len} bytes are no whole number of {dtype}");
    assert!(job.at <= job.others.len(), "this rank's place is among the inputs'");
    assert!(job.others.iter().all(|other| other.len() == len), "inputs of one length");
    assert!(job.copy.as_ref().is_none_or(|copy| copy.len() == len), "a copy of the inputs' length");
    let by_power = job.divisor.is_power_of_two() && kernel::POWERS.contains(&job.divisor);
    macro_rules! floats {
        ($kind:ty, $least:ty, $greatest:ty) => {
            match op {
                Reduction::Sum => kernel::run::<$kind, Sum>(level, job),
                Reduction::Avg if by_power => kernel::run::<$kind, AvgOfPower>(level, job),
                Reduction::Avg => kernel::run::<$kind, Avg>(level, job),
                Reduction::Min => kernel::run::<$least, Min>(level, job),
                Reduction::Max => kernel::run::<$greatest, Max>(level, job),
                Reduction::Product => kernel::run::<$kind, Product>(level, job),
                _ => return Err(UnsupportedReduction { dtype, op }),
            }
        };
        ($kind:ty) => {
            floats!($kind, $kind, $kind)
        };
    }
    macro_rules! integers {
        ($kind:ty) => {
            match op {
                Reduction::BitAnd => kernel::run::<$kind, And>(level, job),
                Reduction::BitOr => kernel::run::<$kind, Or>(level, job),
                Reduction::BitXor => kernel::run::<$kind, Xor>(level, job),
                _ => floats!($kind),
            }
        };
    }
    match dtype {
        DType::F32 => floats!(Plain<f32>),
        DType::F64 => floats!(Plain<f64>),
        DType::F16 => floats!(Packed<f16>, Least<f16>, Greatest<f16>),
        DType::BF16 => floats!(Packed<bf16>, Least<bf16>, Greatest<bf16>),
        DType::I8 => integers!(Plain<i8>),
        DType::U8 => integers!(Plain<u8>),
        DType::I16 => integers!(Plain<i16>),
        DType::U16 => integers!(Plain<u16>),
        DType::I32 => integers!(Plain<i32>),
        DType::U32 => integers!(Plain<u32>),
        DType::I64 => integers!(Plain<i64>),
        DType::U64 => integers!(Plain<u64>),
        DType::Bool => match op {
            Reduction::Sum | Reduction::Max | Reduction::BitOr => kernel::run::<kernel::Truth, Or>(level, job),
            Reduction::Product | Reduction::Min | Reduction::BitAnd => kernel::run::<kernel::Truth, And>(level, job),
            Reduction::BitXor => kernel::run::<kernel::Truth, Xor>(level, job),
            Reduction::Avg => return Err(UnsupportedReduction { dtype, op }),
        },
        DType::F8E4M3Fn => floats!(F8<float8::E4M3Fn>),
        DType::F8E5M2 => floats!(F8<float8::E5M2>),
        DType::F8E4M3FnUz => floats!(F8<float8::E4M3FnUz>),
        DType::F8E5M2FnUz => floats!(F8<float8::E5M2FnUz>),
        DType::F8 | DType::C32 | DType::C64 | DType::C128 => return Err(UnsupportedReduction { dtype, op }),
    }
    Ok(())
}

/// The division of an average, in place; nothing for other reductions.
///
/// # Errors
/// As [`check`].
pub fn finish(dtype: DType, op: Reduction, dst: &mut [u8], divisor: usize) -> Result<(), UnsupportedReduction> {
    if op == Reduction::Avg { fold(dtype, op, dst, 0, &[], None, divisor) } else { check(dtype, op) }
}

#[cfg(test)]
mod tests;
