//! Does: one queue pair with memory of its own, and nothing around them: what measurements lay beside a message, and an
//! example of what the wire is built from.

#![allow(unsafe_code)]

use super::adapter::{Access, Adapter, Endpoint, Key, Remote, Span, Work};
use super::fault::Fault;
use super::{adapter::What, status::Status};
use crate::{Region, RegisterError, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::sync::Arc;
use std::time::Instant;

const PAGE: usize = 4096;

/// How far a queue pair has come, since it was connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Writes that are known to have ended: the first so many.
    pub written: u64,
    /// Receives that a write's word has met.
    pub words: u64,
}

/// One end of a queue pair, with memory that the other end may write at any time.
pub struct Bare {
    adapter: Box<dyn Adapter>,
    endpoint: Endpoint,
    key: Key,
    start: *mut u8,
    bytes: usize,
    remote: Option<Remote>,
    posted: u64,
    progress: Progress,
    events: Vec<super::adapter::Event>,
    // Behind the adapter, which reaches it.
    _memory: Arc<Region>,
}

// SAFETY: the pointer is to memory that this value keeps alive, and reads and writes it in single bytes and words.
unsafe impl Send for Bare {}

impl Bare {
    /// A queue pair of `adapter`, and `bytes` of memory, which begin on a page.
    ///
    /// # Errors
    /// The device's, and `Config` where the memory cannot be registered.
    pub fn new(mut adapter: Box<dyn Adapter>, bytes: usize) -> Result<Self, TransportError> {
        let memory = Region::zeroed(bytes + PAGE);
        let first = memory.as_ptr();
        let start = first.wrapping_add(first.addr().next_multiple_of(PAGE) - first.addr());
        // SAFETY: the memory is kept until the adapter is gone, which is dropped before it.
        let key = unsafe { adapter.register(start, bytes, Access::Write) };
        let refused = |error: RegisterError| TransportError::Config {
            setting: "memory for a bare queue pair".to_owned(),
            reason: error.to_string(),
        };
        let key = key.map_err(refused)?;
        let endpoint = adapter.open()?;
        let (progress, events) = (Progress::default(), Vec::new());
        Ok(Self { adapter, endpoint, key, start, bytes, remote: None, posted: 0, progress, events, _memory: memory })
    }

    /// What the other end must know.
    pub fn offer(&self) -> (Endpoint, Remote) {
        (self.endpoint, Remote { address: self.start.addr() as u64, key: self.key.remote })
    }

    /// Connects to the other end.
    ///
    /// # Errors
    /// `Io` when it cannot be reached from this port.
    pub fn connect(&mut self, (endpoint, remote): (Endpoint, Remote)) -> Result<(), TransportError> {
        self.adapter.connect(self.endpoint.queue_pair, &endpoint)?;
        self.remote = Some(remote);
        Ok(())
    }

    /// The device, port and address used, and what it allows.
    pub fn adapter(&self) -> &dyn Adapter {
        &*self.adapter
    }

    /// Writes `bytes` of our memory from `from` on to the same place of the peer's; with a word, which ends a receive there.
    ///
    /// # Errors
    /// `Config` outside of the memory, or `Io` when the queue takes no more.
    pub fn write(
        &mut self,
        from: usize,
        bytes: usize,
        word: Option<u32>,
        signalled: bool,
    ) -> Result<(), TransportError> {
        self.check(from, bytes)?;
        let remote = self.remote.ok_or_else(|| wrong("it is not connected".to_owned()))?;
        let span = Span { address: (self.start.addr() + from) as u64, bytes: bytes as u32, key: self.key.local };
        let there = Remote { address: remote.address + from as u64, key: remote.key };
        self.posted += 1;
        let posted =
            self.adapter.post(self.endpoint.queue_pair, self.posted, span, Work::Write(there, word), signalled);
        posted.map_err(|error| TransportError::io("post a write", error))
    }

    /// Posts a receive for a word, with no memory.
    ///
    /// # Errors
    /// `Io` when the queue takes no more.
    pub fn expect_word(&mut self) -> Result<(), TransportError> {
        let span = Span { address: 0, bytes: 0, key: self.key.local };
        let posted = self.adapter.post_recv(self.endpoint.queue_pair, 0, span);
        posted.map_err(|error| TransportError::io("post a receive", error))
    }

    /// Takes what has ended.
    ///
    /// # Errors
    /// The fault of a queue pair that is of no use any more.
    pub fn poll(&mut self) -> Result<Progress, Fault> {
        self.adapter.poll(&mut self.events);
        for event in self.events.drain(..) {
            match event.what {
                What::Done => self.progress.written = event.number,
                What::Received(..) => self.progress.words += 1,
                What::Failed(Status { .. }) if event.queue_pair != self.endpoint.queue_pair => {}
                What::Failed(status) => {
                    return Err(Fault::of_work(self.adapter.name(), self.endpoint.queue_pair, status));
                }
            }
        }
        Ok(self.progress)
    }

    /// Sleeps until something more than `known` has ended, or `until`.
    ///
    /// # Errors
    /// As for [`Self::poll`]; also what the device says of itself.
    pub fn sleep(&mut self, known: Progress, until: Instant) -> Result<Progress, Fault> {
        self.adapter.arm();
        let progress = self.poll()?;
        if progress == known {
            let wait = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
            let mut fds = [PollFd::from_borrowed_fd(self.adapter.sleep_on(), PollFlags::IN)];
            // Interrupted, the caller polls and comes back.
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
        }
        let mut troubles = Vec::new();
        self.adapter.wake_up(&mut troubles);
        match troubles.into_iter().find(|trouble| trouble.fatal) {
            Some(trouble) => Err(Fault::of_device(self.adapter.name(), self.endpoint.queue_pair, trouble.what)),
            None => self.poll(),
        }
    }

    /// The word at `at`, as it is now: the peer may write it meanwhile.
    ///
    /// # Panics
    /// Where it lies outside of the memory, or not on a multiple of eight.
    pub fn word(&self, at: usize) -> u64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.bytes, "a word of this memory");
        let place = self.start.wrapping_add(at).cast::<u64>();
        // SAFETY: it lies within our memory, aligned; a device that writes it meanwhile is why the read is volatile.
        u64::from_le(unsafe { place.read_volatile() })
    }

    /// Sets the word at `at`.
    ///
    /// # Panics
    /// As [`Self::word`].
    pub fn set_word(&mut self, at: usize, word: u64) {
        assert!(at.is_multiple_of(8) && at + 8 <= self.bytes, "a word of this memory");
        let place = self.start.wrapping_add(at).cast::<u64>();
        // SAFETY: it lies within our memory, aligned, and nobody holds a reference to it.
        unsafe { place.write_volatile(word.to_le()) }
    }

    fn check(&self, from: usize, bytes: usize) -> Result<(), TransportError> {
        let inside = from.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        let fits = bytes <= self.adapter.limits().message_bytes;
        match inside && fits {
            true => Ok(()),
            false => Err(wrong(format!("{bytes} bytes from {from} on: it has {}", self.bytes))),
        }
    }
}

fn wrong(reason: String) -> TransportError {
    TransportError::Config { setting: "a write by a bare queue pair".to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::Fabric;
    use super::*;
    use std::time::Duration;

    #[test]
    fn writes_land_where_they_came_from_and_words_are_counted() {
        let fabric = Fabric::default();
        let mut ends = [(); 2].map(|()| Bare::new(Box::new(fabric.adapter()), 4096).unwrap());
        let offers = [ends[0].offer(), ends[1].offer()];
        ends.iter_mut().zip(offers.into_iter().rev()).for_each(|(end, offer)| end.connect(offer).unwrap());
        let [a, b] = &mut ends;
        b.expect_word().unwrap();
        a.set_word(64, 0x1122);
        a.write(64, 8, None, false).unwrap();
        a.set_word(128, 7);
        a.write(128, 8, Some(3), true).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        let (mut written, mut heard) = (Progress::default(), Progress::default());
        // What is posted is carried out as its own end is polled.
        while written.written < 2 || heard.words == 0 {
            assert!(Instant::now() < until);
            written = a.poll().unwrap();
            heard = b.sleep(heard, Instant::now()).unwrap();
        }
        assert_eq!((b.word(64), b.word(128), b.word(72)), (0x1122, 7, 0));
        assert_eq!((written, heard), (Progress { written: 2, words: 0 }, Progress { written: 0, words: 1 }));
        assert!(a.write(4090, 8, None, true).is_err() && a.write(usize::MAX, 8, None, true).is_err());
    }
}
