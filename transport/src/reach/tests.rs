//! Both ends in one process, over sockets and over queue pairs within the process.

use super::calling::{Calling, Order, PEER};
use super::serving::{Serving, Wish};
use super::*;
use crate::verbs::Fabric;
use crate::{
    Completion, Config, Envelope, Mesh, PeerId, Region, TcpWire, TransportError, VerbsWire, Wire, WireChoice, WireKind,
    tcp,
};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| ((at + seed) * 31 % 251) as u8).collect()
}

fn whole(region: &Arc<Region>) -> Local {
    Local { region: Arc::clone(region), range: 0..region.len() }
}

fn bytes(region: &Arc<Region>) -> Vec<u8> {
    region.read(0..region.len()).unwrap().to_vec()
}

fn ends(fabric: Option<&Fabric>) -> (Exposer, Accessor) {
    let wire = if fabric.is_some() { WireChoice::Verbs } else { WireChoice::Tcp };
    let config = Config { wire, token: Some("t".into()), ..Config::default() };
    let device = || fabric.map(|fabric| (VerbsWire::new(&config, Box::new(fabric.adapter())), "a fabric".to_owned()));
    let exposer = Exposer::over(&config, device()).unwrap();
    let accessor = Accessor::over(&config, device(), exposer.url(), Instant::now() + LONG).unwrap();
    let kind = if fabric.is_some() { WireKind::Verbs } else { WireKind::Tcp };
    assert_eq!(accessor.wire().0, kind);
    (exposer, accessor)
}

fn expose(exposer: &Exposer, region: &Arc<Region>) -> RemoteMemory {
    exposer.expose(Arc::clone(region), LONG).unwrap()
}

fn finish(access: Result<Access, TransportError>) -> Result<(), TransportError> {
    access?.wait(LONG).expect("it ends")
}

fn reads_and_writes(fabric: Option<&Fabric>) {
    let (exposer, accessor) = ends(fabric);
    let memory = Region::zeroed(10 << 20);
    let remote = expose(&exposer, &memory);
    let remote = RemoteMemory::decode(&remote.encode()).unwrap();
    for (offset, length) in [(0, 0), (7, 1), (1000, 70_000), (5, 9 << 20), (0, 10 << 20)] {
        let part = remote.part(offset, length as u64).unwrap();
        finish(accessor.put(whole(&Region::from_vec(pattern(length, length))), part)).unwrap();
        let back = Region::zeroed(length);
        finish(accessor.get(whole(&back), part)).unwrap();
        assert_eq!(bytes(&back), pattern(length, length));
        let first = offset as usize;
        assert_eq!(bytes(&memory)[first..first + length], pattern(length, length));
    }
    let many: Vec<_> = (0..100)
        .map(|at| {
            let own = Region::from_vec(pattern(at, 10_000));
            accessor.put(whole(&own), remote.part(10_000 * at as u64, 10_000).unwrap()).unwrap()
        })
        .collect();
    many.iter().for_each(|access| access.wait(LONG).unwrap().unwrap());
    assert!((0..100).all(|at| bytes(&memory)[10_000 * at..10_000 * (at + 1)] == pattern(at, 10_000)));
    assert!(exposer.withdraw(remote, LONG));
    let refused = finish(accessor.put(whole(&Region::zeroed(10)), remote.part(0, 10).unwrap())).unwrap_err();
    assert!(refused.to_string().contains("exposed"), "{refused}");
}

#[test]
fn memory_is_read_and_written_by_messages() {
    reads_and_writes(None);
}

#[test]
fn memory_is_read_and_written_by_the_device() {
    let fabric = Fabric::default();
    reads_and_writes(Some(&fabric));
    assert!(fabric.messages() > 100 && fabric.not_ready() == 0);
    assert_eq!(fabric.queue_pairs(), 0, "nothing stays");
    let (exposer, accessor) = ends(Some(&fabric));
    let before = fabric.registrations();
    let (memory, own) = (Region::zeroed(100), Region::zeroed(100));
    let remote = expose(&exposer, &memory);
    for _ in 0..3 {
        finish(accessor.put(whole(&own), remote)).unwrap();
        assert_eq!(fabric.registrations(), before + 2, "each end registers its memory once");
    }
    assert!(exposer.withdraw(remote, LONG));
    accessor.forget(own);
    let until = Instant::now() + LONG;
    while fabric.registrations() > before {
        assert!(Instant::now() < until, "{} registrations", fabric.registrations());
        std::thread::yield_now();
    }
}

#[test]
fn an_access_outside_of_exposed_memory_ends_the_connection_and_no_other() {
    let fabric = Fabric::default();
    for fabric in [None, Some(&fabric)] {
        let (exposer, accessor) = ends(fabric);
        let memory = Region::from_vec(pattern(1, 5000));
        let remote = expose(&exposer, &memory);
        let own = Region::zeroed(100);
        let config = Config { wire: WireChoice::Tcp, token: Some("t".into()), ..Config::default() };
        let other = Accessor::over(&config, None, exposer.url(), Instant::now() + LONG).unwrap();
        let forged = RemoteMemory { offset: 4950, bytes: 100, ..remote };
        let text = finish(accessor.put(whole(&own), forged)).unwrap_err().to_string();
        assert!(text.contains("exposed"), "{text}");
        let again = finish(accessor.get(whole(&own), remote.part(0, 100).unwrap())).unwrap_err().to_string();
        assert_eq!(again, text, "the connection is over");
        finish(other.get(whole(&own), remote.part(100, 100).unwrap())).unwrap();
        assert_eq!(bytes(&own), pattern(101, 100));
        assert_eq!(bytes(&memory), pattern(1, 5000), "nothing was written");
    }
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_sent() {
    let (exposer, accessor) = ends(None);
    let (memory, own) = (Region::zeroed(100), Region::zeroed(50));
    let remote = expose(&exposer, &memory);
    let longer = accessor.put(whole(&own), remote).unwrap_err().to_string();
    assert!(longer.contains("50 bytes of ours do not fit 100"), "{longer}");
    let stranger = RemoteMemory { owner: 5, bytes: 50, ..remote };
    let stranger = accessor.get(whole(&own), stranger).unwrap_err().to_string();
    assert!(stranger.contains("not that of"), "{stranger}");
    let held = own.write(0..1).unwrap();
    let busy = finish(accessor.get(whole(&own), remote.part(0, 50).unwrap())).unwrap_err().to_string();
    assert!(busy.contains("in use"), "{busy}");
    drop(held);
    finish(accessor.get(whole(&own), remote.part(0, 50).unwrap())).unwrap();
    let unknown = Accessor::connect(&Config::default(), b"elsewhere", Instant::now()).err().unwrap().to_string();
    assert!(unknown.contains("bind()"), "{unknown}");
    let config = Config { wire: WireChoice::Tcp, token: Some("other".into()), ..Config::default() };
    let strange = Accessor::over(&config, None, exposer.url(), Instant::now() + LONG).err().unwrap();
    assert!(matches!(strange, TransportError::Authentication { .. }), "{strange}");
}

#[test]
fn either_end_may_go_and_the_other_is_told() {
    for by_device in [false, true] {
        let fabric = Fabric::default();
        let (exposer, accessor) = ends(Some(&fabric).filter(|_| by_device));
        let memory = Region::zeroed(100);
        let remote = expose(&exposer, &memory);
        exposer.close(LONG);
        assert_eq!(exposer.expose(Arc::clone(&memory), LONG).unwrap_err().map(|error| error.to_string()), None);
        let gone = finish(accessor.get(whole(&Region::zeroed(100)), remote)).unwrap_err();
        assert!(matches!(gone, TransportError::PeerLost { .. }), "{gone}");
        let (exposer, accessor) = ends(Some(&fabric).filter(|_| by_device));
        let remote = expose(&exposer, &memory);
        let last = accessor.put(whole(&Region::from_vec(vec![9; 100])), remote).unwrap();
        accessor.close(LONG);
        last.wait(Duration::ZERO).expect("closing waits for it").unwrap();
        assert!(matches!(accessor.lost(), Some(TransportError::Closed | TransportError::PeerLost { .. })));
        assert!(matches!(accessor.get(whole(&memory), remote).unwrap_err(), TransportError::Closed));
        assert_eq!(bytes(&memory), [9; 100]);
    }
}

#[test]
fn accesses_to_the_same_bytes_take_turns() {
    let (exposer, first) = ends(None);
    let config = Config { wire: WireChoice::Tcp, token: Some("t".into()), ..Config::default() };
    let second = Accessor::over(&config, None, exposer.url(), Instant::now() + LONG).unwrap();
    let memory = Region::zeroed(1 << 20);
    let remote = expose(&exposer, &memory);
    let fill = |value: u8| Region::from_vec(vec![value; 1 << 20]);
    let all: Vec<_> =
        (0..20u8).map(|at| if at % 2 == 0 { &first } else { &second }.put(whole(&fill(at)), remote).unwrap()).collect();
    all.iter().for_each(|access| access.wait(LONG).unwrap().unwrap());
    let end = bytes(&memory);
    assert!(end.iter().all(|&byte| byte == end[0]), "never two at once");
}

#[test]
fn who_breaks_the_rules_is_turned_away() {
    let (exposer, accessor) = ends(None);
    let config = Config { wire: WireChoice::Tcp, token: Some("t".into()), ..Config::default() };
    let record = crate::rendezvous::Record::decode(exposer.url()).unwrap();
    let identity = crate::Identity {
        rank: None,
        host: "h".into(),
        pid: 1,
        boot_id: String::new(),
        nonce: 3,
        rdma: false,
        memory: false,
    };
    for junk in [&[0xff; 26][..], &[][..]] {
        let mut stranger = TcpWire::new(&config, identity.clone(), crate::Acceptance::Nobody).unwrap();
        stranger.dial(PEER, None, &record.addresses_from(&crate::home()), Instant::now() + LONG).unwrap();
        let mut loan = stranger.lend(PEER, junk.len()).unwrap();
        loan.copy_from_slice(junk);
        stranger.post_loan(Envelope { peer: PEER, tag: ASK, note: 0 }, loan).unwrap();
        let (mut done, until) = (Vec::new(), Instant::now() + LONG);
        while !done.iter().any(
            |one| matches!(one, Completion::PeerDown { error, .. } if error.to_string().contains("makes no sense")),
        ) {
            assert!(Instant::now() < until, "{done:?}");
            stranger.poll(Instant::now(), &mut done);
            stranger.park(Instant::now() + Duration::from_millis(50));
        }
    }
    let remote = expose(&exposer, &Region::zeroed(10));
    finish(accessor.put(whole(&Region::zeroed(10)), remote)).unwrap();
}

#[test]
fn what_a_broken_device_has_not_done_is_done_by_messages() {
    let fabric = Fabric::default();
    let (a, b) = tcp::pair(&Config::default(), &Config::default()).unwrap();
    let mesh = |tcp: TcpWire, peer: PeerId| {
        let mut verbs = VerbsWire::new(&Config::default(), Box::new(fabric.adapter()));
        verbs.attach(peer, tcp.name(peer), Instant::now()).unwrap();
        Mesh::new(tcp, vec![Box::new(verbs)], [peer], Vec::new())
    };
    // Rank 0 exposes, so that it is the caller's peer 0.
    let (mut serving, mut calling) = (Serving::new(mesh(a, PeerId(1)), 7), Calling::new(mesh(b, PEER)));
    serving.take(Completion::PeerUp(PeerId(1)));
    let memory = Region::zeroed(1 << 20);
    let (answer, told) = sync_channel(1);
    serving.grant(Wish::Expose(Arc::clone(&memory), answer));
    let remote = told.try_recv().unwrap().unwrap();
    let mut finish = |is_put, region: &Arc<Region>| {
        let access = Access::default();
        let (region, range) = (Arc::clone(region), 0..region.len());
        calling.begin(Order { is_put, region, range, remote, access: access.clone() });
        let until = Instant::now() + LONG;
        while !access.is_done() {
            assert!(Instant::now() < until, "{access:?}");
            serving.turn();
            calling.turn();
            calling.tell();
        }
        (access.wait(Duration::ZERO).unwrap(), calling.mesh.kind(PEER))
    };
    let own = Region::from_vec(pattern(1, 1 << 20));
    assert!(matches!(finish(true, &own), (Ok(()), WireKind::Verbs)));
    fabric.go_down();
    let back = Region::zeroed(1 << 20);
    assert!(matches!(finish(false, &back), (Ok(()), WireKind::Tcp)));
    assert_eq!(bytes(&back), pattern(1, 1 << 20));
}

#[test]
fn who_hears_of_a_failed_access_finds_the_peer_lost() {
    let (a, b) = tcp::pair(&Config::default(), &Config::default()).unwrap();
    let mut calling = Calling::new(Mesh::new(b, Vec::new(), [PEER], Vec::new()));
    let (region, access) = (Region::zeroed(100), Access::default());
    let remote = RemoteMemory { owner: 7, key: 1, device: 0, offset: 0, bytes: 100 };
    calling.begin(Order { is_put: false, region, range: 0..100, remote, access: access.clone() });
    drop(a);
    let until = Instant::now() + LONG;
    while calling.under_way() > 0 {
        assert!(Instant::now() < until, "{access:?}");
        calling.turn();
    }
    assert!(!access.is_done() && calling.lost().is_some(), "its end is not told before its cause can be seen");
    calling.tell();
    assert!(access.wait(Duration::ZERO).unwrap().is_err());
}
