//! Pure: the control plane: who serves which shard, who takes over, and how everybody comes to know.

mod agent;
mod cluster;
mod coordinator;
mod directory;
mod map;
mod right;
mod words;

pub(crate) use agent::{Agent, Line};
pub use cluster::{Cluster, Moves, Processes};
pub use coordinator::{Coordinator, CoordinatorReport, CoordinatorSettings};
pub(crate) use directory::Directory;
pub use map::{ClusterMap, Seating, ShardSeats};
pub(crate) use map::{MAX_REPLICAS, Part as SeatPart};
pub use words::{Join, Sighting};
