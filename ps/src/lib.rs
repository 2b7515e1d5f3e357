//! gradwire-ps: a sharded parameter server and its client.

mod body;
mod bounded;
mod checkpoint;
mod chunk;
mod client;
mod clustered;
mod codec;
mod control;
mod counts;
#[doc(hidden)]
pub mod decoders;
mod dense;
mod dial;
mod dtype;
mod error;
mod etcd;
mod exact_sum;
mod exchange;
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
mod rally;
mod rates;
mod recovery;
mod refusal;
pub mod replica;
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
mod tensors;
mod unpacking;
mod update_rule;
mod values;

pub use body::BadBody;
pub use client::{
    Checkpoint, Client, ClientSettings, DenseTable, Done, OnDone, Pending, SparseOptions, SparseTable, TableOptions,
};
pub use clustered::ClusterServers;
pub use codec::{Codec, Compression};
pub use control::{
    Cluster, ClusterMap, Coordinator, CoordinatorReport, CoordinatorSettings, Join, Moves, Processes, Seating,
    ShardSeats, Sighting,
};
pub use dial::Dialer;
pub use dtype::DType;
pub use error::PsError;
pub use etcd::EtcdSettings;
pub use exchange::{Exchanged, export_checkpoint, import_checkpoint};
pub use gauges::{LATENCY_BOUNDS_US, Latencies, Report};
pub use keeper::Checkpoints;
pub use key::{KeyRange, MAX_NAME_BYTES, TableId};
pub use local::LocalServers;
pub use monitor::Monitor;
pub use recovery::Recovery;
pub use refusal::{Reason, Refusal};
pub use schedule::{Course, MAX_LISTED, Schedule, WarmUp, rate_body};
pub use server::{Server, ServerSettings, Stopper};
pub use shard::{Checkpointing, Limits};
pub use shard_map::{Epoch, ShardMap};
pub use sparse::{Eviction, Initializer, MAX_DIM, SparseSpec, open_sparse_body, shard_of};
pub use spec::{Combine, MAX_DIMENSIONS, TableSpec, open_body};
pub use staleness::Mode;
pub use status::{ClientStatus, Role, ShardStatus, SparseStatus, Standing, TableStatus};
pub use update_rule::{Adagrad, Adam, Ftrl, Sgd, UpdateRule};
