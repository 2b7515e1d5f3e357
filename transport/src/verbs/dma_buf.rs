//! Does: asks the RDMA devices of this host whether they reach memory of other devices, such as GPUs, by dma-bufs.

#![allow(unsafe_code)]

use super::context::{DeviceList, ProtectionDomain, not_null};
use super::ffi::ACCESS_LOCAL_WRITE;
use super::library::{self, Library};
use rustix::io::Errno;
use std::io;

/// A device's answer.
#[derive(Debug)]
pub struct DmaBufAnswer {
    /// The RDMA device.
    pub device: String,
    /// `Ok`, or why it does not.
    pub answer: io::Result<()>,
}

/// Asks each device to register a dma-buf that cannot be: one that knows dma-bufs complains of the file, others of the call.
///
/// # Errors
/// There is no library, or no device.
pub fn ask_for_dma_bufs() -> Result<Vec<DmaBufAnswer>, String> {
    let devices =
        DeviceList::read(Library::load()?).map_err(|error| format!("this host has no RDMA device ({error})"))?;
    let names = devices.names();
    let ask = |device: String| DmaBufAnswer { answer: ask(&devices, &device), device };
    Ok(names.into_iter().map(ask).collect())
}

/// The system's answer, with its number.
pub(crate) fn words(error: &io::Error) -> String {
    error.to_string().replace("(os error ", "(")
}

fn ask(devices: &DeviceList, name: &str) -> io::Result<()> {
    let too_old =
        || io::Error::new(io::ErrorKind::Unsupported, "libibverbs has no ibv_reg_dmabuf_mr: update rdma-core");
    let register = library::reg_dmabuf_mr().ok_or_else(too_old)?;
    let domain = ProtectionDomain::new(&devices.open(name)?)?;
    // SAFETY: the domain is there; -1 is no file, so nothing is registered.
    let answer = not_null(unsafe { register(domain.raw.as_ptr(), 0, 4096, 0, -1, ACCESS_LOCAL_WRITE) });
    match answer {
        Err(error) if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("it registered a file that is none")),
    }
}
