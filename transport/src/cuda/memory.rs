//! Does: memory of a device, and memory of the host that a device copies to and from by itself.

#![allow(unsafe_code)]

use super::device::SUCCESS;
use super::{CudaError, Device, Driver};
use crate::region::{Overlap, Region};
use std::any::Any;
use std::ffi::c_int;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

const MEMORY_TYPE: c_int = 2;
const DEVICE_ORDINAL: c_int = 9;
const TYPE_DEVICE: u32 = 2;
/// Pinned memory that every context may use.
const PORTABLE: u32 = 1;

/// A stretch of a device's memory. The host never looks into it; streams copy it.
pub struct DeviceMemory {
    address: u64,
    bytes: usize,
    device: Arc<Device>,
    _keep_alive: Box<dyn Any + Send + Sync>,
}

impl DeviceMemory {
    /// Memory that somebody else owns, which the driver is asked about.
    ///
    /// # Errors
    /// `WrongMemory` where the driver says that it is not this device's.
    ///
    /// # Safety
    /// `address..address + bytes` must stay allocated for as long as `keep_alive` lives, and what writes it meanwhile must be
    /// ordered by the streams that copies of it are ordered by.
    pub unsafe fn from_raw(
        address: u64,
        bytes: usize,
        device: Arc<Device>,
        keep_alive: Box<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>, CudaError> {
        if bytes > 0 {
            let wrong = |found: String| CudaError::WrongMemory { address, bytes, ordinal: device.ordinal(), found };
            let last =
                address.checked_add(bytes as u64 - 1).ok_or_else(|| wrong("it goes beyond all memory".into()))?;
            for byte in [address, last] {
                match owner(device.driver, byte) {
                    None => return Err(wrong("the driver does not know it".into())),
                    Some((TYPE_DEVICE, ordinal)) if ordinal == device.ordinal() => {}
                    Some((TYPE_DEVICE, ordinal)) => return Err(wrong(format!("it is of device {ordinal}"))),
                    Some(_) => return Err(wrong("it is memory of the host".into())),
                }
            }
        }
        Ok(Arc::new(Self { address, bytes, device, _keep_alive: keep_alive }))
    }

    /// `bytes` of new memory, not set.
    ///
    /// # Errors
    /// `Refused`: there is not so much.
    pub fn allocate(device: &Arc<Device>, bytes: usize) -> Result<Arc<Self>, CudaError> {
        let mut address = 0;
        // SAFETY: `address` may be written; the driver takes no length of 0.
        device.inside("cuMemAlloc", |cuda| unsafe { (cuda.cuMemAlloc_v2)(&raw mut address, bytes.max(1)) })?;
        let keep = Box::new(Allocated { address, device: Arc::clone(device) });
        Ok(Arc::new(Self { address, bytes, device: Arc::clone(device), _keep_alive: keep }))
    }

    /// Memory that `device` reaches, whosever it is, as the driver itself or another holder said.
    pub(super) fn reached(
        address: u64,
        bytes: usize,
        device: &Arc<Device>,
        keep: Box<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self { address, bytes, device: Arc::clone(device), _keep_alive: keep })
    }

    /// Where it begins, on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whose it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Part of it.
    ///
    /// # Errors
    /// `Overlap` for a range that lies outside.
    pub fn slice(self: &Arc<Self>, range: Range<usize>) -> Result<DeviceSlice, Overlap> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Overlap { start: range.start, end: range.end, bytes: self.bytes });
        }
        Ok(DeviceSlice { memory: Arc::clone(self), range })
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({} bytes of device {})", self.bytes, self.device.ordinal())
    }
}

/// Part of a device's memory, which it keeps alive.
#[derive(Clone, Debug)]
pub struct DeviceSlice {
    memory: Arc<DeviceMemory>,
    range: Range<usize>,
}

impl DeviceSlice {
    /// Where it begins, on the device.
    pub fn address(&self) -> u64 {
        self.memory.address + self.range.start as u64
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whose memory it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.memory.device
    }

    /// Part of it, which must lie within.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.range.len(), "a part lies within its slice");
        let range = self.range.start + range.start..self.range.start + range.end;
        Self { memory: Arc::clone(&self.memory), range }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// Kind and device of the memory at `address`; `None` where the driver does not know it.
fn owner(driver: &Driver, address: u64) -> Option<(u32, u32)> {
    let (mut kind, mut ordinal) = (0u32, 0i32);
    let library = &driver.library;
    // SAFETY: the attribute is an unsigned int, which may be written; the driver only looks the address up.
    let code = unsafe { (library.cuPointerGetAttribute)((&raw mut kind).cast(), MEMORY_TYPE, address) };
    if code != SUCCESS {
        return None;
    }
    // SAFETY: as above, an int.
    let code = unsafe { (library.cuPointerGetAttribute)((&raw mut ordinal).cast(), DEVICE_ORDINAL, address) };
    (code == SUCCESS).then_some((kind, ordinal.cast_unsigned()))
}

struct Allocated {
    address: u64,
    device: Arc<Device>,
}

impl Drop for Allocated {
    fn drop(&mut self) {
        // SAFETY: it came from cuMemAlloc and only this frees it, once nobody holds a slice.
        let freed = self.device.inside("cuMemFree", |cuda| unsafe { (cuda.cuMemFree_v2)(self.address) });
        if let Err(error) = freed {
            tracing::warn!(%error, "memory of a device was not freed");
        }
    }
}

struct Pinned {
    start: NonNull<u8>,
    device: Arc<Device>,
}

// SAFETY: the memory is reached through the region that holds this, and may be freed from any thread.
unsafe impl Send for Pinned {}
// SAFETY: as above; nothing is reached through a shared reference.
unsafe impl Sync for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        let start = self.start.as_ptr().cast();
        // SAFETY: it came from cuMemHostAlloc and only this frees it, once nobody holds the region.
        let freed = self.device.inside("cuMemFreeHost", |cuda| unsafe { (cuda.cuMemFreeHost)(start) });
        if let Err(error) = freed {
            tracing::warn!(%error, "pinned memory was not freed");
        }
    }
}

impl Driver {
    /// Whose memory is at `address`; `None` where it is not a device's.
    pub fn owner(&self, address: u64) -> Option<u32> {
        owner(self, address).filter(|(kind, _)| *kind == TYPE_DEVICE).map(|(_, ordinal)| ordinal)
    }
}

impl Device {
    /// `bytes` of the host's memory, pinned and set to zero, which every wire takes like any other.
    ///
    /// # Errors
    /// `Refused`: there is not so much that may be pinned.
    pub fn pin(self: &Arc<Self>, bytes: usize) -> Result<Arc<Region>, CudaError> {
        let (whole, mut start) = (bytes.max(1), std::ptr::null_mut());
        // SAFETY: `start` may be written.
        self.inside("cuMemHostAlloc", |cuda| unsafe { (cuda.cuMemHostAlloc)(&raw mut start, whole, PORTABLE) })?;
        let start = NonNull::new(start.cast::<u8>()).expect("the driver gives memory where it says that all is well");
        // SAFETY: the driver gave `whole` bytes from `start` on, which nobody else has.
        unsafe { start.as_ptr().write_bytes(0, whole) };
        let keep = Box::new(Pinned { start, device: Arc::clone(self) });
        // SAFETY: the memory lives until `keep` is dropped, and only the region leads to it.
        Ok(unsafe { Region::from_raw(start, bytes, keep) })
    }
}
