//! Does: the waist, for RDMA verbs. It leans on sockets beside it: they connect its queue pairs and tell who is lost.

use super::adapter::{Adapter, Event, Trouble, What};
use super::fault::Fault;
use super::gpu_direct::Reached;
use super::lane::Carried;
use super::link::{Link, Phase};
use super::nic::Nic;
use super::registrations::RegistrationCount;
use super::sending::RECEIVE;
use super::settings::VerbsConfig;
use super::status::REMOTE_ACCESS;
use crate::beside::Words;
use crate::credit::{Credit, Grant};
use crate::flights::Cargo;
use crate::inbox::Receive;
use crate::pool::Pool;
use crate::slab::NumberMap;
use crate::{Completion, Config, Envelope, LossCause, PeerId, RegionSliceMut, Tag, TransportError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// While peers are watched, completions are taken once in so many polls, and in so many where each finds a small frame.
const EVENT_TURNS: u32 = 8;
const BUSY_TURNS: u32 = 16;
/// Whether a quiet link's peer is still there is asked once in so many polls, and before a sleep.
const PROBE_TURNS: u32 = 64;

/// What the wire has been through; nothing of it moves on a warm and healthy data path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerbsCount {
    /// Registrations of memory.
    pub registrations: RegistrationCount,
    /// Messages that went in pieces, since their memory could not be registered.
    pub copied: u64,
    /// Queue pairs that failed.
    pub failures: u64,
    /// Links that were connected again.
    pub reconnects: u64,
    /// Links that went over to sockets.
    pub fallbacks: u64,
}

/// The wire to peers that are reached by one RDMA device.
pub struct VerbsWire {
    pub(super) config: Config,
    pub(super) verbs: VerbsConfig,
    pub(super) links: Vec<Option<Box<Link>>>,
    /// Whose a queue pair is, and which of its lanes.
    pub(super) routes: NumberMap<u32, (usize, usize)>,
    pub(super) nic: Nic,
    pub(super) pool: Arc<Pool>,
    pub(super) pending: Vec<Completion>,
    pub(super) words: VecDeque<(PeerId, Words)>,
    /// Peers that do not answer, whose hosts are to be asked for.
    pub(super) doubts: VecDeque<PeerId>,
    pub(super) count: VerbsCount,
    /// Whether sockets may not take over.
    pub(super) must: bool,
    pub(super) exposed: BTreeMap<u32, (u64, RegionSliceMut)>,
    /// Memory of GPUs that the device reaches, by remote key; it outlives the registrations, which the fields above hold.
    pub(super) direct: BTreeMap<u32, Reached>,
    pub(super) credit: Option<Credit>,
    /// Scratch of `granting`.
    pub(super) granted: Vec<Grant>,
    events: Vec<Event>,
    ended: Vec<Carried>,
    pub(super) polls: u32,
    /// Polls since completions were taken.
    turns: u32,
    /// Whether the last poll left it at telling what had come.
    pub(super) hurried: bool,
    pub(super) closed: bool,
}

impl VerbsWire {
    /// A wire without peers on `adapter`.
    pub fn new(config: &Config, adapter: Box<dyn Adapter>) -> Self {
        let verbs = config.verbs.clone();
        Self {
            config: config.clone(),
            links: Vec::new(),
            routes: NumberMap::default(),
            nic: Nic::new(adapter, verbs.cache_bytes, verbs.pool_bytes),
            verbs,
            pool: Arc::new(Pool::default()),
            pending: Vec::new(),
            words: VecDeque::new(),
            doubts: VecDeque::new(),
            count: VerbsCount::default(),
            must: config.wire == crate::WireChoice::Verbs,
            exposed: BTreeMap::new(),
            direct: BTreeMap::new(),
            credit: config.credit.filter(|settings| !settings.marked).map(Credit::of_whole_messages),
            granted: Vec::new(),
            events: Vec::new(),
            ended: Vec::new(),
            polls: 0,
            turns: 0,
            hurried: false,
            closed: false,
        }
    }

    /// The device, port and address in use.
    pub fn device(&self) -> String {
        self.nic.adapter.name()
    }

    /// What the wire has been through.
    pub fn count(&self) -> VerbsCount {
        let registrations = self.nic.registrations.count();
        VerbsCount { registrations, copied: self.nic.copied, ..self.count }
    }

    pub(super) fn at(&mut self, at: usize) -> Option<&mut Link> {
        self.links.get_mut(at)?.as_deref_mut()
    }

    pub(super) fn link(&mut self, peer: PeerId) -> Result<&mut Link, TransportError> {
        match self.links.get_mut(peer.index()) {
            _ if self.closed => Err(TransportError::Closed),
            Some(Some(link)) => Ok(link),
            _ => Err(TransportError::UnknownPeer(peer.0)),
        }
    }

    pub(super) fn sendable(&mut self, peer: PeerId) -> Result<(), TransportError> {
        let depth = self.config.queue_depth;
        self.link(peer).and_then(|link| match &link.lost {
            Some(lost) => Err(lost.clone()),
            None if link.flights.len() >= depth => Err(full(link, link.flights.len())),
            None => Ok(()),
        })
    }

    /// Sends a small message at once, where nothing is before it; whether it did.
    pub(super) fn post_small(&mut self, to: Envelope, payload: &[u8]) -> bool {
        match self.links.get_mut(to.peer.index()) {
            Some(Some(link)) if !self.closed => link.post_small(to, payload, &mut self.nic),
            _ => false,
        }
    }

    pub(super) fn post_cargo(&mut self, to: Envelope, cargo: Cargo) -> Result<(), (TransportError, Cargo)> {
        if let Err(error) = self.sendable(to.peer) {
            return Err((error, cargo));
        }
        if let Some(Some(link)) = self.links.get_mut(to.peer.index()) {
            link.post(to, cargo, &mut self.nic, &mut self.pending);
        }
        Ok(())
    }

    pub(super) fn post_receive(
        &mut self,
        peer: PeerId,
        tag: Tag,
        receive: Receive,
    ) -> Result<(), (TransportError, Receive)> {
        let depth = self.config.queue_depth;
        let ready = self.link(peer).and_then(|link| match &link.lost {
            Some(lost) if !link.inbox.has_whole(tag) => Err(lost.clone()),
            _ if link.inbox.posted() >= depth => Err(full(link, link.inbox.posted())),
            _ => Ok(()),
        });
        if let Err(error) = ready {
            return Err((error, receive));
        }
        if let Some(Some(link)) = self.links.get_mut(peer.index()) {
            link.receive(tag, receive, &mut self.pending);
            if link.wants_credit() {
                self.grant_to_all();
            }
        }
        Ok(())
    }

    /// Takes what the device has completed, and what has come into our rings; whether there was any.
    pub(super) fn take_events(&mut self, done: &mut Vec<Completion>) -> bool {
        let any = self.take_completions(done);
        self.look_at_rings(done).0 || any
    }

    fn take_completions(&mut self, done: &mut Vec<Completion>) -> bool {
        self.turns = 0;
        let mut events = std::mem::take(&mut self.events);
        self.nic.adapter.poll(&mut events);
        let any = !events.is_empty();
        for event in events.drain(..) {
            self.dispatch(event, done);
        }
        self.events = events;
        any
    }

    /// Takes what has come, for a poll: while a peer is watched, which then sends little else, only seldom by completions.
    /// Whether anything had come into our rings.
    pub(super) fn take_soon(&mut self, done: &mut Vec<Completion>) -> bool {
        let (any, watching) = self.look_at_rings(done);
        self.turns += 1;
        if !watching || self.turns >= if any { BUSY_TURNS } else { EVENT_TURNS } {
            self.take_completions(done);
        }
        any
    }

    /// Takes what has been written into our rings; whether anything had, and whether a peer is watched.
    fn look_at_rings(&mut self, done: &mut Vec<Completion>) -> (bool, bool) {
        let (mut any, mut watching, mut ended) = (false, false, None);
        for (at, link) in self.links.iter_mut().enumerate() {
            let Some(link) = link.as_deref_mut().filter(|link| link.lost.is_none()) else { continue };
            watching |= link.ring.watcher.is_watching();
            if !link.has_come() {
                continue;
            }
            match link.look(&mut self.nic, done) {
                Ok(came) => any |= came,
                Err(broken) => {
                    // What has come of the others is found by the next look.
                    ended = Some((at, broken));
                    break;
                }
            }
        }
        if let Some((at, broken)) = ended {
            self.end(at, LossCause::Protocol(broken.to_owned()), done);
        }
        (any, watching)
    }

    fn dispatch(&mut self, event: Event, done: &mut Vec<Completion>) {
        let Some(&(at, lane)) = self.routes.get(&event.queue_pair) else { return };
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        link.active = true;
        match event.what {
            What::Done => {
                let ended = &mut self.ended;
                link.lanes[lane].complete(event.number, |carried| ended.push(carried));
                for carried in self.ended.drain(..) {
                    link.ended(lane, carried, &mut self.nic, done);
                }
            }
            What::Received(bytes, word) => {
                let slot = (event.number & !RECEIVE) as usize;
                // What was written into the ring before it lies there.
                let before = if lane == 0 { link.look(&mut self.nic, done).map(drop) } else { Ok(()) };
                let taken =
                    before.and_then(|()| link.received((lane, slot, bytes as usize), word, &mut self.nic, done));
                if let Err(broken) = taken {
                    self.end(at, LossCause::Protocol(broken.to_owned()), done);
                }
            }
            What::Failed(status) => {
                let is_receive = event.number & RECEIVE != 0;
                let carried = link.lanes[lane].carried(event.number);
                link.lanes[lane].posted -= usize::from(is_receive);
                if status.code == REMOTE_ACCESS && matches!(carried, Some(Carried::Put { .. } | Carried::Get { .. })) {
                    self.end(at, LossCause::Protocol("access to memory that is not exposed".to_owned()), done);
                } else if matches!(link.phase, Phase::Up) {
                    let fault = Fault::of_work(self.nic.adapter.name(), event.queue_pair, status);
                    link.fault.get_or_insert(fault);
                }
            }
        }
    }

    /// What the device says of itself.
    pub(super) fn look_around(&mut self) {
        let mut troubles = Vec::new();
        self.nic.adapter.wake_up(&mut troubles);
        for Trouble { queue_pair, fatal, what } in troubles {
            if !fatal {
                tracing::info!(device = self.nic.adapter.name(), what, "the RDMA device tells");
                continue;
            }
            let routes = self.routes.iter().filter(|(pair, _)| queue_pair.is_none_or(|failed| failed == **pair));
            let concerned: Vec<(u32, usize)> = routes.map(|(pair, (at, _))| (*pair, *at)).collect();
            for (pair, at) in concerned {
                let fault = Fault::of_device(self.nic.adapter.name(), pair, what.clone());
                if let Some(link) = self.at(at).filter(|link| matches!(link.phase, Phase::Up)) {
                    link.fault.get_or_insert(fault);
                }
            }
        }
    }

    pub(super) fn end(&mut self, at: usize, cause: LossCause, done: &mut Vec<Completion>) {
        if let Some(Some(link)) = self.links.get_mut(at) {
            let error = link.loss(cause);
            link.end(&error, &mut self.nic, done);
            self.routes.retain(|_, (other, _)| *other != at);
        }
    }

    /// Writes what there is room for, on every link, and sees to what failed.
    pub(super) fn flush(&mut self, now: Instant, done: &mut Vec<Completion>) {
        if self.credit.is_some() {
            self.grant_to_all();
        }
        let due = self.polls.is_multiple_of(PROBE_TURNS);
        for at in 0..self.links.len() {
            let Some(link) = &mut self.links[at] else { continue };
            if !due && link.is_quiet() {
                continue;
            }
            link.flush(&mut self.nic, done);
            let peer = link.peer;
            self.words.extend(link.carried.drain(..).map(|frame| (peer, Words::Frame(frame))));
            self.see_to(at, now, done);
        }
    }
}

impl Drop for VerbsWire {
    fn drop(&mut self) {
        // Slices that are still lent go back once no queue pair reaches them.
        for link in self.links.iter_mut().flatten() {
            link.close(&mut self.nic);
        }
    }
}

fn full(link: &Link, queued: usize) -> TransportError {
    TransportError::QueueFull { peer: Box::new(link.name.clone()), queued }
}
