//! gradwire-ps: a sharded parameter server and its client.

mod body;
mod bounded;
mod checkpoint;
mod client;
mod dense;
mod dial;
mod dtype;
mod error;
pub mod header;
mod keeper;
mod kernel;
mod key;
mod local;
mod members;
mod memory;
mod protocol;
mod rates;
mod recovery;
mod refusal;
mod server;
pub mod shard;
pub mod shard_map;
mod sparse;
mod spec;
pub mod staleness;
pub mod state;
mod status;
mod storage;
mod update_rule;
mod values;

pub use body::BadBody;
pub use client::{
    Checkpoint, Client, ClientSettings, DenseTable, Done, OnDone, Pending, SparseOptions, SparseTable, TableOptions,
};
pub use dial::Dialer;
pub use dtype::DType;
pub use error::PsError;
pub use keeper::Checkpoints;
pub use key::{KeyRange, MAX_NAME_BYTES, TableId};
pub use local::LocalServers;
pub use recovery::Recovery;
pub use refusal::{Reason, Refusal};
pub use server::{Server, ServerSettings, Stopper};
pub use shard::{Limits, open_body, open_sparse_body};
pub use shard_map::{Epoch, ShardMap};
pub use sparse::{Eviction, Initializer, MAX_DIM, SparseSpec, shard_of};
pub use spec::{Combine, MAX_DIMENSIONS, TableSpec};
pub use staleness::Mode;
pub use status::{ClientStatus, ShardStatus, SparseStatus, TableStatus};
pub use update_rule::{Adagrad, Adam, Ftrl, Sgd, UpdateRule};
