//! Pure: the loops. Elements are read from and written to bytes, so that any alignment will do; the compiler makes wide
//! loads and stores of it.

use super::level::{self, Loop};
use std::marker::PhantomData;

/// Elements combined at a time when there are more than two inputs: the partial results stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

/// What to combine.
pub(super) struct Job<'a> {
    pub(super) own: &'a mut [u8],
    pub(super) at: usize,
    pub(super) others: &'a [&'a [u8]],
    pub(super) copy: Option<&'a mut [u8]>,
    pub(super) divisor: usize,
}

/// How two values become one.
pub(super) trait Op<T> {
    fn apply(a: T, b: T) -> T;
}

pub(super) struct Sum;
pub(super) struct Min;
pub(super) struct Max;
pub(super) struct Product;
pub(super) struct And;
pub(super) struct Or;
pub(super) struct Xor;

/// A type of element: how its bytes become values to compute with, and back.
pub(super) trait Kind {
    type Value: Copy + Default;
    const BYTES: usize;
    fn load(bytes: &[u8], values: &mut [Self::Value]);
    fn store(values: &[Self::Value], bytes: &mut [u8]);
    fn divide(value: Self::Value, by: usize) -> Self::Value;
    /// `own = own ∘ other` without a detour, where values and elements are the same.
    fn pair<O: Op<Self::Value>>(own: &mut [u8], other: &[u8]) -> bool;
}

/// An element that is computed with as it is.
pub(super) struct Plain<T>(PhantomData<T>);

/// A bool: any byte but 0 is true.
pub(super) struct Truth;

macro_rules! plain {
    ($($type:ty, $divide:expr);*) => {
        $(impl Kind for Plain<$type> {
            type Value = $type;
            const BYTES: usize = size_of::<$type>();

            #[inline(always)]
            fn load(bytes: &[u8], values: &mut [$type]) {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = <$type>::from_le_bytes(*bytes);
                }
            }

            #[inline(always)]
            fn store(values: &[$type], bytes: &mut [u8]) {
                for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = value.to_le_bytes();
                }
            }

            #[inline(always)]
            fn divide(value: $type, by: usize) -> $type {
                let divide: fn($type, usize) -> $type = $divide;
                divide(value, by)
            }

            #[inline(always)]
            fn pair<O: Op<$type>>(own: &mut [u8], other: &[u8]) -> bool {
                for (own, other) in own.as_chunks_mut().0.iter_mut().zip(other.as_chunks().0) {
                    *own = O::apply(<$type>::from_le_bytes(*own), <$type>::from_le_bytes(*other)).to_le_bytes();
                }
                true
            }
        })*
    };
}

plain! {
    f32, |value, by| value / by as f32;
    f64, |value, by| value / by as f64;
    i8, |value, by| (i128::from(value) / by as i128) as i8;
    u8, |value, by| (usize::from(value) / by) as u8;
    i16, |value, by| (i128::from(value) / by as i128) as i16;
    u16, |value, by| (usize::from(value) / by) as u16;
    i32, |value, by| (i128::from(value) / by as i128) as i32;
    u32, |value, by| (u64::from(value) / by as u64) as u32;
    i64, |value, by| (i128::from(value) / by as i128) as i64;
    u64, |value, by| value / by as u64
}

impl Kind for Truth {
    type Value = u8;
    const BYTES: usize = 1;

    #[inline(always)]
    fn load(bytes: &[u8], values: &mut [u8]) {
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value = u8::from(*byte != 0);
        }
    }

    #[inline(always)]
    fn store(values: &[u8], bytes: &mut [u8]) {
        bytes.copy_from_slice(values);
    }

    fn divide(value: u8, _by: usize) -> u8 {
        value
    }

    #[inline(always)]
    fn pair<O: Op<u8>>(_own: &mut [u8], _other: &[u8]) -> bool {
        false
    }
}

macro_rules! float_ops {
    ($($type:ty),*) => {
        $(impl Op<$type> for Sum {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a + b }
        }
        impl Op<$type> for Product {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a * b }
        }
        impl Op<$type> for Min {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { if a < b || a.is_nan() { a } else { b } }
        }
        impl Op<$type> for Max {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { if a > b || a.is_nan() { a } else { b } }
        })*
    };
}

macro_rules! integer_ops {
    ($($type:ty),*) => {
        $(impl Op<$type> for Sum {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a.wrapping_add(b) }
        }
        impl Op<$type> for Product {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a.wrapping_mul(b) }
        }
        impl Op<$type> for Min {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a.min(b) }
        }
        impl Op<$type> for Max {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a.max(b) }
        }
        impl Op<$type> for And {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a & b }
        }
        impl Op<$type> for Or {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a | b }
        }
        impl Op<$type> for Xor {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type { a ^ b }
        })*
    };
}

float_ops!(f32, f64);
integer_ops!(i8, u8, i16, u16, i32, u32, i64, u64);

/// Carries out `job` with the widest instructions there are.
pub(super) fn run<K: Kind, O: Op<K::Value>>(job: Job<'_>) {
    level::run(Fold::<K, O>(job, PhantomData));
}

struct Fold<'a, K, O>(Job<'a>, PhantomData<(K, O)>);

impl<K: Kind, O: Op<K::Value>> Loop for Fold<'_, K, O> {
    #[inline(always)]
    fn run(self) {
        let Job { own, at, others, mut copy, divisor } = self.0;
        // Two inputs commute, to the bit: which of them is first does not matter.
        if let ([other], None, 1) = (others, &copy, divisor)
            && K::pair::<O>(own, other)
        {
            return;
        }
        let (mut sum, mut next) = ([K::Value::default(); BLOCK], [K::Value::default(); BLOCK]);
        let mut start = 0;
        while start < own.len() {
            let end = own.len().min(start + BLOCK * K::BYTES);
            let count = (end - start) / K::BYTES;
            let (sum, next) = (&mut sum[..count], &mut next[..count]);
            for rank in 0..=others.len() {
                let input = match rank.cmp(&at) {
                    std::cmp::Ordering::Less => &others[rank][start..end],
                    std::cmp::Ordering::Equal => &own[start..end],
                    std::cmp::Ordering::Greater => &others[rank - 1][start..end],
                };
                if rank == 0 {
                    K::load(input, sum);
                    continue;
                }
                K::load(input, next);
                for (sum, next) in sum.iter_mut().zip(next.iter()) {
                    *sum = O::apply(*sum, *next);
                }
            }
            if divisor > 1 {
                sum.iter_mut().for_each(|sum| *sum = K::divide(*sum, divisor));
            }
            K::store(sum, &mut own[start..end]);
            if let Some(copy) = &mut copy {
                copy[start..end].copy_from_slice(&own[start..end]);
            }
            start = end;
        }
    }
}
