//! Does: the requests of one client, from their making to their end, over one wire to all shards.

use super::lane::Lane;
use super::pending::{Call, Done};
use super::reach::{Reach, WITHOUT_TABLES};
use crate::control::Directory;
use crate::dial::Dialer;
use crate::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use crate::protocol::{PAYLOAD, REPLY, REPLY_BYTES, slot_of};
use crate::refusal::{Reason, Refusal};
use crate::{PsError, TableId};
use gradwire_transport::{Arrival, Completion, Envelope, PeerId, RegionSlice, RegionSliceMut, TransportError};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests of one client under way at once; a table of 16 GiB is about 65,536 of them.
const MAX_REQUESTS: usize = 1 << 18;
/// How much longer than the server a client waits, so that the server, who knows why, answers first.
const SLACK: Duration = Duration::from_secs(2);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// The first and the longest pause before a request that the server had no room for goes again.
const REST: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(64));

/// What a request carries.
pub(super) enum Cargo {
    Nothing,
    /// A short body.
    Body(Vec<u8>),
    /// Elements of the caller's.
    Slice(RegionSlice),
}

impl Cargo {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Body(body) => body,
            Self::Slice(slice) => slice,
        }
    }
}

/// A request to be made.
pub(super) struct NewRequest {
    pub(super) shard: u32,
    pub(super) header: Header,
    pub(super) cargo: Cargo,
    /// Where the elements that it asks for go.
    pub(super) target: Option<RegionSliceMut>,
    /// For requests about a part: whether its table is synchronous.
    pub(super) lane: Option<bool>,
    /// Whether the caller wants the body of the answer.
    pub(super) keep_body: bool,
    /// Whether it is in vain once any server has lost its tables: their workers must notice together.
    pub(super) fragile: bool,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// In its lane: others go first.
    Laned,
    /// In the queue of its shard.
    Queued,
    /// With the server.
    Sent,
    /// The server had no room for it: it goes again soon.
    Resting,
}

/// A request under way.
pub(super) struct Entry {
    pub(super) call: Option<Arc<Call>>,
    pub(super) request: NewRequest,
    pub(super) phase: Phase,
    pub(super) order: u64,
    pub(super) deadline: Instant,
    /// Whether a receive is posted for its elements, and whether that only lets them pass since nobody wants them.
    pub(super) receiving: bool,
    pub(super) draining: bool,
    /// How many sends of its payload are posted.
    pub(super) sending: u32,
    /// Whether the server owes an answer over the present connection.
    pub(super) owed: bool,
    pub(super) sent_before: bool,
    pub(super) rest: Duration,
    /// What it came to. Its call learns it once nothing of the caller's is posted any more.
    pub(super) outcome: Option<Result<Done, PsError>>,
}

/// The requests of a client, and the connections they travel on.
pub(super) struct Engine {
    pub(super) wire: Box<dyn Dialer>,
    pub(super) shards: Vec<Reach>,
    pub(super) entries: Vec<Option<Entry>>,
    pub(super) free: Vec<u32>,
    pub(super) lanes: HashMap<(TableId, u64), Lane>,
    pub(super) finished: Vec<Arc<Call>>,
    done: Vec<Completion>,
    order: u64,
    next_tick: Instant,
    pub(super) timeout: Duration,
    pub(super) reconnect: Duration,
    /// The client's part of every header.
    pub(super) me: Header,
    /// Where to ask for shards that have moved, if anywhere.
    pub(super) directory: Option<Directory>,
    /// Why a server would not have us, if one would not.
    pub(super) refused_hello: Option<PsError>,
}

impl Engine {
    pub(super) fn new(
        wire: Box<dyn Dialer>,
        addresses: &[String],
        me: Header,
        timeout: Duration,
        reconnect: Duration,
    ) -> Self {
        Self {
            wire,
            shards: addresses.iter().map(|address| Reach::new(address)).collect(),
            entries: Vec::new(),
            free: Vec::new(),
            lanes: HashMap::new(),
            finished: Vec::new(),
            done: Vec::new(),
            order: 0,
            next_tick: Instant::now(),
            timeout,
            reconnect,
            me,
            directory: None,
            refused_hello: None,
        }
    }

    /// Takes up a call's requests.
    pub(super) fn begin(&mut self, call: &Arc<Call>, requests: Vec<NewRequest>) {
        let now = Instant::now();
        for mut request in requests {
            let used = self.entries.len() - self.free.len();
            if used >= MAX_REQUESTS || call.has_failed() {
                let reason = format!("{MAX_REQUESTS} requests are under way: wait for some first");
                drop(request);
                self.end_call(call, Err(PsError::invalid(call.what.to_string(), reason)));
                continue;
            }
            let slot = self.free.pop().unwrap_or_else(|| {
                self.entries.push(None);
                u32::try_from(self.entries.len() - 1).expect("the number of requests is bounded")
            });
            let header = &mut request.header;
            header.client = self.me.client;
            header.incarnation = self.me.incarnation;
            header.slot = slot;
            if header.wait_ms == 0 {
                header.wait_ms = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
            }
            let (shard, lane, header) = (request.shard, request.lane, request.header);
            self.order += 1;
            let phase = if lane.is_some() { Phase::Laned } else { Phase::Queued };
            self.entries[slot as usize] = Some(Entry {
                call: Some(Arc::clone(call)),
                request,
                phase,
                order: self.order,
                deadline: now + Duration::from_millis(header.wait_ms.into()) + SLACK,
                receiving: false,
                draining: false,
                sending: 0,
                owed: false,
                sent_before: false,
                rest: REST.0,
                outcome: None,
            });
            match lane {
                Some(synchronous) => {
                    let lane = self.lanes.entry((header.table, header.keys.start)).or_default();
                    lane.enter(slot, header.kind.pushes(), header.kind.pulls());
                    self.pump_lane(header.table, header.keys.start, synchronous);
                }
                None => self.shards[shard as usize].queue.push_back(slot),
            }
        }
    }

    /// Lets go what may go of a part's requests.
    pub(super) fn pump_lane(&mut self, table: TableId, start: u64, synchronous: bool) {
        let Some(lane) = self.lanes.get_mut(&(table, start)) else { return };
        while let Some(slot) = lane.next(synchronous) {
            if let Some(entry) = &mut self.entries[slot as usize] {
                entry.phase = Phase::Queued;
                self.shards[entry.request.shard as usize].queue.push_back(slot);
            }
        }
    }

    /// Moves what can be moved; whether anything did.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        let mut moved = self.reach_shards(now);
        moved |= self.post_queues();
        let mut done = std::mem::take(&mut self.done);
        self.wire.poll(now, &mut done);
        moved |= !done.is_empty();
        for completion in done.drain(..) {
            self.complete(completion, now);
        }
        self.done = done;
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.expire(now);
            self.look_after_silent_shards(now);
        }
        moved | self.post_queues()
    }

    /// Sleeps until something may have happened.
    pub(super) fn park(&mut self, until: Instant) {
        let resting = self.shards.iter().filter_map(|shard| shard.resting.front().map(|&(when, _)| when));
        let dialling = self.shards.iter().filter_map(Reach::next_try);
        let until = resting.chain(dialling).fold(until, Instant::min);
        self.wire.park(until);
    }

    /// The calls that have ended since last asked.
    pub(super) fn take_finished(&mut self) -> Vec<Arc<Call>> {
        std::mem::take(&mut self.finished)
    }

    fn complete(&mut self, completion: Completion, now: Instant) {
        if let Completion::Received { from, .. } | Completion::Arrived(Arrival { from, .. }) = &completion {
            self.shards[from.peer.index()].heard = now;
        }
        match completion {
            Completion::Sent { to, slice } | Completion::SendFailed { to, slice, .. } if to.tag == PAYLOAD => {
                drop(slice);
                let shard = &mut self.shards[to.peer.index()];
                shard.sending = shard.sending.saturating_sub(1);
                if let Some(entry) = self.entry(to.note) {
                    entry.sending = entry.sending.saturating_sub(1);
                    self.settle(to.note as u32);
                }
            }
            Completion::Received { from, slice, bytes } => self.take_value(from, slice, bytes),
            Completion::Arrived(arrival) if arrival.from.tag == REPLY => self.take_reply(arrival, now),
            Completion::Arrived(arrival) => {
                // Elements that nobody wants any more.
                if let Some(slot) = slot_of(arrival.from.tag)
                    && let Some(entry) = self.entry(slot.into())
                {
                    (entry.receiving, entry.draining) = (false, false);
                    self.answered(slot, Ok(Done::default()));
                }
            }
            Completion::RecvFailed { peer, tag, slice, error } => {
                let Some(slot) = slot_of(tag) else { return };
                if let TransportError::MessageTooLong { bytes, capacity, .. } = error {
                    self.broken(peer, &format!("it sent {bytes} bytes of elements for {capacity}"));
                }
                self.receive_ended(peer, slot, slice);
            }
            Completion::PeerDown { peer, error } => self.lost(peer, &error, now),
            _ => {}
        }
    }

    pub(super) fn entry(&mut self, slot: u64) -> Option<&mut Entry> {
        self.entries.get_mut(usize::try_from(slot).ok()?)?.as_mut()
    }

    fn take_value(&mut self, from: Envelope, slice: RegionSliceMut, bytes: usize) {
        let Some(slot) = slot_of(from.tag) else { return };
        let whole = bytes == slice.len();
        if let Some(entry) = self.entry(slot.into()) {
            entry.receiving = false;
            entry.request.target = Some(slice);
        }
        if whole {
            self.answered(slot, Ok(Done { clock: from.note }));
        } else {
            self.broken(from.peer, &format!("it sent {bytes} bytes of elements, too few"));
        }
    }

    fn take_reply(&mut self, arrival: Arrival, now: Instant) {
        let Arrival { from, loan } = arrival;
        let peer = from.peer;
        let header = match Header::decode(&loan) {
            Ok(header) if header.kind.is_reply() => header,
            Ok(header) => return self.broken(peer, &format!("it answered with a {:?}", header.kind)),
            Err(error) => return self.broken(peer, &error.to_string()),
        };
        let body = if header.flags & FLAG_INLINE != 0 { &loan[HEADER_BYTES..] } else { &[] };
        if header.slot == u32::MAX {
            self.greeted(peer, &header, body);
        } else if self.entry(header.slot.into()).is_none_or(|entry| entry.request.header.sequence != header.sequence) {
            self.broken(peer, &format!("it answered request {}, which nobody made", header.slot));
        } else {
            self.take_answer(peer, &header, body, now);
        }
        drop(loan);
        // A peer that is lost meanwhile is reported by its own completion.
        let _ = self.wire.post_recv_loan(peer, REPLY, REPLY_BYTES);
    }

    fn take_answer(&mut self, peer: PeerId, header: &Header, body: &[u8], now: Instant) {
        let (slot, shard) = (header.slot, peer.0);
        let Some(entry) = self.entry(slot.into()) else { return };
        match header.kind {
            Kind::Done if entry.request.header.kind.pulls() => {
                self.broken(peer, "it answered a pull without elements");
            }
            Kind::Done => {
                if entry.request.keep_body
                    && let Some(call) = &entry.call
                {
                    call.keep_body(shard, body.to_vec());
                }
                self.answered(slot, Ok(Done { clock: header.clock }));
            }
            Kind::Later => {
                let until = now + entry.rest;
                entry.phase = Phase::Resting;
                entry.owed = false;
                entry.rest = (entry.rest * 2).min(REST.1);
                self.shards[shard as usize].rest(until, slot);
            }
            _ => match Refusal::decode(header.status, body) {
                Ok(refusal) => {
                    let error = self.refused(shard, slot, refusal);
                    self.answered(slot, Err(error));
                }
                Err(bad) => self.broken(peer, &bad.to_string()),
            },
        }
    }

    fn refused(&mut self, shard: u32, slot: u32, refusal: Refusal) -> PsError {
        let what = self.entry(slot.into()).and_then(|entry| entry.call.as_ref()).map(|call| call.what.to_string());
        let (address, timeout) = (self.shards[shard as usize].address.clone(), self.timeout);
        match refusal.reason {
            Reason::Waited => {
                let what = what.unwrap_or_default();
                PsError::Timeout { what: format!("{what} (shard {shard} at {address}): {refusal}"), waited: timeout }
            }
            Reason::Recovering => {
                let error = PsError::Recovering { shard, address, refusal: Box::new(refusal) };
                self.fail_fragile(&error);
                error
            }
            Reason::UnknownTable if self.shards[shard as usize].restarted => {
                PsError::ServerLost { shard, address, cause: WITHOUT_TABLES.to_owned() }
            }
            _ => PsError::Refused { shard, address, refusal: Box::new(refusal) },
        }
    }
}
