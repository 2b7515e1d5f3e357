//! Does: serves one seat over a wire, on the thread that runs it. Sleeps while nobody asks.

mod copying;

use crate::control::Line;
use crate::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use crate::protocol::{
    INLINE_BYTES, LOG, PAYLOAD, PAYLOAD_BYTES, POSTED_PAYLOADS, POSTED_REQUESTS, POSTED_SENDS, REPLY, REQUEST,
    REQUEST_BYTES, check_lengths, value,
};
use crate::replica::Seat;
use crate::shard::{Action, Limits, Shard};
use crate::status::{ClientStatus, PAGE};
use crate::{Dialer, PsError, dial};
use gradwire_transport::{
    Completion, Config, CreditSettings, Envelope, LossCause, PeerId, RecvLoan, RegionSlice, Tag, TransportError, Wake,
};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often requests that wait are looked at, while there are clients: a deadline is kept to within this.
const TICK: Duration = Duration::from_millis(250);
/// How long an idle server without clients sleeps. Anything that happens wakes it earlier.
const NAP: Duration = Duration::from_secs(60);
/// How long clients are said goodbye to.
const FAREWELL: Duration = Duration::from_millis(300);

/// Settings of a server.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where to listen; port 0 takes a free one. Default 127.0.0.1:0.
    pub listen: SocketAddr,
    /// The secret that clients must know. Needed off loopback.
    pub token: Option<String>,
    /// Listen off loopback without a token: anybody who reaches the port may read and change every table. Default false.
    pub insecure: bool,
    /// What it may hold.
    pub limits: Limits,
    /// Settings of the wire; its token is set from `token`.
    pub transport: Config,
}

impl Default for ServerSettings {
    fn default() -> Self {
        // A server mostly shares its cores with workers who compute: on a busy machine of 2 cores, 50 turns of spinning
        // made a push_pull of 64 KiB three times slower than none. With a core of its own, 2,000 halve the latency.
        let credit = Some(CreditSettings::default());
        let transport = Config { spin_turns: 0, credit, ..Config::default() };
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: None,
            insecure: false,
            limits: Limits::default(),
            transport,
        }
    }
}

/// Stops a running server from another thread.
#[derive(Clone)]
pub struct Stopper {
    flag: Arc<AtomicBool>,
    waker: Arc<dyn Wake>,
}

impl Stopper {
    pub(crate) fn new(flag: Arc<AtomicBool>, waker: Arc<dyn Wake>) -> Self {
        Self { flag, waker }
    }

    /// Makes [`Server::run`] say goodbye and return.
    pub fn stop(&self) {
        self.flag.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// One connection.
#[derive(Default)]
struct Connection {
    requests: VecDeque<(Header, Option<RecvLoan>)>,
    payloads: VecDeque<RecvLoan>,
    values: VecDeque<(Header, RegionSlice)>,
    sending: usize,
    /// Entries of our log that have not gone.
    log: VecDeque<Vec<u8>>,
}

/// A server of one shard, or of a copy of one.
pub struct Server {
    wire: Box<dyn Dialer>,
    address: SocketAddr,
    seat: Seat,
    /// To the coordinator, where there is one.
    line: Option<Arc<Line>>,
    copying: copying::Copying,
    connections: HashMap<PeerId, Connection>,
    outbox: VecDeque<Action>,
    actions: Vec<Action>,
    done: Vec<Completion>,
    stop: Arc<AtomicBool>,
    spin_turns: u32,
}

impl Server {
    /// Listens; clients are answered once it runs.
    ///
    /// # Errors
    /// `Invalid` off loopback without a token; `Transport` when the address cannot be had.
    pub fn bind(settings: ServerSettings) -> Result<Self, PsError> {
        let instance = dial::random()?;
        let shard = Shard::new(settings.limits.clone(), instance);
        Self::bind_seat(settings, instance, Seat::alone(shard))
    }

    /// Listens for a seat.
    pub(crate) fn bind_seat(settings: ServerSettings, instance: u64, seat: Seat) -> Result<Self, PsError> {
        let token = settings.token.filter(|token| !token.is_empty());
        dial::check_secret(settings.listen, token.as_deref(), settings.insecure)?;
        let config = Config { token, ..settings.transport };
        let (wire, address) = dial::listener(&config, settings.listen, (instance, settings.limits.clients))?;
        Ok(Self::seated(wire, address, seat, config.spin_turns))
    }

    /// Serves `shard` on `wire`, which accepts peers by itself.
    pub fn on(wire: Box<dyn Dialer>, address: SocketAddr, shard: Shard, spin_turns: u32) -> Self {
        Self::seated(wire, address, Seat::alone(shard), spin_turns)
    }

    fn seated(wire: Box<dyn Dialer>, address: SocketAddr, seat: Seat, spin_turns: u32) -> Self {
        Self {
            wire,
            address,
            seat,
            line: None,
            copying: copying::Copying::default(),
            connections: HashMap::new(),
            outbox: VecDeque::new(),
            actions: Vec::new(),
            done: Vec::new(),
            stop: Arc::new(AtomicBool::new(false)),
            spin_turns,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A handle to stop it with.
    pub fn stopper(&self) -> Stopper {
        Stopper::new(Arc::clone(&self.stop), self.wire.waker())
    }

    /// Serves until it is stopped, or its seat has ended.
    pub fn run(&mut self) {
        let mut idle = 0;
        let mut tick = Instant::now() + TICK;
        while !self.stop.load(Ordering::Acquire) && self.seat.over().is_none() {
            let now = Instant::now();
            let moved = self.turn(now);
            let quiet = self.connections.is_empty() && self.line.is_none();
            if now >= tick && !quiet {
                tick = now + self.pause();
                self.seat.tick(now, &mut self.actions);
                self.act();
            }
            if self.line.is_some() {
                self.mind_the_line(now);
            }
            idle = if moved { 0 } else { idle + 1 };
            if idle > self.spin_turns {
                self.wire.park(if quiet { now + NAP } else { tick.max(now) });
                // After a rest one look is enough: spinning is for the middle of a conversation.
                idle = self.spin_turns;
            }
        }
        self.wire.shutdown(Instant::now() + FAREWELL);
    }

    /// Moves what can be moved; whether anything did.
    fn turn(&mut self, now: Instant) -> bool {
        self.wire.poll(now, &mut self.done);
        let moved = !self.done.is_empty();
        let mut done = std::mem::take(&mut self.done);
        for completion in done.drain(..) {
            self.complete(completion, now);
        }
        self.done = done;
        if !self.outbox.is_empty() {
            self.actions.extend(self.outbox.drain(..));
            self.act();
        }
        if self.line.is_some() {
            self.copy(now);
        }
        moved
    }

    fn complete(&mut self, completion: Completion, now: Instant) {
        match completion {
            Completion::PeerUp(peer) => self.welcome(peer),
            Completion::Arrived(arrival) if arrival.from.tag == REQUEST => {
                self.take_request(arrival.from.peer, arrival.loan);
                self.serve(arrival.from.peer, now);
            }
            Completion::Arrived(arrival) if arrival.from.tag == PAYLOAD => {
                if let Some(connection) = self.connections.get_mut(&arrival.from.peer) {
                    connection.payloads.push_back(arrival.loan);
                    self.serve(arrival.from.peer, now);
                }
            }
            Completion::Arrived(arrival) if arrival.from.tag == LOG => self.take_entry(arrival, now),
            Completion::Sent { to, slice } => {
                drop(slice);
                self.sent(to.peer);
            }
            Completion::SendFailed { to, slice, error } => {
                drop(slice);
                tracing::debug!(peer = to.peer.0, %error, "a value could not be sent");
                self.sent(to.peer);
            }
            Completion::RecvFailed { peer, error: TransportError::MessageTooLong { bytes, capacity, .. }, .. } => {
                self.close(peer, format!("a request of {bytes} bytes, of which {capacity} are taken"));
            }
            Completion::PeerDown { peer, error } => self.farewell(peer, &error, now),
            _ => {}
        }
    }

    fn welcome(&mut self, peer: PeerId) {
        self.connections.insert(peer, Connection::default());
        let receives = [(REQUEST, REQUEST_BYTES, POSTED_REQUESTS), (PAYLOAD, PAYLOAD_BYTES, POSTED_PAYLOADS)];
        for (tag, bytes, count) in receives {
            for _ in 0..count {
                self.receive(peer, tag, bytes);
            }
        }
        let (name, wire) = (self.wire.name(peer), self.wire.kind(peer));
        tracing::info!(host = name.host, pid = name.pid, address = name.address, %wire, "a client has connected");
    }

    fn farewell(&mut self, peer: PeerId, error: &TransportError, now: Instant) {
        if let Some(connection) = self.connections.remove(&peer) {
            self.copying.forget(&connection);
            let name = self.wire.name(peer);
            tracing::info!(host = name.host, pid = name.pid, address = name.address, why = %error, "a connection has ended");
        }
        self.seat.gone(peer, now, &mut self.actions);
        self.act();
    }

    fn receive(&mut self, peer: PeerId, tag: Tag, bytes: usize) {
        // A peer that is lost meanwhile is reported by its own completion.
        if let Err(refused) = self.wire.post_recv_loan(peer, tag, bytes) {
            tracing::debug!(peer = peer.0, error = %refused.error, "nothing more can be received");
        }
    }

    fn take_request(&mut self, peer: PeerId, loan: RecvLoan) {
        let header = Header::decode(&loan).map_err(|error| error.to_string());
        let header = header.and_then(|header| check_lengths(&header, loan.len()).map(|()| header));
        match header {
            Ok(header) => {
                let inline = (loan.len() > HEADER_BYTES).then_some(loan);
                if let Some(connection) = self.connections.get_mut(&peer) {
                    connection.requests.push_back((header, inline));
                }
            }
            Err(reason) => self.close(peer, reason),
        }
    }

    /// Hands the requests of a peer to the shard, in their order, as far as their payloads are there.
    fn serve(&mut self, peer: PeerId, now: Instant) {
        loop {
            let Some(connection) = self.connections.get_mut(&peer) else { return };
            let Some((header, _)) = connection.requests.front() else { return };
            if !header.kind.is_control() && (self.copying.is_full() || self.seat.is_full()) {
                // What the backup has not taken yet is bounded; clients wait meanwhile.
                self.copying.stalled = true;
                return;
            }
            let apart = !header.is_inline() && header.payload_bytes > 0;
            if apart && connection.payloads.is_empty() {
                return;
            }
            let Some((header, inline)) = connection.requests.pop_front() else { return };
            let payload = if apart { connection.payloads.pop_front() } else { None };
            let bytes = match (&inline, &payload) {
                (Some(loan), _) => &loan[HEADER_BYTES..],
                (None, Some(loan)) => loan,
                (None, None) => &[],
            };
            self.seat.handle(peer, &header, bytes, now, &mut self.actions);
            drop((inline, payload));
            self.receive(peer, REQUEST, REQUEST_BYTES);
            if apart {
                self.receive(peer, PAYLOAD, PAYLOAD_BYTES);
            }
            self.act();
        }
    }

    /// Does what the shard has decided.
    fn act(&mut self) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Reply { to, header, body } => self.reply(to, header, body),
                Action::Value { to, header, slice } => {
                    if let Some(connection) = self.connections.get_mut(&to) {
                        connection.values.push_back((header, slice));
                        self.send_values(to);
                    }
                }
                Action::Close { peer, reason } => {
                    if self.connections.contains_key(&peer) {
                        self.close(peer, reason);
                    }
                }
                Action::Ship { to, bytes } => self.ship(to, bytes),
                Action::Tell { to, header } => self.tell(to, header),
                Action::Status { to, mut header } => {
                    let body = self.status(usize::try_from(header.keys.start).unwrap_or(usize::MAX));
                    header.flags = FLAG_INLINE;
                    header.payload_bytes = body.len() as u64;
                    self.reply(to, header, body);
                }
            }
        }
        self.actions = actions;
    }

    fn reply(&mut self, to: PeerId, header: Header, body: Vec<u8>) {
        if !self.connections.contains_key(&to) {
            return;
        }
        if header.kind == Kind::Refused {
            tracing::debug!(peer = to.0, status = header.status, "refused a request");
        }
        let Some(mut loan) = self.wire.lend(to, HEADER_BYTES + body.len()) else {
            self.outbox.push_back(Action::Reply { to, header, body });
            return;
        };
        loan[..HEADER_BYTES].copy_from_slice(&header.encode());
        loan[HEADER_BYTES..].copy_from_slice(&body);
        let envelope = Envelope { peer: to, tag: REPLY, note: header.slot.into() };
        if let Err(refused) = self.wire.post_loan(envelope, loan)
            && matches!(refused.error, TransportError::QueueFull { .. })
        {
            self.outbox.push_back(Action::Reply { to, header, body });
        }
    }

    fn send_values(&mut self, to: PeerId) {
        let Some(connection) = self.connections.get_mut(&to) else { return };
        while connection.sending < POSTED_SENDS {
            let Some((header, slice)) = connection.values.pop_front() else { return };
            let envelope = Envelope { peer: to, tag: value(header.slot), note: header.clock };
            match self.wire.post_send(envelope, slice) {
                Ok(()) => connection.sending += 1,
                Err(refused) if matches!(refused.error, TransportError::QueueFull { .. }) => {
                    connection.values.push_front((header, refused.slice));
                    return;
                }
                // The peer is lost: its own completion says so.
                Err(_) => return,
            }
        }
    }

    fn sent(&mut self, to: PeerId) {
        if let Some(connection) = self.connections.get_mut(&to) {
            connection.sending = connection.sending.saturating_sub(1);
            self.send_values(to);
        }
    }

    fn close(&mut self, peer: PeerId, reason: String) {
        let name = self.wire.name(peer);
        tracing::warn!(host = name.host, pid = name.pid, address = name.address, reason, "closing a connection");
        let cause = LossCause::Aborted(reason);
        if let Some(connection) = self.connections.remove(&peer) {
            self.copying.forget(&connection);
        }
        self.wire.disconnect(peer, TransportError::PeerLost { peer: Box::new(name), cause });
    }

    fn status(&self, first: usize) -> Vec<u8> {
        let shard = self.seat.shard();
        let mut status = shard.status(first);
        status.lag = self.seat.standing().3;
        for (client, peer) in shard.clients().skip(first).take(PAGE) {
            let (name, traffic) = (self.wire.name(peer), self.wire.traffic(peer));
            status.clients.push(ClientStatus {
                client,
                host: name.host,
                pid: name.pid,
                address: name.address,
                received_bytes: traffic.received_bytes,
                sent_bytes: traffic.sent_bytes,
            });
        }
        status.encode()
    }
}

// A payload that travels behind its header fits the request that is posted for it.
const _: () = assert!(INLINE_BYTES + HEADER_BYTES == REQUEST_BYTES);
