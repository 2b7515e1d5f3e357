//! Pure: the choice of an algorithm, told to people.

use crate::choose::{Choice, Chooser};
use std::fmt;

/// By which algorithm a collective goes, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Its name, as `GRADWIRE_ALGO` has it; "segment" where all ranks share memory.
    pub algorithm: String,
    /// Why this one.
    pub reason: String,
    /// What there was to choose from, with the microseconds that each is expected to take, the least first.
    pub expected_us: Vec<(String, f64)>,
}

impl Explanation {
    pub(crate) fn new(choice: Choice, chooser: &Chooser, at_segment: bool, folded: Option<String>) -> Self {
        let named = |(algorithm, us): (crate::algorithm::Algorithm, f64)| (algorithm.name().to_owned(), us);
        let expected_us: Vec<_> = choice.expected_us.into_iter().map(named).collect();
        let (algorithm, mut reason) = match (at_segment, choice.wished) {
            (true, _) => ("segment", "all ranks are on this host and share memory".to_owned()),
            (_, true) => (choice.algorithm.name(), "GRADWIRE_ALGO says so".to_owned()),
            _ => (choice.algorithm.name(), format!("it is expected to take the least; {}", chooser.world())),
        };
        if let Some(folded) = folded {
            reason += &format!("; CUDA tensors are folded {folded}");
        }
        Self { algorithm: algorithm.to_owned(), reason, expected_us }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.algorithm, self.reason)?;
        for (name, us) in &self.expected_us {
            write!(f, "\n  {name:<12} {us:>12.1} us")?;
        }
        Ok(())
    }
}
