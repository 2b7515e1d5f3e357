//! Does: the Python module `gradwire._native`: pointers in, handles out. The package around it gives it its face.

use pyo3::prelude::*;

mod buffer;
mod callbacks;
mod communicator;
mod device;
mod element;
mod errors;
mod forked;
mod on_signal;
mod one_sided;
mod operation;
mod ps;
mod schedule;
mod settings;
mod sparse;
mod store;
mod wait;

/// The engine behind the package `gradwire`.
#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::buffer::Allocation;
    #[pymodule_export]
    use super::communicator::Group;
    #[pymodule_export]
    use super::forked::after_fork;
    #[pymodule_export]
    use super::one_sided::{OneSided, OneSidedMemory, Transfer};
    #[pymodule_export]
    use super::operation::Operation;
    #[pymodule_export]
    use super::ps::{PsClient, PsPending, PsServers, PsTable};

    #[pymodule_export]
    use super::sparse::PsSparseTable;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
