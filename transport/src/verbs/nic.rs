//! Does: the device with what the wire knows of its memory.

use super::adapter::{Access, Adapter, Limits};
use super::registered_pool::{LARGEST, Lent, RegisteredPool};
use super::registrations::{Lease, Registrations};
use crate::{Region, RegisterError};
use std::ops::Range;
use std::sync::Arc;

/// One device, its registrations and the wire's registered memory. The device goes first: it reaches the other two.
pub(super) struct Nic {
    pub(super) adapter: Box<dyn Adapter>,
    pub(super) limits: Limits,
    pub(super) registrations: Registrations,
    pub(super) pool: RegisteredPool,
    /// Records that have come from anybody.
    pub(super) turn: u64,
    /// Messages that went in pieces, since their memory could not be registered.
    pub(super) copied: u64,
}

impl Nic {
    pub(super) fn new(adapter: Box<dyn Adapter>, cache_bytes: usize, pool_bytes: usize) -> Self {
        Self {
            limits: adapter.limits(),
            adapter,
            registrations: Registrations::new(cache_bytes),
            pool: RegisteredPool::new(pool_bytes),
            turn: 0,
            copied: 0,
        }
    }

    /// Memory for a link's own use, with its registration.
    ///
    /// # Errors
    /// The device's; also where the pool is too small.
    pub(super) fn slots(&mut self, bytes: usize) -> Result<(Lent, Lease), RegisterError> {
        let lent = self.pool.take(bytes, &mut *self.adapter, &mut self.registrations)?;
        let known = lent.and_then(|lent| self.known(lent.address, bytes).map(|lease| (lent, lease)));
        let (lent, lease) = known.ok_or_else(|| RegisterError::Device {
            bytes,
            device: self.adapter.name(),
            source: Arc::new(std::io::Error::other("the wire's registered memory is used up: raise its pool_bytes")),
        })?;
        self.registrations.release(lease);
        Ok((lent, lease))
    }

    /// A buffer that the peer may write, with its remote key; `None` where there is none to be had.
    pub(super) fn buffer(&mut self, bytes: usize) -> Option<(Lent, u32)> {
        let lent = self.take(bytes)?;
        let lease = self.registrations.find(lent.address, bytes, Access::Write)?;
        // The pool's memory stays registered: it needs nobody's lease.
        self.registrations.release(lease);
        Some((lent, lease.remote))
    }

    /// A buffer to write a message in.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Lent> {
        if bytes > LARGEST {
            return None;
        }
        let taken = self.pool.take(bytes, &mut *self.adapter, &mut self.registrations);
        taken.inspect_err(|error| tracing::warn!(%error, "no more memory can be registered for messages")).ok()?
    }

    /// The registration of a caller's memory; `None` where it cannot be registered: the message then goes in pieces.
    pub(super) fn lease(&mut self, region: &Arc<Region>, range: Range<usize>, writes: bool) -> Option<Lease> {
        let access = if writes { Access::Write } else { Access::Read };
        let bytes = range.len();
        let lease = self.registrations.lease(&mut *self.adapter, region, range, access);
        lease
            .inspect_err(|error| {
                self.copied += 1;
                if self.copied.is_power_of_two() {
                    tracing::warn!(%error, bytes, copied = self.copied, "a message is copied: its memory cannot be registered");
                }
            })
            .ok()
    }

    /// The registration of memory that is known already.
    pub(super) fn known(&mut self, start: usize, bytes: usize) -> Option<Lease> {
        self.registrations.find(start, bytes, Access::Read)
    }
}
