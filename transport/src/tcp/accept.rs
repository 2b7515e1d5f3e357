//! Does: the listening side: connections that come, and what becomes of them.

use super::handshake::{Guest, Me, Progress};
use super::options;
use super::stream::Stream;
use crate::hello::{Hello, Identity};
use crate::{PeerId, TransportError, WorldSize};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

/// Connections that may be in their hello at once; more wait in the kernel's queue.
const GUESTS: usize = 256;
/// Time for a hello.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whom a wire lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// The ranks of a group: `PeerId` is the rank.
    Ranks(WorldSize),
    /// Anybody with the token, up to a number at once: `PeerId` counts upwards.
    Anyone {
        /// How many at once.
        max_peers: usize,
    },
    /// Nobody: the wire only calls.
    Nobody,
}

/// A peer of which all lanes have come.
pub(super) struct Arrived {
    pub(super) peer: PeerId,
    pub(super) identity: Identity,
    pub(super) address: SocketAddr,
    pub(super) streams: Vec<Stream>,
}

struct Party {
    identity: Identity,
    address: SocketAddr,
    streams: Vec<Option<Stream>>,
    deadline: Instant,
}

/// The listeners of a wire, and who stands at the door.
pub(super) struct Entrance {
    accept: Acceptance,
    listeners: Vec<TcpListener>,
    guests: Vec<Guest>,
    parties: Vec<Party>,
    next: u32,
}

impl Entrance {
    pub(super) fn new(accept: Acceptance) -> Self {
        Self { accept, listeners: Vec::new(), guests: Vec::new(), parties: Vec::new(), next: 0 }
    }

    /// Whether nobody stands at the door.
    pub(super) fn is_empty(&self) -> bool {
        self.guests.is_empty() && self.parties.is_empty()
    }

    /// Whether anybody may come, and go, any number of times.
    pub(super) fn is_public(&self) -> bool {
        matches!(self.accept, Acceptance::Anyone { .. })
    }

    /// Whether there is a door.
    pub(super) fn is_open(&self) -> bool {
        !self.listeners.is_empty()
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// Descriptors to sleep on: listeners and guests.
    pub(super) fn listeners(&self) -> impl Iterator<Item = &TcpListener> {
        self.listeners.iter()
    }

    /// Streams of guests, to sleep on.
    pub(super) fn guest_streams(&self) -> impl Iterator<Item = &Stream> {
        self.guests.iter().map(|guest| &guest.stream)
    }

    /// When the first guest's time is up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.guests.iter().map(|guest| guest.deadline).chain(self.parties.iter().map(|party| party.deadline)).min()
    }

    pub(super) fn listen(
        &mut self,
        address: SocketAddr,
        port_range: Option<(u16, u16)>,
    ) -> Result<SocketAddr, TransportError> {
        let (first, last) = match port_range {
            Some(range) if address.port() == 0 => range,
            _ => (address.port(), address.port()),
        };
        let mut refusal = None;
        for port in first..=last {
            match open(SocketAddr::new(address.ip(), port)) {
                Ok((listener, address)) => {
                    self.listeners.push(listener);
                    return Ok(address);
                }
                Err(error) => refusal = Some(error),
            }
        }
        let error = refusal.unwrap_or_else(|| std::io::ErrorKind::InvalidInput.into());
        Err(TransportError::io(format!("listen at {}, ports {first} to {last}", address.ip()), error))
    }

    /// Takes who comes and moves the hellos on; who has come whole.
    pub(super) fn advance(
        &mut self,
        me: &Me,
        now: Instant,
        peers: usize,
        taken: impl Fn(PeerId, &Identity) -> bool,
    ) -> Vec<Arrived> {
        self.take_in(now);
        let mut arrived: Vec<Arrived> = Vec::new();
        let mut at = 0;
        while at < self.guests.len() {
            match self.guests[at].advance(me, now) {
                Progress::Waiting => at += 1,
                Progress::Gone(reason) => {
                    let guest = self.guests.swap_remove(at);
                    tracing::warn!(address = %guest.address, reason, "a connection was turned away");
                }
                Progress::Ready(hello) => {
                    let guest = self.guests.swap_remove(at);
                    // Two of one rank may finish their hellos together.
                    let here = |peer, who: &Identity| {
                        taken(peer, who) || arrived.iter().any(|other| other.peer == peer && other.identity != *who)
                    };
                    let seated = self.seat(guest, hello, now, peers + arrived.len(), &here);
                    arrived.extend(seated);
                }
            }
        }
        self.parties.retain(|party| now < party.deadline);
        arrived
    }

    fn take_in(&mut self, now: Instant) {
        for listener in &self.listeners {
            while self.guests.len() < GUESTS {
                let Ok((stream, address)) = listener.accept() else { break };
                match Guest::new(stream, address, now + PATIENCE) {
                    Ok(guest) => self.guests.push(guest),
                    Err(error) => tracing::warn!(%address, %error, "a connection could not be set up"),
                }
            }
        }
    }

    /// Finds the place of a guest that has proved itself.
    fn seat(
        &mut self,
        mut guest: Guest,
        hello: Hello,
        now: Instant,
        peers: usize,
        taken: &impl Fn(PeerId, &Identity) -> bool,
    ) -> Option<Arrived> {
        let rank = hello.identity.rank.map(PeerId::from);
        let arriving = |peer: PeerId| {
            let same_rank = |party: &&Party| party.identity.rank.map(PeerId::from) == Some(peer);
            self.parties.iter().find(same_rank).is_some_and(|party| party.identity != hello.identity)
        };
        let taken = |peer| taken(peer, &hello.identity) || arriving(peer);
        match (self.accept, rank) {
            (Acceptance::Ranks(size), Some(peer)) if peer.0 < size.get() && hello.wants != 0 && !taken(peer) => {}
            (Acceptance::Anyone { max_peers }, _) if peers + self.parties.len() < max_peers => {}
            (Acceptance::Anyone { .. }, _) => {
                guest.turn_away();
                return None;
            }
            (Acceptance::Ranks(_), Some(peer)) if taken(peer) => {
                guest.call_double();
                tracing::warn!(address = %guest.address, identity = ?hello.identity, "this rank is here already");
                return None;
            }
            _ => {
                guest.send_elsewhere();
                tracing::warn!(address = %guest.address, identity = ?hello.identity, "not a rank that is awaited here");
                return None;
            }
        }
        let address = guest.address;
        let stream = guest.welcome().ok()?;
        let at = self.parties.iter().position(|party| party.identity == hello.identity);
        let at = at.unwrap_or_else(|| {
            let streams = (0..hello.lanes).map(|_| None).collect();
            let deadline = now + PATIENCE;
            self.parties.push(Party { identity: hello.identity, address, streams, deadline });
            self.parties.len() - 1
        });
        *self.parties[at].streams.get_mut(usize::from(hello.lane))? = Some(stream);
        if self.parties[at].streams.iter().any(Option::is_none) {
            return None;
        }
        let Party { identity, address, streams, .. } = self.parties.swap_remove(at);
        let peer = match self.accept {
            Acceptance::Ranks(_) => rank?,
            _ => {
                self.next += 1;
                PeerId(self.next - 1)
            }
        };
        Some(Arrived { peer, identity, address, streams: streams.into_iter().flatten().collect() })
    }
}

fn open(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = options::listen(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}
