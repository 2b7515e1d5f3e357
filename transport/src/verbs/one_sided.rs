//! Does: reads and writes of a peer's memory without its help.

#![allow(unsafe_code)]

use super::adapter::Access as MemoryAccess;
use super::link::{Access, Out, Phase, Remotely};
use super::registrations::Lease;
use super::wire::VerbsWire;
use crate::flights::Cargo;
use crate::wire::fits;
use crate::{
    Envelope, OneSided, PeerId, PostError, Region, RegionSlice, RegionSliceMut, RegisterError, RemoteSlice,
    TransportError,
};
use std::ops::Range;
use std::sync::Arc;

/// Memory that may be exposed at once.
pub(super) const MAX_EXPOSED: usize = 1 << 16;

impl VerbsWire {
    /// The way to `peer` is there, and the queue is not full. Where sockets are all that is left, an access would wait for ever.
    pub(super) fn ready(&mut self, with: Envelope, bytes: u64, capacity: u64) -> Result<(), TransportError> {
        self.sendable(with.peer)?;
        if let Phase::Sockets(reason) = &self.link(with.peer)?.phase {
            let reason = format!("no RDMA any more: {reason}");
            return Err(TransportError::Config { setting: "one-sided access".to_owned(), reason });
        }
        fits(self.link(with.peer)?.name.clone(), with.tag, bytes, capacity)
    }

    fn lease_remotely(
        &mut self,
        region: &Arc<Region>,
        range: Range<usize>,
        access: MemoryAccess,
    ) -> Result<Option<Lease>, TransportError> {
        if range.is_empty() {
            return Ok(None);
        }
        let lease = self.nic.registrations.lease(&mut *self.nic.adapter, region, range, access);
        let refused = |error: RegisterError| TransportError::Config {
            setting: "one-sided access".to_owned(),
            reason: error.to_string(),
        };
        lease.map(Some).map_err(refused)
    }
}

impl OneSided for VerbsWire {
    /// Every peer of this wire that is told the key may use it: a device does not tell them apart.
    fn expose(&mut self, _peer: PeerId, slice: RegionSliceMut) -> Result<RemoteSlice, RegisterError> {
        if self.exposed.len() >= MAX_EXPOSED {
            return Err(RegisterError::TooMany { limit: MAX_EXPOSED });
        }
        let (start, bytes) = (slice.as_ptr().cast_mut(), slice.len());
        // SAFETY: the slice keeps its region mapped, and is kept until it is deregistered or the device is closed.
        let key = unsafe { self.nic.adapter.register(start, bytes, MemoryAccess::Exposed) }?;
        self.exposed.insert(key.remote, (key.handle, slice));
        // Where the first byte is, for the device, travels in the key's upper half: it lies within a page.
        Ok(RemoteSlice { key: key.first << 32 | u64::from(key.remote), offset: 0, bytes: bytes as u64 })
    }

    fn withdraw(&mut self, remote: RemoteSlice) -> Option<RegionSliceMut> {
        let (handle, slice) = self.exposed.remove(&(remote.key as u32))?;
        self.nic.adapter.deregister(handle);
        Some(slice)
    }

    fn post_put(
        &mut self,
        to: Envelope,
        slice: RegionSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError<RegionSlice>> {
        let ready = self.ready(to, slice.len() as u64, remote.bytes);
        let lease = ready.and_then(|()| self.lease_remotely(slice.region(), slice.range(), MemoryAccess::Read));
        let (lease, link) = match (lease, self.at(to.peer.index())) {
            (Ok(lease), Some(link)) => (lease, link),
            (Err(error), _) => return Err(PostError { error, slice }),
            (Ok(_), None) => return Err(PostError { error: TransportError::UnknownPeer(to.peer.0), slice }),
        };
        let flight = link.flights.begin(to);
        let what = Access::Put { flight, cargo: Cargo::Slice(slice) };
        let key = link.remotely.insert(Remotely { lease, remote, next: 0, what, direct: None });
        link.queue.push_back(Out::Put { key });
        Ok(())
    }

    fn post_get(
        &mut self,
        from: Envelope,
        slice: RegionSliceMut,
        remote: RemoteSlice,
    ) -> Result<(), PostError<RegionSliceMut>> {
        let ready = self.ready(from, remote.bytes, slice.len() as u64);
        let first = slice.range().start;
        let range = first..first + usize::try_from(remote.bytes).unwrap_or(0).min(slice.len());
        let lease = ready.and_then(|()| self.lease_remotely(slice.region(), range, MemoryAccess::Write));
        let (lease, link) = match (lease, self.at(from.peer.index())) {
            (Ok(lease), Some(link)) => (lease, link),
            (Err(error), _) => return Err(PostError { error, slice }),
            (Ok(_), None) => return Err(PostError { error: TransportError::UnknownPeer(from.peer.0), slice }),
        };
        let key =
            link.remotely.insert(Remotely { lease, remote, next: 0, what: Access::Get { from, slice }, direct: None });
        link.queue.push_back(Out::Get { key });
        Ok(())
    }
}
