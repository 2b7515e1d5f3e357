//! Does: streams of a device, ours and the callers', and the events that order them.

#![allow(unsafe_code)]

use super::device::SUCCESS;
use super::library::Handle;
use super::{CudaError, Device};
use std::sync::Arc;
use std::time::{Duration, Instant};

const NON_BLOCKING: u32 = 1;
const DISABLE_TIMING: u32 = 2;
const NOT_READY: i32 = 600;
/// Looks at an event before a waiting thread sleeps: copies of small buffers take microseconds.
const LOOKS: u32 = 200;
const FIRST_NAP: Duration = Duration::from_micros(20);
const LONGEST_NAP: Duration = Duration::from_millis(1);

/// An order of work on a device.
#[derive(Debug)]
pub struct Stream {
    pub(super) handle: Handle,
    pub(super) device: Arc<Device>,
    ours: bool,
}

impl Stream {
    /// A stream of our own, which does not wait for the default one.
    ///
    /// # Errors
    /// `Refused`.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let mut handle = 0;
        // SAFETY: `handle` may be written.
        device.inside("cuStreamCreate", |cuda| unsafe { (cuda.cuStreamCreate)(&raw mut handle, NON_BLOCKING) })?;
        Ok(Self { handle, device: Arc::clone(device), ours: true })
    }

    /// A stream of somebody else's: 0 or 1 the legacy default stream, 2 the thread's.
    ///
    /// # Safety
    /// `handle` is a stream of `device`'s primary context, and stays one while this lives.
    pub unsafe fn from_raw(handle: usize, device: &Arc<Device>) -> Self {
        Self { handle, device: Arc::clone(device), ours: false }
    }

    /// Its device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether both are the same stream of the same device.
    pub fn is_same(&self, other: &Self) -> bool {
        self.handle == other.handle && self.device.ordinal() == other.device.ordinal()
    }

    /// What marks all that this stream has been given so far.
    ///
    /// # Errors
    /// `Refused`.
    pub fn mark(&self) -> Result<Event, CudaError> {
        let event = Event::new(&self.device)?;
        event.record(self)?;
        Ok(event)
    }

    /// Has what this stream is given from now on wait for `event`. Blocks nobody.
    ///
    /// # Errors
    /// `Refused`.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        let (stream, event) = (self.handle, event.handle);
        // SAFETY: both are alive; the driver remembers what the event marks now.
        self.device.inside("cuStreamWaitEvent", |cuda| unsafe { (cuda.cuStreamWaitEvent)(stream, event, 0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        let handle = self.handle;
        // SAFETY: made by `new`; the driver does the work that is left, then lets go.
        let gone = self.device.inside("cuStreamDestroy", |cuda| unsafe { (cuda.cuStreamDestroy_v2)(handle) });
        if let Err(error) = gone {
            tracing::warn!(%error, "a stream was not destroyed");
        }
    }
}

/// A mark in a stream, which is reached when all before it is done.
#[derive(Debug)]
pub struct Event {
    pub(super) handle: Handle,
    device: Arc<Device>,
}

impl Event {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let mut handle = 0;
        // SAFETY: `handle` may be written.
        device.inside("cuEventCreate", |cuda| unsafe { (cuda.cuEventCreate)(&raw mut handle, DISABLE_TIMING) })?;
        Ok(Self { handle, device: Arc::clone(device) })
    }

    pub(super) fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        let (event, stream) = (self.handle, stream.handle);
        // SAFETY: both are alive.
        self.device.inside("cuEventRecord", |cuda| unsafe { (cuda.cuEventRecord)(event, stream) })
    }

    /// Whether it has been reached.
    ///
    /// # Errors
    /// `Refused`: what came before it failed.
    pub fn is_reached(&self) -> Result<bool, CudaError> {
        let mut code = SUCCESS;
        let handle = self.handle;
        self.device.inside("cuEventQuery", |cuda| {
            // SAFETY: the event is alive.
            code = unsafe { (cuda.cuEventQuery)(handle) };
            if code == NOT_READY { SUCCESS } else { code }
        })?;
        Ok(code == SUCCESS)
    }

    /// Has this thread wait until it has been reached, at most until `deadline`.
    ///
    /// # Errors
    /// `Timeout`, with `what` was waited for; `Refused`: what came before it failed.
    pub fn wait(&self, what: &'static str, deadline: Instant) -> Result<(), CudaError> {
        let (began, mut looks, mut nap) = (Instant::now(), 0, FIRST_NAP);
        while !self.is_reached()? {
            let now = Instant::now();
            if now >= deadline {
                return Err(CudaError::Timeout { ordinal: self.device.ordinal(), what, waited: now - began });
            }
            if looks < LOOKS {
                looks += 1;
                std::thread::yield_now();
                continue;
            }
            std::thread::sleep(nap.min(deadline - now));
            nap = (2 * nap).min(LONGEST_NAP);
        }
        Ok(())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let handle = self.handle;
        // SAFETY: made by `new`; the driver keeps what is left of it until it has been reached.
        let gone = self.device.inside("cuEventDestroy", |cuda| unsafe { (cuda.cuEventDestroy_v2)(handle) });
        if let Err(error) = gone {
            tracing::warn!(%error, "an event was not destroyed");
        }
    }
}
