//! Pure: what can go wrong at the CUDA driver's door.

use std::time::Duration;

/// Why memory of a CUDA device could not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver, or it does not start.
    #[error("no CUDA driver: {reason}; install NVIDIA's driver, or hand in memory of the host (`.cpu()`)")]
    NoDriver {
        /// What was tried, and the answer.
        reason: String,
    },
    /// The driver lacks a function.
    #[error("the CUDA driver {library} has no {symbol}: update NVIDIA's driver (R515, for CUDA 11.7, or newer)")]
    TooOld {
        /// The file.
        library: String,
        /// What it lacks.
        symbol: &'static str,
    },
    /// The driver does not see this device.
    #[error(
        "there is no CUDA device {ordinal}: the driver sees {count}; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// Which was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// Memory that was said to be of a device is not.
    #[error("{bytes} bytes at {address:#x} are not memory of CUDA device {ordinal}: {found}")]
    WrongMemory {
        /// Where.
        address: u64,
        /// How much.
        bytes: usize,
        /// Whose it was said to be.
        ordinal: u32,
        /// What it is.
        found: String,
    },
    /// The driver refused a call, or an earlier one failed meanwhile.
    #[error("{call} failed on CUDA device {ordinal}: {name} ({code}){}", remedy(*code))]
    Refused {
        /// The driver's function.
        call: &'static str,
        /// The device.
        ordinal: u32,
        /// The driver's code.
        code: i32,
        /// Its name.
        name: String,
    },
    /// The device did not come to it in time.
    #[error(
        "CUDA device {ordinal}: waited {:.1} s for {what}; see what the stream before it is waiting for, or raise the time-out",
        waited.as_secs_f64()
    )]
    Timeout {
        /// The device.
        ordinal: u32,
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// There is no compiler for the device, or it refuses.
    #[error("no kernels for CUDA devices: {reason}; install NVRTC (`pip install nvidia-cuda-nvrtc`)")]
    NoKernels {
        /// What was tried, and the answer.
        reason: String,
    },
    /// A copy between ranges of different lengths.
    #[error("a copy of {from} bytes into {to}: both must be of one length")]
    Length {
        /// Bytes to be read.
        from: usize,
        /// Bytes to be written.
        to: usize,
    },
}

fn remedy(code: i32) -> &'static str {
    match code {
        2 => ": free memory of the device, or (cuMemHostAlloc) raise what the host may pin",
        700 => ": memory was freed while it was in use; the device's context is lost, start the process anew",
        _ => "",
    }
}
