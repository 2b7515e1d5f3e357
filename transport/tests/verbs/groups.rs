//! Groups that form over queue pairs: by name on one host, and with the reason told.

use gradwire_transport::{
    Completion, Config, Envelope, Group, GroupSpec, MemoryStore, PeerId, Region, Store, Tag, TransportError,
    WireChoice, WireKind, WorldSize, form_group,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn meet(size: u32, config: &Config) -> Vec<Result<Group, TransportError>> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(size).unwrap();
    std::thread::scope(|scope| {
        let ranks = world_size.ranks().map(|rank| {
            let (store, config) = (Arc::clone(&store), config.clone());
            let spec = GroupSpec { name: "g".to_owned(), rank, world_size, store, config };
            scope.spawn(move || form_group(spec, Instant::now() + PATIENCE))
        });
        ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn by_verbs() -> Config {
    Config { wire: WireChoice::Verbs, ..Config::default() }
}

/// Sends a message to every other rank and receives one from each.
fn greet_all(group: &mut Group) {
    let (rank, others): (u32, Vec<u32>) =
        (group.rank.0, group.world_size.ranks().map(|other| other.0).filter(|&other| other != group.rank.0).collect());
    for &other in &others {
        let region = Region::from_vec(vec![rank as u8; 100_000]);
        let to = Envelope { peer: PeerId(other), tag: Tag(1), note: 0 };
        group.wire.post_send(to, region.read(0..100_000).unwrap()).unwrap();
        group.wire.post_recv(PeerId(other), Tag(1), Region::zeroed(100_000).write(0..100_000).unwrap()).unwrap();
    }
    let (mut done, mut open, until) = (Vec::new(), 2 * others.len(), Instant::now() + PATIENCE);
    while open > 0 {
        assert!(Instant::now() < until, "{open} operations are open");
        group.wire.poll(Instant::now(), &mut done);
        for completion in done.drain(..) {
            match completion {
                Completion::Received { from, slice, bytes: 100_000 } => {
                    assert!(slice.iter().all(|&byte| u32::from(byte) == from.peer.0));
                }
                Completion::Sent { .. } => {}
                other => panic!("{other:?}"),
            }
            open -= 1;
        }
        group.wire.park(Instant::now() + Duration::from_millis(1));
    }
    group.wire.shutdown(Instant::now() + Duration::from_secs(2));
}

#[test]
fn ranks_of_one_host_meet_over_queue_pairs_where_they_are_asked_for() {
    let groups: Vec<Group> = meet(3, &by_verbs()).into_iter().map(Result::unwrap).collect();
    for link in groups.iter().flat_map(|group| &group.links) {
        assert_eq!(link.kind, WireKind::Verbs, "{link:?}");
        assert!(link.reason.contains("rxe0") && link.reason.contains("RoCE v2"), "{link:?}");
    }
}

#[test]
fn a_hundred_groups_start_and_end_cleanly() {
    for round in 0..100 {
        let groups: Vec<Group> = meet(2, &by_verbs()).into_iter().map(Result::unwrap).collect();
        std::thread::scope(|scope| {
            groups.into_iter().for_each(|mut group| {
                scope.spawn(move || greet_all(&mut group));
            });
        });
        // A queue pair, a region or a descriptor that stayed would add up.
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(open < 200, "round {round}: {open} descriptors are open");
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error_by_name_and_a_reason_otherwise() {
    let mut config = by_verbs();
    config.verbs.hca = Some("=nothing9".to_owned());
    for refused in meet(2, &config) {
        let text = refused.err().expect("there is no such device").to_string();
        assert!(text.contains("GRADWIRE_TRANSPORT=verbs") && text.contains("nothing9"), "{text}");
    }
}
