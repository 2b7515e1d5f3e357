//! Does: one peer on the same host: what goes into its ring, and what comes out of ours.

use super::ring::{ABORTED, CLOSED, GOODBYE, INLINE_BYTES, Inlet, Kind, Outlet, PairMemory, Record, SLOT_BYTES, SLOTS};
use crate::credit::{Held, UNASKED_BYTES, UNASKED_WINDOW};
use crate::flights::{Cargo, Flights};
use crate::inbox::{Inbox, Payload, Receive, Reply};
use crate::pool::Pool;
use crate::region::{BufferHome, Loan};
use crate::slab::Slab;
use crate::{
    Completion, Config, Envelope, LossCause, PeerId, PeerName, RegionSlice, SendLoan, Tag, Traffic, TransportError,
};
use std::collections::VecDeque;
use std::sync::Arc;

/// Bytes of a large message copied at a time: the receiver copies one out while we copy the next one in.
const PIECE_BYTES: usize = 128 << 10;
/// What a message takes of the window beside its bytes.
const MESSAGE_COST: u64 = 64;
/// Records read before others get their turn.
const TURN_RECORDS: usize = 256;
/// Turns after which a full ring has been read.
const RING_TURNS: usize = 16;
/// Pieces written before others get their turn.
const TURN_PIECES: usize = 4;
/// Slots of the peer that our caller may hold; beyond, messages are copied out, so that the peer can always go on.
const HELD: u32 = SLOTS / 2;
/// "No slot" in a record.
const NONE: u64 = u64::MAX;

/// Why a link ends: its peer broke the rules.
type Broken = &'static str;

pub(super) enum Out {
    Message { flight: u64, to: Envelope, cargo: Cargo },
    Answer(Reply),
}

struct Large {
    flight: u64,
    key: u64,
    cargo: Cargo,
    sent: usize,
    whole: bool,
}

enum Written {
    /// All of it has been copied, or its slot handed over; the slice that was posted.
    Whole(Option<RegionSlice>),
    /// It does not fit the window: the peer must ask for it.
    TooMuch(Cargo),
    /// There is no room.
    Blocked(Cargo),
}

/// A peer of this host.
pub(super) struct Link {
    pub(super) peer: PeerId,
    pub(super) name: PeerName,
    pub(super) inbox: Inbox,
    pub(super) flights: Flights,
    pub(super) lost: Option<TransportError>,
    /// Its process has ended.
    pub(super) dead: bool,
    pool: Arc<Pool>,
    outlet: Outlet,
    inlet: Inlet,
    pub(super) queue: VecDeque<Out>,
    /// What waits for credit, where that is granted.
    pub(super) held: Option<Held>,
    announced: Slab<(u64, Cargo)>,
    large: VecDeque<Large>,
    window_bytes: u64,
    eager_bytes: usize,
    max_message_bytes: usize,
    max_unmatched: usize,
    /// What our messages took of the peer's window since the start, and how much of it the peer had taken when we looked.
    spent: u64,
    taken: u64,
    told: u64,
    sent: (u64, u64),
}

impl Link {
    pub(super) fn new(peer: PeerId, name: PeerName, memory: PairMemory, config: &Config, pool: Arc<Pool>) -> Self {
        let memory = Arc::new(memory);
        // As over TCP: where one end grants, both do, and little goes unasked.
        let grants = super::granting::grants(config);
        let (eager, window) = if grants { (UNASKED_BYTES, UNASKED_WINDOW) } else { (SLOT_BYTES, usize::MAX) };
        Self {
            peer,
            inbox: Inbox::new(peer, name.clone(), Arc::clone(&pool)),
            name,
            flights: Flights::default(),
            lost: None,
            dead: false,
            pool,
            outlet: Outlet::new(Arc::clone(&memory)),
            inlet: Inlet::new(memory),
            queue: VecDeque::new(),
            held: grants.then(Held::default),
            announced: Slab::default(),
            large: VecDeque::new(),
            window_bytes: config.window_bytes.min(window) as u64,
            eager_bytes: config.eager_bytes.min(eager),
            max_message_bytes: config.max_message_bytes,
            max_unmatched: config.queue_depth + config.window_bytes / MESSAGE_COST as usize,
            spent: 0,
            taken: 0,
            told: 0,
            sent: (0, 0),
        }
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic::of(self.sent, self.inbox.received)
    }

    pub(super) fn memory(&self) -> &PairMemory {
        &self.outlet.memory
    }

    /// Memory to write a message in: a slot where there is one to spare and it pays, else a buffer.
    pub(super) fn lend(&mut self, bytes: usize) -> SendLoan {
        if bytes > INLINE_BYTES
            && bytes <= SLOT_BYTES
            && self.lost.is_none()
            && let Ok(Some(slot)) = self.outlet.take_slot(true)
        {
            return self.outlet.memory.lend(slot, bytes);
        }
        let home: Arc<dyn BufferHome> = Arc::clone(&self.pool) as _;
        SendLoan(Loan::of_buffer(self.pool.take(bytes), bytes, home))
    }

    /// Sends a message: at once where nothing is before it and there is room.
    pub(super) fn post(&mut self, to: Envelope, cargo: Cargo, done: &mut Vec<Completion>) -> Result<(), Broken> {
        if !self.queue.is_empty() || !self.flights.is_free(to.tag) {
            let flight = self.flights.begin(to);
            self.queue.push_back(Out::Message { flight, to, cargo });
            return self.flush(done);
        }
        match self.write(to, cargo)? {
            Written::Whole(slice) => {
                done.extend(slice.map(|slice| Completion::Sent { to, slice }));
                self.memory().ring_bell();
            }
            Written::TooMuch(cargo) => {
                let flight = self.flights.begin(to);
                self.queue.push_back(Out::Message { flight, to, cargo });
                return self.flush(done);
            }
            Written::Blocked(cargo) => {
                let flight = self.flights.begin(to);
                self.queue.push_back(Out::Message { flight, to, cargo });
            }
        }
        Ok(())
    }

    /// A receive is posted.
    pub(super) fn receive(&mut self, tag: Tag, receive: Receive, done: &mut Vec<Completion>) -> Result<(), Broken> {
        if let Some(reply) = self.inbox.post(tag, receive, done) {
            self.answer(reply);
            self.flush(done)?;
        }
        self.give_credit();
        Ok(())
    }

    /// Whether something is to be written that could not be yet.
    pub(super) fn wants_to_write(&self) -> bool {
        self.lost.is_none() && (!self.queue.is_empty() || !self.large.is_empty())
    }

    /// Whether something happened that is worth a poll.
    pub(super) fn has_news(&mut self) -> bool {
        if self.lost.is_some() {
            return false;
        }
        let writable = self.wants_to_write() && self.outlet.has_news();
        writable || self.dead || self.inlet.has_record() || self.memory().gone() != 0
    }

    /// Moves what can be moved.
    pub(super) fn progress(&mut self, turn: &mut u64, done: &mut Vec<Completion>) {
        if self.lost.is_some() {
            return;
        }
        // Looked at first: what was written before the end is then there to be read.
        let gone = match self.memory().gone() {
            0 if self.dead => CLOSED,
            gone => gone,
        };
        let moved = self.read(turn, done).and_then(|drained| self.flush(done).map(|()| drained));
        match moved {
            Err(broken) => self.break_off(broken, done),
            Ok(true) if gone != 0 => {
                let cause = match gone {
                    GOODBYE => LossCause::Goodbye,
                    ABORTED => LossCause::Aborted(self.memory().text()),
                    _ => LossCause::Closed,
                };
                self.lose(cause, done);
            }
            Ok(_) => {}
        }
    }

    /// Ends the link because the peer broke the rules.
    pub(super) fn break_off(&mut self, broken: Broken, done: &mut Vec<Completion>) {
        self.lose(LossCause::Protocol(broken.to_owned()), done);
    }

    fn lose(&mut self, cause: LossCause, done: &mut Vec<Completion>) {
        let error = TransportError::PeerLost { peer: Box::new(self.name.clone()), cause };
        self.end(&error, done);
    }

    /// Takes what the peer has written, then ends everything with `error`: another wire has found it to be gone.
    pub(super) fn end_after_reading(&mut self, error: &TransportError, turn: &mut u64, done: &mut Vec<Completion>) {
        for _ in 0..RING_TURNS {
            if self.lost.is_some() || !matches!(self.read(turn, done), Ok(false)) {
                break;
            }
        }
        self.end(error, done);
    }

    /// Ends everything with `error`, and tells the peer if it is still there.
    pub(super) fn end(&mut self, error: &TransportError, done: &mut Vec<Completion>) {
        if self.lost.is_some() {
            return;
        }
        self.lost = Some(error.clone());
        let text = match error {
            TransportError::PeerLost { cause: LossCause::Aborted(reason), .. } => reason.clone(),
            other => other.to_string(),
        };
        self.memory().leave(ABORTED, &text);
        done.push(Completion::PeerDown { peer: self.peer, error: error.clone() });
        let mut cut = Vec::new();
        for out in std::mem::take(&mut self.queue) {
            if let Out::Message { flight, cargo, .. } = out {
                cut.push((flight, cargo));
            }
        }
        cut.extend(self.announced.take_all());
        cut.extend(std::mem::take(&mut self.large).into_iter().map(|large| (large.flight, large.cargo)));
        for (flight, cargo) in cut {
            self.flights.end(flight, cargo.into_slice(), Some(error.clone()), done);
        }
        self.inbox.end_all(error, done);
    }

    /// Reads what is in the ring; whether it is empty now.
    fn read(&mut self, turn: &mut u64, done: &mut Vec<Completion>) -> Result<bool, Broken> {
        for _ in 0..TURN_RECORDS {
            let Some((record, length)) = self.inlet.next()? else {
                self.give_credit();
                return Ok(true);
            };
            *turn += 1;
            self.take(&record, length, *turn, done)?;
            self.inlet.consume(length);
        }
        self.give_credit();
        Ok(false)
    }

    fn take(&mut self, record: &Record, length: usize, turn: u64, done: &mut Vec<Completion>) -> Result<(), Broken> {
        if self.inbox.unmatched() > self.max_unmatched {
            return Err("more messages that nobody waits for than it may send");
        }
        let from = Envelope { peer: self.peer, tag: Tag(record.tag), note: record.note };
        match record.kind {
            Kind::Eager => {
                let payload = Payload::Bytes(self.inlet.payload(length));
                self.inbox.deliver(from, payload, length as u64 + MESSAGE_COST, turn, done);
            }
            Kind::EagerSlot => {
                let loan = slot_of(record)?;
                let cost = loan.1 as u64 + MESSAGE_COST;
                let keep = self.outlet.memory.held() < HELD;
                let loan = self.outlet.memory.read_slot(loan.0, loan.1);
                if keep {
                    self.inbox.deliver(from, Payload::Loan(loan), cost, turn, done);
                } else {
                    self.inbox.deliver(from, Payload::Bytes(&loan), cost, turn, done);
                }
            }
            Kind::Announce => {
                let bytes = usize::try_from(record.bytes).ok().filter(|&bytes| bytes <= self.max_message_bytes);
                let bytes = bytes.ok_or("a message longer than GRADWIRE takes (Config::max_message_bytes)")?;
                if let Some(reply) = self.inbox.announce(from, bytes, record.id, turn, done) {
                    self.answer(reply);
                }
            }
            Kind::Grant => {
                let (flight, cargo) = self.announced.remove(record.id).ok_or("an answer to what was not offered")?;
                let whole = record.note != 0 && cargo.len() <= SLOT_BYTES;
                self.large.push_back(Large { flight, key: record.slot, cargo, sent: 0, whole });
            }
            Kind::Refuse => {
                let (flight, cargo) = self.announced.remove(record.id).ok_or("an answer to what was not offered")?;
                let Envelope { tag, note, .. } = self.flights.to(flight).ok_or("an answer to what was not offered")?;
                let capacity = usize::try_from(record.bytes).unwrap_or(usize::MAX);
                let (peer, bytes) = (Box::new(self.name.clone()), cargo.len());
                let error = TransportError::MessageTooLong { peer, tag, note, bytes, capacity };
                self.flights.end(flight, cargo.into_slice(), Some(error), done);
            }
            Kind::Piece if record.slot == NONE => {
                self.inbox.fill(record.id, record.note, Payload::Bytes(&[]), done)?;
            }
            Kind::Piece => {
                let (slot, bytes) = slot_of(record)?;
                self.held.iter_mut().for_each(|held| held.count(bytes));
                let keep = self.outlet.memory.held() < HELD;
                let loan = self.outlet.memory.read_slot(slot, bytes);
                let payload = if keep { Payload::Loan(loan) } else { return self.copy_piece(record, &loan, done) };
                self.inbox.fill(record.id, record.note, payload, done)?;
            }
        }
        Ok(())
    }

    fn copy_piece(&mut self, record: &Record, bytes: &[u8], done: &mut Vec<Completion>) -> Result<(), Broken> {
        self.inbox.fill(record.id, record.note, Payload::Bytes(bytes), done)
    }

    /// Tells the peer how much of its window is free again, once it is worth telling.
    fn give_credit(&mut self) {
        if self.inbox.taken - self.told >= self.window_bytes / 4 {
            self.told = self.inbox.taken;
            self.memory().set_taken(self.told);
        }
    }

    /// Writes what there is room for.
    pub(super) fn flush(&mut self, done: &mut Vec<Completion>) -> Result<(), Broken> {
        if self.queue.is_empty() && self.large.is_empty() {
            return Ok(());
        }
        while let Some(out) = self.queue.pop_front() {
            match out {
                Out::Answer(reply) => {
                    if !self.outlet.write(&answer(reply), &[])? {
                        self.queue.push_front(Out::Answer(reply));
                        break;
                    }
                }
                Out::Message { flight, to, cargo } => match self.write(to, cargo)? {
                    Written::Whole(slice) => self.flights.end(flight, slice, None, done),
                    Written::Blocked(cargo) => {
                        self.queue.push_front(Out::Message { flight, to, cargo });
                        break;
                    }
                    Written::TooMuch(cargo) => {
                        let bytes = cargo.len() as u64;
                        let id = self.announced.insert((flight, cargo));
                        let (tag, note) = (to.tag.0, to.note);
                        let record = Record { tag, note, bytes, id, ..Record::new(Kind::Announce) };
                        if !self.outlet.write(&record, &[])? {
                            if let Some((flight, cargo)) = self.announced.remove(id) {
                                self.queue.push_front(Out::Message { flight, to, cargo });
                            }
                            break;
                        }
                    }
                },
            }
        }
        self.write_pieces(done)?;
        self.memory().ring_bell();
        Ok(())
    }

    /// Writes a message that may go unasked.
    fn write(&mut self, to: Envelope, cargo: Cargo) -> Result<Written, Broken> {
        let bytes = cargo.len();
        let cost = bytes as u64 + MESSAGE_COST;
        let lent = self.lent_slot(&cargo);
        if bytes > self.eager_bytes && lent.is_none() || !self.has_window(cost)? {
            return Ok(Written::TooMuch(cargo));
        }
        let mut record = Record { tag: to.tag.0, note: to.note, bytes: bytes as u64, ..Record::new(Kind::Eager) };
        let written = if bytes <= INLINE_BYTES {
            self.outlet.write(&record, &cargo)?
        } else {
            record.kind = Kind::EagerSlot;
            self.write_slot(&record, &cargo, lent)?
        };
        if !written {
            return Ok(Written::Blocked(cargo));
        }
        self.spent += cost;
        self.count(bytes);
        Ok(Written::Whole(let_go(cargo, lent)))
    }

    /// Writes a record whose payload lies, or is put, in a slot.
    fn write_slot(&mut self, record: &Record, payload: &[u8], lent: Option<u32>) -> Result<bool, Broken> {
        let slot = match lent {
            Some(slot) => slot,
            None => match self.outlet.take_slot(false)? {
                Some(slot) => slot,
                None => return Ok(false),
            },
        };
        if lent.is_none() {
            self.outlet.fill(slot, payload);
        }
        let written = self.outlet.write(&Record { slot: u64::from(slot), ..*record }, &[])?;
        if written {
            self.outlet.slot_sent(slot);
        } else if lent.is_none() {
            self.outlet.slot_unused(slot);
        }
        Ok(written)
    }

    fn write_pieces(&mut self, done: &mut Vec<Completion>) -> Result<(), Broken> {
        for _ in 0..TURN_PIECES {
            let Some(mut large) = self.large.pop_front() else { break };
            let lent = self.lent_slot(&large.cargo);
            let most = if large.whole || lent.is_some() { large.cargo.len() } else { PIECE_BYTES };
            let (start, end) = (large.sent, large.cargo.len().min(large.sent + most));
            let (note, bytes) = (start as u64, (end - start) as u64);
            let record = Record { note, bytes, id: large.key, slot: NONE, ..Record::new(Kind::Piece) };
            let written = match end - start {
                0 => self.outlet.write(&record, &[])?,
                _ => self.write_slot(&record, &large.cargo[start..end], lent)?,
            };
            if !written {
                self.large.push_front(large);
                break;
            }
            large.sent = end;
            self.memory().ring_bell();
            if end < large.cargo.len() {
                self.large.push_front(large);
                continue;
            }
            self.count(end);
            self.flights.end(large.flight, let_go(large.cargo, lent), None, done);
        }
        Ok(())
    }

    fn count(&mut self, bytes: usize) {
        self.sent.0 += bytes as u64;
        self.sent.1 += 1;
    }

    /// The slot of ours that a lent message was written in, if it was.
    fn lent_slot(&self, cargo: &Cargo) -> Option<u32> {
        match cargo {
            Cargo::Loan(loan) if loan.len() > INLINE_BYTES => self.outlet.memory.slot_of(loan),
            _ => None,
        }
    }

    fn has_window(&mut self, cost: u64) -> Result<bool, Broken> {
        if self.spent - self.taken + cost > self.window_bytes {
            let taken = self.memory().taken();
            if taken < self.taken || taken > self.spent {
                return Err("it took more of its window than was sent");
            }
            self.taken = taken;
        }
        Ok(self.spent - self.taken + cost <= self.window_bytes)
    }
}

/// The slot and length that a record names, checked.
fn slot_of(record: &Record) -> Result<(u32, usize), Broken> {
    let slot = u32::try_from(record.slot).ok().filter(|&slot| slot < SLOTS);
    let bytes = usize::try_from(record.bytes).ok().filter(|&bytes| bytes <= SLOT_BYTES);
    slot.zip(bytes).ok_or("a slot that does not exist")
}

/// The slice that was posted; a loan whose slot has gone to the peer does not come home.
fn let_go(cargo: Cargo, lent: Option<u32>) -> Option<RegionSlice> {
    match cargo {
        Cargo::Slice(slice) => Some(slice),
        Cargo::Loan(loan) => {
            if lent.is_some() {
                loan.0.into_ticket();
            }
            None
        }
    }
}

fn answer(reply: Reply) -> Record {
    match reply {
        Reply::Grant { id, key, whole } => Record { id, slot: key, note: u64::from(whole), ..Record::new(Kind::Grant) },
        Reply::Refuse { id, capacity } => Record { id, bytes: capacity as u64, ..Record::new(Kind::Refuse) },
    }
}
