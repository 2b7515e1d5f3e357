//! What the promises are made with: wires of one process that are each other's peers, and a clock that suits them.

#[macro_use]
pub mod each;
pub mod loans;
pub mod loss;
pub mod messages;
pub mod one_sided;
pub mod order;
pub mod random;
pub mod waiting;

use gradwire_transport::verbs::adapter::Adapter;
use gradwire_transport::verbs::{Fabric, VerbsConfig};
use gradwire_transport::{
    Acceptance, Beside, Completion, Config, CreditSettings, Envelope, FaultPlan, Identity, Mesh, PeerId, PeerName,
    Rank, Region, RegionSlice, RegionSliceMut, ShmOffer, ShmWire, SimNetwork, SimWire, Tag, TcpWire, VerbsWire, Wire,
    WorldSize,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Makes that many wires, each every other's peer: wire i is `PeerId(i)`.
pub type Make = fn(&Config, u32) -> World;

/// Wires, what they have completed, and the time they live in.
pub struct World {
    pub wires: Vec<Option<Box<dyn Wire>>>,
    pub done: Vec<Vec<Completion>>,
    /// The simulator's network and clock, where they are simulated.
    pub simulated: Option<(SimNetwork, Instant)>,
}

impl World {
    pub fn new(wires: Vec<Box<dyn Wire>>, simulated: Option<(SimNetwork, Instant)>) -> Self {
        let done = wires.iter().map(|_| Vec::new()).collect();
        Self { wires: wires.into_iter().map(Some).collect(), done, simulated }
    }

    pub fn now(&self) -> Instant {
        self.simulated.as_ref().map_or_else(Instant::now, |(_, now)| *now)
    }

    pub fn is_simulated(&self) -> bool {
        self.simulated.is_some()
    }

    pub fn wire(&mut self, at: usize) -> &mut dyn Wire {
        &mut **self.wires[at].as_mut().expect("this wire has not been dropped")
    }

    /// Polls every wire once; simulated time moves to the next event.
    pub fn turn(&mut self) {
        if let Some((network, now)) = &mut self.simulated {
            *now = network.next_event().unwrap_or(*now + Duration::from_millis(1)).max(*now);
        }
        let now = self.now();
        for (wire, done) in self.wires.iter_mut().zip(&mut self.done) {
            if let Some(wire) = wire {
                wire.poll(now, done);
            }
        }
    }

    /// Turns until `enough` says so; fails after a while.
    pub fn until(&mut self, mut enough: impl FnMut(&Self) -> bool) {
        let until = self.now() + PATIENCE;
        while !enough(self) {
            self.turn();
            assert!(self.now() < until, "nothing more came: {:?}", self.done);
        }
    }

    /// Turns until wire `at` has completed `count` operations, and takes them.
    pub fn take(&mut self, at: usize, count: usize) -> Vec<Completion> {
        self.until(|world| world.done[at].len() >= count);
        std::mem::take(&mut self.done[at])
    }

    /// Turns for long enough that whatever was going to happen has happened.
    pub fn settle(&mut self) {
        let until = self.now() + Duration::from_millis(30);
        while self.now() < until {
            self.turn();
        }
    }
}

pub fn to(peer: u32, tag: u64, note: u64) -> Envelope {
    Envelope { peer: PeerId(peer), tag: Tag(tag), note }
}

/// Bytes that tell their place and their message.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| (i.wrapping_mul(31).wrapping_add(seed * 7).wrapping_add(i >> 8)) as u8).collect()
}

pub fn filled(seed: u64, bytes: usize) -> (Arc<Region>, RegionSlice) {
    let region = Region::from_vec(pattern(seed, bytes));
    let slice = region.read(0..bytes).unwrap();
    (region, slice)
}

pub fn blank(bytes: usize) -> (Arc<Region>, RegionSliceMut) {
    let region = Region::zeroed(bytes);
    let slice = region.write(0..bytes).unwrap();
    (region, slice)
}

/// Wires over loopback sockets: each calls all before it and is called by all behind it.
pub fn tcp(config: &Config, count: u32) -> World {
    boxed(tcp_wires(config, count))
}

fn boxed<W: Wire + 'static>(wires: Vec<W>) -> World {
    World::new(wires.into_iter().map(|wire| -> Box<dyn Wire> { Box::new(wire) }).collect(), None)
}

fn tcp_wires(config: &Config, count: u32) -> Vec<TcpWire> {
    let accept = Acceptance::Ranks(WorldSize::new(count).unwrap());
    let new = |rank| {
        let identity = Identity {
            rank: Some(Rank(rank)),
            host: "localhost".to_owned(),
            pid: std::process::id(),
            boot_id: String::new(),
            nonce: u64::from(rank) + 1,
            rdma: false,
            memory: false,
        };
        let mut wire = TcpWire::new(config, identity, accept).unwrap();
        let address = wire.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        (wire, address)
    };
    let (wires, addresses): (Vec<_>, Vec<_>) = (0..count).map(new).unzip();
    let deadline = Instant::now() + PATIENCE;
    let connect = |rank: u32, mut wire: TcpWire| {
        for lower in 0..rank {
            let address = addresses[lower as usize];
            wire.dial(PeerId(lower), Some(u64::from(lower) + 1), &[address], deadline).unwrap();
        }
        let mut done = Vec::new();
        while done.len() < (count - 1 - rank) as usize {
            assert!(Instant::now() < deadline, "{done:?}");
            wire.park(deadline);
            wire.poll(Instant::now(), &mut done);
        }
        wire
    };
    let connect = &connect;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..count).zip(wires).map(|(rank, wire)| scope.spawn(move || connect(rank, wire))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub fn tcp_lanes(config: &Config, count: u32) -> World {
    tcp(&Config { lanes: 3, ..config.clone() }, count)
}

/// What comes is granted in portions.
pub fn tcp_credit(config: &Config, count: u32) -> World {
    let credit = CreditSettings { loopback: true, ..CreditSettings::default() };
    tcp(&Config { lanes: 2, credit: Some(credit), ..config.clone() }, count)
}

/// Wires over shared memory, each pair by an offer that is sent as bytes.
pub fn shm(config: &Config, count: u32) -> World {
    boxed(shm_wires(config, count, count))
}

/// The same, and what comes is granted, whole messages at a time.
pub fn shm_credit(config: &Config, count: u32) -> World {
    let credit = CreditSettings { loopback: true, ..CreditSettings::default() };
    shm(&Config { credit: Some(credit), ..config.clone() }, count)
}

/// Sockets for all, and shared memory between the first `near` of them.
fn mesh_world(config: &Config, count: u32, near: u32) -> World {
    let better = shm_wires(config, count, near).into_iter().map(|wire| -> Box<dyn Beside> { Box::new(wire) });
    joined(config, count, better.collect())
}

/// Sockets for all, each with a better wire beside them.
fn joined(config: &Config, count: u32, better: Vec<Box<dyn Beside>>) -> World {
    let others = |rank| (0..count).filter(move |&other| other != rank).map(PeerId);
    let pairs = (0..).zip(tcp_wires(config, count).into_iter().zip(better));
    boxed(pairs.map(|(rank, (tcp, wire))| Mesh::new(tcp, vec![wire], others(rank), Vec::new())).collect())
}

/// Queue pairs of a network within this process.
pub fn verbs_on(fabric: &Fabric, config: &Config, count: u32) -> World {
    verbs_world(config, count, || Box::new(fabric.adapter()))
}

/// Sockets for all, with queue pairs beside them, of a device for each.
pub fn verbs_world(config: &Config, count: u32, open: impl FnMut() -> Box<dyn Adapter>) -> World {
    let wires = verbs_wires(config, count, open).into_iter();
    joined(config, count, wires.map(|wire| -> Box<dyn Beside> { Box::new(wire) }).collect())
}

/// Wires that are connected by each other's proposals.
pub fn verbs_wires(config: &Config, count: u32, mut open: impl FnMut() -> Box<dyn Adapter>) -> Vec<VerbsWire> {
    let name = |rank| PeerName {
        rank: Some(Rank(rank)),
        host: "localhost".to_owned(),
        pid: std::process::id(),
        address: "loopback".to_owned(),
    };
    let mut wires: Vec<_> = (0..count).map(|_| VerbsWire::new(config, open())).collect();
    for (a, b) in (0..count).flat_map(|b| (0..b).map(move |a| (a, b))) {
        let mut proposals = [(a, b), (b, a)].map(|(here, there)| {
            let wire = &mut wires[here as usize];
            wire.attach(PeerId(there), name(there), Instant::now()).unwrap();
            wire.next_words().unwrap().1
        });
        proposals.reverse();
        for ((here, there), words) in [(a, b), (b, a)].into_iter().zip(proposals) {
            wires[here as usize].hear(PeerId(there), words, Instant::now());
            assert!(wires[here as usize].is_up(PeerId(there)));
        }
    }
    wires
}

pub fn verbs(config: &Config, count: u32) -> World {
    verbs_on(&Fabric::default(), config, count)
}

/// Few slots, three queue pairs.
pub fn verbs_lanes(config: &Config, count: u32) -> World {
    let verbs = VerbsConfig { queue_pairs: 3, slots: 4, ..VerbsConfig::default() };
    verbs_on(&Fabric::default(), &Config { verbs, ..config.clone() }, count)
}

/// What comes is granted, whole messages at a time.
pub fn verbs_credit(config: &Config, count: u32) -> World {
    verbs(&Config { credit: Some(CreditSettings::default()), ..config.clone() }, count)
}

/// The same with queue pairs that break now and then.
pub fn breaking_verbs_credit(config: &Config, count: u32) -> World {
    breaking_verbs(&Config { credit: Some(CreditSettings::default()), ..config.clone() }, count)
}

/// Queue pairs that break now and then, and are connected again.
pub fn breaking_verbs(config: &Config, count: u32) -> World {
    let fabric = Fabric::default();
    fabric.fail_at_random(5, 20_000, 2);
    verbs_on(&fabric, config, count)
}

/// Queue pairs that soon break for good, so that sockets take over.
pub fn failing_verbs(config: &Config, count: u32) -> World {
    let fabric = Fabric::default();
    fabric.fail_at_random(3, 100_000, u64::MAX);
    verbs_on(&fabric, config, count)
}

pub fn mesh(config: &Config, count: u32) -> World {
    mesh_world(config, count, count)
}

pub fn mixed_mesh(config: &Config, count: u32) -> World {
    mesh_world(config, count, 2)
}

fn shm_wires(config: &Config, count: u32, near: u32) -> Vec<ShmWire> {
    let name = |rank| PeerName {
        rank: Some(Rank(rank)),
        host: "localhost".to_owned(),
        pid: std::process::id(),
        address: "shared memory".to_owned(),
    };
    let mut wires: Vec<_> = (0..count).map(|_| ShmWire::new(config).unwrap()).collect();
    for (a, b) in (0..near).flat_map(|b| (0..b).map(move |a| (a, b))) {
        let (offer, ours) = wires[a as usize].offer().unwrap();
        let theirs = wires[b as usize].accept(&ShmOffer::decode(&offer.encode()).unwrap()).unwrap();
        wires[a as usize].attach(PeerId(b), name(b), ours).unwrap();
        wires[b as usize].attach(PeerId(a), name(a), theirs).unwrap();
    }
    wires
}

/// Simulated wires, for what only they can do.
pub fn simulate(seed: u64, plan: FaultPlan, config: &Config, count: u32) -> (SimNetwork, Vec<SimWire>, Instant) {
    let start = Instant::now();
    let network = SimNetwork::new(seed, plan, start);
    let wires = network.group(WorldSize::new(count).unwrap(), config);
    (network, wires, start)
}

fn sim_world(plan: FaultPlan, config: &Config, count: u32) -> World {
    let (network, wires, start) = simulate(7, plan, config, count);
    let boxed = wires.into_iter().map(|wire| -> Box<dyn Wire> { Box::new(wire) });
    World::new(boxed.collect(), Some((network, start)))
}

/// A quiet network.
pub fn sim(config: &Config, count: u32) -> World {
    let mut plan = FaultPlan::default();
    plan.link.delay = Duration::from_micros(20);
    plan.link.bytes_per_s = 1_000_000_000;
    sim_world(plan, config, count)
}

/// The same, and what comes is granted in portions.
pub fn sim_credit(config: &Config, count: u32) -> World {
    sim(&Config { credit: Some(CreditSettings::default()), ..config.clone() }, count)
}

/// What comes over the bad one is granted in portions.
pub fn bad_sim_credit(config: &Config, count: u32) -> World {
    bad_sim(&Config { credit: Some(CreditSettings::default()), ..config.clone() }, count)
}

/// A network that loses, doubles and reorders.
pub fn bad_sim(config: &Config, count: u32) -> World {
    let mut plan = FaultPlan::default();
    plan.link.delay = Duration::from_micros(20);
    plan.link.jitter = Duration::from_micros(100);
    plan.link.lost_per_million = 100_000;
    plan.link.twice_per_million = 100_000;
    sim_world(plan, config, count)
}
