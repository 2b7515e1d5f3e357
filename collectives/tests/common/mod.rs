//! Groups of threads, for tests: each thread is a rank with wires of its own.
#![allow(dead_code)] // Each test uses a part.

use gradwire_collectives::{Call, Collective, CollectiveError, Communicator, DType, Piece, Settings};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{
    Config, CreditSettings, Group, GroupSpec, Link, LinkCosts, MemoryStore, Mesh, PeerId, PeerName, Rank, Region,
    TcpWire, VerbsWire, Wire, WireChoice, WireKind, WorldSize, form_group,
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
    let store = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(size).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = world_size
            .ranks()
            .map(|rank| {
                let (store, settings, body) = (Arc::clone(&store), settings(rank), &body);
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
                    let communicator = Communicator::new(group, "test", settings).unwrap();
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
        CollectiveError::Mismatch { rank, .. } => vec![rank.rank],
        other => panic!("blames nobody: {other}"),
    }
}

/// One end of a group of two over queue pairs of this process.
pub fn over_verbs(tcp: TcpWire, own: u32, fabric: &Fabric, settings: Settings) -> Communicator {
    let peer = PeerId(1 - own);
    let mut verbs = VerbsWire::new(&Config::default(), Box::new(fabric.adapter()));
    verbs.attach(peer, tcp.name(peer), Instant::now()).unwrap();
    let link = Link { peer: tcp.name(peer), kind: WireKind::Verbs, reason: "a test".into() };
    let member = |rank| PeerName { rank: Some(Rank(rank)), ..tcp.name(peer) };
    let members = [0, 1].map(member).to_vec();
    let wire = Box::new(Mesh::new(tcp, vec![Box::new(verbs)], [peer], Vec::new()));
    let world_size = WorldSize::new(2).unwrap();
    let (hosts, costs) = (vec![0, 1], LinkCosts::default());
    let group = Group {
        wire,
        rank: Rank(own),
        world_size,
        members,
        links: vec![link],
        segment: None,
        hosts,
        costs,
        news: Vec::new(),
    };
    Communicator::new(group, "test", settings).unwrap()
}
