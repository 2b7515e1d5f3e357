//! Does: reaches the memory of Python objects without a copy: tensors by DLPack's C exchange API or by their data pointer,
//! NumPy arrays and others by the buffer protocol.
//!
//! An owning handle keeps the memory alive while the engine has it. Every handle is a Python object, so that one dropped on
//! a thread without the GIL (the progress thread) is put aside by pyo3 and released by the next thread that has the GIL:
//! PyTorch's deleter takes the GIL itself, and would wait for it there.

#![allow(unsafe_code)]

use crate::device::{self, OnDevice, Place};
use crate::element::Element;
use gradwire_collectives::{Memory as GroupMemory, Piece};
use gradwire_transport::Region;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};
use std::any::Any;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

/// What will be done with the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// What a Python object holds, wherever it is.
pub(crate) enum Taken {
    Host(Memory),
    Device(OnDevice),
}

impl Taken {
    /// The memory of `object`, in the host or on a CUDA device.
    ///
    /// # Errors
    /// As [`Memory::of`], and `CudaError`.
    pub(crate) fn of(object: &Bound<'_, PyAny>, argument: &str, access: Access) -> PyResult<Self> {
        let py = object.py();
        if let Ok(capsule) = object.get_type().getattr(intern!(py, "__dlpack_c_exchange_api__")) {
            return Memory::of_dlpack(object, &capsule, argument, access);
        }
        // A tensor without the exchange API tells no stream, so its interface is not asked.
        if object.hasattr(intern!(py, "data_ptr"))? && object.hasattr(intern!(py, "is_contiguous"))? {
            return Memory::of_tensor(object, argument).map(Self::Host);
        }
        // SAFETY: the object is alive, and only asked for its type's slots.
        let buffer = unsafe { ffi::PyObject_CheckBuffer(object.as_ptr()) } != 0;
        if !buffer && let Ok(interface) = object.getattr(intern!(py, "__cuda_array_interface__")) {
            let refuse = |shape: &[i64], dtype: &str, reason: &str| refused(argument, shape, dtype, reason);
            let (place, element, shape) = device::of_interface(&interface, access == Access::Write, &refuse)?;
            let keep = Box::new(object.clone().unbind());
            // SAFETY: the interface promises contiguous memory that lives as long as the object, and one of its streams.
            return unsafe { OnDevice::new(py, &place, element, shape, keep) }.map(Self::Device);
        }
        Memory::of_buffer(object, argument, access).map(Self::Host)
    }

    pub(crate) fn host(&self) -> Option<&Memory> {
        match self {
            Self::Host(memory) => Some(memory),
            Self::Device(_) => None,
        }
    }

    pub(crate) fn device(self) -> Option<OnDevice> {
        match self {
            Self::Host(_) => None,
            Self::Device(memory) => Some(memory),
        }
    }

    pub(crate) fn element(&self) -> &Element {
        match self {
            Self::Host(memory) => &memory.element,
            Self::Device(memory) => &memory.element,
        }
    }

    pub(crate) fn shape(&self) -> &[i64] {
        match self {
            Self::Host(memory) => &memory.shape,
            Self::Device(memory) => &memory.shape,
        }
    }
}

/// The memory of a Python object.
pub(crate) struct Memory {
    pub(crate) region: Arc<Region>,
    pub(crate) element: Element,
    pub(crate) shape: Vec<i64>,
}

impl Memory {
    /// The memory of `object`, which the caller's argument `argument` is.
    ///
    /// # Errors
    /// `TypeError`: no memory that can be reached. `ValueError`: not contiguous, read-only where it is to be written, on
    /// another device, or a conjugated or negated view.
    pub(crate) fn of(object: &Bound<'_, PyAny>, argument: &str, access: Access) -> PyResult<Self> {
        match Taken::of(object, argument, access)? {
            Taken::Host(memory) => Ok(memory),
            Taken::Device(memory) => {
                Err(refused(argument, &memory.shape, memory.element.name(), "is not in host memory: pass `.cpu()`"))
            }
        }
    }

    /// All of it, for a call.
    pub(crate) fn piece(&self) -> Piece {
        Piece::whole(Arc::clone(&self.region))
    }

    fn of_dlpack(
        object: &Bound<'_, PyAny>,
        capsule: &Bound<'_, PyAny>,
        argument: &str,
        access: Access,
    ) -> PyResult<Taken> {
        let handle = DlpackHandle::of(object, capsule)?;
        let tensor = handle.tensor();
        let dims = usize::try_from(tensor.ndim).unwrap_or(0);
        let shape = handle.numbers(tensor.shape, dims);
        let element = Element::of_dlpack(tensor.code, tensor.bits, tensor.lanes)
            .ok_or_else(|| wrong_type(argument, &shape, "elements that are no whole number of bytes"))?;
        let name = element.name().to_owned();
        let refuse = |reason: &str| refused(argument, &shape, &name, reason);
        let cuda = tensor.device_type == CUDA;
        if !cuda && !matches!(tensor.device_type, CPU | CUDA_HOST | ROCM_HOST) {
            return Err(refuse("is not in host memory: pass `.cpu()`"));
        }
        refuse_lazy_views(object, &refuse)?;
        if !contiguous(&shape, &handle.numbers(tensor.strides, dims)) {
            return Err(refuse("is not contiguous: pass `.contiguous()`, and copy the result back"));
        }
        if access == Access::Write && handle.flags() & READ_ONLY != 0 {
            return Err(refuse("is read-only, and is to be written: pass a copy"));
        }
        let bytes = element.bytes() * product(&shape);
        let start = tensor.data as usize + usize::try_from(tensor.byte_offset).unwrap_or(0);
        if cuda {
            let ordinal = u32::try_from(tensor.device_id).unwrap_or(u32::MAX);
            let stream = handle.current_stream()?;
            let place = Place { start: start as u64, bytes, device: Some(ordinal), stream };
            let keep = Box::new(Py::new(object.py(), handle)?);
            // SAFETY: as below, on the device; its stream is the owner's word.
            return unsafe { OnDevice::new(object.py(), &place, element, shape, keep) }.map(Taken::Device);
        }
        let keep = Py::new(object.py(), handle)?;
        // SAFETY: DLPack promises `bytes` of memory from `data + byte_offset` on, alive until the handle is dropped.
        let region = unsafe { region(start, bytes, Box::new(keep)) };
        Ok(Taken::Host(Self { region, element, shape }))
    }

    /// Tensors of a PyTorch without the exchange API.
    fn of_tensor(object: &Bound<'_, PyAny>, argument: &str) -> PyResult<Self> {
        let py = object.py();
        let shape: Vec<i64> = object.getattr(intern!(py, "shape"))?.extract()?;
        let name = object.getattr(intern!(py, "dtype"))?.str()?.to_string();
        let bytes_each: usize = object.call_method0(intern!(py, "element_size"))?.extract()?;
        let opaque = || Element::Opaque { bytes: bytes_each, name: name.clone() };
        let element = Element::of_name(&name).unwrap_or_else(opaque);
        let refuse = |reason: &str| refused(argument, &shape, &name, reason);
        let device: String = object.getattr(intern!(py, "device"))?.getattr(intern!(py, "type"))?.extract()?;
        if device != "cpu" {
            return Err(refuse("is not in host memory: pass `.cpu()`"));
        }
        refuse_lazy_views(object, &refuse)?;
        if !object.call_method0(intern!(py, "is_contiguous"))?.extract::<bool>()? {
            return Err(refuse("is not contiguous: pass `.contiguous()`, and copy the result back"));
        }
        let start: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let bytes = bytes_each * product(&shape);
        // SAFETY: a contiguous tensor in host memory holds `bytes` from `data_ptr` on for as long as it lives.
        let region = unsafe { region(start, bytes, Box::new(object.clone().unbind())) };
        Ok(Self { region, element, shape })
    }

    fn of_buffer(object: &Bound<'_, PyAny>, argument: &str, access: Access) -> PyResult<Self> {
        let py = object.py();
        // Types that came to NumPy from outside (bfloat16, float8) have no format; their bits have one.
        let outside = object
            .getattr(intern!(py, "dtype"))
            .and_then(|dtype| dtype.getattr(intern!(py, "name"))?.extract::<String>())
            .ok()
            .filter(|name| name == "bfloat16" || name.starts_with("float8"));
        let bits = match outside.as_deref() {
            Some("bfloat16") => Some(object.call_method1(intern!(py, "view"), ("uint16",))?),
            Some(_) => Some(object.call_method1(intern!(py, "view"), ("uint8",))?),
            None => None,
        };
        let buffer = PyUntypedBuffer::get(bits.as_ref().unwrap_or(object)).map_err(|error| {
            let kind = object.get_type().name().map_or_else(|_| "object".to_owned(), |name| name.to_string());
            let reason = format!(
                "{argument}: a {kind} has no memory that can be sent ({error}): pass a NumPy array, a tensor, or another \
                 object with the buffer protocol"
            );
            PyTypeError::new_err(reason)
        })?;
        let shape: Vec<i64> = buffer.shape().iter().map(|&len| i64::try_from(len).unwrap_or(i64::MAX)).collect();
        let format = buffer.format().to_string_lossy().into_owned();
        let element =
            outside.as_deref().map_or_else(|| Element::of_format(&format, buffer.item_size()), Element::of_name);
        let element = element.ok_or_else(|| wrong_type(argument, &shape, &format!("elements of format `{format}`")))?;
        let refuse = |reason: &str| refused(argument, &shape, element.name(), reason);
        if !buffer.is_c_contiguous() {
            return Err(refuse("is not contiguous: pass `numpy.ascontiguousarray(...)`, and copy the result back"));
        }
        if access == Access::Write && buffer.readonly() {
            return Err(refuse("is read-only, and is to be written: pass a copy"));
        }
        let (start, bytes) = (buffer.buf_ptr() as usize, buffer.len_bytes());
        let keep = Py::new(py, BufferHandle { _buffer: buffer })?;
        // SAFETY: the exporter keeps `bytes` from `start` on in place until the buffer is released.
        let region = unsafe { region(start, bytes, Box::new(keep)) };
        Ok(Self { region, element, shape })
    }
}

/// # Safety
/// As [`Region::from_raw`]. Memory that a caller asked to read only is only read: pieces of input are never written.
unsafe fn region(start: usize, bytes: usize, keep: Box<dyn Any + Send + Sync>) -> Arc<Region> {
    let start = NonNull::new(start as *mut u8).unwrap_or(NonNull::dangling());
    // SAFETY: promised by the caller; an empty tensor may have no address, and then has no bytes.
    unsafe { Region::from_raw(start, bytes, keep) }
}

fn refuse_lazy_views(object: &Bound<'_, PyAny>, refuse: &dyn Fn(&str) -> PyErr) -> PyResult<()> {
    let py = object.py();
    for name in [intern!(py, "is_conj"), intern!(py, "is_neg")] {
        let view = object.call_method0(name).and_then(|answer| answer.extract::<bool>());
        if view.unwrap_or(false) {
            return Err(refuse("is a conjugated or negated view: pass `.resolve_conj().resolve_neg()`"));
        }
    }
    Ok(())
}

fn refused(argument: &str, shape: &[i64], dtype: &str, reason: &str) -> PyErr {
    PyValueError::new_err(format!(
        "{argument}: the tensor of shape {shape:?} and dtype {dtype} {reason}. Nothing was sent"
    ))
}

fn wrong_type(argument: &str, shape: &[i64], what: &str) -> PyErr {
    PyTypeError::new_err(format!(
        "{argument}: the tensor of shape {shape:?} has {what}, which cannot be sent: view it as bytes (uint8). Nothing was sent"
    ))
}

fn product(shape: &[i64]) -> usize {
    shape.iter().map(|&len| usize::try_from(len).unwrap_or(0)).product()
}

fn contiguous(shape: &[i64], strides: &[i64]) -> bool {
    if strides.is_empty() || product(shape) == 0 {
        return true;
    }
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&len, &stride)| {
        let fits = len == 1 || stride == expected;
        expected *= len;
        fits
    })
}

const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;
const ROCM_HOST: i32 = 11;
const READ_ONLY: u64 = 1;
const API_NAME: &CStr = c"dlpack_exchange_api";
/// Major version of DLPack whose structures are declared here.
const MAJOR: u32 = 1;

/// `DLPackExchangeAPI` of DLPack 1.3.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    _prev_api: *const c_void,
    _allocator: *const c_void,
    managed_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut *mut Managed) -> c_int>,
    _managed_to_object: *const c_void,
    _tensor_from_object: *const c_void,
    current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

/// `DLTensor`, its nested structures laid flat.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Managed {
    _major: u32,
    _minor: u32,
    _context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
    flags: u64,
    tensor: DlTensor,
}

/// Owns a tensor's storage, apart from the Python object.
#[pyclass(frozen, module = "gradwire._native")]
struct DlpackHandle {
    managed: NonNull<Managed>,
    current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

// SAFETY: DLPack lets a managed tensor be deleted from any thread, and it is only read until then.
unsafe impl Send for DlpackHandle {}
// SAFETY: as above: nothing is written through a shared reference.
unsafe impl Sync for DlpackHandle {}

impl DlpackHandle {
    fn of(object: &Bound<'_, PyAny>, capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        let api = capsule.cast::<PyCapsule>()?.pointer_checked(Some(API_NAME))?.cast::<ExchangeApi>();
        // SAFETY: a capsule of this name holds a `DLPackExchangeAPI`, which lives as long as the process.
        let api = unsafe { api.as_ref() };
        let (ExchangeApi { major, minor, .. }, Some(convert)) = (api, api.managed_from_object) else {
            return Err(PyTypeError::new_err("the tensor's DLPack exchange API is empty"));
        };
        if *major != MAJOR {
            let text =
                format!("the tensor speaks DLPack {major}.{minor}, and gradwire speaks {MAJOR}.x: upgrade gradwire");
            return Err(PyTypeError::new_err(text));
        }
        let mut managed = std::ptr::null_mut();
        // SAFETY: the GIL is held, `object` is of the type that the API was found at, and `managed` may be written.
        let code = unsafe { convert(object.as_ptr().cast(), &raw mut managed) };
        match NonNull::new(managed) {
            Some(managed) if code == 0 => Ok(Self { managed, current_stream: api.current_stream }),
            _ => Err(PyErr::take(object.py())
                .unwrap_or_else(|| PyTypeError::new_err("the tensor cannot be exported by DLPack"))),
        }
    }

    fn tensor(&self) -> &DlTensor {
        // SAFETY: the handle owns the managed tensor until it is dropped.
        unsafe { &(*self.managed.as_ptr()).tensor }
    }

    /// The stream that the tensor's library uses on this thread.
    fn current_stream(&self) -> PyResult<usize> {
        let (tensor, mut stream) = (self.tensor(), std::ptr::null_mut());
        let missing = || PyTypeError::new_err("the tensor's DLPack exchange API tells no current stream");
        let ask = self.current_stream.ok_or_else(missing)?;
        // SAFETY: `stream` may be written, and the GIL is held.
        let code = unsafe { ask(tensor.device_type, tensor.device_id, &raw mut stream) };
        if code == 0 { Ok(stream as usize) } else { Err(missing()) }
    }

    fn flags(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (*self.managed.as_ptr()).flags }
    }

    /// `dims` numbers of the shape or the strides; none where DLPack leaves them out.
    fn numbers(&self, first: *const i64, dims: usize) -> Vec<i64> {
        if first.is_null() {
            return Vec::new();
        }
        // SAFETY: shape and strides of a DLTensor have `ndim` numbers each, owned by the managed tensor.
        unsafe { std::slice::from_raw_parts(first, dims) }.to_vec()
    }
}

impl Drop for DlpackHandle {
    fn drop(&mut self) {
        // SAFETY: as in `tensor`.
        let deleter = unsafe { (*self.managed.as_ptr()).deleter };
        if let Some(deleter) = deleter {
            // SAFETY: called once, by the only owner; a Python object is dropped with the GIL held.
            unsafe { deleter(self.managed.as_ptr()) };
        }
    }
}

/// Holds an exported buffer.
#[pyclass(frozen, module = "gradwire._native")]
struct BufferHandle {
    _buffer: PyUntypedBuffer,
}

/// Memory of a group, which gives it out by the buffer protocol and takes it back when this goes.
#[pyclass(frozen, module = "gradwire._native")]
pub(crate) struct Allocation {
    memory: GroupMemory,
}

impl Allocation {
    pub(crate) fn new(memory: GroupMemory) -> Self {
        Self { memory }
    }
}

#[pymethods]
impl Allocation {
    fn __len__(&self) -> usize {
        self.memory.len()
    }

    /// # Safety
    /// Called by Python alone, with a view to be filled.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let memory = &slf.get().memory;
        let (start, bytes) = (memory.as_ptr().cast(), memory.len().cast_signed());
        // SAFETY: the view is Python's to be filled; the bytes are this object's alone, and the view holds the object.
        let code = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, bytes, 0, flags) };
        if code == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
