//! Does: how a link's queue pairs are connected, for the first time and again: what each end proposes, what both conclude, and
//! what is sent again.

use super::fault::Fault;
use super::lane::Carried;
use super::link::{Access, Link, Out, Part, Phase};
use super::nic::Nic;
use super::proposal::{Conclusion, Means, Proposal, conclude};
use crate::{Completion, TransportError};
use std::time::{Duration, Instant};

/// Failures within [`FORGET`] after which a link goes on over sockets.
const FAILURES: usize = 3;
/// How long a failure counts.
const FORGET: Duration = Duration::from_secs(60);

impl Link {
    /// Makes queue pairs with their receives posted; what to tell the peer.
    pub(super) fn propose(&mut self, now: Instant, nic: &mut Nic) -> Proposal {
        self.ring.reset();
        self.failures.retain(|failure| now.saturating_duration_since(*failure) < FORGET);
        let means = if self.failures.len() >= FAILURES {
            let why = self.last_fault.as_ref().map_or_else(String::new, ToString::to_string);
            Means::Sockets(format!(
                "its queue pairs failed {FAILURES} times within {} s, the last time: {why}",
                FORGET.as_secs()
            ))
        } else {
            match self.open(nic) {
                Ok(endpoints) => Means::QueuePairs { endpoints, receives: self.slots as u32, ring: self.ring.offer() },
                Err(error) => Means::Sockets(error.to_string()),
            }
        };
        self.fault = None;
        self.phase = Phase::Apart { since: Some(now) };
        let received = self.lanes.iter().map(|lane| lane.received).collect();
        let proposal = Proposal { epoch: self.epoch, received, means };
        self.ours = Some(proposal.clone());
        proposal
    }

    fn open(&mut self, nic: &mut Nic) -> Result<Vec<super::adapter::Endpoint>, TransportError> {
        let mut endpoints = Vec::new();
        for at in 0..self.lanes.len() {
            let endpoint = match nic.adapter.open() {
                Ok(endpoint) => endpoint,
                Err(error) => {
                    self.close(nic);
                    return Err(error);
                }
            };
            self.lanes[at].queue_pair = Some(endpoint.queue_pair);
            endpoints.push(endpoint);
            for slot in 0..self.slots {
                self.post_receive(at, slot, nic);
            }
        }
        Ok(endpoints)
    }

    /// Both proposals of this epoch are there: goes on by what they conclude. `Ok(false)`: our end of it failed at once, and a
    /// new proposal is needed.
    ///
    /// # Errors
    /// What the peer claims that cannot be.
    pub(super) fn resume(
        &mut self,
        theirs: &Proposal,
        nic: &mut Nic,
        done: &mut Vec<Completion>,
    ) -> Result<bool, &'static str> {
        let Some(ours) = self.ours.take() else { return Err("a proposal that nobody waits for") };
        let (endpoints, receives, ring) = match conclude(&ours, theirs) {
            Conclusion::Connect(endpoints, receives, ring) => (endpoints, receives, ring),
            Conclusion::Sockets(reason) => {
                self.close(nic);
                self.phase = Phase::Sockets(reason);
                self.rewind(theirs, self.slots as u64, nic, done)?;
                return Ok(true);
            }
        };
        for lane in self.lanes.drain(endpoints.len()..) {
            lane.queue_pair.into_iter().for_each(|queue_pair| nic.adapter.close(queue_pair));
        }
        for (at, endpoint) in endpoints.iter().enumerate() {
            let Some(queue_pair) = self.lanes[at].queue_pair else { return Ok(false) };
            if let Err(error) = nic.adapter.connect(queue_pair, endpoint) {
                self.fault = Some(Fault::of_device(nic.adapter.name(), queue_pair, error.to_string()));
                return Ok(false);
            }
        }
        self.phase = Phase::Up;
        self.ring.join(ring, receives.into());
        self.rewind(theirs, receives.into(), nic, done)?;
        Ok(true)
    }

    /// Ends what the peer has received, and sends the rest again.
    fn rewind(
        &mut self,
        theirs: &Proposal,
        receives: u64,
        nic: &mut Nic,
        done: &mut Vec<Completion>,
    ) -> Result<(), &'static str> {
        let mut again = Vec::new();
        for at in 0..self.lanes.len() {
            let expected = theirs.received.get(at).copied().unwrap_or(0);
            let lane = &mut self.lanes[at];
            let (delivered, left) =
                lane.rewind(expected).ok_or("it received what was never sent, or lost what it had")?;
            lane.set_peer_depth(receives);
            lane.reset_receives();
            delivered.into_iter().for_each(|carried| self.ended(at, carried, nic, done));
            again.extend(left);
        }
        let in_order = again.iter().rev().filter_map(|carried| match carried {
            Carried::Put { key } => Some(Out::Put { key: *key }),
            Carried::Get { key } => Some(Out::Get { key: *key }),
            _ => None,
        });
        in_order.for_each(|out| self.queue.push_front(out));
        self.restart_larges(nic);
        if matches!(self.phase, Phase::Sockets(_)) {
            self.give_up_remotely(nic, done);
        }
        self.probing = false;
        let (first, last) = (self.frames_freed, self.frames_made);
        for at in first..last {
            self.send_frame(at, nic);
        }
        Ok(())
    }

    /// Parts that were not delivered begin anew; over sockets whole messages do, in pieces.
    fn restart_larges(&mut self, nic: &mut Nic) {
        let by_sockets = matches!(self.phase, Phase::Sockets(_));
        for &key in &self.writing {
            let Some(large) = self.large.get_mut(key) else { continue };
            if large.lease.is_none() {
                continue;
            }
            for part in &mut large.parts {
                part.next = if part.delivered { part.end } else { part.start };
            }
            if by_sockets {
                large.lease.take().into_iter().for_each(|lease| nic.registrations.release(lease));
                large.parts = Default::default();
                large.parts[0] = Part::of(0, large.cargo.len());
            }
        }
        for remotely in self.queue.iter().filter_map(|out| match out {
            Out::Put { key } | Out::Get { key } => Some(*key),
            _ => None,
        }) {
            if let Some(remotely) = self.remotely.get_mut(remotely) {
                remotely.next = 0;
            }
        }
    }

    /// There is no reaching into the peer's memory over sockets.
    fn give_up_remotely(&mut self, nic: &mut Nic, done: &mut Vec<Completion>) {
        let error = TransportError::Config {
            setting: "one-sided access".to_owned(),
            reason: format!("the queue pairs to {} are gone, and sockets cannot do it", self.name),
        };
        self.queue.retain(|out| !matches!(out, Out::Put { .. } | Out::Get { .. }));
        for remotely in self.remotely.take_all() {
            remotely.lease.into_iter().for_each(|lease| nic.registrations.release(lease));
            match remotely.what {
                Access::Put { flight, cargo } => {
                    self.flights.end(flight, cargo.into_slice(), Some(error.clone()), done)
                }
                Access::Get { from, slice } => done.push(Completion::RecvFailed {
                    peer: self.peer,
                    tag: from.tag,
                    slice: Some(slice),
                    error: error.clone(),
                }),
            }
        }
    }
}
