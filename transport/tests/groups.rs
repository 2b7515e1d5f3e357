//! Groups of threads that meet at every kind of store, and what is said when somebody does not come.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_transport::{
    Config, FileStore, Group, GroupSpec, MemoryStore, Rank, Store, TcpStore, TransportError, WireChoice, WireKind,
    WorldSize, form_group, open_store,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn spec(store: &Arc<dyn Store>, rank: Rank, world_size: WorldSize, config: Config) -> GroupSpec {
    GroupSpec { name: "g".to_owned(), rank, world_size, store: Arc::clone(store), config }
}

/// Forms a group of `size` threads; `store_of` opens each rank's way to the store.
fn meet(size: u32, config: &Config, store_of: impl Fn(Rank) -> Arc<dyn Store> + Sync) -> Vec<Group> {
    let world_size = WorldSize::new(size).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = world_size
            .ranks()
            .map(|rank| {
                let (config, store_of) = (config.clone(), &store_of);
                scope.spawn(move || {
                    form_group(spec(&store_of(rank), rank, world_size, config), Instant::now() + PATIENCE).unwrap()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn assert_complete(groups: &[Group], kind: WireKind) {
    for (rank, group) in (0u32..).zip(groups) {
        assert_eq!((group.rank, group.members.len(), group.links.len()), (Rank(rank), groups.len(), groups.len() - 1));
        assert_eq!(group.segment.is_some(), kind == WireKind::Shm && groups.len() > 1, "rank {rank}");
        for link in &group.links {
            assert_eq!(link.kind, kind, "{link:?}");
            assert_eq!(link.peer.pid, std::process::id());
            assert!(!link.reason.is_empty());
        }
    }
}

#[test]
fn ranks_meet_at_every_kind_of_store() {
    let memory: Arc<dyn Store> = Arc::new(MemoryStore::default());
    assert_complete(&meet(5, &Config::default(), |_| Arc::clone(&memory)), WireKind::Shm);

    let folder = std::env::temp_dir().join(format!("gradwire-groups-{}", std::process::id()));
    assert_complete(&meet(3, &Config::default(), |_| Arc::new(FileStore::new(&folder).unwrap())), WireKind::Shm);
    std::fs::remove_dir_all(&folder).unwrap();

    let served = Arc::new(TcpStore::serve(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap());
    let port = served.address().port();
    let store_of = |rank: Rank| -> Arc<dyn Store> {
        if rank == Rank(0) { Arc::clone(&served) as _ } else { Arc::new(TcpStore::client("localhost", port).unwrap()) }
    };
    let tcp = Config { wire: WireChoice::Tcp, lanes: 2, ..Config::default() };
    assert_complete(&meet(4, &tcp, store_of), WireKind::Tcp);
}

#[test]
fn a_group_of_one_needs_nobody() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let groups = meet(1, &Config::default(), |_| Arc::clone(&store));
    assert!(groups[0].links.is_empty() && groups[0].segment.is_none());
}

#[test]
fn who_does_not_come_is_named_with_what_to_look_at() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(3).unwrap();
    let deadline = Instant::now() + Duration::from_millis(300);
    let refused = |rank: u32| {
        let formed = form_group(spec(&store, Rank(rank), world_size, Config::default()), deadline);
        formed.err().expect("nobody else has come").to_string()
    };
    let (first, last) = std::thread::scope(|scope| {
        let first = scope.spawn(|| refused(0));
        (refused(2), first.join().unwrap())
    });
    for text in [first, last] {
        assert!(text.contains("rank 1") && text.contains("GRADWIRE_SOCKET_IFNAME"), "{text}");
    }
}

#[test]
fn the_address_of_a_dead_attempt_is_passed_over() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    // What a killed rank 0 left: an address at which nobody listens any more, and a nonce that nobody has.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let home = gradwire_transport::home();
    let (host, boot, net) = (home.host, home.boot_id, home.net_namespace);
    let stale = format!("gradwire 1\n{host}\n{boot}\n{net}\n1\n12345\n{gone}\n");
    store.set("gradwire/g/0", stale.as_bytes()).unwrap();
    let world_size = WorldSize::new(2).unwrap();
    std::thread::scope(|scope| {
        let one =
            scope.spawn(|| form_group(spec(&store, Rank(1), world_size, Config::default()), Instant::now() + PATIENCE));
        // Rank 1 has found the stale record by the time it has left its own.
        store.get("gradwire/g/1", Instant::now() + PATIENCE).unwrap();
        let zero = form_group(spec(&store, Rank(0), world_size, Config::default()), Instant::now() + PATIENCE).unwrap();
        assert_complete(&[zero, one.join().unwrap().unwrap()], WireKind::Shm);
    });
}

#[test]
fn two_processes_with_one_rank_are_told_so() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(3).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let errors: Vec<Option<TransportError>> = std::thread::scope(|scope| {
        let ranks = [0, 1, 1].map(|rank| {
            let spec = spec(&store, Rank(rank), world_size, Config::default());
            scope.spawn(move || form_group(spec, deadline).err())
        });
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let texts: Vec<String> = errors.iter().flatten().map(ToString::to_string).collect();
    assert!(texts.iter().any(|text| text.contains("two processes were started with one rank")), "{texts:?}");
    assert_eq!(texts.len(), 3, "nobody takes the group for complete");
}

#[test]
fn another_token_is_told_to_whoever_calls() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let world_size = WorldSize::new(2).unwrap();
    let config = |token: &str| Config { token: Some(token.to_owned()), ..Config::default() };
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| {
            form_group(spec(&store, Rank(0), world_size, config("a")), Instant::now() + Duration::from_secs(2))
        });
        let one = form_group(spec(&store, Rank(1), world_size, config("b")), Instant::now() + PATIENCE);
        assert!(matches!(one.err(), Some(TransportError::Authentication { .. })));
        assert!(zero.join().unwrap().is_err());
    });
}

#[test]
fn urls_and_environments_are_read_as_launchers_write_them() {
    let none = |_: &str| None;
    let folder = std::env::temp_dir().join(format!("gradwire-url-{}", std::process::id()));
    let url = format!("file://{}?rank=1&world_size=4", folder.display());
    let (_, rank, size) = open_store(&url, None, None, &none).unwrap();
    assert_eq!((rank, size.get()), (Rank(1), 4));
    std::fs::remove_dir_all(&folder).unwrap();
    let slurm = |name: &str| match name {
        "SLURM_PROCID" => Some("2".to_owned()),
        "SLURM_NTASKS" => Some("3".to_owned()),
        "MASTER_ADDR" => Some("127.0.0.1".to_owned()),
        "MASTER_PORT" => Some("29500".to_owned()),
        _ => None,
    };
    let (_, rank, size) = open_store("env://", None, None, &slurm).unwrap();
    assert_eq!((rank, size.get()), (Rank(2), 3));
    for (url, said) in [
        ("env://", "RANK"),
        ("nonsense", "not a URL"),
        ("http://x?rank=0&world_size=1", "env://"),
        ("tcp://127.0.0.1?rank=0&world_size=1", "port"),
        ("tcp://127.0.0.1:1?rank=5&world_size=2", "group of 2"),
    ] {
        let refused = open_store(url, None, None, &none).err().expect(url).to_string();
        assert!(refused.contains(said), "{url}: {refused}");
    }
}

#[test]
fn many_stores_write_one_folder_at_once() {
    let folder = std::env::temp_dir().join(format!("gradwire-drafts-{}", std::process::id()));
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let folder = &folder;
            scope.spawn(move || {
                for number in 0..500 {
                    FileStore::new(folder).unwrap().set(&format!("{writer}"), format!("{number}").as_bytes()).unwrap();
                }
            });
        }
    });
    let store = FileStore::new(&folder).unwrap();
    for writer in 0..4 {
        assert_eq!(store.get(&format!("{writer}"), Instant::now() + PATIENCE).unwrap(), b"499");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
