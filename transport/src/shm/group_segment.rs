//! Does: the segment that all ranks of a group on one host share: a slot of memory per rank, and steps that all take
//! together.
//!
//! Ranks move in lock step. A rank announces step s, then waits until all have. Round r uses slot set r % 2: a rank writes
//! only its own slot of the set, all take a step, and then all read. Before a set is written again two rounds later, all
//! have taken the step of the round between, so all have finished reading. This is what makes the slices below sound, as
//! long as every rank follows it; the ranks of a group trust each other with their data.

#![allow(unsafe_code)]

use super::segment::{Segment, SegmentOffer};
use crate::{Rank, TransportError, WorldSize};
use rustix::event::Timespec;
use rustix::thread::futex;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a rank's slot in one set: with every slot of a round in the second-level cache, rounds run at its pace.
const SLOT_BYTES: usize = 256 << 10;
const LINE: usize = 64;
/// Words that all share: poison, sleepers, the bell; each on a line of its own.
const SHARED_BYTES: usize = 3 * LINE;
/// Per rank: its step, then two pairs of (sequence + 1, fingerprint), each on a line of its own.
const RANK_BYTES: usize = 3 * LINE;
/// Yields between looks at the rest of the world.
const YIELDS: u32 = 16;
/// How long a waiter yields before it sleeps.
const YIELDING: Duration = Duration::from_millis(1);
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
    spins: u32,
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
    /// As [`Segment::create`].
    pub fn create(world_size: WorldSize) -> Result<Self, TransportError> {
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
        // With a core each, spin some 30 us; where ranks outnumber cores, spinning keeps the others from their work.
        let spins = if world_size.get() as usize <= cores { 2000 } else { 20 };
        Self { segment, rank, world_size, step: 0, round: 0, spins }
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

    /// Publishes that this rank begins collective number `sequence`. The next step tells it to all.
    pub fn arrive(&mut self, sequence: u64, fingerprint: u64) {
        let at = self.arrival(self.rank, sequence);
        self.segment.word64(at + 8).store(fingerprint, Ordering::Relaxed);
        self.segment.word64(at).store(sequence + 1, Ordering::Release);
    }

    /// What `rank` has published for collective number `sequence`; `None` where it has not begun it. True after a step.
    pub fn arrived(&self, rank: Rank, sequence: u64) -> Option<u64> {
        let at = self.arrival(rank, sequence);
        let begun = self.segment.word64(at).load(Ordering::Acquire);
        (begun == sequence + 1).then(|| self.segment.word64(at + 8).load(Ordering::Relaxed))
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

    /// Takes a step and waits until all have. `idle` is called while it takes long, with the ranks that are missing.
    ///
    /// # Errors
    /// `Idle`, what `idle` gave; `Timeout` naming who is missing; `Poisoned` once a rank has called [`Self::poison`].
    pub fn step<E>(
        &mut self,
        deadline: Instant,
        idle: &mut dyn FnMut(&[Rank]) -> Result<(), E>,
    ) -> Result<(), WaitError<E>> {
        self.step += 1;
        self.step_word(self.rank).store(self.step, Ordering::SeqCst);
        if self.sleepers().load(Ordering::SeqCst) > 0 {
            self.bell().fetch_add(1, Ordering::SeqCst);
            // Nobody asleep any more is as good.
            let _ = futex::wake(self.bell(), futex::Flags::empty(), u32::MAX >> 1);
        }
        let mut spun = 0;
        while !self.all_here() {
            if spun < self.spins {
                spun += 1;
                std::hint::spin_loop();
            } else {
                self.wait(deadline, idle)?;
            }
        }
        Ok(())
    }

    /// Ends the group at the segment: every waiter, now and later, gets `Poisoned`.
    pub fn poison(&self) {
        self.poisoned().store(1, Ordering::SeqCst);
        self.bell().fetch_add(1, Ordering::SeqCst);
        // As above.
        let _ = futex::wake(self.bell(), futex::Flags::empty(), u32::MAX >> 1);
    }

    /// Yields for a while, then sleeps; returns when something may have changed.
    fn wait<E>(&self, deadline: Instant, idle: &mut dyn FnMut(&[Rank]) -> Result<(), E>) -> Result<(), WaitError<E>> {
        let began = Instant::now();
        loop {
            for _ in 0..YIELDS {
                if self.all_here() {
                    return Ok(());
                }
                std::thread::yield_now();
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

    fn sleep(&self) {
        let rung = self.bell().load(Ordering::SeqCst);
        self.sleepers().fetch_add(1, Ordering::SeqCst);
        if !self.all_here() && self.poisoned().load(Ordering::SeqCst) == 0 {
            let nap = Timespec { tv_sec: 0, tv_nsec: i64::from(SLEEP.subsec_nanos()) };
            // Woken, timed out or too late: the caller looks again.
            let _ = futex::wait(self.bell(), futex::Flags::empty(), rung, Some(&nap));
        }
        self.sleepers().fetch_sub(1, Ordering::SeqCst);
    }

    fn all_here(&self) -> bool {
        self.world_size.ranks().all(|rank| self.step_word(rank).load(Ordering::Acquire) >= self.step)
    }

    fn missing(&self) -> Vec<Rank> {
        self.world_size.ranks().filter(|&rank| self.step_word(rank).load(Ordering::Acquire) < self.step).collect()
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

    fn step_word(&self, rank: Rank) -> &AtomicU64 {
        self.segment.word64(SHARED_BYTES + rank.index() * RANK_BYTES)
    }

    fn arrival(&self, rank: Rank, sequence: u64) -> usize {
        SHARED_BYTES + rank.index() * RANK_BYTES + LINE * (1 + (sequence % 2) as usize)
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
    (super::segment::HEAD_BYTES + SHARED_BYTES + world_size * RANK_BYTES).next_multiple_of(4096)
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
                    segment.step(Instant::now() + Duration::from_secs(20), &mut nothing).unwrap();
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
    fn who_does_not_come_is_named_and_poison_frees_waiters() {
        let gate = std::sync::Barrier::new(3);
        together(3, |segment| {
            if segment.rank != Rank(1) {
                match segment.step(Instant::now() + Duration::from_millis(50), &mut nothing) {
                    Err(WaitError::Timeout(missing)) => assert_eq!(missing, [Rank(1)]),
                    other => panic!("{other:?}"),
                }
            }
            gate.wait();
            if segment.rank == Rank(0) {
                segment.poison();
            } else {
                let waited = segment.step(Instant::now() + Duration::from_secs(20), &mut nothing);
                // Rank 1 takes its first step here, which all have taken: only its second can show the poison.
                let waited = if waited.is_ok() {
                    segment.step(Instant::now() + Duration::from_secs(20), &mut nothing)
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
                let ended = segment
                    .step(Instant::now() + Duration::from_secs(20), &mut |missing: &[Rank]| Err(missing.to_vec()));
                assert!(matches!(ended, Err(WaitError::Idle(missing)) if missing == [Rank(1)]));
            }
        });
    }
}
