//! Does: the group of ranks, as Python holds it: makes it, hands it calls, tells of it.

use crate::buffer::{Access, Allocation, Memory, Taken};
use crate::device::OnDevice;
use crate::operation::{Operation, Part};
use crate::settings::Options;
use crate::store::PythonStore;
use crate::wait::{Interruption, apart, by_turns, maybe_seconds, seconds};
use crate::{errors, forked, on_signal};
use gradwire_collectives::{
    Call, Collective, CollectiveError, Communicator, DType, Description, DeviceCall, Explanation, Pending, Piece,
    Reduction,
};
use gradwire_transport::cuda::{DeviceSlice, Stream};
use gradwire_transport::{GroupSpec, Rank, Store, WorldSize, form_group, open_store};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A group of ranks, and this process's place in it.
#[pyclass(frozen, module = "gradwire._native")]
pub(crate) struct Group {
    communicator: Arc<Communicator>,
    interruption: Interruption,
    generation: u32,
}

/// The memory of a call.
enum Buffers {
    Host { input: Vec<Piece>, output: Vec<Piece>, dtype: DType },
    Device { input: Vec<DeviceSlice>, output: Vec<DeviceSlice>, dtype: DType, stream: Stream },
}

#[pymethods]
impl Group {
    /// Meets the other ranks and connects to them.
    #[staticmethod]
    #[pyo3(signature = (name, *, init_method=None, store=None, rank=None, world_size=None, timeout_s, options, environment))]
    #[allow(clippy::too_many_arguments)] // Python's keywords, all of them named at the call.
    fn form(
        py: Python<'_>,
        name: String,
        init_method: Option<String>,
        store: Option<Py<PyAny>>,
        rank: Option<u32>,
        world_size: Option<u32>,
        timeout_s: f64,
        options: Options,
        environment: HashMap<String, String>,
    ) -> PyResult<Self> {
        let timeout = seconds(timeout_s, "timeout_s")?;
        let signal = options.trace_signal()?;
        let (config, settings) = options.parse(timeout)?;
        signal.map(on_signal::listen).transpose()?;
        let label = name.clone();
        let formed = apart(py, move || {
            let meeting = match store {
                Some(store) => known_place(store, rank, world_size),
                None => {
                    let url = init_method.as_deref().unwrap_or("env://");
                    open_store(url, rank, world_size, &|name| environment.get(name).cloned())
                }
            };
            let (store, rank, world_size) = meeting?;
            let spec = GroupSpec { name: label.clone(), rank, world_size, store, config };
            let group = form_group(spec, Instant::now() + timeout)?;
            Communicator::new(group, &label, settings)
        })?;
        match formed {
            Ok(communicator) => {
                let interruption = Interruption::default();
                communicator.set_watch(interruption.watch());
                if signal.is_some() {
                    on_signal::add(communicator.trace_writer());
                }
                Ok(Self { communicator: Arc::new(communicator), interruption, generation: forked::generation() })
            }
            Err(error) => Err(errors::collective(py, &error)),
        }
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.communicator.rank().0
    }

    #[getter]
    fn world_size(&self) -> u32 {
        self.communicator.world_size().get()
    }

    /// Collectives begun so far.
    #[getter]
    fn sequence(&self) -> u64 {
        self.communicator.sequence()
    }

    /// Begins `collective` and returns its handle; without `background`, carries it out and returns None.
    #[pyo3(signature = (collective, inputs, outputs, *, op=None, root=0, timeout_s=None, background=false))]
    #[allow(clippy::too_many_arguments)] // As above.
    fn run(
        &self,
        py: Python<'_>,
        collective: &str,
        inputs: Vec<Bound<'_, PyAny>>,
        outputs: Vec<Bound<'_, PyAny>>,
        op: Option<&str>,
        root: u32,
        timeout_s: Option<f64>,
        background: bool,
    ) -> PyResult<Option<Operation>> {
        forked::check(self.generation)?;
        let collective = collective_of(collective, op, Rank(root))?;
        let timeout = maybe_seconds(timeout_s, "timeout_s")?;
        let call = match buffers(&collective, &inputs, &outputs)? {
            Buffers::Host { input, output, dtype } => Call { collective, dtype, input, output, timeout },
            Buffers::Device { input, output, dtype, stream } => {
                let call = DeviceCall { collective, dtype, input, output, timeout };
                let pending = py.detach(|| self.communicator.start_on_device(call, &stream));
                if background {
                    return Ok(Some(self.operation(py, pending)?));
                }
                let pending = pending.map_err(|error| errors::collective(py, &error))?;
                return self.see_through(py, &pending).map(|()| None);
            }
        };
        if background {
            let pending = py.detach(|| self.communicator.start(call));
            return Ok(Some(self.operation(py, pending)?));
        }
        let pending = py.detach(|| self.communicator.begin(call)).map_err(|error| errors::collective(py, &error))?;
        self.see_through(py, &pending)?;
        Ok(None)
    }

    /// Begins to send `tensor` to rank `to`, where it meets a receive with the same tag.
    #[pyo3(signature = (tensor, to, tag, timeout_s=None))]
    fn send(
        &self,
        py: Python<'_>,
        tensor: Bound<'_, PyAny>,
        to: u32,
        tag: u32,
        timeout_s: Option<f64>,
    ) -> PyResult<Operation> {
        forked::check(self.generation)?;
        let timeout = maybe_seconds(timeout_s, "timeout_s")?;
        let (group, to) = (&self.communicator, Rank(to));
        let pending = match Taken::of(&tensor, "tensor", Access::Read)? {
            Taken::Host(memory) => py.detach(|| group.send(to, tag, memory.piece(), timeout)),
            Taken::Device(OnDevice { slice, stream, .. }) => {
                py.detach(|| group.send_from_device(to, tag, slice, &stream, timeout))
            }
        };
        self.operation(py, pending)
    }

    /// Begins to receive into `tensor` from rank `source`, or from whoever is first.
    #[pyo3(signature = (tensor, source, tag, timeout_s=None))]
    fn recv(
        &self,
        py: Python<'_>,
        tensor: Bound<'_, PyAny>,
        source: Option<u32>,
        tag: u32,
        timeout_s: Option<f64>,
    ) -> PyResult<Operation> {
        forked::check(self.generation)?;
        let timeout = maybe_seconds(timeout_s, "timeout_s")?;
        let (group, source) = (&self.communicator, source.map(Rank));
        let pending = match Taken::of(&tensor, "tensor", Access::Write)? {
            Taken::Host(memory) => py.detach(|| group.recv(source, tag, memory.piece(), timeout)),
            Taken::Device(OnDevice { slice, stream, .. }) => {
                py.detach(|| group.recv_to_device(source, tag, slice, &stream, timeout))
            }
        };
        self.operation(py, pending)
    }

    /// Memory for calls to come, known to the device where the group has RDMA.
    fn allocate(&self, py: Python<'_>, bytes: usize) -> PyResult<Allocation> {
        forked::check(self.generation)?;
        let memory = py.detach(|| self.communicator.allocate(bytes));
        memory.map(Allocation::new).map_err(|error| errors::collective(py, &error))
    }

    /// How long an operation may take that is given no time-out of its own.
    fn set_timeout(&self, timeout_s: f64) -> PyResult<()> {
        self.communicator.set_timeout(seconds(timeout_s, "timeout_s")?);
        Ok(())
    }

    /// What `describe()` tells, as plain values.
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        forked::check(self.generation)?;
        let description = py.detach(|| self.communicator.describe());
        tell(py, &description)
    }

    /// The algorithm of a collective, why it is this one, and what there was to choose from with microseconds.
    #[pyo3(signature = (collective, bytes, *, dtype="float32", op=None))]
    fn explain(&self, py: Python<'_>, collective: &str, bytes: usize, dtype: &str, op: Option<&str>) -> PyResult<Told> {
        forked::check(self.generation)?;
        let collective = collective_of(collective, op, Rank(0))?;
        let unknown =
            || PyValueError::new_err(format!("dtype: `{dtype}` is not known; use a name as NumPy's: float32"));
        let dtype = DType::from_name(dtype).ok_or_else(unknown)?;
        let Explanation { algorithm, reason, expected_us } =
            py.detach(|| self.communicator.explain(&collective, dtype, bytes));
        Ok((algorithm, reason, expected_us))
    }

    /// The last operations with their times, as JSON.
    fn trace(&self) -> PyResult<String> {
        forked::check(self.generation)?;
        Ok(self.communicator.trace())
    }

    /// Raises the error that ended the group, if it is over.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        forked::check(self.generation)?;
        match py.detach(|| self.communicator.error()) {
            Some(error) => Err(errors::collective(py, &error)),
            None => Ok(()),
        }
    }

    /// Ends the group on every rank, with `reason`.
    fn abort(&self, py: Python<'_>, reason: &str) {
        if forked::check(self.generation).is_ok() {
            py.detach(|| self.communicator.abort(reason));
        }
    }

    /// Leaves the group in good order, within `timeout_s`.
    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let timeout = seconds(timeout_s, "timeout_s")?;
        if forked::check(self.generation).is_ok() {
            py.detach(|| self.communicator.close(timeout));
        }
        Ok(())
    }
}

impl Group {
    fn operation(&self, py: Python<'_>, pending: Result<Pending, CollectiveError>) -> PyResult<Operation> {
        match pending {
            Ok(pending) => Ok(Operation::new(vec![Part::Collective(pending, self.interruption.clone())])),
            Err(error) => Err(errors::collective(py, &error)),
        }
    }

    /// Waits for an operation from the caller's own thread; an interruption ends the group, since the other ranks would
    /// wait for this one in vain.
    fn see_through(&self, py: Python<'_>, pending: &Pending) -> PyResult<()> {
        match by_turns(py, None, |slice| pending.wait(Some(slice))) {
            Ok(Some(Err(error))) => Err(self.interruption.or(py, &error)),
            Ok(_) => Ok(()),
            Err(interruption) => {
                let reason = format!("it was interrupted ({})", interruption.value(py).get_type());
                py.detach(|| self.communicator.abort(&reason));
                Err(interruption)
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let communicator = Arc::clone(&self.communicator);
        if forked::check(self.generation).is_err() {
            // A forked child has the sockets but not the threads: a goodbye from here would end its parent's group.
            return std::mem::forget(communicator);
        }
        // Closing waits for the progress thread. None: the interpreter is going down.
        let _ = Python::try_attach(|py| py.detach(|| communicator.close(Duration::from_millis(500))));
    }
}

/// An algorithm, the reason for it, and what else there was, with the microseconds expected of each.
type Told = (String, String, Vec<(String, f64)>);
type Meeting = (Arc<dyn Store>, Rank, WorldSize);

fn known_place(
    store: Py<PyAny>,
    rank: Option<u32>,
    world_size: Option<u32>,
) -> Result<Meeting, gradwire_transport::TransportError> {
    let wrong = |setting: &str, reason: String| gradwire_transport::TransportError::Config {
        setting: setting.to_owned(),
        reason,
    };
    let rank = rank.ok_or_else(|| wrong("rank", "give it together with `store`".to_owned()))?;
    let size = world_size.ok_or_else(|| wrong("world_size", "give it together with `store`".to_owned()))?;
    let world_size = WorldSize::new(size)
        .filter(|size| size.contains(Rank(rank)))
        .ok_or_else(|| wrong("rank", format!("rank {rank} is not one of a group of {size}")))?;
    Ok((Arc::new(PythonStore(store)), Rank(rank), world_size))
}

fn collective_of(name: &str, op: Option<&str>, root: Rank) -> PyResult<Collective> {
    let op = || reduction_of(op.unwrap_or("sum"));
    Ok(match name {
        "all_reduce" => Collective::AllReduce { op: op()? },
        "reduce" => Collective::Reduce { op: op()?, root },
        "broadcast" => Collective::Broadcast { root },
        "all_gather" => Collective::AllGather,
        "reduce_scatter" => Collective::ReduceScatter { op: op()? },
        "all_to_all" => Collective::AllToAll,
        "gather" => Collective::Gather { root },
        "scatter" => Collective::Scatter { root },
        "barrier" => Collective::Barrier,
        other => return Err(PyValueError::new_err(format!("`{other}` is not a collective"))),
    })
}

fn reduction_of(name: &str) -> PyResult<Reduction> {
    Ok(match name {
        "sum" => Reduction::Sum,
        "avg" => Reduction::Avg,
        "min" => Reduction::Min,
        "max" => Reduction::Max,
        "product" => Reduction::Product,
        "band" => Reduction::BitAnd,
        "bor" => Reduction::BitOr,
        "bxor" => Reduction::BitXor,
        other => {
            let known = "sum, avg, min, max, product, band, bor, bxor";
            return Err(PyValueError::new_err(format!("op: `{other}` is not a reduction; use one of {known}")));
        }
    })
}

fn buffers(collective: &Collective, inputs: &[Bound<'_, PyAny>], outputs: &[Bound<'_, PyAny>]) -> PyResult<Buffers> {
    let read = |objects: &[Bound<'_, PyAny>], argument: &str, access| {
        let one = |(place, object): (usize, &Bound<'_, PyAny>)| {
            let argument = if objects.len() > 1 { format!("{argument}[{place}]") } else { argument.to_owned() };
            Taken::of(object, &argument, access)
        };
        objects.iter().enumerate().map(one).collect::<PyResult<Vec<Taken>>>()
    };
    let in_place = inputs.is_empty();
    let input = read(inputs, "input", Access::Read)?;
    let output = read(outputs, if in_place { "tensor" } else { "output" }, Access::Write)?;
    let mut dtype = DType::U8;
    if let Some(first) = input.iter().chain(&output).next() {
        if let Some(other) = input.iter().chain(&output).find(|other| other.element() != first.element()) {
            return Err(PyTypeError::new_err(format!(
                "{}: all tensors of one call have the same dtype, got {} (shape {:?}) and {} (shape {:?}). Nothing was sent",
                collective.name(),
                first.element().name(),
                first.shape(),
                other.element().name(),
                other.shape()
            )));
        }
        dtype = first.element().for_call(collective).map_err(PyTypeError::new_err)?;
    }
    place(collective, input, output, dtype)
}

/// The memory of a call, all of it in the host or all of it on a device.
fn place(collective: &Collective, input: Vec<Taken>, output: Vec<Taken>, dtype: DType) -> PyResult<Buffers> {
    let all = || input.iter().chain(&output);
    let on_device = all().filter(|taken| matches!(taken, Taken::Device(_))).count();
    if on_device == 0 {
        let pieces = |all: &[Taken]| all.iter().filter_map(Taken::host).map(Memory::piece).collect();
        return Ok(Buffers::Host { input: pieces(&input), output: pieces(&output), dtype });
    }
    if on_device < all().count() {
        return Err(PyValueError::new_err(format!(
            "{}: all tensors of one call are on one CUDA device or all in host memory. Nothing was sent",
            collective.name()
        )));
    }
    let mut streams = Vec::new();
    let mut slices = |all: Vec<Taken>| {
        let device = all.into_iter().filter_map(Taken::device);
        device
            .map(|OnDevice { slice, stream, .. }| {
                streams.push(stream);
                slice
            })
            .collect::<Vec<_>>()
    };
    let (input, output) = (slices(input), slices(output));
    let stream = streams.swap_remove(0);
    // Tensors may come on streams of their own: the call comes after all of them.
    for other in streams.iter().filter(|other| !other.is_same(&stream)) {
        let ordered = other.mark().and_then(|mark| stream.wait_for(&mark));
        ordered.map_err(|error| Python::attach(|py| errors::cuda(py, &error)))?;
    }
    Ok(Buffers::Device { input, output, dtype, stream })
}

fn tell<'py>(py: Python<'py>, description: &Description) -> PyResult<Bound<'py, PyDict>> {
    let told = PyDict::new(py);
    told.set_item("group", &description.group)?;
    told.set_item("rank", description.rank.0)?;
    told.set_item("world_size", description.world_size)?;
    told.set_item("collectives", &description.collectives)?;
    told.set_item("segment_bytes", description.segment_bytes)?;
    told.set_item("devices", &description.devices)?;
    told.set_item("text", description.to_string())?;
    let links = description.links.iter().map(|link| {
        let one = PyDict::new(py);
        one.set_item("rank", link.rank.0)?;
        one.set_item("host", &link.host)?;
        one.set_item("pid", link.pid)?;
        one.set_item("wire", &link.wire)?;
        one.set_item("reason", &link.reason)?;
        one.set_item("sent_bytes", link.traffic.sent_bytes)?;
        one.set_item("received_bytes", link.traffic.received_bytes)?;
        Ok(one)
    });
    told.set_item("links", links.collect::<PyResult<Vec<_>>>()?)?;
    Ok(told)
}
