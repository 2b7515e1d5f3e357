//! Does: the connection to each shard: dialled, greeted, lost, dialled again, given up.

use super::engine::{Engine, Entry, Phase};
use crate::PsError;
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::protocol::{POSTED_REPLIES, REPLY, REPLY_BYTES, REQUEST};
use crate::refusal::{Reason, Refusal};
use crate::shard_map::Epoch;
use gradwire_transport::{Envelope, LossCause, PeerId, TransportError};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The longest that dialling one server anew may keep the others waiting.
const DIAL: Duration = Duration::from_millis(250);
/// Pause between two attempts.
const AGAIN: Duration = Duration::from_millis(20);
/// Pauses until a coordinator is asked about a lost shard, and until the shard is called where it was though nothing is said
/// of its having moved.
const GLANCE: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_millis(300);
/// Silence after which a coordinator is asked whether another server has the shard: a host that vanishes closes nothing. And the
/// pause where no coordinator answers.
const SILENCE: Duration = Duration::from_secs(1);
const NO_COORDINATOR: Duration = Duration::from_secs(5);
/// How long a server has to answer a hello.
const GREETING: Duration = Duration::from_secs(5);

/// Why a server that was restored from a checkpoint is not gone on with: what was pushed after it would be missing, and nobody
/// would know.
pub(super) const RESTORED: &str =
    "another server process answers there now, restored from a checkpoint: its tables' clocks say from where to go on";

/// Why another server process than the one we began with is of no use to calls on its tables.
pub(super) const WITHOUT_TABLES: &str = "another server process answers there now, without the tables";

/// How the connection stands.
#[derive(Clone, Debug)]
enum State {
    /// There is none. `since`: from when on somebody has needed it.
    Down { since: Option<Instant>, next: Instant, cause: String },
    /// The hello is on its way.
    Greeting { until: Instant },
    /// Requests may go.
    Up,
}

/// One shard as a client reaches it.
pub(super) struct Reach {
    pub(super) address: String,
    /// Requests that may go, in their order.
    pub(super) queue: VecDeque<u32>,
    /// Requests that the server had no room for, and when they go again.
    pub(super) resting: VecDeque<(Instant, u32)>,
    /// Payloads posted and not yet sent.
    pub(super) sending: usize,
    /// Whether another process answers at its address than the one we began with.
    pub(super) restarted: bool,
    /// The epoch in which it began to answer.
    pub(super) epoch: Epoch,
    /// The longest payload that it takes.
    pub(super) most_bytes: u64,
    /// When it has said something last.
    pub(super) heard: Instant,
    /// When the coordinator is asked about it next, while it is silent.
    next_glance: Instant,
    /// Since when it is not up, though needed.
    trying_since: Option<Instant>,
    /// When it is called next though the coordinator does not say that it has moved.
    blind_call: Instant,
    state: State,
    attempts: u64,
    instance: Option<u64>,
}

impl Reach {
    pub(super) fn new(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            queue: VecDeque::new(),
            resting: VecDeque::new(),
            sending: 0,
            restarted: false,
            epoch: Epoch::default(),
            trying_since: None,
            blind_call: Instant::now(),
            most_bytes: 0,
            heard: Instant::now(),
            next_glance: Instant::now(),
            state: State::Down { since: None, next: Instant::now(), cause: "it was never reached".to_owned() },
            attempts: 0,
            instance: None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.state, State::Up)
    }

    /// When this connection wants attention by itself.
    pub(super) fn next_try(&self) -> Option<Instant> {
        match self.state {
            State::Down { since: Some(_), next, .. } => Some(next),
            State::Greeting { until } => Some(until),
            State::Down { since: None, .. } | State::Up => None,
        }
    }

    /// A request goes again at `until`.
    pub(super) fn rest(&mut self, until: Instant, slot: u32) {
        let at = self.resting.partition_point(|&(when, _)| when <= until);
        self.resting.insert(at, (until, slot));
    }
}

impl Engine {
    /// Reaches every shard for the first time.
    pub(super) fn reach_all(&mut self, deadline: Instant) -> Result<(), PsError> {
        while !self.shards.iter().all(Reach::is_up) {
            for at in 0..self.shards.len() {
                let State::Down { cause, .. } = &self.shards[at].state else { continue };
                let (shard, cause) = (at as u32, cause.clone());
                let clustered = self.directory.is_some();
                if clustered && self.shards[at].attempts > 0 {
                    self.look_up(at, Instant::now());
                }
                let address = self.shards[at].address.clone();
                if let Some(error) = self.refused_hello.take() {
                    return Err(error);
                }
                if self.shards[at].attempts > 0 && Instant::now() >= deadline {
                    return Err(PsError::ServerLost { shard, address, cause });
                }
                let until = if clustered { deadline.min(Instant::now() + DIAL) } else { deadline };
                match self.wire.call(PeerId(shard), &address, until) {
                    Ok(()) => self.greet(at),
                    Err(TransportError::Unreachable { .. }) if clustered && Instant::now() < deadline => {
                        self.shards[at].attempts += 1;
                    }
                    Err(error) => return Err(lost_error(shard, &address, error, None)),
                }
            }
            let now = Instant::now();
            if !self.turn(now) {
                self.park(deadline.clamp(now, now + DIAL));
            }
        }
        Ok(())
    }

    /// Sees to connections that are down, greetings without an answer, and requests that have rested.
    pub(super) fn reach_shards(&mut self, now: Instant) -> bool {
        let mut moved = false;
        for at in 0..self.shards.len() {
            let shard = &mut self.shards[at];
            while let Some(&(until, slot)) = shard.resting.front()
                && until <= now
            {
                shard.resting.pop_front();
                shard.queue.push_back(slot);
                if let Some(Some(entry)) = self.entries.get_mut(slot as usize) {
                    entry.phase = Phase::Queued;
                }
            }
            match &self.shards[at].state {
                State::Up => {}
                State::Greeting { until } if *until > now => {}
                State::Greeting { .. } => {
                    let peer = PeerId(at as u32);
                    let error = self.silence(peer, GREETING);
                    self.wire.disconnect(peer, error);
                    self.shards[at].state = State::Greeting { until: now + GREETING };
                }
                State::Down { .. } => moved |= self.dial_again(at, now),
            }
        }
        moved
    }

    fn silence(&self, peer: PeerId, how_long: Duration) -> TransportError {
        TransportError::PeerLost { peer: Box::new(self.wire.name(peer)), cause: LossCause::Silent(how_long) }
    }

    /// Dials a server that is needed, once what was posted to it before has come back.
    fn dial_again(&mut self, at: usize, now: Instant) -> bool {
        let of_shard = || self.entries.iter().flatten().filter(|entry| entry.request.shard as usize == at);
        let waits = |entry: &Entry| entry.outcome.is_none();
        let needed = self
            .entries
            .iter()
            .flatten()
            .any(|it| waits(it) && (it.request.shard as usize == at || it.request.fragile));
        let posted = of_shard().any(|entry| entry.receiving || entry.sending > 0);
        let Reach { state, trying_since, .. } = &mut self.shards[at];
        let State::Down { since, next, cause } = state else { return false };
        if !needed {
            *since = None;
            return false;
        }
        let since = *since.get_or_insert(*trying_since.get_or_insert(now));
        if posted || now < *next {
            return false;
        }
        let cause = cause.clone();
        if now < since + self.reconnect && !self.look_up(at, now) {
            if let State::Down { next, .. } = &mut self.shards[at].state {
                *next = Instant::now() + AGAIN;
            }
            return true;
        }
        let (address, peer) = (self.shards[at].address.clone(), PeerId(at as u32));
        match self.wire.call(peer, &address, now + DIAL) {
            Ok(()) => {
                tracing::info!(shard = at, address, "reached the server again");
                self.greet(at);
            }
            Err(error) => {
                let again = now < since + self.reconnect && !is_final(&error);
                if let State::Down { since, next, .. } = &mut self.shards[at].state {
                    *next = Instant::now() + AGAIN;
                    *since = since.filter(|_| again);
                }
                if !again {
                    self.fail_shard(at as u32, lost_error(at as u32, &address, error, Some(cause)));
                }
            }
        }
        true
    }

    /// Says hello on a connection that has just been made.
    fn greet(&mut self, at: usize) {
        let peer = PeerId(at as u32);
        let shard = &mut self.shards[at];
        shard.attempts += 1;
        shard.sending = 0;
        shard.state = State::Greeting { until: Instant::now() + GREETING };
        let hello = Header { kind: Kind::Hello, sequence: shard.attempts, slot: u32::MAX, ..self.me };
        for _ in 0..POSTED_REPLIES {
            // A peer that is lost meanwhile is reported by its own completion.
            let _ = self.wire.post_recv_loan(peer, REPLY, REPLY_BYTES);
        }
        let Some(mut loan) = self.wire.lend(peer, HEADER_BYTES) else {
            unreachable!("a connection that has just been made has lent nothing yet")
        };
        loan.copy_from_slice(&hello.encode());
        let _ = self.wire.post_loan(Envelope { peer, tag: REQUEST, note: 0 }, loan);
    }

    /// A server has answered our hello.
    pub(super) fn greeted(&mut self, peer: PeerId, header: &Header, body: &[u8]) {
        if header.kind == Kind::Refused {
            let (shard, address) = (peer.0, self.shards[peer.index()].address.clone());
            let moved = self.directory.is_some() && Reason::of_status(header.status) == Reason::WrongEpoch;
            if moved {
                // It is not the shard's server, not yet or not any more: the coordinator will tell who is.
                return self.turn_away(peer);
            }
            let error = match Refusal::decode(header.status, body) {
                Ok(refusal) => PsError::Refused { shard, address, refusal: Box::new(refusal) },
                Err(bad) => PsError::Protocol { shard, address, reason: bad.to_string() },
            };
            self.refused_hello = Some(error.clone());
            self.fail_shard(shard, error);
            let error = self.silence(peer, Duration::ZERO);
            self.wire.disconnect(peer, error);
            return;
        }
        let shard = &self.shards[peer.index()];
        if header.status != 0 && shard.instance.is_some_and(|instance| instance != header.clock) {
            let error =
                PsError::ServerLost { shard: peer.0, address: shard.address.clone(), cause: RESTORED.to_owned() };
            self.fail_shard(peer.0, error);
            let error = self.silence(peer, Duration::ZERO);
            self.wire.disconnect(peer, error);
            return;
        }
        let shard = &mut self.shards[peer.index()];
        let restarted = shard.instance.is_some_and(|instance| instance != header.clock);
        shard.restarted |= restarted;
        shard.instance = Some(header.clock);
        shard.epoch = header.epoch;
        shard.most_bytes = header.keys.len();
        shard.trying_since = None;
        shard.state = State::Up;
        if restarted {
            let (shard, address) = (peer.0, shard.address.clone());
            let cause = WITHOUT_TABLES.to_owned();
            self.fail_fragile(&PsError::ServerLost { shard, address, cause });
        }
    }

    /// A server does not serve the shard: another is asked for.
    fn turn_away(&mut self, peer: PeerId) {
        let name = Box::new(self.wire.name(peer));
        let cause = LossCause::Aborted("it does not serve this shard".to_owned());
        self.wire.disconnect(peer, TransportError::PeerLost { peer: name, cause });
    }

    /// Looks whether a shard has moved. False where it has not, and was called lately.
    fn look_up(&mut self, at: usize, now: Instant) -> bool {
        let Some(directory) = &self.directory else { return true };
        let map = match directory.ask(Instant::now() + DIAL) {
            Ok(map) => map,
            Err(error) => {
                tracing::warn!(shard = at, %error, "calling the shard where it was before");
                return true;
            }
        };
        let primary = map.shards.get(at).and_then(|seats| seats.primary.as_ref());
        let Some(primary) = primary else { return false };
        let shard = &mut self.shards[at];
        let moved = shard.address != primary.address || shard.epoch < map.shards[at].term;
        if moved && shard.address != primary.address {
            tracing::info!(shard = at, from = shard.address, to = primary.address, "the shard has moved");
            shard.address.clone_from(&primary.address);
        }
        if moved || now >= shard.blind_call {
            shard.blind_call = now + PATIENCE;
            return true;
        }
        false
    }

    /// Leaves servers that owe an answer, say nothing, and have been replaced.
    pub(super) fn look_after_silent_shards(&mut self, now: Instant) {
        let Some(directory) = &self.directory else { return };
        let owes = |at: usize| self.entries.iter().flatten().any(|it| it.owed && it.request.shard as usize == at);
        let due = |shard: &Reach| shard.is_up() && now >= shard.next_glance && now >= shard.heard + SILENCE;
        let silent: Vec<usize> = (0..self.shards.len()).filter(|&at| due(&self.shards[at]) && owes(at)).collect();
        if silent.is_empty() {
            return;
        }
        // One answer tells of all.
        let asked = directory.ask(Instant::now() + DIAL);
        let next = Instant::now() + if asked.is_ok() { SILENCE } else { NO_COORDINATOR };
        for at in silent {
            self.shards[at].next_glance = next;
            let term = asked.as_ref().ok().and_then(|map| map.shards.get(at).map(|seats| seats.term));
            if term.is_some_and(|term| term > self.shards[at].epoch) {
                tracing::info!(shard = at, address = self.shards[at].address, "the server is silent, and was replaced");
                self.turn_away(PeerId(at as u32));
            }
        }
    }

    /// A connection is gone. What the server had of us goes again over the next one.
    pub(super) fn lost(&mut self, peer: PeerId, error: &TransportError, now: Instant) {
        let cause = match error {
            TransportError::PeerLost { cause: LossCause::Goodbye, .. } => "the server was stopped".to_owned(),
            TransportError::PeerLost { cause, .. } => cause.to_string(),
            other => other.to_string(),
        };
        let at = peer.index();
        tracing::info!(shard = at, address = self.shards[at].address, cause, "lost the connection to a server");
        let mut again: Vec<(u64, u32)> = Vec::new();
        let mut settled = Vec::new();
        for (slot, entry) in (0..).zip(&mut self.entries) {
            let Some(entry) = entry.as_mut().filter(|entry| entry.request.shard == peer.0) else { continue };
            entry.owed = false;
            if entry.outcome.is_some() {
                settled.push(slot);
            } else if entry.phase != Phase::Laned {
                entry.phase = Phase::Queued;
                again.push((entry.order, slot));
            }
        }
        again.sort_unstable();
        let shard = &mut self.shards[at];
        shard.resting.clear();
        shard.queue.clear();
        shard.queue.extend(again.into_iter().map(|(_, slot)| slot));
        // Who has a coordinator gives it a moment to see what has happened.
        let next = if self.directory.is_some() { now + GLANCE } else { now };
        shard.blind_call = now + PATIENCE;
        shard.state = State::Down { since: None, next, cause };
        settled.into_iter().for_each(|slot| self.settle(slot));
    }

    /// Gives up what is in vain once any server has lost its tables, or another worker recovers them.
    pub(super) fn fail_fragile(&mut self, error: &PsError) {
        for slot in 0..self.entries.len() {
            if self.entries[slot].as_ref().is_some_and(|entry| entry.request.fragile) {
                self.give_up(slot as u32, error.clone());
            }
        }
    }

    /// Gives up every request to a shard.
    pub(super) fn fail_shard(&mut self, shard: u32, error: PsError) {
        self.fail_fragile(&error);
        for slot in 0..self.entries.len() {
            if self.entries[slot].as_ref().is_some_and(|entry| entry.request.shard == shard) {
                self.give_up(slot as u32, error.clone());
            }
        }
    }

    /// A server does what it must not: it is not spoken to any more.
    pub(super) fn broken(&mut self, peer: PeerId, reason: &str) {
        let (shard, address) = (peer.0, self.shards[peer.index()].address.clone());
        self.fail_shard(shard, PsError::Protocol { shard, address, reason: reason.to_owned() });
        let name = Box::new(self.wire.name(peer));
        self.wire
            .disconnect(peer, TransportError::PeerLost { peer: name, cause: LossCause::Protocol(reason.to_owned()) });
    }
}

/// Whether it would be the same when tried again.
fn is_final(error: &TransportError) -> bool {
    matches!(error, TransportError::Authentication { .. } | TransportError::Tls { .. })
}

/// What a failed dial means: no shard without its cause.
fn lost_error(shard: u32, address: &str, error: TransportError, before: Option<String>) -> PsError {
    let address = address.to_owned();
    match error {
        TransportError::Authentication { reason, .. } => PsError::Authentication { address, reason },
        error @ TransportError::Tls { .. } => PsError::Transport(error),
        TransportError::Unreachable { reason, .. } => {
            let cause = before.map_or_else(String::new, |cause| format!("{cause}, and then "));
            PsError::ServerLost { shard, address, cause: format!("{cause}nobody answered: {reason}") }
        }
        other => PsError::ServerLost { shard, address, cause: other.to_string() },
    }
}
