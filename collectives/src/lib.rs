//! gradwire-collectives: combines tensors over the ranks of a group, on any wire.

mod schedule;

pub use schedule::{Action, Place, Schedule, Span, Step, StepId};
