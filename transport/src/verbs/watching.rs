//! Does: small frames by way of memory: writes them into the peer's ring, takes them out of ours, and tells the peer whether we
//! watch. [`super::watch`] has the rules, and why nothing is lost.

#![allow(unsafe_code)]

use super::adapter::{Remote, Span, Work};
use super::lane::Carried;
use super::link::{Broken, Link, Phase};
use super::nic::Nic;
use super::registered_pool::Lent;
use super::watch::{self, MOST_BYTES, MOST_WORDS, PLACE_BYTES, SEAL_BYTES, Watcher};
use crate::{Completion, RegisterError};
use std::mem::MaybeUninit;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

/// Behind the places: the peer's word, and the one that we tell it.
const WORDS: usize = 16;

/// What two ends need to reach each other's memory so.
pub(super) struct Ring {
    memory: Lent,
    /// A power of two, as the peer's.
    places: usize,
    local: u32,
    remote: u32,
    /// The peer's ring, with its number of places.
    there: Option<(Remote, u64)>,
    /// One more than the number of the last message that went into it.
    written: u64,
    pub(super) watcher: Watcher,
}

impl Ring {
    /// A ring of so many places, a power of two.
    ///
    /// # Errors
    /// The device's, when it cannot be registered.
    pub(super) fn new(places: usize, nic: &mut Nic) -> Result<Self, RegisterError> {
        let (memory, lease) = nic.slots(places * PLACE_BYTES + WORDS)?;
        let (local, remote) = (lease.local, lease.remote);
        let ring = Self { memory, places, local, remote, there: None, written: 0, watcher: Watcher::default() };
        ring.wipe();
        Ok(ring)
    }

    /// Where the peer writes.
    pub(super) fn offer(&self) -> Remote {
        Remote { address: self.memory.address as u64, key: self.remote }
    }

    /// The peer's ring is there, with one place for each receive.
    pub(super) fn join(&mut self, remote: Remote, places: u64) {
        self.there = (remote.key != 0 && places.is_power_of_two()).then_some((remote, places));
    }

    /// The peer is woken by something else, behind all that was written.
    pub(super) fn woken(&mut self) {
        self.written = 0;
    }

    /// Forgets what was written, either way. No queue pair may be there that reaches the memory.
    pub(super) fn reset(&mut self) {
        (self.there, self.written, self.watcher) = (None, 0, Watcher::default());
        self.wipe();
    }

    fn wipe(&self) {
        // SAFETY: the memory holds so many bytes, is ours for as long as `self`, and no device writes it now.
        unsafe { std::ptr::write_bytes(self.memory.address as *mut u8, 0, self.places * PLACE_BYTES + WORDS) }
    }

    /// The word at `at`, which the peer may be writing.
    fn load(&self, at: usize) -> u64 {
        // SAFETY: it lies within our memory, aligned, which lives as long as `self`; the device is why the read is volatile.
        u64::from_le(unsafe { ((self.memory.address + at) as *const u64).read_volatile() })
    }

    /// What the peer has told.
    fn word(&self) -> u64 {
        self.load(self.places * PLACE_BYTES)
    }

    /// Where the last word of frame `number` lies.
    #[inline]
    fn end(&self, number: u64) -> usize {
        ((number as usize & (self.places - 1)) + 1) * PLACE_BYTES - SEAL_BYTES
    }

    /// Copies frame `number` into `frame`, if it is there whole; how many words it has.
    fn take(&self, number: u64, frame: &mut [MaybeUninit<u64>; MOST_WORDS]) -> Option<usize> {
        let end = self.end(number);
        let last = self.load(end);
        let words = watch::words_of(last, number)?;
        fence(Ordering::Acquire);
        let start = end - words * 8;
        let copied = frame[..words].iter_mut().enumerate().map(|(at, place)| {
            let word = self.load(start + at * 8);
            place.write(word.to_le());
            word
        });
        (watch::seal(copied, words, number) == last).then_some(words)
    }
}

impl Link {
    /// Where a frame of `bytes` goes in the peer's ring, if it watches.
    #[inline(always)]
    pub(super) fn place_there(&self, bytes: usize) -> Option<Remote> {
        let (remote, places) = self.ring.there?;
        let small = bytes <= MOST_BYTES && matches!(self.phase, Phase::Up);
        if !small || !watch::watches(self.ring.word()) {
            return None;
        }
        let end = ((self.lanes[0].next_message() & (places - 1)) + 1) * PLACE_BYTES as u64;
        Some(Remote { address: remote.address.wrapping_add(end - (bytes + SEAL_BYTES) as u64), key: remote.key })
    }

    /// Writes the seal of the next message behind frame `at`.
    #[inline(always)]
    pub(super) fn seal(&mut self, at: u64, bytes: usize) {
        let number = self.lanes[0].next_message();
        let frame = self.slot_bytes(at, bytes).as_chunks::<8>().0;
        let seal = watch::seal(frame.iter().map(|word| u64::from_le_bytes(*word)), frame.len(), number);
        let end = (self.send_slot(at) + bytes) as *mut u64;
        // SAFETY: the slot is far longer than what is watched for, its frames are whole words long, and no work request names
        // what is behind this one.
        unsafe { end.write(seal.to_le()) };
        self.ring.written = number + 1;
    }

    /// Whether the peer is to be woken.
    pub(super) fn owes_nudge(&self) -> bool {
        self.ring.written > 0 && watch::may_lack(self.ring.word(), self.ring.written)
    }

    /// Wakes a peer that has ceased to watch and may lack what was written to its ring.
    #[inline(always)]
    pub(super) fn nudge(&mut self, nic: &mut Nic) {
        if self.owes_nudge() {
            self.send_empty(nic);
        }
    }

    /// Whether something may have come into our ring.
    #[inline]
    pub(super) fn has_come(&self) -> bool {
        let number = self.lanes[0].received;
        watch::words_of(self.ring.load(self.ring.end(number)), number).is_some()
    }

    /// Takes what has come into our ring; whether anything had.
    ///
    /// # Errors
    /// What the peer did wrong.
    pub(super) fn look(&mut self, nic: &mut Nic, done: &mut Vec<Completion>) -> Result<bool, Broken> {
        let mut copied = [MaybeUninit::uninit(); MOST_WORDS];
        let mut any = false;
        while let Some(words) = self.ring.take(self.lanes[0].received, &mut copied) {
            any = true;
            self.lanes[0].received += 1;
            // SAFETY: words are bytes, and so many were written.
            let frame = unsafe { std::slice::from_raw_parts(copied.as_ptr().cast::<u8>(), words * 8) };
            self.take_frame(frame, nic, done)?;
        }
        self.active |= any;
        Ok(any)
    }

    /// A small frame has come by a completion: a few of them in a row, and we watch.
    pub(super) fn came_small(&mut self, bytes: usize, nic: &mut Nic) {
        if bytes <= MOST_BYTES && self.ring.watcher.came() && self.tell(true, nic) {
            self.ring.watcher.watch();
        }
    }

    /// Before a sleep; whether it must wait, since the peer is only now told of it, or cannot be.
    pub(super) fn cease_to_watch(&mut self, now: Instant, nic: &mut Nic) -> bool {
        self.ring.watcher.sleeps(now);
        let told = self.ring.watcher.is_watching() && self.tell(false, nic);
        if told {
            self.ring.watcher.leave(now);
        }
        // Who has taken leave writes nothing more, and may not be there to be told.
        let listens = matches!(self.phase, Phase::Up) && self.lost.is_none() && !self.heard_goodbye;
        told || (self.ring.watcher.is_watching() && listens)
    }

    /// Tells the peer whether we watch; whether there was room for it. That we do not is told with a completion, which wakes us
    /// once it is known there.
    fn tell(&mut self, watches: bool, nic: &mut Nic) -> bool {
        let Some((remote, places)) = self.ring.there else { return false };
        let gone = !matches!(self.phase, Phase::Up) || self.fault.is_some() || self.heard_goodbye;
        if gone || !self.has_room() {
            return false;
        }
        let ours = self.ring.memory.address + self.ring.places * PLACE_BYTES + 8;
        let word = watch::word(watches, self.lanes[0].received);
        // SAFETY: it lies within our memory, aligned. A write under way that reads it meanwhile tells the newer word.
        unsafe { (ours as *mut u64).write_volatile(word.to_le()) };
        // Behind a goodbye nothing else would tell that it has ended.
        let (number, signalled) = self.lanes[0].post(Carried::Word, !watches || self.said_goodbye);
        let span = Span { address: ours as u64, bytes: 8, key: self.ring.local };
        let there = Remote { address: remote.address.wrapping_add(places * PLACE_BYTES as u64), key: remote.key };
        self.post_work(0, number, span, Work::Write(there, None), signalled, nic);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::Fabric;
    use super::super::wire::VerbsWire;
    use crate::beside::Beside;
    use crate::{Completion, Config, Envelope, PeerId, PeerName, Rank, Region, Tag, Wire};
    use std::time::{Duration, Instant};

    fn pair(fabric: &Fabric) -> [VerbsWire; 2] {
        let mut wires = [(); 2].map(|()| VerbsWire::new(&Config::default(), Box::new(fabric.adapter())));
        for at in 0..2u32 {
            let name = PeerName { rank: Some(Rank(1 - at)), host: "h".to_owned(), pid: 0, address: "a".to_owned() };
            wires[at as usize].attach(PeerId(1 - at), name, Instant::now()).unwrap();
        }
        carry(&mut wires);
        wires
    }

    /// Words from each to the other, as sockets carry them.
    fn carry(wires: &mut [VerbsWire; 2]) {
        for from in 0..2 {
            while let Some((to, words)) = wires[from].next_words() {
                wires[to.index()].hear(PeerId(from as u32), words, Instant::now());
            }
        }
    }

    fn by_ring(wire: &VerbsWire) -> bool {
        wire.links.iter().flatten().any(|link| link.ring.written > 0)
    }

    /// Messages there and back, each of which tells its number; the second end sleeps before each of `sleeps`. How many of the
    /// first end's went by the ring.
    fn talk(fabric: &Fabric, wires: &mut [VerbsWire; 2], messages: u64, sleeps: impl Fn(u64) -> bool) -> u64 {
        let (regions, mut ringed, mut done) = ([Region::zeroed(64), Region::zeroed(64)], 0, Vec::new());
        for number in 0..messages {
            for from in 0..2usize {
                let (to, tag) = (1 - from, Tag(7));
                let mut bytes = regions[from].write(0..16).unwrap();
                bytes[..8].copy_from_slice(&number.to_le_bytes());
                drop(bytes);
                if from == 0 && sleeps(number) {
                    while !wires[1].fall_asleep() {
                        wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), &mut done));
                        carry(wires);
                    }
                }
                let envelope = Envelope { peer: PeerId(to as u32), tag, note: number };
                wires[to].post_recv(PeerId(from as u32), tag, regions[to].write(16..32).unwrap()).unwrap();
                wires[from].post_send(envelope, regions[from].read(0..16).unwrap()).unwrap();
                ringed += u64::from(from == 0 && by_ring(&wires[0]));
                let until = Instant::now() + Duration::from_secs(20);
                let mut came = false;
                while !came {
                    assert!(Instant::now() < until, "message {number} of end {from} did not come");
                    wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), &mut done));
                    carry(wires);
                    for completion in done.drain(..) {
                        match completion {
                            Completion::Received { from: envelope, slice, bytes: 16 } => {
                                assert_eq!((envelope.note, &slice[..8]), (number, &number.to_le_bytes()[..]));
                                came = true;
                            }
                            Completion::Sent { .. } => {}
                            other => panic!("{other:?}"),
                        }
                    }
                }
            }
        }
        assert_eq!(fabric.not_ready(), 0);
        ringed
    }

    #[test]
    fn after_a_few_small_messages_all_go_by_the_ring_until_the_receiver_sleeps() {
        let fabric = Fabric::default();
        let mut wires = pair(&fabric);
        assert!(talk(&fabric, &mut wires, 200, |_| false) > 150);
        assert_eq!(talk(&fabric, &mut wires, 100, |_| true), 0, "nobody is written to who sleeps");
        let some = talk(&fabric, &mut wires, 200, |number| number % 40 == 0);
        assert!(some > 50 && some < 190, "{some}");
    }

    #[test]
    fn queue_pairs_that_break_lose_and_repeat_nothing_of_the_ring() {
        for seed in 0..30 {
            let fabric = Fabric::default();
            let mut wires = pair(&fabric);
            fabric.fail_at_random(seed, 20_000, 2);
            assert!(talk(&fabric, &mut wires, 300, |number| number % 97 == 0) > 100, "seed {seed}");
        }
    }
}
