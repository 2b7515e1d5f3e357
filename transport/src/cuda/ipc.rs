//! Does: memory of a device that processes of one host lend each other by CUDA IPC.

#![allow(unsafe_code)]

use super::device::SUCCESS;
use super::library::IpcHandle;
use super::{CudaError, Device, DeviceMemory};
use std::sync::Arc;

/// Bytes of what leads another process to a device's memory.
pub const HANDLE_BYTES: usize = 64;
/// Reaches the memory of another device over NVLink or PCIe, where it is one.
const LAZY_PEER_ACCESS: u32 = 1;

impl DeviceMemory {
    /// What leads another process of this host to this memory, which must have been allocated here, as a whole.
    ///
    /// # Errors
    /// `Refused`; `TooOld` for a driver without CUDA IPC.
    pub fn share(&self) -> Result<[u8; HANDLE_BYTES], CudaError> {
        let share = self.device().driver.library.cuIpcGetMemHandle.ok_or_else(|| lacks("cuIpcGetMemHandle"))?;
        let (mut handle, address) = (IpcHandle([0; HANDLE_BYTES]), self.address());
        // SAFETY: `handle` may be written; what the address is of is the driver's to judge.
        self.device().inside("cuIpcGetMemHandle", |_| unsafe { share(&raw mut handle, address) })?;
        Ok(handle.0)
    }

    /// Memory of `bytes` that another process of this host shares, as `device` reaches it.
    ///
    /// # Errors
    /// `Refused`: the devices do not reach each other, or it is this very process's; `TooOld`.
    ///
    /// # Safety
    /// `handle` is what [`share`](Self::share) gave for memory of at least `bytes`, which stays allocated for as long as this lives.
    pub unsafe fn open(device: &Arc<Device>, handle: [u8; HANDLE_BYTES], bytes: usize) -> Result<Arc<Self>, CudaError> {
        let library = &device.driver.library;
        let (Some(open), Some(_)) = (library.cuIpcOpenMemHandle_v2, library.cuIpcCloseMemHandle) else {
            return Err(lacks("cuIpcOpenMemHandle_v2"));
        };
        let (mut address, handle) = (0, IpcHandle(handle));
        // SAFETY: `address` may be written; the caller says what the handle is.
        device.inside("cuIpcOpenMemHandle", |_| unsafe { open(&raw mut address, handle, LAZY_PEER_ACCESS) })?;
        Ok(Self::reached(address, bytes, device, Box::new(Opened { address, device: Arc::clone(device) })))
    }
}

fn lacks(symbol: &'static str) -> CudaError {
    CudaError::TooOld { library: "libcuda".to_owned(), symbol }
}

struct Opened {
    address: u64,
    device: Arc<Device>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let address = self.address;
        let closed = self.device.inside("cuIpcCloseMemHandle", |cuda| {
            // SAFETY: opened once, by `open`, and nobody holds a slice of it any more.
            cuda.cuIpcCloseMemHandle.map_or(SUCCESS, |close| unsafe { close(address) })
        });
        if let Err(error) = closed {
            tracing::warn!(%error, "another process's memory of a device was not closed");
        }
    }
}
