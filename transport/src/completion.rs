//! Pure: what a wire reports when it is polled.

use crate::{Envelope, PeerId, RecvLoan, RegionSlice, RegionSliceMut, Tag, TransportError};

/// One event of a wire. Every posted operation ends in exactly one of them, which gives back what was posted.
#[derive(Debug)]
#[non_exhaustive]
pub enum Completion {
    /// The slice of a `post_send` may be written again; the peer has it or will have it in order.
    Sent {
        /// Where it went.
        to: Envelope,
        /// The slice that was posted.
        slice: RegionSlice,
    },
    /// A posted receive was met. `from.note` is the sender's note.
    Received {
        /// Where it came from.
        from: Envelope,
        /// The slice that was posted; only its first `bytes` bytes were written.
        slice: RegionSliceMut,
        /// Length of the message.
        bytes: usize,
    },
    /// A receive posted by `post_recv_loan` was met.
    Arrived(Arrival),
    /// A posted send failed; nothing more will be read from the slice.
    SendFailed {
        /// Where it should have gone.
        to: Envelope,
        /// The slice that was posted.
        slice: RegionSlice,
        /// Why.
        error: TransportError,
    },
    /// A posted receive (`slice`), or a receive by loan (`None`), failed or was cancelled; nothing more will be written.
    RecvFailed {
        /// From whom it was awaited.
        peer: PeerId,
        /// With which tag.
        tag: Tag,
        /// The slice that was posted.
        slice: Option<RegionSliceMut>,
        /// Why.
        error: TransportError,
    },
    /// A peer has said hello and can be written to (only on a wire that accepts peers by itself, such as a server's).
    PeerUp(PeerId),
    /// A peer is gone: its operations fail with the same error, each in a completion of its own, after this one.
    PeerDown {
        /// Who.
        peer: PeerId,
        /// Why: `LossCause::Goodbye` where it left in good order.
        error: TransportError,
    },
}

/// A message in the wire's own memory.
#[derive(Debug)]
pub struct Arrival {
    /// Where it came from, with the sender's note.
    pub from: Envelope,
    /// The payload, read in place; dropping it gives the memory, and with it the sender's credit, back.
    pub loan: RecvLoan,
}
