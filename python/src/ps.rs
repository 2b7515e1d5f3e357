//! Does: the parameter server's client and in-process servers, for Python.

use crate::buffer::{Access, Taken};
use crate::device::Landing;
use crate::errors;
use crate::forked::Own;
use crate::schedule::Described;
use crate::settings::Options;
use crate::sparse::{Making, PsSparseTable};
use crate::wait::{by_turns, maybe_seconds, seconds};
use gradwire_ps::{
    Adagrad, Adam, ClientSettings, Codec, Combine, Compression, DType, Ftrl, LocalServers, Mode, PsError, Recovery,
    ServerSettings, Sgd, SparseStatus, TableOptions, UpdateRule,
};
use gradwire_transport::cuda::CudaError;
use gradwire_transport::{Overlap, RegionSlice, RegionSliceMut};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A connection to all servers.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct PsClient {
    inner: Own<gradwire_ps::Client>,
}

/// A table that is cut over all servers.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct PsTable {
    inner: Own<gradwire_ps::DenseTable>,
}

/// A push or pull under way.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct PsPending {
    inner: Own<gradwire_ps::Pending>,
    /// What is still to be brought to a device when it has ended.
    landing: Mutex<Option<Result<Landing, CudaError>>>,
}

/// Servers of this process.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct PsServers {
    inner: Mutex<Option<Own<LocalServers>>>,
    addresses: Vec<String>,
}

/// An update rule as the front says it: its name and its numbers.
#[derive(FromPyObject)]
pub(crate) struct Rule(String, Vec<f64>, bool);

impl Rule {
    pub(crate) fn rule(&self) -> PyResult<UpdateRule> {
        let Self(name, numbers, flag) = self;
        Ok(match (name.as_str(), numbers.as_slice()) {
            ("sum", []) => UpdateRule::Sum,
            ("replace", []) => UpdateRule::Replace,
            ("sgd", &[learning_rate, momentum, dampening, weight_decay]) => {
                UpdateRule::Sgd(Sgd { learning_rate, momentum, dampening, weight_decay, nesterov: *flag })
            }
            ("adam", &[learning_rate, beta1, beta2, epsilon, weight_decay]) => {
                UpdateRule::Adam(Adam { learning_rate, beta1, beta2, epsilon, weight_decay, decoupled: *flag })
            }
            ("adagrad", &[learning_rate, learning_rate_decay, initial, epsilon, weight_decay]) => {
                let row_wise = *flag;
                UpdateRule::Adagrad(Adagrad {
                    learning_rate,
                    learning_rate_decay,
                    initial,
                    epsilon,
                    weight_decay,
                    row_wise,
                })
            }
            ("ftrl", &[learning_rate, beta, l1, l2]) => UpdateRule::Ftrl(Ftrl { learning_rate, beta, l1, l2 }),
            _ => return Err(PyValueError::new_err(format!("update rule {name} with {numbers:?} is not known"))),
        })
    }
}

/// A codec as the front says it: its name, and the share of elements that travel.
#[derive(FromPyObject)]
pub(crate) struct Shortening(String, f64);

/// How gradients and values travel.
pub(crate) fn shortened((push, pull): &(Shortening, Shortening)) -> PyResult<Compression> {
    Ok(Compression { push: push.codec()?, pull: pull.codec()? })
}

impl Shortening {
    fn codec(&self) -> PyResult<Codec> {
        let &Self(ref name, share) = self;
        Ok(match name.as_str() {
            "none" => Codec::Whole,
            "bf16" => Codec::Bf16,
            "fp16" => Codec::F16,
            "int8" => Codec::Int8,
            "topk" => Codec::TopK { share },
            _ => return Err(PyValueError::new_err(format!("compression {name} is not known"))),
        })
    }
}

/// How pushes meet: all of a clock together, within a bound of each other, or as they come.
pub(crate) fn mode(workers: Option<u32>, staleness: Option<u32>) -> PyResult<Mode> {
    match (workers, staleness) {
        (Some(workers), Some(staleness)) => Ok(Mode::Ssp { workers, staleness }),
        (Some(workers), None) => Ok(Mode::Sync { workers }),
        (None, None) => Ok(Mode::Async),
        (None, Some(_)) => Err(PyValueError::new_err("staleness bounds how far workers are apart: give workers=")),
    }
}

/// How the Python side tells of checkpoints that are wanted so often, before the number of seconds.
const CHECKPOINT_EVERY: &str = "checkpoint every ";

/// And of copies beside the first, before their number.
const REPLICATE: &str = "replicate ";

/// What becomes of a table when a server of it dies.
pub(crate) fn recovery(name: &str) -> PyResult<Recovery> {
    match name {
        "none" => Ok(Recovery::None),
        "replicate" => Ok(Recovery::Replicate { copies: 1 }),
        "checkpoint" => Ok(Recovery::Checkpoint { every: None }),
        "workers" => Ok(Recovery::Workers),
        _ => {
            let seconds = name.strip_prefix(CHECKPOINT_EVERY).and_then(|seconds| seconds.parse().ok());
            if let Some(every) = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
                return Ok(Recovery::Checkpoint { every: Some(every) });
            }
            if let Some(copies) = name.strip_prefix(REPLICATE).and_then(|copies| copies.parse().ok()) {
                return Ok(Recovery::Replicate { copies });
            }
            let known =
                "\"none\", \"checkpoint\", CheckpointEvery(seconds), \"replicate\", Replicate(copies) or \"workers\"";
            Err(PyValueError::new_err(format!("recovery is {known}, not {name:?}")))
        }
    }
}

/// The type of that name.
pub(crate) fn table_type(name: &str) -> PyResult<DType> {
    DType::ALL.into_iter().find(|dtype| dtype.to_string() == name).ok_or_else(|| {
        let known: Vec<String> = DType::ALL.iter().map(ToString::to_string).collect();
        PyValueError::new_err(format!("tables hold {}, not {name}", known.join(", ")))
    })
}

#[pymethods]
impl PsClient {
    /// Connects to the servers, one a shard.
    #[staticmethod]
    #[pyo3(signature = (addresses, token, worker, timeout_s, reconnect_s, options, clustered=false))]
    #[expect(clippy::too_many_arguments)] // The front names them.
    fn connect(
        py: Python<'_>,
        addresses: Vec<String>,
        token: Option<String>,
        worker: Option<u32>,
        timeout_s: f64,
        reconnect_s: f64,
        options: Options,
        clustered: bool,
    ) -> PyResult<Self> {
        let (timeout, reconnect) = (seconds(timeout_s, "timeout_s")?, seconds(reconnect_s, "reconnect_s")?);
        let transport = options.wires(ClientSettings::default().transport)?;
        let settings = ClientSettings { token, worker, timeout, reconnect, transport, ..ClientSettings::default() };
        let inner = py.detach(|| match clustered {
            true => gradwire_ps::Client::through(&addresses, settings),
            false => gradwire_ps::Client::connect(&addresses, settings),
        });
        Ok(Self { inner: Own::new(inner.map_err(|error| errors::ps(py, &error))?) })
    }

    /// Makes a dense table, or finds it. `workers`: synchronous with so many, or within `staleness`; none: asynchronous.
    #[expect(clippy::too_many_arguments)] // One argument for each thing that all clients must agree on.
    fn dense(
        &self,
        py: Python<'_>,
        name: &str,
        shape: Vec<usize>,
        dtype_name: &str,
        rule: Rule,
        workers: Option<u32>,
        average: bool,
        staleness: Option<u32>,
        clipped: bool,
        recovery_name: &str,
        compression: (Shortening, Shortening),
    ) -> PyResult<PsTable> {
        let options = TableOptions {
            rule: rule.rule()?,
            mode: mode(workers, staleness)?,
            combine: if average { Combine::Mean } else { Combine::Sum },
            clipped,
            recovery: recovery(recovery_name)?,
            compression: shortened(&compression)?,
        };
        let dtype = table_type(dtype_name)?;
        let client = self.inner.get()?;
        let table = py.detach(|| client.dense(name, &shape, dtype, options));
        Ok(PsTable { inner: Own::new(table.map_err(|error| errors::ps(py, &error))?) })
    }

    /// Makes a sparse table, or finds it.
    fn sparse(
        &self,
        py: Python<'_>,
        name: &str,
        dim: usize,
        dtype_name: &str,
        rule: Rule,
        making: Making,
    ) -> PyResult<PsSparseTable> {
        PsSparseTable::open(py, self.inner.get()?, name, (dim, dtype_name), &rule, &making)
    }

    /// Clips the gradients that were pushed last by their common norm; the norm.
    fn clip(&self, py: Python<'_>, tables: Vec<Py<PsTable>>, most: f64) -> PyResult<f64> {
        let client = self.inner.get()?;
        let tables = tables.iter().map(|table| table.get().inner.get()).collect::<PyResult<Vec<_>>>()?;
        py.detach(|| client.clip(&tables, most)).map_err(|error| errors::ps(py, &error))
    }

    /// Gives lost tables again, each with the value that was pulled last; the clocks to go on from.
    fn recover(&self, py: Python<'_>, tables: Vec<(Py<PsTable>, Bound<'_, PyAny>)>) -> PyResult<Vec<u64>> {
        let mut values = Vec::new();
        for (table, value) in &tables {
            let table = table.get().inner.get()?;
            let (value, dtype) = reading(value, "values")?;
            same_type(&dtype.to_string(), "values", table.name(), table.dtype())?;
            values.push((table, value));
        }
        let client = self.inner.get()?;
        py.detach(|| client.recover(&values)).map_err(|error| errors::ps(py, &error))
    }

    /// Waits until `clients` clients have come.
    #[pyo3(signature = (name, clients, timeout_s=None))]
    fn barrier(&self, py: Python<'_>, name: &str, clients: u32, timeout_s: Option<f64>) -> PyResult<()> {
        let timeout = maybe_seconds(timeout_s, "timeout_s")?;
        let client = self.inner.get()?;
        py.detach(|| client.barrier(name, clients, timeout)).map_err(|error| errors::ps(py, &error))
    }

    /// Writes a checkpoint: its name, its bytes, how many seconds it took, and the clocks of synchronous tables.
    fn snapshot(&self, py: Python<'_>, timeout_s: f64) -> PyResult<(String, u64, f64, BTreeMap<String, u64>)> {
        let timeout = seconds(timeout_s, "timeout_s")?;
        let client = self.inner.get()?;
        let written = py.detach(|| client.snapshot(timeout)).map_err(|error| errors::ps(py, &error))?;
        Ok((written.name, written.bytes, written.took.as_secs_f64(), written.clocks))
    }

    /// What each server holds: a list of dicts.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let client = self.inner.get()?;
        let all = py.detach(|| client.status()).map_err(|error| errors::ps(py, &error))?;
        let out = PyList::empty(py);
        for shard in all {
            let entry = PyDict::new(py);
            entry.set_item("memory_bytes", shard.memory_bytes)?;
            entry.set_item("memory_limit_bytes", shard.memory_limit_bytes)?;
            entry.set_item("role", shard.standing.role.name())?;
            entry.set_item("log", shard.standing.log)?;
            entry.set_item("backup_has", shard.standing.backup)?;
            let tables = PyList::empty(py);
            for table in &shard.tables {
                let each = PyDict::new(py);
                each.set_item("name", &table.spec.name)?;
                each.set_item("shape", &table.spec.shape)?;
                each.set_item("dtype", table.spec.dtype.to_string())?;
                each.set_item("elements", table.elements)?;
                each.set_item("bytes", table.bytes)?;
                each.set_item("clock", table.clock)?;
                each.set_item("pushes", table.pushes)?;
                each.set_item("pulls", table.pulls)?;
                each.set_item("duplicates", table.duplicates)?;
                each.set_item("waiting", table.waiting)?;
                each.set_item("compression", table.spec.compression.to_string())?;
                each.set_item("pushed_bytes", table.pushed_bytes)?;
                each.set_item("pushed_whole_bytes", table.pushed_whole_bytes)?;
                each.set_item("pulled_bytes", table.pulled_bytes)?;
                each.set_item("pulled_whole_bytes", table.pulled_whole_bytes)?;
                tables.append(each)?;
            }
            entry.set_item("tables", tables)?;
            entry.set_item("sparse", sparse_tables(py, &shard.sparse)?)?;
            let clients = PyList::empty(py);
            for client in &shard.clients {
                let each = PyDict::new(py);
                each.set_item("client", client.client)?;
                each.set_item("host", &client.host)?;
                each.set_item("pid", client.pid)?;
                each.set_item("address", &client.address)?;
                each.set_item("received_bytes", client.received_bytes)?;
                each.set_item("sent_bytes", client.sent_bytes)?;
                clients.append(each)?;
            }
            entry.set_item("clients", clients)?;
            out.append(entry)?;
        }
        Ok(out)
    }

    /// Number of shards.
    #[getter]
    fn shards(&self) -> PyResult<u32> {
        Ok(self.inner.get()?.shards())
    }

    /// Says goodbye to the servers.
    fn close(&self, py: Python<'_>) {
        // A fork has nothing to say.
        if let Ok(client) = self.inner.get() {
            py.detach(|| client.close());
        }
    }
}

fn sparse_tables<'py>(py: Python<'py>, all: &[SparseStatus]) -> PyResult<Bound<'py, PyList>> {
    let tables = PyList::empty(py);
    for table in all {
        let each = PyDict::new(py);
        each.set_item("name", &table.spec.name)?;
        each.set_item("dim", table.spec.dim)?;
        each.set_item("dtype", table.spec.dtype.to_string())?;
        each.set_item("rows", table.rows)?;
        each.set_item("bytes", table.bytes)?;
        each.set_item("clock", table.clock)?;
        each.set_item("pushes", table.pushes)?;
        each.set_item("pulls", table.pulls)?;
        each.set_item("duplicates", table.duplicates)?;
        each.set_item("waiting", table.waiting)?;
        each.set_item("evicted", table.evicted)?;
        each.set_item("unadmitted", table.unadmitted)?;
        each.set_item("compression", table.spec.compression.to_string())?;
        each.set_item("max_grad_norm", table.spec.max_grad_norm)?;
        each.set_item("pushed_bytes", table.pushed_bytes)?;
        each.set_item("pulled_bytes", table.pulled_bytes)?;
        tables.append(each)?;
    }
    Ok(tables)
}

/// Memory to read from, and the name of its type.
pub(crate) fn reading(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<(RegionSlice, DType)> {
    let py = object.py();
    let memory = Taken::of(object, argument, Access::Read)?;
    let dtype = table_type(memory.element().name())?;
    let (region, range) = match memory {
        Taken::Host(memory) => {
            let piece = memory.piece();
            (piece.region, piece.range)
        }
        Taken::Device(memory) => {
            let region = py.detach(|| memory.fetch()).map_err(|error| errors::cuda(py, &error))?;
            (region, 0..memory.slice.len())
        }
    };
    Ok((region.read(range).map_err(in_use)?, dtype))
}

/// Where values go, and what brings them on to a device.
type Output = (RegionSliceMut, Option<Landing>);

/// Memory to write to, of the table's own type.
fn writing(object: &Bound<'_, PyAny>, argument: &str, table: &gradwire_ps::DenseTable) -> PyResult<Output> {
    let memory = Taken::of(object, argument, Access::Write)?;
    same_type(memory.element().name(), argument, table.name(), table.dtype())?;
    match memory {
        Taken::Host(memory) => {
            let piece = memory.piece();
            Ok((piece.region.write(piece.range).map_err(in_use)?, None))
        }
        Taken::Device(memory) => {
            let landing = object.py().detach(|| memory.landing());
            let (slice, landing) = landing.map_err(|error| errors::cuda(object.py(), &error))?;
            Ok((slice, Some(landing)))
        }
    }
}

/// The error for memory that another call holds.
pub(crate) fn in_use(overlap: Overlap) -> PyErr {
    PyValueError::new_err(overlap.to_string())
}

/// Checks that `argument`, of type `name`, is of the type of its table.
pub(crate) fn same_type(name: &str, argument: &str, table: &str, dtype: DType) -> PyResult<()> {
    if name == dtype.to_string() {
        return Ok(());
    }
    let message = format!("{argument} has dtype {name}, but table {table:?} holds {dtype}");
    Err(PyValueError::new_err(message))
}

#[pymethods]
impl PsTable {
    /// Writes the first values, unless another client has.
    fn init(&self, py: Python<'_>, values: &Bound<'_, PyAny>) -> PyResult<bool> {
        let table = self.inner.get()?;
        let (values, dtype) = reading(values, "values")?;
        same_type(&dtype.to_string(), "values", table.name(), table.dtype())?;
        py.detach(|| table.init(values)).map_err(|error| errors::ps(py, &error))
    }

    /// Starts a push.
    fn push(&self, py: Python<'_>, gradient: &Bound<'_, PyAny>) -> PyResult<PsPending> {
        let table = self.inner.get()?;
        let (gradient, dtype) = reading(gradient, "gradient")?;
        let pushed = py.detach(|| table.push_as(gradient, dtype));
        Ok(PsPending::new(pushed.map_err(|error| errors::ps(py, &error))?))
    }

    /// Starts a pull; `whole`: uncompressed, whatever the table says.
    fn pull(&self, py: Python<'_>, out: &Bound<'_, PyAny>, whole: bool) -> PyResult<PsPending> {
        let table = self.inner.get()?;
        let (out, landing) = writing(out, "out", table)?;
        let pulled = py.detach(|| if whole { table.pull_whole(out) } else { table.pull(out) });
        let inner = Own::new(pulled.map_err(|error| errors::ps(py, &error))?);
        Ok(PsPending { inner, landing: Mutex::new(landing.map(Ok)) })
    }

    /// Starts a push whose answer is what came of it.
    fn push_pull(&self, py: Python<'_>, gradient: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<PsPending> {
        let table = self.inner.get()?;
        let ((gradient, dtype), (out, landing)) = (reading(gradient, "gradient")?, writing(out, "out", table)?);
        let started = py.detach(|| table.push_pull_as(gradient, dtype, out));
        let inner = Own::new(started.map_err(|error| errors::ps(py, &error))?);
        Ok(PsPending { inner, landing: Mutex::new(landing.map(Ok)) })
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

    /// Pushes made by this client.
    #[getter]
    fn clock(&self) -> PyResult<u64> {
        Ok(self.inner.get()?.clock())
    }

    /// The clock of the value that was pulled last.
    #[getter]
    fn pulled(&self) -> PyResult<Option<u64>> {
        Ok(self.inner.get()?.pulled())
    }
}

impl PsPending {
    pub(crate) fn new(inner: gradwire_ps::Pending) -> Self {
        Self { inner: Own::new(inner), landing: Mutex::default() }
    }
}

#[pymethods]
impl PsPending {
    /// Waits until it has ended; False when the time is up. Fills an `out` on a CUDA device, which nothing else does.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let timeout = maybe_seconds(timeout_s, "timeout_s")?;
        let pending = self.inner.get()?;
        let came = by_turns(py, timeout, |slice| match pending.wait(Some(slice)) {
            Err(PsError::Timeout { .. }) if !pending.is_done() => None,
            result => Some(result),
        })?;
        match came {
            None => Ok(false),
            Some(Ok(_)) => {
                let landed = py.detach(|| {
                    // Another thread that waits too waits for the copy, and is told the same.
                    let mut landing = self.landing.lock().unwrap_or_else(PoisonError::into_inner);
                    let landed = landing.take().map_or(Ok(()), |landing| landing.and_then(Landing::land));
                    *landing = landed.as_ref().err().map(|error| Err(error.clone()));
                    landed
                });
                landed.map(|()| true).map_err(|error| errors::cuda(py, &error))
            }
            Some(Err(error)) => Err(errors::ps(py, &error)),
        }
    }

    /// Whether it has ended, well or not.
    fn is_done(&self) -> PyResult<bool> {
        Ok(self.inner.get()?.is_done())
    }
}

#[pymethods]
impl PsServers {
    /// Starts servers on free ports of 127.0.0.1.
    #[staticmethod]
    fn start(py: Python<'_>, servers: u32, token: Option<String>, options: Options) -> PyResult<Self> {
        let transport = options.wires(ServerSettings::default().transport)?;
        let settings = ServerSettings { token, transport, ..ServerSettings::default() };
        let inner = py.detach(|| LocalServers::start(servers, settings)).map_err(|error| errors::ps(py, &error))?;
        Ok(Self { addresses: inner.addresses().to_vec(), inner: Mutex::new(Some(Own::new(inner))) })
    }

    /// Where they listen, in the order of the shards.
    #[getter]
    fn addresses(&self) -> Vec<String> {
        self.addresses.clone()
    }

    /// Stops one of them, as if its process had ended.
    fn stop_shard(&self, py: Python<'_>, shard: usize) -> PyResult<()> {
        py.detach(|| {
            if let Some(servers) = self.inner.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                servers.get_mut()?.stop_shard(shard);
            }
            Ok(())
        })
    }

    /// Stops them all.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| drop(self.inner.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }
}
