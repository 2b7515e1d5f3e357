//! Does: memory that a device knows.

#![allow(unsafe_code)]

use super::adapter::{Access, Foreign, Key, Span};
use super::context::{ProtectionDomain, answer, not_null};
use super::ffi::*;
use super::library;
use crate::RegisterError;
use rustix::fd::AsRawFd;
use rustix::process::Resource;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// One registration.
pub(super) struct MemoryRegion {
    raw: NonNull<ibv_mr>,
    first: u64,
    bytes: usize,
    access: Access,
    domain: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs lets any thread use a registration.
unsafe impl Send for MemoryRegion {}

impl MemoryRegion {
    /// Pins `bytes` from `start`.
    ///
    /// # Safety
    /// The memory must stay mapped for as long as this lives.
    pub(super) unsafe fn register(
        domain: &Arc<ProtectionDomain>,
        start: *mut u8,
        bytes: usize,
        access: Access,
    ) -> Result<Self, RegisterError> {
        let (library, pd) = (domain.context.library, domain.raw.as_ptr());
        let open = ACCESS_LOCAL_WRITE | ACCESS_REMOTE_WRITE;
        let exposed = (open | ACCESS_REMOTE_READ) as u32;
        let first = match access {
            Access::Read | Access::Write => start.addr(),
            // The kernel takes no other place within the page.
            Access::Exposed => start.addr() % rustix::param::page_size(),
        } as u64;
        let raw = match access {
            // SAFETY: the domain is there, and the caller promises the memory.
            Access::Read => unsafe { (library.reg_mr)(pd, start.cast(), bytes, 0) },
            // SAFETY: as above.
            Access::Write => unsafe { (library.reg_mr)(pd, start.cast(), bytes, open) },
            // SAFETY: as above.
            Access::Exposed => unsafe { (library.reg_mr_iova2)(pd, start.cast(), bytes, first, exposed) },
        };
        match not_null(raw) {
            Ok(raw) => Ok(Self { raw, first, bytes, access, domain: Arc::clone(domain) }),
            Err(error) => Err(refusal(bytes, &domain.context.name, error)),
        }
    }

    /// Maps memory of another device, exposed.
    ///
    /// # Safety
    /// The memory must stay allocated for as long as this lives.
    pub(super) unsafe fn register_foreign(
        domain: &Arc<ProtectionDomain>,
        memory: Foreign<'_>,
    ) -> Result<Self, RegisterError> {
        let (library, pd, bytes) = (domain.context.library, domain.raw.as_ptr(), memory.bytes);
        let exposed = ACCESS_LOCAL_WRITE | ACCESS_REMOTE_WRITE | ACCESS_REMOTE_READ;
        let in_page = |place: u64| place % rustix::param::page_size() as u64;
        let (raw, first) = match memory.dma_buf {
            Some((fd, offset)) => {
                let first = in_page(offset);
                let register = library::reg_dmabuf_mr().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported));
                // SAFETY: the domain is there; the kernel checks the file and the range, and holds the dma-buf by itself.
                let made = register.map(|call| unsafe { call(pd, offset, bytes, first, fd.as_raw_fd(), exposed) });
                (made.and_then(not_null), first)
            }
            None => {
                let (start, first) = (memory.address as *mut std::ffi::c_void, in_page(memory.address));
                // SAFETY: the domain is there; an address that no module of the kernel knows is refused.
                let made = unsafe { (library.reg_mr_iova2)(pd, start, bytes, first, exposed as u32) };
                (not_null(made), first)
            }
        };
        match raw {
            Ok(raw) => Ok(Self { raw, first, bytes, access: Access::Exposed, domain: Arc::clone(domain) }),
            Err(error) => Err(refusal(bytes, &domain.context.name, error)),
        }
    }

    /// By what it is named in work requests. Its local key is its handle too: no other registration has it.
    pub(super) fn key(&self) -> Key {
        // SAFETY: the registration is there for as long as `self`, and nobody changes it.
        let raw = unsafe { self.raw.as_ref() };
        Key { handle: raw.lkey.into(), local: raw.lkey, remote: raw.rkey, first: self.first }
    }

    /// Whether the processor can read the span where its address says: it lies in here, and addresses are what they seem.
    pub(super) fn is_readable(&self, span: &Span) -> bool {
        let begin = span.address.checked_sub(self.first);
        let inside = begin.is_some_and(|begin| begin.saturating_add(span.bytes.into()) <= self.bytes as u64);
        inside && self.access != Access::Exposed
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: made by the library and freed once, when no work request names it any more, as `deregister` asks.
        if let Err(error) = answer(unsafe { (self.domain.context.library.dereg_mr)(self.raw.as_ptr()) }) {
            tracing::error!(device = self.domain.context.name, %error, "memory could not be deregistered");
        }
    }
}

fn refusal(bytes: usize, device: &str, error: io::Error) -> RegisterError {
    let out_of_memory = error.raw_os_error() == Some(rustix::io::Errno::NOMEM.raw_os_error());
    match rustix::process::getrlimit(Resource::Memlock).current {
        Some(limit_bytes) if out_of_memory => RegisterError::LockedMemoryLimit { bytes, limit_bytes },
        _ => RegisterError::Device { bytes, device: device.to_owned(), source: Arc::new(error) },
    }
}
