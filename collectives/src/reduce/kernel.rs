//! Pure: the loops. Elements are read from and written to bytes, so that any alignment will do; the compiler makes wide
//! loads and stores of it.

use super::float8::{self, F8};
use super::level::{Instructions, Level, Loop};
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
    /// `values = bytes`.
    fn load<I: Instructions>(bytes: &[u8], values: &mut [Self::Value]);
    /// `values = values ∘ bytes`.
    fn combine<I: Instructions, O: Op<Self::Value>>(values: &mut [Self::Value], bytes: &[u8]);
    /// `bytes = values`, finished.
    fn store<I: Instructions, O: Op<Self::Value>>(values: &[Self::Value], bytes: &mut [u8], divisor: usize);
    /// `own = own ∘ other`, finished, without a detour by a block of values; false where there is no such way.
    #[inline(always)]
    fn pair<I: Instructions, O: Op<Self::Value>>(_own: &mut [u8], _other: &[u8], _divisor: usize) -> bool {
        false
    }
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
            fn load<I: Instructions>(bytes: &[u8], values: &mut [Self::Value]) {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<$bytes>().0) {
                    *value = Self::get(*bytes);
                }
            }

            #[inline(always)]
            fn combine<I: Instructions, O: Op<Self::Value>>(values: &mut [Self::Value], bytes: &[u8]) {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<$bytes>().0) {
                    *value = O::apply(*value, Self::get(*bytes));
                }
            }

            #[inline(always)]
            fn store<I: Instructions, O: Op<Self::Value>>(values: &[Self::Value], bytes: &mut [u8], divisor: usize) {
                for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<$bytes>().0) {
                    *bytes = Self::put(O::finish(*value, divisor));
                }
            }

            #[inline(always)]
            fn pair<I: Instructions, O: Op<Self::Value>>(own: &mut [u8], other: &[u8], divisor: usize) -> bool {
                for (own, other) in own.as_chunks_mut::<$bytes>().0.iter_mut().zip(other.as_chunks::<$bytes>().0) {
                    *own = Self::put(O::finish(O::apply(Self::get(*own), Self::get(*other)), divisor));
                }
                true
            }
        })*
    };
}

kind! {
    Plain<f32>, 4; Plain<f64>, 8;
    Plain<i8>, 1; Plain<u8>, 1; Plain<i16>, 2; Plain<u16>, 2;
    Plain<i32>, 4; Plain<u32>, 4; Plain<i64>, 8; Plain<u64>, 8;
    Truth, 1;
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

/// Carries out `job` with the instructions of `level`.
pub(super) fn run<K: Kind, O: Op<K::Value>>(level: Level, job: Job<'_>) {
    level.run(Fold::<K, O>(job, PhantomData));
}

struct Fold<'a, K, O>(Job<'a>, PhantomData<(K, O)>);

impl<K: Kind, O: Op<K::Value>> Loop for Fold<'_, K, O> {
    #[inline(always)]
    fn run<I: Instructions>(self) {
        let Job { own, at, others, mut copy, divisor } = self.0;
        if let ([other], None) = (others, &copy)
            && K::pair::<I, O>(own, other, divisor)
        {
            return;
        }
        let mut values = [K::Value::default(); BLOCK];
        let mut start = 0;
        while start < own.len() {
            let end = own.len().min(start + BLOCK * K::BYTES);
            let values = &mut values[..(end - start) / K::BYTES];
            for rank in 0..=others.len() {
                let input = match rank.cmp(&at) {
                    std::cmp::Ordering::Less => &others[rank][start..end],
                    std::cmp::Ordering::Equal => &own[start..end],
                    std::cmp::Ordering::Greater => &others[rank - 1][start..end],
                };
                if rank == 0 { K::load::<I>(input, values) } else { K::combine::<I, O>(values, input) }
            }
            K::store::<I, O>(values, &mut own[start..end], divisor);
            if let Some(copy) = &mut copy {
                copy[start..end].copy_from_slice(&own[start..end]);
            }
            start = end;
        }
    }
}
