//! Does: work that a device does on its own memory, in order, which holds that memory until it is done.

#![allow(unsafe_code)]

use super::stream::Event;
use super::{Copying, CudaError, DeviceSlice, FoldKernel, Stream};

/// One thing to do.
pub enum Act<'a> {
    /// Copy; of one and the same memory, nothing.
    Copy {
        /// What is read.
        from: DeviceSlice,
        /// What is written, of the same length.
        to: DeviceSlice,
    },
    /// Fold all of `from`, in their order, into `into`, which may be one of them.
    Fold {
        /// By what.
        kernel: &'a FoldKernel,
        /// What is read; all of one length.
        from: Vec<DeviceSlice>,
        /// What is written.
        into: DeviceSlice,
    },
}

impl Stream {
    /// Begins to do `acts`, one after the other, once all that this stream was given before is done. `None` where there is nothing
    /// to do.
    ///
    /// # Errors
    /// `Length`, or `Refused`. What was begun before is waited for.
    pub fn work(&self, acts: Vec<Act<'_>>) -> Result<Option<Copying<Vec<DeviceSlice>>>, CudaError> {
        let (mut held, mut begun) = (Vec::new(), Ok(()));
        for act in acts {
            begun = begun.and_then(|()| self.begin(&act));
            match act {
                Act::Copy { from, to } => held.extend([from, to]),
                Act::Fold { from, into, .. } => held.extend(from.into_iter().chain([into])),
            }
        }
        let Some(last) = held.pop() else { return Ok(None) };
        // Of what was begun before a refusal, too: dropped, it waits until its memory is free.
        let working = Copying::begun(self, Event::new(&self.device)?, last, held)?;
        begun.map(|()| Some(working))
    }

    fn begin(&self, act: &Act<'_>) -> Result<(), CudaError> {
        let (from, to) = match act {
            Act::Fold { kernel, from, into } => return kernel.launch(self, from, into),
            Act::Copy { from, to } => (from, to),
        };
        if from.len() != to.len() {
            return Err(CudaError::Length { from: from.len(), to: to.len() });
        }
        let (source, target, bytes, stream) = (from.address(), to.address(), from.len(), self.handle);
        if bytes == 0 || source == target {
            return Ok(());
        }
        self.device.inside("cuMemcpyDtoDAsync", |cuda| {
            // SAFETY: both ends are held until the event behind the work has been reached.
            unsafe { (cuda.cuMemcpyDtoDAsync_v2)(target, source, bytes, stream) }
        })
    }
}
