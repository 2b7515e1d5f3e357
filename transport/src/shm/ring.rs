//! Does: the memory that two processes share as a pair: a ring of records and a set of slots in each direction.
//!
//! A record is one cache line or more: its first word says what it is and is stored last, so that the reader, which looks at
//! that word, gets it and a small payload in one transfer of the line. The writer clears the word behind a record before it
//! publishes the record. Slots hold what is too large for the ring, or was lent: the writer fills a free one and names it in a
//! record; the reader gives it back by setting its bit, in any order and from any thread.
//!
//! Everything read here was written by another process: lengths, kinds and slots are checked before use. Payload bytes are
//! only ever handed on. A peer that breaks the rules can garble its own messages, no more.

#![allow(unsafe_code)]

use super::past_cache::copy_streaming;
use super::segment::{Segment, SegmentOffer};
use super::storing::Storing;
use crate::region::{Loan, LoanHome};
use crate::{RecvLoan, SendLoan, TransportError};
use rustix::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// Slots per direction; a message up to [`SLOT_BYTES`] fits one. Pages are taken as they are touched, lowest slot first.
pub(super) const SLOTS: u32 = 16;
/// Bytes of a slot: two of them, one being filled and one being read, fit a second-level cache.
pub(super) const SLOT_BYTES: usize = 256 << 10;
/// Longest payload that goes in the ring itself.
pub(super) const INLINE_BYTES: usize = 4 << 10;
/// Longest reason told to a peer.
pub(super) const TEXT_BYTES: usize = 1024;
/// Less is always stored in the cache: its lines are on their way to the reader one after the other anyway.
const LEAST_PAST: usize = 16 << 10;
/// Slots kept for messages that are copied, so that lent ones cannot hold those up.
const RESERVED: u32 = 4;
const RING_BYTES: usize = 256 << 10;
const LINE: usize = 64;
const HEADER_BYTES: usize = 48;
/// Two lines, since processors fetch lines in pairs.
const APART: usize = 2 * LINE;
/// What a side tells the other: its sleep and end; where it reads; what it took; which slots it gave back; its last words.
const SIDE_BYTES: usize = 4 * APART + TEXT_BYTES;
const ONE_WAY_BYTES: usize = RING_BYTES + SLOTS as usize * SLOT_BYTES;
const PAIR_BYTES: usize = APART + 2 * (SIDE_BYTES + ONE_WAY_BYTES);
/// Version and layout of the memory, so that another build is refused and not misread.
const GEOMETRY: u64 = 1 << 56 | (RING_BYTES as u64) << 24 | (SLOT_BYTES as u64 >> 10) << 8 | SLOTS as u64;

/// Why a side will write no more.
pub(super) const GOODBYE: u32 = 1;
pub(super) const ABORTED: u32 = 2;
pub(super) const CLOSED: u32 = 3;

/// What a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A message, whole, in the ring.
    Eager,
    /// A message, whole, in a slot.
    EagerSlot,
    /// A message is offered.
    Announce,
    /// An offered message is wanted.
    Grant,
    /// An offered message does not fit.
    Refuse,
    /// Part of a wanted message, in a slot (or of no bytes, and in none).
    Piece,
}

const KINDS: [Kind; 6] = [Kind::Eager, Kind::EagerSlot, Kind::Announce, Kind::Grant, Kind::Refuse, Kind::Piece];
/// The rest of the ring is empty: go on at its beginning.
const SKIP: u64 = 0xff;

/// A record without its payload. Which fields mean what depends on the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: Kind,
    pub(super) tag: u64,
    /// The note; the offset of a piece.
    pub(super) note: u64,
    /// Length of the message, of the piece, or of the receive that was too small.
    pub(super) bytes: u64,
    /// The sender's name of a message in an announcement and its answers, the receiver's in pieces.
    pub(super) id: u64,
    /// A slot; the receiver's name of a message in a grant.
    pub(super) slot: u64,
}

impl Record {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, tag: 0, note: 0, bytes: 0, id: 0, slot: 0 }
    }
}

/// The memory of a pair, as one side sees it.
pub(super) struct PairMemory {
    segment: Segment,
    me: usize,
    /// The other side's bell.
    bell: OwnedFd,
    /// Slots lent to our caller and given back unused.
    unused: AtomicU64,
    /// The other side's slots that our caller holds.
    held: AtomicU32,
}

/// Makes the memory of a pair.
pub(super) fn create() -> Result<Segment, TransportError> {
    let segment = Segment::create(PAIR_BYTES)?;
    segment.word64(0).store(GEOMETRY, Ordering::Release);
    Ok(segment)
}

/// Opens the memory of a pair that another process made.
pub(super) fn open(offer: &SegmentOffer) -> Result<Segment, TransportError> {
    let segment = Segment::open(offer)?;
    let whole = offer.bytes == (PAIR_BYTES + super::segment::HEAD_BYTES) as u64;
    if !whole || segment.word64(0).load(Ordering::Acquire) != GEOMETRY {
        let reason = "it is laid out by another version of gradwire".to_owned();
        return Err(TransportError::BadFrame { peer: format!("process {}", offer.pid), reason });
    }
    Ok(segment)
}

/// Where `side` tells the other what: 0 whether it sleeps, 4 its end, 8 its process, 12 its bell (one more than the
/// descriptor), then on pairs of lines of their own the words below.
fn side(side: usize) -> usize {
    APART + side * SIDE_BYTES
}
const HEAD: usize = APART;
const TAKEN: usize = 2 * APART;
const RETURNED: usize = 3 * APART;
const TEXT: usize = 4 * APART;

/// Leaves word of a side's process and bell.
pub(super) fn introduce(segment: &Segment, me: usize, bell: u32) {
    segment.word32(side(me) + 8).store(std::process::id(), Ordering::Relaxed);
    segment.word32(side(me) + 12).store(bell + 1, Ordering::Release);
}

/// The process and bell of a side, once it has come.
pub(super) fn introduced(segment: &Segment, other: usize) -> Option<(u32, u32)> {
    let bell = segment.word32(side(other) + 12).load(Ordering::Acquire).checked_sub(1)?;
    Some((segment.word32(side(other) + 8).load(Ordering::Relaxed), bell))
}

impl PairMemory {
    pub(super) fn new(segment: Segment, me: usize, bell: OwnedFd) -> Self {
        Self { segment, me, bell, unused: AtomicU64::new(0), held: AtomicU32::new(0) }
    }

    /// Tells the other side whether we sleep.
    pub(super) fn set_asleep(&self, asleep: bool) {
        // Sequentially consistent, as is every store that a sleeper waits for and the look at this word after it: either the
        // sleeper sees the store, or the other side sees the sleeper.
        self.segment.word32(side(self.me)).store(u32::from(asleep), Ordering::SeqCst);
    }

    /// Wakes the other side if it sleeps.
    pub(super) fn ring_bell(&self) {
        let asleep = self.segment.word32(side(1 - self.me));
        if asleep.load(Ordering::SeqCst) != 0 && asleep.swap(0, Ordering::SeqCst) != 0 {
            // A pipe that is full wakes as well.
            let _ = rustix::io::write(&self.bell, &[1]);
        }
    }

    /// Says that we write no more, and why.
    pub(super) fn leave(&self, how: u32, text: &str) {
        let gone = self.segment.word32(side(self.me) + 4);
        if gone.load(Ordering::Relaxed) != 0 {
            return;
        }
        let end = (0..=text.len().min(TEXT_BYTES - 8)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        self.segment.word64(side(self.me) + TEXT).store(end as u64, Ordering::Relaxed);
        self.copy_in(side(self.me) + TEXT + 8, &text.as_bytes()[..end]);
        gone.store(how, Ordering::SeqCst);
        self.ring_bell();
    }

    /// Whether the other side writes no more, and why.
    pub(super) fn gone(&self) -> u32 {
        self.segment.word32(side(1 - self.me) + 4).load(Ordering::SeqCst)
    }

    /// Its last words.
    pub(super) fn text(&self) -> String {
        let at = side(1 - self.me) + TEXT;
        let bytes = self.segment.word64(at).load(Ordering::Relaxed).min(TEXT_BYTES as u64 - 8) as usize;
        String::from_utf8_lossy(self.bytes(at + 8, bytes)).into_owned()
    }

    /// Tells how much of the sender's window has been taken since the start.
    pub(super) fn set_taken(&self, taken: u64) {
        self.segment.word64(side(self.me) + TAKEN).store(taken, Ordering::Release);
    }

    /// How much of our window the other side has taken.
    pub(super) fn taken(&self) -> u64 {
        self.segment.word64(side(1 - self.me) + TAKEN).load(Ordering::Acquire)
    }

    /// Slots of the other side that our caller holds.
    pub(super) fn held(&self) -> u32 {
        self.held.load(Ordering::Relaxed)
    }

    /// Our own slot that `bytes` lie at the beginning of, if they do.
    pub(super) fn slot_of(&self, bytes: &[u8]) -> Option<u32> {
        let first = self.segment.pointer(slot_at(self.me, 0), SLOTS as usize * SLOT_BYTES).as_ptr() as usize;
        let offset = (bytes.as_ptr() as usize).checked_sub(first)?;
        (offset < SLOTS as usize * SLOT_BYTES).then_some((offset / SLOT_BYTES) as u32)
    }

    /// Lends one of our slots, which must be ours to write, to be filled in place.
    pub(super) fn lend(self: &Arc<Self>, slot: u32, bytes: usize) -> SendLoan {
        assert!(bytes <= SLOT_BYTES, "what is lent fits its slot");
        let home: Arc<dyn LoanHome> = Arc::new(Unused(Arc::clone(self)));
        let start = self.segment.pointer(slot_at(self.me, slot), bytes);
        // SAFETY: the mapping lives as long as `home` holds `self`. The slot was free, so the peer does not read it, and
        // until it comes home, or its record is written, it is not given to anybody else.
        SendLoan(unsafe { Loan::new(start, bytes, u64::from(slot), home) })
    }

    /// The first `bytes` bytes of a slot of the other side, to be read in place and then given back. Both were checked.
    pub(super) fn read_slot(self: &Arc<Self>, slot: u32, bytes: usize) -> RecvLoan {
        self.held.fetch_add(1, Ordering::Relaxed);
        let home: Arc<dyn LoanHome> = Arc::new(Returned(Arc::clone(self)));
        let start = self.segment.pointer(slot_at(1 - self.me, slot), bytes);
        // SAFETY: the mapping lives as long as `home` holds `self`. The sender does not write the slot until it is given
        // back; a process that breaks this rule changes bytes of its own message, which nothing here depends on.
        RecvLoan(unsafe { Loan::new(start, bytes, u64::from(slot), home) })
    }

    fn bytes(&self, offset: usize, bytes: usize) -> &[u8] {
        let start: NonNull<u8> = self.segment.pointer(offset, bytes);
        // SAFETY: within the mapping, which lives as long as `self`. It was published before it was found; the writer does not
        // write it again before it is consumed, and if it broke this rule, only bytes of its own message would change.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }
    }

    /// As [`Self::copy_in`], past the cache.
    fn stream_in(&self, offset: usize, bytes: &[u8]) {
        let into = self.segment.pointer(offset, bytes.len());
        // SAFETY: as in `copy_in`.
        copy_streaming(unsafe { std::slice::from_raw_parts_mut(into.as_ptr(), bytes.len()) }, bytes);
    }

    fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let into = self.segment.pointer(offset, bytes.len());
        // SAFETY: within the mapping; `bytes` is borrowed from elsewhere, since nobody holds a slice of memory that is ours to
        // write.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into.as_ptr(), bytes.len()) };
    }
}

fn ring_at(side: usize) -> usize {
    APART + 2 * SIDE_BYTES + side * ONE_WAY_BYTES
}

fn slot_at(side: usize, slot: u32) -> usize {
    ring_at(side) + RING_BYTES + slot as usize * SLOT_BYTES
}

/// Takes back slots that were lent and not posted.
struct Unused(Arc<PairMemory>);

impl LoanHome for Unused {
    fn give_back(&self, slot: u64) {
        self.0.unused.fetch_or(1 << slot, Ordering::AcqRel);
    }
}

/// Gives slots back to the other side.
struct Returned(Arc<PairMemory>);

impl LoanHome for Returned {
    fn give_back(&self, slot: u64) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
        // Whatever was read of it was read before this: the sender acquires the bit before it writes again.
        self.0.segment.word64(side(self.0.me) + RETURNED).fetch_or(1 << slot, Ordering::SeqCst);
        self.0.ring_bell();
    }
}

/// Our end of the way out: the ring that we write and our slots.
pub(super) struct Outlet {
    pub(super) memory: Arc<PairMemory>,
    tail: u64,
    head: u64,
    free: u64,
    away: u64,
    storing: Storing,
}

impl Outlet {
    pub(super) fn new(memory: Arc<PairMemory>) -> Self {
        Self { memory, tail: 0, head: 0, free: (1 << SLOTS) - 1, away: 0, storing: Storing::giving() }
    }

    /// Writes a record with its payload, where the ring has room.
    ///
    /// # Errors
    /// What the other side did wrong.
    pub(super) fn write(&mut self, record: &Record, payload: &[u8]) -> Result<bool, &'static str> {
        let needed = size(payload.len());
        let at = (self.tail % RING_BYTES as u64) as usize;
        let skipped = if at + needed > RING_BYTES { RING_BYTES - at } else { 0 };
        // One line more: the word behind the record is cleared too.
        if !self.has_room(skipped + needed + LINE)? {
            return Ok(false);
        }
        if skipped > 0 {
            let beginning = self.word(self.tail + skipped as u64, 0);
            beginning.store(0, Ordering::Relaxed);
            self.word(self.tail, 0).store(SKIP, Ordering::SeqCst);
            self.tail += skipped as u64;
        }
        let (tail, next) = (self.tail, self.tail + needed as u64);
        self.word(next, 0).store(0, Ordering::Relaxed);
        for (place, word) in
            [(8, record.tag), (16, record.note), (24, record.bytes), (32, record.id), (40, record.slot)]
        {
            self.word(tail, place).store(word, Ordering::Relaxed);
        }
        let at = ring_at(self.memory.me) + (tail % RING_BYTES as u64) as usize;
        self.memory.copy_in(at + HEADER_BYTES, payload);
        let kind = KINDS.iter().position(|kind| *kind == record.kind).expect("every kind is in the table") as u64 + 1;
        self.word(tail, 0).store(kind | (payload.len() as u64) << 8, Ordering::SeqCst);
        self.tail = next;
        Ok(true)
    }

    /// A slot of ours to write; `lent`: for a caller to keep.
    ///
    /// # Errors
    /// What the other side did wrong.
    pub(super) fn take_slot(&mut self, lent: bool) -> Result<Option<u32>, &'static str> {
        let back = self.memory.segment.word64(side(1 - self.memory.me) + RETURNED);
        if back.load(Ordering::Relaxed) != 0 {
            let back = back.swap(0, Ordering::AcqRel);
            if back & !self.away != 0 {
                return Err("a slot was given back that it did not have");
            }
            self.away &= !back;
            self.free |= back;
        }
        if self.memory.unused.load(Ordering::Relaxed) != 0 {
            self.free |= self.memory.unused.swap(0, Ordering::AcqRel);
        }
        if self.free == 0 || lent && self.free.count_ones() <= RESERVED {
            return Ok(None);
        }
        // The lowest, which is the likeliest to be in cache.
        let slot = self.free.trailing_zeros();
        self.free &= self.free - 1;
        Ok(Some(slot))
    }

    /// Copies a message into one of our slots, which must be ours to write.
    pub(super) fn fill(&mut self, slot: u32, bytes: &[u8]) {
        assert!(bytes.len() <= SLOT_BYTES, "what is copied fits its slot");
        let at = slot_at(self.memory.me, slot);
        if bytes.len() < LEAST_PAST {
            return self.memory.copy_in(at, bytes);
        }
        let way = self.storing.next(bytes.len());
        let began = way.timed.then(Instant::now);
        if way.past {
            self.memory.stream_in(at, bytes)
        } else {
            self.memory.copy_in(at, bytes)
        }
        if let Some(began) = began {
            self.storing.took(bytes.len(), way.past, began.elapsed());
        }
    }

    /// A slot that was taken has gone out in a record.
    pub(super) fn slot_sent(&mut self, slot: u32) {
        self.away |= 1 << slot;
    }

    /// A slot that was taken is not needed.
    pub(super) fn slot_unused(&mut self, slot: u32) {
        self.free |= 1 << slot;
    }

    /// Whether room or slots have come back since we last looked.
    pub(super) fn has_news(&mut self) -> bool {
        let other = side(1 - self.memory.me);
        let head = self.memory.segment.word64(other + HEAD).load(Ordering::SeqCst);
        // An impossible one is found when it is needed.
        let moved = head > self.head && head <= self.tail;
        if moved {
            self.head = head;
        }
        moved || self.memory.segment.word64(other + RETURNED).load(Ordering::SeqCst) != 0
    }

    fn has_room(&mut self, bytes: usize) -> Result<bool, &'static str> {
        let full = |head: u64, tail: u64| tail + bytes as u64 - head > RING_BYTES as u64;
        if full(self.head, self.tail) {
            let head = self.memory.segment.word64(side(1 - self.memory.me) + HEAD).load(Ordering::Acquire);
            if head < self.head || head > self.tail {
                return Err("it has read what was not written");
            }
            self.head = head;
        }
        Ok(!full(self.head, self.tail))
    }

    fn word(&self, position: u64, place: usize) -> &AtomicU64 {
        let at = (position % RING_BYTES as u64) as usize;
        self.memory.segment.word64(ring_at(self.memory.me) + at + place)
    }
}

/// Our end of the way in: the ring that we read.
pub(super) struct Inlet {
    pub(super) memory: Arc<PairMemory>,
    position: u64,
    told: u64,
}

impl Inlet {
    pub(super) fn new(memory: Arc<PairMemory>) -> Self {
        Self { memory, position: 0, told: 0 }
    }

    /// Whether a record is there.
    pub(super) fn has_record(&self) -> bool {
        self.word(0).load(Ordering::SeqCst) != 0
    }

    /// The next record, with the length of its payload; it stays until [`Inlet::consume`].
    ///
    /// # Errors
    /// What the other side did wrong.
    pub(super) fn next(&mut self) -> Result<Option<(Record, usize)>, &'static str> {
        let mut word = self.word(0).load(Ordering::Acquire);
        if word == SKIP {
            self.position += RING_BYTES as u64 - self.position % RING_BYTES as u64;
            word = self.word(0).load(Ordering::Acquire);
        }
        if word == 0 {
            return Ok(None);
        }
        let kind = (word & 0xff).checked_sub(1).and_then(|kind| KINDS.get(kind as usize));
        let kind = *kind.ok_or("a record of no known kind")?;
        let length = usize::try_from(word >> 8).map_err(|_| "a record of impossible length")?;
        if length > INLINE_BYTES || self.at() + size(length) > RING_BYTES {
            return Err("a record longer than records are");
        }
        let field = |place| self.word(place).load(Ordering::Relaxed);
        let record = Record { kind, tag: field(8), note: field(16), bytes: field(24), id: field(32), slot: field(40) };
        Ok(Some((record, length)))
    }

    /// The payload of the record found by [`Inlet::next`].
    pub(super) fn payload(&self, length: usize) -> &[u8] {
        self.memory.bytes(ring_at(1 - self.memory.me) + self.at() + HEADER_BYTES, length)
    }

    /// Goes on to the record behind one with a payload of `length` bytes.
    pub(super) fn consume(&mut self, length: usize) {
        self.position += size(length) as u64;
        // Seldom, so that the writer's line is not fetched for each record.
        if self.position - self.told >= RING_BYTES as u64 / 8 {
            self.told = self.position;
            self.memory.segment.word64(side(self.memory.me) + HEAD).store(self.told, Ordering::SeqCst);
            self.memory.ring_bell();
        }
    }

    fn at(&self) -> usize {
        (self.position % RING_BYTES as u64) as usize
    }

    fn word(&self, place: usize) -> &AtomicU64 {
        self.memory.segment.word64(ring_at(1 - self.memory.me) + self.at() + place)
    }
}

/// Ring bytes of a record with a payload of `length` bytes.
fn size(length: usize) -> usize {
    (HEADER_BYTES + length).next_multiple_of(LINE)
}
