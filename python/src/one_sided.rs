//! Does: one-sided reads and writes between processes, as Python holds them: an endpoint, its memory, and what is under way.

use crate::buffer::{Access as Use, Memory};
use crate::callbacks::call_soon;
use crate::settings::Options;
use crate::wait::{apart, by_turns, maybe_seconds, seconds};
use crate::{errors, forked};
use gradwire_transport::{
    Access, Accessor, Config, Exposer, Local, Region, RegisterError, RemoteMemory, TransportError, WireChoice, WireKind,
};
use pyo3::exceptions::{PyRuntimeError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One end: offers memory to its peer, and reaches the peer's.
#[pyclass(frozen, module = "gradwire._native")]
pub(crate) struct OneSided {
    config: Config,
    ends: Mutex<Ends>,
    generation: u32,
}

#[derive(Default)]
struct Ends {
    exposer: Option<Arc<Exposer>>,
    accessor: Option<Arc<Accessor>>,
    is_closed: bool,
}

/// Memory of this process that may be reached, or be the local side of an access.
#[pyclass(frozen, module = "gradwire._native")]
pub(crate) struct OneSidedMemory {
    region: Arc<Region>,
    told: Mutex<Option<RemoteMemory>>,
}

/// A read or write under way. Dropping it does not stop it.
#[pyclass(frozen, module = "gradwire._native")]
pub(crate) struct Transfer {
    access: Access,
}

#[pymethods]
impl OneSided {
    /// An end that neither listens nor is connected.
    #[staticmethod]
    #[pyo3(signature = (*, timeout_s, options))]
    fn open(timeout_s: f64, options: Options) -> PyResult<Self> {
        let (mut config, _) = options.parse(seconds(timeout_s, "timeout_s")?)?;
        if config.wire == WireChoice::Shm {
            // Nobody's memory is shared here: the best that is left.
            config.wire = WireChoice::Auto;
        }
        Ok(Self { config, ends: Mutex::new(Ends::default()), generation: forked::generation() })
    }

    /// Listens; what the peer connects by. May be repeated.
    fn bind<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let exposer = self.exposer(py)?;
        Ok(PyBytes::new(py, exposer.url()))
    }

    /// Connects to the endpoint that is bound at `url`.
    fn connect(&self, py: Python<'_>, url: Vec<u8>, timeout_s: f64) -> PyResult<()> {
        let timeout = seconds(timeout_s, "timeout")?;
        if self.ends_open()?.accessor.is_some() {
            return Err(PyRuntimeError::new_err(
                "this transport is connected already: make another one for another peer",
            ));
        }
        let config = self.config.clone();
        let made = apart(py, move || Accessor::connect(&config, &url, Instant::now() + timeout))?;
        let accessor = Arc::new(made.map_err(|error| errors::transport(py, &error))?);
        self.ends_open()?.accessor.get_or_insert(accessor);
        Ok(())
    }

    /// Whether there is a peer, and it is there.
    fn connected(&self) -> bool {
        self.ends().accessor.as_ref().is_some_and(|accessor| accessor.lost().is_none())
    }

    /// Takes `buffer` as memory for accesses; nothing is told to anybody.
    fn register(&self, buffer: Bound<'_, PyAny>) -> PyResult<OneSidedMemory> {
        drop(self.ends_open()?);
        let region = Memory::of(&buffer, "tensor", Use::Write)?.region;
        Ok(OneSidedMemory { region, told: Mutex::new(None) })
    }

    /// What the peer reaches `memory` by, to be sent to it.
    fn expose<'py>(&self, py: Python<'py>, memory: &OneSidedMemory, timeout_s: f64) -> PyResult<Bound<'py, PyBytes>> {
        let timeout = seconds(timeout_s, "timeout")?;
        let exposer = self.exposer(py)?;
        let told = py.detach(|| {
            let mut told = memory.told.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(told) = *told {
                return Ok(told);
            }
            let made = exposer.expose(Arc::clone(&memory.region), timeout)?;
            *told = Some(made);
            Ok(made)
        });
        let refused = |error: Option<RegisterError>| match error {
            Some(error) => errors::register(py, &error),
            None => PyTimeoutError::new_err(format!("the memory was not registered within {timeout_s} s")),
        };
        told.map(|told| PyBytes::new(py, &told.encode())).map_err(refused)
    }

    /// Ends the exposure of `memory`; False where accesses of it still go on after `timeout_s`.
    fn unregister(&self, py: Python<'_>, memory: &OneSidedMemory, timeout_s: f64) -> PyResult<bool> {
        let timeout = seconds(timeout_s, "timeout")?;
        forked::check(self.generation)?;
        let (exposer, accessor) = {
            let ends = self.ends();
            (ends.exposer.clone(), ends.accessor.clone())
        };
        Ok(py.detach(|| {
            accessor.inspect(|accessor| accessor.forget(Arc::clone(&memory.region)));
            let told = memory.told.lock().unwrap_or_else(PoisonError::into_inner).take();
            exposer.zip(told).is_none_or(|(exposer, told)| exposer.withdraw(told, timeout))
        }))
    }

    /// Begins to write `bytes` bytes of `memory` from `offset` on into the first ones of `remote`.
    fn write(
        &self,
        py: Python<'_>,
        memory: &OneSidedMemory,
        offset: usize,
        bytes: usize,
        remote: &[u8],
    ) -> PyResult<Transfer> {
        self.transfer(py, (memory, offset, bytes, remote), Accessor::put)
    }

    /// Begins to read the first `bytes` bytes of `remote` into `memory` from `offset` on.
    fn read(
        &self,
        py: Python<'_>,
        memory: &OneSidedMemory,
        offset: usize,
        bytes: usize,
        remote: &[u8],
    ) -> PyResult<Transfer> {
        self.transfer(py, (memory, offset, bytes, remote), Accessor::get)
    }

    /// By which wire the peer's memory is reached, and why.
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let told = PyDict::new(py);
        let (exposer, accessor) = {
            let ends = self.ends();
            (ends.exposer.clone(), ends.accessor.clone())
        };
        told.set_item("device", exposer.as_ref().and_then(|exposer| exposer.device()))?;
        let Some(accessor) = accessor else {
            told.set_item("wire", py.None())?;
            told.set_item("text", "not connected")?;
            return Ok(told);
        };
        let (kind, reason) = accessor.wire();
        told.set_item("wire", kind.to_string())?;
        let peer = accessor.peer();
        told.set_item(
            "text",
            match kind {
                WireKind::Verbs => format!("{peer}: by RDMA verbs, without its help ({reason})"),
                _ => format!("{peer}: by messages over TCP that its thread serves ({reason})"),
            },
        )?;
        Ok(told)
    }

    /// Waits for what is under way and takes leave, within `timeout_s`. May be repeated.
    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let timeout = seconds(timeout_s, "timeout")?;
        if forked::check(self.generation).is_ok() {
            py.detach(|| self.leave(timeout));
        }
        Ok(())
    }
}

type Move = fn(&Accessor, Local, RemoteMemory) -> Result<Access, TransportError>;

impl OneSided {
    fn transfer(
        &self,
        py: Python<'_>,
        (memory, offset, bytes, remote): (&OneSidedMemory, usize, usize, &[u8]),
        begin: Move,
    ) -> PyResult<Transfer> {
        let accessor = self.ends_open()?.accessor.clone();
        let accessor = accessor.ok_or_else(|| PyRuntimeError::new_err("connect() to the peer first"))?;
        let remote = RemoteMemory::decode(remote)
            .ok_or_else(|| PyValueError::new_err("the remote buffer is not one of gradwire's transport"))?;
        let range = offset..offset.saturating_add(bytes);
        let part = remote.part(0, bytes as u64).filter(|_| range.end <= memory.region.len());
        let part = part.ok_or_else(|| {
            let (ours, theirs) = (memory.region.len(), remote.bytes);
            PyValueError::new_err(format!(
                "{bytes} bytes at {offset} of {ours} local ones do not fit the {theirs} of the remote buffer. Nothing was sent"
            ))
        })?;
        let local = Local { region: Arc::clone(&memory.region), range };
        let access = py.detach(|| begin(&accessor, local, part)).map_err(|error| errors::transport(py, &error))?;
        Ok(Transfer { access })
    }

    fn exposer(&self, py: Python<'_>) -> PyResult<Arc<Exposer>> {
        // The lock may be held while another thread opens a device.
        let made = py.detach(|| {
            let mut ends = self.ends_open()?;
            if let Some(exposer) = &ends.exposer {
                return Ok(Ok(Arc::clone(exposer)));
            }
            Ok::<_, PyErr>(Exposer::bind(&self.config).map(|made| Arc::clone(ends.exposer.insert(Arc::new(made)))))
        })?;
        made.map_err(|error| errors::transport(py, &error))
    }

    fn ends_open(&self) -> PyResult<MutexGuard<'_, Ends>> {
        forked::check(self.generation)?;
        let ends = self.ends();
        if ends.is_closed {
            return Err(PyRuntimeError::new_err("the transport is closed"));
        }
        Ok(ends)
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, timeout: Duration) {
        let (exposer, accessor) = {
            let mut ends = self.ends();
            ends.is_closed = true;
            (ends.exposer.clone(), ends.accessor.clone())
        };
        let until = Instant::now() + timeout;
        accessor.inspect(|accessor| accessor.close(timeout));
        exposer.inspect(|exposer| exposer.close(until.saturating_duration_since(Instant::now())));
    }
}

impl Drop for OneSided {
    fn drop(&mut self) {
        if forked::check(self.generation).is_err() {
            // A forked child has the sockets but not the threads.
            return std::mem::forget(std::mem::take(&mut *self.ends()));
        }
        // Closing waits for the threads. None: the interpreter is going down.
        let _ = Python::try_attach(|py| py.detach(|| self.leave(Duration::from_millis(500))));
    }
}

#[pymethods]
impl OneSidedMemory {
    fn __len__(&self) -> usize {
        self.region.len()
    }
}

#[pymethods]
impl Transfer {
    /// Waits until it has ended; False when `timeout_s` passed first, and it goes on.
    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let timeout = maybe_seconds(timeout_s, "timeout")?;
        match by_turns(py, timeout, |slice| self.access.wait(slice))? {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) => Err(errors::transport(py, &error)),
        }
    }

    /// Whether it has ended.
    fn is_done(&self) -> bool {
        self.access.is_done()
    }

    /// Has `callback()` called once it has ended, on a thread of its own.
    fn on_done(&self, callback: Py<PyAny>) {
        self.access.on_done(move || call_soon(callback));
    }

    /// No rank: as of an operation that is no receive.
    #[getter]
    fn source(&self) -> Option<u32> {
        None
    }
}
