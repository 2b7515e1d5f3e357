//! Kernels against the plainest possible loop, and against each other.

use super::*;
use kernel::Element;

const LENGTHS: [usize; 14] = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 70, 1023, 1025, 5000];

/// Small, exact values of either sign, and no zero: a product of floats would have to tell one zero from the other.
fn value(rank: usize, i: usize) -> i64 {
    match ((i * 7 + rank * 13) % 11) as i64 - 5 {
        0 => 6,
        value => value,
    }
}

fn encode(dtype: DType, value: i64) -> Vec<u8> {
    match dtype {
        DType::F32 => (value as f32).to_le_bytes().to_vec(),
        DType::F64 => (value as f64).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f64(value as f64).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f64(value as f64).to_le_bytes().to_vec(),
        DType::Bool => vec![u8::from(value > 0)],
        DType::F8E4M3Fn => F8::<float8::E4M3Fn>::put(value as f32).to_vec(),
        DType::F8E5M2 => F8::<float8::E5M2>::put(value as f32).to_vec(),
        DType::F8E4M3FnUz => F8::<float8::E4M3FnUz>::put(value as f32).to_vec(),
        DType::F8E5M2FnUz => F8::<float8::E5M2FnUz>::put(value as f32).to_vec(),
        _ => value.to_le_bytes()[..dtype.bytes()].to_vec(),
    }
}

fn combine(dtype: DType, op: Reduction, a: i64, b: i64) -> i64 {
    let unsigned = matches!(dtype, DType::U8 | DType::U16 | DType::U32 | DType::U64);
    let truth = dtype == DType::Bool;
    let (a, b) = if truth { (i64::from(a > 0), i64::from(b > 0)) } else { (a, b) };
    match op {
        Reduction::Sum | Reduction::Avg if truth => a | b,
        Reduction::Sum | Reduction::Avg => a.wrapping_add(b),
        Reduction::Product => a.wrapping_mul(b),
        Reduction::Min if unsigned => (a as u64).min(b as u64) as i64,
        Reduction::Max if unsigned => (a as u64).max(b as u64) as i64,
        Reduction::Min => a.min(b),
        Reduction::Max => a.max(b),
        Reduction::BitAnd => a & b,
        Reduction::BitOr => a | b,
        Reduction::BitXor => a ^ b,
    }
}

fn every(mut body: impl FnMut(DType, Reduction)) {
    for code in 0..21 {
        for op in 0..8 {
            let (dtype, op) = (DType::from_code(code).unwrap(), Reduction::from_code(op).unwrap());
            if check(dtype, op).is_ok() && op != Reduction::Avg {
                body(dtype, op);
            }
        }
    }
}

#[test]
fn every_fold_gives_what_the_plainest_loop_gives() {
    every(|dtype, op| {
        for ranks in 1..=5 {
            for len in LENGTHS {
                let input = |rank| (0..len).flat_map(|i| encode(dtype, value(rank, i))).collect::<Vec<u8>>();
                let expected: Vec<u8> = (0..len)
                    .flat_map(|i| {
                        let all = (1..ranks).fold(value(0, i), |sum, rank| combine(dtype, op, sum, value(rank, i)));
                        encode(dtype, all)
                    })
                    .collect();
                for at in 0..ranks {
                    let mut own = input(at);
                    let others: Vec<Vec<u8>> = (0..ranks).filter(|&rank| rank != at).map(input).collect();
                    let others: Vec<&[u8]> = others.iter().map(Vec::as_slice).collect();
                    let mut copy = vec![9; own.len()];
                    fold(dtype, op, &mut own, at, &others, (ranks % 2 == 0).then_some(&mut copy), ranks).unwrap();
                    assert_eq!(own, expected, "{dtype} {op:?} {ranks} ranks, {len} elements, at {at}");
                    assert!(ranks % 2 == 1 || copy == expected);
                }
            }
        }
    });
}

#[test]
fn bytes_of_any_alignment_will_do() {
    every(|dtype, op| {
        let len = 37 * dtype.bytes();
        let mut aligned: Vec<u8> = (0..37).flat_map(|i| encode(dtype, value(0, i))).collect();
        let other: Vec<u8> = (0..37).flat_map(|i| encode(dtype, value(1, i))).collect();
        let mut shifted = [vec![0], aligned.clone()].concat();
        reduce_into(dtype, op, &mut aligned, &other).unwrap();
        reduce_into(dtype, op, &mut shifted[1..=len], &other).unwrap();
        assert_eq!(aligned, shifted[1..=len]);
    });
}

#[test]
fn averages_divide_once_at_the_end() {
    let (a, b, c) = (7i32.to_le_bytes(), (-2i32).to_le_bytes(), (-9i32).to_le_bytes());
    let mut own = a;
    fold(DType::I32, Reduction::Avg, &mut own, 0, &[&b, &c], None, 3).unwrap();
    assert_eq!(i32::from_le_bytes(own), -1, "-4 / 3, cut towards zero");
    let mut own = 5f32.to_le_bytes();
    finish(DType::F32, Reduction::Avg, &mut own, 2).unwrap();
    assert_eq!(f32::from_le_bytes(own), 2.5);
    finish(DType::F32, Reduction::Sum, &mut own, 2).unwrap();
    assert_eq!(f32::from_le_bytes(own), 2.5);
}

#[test]
fn sixteen_bit_floats_are_rounded_once() {
    // 256 + 1 + 1: in bfloat16, 256 + 1 rounds back to 256, so rounding each time would lose both ones.
    let [big, one] = [256.0, 1.0].map(|value| bf16::from_f32(value).to_le_bytes());
    let mut own = big;
    fold(DType::BF16, Reduction::Sum, &mut own, 0, &[&one, &one], None, 3).unwrap();
    assert_eq!(bf16::from_le_bytes(own).to_f32(), 258.0);
    for bits in 0..=u16::MAX {
        for dtype in [DType::BF16, DType::F16] {
            let mut own = bits.to_le_bytes();
            fold(dtype, Reduction::Sum, &mut own, 0, &[], None, 1).unwrap();
            let nan = if dtype == DType::BF16 { bf16::from_bits(bits).is_nan() } else { f16::from_bits(bits).is_nan() };
            assert!(nan || own == bits.to_le_bytes(), "{bits:#x} of {dtype} changed by a trip through f32");
        }
    }
}

/// Any bits at all, with NaN of many kinds, zeros of both signs and infinities more often than chance has them.
fn noise(dtype: DType, count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let special = [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -f64::NAN, 1.0, 65504.0, 3.4e38, 1e-40];
    let mut element = || {
        let (bits, choice) = (next(), next() as usize % 20);
        match (dtype, special.get(choice)) {
            (DType::F64, Some(value)) => value.to_le_bytes().to_vec(),
            (DType::F32, Some(value)) => (*value as f32).to_le_bytes().to_vec(),
            (DType::F16, Some(value)) => f16::from_f64(*value).to_le_bytes().to_vec(),
            (DType::BF16, Some(value)) => bf16::from_f64(*value).to_le_bytes().to_vec(),
            _ => bits.to_le_bytes()[..dtype.bytes()].to_vec(),
        }
    };
    (0..count).flat_map(|_| element()).collect()
}

fn every_reduction(mut body: impl FnMut(DType, Reduction)) {
    every(&mut body);
    for dtype in (0..21).filter_map(DType::from_code).filter(|&dtype| check(dtype, Reduction::Avg).is_ok()) {
        body(dtype, Reduction::Avg);
    }
}

#[test]
fn every_set_of_instructions_and_every_cut_gives_the_same_bits() {
    let (all, lengths): (usize, Vec<usize>) = (3001, (0..=70).chain([511, 512, 513, 1025, 3001]).collect());
    every_reduction(|dtype, op| {
        for (ranks, at) in [(2, 0), (2, 1), (3, 1), (5, 4)] {
            let inputs: Vec<Vec<u8>> = (0..ranks).map(|rank| noise(dtype, all, rank as u64 + 1)).collect();
            let others = |range: std::ops::Range<usize>| -> Vec<&[u8]> {
                (0..ranks).filter(|&rank| rank != at).map(|rank| &inputs[rank][range.clone()]).collect()
            };
            // One element at a time: nothing is wide then.
            let mut expected = inputs[at].clone();
            for (i, own) in expected.chunks_mut(dtype.bytes()).enumerate() {
                let others = others(i * dtype.bytes()..(i + 1) * dtype.bytes());
                let job = kernel::Job { own, at, others: &others, copy: None, divisor: ranks };
                fold_at(Level::all().next().unwrap(), dtype, op, job).unwrap();
            }
            for level in Level::all() {
                for &len in &lengths {
                    let bytes = len * dtype.bytes();
                    let (mut own, mut copy) = (inputs[at][..bytes].to_vec(), vec![1; bytes]);
                    let (others, wants_copy) = (others(0..bytes), len % 2 == 0);
                    let copied = wants_copy.then_some(&mut copy[..]);
                    let job = kernel::Job { own: &mut own, at, others: &others, copy: copied, divisor: ranks };
                    fold_at(level, dtype, op, job).unwrap();
                    assert!(own == expected[..bytes], "{level:?}: {dtype} {op:?}, {ranks} ranks, {len} elements");
                    assert!(!wants_copy || copy == own, "{level:?}: {dtype} {op:?}, the copy of {len} elements");
                }
            }
        }
    });
}

/// What `op` makes of two 16-bit floats and perhaps of a third, one after the other, by the plainest means.
fn plain(dtype: DType, op: Reduction, inputs: &[[u8; 2]], divisor: usize) -> [u8; 2] {
    let value = |bytes: &[u8; 2]| match dtype {
        DType::F16 => f16::from_le_bytes(*bytes).to_f32(),
        _ => bf16::from_le_bytes(*bytes).to_f32(),
    };
    let both = |a: f32, b: f32| match op {
        Reduction::Sum | Reduction::Avg => a + b,
        Reduction::Product => a * b,
        _ if a.is_nan() || b.is_nan() => f32::NAN,
        Reduction::Min => {
            if a.total_cmp(&b).is_lt() {
                a
            } else {
                b
            }
        }
        _ => {
            if a.total_cmp(&b).is_gt() {
                a
            } else {
                b
            }
        }
    };
    let found = inputs.iter().map(value).reduce(both).unwrap();
    let found = if op == Reduction::Avg { found / divisor as f32 } else { found };
    match dtype {
        DType::F16 if found.is_nan() => f16::NAN.to_le_bytes(),
        DType::F16 => f16::from_f32(found).to_le_bytes(),
        _ if found.is_nan() => bf16::NAN.to_le_bytes(),
        _ => bf16::from_f32(found).to_le_bytes(),
    }
}

#[test]
fn all_16_bit_floats_are_combined_alike_by_every_set_of_instructions() {
    // In blocks of ordinary values, denormal ones and such as are no numbers, and in both of all.
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let ops = [Reduction::Sum, Reduction::Avg, Reduction::Min, Reduction::Max, Reduction::Product];
    for other in
        [0, 0x8000, 0x0001, 0x807f, 0x0400, 0x8081, 0x3c01, 0x3f80, 0xbf81, 0x7bff, 0xfc00, 0x7f7f, 0xff80, 0x7fc1]
    {
        let mut others: Vec<u8> = u16::to_le_bytes(other).repeat(1 << 16);
        // One odd element in a block of ordinary ones.
        others[2 * 0x4000..2 * 0x4000 + 2].copy_from_slice(&0x0001u16.to_le_bytes());
        let third: Vec<u8> = (0..=u16::MAX).flat_map(|bits| bits.wrapping_mul(0x9e37).to_le_bytes()).collect();
        for (dtype, op) in [DType::F16, DType::BF16].into_iter().flat_map(|dtype| ops.map(|op| (dtype, op))) {
            for inputs in [&[&others[..]][..], &[&others, &third]] {
                let divisor = inputs.len() + 1;
                let expected: Vec<u8> = (0..1 << 16)
                    .flat_map(|i| {
                        let at = |input: &[u8]| input.as_chunks().0[i];
                        let elements = [at(&all), at(inputs[0]), at(inputs[inputs.len() - 1])];
                        plain(dtype, op, &elements[..divisor], divisor)
                    })
                    .collect();
                for level in Level::all() {
                    let mut own = all.clone();
                    let job = kernel::Job { own: &mut own, at: 0, others: inputs, copy: None, divisor };
                    fold_at(level, dtype, op, job).unwrap();
                    assert!(own == expected, "{level:?}: {dtype} {op:?} of {divisor} with {other:#06x}");
                }
            }
        }
    }
}

#[test]
fn an_average_by_a_power_of_two_has_the_bits_of_a_division() {
    every_reduction(|dtype, op| {
        if op != Reduction::Avg {
            return;
        }
        for divisor in (2..=6).map(|power| 1 << power).chain([128, 256]) {
            let (own, other) = (noise(dtype, 3001, 5), noise(dtype, 3001, 6));
            let fold = |at: Level, by: fn(Level, DType, kernel::Job<'_>)| {
                let mut own = own.clone();
                by(at, dtype, kernel::Job { own: &mut own, at: 0, others: &[&other], copy: None, divisor });
                own
            };
            for level in Level::all() {
                let expected = fold(level, divided);
                let got = fold(level, |level, dtype, job| fold_at(level, dtype, Reduction::Avg, job).unwrap());
                assert!(got == expected, "{level:?}: {dtype} by {divisor}");
            }
        }
    });
}

/// An average by division, whatever the divisor.
fn divided(level: Level, dtype: DType, job: kernel::Job<'_>) {
    match dtype {
        DType::F32 => kernel::run::<Plain<f32>, Avg>(level, job),
        DType::F64 => kernel::run::<Plain<f64>, Avg>(level, job),
        DType::F16 => kernel::run::<Packed<f16>, Avg>(level, job),
        DType::BF16 => kernel::run::<Packed<bf16>, Avg>(level, job),
        DType::I8 => kernel::run::<Plain<i8>, Avg>(level, job),
        DType::U8 => kernel::run::<Plain<u8>, Avg>(level, job),
        DType::I16 => kernel::run::<Plain<i16>, Avg>(level, job),
        DType::U16 => kernel::run::<Plain<u16>, Avg>(level, job),
        DType::I32 => kernel::run::<Plain<i32>, Avg>(level, job),
        DType::U32 => kernel::run::<Plain<u32>, Avg>(level, job),
        DType::I64 => kernel::run::<Plain<i64>, Avg>(level, job),
        DType::U64 => kernel::run::<Plain<u64>, Avg>(level, job),
        DType::F8E4M3Fn => kernel::run::<F8<float8::E4M3Fn>, Avg>(level, job),
        DType::F8E5M2 => kernel::run::<F8<float8::E5M2>, Avg>(level, job),
        DType::F8E4M3FnUz => kernel::run::<F8<float8::E4M3FnUz>, Avg>(level, job),
        _ => kernel::run::<F8<float8::E5M2FnUz>, Avg>(level, job),
    }
}

#[test]
fn two_inputs_commute_to_the_bit() {
    every_reduction(|dtype, op| {
        let (a, b) = (noise(dtype, 5000, 3), noise(dtype, 5000, 4));
        let (mut first, mut second) = (a.clone(), b.clone());
        fold(dtype, op, &mut first, 0, &[&b], None, 2).unwrap();
        fold(dtype, op, &mut second, 1, &[&a], None, 2).unwrap();
        assert!(first == second, "{dtype} {op:?}: two ranks would hold different bits");
    });
}

#[test]
fn a_minimum_takes_the_negative_zero_and_a_maximum_the_positive_one() {
    for (op, expected) in [(Reduction::Min, -0.0f32), (Reduction::Max, 0.0)] {
        for (a, b) in [(0.0f32, -0.0f32), (-0.0, 0.0)] {
            let mut own = a.to_le_bytes();
            reduce_into(DType::F32, op, &mut own, &b.to_le_bytes()).unwrap();
            assert_eq!(own, expected.to_le_bytes(), "{op:?} of {a} and {b}");
        }
    }
}

#[test]
fn a_nan_spreads_and_there_is_only_one() {
    for op in [Reduction::Min, Reduction::Max] {
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
            let mut own = a.to_le_bytes();
            reduce_into(DType::F32, op, &mut own, &b.to_le_bytes()).unwrap();
            assert!(f32::from_le_bytes(own).is_nan());
        }
    }
    for (a, b) in [(f32::INFINITY, f32::NEG_INFINITY), (-f32::NAN, 1.0), (f32::from_bits(0x7f80_0001), 0.0)] {
        let mut own = a.to_le_bytes();
        reduce_into(DType::F32, Reduction::Sum, &mut own, &b.to_le_bytes()).unwrap();
        assert_eq!(own, f32::NAN.to_le_bytes(), "whatever the processor makes of {a} + {b}");
    }
}

#[test]
fn what_has_no_meaning_is_refused() {
    for (dtype, op) in [(DType::F32, Reduction::BitXor), (DType::C64, Reduction::Sum), (DType::Bool, Reduction::Avg)] {
        assert_eq!(check(dtype, op), Err(UnsupportedReduction { dtype, op }));
    }
}
