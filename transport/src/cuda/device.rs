//! Does: the driver and its devices: each by its primary context, which the process's other users of CUDA share.

#![allow(unsafe_code)]

use super::library::{Handle, Library};
use super::{CudaError, Findings, PinnedPool, Way};
use crate::verbs::{DmaBufAnswer, dma_buf};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What the driver answers where all is well.
pub(super) const SUCCESS: c_int = 0;
const NO_DEVICE: c_int = 100;
const PROCESSORS: c_int = 16;
const MAJOR: c_int = 75;
const MINOR: c_int = 76;
const DMA_BUF_SUPPORTED: c_int = 124;

/// CUDA's driver, loaded and started.
pub struct Driver {
    pub(super) library: Library,
    devices: Mutex<BTreeMap<u32, Weak<Device>>>,
    pub(super) pools: Mutex<BTreeMap<u32, Weak<PinnedPool>>>,
}

impl Driver {
    /// The driver: `libcuda.so.1` as the system finds it, or the file at `path`. Loaded by the first call, and kept.
    ///
    /// # Errors
    /// `NoDriver` where there is none or it does not start, `TooOld` where it lacks a function.
    pub fn load(path: Option<&Path>) -> Result<&'static Self, CudaError> {
        static LOADED: Mutex<BTreeMap<Option<PathBuf>, &'static Driver>> = Mutex::new(BTreeMap::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = path.map(Path::to_path_buf);
        if let Some(driver) = loaded.get(&key) {
            return Ok(driver);
        }
        let library = Library::open(path)?;
        // SAFETY: `cuInit` takes 0, and may be called again and again.
        let code = unsafe { (library.cuInit)(0) };
        let driver = Self { library, devices: Mutex::default(), pools: Mutex::default() };
        match code {
            SUCCESS => {}
            NO_DEVICE => return Err(CudaError::NoDevice { ordinal: 0, count: 0 }),
            code => {
                let reason = format!("it does not start: {} ({code})", driver.name_of(code));
                return Err(CudaError::NoDriver { reason });
            }
        }
        let driver: &'static Self = Box::leak(Box::new(driver));
        loaded.insert(key, driver);
        Ok(driver)
    }

    /// How many devices the process sees.
    ///
    /// # Errors
    /// `Refused`.
    pub fn count(&self) -> Result<u32, CudaError> {
        let mut count = 0;
        // SAFETY: `count` may be written.
        let code = unsafe { (self.library.cuDeviceGetCount)(&raw mut count) };
        self.check("cuDeviceGetCount", 0, code)?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The device of this number, by its primary context, which is held as long as the answer is.
    ///
    /// # Errors
    /// `NoDevice`, or `Refused`.
    pub fn device(&'static self, ordinal: u32) -> Result<Arc<Device>, CudaError> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(device);
        }
        let count = self.count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let (mut number, mut context) = (0, 0);
        // SAFETY: `number` may be written.
        let code = unsafe { (self.library.cuDeviceGet)(&raw mut number, ordinal.cast_signed()) };
        self.check("cuDeviceGet", ordinal, code)?;
        // SAFETY: `context` may be written, and the device is the driver's own number.
        let code = unsafe { (self.library.cuDevicePrimaryCtxRetain)(&raw mut context, number) };
        self.check("cuDevicePrimaryCtxRetain", ordinal, code)?;
        let device = Arc::new(Device { driver: self, ordinal, number, context });
        devices.insert(ordinal, Arc::downgrade(&device));
        Ok(device)
    }

    pub(super) fn check(&self, call: &'static str, ordinal: u32, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(CudaError::Refused { call, ordinal, code, name: self.name_of(code) })
    }

    fn name_of(&self, code: c_int) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: `name` may be written.
        let known = unsafe { (self.library.cuGetErrorName)(code, &raw mut name) };
        if known != SUCCESS || name.is_null() {
            return "an error that it does not name".to_owned();
        }
        // SAFETY: the driver's names are static and end with a zero.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Driver")
    }
}

/// A CUDA device, by its primary context.
pub struct Device {
    pub(super) driver: &'static Driver,
    ordinal: u32,
    pub(super) number: c_int,
    context: Handle,
}

impl Device {
    /// Its number, as the process sees it.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// What the driver calls it.
    ///
    /// # Errors
    /// `Refused`.
    pub fn name(&self) -> Result<String, CudaError> {
        let mut name = [0; 256];
        // SAFETY: the driver writes at most 256 bytes, with a zero at the end.
        let code = unsafe { (self.driver.library.cuDeviceGetName)(name.as_mut_ptr().cast(), 256, self.number) };
        self.driver.check("cuDeviceGetName", self.ordinal, code)?;
        Ok(CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned()))
    }

    /// Whether its memory can be told to a network card as a dma-buf.
    ///
    /// # Errors
    /// `Refused`.
    pub fn exports_dma_buf(&self) -> Result<bool, CudaError> {
        Ok(self.attribute(DMA_BUF_SUPPORTED)? != 0 && self.driver.library.cuMemGetHandleForAddressRange.is_some())
    }

    /// What its processors understand: 9 and 0 for `sm_90`.
    ///
    /// # Errors
    /// `Refused`.
    pub fn capability(&self) -> Result<(i32, i32), CudaError> {
        Ok((self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    /// How many processors it has.
    ///
    /// # Errors
    /// `Refused`.
    pub fn processors(&self) -> Result<u32, CudaError> {
        Ok(self.attribute(PROCESSORS)?.max(1).cast_unsigned())
    }

    fn attribute(&self, which: c_int) -> Result<c_int, CudaError> {
        let mut value = 0;
        // SAFETY: `value` may be written; a driver that does not know the attribute says so.
        let code = unsafe { (self.driver.library.cuDeviceGetAttribute)(&raw mut value, which, self.number) };
        self.driver.check("cuDeviceGetAttribute", self.ordinal, code)?;
        Ok(value)
    }

    /// By which way its memory could reach the RDMA devices of this host.
    ///
    /// # Errors
    /// `Refused`.
    pub fn way_to_rdma(&self) -> Result<Way, CudaError> {
        let answers = crate::verbs::ask_for_dma_bufs().unwrap_or_default();
        let told = |answer: DmaBufAnswer| (answer.device, answer.answer.err().map(|error| dma_buf::words(&error)));
        let cards = answers.into_iter().map(told).collect();
        let peer_memory = Path::new("/sys/module/nvidia_peermem").exists();
        Ok(Way::of(&Findings { exports: self.exports_dma_buf()?, cards, peer_memory }))
    }

    /// Runs `work`, which makes the one driver call `call`, with this device's context current on this thread.
    pub(super) fn inside(&self, call: &'static str, work: impl FnOnce(&Library) -> c_int) -> Result<(), CudaError> {
        let library = &self.driver.library;
        // SAFETY: the context is retained until this device is dropped.
        let code = unsafe { (library.cuCtxPushCurrent_v2)(self.context) };
        self.driver.check("cuCtxPushCurrent", self.ordinal, code)?;
        let code = work(library);
        let mut popped = 0;
        // SAFETY: it takes off what was put on above; `popped` may be written.
        let left = unsafe { (library.cuCtxPopCurrent_v2)(&raw mut popped) };
        self.driver.check(call, self.ordinal, code)?;
        self.driver.check("cuCtxPopCurrent", self.ordinal, left)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once by `Driver::device`; all that was made in the context holds the device, and so is gone.
        let code = unsafe { (self.driver.library.cuDevicePrimaryCtxRelease_v2)(self.number) };
        if code != SUCCESS {
            tracing::warn!(ordinal = self.ordinal, code, "the CUDA context was not released");
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.ordinal)
    }
}
