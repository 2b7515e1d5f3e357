//! Pure: a group told to people: who, by which wire, why, and how much.

use crate::engine::Engine;
use gradwire_transport::{Link, Rank, Traffic};
use std::fmt;

/// What is known of the way to one rank.
#[derive(Clone, Debug)]
pub struct LinkDescription {
    /// The other rank.
    pub rank: Rank,
    /// Its host.
    pub host: String,
    /// Its process id.
    pub pid: u32,
    /// The wire between us: "tcp", "shm", "verbs".
    pub wire: String,
    /// Why this one.
    pub reason: String,
    /// What has passed over it.
    pub traffic: Traffic,
}

/// A group as it stands.
#[derive(Clone, Debug)]
pub struct Description {
    /// Name of the group.
    pub group: String,
    /// This process's rank.
    pub rank: Rank,
    /// Number of ranks.
    pub world_size: u32,
    /// How collectives travel: by the segment that all ranks share, or by messages over the links, with what those cost.
    pub collectives: String,
    /// Bytes of the users' buffers that went through collectives at the shared segment.
    pub segment_bytes: u64,
    /// How memory of each CUDA device that was used travels.
    pub devices: Vec<String>,
    /// The way to every other rank.
    pub links: Vec<LinkDescription>,
}

impl Description {
    pub(crate) fn new(engine: &Engine, links: &[Link], world: String, devices: Vec<String>) -> Self {
        let links = links
            .iter()
            .filter_map(|link| {
                let rank = link.peer.rank?;
                let (wire, changed) = engine.way(rank);
                let wire = if engine.local.is_some() { link.kind } else { wire };
                Some(LinkDescription {
                    rank,
                    host: link.peer.host.clone(),
                    pid: link.peer.pid,
                    wire: wire.to_string(),
                    reason: changed.unwrap_or_else(|| link.reason.clone()),
                    traffic: engine.traffic(rank),
                })
            })
            .collect();
        let collectives = match &engine.local {
            Some(_) => "one shared segment: all ranks are on this host".to_owned(),
            None if engine.world_size.get() == 1 => "alone: nothing travels".to_owned(),
            None => format!("messages over the links; {world}"),
        };
        Self {
            group: engine.group.clone(),
            rank: engine.rank,
            world_size: engine.world_size.get(),
            collectives,
            segment_bytes: engine.local.as_ref().map_or(0, |local| local.bytes()),
            devices,
            links,
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "group {}: {} of {}", self.group, self.rank, self.world_size)?;
        write!(f, "collectives: {}", self.collectives)?;
        for device in &self.devices {
            write!(f, "\n{device}")?;
        }
        for link in &self.links {
            let Traffic { sent_bytes, received_bytes, .. } = link.traffic;
            write!(
                f,
                "\n{} (host {}, pid {}) by {}: {}; {sent_bytes} bytes sent, {received_bytes} received",
                link.rank, link.host, link.pid, link.wire, link.reason
            )?;
        }
        Ok(())
    }
}
