//! RDMA verbs: queue pairs over RoCE v2, InfiniBand or soft-RoCE, by libibverbs, which is found when the program runs. A wire
//! beside sockets: they connect it, and tell who is lost.

#[cfg(all(test, feature = "abi-check"))]
mod abi_check;
pub mod adapter;
mod async_events;
pub mod bare;
mod completion_queue;
mod context;
pub(crate) mod decoders;
pub mod device;
pub(crate) mod dma_buf;
mod fault;
mod ffi;
pub mod gid;
mod gpu_direct;
mod granting;
mod grants;
mod joining;
mod lane;
mod library;
mod link;
mod listing;
mod loopback;
mod memory_region;
mod nic;
mod one_sided;
mod proposal;
mod queue_pair;
mod record;
mod recovery;
mod registered_pool;
mod registrations;
mod sending;
pub mod settings;
pub mod status;
mod under_way;
mod waist;
mod watch;
mod watching;
mod wire;

pub use dma_buf::{DmaBufAnswer, ask_for_dma_bufs};
pub use fault::Fault;
pub use loopback::{Fabric, Loopback};
pub use registrations::RegistrationCount;
pub use settings::VerbsConfig;
pub use wire::{VerbsCount, VerbsWire};

/// A proposal that says why there are no queue pairs.
pub(crate) fn refusal(why: &str) -> Vec<u8> {
    proposal::Proposal { epoch: 0, received: Vec::new(), means: proposal::Means::Sockets(why.to_owned()) }.encode()
}
