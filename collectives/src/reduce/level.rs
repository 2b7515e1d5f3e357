//! Does: picks the widest instructions that this processor has, once; every kernel runs through here.

#![allow(unsafe_code)]

use std::sync::OnceLock;

/// A loop that the compiler makes wide for each level of instructions. `run` must be `#[inline(always)]`.
pub(super) trait Loop {
    fn run<I: Instructions>(self);
}

/// What a loop may use beyond what the compiler makes of it.
pub(super) trait Instructions {
    /// Conversions of 16-bit floats: the processor has AVX and F16C.
    const F16C: bool;
    /// Conversions to bfloat16: the processor has AVX512F, BW, VL, DQ and BF16.
    const BF16: bool;
}

struct Any;
impl Instructions for Any {
    const F16C: bool = false;
    const BF16: bool = false;
}

#[cfg(target_arch = "x86_64")]
struct Converting;
#[cfg(target_arch = "x86_64")]
impl Instructions for Converting {
    const F16C: bool = true;
    const BF16: bool = false;
}

#[cfg(target_arch = "x86_64")]
struct ConvertingBoth;
#[cfg(target_arch = "x86_64")]
impl Instructions for ConvertingBoth {
    const F16C: bool = true;
    const BF16: bool = true;
}

/// A set of instructions. Made only by [`Level::widest`] and, in tests, `Level::all`: who holds one may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Level(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Level {
    /// The widest that this processor has.
    pub(super) fn widest() -> Self {
        static WIDEST: OnceLock<Level> = OnceLock::new();
        *WIDEST.get_or_init(|| available().last().expect("the baseline is always there"))
    }

    /// All that this processor has.
    #[cfg(test)]
    pub(super) fn all() -> impl Iterator<Item = Self> {
        available()
    }

    /// Runs `task` with these instructions.
    pub(super) fn run(self, task: impl Loop) {
        match self.0 {
            Set::Baseline => task.run::<Any>(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has found these instructions on this processor.
            Set::Avx2 => unsafe { avx2(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has found these instructions on this processor.
            Set::Avx512 => unsafe { avx512(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has found these instructions on this processor.
            Set::Avx512Bf16 => unsafe { avx512_bf16(task) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn available() -> impl DoubleEndedIterator<Item = Level> {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
    let sets = [(true, Set::Baseline), (avx2, Set::Avx2), (avx512, Set::Avx512), (bf16, Set::Avx512Bf16)];
    sets.into_iter().filter_map(|(there, set)| there.then_some(Level(set)))
}

#[cfg(not(target_arch = "x86_64"))]
fn available() -> impl DoubleEndedIterator<Item = Level> {
    std::iter::once(Level(Set::Baseline))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn avx2(task: impl Loop) {
    task.run::<Converting>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn avx512(task: impl Loop) {
    task.run::<Converting>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn avx512_bf16(task: impl Loop) {
    task.run::<ConvertingBoth>();
}
