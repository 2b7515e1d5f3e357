//! Does: writes on a queue pair with nothing around it, as ib_write_lat and ib_write_bw make them, with a word or without.

use super::meeting::Meeting;
use super::{End, Plan, deadline, device, in_time};
use gradwire_transport::verbs::adapter::{Endpoint, Remote};
use gradwire_transport::verbs::bare::{Bare as Pair, Progress};
use std::error::Error;
use std::time::Instant;

/// Longest message.
const MOST_BYTES: usize = 8 << 20;
/// Where the second end tells how many words it has taken: behind the messages.
const TAKEN: usize = MOST_BYTES;
/// Receives that are posted at the start, and kept posted.
const RECEIVES: u64 = 64;
/// Messages above this size each ask for a completion, as in perftest; of others one in so many.
const SIGNALLED_BYTES: usize = 8 << 10;
const SIGNAL_EVERY: u64 = 16;
/// Looks at memory between two at the clock.
const YIELD_TURNS: u32 = 4096;

/// What tells the other end that a message is there.
pub(super) struct Bare {
    is_first: bool,
    by_word: bool,
    pair: Pair,
    spin: u32,
    writes: u64,
    /// Values that no message has carried yet.
    mark: u64,
    progress: Progress,
}

impl Bare {
    /// Opens a device, and connects to the other end.
    pub(super) fn open(plan: &Plan, by_word: bool, meeting: &mut Meeting) -> Result<Self, Box<dyn Error>> {
        let mut pair = Pair::new(device()?, MOST_BYTES + 8)?;
        for _ in 0..RECEIVES {
            pair.expect_word()?;
        }
        let (Endpoint { queue_pair, packet, lid, mtu_bytes, reads, gid }, Remote { address, key }) = pair.offer();
        let offer = serde_json::to_vec(&((queue_pair, packet, lid, mtu_bytes, reads, gid), (address, key)))?;
        let ((queue_pair, packet, lid, mtu_bytes, reads, gid), (address, key)) =
            serde_json::from_slice(&meeting.swap(&offer)?)?;
        pair.connect((Endpoint { queue_pair, packet, lid, mtu_bytes, reads, gid }, Remote { address, key }))?;
        meeting.swap(b"connected")?;
        let (is_first, spin) = (meeting.is_first, plan.spin(meeting));
        Ok(Self { is_first, by_word, pair, spin, writes: 0, mark: 0, progress: Progress::default() })
    }

    fn write(&mut self, from: usize, bytes: usize, word: Option<u32>, must_tell: bool) -> Result<(), Box<dyn Error>> {
        self.writes += 1;
        let signalled = must_tell || bytes > SIGNALLED_BYTES || self.writes.is_multiple_of(SIGNAL_EVERY);
        Ok(self.pair.write(from, bytes, word, signalled)?)
    }

    /// Sends a message that ends in the next mark.
    fn send(&mut self, bytes: usize) -> Result<(), Box<dyn Error>> {
        let mark = self.mark + 1;
        self.pair.set_word(bytes - 8, mark);
        self.write(0, bytes, self.by_word.then_some(mark as u32), false)
    }

    /// Waits for the message that ends in the next mark.
    fn receive(&mut self, bytes: usize) -> Result<(), Box<dyn Error>> {
        let (until, mark, mut turns) = (deadline(), self.mark + 1, 0u32);
        if self.by_word {
            let known = self.progress.words;
            while self.progress.words == known {
                self.progress = self.pair.poll()?;
                turns = turns.wrapping_add(1);
                rest(turns, until)?;
            }
            self.pair.expect_word()?;
        }
        while self.pair.word(bytes - 8) != mark {
            turns = turns.wrapping_add(1);
            rest(turns, until)?;
        }
        if self.writes - self.progress.written > SIGNAL_EVERY * 2 {
            self.progress = self.pair.poll()?;
        }
        Ok(())
    }

    /// Waits for progress: polls, then sleeps.
    fn wait(&mut self, until: Instant, enough: impl Fn(&Pair, Progress) -> bool) -> Result<(), Box<dyn Error>> {
        let mut idle = 0;
        loop {
            let progress = self.pair.poll()?;
            idle = if progress == self.progress { idle + 1 } else { 0 };
            self.progress = progress;
            if enough(&self.pair, progress) {
                return Ok(());
            }
            if idle > self.spin {
                in_time(until, "the end of a write")?;
                self.progress = self.pair.sleep(progress, until)?;
                idle = 0;
            }
        }
    }

    /// Sends all of a stream, so many at once, and waits until they have arrived.
    fn pour(&mut self, bytes: usize, count: usize, in_flight: usize) -> Result<(), Box<dyn Error>> {
        let (first, words, until) = (self.writes, self.pair.word(TAKEN), deadline());
        let last = first + count as u64;
        while self.writes < last {
            let word = self.by_word.then_some(self.writes as u32);
            let is_last = self.writes + 1 == last;
            self.write(0, bytes, word, is_last)?;
            let (sent, window) = (self.writes, in_flight.max(SIGNAL_EVERY as usize * 2) as u64);
            let window = if bytes > SIGNALLED_BYTES { in_flight as u64 } else { window };
            // Every receive of the other end may be met before it has posted one anew.
            let by_word = self.by_word;
            let free = move |pair: &Pair, progress: Progress| {
                let taken = pair.word(TAKEN) - words;
                sent - progress.written < window && (!by_word || sent - first < taken + RECEIVES)
            };
            if !free(&self.pair, self.progress) {
                self.wait(until, free)?;
            }
        }
        self.wait(until, |_, progress| progress.written >= last)
    }

    /// Takes the words of a stream, and tells how many have been taken.
    fn drink(&mut self, count: usize) -> Result<(), Box<dyn Error>> {
        let (first, until) = (self.progress.words, deadline());
        let (mut taken, mut told) = (0, self.pair.word(TAKEN));
        while taken < count as u64 {
            self.wait(until, move |_, progress| progress.words - first > taken)?;
            for _ in taken..self.progress.words - first {
                self.pair.expect_word()?;
            }
            let more = self.progress.words - first - taken;
            taken += more;
            told += more;
            // The place is of the other end's memory: our own serves as what is written from.
            self.pair.set_word(TAKEN, told);
            if taken.is_multiple_of(RECEIVES / 4) || more > 1 || taken == count as u64 {
                self.write(TAKEN, 8, None, true)?;
            }
        }
        self.settle()
    }

    /// Waits until all that was written has arrived.
    fn settle(&mut self) -> Result<(), Box<dyn Error>> {
        if self.progress.written < self.writes {
            self.write(TAKEN, 0, None, true)?;
        }
        let written = self.writes;
        self.wait(deadline(), move |_, progress| progress.written >= written)
    }
}

/// Between two looks: now and then lets others run, on whom a device made of software depends.
fn rest(turns: u32, until: Instant) -> Result<(), Box<dyn Error>> {
    if turns.is_multiple_of(YIELD_TURNS) {
        std::thread::yield_now();
        in_time(until, "a write")?;
    }
    Ok(())
}

impl End for Bare {
    fn device(&self) -> String {
        self.pair.adapter().name()
    }

    fn verify(&mut self, bytes: usize) -> Result<(), Box<dyn Error>> {
        // Each end's pattern is its own, so that what comes back is not what was sent.
        let pattern = |is_first: bool, at: usize| {
            (at as u64 + u64::from(is_first)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ bytes as u64
        };
        let words = || (0..bytes - 8).step_by(8);
        if self.is_first {
            words().for_each(|at| self.pair.set_word(at, pattern(true, at)));
            self.send(bytes)?;
            self.mark += 1;
        }
        self.receive(bytes)?;
        if let Some(at) = words().find(|&at| self.pair.word(at) != pattern(!self.is_first, at)) {
            return Err(format!("word {at} of a write of {bytes} bytes is {:#x}", self.pair.word(at)).into());
        }
        if !self.is_first {
            self.mark += 1;
            words().for_each(|at| self.pair.set_word(at, pattern(false, at)));
            self.send(bytes)?;
        }
        self.mark += 1;
        self.settle()
    }

    fn ping(&mut self, bytes: usize, rounds: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let began = Instant::now();
            if self.is_first {
                self.send(bytes)?;
                self.mark += 1;
                self.receive(bytes)?;
            } else {
                self.receive(bytes)?;
                self.mark += 1;
                self.send(bytes)?;
            }
            self.mark += 1;
            times.push(began.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    fn stream(&mut self, bytes: usize, count: usize, in_flight: usize) -> Result<f64, Box<dyn Error>> {
        let began = Instant::now();
        match (self.is_first, self.by_word) {
            (true, _) => self.pour(bytes, count, in_flight)?,
            (false, true) => self.drink(count)?,
            // A write tells nobody.
            (false, false) => {}
        }
        Ok(began.elapsed().as_secs_f64())
    }
}
