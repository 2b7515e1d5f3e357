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

/// What only the process that made it may use. A fork is refused it, and leaves it alone when it drops it: a goodbye from there
/// would end its parent's connections.
pub(crate) struct Own<T> {
    inner: Option<T>,
    made_in: u32,
}

impl<T> Own<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self { inner: Some(inner), made_in: generation() }
    }

    /// It, in the process that made it.
    pub(crate) fn get(&self) -> PyResult<&T> {
        check(self.made_in)?;
        Ok(self.inner.as_ref().expect("it is taken when it is dropped"))
    }

    /// The same, to change it.
    pub(crate) fn get_mut(&mut self) -> PyResult<&mut T> {
        check(self.made_in)?;
        Ok(self.inner.as_mut().expect("it is taken when it is dropped"))
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if check(self.made_in).is_err() {
            std::mem::forget(self.inner.take());
        }
    }
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
