//! Does: pinned memory of the host that is used again: one pool a device, shared by all of the process that copy from and to it.

use super::{CudaError, Device};
use crate::Region;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that nobody uses and that are kept all the same: what a step of training moves is moved again by the next.
const KEPT_BYTES: usize = 256 << 20;
/// Lengths are rounded up to so much, so that calls of about one length share a buffer.
const UNIT_BYTES: usize = 64 << 10;
/// A buffer is not used for less than this part of it, unless it is small.
const MOST_WASTE: usize = 4;

/// What a pool has done, and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinnedCount {
    /// Buffers that were pinned.
    pub made: u64,
    /// Buffers that were asked for and there already.
    pub reused: u64,
    /// Buffers that were given up for want of room.
    pub given_up: u64,
    /// Bytes pinned now, used or not.
    pub bytes: usize,
}

/// Pinned buffers of one device. One that its user has dropped, with all slices of it, is there for the next.
pub struct PinnedPool {
    device: Arc<Device>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// The one that was asked for longest ago is first.
    buffers: Vec<Arc<Region>>,
    count: PinnedCount,
}

impl Held {
    /// Takes out what nobody uses beyond `most` bytes, the oldest first.
    fn excess(&mut self, most: usize) -> Vec<Arc<Region>> {
        let mut idle: usize = self.buffers.iter().filter(|buffer| is_idle(buffer)).map(|buffer| buffer.len()).sum();
        // What a device knows would stay pinned all the same, and is used again for as long as it is.
        let goes = |buffer: &mut Arc<Region>| {
            let goes = idle > most && is_idle(buffer) && Arc::strong_count(buffer) == 1;
            idle -= if goes { buffer.len() } else { 0 };
            goes
        };
        let excess: Vec<_> = self.buffers.extract_if(.., goes).collect();
        self.count.given_up += excess.len() as u64;
        self.count.bytes -= excess.iter().map(|buffer| buffer.len()).sum::<usize>();
        excess
    }
}

impl PinnedPool {
    /// The pool of `device`: the same for all who ask while one of them has it.
    pub fn of(device: &Arc<Device>) -> Arc<Self> {
        let mut pools = device.driver.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(&device.ordinal()).and_then(std::sync::Weak::upgrade) {
            return pool;
        }
        let pool = Arc::new(Self { device: Arc::clone(device), held: Mutex::default() });
        pools.insert(device.ordinal(), Arc::downgrade(&pool));
        pool
    }

    /// Whose it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// A buffer of at least `bytes` that nobody else uses; its bytes are what its last user left. Drop it to give it back.
    ///
    /// Pinning memory and giving it up may wait for the whole device. That is done here, never where a buffer is dropped: so a
    /// thread that streams of the device wait for may drop one, but must not ask.
    ///
    /// # Errors
    /// `Refused`: there is not so much that may be pinned, though all that nobody uses was given up.
    pub fn take(&self, bytes: usize) -> Result<Arc<Region>, CudaError> {
        let bytes = bytes.max(1).next_multiple_of(UNIT_BYTES);
        let most = bytes.saturating_mul(MOST_WASTE).max(1 << 20);
        let mut held = self.held();
        let fits = |buffer: &&Arc<Region>| (bytes..=most).contains(&buffer.len()) && is_idle(buffer);
        let found = held.buffers.iter().filter(fits).min_by_key(|buffer| buffer.len()).map(Arc::clone);
        if let Some(found) = found {
            held.count.reused += 1;
            // Behind all others, as the youngest.
            held.buffers.retain(|buffer| !Arc::ptr_eq(buffer, &found));
            let lent = lend(&found);
            held.buffers.push(found);
            let excess = held.excess(KEPT_BYTES);
            drop(held);
            drop(excess);
            return Ok(lent);
        }
        let excess = held.excess(KEPT_BYTES.saturating_sub(bytes));
        drop(held);
        drop(excess);
        let made = self.device.pin(bytes).or_else(|_| {
            let all = self.held().excess(0);
            drop(all);
            self.device.pin(bytes)
        })?;
        let mut held = self.held();
        held.count.made += 1;
        held.count.bytes += made.len();
        let lent = lend(&made);
        held.buffers.push(made);
        Ok(lent)
    }

    /// What it has done.
    pub fn count(&self) -> PinnedCount {
        self.held().count
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The buffer in its user's hands, until the last slice of it is dropped. A network card that is told of it keeps the buffer, not
/// this.
fn lend(buffer: &Arc<Region>) -> Arc<Region> {
    Region::of_slice(buffer.write(0..buffer.len()).expect("it is idle, and only the pool lends it"))
}

/// Whether nobody uses it.
fn is_idle(buffer: &Arc<Region>) -> bool {
    buffer.write(0..buffer.len()).is_ok()
}
