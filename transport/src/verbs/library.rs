//! Does: finds libibverbs when the program runs, so that one build works with and without it.

#![allow(unsafe_code)]

use super::ffi::*;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// The file that is looked for.
const FILE: &CStr = c"libibverbs.so.1";

macro_rules! library {
    ($($name:ident, $version:literal: fn($($type:ty),*) $(-> $answer:ty)?;)*) => {
        /// The functions of libibverbs that are not in a context's own table.
        pub(super) struct Library {
            $(pub $name: unsafe extern "C" fn($($type),*) $(-> $answer)?,)*
        }

        impl Library {
            fn look_up(handle: *mut c_void) -> Result<Self, String> {
                $(
                    let address = find(handle, concat!("ibv_", stringify!($name), "\0"), concat!($version, "\0"))?;
                    // SAFETY: the symbol of this name and version is a function of this type, as the headers say.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $answer)?>(address)
                    };
                )*
                Ok(Self { $($name,)* })
            }
        }
    };
}

library! {
    get_device_list, "IBVERBS_1.1": fn(*mut c_int) -> *mut *mut ibv_device;
    free_device_list, "IBVERBS_1.1": fn(*mut *mut ibv_device);
    get_device_name, "IBVERBS_1.1": fn(*mut ibv_device) -> *const c_char;
    open_device, "IBVERBS_1.1": fn(*mut ibv_device) -> *mut ibv_context;
    close_device, "IBVERBS_1.1": fn(*mut ibv_context) -> c_int;
    query_device, "IBVERBS_1.1": fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    query_port, "IBVERBS_1.1": fn(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    query_gid, "IBVERBS_1.1": fn(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
    get_async_event, "IBVERBS_1.1": fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
    ack_async_event, "IBVERBS_1.1": fn(*mut ibv_async_event);
    alloc_pd, "IBVERBS_1.1": fn(*mut ibv_context) -> *mut ibv_pd;
    dealloc_pd, "IBVERBS_1.1": fn(*mut ibv_pd) -> c_int;
    reg_mr, "IBVERBS_1.1": fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    reg_mr_iova2, "IBVERBS_1.8": fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
    dereg_mr, "IBVERBS_1.1": fn(*mut ibv_mr) -> c_int;
    create_comp_channel, "IBVERBS_1.0": fn(*mut ibv_context) -> *mut ibv_comp_channel;
    destroy_comp_channel, "IBVERBS_1.0": fn(*mut ibv_comp_channel) -> c_int;
    create_cq, "IBVERBS_1.1": fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    resize_cq, "IBVERBS_1.1": fn(*mut ibv_cq, c_int) -> c_int;
    destroy_cq, "IBVERBS_1.1": fn(*mut ibv_cq) -> c_int;
    get_cq_event, "IBVERBS_1.1": fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ack_cq_events, "IBVERBS_1.1": fn(*mut ibv_cq, c_uint);
    create_qp, "IBVERBS_1.1": fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    modify_qp, "IBVERBS_1.1": fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    destroy_qp, "IBVERBS_1.1": fn(*mut ibv_qp) -> c_int;
}

/// `ibv_reg_dmabuf_mr`: domain, offset, length, address, file, access.
pub(super) type RegDmaBuf = unsafe extern "C" fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;

/// The function by which a device is told of a dma-buf; `None`: the library is older than rdma-core 34.
pub(super) fn reg_dmabuf_mr() -> Option<RegDmaBuf> {
    // SAFETY: as in `open`: the library is there already, and is never closed.
    let handle = unsafe { libc::dlopen(FILE.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return None;
    }
    let address = find(handle, "ibv_reg_dmabuf_mr\0", "IBVERBS_1.12\0").ok()?;
    // SAFETY: the symbol of this name and version is a function of this type, as the headers say.
    Some(unsafe { std::mem::transmute::<*mut c_void, RegDmaBuf>(address) })
}

impl Library {
    /// The library, opened by the first call and never closed: its providers' threads and tables may not be unloaded.
    ///
    /// # Errors
    /// Why it cannot be used, with the remedy.
    pub(super) fn load() -> Result<&'static Self, String> {
        static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
        LOADED.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, String> {
        // SAFETY: the name ends with a zero; the library's own constructors are trusted, as those of any linked library.
        let handle = unsafe { libc::dlopen(FILE.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(format!(
                "{} cannot be loaded: {}; install libibverbs and its providers (Debian: `apt-get install libibverbs1 \
                 ibverbs-providers`, Fedora: `dnf install libibverbs`)",
                FILE.to_string_lossy(),
                last_complaint()
            ));
        }
        Self::look_up(handle)
    }
}

/// The address of a function of the given version: a library may hold others of the same name for old programs.
fn find(handle: *mut c_void, name: &str, version: &str) -> Result<*mut c_void, String> {
    // SAFETY: the handle is open, and both strings end with a zero.
    let found = unsafe { libc::dlvsym(handle, name.as_ptr().cast(), version.as_ptr().cast()) };
    if found.is_null() {
        return Err(format!("{} is too old: {}; update rdma-core", FILE.to_string_lossy(), last_complaint()));
    }
    Ok(found)
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
