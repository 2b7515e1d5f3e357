//! Pure: what a link has under way beyond its frames: messages that are written part by part, and accesses to a peer's memory.

use super::adapter::Remote;
use super::gpu_direct::Direct;
use super::proposal::MAX_LANES;
use super::registrations::Lease;
use crate::flights::Cargo;
use crate::{Envelope, RegionSliceMut, RemoteSlice};

/// A message that the peer has granted.
pub(super) struct Large {
    pub(super) flight: u64,
    pub(super) cargo: Cargo,
    /// Our registration of it; none: it goes in pieces.
    pub(super) lease: Option<Lease>,
    /// Where the peer wants it.
    pub(super) remote: Remote,
    pub(super) key: u32,
    /// What each lane carries.
    pub(super) parts: [Part; MAX_LANES],
}

/// A stretch of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: usize,
    pub(super) next: usize,
    pub(super) end: usize,
    pub(super) delivered: bool,
}

impl Part {
    pub(super) fn of(start: usize, end: usize) -> Self {
        Self { start, next: start, end, delivered: false }
    }

    /// Whether something of it is still to be delivered.
    pub(super) fn is_open(&self) -> bool {
        self.end > self.start && !self.delivered
    }
}

/// A read or write of the peer's exposed memory.
pub(super) struct Remotely {
    pub(super) lease: Option<Lease>,
    pub(super) remote: RemoteSlice,
    /// Bytes of it that have been posted.
    pub(super) next: usize,
    pub(super) what: Access,
    /// What is read or written here in place of the access's slice, which has no bytes then.
    pub(super) direct: Option<Direct>,
}

impl Remotely {
    /// How many bytes it sends or fetches.
    pub(super) fn bytes(&self) -> usize {
        match (&self.direct, &self.what) {
            (Some(direct), _) => direct.bytes,
            (None, Access::Put { cargo, .. }) => cargo.len(),
            (None, Access::Get { .. }) => self.remote.bytes as usize,
        }
    }
}

/// Which of the two it is, and with what.
pub(super) enum Access {
    Put { flight: u64, cargo: Cargo },
    Get { from: Envelope, slice: RegionSliceMut },
}
