//! Does: the waist, for memory shared with other processes of this host.

use super::link::Link;
use super::offer::{self, ShmEnd, ShmOffer};
use super::ring::{CLOSED, GOODBYE, PairMemory};
use crate::credit::{Credit, Grant};
use crate::flights::{self, Cargo};
use crate::inbox::{self, Receive};
use crate::pool::Pool;
use crate::slab::Recent;
use crate::{
    Beside, Completion, Config, Envelope, LossCause, PeerId, PeerName, PostError, Probe, Rank, Region, RegionSlice,
    RegionSliceMut, RegisterError, SendLoan, Tag, Traffic, TransportError, Wake, Wire, WireKind,
};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest message that can be lent; up to 256 KiB it is read, and written, in place.
const LOAN_BYTES: usize = 4 << 20;
/// How often the system is asked who has died while the wire is polled without a sleep.
const LIFE_TURNS: u32 = 1024;
/// Callers that one process shares memory with: each is looked at in every poll, and takes three descriptors.
const MOST_GUESTS: usize = 32;
/// What the bell is called among the descriptors to sleep on; the others are peers.
const BELL: u64 = u64::MAX;

/// The wire to other processes of this host.
pub struct ShmWire {
    config: Config,
    pub(super) links: Recent<Box<Link>>,
    /// The descriptors of the peers' processes, by peer, where the system has such.
    lives: Recent<OwnedFd>,
    /// Our end of what was offered last.
    offered: Option<ShmEnd>,
    pool: Arc<Pool>,
    bell: Arc<Bell>,
    sleep_on: OwnedFd,
    pending: Vec<Completion>,
    pub(super) credit: Option<Credit>,
    /// Scratch of `granting`.
    pub(super) granted: Vec<Grant>,
    /// Messages that have come from anybody.
    turn: u64,
    polls: u32,
    closed: bool,
}

/// A pipe: its far end is in the hands of the peers too.
struct Bell {
    near: OwnedFd,
    far: OwnedFd,
}

impl Wake for Bell {
    fn wake(&self) {
        // A pipe that is full wakes as well.
        let _ = rustix::io::write(&self.far, &[1]);
    }
}

impl ShmWire {
    /// A wire without peers.
    ///
    /// # Errors
    /// `Io` when the system gives no descriptors.
    pub fn new(config: &Config) -> Result<Self, TransportError> {
        let refused = |error: rustix::io::Errno| TransportError::io("make a bell", error);
        let (near, far) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(refused)?;
        let sleep_on = epoll::create(CreateFlags::CLOEXEC).map_err(refused)?;
        epoll::add(&sleep_on, &near, EventData::new_u64(BELL), EventFlags::IN).map_err(refused)?;
        Ok(Self {
            config: config.clone(),
            links: Recent::default(),
            lives: Recent::default(),
            offered: None,
            pool: Arc::new(Pool::default()),
            bell: Arc::new(Bell { near, far }),
            sleep_on,
            pending: Vec::new(),
            credit: config.credit.filter(|_| super::granting::grants(config)).map(Credit::of_whole_messages),
            granted: Vec::new(),
            turn: 0,
            polls: 0,
            closed: false,
        })
    }

    /// Makes memory for one pair. The offer goes to the peer, over a connection that is there already; once the peer has
    /// accepted it, our end is attached.
    ///
    /// # Errors
    /// `Io` when the system has no memory for it.
    pub fn offer(&mut self) -> Result<(ShmOffer, ShmEnd), TransportError> {
        offer::make(self.bell_number())
    }

    /// Opens what a peer offers: the proof that both are on one host and of one user.
    ///
    /// # Errors
    /// `Io` or `BadFrame` where it cannot be reached or is not what was offered: use another wire.
    pub fn accept(&mut self, offer: &ShmOffer) -> Result<ShmEnd, TransportError> {
        offer::take(offer, self.bell_number())
    }

    /// Makes the process at the other end `peer`.
    ///
    /// # Errors
    /// `Timeout` where it has not accepted the offer yet; `Io` or `BadFrame` where its bell cannot be reached.
    pub fn attach(&mut self, peer: PeerId, name: PeerName, mut end: ShmEnd) -> Result<(), TransportError> {
        let (pid, bell) = offer::other(&mut end)?;
        let memory = PairMemory::new(end.segment, end.side, bell);
        if let Some(life) = Some(pid).filter(|pid| *pid != std::process::id()).and_then(|pid| self.watch(peer, pid)) {
            self.lives.insert(peer.0, life);
        }
        let link = Link::new(peer, name, memory, &self.config, Arc::clone(&self.pool));
        self.links.insert(peer.0, Box::new(link));
        Ok(())
    }

    fn bell_number(&self) -> u32 {
        u32::try_from(self.bell.far.as_raw_fd()).expect("a descriptor is not negative")
    }

    /// A descriptor that tells when the process ends. Without one, the end shows on the connection beside this wire.
    fn watch(&self, peer: PeerId, pid: u32) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let opened = rustix::process::pidfd_open(pid, PidfdFlags::empty()).and_then(|life| {
            epoll::add(&self.sleep_on, &life, EventData::new_u64(peer.0.into()), EventFlags::IN).map(|()| life)
        });
        opened.inspect_err(|error| tracing::debug!(%error, "the system does not tell when a process ends")).ok()
    }

    /// Hears the bell out, and who has died.
    fn look_around(&mut self) {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 16];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = epoll::wait(&self.sleep_on, &mut events[..], Some(&now)).unwrap_or(0);
        for event in &events[..found] {
            let who = { event.data }.u64();
            if who == BELL {
                let mut rings = [0; 64];
                while matches!(rustix::io::read(&self.bell.near, &mut rings), Ok(64)) {}
            } else if let Ok(peer) = u32::try_from(who) {
                if let Some(link) = self.links.get(peer) {
                    link.dead = true;
                }
                // Told once: closing the descriptor ends its watch.
                self.lives.remove(peer);
            }
        }
    }

    fn link(&mut self, peer: PeerId) -> Result<&mut Link, TransportError> {
        match self.links.get(peer.0) {
            _ if self.closed => Err(TransportError::Closed),
            Some(link) => Ok(link),
            None => Err(TransportError::UnknownPeer(peer.0)),
        }
    }

    fn post_cargo(&mut self, to: Envelope, cargo: Cargo) -> Result<(), (TransportError, Cargo)> {
        let depth = self.config.queue_depth;
        let ready = self.link(to.peer).and_then(|link| match &link.lost {
            Some(lost) => Err(lost.clone()),
            None if link.flights.len() >= depth => Err(full(link, link.flights.len())),
            None => Ok(()),
        });
        if let Err(error) = ready {
            return Err((error, cargo));
        }
        if let Some(link) = self.links.get(to.peer.0)
            && let Err(broken) = link.post(to, cargo, &mut self.pending)
        {
            link.break_off(broken, &mut self.pending);
        }
        Ok(())
    }

    fn post_receive(&mut self, peer: PeerId, tag: Tag, receive: Receive) -> Result<(), (TransportError, Receive)> {
        let depth = self.config.queue_depth;
        let ready = self.link(peer).and_then(|link| match &link.lost {
            Some(lost) if !link.inbox.has_whole(tag) => Err(lost.clone()),
            _ if link.inbox.posted() >= depth => Err(full(link, link.inbox.posted())),
            _ => Ok(()),
        });
        if let Err(error) = ready {
            return Err((error, receive));
        }
        let Some(link) = self.links.get(peer.0) else { return Ok(()) };
        if let Err(broken) = link.receive(tag, receive, &mut self.pending) {
            link.break_off(broken, &mut self.pending);
        }
        if link.wants_credit() {
            let mut done = std::mem::take(&mut self.pending);
            self.grant_to_all(&mut done);
            self.pending = done;
        }
        Ok(())
    }
}

impl Beside for ShmWire {
    fn leave(&mut self) -> bool {
        let busy = |link: &Link| link.lost.is_none() && (link.flights.len() > 0 || link.wants_to_write());
        !self.links.values().any(|link| busy(link))
    }

    fn detach(&mut self, peer: PeerId, error: TransportError) {
        if let Some(link) = self.links.get(peer.0) {
            link.end_after_reading(&error, &mut self.turn, &mut self.pending);
        }
    }

    fn shares(&self) -> bool {
        true
    }

    fn offer_memory(&mut self) -> Result<Vec<u8>, String> {
        let (offer, end) = self.offer().map_err(|error| error.to_string())?;
        self.offered = Some(end);
        Ok(offer.encode().to_vec())
    }

    fn take_memory(&mut self, peer: PeerId, name: PeerName, offer: &[u8]) -> Result<(), String> {
        if self.links.len() >= MOST_GUESTS {
            return Err(format!("it shares memory with {MOST_GUESTS} others already"));
        }
        let end = ShmOffer::decode(offer).and_then(|offer| self.accept(&offer));
        end.and_then(|end| self.attach(peer, name, end)).map_err(|error| error.to_string())
    }

    fn attach_offered(&mut self, peer: PeerId, name: PeerName) -> Result<(), String> {
        let end = self.offered.take().ok_or("nothing was offered")?;
        self.attach(peer, name, end).map_err(|error| error.to_string())
    }

    fn forget(&mut self, peer: PeerId) {
        self.offered = None;
        if let Some(link) = self.links.remove(peer.0) {
            link.memory().leave(CLOSED, "");
            self.credit.iter_mut().for_each(|credit| credit.gone(peer));
        }
        self.lives.remove(peer.0);
    }

    fn has(&self, peer: PeerId) -> bool {
        self.links.has(peer.0)
    }

    fn fall_asleep(&mut self) -> bool {
        let links = || self.links.values().filter(|link| link.lost.is_none());
        links().for_each(|link| link.memory().set_asleep(true));
        self.pending.is_empty() && !self.links.values_mut().any(|link| link.has_news())
    }

    fn sleep_on(&self) -> BorrowedFd<'_> {
        self.sleep_on.as_fd()
    }

    fn deadline(&self) -> Option<Instant> {
        self.credit.as_ref()?.deadline()
    }

    fn wake_up(&mut self) {
        for link in self.links.values().filter(|link| link.lost.is_none()) {
            link.memory().set_asleep(false);
        }
        self.look_around();
    }
}

impl Drop for ShmWire {
    fn drop(&mut self) {
        for link in self.links.values() {
            link.memory().leave(CLOSED, "");
        }
    }
}

impl Wire for ShmWire {
    fn kind(&self, _peer: PeerId) -> WireKind {
        WireKind::Shm
    }

    fn name(&self, peer: PeerId) -> PeerName {
        match self.links.peek(peer.0) {
            Some(link) => link.name.clone(),
            None => PeerName { rank: None, host: "unknown".to_owned(), pid: 0, address: "unknown".to_owned() },
        }
    }

    fn traffic(&self, peer: PeerId) -> Traffic {
        self.links.peek(peer.0).map(|link| link.traffic()).unwrap_or_default()
    }

    fn register(&mut self, _region: &Arc<Region>) -> Result<(), RegisterError> {
        Ok(())
    }

    fn post_send(&mut self, to: Envelope, slice: RegionSlice) -> Result<(), PostError<RegionSlice>> {
        self.post_cargo(to, Cargo::Slice(slice)).map_err(flights::refused)
    }

    fn post_recv(&mut self, peer: PeerId, tag: Tag, slice: RegionSliceMut) -> Result<(), PostError<RegionSliceMut>> {
        self.post_receive(peer, tag, Receive::Slice(slice)).map_err(inbox::refused)
    }

    fn post_recv_loan(&mut self, peer: PeerId, tag: Tag, max_bytes: usize) -> Result<(), PostError<()>> {
        let receive = Receive::Loan(max_bytes.min(LOAN_BYTES));
        self.post_receive(peer, tag, receive).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn lend(&mut self, peer: PeerId, bytes: usize) -> Option<SendLoan> {
        let link = self.link(peer).ok()?;
        (bytes <= LOAN_BYTES).then(|| link.lend(bytes))
    }

    fn max_loan_bytes(&self) -> usize {
        LOAN_BYTES
    }

    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>> {
        self.post_cargo(to, Cargo::Loan(loan)).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn probe(&mut self, tag: Tag) -> Option<Probe> {
        let found = self.links.values().filter_map(|link| link.inbox.probe(tag));
        found.min_by_key(|(turn, ..)| *turn).map(|(_, from, bytes)| Probe { from, bytes })
    }

    fn cancel_recvs(&mut self, peer: PeerId, tag: Tag) {
        if let Some(link) = self.links.get(peer.0) {
            link.inbox.cancel(tag, &TransportError::Cancelled, &mut self.pending);
        }
    }

    fn disconnect(&mut self, peer: PeerId, error: TransportError) {
        if let Some(link) = self.links.get(peer.0) {
            link.end(&error, &mut self.pending);
        }
    }

    fn poll(&mut self, _now: Instant, done: &mut Vec<Completion>) {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(LIFE_TURNS) {
            self.look_around();
        }
        done.append(&mut self.pending);
        for link in self.links.values_mut() {
            link.progress(&mut self.turn, done);
        }
        self.grant_to_all(done);
    }

    fn park(&mut self, until: Instant) {
        let until = self.deadline().map_or(until, |deadline| deadline.min(until));
        let wait = until.saturating_duration_since(Instant::now());
        if self.fall_asleep() && !wait.is_zero() {
            let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
            // Interrupted or refused, the caller polls and comes back.
            let _ = rustix::event::poll(&mut [PollFd::new(&self.sleep_on, PollFlags::IN)], Some(&timeout));
        }
        self.wake_up();
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as _
    }

    fn shutdown(&mut self, until: Instant) {
        let mut done = Vec::new();
        while Instant::now() < until && !self.leave() {
            self.poll(Instant::now(), &mut done);
            done.clear();
            self.park(until.min(Instant::now() + Duration::from_millis(10)));
        }
        for link in self.links.values_mut() {
            link.memory().leave(GOODBYE, "");
            let peer = Box::new(link.name.clone());
            link.end(&TransportError::PeerLost { peer, cause: LossCause::Goodbye }, &mut done);
        }
        self.closed = true;
    }
}

fn full(link: &Link, queued: usize) -> TransportError {
    TransportError::QueueFull { peer: Box::new(link.name.clone()), queued }
}

/// Two wires of one process, joined by shared memory: for tests and measurements.
///
/// # Errors
/// As [`ShmWire::offer`] and [`ShmWire::accept`].
pub fn pair(a: &Config, b: &Config) -> Result<(ShmWire, ShmWire), TransportError> {
    let name = |rank| PeerName {
        rank: Some(Rank(rank)),
        host: "localhost".to_owned(),
        pid: std::process::id(),
        address: "shared memory".to_owned(),
    };
    let (mut a, mut b) = (ShmWire::new(a)?, ShmWire::new(b)?);
    let (offer, ours) = a.offer()?;
    let theirs = b.accept(&offer)?;
    a.attach(PeerId(1), name(1), ours)?;
    b.attach(PeerId(0), name(0), theirs)?;
    Ok((a, b))
}
