//! Memory shared by processes of one host: a mapping without a name, the segment that all ranks of a group share, and the
//! wire between pairs of processes.

mod core;
mod granting;
mod group_segment;
mod link;
mod offer;
mod past_cache;
mod patience;
mod ring;
mod segment;
mod storing;
mod wire;

pub use group_segment::{GroupSegment, Letters, Others, WaitError};
pub use offer::{OFFER_BYTES, ShmEnd, ShmOffer};
pub use past_cache::copy_streaming;
pub use patience::Deadline;
pub use segment::{Segment, SegmentOffer};
pub use storing::{Storing, Way};
pub use wire::{ShmWire, pair};
