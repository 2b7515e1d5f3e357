//! Pure: Adagrad, element by element and row by row, and FTRL-Proximal. The caller chooses the instructions they become.

use super::{Real, add_decay};
use crate::{Adagrad, Ftrl};

/// Sums that a row's squares are spread over: as many as the widest vector holds, so that every width adds alike.
const LANES: usize = 16;

#[derive(Clone, Copy, Debug)]
pub(crate) struct AdagradStep<C> {
    weight_decay: Option<C>,
    epsilon: C,
    minus_rate: C,
    row_wise: bool,
}

impl<C: Real> AdagradStep<C> {
    pub(super) fn new(rule: Adagrad, n: u64) -> Self {
        let rate = rule.learning_rate / (1.0 + (n as f64 - 1.0) * rule.learning_rate_decay);
        Self {
            weight_decay: (rule.weight_decay != 0.0).then(|| C::of(rule.weight_decay)),
            epsilon: C::of(rule.epsilon),
            minus_rate: C::of(-rate),
            row_wise: rule.row_wise,
        }
    }

    #[inline(always)]
    pub(super) fn run(&self, value: &mut [C], gradient: &mut [C], sum: &mut [C]) {
        add_decay(self.weight_decay, value, gradient);
        if self.row_wise {
            sum[0] += mean_square(gradient);
            let root = sum[0].sqrt() + self.epsilon;
            for (value, gradient) in value.iter_mut().zip(gradient.iter()) {
                *value += self.minus_rate * *gradient / root;
            }
            return;
        }
        for ((value, gradient), sum) in value.iter_mut().zip(gradient.iter()).zip(sum) {
            *sum += *gradient * *gradient;
            *value += self.minus_rate * *gradient / (sum.sqrt() + self.epsilon);
        }
    }
}

/// The mean of the squares. Element `n` is added to lane `n % LANES`, then the upper half of the lanes to the lower.
#[inline(always)]
fn mean_square<C: Real>(gradient: &[C]) -> C {
    let mut lanes = [C::default(); LANES];
    for chunk in gradient.chunks(LANES) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, gradient)| *lane += *gradient * *gradient);
    }
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        low.iter_mut().zip(high.iter()).for_each(|(low, high)| *low += *high);
        half /= 2;
    }
    lanes[0] / C::of(gradient.len() as f64)
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FtrlStep<C> {
    rate: C,
    beta: C,
    l1: C,
    l2: C,
}

impl<C: Real> FtrlStep<C> {
    pub(super) fn new(rule: Ftrl) -> Self {
        Self { rate: C::of(rule.learning_rate), beta: C::of(rule.beta), l1: C::of(rule.l1), l2: C::of(rule.l2) }
    }

    /// The per-coordinate algorithm of the paper: `z` and `squares` are its state.
    ///
    /// There a weight is what `z` makes of it. One that was written, as a first value is, and that no gradient has reached, is
    /// kept, and gives the `z` that makes it: else the first gradient would begin at 0.
    #[inline(always)]
    pub(super) fn run(&self, value: &mut [C], gradient: &[C], z: &mut [C], squares: &mut [C]) {
        let zero = C::default();
        let first_slope = self.beta / self.rate + self.l2;
        for (((value, gradient), z), squares) in value.iter_mut().zip(gradient).zip(z).zip(squares) {
            let written = *squares == zero && *value != zero;
            let sign = if *value > zero { self.l1 } else { zero - self.l1 };
            let first = zero - *value * first_slope - sign;
            let before = squares.sqrt();
            *squares += *gradient * *gradient;
            let root = squares.sqrt();
            *z = if written { first } else { *z };
            *z += *gradient - (root - before) / self.rate * *value;
            let shrunk = if *z > zero { self.l1 - *z } else { zero - self.l1 - *z };
            let slope = (self.beta + root) / self.rate + self.l2;
            // The division is made in either case, so that it becomes one of a vector.
            let wanted = shrunk / slope;
            let wanted = if z.abs() <= self.l1 { zero } else { wanted };
            *value = if written && *squares == zero { *value } else { wanted };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Step;
    use super::*;
    use crate::UpdateRule;
    use proptest::prelude::*;

    /// One step of `rule` on a row of `f32`, with the state at `first`.
    fn step(rule: UpdateRule, n: u64, value: &mut [f32], gradient: &[f32], state: &mut [Vec<f32>; 2]) {
        let mut gradient = gradient.to_vec();
        let [first, second] = state;
        Step::new(&rule, n).run(value, &mut gradient, first, second);
    }

    fn state(rule: UpdateRule, elements: usize) -> [Vec<f32>; 2] {
        rule.state_of_row(elements).map(|length| vec![rule.first_state() as f32; length])
    }

    // The bits that torch 2.15 (CPU) prints for three steps of
    // torch.optim.Adagrad([p], lr=0.1, initial_accumulator_value=0.5), then with lr_decay=0.1, weight_decay=0.01, as in
    // the tests beside this room.
    const ADAGRAD: [u32; 4] = [0x3ed7d2ad, 0xbf8eefef, 0x40353806, 0x3a6fe67e];
    const ADAGRAD_DECAYED: [u32; 4] = [0x3edb7c1b, 0xbf90643c, 0x403603e3, 0x3a716e04];

    #[test]
    fn adagrad_gives_torch_s_numbers() {
        let adagrad = Adagrad { learning_rate: 0.1, initial: 0.5, ..Adagrad::default() };
        let decayed = Adagrad { learning_rate_decay: 0.1, weight_decay: 0.01, ..adagrad };
        for (rule, torch) in [(adagrad, ADAGRAD), (decayed, ADAGRAD_DECAYED)] {
            let rule = UpdateRule::Adagrad(rule);
            let mut value = [0.5f32, -1.25, 3.0, 1e-3];
            let mut state = state(rule, 4);
            for n in 1..=3u64 {
                step(rule, n, &mut value, &[0.1f32, -0.2, 0.3, 1e-4].map(|g| g * n as f32), &mut state);
            }
            for (got, torch) in value.into_iter().zip(torch.map(f32::from_bits)) {
                assert!((got - torch).abs() <= f32::EPSILON * torch.abs().max(2e-3), "{rule}: {got} is not {torch}");
            }
        }
    }

    #[test]
    fn a_row_wise_sum_is_that_of_the_means() {
        let rule = UpdateRule::Adagrad(Adagrad { learning_rate: 0.5, row_wise: true, ..Adagrad::default() });
        let (mut value, mut state) = (vec![1.0f32; 5], state(rule, 5));
        step(rule, 1, &mut value, &[1.0, 2.0, 2.0, 4.0, 0.0], &mut state);
        assert_eq!(state[0], [5.0]);
        assert_eq!(value[3], 1.0 - 0.5 * 4.0 / 5f32.sqrt());
    }

    #[test]
    fn ftrl_gives_the_paper_s_numbers_and_zeros_below_l1() {
        let ftrl = Ftrl { learning_rate: 0.1, beta: 1.0, l1: 0.5, l2: 0.01 };
        let rule = UpdateRule::Ftrl(ftrl);
        let (mut value, mut state) = ([0.0f32; 4], state(rule, 4));
        let (mut w, mut z, mut q) = ([0.0f64; 4], [0.0f64; 4], [0.0f64; 4]);
        for n in 1..=4u64 {
            let gradient = [0.4f32, -0.9, 0.05, 0.0].map(|g| g * n as f32);
            step(rule, n, &mut value, &gradient, &mut state);
            for (i, gradient) in gradient.map(f64::from).into_iter().enumerate() {
                let sigma = ((q[i] + gradient * gradient).sqrt() - q[i].sqrt()) / ftrl.learning_rate;
                z[i] += gradient - sigma * w[i];
                q[i] += gradient * gradient;
                let slope = (ftrl.beta + q[i].sqrt()) / ftrl.learning_rate + ftrl.l2;
                w[i] = if z[i].abs() <= ftrl.l1 { 0.0 } else { -(z[i] - z[i].signum() * ftrl.l1) / slope };
            }
        }
        for (got, expected) in value.into_iter().zip(w) {
            assert!((f64::from(got) - expected).abs() <= 1e-6, "{got} is not {expected}");
        }
        assert!(value[0] < 0.0 && value[1] > 0.0 && value[2] == 0.0 && value[3] == 0.0);
    }

    #[test]
    fn ftrl_goes_on_from_a_weight_that_was_written() {
        let ftrl = Ftrl { learning_rate: 0.1, beta: 1.0, l1: 0.5, l2: 0.01 };
        let weights = [2.0f32, -0.75, 1e-3, 0.0];
        let (mut value, mut state) = (weights, state(UpdateRule::Ftrl(ftrl), 4));
        for rate in [0.1, 0.4] {
            let rule = UpdateRule::Ftrl(Ftrl { learning_rate: rate, ..ftrl });
            step(rule, 1, &mut value, &[0.0; 4], &mut state);
            assert_eq!(value, weights, "no gradient has come, whatever the rate");
        }
        // The z that makes each weight, by the paper's formula for it, and from there the paper's two steps.
        let slope = |squares: f64| (ftrl.beta + squares.sqrt()) / ftrl.learning_rate + ftrl.l2;
        let mut w = weights.map(f64::from);
        let mut z = w.map(|w| if w == 0.0 { 0.0 } else { -w * slope(0.0) - w.signum() * ftrl.l1 });
        let mut q = [0.0f64; 4];
        for gradient in [[0.4f32, -0.9, 0.05, 0.75], [0.2, 0.1, -0.3, 0.0]] {
            step(UpdateRule::Ftrl(ftrl), 2, &mut value, &gradient, &mut state);
            for (i, gradient) in gradient.map(f64::from).into_iter().enumerate() {
                z[i] += gradient - ((q[i] + gradient * gradient).sqrt() - q[i].sqrt()) / ftrl.learning_rate * w[i];
                q[i] += gradient * gradient;
                w[i] = if z[i].abs() <= ftrl.l1 { 0.0 } else { -(z[i] - z[i].signum() * ftrl.l1) / slope(q[i]) };
            }
            for (got, expected) in value.into_iter().zip(w) {
                assert!((f64::from(got) - expected).abs() <= 1e-6, "{got} is not {expected}");
            }
        }
        assert!(value[0] > 1.9 && value[1] < -0.6, "they are about what they were: {value:?}");
    }

    /// The same formulas, one element after the other, with nothing that could become a vector.
    fn by_hand(rule: UpdateRule, n: u64, value: &mut [f32], gradient: &[f32], state: &mut [Vec<f32>; 2]) {
        match rule {
            UpdateRule::Adagrad(Adagrad { row_wise: true, epsilon, learning_rate, .. }) => {
                let mut lanes = [0.0f32; LANES];
                for (n, gradient) in gradient.iter().enumerate() {
                    lanes[n % LANES] = std::hint::black_box(lanes[n % LANES] + gradient * gradient);
                }
                for half in [8, 4, 2, 1] {
                    for n in 0..half {
                        lanes[n] = std::hint::black_box(lanes[n] + lanes[n + half]);
                    }
                }
                state[0][0] += lanes[0] / gradient.len() as f32;
                let root = std::hint::black_box(state[0][0].sqrt() + epsilon as f32);
                for (value, gradient) in value.iter_mut().zip(gradient) {
                    *value = std::hint::black_box(*value + -(learning_rate as f32) * *gradient / root);
                }
            }
            _ => {
                for (at, gradient) in gradient.iter().enumerate() {
                    let mut one = [value[at]];
                    let mut of_one = [0, 1].map(|s| state[s].get(at).map_or(vec![], |number| vec![*number]));
                    step(rule, n, &mut one, &[*gradient], &mut of_one);
                    value[at] = one[0];
                    for (state, one) in state.iter_mut().zip(of_one) {
                        one.first().inspect(|number| state[at] = **number);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_row_length_has_the_bits_of_one_element_after_the_other(
            values in proptest::collection::vec(-4.0f32..4.0, 1..70), l1 in 0.0f64..1.0,
        ) {
            for rule in [
                UpdateRule::Adagrad(Adagrad { weight_decay: 0.1, initial: 0.25, ..Adagrad::default() }),
                UpdateRule::Adagrad(Adagrad { row_wise: true, initial: 0.25, ..Adagrad::default() }),
                UpdateRule::Ftrl(Ftrl { l1, l2: 0.1, ..Ftrl::default() }),
            ] {
                let (mut whole, mut apart) = (values.clone(), values.clone());
                let (mut of_whole, mut of_apart) = (state(rule, values.len()), state(rule, values.len()));
                for n in 1..4 {
                    let gradient: Vec<f32> = values.iter().map(|value| value * 0.3 + 0.1 * n as f32).collect();
                    step(rule, n, &mut whole, &gradient, &mut of_whole);
                    by_hand(rule, n, &mut apart, &gradient, &mut of_apart);
                }
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&whole), bits(&apart));
                prop_assert_eq!(bits(&of_whole[0]), bits(&of_apart[0]));
                prop_assert_eq!(bits(&of_whole[1]), bits(&of_apart[1]));
            }
        }
    }
}
