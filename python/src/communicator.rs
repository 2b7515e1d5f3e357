//! Does: a group's communicator, for Python.

use crate::buffer::Memory;
use crate::errors;
use crate::store::PythonStore;
use gradwire_collectives::{Call, Collective, DType, Done, Reduction, Settings};
use gradwire_transport::{Config, GroupSpec, Rank, Store, WireChoice, WorldSize, form_group, open_store};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks for Ctrl-C.
const SIGNALS: Duration = Duration::from_millis(100);

/// What the Python front has read from arguments and environment.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Options {
    timeout_s: f64,
    transport: String,
    lanes: usize,
    socket_ifname: Option<String>,
    port_range: Option<(u16, u16)>,
    token: Option<String>,
    algorithms: Option<String>,
    cores: usize,
}

impl Options {
    fn config(&self) -> PyResult<Config> {
        let wire = match self.transport.as_str() {
            "auto" => WireChoice::Auto,
            "tcp" => WireChoice::Tcp,
            "shm" => WireChoice::Shm,
            other => {
                let message = format!("transport must be 'auto', 'tcp' or 'shm', got {other:?} (GRADWIRE_TRANSPORT)");
                return Err(PyValueError::new_err(message));
            }
        };
        Ok(Config {
            wire,
            lanes: self.lanes,
            socket_ifname: self.socket_ifname.clone(),
            port_range: self.port_range,
            token: self.token.clone(),
            timeout: seconds(self.timeout_s)?,
            ..Config::default()
        })
    }
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| PyValueError::new_err(format!("a timeout must be a positive number of seconds, got {value}")))
}

/// A group of ranks.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct Communicator {
    inner: gradwire_collectives::Communicator,
}

/// An operation under way.
#[pyclass(module = "gradwire._native", frozen)]
pub(crate) struct Pending {
    inner: gradwire_collectives::Pending,
}

#[pymethods]
impl Communicator {
    /// Forms a group: `meeting` is a URL, or an object with `set(key, value)` and `get(key, timeout_s)`.
    #[staticmethod]
    fn connect(
        py: Python<'_>,
        meeting: &Bound<'_, PyAny>,
        name: String,
        rank: Option<u32>,
        world_size: Option<u32>,
        env: Bound<'_, PyDict>,
        options: Options,
    ) -> PyResult<Self> {
        let config = options.config()?;
        let timeout = config.timeout;
        let (store, rank, world_size): (Arc<dyn Store>, Rank, WorldSize) = match meeting.extract::<String>() {
            Ok(url) => {
                let read = |name: &str| env.get_item(name).ok().flatten()?.extract::<String>().ok();
                open_store(&url, rank, world_size, &read).map_err(|error| errors::transport(py, &error))?
            }
            Err(_) => {
                let world_size = world_size.and_then(WorldSize::new);
                let size = world_size.ok_or_else(|| PyValueError::new_err("world_size must be given with a store"))?;
                let rank = rank.map(Rank).filter(|rank| size.contains(*rank));
                let rank =
                    rank.ok_or_else(|| PyValueError::new_err("rank must be given with a store, below world_size"))?;
                (Arc::new(PythonStore(meeting.clone().unbind())), rank, size)
            }
        };
        let settings =
            Settings { timeout, algorithms: options.algorithms.clone(), same_host: true, cores: options.cores };
        let spec = GroupSpec { name: name.clone(), rank, world_size, store, config };
        let group = py.detach(|| form_group(spec, Instant::now() + timeout));
        let group = group.map_err(|error| errors::transport(py, &error))?;
        let inner = gradwire_collectives::Communicator::new(group, &name, settings);
        Ok(Self { inner: inner.map_err(|error| errors::collective(py, &error))? })
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.inner.rank().0
    }

    #[getter]
    fn world_size(&self) -> u32 {
        self.inner.world_size().get()
    }

    /// Collectives begun so far.
    #[getter]
    fn sequence(&self) -> u64 {
        self.inner.sequence()
    }

    /// Begins a collective; the progress thread carries it out.
    #[pyo3(signature = (collective, dtype, input, output, op=None, root=None, timeout_s=None))]
    #[expect(clippy::too_many_arguments)] // One call that all collectives share.
    fn start(
        &self,
        py: Python<'_>,
        collective: &str,
        dtype: &str,
        input: Vec<Memory>,
        output: Vec<Memory>,
        op: Option<&str>,
        root: Option<u32>,
        timeout_s: Option<f64>,
    ) -> PyResult<Pending> {
        let call = call(collective, dtype, input, output, op, root, timeout_s)?;
        let started = py.detach(|| self.inner.start(call));
        Ok(Pending { inner: started.map_err(|error| errors::collective(py, &error))? })
    }

    /// Begins a collective that the caller waits for at once: whoever waits moves it, without a hand-over.
    #[pyo3(signature = (collective, dtype, input, output, op=None, root=None, timeout_s=None))]
    #[expect(clippy::too_many_arguments)] // One call that all collectives share.
    fn begin(
        &self,
        py: Python<'_>,
        collective: &str,
        dtype: &str,
        input: Vec<Memory>,
        output: Vec<Memory>,
        op: Option<&str>,
        root: Option<u32>,
        timeout_s: Option<f64>,
    ) -> PyResult<Pending> {
        let call = call(collective, dtype, input, output, op, root, timeout_s)?;
        let begun = self.inner.begin(call);
        Ok(Pending { inner: begun.map_err(|error| errors::collective(py, &error))? })
    }

    /// Carries out a collective from the caller's own thread.
    #[pyo3(signature = (collective, dtype, input, output, op=None, root=None, timeout_s=None))]
    #[expect(clippy::too_many_arguments)] // As above.
    fn run(
        &self,
        py: Python<'_>,
        collective: &str,
        dtype: &str,
        input: Vec<Memory>,
        output: Vec<Memory>,
        op: Option<&str>,
        root: Option<u32>,
        timeout_s: Option<f64>,
    ) -> PyResult<()> {
        let call = call(collective, dtype, input, output, op, root, timeout_s)?;
        let begun = self.inner.begin(call).map_err(|error| errors::collective(py, &error))?;
        wait(py, &begun, None).map(drop)
    }

    /// Sends memory to a rank.
    #[pyo3(signature = (to, tag, memory, timeout_s=None))]
    fn send(&self, py: Python<'_>, to: u32, tag: u32, memory: Memory, timeout_s: Option<f64>) -> PyResult<Pending> {
        let piece = memory.piece()?;
        let timeout = timeout_s.map(seconds).transpose()?;
        let sent = py.detach(|| self.inner.send(Rank(to), tag, piece, timeout));
        Ok(Pending { inner: sent.map_err(|error| errors::collective(py, &error))? })
    }

    /// Receives from a rank, or from whoever is first.
    #[pyo3(signature = (source, tag, memory, timeout_s=None))]
    fn recv(
        &self,
        py: Python<'_>,
        source: Option<u32>,
        tag: u32,
        memory: Memory,
        timeout_s: Option<f64>,
    ) -> PyResult<Pending> {
        let piece = memory.piece()?;
        let timeout = timeout_s.map(seconds).transpose()?;
        let received = py.detach(|| self.inner.recv(source.map(Rank), tag, piece, timeout));
        Ok(Pending { inner: received.map_err(|error| errors::collective(py, &error))? })
    }

    /// The time-out of operations that are given none.
    fn set_timeout(&self, timeout_s: f64) -> PyResult<()> {
        self.inner.set_timeout(seconds(timeout_s)?);
        Ok(())
    }

    /// Ends the group at once, on every rank.
    fn abort(&self, py: Python<'_>, reason: String) {
        py.detach(|| self.inner.abort(&reason));
    }

    /// Leaves the group in good order.
    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let timeout = seconds(timeout_s)?;
        py.detach(|| self.inner.close(timeout));
        Ok(())
    }

    /// The group as it stands, as a dict.
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let description = py.detach(|| self.inner.describe());
        let out = PyDict::new(py);
        out.set_item("text", description.to_string())?;
        out.set_item("group", &description.group)?;
        out.set_item("rank", description.rank.0)?;
        out.set_item("world_size", description.world_size)?;
        out.set_item("collectives", &description.collectives)?;
        out.set_item("segment_bytes", description.segment_bytes)?;
        let links = PyList::empty(py);
        for link in &description.links {
            let entry = PyDict::new(py);
            entry.set_item("rank", link.rank.0)?;
            entry.set_item("host", &link.host)?;
            entry.set_item("pid", link.pid)?;
            entry.set_item("wire", &link.wire)?;
            entry.set_item("reason", &link.reason)?;
            entry.set_item("sent_bytes", link.traffic.sent_bytes)?;
            entry.set_item("received_bytes", link.traffic.received_bytes)?;
            links.append(entry)?;
        }
        out.set_item("links", links)?;
        Ok(out)
    }
}

#[pymethods]
impl Pending {
    /// Waits until the operation has ended: (source rank or None, bytes) of a receive. None: the time is up.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<Option<(Option<u32>, usize)>> {
        let timeout = timeout_s.map(seconds).transpose()?;
        let done = wait(py, &self.inner, timeout)?;
        Ok(done.map(|done| (done.source.map(|rank| rank.0), done.bytes)))
    }

    /// Whether it has ended.
    fn is_done(&self) -> bool {
        self.inner.is_done()
    }
}

/// Waits in slices, so that Ctrl-C ends the wait.
fn wait(py: Python<'_>, pending: &gradwire_collectives::Pending, timeout: Option<Duration>) -> PyResult<Option<Done>> {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let slice = left.map_or(SIGNALS, |left| left.min(SIGNALS));
        match py.detach(|| pending.wait(Some(slice))) {
            Some(Ok(done)) => return Ok(Some(done)),
            Some(Err(error)) => return Err(errors::collective(py, &error)),
            None if left.is_some_and(|left| left <= slice) => return Ok(None),
            None => py.check_signals()?,
        }
    }
}

fn call(
    collective: &str,
    dtype: &str,
    input: Vec<Memory>,
    output: Vec<Memory>,
    op: Option<&str>,
    root: Option<u32>,
    timeout_s: Option<f64>,
) -> PyResult<Call> {
    let dtype = DType::from_name(dtype)
        .ok_or_else(|| PyValueError::new_err(format!("{collective}: elements of dtype {dtype} are not supported")))?;
    let op = || {
        let name = op.unwrap_or("sum");
        (0..8)
            .filter_map(Reduction::from_code)
            .find(|known| known.name() == name)
            .ok_or_else(|| PyValueError::new_err(format!("{collective}: reduction {name:?} is not known")))
    };
    let root = || root.map(Rank).ok_or_else(|| PyValueError::new_err(format!("{collective} needs a root")));
    let collective = match collective {
        "all_reduce" => Collective::AllReduce { op: op()? },
        "reduce" => Collective::Reduce { op: op()?, root: root()? },
        "broadcast" => Collective::Broadcast { root: root()? },
        "all_gather" => Collective::AllGather,
        "reduce_scatter" => Collective::ReduceScatter { op: op()? },
        "all_to_all" => Collective::AllToAll,
        "gather" => Collective::Gather { root: root()? },
        "scatter" => Collective::Scatter { root: root()? },
        "barrier" => Collective::Barrier,
        other => return Err(PyValueError::new_err(format!("no collective {other:?}"))),
    };
    let pieces = |memory: Vec<Memory>| memory.into_iter().map(Memory::piece).collect::<PyResult<Vec<_>>>();
    let timeout = timeout_s.map(seconds).transpose()?;
    Ok(Call { collective, dtype, input: pieces(input)?, output: pieces(output)?, timeout })
}
