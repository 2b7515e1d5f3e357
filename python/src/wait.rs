//! Does: waits without the GIL, and looks for Ctrl-C while it does.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// How long Ctrl-C may go unnoticed.
const SLICE: Duration = Duration::from_millis(100);

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
        .map_err(|error| super::errors::plain(format!("cannot start a thread: {error}")))?;
    let receive = std::sync::Mutex::new(receive);
    let came = by_turns(py, None, |slice| {
        let receive = receive.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match receive.recv_timeout(slice) {
            Ok(result) => Some(Ok(result)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(())),
        }
    })?;
    match came {
        Some(Ok(result)) => Ok(result),
        _ => Err(super::errors::plain("a thread of gradwire panicked; its message is on standard error".to_owned())),
    }
}
