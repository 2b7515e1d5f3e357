//! Does: what a group holds of a device: streams of its own, the ring of pinned buffers, larger ones for what cannot be cut, and
//! the gate that callers' streams wait at.

use super::cut::{SLOT_BYTES, SLOTS};
use gradwire_transport::Region;
use gradwire_transport::cuda::{CudaError, Device, Gate, Stream};
use std::sync::{Arc, Mutex, PoisonError};

/// Larger pinned buffers that nobody has are given up beyond this many bytes.
const SPARE_BYTES: usize = 64 << 20;

/// A device as one group uses it.
pub(crate) struct Lane {
    pub(crate) device: Arc<Device>,
    /// Copies from the device, to it, and those of messages: so that neither waits for another.
    pub(crate) out: Stream,
    pub(crate) into: Stream,
    pub(crate) sends: Stream,
    pub(crate) receives: Stream,
    pub(crate) slots: [Arc<Region>; SLOTS],
    pub(crate) gate: Gate,
    /// Calls begun, which the gate counts the ends of.
    pub(crate) begun: Mutex<u32>,
    /// What there would be in place of copies, in words; none where no link is by RDMA.
    pub(crate) way: Option<String>,
    spare: Mutex<Vec<Arc<Region>>>,
}

impl Lane {
    pub(crate) fn new(device: &Arc<Device>, rdma: bool) -> Result<Self, CudaError> {
        let stream = || Stream::new(device);
        let slot = || device.pin(SLOT_BYTES);
        Ok(Self {
            device: Arc::clone(device),
            out: stream()?,
            into: stream()?,
            sends: stream()?,
            receives: stream()?,
            slots: [slot()?, slot()?, slot()?, slot()?],
            gate: Gate::new(device)?,
            begun: Mutex::new(0),
            way: if rdma { Some(device.way_to_rdma()?.to_string()) } else { None },
            spare: Mutex::default(),
        })
    }

    /// Pinned memory of at least `bytes`, to be [given back](Self::give_back). Only callers ask: pinning may wait for the whole
    /// device, and a stream of the device may wait for the thread that carries calls out.
    pub(crate) fn buffer(&self, bytes: usize) -> Result<Arc<Region>, CudaError> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = spare.iter().position(|region| region.len() >= bytes) {
            return Ok(spare.swap_remove(at));
        }
        drop(spare);
        self.device.pin(bytes.next_multiple_of(64 << 10))
    }

    /// Keeps a buffer for the next that asks, within a bound.
    pub(crate) fn give_back(&self, buffer: Arc<Region>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let held: usize = spare.iter().map(|region| region.len()).sum();
        if held + buffer.len() <= SPARE_BYTES {
            spare.push(buffer);
        }
    }
}
