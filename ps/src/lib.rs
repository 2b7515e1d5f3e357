//! gradwire-ps: a sharded parameter server and its client.

mod body;
mod client;
mod dense;
mod dial;
mod dtype;
mod error;
pub mod header;
mod kernel;
mod key;
mod local;
mod members;
mod protocol;
mod refusal;
mod server;
pub mod shard;
pub mod shard_map;
mod spec;
pub mod staleness;
mod status;
mod update_rule;
mod values;

pub use body::BadBody;
pub use client::{Client, ClientSettings, DenseTable, Done, OnDone, Pending, TableOptions};
pub use dial::Dialer;
pub use dtype::DType;
pub use error::PsError;
pub use key::{KeyRange, MAX_NAME_BYTES, TableId};
pub use local::LocalServers;
pub use refusal::{Reason, Refusal};
pub use server::{Server, ServerSettings, Stopper};
pub use shard::{Limits, open_body};
pub use shard_map::{Epoch, ShardMap};
pub use spec::{Combine, MAX_DIMENSIONS, TableSpec};
pub use staleness::Mode;
pub use status::{ClientStatus, ShardStatus, TableStatus};
pub use update_rule::{Adam, Sgd, UpdateRule};
