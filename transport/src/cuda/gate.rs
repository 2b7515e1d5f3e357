//! Does: a gate in callers' streams: what they are given behind it waits, on the device, for what the host has yet to bring
//! about. Nobody on the host is blocked.

#![allow(unsafe_code)]

use super::device::SUCCESS;
use super::stream::Event;
use super::{CudaError, Device, Stream};
use crate::region::Region;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const NOT_SUPPORTED: i32 = 801;
/// Flag of a wait until the word is the value or more.
const AT_LEAST: u32 = 0;
const PATIENCE: Duration = Duration::from_secs(1);

/// A word of pinned memory that only grows; streams wait for numbers in it.
pub struct Gate {
    device: Arc<Device>,
    word: Option<Arc<Region>>,
    /// Marks behind the waits that streams may not have come through yet.
    waits: Mutex<VecDeque<Event>>,
}

impl Gate {
    /// A gate that stands at 0.
    ///
    /// # Errors
    /// `Refused`.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let (device, word) = (Arc::clone(device), Some(device.pin(4)?));
        Ok(Self { device, word, waits: Mutex::default() })
    }

    /// Has what `stream` is given from now on wait until the gate stands at `number`. False: this device cannot.
    ///
    /// # Errors
    /// `Refused`.
    pub fn hold(&self, stream: &Stream, number: u32) -> Result<bool, CudaError> {
        let Some(wait) = self.device.driver.library.cuStreamWaitValue32_v2 else { return Ok(false) };
        let behind = Event::new(&self.device)?;
        let (address, handle, mut can) = (self.address(), stream.handle, true);
        self.device.inside("cuStreamWaitValue32", |_| {
            // SAFETY: the word is pinned, so that the device has it at the host's address, and lives until all waits are over.
            let code = unsafe { wait(handle, address, number, AT_LEAST) };
            can = code != NOT_SUPPORTED;
            if can { code } else { SUCCESS }
        })?;
        if can {
            if let Err(error) = behind.record(stream) {
                // Nothing tells when the stream has come through: it may look at the word for ever.
                std::mem::forget(self.word.clone());
                return Err(error);
            }
            let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
            while waits.pop_front_if(|event| !event.is_reached().is_ok_and(|reached| !reached)).is_some() {}
            waits.push_back(behind);
        }
        Ok(can)
    }

    /// Sets the gate to `number`, which is not less than before.
    pub fn open(&self, number: u32) {
        let address = self.address() as *mut u32;
        // SAFETY: the word is ours, of the right alignment, and alive; all who touch it do so atomically.
        unsafe { AtomicU32::from_ptr(address) }.store(number, Ordering::SeqCst);
    }

    fn address(&self) -> u64 {
        self.word.as_ref().expect("it is there until the gate is dropped").as_ptr() as u64
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // As far ahead as the device's comparison, which goes around, allows.
        self.open(i32::MAX.cast_unsigned());
        let deadline = Instant::now() + PATIENCE;
        let waits = std::mem::take(self.waits.get_mut().unwrap_or_else(PoisonError::into_inner));
        if waits.iter().any(|event| matches!(event.wait("a gate", deadline), Err(CudaError::Timeout { .. }))) {
            // A stream has yet to come to its wait, and will look at the word.
            std::mem::forget(self.word.take());
        }
    }
}
