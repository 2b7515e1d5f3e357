//! Does: reaches memory of CUDA devices that Python objects hold, with the stream that they are used on; copies it to and from
//! pinned memory for calls that take the host's memory only.

#![allow(unsafe_code)]

use crate::element::Element;
use crate::errors;
use gradwire_transport::cuda::{CudaError, Device, DeviceMemory, DeviceSlice, Driver, Event, PinnedPool, Stream};
use gradwire_transport::{Region, RegionSlice, RegionSliceMut};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The file that stands for libcuda.so.1.
const LIBRARY: &str = "GRADWIRE_CUDA_LIBRARY";
/// How long a copy may take that has no time-out of its own.
const PATIENCE: Duration = Duration::from_secs(300);

/// Memory of a device, in a Python object's hands.
pub(crate) struct OnDevice {
    pub(crate) slice: DeviceSlice,
    pub(crate) stream: Stream,
    pub(crate) element: Element,
    pub(crate) shape: Vec<i64>,
}

/// Where it is, and the stream that its owner uses it on.
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) bytes: usize,
    /// `None`: the driver knows.
    pub(crate) device: Option<u32>,
    pub(crate) stream: usize,
}

impl OnDevice {
    /// The memory at `place`, which `keep` keeps alive.
    ///
    /// # Errors
    /// `CudaError`: no driver, or memory that is not of the device.
    ///
    /// # Safety
    /// `place` is memory of `element`s that stays there for as long as `keep` lives, and a stream of its device.
    pub(crate) unsafe fn new(
        py: Python<'_>,
        place: &Place,
        element: Element,
        shape: Vec<i64>,
        keep: Box<dyn Any + Send + Sync>,
    ) -> PyResult<Self> {
        let open = || {
            let driver = driver()?;
            let ordinal = place.device.or_else(|| driver.owner(place.start)).unwrap_or(0);
            let device = driver.device(ordinal)?;
            // SAFETY: promised by the caller.
            let memory = unsafe { DeviceMemory::from_raw(place.start, place.bytes, Arc::clone(&device), keep) }?;
            let slice = memory.slice(0..place.bytes).expect("all of it lies within it");
            // SAFETY: promised by the caller.
            let stream = unsafe { Stream::from_raw(place.stream, &device) };
            Ok(Self { slice, stream, element, shape })
        };
        open().map_err(|error| errors::cuda(py, &error))
    }

    /// A copy in pinned memory, made after what the stream has been given so far.
    pub(crate) fn fetch(&self) -> Result<Arc<Region>, CudaError> {
        let region = pinned(self.stream.device(), self.slice.len())?;
        let own = Stream::new(self.stream.device())?;
        own.wait_for(&self.stream.mark()?)?;
        let host = region.write(0..self.slice.len()).expect("an idle buffer is nobody's");
        drop(own.copy_out(self.slice.clone(), host)?.wait(Instant::now() + PATIENCE)?);
        Ok(region)
    }

    /// Pinned memory to be filled, and what brings it to the device.
    pub(crate) fn landing(self) -> Result<(RegionSliceMut, Landing), CudaError> {
        let region = pinned(self.stream.device(), self.slice.len())?;
        let host = region.write(0..self.slice.len()).expect("an idle buffer is nobody's");
        let ready = self.stream.mark()?;
        Ok((host, Landing { region, slice: self.slice, ready }))
    }
}

/// What has come for a device, and is to be copied there.
pub(crate) struct Landing {
    region: Arc<Region>,
    slice: DeviceSlice,
    ready: Event,
}

impl Landing {
    /// Copies it, after what the owner's stream had been given, and waits: then it is there for every stream.
    pub(crate) fn land(self) -> Result<(), CudaError> {
        let own = Stream::new(self.slice.device())?;
        own.wait_for(&self.ready)?;
        let host: RegionSlice = self.region.read(0..self.slice.len()).expect("who filled it has given it back");
        own.copy_in(host, self.slice)?.wait(Instant::now() + PATIENCE).map(drop)
    }
}

/// The stream of that handle on device `ordinal`.
///
/// # Errors
/// `CudaError`, or `ValueError` where the caller does not promise what it must: see there.
pub(crate) fn stream(py: Python<'_>, handle: usize, ordinal: u32) -> PyResult<Stream> {
    let device = driver().and_then(|driver| driver.device(ordinal)).map_err(|error| errors::cuda(py, &error))?;
    // SAFETY: the handle is what the owner of the stream (PyTorch, CuPy) calls it by, as is said where Python hands it in.
    Ok(unsafe { Stream::from_raw(handle, &device) })
}

fn driver() -> Result<&'static Driver, CudaError> {
    let path = std::env::var_os(LIBRARY).map(PathBuf::from);
    Driver::load(path.as_deref())
}

/// A pinned buffer of at least `bytes` that nobody uses, of a pool that stays: pinning takes longer than most copies.
fn pinned(device: &Arc<Device>, bytes: usize) -> Result<Arc<Region>, CudaError> {
    static POOLS: Mutex<BTreeMap<u32, Arc<PinnedPool>>> = Mutex::new(BTreeMap::new());
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = Arc::clone(pools.entry(device.ordinal()).or_insert_with(|| PinnedPool::of(device)));
    drop(pools);
    pool.take(bytes)
}

/// What `__cuda_array_interface__` says: where the memory is, of what, in which shape.
pub(crate) fn of_interface(
    interface: &Bound<'_, PyAny>,
    writes: bool,
    refuse: &dyn Fn(&[i64], &str, &str) -> PyErr,
) -> PyResult<(Place, Element, Vec<i64>)> {
    let shape: Vec<i64> = interface.get_item("shape")?.extract()?;
    let typestr: String = interface.get_item("typestr")?.extract()?;
    let (start, read_only): (u64, bool) = interface.get_item("data")?.extract()?;
    let element = element_of(&typestr).ok_or_else(|| refuse(&shape, &typestr, "has elements that cannot be sent"))?;
    let bytes = element.bytes() * shape.iter().map(|&len| usize::try_from(len).unwrap_or(0)).product::<usize>();
    let optional = |name: &str| interface.get_item(name).ok().filter(|value| !value.is_none());
    if let Some(strides) = optional("strides") {
        let strides: Vec<i64> = strides.extract()?;
        let mut expected = i64::try_from(element.bytes()).unwrap_or(i64::MAX);
        let dense = shape.iter().zip(&strides).rev().all(|(&len, &stride)| {
            let fits = len == 1 || stride == expected;
            expected *= len;
            fits
        });
        if !dense && bytes > 0 {
            return Err(refuse(
                &shape,
                &typestr,
                "is not contiguous: pass a contiguous copy, and copy the result back",
            ));
        }
    }
    if writes && read_only {
        return Err(refuse(&shape, &typestr, "is read-only, and is to be written: pass a copy"));
    }
    // None: the owner needs no order; the default stream gives one all the same. 0 is not allowed, since it may mean two.
    let stream = optional("stream").map_or(Ok(1), |stream| stream.extract::<usize>())?;
    if stream == 0 {
        return Err(PyValueError::new_err(
            "__cuda_array_interface__: stream 0 is ambiguous: 1 is the legacy default one, 2 the thread's",
        ));
    }
    Ok((Place { start, bytes, device: None, stream }, element, shape))
}

/// The element of a NumPy type string: byte order, kind and bytes.
fn element_of(typestr: &str) -> Option<Element> {
    let letters = typestr.trim_start_matches(['<', '|', '=']);
    let bytes: usize = letters.get(1..)?.parse().ok()?;
    let format = match (letters.chars().next()?, bytes) {
        ('f', 2) => "e",
        ('f', 4) => "f",
        ('f', 8) => "d",
        ('c', 8) => "Zf",
        ('c', 16) => "Zd",
        ('b', 1) => "?",
        ('i', _) => "i",
        ('u', _) => "I",
        _ => return None,
    };
    Element::of_format(format, bytes)
}
