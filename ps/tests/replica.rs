//! Does: drives seats, their coordinator and clients by hand, in random order, kills any of them at any point, and counts.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::header::{FLAG_AGAIN, Header, Kind};
use gradwire_ps::replica::{PRIMARY, Seat};
use gradwire_ps::shard::{Action, Limits};
use gradwire_ps::{
    Cluster, ClusterMap, Combine, Compression, DType, Initializer, Join, KeyRange, Mode, Recovery, SparseSpec, TableId,
    TableSpec, UpdateRule, open_body, open_sparse_body,
};
use gradwire_transport::PeerId;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

const DENSE: u64 = 2;
const PUSHES: u64 = 12;
const IDS: u64 = 3;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// What travels: in order on each connection, which may be cut with what is on it.
#[derive(Debug)]
enum Message {
    Request(Header, Vec<u8>),
    Reply(Header),
    Value(Header, Vec<u8>),
    Entry(Vec<u8>),
}

/// The ends of a connection: the client, or the backup's seat, and the server that was called.
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

struct Client {
    attempts: u64,
    connection: Option<usize>,
    /// What it asks for, whether that went before, and whether it was answered.
    script: Vec<(Header, Vec<u8>, bool, bool)>,
    /// The next one to go on this connection.
    next: usize,
    greeted: bool,
    /// What the server had no room for.
    later: Vec<u32>,
    seen: Vec<f32>,
}

/// A cluster of one shard, and three workers.
struct World {
    random: Random,
    now: Instant,
    cluster: Cluster,
    seats: BTreeMap<u64, Seat>,
    connections: Vec<Connection>,
    clients: Vec<Client>,
    next: u64,
    kills: usize,
    out: Vec<Action>,
}

fn dense_spec(mode: Mode) -> TableSpec {
    TableSpec {
        name: "dense".into(),
        shape: vec![DENSE],
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode,
        combine: Combine::Sum,
        clipped: false,
        compression: Compression::default(),
        recovery: Recovery::Replicate,
        shards: 1,
        shard: 0,
        part_elements: DENSE,
    }
}

fn sparse_spec(mode: Mode) -> SparseSpec {
    SparseSpec {
        name: "sparse".into(),
        dim: 1,
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode,
        combine: Combine::Sum,
        initializer: Initializer::Zeros,
        seed: 0,
        capacity: None,
        eviction: None,
        admission: 1,
        recovery: Recovery::Replicate,
        shards: 1,
        shard: 0,
    }
}

fn floats(count: u64) -> Vec<u8> {
    (0..count).flat_map(|_| 1f32.to_le_bytes()).collect()
}

fn ids() -> Vec<u8> {
    (0..IDS).flat_map(u64::to_le_bytes).collect()
}

/// What worker `client` of `mode` asks for, one thing after the other: opens, pushes, a pull of each table.
fn script(client: u64, mode: Mode) -> Vec<(Header, Vec<u8>, bool, bool)> {
    let clock = |n: u64| if mode.workers().is_some() { n } else { 0 };
    let dense = Header { table: TableId::of("dense"), dtype: Some(DType::F32), ..Header::new(Kind::Push) };
    let sparse = Header { table: TableId::of("sparse"), ..dense };
    let all = KeyRange { start: 0, end: DENSE };
    let rows = KeyRange { start: 0, end: IDS };
    let mut out = Vec::new();
    out.push((Header { kind: Kind::Open, ..dense }, open_body(&dense_spec(mode))));
    out.push((Header { kind: Kind::OpenSparse, ..sparse }, open_sparse_body(&sparse_spec(mode))));
    for n in 1..=PUSHES {
        let kind = if n % 3 == 0 { Kind::PushPull } else { Kind::Push };
        out.push((Header { kind, keys: all, clock: clock(n), sequence: n, ..dense }, floats(DENSE)));
        let header = Header { kind: Kind::SparsePush, keys: rows, clock: clock(n), sequence: n, ..sparse };
        let part = [0u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
        out.push((header, [part, ids(), floats(IDS)].concat()));
    }
    out.push((
        Header { table: TableId(77), keys: KeyRange { start: 0, end: 3 }, sequence: 900, ..Header::new(Kind::Barrier) },
        Vec::new(),
    ));
    out.push((Header { kind: Kind::Pull, keys: all, clock: clock(PUSHES), sequence: 1000, ..dense }, Vec::new()));
    let pull = Header { kind: Kind::SparsePull, keys: rows, clock: clock(PUSHES), sequence: 1001, ..sparse };
    out.push((pull, ids()));
    let sealed = (0..).zip(out).map(|(slot, (header, body))| {
        let (incarnation, payload_bytes) = (1, body.len() as u64);
        (Header { client, incarnation, payload_bytes, slot, ..header }, body, false, false)
    });
    sealed.collect()
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
    fn new(seed: u64, mode: Mode) -> Self {
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
            cluster: Cluster::new(1, 1),
            seats: BTreeMap::new(),
            connections: Vec::new(),
            clients: (0..3).map(client).collect(),
            next: 1,
            kills: 0,
            out: Vec::new(),
        };
        (0..2).for_each(|_| world.begin_seat());
        world
    }

    fn begin_seat(&mut self) {
        let (id, limits) = (self.next * 100, Limits { replicas: 1, ..Limits::default() });
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
                Action::Ship { to, bytes } => (to, Message::Entry(bytes)),
                Action::Tell { header, .. } => {
                    if let Some(connection) = self.made_by(seat) {
                        connection.up.push_back(Message::Request(header, Vec::new()));
                    }
                    continue;
                }
                Action::Close { peer, .. } => {
                    let (connection, ends) = match peer {
                        PRIMARY => (self.made_by(seat), (true, false)),
                        _ => (self.between(seat, peer), (false, true)),
                    };
                    connection.into_iter().for_each(|connection| connection.cut = Some(ends));
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

    /// The connection that `seat` has made to its primary, unless it is cut.
    fn made_by(&mut self, seat: u64) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|it| it.caller == Caller::Seat(seat) && it.cut.is_none())
    }

    /// One of the things that may happen next, happens.
    fn step(&mut self) {
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
        let message = if up { connection.up.pop_front() } else { connection.down.pop_front() }.unwrap();
        match (message, caller) {
            (Message::Request(header, body), _) => {
                if let Some(seat) = self.seats.get_mut(&server) {
                    seat.handle(peer, &header, &body, self.now, &mut self.out);
                    self.act(server);
                }
            }
            (Message::Entry(bytes), Caller::Seat(id)) => {
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.take_entry(&bytes, self.now);
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
                assert!(!*answered, "answered twice: {request:?}");
                *answered = true;
                if matches!(request.kind, Kind::Pull | Kind::SparsePull) {
                    let values = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
                    client.seen.extend(values);
                }
            }
            Kind::Later => client.later.push(header.slot),
            kind => panic!("{kind:?} for {request:?}"),
        }
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
            let join = Join { process: id, seats: vec![(id, id.to_string())], known: ClusterMap::default() };
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

    /// A server dies, where the shard has a copy. A new one takes its seat in the house.
    fn kill(&mut self) {
        let Some(seats) = self.cluster.map().shards.first().filter(|_| self.kills > 0) else { return };
        let (Some(primary), Some(backup)) = (&seats.primary, &seats.backup) else { return };
        if !self.seats.contains_key(&primary.seat) || !self.seats.contains_key(&backup.seat) {
            return;
        }
        let victim = if self.random.below(3) > 0 { primary.seat } else { backup.seat };
        self.kills -= 1;
        self.remove(victim);
        self.begin_seat();
    }

    fn is_done(&self) -> bool {
        self.clients.iter().all(|client| client.script.iter().all(|(.., answered)| *answered))
    }
}

/// Runs three workers over a cluster in which up to `kills` servers die; what each of them saw in the end.
fn run(seed: u64, mode: Mode, kills: usize) -> Vec<Vec<f32>> {
    let mut world = World::new(seed, mode);
    let wanted = (kills > 0).then(|| 200 + world.random.below(2500));
    for step in 0..200_000 {
        if Some(step) == wanted {
            world.kills = kills;
        }
        world.step();
        if world.is_done() {
            return world.clients.into_iter().map(|client| client.seen).collect();
        }
    }
    let standing: Vec<_> = world.seats.iter().map(|(id, seat)| (id, seat.standing(), seat.report())).collect();
    let open = world.clients.iter().flat_map(|client| client.script.iter().filter(|(.., answered)| !answered));
    let open: Vec<_> = open.map(|(header, _, sent, _)| (header.client, header.kind, header.sequence, *sent)).collect();
    panic!("seed {seed}, {mode}: not done; {standing:?}, {open:?}, {:?}", world.cluster.map());
}

#[test]
fn whoever_dies_whenever_every_push_counts_once_and_none_that_was_acknowledged_is_lost() {
    let expected = [3.0 * PUSHES as f32; (DENSE + IDS) as usize];
    for mode in [Mode::Async, Mode::Sync { workers: 3 }, Mode::Ssp { workers: 3, staleness: 1 }] {
        for seed in 0..150 {
            for seen in run(seed, mode, 3) {
                assert_eq!(seen, expected, "seed {seed}, {mode}");
            }
        }
    }
}
