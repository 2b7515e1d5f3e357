//! Pure: a frame's journey through the simulated network: sent, lost or twice there, put in order, acknowledged.

use super::core::{Core, Event, MAX_WAIT, State, name};
use super::link::{Frame, Sent};
use crate::slab::Slab;
use crate::{LossCause, PeerId, RegionSliceMut, RemoteSlice, TransportError};
use std::time::Duration;

/// Shortest wait for an acknowledgement.
const MIN_WAIT: Duration = Duration::from_micros(100);
const OUTSIDE: &str = "a one-sided access outside of what is exposed to it";

impl Core {
    pub(super) fn send(&mut self, from: PeerId, to: PeerId, frame: Frame) {
        let since = self.now;
        let link = self.node(from).links[to.index()].as_mut().expect("frames go where a connection is");
        let number = link.first + link.frames.len() as u64;
        link.frames.push_back(Sent { frame, since });
        self.transmit(from, to, number, 0);
    }

    fn transmit(&mut self, from: PeerId, to: PeerId, number: u64, attempt: u32) {
        let (now, plan) = (self.now, self.plan.link(from, to));
        let slower = self.plan.extra(from, to, now - self.start);
        // The same draws for every frame, so that a change of one probability moves nothing else.
        let jitters = [self.random.up_to(plan.jitter), self.random.up_to(plan.jitter)];
        let lost = self.random.happens(plan.lost_per_million);
        let twice = self.random.happens(plan.twice_per_million);
        let cut = self.plan.is_cut(from, to, now - self.start);
        let Some(link) = self.node(from).links[to.index()].as_mut() else { return };
        let Some(sent) = number.checked_sub(link.first).and_then(|at| link.frames.get(at as usize)) else { return };
        let bytes = sent.frame.bytes() as u64;
        let leaving = match plan.bytes_per_s {
            0 => Duration::ZERO,
            rate => Duration::from_nanos(
                u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX),
            ),
        };
        link.busy_until = link.busy_until.max(now) + leaving;
        let left = link.busy_until;
        let arrival = left + plan.delay + slower;
        if !lost && !cut {
            self.at(arrival + jitters[0], Event::Arrive { from, to, number });
            if twice {
                self.at(arrival + jitters[1], Event::Arrive { from, to, number });
            }
        }
        let round_trip = (plan.delay + plan.jitter + slower) * 2 + MIN_WAIT;
        let wait = (round_trip * 2u32.pow(attempt.min(10))).min(MAX_WAIT.max(round_trip));
        self.at(left + wait, Event::Again { from, to, number, attempt: attempt + 1 });
    }

    pub(super) fn again(&mut self, from: PeerId, to: PeerId, number: u64, attempt: u32) {
        let now = self.now;
        let node = self.node(from);
        let (up, timeout) = (node.state != State::Down, node.config.timeout);
        let Some(link) = node.links[to.index()].as_ref().filter(|link| up && number >= link.first) else { return };
        let since = link.frames.get((number - link.first) as usize).map_or(now, |sent| sent.since);
        if now < since + timeout {
            self.transmit(from, to, number, attempt);
        } else {
            self.lose(from, to, true);
        }
    }

    pub(super) fn arrive(&mut self, from: PeerId, to: PeerId, number: u64) {
        let both = self.node(from).state != State::Down && self.node(to).state != State::Down;
        if !both || self.plan.is_cut(from, to, self.now - self.start) {
            return;
        }
        let Some(link) = self.node(to).links[from.index()].as_mut() else { return };
        if number >= link.expected {
            link.early.insert(number);
        }
        while let Some(link) = self.node(to).links[from.index()].as_mut()
            && link.early.remove(&link.expected)
        {
            link.expected += 1;
            let number = link.expected - 1;
            self.deliver(from, to, number);
        }
        let next = self.end(to, from).map_or(0, |link| link.expected);
        let plan = self.plan.link(to, from);
        let slower = self.plan.extra(to, from, self.now - self.start);
        let jitter = self.random.up_to(plan.jitter);
        if !self.random.happens(plan.lost_per_million) {
            self.at(self.now + plan.delay + slower + jitter, Event::Ack { from: to, to: from, next });
        }
    }

    fn deliver(&mut self, from: PeerId, to: PeerId, number: u64) {
        let Some(sender) = self.node(from).links[to.index()].as_mut() else { return };
        let Some(at) = number.checked_sub(sender.first).map(|at| at as usize) else { return };
        let Some(sent) = sender.frames.get_mut(at) else { return };
        let frame = std::mem::replace(&mut sent.frame, Frame::Void);
        self.turn += 1;
        let turn = self.turn;
        let node = self.node(to);
        let Some(link) = node.links[from.index()].as_mut() else { return };
        let result = match &frame {
            _ if link.lost.is_some() => Ok(None),
            Frame::Put { cargo, remote, .. } => reach(&mut node.exposed, from, remote)
                .and_then(|space| space.get_mut(..cargo.len()))
                .map(|space| space.copy_from_slice(cargo))
                .map(|()| None)
                .ok_or(LossCause::Protocol(OUTSIDE.to_owned())),
            Frame::Get { key, remote } => reach(&mut node.exposed, from, remote)
                .map(|space| Some(Frame::Got { key: *key, bytes: space.to_vec() }))
                .ok_or(LossCause::Protocol(OUTSIDE.to_owned())),
            frame => link.take(frame, turn, &mut node.done),
        };
        if node.state == State::Leaving {
            node.done.clear();
        }
        if let Some(sender) = self.node(from).links[to.index()].as_mut()
            && sender.lost.is_none()
        {
            sender.frames[at].frame = frame;
        }
        match result {
            Ok(reply) => self.follow_up(to, from, reply),
            Err(cause @ LossCause::Protocol(_)) => {
                let error = TransportError::PeerLost { peer: Box::new(name(from)), cause };
                self.disconnect(to, from, &error);
            }
            Err(cause) => self.give_up(to, from, cause),
        }
    }

    pub(super) fn acknowledge(&mut self, from: PeerId, to: PeerId, next: u64) {
        if self.plan.is_cut(from, to, self.now - self.start) {
            return;
        }
        let node = self.node(to);
        if let Some(link) = node.links[from.index()].as_mut() {
            link.acknowledged(next, &mut node.done);
        }
        if node.state != State::Up {
            node.done.clear();
        }
    }
}

/// The memory that `remote` names, if it is exposed to `peer`.
fn reach<'a>(
    exposed: &'a mut Slab<(PeerId, RegionSliceMut)>,
    peer: PeerId,
    remote: &RemoteSlice,
) -> Option<&'a mut [u8]> {
    let (_, slice) = exposed.get_mut(remote.key).filter(|(allowed, _)| *allowed == peer)?;
    let start = usize::try_from(remote.offset).ok()?;
    let end = start.checked_add(usize::try_from(remote.bytes).ok()?)?;
    slice.get_mut(start..end)
}
