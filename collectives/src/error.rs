//! Pure: what can go wrong in a collective, told the same way on every rank.

use crate::verdict::{Member, list_members};
use gradwire_transport::cuda::CudaError;
use gradwire_transport::{Rank, RegisterError, TransportError};
use std::fmt;
use std::time::Duration;

/// Which operation an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What was called, in words: "all_reduce sum of 8 float32".
    pub call: String,
    /// How many collectives the group had begun before it; for sends and receives, the user's tag.
    pub sequence: u64,
    /// Name of the group.
    pub group: String,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (number {} of group {})", self.call, self.sequence, self.group)
    }
}

/// What to do, where `calls` may differ only by who gave split sizes.
fn about_splits(calls: &[&String]) -> &'static str {
    if calls.iter().any(|call| call.starts_with("all_to_all")) {
        ". An all_to_all of CUDA tensors of more than 4 MiB, in and out, goes in parts only where no rank gives split sizes: give them \
         on all ranks, or on none"
    } else {
        ""
    }
}

/// Why a collective, send or receive did not complete.
///
/// After `RankFailed`, `Timeout`, `Mismatch`, `PartsDiffer`, `NotANumber` and `Aborted` of a collective the group is over: every later call fails with
/// the same verdict, on every rank. Close it and form a new one.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Ranks died, or left the group while they were needed.
    #[error("{operation}: {} failed: {cause}. Form a new group without it, or restart it", list_members(ranks))]
    RankFailed {
        /// What was under way.
        operation: Box<Operation>,
        /// Who.
        ranks: Vec<Member>,
        /// What was seen of it.
        cause: String,
    },
    /// Ranks did not come within the deadline.
    #[error(
        "{operation}: Timed out waiting {:.1} s: {}. See what those ranks are doing (a stopped process, an exception, another branch of \
         the program), or raise the timeout", waited.as_secs_f64(),
        if missing.is_empty() { "no rank is missing, but the data did not come".to_owned() }
        else { format!("{} did not come", list_members(missing)) }
    )]
    Timeout {
        /// What was under way.
        operation: Box<Operation>,
        /// Who has not come; nobody where all have but no data moves.
        missing: Vec<Member>,
        /// The deadline that passed.
        waited: Duration,
    },
    /// Ranks called different things.
    #[error(
        "{operation}: {rank} called {got} where the others called {expected}: every rank must make the same calls in the same order{}",
        about_splits(&[expected, got])
    )]
    Mismatch {
        /// What was under way here.
        operation: Box<Operation>,
        /// Who differs.
        rank: Member,
        /// What the others called.
        expected: String,
        /// What it called.
        got: String,
    },
    /// Two ranks do not agree how much goes from one to the other, in a call in which others need not know.
    #[error(
        "{operation}: {sender} gives {sent} elements to {receiver}, which awaits {awaited}: what a rank gives another must be as \
         long as that one's place for it (in all-to-all, input splits of the one and output splits of the other){}",
        about_splits(&[&operation.call])
    )]
    PartsDiffer {
        /// What was under way here.
        operation: Box<Operation>,
        /// Who gives.
        sender: Member,
        /// Who takes.
        receiver: Member,
        /// Elements given.
        sent: u64,
        /// Elements awaited.
        awaited: u64,
    },
    /// A rank gave NaN, and all had asked to look for it.
    #[error(
        "{operation}: {rank} gave NaN (the first is element {element} of what it gave), and nobody took it: look at that rank's loss, \
         gradients and input; GRADWIRE_CHECK_NAN=0 lets it pass"
    )]
    NotANumber {
        /// What was under way here.
        operation: Box<Operation>,
        /// Who.
        rank: Member,
        /// The first, counted over all that it gave.
        element: u64,
    },
    /// The call cannot be carried out; nothing was sent.
    #[error("{call}: {reason}")]
    Invalid {
        /// What was called.
        call: String,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A message from a peer has another length than the receive that was posted for it. The group goes on.
    #[error(
        "recv of {expected_bytes} bytes with tag {tag} from {from}: {got_bytes} bytes came: both ends must agree on the size"
    )]
    WrongLength {
        /// Who sent it.
        from: Rank,
        /// The user's tag.
        tag: u32,
        /// Length of the receive.
        expected_bytes: usize,
        /// Length of the message.
        got_bytes: usize,
    },
    /// The group was aborted by a rank, or closed here.
    #[error("the group is over: {reason}")]
    Aborted {
        /// Who, and why.
        reason: String,
    },
    /// Memory could not be made known to the device.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Memory of a CUDA device could not be used. Where the call was under way, the group is over.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The transport failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
}
