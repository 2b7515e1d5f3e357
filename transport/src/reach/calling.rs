//! Does: carries out reads and writes of one peer's memory: by the device where there is a link of queue pairs, else in parts
//! that the peer is asked for. What the device had not done when its link broke for good is done again by messages.

use super::request::{RemoteMemory, Request};
use super::ticket::Access;
use super::{ANSWER, ASK, DEVICE, GET, OPEN, PART_BYTES, PUT, SLOT};
use crate::{
    Completion, Envelope, LossCause, Mesh, OneSided, PeerId, Region, RegionSlice, RegionSliceMut, Tag, TransportError,
    Wire, WireKind,
};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// The exposer.
pub(super) const PEER: PeerId = PeerId(0);

/// An access as it is asked for.
pub(super) struct Order {
    pub(super) is_put: bool,
    pub(super) region: Arc<Region>,
    pub(super) range: Range<usize>,
    pub(super) remote: RemoteMemory,
    pub(super) access: Access,
}

struct Running {
    order: Order,
    /// Bytes that have been begun.
    next: u64,
    /// Parts under way.
    open: usize,
    error: Option<TransportError>,
}

/// Our bytes of a part.
enum Held {
    Read(RegionSlice),
    Write(RegionSliceMut),
}

/// All that an accessor's thread has.
pub(super) struct Calling {
    pub(super) mesh: Mesh,
    running: BTreeMap<u64, Running>,
    /// Those of which something is still to be begun, in order.
    waiting: VecDeque<u64>,
    /// Whose part is in each slot, and whether the device has it.
    slots: [Option<(u64, bool)>; OPEN],
    next: u64,
    lost: Option<TransportError>,
    /// Accesses that have ended, and of which nobody knows yet.
    ended: Vec<(Access, Result<(), TransportError>)>,
    done: Vec<Completion>,
}

impl Calling {
    /// Over a wire on which the exposer is [`PEER`].
    pub(super) fn new(mut mesh: Mesh) -> Self {
        // Who is gone is told of by its own completion.
        let _ = mesh.post_recv_loan(PEER, ANSWER, 0);
        let (running, waiting, slots) = (BTreeMap::new(), VecDeque::new(), [None; OPEN]);
        Self { mesh, running, waiting, slots, next: 0, lost: None, ended: Vec::new(), done: Vec::new() }
    }

    pub(super) fn begin(&mut self, order: Order) {
        if let Some(lost) = &self.lost {
            return self.ended.push((order.access, Err(lost.clone())));
        }
        if order.range.is_empty() {
            return self.ended.push((order.access, Ok(())));
        }
        self.running.insert(self.next, Running { order, next: 0, open: 0, error: None });
        self.waiting.push_back(self.next);
        self.next += 1;
    }

    /// Accesses that have not ended.
    pub(super) fn under_way(&self) -> usize {
        self.running.len()
    }

    pub(super) fn lost(&self) -> Option<&TransportError> {
        self.lost.as_ref()
    }

    /// Tells whoever waits of what has ended. Whoever hears that a peer is lost, and asks, must find it lost: so that is told first.
    pub(super) fn tell(&mut self) {
        self.ended.drain(..).for_each(|(access, outcome)| access.end(outcome));
    }

    /// Ends everything with `error`.
    pub(super) fn fail(&mut self, error: &TransportError) {
        self.waiting.clear();
        self.slots = [None; OPEN];
        let running = std::mem::take(&mut self.running);
        self.ended.extend(running.into_values().map(|running| (running.order.access, Err(error.clone()))));
    }

    /// Moves what can be moved; whether anything did.
    pub(super) fn turn(&mut self) -> bool {
        let began = self.begin_parts();
        let mut done = std::mem::take(&mut self.done);
        self.mesh.poll(Instant::now(), &mut done);
        let moved = began || !done.is_empty();
        done.drain(..).for_each(|completion| self.take(completion));
        self.done = done;
        moved
    }

    fn take(&mut self, completion: Completion) {
        match completion {
            Completion::PeerDown { error, .. } => {
                self.fail(&error);
                self.lost = Some(error);
            }
            Completion::Arrived(arrival) if arrival.from.tag == ANSWER => {
                let slot = arrival.from.note;
                drop(arrival);
                let _ = self.mesh.post_recv_loan(PEER, ANSWER, 0);
                self.end_part(slot, Ok(()));
            }
            // The bytes of a write are gone; its answer tells of their coming.
            Completion::Sent { to, .. } if to.tag.0 & !SLOT == PUT => {}
            Completion::Sent { to, slice } => {
                drop(slice);
                self.end_part(to.tag.0 & SLOT, Ok(()));
            }
            Completion::Received { from, slice, .. } => {
                drop(slice);
                self.end_part(from.tag.0 & SLOT, Ok(()));
            }
            Completion::SendFailed { to, slice, error } => {
                drop(slice);
                self.end_part(to.tag.0 & SLOT, Err(error));
            }
            Completion::RecvFailed { tag, slice: Some(slice), error, .. } => {
                drop(slice);
                self.end_part(tag.0 & SLOT, Err(error));
            }
            _ => {}
        }
    }

    fn end_part(&mut self, slot: u64, outcome: Result<(), TransportError>) {
        let freed = usize::try_from(slot).ok().and_then(|slot| self.slots.get_mut(slot)).and_then(Option::take);
        let Some((number, by_device)) = freed else { return };
        let cut_off = by_device && self.lost.is_none() && self.mesh.kind(PEER) != WireKind::Verbs;
        let Some(running) = self.running.get_mut(&number) else { return };
        running.open -= 1;
        match outcome {
            // The device's link is gone, and the peer is not: what is read or written twice is the same.
            Err(TransportError::Config { .. }) if cut_off => {
                running.next = 0;
                self.waiting.push_front(number);
            }
            Err(error) => running.error = running.error.take().or(Some(error)),
            Ok(()) => {}
        }
        let whole = running.order.remote.bytes;
        if running.open > 0 || (running.error.is_none() && running.next < whole) {
            return;
        }
        if let Some(ended) = self.running.remove(&number) {
            self.waiting.retain(|other| *other != number);
            self.ended.push((ended.order.access, ended.error.map_or(Ok(()), Err)));
        }
    }

    fn begin_parts(&mut self) -> bool {
        let mut began = false;
        while let Some(&number) = self.waiting.front()
            && let Some(slot) = self.slots.iter().position(Option::is_none)
            && let Some(running) = self.running.get_mut(&number)
        {
            let by_device = self.mesh.kind(PEER) == WireKind::Verbs && running.order.remote.device != 0;
            let left = running.order.remote.bytes - running.next;
            let bytes = if by_device { left } else { left.min(PART_BYTES) };
            let start = running.order.range.start + running.next as usize;
            let (region, range) = (Arc::clone(&running.order.region), start..start + bytes as usize);
            let (is_put, first) = (running.order.is_put, running.next);
            let Some(remote) = running.order.remote.part(first, bytes) else { unreachable!("a part lies inside") };
            running.next += bytes;
            running.open += 1;
            if running.next == running.order.remote.bytes {
                self.waiting.pop_front();
            }
            self.slots[slot] = Some((number, by_device));
            began = true;
            let held = if is_put { region.read(range).map(Held::Read) } else { region.write(range).map(Held::Write) };
            let posted = held.map_err(|overlap| in_use(&overlap)).and_then(|held| match by_device {
                true => self.post_to_device(slot, held, remote),
                false => self.ask(slot, held, remote),
            });
            if let Err(error) = posted {
                if let Some(running) = self.running.get_mut(&number) {
                    running.next = running.order.remote.bytes;
                }
                self.waiting.retain(|other| *other != number);
                self.slots[slot] = Some((number, false));
                self.end_part(slot as u64, Err(error));
            }
        }
        began
    }

    fn post_to_device(&mut self, slot: usize, held: Held, remote: RemoteMemory) -> Result<(), TransportError> {
        let with = Envelope { peer: PEER, tag: Tag(DEVICE | slot as u64), note: 0 };
        let wire: &mut dyn OneSided = self.mesh.one_sided().ok_or(TransportError::Closed)?;
        match held {
            Held::Read(slice) => wire.post_put(with, slice, remote.slice()).map_err(|refused| refused.error),
            Held::Write(slice) => wire.post_get(with, slice, remote.slice()).map_err(|refused| refused.error),
        }
    }

    fn ask(&mut self, slot: usize, held: Held, remote: RemoteMemory) -> Result<(), TransportError> {
        let is_put = matches!(held, Held::Read(_));
        let RemoteMemory { key, offset, bytes, .. } = remote;
        let request = Request { is_put, slot: slot as u8, key, offset, bytes }.encode();
        let full = || TransportError::QueueFull { peer: Box::new(self.mesh.name(PEER)), queued: OPEN };
        let refused_loan = full();
        let mut loan = self.mesh.lend(PEER, request.len()).ok_or(refused_loan)?;
        loan.copy_from_slice(&request);
        let slot = slot as u64;
        if let Held::Write(slice) = held {
            self.mesh.post_recv(PEER, Tag(GET | slot), slice).map_err(|refused| refused.error)?;
            return self
                .mesh
                .post_loan(Envelope { peer: PEER, tag: ASK, note: 0 }, loan)
                .map_err(|refused| refused.error);
        }
        self.mesh.post_loan(Envelope { peer: PEER, tag: ASK, note: 0 }, loan).map_err(|refused| refused.error)?;
        let Held::Read(slice) = held else { return Ok(()) };
        let to = Envelope { peer: PEER, tag: Tag(PUT | slot), note: 0 };
        self.mesh.post_send(to, slice).map_err(|refused| refused.error)
    }

    /// Gives the exposer up.
    pub(super) fn give_up(&mut self, why: &str) {
        let cause = LossCause::Aborted(why.to_owned());
        let error = TransportError::PeerLost { peer: Box::new(self.mesh.name(PEER)), cause };
        self.fail(&error);
        self.lost.get_or_insert(error);
    }
}

fn in_use(overlap: &crate::Overlap) -> TransportError {
    TransportError::Config {
        setting: "local memory".to_owned(),
        reason: format!("{overlap}: wait for the access under way before another one of the same bytes"),
    }
}
