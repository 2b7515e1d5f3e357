//! RDMA verbs: queue pairs over RoCE v2, InfiniBand or soft-RoCE. A wire beside sockets, which connect it and tell who is lost.

mod adapter;
mod fault;
mod grants;
mod joining;
mod lane;
mod link;
mod loopback;
mod nic;
mod one_sided;
mod proposal;
mod record;
mod recovery;
mod registered_pool;
mod registrations;
mod sending;
mod settings;
mod status;
mod waist;
mod wire;

pub use adapter::{Access, Adapter, Endpoint, Event, Key, Limits, Remote, Span, Trouble, What, Work};
pub use fault::Fault;
pub use loopback::{Fabric, Loopback};
pub use registrations::RegistrationCount;
pub use settings::VerbsConfig;
pub use status::Status;
pub use wire::{VerbsCount, VerbsWire};

use crate::TransportError;
use std::net::IpAddr;

/// Opens the RDMA device that fits `config` and the addresses by which peers are reached; with the reason for the choice.
///
/// # Errors
/// `Config` with why there is none.
pub fn open(config: &VerbsConfig, addresses: &[IpAddr]) -> Result<(Box<dyn Adapter>, String), TransportError> {
    let _ = (config, addresses);
    Err(TransportError::Config { setting: "verbs".to_owned(), reason: "no device".to_owned() })
}

/// A proposal that says why there are no queue pairs.
pub(crate) fn refusal(why: &str) -> Vec<u8> {
    proposal::Proposal { epoch: 0, received: Vec::new(), means: proposal::Means::Sockets(why.to_owned()) }.encode()
}
