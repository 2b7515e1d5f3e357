//! Pure: the simulated network itself: what happens next, and what it does to whom.

use super::link::{Frame, Link, grants};
use super::plan::{FaultPlan, Manner, Moment};
use super::random::Random;
use crate::credit::Credit;
use crate::flights::Cargo;
use crate::inbox::Receive;
use crate::pool::Pool;
use crate::slab::Slab;
use crate::{Completion, Config, Envelope, LossCause, PeerId, PeerName, Rank, RegionSliceMut, Tag, TransportError};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for an acknowledgement.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// A frame comes to `to`.
    Arrive { from: PeerId, to: PeerId, number: u64 },
    /// `to` hears that `from` has taken every frame before `next`.
    Ack { from: PeerId, to: PeerId, next: u64 },
    /// A frame that has not been acknowledged by now goes out again.
    Again { from: PeerId, to: PeerId, number: u64, attempt: u32 },
    /// `at` finds that `peer` has been silent too long, or that its connection is closed.
    Lost { at: PeerId, peer: PeerId, silent: bool },
    /// A planned death.
    Die { peer: PeerId, manner: Manner },
    /// Whoever leaves waits no longer.
    Leave { peer: PeerId },
    /// The credit of `at` is looked at though nothing has come.
    Look { at: PeerId },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Up,
    /// Shut down; what it posted is still on its way.
    Leaving,
    Down,
}

/// A peer.
pub(super) struct Node {
    pub(super) config: Config,
    pub(super) links: Vec<Option<Link>>,
    pub(super) done: Vec<Completion>,
    pub(super) pool: Arc<Pool>,
    pub(super) exposed: Slab<(PeerId, RegionSliceMut)>,
    pub(super) state: State,
    pub(super) credit: Option<Credit>,
    /// When credit is looked at next though nothing comes.
    pub(super) look: Option<Instant>,
    messages: u64,
}

/// The network.
pub(super) struct Core {
    pub(super) plan: FaultPlan,
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) random: Random,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    scheduled: u64,
    pub(super) turn: u64,
    nodes: Vec<Option<Node>>,
}

impl Core {
    pub(super) fn new(seed: u64, plan: FaultPlan, start: Instant) -> Self {
        let (random, events) = (Random::new(seed), BinaryHeap::new());
        Self { plan, start, now: start, random, events, scheduled: 0, turn: 0, nodes: Vec::new() }
    }

    /// A peer comes: connected to all that are there; `told`: they hear of it.
    pub(super) fn join(&mut self, me: PeerId, config: &Config, told: bool) {
        if self.nodes.len() <= me.index() {
            self.nodes.resize_with(me.index() + 1, || None);
        }
        assert!(self.nodes[me.index()].is_none(), "peer {} is on this network already", me.0);
        let pool = Arc::new(Pool::default());
        let (config, exposed) = (config.clone(), Slab::default());
        let credit = config.credit.filter(|_| grants(&config)).map(Credit::new);
        self.nodes[me.index()] = Some(Node {
            config,
            links: Vec::new(),
            done: Vec::new(),
            pool,
            exposed,
            state: State::Up,
            credit,
            look: None,
            messages: 0,
        });
        let others: Vec<PeerId> = self.peers().filter(|&other| other != me).collect();
        for other in others {
            if self.node(other).state == State::Up {
                self.connect(me, other);
                self.connect(other, me);
                if told {
                    self.node(other).done.push(Completion::PeerUp(me));
                }
            }
        }
        for death in self.plan.deaths.clone() {
            if let Moment::At(time) = death.moment
                && death.peer == me
            {
                self.at(self.start + time, Event::Die { peer: me, manner: death.manner });
            }
        }
    }

    /// The peer's own state; it has joined.
    pub(super) fn node(&mut self, peer: PeerId) -> &mut Node {
        self.nodes[peer.index()].as_mut().expect("a wire's peer has joined its network")
    }

    /// `me`'s end of the connection to `peer`.
    pub(super) fn link(&mut self, me: PeerId, peer: PeerId) -> Result<&mut Link, TransportError> {
        let node = self.node(me);
        if node.state != State::Up {
            return Err(TransportError::Closed);
        }
        node.links.get_mut(peer.index()).and_then(Option::as_mut).ok_or(TransportError::UnknownPeer(peer.0))
    }

    /// When something happens next.
    pub(super) fn next_event(&mut self) -> Option<Instant> {
        loop {
            let Reverse((at, _, event)) = *self.events.peek()?;
            let stale = match event {
                Event::Again { from, to, number, .. } => self.end(from, to).is_none_or(|link| number < link.first),
                Event::Lost { at, peer, .. } => self.end(at, peer).is_none_or(|link| link.lost.is_some()),
                Event::Leave { peer } => self.node(peer).links.iter().flatten().all(|link| !link.closing),
                Event::Look { at: who } => self.node(who).look != Some(at),
                _ => false,
            };
            if !stale {
                return Some(at);
            }
            self.events.pop();
        }
    }

    /// Lets time pass until `now`.
    pub(super) fn advance(&mut self, now: Instant) {
        while let Some(Reverse((at, _, event))) = self.events.peek().copied()
            && at <= now
        {
            self.events.pop();
            self.now = self.now.max(at);
            match event {
                Event::Arrive { from, to, number } => self.arrive(from, to, number),
                Event::Ack { from, to, next } => self.acknowledge(from, to, next),
                Event::Again { from, to, number, attempt } => self.again(from, to, number, attempt),
                Event::Lost { at, peer, silent } => self.lose(at, peer, silent),
                Event::Die { peer, manner } => self.die(peer, manner),
                Event::Leave { peer } => self.take_leave(peer, true),
                Event::Look { at } => self.grant(at),
            }
        }
        self.now = self.now.max(now);
    }

    /// A message of `me` begins.
    pub(super) fn post(&mut self, me: PeerId, to: Envelope, cargo: Cargo) -> Result<(), (TransportError, Cargo)> {
        let (number, depth) = (self.node(me).messages, self.node(me).config.queue_depth);
        let planned = self.plan.deaths.iter().find(|d| d.peer == me && d.moment == Moment::Message(number));
        if let Some(manner) = planned.map(|death| death.manner) {
            self.die(me, manner);
        }
        let ready = self.link(me, to.peer).and_then(|link| sendable(link, depth));
        if let Err(error) = ready {
            return Err((error, cargo));
        }
        self.node(me).messages += 1;
        let frame = self.link(me, to.peer).expect("it was there just now").begin(to, cargo);
        self.send(me, to.peer, frame);
        Ok(())
    }

    /// A receive of `me` is posted.
    pub(super) fn receive(
        &mut self,
        me: PeerId,
        peer: PeerId,
        tag: Tag,
        receive: Receive,
    ) -> Result<(), (TransportError, Receive)> {
        let depth = self.node(me).config.queue_depth;
        let ready = self.link(me, peer).and_then(|link| match &link.lost {
            Some(lost) if !link.inbox.has_whole(tag) => Err(lost.clone()),
            _ if link.inbox.posted() >= depth => Err(full(link, link.inbox.posted())),
            _ => Ok(()),
        });
        if let Err(error) = ready {
            return Err((error, receive));
        }
        let node = self.node(me);
        let link = node.links[peer.index()].as_mut().expect("it was there just now");
        let frame = link.inbox.post(tag, receive, &mut node.done).and_then(|reply| link.answer(reply));
        self.follow_up(me, peer, frame);
        Ok(())
    }

    /// A write or read of `peer`'s memory begins; `begin` makes its frame.
    pub(super) fn one_sided<T>(
        &mut self,
        (me, peer): (PeerId, PeerId),
        slice: T,
        begin: impl FnOnce(&mut Link, T) -> Frame,
    ) -> Result<(), (TransportError, T)> {
        let depth = self.node(me).config.queue_depth;
        match self.link(me, peer).and_then(|link| sendable(link, depth).map(|()| link)) {
            Ok(link) => {
                let frame = begin(link, slice);
                self.send(me, peer, frame);
                Ok(())
            }
            Err(error) => Err((error, slice)),
        }
    }

    /// `me` gives `peer` up, and says why.
    pub(super) fn disconnect(&mut self, me: PeerId, peer: PeerId, error: &TransportError) {
        let node = self.node(me);
        let Some(link) = node.links.get_mut(peer.index()).and_then(Option::as_mut) else { return };
        if link.lost.is_some() {
            return;
        }
        let text = match error {
            TransportError::PeerLost { cause: LossCause::Aborted(reason), .. } => reason.clone(),
            other => other.to_string(),
        };
        link.end(error, &mut node.done);
        self.send(me, peer, Frame::Abort(text));
        self.grant(me);
    }

    /// `me` leaves in good order: goodbyes follow what it posted, at `until` at the latest.
    pub(super) fn shut_down(&mut self, me: PeerId, until: Instant) {
        if self.node(me).state != State::Up {
            return;
        }
        let node = self.node(me);
        node.state = State::Leaving;
        let mut ended = Vec::new();
        for link in node.links.iter_mut().flatten() {
            link.closing = link.lost.is_none();
            link.inbox.end_all(&TransportError::Closed, &mut ended);
        }
        self.at(until, Event::Leave { peer: me });
        self.take_leave(me, false);
        // Regions call back into their own ledgers only, never into the network.
        drop(ended);
    }

    /// The process of `me` has ended.
    pub(super) fn drop_wire(&mut self, me: PeerId) {
        if self.node(me).state == State::Up {
            self.die(me, Manner::Killed);
        }
        self.node(me).done.clear();
    }

    fn peers(&self) -> impl Iterator<Item = PeerId> + use<> {
        let there: Vec<bool> = self.nodes.iter().map(Option::is_some).collect();
        (0u32..).zip(there).filter(|(_, there)| *there).map(|(peer, _)| PeerId(peer))
    }

    pub(super) fn end(&self, me: PeerId, peer: PeerId) -> Option<&Link> {
        self.nodes.get(me.index())?.as_ref()?.links.get(peer.index())?.as_ref()
    }

    fn connect(&mut self, me: PeerId, peer: PeerId) {
        let (now, start) = (self.now, self.start);
        let theirs = self.node(peer).config.clone();
        let node = self.node(me);
        if node.links.len() <= peer.index() {
            node.links.resize_with(peer.index() + 1, || None);
        }
        let ends = (&node.config, &theirs);
        node.links[peer.index()] = Some(Link::new((peer, name(peer)), ends, Arc::clone(&node.pool), now));
        let timeout = node.config.timeout;
        for cut in self.plan.partitions.clone() {
            let silence = start + cut.from + timeout;
            if cut.parts(me, peer) && start + cut.until > silence && silence > now {
                self.at(silence, Event::Lost { at: me, peer, silent: true });
            }
        }
    }

    pub(super) fn at(&mut self, at: Instant, event: Event) {
        self.scheduled += 1;
        self.events.push(Reverse((at.max(self.now), self.scheduled, event)));
    }

    /// Sends a reply, what is granted now, the window that is due, and a goodbye that has waited for the last message.
    pub(super) fn follow_up(&mut self, me: PeerId, peer: PeerId, reply: Option<Frame>) {
        let Some(link) = self.node(me).links[peer.index()].as_mut().filter(|link| link.lost.is_none()) else { return };
        let credit = link.credit();
        for frame in [reply, credit].into_iter().flatten() {
            self.send(me, peer, frame);
        }
        self.grant(me);
        self.take_leave(me, false);
    }

    fn take_leave(&mut self, me: PeerId, now_or_never: bool) {
        for peer in self.peers() {
            let link = self.node(me).links.get_mut(peer.index()).and_then(Option::as_mut);
            if let Some(goodbye) = link.and_then(|link| link.goodbye(now_or_never)) {
                self.send(me, peer, goodbye);
            }
        }
    }

    pub(super) fn lose(&mut self, at: PeerId, peer: PeerId, silent: bool) {
        let (now, start) = (self.now, self.start);
        if silent {
            let cause = LossCause::Silent(self.node(at).config.timeout);
            self.give_up(at, peer, cause);
        } else if self.plan.is_cut(at, peer, now - start) {
            // The word of the end does not get through yet; silence may come first.
            self.at(now + MAX_WAIT, Event::Lost { at, peer, silent });
        } else {
            self.give_up(at, peer, LossCause::Closed);
        }
    }

    pub(super) fn give_up(&mut self, at: PeerId, peer: PeerId, cause: LossCause) {
        let node = self.node(at);
        let Some(link) = node.links[peer.index()].as_mut() else { return };
        let error = TransportError::PeerLost { peer: Box::new(link.name.clone()), cause };
        link.end(&error, &mut node.done);
        if node.state != State::Up {
            node.done.clear();
        }
        self.grant(at);
    }

    fn die(&mut self, me: PeerId, manner: Manner) {
        let node = self.node(me);
        if node.state == State::Down {
            return;
        }
        node.state = State::Down;
        for link in node.links.iter_mut().flatten() {
            link.end(&TransportError::Closed, &mut node.done);
        }
        node.exposed = Slab::default();
        for other in self.peers().filter(|&other| other != me) {
            let plan = self.plan.link(me, other);
            let (after, silent) = match manner {
                Manner::Killed => (plan.delay + self.random.up_to(plan.jitter), false),
                Manner::Silent => (self.node(other).config.timeout, true),
            };
            if self.end(other, me).is_some_and(|link| link.lost.is_none()) {
                self.at(self.now + after, Event::Lost { at: other, peer: me, silent });
            }
        }
    }
}

/// Whom a number means to people.
pub(super) fn name(peer: PeerId) -> PeerName {
    PeerName { rank: Some(Rank(peer.0)), host: "simulated".to_owned(), pid: 0, address: format!("sim:{}", peer.0) }
}

fn sendable(link: &Link, depth: usize) -> Result<(), TransportError> {
    let queued = link.flights.len() + link.gets.len();
    match &link.lost {
        Some(lost) => Err(lost.clone()),
        None if queued >= depth => Err(full(link, queued)),
        None => Ok(()),
    }
}

fn full(link: &Link, queued: usize) -> TransportError {
    TransportError::QueueFull { peer: Box::new(link.name.clone()), queued }
}
