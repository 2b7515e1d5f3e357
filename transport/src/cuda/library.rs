//! Does: finds CUDA's driver when the program runs, with an error for each function that is not there; and opens files for others.

#![allow(unsafe_code, non_snake_case)]

use super::CudaError;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The file that is looked for where no other is named.
const FILE: &str = "libcuda.so.1";

/// An address in a device's memory.
pub(super) type Pointer = u64;
/// A context, stream, event, module or function: a pointer of the driver's, which we never follow.
pub(super) type Handle = usize;
/// What leads another process to a device's memory; handed over by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct IpcHandle(pub(super) [u8; 64]);

macro_rules! library {
    (needed { $($name:ident($($type:ty),*);)* } wanted { $($other:ident($($kind:ty),*);)* }) => {
        /// The functions of libcuda that are used, by their own names. All answer with a `CUresult`.
        pub(super) struct Library {
            $(pub $name: unsafe extern "C" fn($($type),*) -> c_int,)*
            $(pub $other: Option<unsafe extern "C" fn($($kind),*) -> c_int>,)*
        }

        impl Library {
            fn look_up(handle: *mut c_void, file: &str) -> Result<Self, CudaError> {
                $(
                    let address = find(handle, concat!(stringify!($name), "\0"));
                    if address.is_null() {
                        return Err(CudaError::TooOld { library: file.to_owned(), symbol: stringify!($name) });
                    }
                    // SAFETY: the symbol of this name is a function of this type, as cuda.h says.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> c_int>(address)
                    };
                )*
                $(
                    let address = find(handle, concat!(stringify!($other), "\0"));
                    // SAFETY: as above; null is `None`.
                    let $other = unsafe {
                        std::mem::transmute::<*mut c_void, Option<unsafe extern "C" fn($($kind),*) -> c_int>>(address)
                    };
                )*
                Ok(Self { $($name,)* $($other,)* })
            }
        }
    };
}

library! {
    needed {
        cuInit(c_uint);
        cuGetErrorName(c_int, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut c_int, c_int);
        cuDeviceGetName(*mut c_char, c_int, c_int);
        cuDeviceGetAttribute(*mut c_int, c_int, c_int);
        cuDevicePrimaryCtxRetain(*mut Handle, c_int);
        cuDevicePrimaryCtxRelease_v2(c_int);
        cuCtxPushCurrent_v2(Handle);
        cuCtxPopCurrent_v2(*mut Handle);
        cuMemAlloc_v2(*mut Pointer, usize);
        cuMemFree_v2(Pointer);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuPointerGetAttribute(*mut c_void, c_int, Pointer);
        cuStreamCreate(*mut Handle, c_uint);
        cuStreamDestroy_v2(Handle);
        cuStreamWaitEvent(Handle, Handle, c_uint);
        cuEventCreate(*mut Handle, c_uint);
        cuEventDestroy_v2(Handle);
        cuEventRecord(Handle, Handle);
        cuEventQuery(Handle);
        cuMemcpyHtoDAsync_v2(Pointer, *const c_void, usize, Handle);
        cuMemcpyDtoHAsync_v2(*mut c_void, Pointer, usize, Handle);
        cuMemcpyDtoDAsync_v2(Pointer, Pointer, usize, Handle);
        cuModuleLoadData(*mut Handle, *const c_void);
        cuModuleUnload(Handle);
        cuModuleGetFunction(*mut Handle, Handle, *const c_char);
        cuLaunchKernel(Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void);
    }
    wanted {
        cuMemGetHandleForAddressRange(*mut c_void, Pointer, usize, c_int, c_ulonglong);
        cuFlushGPUDirectRDMAWrites(c_int, c_int);
        cuStreamWaitValue32_v2(Handle, Pointer, u32, c_uint);
        cuIpcGetMemHandle(*mut IpcHandle, Pointer);
        cuIpcOpenMemHandle_v2(*mut Pointer, IpcHandle, c_uint);
        cuIpcCloseMemHandle(Pointer);
    }
}

impl Library {
    /// Opens `path`, or the system's driver. It is never closed: the driver has threads.
    pub(super) fn open(path: Option<&Path>) -> Result<Self, CudaError> {
        let file = path.unwrap_or(Path::new(FILE));
        let handle = open(file).map_err(|reason| CudaError::NoDriver { reason })?;
        Self::look_up(handle, &file.display().to_string())
    }
}

/// Opens `file`, for good; or says why not.
pub(super) fn open(file: &Path) -> Result<*mut c_void, String> {
    let shown = file.display();
    let name = CString::new(file.as_os_str().as_bytes()).map_err(|_| format!("{shown:?} is not a file's name"))?;
    // SAFETY: the name ends with a zero; the file's own constructors are trusted, as those of any linked library.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() { Err(format!("{shown} cannot be loaded ({})", last_complaint())) } else { Ok(handle) }
}

/// The address of what `name`, which ends with a zero, means in an open file; null where it means nothing.
pub(super) fn find(handle: *mut c_void, name: &str) -> *mut c_void {
    // SAFETY: the handle is open, and the name ends with a zero.
    unsafe { libc::dlsym(handle, name.as_ptr().cast()) }
}

fn last_complaint() -> String {
    // SAFETY: no arguments; the answer belongs to this thread until its next call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".to_owned();
    }
    // SAFETY: it is not null, ends with a zero, and is copied before the next call.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
