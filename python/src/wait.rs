//! Does: waits without the GIL, and looks for Ctrl-C while it does.

use crate::errors;
use gradwire_collectives::CollectiveError;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long Ctrl-C may go unnoticed.
const SLICE: Duration = Duration::from_millis(100);

/// What a signal handler raised while the engine held the main thread, where no error can be handed up.
#[derive(Clone, Default)]
pub(crate) struct Interruption(Arc<Mutex<Option<PyErr>>>);

impl Interruption {
    /// Looks for signals; true once one has been raised.
    pub(crate) fn watch(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let kept = Arc::clone(&self.0);
        move || {
            // None: the interpreter is going down, and so is the group.
            let raised = Python::try_attach(|py| py.check_signals()).unwrap_or(Ok(())).err();
            let found = raised.is_some();
            if found {
                *kept.lock().unwrap_or_else(PoisonError::into_inner) = raised;
            }
            found
        }
    }

    /// What was raised, or else the exception for `error`, which the interruption has brought about.
    pub(crate) fn or(&self, py: Python<'_>, error: &CollectiveError) -> PyErr {
        let raised = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        raised.unwrap_or_else(|| errors::collective(py, error))
    }
}

/// Seconds as Python gives them.
///
/// # Errors
/// `ValueError` for a number that is no length of time.
pub(crate) fn seconds(value: f64, argument: &str) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err(format!("{argument}: {value} is not a number of seconds, 0 or more")))
}

/// As [`seconds`], for a value that may be left out.
pub(crate) fn maybe_seconds(value: Option<f64>, argument: &str) -> PyResult<Option<Duration>> {
    value.map(|value| seconds(value, argument)).transpose()
}

/// Waits by turns of `turn`, which waits as long as it is told and says what came, until something has come or `timeout`
/// has passed.
///
/// # Errors
/// What a signal handler raises: `KeyboardInterrupt`.
pub(crate) fn by_turns<T: Send>(
    py: Python<'_>,
    timeout: Option<Duration>,
    turn: impl Fn(Duration) -> Option<T> + Send + Sync,
) -> PyResult<Option<T>> {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let came = py.detach(|| turn(left.map_or(SLICE, |left| left.min(SLICE))));
        if came.is_some() {
            return Ok(came);
        }
        py.check_signals()?;
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(None);
        }
    }
}

/// Runs `work`, which cannot be cut into turns, on a thread of its own. After an interruption it is left to its deadline.
///
/// # Errors
/// What a signal handler raises: `KeyboardInterrupt`.
pub(crate) fn apart<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> T + Send + 'static) -> PyResult<T> {
    let (send, receive) = sync_channel(1);
    std::thread::Builder::new()
        .name("gradwire-start".to_owned())
        .spawn(move || {
            // Nobody listens any more after an interruption.
            let _ = send.send(work());
        })
        .map_err(|error| errors::plain(format!("cannot start a thread: {error}")))?;
    let receive = Mutex::new(receive);
    let came = by_turns(py, None, |slice| {
        let receive = receive.lock().unwrap_or_else(PoisonError::into_inner);
        match receive.recv_timeout(slice) {
            Ok(result) => Some(Ok(result)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(())),
        }
    })?;
    match came {
        Some(Ok(result)) => Ok(result),
        _ => Err(errors::plain("a thread of gradwire panicked; its message is on standard error".to_owned())),
    }
}
