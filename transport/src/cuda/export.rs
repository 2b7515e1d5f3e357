//! Does: a device's memory as a file that network cards take, and what they wrote made visible to the device.

#![allow(unsafe_code)]

use super::device::SUCCESS;
use super::{CudaError, Device, DeviceSlice};
use rustix::fd::{FromRawFd, OwnedFd};
use std::ffi::c_int;

const RANGE_START: c_int = 11;
const RANGE_SIZE: c_int = 12;
const DMA_BUF_FD: c_int = 1;
/// Devices whose kernels see what a card wrote, in the order in which it was written, say at least so much to this.
const WRITES_ORDERING: c_int = 118;
const TO_OWNER: c_int = 100;
const CURRENT_DEVICE: c_int = 0;

impl DeviceSlice {
    /// A dma-buf of the allocation that this lies in, and where it begins there.
    ///
    /// # Errors
    /// `WrongMemory` where it lies in several allocations, `TooOld` or `Refused` where the driver exports none.
    pub fn export(&self) -> Result<(OwnedFd, u64), CudaError> {
        let device = self.device();
        let symbol = "cuMemGetHandleForAddressRange";
        let too_old = || CudaError::TooOld { library: "libcuda".to_owned(), symbol };
        let export = device.driver.library.cuMemGetHandleForAddressRange.ok_or_else(too_old)?;
        let (mut start, mut bytes) = (0u64, 0usize);
        for (attribute, value) in [(RANGE_START, (&raw mut start).cast()), (RANGE_SIZE, (&raw mut bytes).cast())] {
            // SAFETY: both are as the attributes say, an address and a size, and may be written.
            let code = unsafe { (device.driver.library.cuPointerGetAttribute)(value, attribute, self.address()) };
            device.driver.check("cuPointerGetAttribute", device.ordinal(), code)?;
        }
        let offset = self.address().saturating_sub(start);
        if offset + self.len() as u64 > bytes as u64 {
            let (address, bytes, ordinal) = (self.address(), self.len(), device.ordinal());
            let found = "it lies in several allocations".to_owned();
            return Err(CudaError::WrongMemory { address, bytes, ordinal, found });
        }
        let whole = bytes.next_multiple_of(rustix::param::page_size());
        let mut file: c_int = -1;
        // SAFETY: `file` may be written; the driver checks the range.
        device.inside(symbol, |_| unsafe { export((&raw mut file).cast(), start, whole, DMA_BUF_FD, 0) })?;
        // SAFETY: the driver has made it for us, and nobody else closes it.
        Ok((unsafe { OwnedFd::from_raw_fd(file) }, offset))
    }
}

impl Device {
    /// Has kernels that begin after this see what a network card has written into the device's memory; of a device that sees it
    /// by itself, nothing is asked.
    ///
    /// # Errors
    /// `TooOld` or `Refused`.
    pub fn flush_rdma_writes(&self) -> Result<(), CudaError> {
        let mut ordering = 0;
        let library = &self.driver.library;
        // SAFETY: `ordering` may be written; a driver that does not know the attribute says so.
        let code = unsafe { (library.cuDeviceGetAttribute)(&raw mut ordering, WRITES_ORDERING, self.number) };
        if code == SUCCESS && ordering >= TO_OWNER {
            return Ok(());
        }
        let symbol = "cuFlushGPUDirectRDMAWrites";
        let too_old = || CudaError::TooOld { library: "libcuda".to_owned(), symbol };
        let flush = library.cuFlushGPUDirectRDMAWrites.ok_or_else(too_old)?;
        // SAFETY: the device's context is current; both are values of the driver's enumerations.
        self.inside(symbol, |_| unsafe { flush(CURRENT_DEVICE, TO_OWNER) })
    }
}
