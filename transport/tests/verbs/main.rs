//! What every wire promises, on queue pairs of a real device: asked for by name, where there is one.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[macro_use]
#[path = "../promises/mod.rs"]
#[allow(dead_code)] // Other wires' worlds are made elsewhere.
mod promises;
mod groups;
mod warm;

use gradwire_transport::Config;
use gradwire_transport::verbs::VerbsConfig;
use gradwire_transport::verbs::adapter::Adapter;
use gradwire_transport::verbs::device::Device;
use promises::{World, verbs_world};

fn open(config: &VerbsConfig) -> Box<dyn Adapter> {
    Box::new(Device::open(config, &[]).expect("these tests are for a host with an RDMA device").0)
}

fn device(config: &Config, count: u32) -> World {
    verbs_world(config, count, || open(&config.verbs))
}

/// Few slots, three queue pairs a peer.
fn device_lanes(config: &Config, count: u32) -> World {
    let verbs = VerbsConfig { queue_pairs: 3, slots: 4, ..VerbsConfig::default() };
    device(&Config { verbs, ..config.clone() }, count)
}

promises! {
    over_a_device by crate::device;
    over_a_device_with_lanes by crate::device_lanes;
}

mod one_sided_over_a_device {
    use crate::promises::one_sided::{self, OneSidedPair};
    use crate::promises::verbs_wires;
    use gradwire_transport::{Config, VerbsWire};
    use std::time::Instant;

    fn pair() -> OneSidedPair<VerbsWire> {
        let config = Config::default();
        let wires = verbs_wires(&config, 2, || crate::open(&config.verbs));
        let wires = wires.try_into().unwrap_or_else(|_| unreachable!("two wires were asked for"));
        OneSidedPair { wires, done: [Vec::new(), Vec::new()], turn: Box::new(Instant::now) }
    }

    #[test]
    fn puts_and_gets_reach_exposed_memory() {
        one_sided::puts_and_gets_reach_exposed_memory(pair);
    }
}
