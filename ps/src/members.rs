//! Pure: the clients of a shard, by which connection each is reached, and the barriers they meet at.

use crate::body::{BadBody, Reader, Writer};
use crate::dense::{Wait, superseded};
use crate::header::Header;
use crate::refusal::{Reason, Refusal};
use crate::staleness::Window;
use gradwire_transport::PeerId;
use std::collections::HashMap;

/// Most barriers under way at once.
const MAX_BARRIERS: usize = 1024;

/// A client as a shard knows it.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) incarnation: u64,
    /// Its connection; `None` while it has none.
    pub(crate) peer: Option<PeerId>,
    attempt: u64,
    barriers: Window,
}

/// Clients that wait for each other.
#[derive(Debug)]
struct Barrier {
    wanted: u64,
    arrived: Vec<Wait>,
}

/// Who may speak, and for whom.
#[derive(Debug)]
pub(crate) struct Members {
    limit: usize,
    clients: HashMap<u64, Member>,
    peers: HashMap<PeerId, u64>,
    barriers: HashMap<u64, Barrier>,
}

impl Members {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, clients: HashMap::new(), peers: HashMap::new(), barriers: HashMap::new() }
    }

    /// What outlives connections: who the clients are, as bodies of at most `most` of them.
    pub(crate) fn bodies(&self, most: usize) -> Vec<Vec<u8>> {
        let mut clients: Vec<_> = self.clients.iter().collect();
        clients.sort_unstable_by_key(|(client, _)| **client);
        let body = |clients: &[(&u64, &Member)]| {
            let mut out = Writer::default();
            out.number(clients.len() as u64);
            for (client, member) in clients {
                [**client, member.incarnation, member.attempt].into_iter().for_each(|number| out.number(number));
                member.barriers.encode(&mut out);
            }
            out.0
        };
        clients.chunks(most).map(body).collect()
    }

    /// Takes up clients that were told of; of one that is known already, the later life.
    pub(crate) fn restore(&mut self, from: &mut Reader<'_>) -> Result<(), BadBody> {
        for _ in 0..from.count(48)? {
            let (client, incarnation, attempt) = (from.number()?, from.number()?, from.number()?);
            let member = Member { incarnation, peer: None, attempt, barriers: Window::decode(from)? };
            let known = self.clients.get(&client).map(|known| (known.incarnation, known.attempt));
            if known.is_none() && self.clients.len() >= self.limit {
                self.forget_oldest_absent();
            }
            if known.is_none_or(|known| known < (incarnation, attempt)) {
                self.clients.insert(client, member);
            }
        }
        Ok(())
    }

    /// The clients that have a connection.
    pub(crate) fn connected(&self) -> impl Iterator<Item = (u64, PeerId)> + '_ {
        self.clients.iter().filter_map(|(&client, member)| Some((client, member.peer?)))
    }

    /// How well a client is known: 0 where it was forgotten, 1 where it has no connection, 2 where it has one.
    pub(crate) fn presence(&self, client: u64) -> u8 {
        self.clients.get(&client).map_or(0, |member| 1 + u8::from(member.peer.is_some()))
    }

    /// A client says who it is. Tells the connection whose place it takes, which is to be closed.
    pub(crate) fn hello(&mut self, from: PeerId, header: &Header) -> Result<Option<PeerId>, Refusal> {
        if self.clients.len() >= self.limit && !self.clients.contains_key(&header.client) {
            self.forget_oldest_absent();
        }
        if self.clients.len() >= self.limit && !self.clients.contains_key(&header.client) {
            let expected = format!("at most {}", self.limit);
            return Err(Refusal::new(Reason::Limit, "server", "clients", expected, self.limit + 1));
        }
        if let Some(other) = self.peers.get(&from) {
            let expected = format!("client {other}, as it said before");
            return Err(Refusal::new(Reason::Malformed, "hello", "client", expected, header.client));
        }
        let fresh = Member {
            incarnation: header.incarnation,
            peer: None,
            attempt: 0,
            barriers: Window::new(header.incarnation),
        };
        let member = self.clients.entry(header.client).or_insert_with(|| fresh.clone());
        let (known, told) = ((member.incarnation, member.attempt), (header.incarnation, header.sequence));
        if told < known {
            return Err(superseded(header));
        }
        let before = member.peer.take();
        if header.incarnation > member.incarnation {
            *member = fresh;
        }
        member.attempt = header.sequence;
        member.peer = Some(from);
        self.peers.insert(from, header.client);
        if let Some(before) = before {
            self.gone(before);
        }
        Ok(before)
    }

    /// Checks that `header` comes over the connection of the client that it names.
    pub(crate) fn check(&self, from: PeerId, header: &Header) -> Result<(), Refusal> {
        match self.peers.get(&from) {
            Some(&client) if client == header.client && self.clients[&client].incarnation == header.incarnation => {
                Ok(())
            }
            Some(client) => Err(Refusal::new(Reason::Malformed, "request", "client", client, header.client)),
            None => Err(Refusal::new(
                Reason::Malformed,
                "request",
                "first request",
                "a hello",
                format!("{:?}", header.kind),
            )),
        }
    }

    /// A connection is closed. Its client keeps its place and may come back.
    pub(crate) fn gone(&mut self, peer: PeerId) {
        if let Some(client) = self.peers.remove(&peer)
            && let Some(member) = self.clients.get_mut(&client)
            && member.peer == Some(peer)
        {
            member.peer = None;
        }
    }

    fn forget_oldest_absent(&mut self) {
        let absent = self.clients.iter().filter(|(_, member)| member.peer.is_none());
        let oldest = absent.min_by_key(|(_, member)| member.incarnation).map(|(&client, _)| client);
        oldest.map(|client| self.clients.remove(&client));
    }

    /// A client comes to a barrier; everyone's request when it is the last. The barrier's id is in the table's place.
    pub(crate) fn barrier(&mut self, wait: Wait) -> Result<Vec<Wait>, Refusal> {
        let header = wait.header;
        let subject = || format!("barrier {:#x}", header.table.0);
        let wanted = header.keys.len();
        if wanted == 0 || wanted > self.limit as u64 {
            let expected = format!("1 to {}", self.limit);
            return Err(Refusal::new(Reason::Malformed, subject(), "clients", expected, wanted));
        }
        let passed = |member: &Member| member.barriers.contains(header.incarnation, header.sequence);
        if self.clients.get(&header.client).is_some_and(passed) {
            return Ok(vec![wait]);
        }
        if self.barriers.len() >= MAX_BARRIERS && !self.barriers.contains_key(&header.table.0) {
            let expected = format!("at most {MAX_BARRIERS}");
            return Err(Refusal::new(Reason::Limit, subject(), "barriers", expected, MAX_BARRIERS + 1));
        }
        let barrier = self.barriers.entry(header.table.0).or_insert(Barrier { wanted, arrived: Vec::new() });
        if barrier.wanted != wanted {
            return Err(Refusal::new(Reason::Mismatch, subject(), "clients", barrier.wanted, wanted));
        }
        match barrier.arrived.iter_mut().find(|other| other.header.client == header.client) {
            Some(other) => *other = wait,
            None => barrier.arrived.push(wait),
        }
        if (barrier.arrived.len() as u64) < wanted {
            return Ok(Vec::new());
        }
        let arrived = self.barriers.remove(&header.table.0).map(|barrier| barrier.arrived).unwrap_or_default();
        for wait in &arrived {
            if let Some(member) = self.clients.get_mut(&wait.header.client) {
                member.barriers.admit(wait.header.incarnation, wait.header.sequence);
            }
        }
        Ok(arrived)
    }

    /// Takes out all who wait at barriers.
    pub(crate) fn take_waiting(&mut self) -> impl Iterator<Item = Wait> + '_ {
        self.barriers.drain().flat_map(|(_, barrier)| barrier.arrived)
    }

    /// Takes out those who have waited too long, with who had come.
    pub(crate) fn expire(&mut self, now: std::time::Instant, mut refuse: impl FnMut(Wait, Refusal)) {
        self.barriers.retain(|id, barrier| {
            let came: Vec<String> = barrier.arrived.iter().map(|wait| wait.header.client.to_string()).collect();
            let expected = format!("{} clients", barrier.wanted);
            for wait in barrier.arrived.extract_if(.., |wait| wait.until <= now) {
                let got = format!("only client {}", came.join(", "));
                refuse(wait, Refusal::new(Reason::Waited, format!("barrier {id:#x}"), "clients", &expected, got));
            }
            !barrier.arrived.is_empty()
        });
    }
}
