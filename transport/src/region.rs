//! Pure: memory that may travel, who may touch it, and what keeps it alive.
//!
//! A [`Region`] keeps a ledger of the byte ranges that are lent out, as `RefCell` does for one value: many readers or one
//! writer a byte. So slices can be posted, given back and handed out anew in any order, without `unsafe` in the callers
//! and without allocation once the ledger has grown to its working size.

#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A stretch of memory that wires may read and write while slices of it are posted.
pub struct Region {
    start: NonNull<u8>,
    bytes: usize,
    ledger: Mutex<Vec<Lease>>,
    registration: OnceLock<Box<dyn Any + Send + Sync>>,
    keep_alive: Box<dyn Any + Send + Sync>,
}

// SAFETY: the memory is reached only through slices, and the ledger lends each byte to one writer or to readers only; what
// keeps it alive is itself `Send + Sync`.
unsafe impl Send for Region {}
// SAFETY: as above; the ledger is behind a lock.
unsafe impl Sync for Region {}

struct Lease {
    start: usize,
    end: usize,
    readers: usize, // 0: one writer
}

/// A range was asked for that somebody else holds, or that lies outside the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {start}..{end} of a region of {bytes} bytes are in use or outside of it")]
pub struct Overlap {
    /// First byte asked for.
    pub start: usize,
    /// One past the last byte asked for.
    pub end: usize,
    /// Size of the region.
    pub bytes: usize,
}

impl Region {
    /// Takes over `memory`.
    pub fn from_vec(mut memory: Vec<u8>) -> Arc<Self> {
        let bytes = memory.len();
        let start = NonNull::new(memory.as_mut_ptr()).unwrap_or(NonNull::dangling());
        // SAFETY: a Vec's heap block does not move when the Vec is moved into the box, lives as long as the box, and nobody
        // reads the box.
        unsafe { Self::from_raw(start, bytes, Box::new(memory)) }
    }

    /// A region of `bytes` zeros.
    pub fn zeroed(bytes: usize) -> Arc<Self> {
        Self::from_vec(vec![0; bytes])
    }

    /// A region over memory that somebody else owns.
    ///
    /// # Safety
    /// `start..start + bytes` must be valid for reads and writes for as long as `keep_alive` lives (`bytes` may be 0), and
    /// nobody may write it, nor read what a writer holds, except through slices of this region, while any are out.
    pub unsafe fn from_raw(start: NonNull<u8>, bytes: usize, keep_alive: Box<dyn Any + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { start, bytes, ledger: Mutex::new(Vec::new()), registration: OnceLock::new(), keep_alive })
    }

    /// The bytes of a slice as a region of its own, for one user after the other of memory that stays: the slice is given back
    /// when the last one lets go of it.
    pub fn of_slice(mut whole: RegionSliceMut) -> Arc<Self> {
        let bytes = whole.len();
        let start = NonNull::new(whole.as_mut_ptr()).unwrap_or(NonNull::dangling());
        // SAFETY: the slice keeps its region's memory, nobody else has a slice of these bytes, and nobody reads this one any more.
        unsafe { Self::from_raw(start, bytes, Box::new(whole)) }
    }

    /// The region that a device is to know for this one: that of the memory which stays, where this is but one use of it.
    pub(crate) fn lasting(self: &Arc<Self>) -> &Arc<Self> {
        self.keep_alive.downcast_ref::<RegionSliceMut>().map_or(self, RegionSliceMut::region)
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The address of the first byte, for a device's registration.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Where a device keeps what it knows of this region; empty until it is registered.
    pub fn registration(&self) -> &OnceLock<Box<dyn Any + Send + Sync>> {
        &self.registration
    }

    /// The same memory with a ledger of its own, for a device that is told of it and asks no ledger: slices of it are held for
    /// as long as the device knows them, and never looked into.
    pub(crate) fn beside(self: &Arc<Self>) -> Arc<Self> {
        // SAFETY: this region, which is held, keeps the memory; who writes it meanwhile is the device's affair, as it is for
        // all memory that peers reach by themselves.
        unsafe { Self::from_raw(self.start, self.bytes, Box::new(Arc::clone(self))) }
    }

    /// Lends `range` for reading.
    pub fn read(self: &Arc<Self>, range: Range<usize>) -> Result<RegionSlice, Overlap> {
        self.lease(&range, false)?;
        Ok(RegionSlice { region: Arc::clone(self), start: range.start, end: range.end })
    }

    /// Lends `range` for writing, to this one holder.
    pub fn write(self: &Arc<Self>, range: Range<usize>) -> Result<RegionSliceMut, Overlap> {
        self.lease(&range, true)?;
        Ok(RegionSliceMut { region: Arc::clone(self), start: range.start, end: range.end })
    }

    fn ledger(&self) -> MutexGuard<'_, Vec<Lease>> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lease(&self, range: &Range<usize>, write: bool) -> Result<(), Overlap> {
        let (start, end) = (range.start, range.end);
        let refused = Overlap { start, end, bytes: self.bytes };
        if start > end || end > self.bytes {
            return Err(refused);
        }
        if start == end {
            return Ok(());
        }
        let mut ledger = self.ledger();
        let mut same = None;
        for (index, lease) in ledger.iter().enumerate() {
            if lease.start < end && start < lease.end {
                if write || lease.readers == 0 {
                    return Err(refused);
                }
                if lease.start == start && lease.end == end {
                    same = Some(index);
                }
            }
        }
        match same {
            Some(index) => ledger[index].readers += 1,
            None => ledger.push(Lease { start, end, readers: usize::from(!write) }),
        }
        Ok(())
    }

    fn give_back(&self, start: usize, end: usize, write: bool) {
        if start == end {
            return;
        }
        let mut ledger = self.ledger();
        let found = ledger.iter().position(|l| l.start == start && l.end == end && (l.readers == 0) == write);
        let index = found.expect("a slice in somebody's hand stands in the ledger");
        if write || ledger[index].readers == 1 {
            ledger.swap_remove(index);
        } else {
            ledger[index].readers -= 1;
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} bytes)", self.bytes)
    }
}

macro_rules! slice_of_region {
    ($name:ident, $write:literal) => {
        impl $name {
            /// The region that this is a slice of.
            pub fn region(&self) -> &Arc<Region> {
                &self.region
            }

            /// Which bytes of the region.
            pub fn range(&self) -> Range<usize> {
                self.start..self.end
            }
        }

        impl Deref for $name {
            type Target = [u8];

            fn deref(&self) -> &[u8] {
                // SAFETY: `start` lies within the region, since the ledger lent it.
                let first = unsafe { self.region.start.as_ptr().add(self.start) };
                // SAFETY: the region keeps the memory alive and the ledger keeps writers away while this slice is out.
                unsafe { std::slice::from_raw_parts(first, self.end - self.start) }
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                self.region.give_back(self.start, self.end, $write);
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({}..{})"), self.start, self.end)
            }
        }
    };
}

/// Bytes of a region, lent for reading. Dropping it gives them back.
pub struct RegionSlice {
    region: Arc<Region>,
    start: usize,
    end: usize,
}

/// Bytes of a region, lent for writing to this one holder. Dropping it gives them back.
pub struct RegionSliceMut {
    region: Arc<Region>,
    start: usize,
    end: usize,
}

slice_of_region!(RegionSlice, false);
slice_of_region!(RegionSliceMut, true);

impl DerefMut for RegionSliceMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` lies within the region, since the ledger lent it.
        let first = unsafe { self.region.start.as_ptr().add(self.start) };
        // SAFETY: the region keeps the memory alive and the ledger lent these bytes to nobody else.
        unsafe { std::slice::from_raw_parts_mut(first, self.end - self.start) }
    }
}

/// Takes a loan's memory back. One per pool of a wire.
pub trait LoanHome: Send + Sync {
    /// The memory that was lent under `ticket` is free again. May come from any thread.
    fn give_back(&self, ticket: u64);
}

/// Takes a lent buffer back. One per pool of a wire whose memory is ordinary heap memory.
pub trait BufferHome: Send + Sync {
    /// `buffer` is free again. May come from any thread.
    fn take_back(&self, buffer: Vec<u8>);
}

/// Memory of a wire in somebody's hands: a slot of a shared segment, a registered eager buffer, a pooled buffer.
pub struct Loan(Backing);

enum Backing {
    Slot { start: NonNull<u8>, bytes: usize, ticket: u64, home: Option<Arc<dyn LoanHome>> },
    Buffer { buffer: Vec<u8>, bytes: usize, home: Option<Arc<dyn BufferHome>> },
}

// SAFETY: a loan is the only way to its memory until it is given back, and its home may be called from any thread.
unsafe impl Send for Loan {}
// SAFETY: shared access only reads.
unsafe impl Sync for Loan {}

impl Loan {
    /// A loan of `start..start + bytes`, to be given back to `home` under `ticket`.
    ///
    /// # Safety
    /// The memory must be valid for reads and writes, and nobody else may write it (nor read it, for a loan that is to be
    /// written), until `home.give_back(ticket)` is called; the home must keep it alive until then.
    pub unsafe fn new(start: NonNull<u8>, bytes: usize, ticket: u64, home: Arc<dyn LoanHome>) -> Self {
        Self(Backing::Slot { start, bytes, ticket, home: Some(home) })
    }

    /// A loan of the first `bytes` bytes of `buffer`, which goes back to `home`.
    pub fn of_buffer(buffer: Vec<u8>, bytes: usize, home: Arc<dyn BufferHome>) -> Self {
        assert!(bytes <= buffer.len(), "a loan lies within its buffer");
        Self(Backing::Buffer { buffer, bytes, home: Some(home) })
    }

    /// The ticket, for the wire that lent a slot and takes it back by `post_loan`: the home is not called. 0 for a buffer.
    pub fn into_ticket(mut self) -> u64 {
        match &mut self.0 {
            Backing::Slot { ticket, home, .. } => {
                *home = None;
                *ticket
            }
            Backing::Buffer { .. } => 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: promised by the caller of `new`; the loan has not been given back yet.
            Backing::Slot { start, bytes, .. } => unsafe { std::slice::from_raw_parts(start.as_ptr(), *bytes) },
            Backing::Buffer { buffer, bytes, .. } => &buffer[..*bytes],
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            // SAFETY: promised by the caller of `new`; it has not been given back yet, and `&mut self` makes us alone.
            Backing::Slot { start, bytes, .. } => unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), *bytes) },
            Backing::Buffer { buffer, bytes, .. } => &mut buffer[..*bytes],
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        match &mut self.0 {
            Backing::Slot { ticket, home, .. } => {
                if let Some(home) = home.take() {
                    home.give_back(*ticket);
                }
            }
            Backing::Buffer { buffer, home, .. } => {
                if let Some(home) = home.take() {
                    home.take_back(std::mem::take(buffer));
                }
            }
        }
    }
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loan({} bytes)", self.bytes().len())
    }
}

/// A message to be written in the wire's own memory, then posted.
#[derive(Debug)]
pub struct SendLoan(pub Loan);

/// A message that arrived in the wire's own memory.
#[derive(Debug)]
pub struct RecvLoan(pub Loan);

impl Deref for SendLoan {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl DerefMut for SendLoan {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

impl Deref for RecvLoan {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_may_read_one_may_write() {
        let region = Region::zeroed(16);
        let a = region.read(0..8).unwrap();
        let b = region.read(0..8).unwrap();
        let c = region.read(4..12).unwrap();
        assert_eq!(region.write(7..9).unwrap_err(), Overlap { start: 7, end: 9, bytes: 16 });
        drop((a, c));
        assert!(region.write(0..1).is_err(), "the second reader still holds it");
        drop(b);
        let mut w = region.write(0..16).unwrap();
        w[3] = 9;
        assert!(region.read(0..1).is_err());
        drop(w);
        assert_eq!(region.read(3..4).unwrap()[0], 9);
        assert!(region.ledger().is_empty());
    }

    #[test]
    fn a_slice_may_be_a_region_until_its_last_user_lets_go() {
        let memory = Region::zeroed(16);
        let part = Region::of_slice(memory.write(4..12).unwrap());
        part.write(1..2).unwrap()[0] = 9;
        let slice = part.read(0..8).unwrap();
        assert!(part.write(7..8).is_err() && memory.read(0..5).is_err() && memory.read(12..16).is_ok());
        assert!(Arc::ptr_eq(part.lasting(), &memory) && Arc::ptr_eq(memory.lasting(), &memory));
        drop(part);
        assert!(memory.read(5..6).is_err(), "a slice of it is out");
        drop(slice);
        assert_eq!(memory.read(4..7).unwrap()[..], [0, 9, 0]);
    }

    #[test]
    fn a_range_outside_is_refused() {
        let region = Region::zeroed(4);
        assert!(region.read(0..5).is_err());
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 3..2;
        assert!(region.read(reversed).is_err());
        assert!(region.write(4..4).unwrap().is_empty());
    }
}
