//! Pure: the arithmetic of a part: adding gradients, applying an update rule. In blocks that stay in the first cache.
//!
//! Elements arrive as bytes in any of the four types and are computed with as `f32` or `f64`. Every loop runs over slices
//! of one length, so that the compiler makes vectors of it; vector and tail compute the same bits, as nothing is fused.

#![allow(unsafe_code)]

mod adaptive;

use crate::{Adam, DType, Sgd, UpdateRule};
use adaptive::{AdagradStep, FtrlStep};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Sub};

/// Elements computed at a time: value, gradient and state of a block fit the first cache.
pub(crate) const BLOCK: usize = 512;

/// A type to compute in.
pub(crate) trait Real:
    Copy
    + bytemuck::Pod
    + Default
    + Debug
    + PartialEq
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
    + MulAssign
    + Into<f64>
    + 'static
{
    /// The stored type that needs no conversion.
    const DTYPE: DType;
    fn of(value: f64) -> Self;
    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    /// Reads elements of type `dtype`.
    fn load(dtype: DType, from: &[u8], to: &mut [Self]);
    /// The elements themselves, where `stored` of type `dtype` holds them as they are computed with.
    fn in_place(dtype: DType, stored: &mut [u8]) -> Option<&mut [Self]> {
        let same = dtype == Self::DTYPE && cfg!(target_endian = "little");
        if same { bytemuck::try_cast_slice_mut(stored).ok() } else { None }
    }
    /// Writes elements of type `dtype`, rounding to nearest, ties to even.
    fn store(dtype: DType, from: &[Self], to: &mut [u8]);
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;

    fn of(value: f64) -> Self {
        value as f32
    }

    fn sqrt(self) -> Self {
        self.sqrt()
    }

    fn abs(self) -> Self {
        self.abs()
    }

    fn load(dtype: DType, from: &[u8], to: &mut [Self]) {
        match dtype {
            DType::F32 => to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| *to = f32::from_le_bytes(*from)),
            DType::BF16 => to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| {
                *to = f32::from_bits(u32::from(u16::from_le_bytes(*from)) << 16);
            }),
            DType::F16 => {
                let mut bits = [0; BLOCK];
                for (to, from) in to.chunks_mut(BLOCK).zip(from.chunks(2 * BLOCK)) {
                    let bits = &mut bits[..to.len()];
                    bits.iter_mut().zip(from.as_chunks().0).for_each(|(bits, from)| *bits = u16::from_le_bytes(*from));
                    bits.reinterpret_cast::<f16>().convert_to_f32_slice(to);
                }
            }
            DType::F64 => unreachable!("a table that computes in 32 bits takes no 64-bit gradient"),
        }
    }

    fn store(dtype: DType, from: &[Self], to: &mut [u8]) {
        match dtype {
            DType::F32 => to.as_chunks_mut().0.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_le_bytes()),
            DType::BF16 => to.as_chunks_mut().0.iter_mut().zip(from).for_each(|(to, from)| {
                *to = bf16_bits(*from).to_le_bytes();
            }),
            DType::F16 => {
                let mut halves = [f16::ZERO; BLOCK];
                for (to, from) in to.chunks_mut(2 * BLOCK).zip(from.chunks(BLOCK)) {
                    let halves = &mut halves[..from.len()];
                    halves.convert_from_f32_slice(from);
                    to.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(to, half)| *to = half.to_le_bytes());
                }
            }
            DType::F64 => unreachable!("a 64-bit table computes in 64 bits"),
        }
    }
}

/// The nearest bfloat16. The same bits as `bf16::from_f32`, without its branch.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    let nan = (bits >> 16) as u16 | 0x40;
    if value.is_nan() { nan } else { rounded }
}

impl Real for f64 {
    const DTYPE: DType = DType::F64;

    fn of(value: f64) -> Self {
        value
    }

    fn sqrt(self) -> Self {
        self.sqrt()
    }

    fn abs(self) -> Self {
        self.abs()
    }

    fn load(dtype: DType, from: &[u8], to: &mut [Self]) {
        match dtype {
            DType::F64 => to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| *to = f64::from_le_bytes(*from)),
            DType::F32 => to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| {
                *to = f32::from_le_bytes(*from).into();
            }),
            DType::F16 => to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| {
                *to = f16::from_le_bytes(*from).into();
            }),
            DType::BF16 => to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| {
                *to = bf16::from_le_bytes(*from).into();
            }),
        }
    }

    fn store(dtype: DType, from: &[Self], to: &mut [u8]) {
        assert!(dtype == DType::F64, "only a 64-bit table computes in 64 bits");
        to.as_chunks_mut().0.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_le_bytes());
    }
}

/// `sum = gradient`.
pub(crate) fn begin<C: Real>(sum: &mut [C], dtype: DType, gradient: &[u8]) {
    C::load(dtype, gradient, sum);
}

/// `sum += gradient`.
pub(crate) fn add<C: Real>(sum: &mut [C], dtype: DType, gradient: &[u8]) {
    let mut block = [C::default(); BLOCK];
    for (sum, gradient) in sum.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK * dtype.bytes())) {
        let block = &mut block[..sum.len()];
        C::load(dtype, gradient, block);
        sum.iter_mut().zip(block).for_each(|(sum, gradient)| *sum += *gradient);
    }
}

/// Asks for the memory of `row` before it is read.
#[inline(always)]
pub(crate) fn prefetch<C>(row: &[C]) {
    #[cfg(target_arch = "x86_64")]
    for at in row.chunks((64 / size_of::<C>()).max(1)) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint reads nothing, whatever the address; this one lies in `row`.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// A rule with its numbers in the type that is computed in, at one step.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step<C> {
    Sum,
    Replace,
    Sgd { minus_rate: C, weight_decay: Option<C>, momentum: Option<Momentum<C>> },
    Adam(AdamStep<C>),
    Adagrad(AdagradStep<C>),
    Ftrl(FtrlStep<C>),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Momentum<C> {
    keep: C,
    take: C,
    first: bool,
    nesterov: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamStep<C> {
    /// Added to the gradient.
    weight_decay: Option<C>,
    /// Multiplies the value.
    shrink: Option<C>,
    lerp: C,
    lerp_from_end: bool,
    beta2: C,
    one_less_beta2: C,
    root_correction: C,
    epsilon: C,
    minus_step: C,
}

impl<C: Real> Step<C> {
    /// `rule` at its `n`-th application, from 1.
    pub(crate) fn new(rule: &UpdateRule, n: u64) -> Self {
        let unless_0 = |value: f64| (value != 0.0).then(|| C::of(value));
        match *rule {
            UpdateRule::Sum => Self::Sum,
            UpdateRule::Replace => Self::Replace,
            UpdateRule::Sgd(Sgd { learning_rate, momentum, dampening, weight_decay, nesterov }) => Self::Sgd {
                minus_rate: C::of(-learning_rate),
                weight_decay: unless_0(weight_decay),
                momentum: unless_0(momentum).map(|keep| Momentum {
                    keep,
                    take: C::of(1.0 - dampening),
                    first: n == 1,
                    nesterov,
                }),
            },
            UpdateRule::Adam(Adam { learning_rate, beta1, beta2, epsilon, weight_decay, decoupled }) => {
                let power = |beta: f64| beta.powi(i32::try_from(n).unwrap_or(i32::MAX));
                let weight = 1.0 - beta1;
                let lerp_from_end = weight >= 0.5;
                Self::Adam(AdamStep {
                    weight_decay: unless_0(weight_decay).filter(|_| !decoupled),
                    shrink: unless_0(weight_decay)
                        .filter(|_| decoupled)
                        .map(|_| C::of(1.0 - learning_rate * weight_decay)),
                    lerp: if lerp_from_end { C::of(1.0) - C::of(weight) } else { C::of(weight) },
                    lerp_from_end,
                    beta2: C::of(beta2),
                    one_less_beta2: C::of(1.0 - beta2),
                    root_correction: C::of((1.0 - power(beta2)).sqrt()),
                    epsilon: C::of(epsilon),
                    minus_step: C::of(-(learning_rate / (1.0 - power(beta1)))),
                })
            }
            UpdateRule::Adagrad(adagrad) => Self::Adagrad(AdagradStep::new(adagrad, n)),
            UpdateRule::Ftrl(ftrl) => Self::Ftrl(FtrlStep::new(ftrl)),
        }
    }

    #[inline(always)]
    fn run_here(&self, value: &mut [C], gradient: &mut [C], first: &mut [C], second: &mut [C]) {
        match *self {
            Self::Sum => value.iter_mut().zip(gradient).for_each(|(value, gradient)| *value += *gradient),
            Self::Replace => value.copy_from_slice(gradient),
            Self::Sgd { minus_rate, weight_decay, momentum } => {
                add_decay(weight_decay, value, gradient);
                if let Some(momentum) = momentum {
                    momentum.run(gradient, first);
                }
                value.iter_mut().zip(gradient).for_each(|(value, gradient)| *value += minus_rate * *gradient);
            }
            Self::Adam(adam) => adam.run(value, gradient, first, second),
            Self::Adagrad(adagrad) => adagrad.run(value, gradient, first),
            Self::Ftrl(ftrl) => ftrl.run(value, gradient, first, second),
        }
    }

    /// Applies the rule to a block; `gradient` is used up. `first` and `second` are the state, empty where there is none.
    pub(crate) fn run(&self, value: &mut [C], gradient: &mut [C], first: &mut [C], second: &mut [C]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the line above has seen that this processor has AVX2.
            return unsafe { self.run_avx2(value, gradient, first, second) };
        }
        self.run_here(value, gradient, first, second);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn run_avx2(&self, value: &mut [C], gradient: &mut [C], first: &mut [C], second: &mut [C]) {
        self.run_here(value, gradient, first, second);
    }
}

#[inline(always)]
fn add_decay<C: Real>(weight_decay: Option<C>, value: &[C], gradient: &mut [C]) {
    if let Some(decay) = weight_decay {
        gradient.iter_mut().zip(value).for_each(|(gradient, value)| *gradient += decay * *value);
    }
}

impl<C: Real> Momentum<C> {
    #[inline(always)]
    fn run(&self, gradient: &mut [C], velocity: &mut [C]) {
        if self.first {
            velocity.copy_from_slice(gradient);
        } else {
            for (velocity, gradient) in velocity.iter_mut().zip(gradient.iter()) {
                *velocity = *velocity * self.keep + self.take * *gradient;
            }
        }
        if self.nesterov {
            for (gradient, velocity) in gradient.iter_mut().zip(velocity.iter()) {
                *gradient += self.keep * *velocity;
            }
        } else {
            gradient.copy_from_slice(velocity);
        }
    }
}

impl<C: Real> AdamStep<C> {
    #[inline(always)]
    fn run(&self, value: &mut [C], gradient: &mut [C], mean: &mut [C], square: &mut [C]) {
        if let Some(shrink) = self.shrink {
            value.iter_mut().for_each(|value| *value *= shrink);
        }
        add_decay(self.weight_decay, value, gradient);
        // torch's lerp: from whichever end is nearer.
        if self.lerp_from_end {
            for (mean, gradient) in mean.iter_mut().zip(gradient.iter()) {
                *mean = *gradient - (*gradient - *mean) * self.lerp;
            }
        } else {
            for (mean, gradient) in mean.iter_mut().zip(gradient.iter()) {
                *mean = *mean + self.lerp * (*gradient - *mean);
            }
        }
        for (square, gradient) in square.iter_mut().zip(gradient.iter()) {
            *square = *square * self.beta2 + self.one_less_beta2 * *gradient * *gradient;
        }
        for ((value, mean), square) in value.iter_mut().zip(mean.iter()).zip(square.iter()) {
            let root = square.sqrt() / self.root_correction + self.epsilon;
            *value += self.minus_step * *mean / root;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The values after three steps from 0.5, -1.25, 3.0, 0.001 with gradients k * (0.1, -0.2, 0.3, 0.0001).
    fn three_steps(rule: UpdateRule) -> [f32; 4] {
        let mut value = [0.5f32, -1.25, 3.0, 1e-3];
        let (mut first, mut second) = ([0.0; 4], [0.0; 4]);
        let state = rule.state_per_element();
        for n in 1..=3u64 {
            let mut gradient = [0.1f32, -0.2, 0.3, 1e-4].map(|gradient| gradient * n as f32);
            let first = &mut first[..if state > 0 { 4 } else { 0 }];
            let second = &mut second[..if state > 1 { 4 } else { 0 }];
            Step::new(&rule, n).run(&mut value, &mut gradient, first, second);
        }
        value
    }

    fn check(name: &str, rule: UpdateRule, torch: [u32; 4]) {
        let got = three_steps(rule);
        for (got, torch) in got.into_iter().zip(torch.map(f32::from_bits)) {
            // torch fuses some multiplications with their addition, in its vector path only; we never do.
            let ulps = got.to_bits().abs_diff(torch.to_bits());
            let bound = f32::EPSILON * torch.abs().max(2e-3);
            assert!(ulps <= 2 || (got - torch).abs() <= bound, "{name}: {got} is not torch's {torch} ({ulps} ulps)");
        }
    }

    // The numbers are the bits of float32 that torch 2.15 (CPU) prints for
    //
    // def run(make):
    //     p = torch.nn.Parameter(torch.tensor([0.5, -1.25, 3.0, 1e-3]))
    //     o = make([p]); g = torch.tensor([0.1, -0.2, 0.3, 1e-4])
    //     for k in range(3): p.grad = g * (k + 1); o.step()
    //     print([hex(struct.unpack('<I', struct.pack('<f', x))[0]) for x in p.detach()])
    //
    // with make = lambda p: torch.optim.SGD(p, lr=0.1), and so on as the rules below say.
    #[test]
    fn sgd_gives_torch_s_numbers() {
        let sgd = Sgd { learning_rate: 0.1, ..Sgd::default() };
        let decayed = Sgd { weight_decay: 0.01, ..sgd };
        let momentum = Sgd { momentum: 0.9, ..sgd };
        let damped = Sgd { dampening: 0.5, weight_decay: 0.01, ..momentum };
        let nesterov = Sgd { nesterov: true, weight_decay: 0.01, ..momentum };
        check("sgd", UpdateRule::Sgd(sgd), [0x3ee147ae, 0xbf90a3d7, 0x40347ae2, 0x3a766a57]);
        check("weight decay", UpdateRule::Sgd(decayed), [0x3ee08882, 0xbf902bb4, 0x4033e989, 0x3a75a3e6]);
        check("momentum", UpdateRule::Sgd(momentum), [0x3ecf4f0d, 0xbf87a787, 0x402dbda6, 0x3a6d36d1]);
        check("dampening", UpdateRule::Sgd(damped), [0x3edfaa28, 0xbf8fb304, 0x403379a0, 0x3a750b19]);
        check("nesterov", UpdateRule::Sgd(nesterov), [0x3eb37d97, 0xbf72f9f1, 0x402289a0, 0x3a5deb03]);
    }

    #[test]
    fn adam_gives_torch_s_numbers() {
        let adam = Adam { learning_rate: 0.01, ..Adam::default() };
        let decayed = Adam { beta1: 0.8, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.05, ..adam };
        let adamw = Adam { weight_decay: 0.05, decoupled: true, ..adam };
        check("adam", UpdateRule::Adam(adam), [0x3ef10887, 0xbf9c4222, 0x403e2111, 0xbce74222]);
        check("weight decay", UpdateRule::Adam(decayed), [0x3ef0b0db, 0xbf9c2b46, 0x403e1471, 0xbb6e55fc]);
        check("adamw", UpdateRule::Adam(adamw), [0x3ef0a836, 0xbf9c0535, 0x403dd79d, 0xbce72632]);
    }

    proptest! {
        #[test]
        fn a_longer_vector_gives_each_element_the_same_bits(values in proptest::collection::vec(-4.0f32..4.0, 1..40)) {
            for rule in [
                UpdateRule::Sgd(Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.1, ..Sgd::default() }),
                UpdateRule::Adam(Adam { weight_decay: 0.1, ..Adam::default() }),
            ] {
                let run = |value: &mut [f32]| {
                    let mut gradient: Vec<f32> = value.iter().map(|value| value * 0.3 + 0.1).collect();
                    let state = vec![0.25f32; value.len()];
                    let (mut first, mut second) = (state.clone(), state);
                    if rule.state_per_element() < 2 { second.clear(); }
                    Step::new(&rule, 2).run(value, &mut gradient, &mut first, &mut second);
                };
                let mut whole = values.clone();
                run(&mut whole);
                for (n, value) in values.iter().enumerate() {
                    let mut alone = [*value];
                    run(&mut alone);
                    prop_assert_eq!(alone[0].to_bits(), whole[n].to_bits());
                }
            }
        }

        #[test]
        fn bfloat16_is_rounded_as_the_crate_does(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(bf16_bits(value), bf16::from_f32(value).to_bits());
        }

        #[test]
        fn what_is_stored_is_loaded_again(bits in proptest::collection::vec(any::<u16>(), 0..1100)) {
            for dtype in [DType::F16, DType::BF16] {
                let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
                let (mut wide, mut back) = (vec![0.0f32; bits.len()], vec![0; bytes.len()]);
                f32::load(dtype, &bytes, &mut wide);
                f32::store(dtype, &wide, &mut back);
                for (n, (before, after)) in bytes.chunks(2).zip(back.chunks(2)).enumerate() {
                    prop_assert!(before == after || wide[n].is_nan());
                }
            }
        }
    }

    #[test]
    fn gradients_of_every_type_add_to_both_kinds_of_sum() {
        fn sum<C: Real>(dtype: DType, wide: impl Fn(f32) -> Vec<u8>) -> Vec<C> {
            let bytes: Vec<u8> = (0..1100).flat_map(|n| wide(n as f32)).collect();
            let mut sum = vec![C::default(); 1100];
            begin(&mut sum, dtype, &bytes);
            add(&mut sum, dtype, &bytes);
            sum
        }
        let expected: Vec<f32> = (0..1100).map(|n| 2.0 * n as f32).collect();
        assert_eq!(sum::<f32>(DType::F32, |x| x.to_le_bytes().to_vec()), expected);
        assert_eq!(sum::<f32>(DType::F16, |x| f16::from_f32(x).to_le_bytes().to_vec()), expected);
        let rounded: Vec<f64> = (0..1100).map(|n| 2.0 * bf16::from_f32(n as f32).to_f64()).collect();
        assert_eq!(sum::<f64>(DType::BF16, |x| bf16::from_f32(x).to_le_bytes().to_vec()), rounded);
        let expected: Vec<f64> = (0..1100).map(|n| 2.0 * f64::from(n)).collect();
        assert_eq!(sum::<f64>(DType::F64, |x| f64::from(x).to_le_bytes().to_vec()), expected);
    }
}
