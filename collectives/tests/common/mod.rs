//! Groups of threads, for tests: each thread is a rank with wires of its own.

use gradwire_collectives::{Call, Collective, CollectiveError, Communicator, DType, Piece, Settings};
use gradwire_transport::{Config, GroupSpec, MemoryStore, Rank, Region, WireChoice, WorldSize, form_group};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a group under test moves its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code)]
pub enum Way {
    /// TCP messages.
    Tcp,
    /// Messages through shared memory, between each pair.
    Shm,
    /// The segment that all share.
    Segment,
}

/// Runs `body` on every rank of a group of `size` threads and returns what they return, by rank.
pub fn group<T: Send>(size: u32, way: Way, settings: Settings, body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    let store = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(size).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = world_size
            .ranks()
            .map(|rank| {
                let (store, settings, body) = (Arc::clone(&store), settings.clone(), &body);
                scope.spawn(move || {
                    let wire = if way == Way::Tcp { WireChoice::Tcp } else { WireChoice::Auto };
                    let config = Config { wire, ..Config::default() };
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
#[allow(dead_code)]
pub fn blamed(error: &CollectiveError) -> Vec<Rank> {
    match error {
        CollectiveError::RankFailed { ranks, .. } => ranks.iter().map(|member| member.rank).collect(),
        CollectiveError::Timeout { missing, .. } => missing.iter().map(|member| member.rank).collect(),
        CollectiveError::Mismatch { rank, .. } => vec![rank.rank],
        other => panic!("blames nobody: {other}"),
    }
}
