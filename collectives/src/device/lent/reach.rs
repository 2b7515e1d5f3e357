//! Does: memory of a device that ranks lend each other: of this process by itself, of others on this host by CUDA IPC, and on other
//! hosts by what the network card knows it by.

#![allow(unsafe_code)]

use super::card::Card;
use super::{LANDING_BYTES, SLOT_BYTES};
use crate::submitter::Submitter;
use gradwire_transport::cuda::{CudaError, Device, DeviceMemory, HANDLE_BYTES};
use gradwire_transport::{Rank, RemoteSlice, WireKind};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

/// This process, by a number drawn by chance.
pub(super) static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
/// What ranks of this process lend, by its address.
static LENT: Mutex<BTreeMap<u64, Weak<DeviceMemory>>> = Mutex::new(BTreeMap::new());

/// A rank's slot.
pub(super) enum Slot {
    /// This rank's device reaches it.
    Near(Arc<DeviceMemory>),
    /// The network card does.
    Far(RemoteSlice),
    /// Nothing does, and nobody has to.
    Away,
}

/// What this rank lends.
pub(super) struct Own {
    pub(super) memory: Arc<DeviceMemory>,
    pub(super) handle: [u8; HANDLE_BYTES],
    /// As the network card has it: the slot, and behind it where reads of other ranks' slots land. Of no bytes where all are near.
    pub(super) exposed: RemoteSlice,
    /// By which ways the others reach it, in words.
    pub(super) ways: String,
    /// Why only those of this host do, where it is so.
    pub(super) apart: Option<String>,
    /// Whether it would do if only those of this host did.
    pub(super) near: bool,
}

impl Own {
    /// Memory that nobody else reaches.
    pub(super) fn alone(memory: Arc<DeviceMemory>) -> Self {
        let exposed = RemoteSlice { key: 0, offset: 0, bytes: 0 };
        Self { memory, handle: [0; HANDLE_BYTES], exposed, ways: String::new(), apart: None, near: false }
    }
}

/// Lends a slot of `device`, by the ways that lead to the other ranks.
///
/// # Errors
/// Why not, for people.
pub(super) fn lend(device: &Arc<Device>, links: &[(Rank, WireKind)], submitter: &Submitter) -> Result<Own, String> {
    let together = hosts_of_several(links, submitter);
    let by = |kind| links.iter().any(|(_, link)| *link == kind);
    let (near, far) = (by(WireKind::Shm), by(WireKind::Verbs));
    // A link that began by RDMA may have none left.
    let now = |(rank, kind): &(Rank, WireKind)| match kind {
        WireKind::Verbs => submitter.shared.engine().wire.kind((*rank).into()),
        other => *other,
    };
    let blind = links.iter().map(now).find(|kind| !matches!(kind, WireKind::Shm | WireKind::Verbs));
    let mut apart = blind.map(|other| format!("a rank is reached by {other}, which reads no device"));
    if let Some(reason) = apart.as_ref().filter(|_| !together) {
        return Err(reason.clone());
    }
    let far = far && apart.is_none();
    let refused = |error: CudaError| error.to_string();
    let bytes = SLOT_BYTES + if far { LANDING_BYTES } else { 0 };
    let memory = DeviceMemory::allocate(device, bytes).map_err(refused)?;
    let (mut ways, mut exposed) = (Vec::new(), RemoteSlice { key: 0, offset: 0, bytes: 0 });
    if far {
        let whole = memory.slice(0..bytes).map_err(|error| error.to_string())?;
        let mut engine = submitter.shared.engine();
        let wire = engine.wire.device_sided().ok_or("no wire of the group reads devices")?;
        let (way, remote) = wire.expose_device(whole);
        match remote {
            Some(remote) => {
                exposed = remote;
                ways.push(way.to_string());
            }
            None if together => apart = Some(way.to_string()),
            None => return Err(way.to_string()),
        }
    }
    let handle = if near { memory.share().map_err(refused)? } else { [0; HANDLE_BYTES] };
    if near {
        ways.push("CUDA IPC".to_owned());
    }
    let mut lent = lent();
    lent.retain(|_, memory| memory.strong_count() > 0);
    lent.insert(memory.address(), Arc::downgrade(&memory));
    Ok(Own { memory, handle, exposed, ways: ways.join(" and "), apart, near: together })
}

/// Whether there are several hosts, as many ranks on each, and this one shares memory with those of its own.
fn hosts_of_several(links: &[(Rank, WireKind)], submitter: &Submitter) -> bool {
    let Some(hosts) = submitter.chooser.hosts().filter(|hosts| hosts.count() > 1 && hosts.most() > 1) else {
        return false;
    };
    let here = hosts.ranks(hosts.place(submitter.rank).0);
    let near = |(rank, kind): &(Rank, WireKind)| !here.contains(rank) || *kind == WireKind::Shm;
    hosts.across(submitter.rank).is_some() && links.iter().all(near)
}

/// Has the network card forget what was lent to no avail, so that it is freed.
pub(super) fn take_back(own: &Own, submitter: &Submitter) {
    if own.exposed.bytes > 0
        && let Some(wire) = submitter.shared.engine().wire.device_sided()
    {
        // Nobody has read it: it comes back, and goes with the other holders.
        drop(wire.withdraw_device(own.exposed));
    }
}

/// The slot of the rank whose card this is, to which such a link leads.
pub(super) fn reach(device: &Arc<Device>, card: &Card, link: WireKind) -> Result<Slot, CudaError> {
    if link == WireKind::Verbs {
        return Ok(Slot::Far(card.remote));
    }
    let here = || lent().get(&card.address).and_then(Weak::upgrade);
    if card.process == *PROCESS
        && let Some(memory) = here()
    {
        return Ok(Slot::Near(memory));
    }
    // SAFETY: the handle is that of a slot of `SLOT_BYTES`, as a rank has told, which keeps it until the group is closed, and for good
    // where a call failed; the ranks of a group trust each other with their data.
    unsafe { DeviceMemory::open(device, card.handle, SLOT_BYTES) }.map(Slot::Near)
}

fn lent() -> MutexGuard<'static, BTreeMap<u64, Weak<DeviceMemory>>> {
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}
