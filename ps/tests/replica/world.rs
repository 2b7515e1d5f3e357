//! Does: seats, their coordinator and clients, driven by hand in random order; any may die, and any connection break.

use crate::script::{Asked, script};
use gradwire_ps::header::{FLAG_AGAIN, Header, Kind};
use gradwire_ps::replica::{PRIMARY, Seat};
use gradwire_ps::shard::{Action, Limits};
use gradwire_ps::{Cluster, ClusterMap, Join, Mode};
use gradwire_transport::PeerId;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct Random(u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// What travels: in order on each connection, which may be cut with what is on it.
#[derive(Clone, Debug)]
enum Message {
    Request(Header, Vec<u8>),
    Reply(Header),
    Value(Header, Vec<u8>),
    Entry(Arc<Vec<u8>>),
}

/// The ends of a connection: the client, or the seat that follows, and the server that was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Client(usize),
    Seat(u64),
}

struct Connection {
    caller: Caller,
    server: u64,
    peer: PeerId,
    up: VecDeque<Message>,
    down: VecDeque<Message>,
    /// Which ends know that it is cut.
    cut: Option<(bool, bool)>,
}

pub struct Client {
    attempts: u64,
    connection: Option<usize>,
    script: Vec<Asked>,
    /// The next one to go on this connection.
    next: usize,
    greeted: bool,
    /// What the server had no room for.
    later: Vec<u32>,
    pub seen: Vec<f32>,
}

/// A cluster of one shard, and three workers.
pub struct World {
    pub random: Random,
    now: Instant,
    cluster: Cluster,
    seats: BTreeMap<u64, Seat>,
    connections: Vec<Connection>,
    pub clients: Vec<Client>,
    next: u64,
    /// Servers that may still die; while there are any, connections break and messages come twice.
    pub kills: usize,
    /// Backups that have turned from a neighbour that was gone to the next one, without a new copy.
    pub turned: usize,
    /// What clients asked for that came twice.
    twice: HashSet<(usize, u32)>,
    out: Vec<Action>,
}

/// Whether a network that repeats messages may repeat this one: what begins a conversation belongs to its connection.
fn may_come_twice(message: &Message) -> bool {
    match message {
        Message::Request(header, _) => !matches!(header.kind, Kind::Hello | Kind::Follow),
        // Of the log, what happened; the copy of what was before comes once.
        Message::Entry(bytes) => matches!(bytes[0], 2..=5 | 9 | 10),
        Message::Reply(_) | Message::Value(..) => false,
    }
}

impl Client {
    /// Whether the next request may go: what stands alone waits for all before it, and all after it wait for it.
    fn may_send(&self) -> bool {
        let Some((header, ..)) = self.script.get(self.next).filter(|_| self.greeted) else { return false };
        let open = self.script[..self.next].iter().filter(|(.., answered)| !answered);
        let alone = |kind: Kind| !kind.pushes();
        let (count, waits) =
            open.fold((0, false), |(count, waits), (header, ..)| (count + 1, waits || alone(header.kind)));
        !waits && count < if alone(header.kind) { 1 } else { 4 }
    }
}

impl World {
    /// Each shard has `replicas` copies.
    pub fn new(seed: u64, mode: Mode, replicas: u32) -> Self {
        let client = |client| Client {
            attempts: 0,
            connection: None,
            script: script(client, mode),
            next: 0,
            greeted: false,
            later: Vec::new(),
            seen: Vec::new(),
        };
        let mut world = Self {
            random: Random(seed),
            now: Instant::now(),
            cluster: Cluster::new(1, replicas),
            seats: BTreeMap::new(),
            connections: Vec::new(),
            clients: (0..3).map(client).collect(),
            next: 1,
            kills: 0,
            turned: 0,
            twice: HashSet::new(),
            out: Vec::new(),
        };
        (0..=replicas).for_each(|_| world.begin_seat());
        world
    }

    fn begin_seat(&mut self) {
        let (id, limits) = (self.next * 100, Limits::default());
        self.next += 1;
        self.seats.insert(id, Seat::spare(id, limits));
    }

    fn connect(&mut self, caller: Caller, server: u64) -> usize {
        self.next += 1;
        let (peer, up, down) = (PeerId(self.next as u32), VecDeque::new(), VecDeque::new());
        self.connections.push(Connection { caller, server, peer, up, down, cut: None });
        self.connections.len() - 1
    }

    /// Carries out what a seat wants.
    fn act(&mut self, seat: u64) {
        for action in std::mem::take(&mut self.out) {
            let (peer, message) = match action {
                Action::Reply { to, header, .. } => (to, Message::Reply(header)),
                Action::Value { to, header, slice } => (to, Message::Value(header, slice.to_vec())),
                Action::Ship { to, bytes } => {
                    // The log goes on.
                    self.turned += usize::from(bytes[0] == 8);
                    (to, Message::Entry(bytes))
                }
                Action::Tell { header, .. } => {
                    if let Some(connection) = self.made_by(seat) {
                        connection.up.push_back(Message::Request(header, Vec::new()));
                    }
                    continue;
                }
                Action::Close { peer, .. } => {
                    if peer == PRIMARY {
                        // It hears no more of it, whether it was cut or not.
                        let made = self.connections.iter_mut().filter(|it| it.caller == Caller::Seat(seat));
                        made.for_each(|it| it.cut = Some((true, it.cut.is_some_and(|(_, server)| server))));
                    } else if let Some(connection) = self.between(seat, peer) {
                        connection.cut = Some((false, true));
                    }
                    continue;
                }
                Action::Status { .. } | Action::Store { .. } => continue,
            };
            if let Some(connection) = self.between(seat, peer) {
                connection.down.push_back(message);
            }
        }
    }

    /// The connection of `peer` to `seat`, unless it is cut.
    fn between(&mut self, seat: u64, peer: PeerId) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|it| it.server == seat && it.peer == peer && it.cut.is_none())
    }

    /// The connection that `seat` has made to whom it follows, unless it is cut.
    fn made_by(&mut self, seat: u64) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|it| it.caller == Caller::Seat(seat) && it.cut.is_none())
    }

    /// One of the things that may happen next, happens.
    pub fn step(&mut self) {
        self.now += Duration::from_millis(1);
        match self.random.below(100) {
            0..50 => self.deliver(),
            50..75 => self.client_does(),
            75..80 => self.seat_hears(),
            80..90 => self.seat_does(),
            90..93 => self.join(),
            93..97 => self.tell_of_cuts(),
            97 if self.kills > 0 && !self.connections.is_empty() => {
                let at = self.random.below(self.connections.len());
                self.connections[at].cut.get_or_insert((false, false));
            }
            98 => self.kill(),
            _ => {}
        }
    }

    fn pick_seat(&mut self) -> Option<u64> {
        let at = self.random.below(self.seats.len().max(1));
        self.seats.keys().nth(at).copied()
    }

    /// A message arrives, in the order of its connection. What is on the way when a connection is cut may still arrive.
    fn deliver(&mut self) {
        let full: Vec<(usize, bool)> = (0..self.connections.len())
            .flat_map(|at| [(at, true), (at, false)])
            .filter(|&(at, up)| !if up { &self.connections[at].up } else { &self.connections[at].down }.is_empty())
            .filter(|&(at, up)| {
                !self.connections[at].cut.is_some_and(|(caller, server)| if up { server } else { caller })
            })
            .collect();
        let Some(&(at, up)) = full.get(self.random.below(full.len().max(1))) else { return };
        let connection = &mut self.connections[at];
        let (caller, server, peer) = (connection.caller, connection.server, connection.peer);
        let messages = if up { &mut connection.up } else { &mut connection.down };
        let message = messages.pop_front().unwrap();
        if self.kills > 0 && self.random.below(20) == 0 && may_come_twice(&message) {
            if let (Message::Request(header, _), Caller::Client(client)) = (&message, caller) {
                self.twice.insert((client, header.slot));
            }
            messages.push_front(message.clone());
        }
        match (message, caller) {
            (Message::Request(header, body), _) => {
                if let Some(seat) = self.seats.get_mut(&server) {
                    seat.handle(peer, &header, &body, self.now, &mut self.out);
                    self.act(server);
                }
            }
            (Message::Entry(bytes), Caller::Seat(id)) => {
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.take_entry(&bytes, self.now, &mut self.out);
                    seat.answer(&mut self.out);
                    self.act(id);
                }
            }
            (Message::Reply(header), Caller::Client(client)) => self.client_hears(client, at, &header, &[]),
            (Message::Value(header, bytes), Caller::Client(client)) => self.client_hears(client, at, &header, &bytes),
            (other, caller) => panic!("{other:?} to {caller:?}"),
        }
    }

    fn client_hears(&mut self, at: usize, connection: usize, header: &Header, bytes: &[u8]) {
        let client = &mut self.clients[at];
        if client.connection != Some(connection) {
            return;
        }
        if header.slot == u32::MAX {
            if header.kind == Kind::Done {
                client.greeted = true;
                client.attempts = client.attempts.max(header.sequence);
                client.script.iter_mut().for_each(|(request, ..)| request.epoch = header.epoch);
            } else {
                self.connections[connection].cut = Some((false, true));
            }
            return;
        }
        let (request, .., answered) = &mut client.script[header.slot as usize];
        match header.kind {
            Kind::Done => {
                let again = std::mem::replace(answered, true);
                assert!(!again || self.twice.contains(&(at, header.slot)), "answered twice: {request:?}");
                if !again && matches!(request.kind, Kind::Pull | Kind::SparsePull) {
                    let values = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
                    client.seen.extend(values);
                }
            }
            Kind::Later => client.later.push(header.slot),
            kind => panic!("{kind:?} for {request:?}"),
        }
    }

    /// For whoever looks why nothing goes on.
    pub fn told(&self) -> String {
        let seats: Vec<_> = self.seats.iter().map(|(id, seat)| (id, seat.standing(), seat.report())).collect();
        let open = self.clients.iter().flat_map(|client| client.script.iter().filter(|(.., answered)| !answered));
        let open: Vec<_> =
            open.map(|(header, _, sent, _)| (header.client, header.kind, header.sequence, *sent)).collect();
        format!("{seats:?}, {open:?}, {:?}", self.cluster.map())
    }

    /// A client connects, to the server that the coordinator names, or sends its next request.
    fn client_does(&mut self) {
        let at = self.random.below(self.clients.len());
        let client = &self.clients[at];
        match client.connection {
            None => {
                let seats = self.cluster.map().shards.first().filter(|seats| seats.formed);
                let Some(server) = seats.and_then(|seats| seats.primary.clone()) else { return };
                if !self.seats.contains_key(&server.seat) {
                    return;
                }
                let connection = self.connect(Caller::Client(at), server.seat);
                let client = &mut self.clients[at];
                client.attempts += 1;
                (client.connection, client.greeted) = (Some(connection), false);
                client.later.clear();
                // Whatever was not answered goes again.
                client.next = client.script.iter().position(|(.., answered)| !answered).unwrap_or(client.script.len());
                let hello = Header {
                    client: at as u64,
                    incarnation: 1,
                    sequence: client.attempts,
                    slot: u32::MAX,
                    ..Header::new(Kind::Hello)
                };
                self.connections[connection].up.push_back(Message::Request(hello, Vec::new()));
            }
            Some(connection) if !client.later.is_empty() => {
                let client = &mut self.clients[at];
                let slot = client.later.swap_remove(0);
                let (header, body, ..) = &client.script[slot as usize];
                let message = Message::Request(Header { flags: FLAG_AGAIN, ..*header }, body.clone());
                self.connections[connection].up.push_back(message);
            }
            Some(connection) if client.may_send() => {
                let client = &mut self.clients[at];
                let (header, body, before, answered) = &mut client.script[client.next];
                client.next += 1;
                if !*answered {
                    let flags = if std::mem::replace(before, true) { FLAG_AGAIN } else { 0 };
                    let message = Message::Request(Header { flags, ..*header }, body.clone());
                    self.connections[connection].up.push_back(message);
                }
            }
            Some(_) => {}
        }
    }

    fn seat_hears(&mut self) {
        let Some(id) = self.pick_seat() else { return };
        let map = self.cluster.map().clone();
        self.seats.get_mut(&id).unwrap().hear(&map, self.now, &mut self.out);
        self.act(id);
        self.end_where_over(id);
    }

    fn end_where_over(&mut self, id: u64) {
        if self.seats[&id].over().is_some() {
            self.remove(id);
            self.begin_seat();
        }
    }

    fn seat_does(&mut self) {
        let Some(id) = self.pick_seat() else { return };
        let seat = self.seats.get_mut(&id).unwrap();
        seat.tick(self.now, &mut self.out);
        self.act(id);
        let seat = self.seats.get_mut(&id).unwrap();
        seat.tell_more(self.now, &mut self.out);
        self.act(id);
        let seat = &self.seats[&id];
        if let Some(report) = seat.report() {
            self.cluster.report(report, self.now);
        }
        if let Some(address) = seat.dial() {
            let server: u64 = address.parse().unwrap();
            if self.seats.contains_key(&server) {
                self.connect(Caller::Seat(id), server);
                self.seats.get_mut(&id).unwrap().dialled(self.now, &mut self.out);
                self.act(id);
            }
        }
        self.end_where_over(id);
    }

    /// The processes, one a seat, say that they are there.
    fn join(&mut self) {
        for &id in self.seats.keys() {
            let join =
                Join { process: id, leaving: false, seats: vec![(id, id.to_string())], known: ClusterMap::default() };
            self.cluster.join(join, self.now);
        }
        self.cluster.tick(self.now);
    }

    /// One end of a connection that is cut sees it.
    fn tell_of_cuts(&mut self) {
        let cut: Vec<usize> = (0..self.connections.len())
            .filter(|&at| self.connections[at].cut.is_some_and(|ends| ends != (true, true)))
            .collect();
        let Some(&at) = cut.get(self.random.below(cut.len().max(1))) else { return };
        let connection = &mut self.connections[at];
        let (caller, server, peer) = (connection.caller, connection.server, connection.peer);
        let ends = connection.cut.as_mut().unwrap();
        if !ends.0 && (ends.1 || self.random.below(2) == 0) {
            ends.0 = true;
            match caller {
                Caller::Client(client) => self.clients[client].connection = None,
                Caller::Seat(id) => {
                    if let Some(seat) = self.seats.get_mut(&id) {
                        seat.gone(PRIMARY, self.now, &mut self.out);
                        self.act(id);
                        self.end_where_over(id);
                    }
                }
            }
        } else {
            ends.1 = true;
            if let Some(seat) = self.seats.get_mut(&server) {
                seat.gone(peer, self.now, &mut self.out);
                self.act(server);
            }
        }
    }

    fn remove(&mut self, id: u64) {
        self.seats.remove(&id);
        for connection in &mut self.connections {
            if connection.server == id || connection.caller == Caller::Seat(id) {
                let (caller, server) = connection.cut.unwrap_or((false, false));
                connection.cut =
                    Some((caller || connection.caller == Caller::Seat(id), server || connection.server == id));
            }
        }
    }

    /// A server dies, where another has all that it has. A new one takes its seat in the house.
    fn kill(&mut self) {
        let Some(seats) = self.cluster.map().shards.first().filter(|_| self.kills > 0) else { return };
        let chain = seats.primary.iter().chain(&seats.backups).map(|who| who.seat);
        let alive: Vec<u64> = chain.filter(|seat| self.seats.contains_key(seat)).collect();
        if alive.len() < 2 {
            return;
        }
        // The primary in every second case, whatever the number of copies.
        let at = self.random.below(2 * alive.len()) % (alive.len() + 1) % alive.len();
        self.kills -= 1;
        self.remove(alive[at]);
        self.begin_seat();
    }

    pub fn is_done(&self) -> bool {
        self.clients.iter().all(|client| client.script.iter().all(|(.., answered)| *answered))
    }
}
