//! Groups of threads, for tests: each thread is a rank with wires of its own.
#![allow(dead_code)] // Each test uses a part.

use gradwire_collectives::{Call, Collective, CollectiveError, Communicator, DType, Piece, Settings};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{
    Acceptance, Beside, Config, CreditSettings, Group, GroupSpec, Identity, Link, LinkCosts, MemoryStore, Mesh, PeerId,
    PeerName, Rank, Region, TcpWire, VerbsWire, Wire, WireChoice, WireKind, WorldSize, form_group,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a group under test moves its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// TCP messages.
    Tcp,
    /// TCP messages, in portions that are granted where many ranks send to one.
    Credit,
    /// TCP messages over four connections between each two ranks.
    Lanes,
    /// Messages through shared memory, between each pair.
    Shm,
    /// The segment that all share.
    Segment,
}

/// Runs `body` on every rank of a group of `size` threads and returns what they return, by rank.
pub fn group<T: Send>(size: u32, way: Way, settings: Settings, body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    group_of(size, way, |_| settings.clone(), body)
}

/// The same, where each rank has settings of its own.
pub fn group_of<T: Send>(
    size: u32,
    way: Way,
    settings: impl Fn(Rank) -> Settings,
    body: impl Fn(&Communicator) -> T + Sync,
) -> Vec<T> {
    group_changed(size, way, settings, |group| group, body)
}

/// The same by memory between each two ranks, where those with different numbers in `hosts` take each other for ranks of other hosts,
/// which they reach by TCP.
pub fn group_on_hosts<T: Send>(
    hosts: &[u32],
    settings: impl Fn(Rank) -> Settings,
    body: impl Fn(&Communicator) -> T + Sync,
) -> Vec<T> {
    let change = |group: Group| {
        let here = hosts[group.rank.index()];
        let far = |link: &Link| link.peer.rank.is_some_and(|rank| hosts[rank.index()] != here);
        let told = |link: Link| Link { kind: if far(&link) { WireKind::Tcp } else { link.kind }, ..link };
        Group { links: group.links.into_iter().map(told).collect(), hosts: hosts.to_vec(), ..group }
    };
    group_changed(hosts.len() as u32, Way::Shm, settings, change, body)
}

/// The same in a group that was changed before the ranks talk.
pub fn group_changed<T: Send>(
    size: u32,
    way: Way,
    settings: impl Fn(Rank) -> Settings,
    change: impl Fn(Group) -> Group + Sync,
    body: impl Fn(&Communicator) -> T + Sync,
) -> Vec<T> {
    let store = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(size).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = world_size
            .ranks()
            .map(|rank| {
                let (store, settings, change, body) = (Arc::clone(&store), settings(rank), &change, &body);
                scope.spawn(move || {
                    let tcp = matches!(way, Way::Tcp | Way::Credit | Way::Lanes);
                    let wire = if tcp { WireChoice::Tcp } else { WireChoice::Auto };
                    let lanes = if way == Way::Lanes { 4 } else { 1 };
                    let portions = CreditSettings { loopback: true, marked: true, ..CreditSettings::default() };
                    let credit = (way == Way::Credit).then_some(portions);
                    let config = Config { wire, lanes, credit, ..Config::default() };
                    let spec = GroupSpec { name: "test".into(), rank, world_size, store, config };
                    let group = form_group(spec, Instant::now() + Duration::from_secs(20)).unwrap();
                    let settings = Settings { same_host: way == Way::Segment, ..settings };
                    let communicator = Communicator::new(change(group), "test", settings).unwrap();
                    let result = body(&communicator);
                    communicator.close(Duration::from_secs(5));
                    result
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A buffer of 32-bit floats that may travel.
pub fn floats(values: impl IntoIterator<Item = f32>) -> Arc<Region> {
    Region::from_vec(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// The floats in a buffer.
pub fn values(region: &Arc<Region>) -> Vec<f32> {
    let bytes = region.read(0..region.len()).unwrap();
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

/// A call over whole buffers of 32-bit floats.
pub fn call(collective: Collective, input: &[&Arc<Region>], output: &[&Arc<Region>]) -> Call {
    let pieces = |regions: &[&Arc<Region>]| regions.iter().map(|&region| Piece::whole(Arc::clone(region))).collect();
    Call { collective, dtype: DType::F32, input: pieces(input), output: pieces(output), timeout: None }
}

/// The rank that an error blames.
pub fn blamed(error: &CollectiveError) -> Vec<Rank> {
    match error {
        CollectiveError::RankFailed { ranks, .. } => ranks.iter().map(|member| member.rank).collect(),
        CollectiveError::Timeout { missing, .. } => missing.iter().map(|member| member.rank).collect(),
        CollectiveError::Mismatch { rank, .. } | CollectiveError::NotANumber { rank, .. } => vec![rank.rank],
        CollectiveError::PartsDiffer { sender, receiver, .. } => vec![sender.rank, receiver.rank],
        other => panic!("blames nobody: {other}"),
    }
}

/// One end of a group of two over queue pairs of this process.
pub fn over_verbs(tcp: TcpWire, own: u32, fabric: &Fabric, settings: Settings) -> Communicator {
    let (peer, mut verbs) = (PeerId(1 - own), VerbsWire::new(&Config::default(), Box::new(fabric.adapter())));
    verbs.attach(peer, tcp.name(peer), Instant::now()).unwrap();
    one_of(tcp, verbs, (own, &[0, 1]), settings)
}

/// Runs `body` on every rank of a group of `size` threads, each on a host of its own, over queue pairs of this process.
pub fn group_over_verbs<T: Send>(
    size: u32,
    fabric: &Fabric,
    settings: impl Fn(Rank) -> Settings + Sync,
    body: impl Fn(&Communicator) -> T + Sync,
) -> Vec<T> {
    let hosts: Vec<u32> = (0..size).collect();
    group_over_verbs_on(&hosts, fabric, settings, body)
}

/// The same, where ranks with the same number in `hosts` take each other for ranks of one host, with which they share memory.
pub fn group_over_verbs_on<T: Send>(
    hosts: &[u32],
    fabric: &Fabric,
    settings: impl Fn(Rank) -> Settings + Sync,
    body: impl Fn(&Communicator) -> T + Sync,
) -> Vec<T> {
    let size = hosts.len() as u32;
    let until = Instant::now() + Duration::from_secs(20);
    let identity = |rank| Identity {
        rank: Some(Rank(rank)),
        host: "localhost".to_owned(),
        pid: std::process::id(),
        boot_id: String::new(),
        nonce: u64::from(rank) + 1,
        rdma: false,
        memory: false,
    };
    let new = |rank| {
        let accept = Acceptance::Ranks(WorldSize::new(size).unwrap());
        let mut wire = TcpWire::new(&Config::default(), identity(rank), accept).unwrap();
        let address = wire.listen(([127, 0, 0, 1], 0).into()).unwrap();
        (wire, address)
    };
    let (wires, addresses): (Vec<_>, Vec<_>) = (0..size).map(new).unzip();
    let verbs = connected(size, fabric);
    let run = |rank: u32, mut wire: TcpWire, verbs: VerbsWire| {
        for lower in 0..rank {
            let (address, nonce) = (addresses[lower as usize], u64::from(lower) + 1);
            wire.dial(PeerId(lower), Some(nonce), &[address], until).unwrap();
        }
        let mut done = Vec::new();
        while done.len() < (size - 1 - rank) as usize {
            assert!(Instant::now() < until, "{done:?}");
            wire.park(until);
            wire.poll(Instant::now(), &mut done);
        }
        let communicator = one_of(wire, verbs, (rank, hosts), settings(Rank(rank)));
        let result = body(&communicator);
        communicator.close(Duration::from_secs(5));
        result
    };
    let run = &run;
    std::thread::scope(|scope| {
        let ends = (0..size).zip(wires).zip(verbs);
        let threads: Vec<_> = ends.map(|((rank, tcp), verbs)| scope.spawn(move || run(rank, tcp, verbs))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Wires whose queue pairs are connected: the fabric does not wait for an end that is late.
fn connected(size: u32, fabric: &Fabric) -> Vec<VerbsWire> {
    let new = |_| VerbsWire::new(&Config::default(), Box::new(fabric.adapter()));
    let mut wires: Vec<VerbsWire> = (0..size).map(new).collect();
    let name = |rank| PeerName {
        rank: Some(Rank(rank)),
        host: "localhost".to_owned(),
        pid: std::process::id(),
        address: "loopback".to_owned(),
    };
    for (a, b) in (0..size).flat_map(|b| (0..b).map(move |a| (a, b))) {
        let [from_a, from_b] = [(a, b), (b, a)].map(|(here, there)| {
            let wire = &mut wires[here as usize];
            wire.attach(PeerId(there), name(there), Instant::now()).unwrap();
            wire.next_words().unwrap().1
        });
        wires[a as usize].hear(PeerId(b), from_b, Instant::now());
        wires[b as usize].hear(PeerId(a), from_a, Instant::now());
    }
    wires
}

fn one_of(tcp: TcpWire, verbs: VerbsWire, (own, hosts): (u32, &[u32]), settings: Settings) -> Communicator {
    let size = hosts.len() as u32;
    let peers: Vec<PeerId> = (0..size).filter(|rank| *rank != own).map(PeerId).collect();
    let link = |&peer: &PeerId| {
        let name = PeerName { rank: Some(Rank(peer.0)), ..tcp.name(peer) };
        let is_near = hosts[peer.index()] == hosts[own as usize];
        let kind = if is_near { WireKind::Shm } else { WireKind::Verbs };
        Link { peer: name, kind, reason: "a test".into() }
    };
    let links = peers.iter().map(link).collect();
    let member = |rank| PeerName { rank: Some(Rank(rank)), ..tcp.name(peers[0]) };
    let members = (0..size).map(member).collect();
    let wire = Box::new(Mesh::new(tcp, vec![Box::new(verbs)], peers, Vec::new()));
    let world_size = WorldSize::new(size).unwrap();
    let (hosts, costs) = (hosts.to_vec(), LinkCosts::default());
    let group =
        Group { wire, rank: Rank(own), world_size, members, links, segment: None, hosts, costs, news: Vec::new() };
    Communicator::new(group, "test", settings).unwrap()
}
