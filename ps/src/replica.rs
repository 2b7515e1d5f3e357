//! Pure: a shard and its backup: what one tells the other, and when clients may be answered.

mod backup;
mod lead;
mod log;
mod seat;

pub(crate) use log::MAX_ENTRY_BYTES;
pub use seat::{PRIMARY, Seat};
