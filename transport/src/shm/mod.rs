//! Memory shared by processes of one host: a mapping without a name, and the segment that all ranks of a group share.

mod group_segment;
mod segment;

pub use group_segment::{GroupSegment, Others, WaitError};
pub use segment::{Segment, SegmentOffer};
