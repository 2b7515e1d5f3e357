//! gradwire-ps: a sharded parameter server and its client.

mod body;
mod bounded;
mod checkpoint;
mod chunk;
mod client;
mod codec;
mod counts;
mod dense;
mod dial;
mod dtype;
mod error;
#[allow(dead_code)]
mod etcd;
mod exact_sum;
mod gauges;
pub mod header;
mod keeper;
mod kernel;
mod key;
mod local;
mod members;
mod memory;
mod monitor;
mod patience;
mod protocol;
mod rates;
mod refusal;
mod schedule;
mod server;
pub mod shard;
pub mod shard_map;
mod sparse;
mod spec;
pub mod staleness;
pub mod state;
mod status;
mod storage;
mod unpacking;
mod update_rule;
mod values;

pub use body::BadBody;
pub use client::{
    Checkpoint, Client, ClientSettings, DenseTable, Done, OnDone, Pending, SparseOptions, SparseTable, TableOptions,
};
pub use codec::{Codec, Compression};
pub use dial::Dialer;
pub use dtype::DType;
pub use error::PsError;
pub use gauges::{LATENCY_BOUNDS_US, Latencies, Report};
pub use keeper::Checkpoints;
pub use key::{KeyRange, MAX_NAME_BYTES, TableId};
pub use local::LocalServers;
pub use monitor::Monitor;
pub use refusal::{Reason, Refusal};
pub use schedule::{Course, MAX_LISTED, Schedule, WarmUp, rate_body};
pub use server::{Server, ServerSettings, Stopper};
pub use shard::Limits;
pub use shard_map::{Epoch, ShardMap};
pub use sparse::{Eviction, Initializer, MAX_DIM, SparseSpec, open_sparse_body, shard_of};
pub use spec::{Combine, MAX_DIMENSIONS, TableSpec, open_body};
pub use staleness::Mode;
pub use status::{ClientStatus, ShardStatus, SparseStatus, TableStatus};
pub use update_rule::{Adagrad, Adam, Ftrl, Sgd, UpdateRule};
