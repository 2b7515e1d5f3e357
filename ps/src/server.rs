//! Does: serves one seat over a wire, on the thread that runs it. Sleeps while nobody asks.

mod copying;
mod telling;

use crate::control::Line;
use crate::gauges::Gauges;
use crate::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use crate::keeper::{Checkpoints, Keeper};
use crate::monitor::{Monitor, Questions};
use crate::patience::{self, Patience};
use crate::protocol::{
    INLINE_BYTES, LOG, PAYLOAD, PAYLOAD_BYTES, POSTED_PAYLOADS, POSTED_REQUESTS, POSTED_SENDS, REPLY, REQUEST,
    REQUEST_BYTES, check_lengths, value,
};
use crate::replica::{PRIMARY, Seat};
use crate::shard::{Action, Limits, Shard};
use crate::shard_map::MAX_PART_BYTES;
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
/// Bytes of values that may wait for a client to read them: beyond, no more are made for it until it has. Twice what is posted
/// to the wire at once, so that no link waits for the shard.
const MOST_UNREAD: usize = 2 * POSTED_SENDS * MAX_PART_BYTES;
/// How long clients are said goodbye to.
const FAREWELL: Duration = Duration::from_millis(300);

/// Settings of a server.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where to listen; port 0 takes a free one. Default 127.0.0.1:0.
    pub listen: SocketAddr,
    /// The secret that clients must know. Needed off loopback, unless there is TLS.
    pub token: Option<String>,
    /// Listen off loopback without a token or TLS: anybody who reaches the port may read and change every table. Default false.
    pub insecure: bool,
    /// Whether it counts for [`Server::monitor`]. Default false.
    pub watched: bool,
    /// What it may hold.
    pub limits: Limits,
    /// The longest that it looks for more after something has come, before it sleeps: less where little comes soon.
    /// Default 200 µs.
    pub spin: Duration,
    /// Where checkpoints are kept. Default: nowhere, and who asks for one is refused.
    pub checkpoints: Option<Checkpoints>,
    /// Whether who starts the servers asks them for checkpoints as often as tables want (`gradwire-ps serve` does); such tables are
    /// refused elsewhere. Default false.
    pub as_wanted: bool,
    /// Settings of the wire; its token is set from `token`.
    pub transport: Config,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: None,
            insecure: false,
            watched: false,
            limits: Limits::default(),
            checkpoints: None,
            as_wanted: false,
            spin: patience::MOST,
            transport: Config { credit: Some(CreditSettings::default()), ..Config::default() },
        }
    }
}

impl ServerSettings {
    /// Whether a server may start so.
    ///
    /// # Errors
    /// `Invalid` off loopback without a token and without TLS.
    pub fn check(&self) -> Result<(), PsError> {
        let open = self.token.as_ref().is_none_or(String::is_empty) && self.transport.tls.is_none();
        dial::check_open(self.listen, open && !self.insecure)
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
    /// Bytes of values that were made for it and have not gone.
    unread: usize,
    /// Entries of our log that have not gone.
    log: VecDeque<Arc<Vec<u8>>>,
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
    questions: Arc<Questions>,
    gauges: Option<Gauges>,
    patience: Patience,
    keeper: Option<Keeper>,
}

impl Server {
    /// Listens; clients are answered once it runs.
    ///
    /// # Errors
    /// `Invalid` off loopback without a token and without TLS; `Transport` when the address cannot be had.
    pub fn bind(settings: ServerSettings) -> Result<Self, PsError> {
        let shard = Shard::new(settings.limits.clone(), dial::random()?);
        Self::bind_with(settings, shard)
    }

    /// Listens, with what `shard` holds.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_with(settings: ServerSettings, shard: Shard) -> Result<Self, PsError> {
        let instance = shard.instance();
        Self::bind_seat(settings, instance, Seat::alone(shard))
    }

    /// Listens for a seat.
    pub(crate) fn bind_seat(settings: ServerSettings, instance: u64, mut seat: Seat) -> Result<Self, PsError> {
        settings.check()?;
        let token = settings.token.filter(|token| !token.is_empty());
        let config = Config { token, ..settings.transport };
        let who = (instance, settings.limits.clients);
        let (wire, address) = dial::listener(&config, settings.listen, who)?;
        if settings.checkpoints.is_some() {
            seat.keep_checkpoints();
        }
        let keeper = settings.checkpoints.map(|kept| Keeper::start(&kept, wire.waker())).transpose()?;
        Ok(Self { keeper, ..Self::seated(wire, address, seat, settings.spin) })
    }

    /// Serves `shard` on `wire`, which accepts peers by itself; looks for more for `spin` at most before it sleeps.
    pub fn on(wire: Box<dyn Dialer>, address: SocketAddr, shard: Shard, spin: Duration) -> Self {
        Self::seated(wire, address, Seat::alone(shard), spin)
    }

    fn seated(wire: Box<dyn Dialer>, address: SocketAddr, seat: Seat, spin: Duration) -> Self {
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
            questions: Arc::default(),
            gauges: None,
            patience: Patience::new(spin),
            keeper: None,
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

    /// What others ask for its reports; from now on it counts for them.
    pub fn monitor(&mut self) -> Monitor {
        self.count();
        self.uncounted_monitor()
    }

    /// The same, for its status alone: nothing is counted.
    pub(crate) fn uncounted_monitor(&mut self) -> Monitor {
        self.questions.open();
        Monitor::new(Arc::clone(&self.questions), self.wire.waker())
    }

    /// Requests are counted from now on.
    pub(crate) fn count(&mut self) {
        self.gauges.get_or_insert_default();
    }

    /// Answers the questions of a monitor of the server before.
    pub(crate) fn answer_to(&mut self, monitor: &Monitor) {
        self.questions = monitor.turn_to(self.wire.waker());
        self.questions.open();
    }

    /// Serves until it is stopped, or its seat has ended.
    pub fn run(&mut self) {
        let mut last = Instant::now();
        let mut tick = last + TICK;
        while !self.stop.load(Ordering::Acquire) && self.seat.over().is_none() {
            let now = Instant::now();
            let moved = self.turn(now);
            for asker in self.questions.take() {
                // Who does not wait any more needs no answer.
                let _ = asker.send(self.report(now));
            }
            let quiet = self.connections.is_empty() && self.line.is_none();
            if now >= tick && !quiet {
                tick = now + self.pause();
                self.seat.tick(now, &mut self.actions);
                self.act();
            }
            self.mind_the_line(now);
            let idle = now.saturating_duration_since(last);
            if moved {
                self.patience.learn(idle);
                last = Instant::now();
            } else if self.patience.looks_on(idle) {
                // Whoever is waited for may want this very core.
                std::thread::yield_now();
            } else {
                self.wire.park(if quiet { now + NAP } else { tick.max(now) });
            }
        }
        self.questions.close();
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
        if let Some(keeper) = self.keeper.as_mut().filter(|keeper| keeper.is_busy()) {
            keeper.answers(&mut self.actions);
            self.act();
        }
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
            Completion::Sent { to, slice } => self.sent(to.peer, slice, now),
            Completion::SendFailed { to, slice, error } => {
                tracing::debug!(peer = to.peer.0, %error, "a value could not be sent");
                self.sent(to.peer, slice, now);
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
        if let Some(gauges) = &mut self.gauges {
            gauges.gone(peer);
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
            if header.kind.pulls() && connection.unread >= MOST_UNREAD {
                // It is served again once something has gone.
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
            if let Some(gauges) = &mut self.gauges {
                gauges.ask(peer, &header, now);
            }
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
                    if let Some(gauges) = &mut self.gauges {
                        gauges.answer(to, &header, Instant::now());
                    }
                    if let Some(connection) = self.connections.get_mut(&to) {
                        connection.unread += slice.len();
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
                Action::Store { to, header, cut } => match &mut self.keeper {
                    Some(keeper) => self.outbox.extend(keeper.store(to, header, cut)),
                    None => {
                        let why = "no folder is known: start the servers with --checkpoint-dir".to_owned();
                        self.outbox.push_back(Shard::stored((to, header), Err(why)));
                    }
                },
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
        if let Some(gauges) = &mut self.gauges {
            gauges.answer(to, &header, Instant::now());
        }
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

    /// A value has gone, or never will.
    fn sent(&mut self, to: PeerId, slice: RegionSlice, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&to) {
            connection.sending = connection.sending.saturating_sub(1);
            connection.unread = connection.unread.saturating_sub(slice.len());
            drop(slice);
            self.send_values(to);
            self.serve(to, now);
        }
    }

    fn close(&mut self, peer: PeerId, reason: String) {
        let name = self.wire.name(peer);
        tracing::warn!(host = name.host, pid = name.pid, address = name.address, reason, "closing a connection");
        let cause = LossCause::Aborted(reason);
        if let Some(connection) = self.connections.remove(&peer) {
            self.copying.forget(&connection);
        }
        if peer == PRIMARY {
            self.copying.call_later(Instant::now());
        }
        self.wire.disconnect(peer, TransportError::PeerLost { peer: Box::new(name), cause });
    }
}

// A payload that travels behind its header fits the request that is posted for it.
const _: () = assert!(INLINE_BYTES + HEADER_BYTES == REQUEST_BYTES);
