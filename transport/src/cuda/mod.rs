//! Does: memory of CUDA devices: found, allocated, taken by pointer, and copied to and from pinned memory of the host.
//!
//! The driver is looked for when the program first asks for it, by a small table of our own ([`Driver`]): of cudarc, which does
//! the same, a driver that lacks a function is a panic and the file cannot be chosen; here both are errors, and tests can hand in
//! a driver of their own. Nothing here synchronises a whole device: order is made by events between streams.

mod copy;
mod device;
mod error;
mod export;
mod gate;
mod ipc;
mod library;
mod memory;
mod module;
mod nvrtc;
mod pinned_pool;
mod stream;
mod way;
mod work;

pub use copy::Copying;
pub use device::{Device, Driver};
pub use error::CudaError;
pub use gate::Gate;
pub use ipc::HANDLE_BYTES;
pub use memory::{DeviceMemory, DeviceSlice};
pub use module::{FoldKernel, MOST_SOURCES, Module};
pub use nvrtc::Compiler;
pub use pinned_pool::{PinnedCount, PinnedPool};
pub use stream::{Event, Stream};
pub use way::{Findings, Trial, Way};
pub use work::Act;
