//! Pure: the loops. Elements are read from and written to bytes, so that any alignment will do; the compiler makes wide
//! loads and stores of it.

use super::extreme::{Greatest, Least};
use super::float8::{self, F8};
use super::level::{Instructions, Level, Loop};
use half::{bf16, f16};
use std::cmp::Ordering;
use std::marker::PhantomData;

/// Elements combined at a time when there are more than two inputs: the partial results stay in the first-level cache.
pub(super) const BLOCK: usize = 512;

/// What to combine.
pub(super) struct Job<'a> {
    pub(super) own: &'a mut [u8],
    pub(super) at: usize,
    pub(super) others: &'a [&'a [u8]],
    pub(super) copy: Option<&'a mut [u8]>,
    pub(super) divisor: usize,
}

/// How two values become one. Every operation commutes to the bit (NaN and zeros too), so that who holds which of
/// two inputs does not matter.
pub(super) trait Op<T: Copy> {
    fn apply(a: T, b: T) -> T;
    /// What is left to do when all inputs are in.
    #[inline(always)]
    fn finish(value: T, _divisor: usize) -> T {
        value
    }
}

pub(super) struct Sum;
pub(super) struct Avg;
/// The same, by a divisor of [`POWERS`].
pub(super) struct AvgOfPower;
pub(super) struct Min;
pub(super) struct Max;
pub(super) struct Product;
pub(super) struct And;
pub(super) struct Or;
pub(super) struct Xor;

/// Partial results of a block.
pub(super) type Block<K> = [<K as Kind>::Value; BLOCK];

/// A type of element: how its bytes are combined, pass by pass.
pub(super) trait Kind {
    type Value: Copy + Default;
    const BYTES: usize;
    /// `own`, finished: there is nothing to combine it with.
    fn alone<I: Instructions, O: Op<Self::Value>>(own: &mut [u8], divisor: usize);
    /// `own = own ∘ other`, finished.
    fn pair<I: Instructions, O: Op<Self::Value>>(own: &mut [u8], other: &[u8], divisor: usize);
    /// `values = one ∘ other`.
    fn first<I: Instructions, O: Op<Self::Value>>(values: &mut Block<Self>, one: &[u8], other: &[u8]);
    /// `values = values ∘ input`.
    fn next<I: Instructions, O: Op<Self::Value>>(values: &mut Block<Self>, input: &[u8]);
    /// `own = values ∘ input`, finished.
    fn last<I: Instructions, O: Op<Self::Value>>(values: &Block<Self>, input: &[u8], own: &mut [u8], divisor: usize);
    /// `own = values ∘ own`, finished.
    fn last_own<I: Instructions, O: Op<Self::Value>>(values: &Block<Self>, own: &mut [u8], divisor: usize);
}

/// An element whose bytes become a value one by one; the compiler makes these loops wide.
pub(super) trait Element {
    type Value: Copy + Default;
    type Bytes: Copy;
    fn get(bytes: Self::Bytes) -> Self::Value;
    fn put(value: Self::Value) -> Self::Bytes;
}

macro_rules! kind {
    ($($element:ty, $bytes:literal);*) => {
        $(impl Kind for $element {
            type Value = <$element as Element>::Value;
            const BYTES: usize = $bytes;

            #[inline(always)]
            fn alone<I: Instructions, O: Op<Self::Value>>(own: &mut [u8], divisor: usize) {
                for own in own.as_chunks_mut::<$bytes>().0 {
                    *own = Self::put(O::finish(Self::get(*own), divisor));
                }
            }

            #[inline(always)]
            fn pair<I: Instructions, O: Op<Self::Value>>(own: &mut [u8], other: &[u8], divisor: usize) {
                for (own, other) in own.as_chunks_mut::<$bytes>().0.iter_mut().zip(other.as_chunks::<$bytes>().0) {
                    *own = Self::put(O::finish(O::apply(Self::get(*own), Self::get(*other)), divisor));
                }
            }

            #[inline(always)]
            fn first<I: Instructions, O: Op<Self::Value>>(
                values: &mut Block<Self>,
                one: &[u8],
                other: &[u8],
            ) {
                let inputs = one.as_chunks::<$bytes>().0.iter().zip(other.as_chunks::<$bytes>().0);
                for (value, (one, other)) in values.iter_mut().zip(inputs) {
                    *value = O::apply(Self::get(*one), Self::get(*other));
                }
            }

            #[inline(always)]
            fn next<I: Instructions, O: Op<Self::Value>>(values: &mut Block<Self>, input: &[u8]) {
                for (value, input) in values.iter_mut().zip(input.as_chunks::<$bytes>().0) {
                    *value = O::apply(*value, Self::get(*input));
                }
            }

            #[inline(always)]
            fn last<I: Instructions, O: Op<Self::Value>>(
                values: &Block<Self>,
                input: &[u8],
                own: &mut [u8],
                divisor: usize,
            ) {
                let operands = values.iter().zip(input.as_chunks::<$bytes>().0);
                for (own, (value, input)) in own.as_chunks_mut::<$bytes>().0.iter_mut().zip(operands) {
                    *own = Self::put(O::finish(O::apply(*value, Self::get(*input)), divisor));
                }
            }

            #[inline(always)]
            fn last_own<I: Instructions, O: Op<Self::Value>>(
                values: &Block<Self>,
                own: &mut [u8],
                divisor: usize,
            ) {
                for (own, value) in own.as_chunks_mut::<$bytes>().0.iter_mut().zip(values) {
                    *own = Self::put(O::finish(O::apply(*value, Self::get(*own)), divisor));
                }
            }
        })*
    };
}

kind! {
    Plain<f32>, 4; Plain<f64>, 8;
    Plain<i8>, 1; Plain<u8>, 1; Plain<i16>, 2; Plain<u16>, 2;
    Plain<i32>, 4; Plain<u32>, 4; Plain<i64>, 8; Plain<u64>, 8;
    Truth, 1; Least<f16>, 2; Least<bf16>, 2; Greatest<f16>, 2; Greatest<bf16>, 2;
    F8<float8::E4M3Fn>, 1; F8<float8::E5M2>, 1; F8<float8::E4M3FnUz>, 1; F8<float8::E5M2FnUz>, 1
}

/// An element that is computed with as it is.
pub(super) struct Plain<T>(PhantomData<T>);

/// A bool: any byte but 0 is true.
pub(super) struct Truth;

macro_rules! plain {
    ($($type:ty, $put:expr);*) => {
        $(impl Element for Plain<$type> {
            type Value = $type;
            type Bytes = [u8; size_of::<$type>()];

            #[inline(always)]
            fn get(bytes: Self::Bytes) -> $type {
                <$type>::from_le_bytes(bytes)
            }

            #[inline(always)]
            fn put(value: $type) -> Self::Bytes {
                let put: fn($type) -> $type = $put;
                put(value).to_le_bytes()
            }
        })*
    };
}

plain! {
    f32, |value| if value.is_nan() { f32::NAN } else { value };
    f64, |value| if value.is_nan() { f64::NAN } else { value };
    i8, |value| value; u8, |value| value; i16, |value| value; u16, |value| value;
    i32, |value| value; u32, |value| value; i64, |value| value; u64, |value| value
}

impl Element for Truth {
    type Value = u8;
    type Bytes = [u8; 1];

    #[inline(always)]
    fn get(bytes: [u8; 1]) -> u8 {
        u8::from(bytes[0] != 0)
    }

    #[inline(always)]
    fn put(value: u8) -> [u8; 1] {
        [value]
    }
}

macro_rules! op {
    ($op:ident, $($type:ty),*; $apply:expr) => {
        $(impl Op<$type> for $op {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type {
                let apply: fn($type, $type) -> $type = $apply;
                apply(a, b)
            }
        })*
    };
}

macro_rules! extreme {
    ($op:ident, $before:tt, $signs:tt; $($type:ident),*) => {
        $(impl Op<$type> for $op {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type {
                let (one, other) = (if a $before b { a } else { b }, if b $before a { b } else { a });
                let found = $type::from_bits(one.to_bits() $signs other.to_bits());
                if a.is_nan() || b.is_nan() { $type::NAN } else { found }
            }
        })*
    };
}

macro_rules! average {
    ($wide:ty; $($type:ty),*; $apply:expr) => {
        $(impl Op<$type> for Avg {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type {
                let apply: fn($type, $type) -> $type = $apply;
                apply(a, b)
            }
            #[inline(always)]
            fn finish(value: $type, divisor: usize) -> $type {
                (value as $wide / divisor as $wide) as $type
            }
        })*
    };
}

/// Divisors by which `AvgOfPower` divides, if they are powers of two: the inverse of one is exact, and it fits every integer.
pub(super) const POWERS: std::ops::RangeInclusive<usize> = 2..=64;

macro_rules! average_of_power {
    ($($type:ty),*; $finish:expr) => {
        $(impl Op<$type> for AvgOfPower {
            #[inline(always)]
            fn apply(a: $type, b: $type) -> $type {
                <Sum as Op<$type>>::apply(a, b)
            }
            #[inline(always)]
            fn finish(value: $type, divisor: usize) -> $type {
                let finish: fn($type, $type, u32) -> $type = $finish;
                finish(value, divisor as $type, divisor.trailing_zeros())
            }
        })*
    };
}

// Which NaN comes of two is the processor's choice, so `put` makes them all the same one. Of two zeros, a minimum takes the
// negative one and a maximum the positive one, whichever comes first: `if` takes `b` of two equals, so each way gives one
// of the zeros, and the sign bits tell.
op!(Sum, f32, f64; |a, b| a + b);
op!(Product, f32, f64; |a, b| a * b);
extreme!(Min, <, |; f32, f64);
extreme!(Max, >, &; f32, f64);
op!(Sum, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a.wrapping_add(b));
op!(Product, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a.wrapping_mul(b));
op!(Min, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a.min(b));
op!(Max, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a.max(b));
op!(And, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a & b);
op!(Or, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a | b);
op!(Xor, i8, u8, i16, u16, i32, u32, i64, u64; |a, b| a ^ b);
average!(f32; f32; |a, b| a + b);
average!(f64; f64; |a, b| a + b);
average!(i64; i8, i16, i32, i64; |a, b| a.wrapping_add(b));
average!(u64; u8, u16, u32, u64; |a, b| a.wrapping_add(b));
average_of_power!(f32, f64; |value, divisor, _| value * (1.0 / divisor));
average_of_power!(u8, u16, u32, u64; |value, _, places| value >> places);
// What is negative is cut towards zero too.
average_of_power!(i8, i16, i32, i64; |value, divisor, places| {
    value.wrapping_add(if value < 0 { divisor - 1 } else { 0 }) >> places
});

/// Carries out `job` with the instructions of `level`.
pub(super) fn run<K: Kind, O: Op<K::Value>>(level: Level, job: Job<'_>) {
    level.run(Fold::<K, O>(job, PhantomData));
}

struct Fold<'a, K, O>(Job<'a>, PhantomData<(K, O)>);

impl<K: Kind, O: Op<K::Value>> Loop for Fold<'_, K, O> {
    #[inline(always)]
    fn run<I: Instructions>(self) {
        let Job { own, at, others, mut copy, divisor } = self.0;
        // Of several inputs; zeroing it would take two short ones longer than adding them up.
        let mut values = None;
        // One pass will do for two inputs, however long they are.
        let block = if others.len() < 2 && copy.is_none() { own.len() } else { BLOCK * K::BYTES };
        let mut start = 0;
        while start < own.len() {
            let end = own.len().min(start + block);
            let own = &mut own[start..end];
            match others {
                [] => K::alone::<I, O>(own, divisor),
                [other] => K::pair::<I, O>(own, &other[start..end], divisor),
                [one, other, ..] => {
                    let values = values.get_or_insert_with(|| [K::Value::default(); BLOCK]);
                    // The first two commute.
                    let second = if at < 2 { &*own } else { &other[start..end] };
                    K::first::<I, O>(values, &one[start..end], second);
                    for rank in 2..others.len() {
                        let input = match rank.cmp(&at) {
                            Ordering::Less => &others[rank][start..end],
                            Ordering::Equal => &*own,
                            Ordering::Greater => &others[rank - 1][start..end],
                        };
                        K::next::<I, O>(values, input);
                    }
                    if at == others.len() {
                        K::last_own::<I, O>(values, own, divisor);
                    } else {
                        K::last::<I, O>(values, &others[others.len() - 1][start..end], own, divisor);
                    }
                }
            }
            if let Some(copy) = &mut copy {
                copy[start..end].copy_from_slice(own);
            }
            start = end;
        }
    }
}
