//! Does: the side that reaches the memory of one exposer: connects to it, takes orders, and has a thread that carries them out.

use super::SPIN_TURNS;
use super::calling::{Calling, Order, PEER};
use super::exposer::nonce;
use super::request::RemoteMemory;
use super::ticket::Access;
use crate::rendezvous::Record;
use crate::{
    Acceptance, Config, Identity, Mesh, PeerName, Region, TcpWire, TransportError, VerbsWire, Wake, Wire, WireChoice,
    WireKind, home, open_verbs, routed_address,
};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Accesses that may be under way at once.
const MAX_QUEUED: usize = 1 << 16;
/// Longest sleep of the thread.
const NAP: Duration = Duration::from_secs(1);

/// Our side of an access.
pub struct Local {
    /// The memory.
    pub region: Arc<Region>,
    /// Which bytes of it.
    pub range: Range<usize>,
}

#[derive(Default)]
struct Inbox {
    orders: VecDeque<Order>,
    /// Memory that the device is to know no longer.
    forgotten: Vec<Arc<Region>>,
    /// By when the thread is to be gone.
    closing: Option<Instant>,
    under_way: usize,
    lost: Option<TransportError>,
    kind: Option<WireKind>,
}

/// Reaches the memory of one exposer.
pub struct Accessor {
    inbox: Arc<Mutex<Inbox>>,
    waker: Arc<dyn Wake>,
    thread: Mutex<Option<JoinHandle<()>>>,
    owner: u64,
    peer: PeerName,
    device: Option<String>,
    reason: String,
}

impl Accessor {
    /// Connects to the exposer at `url`; blocks until then, at most until the deadline.
    ///
    /// # Errors
    /// `Config` for a URL that is none, a wire that was asked for by name and cannot be had; `Authentication`;
    /// `Unreachable`.
    pub fn connect(config: &Config, url: &[u8], deadline: Instant) -> Result<Self, TransportError> {
        let record = read(url)?;
        let local: Vec<_> = record.addresses.iter().copied().filter_map(routed_address).collect();
        Self::over(config, open_verbs(config, &local)?, url, deadline)
    }

    /// As [`Accessor::connect`], with this device.
    ///
    /// # Errors
    /// As [`Accessor::connect`].
    pub fn over(
        config: &Config,
        verbs: Option<(VerbsWire, String)>,
        url: &[u8],
        deadline: Instant,
    ) -> Result<Self, TransportError> {
        let (record, home) = (read(url)?, home());
        let addresses = record.addresses_from(&home);
        let identity = Identity {
            rank: None,
            host: home.host,
            pid: std::process::id(),
            boot_id: home.boot_id,
            nonce: nonce(),
            rdma: verbs.is_some(),
            memory: false,
        };
        let mut tcp = TcpWire::new(config, identity, Acceptance::Nobody)?;
        let device = verbs.as_ref().map(|(_, reason)| reason.clone());
        let mesh = match verbs {
            Some((verbs, _)) => {
                let mut mesh = Mesh::meeting(tcp, vec![Box::new(verbs)], config.wire);
                mesh.call(PEER, None, &addresses, deadline)?;
                mesh
            }
            None => {
                tcp.dial(PEER, None, &addresses, deadline)?;
                Mesh::new(tcp, Vec::new(), [PEER], Vec::new())
            }
        };
        let peer = mesh.name(PEER);
        let (own, other) = mesh.identities(PEER);
        if other.is_none_or(|other| other.nonce != record.nonce) {
            let who = format!("the exposer (pid {} on {})", record.pid, record.home.host);
            let reason = "another process listens there now: exchange URLs anew".to_owned();
            return Err(TransportError::Unreachable { who, addresses, reason });
        }
        let reason = reason(config.wire, device.is_some(), own, other);
        let inbox = Inbox { kind: Some(mesh.kind(PEER)), ..Inbox::default() };
        let (inbox, waker) = (Arc::new(Mutex::new(inbox)), mesh.waker());
        let (shared, calling) = (Arc::clone(&inbox), Calling::new(mesh));
        let thread = std::thread::Builder::new().name("gradwire-access".to_owned());
        let thread =
            thread.spawn(move || run(calling, &shared)).map_err(|error| TransportError::io("start a thread", error))?;
        Ok(Self { inbox, waker, thread: Mutex::new(Some(thread)), owner: record.nonce, peer, device, reason })
    }

    /// Whose memory is reached.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// By which wire now, and why: `Verbs` is the device itself, anything else messages that the peer serves.
    pub fn wire(&self) -> (WireKind, String) {
        match self.inbox().kind {
            Some(WireKind::Verbs) => (WireKind::Verbs, self.device.clone().unwrap_or_default()),
            kind => (kind.unwrap_or(WireKind::Tcp), self.reason.clone()),
        }
    }

    /// Why the exposer is gone, once it is.
    pub fn lost(&self) -> Option<TransportError> {
        let inbox = self.inbox();
        inbox.lost.clone().or_else(|| inbox.closing.map(|_| TransportError::Closed))
    }

    /// Begins to write `local` into `remote`, which is as long.
    ///
    /// # Errors
    /// `Config` for lengths that differ, or memory of another exposer; `QueueFull`. Nothing was sent.
    pub fn put(&self, local: Local, remote: RemoteMemory) -> Result<Access, TransportError> {
        self.order(true, local, remote)
    }

    /// Begins to read `remote` into `local`, which is as long.
    ///
    /// # Errors
    /// As [`Accessor::put`].
    pub fn get(&self, local: Local, remote: RemoteMemory) -> Result<Access, TransportError> {
        self.order(false, local, remote)
    }

    /// Memory that will not be handed over again: the device need not know it any more.
    pub fn forget(&self, region: Arc<Region>) {
        self.inbox().forgotten.push(region);
        self.waker.wake();
    }

    /// Waits for what is under way and takes leave, within `timeout`; what has not ended then fails. Idempotent.
    pub fn close(&self, timeout: Duration) {
        self.inbox().closing.get_or_insert(Instant::now() + timeout);
        self.waker.wake();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic of the thread has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }

    fn order(&self, is_put: bool, local: Local, remote: RemoteMemory) -> Result<Access, TransportError> {
        let Local { region, range } = local;
        let refuse = |reason: String| TransportError::Config { setting: "one-sided access".to_owned(), reason };
        if remote.owner != self.owner {
            return Err(refuse(format!("the remote memory is not that of {}, to whom we are connected", self.peer)));
        }
        let possible = remote.offset.checked_add(remote.bytes).is_some();
        if range.len() as u64 != remote.bytes || range.end > region.len() || !possible {
            let (ours, theirs) = (range.len(), remote.bytes);
            return Err(refuse(format!("{ours} bytes of ours do not fit {theirs} bytes of {}", self.peer)));
        }
        let access = Access::default();
        let order = Order { is_put, region, range, remote, access: access.clone() };
        let mut inbox = self.inbox();
        if inbox.closing.is_some() {
            return Err(TransportError::Closed);
        }
        if inbox.under_way + inbox.orders.len() >= MAX_QUEUED {
            return Err(TransportError::QueueFull { peer: Box::new(self.peer.clone()), queued: MAX_QUEUED });
        }
        inbox.orders.push_back(order);
        drop(inbox);
        self.waker.wake();
        Ok(access)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Accessor {
    fn drop(&mut self) {
        self.close(Duration::from_millis(500));
    }
}

fn read(url: &[u8]) -> Result<Record, TransportError> {
    Record::decode(url).ok_or_else(|| TransportError::Config {
        setting: "peer_url".to_owned(),
        reason: "it is not what bind() of gradwire's transport returns".to_owned(),
    })
}

fn reason(choice: WireChoice, has_device: bool, own: &Identity, other: Option<&Identity>) -> String {
    let one_host = other.is_some_and(|other| !own.boot_id.is_empty() && own.boot_id == other.boot_id);
    match choice {
        WireChoice::Tcp => "GRADWIRE_TRANSPORT=tcp",
        _ if !has_device => "this host has no RDMA device that can be used",
        _ if !other.is_some_and(|other| other.rdma) => "the other end has no RDMA device that can be used",
        _ if one_host => "both ends are on one host",
        _ => "queue pairs could not be connected, or failed",
    }
    .to_owned()
}

fn run(mut calling: Calling, inbox: &Mutex<Inbox>) {
    let mut idle = 0;
    loop {
        let closing = {
            let mut inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
            idle = if inbox.orders.is_empty() { idle + 1 } else { 0 };
            inbox.orders.drain(..).for_each(|order| calling.begin(order));
            inbox.forgotten.drain(..).for_each(|region| calling.mesh.deregister(&region));
            inbox.under_way = calling.under_way();
            inbox.kind = Some(calling.mesh.kind(PEER));
            if inbox.lost.is_none() {
                inbox.lost = calling.lost().cloned();
            }
            inbox.closing
        };
        calling.tell();
        if let Some(until) = closing
            && (calling.under_way() == 0 || Instant::now() >= until)
        {
            calling.give_up("the accessor was closed");
            calling.tell();
            return calling.mesh.shutdown(until.max(Instant::now() + Duration::from_millis(100)));
        }
        if calling.turn() {
            idle = 0;
        }
        if idle > SPIN_TURNS {
            let latest = Instant::now() + NAP;
            calling.mesh.park(closing.map_or(latest, |until| until.min(latest)));
        }
    }
}
