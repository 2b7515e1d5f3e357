//! Pure: what one shard may hold, and how long it lets others wait.

use crate::refusal::{Reason, Refusal};
use std::time::Duration;

/// Who has checkpoints of a shard written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Nobody: its server keeps none.
    #[default]
    Never,
    /// Whoever asks all shards for one.
    WhenAsked,
    /// Who runs the servers asks, too, as often as tables want: those of this place.
    AsWanted {
        /// Which shard it is.
        shard: u32,
        /// Of how many that are asked together.
        shards: u32,
    },
}

/// What one shard may hold.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes in tables and waiting contributions. Default 8 GiB.
    pub memory_bytes: u64,
    /// Bytes of contributions of one client that may wait: it is asked to come again then. Default half of the memory: a
    /// table that fits takes as much itself.
    pub client_bytes: u64,
    /// Tables. Default 65,536.
    pub tables: usize,
    /// Clients known at once; those long gone make room. Default 4,096.
    pub clients: usize,
    /// Requests of all clients that may wait on one part of a table, so that nobody fills the memory by asking. Default 65,536.
    pub waiting: usize,
    /// Copies of the shard that its cluster keeps beside the first. Default 0.
    pub replicas: u32,
    /// Whether its server keeps checkpoints, and who asks for them. Set by the server.
    pub checkpoints: Checkpointing,
    /// The longest that a request may wait for other workers. Default 1 h; clients ask for less.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 8 << 30,
            client_bytes: 4 << 30,
            tables: 1 << 16,
            clients: 4096,
            waiting: 1 << 16,
            replicas: 0,
            checkpoints: Checkpointing::Never,
            patience: Duration::from_secs(3600),
        }
    }
}

/// Checks that one more request may wait.
pub(super) fn check_waiting(waiting: usize, subject: impl Fn() -> String, limits: &Limits) -> Result<(), Refusal> {
    if waiting < limits.waiting {
        return Ok(());
    }
    let expected = format!("at most {}", limits.waiting);
    Err(Refusal::new(Reason::Limit, subject(), "requests that wait", expected, waiting + 1))
}
