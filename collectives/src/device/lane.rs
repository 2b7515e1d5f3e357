//! Does: what a group holds of a device: streams of its own, the ring of pinned buffers, larger ones for what cannot be cut, and
//! the gate that callers' streams wait at.

use super::cut::{SLOT_BYTES, SLOTS};
use gradwire_transport::Region;
use gradwire_transport::cuda::{CudaError, Device, Gate, PinnedPool, Stream, Way};
use std::sync::{Arc, Mutex};

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
    /// Pinned memory for what cannot be cut. Only callers ask it, since a stream may wait for the thread that carries calls out.
    pub(crate) pinned: Arc<PinnedPool>,
}

impl Lane {
    pub(crate) fn new(device: &Arc<Device>, rdma: bool) -> Result<Self, CudaError> {
        let stream = || Stream::new(device);
        let pinned = PinnedPool::of(device);
        let slot = || pinned.take(SLOT_BYTES);
        Ok(Self {
            device: Arc::clone(device),
            out: stream()?,
            into: stream()?,
            sends: stream()?,
            receives: stream()?,
            slots: [slot()?, slot()?, slot()?, slot()?],
            gate: Gate::new(device)?,
            begun: Mutex::new(0),
            way: if rdma { Some(words(&device.way_to_rdma()?)) } else { None },
            pinned,
        })
    }
}

fn words(way: &Way) -> String {
    match way {
        Way::Staged { .. } => way.to_string(),
        direct => format!(
            "{direct} for one-sided access and calls of several rounds; what is shorter, and messages, are staged"
        ),
    }
}
