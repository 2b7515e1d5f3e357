//! Does: copies between a device and the host, and whatever else holds memory of both until it is done.

#![allow(unsafe_code)]

use super::stream::Event;
use super::{CudaError, DeviceSlice, Stream};
use crate::region::{RegionSlice, RegionSliceMut};
use std::time::{Duration, Instant};

/// How long a copy that nobody waited for is waited for when it is dropped; after that its memory is never given back.
const PATIENCE: Duration = Duration::from_secs(10);

/// A copy under way. It holds both ends; dropped before it is done, it waits.
pub struct Copying<H> {
    ends: Option<(DeviceSlice, H)>,
    done: Event,
}

impl Stream {
    /// Begins to copy from the device to the host, once all that this stream was given before is done.
    ///
    /// # Errors
    /// `Length`, or `Refused`; nothing is copied then.
    pub fn copy_out(&self, from: DeviceSlice, mut to: RegionSliceMut) -> Result<Copying<RegionSliceMut>, CudaError> {
        let (source, target, bytes) = (from.address(), to.as_mut_ptr(), from.len());
        equal(bytes, to.len())?;
        let done = Event::new(&self.device)?;
        if bytes > 0 {
            let stream = self.handle;
            self.device.inside("cuMemcpyDtoHAsync", |cuda| {
                // SAFETY: both ends are held until the event behind the copy has been reached, `to` by us alone.
                unsafe { (cuda.cuMemcpyDtoHAsync_v2)(target.cast(), source, bytes, stream) }
            })?;
        }
        Copying::begun(self, done, from, to)
    }

    /// Begins to copy from the host to the device, once all that this stream was given before is done.
    ///
    /// # Errors
    /// As [`Stream::copy_out`].
    pub fn copy_in(&self, from: RegionSlice, to: DeviceSlice) -> Result<Copying<RegionSlice>, CudaError> {
        let (source, target, bytes) = (from.as_ptr(), to.address(), to.len());
        equal(from.len(), bytes)?;
        let done = Event::new(&self.device)?;
        if bytes > 0 {
            let stream = self.handle;
            self.device.inside("cuMemcpyHtoDAsync", |cuda| {
                // SAFETY: both ends are held until the event behind the copy has been reached.
                unsafe { (cuda.cuMemcpyHtoDAsync_v2)(target, source.cast(), bytes, stream) }
            })?;
        }
        Copying::begun(self, done, to, from)
    }
}

impl<H> Copying<H> {
    pub(super) fn begun(stream: &Stream, done: Event, device: DeviceSlice, host: H) -> Result<Self, CudaError> {
        let ends = Some((device, host));
        if let Err(error) = done.record(stream) {
            // The copy may be under way, and nothing tells when it ends: its memory is never given back.
            std::mem::forget(ends);
            return Err(error);
        }
        Ok(Self { ends, done })
    }

    /// What is reached when the copy is done, for streams to wait for.
    pub fn event(&self) -> &Event {
        &self.done
    }

    /// Whether it is done.
    ///
    /// # Errors
    /// `Refused`: it failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.done.is_reached()
    }

    /// Waits until it is done, and gives the host's end back. One that is not done by `deadline` is waited for some seconds more,
    /// since its memory is in use.
    ///
    /// # Errors
    /// `Timeout`, or `Refused`: it failed.
    pub fn wait(mut self, deadline: Instant) -> Result<H, CudaError> {
        self.done.wait("a copy", deadline)?;
        let (_, host) = self.ends.take().expect("it is there until the copy is done");
        Ok(host)
    }
}

impl<H> Copying<H> {
    /// Lets several go that nobody waits for any more: all together are waited for as long as one that is dropped.
    pub fn let_go(copies: impl IntoIterator<Item = Self>) {
        let until = Instant::now() + PATIENCE;
        copies.into_iter().for_each(|mut copy| copy.release(until));
    }

    fn release(&mut self, until: Instant) {
        let Some(ends) = self.ends.take() else { return };
        // A copy that failed is over, too.
        if let Err(error @ CudaError::Timeout { .. }) = self.done.wait("a copy", until) {
            tracing::error!(%error, "the memory of a copy is never given back, since it may still be written");
            std::mem::forget(ends);
        }
    }
}

impl<H> Drop for Copying<H> {
    fn drop(&mut self) {
        self.release(Instant::now() + PATIENCE);
    }
}

fn equal(from: usize, to: usize) -> Result<(), CudaError> {
    if from == to { Ok(()) } else { Err(CudaError::Length { from, to }) }
}
