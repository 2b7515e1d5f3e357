//! Does: one peer: what it has told us, what we have to tell it, and the messages between us.

#![allow(unsafe_code)]

use super::adapter::Remote;
use super::fault::Fault;
use super::grants::{self, Grant, Grants};
use super::lane::{Carried, Lane};
use super::nic::Nic;
use super::proposal::{MAX_LANES, Proposal};
use super::record::Record;
use super::registered_pool::Lent;
use super::settings::VerbsConfig;
pub(super) use super::under_way::{Access, Large, Part, Remotely};
use super::watching::Ring;
use crate::credit::Held;
use crate::flights::{Cargo, Flights};
use crate::inbox::{Inbox, Payload, Receive, Reply};
use crate::pool::Pool;
use crate::region::Loan;
use crate::slab::Slab;
use crate::{
    Completion, Config, Envelope, LossCause, PeerId, PeerName, RecvLoan, RegisterError, Tag, Traffic, TransportError,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a slot: a frame.
pub(super) const SLOT_BYTES: usize = 8192;
/// What a message takes of the window beside its bytes.
pub(super) const MESSAGE_COST: u64 = 64;

/// Why a link ends: its peer broke the rules.
pub(super) type Broken = &'static str;

/// What waits for room in a frame.
pub(super) enum Out {
    Message { flight: u64, to: Envelope, cargo: Cargo },
    Answer(Reply),
    Put { key: u64 },
    Get { key: u64 },
}

/// How frames travel now.
#[derive(Debug)]
pub(super) enum Phase {
    /// Not at all: our proposal is on its way, or none has been made.
    Apart { since: Option<Instant> },
    /// By queue pairs.
    Up,
    /// Over sockets, for this reason.
    Sockets(String),
}

/// A peer.
pub(super) struct Link {
    pub(super) peer: PeerId,
    pub(super) name: PeerName,
    pub(super) inbox: Inbox,
    pub(super) flights: Flights,
    pub(super) lost: Option<TransportError>,
    pub(super) phase: Phase,
    pub(super) epoch: u32,
    /// How long its answer to the last proposal is waited for before its host is asked for, again.
    pub(super) patience: Duration,
    pub(super) ours: Option<Proposal>,
    /// When the queue pairs failed lately.
    pub(super) failures: Vec<Instant>,
    /// Why they are of no use any more, once that shows.
    pub(super) fault: Option<Fault>,
    pub(super) last_fault: Option<Fault>,
    pub(super) lanes: Vec<Lane>,
    /// Whether its device has completed anything since it was last looked at, and when it had.
    pub(super) active: bool,
    pub(super) heard: Instant,
    /// Whether a probe is under way.
    pub(super) probing: bool,
    pub(super) heard_goodbye: bool,
    pub(super) said_goodbye: bool,
    pub(super) queue: VecDeque<Out>,
    pub(super) announced: Slab<(u64, Cargo)>,
    pub(super) large: Slab<Large>,
    pub(super) writing: VecDeque<u64>,
    pub(super) remotely: Slab<Remotely>,
    pub(super) grants: Grants,
    /// What waits for credit, where that is granted.
    pub(super) held: Option<Held>,
    pub(super) slots: usize,
    /// The slots: half of them to send from, half to receive in.
    memory: Lent,
    pub(super) slot_key: u32,
    pub(super) ring: Ring,
    /// Where a piece is put together.
    pub(super) piece: Vec<u8>,
    /// Bytes of the frame that is being written; `None` where none is.
    pub(super) frame: Option<usize>,
    /// Length of the frame in each slot.
    pub(super) lengths: Vec<usize>,
    /// Frames written into slots, and of those the ones whose slots are free again, since the start.
    pub(super) frames_made: u64,
    pub(super) frames_freed: u64,
    /// Frames to go over the sockets.
    pub(super) carried: VecDeque<Vec<u8>>,
    pub(super) window_bytes: u64,
    pub(super) eager_bytes: usize,
    max_message_bytes: usize,
    max_unmatched: usize,
    pub(super) spent: u64,
    pub(super) taken: u64,
    pub(super) told: u64,
    pub(super) sent: (u64, u64),
    /// Bytes and numbers of what was read out of the peer's memory.
    fetched: (u64, u64),
}

impl Link {
    /// A link without queue pairs, with its slots.
    ///
    /// # Errors
    /// The device's, when the slots cannot be registered.
    pub(super) fn new(
        (peer, name, now): (PeerId, PeerName, Instant),
        (config, verbs): (&Config, &VerbsConfig),
        pool: Arc<Pool>,
        nic: &mut Nic,
    ) -> Result<Self, RegisterError> {
        // A power of two, so that no place is found by a division.
        let slots = 1 << verbs.slots.clamp(4, 256).min(nic.limits.recv_depth).max(1).ilog2();
        let lanes = verbs.queue_pairs.clamp(1, MAX_LANES);
        let (memory, lease) = nic.slots(2 * slots * SLOT_BYTES)?;
        Ok(Self {
            peer,
            inbox: Inbox::new(peer, name.clone(), pool),
            name,
            flights: Flights::default(),
            lost: None,
            phase: Phase::Apart { since: None },
            patience: Duration::ZERO,
            epoch: 0,
            ours: None,
            failures: Vec::new(),
            fault: None,
            last_fault: None,
            lanes: (0..lanes).map(|_| Lane::new(nic.limits.send_depth)).collect(),
            active: true,
            heard: now,
            probing: false,
            heard_goodbye: false,
            said_goodbye: false,
            queue: VecDeque::new(),
            announced: Slab::default(),
            large: Slab::default(),
            writing: VecDeque::new(),
            remotely: Slab::default(),
            grants: Grants::default(),
            held: config.credit.filter(|settings| !settings.marked).map(|_| Held::default()),
            slots,
            memory,
            slot_key: lease.local,
            ring: Ring::new(slots, nic)?,
            piece: Vec::new(),
            frame: None,
            lengths: vec![0; slots],
            frames_made: 0,
            frames_freed: 0,
            carried: VecDeque::new(),
            window_bytes: config.window_bytes as u64,
            eager_bytes: verbs.eager_bytes.min(SLOT_BYTES - 2 * super::record::EAGER_BYTES),
            max_message_bytes: config.max_message_bytes,
            max_unmatched: config.queue_depth + config.window_bytes / MESSAGE_COST as usize,
            spent: 0,
            taken: 0,
            told: 0,
            sent: (0, 0),
            fetched: (0, 0),
        })
    }

    pub(super) fn traffic(&self) -> Traffic {
        let ((bytes, messages), (fetched, reads)) = (self.inbox.received, self.fetched);
        Traffic::of(self.sent, (bytes + fetched, messages + reads))
    }

    /// Which slot frame `number` lies in.
    pub(super) fn place(&self, number: u64) -> usize {
        number as usize & (self.slots - 1)
    }

    /// Where the slot that frame `number` lies in begins.
    pub(super) fn send_slot(&self, number: u64) -> usize {
        self.memory.address + self.place(number) * SLOT_BYTES
    }

    /// Where receive slot `slot` begins.
    pub(super) fn recv_slot(&self, slot: usize) -> usize {
        self.memory.address + (self.slots + slot) * SLOT_BYTES
    }

    /// The first `bytes` bytes of frame `number`.
    pub(super) fn slot_bytes(&self, number: u64, bytes: usize) -> &[u8] {
        let start = self.send_slot(number) as *const u8;
        // SAFETY: the slot lies within our send slots, which live as long as the link; a frame that is made is not written.
        unsafe { std::slice::from_raw_parts(start, bytes) }
    }

    /// The slot that is being written.
    pub(super) fn open_slot(&mut self) -> &mut [u8] {
        let start = self.send_slot(self.frames_made) as *mut u8;
        // SAFETY: the slot lies within our send slots, which live as long as the link; no work request names it, since its last
        // frame has ended, and `&mut self` keeps other writers away.
        unsafe { std::slice::from_raw_parts_mut(start, SLOT_BYTES) }
    }

    /// Sends a message: at once where nothing is before it, it is small and there is room.
    pub(super) fn post(&mut self, to: Envelope, cargo: Cargo, nic: &mut Nic, done: &mut Vec<Completion>) {
        let free = self.queue.is_empty() && self.flights.is_free(to.tag);
        if free && self.write_eager(to, &cargo, nic) {
            done.extend(cargo.into_slice().map(|slice| Completion::Sent { to, slice }));
            self.end_frame(nic);
            return;
        }
        let flight = self.flights.begin(to);
        self.queue.push_back(Out::Message { flight, to, cargo });
    }

    /// Sends a small message where nothing at all is before it and there is room; whether it did. It has ended then.
    pub(super) fn post_small(&mut self, to: Envelope, payload: &[u8], nic: &mut Nic) -> bool {
        let free = self.lost.is_none() && self.queue.is_empty() && self.flights.len() == 0;
        let written = free && self.write_eager(to, payload, nic);
        if written {
            self.end_frame(nic);
        }
        written
    }

    /// A receive is posted.
    pub(super) fn receive(&mut self, tag: Tag, receive: Receive, done: &mut Vec<Completion>) {
        if let Some(reply) = self.inbox.post(tag, receive, done) {
            self.answer(reply);
        }
    }

    /// Messages for which the peer has no receive yet, or that wait for room.
    pub(super) fn wants_to_write(&self) -> bool {
        self.lost.is_none() && (self.frame.is_some() || !self.queue.is_empty() || !self.writing.is_empty())
    }

    /// A receive of lane `at` was met by a frame in slot `slot`, or by a write's word.
    pub(super) fn received(
        &mut self,
        (at, slot, bytes): (usize, usize, usize),
        word: Option<u32>,
        nic: &mut Nic,
        done: &mut Vec<Completion>,
    ) -> Result<(), Broken> {
        self.lanes[at].posted -= 1;
        self.lanes[at].received += 1;
        match word {
            Some(word) => self.part_came(word, nic, done)?,
            None if at == 0 && slot < self.slots && bytes <= SLOT_BYTES => {
                // SAFETY: the slot lies within our receive slots, which live as long as the link, and the device does not write
                // it before it is posted anew, below.
                let frame = unsafe { std::slice::from_raw_parts(self.recv_slot(slot) as *const u8, bytes) };
                self.take_frame(frame, nic, done)?;
                self.came_small(bytes, nic);
            }
            None => return Err("a frame where none may come"),
        }
        self.post_receive(at, slot, nic);
        Ok(())
    }

    /// Takes a frame that came over the sockets.
    pub(super) fn carry_in(&mut self, frame: &[u8], nic: &mut Nic, done: &mut Vec<Completion>) -> Result<(), Broken> {
        self.lanes[0].received += 1;
        self.take_frame(frame, nic, done)
    }

    #[inline(always)]
    pub(super) fn take_frame(
        &mut self,
        mut frame: &[u8],
        nic: &mut Nic,
        done: &mut Vec<Completion>,
    ) -> Result<(), Broken> {
        while !frame.is_empty() {
            let record = Record::decode(&mut frame)?;
            if self.inbox.unmatched() > self.max_unmatched {
                return Err("more messages that nobody waits for than it may send");
            }
            nic.turn += 1;
            match record {
                Record::Eager { tag, note, payload } => {
                    let (from, cost) = (Envelope { peer: self.peer, tag, note }, payload.len() as u64 + MESSAGE_COST);
                    self.inbox.deliver(from, Payload::Bytes(payload), cost, nic.turn, done);
                }
                record => self.take(record, nic, done)?,
            }
        }
        Ok(())
    }

    /// Takes a record that carries no whole message.
    fn take(&mut self, record: Record<'_>, nic: &mut Nic, done: &mut Vec<Completion>) -> Result<(), Broken> {
        const NOT_OFFERED: Broken = "an answer to what was not offered";
        match record {
            // Its taker has seen to it.
            Record::Eager { .. } => {}
            Record::Announce { tag, note, bytes, id } => {
                let bytes = usize::try_from(bytes).ok().filter(|&bytes| bytes <= self.max_message_bytes);
                let bytes = bytes.ok_or("a message longer than is taken (Config::max_message_bytes)")?;
                let from = Envelope { peer: self.peer, tag, note };
                if let Some(reply) = self.inbox.announce(from, bytes, id, nic.turn, done) {
                    self.answer(reply);
                }
            }
            Record::Grant { id, address, rkey, key } => {
                let (flight, cargo) = self.announced.remove(id).ok_or(NOT_OFFERED)?;
                self.begin_large(flight, cargo, (Remote { address, key: rkey }, key), nic);
            }
            Record::Refuse { id, capacity } => {
                let (flight, cargo) = self.announced.remove(id).ok_or(NOT_OFFERED)?;
                let Envelope { tag, note, .. } = self.flights.to(flight).ok_or(NOT_OFFERED)?;
                let capacity = usize::try_from(capacity).unwrap_or(usize::MAX);
                let (peer, bytes) = (Box::new(self.name.clone()), cargo.len());
                let error = TransportError::MessageTooLong { peer, tag, note, bytes, capacity };
                self.flights.end(flight, cargo.into_slice(), Some(error), done);
            }
            Record::Credit { lane, returned, taken } => {
                let lane = self.lanes.get_mut(usize::from(lane)).ok_or("credit for a lane that there is not")?;
                lane.on_credit(returned).ok_or("more receives than there are")?;
                if taken < self.taken || taken > self.spent {
                    return Err("it took more of its window than was sent");
                }
                self.taken = taken;
            }
            Record::Piece { key, offset, payload } => self.piece_came(key, offset, payload, nic, done)?,
            Record::Goodbye => self.heard_goodbye = true,
        }
        Ok(())
    }

    fn part_came(&mut self, word: u32, nic: &mut Nic, done: &mut Vec<Completion>) -> Result<(), Broken> {
        let (key, parts) = grants::split(word);
        let grant = self.grants.get_mut(key).ok_or("bytes of a message that was not granted")?;
        let left = grant.parts_left.get_or_insert(parts);
        *left = left.checked_sub(1).ok_or("a message of no parts")?;
        if *left > 0 {
            return Ok(());
        }
        let Some(Grant { inbox, bytes, lease, loan, .. }) = self.grants.remove(key) else { return Ok(()) };
        self.count_came(bytes);
        lease.into_iter().for_each(|lease| nic.registrations.release(lease));
        match loan {
            Some(loan) => self.inbox.fill(inbox, 0, Payload::Loan(RecvLoan(loan)), done),
            None => self.inbox.filled(inbox, done),
        }
    }

    fn piece_came(
        &mut self,
        key: u32,
        offset: u64,
        payload: &[u8],
        nic: &mut Nic,
        done: &mut Vec<Completion>,
    ) -> Result<(), Broken> {
        let grant = self.grants.get_mut(key).ok_or("bytes of a message that was not granted")?;
        let (inbox, last) = (grant.inbox, offset.checked_add(payload.len() as u64) == Some(grant.bytes as u64));
        self.inbox.fill(inbox, offset, Payload::Bytes(payload), done)?;
        if last && let Some(Grant { bytes, lease, .. }) = self.grants.remove(key) {
            self.count_came(bytes);
            lease.into_iter().for_each(|lease| nic.registrations.release(lease));
        }
        Ok(())
    }

    /// Where the peer may write a message, told in a record; memory that cannot be registered is filled in pieces.
    pub(super) fn grant(&mut self, reply: Reply, nic: &mut Nic) -> Record<'static> {
        let (id, inbox, whole) = match reply {
            Reply::Grant { id, key, whole } => (id, key, whole),
            Reply::Refuse { id, capacity } => return Record::Refuse { id, capacity: capacity as u64 },
        };
        let bytes = self.inbox.bytes_of(inbox);
        let (mut lease, mut loan, mut place) = (None, None::<Loan>, (0, 0));
        if matches!(self.phase, Phase::Up) && bytes > 0 {
            if whole {
                if let Some((lent, key)) = nic.buffer(bytes) {
                    place = (lent.address as u64, key);
                    loan = Some(lent.loan);
                }
            } else if let Some(slice) = self.inbox.slice_of(inbox) {
                lease = nic.lease(slice.region(), slice.range().start..slice.range().start + bytes, true);
                let address = slice.region().as_ptr() as u64 + slice.range().start as u64;
                place = lease.map_or((0, 0), |lease| (address, lease.remote));
            }
        }
        let key = self.grants.insert(Grant { inbox, bytes, lease, loan, parts_left: None });
        let key = key.expect("whoever asks for a grant has seen that there is room");
        Record::Grant { id, address: place.0, rkey: place.1, key }
    }

    /// Ends everything with `error`. Nothing that was lent is reached by the device any more.
    pub(super) fn end(&mut self, error: &TransportError, nic: &mut Nic, done: &mut Vec<Completion>) {
        if self.lost.is_some() {
            return;
        }
        self.close(nic);
        self.lost = Some(error.clone());
        done.push(Completion::PeerDown { peer: self.peer, error: error.clone() });
        let mut cut = Vec::new();
        for out in std::mem::take(&mut self.queue) {
            if let Out::Message { flight, cargo, .. } = out {
                cut.push((flight, cargo));
            }
        }
        cut.extend(self.announced.take_all());
        let larges = self.large.take_all();
        let leases = larges.iter().filter_map(|large| large.lease);
        leases.for_each(|lease| nic.registrations.release(lease));
        cut.extend(larges.into_iter().map(|large| (large.flight, large.cargo)));
        let peer = self.peer;
        for Remotely { lease, what, .. } in self.remotely.take_all() {
            lease.into_iter().for_each(|lease| nic.registrations.release(lease));
            match what {
                Access::Put { flight, cargo } => cut.push((flight, cargo)),
                Access::Get { from, slice } => {
                    let failed =
                        Completion::RecvFailed { peer, tag: from.tag, slice: Some(slice), error: error.clone() };
                    done.push(failed);
                }
            }
        }
        for (flight, cargo) in cut {
            self.flights.end(flight, cargo.into_slice(), Some(error.clone()), done);
        }
        let leases = self.grants.take_all().filter_map(|grant| grant.lease);
        leases.for_each(|lease| nic.registrations.release(lease));
        self.inbox.end_all(error, done);
        (self.writing, self.carried, self.frame) = (VecDeque::new(), VecDeque::new(), None);
    }

    /// Ends the queue pairs; the device reaches nothing of this link's from now on.
    pub(super) fn close(&mut self, nic: &mut Nic) {
        for lane in &mut self.lanes {
            if let Some(queue_pair) = lane.queue_pair.take() {
                nic.adapter.close(queue_pair);
            }
            lane.posted = 0;
        }
    }

    /// The error for a peer that is gone, with why.
    pub(super) fn loss(&self, cause: LossCause) -> TransportError {
        TransportError::PeerLost { peer: Box::new(self.name.clone()), cause }
    }

    /// A work request of lane `at` has been done.
    pub(super) fn ended(&mut self, at: usize, carried: Carried, nic: &mut Nic, done: &mut Vec<Completion>) {
        match carried {
            Carried::Frame => self.frames_freed += 1,
            Carried::Chunk { .. } | Carried::Word => {}
            Carried::Probe => self.probing = false,
            Carried::Part { key, .. } => {
                if let Some(large) = self.large.get_mut(key) {
                    large.parts[at].delivered = true;
                    if !large.parts.iter().any(Part::is_open) {
                        self.finish_large(key, nic, done);
                    }
                }
            }
            Carried::Put { key } | Carried::Get { key } => {
                let Some(remotely) = self.remotely.remove(key) else { return };
                let bytes = remotely.bytes();
                let Remotely { lease, what, direct, .. } = remotely;
                lease.into_iter().for_each(|lease| nic.registrations.release(lease));
                match what {
                    Access::Put { flight, cargo } => {
                        self.count_sent(bytes);
                        self.flights.end(flight, cargo.into_slice(), None, done);
                    }
                    Access::Get { from, slice } => {
                        if let Some(Err(error)) = direct.map(|direct| direct.memory.device().flush_rdma_writes()) {
                            let error = TransportError::io("flush what came for a GPU", std::io::Error::other(error));
                            let (peer, tag, slice) = (self.peer, from.tag, Some(slice));
                            return done.push(Completion::RecvFailed { peer, tag, slice, error });
                        }
                        self.fetched = (self.fetched.0 + bytes as u64, self.fetched.1 + 1);
                        done.push(Completion::Received { from, slice, bytes });
                    }
                }
            }
        }
    }

    /// A large message has been delivered.
    pub(super) fn finish_large(&mut self, key: u64, nic: &mut Nic, done: &mut Vec<Completion>) {
        self.writing.retain(|other| *other != key);
        if let Some(large) = self.large.remove(key) {
            large.lease.into_iter().for_each(|lease| nic.registrations.release(lease));
            self.count_sent(large.cargo.len());
            self.flights.end(large.flight, large.cargo.into_slice(), None, done);
        }
    }

    pub(super) fn count_sent(&mut self, bytes: usize) {
        self.sent.0 += bytes as u64;
        self.sent.1 += 1;
    }
}
