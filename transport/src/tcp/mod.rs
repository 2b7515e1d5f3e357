//! Does: the TCP wire. Non-blocking sockets, bytes read straight into posted slices and written straight from them.

mod accept;
mod granting;
mod handshake;
mod incoming;
mod lane;
mod link;
mod options;
mod outgoing;
mod silence;
mod stream;
mod tls;
mod watch;
mod wire;

pub use accept::Acceptance;
pub use tls::{Tls, TlsFiles};

use crate::credit::{Credit, Grant};
use crate::hello::Identity;
use crate::pool::Pool;
use crate::{Completion, Config, PeerId, PeerName, Rank, TransportError, WorldSize};
use accept::Entrance;
use handshake::{CallError, Me};
use link::Link;
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stream::Stream;
use watch::Watch;

/// Longest wait for one address before the next is tried.
const PER_ADDRESS: Duration = Duration::from_secs(3);
/// With more peers than this, the system watches the connections, and is asked who has something before anything is read.
const FEW: usize = 8;
/// Pause before all addresses are tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// The TCP wire of one group, server or client.
pub struct TcpWire {
    config: Config,
    me: Me,
    entrance: Entrance,
    links: BTreeMap<PeerId, Box<Link>>,
    identities: BTreeMap<PeerId, Identity>,
    pool: Arc<Pool>,
    bell: Arc<Bell>,
    watch: Watch,
    pending: Vec<Completion>,
    turns: u32,
    /// When the system was last asked who is silent.
    asked: Instant,
    /// Who is still to be looked at before the system is asked again.
    round: VecDeque<PeerId>,
    /// At which of a peer's addresses the next call begins: the last good one's place, or after a failure the next.
    first: usize,
    credit: Option<Credit>,
    /// Scratch of `granting`.
    grants: Vec<Grant>,
}

/// Wakes a parked wire.
struct Bell(OwnedFd);

impl crate::Wake for Bell {
    fn wake(&self) {
        // A counter that is full wakes as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl TcpWire {
    /// A wire without peers.
    ///
    /// # Errors
    /// `Io` when the system gives no descriptors for events.
    pub fn new(config: &Config, me: Identity, accept: Acceptance) -> Result<Self, TransportError> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| TransportError::io("create an event descriptor", error))?;
        Ok(Self {
            me: Me { identity: me, token: config.token.clone().unwrap_or_default(), tls: config.tls.clone() },
            entrance: Entrance::new(accept),
            links: BTreeMap::new(),
            identities: BTreeMap::new(),
            pool: Arc::new(Pool::default()),
            bell: Arc::new(Bell(bell)),
            watch: Watch::new()?,
            pending: Vec::new(),
            turns: 0,
            asked: Instant::now(),
            round: VecDeque::new(),
            first: 0,
            credit: config.credit.map(Credit::new),
            grants: Vec::new(),
            config: config.clone(),
        })
    }

    /// Listens at `address`; port 0 takes any free port of `config.port_range`. May be called for several addresses.
    ///
    /// # Errors
    /// `Io` when the address cannot be had; `Config` for TLS without a certificate to show.
    pub fn listen(&mut self, address: SocketAddr) -> Result<SocketAddr, TransportError> {
        self.config.tls.as_ref().map_or(Ok(()), |tls| tls.check_listening())?;
        self.entrance.listen(address, self.config.port_range)
    }

    /// Connects to the process at one of `addresses` and makes it `peer`, trying them again until the deadline.
    ///
    /// # Errors
    /// `Authentication`; `Tls` where the ends do not trust each other; `Unreachable` with all addresses and the last reason.
    /// With `expect_nonce`, an address at which another process listens is passed over, and named as stale.
    pub fn dial(
        &mut self,
        peer: PeerId,
        expect_nonce: Option<u64>,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        self.dial_host(peer, expect_nonce, None, addresses, deadline)
    }

    /// As [`TcpWire::dial`], to the process on `host`, whose certificate is to be for that name; `None`: for its address.
    ///
    /// # Errors
    /// As [`TcpWire::dial`].
    pub fn dial_host(
        &mut self,
        peer: PeerId,
        expect_nonce: Option<u64>,
        host: Option<&str>,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let mut reason = "no address is known".to_owned();
        loop {
            for nth in 0..addresses.len() {
                let at = (self.first + nth) % addresses.len();
                let (address, now) = (addresses[at], Instant::now());
                // One that does not answer leaves the others their share.
                let share = deadline.saturating_duration_since(now).div_f64((addresses.len() - nth) as f64);
                match self.dial_one(peer, expect_nonce.unwrap_or(0), (address, host), now + share.min(PER_ADDRESS)) {
                    Ok(()) => {
                        self.first = at;
                        return Ok(());
                    }
                    Err(CallError::Final(error)) => return Err(error),
                    Err(CallError::Stale) => reason = format!("{address}: the process wanted is no longer there"),
                    Err(CallError::Io(error)) => reason = format!("{address}: {error}"),
                }
            }
            self.first = (self.first + 1) % addresses.len().max(1);
            if Instant::now() + AGAIN >= deadline || addresses.is_empty() {
                let who = format!("peer {}", peer.0);
                return Err(TransportError::Unreachable { who, addresses: addresses.to_vec(), reason });
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Who this process says it is.
    pub fn own_identity(&self) -> &Identity {
        &self.me.identity
    }

    /// Who `peer` said it is.
    pub fn identity(&self, peer: PeerId) -> Option<&Identity> {
        self.identities.get(&peer)
    }

    /// The addresses by which this process reaches its peers, each once.
    pub fn local_addresses(&self) -> Vec<IpAddr> {
        let streams = self.links.values().flat_map(|link| link.lanes.first()).map(|lane| lane.stream.socket());
        let mut all: Vec<IpAddr> =
            streams.filter_map(|stream| stream.local_addr().ok()).map(|at| at.ip().to_canonical()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Where this wire listens.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.entrance.addresses()
    }

    /// Whether `peer`'s host acknowledges what was sent to it some seconds ago; so it is there, whatever the process does.
    pub(crate) fn acknowledges(&self, peer: PeerId) -> bool {
        self.links.get(&peer).is_none_or(|link| link.acknowledges())
    }

    fn dial_one(
        &mut self,
        peer: PeerId,
        wants: u64,
        (address, host): (SocketAddr, Option<&str>),
        deadline: Instant,
    ) -> Result<(), CallError> {
        let lanes = u16::try_from(self.config.lanes.clamp(1, 64)).unwrap_or(1);
        let mut streams = Vec::new();
        let mut told = None;
        for lane in 0..lanes {
            let (stream, identity) = handshake::call(&self.me, (address, host), wants, (lane, lanes), deadline)?;
            streams.push(stream);
            told = Some(identity);
        }
        if let Some(identity) = told {
            self.install(peer, identity, address, streams);
        }
        Ok(())
    }

    fn install(&mut self, peer: PeerId, identity: Identity, address: SocketAddr, streams: Vec<Stream>) {
        let name = PeerName {
            rank: identity.rank,
            host: identity.host.clone(),
            pid: identity.pid,
            address: address.to_string(),
        };
        let mut link = Link::new(peer, name, streams, &self.config, Arc::clone(&self.pool));
        self.begin_credit(peer, &mut link, address);
        self.links.insert(peer, Box::new(link));
        self.identities.insert(peer, identity);
        self.watch_links();
    }

    /// Has the system watch all connections, once they are too many to be looked at each time.
    fn watch_links(&mut self) {
        if self.links.len() <= FEW {
            return;
        }
        let watch = &self.watch;
        for (&peer, link) in &mut self.links {
            for lane in link.lanes.iter_mut().filter(|lane| lane.stream.watched.is_none()) {
                if let Err(error) = watch.add(&mut lane.stream, peer) {
                    // As where the system has no memory for it: it is asked for by itself, as before.
                    tracing::warn!(%error, peer = peer.0, "a connection cannot be watched with the others");
                }
            }
        }
    }

    fn link(&mut self, peer: PeerId) -> Result<&mut Link, TransportError> {
        self.links.get_mut(&peer).map(Box::as_mut).ok_or(TransportError::UnknownPeer(peer.0))
    }
}

/// Who a wire of this process is that meets others of it.
fn local_identity(rank: u32) -> Identity {
    Identity {
        rank: Some(Rank(rank)),
        host: "localhost".to_owned(),
        pid: std::process::id(),
        boot_id: String::new(),
        nonce: u64::from(rank) + 1,
        rdma: false,
        memory: false,
    }
}

/// Two wires of one process, joined over loopback: for tests and measurements.
///
/// # Errors
/// As [`TcpWire::dial`].
pub fn pair(a: &Config, b: &Config) -> Result<(TcpWire, TcpWire), TransportError> {
    let accept = Acceptance::Ranks(WorldSize::new(2).expect("two is a size"));
    let mut a = TcpWire::new(a, local_identity(0), accept)?;
    let mut b = TcpWire::new(b, local_identity(1), accept)?;
    let address = a.listen(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    std::thread::scope(|scope| {
        let dialled = scope.spawn(|| b.dial(PeerId(0), Some(1), &[address], Instant::now() + PER_ADDRESS));
        let mut done = Vec::new();
        while !dialled.is_finished() || !a.entrance.is_empty() {
            crate::Wire::poll(&mut a, Instant::now(), &mut done);
            std::thread::yield_now();
        }
        dialled.join().expect("dialling does not panic")
    })?;
    Ok((a, b))
}
