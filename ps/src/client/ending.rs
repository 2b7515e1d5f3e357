//! Does: how requests end: answered, refused, given up; and when their buffers and slots are free again.

use super::engine::{Cargo, Engine, Phase};
use super::pending::{Call, Done};
use crate::protocol::{PAYLOAD_BYTES, value};
use crate::{PsError, TableId};
use gradwire_transport::{LossCause, PeerId, RegionSliceMut, TransportError};
use std::sync::Arc;
use std::time::Instant;

impl Engine {
    /// The server has answered a request.
    pub(super) fn answered(&mut self, slot: u32, result: Result<Done, PsError>) {
        let Some(entry) = self.entry(slot.into()) else { return };
        entry.owed = false;
        entry.outcome.get_or_insert(result);
        let (peer, receiving) = (PeerId(entry.request.shard), entry.receiving);
        self.leave_lane(slot);
        if receiving {
            // It was refused: no elements will come.
            self.wire.cancel_recvs(peer, value(slot));
        }
        self.settle(slot);
    }

    /// A request is of no use any more.
    pub(super) fn give_up(&mut self, slot: u32, error: PsError) {
        let Some(entry) = self.entry(slot.into()) else { return };
        if entry.outcome.is_some() {
            return;
        }
        entry.outcome = Some(Err(error));
        let (peer, receiving, phase) = (PeerId(entry.request.shard), entry.receiving, entry.phase);
        let shard = &mut self.shards[peer.index()];
        match phase {
            Phase::Laned => {}
            Phase::Queued => shard.queue.retain(|&other| other != slot),
            Phase::Resting => shard.resting.retain(|&(_, other)| other != slot),
            Phase::Sent => {}
        }
        self.leave_lane(slot);
        if receiving {
            self.wire.cancel_recvs(peer, value(slot));
        }
        self.settle(slot);
    }

    /// A receive for elements has ended without any.
    pub(super) fn receive_ended(&mut self, peer: PeerId, slot: u32, slice: Option<RegionSliceMut>) {
        let Some(entry) = self.entry(slot.into()) else { return };
        (entry.receiving, entry.draining) = (false, false);
        if slice.is_some() {
            entry.request.target = slice;
        }
        if entry.owed && entry.outcome.is_some() {
            // Given up, but the server will still send them: they must not meet the next request of this slot.
            let posted = self.wire.post_recv_loan(peer, value(slot), PAYLOAD_BYTES).is_ok();
            if let Some(entry) = self.entry(slot.into()) {
                (entry.receiving, entry.draining) = (posted, posted);
            }
        }
        self.settle(slot);
    }

    fn leave_lane(&mut self, slot: u32) {
        let Some(entry) = self.entry(slot.into()) else { return };
        let (header, phase) = (entry.request.header, entry.phase);
        let Some(synchronous) = entry.request.lane.take() else { return };
        if let Some(lane) = self.lanes.get_mut(&(header.table, header.keys.start)) {
            if phase == Phase::Laned {
                lane.forget(slot);
            } else {
                lane.leave(header.kind.pushes(), header.kind.pulls());
            }
        }
        self.pump_lane(header.table, header.keys.start, synchronous);
    }

    /// Tells a call what its request came to, and frees the slot, as soon as either may be.
    pub(super) fn settle(&mut self, slot: u32) {
        let Some(entry) = self.entry(slot.into()) else { return };
        let held = (entry.receiving && !entry.draining) || entry.sending > 0;
        let mut ended = None;
        if entry.outcome.is_some() && !held {
            // The buffers go back before anybody is told.
            entry.request.cargo = Cargo::Nothing;
            entry.request.target = None;
            ended = entry.call.take().zip(entry.outcome.clone());
        }
        if entry.call.is_none() && !entry.owed && !entry.receiving && entry.sending == 0 {
            self.entries[slot as usize] = None;
            self.free.push(slot);
        }
        if let Some((call, result)) = ended {
            self.end_call(&call, result);
        }
    }

    /// One request of a call has ended. With the first failure, the call's other requests are given up.
    pub(super) fn end_call(&mut self, call: &Arc<Call>, result: Result<Done, PsError>) {
        let failure = result.as_ref().err().filter(|_| !call.has_failed()).cloned();
        if call.end(result) {
            self.finished.push(Arc::clone(call));
        } else if let Some(error) = failure {
            let of_call = |call: &Arc<Call>, other: &Option<Arc<Call>>| {
                other.as_ref().is_some_and(|other| Arc::ptr_eq(other, call))
            };
            for slot in 0..self.entries.len() {
                if self.entries[slot].as_ref().is_some_and(|entry| of_call(call, &entry.call)) {
                    self.give_up(slot as u32, error.clone());
                }
            }
        }
    }

    /// Gives up every request about these tables.
    pub(super) fn abandon(&mut self, tables: &[TableId]) {
        for slot in 0..self.entries.len() {
            let Some(entry) = &self.entries[slot] else { continue };
            if tables.contains(&entry.request.header.table) {
                let shard = entry.request.shard;
                let address = self.shards[shard as usize].address.clone();
                let cause = "its tables are being recovered: push again what is beyond their clocks".to_owned();
                self.give_up(slot as u32, PsError::ServerLost { shard, address, cause });
            }
        }
    }

    /// Gives up what has waited too long; a server that should have answered by then is not heard any more.
    pub(super) fn expire(&mut self, now: Instant) {
        for slot in 0..self.entries.len() {
            let Some(entry) = &self.entries[slot] else { continue };
            if entry.deadline > now || entry.outcome.is_some() {
                continue;
            }
            let (shard, owed) = (entry.request.shard, entry.owed);
            let what = entry.call.as_ref().map(|call| call.what.to_string()).unwrap_or_default();
            let waited = std::time::Duration::from_millis(entry.request.header.wait_ms.into());
            let address = &self.shards[shard as usize].address;
            let what = format!("{what}: shard {shard} at {address} does not answer");
            if owed {
                let cause = LossCause::Silent(waited);
                let name = Box::new(self.wire.name(PeerId(shard)));
                self.wire.disconnect(PeerId(shard), TransportError::PeerLost { peer: name, cause });
            }
            self.give_up(slot as u32, PsError::Timeout { what, waited });
        }
    }

    /// Fails every call under way and says goodbye.
    pub(super) fn close(&mut self) {
        for slot in 0..self.entries.len() {
            self.give_up(slot as u32, PsError::Closed);
        }
        self.wire.shutdown(Instant::now() + std::time::Duration::from_millis(200));
        // Whatever was posted comes back with the wire's last completions.
        let mut done = Vec::new();
        self.wire.poll(Instant::now(), &mut done);
        drop(done);
        for entry in self.entries.iter_mut().flatten() {
            if let Some(call) = entry.call.take() {
                entry.request.cargo = Cargo::Nothing;
                entry.request.target = None;
                if call.end(Err(PsError::Closed)) {
                    self.finished.push(call);
                }
            }
        }
    }
}
