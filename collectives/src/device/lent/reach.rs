//! Does: memory of a device that ranks of this host lend each other: that of this process by itself, that of others by CUDA IPC.

#![allow(unsafe_code)]

use super::SLOT_BYTES;
use super::card::Card;
use gradwire_transport::cuda::{CudaError, Device, DeviceMemory, HANDLE_BYTES};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

/// This process, by a number drawn by chance.
pub(super) static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
/// What ranks of this process lend, by its address.
static LENT: Mutex<BTreeMap<u64, Weak<DeviceMemory>>> = Mutex::new(BTreeMap::new());

/// A slot of `device`, and what leads other processes to it.
pub(super) fn lend(device: &Arc<Device>) -> Result<(Arc<DeviceMemory>, [u8; HANDLE_BYTES]), CudaError> {
    let memory = DeviceMemory::allocate(device, SLOT_BYTES)?;
    let handle = memory.share()?;
    let mut lent = lent();
    lent.retain(|_, memory| memory.strong_count() > 0);
    lent.insert(memory.address(), Arc::downgrade(&memory));
    Ok((memory, handle))
}

/// The slot of the rank whose card this is.
pub(super) fn reach(device: &Arc<Device>, card: &Card) -> Result<Arc<DeviceMemory>, CudaError> {
    let here = || lent().get(&card.address).and_then(Weak::upgrade);
    if card.process == *PROCESS
        && let Some(memory) = here()
    {
        return Ok(memory);
    }
    // SAFETY: the handle is that of a slot of `SLOT_BYTES`, as a rank has told, which keeps it until the group is closed, and for good
    // where a call failed; the ranks of a group trust each other with their data.
    unsafe { DeviceMemory::open(device, card.handle, SLOT_BYTES) }
}

fn lent() -> MutexGuard<'static, BTreeMap<u64, Weak<DeviceMemory>>> {
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}
