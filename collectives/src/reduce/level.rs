//! Does: picks the widest instructions that this processor has, once; every kernel runs through here.

#![allow(unsafe_code)]

use std::sync::OnceLock;

/// A loop that the compiler makes wide for each level of instructions. `run` must be `#[inline(always)]`.
pub(super) trait Loop {
    fn run(self);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Runs `task` with the widest instructions there are.
pub(super) fn run(task: impl Loop) {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    match *LEVEL.get_or_init(detect) {
        Level::Baseline => task.run(),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `detect` has found these instructions on this processor.
        Level::Avx2 => unsafe { avx2(task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `detect` has found these instructions on this processor.
        Level::Avx512 => unsafe { avx512(task) },
    }
}

fn detect() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("f16c")
        {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn avx2(task: impl Loop) {
    task.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
fn avx512(task: impl Loop) {
    task.run();
}
