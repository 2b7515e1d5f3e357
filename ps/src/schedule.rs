//! Pure: a learning rate as a function of the clock, described once; the same bits on every machine.

use crate::body::{BadBody, Reader, Writer};

/// Most rates of a list: its description travels in one short message.
pub const MAX_LISTED: usize = 1000;

/// A learning rate as it changes with the clock: step 0 is the first clock that it holds for.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// How it begins. Default: at once with the course.
    pub warm_up: Option<WarmUp>,
    /// How it goes on; its own step 0 comes after the warm-up.
    pub course: Course,
}

/// A linear rise to the first rate of the course, as `torch.optim.lr_scheduler.LinearLR`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WarmUp {
    /// How many steps it takes.
    pub steps: u64,
    /// With what share of that rate it begins.
    pub from: f64,
}

/// How a learning rate changes. The formulas are the closed forms of `torch.optim.lr_scheduler`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Course {
    /// It stays.
    Constant(f64),
    /// Multiplied by `factor` every `every` steps (`StepLR`).
    Step {
        /// The first rate.
        rate: f64,
        /// Steps between two changes.
        every: u64,
        /// What it is multiplied by.
        factor: f64,
    },
    /// Half a cosine from `rate` to `least`, where it stays (`CosineAnnealingLR`).
    Cosine {
        /// The first rate.
        rate: f64,
        /// The last rate.
        least: f64,
        /// Steps from one to the other.
        steps: u64,
    },
    /// Up to `peak` and down again, by cosines (`OneCycleLR`); the last rate stays.
    OneCycle {
        /// The largest rate.
        peak: f64,
        /// Steps of the whole cycle.
        steps: u64,
        /// Share of the steps that it rises for.
        rise: f64,
        /// The first rate is the peak divided by this.
        first_divisor: f64,
        /// The last rate is the first divided by this.
        last_divisor: f64,
    },
    /// One rate a step; the last one stays.
    List(Vec<f64>),
}

impl From<f64> for Schedule {
    fn from(rate: f64) -> Self {
        Course::Constant(rate).into()
    }
}

impl From<Course> for Schedule {
    fn from(course: Course) -> Self {
        Self { warm_up: None, course }
    }
}

/// The body of a request that sets `schedule`.
pub fn rate_body(schedule: &Schedule) -> Vec<u8> {
    let mut out = Writer::default();
    schedule.encode(&mut out);
    out.0
}

/// The body of a request that gives schedules, each from a clock on.
pub(crate) fn rates_body(rates: &[(u64, Schedule)]) -> Vec<u8> {
    let mut out = Writer::default();
    out.number(rates.len() as u64);
    for (clock, schedule) in rates {
        out.number(*clock);
        schedule.encode(&mut out);
    }
    out.0
}

/// What such a body says.
pub(crate) fn read_rates(body: &[u8]) -> Result<Vec<(u64, Schedule)>, BadBody> {
    let mut from = Reader(body);
    let rates = (0..from.count(25)?).map(|_| Ok((from.number()?, Schedule::decode(&mut from)?)));
    let rates = rates.collect::<Result<_, BadBody>>()?;
    from.end()?;
    Ok(rates)
}

impl Schedule {
    /// The rate at `step`.
    pub fn at(&self, step: u64) -> f64 {
        match self.warm_up {
            Some(WarmUp { steps, from }) if step < steps => {
                self.course.at(0) * (from + (1.0 - from) * (step as f64 / steps as f64))
            }
            Some(WarmUp { steps, .. }) => self.course.at(step - steps),
            None => self.course.at(step),
        }
    }

    /// Says what is wrong with its numbers, if anything is.
    pub fn check(&self) -> Result<(), String> {
        if let Some(WarmUp { steps, from }) = self.warm_up {
            at_least_1("steps of the warm-up", steps)?;
            if !(from > 0.0 && from <= 1.0) {
                return Err(format!(
                    "the warm-up begins with {from} of the rate, and must with more than 0, at most 1"
                ));
            }
        }
        self.course.check()
    }

    /// A rate that it never falls below.
    pub(crate) fn least(&self) -> f64 {
        let least = self.course.least();
        self.warm_up.map_or(least, |warm_up| least.min(self.course.at(0) * warm_up.from))
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        let warm_up = self.warm_up.unwrap_or(WarmUp { steps: 0, from: 0.0 });
        out.number(warm_up.steps);
        out.float(warm_up.from);
        match &self.course {
            Course::Constant(rate) => {
                out.byte(0);
                out.float(*rate);
            }
            Course::Step { rate, every, factor } => {
                out.byte(1);
                out.float(*rate);
                out.number(*every);
                out.float(*factor);
            }
            Course::Cosine { rate, least, steps } => {
                out.byte(2);
                out.float(*rate);
                out.float(*least);
                out.number(*steps);
            }
            Course::OneCycle { peak, steps, rise, first_divisor, last_divisor } => {
                out.byte(3);
                out.number(*steps);
                [peak, rise, first_divisor, last_divisor].into_iter().for_each(|&number| out.float(number));
            }
            Course::List(rates) => {
                out.byte(4);
                out.number(rates.len() as u64);
                rates.iter().for_each(|&rate| out.float(rate));
            }
        }
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let warm_up = WarmUp { steps: from.number()?, from: from.float()? };
        let course = match from.byte()? {
            0 => Course::Constant(from.float()?),
            1 => Course::Step { rate: from.float()?, every: from.number()?, factor: from.float()? },
            2 => Course::Cosine { rate: from.float()?, least: from.float()?, steps: from.number()? },
            3 => {
                let steps = from.number()?;
                let (peak, rise) = (from.float()?, from.float()?);
                Course::OneCycle { peak, steps, rise, first_divisor: from.float()?, last_divisor: from.float()? }
            }
            4 => Course::List((0..from.count(8)?).map(|_| from.float()).collect::<Result<_, _>>()?),
            _ => return Err(BadBody("no such schedule")),
        };
        Ok(Self { warm_up: (warm_up.steps > 0).then_some(warm_up), course })
    }
}

impl Course {
    fn at(&self, step: u64) -> f64 {
        match *self {
            Self::Constant(rate) => rate,
            Self::Step { rate, every, factor } => rate * libm::pow(factor, (step / every) as f64),
            Self::Cosine { least, steps, .. } if step >= steps => least,
            Self::Cosine { rate, least, steps } => between(rate, least, step as f64 / steps as f64),
            Self::OneCycle { peak, steps, rise, first_divisor, last_divisor } => {
                let (first, step) = (peak / first_divisor, step as f64);
                // With too few steps for a rise it begins at the peak.
                let (top, end) = ((rise * steps as f64 - 1.0).max(0.0), steps as f64 - 1.0);
                if step < top {
                    between(first, peak, step / top)
                } else if step < end {
                    between(peak, first / last_divisor, (step - top) / (end - top))
                } else {
                    first / last_divisor
                }
            }
            Self::List(ref rates) => {
                let at = usize::try_from(step).unwrap_or(usize::MAX).min(rates.len() - 1);
                rates[at]
            }
        }
    }

    fn least(&self) -> f64 {
        match *self {
            Self::Constant(rate) => rate,
            Self::Step { rate, factor, .. } => {
                if factor < 1.0 {
                    0.0
                } else {
                    rate
                }
            }
            Self::Cosine { rate, least, .. } => rate.min(least),
            Self::OneCycle { peak, first_divisor, last_divisor, .. } => {
                let first = peak / first_divisor;
                first.min(peak).min(first / last_divisor)
            }
            Self::List(ref rates) => rates.iter().copied().fold(f64::INFINITY, f64::min),
        }
    }

    fn check(&self) -> Result<(), String> {
        match *self {
            Self::Constant(rate) => at_least_0("the rate", rate),
            Self::Step { rate, every, factor } => {
                at_least_0("the rate", rate)?;
                at_least_1("every", every)?;
                if factor > 1.0 {
                    return Err(format!("the factor is {factor}, by which the rate would grow without bound"));
                }
                at_least_0("the factor", factor)
            }
            Self::Cosine { rate, least, steps } => {
                at_least_0("the rate", rate)?;
                at_least_0("the least rate", least)?;
                at_least_1("the number of steps", steps)
            }
            Self::OneCycle { peak, steps, rise, first_divisor, last_divisor } => {
                at_least_0("the peak", peak)?;
                at_least_1("the number of steps", steps)?;
                if !(0.0..=1.0).contains(&rise) {
                    return Err(format!("it rises for {rise} of its steps, which is no share"));
                }
                for (what, divisor) in [("first", first_divisor), ("last", last_divisor)] {
                    if !(divisor.is_finite() && divisor >= 1.0) {
                        return Err(format!("the {what} divisor is {divisor}, and must be at least 1"));
                    }
                }
                Ok(())
            }
            Self::List(ref rates) => {
                if rates.is_empty() || rates.len() > MAX_LISTED {
                    return Err(format!("it lists {} rates, and must 1 to {MAX_LISTED}", rates.len()));
                }
                rates.iter().try_for_each(|&rate| at_least_0("a listed rate", rate))
            }
        }
    }
}

/// From `start` to `end` along half a cosine; `share` of the way.
fn between(start: f64, end: f64, share: f64) -> f64 {
    let rate = end + (start - end) / 2.0 * (1.0 + libm::cos(std::f64::consts::PI * share));
    // Rounding must not lead outside, where a rate could be below 0.
    rate.clamp(start.min(end), start.max(end))
}

fn at_least_0(what: &str, rate: f64) -> Result<(), String> {
    if rate.is_finite() && rate >= 0.0 { Ok(()) } else { Err(format!("{what} is {rate}, and must be at least 0")) }
}

fn at_least_1(what: &str, steps: u64) -> Result<(), String> {
    if steps >= 1 { Ok(()) } else { Err(format!("{what} is 0, and must be at least 1")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_schedule() -> impl Strategy<Value = Schedule> {
        let number = 0.0f64..2.0;
        let course = prop_oneof![
            number.clone().prop_map(Course::Constant),
            (number.clone(), 1u64..9, 0.0f64..1.0).prop_map(|(rate, every, factor)| Course::Step {
                rate,
                every,
                factor
            }),
            (number.clone(), number.clone(), 1u64..30).prop_map(|(rate, least, steps)| Course::Cosine {
                rate,
                least,
                steps
            }),
            (number.clone(), 1u64..30, 0.0f64..=1.0, 1.0f64..30.0, 1.0f64..1e5).prop_map(
                |(peak, steps, rise, first_divisor, last_divisor)| Course::OneCycle {
                    peak,
                    steps,
                    rise,
                    first_divisor,
                    last_divisor
                }
            ),
            proptest::collection::vec(number, 1..20).prop_map(Course::List),
        ];
        let warm_up = proptest::option::of((1u64..9, 0.01f64..=1.0).prop_map(|(steps, from)| WarmUp { steps, from }));
        (warm_up, course).prop_map(|(warm_up, course)| Schedule { warm_up, course })
    }

    proptest! {
        #[test]
        fn a_schedule_comes_back_as_it_was_and_no_piece_of_it_does(schedule in any_schedule()) {
            let bytes = rate_body(&schedule);
            prop_assert_eq!(Schedule::decode(&mut Reader(&bytes)), Ok(schedule));
            for cut in 0..bytes.len() {
                prop_assert!(Schedule::decode(&mut Reader(&bytes[..cut])).is_err());
            }
        }

        #[test]
        fn what_passes_the_check_gives_a_sound_rate_at_every_step(
            schedule in any_schedule(), at in any::<prop::sample::Index>(), byte in any::<u8>(), far in any::<u64>(),
        ) {
            let mut bytes = rate_body(&schedule);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            for schedule in [Some(schedule), Schedule::decode(&mut Reader(&bytes)).ok()].into_iter().flatten() {
                if schedule.check().is_err() {
                    continue;
                }
                for step in (0..60).chain([far, u64::MAX]) {
                    let rate = schedule.at(step);
                    let room = rate.abs() * 1e-12;
                    prop_assert!(rate.is_finite() && rate >= 0.0 && rate + room >= schedule.least(), "{schedule:?} {rate}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            Schedule::from(-1.0),
            Schedule::from(f64::NAN),
            Course::Step { rate: 0.1, every: 0, factor: 0.5 }.into(),
            Course::Step { rate: 0.1, every: 1, factor: 1.5 }.into(),
            Course::Cosine { rate: 0.1, least: f64::INFINITY, steps: 3 }.into(),
            Course::OneCycle { peak: 1.0, steps: 9, rise: 1.5, first_divisor: 2.0, last_divisor: 2.0 }.into(),
            Course::OneCycle { peak: 1.0, steps: 9, rise: 0.5, first_divisor: 0.0, last_divisor: 2.0 }.into(),
            Course::List(vec![]).into(),
            Course::List(vec![0.1; MAX_LISTED + 1]).into(),
            Schedule { warm_up: Some(WarmUp { steps: 3, from: 0.0 }), ..Schedule::from(1.0) },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_warm_up_rises_to_where_the_course_begins() {
        let schedule = Schedule {
            warm_up: Some(WarmUp { steps: 4, from: 0.5 }),
            course: Course::Step { rate: 8.0, every: 2, factor: 0.5 },
        };
        let rates: Vec<f64> = (0..9).map(|step| schedule.at(step)).collect();
        assert_eq!(rates, [4.0, 5.0, 6.0, 7.0, 8.0, 8.0, 4.0, 4.0, 2.0]);
    }
}
