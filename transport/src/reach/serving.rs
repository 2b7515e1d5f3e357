//! Does: answers requests for exposed memory: each is checked against what is exposed, waits while others have its bytes, and
//! moves them straight from and to the memory.

use super::request::{RemoteMemory, Request};
use super::{ANSWER, ASK, GET, MAX_REQUESTS, PUT, SLOT};
use crate::{
    Completion, Envelope, LossCause, Mesh, OneSided, PeerId, Region, RegisterError, RemoteSlice, Tag, TransportError,
    Wire,
};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

/// A wish of another thread, with where the answer goes. Who no longer waits for it has said so by its own time-out.
pub(super) enum Wish {
    Expose(Arc<Region>, SyncSender<Result<RemoteMemory, RegisterError>>),
    Withdraw(u64, SyncSender<()>),
}

struct Exposed {
    region: Arc<Region>,
    device: Option<RemoteSlice>,
}

/// All that an exposer's thread has.
pub(super) struct Serving {
    pub(super) mesh: Mesh,
    owner: u64,
    exposed: BTreeMap<u64, Exposed>,
    /// In the order they came.
    waiting: VecDeque<(PeerId, Request)>,
    /// Requests of each peer that have not ended.
    open: BTreeMap<PeerId, usize>,
    /// Withdrawn memory that accesses still have, and who waits for their end.
    leaving: Vec<(Arc<Region>, SyncSender<()>)>,
    done: Vec<Completion>,
}

impl Serving {
    pub(super) fn new(mesh: Mesh, owner: u64) -> Self {
        Self {
            mesh,
            owner,
            exposed: BTreeMap::new(),
            waiting: VecDeque::new(),
            open: BTreeMap::new(),
            leaving: Vec::new(),
            done: Vec::new(),
        }
    }

    pub(super) fn grant(&mut self, wish: Wish) {
        match wish {
            Wish::Expose(region, answer) => {
                let told = self.expose(region);
                let _ = answer.send(told);
            }
            Wish::Withdraw(key, answer) => match self.exposed.remove(&key) {
                Some(Exposed { region, device }) => {
                    if let (Some(device), Some(wire)) = (device, self.mesh.one_sided()) {
                        drop(wire.withdraw(device));
                    }
                    self.leaving.push((region, answer));
                }
                None => {
                    let _ = answer.send(());
                }
            },
        }
    }

    fn expose(&mut self, region: Arc<Region>) -> Result<RemoteMemory, RegisterError> {
        let mut key = [0; 8];
        getrandom::fill(&mut key).expect("the system gives random bytes");
        let key = u64::from_le_bytes(key);
        let bytes = region.len();
        let device = match self.mesh.one_sided() {
            Some(wire) if bytes > 0 => Some(expose_to_all(wire, &region)?),
            _ => None,
        };
        self.exposed.insert(key, Exposed { region, device });
        let device = device.map_or(0, |device| device.key);
        Ok(RemoteMemory { owner: self.owner, key, offset: 0, bytes: bytes as u64, device })
    }

    /// Moves what can be moved; whether anything did.
    pub(super) fn turn(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.mesh.poll(Instant::now(), &mut done);
        let moved = !done.is_empty();
        done.drain(..).for_each(|completion| self.take(completion));
        self.done = done;
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|&(peer, request)| !self.begin(peer, request));
        self.waiting = waiting;
        self.leaving.retain(|(region, answer)| {
            let free = region.write(0..region.len()).is_ok();
            if free {
                let _ = answer.send(());
            }
            !free
        });
        moved
    }

    pub(super) fn take(&mut self, completion: Completion) {
        match completion {
            Completion::PeerUp(peer) => {
                self.open.insert(peer, 0);
                self.listen(peer);
            }
            Completion::PeerDown { peer, error } => {
                tracing::debug!(%error, "who reached our memory is gone");
                self.open.remove(&peer);
                self.waiting.retain(|(other, _)| *other != peer);
            }
            Completion::Arrived(arrival) if arrival.from.tag == ASK => self.ask(arrival.from.peer, &arrival.loan),
            Completion::Received { from, slice, .. } => {
                // The memory is free before the asker hears of it.
                drop(slice);
                self.end(from.peer);
                self.answer(from.peer, from.tag.0 & SLOT);
            }
            Completion::Sent { to, .. } => self.end(to.peer),
            Completion::RecvFailed { peer, tag, error: error @ TransportError::MessageTooLong { .. }, .. } => {
                tracing::debug!(?tag, %error, "a write of more than was asked for");
                self.turn_away(peer, "it wrote more than it asked for");
            }
            _ => {}
        }
    }

    fn listen(&mut self, peer: PeerId) {
        // Who is gone is told of by its own completion.
        let _ = self.mesh.post_recv_loan(peer, ASK, Request::ENCODED);
    }

    fn end(&mut self, peer: PeerId) {
        if let Some(open) = self.open.get_mut(&peer) {
            *open = open.saturating_sub(1);
        }
    }

    fn answer(&mut self, peer: PeerId, slot: u64) {
        // An empty message always has room.
        if let Some(loan) = self.mesh.lend(peer, 0) {
            let _ = self.mesh.post_loan(Envelope { peer, tag: ANSWER, note: slot }, loan);
        }
    }

    fn ask(&mut self, peer: PeerId, bytes: &[u8]) {
        self.listen(peer);
        let Some(open) = self.open.get_mut(&peer) else { return };
        *open += 1;
        let too_many = *open > MAX_REQUESTS;
        match Request::decode(bytes) {
            Some(request) if !too_many => self.waiting.push_back((peer, request)),
            Some(_) => self.turn_away(peer, "it asked for more at once than any accessor does"),
            None => self.turn_away(peer, "its request for memory makes no sense"),
        }
    }

    fn turn_away(&mut self, peer: PeerId, why: &str) {
        tracing::warn!(peer = %self.mesh.name(peer), why, "its connection is ended");
        let name = Box::new(self.mesh.name(peer));
        self.mesh.disconnect(peer, TransportError::PeerLost { peer: name, cause: LossCause::Aborted(why.to_owned()) });
        self.open.remove(&peer);
    }

    /// Begins an access; false while others have its bytes.
    fn begin(&mut self, peer: PeerId, request: Request) -> bool {
        if !self.open.contains_key(&peer) {
            return true;
        }
        let Request { is_put, slot, key, offset, bytes } = request;
        let found = self.exposed.get(&key).map(|exposed| Arc::clone(&exposed.region));
        let end = offset.checked_add(bytes).and_then(|end| usize::try_from(end).ok());
        let inside = |region: &Arc<Region>| end.filter(|&end| end <= region.len());
        let Some((region, end)) = found.and_then(|region| inside(&region).map(|end| (region, end))) else {
            let what = if is_put { "write" } else { "read" };
            let why = format!("a {what} of {bytes} bytes at {offset} lies outside of the memory that is exposed to it");
            self.turn_away(peer, &why);
            return true;
        };
        let range = end - bytes as usize..end;
        let slot = u64::from(slot);
        if is_put {
            let Ok(slice) = region.write(range) else { return false };
            let _ = self.mesh.post_recv(peer, Tag(PUT | slot), slice);
        } else {
            let Ok(slice) = region.read(range) else { return false };
            let _ = self.mesh.post_send(Envelope { peer, tag: Tag(GET | slot), note: 0 }, slice);
        }
        true
    }
}

/// Exposes a whole region, also to those who reach it by messages: the device asks no ledger.
fn expose_to_all(wire: &mut dyn OneSided, region: &Arc<Region>) -> Result<RemoteSlice, RegisterError> {
    let beside = region.beside();
    let slice = beside.write(0..beside.len()).expect("a new region has lent nothing");
    wire.expose(PeerId(0), slice)
}
