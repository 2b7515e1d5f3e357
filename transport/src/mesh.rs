//! Does: one wire out of two: messages to peers of this host go through shared memory, all others, and control messages,
//! over sockets. The sockets also tell who is lost.

use crate::{
    Completion, Envelope, LossCause, PeerId, PeerName, PostError, Probe, Region, RegionSlice, RegionSliceMut,
    RegisterError, SendLoan, ShmWire, Tag, TcpWire, Traffic, TransportError, Wake, Wire, WireKind,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// While shared memory is polled, sockets are looked at once in so many turns, or after so long: a look costs a system call
/// per peer.
const SOCKET_TURNS: u32 = 32;
const SOCKET_PAUSE: Duration = Duration::from_micros(20);
/// How long a peer's end that shared memory shows waits for the sockets to tell of it, and of what was said last.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// What a shutdown keeps for the sockets' goodbye.
const FAREWELL: Duration = Duration::from_millis(200);

/// The wire of a group whose members share hosts.
pub struct Mesh {
    tcp: TcpWire,
    shm: ShmWire,
    /// Whether some peer is reached by sockets only.
    mixed: bool,
    ending: Vec<Ending>,
    down: Vec<PeerId>,
    scratch: Vec<Completion>,
    /// What the sockets told before the wires were joined.
    early: Vec<Completion>,
    turns: u32,
    /// When the sockets were looked at; `None`: they must be, something was posted to them or may have come.
    looked: Option<Instant>,
    /// Whether something was posted to them since: it may have ended without a byte moving.
    posted: bool,
}

/// A peer that shared memory has shown to be gone, and what failed by it.
struct Ending {
    peer: PeerId,
    error: TransportError,
    until: Instant,
    failed: Vec<Completion>,
}

impl Mesh {
    /// Joins two wires. Every one of `peers` is on `tcp`; those on `shm` are reached through it. `early`: what `tcp` has told
    /// that nobody has heard yet.
    pub fn new(tcp: TcpWire, shm: ShmWire, peers: impl IntoIterator<Item = PeerId>, early: Vec<Completion>) -> Self {
        Self {
            mixed: peers.into_iter().any(|peer| !shm.has(peer)),
            tcp,
            shm,
            ending: Vec::new(),
            down: Vec::new(),
            scratch: Vec::new(),
            early,
            turns: 0,
            looked: None,
            posted: false,
        }
    }

    fn is_shared(&self, peer: PeerId) -> bool {
        self.shm.has(peer)
    }

    fn route(&mut self, peer: PeerId, tag: Tag) -> &mut dyn Wire {
        if tag.0 & Tag::CONTROL_BIT == 0 && self.is_shared(peer) {
            &mut self.shm
        } else {
            self.posted = true;
            &mut self.tcp
        }
    }

    /// A peer whose end memory has shown and the sockets have not: what is posted to it now fails with the rest, after them.
    fn ending(&mut self, peer: PeerId, tag: Tag) -> Option<&mut Ending> {
        let shared = tag.0 & Tag::CONTROL_BIT == 0;
        self.ending.iter_mut().find(|ending| shared && ending.peer == peer)
    }

    fn poll_sockets(&mut self, now: Instant, done: &mut Vec<Completion>) {
        (self.looked, self.posted) = (Some(now), false);
        let mut came = std::mem::take(&mut self.scratch);
        self.tcp.poll(now, &mut came);
        came.append(&mut self.early);
        for completion in came.drain(..) {
            match completion {
                Completion::PeerDown { peer, error } => self.go_down(peer, error, now, done),
                other => done.push(other),
            }
        }
        self.scratch = came;
    }

    fn poll_memory(&mut self, now: Instant, done: &mut Vec<Completion>) {
        let mut came = std::mem::take(&mut self.scratch);
        self.shm.poll(now, &mut came);
        for completion in came.drain(..) {
            let peer = match &completion {
                Completion::PeerDown { peer, error } => {
                    self.begin_ending(*peer, error, now);
                    continue;
                }
                Completion::SendFailed { to, error: TransportError::PeerLost { .. }, .. } => Some(to.peer),
                Completion::RecvFailed { peer, error: TransportError::PeerLost { .. }, .. } => Some(*peer),
                _ => None,
            };
            match self.ending.iter_mut().find(|ending| Some(ending.peer) == peer) {
                Some(ending) => ending.failed.push(completion),
                None => done.push(completion),
            }
        }
        self.scratch = came;
    }

    /// Shared memory has shown a peer's end. The sockets will too, after what the peer said last.
    fn begin_ending(&mut self, peer: PeerId, error: &TransportError, now: Instant) {
        if self.down.contains(&peer) {
            return;
        }
        self.ending.push(Ending { peer, error: error.clone(), until: now + LAST_WORDS, failed: Vec::new() });
        let TransportError::PeerLost { cause, .. } = error else { return };
        if !matches!(cause, LossCause::Goodbye | LossCause::Aborted(_) | LossCause::Closed) {
            self.tcp.disconnect(peer, error.clone());
        }
        self.posted = true;
    }

    /// The sockets have told of a peer's end: what came through memory before it is handed over, then everything else fails.
    fn go_down(&mut self, peer: PeerId, error: TransportError, now: Instant, done: &mut Vec<Completion>) {
        let mut came = Vec::new();
        self.shm.detach(peer, error.clone());
        self.shm.poll(now, &mut came);
        self.down.push(peer);
        // Others may have gone at the same time, and their last words wait.
        self.posted = true;
        let mut told = false;
        for completion in came {
            match completion {
                Completion::PeerDown { peer: gone, .. } if gone == peer => {
                    told = true;
                    done.push(Completion::PeerDown { peer, error: error.clone() });
                }
                Completion::PeerDown { peer: other, error } => self.begin_ending(other, &error, now),
                completion => done.push(completion),
            }
        }
        if !told {
            done.push(Completion::PeerDown { peer, error });
        }
        if let Some(at) = self.ending.iter().position(|ending| ending.peer == peer) {
            done.append(&mut self.ending.swap_remove(at).failed);
        }
    }
}

impl Wire for Mesh {
    fn kind(&self, peer: PeerId) -> WireKind {
        if self.is_shared(peer) { WireKind::Shm } else { WireKind::Tcp }
    }

    fn name(&self, peer: PeerId) -> PeerName {
        self.tcp.name(peer)
    }

    fn traffic(&self, peer: PeerId) -> Traffic {
        let (a, b) = (self.tcp.traffic(peer), self.shm.traffic(peer));
        Traffic {
            sent_bytes: a.sent_bytes + b.sent_bytes,
            received_bytes: a.received_bytes + b.received_bytes,
            sent_messages: a.sent_messages + b.sent_messages,
            received_messages: a.received_messages + b.received_messages,
        }
    }

    fn register(&mut self, region: &Arc<Region>) -> Result<(), RegisterError> {
        self.shm.register(region)?;
        self.tcp.register(region)
    }

    fn post_send(&mut self, to: Envelope, slice: RegionSlice) -> Result<(), PostError<RegionSlice>> {
        let refused = self.route(to.peer, to.tag).post_send(to, slice);
        match (refused, self.ending(to.peer, to.tag)) {
            (Err(PostError { error: error @ TransportError::PeerLost { .. }, slice }), Some(ending)) => {
                ending.failed.push(Completion::SendFailed { to, slice, error });
                Ok(())
            }
            (result, _) => result,
        }
    }

    fn post_recv(&mut self, peer: PeerId, tag: Tag, slice: RegionSliceMut) -> Result<(), PostError<RegionSliceMut>> {
        let refused = self.route(peer, tag).post_recv(peer, tag, slice);
        match (refused, self.ending(peer, tag)) {
            (Err(PostError { error: error @ TransportError::PeerLost { .. }, slice }), Some(ending)) => {
                ending.failed.push(Completion::RecvFailed { peer, tag, slice: Some(slice), error });
                Ok(())
            }
            (result, _) => result,
        }
    }

    fn post_recv_loan(&mut self, peer: PeerId, tag: Tag, max_bytes: usize) -> Result<(), PostError<()>> {
        let refused = self.route(peer, tag).post_recv_loan(peer, tag, max_bytes);
        match (refused, self.ending(peer, tag)) {
            (Err(PostError { error: error @ TransportError::PeerLost { .. }, .. }), Some(ending)) => {
                ending.failed.push(Completion::RecvFailed { peer, tag, slice: None, error });
                Ok(())
            }
            (result, _) => result,
        }
    }

    fn lend(&mut self, peer: PeerId, bytes: usize) -> Option<SendLoan> {
        self.route(peer, Tag(0)).lend(peer, bytes)
    }

    fn max_loan_bytes(&self) -> usize {
        self.tcp.max_loan_bytes().min(self.shm.max_loan_bytes())
    }

    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>> {
        match (self.route(to.peer, to.tag).post_loan(to, loan), self.ending(to.peer, to.tag)) {
            (Err(PostError { error: TransportError::PeerLost { .. }, .. }), Some(_)) => Ok(()),
            (result, _) => result,
        }
    }

    fn probe(&mut self, tag: Tag) -> Option<Probe> {
        self.shm.probe(tag).or_else(|| self.tcp.probe(tag))
    }

    fn cancel_recvs(&mut self, peer: PeerId, tag: Tag) {
        self.route(peer, tag).cancel_recvs(peer, tag);
    }

    fn disconnect(&mut self, peer: PeerId, error: TransportError) {
        // The rest follows from the sockets' word of it.
        self.tcp.disconnect(peer, error);
        self.posted = true;
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        self.turns = self.turns.wrapping_add(1);
        self.poll_memory(now, done);
        let due = self.posted || self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= SOCKET_PAUSE);
        if due || self.mixed || !self.ending.is_empty() || self.turns.is_multiple_of(SOCKET_TURNS) {
            self.poll_sockets(now, done);
        }
        if let Some(late) = self.ending.iter().find(|ending| ending.until <= now) {
            self.tcp.disconnect(late.peer, late.error.clone());
            self.poll_sockets(now, done);
        }
    }

    fn park(&mut self, until: Instant) {
        let until = self.ending.iter().fold(until, |until, ending| until.min(ending.until));
        if self.shm.fall_asleep() && !self.posted && self.early.is_empty() {
            self.tcp.park_beside(until, Some(self.shm.sleep_on()));
        }
        self.shm.wake_up();
        self.looked = None;
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.tcp.waker()
    }

    fn shutdown(&mut self, until: Instant) {
        let now = Instant::now();
        self.shm.shutdown(until - FAREWELL.min(until.saturating_duration_since(now) / 2));
        self.tcp.shutdown(until);
    }
}
