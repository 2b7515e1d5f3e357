//! Pure: who is at the other end of a wire, and which conversation a message belongs to.

use crate::Rank;
use std::fmt;

/// A wire's own handle of a peer. In a group it equals the rank; a server counts its clients upwards and never reuses one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

impl PeerId {
    /// The peer as an index into a table.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl Tag {
    /// Set in the tags of control messages, which always go over TCP.
    pub const CONTROL_BIT: u64 = 1 << 63;
}

impl From<Rank> for PeerId {
    fn from(rank: Rank) -> Self {
        Self(rank.0)
    }
}

/// Which conversation between two peers a message belongs to.
///
/// Between one pair of peers the k-th message sent with a tag meets the k-th receive posted with it; messages of
/// different tags do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// A peer as a person knows it: what an error must name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerName {
    /// Its rank, where it is a member of a group.
    pub rank: Option<Rank>,
    /// Its host name, as it told us in the hello; the address while it has not.
    pub host: String,
    /// Its process id on that host; 0 while unknown.
    pub pid: u32,
    /// The address by which we reached it, or it reached us.
    pub address: String,
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "{rank} (")?,
            None => write!(f, "peer (")?,
        }
        write!(f, "host {}, pid {}, {})", self.host, self.pid, self.address)
    }
}
