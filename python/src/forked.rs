//! Does: tells whether this process is a fork of the one that made an object: a fork has its sockets, but not its threads.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Of this process: one more than its parent's.
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Called in the child after each fork.
#[pyfunction]
pub(crate) fn after_fork() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Refuses an object of another generation.
pub(crate) fn check(made_in: u32) -> PyResult<()> {
    if made_in == generation() {
        return Ok(());
    }
    Err(PyRuntimeError::new_err(
        "this object belongs to the parent of this forked process: make a new one here, or start processes by spawn",
    ))
}
