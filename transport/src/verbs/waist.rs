//! Does: the waist, for RDMA verbs.

use super::adapter::Access;
use super::link::Phase;
use super::wire::VerbsWire;
use crate::beside::Beside;
use crate::flights::{self, Cargo};
use crate::inbox::{self, Receive};
use crate::region::{BufferHome, Loan};
use crate::{
    Completion, DeviceSided, Envelope, LossCause, PeerId, PeerName, PostError, Probe, Region, RegionSlice,
    RegionSliceMut, RegisterError, SendLoan, Tag, Traffic, TransportError, Wake, Wire, WireKind,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the device is asked how it is, while the wire is polled without a sleep.
const LOOK_TURNS: u32 = 1024;

impl Wire for VerbsWire {
    fn kind(&self, peer: PeerId) -> WireKind {
        match self.links.get(peer.index()) {
            Some(Some(link)) if matches!(link.phase, Phase::Sockets(_)) => WireKind::Tcp,
            _ => WireKind::Verbs,
        }
    }

    fn reason(&self, peer: PeerId) -> Option<String> {
        match &self.links.get(peer.index())?.as_ref()?.phase {
            Phase::Sockets(reason) => Some(format!("no RDMA any more: {reason}")),
            _ => None,
        }
    }

    fn name(&self, peer: PeerId) -> PeerName {
        match self.links.get(peer.index()) {
            Some(Some(link)) => link.name.clone(),
            _ => PeerName { rank: None, host: "unknown".to_owned(), pid: 0, address: "unknown".to_owned() },
        }
    }

    fn traffic(&self, peer: PeerId) -> Traffic {
        self.links.get(peer.index()).and_then(Option::as_ref).map(|link| link.traffic()).unwrap_or_default()
    }

    fn register(&mut self, region: &Arc<Region>) -> Result<(), RegisterError> {
        if region.is_empty() {
            return Ok(());
        }
        let whole = 0..region.len();
        let lease = self.nic.registrations.lease(&mut *self.nic.adapter, region, whole, Access::Write)?;
        self.nic.registrations.release(lease);
        Ok(())
    }

    fn deregister(&mut self, region: &Arc<Region>) {
        self.nic.registrations.forget(&mut *self.nic.adapter, region);
    }

    fn device_sided(&mut self) -> Option<&mut dyn DeviceSided> {
        Some(self)
    }

    fn post_send(&mut self, to: Envelope, slice: RegionSlice) -> Result<(), PostError<RegionSlice>> {
        if self.post_small(to, &slice) {
            self.pending.push(Completion::Sent { to, slice });
            return Ok(());
        }
        self.post_cargo(to, Cargo::Slice(slice)).map_err(flights::refused)
    }

    fn post_recv(&mut self, peer: PeerId, tag: Tag, slice: RegionSliceMut) -> Result<(), PostError<RegionSliceMut>> {
        self.post_receive(peer, tag, Receive::Slice(slice)).map_err(inbox::refused)
    }

    fn post_recv_loan(&mut self, peer: PeerId, tag: Tag, max_bytes: usize) -> Result<(), PostError<()>> {
        let receive = Receive::Loan(max_bytes.min(self.max_loan_bytes()));
        self.post_receive(peer, tag, receive).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn lend(&mut self, peer: PeerId, bytes: usize) -> Option<SendLoan> {
        let eager = self.link(peer).ok()?.eager_bytes;
        if bytes <= eager {
            let home: Arc<dyn BufferHome> = Arc::clone(&self.pool) as _;
            return Some(SendLoan(Loan::of_buffer(self.pool.take(bytes), bytes, home)));
        }
        self.nic.take(bytes).map(|lent| SendLoan(lent.loan))
    }

    fn max_loan_bytes(&self) -> usize {
        super::registered_pool::LARGEST
    }

    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>> {
        self.post_cargo(to, Cargo::Loan(loan)).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn probe(&mut self, tag: Tag) -> Option<Probe> {
        let found = self.links.iter().flatten().filter_map(|link| link.inbox.probe(tag));
        found.min_by_key(|(turn, ..)| *turn).map(|(_, from, bytes)| Probe { from, bytes })
    }

    fn cancel_recvs(&mut self, peer: PeerId, tag: Tag) {
        if let Some(Some(link)) = self.links.get_mut(peer.index()) {
            link.inbox.cancel(tag, &TransportError::Cancelled, &mut self.pending);
        }
    }

    fn disconnect(&mut self, peer: PeerId, error: TransportError) {
        if let Some(Some(link)) = self.links.get_mut(peer.index()) {
            link.end(&error, &mut self.nic, &mut self.pending);
            self.routes.retain(|_, (other, _)| *other != peer.index());
        }
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(LOOK_TURNS) {
            self.look_around();
        }
        match self.pending.len() {
            0 => {}
            1 => done.extend(self.pending.pop()),
            _ => done.append(&mut self.pending),
        }
        // What has come is told before anything else is seen to, but not twice in a row.
        self.hurried = self.take_soon(done) && !self.hurried;
        if !self.hurried {
            self.flush(now, done);
        }
    }

    fn park(&mut self, until: Instant) {
        if self.fall_asleep() {
            let until = self.deadline().map_or(until, |deadline| until.min(deadline));
            let wait = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
            let mut fds = [PollFd::from_borrowed_fd(self.nic.adapter.sleep_on(), PollFlags::IN)];
            // Interrupted or refused, the caller polls and comes back.
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
        }
        self.wake_up();
    }

    fn owes(&self) -> bool {
        !self.words.is_empty() || self.links.iter().flatten().any(|link| link.lost.is_none() && link.owes())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Nobody)
    }

    fn shutdown(&mut self, until: Instant) {
        let mut done = Vec::new();
        while Instant::now() < until && !self.leave() {
            self.poll(Instant::now(), &mut done);
            done.clear();
            self.park(until.min(Instant::now() + Duration::from_millis(1)));
        }
        for at in 0..self.links.len() {
            self.end(at, LossCause::Goodbye, &mut done);
        }
        self.closed = true;
    }
}

/// The sockets beside this wire are what is woken.
struct Nobody;

impl Wake for Nobody {
    fn wake(&self) {}
}
