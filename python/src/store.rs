//! Does: wraps a Python object with `set(key, value)` and `get(key, timeout_s)` into a store.

use gradwire_transport::{Store, TransportError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::time::{Duration, Instant};

/// A store that lives in Python.
pub(crate) struct PythonStore(pub(crate) Py<PyAny>);

impl Store for PythonStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), TransportError> {
        Python::attach(|py| self.0.bind(py).call_method1("set", (key, PyBytes::new(py, value))).map(drop)).map_err(
            |error| TransportError::io(format!("set {key} in the store"), std::io::Error::other(error.to_string())),
        )
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, TransportError> {
        let began = Instant::now();
        let left = deadline.saturating_duration_since(began).max(Duration::from_millis(1));
        Python::attach(|py| self.0.bind(py).call_method1("get", (key, left.as_secs_f64()))?.extract()).map_err(
            |error| TransportError::Timeout {
                what: format!("key {key} of the store ({error})"),
                waited: began.elapsed(),
            },
        )
    }
}
