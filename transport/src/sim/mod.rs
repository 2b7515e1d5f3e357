//! Does: a wire in virtual time between peers of one process, with delay, loss, duplicates, partitions, slow and dead
//! peers, all drawn from a seed: the same seed, plan and calls give the same events at the same instants.
//!
//! Time is what `poll` is given; nothing sleeps. A driver polls every wire, and where nothing comes of it jumps its clock
//! to [`SimNetwork::next_event`]. Frames that are lost or overtaken are sent again and put in order by the wire itself, so
//! that it promises what every wire promises. A message is delivered whether its receiver polls or not, as a network card
//! would; and, with [`Config::credit`](crate::Config), large ones come as the receiver grants them, in portions.

mod core;
mod granting;
mod journey;
mod link;
#[cfg(test)]
mod many_to_one;
mod plan;
mod random;
mod wire;

pub use plan::{Death, FaultPlan, LinkPlan, Manner, Moment, Partition, Slow};
pub use wire::SimWire;

use self::core::Core;
use crate::{Config, PeerId, WorldSize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A simulated network. Clones are the same network.
#[derive(Clone)]
pub struct SimNetwork {
    core: Arc<Mutex<Core>>,
}

impl SimNetwork {
    /// A network without peers, whose time begins at `start`.
    pub fn new(seed: u64, plan: FaultPlan, start: Instant) -> Self {
        Self { core: Arc::new(Mutex::new(Core::new(seed, plan, start))) }
    }

    /// The wire of `me`, connected to every peer that is there; those see `Completion::PeerUp`.
    ///
    /// # Panics
    /// If `me` is there already.
    pub fn wire(&self, me: PeerId, config: &Config) -> SimWire {
        self.core().join(me, config, true);
        SimWire::new(me, Arc::clone(&self.core))
    }

    /// The wires of a group, rank i being peer i, connected each to each.
    ///
    /// # Panics
    /// If one of them is there already.
    pub fn group(&self, world_size: WorldSize, config: &Config) -> Vec<SimWire> {
        let join = |me: PeerId| {
            self.core().join(me, config, false);
            SimWire::new(me, Arc::clone(&self.core))
        };
        world_size.ranks().map(PeerId::from).map(join).collect()
    }

    /// When something happens next, if anything does: a driver may set its clock to it.
    pub fn next_event(&self) -> Option<Instant> {
        self.core().next_event()
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
