//! Does: messages of the verbs wire, alone or as a group has it.

use super::meeting::Meeting;
use super::{End, PATIENCE, Plan, deadline, device, in_time, settings};
use gradwire_transport::{
    Beside, Completion, Config, Envelope, PeerId, PeerName, Rank, Region, RegionSlice, RegionSliceMut, Tag, VerbsWire,
    Wire, WireChoice, WireKind, Words, form_group,
};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Polls between two looks at the clock.
const CLOCK_TURNS: u32 = 16;
const FORWARD: Tag = Tag(1);
const BACK: Tag = Tag(2);

/// One end.
pub(super) struct Messages {
    is_first: bool,
    wire: Box<dyn Wire>,
    device: String,
    peer: PeerId,
    spin: u32,
    /// A buffer for each message under way.
    buffers: Vec<Arc<Region>>,
    done: Vec<Completion>,
    /// The clock, as it was when it was looked at last, and polls since.
    now: Instant,
    turns: u32,
    /// Completions that nobody has waited for yet.
    sent: usize,
    received: usize,
}

impl Messages {
    /// The wire alone: its first words go through the meeting.
    pub(super) fn open(plan: &Plan, meeting: &mut Meeting) -> Result<Self, Box<dyn Error>> {
        let config = Config { wire: WireChoice::Verbs, verbs: settings()?, ..Config::default() };
        let mut wire = VerbsWire::new(&config, device()?);
        let device = wire.device();
        let peer = PeerId(u32::from(meeting.is_first));
        let name =
            PeerName { rank: Some(Rank(peer.0)), host: "the other end".to_owned(), pid: 0, address: device.clone() };
        wire.attach(peer, name, Instant::now())?;
        let Some((_, Words::Proposal(ours))) = wire.next_words() else { return Err("the wire has no proposal".into()) };
        let theirs = meeting.swap(&ours)?;
        wire.hear(peer, Words::Proposal(theirs), Instant::now());
        if wire.kind(peer) != WireKind::Verbs || !wire.is_up(peer) {
            return Err(wire.reason(peer).unwrap_or("the two ends cannot be connected".to_owned()).into());
        }
        meeting.swap(b"connected")?;
        Ok(Self::with(Box::new(wire), device, plan, meeting))
    }

    /// The wire of a group.
    pub(super) fn form(plan: &Plan, meeting: &mut Meeting) -> Result<Self, Box<dyn Error>> {
        let config = Config { wire: WireChoice::Verbs, verbs: settings()?, ..Config::default() };
        let group = form_group(meeting.group(config), deadline())?;
        let device = group.links.first().map(|link| device_of(&link.reason).to_owned()).unwrap_or_default();
        Ok(Self::with(group.wire, device, plan, meeting))
    }

    fn with(wire: Box<dyn Wire>, device: String, plan: &Plan, meeting: &Meeting) -> Self {
        let is_first = meeting.is_first;
        let peer = PeerId(u32::from(is_first));
        let (buffers, done, spin) = (Vec::new(), Vec::new(), plan.spin(meeting));
        let now = Instant::now();
        Self { is_first, wire, device, peer, spin, buffers, done, now, turns: 0, sent: 0, received: 0 }
    }

    /// At least so many buffers of at least so many bytes.
    fn prepare(&mut self, bytes: usize, count: usize) {
        if self.buffers.first().is_some_and(|buffer| buffer.len() < bytes + PAGE) {
            self.buffers.clear();
        }
        while self.buffers.len() < count {
            self.buffers.push(Region::zeroed(bytes + PAGE));
        }
    }

    fn place(&self, at: usize, bytes: usize) -> std::ops::Range<usize> {
        // Page by page as in perftest: how a buffer lies is part of what is compared.
        let first = self.buffers[at].as_ptr().addr();
        let start = first.next_multiple_of(PAGE) - first;
        start..start + bytes
    }

    fn post_send(&mut self, tag: Tag, slice: RegionSlice) -> Result<(), Box<dyn Error>> {
        let to = Envelope { peer: self.peer, tag, note: 0 };
        self.wire.post_send(to, slice).map_err(|refused| refused.error.into())
    }

    fn post_recv(&mut self, tag: Tag, slice: RegionSliceMut) -> Result<(), Box<dyn Error>> {
        self.wire.post_recv(self.peer, tag, slice).map_err(|refused| refused.error.into())
    }

    fn send(&mut self, tag: Tag, at: usize, bytes: usize) -> Result<(), Box<dyn Error>> {
        let slice = self.buffers[at].read(self.place(at, bytes))?;
        self.post_send(tag, slice)
    }

    fn receive(&mut self, tag: Tag, at: usize, bytes: usize) -> Result<(), Box<dyn Error>> {
        let slice = self.buffers[at].write(self.place(at, bytes))?;
        self.post_recv(tag, slice)
    }

    /// Polls once, and sleeps where that found nothing after `idle` polls that found nothing.
    #[inline]
    fn step(&mut self, idle: &mut u32, until: Instant) -> Result<(), Box<dyn Error>> {
        self.wire.poll(self.now, &mut self.done);
        self.turns += 1;
        if self.turns >= CLOCK_TURNS {
            (self.now, self.turns) = (Instant::now(), 0);
        }
        if self.done.is_empty() {
            *idle += 1;
            if *idle > self.spin {
                in_time(until, "a message")?;
                self.wire.park(until);
            }
        }
        Ok(())
    }

    /// The next completions.
    fn wait(&mut self, until: Instant) -> Result<Vec<Completion>, Box<dyn Error>> {
        let mut idle = 0;
        while self.done.is_empty() {
            self.step(&mut idle, until)?;
        }
        let failed = self.done.iter().find_map(|completion| match completion {
            Completion::SendFailed { error, .. }
            | Completion::RecvFailed { error, .. }
            | Completion::PeerDown { error, .. } => Some(error.clone()),
            _ => None,
        });
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(std::mem::take(&mut self.done)),
        }
    }

    /// Waits for so many completions of either kind; more of them count for the next time.
    fn wait_for(&mut self, sent: usize, received: usize, until: Instant) -> Result<(), Box<dyn Error>> {
        while self.sent < sent || self.received < received {
            let mut done = self.wait(until)?;
            for completion in done.drain(..) {
                match completion {
                    Completion::Sent { .. } => self.sent += 1,
                    _ => self.received += 1,
                }
            }
            self.done = done;
        }
        self.sent -= sent;
        self.received -= received;
        Ok(())
    }

    /// Waits until a slice to be sent is here, and one to receive in.
    fn regain(
        &mut self,
        mut sent: Option<RegionSlice>,
        mut received: Option<RegionSliceMut>,
        until: Instant,
    ) -> Result<(RegionSlice, RegionSliceMut), Box<dyn Error>> {
        let mut idle = 0;
        while sent.is_none() || received.is_none() {
            self.step(&mut idle, until)?;
            for completion in self.done.drain(..) {
                match completion {
                    Completion::Sent { slice, .. } => sent = Some(slice),
                    Completion::Received { slice, .. } => received = Some(slice),
                    Completion::SendFailed { error, .. }
                    | Completion::RecvFailed { error, .. }
                    | Completion::PeerDown { error, .. } => return Err(error.into()),
                    _ => {}
                }
            }
        }
        sent.zip(received).ok_or_else(|| "a slice did not come back".into())
    }

    fn pour(&mut self, bytes: usize, count: usize, in_flight: usize) -> Result<(), Box<dyn Error>> {
        self.receive(BACK, 1, 8)?;
        let (mut posted, mut sent, until) = (0, 0, deadline());
        while posted < count.min(in_flight) {
            self.send(FORWARD, 0, bytes)?;
            posted += 1;
        }
        let mut answered = false;
        while sent < count || !answered {
            let mut done = self.wait(until)?;
            for completion in done.drain(..) {
                let Completion::Sent { slice, .. } = completion else {
                    answered = true;
                    continue;
                };
                sent += 1;
                if posted < count {
                    self.post_send(FORWARD, slice)?;
                    posted += 1;
                }
            }
            self.done.append(&mut done);
        }
        Ok(())
    }

    fn drink(&mut self, bytes: usize, count: usize, in_flight: usize) -> Result<(), Box<dyn Error>> {
        let (mut posted, mut received, until) = (0, 0, deadline());
        while posted < count.min(in_flight) {
            self.receive(FORWARD, posted, bytes)?;
            posted += 1;
        }
        while received < count {
            let mut done = self.wait(until)?;
            for completion in done.drain(..) {
                let Completion::Received { slice, .. } = completion else { continue };
                received += 1;
                if posted < count {
                    self.post_recv(FORWARD, slice)?;
                    posted += 1;
                }
            }
            self.done.append(&mut done);
        }
        self.send(BACK, 0, 8)?;
        self.wait_for(1, 0, deadline())
    }
}

impl End for Messages {
    fn device(&self) -> String {
        self.device.clone()
    }

    fn verify(&mut self, bytes: usize) -> Result<(), Box<dyn Error>> {
        self.prepare(bytes, 2);
        let expected = |at: usize| (at.wrapping_mul(31) ^ (at >> 8) ^ bytes) as u8;
        if self.is_first {
            self.buffers[0].write(self.place(0, bytes))?.iter_mut().enumerate().for_each(|(at, b)| *b = expected(at));
            self.receive(BACK, 1, bytes)?;
            self.send(FORWARD, 0, bytes)?;
            self.wait_for(1, 1, deadline())?;
        } else {
            self.receive(FORWARD, 1, bytes)?;
            self.wait_for(0, 1, deadline())?;
        }
        let came = self.buffers[1].read(self.place(1, bytes))?;
        if let Some(at) = came.iter().enumerate().position(|(at, &byte)| byte != expected(at)) {
            return Err(format!("byte {at} of a message of {bytes} bytes is {}", came[at]).into());
        }
        if !self.is_first {
            self.post_send(BACK, came)?;
            self.wait_for(1, 0, deadline())?;
        }
        Ok(())
    }

    fn ping(&mut self, bytes: usize, rounds: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        self.prepare(bytes, 2);
        let (there, here) = if self.is_first { (FORWARD, BACK) } else { (BACK, FORWARD) };
        // The same slices over and over, as perftest has the same memory.
        let mut out = self.buffers[0].read(self.place(0, bytes))?;
        let mut back = self.buffers[1].write(self.place(1, bytes))?;
        let mut times = Vec::with_capacity(rounds);
        let mut began = Instant::now();
        for _ in 0..rounds {
            let until = began + PATIENCE;
            (out, back) = if self.is_first {
                self.post_send(there, out)?;
                // The receive is posted while the message is on its way.
                self.post_recv(here, back)?;
                self.regain(None, None, until)?
            } else {
                self.post_recv(here, back)?;
                let (sent, received) = self.regain(Some(out), None, until)?;
                self.post_send(there, sent)?;
                self.regain(None, Some(received), until)?
            };
            // One look at the clock a round, as in perftest.
            let ended = Instant::now();
            times.push((ended - began).as_secs_f64());
            began = ended;
        }
        Ok(times)
    }

    fn stream(&mut self, bytes: usize, count: usize, in_flight: usize) -> Result<f64, Box<dyn Error>> {
        self.prepare(bytes, in_flight.max(2));
        let began = Instant::now();
        if self.is_first {
            self.pour(bytes, count, in_flight)?;
        } else {
            self.drink(bytes, count, in_flight)?;
        }
        Ok(began.elapsed().as_secs_f64())
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.wire.shutdown(Instant::now() + Duration::from_millis(500));
    }
}

/// The device in a group's reason for its link, with what is said of it; its name comes first, as a device's own does.
fn device_of(reason: &str) -> &str {
    reason.strip_prefix("RDMA by ").unwrap_or(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_a_group_is_told_by_its_name() {
        assert_eq!(
            device_of("RDMA by rxe0:1 GID 1 (10.0.0.2): by this address"),
            "rxe0:1 GID 1 (10.0.0.2): by this address"
        );
        assert_eq!(device_of("mlx5_0:1"), "mlx5_0:1");
    }
}
