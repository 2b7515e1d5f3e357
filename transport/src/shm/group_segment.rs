//! Does: the segment that all ranks of a group on one host share: a letter and a slot of memory per rank, and steps that all
//! take together.
//!
//! Ranks move in lock step. A rank announces step s, then waits until all have. With the step goes its letter: the number of
//! the step, the caller's fingerprint and a few bytes of data, on one line of cache where they are few. Step s uses letter
//! s % 2: it is written before the step and read after it, and written anew two steps later, when all have taken the step
//! between, so have done reading. Slots are for more: round r uses slot set r % 2, a rank writes only its own slot of the set,
//! all take a step, and then all read. Before a set is written again two rounds later, all have taken the step of the round
//! between, so all have finished reading. This is what makes the slices below sound, as long as every rank follows it; the
//! ranks of a group trust each other with their data.

#![allow(unsafe_code)]

use super::patience::{Deadline, Patience};
use super::segment::{Segment, SegmentOffer};
use crate::{Rank, TransportError, WorldSize};
use rustix::event::Timespec;
use rustix::thread::futex;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a rank's slot in one set: with every slot of a round in the second-level cache, rounds run at its pace.
const SLOT_BYTES: usize = 256 << 10;
const LINE: usize = 64;
/// Words that all share: poison, sleepers, the bell; each on a line of its own.
const SHARED_BYTES: usize = 3 * LINE;
/// What stands before a letter's data: the step and the fingerprint.
const LETTER_HEAD: usize = 16;
/// Bytes of data in a letter: 8 KiB, and what else fits its first line.
const LETTER_BYTES: usize = (8 << 10) + LINE - LETTER_HEAD;
/// Most ranks of a segment: what callers tell each other of lengths fits a letter.
const MOST_RANKS: u32 = 512;
/// Yields between looks at the rest of the world.
const YIELDS: u32 = 16;
/// How long a waiter yields before it sleeps.
const YIELDING: Duration = Duration::from_millis(1);
/// Turns of spinning within which a store is seen by all: some 2 us.
const SETTLING: u32 = 100;
/// Longest sleep: within it, a lost peer is noticed.
const SLEEP: Duration = Duration::from_millis(1);

/// Why a step was not taken by all.
#[derive(Debug)]
pub enum WaitError<E> {
    /// The caller's own look at the world ended it.
    Idle(E),
    /// The deadline passed; these ranks have not taken the step.
    Timeout(Vec<Rank>),
    /// A rank has ended the group.
    Poisoned,
}

/// The group's shared memory, as one rank sees it.
pub struct GroupSegment {
    segment: Segment,
    rank: Rank,
    world_size: WorldSize,
    step: u64,
    round: u64,
    fingerprint: u64,
    patience: Patience,
}

/// The other ranks' letters of a step that all have taken.
pub struct Letters<'a>(&'a GroupSegment);

impl Letters<'_> {
    /// Bytes of `rank`'s letter.
    pub fn of(&self, rank: Rank, range: Range<usize>) -> &[u8] {
        let start = self.0.letter_data(rank, self.0.step, &range);
        // SAFETY: within the mapping; nobody writes it before this rank's next step (the head of this file says why).
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }
}

/// The other ranks' slots in a round, to be read.
pub struct Others<'a> {
    segment: &'a GroupSegment,
    set: usize,
    _life: PhantomData<&'a ()>,
}

impl Others<'_> {
    /// Bytes of `rank`'s slot.
    pub fn of(&self, rank: Rank, range: Range<usize>) -> &[u8] {
        let start = self.segment.slot(self.set, rank, &range);
        // SAFETY: within the mapping; nobody writes it in this round after the step (the head of this file says why).
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }
}

impl GroupSegment {
    /// Makes the segment of a group (rank 0).
    ///
    /// # Errors
    /// As [`Segment::create`]; `Io` for more than 512 ranks.
    pub fn create(world_size: WorldSize) -> Result<Self, TransportError> {
        if world_size.get() > MOST_RANKS {
            let error = std::io::Error::other(format!("it serves {MOST_RANKS} ranks"));
            return Err(TransportError::io("make the group's shared memory", error));
        }
        Ok(Self::new(Segment::create(Self::bytes(world_size))?, Rank(0), world_size))
    }

    /// Opens the segment of a group (the other ranks).
    ///
    /// # Errors
    /// As [`Segment::open`].
    pub fn open(offer: &SegmentOffer, rank: Rank, world_size: WorldSize) -> Result<Self, TransportError> {
        let segment = Segment::open(offer)?;
        if segment.offer().bytes < Self::bytes(world_size) as u64 {
            let error = std::io::Error::other("the segment is of another group");
            return Err(TransportError::io("open the group's shared memory", error));
        }
        Ok(Self::new(segment, rank, world_size))
    }

    fn new(segment: Segment, rank: Rank, world_size: WorldSize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let patience = Patience::new(world_size.get() as usize, cores);
        Self { segment, rank, world_size, step: 0, round: 0, fingerprint: 0, patience }
    }

    fn bytes(world_size: WorldSize) -> usize {
        let n = world_size.get() as usize;
        slots_offset(n) + 2 * n * SLOT_BYTES
    }

    /// What the other ranks need to open it.
    pub fn offer(&self) -> SegmentOffer {
        self.segment.offer()
    }

    /// Bytes of a slot.
    pub const fn slot_bytes(&self) -> usize {
        SLOT_BYTES
    }

    /// Bytes of a letter.
    pub const fn letter_bytes(&self) -> usize {
        LETTER_BYTES
    }

    /// Says with every step from now on that this rank is in the call of `fingerprint`.
    pub fn arrive(&mut self, fingerprint: u64) {
        self.fingerprint = fingerprint;
    }

    /// The call that `rank` said it is in when it took the last step.
    pub fn arrived(&self, rank: Rank) -> u64 {
        self.segment.word64(self.letter_at(rank, self.step) + 8).load(Ordering::Relaxed)
    }

    /// The first bytes of the letter that goes with this rank's next step.
    pub fn letter(&mut self, bytes: usize) -> &mut [u8] {
        let start = self.letter_data(self.rank, self.step + 1, &(0..bytes));
        // SAFETY: within the mapping; before the step nobody reads it (the head of this file says why).
        unsafe { std::slice::from_raw_parts_mut(start, bytes) }
    }

    /// The letters that went with the last step.
    pub fn letters(&self) -> Letters<'_> {
        Letters(self)
    }

    /// This rank's slot in the coming round, to be written before the step.
    pub fn mine(&mut self, range: Range<usize>) -> &mut [u8] {
        let start = self.slot(self.set(), self.rank, &range);
        // SAFETY: within the mapping; before the step of this round nobody reads it (the head of this file says why).
        unsafe { std::slice::from_raw_parts_mut(start, range.len()) }
    }

    /// The others' slots in this round, to be read after the step.
    pub fn others(&self) -> Others<'_> {
        Others { segment: self, set: self.set(), _life: PhantomData }
    }

    /// Bytes of this rank's slot that no other rank reads before the next step, and the others' slots.
    pub fn mine_and_others(&mut self, range: Range<usize>) -> (&mut [u8], Others<'_>) {
        let start = self.slot(self.set(), self.rank, &range);
        // SAFETY: within the mapping; the others read these bytes after the next step only. `Others` gives no way to them:
        // a rank never asks for its own slot.
        let mine = unsafe { std::slice::from_raw_parts_mut(start, range.len()) };
        (mine, self.others())
    }

    /// Ends the round: the next one uses the other set.
    pub fn next_round(&mut self) {
        self.round += 1;
    }

    /// Takes a step, does `own`, what needs no other rank, and waits until all have taken it. `idle` is called while that takes
    /// long, with the ranks that are missing.
    ///
    /// # Errors
    /// `Idle`, what `idle` gave; `Timeout` naming who is missing; `Poisoned` once a rank has called [`Self::poison`].
    pub fn step<E>(
        &mut self,
        deadline: &mut Deadline,
        idle: &mut dyn FnMut(&[Rank]) -> Result<(), E>,
        own: impl FnOnce(),
    ) -> Result<(), WaitError<E>> {
        self.step += 1;
        let at = self.letter_at(self.rank, self.step);
        self.segment.word64(at + 8).store(self.fingerprint, Ordering::Relaxed);
        self.segment.word64(at).store(self.step, Ordering::Release);
        self.wake_sleepers();
        own();
        if self.all_here() {
            return Ok(());
        }
        for _ in 0..self.patience.spins() {
            std::hint::spin_loop();
            if self.all_here() {
                self.patience.waited(0);
                return Ok(());
            }
        }
        let pauses = self.wait(deadline, idle)?;
        self.patience.waited(pauses);
        Ok(())
    }

    /// Without a barrier between the step and the look for sleepers, which would cost every step as much as a line's way to
    /// another core: see [`Self::sleep`].
    fn wake_sleepers(&self) {
        if self.sleepers().load(Ordering::Relaxed) > 0 {
            self.bell().fetch_add(1, Ordering::SeqCst);
            // Nobody asleep any more is as good.
            let _ = futex::wake(self.bell(), futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    /// Ends the group at the segment: every waiter, now and later, gets `Poisoned`.
    pub fn poison(&self) {
        self.poisoned().store(1, Ordering::SeqCst);
        self.bell().fetch_add(1, Ordering::SeqCst);
        // As above.
        let _ = futex::wake(self.bell(), futex::Flags::empty(), u32::MAX >> 1);
    }

    /// Yields for a while, then sleeps; returns when all are here, with how often it yielded.
    fn wait<E>(
        &self,
        deadline: &mut Deadline,
        idle: &mut dyn FnMut(&[Rank]) -> Result<(), E>,
    ) -> Result<u32, WaitError<E>> {
        let began = Instant::now();
        let deadline = deadline.seen(began);
        // By now the step is seen by all: who fell asleep meanwhile is seen here.
        self.wake_sleepers();
        // Of two ranks on a core, one stays.
        if self.patience.moves() && self.missing().first().is_some_and(|&first| first < self.rank) {
            super::core::leave();
        }
        let mut pauses = 0;
        loop {
            for _ in 0..YIELDS {
                if self.all_here() {
                    return Ok(pauses);
                }
                std::thread::yield_now();
                pauses += 1;
            }
            if self.poisoned().load(Ordering::SeqCst) != 0 {
                return Err(WaitError::Poisoned);
            }
            let missing = self.missing();
            idle(&missing).map_err(WaitError::Idle)?;
            let now = Instant::now();
            if now >= deadline && !missing.is_empty() {
                return Err(WaitError::Timeout(missing));
            }
            if now.saturating_duration_since(began) > YIELDING {
                self.sleep();
            }
        }
    }

    /// Sleeps until a rank takes a step or poisons the segment, or [`SLEEP`] is over.
    fn sleep(&self) {
        let rung = self.bell().load(Ordering::SeqCst);
        self.sleepers().fetch_add(1, Ordering::SeqCst);
        // Who took a step before it could see the sleeper is seen after this: no store is on its way for so long. Should one ever
        // be, the sleep takes as long as it may.
        (0..SETTLING).for_each(|_| std::hint::spin_loop());
        if !self.all_here() && self.poisoned().load(Ordering::SeqCst) == 0 {
            let nap = Timespec { tv_sec: 0, tv_nsec: i64::from(SLEEP.subsec_nanos()) };
            // Woken, timed out or too late: the caller looks again.
            let _ = futex::wait(self.bell(), futex::Flags::empty(), rung, Some(&nap));
        }
        self.sleepers().fetch_sub(1, Ordering::SeqCst);
    }

    fn all_here(&self) -> bool {
        self.world_size.ranks().all(|rank| self.is_here(rank))
    }

    fn missing(&self) -> Vec<Rank> {
        self.world_size.ranks().filter(|&rank| !self.is_here(rank)).collect()
    }

    fn is_here(&self, rank: Rank) -> bool {
        self.segment.word64(self.letter_at(rank, self.step)).load(Ordering::Acquire) >= self.step
    }

    fn set(&self) -> usize {
        (self.round % 2) as usize
    }

    fn poisoned(&self) -> &AtomicU32 {
        self.segment.word32(0)
    }

    fn sleepers(&self) -> &AtomicU32 {
        self.segment.word32(LINE)
    }

    fn bell(&self) -> &AtomicU32 {
        self.segment.word32(2 * LINE)
    }

    /// Where `rank`'s letter of `step` begins.
    fn letter_at(&self, rank: Rank, step: u64) -> usize {
        let place = (step % 2) as usize * self.world_size.get() as usize + rank.index();
        SHARED_BYTES + place * (LETTER_HEAD + LETTER_BYTES)
    }

    fn letter_data(&self, rank: Rank, step: u64, range: &Range<usize>) -> *mut u8 {
        let known = self.world_size.contains(rank);
        assert!(known && range.start <= range.end && range.end <= LETTER_BYTES, "a letter has {LETTER_BYTES} bytes");
        let offset = self.letter_at(rank, step) + LETTER_HEAD + range.start;
        self.segment.pointer(offset, range.len()).as_ptr()
    }

    fn slot(&self, set: usize, rank: Rank, range: &Range<usize>) -> *mut u8 {
        let n = self.world_size.get() as usize;
        assert!(
            rank.index() < n && range.start <= range.end && range.end <= SLOT_BYTES,
            "a slot has {SLOT_BYTES} bytes"
        );
        let offset = slots_offset(n) + (set * n + rank.index()) * SLOT_BYTES + range.start;
        self.segment.pointer(offset, range.len()).as_ptr()
    }
}

fn slots_offset(world_size: usize) -> usize {
    (super::segment::HEAD_BYTES + SHARED_BYTES + 2 * world_size * (LETTER_HEAD + LETTER_BYTES)).next_multiple_of(4096)
        - super::segment::HEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn together(n: u32, body: impl Fn(&mut GroupSegment) + Sync) {
        let size = WorldSize::new(n).unwrap();
        let first = GroupSegment::create(size).unwrap();
        let offer = first.offer();
        // Opened before anybody may leave, or the offer would lead nowhere.
        let open = |rank| GroupSegment::open(&offer, rank, size).unwrap();
        let all: Vec<_> = std::iter::once(first).chain(size.ranks().skip(1).map(open)).collect();
        std::thread::scope(|scope| {
            for mut segment in all {
                let body = &body;
                scope.spawn(move || body(&mut segment));
            }
        });
    }

    fn within(wait: Duration) -> Deadline {
        Deadline::At(Instant::now() + wait)
    }

    fn nothing(_: &[Rank]) -> Result<(), ()> {
        Ok(())
    }

    #[test]
    fn after_a_step_all_read_what_all_wrote() {
        for n in [1, 2, 3, 5] {
            together(n, |segment| {
                for round in 0..500u64 {
                    let me = u64::from(segment.rank.0);
                    segment.mine(8..16).copy_from_slice(&(round * 100 + me).to_le_bytes());
                    segment.step(&mut within(Duration::from_secs(20)), &mut nothing, || ()).unwrap();
                    for rank in segment.world_size.ranks().filter(|rank| *rank != segment.rank) {
                        let read = u64::from_le_bytes(segment.others().of(rank, 8..16).try_into().unwrap());
                        assert_eq!(read, round * 100 + u64::from(rank.0));
                    }
                    segment.next_round();
                }
            });
        }
    }

    #[test]
    fn letters_go_with_their_steps() {
        for n in [1, 2, 3, 5] {
            together(n, |segment| {
                for turn in 0..2000u64 {
                    let letter = |rank: Rank| [turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(rank.0); 9];
                    let bytes = |rank: Rank| letter(rank).map(u64::to_le_bytes).concat();
                    // Some fit the first line, others do not.
                    let len = if turn % 3 == 0 { 72 } else { 24 };
                    segment.arrive(turn + u64::from(segment.rank.0));
                    let own = bytes(segment.rank);
                    segment.letter(len).copy_from_slice(&own[..len]);
                    segment.step(&mut Deadline::In(Duration::from_secs(20)), &mut nothing, || ()).unwrap();
                    for rank in segment.world_size.ranks() {
                        assert_eq!(segment.letters().of(rank, 0..len), &bytes(rank)[..len]);
                        assert_eq!(segment.arrived(rank), turn + u64::from(rank.0));
                    }
                }
            });
        }
    }

    #[test]
    fn who_does_not_come_is_named_and_poison_frees_waiters() {
        let gate = std::sync::Barrier::new(3);
        together(3, |segment| {
            if segment.rank != Rank(1) {
                match segment.step(&mut within(Duration::from_millis(50)), &mut nothing, || ()) {
                    Err(WaitError::Timeout(missing)) => assert_eq!(missing, [Rank(1)]),
                    other => panic!("{other:?}"),
                }
            }
            gate.wait();
            if segment.rank == Rank(0) {
                segment.poison();
            } else {
                let waited = segment.step(&mut within(Duration::from_secs(20)), &mut nothing, || ());
                // Rank 1 takes its first step here, which all have taken: only its second can show the poison.
                let waited = if waited.is_ok() {
                    segment.step(&mut within(Duration::from_secs(20)), &mut nothing, || ())
                } else {
                    waited
                };
                assert!(matches!(waited, Err(WaitError::Poisoned)), "{waited:?}");
            }
        });
    }

    #[test]
    fn the_caller_can_end_a_wait() {
        together(2, |segment| {
            if segment.rank == Rank(0) {
                let ended = segment.step(
                    &mut within(Duration::from_secs(20)),
                    &mut |missing: &[Rank]| Err(missing.to_vec()),
                    || (),
                );
                assert!(matches!(ended, Err(WaitError::Idle(missing)) if missing == [Rank(1)]));
            }
        });
    }
}
