//! Pure: schedules of learning rates as the front says them.

use gradwire_ps::{Course, Schedule, WarmUp};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A schedule: its name, its numbers, its steps, and those of its warm-up with the share that it begins with.
#[derive(FromPyObject)]
pub(crate) struct Described(String, Vec<f64>, u64, u64, f64);

impl Described {
    pub(crate) fn schedule(&self) -> PyResult<Schedule> {
        let &Self(ref name, ref numbers, steps, warm_up, from) = self;
        let course = match (name.as_str(), numbers.as_slice()) {
            ("constant", &[rate]) => Course::Constant(rate),
            ("step", &[rate, factor]) => Course::Step { rate, every: steps, factor },
            ("cosine", &[rate, least]) => Course::Cosine { rate, least, steps },
            ("one_cycle", &[peak, rise, first_divisor, last_divisor]) => {
                Course::OneCycle { peak, steps, rise, first_divisor, last_divisor }
            }
            ("list", rates) => Course::List(rates.to_vec()),
            _ => return Err(PyValueError::new_err(format!("schedule {name} with {numbers:?} is not known"))),
        };
        let warm_up = (warm_up > 0).then_some(WarmUp { steps: warm_up, from });
        Ok(Schedule { warm_up, course })
    }
}
