//! Pure: what a verbs link asks of an RDMA device, in plain data. [`super::device`] does it with a real one,
//! [`super::loopback`] within one process, so that everything above is tested where there is no device.

use super::status::Status;
use crate::{RegisterError, TransportError};
use rustix::fd::BorrowedFd;
use std::fmt;
use std::io;

/// One end of a queue pair, as the other end must know it to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Number of the queue pair at its device.
    pub queue_pair: u32,
    /// First packet sequence number that it sends.
    pub packet: u32,
    /// Local identifier; 0 on Ethernet.
    pub lid: u16,
    /// Path MTU that its port can take, in bytes.
    pub mtu_bytes: u16,
    /// Reads and atomics that it answers at once.
    pub reads: u8,
    /// Global identifier.
    pub gid: [u8; 16],
}

/// What a device and its settings allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest message that may be copied into the work request itself.
    pub inline_bytes: usize,
    /// Longest message of one work request.
    pub message_bytes: usize,
    /// Work requests that a queue pair's send queue holds.
    pub send_depth: usize,
    /// Receives that a queue pair's receive queue holds.
    pub recv_depth: usize,
    /// Reads that may be under way on one queue pair.
    pub reads: usize,
}

/// Memory that the device knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// For [`Adapter::deregister`].
    pub handle: u64,
    /// For our own work requests.
    pub local: u32,
    /// For the peer's.
    pub remote: u32,
    /// By what work requests name the first byte: its address, or for [`Access::Exposed`] its place in its page, since
    /// devices map whole pages.
    pub first: u64,
}

/// Memory of another device, such as a GPU, which the processor does not look into.
#[derive(Clone, Copy, Debug)]
pub struct Foreign<'a> {
    /// Where it begins, as its device counts.
    pub address: u64,
    /// Length.
    pub bytes: usize,
    /// The dma-buf that it lies in, and where in it; `None`: by its address, which a module of the kernel must know.
    pub dma_buf: Option<(BorrowedFd<'a>, u64)>,
}

/// What may be done with registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Our own work requests may read it.
    Read,
    /// They may write it too, and so may whoever has the remote key.
    Write,
    /// As `Write`, by offsets from [`Key::first`] instead of addresses, and it may be read remotely.
    Exposed,
}

/// Local memory of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub address: u64,
    /// Length.
    pub bytes: u32,
    /// Local key of the registration that it lies in.
    pub key: u32,
}

/// Memory of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// First byte, as the owner's registration counts.
    pub address: u64,
    /// Remote key.
    pub key: u32,
}

/// A work request for a send queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Into the next receive of the peer.
    Send,
    /// Into the peer's memory; with a word, which ends the peer's next receive.
    Write(Remote, Option<u32>),
    /// Out of the peer's memory.
    Read(Remote),
}

/// What became of a work request or a receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Our queue pair.
    pub queue_pair: u32,
    /// The number that it was posted with.
    pub number: u64,
    /// What happened.
    pub what: What,
}

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A signalled work request is done, and all before it.
    Done,
    /// A receive was met: so many bytes, or a word that a write carried.
    Received(u32, Option<u32>),
    /// It failed; the queue pair is of no use any more.
    Failed(Status),
}

/// Something that the device says of itself, not of a work request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The queue pair concerned; `None`: all.
    pub queue_pair: Option<u32>,
    /// Whether work can go on.
    pub fatal: bool,
    /// What it is, in words.
    pub what: String,
}

/// A device with one completion queue. Memory named in a work request stays as it is until the request has ended or its queue
/// pair is closed: who posts sees to that.
pub trait Adapter: Send {
    /// The device, port and address used, for people.
    fn name(&self) -> String;

    /// What it allows.
    fn limits(&self) -> Limits;

    /// Makes memory known to the device.
    ///
    /// # Safety
    /// `start..start + bytes` must stay mapped until [`Adapter::deregister`].
    ///
    /// # Errors
    /// `LockedMemoryLimit` or `Device`.
    #[allow(unsafe_code)]
    unsafe fn register(&mut self, start: *mut u8, bytes: usize, access: Access) -> Result<Key, RegisterError>;

    /// Makes memory of another device known, as [`Access::Exposed`].
    ///
    /// # Safety
    /// It must stay allocated until [`Adapter::deregister`].
    ///
    /// # Errors
    /// `Device`: this one cannot reach it.
    #[allow(unsafe_code)]
    unsafe fn register_foreign(&mut self, memory: Foreign<'_>) -> Result<Key, RegisterError>;

    /// Forgets memory that no work request names any more.
    fn deregister(&mut self, handle: u64);

    /// Makes a queue pair that can be connected.
    ///
    /// # Errors
    /// `Io` when the device has no more.
    fn open(&mut self) -> Result<Endpoint, TransportError>;

    /// Connects it to the peer's.
    ///
    /// # Errors
    /// `Io` when the address cannot be reached from this port.
    fn connect(&mut self, queue_pair: u32, to: &Endpoint) -> Result<(), TransportError>;

    /// Stops a queue pair: what was posted ends in events, as failed where it had not ended before.
    fn stop(&mut self, queue_pair: u32);

    /// Ends a queue pair. Nothing posted to it touches memory any more, and no event of it comes.
    fn close(&mut self, queue_pair: u32);

    /// Posts a work request.
    ///
    /// # Errors
    /// The device's answer; the queue pair is of no use any more.
    fn post(&mut self, queue_pair: u32, number: u64, span: Span, work: Work, signalled: bool) -> io::Result<()>;

    /// Posts a receive.
    ///
    /// # Errors
    /// As for [`Adapter::post`].
    fn post_recv(&mut self, queue_pair: u32, number: u64, span: Span) -> io::Result<()>;

    /// Appends what has ended.
    fn poll(&mut self, events: &mut Vec<Event>);

    /// Makes [`Adapter::sleep_on`] readable by the next event. What came before must be polled once more.
    fn arm(&mut self);

    /// A descriptor to sleep on.
    fn sleep_on(&self) -> BorrowedFd<'_>;

    /// After a sleep, and now and then: what the device has to say.
    fn wake_up(&mut self, troubles: &mut Vec<Trouble>);
}

impl fmt::Debug for dyn Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({})", self.name())
    }
}
