//! gradwire-collectives: combines tensors over the ranks of a group, on any wire.

mod algorithm;
mod apart;
pub mod bruck;
mod call;
mod choose;
mod chunk;
mod collective;
mod communicator;
mod control;
mod cost;
#[doc(hidden)]
pub mod decoders;
mod describe;
mod device;
pub mod direct;
mod draft;
mod driver;
mod dtype;
mod engine;
mod error;
mod execution;
mod explain;
mod fingerprint;
pub mod halving_doubling;
mod hierarchical;
mod hosts;
mod inquiry;
mod local;
mod memory;
mod messages;
mod nan;
mod patience;
mod pending;
mod pieces;
mod plan;
mod plans;
mod recorder;
#[doc(hidden)]
pub mod recording;
pub mod recursive_doubling;
pub mod reduce;
pub mod ring;
mod same_host;
mod schedule;
mod settings;
mod submitter;
mod trace;
pub mod tree;
mod verdict;
mod wishes;

pub use call::{Call, Piece};
pub use collective::Collective;
pub use communicator::{Communicator, Pending};
pub use describe::{Description, LinkDescription};
pub use device::{DeviceCall, DeviceKernels, FoldPlace};
pub use dtype::DType;
pub use error::{CollectiveError, Operation};
pub use explain::Explanation;
pub use fingerprint::Fingerprint;
pub use memory::Memory;
pub use pending::Done;
pub use reduce::Reduction;
pub use schedule::{Action, Place, Schedule, Span, Step, StepId};
pub use settings::Settings;
pub use trace::TraceWriter;
pub use verdict::{Answer, Member, Verdict};

/// Makers of schedules by themselves, for benchmarks.
#[doc(hidden)]
pub mod schedules {
    pub use crate::{bruck, direct, halving_doubling, recursive_doubling, ring, tree};
}
