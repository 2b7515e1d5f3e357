//! Does: memory of GPUs that the RDMA device reads and writes by itself: by a dma-buf, else by its address where a module of the
//! kernel knows that. Which way, and why no better one, is told for each buffer ([`Way`]).

#![allow(unsafe_code)]

use super::adapter::{Foreign, Key};
use super::dma_buf;
use super::link::{Access, Out, Remotely};
use super::one_sided::MAX_EXPOSED;
use super::wire::VerbsWire;
use crate::cuda::{CudaError, DeviceSlice, Trial, Way};
use crate::flights::Cargo;
use crate::{DeviceSided, Envelope, Region, RegisterError, RemoteSlice, TransportError};
use rustix::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

/// Memory of a GPU that the device knows.
pub(super) struct Reached {
    key: Key,
    /// Accesses under way have it too.
    memory: Arc<DeviceSlice>,
}

/// Part of it, as an access under way has it.
pub(super) struct Direct {
    /// By what the device names its first byte.
    pub(super) address: u64,
    pub(super) bytes: usize,
    pub(super) key: u32,
    pub(super) memory: Arc<DeviceSlice>,
}

impl VerbsWire {
    /// As [`post_put`](crate::OneSided::post_put), out of a GPU's memory that is exposed here; the completion's slice is empty.
    ///
    /// # Errors
    /// Where nothing was posted: `Config` for memory that is not exposed here, else as there.
    pub fn post_put_from_device(
        &mut self,
        to: Envelope,
        own: RemoteSlice,
        remote: RemoteSlice,
    ) -> Result<(), TransportError> {
        self.ready(to, own.bytes, remote.bytes)?;
        let direct = Some(self.part(own)?);
        let nothing = Region::zeroed(0).read(0..0).expect("nothing is nobody's");
        let link = self.link(to.peer)?;
        let what = Access::Put { flight: link.flights.begin(to), cargo: Cargo::Slice(nothing) };
        let key = link.remotely.insert(Remotely { lease: None, remote, next: 0, what, direct });
        link.queue.push_back(Out::Put { key });
        Ok(())
    }

    fn part(&self, own: RemoteSlice) -> Result<Direct, TransportError> {
        let unknown = || TransportError::Config {
            setting: "one-sided access".to_owned(),
            reason: format!("{} bytes at {} of a GPU's memory are not exposed here", own.bytes, own.offset),
        };
        let Reached { key, memory } = self.direct.get(&(own.key as u32)).ok_or_else(unknown)?;
        let end = own.offset.checked_add(own.bytes).filter(|&end| end <= memory.len() as u64);
        end.ok_or_else(unknown)?;
        let (address, bytes) = (key.first + own.offset, own.bytes as usize);
        Ok(Direct { address, bytes, key: key.local, memory: Arc::clone(memory) })
    }

    fn register_dma_buf(&mut self, slice: &DeviceSlice) -> Result<Key, String> {
        let (file, offset) = slice.export().map_err(|error: CudaError| error.to_string())?;
        let dma_buf = Some((file.as_fd(), offset));
        let memory = Foreign { address: slice.address(), bytes: slice.len(), dma_buf };
        // SAFETY: the slice keeps the memory, and is kept until it is deregistered or the device is closed.
        unsafe { self.nic.adapter.register_foreign(memory) }.map_err(|error| words(&error))
    }

    fn register_address(&mut self, slice: &DeviceSlice) -> Result<Key, String> {
        // Without it, memory that the processor and the GPU share would be registered as the host's, and never move again.
        if !Path::new("/sys/module/nvidia_peermem").exists() {
            return Err("nvidia_peermem is not loaded".to_owned());
        }
        let memory = Foreign { address: slice.address(), bytes: slice.len(), dma_buf: None };
        // SAFETY: as above.
        unsafe { self.nic.adapter.register_foreign(memory) }.map_err(|error| words(&error))
    }
}

impl DeviceSided for VerbsWire {
    fn expose_device(&mut self, slice: DeviceSlice) -> (Way, Option<RemoteSlice>) {
        let card = self.nic.adapter.name();
        if slice.is_empty() || self.direct.len() >= MAX_EXPOSED {
            let why = if slice.is_empty() { "it has no bytes" } else { "too much memory is exposed: withdraw some" };
            return (Way::Staged { reason: why.to_owned() }, None);
        }
        let by_dma_buf = self.register_dma_buf(&slice);
        let by_address = match &by_dma_buf {
            Ok(_) => Err("not needed".to_owned()),
            Err(_) => self.register_address(&slice),
        };
        let told = |tried: &Result<Key, String>| tried.as_ref().map(drop).map_err(Clone::clone);
        let way = Way::of_trial(&Trial { card, dma_buf: told(&by_dma_buf), peer_memory: told(&by_address) });
        let Ok(key) = by_dma_buf.or(by_address) else {
            tracing::info!(%way, bytes = slice.len(), "a GPU's memory is staged");
            return (way, None);
        };
        let bytes = slice.len() as u64;
        self.direct.insert(key.remote, Reached { key, memory: Arc::new(slice) });
        (way, Some(RemoteSlice { key: key.first << 32 | u64::from(key.remote), offset: 0, bytes }))
    }

    fn withdraw_device(&mut self, own: RemoteSlice) -> Option<DeviceSlice> {
        let number = own.key as u32;
        let Reached { key, memory } = self.direct.remove(&number)?;
        match Arc::try_unwrap(memory) {
            Ok(slice) => {
                self.nic.adapter.deregister(key.handle);
                Some(slice)
            }
            Err(memory) => {
                self.direct.insert(number, Reached { key, memory });
                None
            }
        }
    }

    fn post_get_to_device(
        &mut self,
        from: Envelope,
        own: RemoteSlice,
        remote: RemoteSlice,
    ) -> Result<(), TransportError> {
        self.ready(from, remote.bytes, own.bytes)?;
        let direct = Some(self.part(RemoteSlice { bytes: remote.bytes, ..own })?);
        let slice = Region::zeroed(0).write(0..0).expect("nothing is nobody's");
        let link = self.link(from.peer)?;
        let what = Access::Get { from, slice };
        let key = link.remotely.insert(Remotely { lease: None, remote, next: 0, what, direct });
        link.queue.push_back(Out::Get { key });
        Ok(())
    }
}

fn words(error: &RegisterError) -> String {
    match error {
        RegisterError::Device { source, .. } => dma_buf::words(source),
        other => other.to_string(),
    }
}
