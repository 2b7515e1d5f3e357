//! Pure: what can go wrong between two peers, with who, what and the remedy.

use crate::verbs::Fault;
use crate::{PeerName, Tag};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Why a peer is gone.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LossCause {
    /// It said goodbye: it closed the group or the client in good order.
    Goodbye,
    /// It, or we, gave up on purpose and said why.
    Aborted(String),
    /// The connection was closed without a goodbye: the process died.
    Closed,
    /// The connection broke.
    Io(Arc<io::Error>),
    /// It sent something that is not our protocol.
    Protocol(String),
    /// Nothing was heard for this long.
    Silent(Duration),
    /// Its queue pairs failed again and again, and no other wire may take over.
    QueuePair(Arc<Fault>),
}

impl std::fmt::Display for LossCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Goodbye => write!(f, "it left the group in good order while we still needed it"),
            Self::Aborted(reason) => write!(f, "it gave up: {reason}"),
            Self::Closed => write!(f, "its connection closed without a goodbye, so the process has died"),
            Self::Io(error) => write!(f, "its connection broke: {error}"),
            Self::Protocol(what) => write!(f, "it sent what is not gradwire's protocol: {what}"),
            Self::QueuePair(fault) => write!(f, "{fault}"),
            Self::Silent(how_long) => write!(f, "nothing was heard from it for {:.1} s", how_long.as_secs_f64()),
        }
    }
}

/// Everything that can go wrong on a wire. Cheap to clone, since one loss fails many operations.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A peer is gone.
    #[error("lost {peer}: {cause}")]
    PeerLost {
        /// Who.
        peer: Box<PeerName>,
        /// Why.
        cause: LossCause,
    },
    /// A message does not fit the receive that it met.
    #[error(
        "a message of {bytes} bytes from {peer} does not fit the {capacity} bytes posted for it (tag {:#x}): both ends must \
         agree on the size", tag.0
    )]
    MessageTooLong {
        /// Who sent it, or was to receive it.
        peer: Box<PeerName>,
        /// The conversation.
        tag: Tag,
        /// What its sender said with it.
        note: u64,
        /// Length of the message.
        bytes: usize,
        /// Length of the receive.
        capacity: usize,
    },
    /// A bounded queue is full.
    #[error("{queued} operations are already queued for {peer}: complete some before posting more")]
    QueueFull {
        /// Whose queue.
        peer: Box<PeerName>,
        /// How many are queued, the bound.
        queued: usize,
    },
    /// The operation was taken back by its owner.
    #[error("cancelled")]
    Cancelled,
    /// The wire was shut down.
    #[error("the wire is closed")]
    Closed,
    /// No such peer.
    #[error("no peer {0} on this wire")]
    UnknownPeer(u32),
    /// The token does not match.
    #[error("{address} refused: {reason}; give both ends the same GRADWIRE_TOKEN")]
    Authentication {
        /// The other end.
        address: String,
        /// What did not match.
        reason: String,
    },
    /// The ends do not agree on TLS, or one does not trust the other's certificate.
    #[error("{address}: no TLS: {reason}; {remedy}")]
    Tls {
        /// The other end.
        address: String,
        /// What is wrong.
        reason: Box<str>,
        /// What to do about it.
        remedy: Box<str>,
    },
    /// A peer did not come, or did not answer, in time.
    #[error("waited {:.1} s for {what}", waited.as_secs_f64())]
    Timeout {
        /// For what, and from whom.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// Nobody could be reached at any of the addresses.
    #[error("cannot reach {who} at {addresses:?}: {reason}")]
    Unreachable {
        /// Who should be there.
        who: String,
        /// All that were tried.
        addresses: Vec<SocketAddr>,
        /// The last failure.
        reason: String,
    },
    /// What arrived is not a frame of ours, or of a length that we do not take.
    #[error("bad frame from {peer}: {reason}")]
    BadFrame {
        /// Who sent it.
        peer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting cannot be used.
    #[error("{setting}: {reason}")]
    Config {
        /// The setting, by the name that the user gave it by.
        setting: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The operating system refused.
    #[error("{action}: {source}")]
    Io {
        /// What we tried, and on what.
        action: String,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
}

impl TransportError {
    /// The operating system refused `action`.
    pub fn io(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { action: action.into(), source: Arc::new(source.into()) }
    }
}

/// A post that was refused; what was to be posted comes back.
#[derive(Debug)]
pub struct PostError<T> {
    /// Why.
    pub error: TransportError,
    /// What was to be posted.
    pub slice: T,
}

/// Memory could not be made known to a device.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The limit of locked memory is too low.
    #[error("cannot pin {bytes} bytes: raise `ulimit -l` (now {limit_bytes} bytes)")]
    LockedMemoryLimit {
        /// How much was asked.
        bytes: usize,
        /// The limit.
        limit_bytes: u64,
    },
    /// The device refused.
    #[error("cannot register {bytes} bytes with {device}: {source}")]
    Device {
        /// How much was asked.
        bytes: usize,
        /// Which device.
        device: String,
        /// Its answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// The table of exposed memory is full.
    #[error("{limit} memory regions are exposed already: withdraw some")]
    TooMany {
        /// The bound.
        limit: usize,
    },
}
