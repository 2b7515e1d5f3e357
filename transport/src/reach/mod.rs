//! Memory of another process, read and written: by an RDMA device where both ends have one, else by messages that the other
//! process serves. An [`Exposer`] offers memory to whoever is told of it; an [`Accessor`] reaches the memory of one exposer.
//! Each has a thread of its own, so nobody needs to poll.

mod accessor;
mod calling;
pub(crate) mod decoders;
mod exposer;
mod request;
mod serving;
mod ticket;

pub use accessor::{Accessor, Local};
pub use exposer::Exposer;
pub use request::RemoteMemory;
pub use ticket::Access;

use crate::Tag;

/// Parts of accesses that an accessor has under way at once: enough to fill a network while each is answered.
const OPEN: usize = 16;
/// Longest part that goes by messages: what is in flight stays small, and many peers get their turn.
const PART_BYTES: u64 = 4 << 20;
/// Requests that an exposer holds for one peer: it may not have seen yet that some have ended.
const MAX_REQUESTS: usize = 2 * OPEN;
/// Turns without anything to do before a thread sleeps.
const SPIN_TURNS: u32 = 200;

/// Requests, and the answers to writes.
const ASK: Tag = Tag(1);
const ANSWER: Tag = Tag(2);
/// The bytes of a part, with its slot in the low bits: to the exposer, from it, and by the device.
const PUT: u64 = 1 << 16;
const GET: u64 = 2 << 16;
const DEVICE: u64 = 3 << 16;
const SLOT: u64 = 0xffff;

#[cfg(test)]
mod tests;
