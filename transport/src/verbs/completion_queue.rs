//! Does: the completion queue of a device, and the channel by which it wakes a sleeper.

#![allow(unsafe_code)]

use super::context::{Context, answer, not_null};
use super::ffi::*;
use rustix::fs::OFlags;
use std::ffi::c_int;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

/// Completions taken at once.
pub(super) const BATCH: usize = 32;

/// Makes a descriptor of the library's one that never blocks.
pub(super) fn never_blocks(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// Wakes who sleeps on its descriptor.
struct Channel {
    context: Arc<Context>,
    raw: NonNull<ibv_comp_channel>,
}

impl Channel {
    fn new(context: &Arc<Context>) -> io::Result<Self> {
        // SAFETY: the context is open.
        let raw = not_null(unsafe { (context.library.create_comp_channel)(context.raw.as_ptr()) })?;
        let channel = Self { context: Arc::clone(context), raw };
        never_blocks(channel.fd())?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is there for as long as `self`, and nobody changes the number.
        let fd = unsafe { (*self.raw.as_ptr()).fd };
        // SAFETY: the descriptor belongs to the channel, which is there for as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: made by the library and freed once, after the queue that used it.
        if let Err(error) = answer(unsafe { (self.context.library.destroy_comp_channel)(self.raw.as_ptr()) }) {
            tracing::error!(device = self.context.name, %error, "a completion channel could not be freed");
        }
    }
}

/// Where a device puts what has ended.
pub(super) struct CompletionQueue {
    pub(super) raw: NonNull<ibv_cq>,
    poll_cq: PollCq,
    req_notify_cq: ReqNotifyCq,
    channel: Channel,
}

// SAFETY: libibverbs lets any thread use a completion queue: its providers lock it.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue of at least `entries`, with its channel.
    pub(super) fn new(context: &Arc<Context>, entries: usize) -> io::Result<Arc<Self>> {
        let channel = Channel::new(context)?;
        let create = context.library.create_cq;
        // SAFETY: context and channel are open; the queue holds both.
        let raw = unsafe { create(context.raw.as_ptr(), length(entries)?, null_mut(), channel.raw.as_ptr(), 0) };
        let (poll_cq, req_notify_cq) = (context.ops().poll_cq, context.ops().req_notify_cq);
        Ok(Arc::new(Self { raw: not_null(raw)?, poll_cq, req_notify_cq, channel }))
    }

    /// How many completions it holds before it overflows.
    pub(super) fn entries(&self) -> usize {
        // SAFETY: the queue is there for as long as `self`; only `resize`, by the one owner, changes the number.
        usize::try_from(unsafe { (*self.raw.as_ptr()).cqe }).unwrap_or(0)
    }

    /// Makes it hold at least `entries`; what is in it stays.
    pub(super) fn resize(&self, entries: usize) -> io::Result<()> {
        // SAFETY: the queue is there for as long as `self`.
        answer(unsafe { (self.channel.context.library.resize_cq)(self.raw.as_ptr(), length(entries)?) })
    }

    /// Takes up to a batch; how many there were.
    pub(super) fn poll(&self, batch: &mut [ibv_wc; BATCH]) -> io::Result<usize> {
        // SAFETY: the queue is there for as long as `self`, and the batch has room for as many as are asked for.
        let found = unsafe { (self.poll_cq)(self.raw.as_ptr(), BATCH as c_int, batch.as_mut_ptr()) };
        usize::try_from(found).map_err(|_| io::Error::from_raw_os_error(found.saturating_abs()))
    }

    /// Makes the channel readable by the next completion.
    pub(super) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue is there for as long as `self`.
        answer(unsafe { (self.req_notify_cq)(self.raw.as_ptr(), 0) })
    }

    /// Readable after [`Self::arm`] and a completion.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }

    /// Takes and acknowledges every notification, so that the descriptor is not readable any more.
    pub(super) fn quiet(&self) {
        let library = self.channel.context.library;
        let mut taken = 0;
        let (mut queue, mut mark) = (null_mut(), null_mut());
        // SAFETY: the channel is there for as long as `self`, never blocks, and both places are ours to be written.
        while unsafe { (library.get_cq_event)(self.channel.raw.as_ptr(), &raw mut queue, &raw mut mark) } == 0 {
            taken += 1;
        }
        if taken > 0 {
            // SAFETY: the channel has this one queue, so so many of its notifications were taken and not acknowledged.
            unsafe { (library.ack_cq_events)(self.raw.as_ptr(), taken) }
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let context = &self.channel.context;
        // SAFETY: made by the library and freed once; queue pairs hold an `Arc` of this, so none is left, and every
        // notification that was taken was acknowledged.
        if let Err(error) = answer(unsafe { (context.library.destroy_cq)(self.raw.as_ptr()) }) {
            tracing::error!(device = context.name, %error, "a completion queue could not be freed");
        }
    }
}

fn length(entries: usize) -> io::Result<c_int> {
    c_int::try_from(entries).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}
