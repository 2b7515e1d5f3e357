//! Does: memory shared by processes, as a memfd: it has no name in the file system, so a killed process leaves nothing.
//!
//! A peer opens it through `/proc/<pid>/fd/<fd>`, which works only on the same host and under the same user (the superuser, who
//! could open anybody's, keeps to it), and compares a random nonce at its head: that is the proof of locality.

#![allow(unsafe_code)]

use crate::TransportError;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Bytes at the head that hold the nonce; what is stored begins behind them.
pub const HEAD_BYTES: usize = 64;

/// How a peer finds a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentOffer {
    /// Who made it.
    pub pid: u32,
    /// Its descriptor there.
    pub fd: i32,
    /// What stands at its head.
    pub nonce: u64,
    /// Its size.
    pub bytes: u64,
}

/// A mapping of shared memory.
pub struct Segment {
    start: NonNull<u8>,
    bytes: usize,
    fd: OwnedFd,
    nonce: u64,
}

// SAFETY: the memory is reached by atomics, or by raw pointers whose users answer for them.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// New shared memory of `bytes` zeros behind the head.
    ///
    /// # Errors
    /// `Io` when the system has no memory for it.
    pub fn create(bytes: usize) -> Result<Self, TransportError> {
        let refused = |error| TransportError::io(format!("make {bytes} bytes of shared memory"), error);
        let fd =
            rustix::fs::memfd_create("gradwire", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(refused)?;
        let total = HEAD_BYTES + bytes;
        rustix::fs::ftruncate(&fd, total as u64).map_err(refused)?;
        // Nobody can cut it short later, which would kill whoever reads it.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(refused)?;
        let mut nonce = [0; 8];
        getrandom::fill(&mut nonce).expect("the system gives random bytes");
        let nonce = u64::from_le_bytes(nonce) | 1;
        let segment = Self::map(fd, total, nonce).map_err(refused)?;
        segment.word64_at(0).store(nonce, std::sync::atomic::Ordering::Release);
        Ok(segment)
    }

    /// Opens what another process of this host has made.
    ///
    /// # Errors
    /// `Io` where it cannot be reached, or is not what was offered: the other process is on another host or of another user.
    pub fn open(offer: &SegmentOffer) -> Result<Self, TransportError> {
        let path = format!("/proc/{}/fd/{}", offer.pid, offer.fd);
        let refused = |error: std::io::Error| TransportError::io(format!("open the shared memory {path}"), error);
        let other = |what: &str| refused(std::io::Error::other(what.to_owned()));
        let file = File::options().read(true).write(true).open(&path).map_err(refused)?;
        let sealed = rustix::fs::fcntl_get_seals(&file).map_err(|error| refused(error.into()))?;
        let about = file.metadata().map_err(refused)?;
        let size = about.len();
        if about.uid() != rustix::process::geteuid().as_raw() {
            return Err(other("another user made it"));
        }
        if size != offer.bytes || size < HEAD_BYTES as u64 || !sealed.contains(SealFlags::SHRINK) {
            return Err(other("it is not the memory that was offered"));
        }
        let bytes = usize::try_from(size).map_err(|_| other("it is too large"))?;
        let segment = Self::map(file.into(), bytes, offer.nonce).map_err(|error| refused(error.into()))?;
        if segment.word64_at(0).load(std::sync::atomic::Ordering::Acquire) != offer.nonce {
            return Err(other("its nonce is another: that process is not the one that offered it"));
        }
        Ok(segment)
    }

    /// What a peer needs to open it.
    pub fn offer(&self) -> SegmentOffer {
        let pid = std::process::id();
        SegmentOffer { pid, fd: self.fd.as_raw_fd(), nonce: self.nonce, bytes: self.bytes as u64 }
    }

    /// The 64-bit word `offset` bytes behind the head.
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        self.word64_at(HEAD_BYTES + offset)
    }

    /// The 32-bit word `offset` bytes behind the head.
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        let at = HEAD_BYTES + offset;
        assert!(at.is_multiple_of(4) && at + 4 <= self.bytes, "a word lies within the segment");
        // SAFETY: the offset lies within the mapping.
        let word = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: aligned, mapped for as long as `self`, and only ever reached as an atomic.
        unsafe { AtomicU32::from_ptr(word.cast()) }
    }

    /// The address `offset` bytes behind the head, of which `bytes` bytes are mapped.
    pub fn pointer(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        assert!(offset <= self.bytes && bytes <= self.bytes - HEAD_BYTES - offset, "a slot lies within the segment");
        // SAFETY: the offset lies within the mapping.
        unsafe { self.start.add(HEAD_BYTES + offset) }
    }

    fn word64_at(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.bytes, "a word lies within the segment");
        // SAFETY: the offset lies within the mapping.
        let word = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: aligned, mapped for as long as `self`, and only ever reached as an atomic.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    fn map(fd: OwnedFd, bytes: usize, nonce: u64) -> rustix::io::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping of a sealed descriptor, anywhere: it overlaps nothing.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, &fd, 0) }?;
        let start = NonNull::new(start.cast()).expect("the system never maps the first page");
        Ok(Self { start, bytes, fd, nonce })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; whoever holds a pointer into it holds the segment.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "shared memory could not be unmapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_writes_the_other_reads() {
        let a = Segment::create(4096).unwrap();
        let b = Segment::open(&a.offer()).unwrap();
        a.word64(64).store(7, Ordering::Release);
        assert_eq!(b.word64(64).load(Ordering::Acquire), 7);
    }

    #[test]
    fn what_is_not_the_segment_that_was_offered_is_refused() {
        let a = Segment::create(64).unwrap();
        assert!(Segment::open(&SegmentOffer { nonce: 1, ..a.offer() }).is_err());
        assert!(Segment::open(&SegmentOffer { bytes: 1 << 40, ..a.offer() }).is_err());
        assert!(Segment::open(&SegmentOffer { fd: 9999, ..a.offer() }).is_err());
        assert!(Segment::open(&SegmentOffer { pid: u32::MAX, ..a.offer() }).is_err());
    }
}
