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

    /// Pinned memory of at least `bytes`, to be [given back](Self::give_back). Only callers ask: pinning memory, and giving it up,
    /// may wait for the whole device, and a stream of the device may wait for the thread that carries calls out.
    pub(crate) fn buffer(&self, bytes: usize) -> Result<Arc<Region>, CudaError> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // A wire that was late may hold one that was given back; slices hold their region.
        let idle = |region: &Arc<Region>| Arc::strong_count(region) == 1;
        let fits = spare.iter().enumerate().filter(|(_, region)| idle(region) && region.len() >= bytes);
        let found = fits.min_by_key(|(_, region)| region.len()).map(|(at, _)| at);
        let found = found.map(|at| spare.swap_remove(at));
        let mut held: usize = spare.iter().map(|region| region.len()).sum();
        let goes = |region: &mut Arc<Region>| {
            let goes = held > SPARE_BYTES && idle(region);
            held -= if goes { region.len() } else { 0 };
            goes
        };
        let excess: Vec<_> = spare.extract_if(.., goes).collect();
        drop(spare);
        drop(excess);
        found.map_or_else(|| self.device.pin(bytes.next_multiple_of(64 << 10)), Ok)
    }

    /// Keeps a buffer for the next that asks, who gives up what is too much.
    pub(crate) fn give_back(&self, buffer: Arc<Region>) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}
