//! Does: RDMA by libibverbs, found when the program runs.

#[cfg(all(test, feature = "abi-check"))]
mod abi_check;
pub mod adapter;
mod async_events;
mod completion_queue;
mod context;
pub mod device;
mod ffi;
pub mod gid;
mod library;
mod listing;
mod memory_region;
mod queue_pair;
pub mod settings;
pub mod status;
