//! Does: lets a Python store (PyTorch's, or any object with `set` and `get`) serve as the place where ranks meet.

use gradwire_transport::{Store, TransportError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::io;
use std::time::{Duration, Instant};

/// Longest single wait inside the Python store, so that its own shorter default time-outs do not end ours early.
const TURN: Duration = Duration::from_secs(5);

/// A Python object with `set(key, value)`, `get(key)` and, if it can wait, `wait(keys, timeout)`.
pub(crate) struct PythonStore(pub(crate) Py<PyAny>);

impl Store for PythonStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), TransportError> {
        Python::attach(|py| {
            self.0.bind(py).call_method1(intern!(py, "set"), (key, PyBytes::new(py, value))).map(|_| ())
        })
        .map_err(|error| failed(&format!("leave {key} in the store"), &error))
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, TransportError> {
        let began = Instant::now();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match Python::attach(|py| self.look(py, key, left.min(TURN))) {
                Ok(value) => return Ok(value),
                Err(error) if Instant::now() >= deadline => {
                    let what = format!("key {key} of the Python store ({error})");
                    return Err(TransportError::Timeout { what, waited: began.elapsed() });
                }
                // A store that cannot wait answers at once.
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl PythonStore {
    fn look(&self, py: Python<'_>, key: &str, left: Duration) -> PyResult<Vec<u8>> {
        let store = self.0.bind(py);
        if store.hasattr(intern!(py, "wait"))? {
            let timeout = left.max(Duration::from_millis(1));
            store.call_method1(intern!(py, "wait"), (vec![key], timeout))?;
        }
        store.call_method1(intern!(py, "get"), (key,))?.extract()
    }
}

fn failed(action: &str, error: &PyErr) -> TransportError {
    TransportError::io(action, io::Error::other(error.to_string()))
}
