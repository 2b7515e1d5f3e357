//! Pure: a shard and its backups: what one tells the next, and when clients may be answered.

mod backup;
mod lead;
mod log;
mod seat;
mod tail;

pub(crate) use log::MAX_ENTRY_BYTES;
pub use seat::{PRIMARY, Seat};
