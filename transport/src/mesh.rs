//! Does: one wire out of several: messages go by shared memory or RDMA verbs to the peers that they reach, to all others, and
//! control messages, over sockets. The sockets also tell who is lost, and carry the other wires' own words.

mod meeting;

pub(crate) use meeting::open_device;
pub use meeting::open_verbs;

use crate::{
    Beside, Completion, DeviceSided, Envelope, Identity, LossCause, OneSided, PeerId, PeerName, PostError, Probe,
    Region, RegionSlice, RegionSliceMut, RegisterError, SendLoan, Tag, TcpWire, Traffic, TransportError, Wake, Wire,
    WireChoice, WireKind, Words,
};
use meeting::Guest;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// While better wires are polled, sockets are looked at once in so many turns, or after so long: a look costs a system call
/// per peer.
const SOCKET_TURNS: u32 = 32;
const SOCKET_PAUSE: Duration = Duration::from_micros(20);
/// How long a peer's end that another wire shows waits for the sockets to tell of it, and of what was said last.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// Words of one peer that may come at once.
const LISTENING: usize = 8;
/// What a shutdown keeps for the sockets' goodbye.
const FAREWELL: Duration = Duration::from_millis(200);

/// The wire of a group whose members are reached in several ways.
pub struct Mesh {
    tcp: TcpWire,
    /// Better ways than the sockets, each to other peers.
    better: Vec<Box<dyn Beside>>,
    /// Whether some peer is reached by sockets only.
    mixed: bool,
    /// Whether peers come and go.
    public: bool,
    choice: WireChoice,
    /// Callers that have not proposed yet.
    guests: Vec<Guest>,
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

/// A peer that another wire has shown to be gone, and what failed by it.
struct Ending {
    peer: PeerId,
    error: TransportError,
    until: Instant,
    failed: Vec<Completion>,
}

impl Mesh {
    /// Joins wires. Every one of `peers` is on `tcp`; those on one of `better` are reached through it. `early`: what `tcp` has
    /// told that nobody has heard yet.
    pub fn new(
        tcp: TcpWire,
        better: Vec<Box<dyn Beside>>,
        peers: impl IntoIterator<Item = PeerId>,
        early: Vec<Completion>,
    ) -> Self {
        let mut mesh = Self {
            mixed: false,
            public: false,
            choice: WireChoice::Auto,
            guests: Vec::new(),
            tcp,
            better,
            ending: Vec::new(),
            down: Vec::new(),
            scratch: Vec::new(),
            early,
            turns: 0,
            looked: None,
            posted: false,
        };
        for peer in peers {
            match mesh.better.iter().find(|wire| wire.has(peer)) {
                Some(wire) if wire.speaks() => mesh.begin_listening(peer),
                Some(_) => {}
                None => mesh.mixed = true,
            }
        }
        mesh
    }

    /// Waits for a peer's words, several at once: all that it says may come this way one day.
    fn begin_listening(&mut self, peer: PeerId) {
        (0..LISTENING).for_each(|_| self.listen(peer));
    }

    /// The wire among these that reaches into peers' memory; its peers are those of [`Wire::kind`] `Verbs`.
    pub fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        self.better.iter_mut().find_map(|wire| wire.one_sided())
    }

    /// Who this process says it is, and who `peer` said it is.
    pub fn identities(&self, peer: PeerId) -> (&Identity, Option<&Identity>) {
        (self.tcp.own_identity(), self.tcp.identity(peer))
    }

    /// Waits for a peer's next words. A peer that is lost is told of by its own completion.
    fn listen(&mut self, peer: PeerId) {
        let _ = self.tcp.post_recv_loan(peer, Words::TAG, Words::MAX_BYTES);
        // Words that had come already are told without another byte.
        self.posted = true;
    }

    /// Carries the words of other wires to their peers.
    fn carry_words(&mut self) {
        for at in 0..self.better.len() {
            while let Some((peer, words)) = self.better[at].next_words() {
                self.say(peer, &words);
            }
        }
    }

    /// Tells wires whose peers do not answer whether their hosts are there.
    fn settle_doubts(&mut self, now: Instant) {
        for wire in &mut self.better {
            while let Some(peer) = wire.next_doubt() {
                wire.settle(peer, self.tcp.acknowledges(peer), now);
            }
        }
    }

    /// Sends words. Who is lost is told of by its own completion.
    fn say(&mut self, peer: PeerId, words: &Words) {
        let bytes = words.encode();
        if let Some(mut loan) = self.tcp.lend(peer, bytes.len()) {
            loan.copy_from_slice(&bytes);
            let _ = self.tcp.post_loan(Envelope { peer, tag: Words::TAG, note: 0 }, loan);
            self.posted = true;
        }
    }

    /// Hands words to the wire that they are for.
    fn hear(&mut self, from: PeerId, bytes: &[u8], now: Instant, done: &mut Vec<Completion>) {
        let words = Words::decode(bytes);
        if let (Some(words), true) = (&words, self.is_guest(from)) {
            return self.settle(from, words.clone(), now, done);
        }
        match (self.better.iter_mut().find(|wire| wire.has(from)), words) {
            (Some(wire), Some(words)) => wire.hear(from, words, now),
            _ => tracing::warn!(peer = %self.tcp.name(from), "words that make no sense"),
        }
    }

    /// Hears what a peer that is gone had said and nobody had listened to yet.
    fn hear_out(&mut self, peer: PeerId, now: Instant, done: &mut Vec<Completion>) {
        let mut any = true;
        while std::mem::take(&mut any) && self.tcp.post_recv_loan(peer, Words::TAG, Words::MAX_BYTES).is_ok() {
            let mut came = Vec::new();
            self.tcp.poll(now, &mut came);
            for completion in came {
                match completion {
                    Completion::Arrived(arrival) if arrival.from.peer == peer && arrival.from.tag == Words::TAG => {
                        self.hear(peer, &arrival.loan, now, done);
                        any = true;
                    }
                    other => self.early.push(other),
                }
            }
        }
    }

    fn route(&mut self, peer: PeerId, tag: Tag) -> &mut dyn Wire {
        let better = self.better.iter_mut().find(|wire| tag.0 & Tag::CONTROL_BIT == 0 && wire.has(peer));
        match better {
            Some(wire) => &mut **wire,
            None => {
                self.posted = true;
                &mut self.tcp
            }
        }
    }

    /// A peer whose end another wire has shown and the sockets have not: what is posted to it now fails with the rest, after them.
    fn ending(&mut self, peer: PeerId, tag: Tag) -> Option<&mut Ending> {
        let shared = tag.0 & Tag::CONTROL_BIT == 0;
        self.ending.iter_mut().find(|ending| shared && ending.peer == peer)
    }

    fn poll_sockets(&mut self, now: Instant, done: &mut Vec<Completion>) {
        (self.looked, self.posted) = (Some(now), false);
        let mut came = std::mem::take(&mut self.scratch);
        came.append(&mut self.early);
        self.tcp.poll(now, &mut came);
        for completion in came.drain(..) {
            match completion {
                Completion::PeerDown { peer, error } => self.go_down(peer, error, now, done),
                Completion::Arrived(arrival) if arrival.from.tag == Words::TAG => {
                    self.hear(arrival.from.peer, &arrival.loan, now, done);
                    self.listen(arrival.from.peer);
                }
                Completion::RecvFailed { tag: Words::TAG, .. } => {}
                Completion::PeerUp(peer) => self.take_in(peer, now, done),
                other => done.push(other),
            }
        }
        self.scratch = came;
    }

    fn poll_better(&mut self, now: Instant, done: &mut Vec<Completion>) {
        let mut came = std::mem::take(&mut self.scratch);
        self.better.iter_mut().for_each(|wire| wire.poll(now, &mut came));
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

    /// Another wire has shown a peer's end. The sockets will too, after what the peer said last.
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

    /// The sockets have told of a peer's end: what came by a better wire before it is handed over, then everything else fails.
    fn go_down(&mut self, peer: PeerId, error: TransportError, now: Instant, done: &mut Vec<Completion>) {
        let mut came = Vec::new();
        if self.better.iter().any(|wire| wire.speaks() && wire.has(peer)) {
            self.hear_out(peer, now, done);
        }
        if let Some(wire) = self.better.iter_mut().find(|wire| wire.has(peer)) {
            wire.detach(peer, error.clone());
            wire.poll(now, &mut came);
        }
        self.down.push(peer);
        self.turn_away(peer);
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
        self.better.iter().find(|wire| wire.has(peer)).map_or(WireKind::Tcp, |wire| wire.kind(peer))
    }

    fn reason(&self, peer: PeerId) -> Option<String> {
        self.better.iter().find_map(|wire| wire.reason(peer))
    }

    fn name(&self, peer: PeerId) -> PeerName {
        self.tcp.name(peer)
    }

    fn traffic(&self, peer: PeerId) -> Traffic {
        // What the sockets carry beside a better wire is not the callers' payload.
        let better = self.better.iter().find(|wire| wire.has(peer));
        better.map_or_else(|| self.tcp.traffic(peer), |wire| wire.traffic(peer))
    }

    fn register(&mut self, region: &Arc<Region>) -> Result<(), RegisterError> {
        self.better.iter_mut().try_for_each(|wire| wire.register(region))?;
        self.tcp.register(region)
    }

    fn deregister(&mut self, region: &Arc<Region>) {
        self.better.iter_mut().for_each(|wire| wire.deregister(region));
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
        self.better.iter().fold(self.tcp.max_loan_bytes(), |most, wire| most.min(wire.max_loan_bytes()))
    }

    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>> {
        match (self.route(to.peer, to.tag).post_loan(to, loan), self.ending(to.peer, to.tag)) {
            (Err(PostError { error: TransportError::PeerLost { .. }, .. }), Some(_)) => Ok(()),
            (result, _) => result,
        }
    }

    fn probe(&mut self, tag: Tag) -> Option<Probe> {
        self.better.iter_mut().find_map(|wire| wire.probe(tag)).or_else(|| self.tcp.probe(tag))
    }

    fn mark(&mut self, tag: Tag, many_to_one: bool) {
        self.better.iter_mut().for_each(|wire| wire.mark(tag, many_to_one));
        self.tcp.mark(tag, many_to_one);
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
        self.tidy_up(now);
        self.poll_better(now, done);
        self.settle_doubts(now);
        self.carry_words();
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
        let until = self.better.iter().filter_map(|wire| wire.deadline()).fold(until, Instant::min);
        // Each is asked: one that is not would sleep on.
        let quiet = self.better.iter_mut().map(|wire| wire.fall_asleep()).filter(|quiet| !quiet).count() == 0;
        self.carry_words();
        if quiet && !self.posted && self.early.is_empty() {
            let beside: Vec<_> = self.better.iter().map(|wire| wire.sleep_on()).collect();
            self.tcp.park_beside(until, &beside);
        }
        self.better.iter_mut().for_each(|wire| wire.wake_up());
        self.looked = None;
    }

    fn owes(&self) -> bool {
        self.tcp.owes() || self.better.iter().any(|wire| wire.owes())
    }

    fn device_sided(&mut self) -> Option<&mut dyn DeviceSided> {
        self.better.iter_mut().find_map(|wire| wire.device_sided())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.tcp.waker()
    }

    fn shutdown(&mut self, until: Instant) {
        let now = Instant::now();
        let until_better = until - FAREWELL.min(until.saturating_duration_since(now) / 2);
        let mut done = Vec::new();
        // All together: what a wire has to say may have to go over the sockets.
        while Instant::now() < until_better
            && self.better.iter_mut().filter_map(|wire| (!wire.leave()).then_some(())).count() > 0
        {
            self.poll(Instant::now(), &mut done);
            done.clear();
            self.park(until_better.min(Instant::now() + Duration::from_millis(10)));
        }
        self.better.iter_mut().for_each(|wire| wire.shutdown(until_better));
        self.tcp.shutdown(until);
    }
}
