//! Does: programs for a device, loaded, and the one kind of kernel that is launched: it folds what several give into one.

#![allow(unsafe_code)]

use super::library::Handle;
use super::{CudaError, Device, DeviceSlice, Stream};
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// So many can be folded at once: what a kernel's list of addresses has room for.
pub const MOST_SOURCES: usize = 32;
/// Threads of a block, and blocks for each processor: enough to keep its memory busy.
const THREADS: u32 = 256;
const BLOCKS: u32 = 8;
/// Bytes that a thread reads of each source at once.
const PACK: usize = 16;

/// A program for one device.
pub struct Module {
    handle: Handle,
    device: Arc<Device>,
    processors: u32,
}

/// A kernel that folds `count` elements of each of some sources, in their order, into as many.
pub struct FoldKernel {
    function: Handle,
    element_bytes: usize,
    module: Arc<Module>,
}

/// The list of addresses, as the kernel takes it.
#[repr(C)]
struct Sources([u64; MOST_SOURCES]);

impl Module {
    /// Loads `image`, as a compiler has made it for `device`.
    ///
    /// # Errors
    /// `Refused`.
    pub fn load(device: &Arc<Device>, image: &[u8]) -> Result<Arc<Self>, CudaError> {
        let (mut handle, processors) = (0, device.processors()?);
        // Text must end with a zero; to binary code one more byte does nothing.
        let image: Vec<u8> = image.iter().copied().chain([0]).collect();
        device.inside("cuModuleLoadData", |cuda| {
            // SAFETY: `handle` may be written, and the image is whole; the driver copies it.
            unsafe { (cuda.cuModuleLoadData)(&raw mut handle, image.as_ptr().cast()) }
        })?;
        Ok(Arc::new(Self { handle, device: Arc::clone(device), processors }))
    }

    /// Its kernel called `name`.
    ///
    /// # Errors
    /// `Refused`: there is none.
    ///
    /// # Safety
    /// The kernel takes `(out, struct of 32 addresses by value, unsigned sources, unsigned long long count)`, for whatever number of
    /// blocks and threads, and touches nothing but `count` elements of `element_bytes` at `out` and at each of the first `sources`
    /// addresses; it may be told that `out` is one of them.
    pub unsafe fn fold_kernel(self: &Arc<Self>, name: &CStr, element_bytes: usize) -> Result<FoldKernel, CudaError> {
        let (mut function, handle) = (0, self.handle);
        self.device.inside("cuModuleGetFunction", |cuda| {
            // SAFETY: `function` may be written, the module is loaded, and the name ends with a zero.
            unsafe { (cuda.cuModuleGetFunction)(&raw mut function, handle, name.as_ptr()) }
        })?;
        Ok(FoldKernel { function, element_bytes, module: Arc::clone(self) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let handle = self.handle;
        // SAFETY: loaded once, and no kernel of it is held; what is under way was waited for by who held its memory.
        let unloaded = self.device.inside("cuModuleUnload", |cuda| unsafe { (cuda.cuModuleUnload)(handle) });
        if let Err(error) = unloaded {
            tracing::warn!(%error, "a program for a device was not unloaded");
        }
    }
}

impl FoldKernel {
    /// Begins to fold, on `stream`. Whoever calls holds the memory until that is done.
    pub(super) fn launch(&self, stream: &Stream, from: &[DeviceSlice], into: &DeviceSlice) -> Result<(), CudaError> {
        let bytes = into.len();
        if let Some(other) = from.iter().find(|slice| slice.len() != bytes) {
            return Err(CudaError::Length { from: other.len(), to: bytes });
        }
        assert!(!from.is_empty() && from.len() <= MOST_SOURCES, "a kernel folds 1 to {MOST_SOURCES} sources");
        if bytes == 0 {
            return Ok(());
        }
        let mut sources = Sources([0; MOST_SOURCES]);
        from.iter().zip(&mut sources.0).for_each(|(slice, address)| *address = slice.address());
        let (mut out, mut many) = (into.address(), from.len() as u32);
        let mut count = (bytes / self.element_bytes) as u64;
        let useful = u32::try_from(bytes.div_ceil(PACK * THREADS as usize)).unwrap_or(u32::MAX);
        let blocks = useful.min(BLOCKS * self.module.processors);
        let (function, handle) = (self.function, stream.handle);
        let mut parameters: [*mut c_void; 4] =
            [(&raw mut out).cast(), (&raw mut sources).cast(), (&raw mut many).cast(), (&raw mut count).cast()];
        self.module.device.inside("cuLaunchKernel", |cuda| {
            // SAFETY: the parameters are those of such a kernel (`fold_kernel`), which the driver copies; all memory that it touches
            // is held by slices of the lengths that were checked above.
            unsafe {
                (cuda.cuLaunchKernel)(
                    function,
                    blocks,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    handle,
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
        })
    }
}
