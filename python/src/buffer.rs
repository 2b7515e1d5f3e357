//! Does: takes memory of Python objects by address. The Python front checks type, layout and device before.

#![allow(unsafe_code)]

use gradwire_collectives::Piece;
use gradwire_transport::Region;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::ptr::NonNull;

/// Memory of a Python object: address, bytes, and the object that keeps it alive.
#[derive(FromPyObject)]
pub(crate) struct Memory(usize, usize, Py<PyAny>);

impl Memory {
    /// The memory as a piece that may travel. The object lives until the last operation has given its slice back.
    pub(crate) fn piece(self) -> PyResult<Piece> {
        let Self(address, bytes, owner) = self;
        let start = match NonNull::new(address as *mut u8) {
            Some(start) => start,
            None if bytes == 0 => NonNull::dangling(),
            None => return Err(PyValueError::new_err("a buffer of some bytes at address 0")),
        };
        // SAFETY: the front takes address and size from the object's own buffer (`data_ptr`, `__array_interface__`), and
        // the object, which owns that memory, is kept. As with every asynchronous call of PyTorch and MPI, the user
        // leaves the memory alone until the operation has ended.
        let region = unsafe { Region::from_raw(start, bytes, Box::new(owner)) };
        Ok(Piece::whole(region))
    }
}
