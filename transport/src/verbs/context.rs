//! Does: opens devices and answers what they are. A child holds its parent, so nothing is closed under its children.

#![allow(unsafe_code)]

use super::ffi::*;
use super::library::Library;
use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// The answer of a function that gives an errno.
pub(super) fn answer(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        // Some providers give -1 and set errno, most give errno itself.
        -1 => Err(io::Error::last_os_error()),
        code => Err(io::Error::from_raw_os_error(code.abs())),
    }
}

/// The answer of a function that gives a pointer, or null and errno.
pub(super) fn not_null<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// The RDMA devices of this host.
pub(super) struct DeviceList {
    library: &'static Library,
    raw: NonNull<*mut ibv_device>,
    count: usize,
}

impl DeviceList {
    /// Asks the library.
    pub(super) fn read(library: &'static Library) -> io::Result<Self> {
        let mut count = 0;
        // SAFETY: `count` is ours to be written.
        let raw = not_null(unsafe { (library.get_device_list)(&raw mut count) })?;
        Ok(Self { library, raw, count: usize::try_from(count).unwrap_or(0) })
    }

    /// Their names.
    pub(super) fn names(&self) -> Vec<String> {
        (0..self.count).map(|at| self.name(at)).collect()
    }

    /// Opens the device of this name.
    pub(super) fn open(&self, name: &str) -> io::Result<Arc<Context>> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("{name} is not there any more"));
        let at = (0..self.count).find(|at| self.name(*at) == name).ok_or_else(gone)?;
        // SAFETY: the device stands in the list, which lives until after the call.
        let raw = not_null(unsafe { (self.library.open_device)(self.device(at)) })?;
        Ok(Arc::new(Context { library: self.library, raw, name: name.to_owned() }))
    }

    fn device(&self, at: usize) -> *mut ibv_device {
        assert!(at < self.count, "a device is one of the list");
        // SAFETY: the list has `count` members, as the library said.
        let place = unsafe { self.raw.add(at) };
        // SAFETY: as above, and nobody changes the list.
        unsafe { place.read() }
    }

    fn name(&self, at: usize) -> String {
        // SAFETY: a device of the list, which is still there.
        let name = unsafe { (self.library.get_device_name)(self.device(at)) };
        // SAFETY: the name is a string of the device, which is still there, and it is copied.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list came from the library and is freed once; an open device stays without it.
        unsafe { (self.library.free_device_list)(self.raw.as_ptr()) }
    }
}

/// An open device.
pub(super) struct Context {
    pub(super) library: &'static Library,
    pub(super) raw: NonNull<ibv_context>,
    pub(super) name: String,
}

// SAFETY: libibverbs lets any thread use a context; what is plain memory in it never changes after it was opened.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// What the device can do.
    pub(super) fn attributes(&self) -> io::Result<ibv_device_attr> {
        let mut attributes = ibv_device_attr::default();
        // SAFETY: the context is open, and the structure is ours to be written.
        answer(unsafe { (self.library.query_device)(self.raw.as_ptr(), &raw mut attributes) })?;
        Ok(attributes)
    }

    /// How a port is.
    pub(super) fn port(&self, number: u8) -> io::Result<ibv_port_attr> {
        let mut attributes = ibv_port_attr::default();
        // SAFETY: the context is open; the structure is ours to be written, and older libraries write its beginning only.
        answer(unsafe { (self.library.query_port)(self.raw.as_ptr(), number, &raw mut attributes) })?;
        Ok(attributes)
    }

    /// An entry of a port's table of addresses; zeros where it is empty.
    pub(super) fn gid(&self, port: u8, index: u8) -> io::Result<[u8; 16]> {
        let mut gid = ibv_gid::default();
        // SAFETY: the context is open, and the structure is ours to be written.
        answer(unsafe { (self.library.query_gid)(self.raw.as_ptr(), port, index.into(), &raw mut gid) })?;
        Ok(gid.0)
    }

    /// The device's own functions.
    pub(super) fn ops(&self) -> &ibv_context_ops {
        // SAFETY: the context is open for as long as `self`, and nobody changes its table.
        let raw = unsafe { self.raw.as_ref() };
        &raw.ops
    }

    /// Readable when the device has something to say.
    pub(super) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open for as long as `self`, and nobody changes the number.
        let raw = unsafe { self.raw.as_ref() };
        // SAFETY: the descriptor belongs to the context, which is open for as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(raw.async_fd) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened by the library and closed once; every child holds an `Arc` of this, so none is left.
        if let Err(error) = answer(unsafe { (self.library.close_device)(self.raw.as_ptr()) }) {
            tracing::error!(device = self.name, %error, "an RDMA device could not be closed");
        }
    }
}

/// What queue pairs and memory must have in common to go together.
pub(super) struct ProtectionDomain {
    pub(super) context: Arc<Context>,
    pub(super) raw: NonNull<ibv_pd>,
}

// SAFETY: libibverbs lets any thread use a protection domain.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A new one.
    pub(super) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let raw = not_null(unsafe { (context.library.alloc_pd)(context.raw.as_ptr()) })?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw }))
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: made by the library and freed once; queue pairs and memory hold an `Arc` of this, so none is left.
        if let Err(error) = answer(unsafe { (self.context.library.dealloc_pd)(self.raw.as_ptr()) }) {
            tracing::error!(device = self.context.name, %error, "a protection domain could not be freed");
        }
    }
}
