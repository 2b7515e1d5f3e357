//! Does: the waist, for the simulator: what its rooms decide, behind one lock.

use super::core::{Core, name};
use super::link::Frame;
use crate::flights::Cargo;
use crate::inbox::Receive;
use crate::region::{BufferHome, Loan};
use crate::wire::fits;
use crate::{
    Completion, Envelope, OneSided, PeerId, PeerName, PostError, Probe, Region, RegionSlice, RegionSliceMut,
    RegisterError, RemoteSlice, SendLoan, Tag, Traffic, TransportError, Wake, Wire, WireKind,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Longest message that can be lent.
const LOAN_BYTES: usize = 4 << 20;

/// One peer's wire of a simulated network. Dropping it without [`Wire::shutdown`] is the death of the process.
pub struct SimWire {
    me: PeerId,
    core: Arc<Mutex<Core>>,
}

/// Nobody sleeps in virtual time.
struct NoSleeper;

impl Wake for NoSleeper {
    fn wake(&self) {}
}

impl SimWire {
    pub(super) fn new(me: PeerId, core: Arc<Mutex<Core>>) -> Self {
        Self { me, core }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SimWire {
    fn drop(&mut self) {
        self.core().drop_wire(self.me);
    }
}

impl Wire for SimWire {
    fn kind(&self, _peer: PeerId) -> WireKind {
        WireKind::Sim
    }

    fn name(&self, peer: PeerId) -> PeerName {
        name(peer)
    }

    fn traffic(&self, peer: PeerId) -> Traffic {
        let mut core = self.core();
        let links = &core.node(self.me).links;
        links.get(peer.index()).and_then(Option::as_ref).map(|link| link.traffic()).unwrap_or_default()
    }

    fn register(&mut self, _region: &Arc<Region>) -> Result<(), RegisterError> {
        Ok(())
    }

    fn post_send(&mut self, to: Envelope, slice: RegionSlice) -> Result<(), PostError<RegionSlice>> {
        self.core().post(self.me, to, Cargo::Slice(slice)).map_err(|(error, cargo)| match cargo {
            Cargo::Slice(slice) => PostError { error, slice },
            Cargo::Loan(_) => unreachable!("a slice was posted"),
        })
    }

    fn post_recv(&mut self, peer: PeerId, tag: Tag, slice: RegionSliceMut) -> Result<(), PostError<RegionSliceMut>> {
        self.core().receive(self.me, peer, tag, Receive::Slice(slice)).map_err(|(error, receive)| match receive {
            Receive::Slice(slice) => PostError { error, slice },
            Receive::Loan(_) => unreachable!("a slice was posted"),
        })
    }

    fn post_recv_loan(&mut self, peer: PeerId, tag: Tag, max_bytes: usize) -> Result<(), PostError<()>> {
        let receive = Receive::Loan(max_bytes.min(LOAN_BYTES));
        self.core().receive(self.me, peer, tag, receive).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn lend(&mut self, _peer: PeerId, bytes: usize) -> Option<SendLoan> {
        let pool = Arc::clone(&self.core().node(self.me).pool);
        let home: Arc<dyn BufferHome> = Arc::clone(&pool) as _;
        (bytes <= LOAN_BYTES).then(|| SendLoan(Loan::of_buffer(pool.take(bytes), bytes, home)))
    }

    fn max_loan_bytes(&self) -> usize {
        LOAN_BYTES
    }

    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>> {
        self.core().post(self.me, to, Cargo::Loan(loan)).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn probe(&mut self, tag: Tag) -> Option<Probe> {
        let mut core = self.core();
        let found = core.node(self.me).links.iter().flatten().filter_map(|link| link.inbox.probe(tag));
        found.min_by_key(|(turn, ..)| *turn).map(|(_, from, bytes)| Probe { from, bytes })
    }

    fn cancel_recvs(&mut self, peer: PeerId, tag: Tag) {
        let mut core = self.core();
        let node = core.node(self.me);
        if let Some(Some(link)) = node.links.get_mut(peer.index()) {
            link.inbox.cancel(tag, &TransportError::Cancelled, &mut node.done);
        }
    }

    fn disconnect(&mut self, peer: PeerId, error: TransportError) {
        self.core().disconnect(self.me, peer, &error);
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        let mut core = self.core();
        core.advance(now);
        done.append(&mut core.node(self.me).done);
    }

    /// Returns at once: time passes between polls. Other threads that live in the same virtual time get their turn.
    fn park(&mut self, _until: Instant) {
        std::thread::yield_now();
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoSleeper)
    }

    /// Returns at once: the network carries what was posted, then the goodbyes, at `until` at the latest.
    fn shutdown(&mut self, until: Instant) {
        self.core().shut_down(self.me, until);
    }
}

impl OneSided for SimWire {
    fn expose(&mut self, peer: PeerId, slice: RegionSliceMut) -> Result<RemoteSlice, RegisterError> {
        let mut core = self.core();
        let node = core.node(self.me);
        let limit = node.config.queue_depth;
        if node.exposed.len() >= limit {
            return Err(RegisterError::TooMany { limit });
        }
        let bytes = slice.len() as u64;
        Ok(RemoteSlice { key: node.exposed.insert((peer, slice)), offset: 0, bytes })
    }

    fn withdraw(&mut self, remote: RemoteSlice) -> Option<RegionSliceMut> {
        self.core().node(self.me).exposed.remove(remote.key).map(|(_, slice)| slice)
    }

    /// An access outside of what is exposed ends the connection, as on a verbs queue pair.
    fn post_put(
        &mut self,
        to: Envelope,
        slice: RegionSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError<RegionSlice>> {
        if let Err(error) = fits(name(to.peer), to.tag, slice.len() as u64, remote.bytes) {
            return Err(PostError { error, slice });
        }
        let begin = |link: &mut super::link::Link, slice| Frame::Put {
            flight: link.flights.begin(to),
            cargo: Cargo::Slice(slice),
            remote,
        };
        self.core().one_sided((self.me, to.peer), slice, begin).map_err(|(error, slice)| PostError { error, slice })
    }

    fn post_get(
        &mut self,
        from: Envelope,
        slice: RegionSliceMut,
        remote: RemoteSlice,
    ) -> Result<(), PostError<RegionSliceMut>> {
        if let Err(error) = fits(name(from.peer), from.tag, remote.bytes, slice.len() as u64) {
            return Err(PostError { error, slice });
        }
        let begin = |link: &mut super::link::Link, slice| Frame::Get { key: link.gets.insert((from, slice)), remote };
        self.core().one_sided((self.me, from.peer), slice, begin).map_err(|(error, slice)| PostError { error, slice })
    }
}
