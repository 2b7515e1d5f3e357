//! Pure: what can go wrong between a client and its servers, with shard, table and the remedy.

use crate::refusal::Refusal;
use gradwire_transport::TransportError;
use std::time::Duration;

/// Everything that can go wrong with a parameter server. Cheap enough to clone: one loss fails many calls.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PsError {
    /// A server is gone, and did not come back in time.
    #[error(
        "lost shard {shard} at {address}: {cause}; its tables are gone with it: start it again, and restore them, or have their workers recover them"
    )]
    ServerLost {
        /// Which shard: its place in the list of addresses.
        shard: u32,
        /// Where it was.
        address: String,
        /// What was seen of its end.
        cause: String,
    },
    /// Another worker recovers the table, so what was asked of it comes to nothing: recover it too.
    #[error("shard {shard} ({address}): {refusal}; recover it, as after a loss")]
    Recovering {
        /// Which shard says so.
        shard: u32,
        /// Where it is.
        address: String,
        /// The table, and who recovers it.
        refusal: Box<Refusal>,
    },
    /// The token does not match.
    #[error("{address} refused us: {reason}; give both ends the same GRADWIRE_TOKEN")]
    Authentication {
        /// The server.
        address: String,
        /// What did not match.
        reason: String,
    },
    /// The server refused a request, and says what it expected and what it got.
    #[error("shard {shard} ({address}): {refusal}")]
    Refused {
        /// Which shard.
        shard: u32,
        /// Where it is.
        address: String,
        /// What it said.
        refusal: Box<Refusal>,
    },
    /// An answer did not come in time.
    #[error("waited {:.1} s for {what}", waited.as_secs_f64())]
    Timeout {
        /// For what.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The caller asked for what cannot be; nothing was sent.
    #[error("{what}: {reason}")]
    Invalid {
        /// What was asked.
        what: String,
        /// Why it cannot be, and what to do.
        reason: String,
    },
    /// A server answered what it should not.
    #[error("shard {shard} at {address} broke the protocol: {reason}; client and servers must be of one version")]
    Protocol {
        /// Which shard.
        shard: u32,
        /// Where it is.
        address: String,
        /// What it did.
        reason: String,
    },
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
    /// The wire could not do what it was asked.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl PsError {
    /// The caller asked for what cannot be.
    pub(crate) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }

    /// What a server would have refused.
    pub(crate) fn of_own_refusal(Refusal { subject, what, expected, got, .. }: Refusal) -> Self {
        Self::invalid(subject, format!("{what}: expected {expected}, got {got}"))
    }
}
