//! Does: operations under way, as Python holds them: one object for one or several that belong together.

use crate::callbacks::call_soon;
use crate::wait::{Interruption, by_turns, maybe_seconds};
use crate::{device, errors};
use gradwire_collectives as collectives;
use gradwire_transport::cuda::Stream;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// One operation under way.
#[derive(Clone)]
pub(crate) enum Part {
    Collective(collectives::Pending, Interruption),
}

/// How one ended.
pub(crate) enum Ended {
    Collective(Result<collectives::Done, collectives::CollectiveError>),
}

impl Part {
    /// Waits for a turn of `slice`, which is kept to where the wait is `bounded`: who waits as long as it takes need not hand over.
    fn wait(&self, slice: Duration, bounded: bool) -> Option<Ended> {
        let Self::Collective(pending, _) = self;
        let outcome = if bounded { pending.wait_at_most(slice) } else { pending.wait(Some(slice)) };
        outcome.map(Ended::Collective)
    }

    fn is_done(&self) -> bool {
        match self {
            Self::Collective(pending, _) => pending.is_done(),
        }
    }

    fn on_done(&self, callback: impl FnOnce() + Send + 'static) {
        match self {
            Self::Collective(pending, _) => pending.on_done(move |_| callback()),
        }
    }
}

/// A handle of one or several operations under way. Dropping it does not stop them.
#[pyclass(frozen, module = "gradwire._native")]
pub(crate) struct Operation {
    parts: Vec<Part>,
}

impl Operation {
    pub(crate) fn new(parts: Vec<Part>) -> Self {
        Self { parts }
    }

    /// Waits for every part; the first failure, once all have ended or the time is over.
    pub(crate) fn wait_all(&self, py: Python<'_>, timeout: Option<Duration>) -> PyResult<bool> {
        let began = std::time::Instant::now();
        let mut failure = None;
        for part in &self.parts {
            let left = timeout.map(|timeout| timeout.saturating_sub(began.elapsed()));
            match by_turns(py, left, |slice| part.wait(slice, left.is_some()))? {
                None => return Ok(false),
                Some(Ended::Collective(Err(error))) => {
                    let Part::Collective(_, interruption) = part;
                    failure.get_or_insert_with(|| interruption.or(py, &error));
                }
                Some(Ended::Collective(Ok(_))) => {}
            }
        }
        failure.map_or(Ok(true), Err)
    }

    /// Has `stream` wait for the results of all; false where one must be waited for by the host.
    fn order_all(&self, stream: &Stream) -> Result<bool, collectives::CollectiveError> {
        for Part::Collective(pending, _) in &self.parts {
            if !pending.order(stream)? {
                return Ok(false);
            }
        }
        Ok(!self.parts.is_empty())
    }

    fn first(&self) -> Option<collectives::Done> {
        match self.parts.first()?.wait(Duration::ZERO, false)? {
            Ended::Collective(done) => done.ok(),
        }
    }
}

#[pymethods]
impl Operation {
    /// One handle for all of `operations`.
    #[staticmethod]
    fn join(operations: Vec<Bound<'_, Self>>) -> Self {
        Self { parts: operations.iter().flat_map(|operation| operation.get().parts.clone()).collect() }
    }

    /// Waits until all have ended; False when `timeout_s` passed first, and they go on.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        self.wait_all(py, maybe_seconds(timeout_s, "timeout_s")?)
    }

    /// Has a stream of CUDA device `device` wait for the results, on the device; False where the host must wait. `stream` is
    /// the handle of a stream that lives.
    fn order(&self, py: Python<'_>, stream: usize, device: u32) -> PyResult<bool> {
        let stream = device::stream(py, stream, device)?;
        py.detach(|| self.order_all(&stream)).map_err(|error| errors::collective(py, &error))
    }

    /// Whether all have ended.
    fn is_done(&self) -> bool {
        self.parts.iter().all(Part::is_done)
    }

    /// Has `callback()` called once all have ended, on a thread of its own.
    fn on_done(&self, py: Python<'_>, callback: Py<PyAny>) {
        if self.parts.is_empty() {
            return call_soon(callback);
        }
        let left = Arc::new(AtomicUsize::new(self.parts.len()));
        let callback = Arc::new(Mutex::new(Some(callback)));
        for part in &self.parts {
            let (left, callback) = (Arc::clone(&left), Arc::clone(&callback));
            py.detach(|| {
                part.on_done(move || {
                    if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                        let last = callback.lock().unwrap_or_else(PoisonError::into_inner).take();
                        last.into_iter().for_each(call_soon);
                    }
                });
            });
        }
    }

    /// The rank that sent a received message; None for all else, and before it has ended.
    #[getter]
    fn source(&self, py: Python<'_>) -> Option<u32> {
        py.detach(|| self.first()).and_then(|done| done.source).map(|rank| rank.0)
    }
}
