//! Pure: what goes wrong in a simulated network, and when. Times count from the network's start.

use crate::PeerId;
use std::time::Duration;

/// Everything that is planned. The default is a perfect network: no delay, no loss, nobody dies.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    /// Every way from one peer to another, but for `links`.
    pub link: LinkPlan,
    /// The ways that are otherwise: from whom, to whom, how.
    pub links: Vec<(PeerId, PeerId, LinkPlan)>,
    /// Times in which some peers do not reach the others.
    pub partitions: Vec<Partition>,
    /// Times in which a peer is slow.
    pub slow: Vec<Slow>,
    /// Deaths of peers.
    pub deaths: Vec<Death>,
}

/// One way from a peer to another.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkPlan {
    /// Time from one end to the other.
    pub delay: Duration,
    /// Up to this much more, drawn for each frame: frames overtake each other.
    pub jitter: Duration,
    /// Bytes per second; 0: without limit.
    pub bytes_per_s: u64,
    /// Frames lost of a million. The sender sends them again.
    pub lost_per_million: u32,
    /// Frames that arrive twice, of a million.
    pub twice_per_million: u32,
}

/// For a time nothing passes between `side` and the rest. Longer than `Config::timeout`, both sides give each other up.
#[derive(Clone, Debug)]
pub struct Partition {
    /// When it begins.
    pub from: Duration,
    /// When it ends.
    pub until: Duration,
    /// One side of it.
    pub side: Vec<PeerId>,
}

/// For a time everything from and to a peer takes longer.
#[derive(Clone, Copy, Debug)]
pub struct Slow {
    /// Who.
    pub peer: PeerId,
    /// When it begins.
    pub from: Duration,
    /// When it ends.
    pub until: Duration,
    /// How much longer.
    pub extra: Duration,
}

/// The end of a peer.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    /// Who.
    pub peer: PeerId,
    /// When.
    pub moment: Moment,
    /// How.
    pub manner: Manner,
}

/// A moment in the life of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// At this time.
    At(Duration),
    /// Instead of sending its message of this number, counted from 0.
    Message(u64),
}

/// How a peer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Manner {
    /// The process is killed: its host closes the connections, and the others hear of it.
    Killed,
    /// The host vanishes: the others hear nothing, and give it up after `Config::timeout`.
    Silent,
}

impl FaultPlan {
    /// The way from `from` to `to`.
    pub(super) fn link(&self, from: PeerId, to: PeerId) -> LinkPlan {
        let own = self.links.iter().find(|(a, b, _)| (*a, *b) == (from, to));
        own.map_or(self.link, |(_, _, link)| *link)
    }

    /// Whether nothing passes between `a` and `b` at `time`.
    pub(super) fn is_cut(&self, a: PeerId, b: PeerId, time: Duration) -> bool {
        self.partitions.iter().any(|cut| cut.from <= time && time < cut.until && cut.parts(a, b))
    }

    /// How much longer things take between `a` and `b` at `time`.
    pub(super) fn extra(&self, a: PeerId, b: PeerId, time: Duration) -> Duration {
        let slow = self.slow.iter().filter(|slow| slow.peer == a || slow.peer == b);
        slow.filter(|slow| slow.from <= time && time < slow.until).map(|slow| slow.extra).sum()
    }
}

impl Partition {
    /// Whether it stands between `a` and `b`.
    pub(super) fn parts(&self, a: PeerId, b: PeerId) -> bool {
        self.side.contains(&a) != self.side.contains(&b)
    }
}
