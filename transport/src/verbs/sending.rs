//! Does: what goes to a peer: records into frames, large messages into its memory.
//!
//! The steps of a small message are inlined into one another: their calls and returns took longer than what they do.

use super::adapter::{Remote, Span, Work};
use super::fault::Fault;
use super::grants;
use super::lane::{Carried, Lane, RESERVED};
use super::link::{Access, Large, Link, MESSAGE_COST, Out, Part, Phase, Remotely, SLOT_BYTES};
use super::nic::Nic;
use super::proposal::MAX_LANES;
use super::record::{CREDIT_BYTES, HEAD_BYTES, Record};
use super::watch::SEAL_BYTES;
use crate::flights::Cargo;
use crate::{Completion, Envelope};

/// Numbers of receives have this bit, since a completion that tells of a failure does not tell of which queue.
pub(super) const RECEIVE: u64 = 1 << 63;
/// Payload bytes of writes under way on one lane: enough to keep a fast link busy, and few enough that a small message behind
/// them does not wait long.
const WRITING_BYTES: usize = 4 << 20;
/// Bytes of one write.
const CHUNK_BYTES: usize = 1 << 20;
/// A message of less than so many bytes a lane is not cut.
const PART_BYTES: usize = 64 << 10;
/// Work requests kept free for frames.
const FRAME_ROOM: u64 = 8;
/// Frames that wait for the sockets.
const CARRIED: usize = 64;

impl Link {
    /// Writes a small message where the window and a frame have room; whether it did.
    #[inline]
    pub(super) fn write_eager(&mut self, to: Envelope, payload: &[u8], nic: &mut Nic) -> bool {
        let cost = payload.len() as u64 + MESSAGE_COST;
        let written = payload.len() <= self.eager_bytes
            && self.has_window(cost)
            && self.put(&Record::Eager { tag: to.tag, note: to.note, payload }, nic);
        if written {
            self.spent += cost;
            self.count_sent(payload.len());
        }
        written
    }

    fn has_window(&self, cost: u64) -> bool {
        self.spent - self.taken + cost <= self.window_bytes
    }

    /// Whether there is nothing to be written and nothing to be seen to.
    pub(super) fn is_quiet(&self) -> bool {
        matches!(self.phase, Phase::Up)
            && self.fault.is_none()
            && self.frame.is_none()
            && self.queue.is_empty()
            && self.writing.is_empty()
            && !self.owes_credit()
            && !self.owes_nudge()
    }

    /// Whether something that was told as sent is not known to be there.
    pub(super) fn owes(&self) -> bool {
        let settled = match self.phase {
            Phase::Up => self.fault.is_none() && self.lanes.iter().all(Lane::is_idle),
            Phase::Sockets(_) => self.carried.is_empty(),
            Phase::Apart { .. } => false,
        };
        !settled || self.frame.is_some() || !self.queue.is_empty() || self.owes_nudge()
    }

    /// Writes what there is room for.
    pub(super) fn flush(&mut self, nic: &mut Nic, done: &mut Vec<Completion>) {
        if self.lost.is_some() || matches!(self.phase, Phase::Apart { .. }) {
            return;
        }
        while let Some(out) = self.queue.pop_front() {
            if let Some(blocked) = self.write_out(out, nic, done) {
                self.queue.push_front(blocked);
                break;
            }
        }
        self.write_larges(nic, done);
        self.give_credit(nic);
        self.end_frame(nic);
        self.nudge(nic);
    }

    /// Writes one thing; gives it back where there is no room.
    fn write_out(&mut self, out: Out, nic: &mut Nic, done: &mut Vec<Completion>) -> Option<Out> {
        match out {
            Out::Answer(reply) => {
                if !self.grants.has_room() || !self.make_frame(HEAD_BYTES, nic) {
                    return Some(Out::Answer(reply));
                }
                let record = self.grant(reply, nic);
                self.put(&record, nic);
            }
            Out::Message { flight, to, cargo } => {
                if self.write_eager(to, &cargo, nic) {
                    self.flights.end(flight, cargo.into_slice(), None, done);
                    return None;
                }
                let small = cargo.len() <= self.eager_bytes && self.has_window(cargo.len() as u64 + MESSAGE_COST);
                if small || !self.make_frame(HEAD_BYTES, nic) {
                    return Some(Out::Message { flight, to, cargo });
                }
                let bytes = cargo.len() as u64;
                let id = self.announced.insert((flight, cargo));
                self.put(&Record::Announce { tag: to.tag, note: to.note, bytes, id }, nic);
            }
            Out::Put { key } => return (!self.write_remotely(key, nic)).then_some(Out::Put { key }),
            Out::Get { key } => return (!self.write_remotely(key, nic)).then_some(Out::Get { key }),
        }
        None
    }

    /// Appends a record to the frame that is being written; whether there was room.
    #[inline(always)]
    fn put(&mut self, record: &Record<'_>, nic: &mut Nic) -> bool {
        if !self.make_frame(record.bytes(), nic) {
            return false;
        }
        let at = self.frame.unwrap_or(0);
        let bytes = record.encode(&mut self.open_slot()[at..]);
        self.frame = Some(at + bytes);
        true
    }

    /// Sees to it that the frame being written has room for `bytes`; whether it has.
    #[inline(always)]
    fn make_frame(&mut self, bytes: usize, nic: &mut Nic) -> bool {
        if self.frame.is_some_and(|used| used + bytes > SLOT_BYTES) {
            self.end_full_frame(nic);
        }
        if self.frame.is_none() && self.has_slot(RESERVED) {
            self.frame = Some(0);
            self.attach_credit(self.slots as u64 / 4, bytes);
        }
        self.frame.is_some()
    }

    /// Whether a frame can be sent that leaves the peer `reserve` receives.
    #[inline(always)]
    fn has_slot(&self, reserve: u64) -> bool {
        let lane = &self.lanes[0];
        let free = self.frames_made - self.frames_freed < self.slots as u64 && lane.credits() > reserve;
        match self.phase {
            Phase::Up => free && self.fault.is_none() && lane.room() > 0,
            Phase::Sockets(_) => free && self.carried.len() < CARRIED,
            Phase::Apart { .. } => false,
        }
    }

    /// Tells of receives posted anew, where at least `least` are due on a lane, as far as that leaves room for `bytes`.
    #[inline(always)]
    fn attach_credit(&mut self, least: u64, bytes: usize) {
        if self.window_is_due() || self.lanes.iter().any(|lane| lane.due() >= least.max(1)) {
            self.attach_due_credit(least, bytes);
        }
    }

    fn attach_due_credit(&mut self, least: u64, room: usize) {
        for at in 0..self.lanes.len() {
            let (due, returned) = (self.lanes[at].due(), self.lanes[at].received);
            let window_due = at == 0 && self.window_is_due();
            if due < least.max(1) && !window_due {
                continue;
            }
            let Some(used) = self.frame.filter(|used| used + CREDIT_BYTES + room <= SLOT_BYTES) else { return };
            let taken = self.inbox.taken;
            let record = Record::Credit { lane: at as u8, returned, taken };
            let bytes = record.encode(&mut self.open_slot()[used..]);
            self.frame = Some(used + bytes);
            self.lanes[at].told = returned;
            self.told = taken;
        }
    }

    /// Whether so much credit is due that it is worth a frame of its own.
    fn owes_credit(&self) -> bool {
        let half = self.slots as u64 / 2;
        self.lanes.iter().any(|lane| lane.due() >= half) || self.window_is_due()
    }

    /// Whether so much of the peer's window has been taken that it is to be told.
    #[inline]
    fn window_is_due(&self) -> bool {
        self.inbox.taken - self.told >= self.window_bytes / 4
    }

    /// Gives credit back, in a frame of its own if need be, once half of it is due.
    fn give_credit(&mut self, nic: &mut Nic) {
        if !self.owes_credit() {
            return;
        }
        if self.frame.is_some_and(|used| used + MAX_LANES * HEAD_BYTES > SLOT_BYTES) {
            self.end_frame(nic);
        }
        if self.frame.is_none() {
            if !self.has_slot(0) {
                return;
            }
            self.frame = Some(0);
        }
        self.attach_credit(1, 0);
    }

    /// Says goodbye once everything else has been written; whether all of it has been delivered.
    pub(super) fn leave(&mut self, nic: &mut Nic) -> bool {
        let settled = !self.wants_to_write() && self.flights.len() == 0 && self.carried.is_empty();
        if settled && !self.said_goodbye && self.put(&Record::Goodbye, nic) {
            self.said_goodbye = true;
            self.end_frame(nic);
        }
        let delivered = matches!(self.phase, Phase::Sockets(_)) || self.lanes.iter().all(Lane::is_idle);
        settled
            && self.said_goodbye
            && self.carried.is_empty()
            && delivered
            && !matches!(self.phase, Phase::Apart { .. })
    }

    #[cold]
    fn end_full_frame(&mut self, nic: &mut Nic) {
        self.end_frame(nic);
    }

    /// Sends the frame that is being written.
    #[inline(always)]
    pub(super) fn end_frame(&mut self, nic: &mut Nic) {
        if let Some(bytes) = self.frame.take().filter(|&bytes| bytes > 0) {
            self.send_made(bytes, nic);
        }
    }

    /// Sends a frame of no records, or of credits; whether there was room.
    pub(super) fn send_empty(&mut self, nic: &mut Nic) -> bool {
        self.end_frame(nic);
        let free = self.has_slot(RESERVED);
        if free {
            self.frame = Some(0);
            self.attach_credit(1, 0);
            let bytes = self.frame.take().unwrap_or(0);
            self.send_made(bytes, nic);
        }
        free
    }

    #[inline(always)]
    fn send_made(&mut self, bytes: usize, nic: &mut Nic) {
        let at = self.frames_made;
        let place = self.place(at);
        self.lengths[place] = bytes;
        self.frames_made += 1;
        self.send_frame(at, nic);
    }

    /// Sends the frame of number `at`, for the first time or again.
    #[inline(always)]
    pub(super) fn send_frame(&mut self, at: u64, nic: &mut Nic) {
        let bytes = self.lengths[self.place(at)];
        // With many slots in use, each frame asks for a completion, or they would not be known to be free again; and so does a
        // goodbye, since nothing follows it.
        let asks = self.said_goodbye || self.frames_made - self.frames_freed > self.slots as u64 / 2;
        let place = self.place_there(bytes);
        match place {
            Some(_) => self.seal(at, bytes),
            None => self.ring.woken(),
        }
        let (number, signalled) = self.lanes[0].post(Carried::Frame, asks);
        let address = self.send_slot(at);
        if let Phase::Sockets(_) = self.phase {
            self.carried.push_back(self.slot_bytes(at, bytes).to_vec());
            self.lanes[0].complete(number, |_| {});
            self.frames_freed += 1;
            return;
        }
        let (bytes, work) = match place {
            Some(there) => (bytes + SEAL_BYTES, Work::Write(there, None)),
            None => (bytes, Work::Send),
        };
        let span = Span { address: address as u64, bytes: bytes as u32, key: self.slot_key };
        self.post_work(0, number, span, work, signalled, nic);
        if place.is_some() {
            self.nudge(nic);
        }
    }

    /// Whether the first lane takes one more work request that carries no frame.
    pub(super) fn has_room(&self) -> bool {
        self.lanes[0].room() > FRAME_ROOM
    }

    #[inline(always)]
    pub(super) fn post_work(&mut self, at: usize, number: u64, span: Span, work: Work, signalled: bool, nic: &mut Nic) {
        let Some(queue_pair) = self.lanes[at].queue_pair else { return };
        if let Err(error) = nic.adapter.post(queue_pair, number, span, work, signalled) {
            let what = format!("it takes no more work: {error}");
            self.fault.get_or_insert(Fault::of_device(nic.adapter.name(), queue_pair, what));
        }
    }

    /// Whether the peer, or its device, has something to do for us.
    pub(super) fn is_waiting(&self) -> bool {
        self.lost.is_none() && (self.flights.len() > 0 || self.inbox.posted() > 0 || !self.grants.is_empty())
    }

    /// Writes no bytes into the peer's memory: its device answers without its help, or ours finds it gone.
    pub(super) fn send_probe(&mut self, nic: &mut Nic) {
        if self.lanes[0].room() > FRAME_ROOM {
            let (number, signalled) = self.lanes[0].post(Carried::Probe, true);
            let (nothing, nowhere) = (Span { address: 0, bytes: 0, key: 0 }, Remote { address: 0, key: 0 });
            self.probing = true;
            self.post_work(0, number, nothing, Work::Write(nowhere, None), signalled, nic);
        }
    }

    /// Posts the receive of slot `slot` on lane `at`; lanes but the first carry no frames, and need no memory.
    pub(super) fn post_receive(&mut self, at: usize, slot: usize, nic: &mut Nic) {
        let Some(queue_pair) = self.lanes[at].queue_pair else { return };
        let (address, bytes) = if at == 0 { (self.recv_slot(slot), SLOT_BYTES) } else { (0, 0) };
        let span = Span { address: address as u64, bytes: bytes as u32, key: self.slot_key };
        self.lanes[at].posted += 1;
        if let Err(error) = nic.adapter.post_recv(queue_pair, RECEIVE | slot as u64, span) {
            self.lanes[at].posted -= 1;
            let what = format!("it takes no more receives: {error}");
            self.fault.get_or_insert(Fault::of_device(nic.adapter.name(), queue_pair, what));
        }
    }

    /// The peer has told where it wants a message that was announced.
    pub(super) fn begin_large(&mut self, flight: u64, cargo: Cargo, (remote, key): (Remote, u32), nic: &mut Nic) {
        let bytes = cargo.len();
        let remotely = remote.key != 0 && bytes > 0 && matches!(self.phase, Phase::Up);
        let lease = match &cargo {
            _ if !remotely => None,
            Cargo::Slice(slice) => nic.lease(slice.region(), slice.range(), false),
            Cargo::Loan(loan) => nic.known(loan.as_ptr() as usize, bytes),
        };
        let mut parts = [Part::default(); MAX_LANES];
        let lanes = self.lanes.len();
        if lease.is_some() && bytes >= PART_BYTES * lanes {
            let each = bytes.div_ceil(lanes).next_multiple_of(128);
            for (at, part) in parts.iter_mut().enumerate().take(lanes) {
                *part = Part::of((at * each).min(bytes), ((at + 1) * each).min(bytes));
            }
        } else {
            parts[0] = Part::of(0, bytes);
        }
        let key = self.large.insert(Large { flight, cargo, lease, remote, key, parts });
        self.writing.push_back(key);
    }

    /// Writes granted messages as far as there is room.
    fn write_larges(&mut self, nic: &mut Nic, done: &mut Vec<Completion>) {
        if self.writing.is_empty() {
            return;
        }
        for at in 0..self.lanes.len() {
            while self.write_chunk(at, nic) {}
        }
        while let Some(key) =
            self.writing.iter().copied().find(|&key| self.large.get(key).is_some_and(|large| large.lease.is_none()))
        {
            match self.write_piece(key, nic) {
                None => break,
                Some(true) => self.finish_large(key, nic, done),
                Some(false) => {}
            }
        }
    }

    /// Writes the next chunk of the first message with something left for lane `at`; whether it did.
    fn write_chunk(&mut self, at: usize, nic: &mut Nic) -> bool {
        let lane = &mut self.lanes[at];
        if !matches!(self.phase, Phase::Up)
            || self.fault.is_some()
            || lane.room() <= FRAME_ROOM
            || lane.writing_bytes >= WRITING_BYTES
        {
            return false;
        }
        let large = &mut self.large;
        let open = |key: &u64| {
            large.get(*key).is_some_and(|large| large.lease.is_some() && large.parts[at].next < large.parts[at].end)
        };
        let Some(key) = self.writing.iter().copied().find(open) else { return false };
        let Some(message) = large.get_mut(key) else { return false };
        let Some(lease) = message.lease else { return false };
        let parts = message.parts.iter().filter(|part| part.end > part.start).count() as u8;
        let part = &mut message.parts[at];
        let bytes = (part.end - part.next).min(CHUNK_BYTES.min(nic.limits.message_bytes));
        let is_last = part.next + bytes == part.end;
        if is_last && lane.credits() <= RESERVED {
            return false;
        }
        let span =
            Span { address: message.cargo.as_ptr() as u64 + part.next as u64, bytes: bytes as u32, key: lease.local };
        let remote = Remote { address: message.remote.address + part.next as u64, key: message.remote.key };
        let work = Work::Write(remote, is_last.then(|| grants::word(message.key, parts)));
        part.next += bytes;
        let carried = if is_last { Carried::Part { key, bytes } } else { Carried::Chunk { bytes } };
        let (number, signalled) = lane.post(carried, true);
        self.post_work(at, number, span, work, signalled, nic);
        true
    }

    /// Copies the next piece of a message into a frame; whether it was the last, or `None` where there is no room.
    fn write_piece(&mut self, key: u64, nic: &mut Nic) -> Option<bool> {
        const LEAST: usize = 1024;
        if !self.make_frame(LEAST, nic) {
            return None;
        }
        let used = self.frame?;
        let start = self.large.get(key)?.parts[0].next;
        // The message lies in the table and the slot in the link: both are reached by way of the table's entry alone.
        let mut slot = std::mem::take(&mut self.piece);
        let large = self.large.get_mut(key)?;
        let bytes = (large.cargo.len() - start).min((SLOT_BYTES - used - HEAD_BYTES) / 8 * 8);
        let record =
            Record::Piece { key: large.key, offset: start as u64, payload: &large.cargo[start..start + bytes] };
        slot.resize(record.bytes(), 0);
        record.encode(&mut slot);
        large.parts[0].next += bytes;
        let is_last = large.parts[0].next == large.cargo.len();
        self.open_slot()[used..used + slot.len()].copy_from_slice(&slot);
        self.frame = Some(used + slot.len());
        self.piece = slot;
        Some(is_last)
    }

    /// Posts a read or write of the peer's exposed memory, as far as there is room; whether all of it is posted.
    fn write_remotely(&mut self, key: u64, nic: &mut Nic) -> bool {
        loop {
            let lane = &mut self.lanes[0];
            if !matches!(self.phase, Phase::Up) || self.fault.is_some() || lane.room() <= FRAME_ROOM {
                return false;
            }
            let Some(remotely) = self.remotely.get_mut(key) else { return true };
            let whole = remotely.bytes();
            let Remotely { lease, remote, next, what, direct } = remotely;
            let is_put = matches!(what, Access::Put { .. });
            let (start, local) = match (direct, what) {
                (Some(direct), _) => (direct.address, direct.key),
                (None, Access::Put { cargo, .. }) => (cargo.as_ptr() as u64, lease.map_or(0, |lease| lease.local)),
                (None, Access::Get { slice, .. }) => (slice.as_ptr() as u64, lease.map_or(0, |lease| lease.local)),
            };
            let bytes = (whole - *next).min(nic.limits.message_bytes);
            let span = Span { address: start + *next as u64, bytes: bytes as u32, key: local };
            let first = (remote.key >> 32).saturating_add(remote.offset);
            let there = Remote { address: first.saturating_add(*next as u64), key: remote.key as u32 };
            let work = if is_put { Work::Write(there, None) } else { Work::Read(there) };
            *next += bytes;
            let is_last = *next == whole;
            let carried = match (is_last, is_put) {
                (false, _) => Carried::Chunk { bytes },
                (true, true) => Carried::Put { key },
                (true, false) => Carried::Get { key },
            };
            let (number, signalled) = lane.post(carried, is_last);
            self.post_work(0, number, span, work, signalled, nic);
            if is_last {
                return true;
            }
        }
    }
}
