//! Pure: the waist. Everything above sends and receives through these traits and knows no wire by name.

use crate::cuda::{DeviceSlice, Way};
use crate::{
    Completion, PeerId, PeerName, PostError, RecvLoan, Region, RegionSlice, RegionSliceMut, RegisterError, SendLoan,
    Tag, TransportError,
};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// The kinds of wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireKind {
    /// TCP sockets.
    Tcp,
    /// Memory shared by two processes of one host.
    Shm,
    /// RDMA verbs: RoCEv2, InfiniBand or soft-RoCE.
    Verbs,
    /// The simulator.
    Sim,
}

impl fmt::Display for WireKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Shm => "shm",
            Self::Verbs => "verbs",
            Self::Sim => "sim",
        })
    }
}

/// The outside of a message: to or from whom, in which conversation, and eight bytes that travel in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// The other end.
    pub peer: PeerId,
    /// The conversation.
    pub tag: Tag,
    /// Carried uninterpreted: a fingerprint, a length, a sequence number.
    pub note: u64,
}

/// A message that has arrived, wholly or in part, and that no receive has been posted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Where it came from.
    pub from: Envelope,
    /// Its whole length.
    pub bytes: usize,
}

/// What passed between us and one peer since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Payload bytes sent.
    pub sent_bytes: u64,
    /// Payload bytes received.
    pub received_bytes: u64,
    /// Messages sent.
    pub sent_messages: u64,
    /// Messages received.
    pub received_messages: u64,
}

impl Traffic {
    /// Bytes and messages, each way.
    pub(crate) fn of(sent: (u64, u64), received: (u64, u64)) -> Self {
        let ((sent_bytes, sent_messages), (received_bytes, received_messages)) = (sent, received);
        Self { sent_bytes, received_bytes, sent_messages, received_messages }
    }
}

/// Wakes a wire out of [`Wire::park`] from another thread.
pub trait Wake: Send + Sync {
    /// Makes the park under way, or else the next one, return at once.
    fn wake(&self);
}

/// A way to move messages between this process and its peers.
///
/// One thread at a time drives a wire. Nothing here blocks but [`Wire::park`]. Every posted operation ends in exactly one
/// completion, also when the peer is lost; the order of completions within one (peer, tag) and direction is the order of
/// posting. Queues are bounded: a full one refuses the post and hands the slice back (`TransportError::QueueFull`).
pub trait Wire: Send {
    /// Which kind of wire leads to `peer`.
    fn kind(&self, peer: PeerId) -> WireKind;

    /// Why `peer` is reached as it is now, where that is not what its group was formed with.
    fn reason(&self, _peer: PeerId) -> Option<String> {
        None
    }

    /// Who `peer` is, for messages to people.
    fn name(&self, peer: PeerId) -> PeerName;

    /// Bytes and messages exchanged with `peer`.
    fn traffic(&self, peer: PeerId) -> Traffic;

    /// Makes `region` known to the device, where there is one. Cheap when repeated; sockets have nothing to do.
    fn register(&mut self, region: &Arc<Region>) -> Result<(), RegisterError>;

    /// Takes `region` from the device again, where it is known there and nothing of it is under way.
    fn deregister(&mut self, _region: &Arc<Region>) {}

    /// Sends `slice`; ends in `Completion::Sent` or `SendFailed`.
    fn post_send(&mut self, to: Envelope, slice: RegionSlice) -> Result<(), PostError<RegionSlice>>;

    /// Receives the next message of (`peer`, `tag`) into `slice`; ends in `Received` or `RecvFailed`. A message longer
    /// than the slice fails at both ends with `TransportError::MessageTooLong`.
    fn post_recv(&mut self, peer: PeerId, tag: Tag, slice: RegionSliceMut) -> Result<(), PostError<RegionSliceMut>>;

    /// Receives the next message of (`peer`, `tag`), of at most `max_bytes`, in the wire's own memory; ends in `Arrived`
    /// or `RecvFailed`.
    fn post_recv_loan(&mut self, peer: PeerId, tag: Tag, max_bytes: usize) -> Result<(), PostError<()>>;

    /// Memory of the wire to write a message of `bytes` to `peer` in; `None` when all is lent out: poll, then try again.
    ///
    /// Any length up to [`Wire::max_loan_bytes`] is possible.
    fn lend(&mut self, peer: PeerId, bytes: usize) -> Option<SendLoan>;

    /// The longest message that can be lent or received by loan.
    fn max_loan_bytes(&self) -> usize;

    /// Sends what was written into `loan`. No completion: the memory is the wire's. A lost peer shows by `PeerDown`.
    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>>;

    /// The earliest unmatched message with this tag, from any peer.
    fn probe(&mut self, tag: Tag) -> Option<Probe>;

    /// Says that in conversation `tag` many peers may send to one at the same time, until it is unmarked. Where the wire grants
    /// credit to such ([`CreditSettings::marked`](crate::CreditSettings)), long messages come as their receiver grants them.
    /// Both ends mark it, before they post anything of it.
    fn mark(&mut self, _tag: Tag, _many_to_one: bool) {}

    /// Takes back every receive posted for (`peer`, `tag`) that no message has met yet: each ends in
    /// `RecvFailed` with `TransportError::Cancelled`.
    fn cancel_recvs(&mut self, peer: PeerId, tag: Tag);

    /// Ends all operations with `peer` with `error` and closes the connection. The peer sees a loss, with `error`'s text
    /// where the wire can still tell it.
    fn disconnect(&mut self, peer: PeerId, error: TransportError);

    /// Moves what can be moved now and appends what came of it. Never blocks. `now` is the caller's clock; the simulator
    /// lives by it.
    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>);

    /// Sleeps until something may have happened, `until`, or a [`Wake::wake`].
    fn park(&mut self, until: Instant);

    /// Whether what was told as sent may still need this end: a queue pair that breaks under it is connected again by both. Who
    /// does nothing more with the wire drives it for as long, or its peers wait in vain.
    fn owes(&self) -> bool {
        false
    }

    /// The part of this wire that reaches memory of CUDA devices, where it has one.
    fn device_sided(&mut self) -> Option<&mut dyn DeviceSided> {
        None
    }

    /// A handle to wake this wire with.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Says goodbye to every peer after sending what was posted, waiting at most `until`. The wire is closed afterwards.
    fn shutdown(&mut self, until: Instant);
}

/// Memory of a peer that we may write and read without its help; made by the owner, sent to us in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteSlice {
    /// Key of the exposed memory at its owner.
    pub key: u64,
    /// First byte of ours within it.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One-sided access, for the wires that have it. A trait of its own, so that no wire has to "not implement" it.
pub trait OneSided: Wire {
    /// Lets `peer` write and read `slice` until [`OneSided::withdraw`].
    fn expose(&mut self, peer: PeerId, slice: RegionSliceMut) -> Result<RemoteSlice, RegisterError>;

    /// Ends the exposure and gives the slice back; `None` for an unknown key.
    fn withdraw(&mut self, remote: RemoteSlice) -> Option<RegionSliceMut>;

    /// Writes `slice` into the peer's memory; ends in `Sent` once the bytes are there, or `SendFailed`. The peer is not
    /// told: send a message after it.
    fn post_put(&mut self, to: Envelope, slice: RegionSlice, remote: RemoteSlice)
    -> Result<(), PostError<RegionSlice>>;

    /// Reads the peer's memory into `slice`; ends in `Received` or `RecvFailed`.
    fn post_get(
        &mut self,
        from: Envelope,
        slice: RegionSliceMut,
        remote: RemoteSlice,
    ) -> Result<(), PostError<RegionSliceMut>>;
}

/// One-sided access between CUDA devices, for the wires whose network card reads and writes their memory by itself.
pub trait DeviceSided {
    /// Lets peers read and write a device's memory until [`DeviceSided::withdraw_device`], and reads of our own land in it. `None`
    /// where the card cannot reach it: the way says why.
    ///
    /// The card asks no stream: what was written before must be done (wait for an event), and what peers have written is seen by
    /// kernels after [`flush_rdma_writes`](crate::cuda::Device::flush_rdma_writes).
    fn expose_device(&mut self, slice: DeviceSlice) -> (Way, Option<RemoteSlice>);

    /// Ends the exposure and gives the memory back; `None` for an unknown key, and while accesses of our own use it.
    fn withdraw_device(&mut self, own: RemoteSlice) -> Option<DeviceSlice>;

    /// As [`OneSided::post_get`], into a device's memory that is exposed here; the completion's slice is empty, and kernels that begin
    /// after it see the bytes.
    ///
    /// # Errors
    /// Where nothing was posted: `Config` for memory that is not exposed here, else as there.
    fn post_get_to_device(
        &mut self,
        from: Envelope,
        own: RemoteSlice,
        remote: RemoteSlice,
    ) -> Result<(), TransportError>;
}

/// Whether an access of `bytes` stays within the `capacity` of its other side.
///
/// # Errors
/// `MessageTooLong`, before anything is sent.
pub(crate) fn fits(peer: PeerName, tag: Tag, bytes: u64, capacity: u64) -> Result<(), TransportError> {
    let whole = |count| usize::try_from(count).unwrap_or(usize::MAX);
    if bytes <= capacity {
        return Ok(());
    }
    let (bytes, capacity) = (whole(bytes), whole(capacity));
    Err(TransportError::MessageTooLong { peer: Box::new(peer), tag, note: 0, bytes, capacity })
}

impl fmt::Debug for dyn Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

// Keeps the pieces of the waist object-safe and thread-movable; a change that breaks this fails here, not far away.
const _: fn(&dyn Wire, &dyn OneSided, RecvLoan, TransportError) = |_, _, _, _| {};
