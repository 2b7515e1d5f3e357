//! Does: sparse tables of the parameter server, for Python.

use crate::buffer::{Access, Memory};
use crate::errors;
use crate::forked::Own;
use crate::ps::{PsPending, Rule, Shortening, in_use, mode, reading, recovery, same_type, shortened, table_type};
use crate::schedule::Described;
use crate::wait::seconds;
use gradwire_ps::{Combine, Eviction, Initializer, SparseOptions};
use gradwire_transport::RegionSlice;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A sparse table over all servers.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct PsSparseTable {
    inner: Own<gradwire_ps::SparseTable>,
}

/// How a sparse table is made, as the front says it.
#[derive(FromPyObject)]
pub(crate) struct Making {
    /// The initializer: its name and its numbers.
    initializer: (String, Vec<f64>),
    seed: u64,
    capacity: Option<u64>,
    /// The eviction: its name and its seconds.
    eviction: Option<(String, f64)>,
    admission: u8,
    workers: Option<u32>,
    staleness: Option<u32>,
    average: bool,
    recovery: String,
    /// Of gradients, and of values.
    compression: (Shortening, Shortening),
    max_grad_norm: Option<f64>,
}

impl Making {
    fn options(&self, rule: &Rule) -> PyResult<SparseOptions> {
        let initializer = match (self.initializer.0.as_str(), self.initializer.1.as_slice()) {
            ("zeros", []) => Initializer::Zeros,
            ("constant", &[value]) => Initializer::Constant(value),
            ("uniform", &[low, high]) => Initializer::Uniform { low, high },
            ("normal", &[mean, deviation]) => Initializer::Normal { mean, deviation },
            (name, numbers) => {
                return Err(PyValueError::new_err(format!("initializer {name} with {numbers:?} is not known")));
            }
        };
        let eviction = match &self.eviction {
            None => None,
            Some((name, _)) if name == "lru" => Some(Eviction::Lru),
            Some((name, _)) if name == "lfu" => Some(Eviction::Lfu),
            Some((name, lifetime_s)) if name == "ttl" => Some(Eviction::Ttl(seconds(*lifetime_s, "eviction")?)),
            Some((name, _)) => return Err(PyValueError::new_err(format!("eviction {name} is not known"))),
        };
        Ok(SparseOptions {
            rule: rule.rule()?,
            mode: mode(self.workers, self.staleness)?,
            combine: if self.average { Combine::Mean } else { Combine::Sum },
            initializer,
            seed: self.seed,
            capacity: self.capacity,
            eviction,
            admission: self.admission,
            recovery: recovery(&self.recovery)?,
            compression: shortened(&self.compression)?,
            max_grad_norm: self.max_grad_norm,
        })
    }
}

impl PsSparseTable {
    pub(crate) fn open(
        py: Python<'_>,
        client: &gradwire_ps::Client,
        name: &str,
        (dim, dtype_name): (usize, &str),
        rule: &Rule,
        making: &Making,
    ) -> PyResult<Self> {
        let (options, dtype) = (making.options(rule)?, table_type(dtype_name)?);
        let table = py.detach(|| client.sparse(name, dim, dtype, options));
        Ok(Self { inner: Own::new(table.map_err(|error| errors::ps(py, &error))?) })
    }
}

/// Ids, 64 bits each, signed or not.
fn ids(object: &Bound<'_, PyAny>) -> PyResult<RegionSlice> {
    let memory = Memory::of(object, "ids", Access::Read)?;
    if !matches!(memory.element.name(), "int64" | "uint64") {
        let message = format!("ids have dtype {}, and must be int64 or uint64", memory.element.name());
        return Err(PyValueError::new_err(message));
    }
    let piece = memory.piece();
    piece.region.read(piece.range).map_err(in_use)
}

#[pymethods]
impl PsSparseTable {
    /// Starts a push of a gradient for each id.
    fn push(&self, py: Python<'_>, ids_of: &Bound<'_, PyAny>, gradients: &Bound<'_, PyAny>) -> PyResult<PsPending> {
        let table = self.inner.get()?;
        let (ids, (gradients, dtype)) = (ids(ids_of)?, reading(gradients, "gradients")?);
        let pushed = py.detach(|| table.push_as(&ids, &gradients, dtype));
        Ok(PsPending::new(pushed.map_err(|error| errors::ps(py, &error))?))
    }

    /// Starts a pull of the row of each id.
    fn pull(&self, py: Python<'_>, ids_of: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<PsPending> {
        let table = self.inner.get()?;
        let ids = ids(ids_of)?;
        let memory = Memory::of(out, "out", Access::Write)?;
        same_type(memory.element.name(), "out", table.name(), table.dtype())?;
        let piece = memory.piece();
        let out = piece.region.write(piece.range).map_err(in_use)?;
        let pulled = py.detach(|| table.pull(&ids, out));
        Ok(PsPending::new(pulled.map_err(|error| errors::ps(py, &error))?))
    }

    /// Sets the learning rate from this worker's next push on.
    fn set_learning_rate(&self, py: Python<'_>, rate: f64) -> PyResult<()> {
        let table = self.inner.get()?;
        py.detach(|| table.set_learning_rate(rate)).map_err(|error| errors::ps(py, &error))
    }

    /// Sets the learning rates from this worker's next push on.
    fn set_schedule(&self, py: Python<'_>, schedule: Described) -> PyResult<()> {
        let schedule = schedule.schedule()?;
        let table = self.inner.get()?;
        py.detach(|| table.set_schedule(&schedule)).map_err(|error| errors::ps(py, &error))
    }

    /// The ids that were evicted since last asked, and how many more are forgotten.
    fn evicted(&self, py: Python<'_>) -> PyResult<(Vec<u64>, u64)> {
        let table = self.inner.get()?;
        py.detach(|| table.evicted()).map_err(|error| errors::ps(py, &error))
    }

    /// Pushes made by this client.
    #[getter]
    fn clock(&self) -> PyResult<u64> {
        Ok(self.inner.get()?.clock())
    }
}
