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
mod library;
mod memory;
mod pinned_pool;
mod stream;
mod way;

pub use copy::Copying;
pub use device::{Device, Driver};
pub use error::CudaError;
pub use gate::Gate;
pub use memory::{DeviceMemory, DeviceSlice};
pub use pinned_pool::{PinnedCount, PinnedPool};
pub use stream::{Event, Stream};
pub use way::{Findings, Trial, Way};
