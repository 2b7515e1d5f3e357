//! Python bindings: pointers in, handles out. Everything that blocks lets go of the interpreter.

mod buffer;
mod communicator;
mod errors;
mod store;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::communicator::{Communicator, Pending};
}
