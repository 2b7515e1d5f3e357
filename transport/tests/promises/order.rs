//! Which message meets which receive.

use super::*;
use gradwire_transport::TransportError;

pub fn tags_do_not_wait_for_each_other(make: Make) {
    let mut world = make(&Config { window_bytes: 100_000, ..Config::default() }, 2);
    // Ten times the window, unmatched; then received in the other order.
    for k in 0..50 {
        world.wire(0).post_send(to(1, k, k), filled(k, 20_000).1).unwrap();
    }
    world.settle();
    for k in (0..50).rev() {
        let (target, space) = blank(20_000);
        world.wire(1).post_recv(PeerId(0), Tag(k), space).unwrap();
        drop(world.take(1, 1));
        assert_eq!(&*target.read(0..20_000).unwrap(), &pattern(k, 20_000)[..]);
    }
    assert_eq!(world.take(0, 50).len(), 50);
}

pub fn messages_of_one_tag_keep_their_order(make: Make) {
    let mut world = make(&Config { window_bytes: 64_000, ..Config::default() }, 2);
    let sizes: Vec<usize> = (0..60).map(|k| [10, 40_000, 0, 300_000, 5][k % 5]).collect();
    for (k, &bytes) in (0u64..).zip(&sizes) {
        world.wire(0).post_send(to(1, 7, k), filled(k, bytes).1).unwrap();
        if k % 2 == 0 {
            world.wire(1).post_recv(PeerId(0), Tag(7), blank(300_000).1).unwrap();
        } else {
            world.wire(1).post_recv_loan(PeerId(0), Tag(7), 300_000).unwrap();
        }
    }
    let sent = world.take(0, 60);
    for (k, completion) in (0u64..).zip(&sent) {
        assert!(matches!(completion, Completion::Sent { to, .. } if to.note == k), "{completion:?}");
    }
    for (k, completion) in (0u64..).zip(&world.take(1, 60)) {
        let expected = pattern(k, sizes[k as usize]);
        match completion {
            Completion::Received { from, slice, bytes } => {
                assert_eq!((from.note, &slice[..*bytes]), (k, &expected[..]));
            }
            Completion::Arrived(arrival) => assert_eq!((arrival.from.note, &*arrival.loan), (k, &expected[..])),
            other => panic!("{other:?}"),
        }
    }
}

pub fn empty_messages_pass_a_full_window(make: Make) {
    let mut world = make(&Config { window_bytes: 1000, ..Config::default() }, 2);
    for k in 0..100 {
        world.wire(0).post_send(to(1, k % 3, k), filled(0, 0).1).unwrap();
    }
    world.settle();
    let mut notes = Vec::new();
    for tag in [2, 0, 1] {
        for _ in (0..100).filter(|k| k % 3 == tag) {
            world.wire(1).post_recv(PeerId(0), Tag(tag), blank(0).1).unwrap();
            match &world.take(1, 1)[..] {
                [Completion::Received { from, bytes: 0, .. }] => notes.push(from.note),
                other => panic!("{other:?}"),
            }
        }
    }
    let expected: Vec<u64> = [2, 0, 1].into_iter().flat_map(|tag| (0..100).filter(move |k| k % 3 == tag)).collect();
    assert_eq!(notes, expected);
    assert_eq!(world.take(0, 100).len(), 100);
}

pub fn probe_finds_and_cancel_takes_back(make: Make) {
    let mut world = make(&Config::default(), 2);
    assert_eq!(world.wire(1).probe(Tag(5)), None);
    world.wire(0).post_send(to(1, 5, 77), filled(1, 30).1).unwrap();
    world.wire(0).post_send(to(1, 5, 78), filled(2, 1 << 20).1).unwrap();
    world.settle();
    for (note, bytes) in [(77, 30), (78, 1 << 20)] {
        let found = world.wire(1).probe(Tag(5)).unwrap();
        assert_eq!((found.from.peer, found.from.note, found.bytes), (PeerId(0), note, bytes));
        world.wire(1).post_recv(PeerId(0), Tag(5), blank(bytes).1).unwrap();
        world.take(1, 1);
    }
    assert_eq!(world.wire(1).probe(Tag(5)), None);
    let (target, space) = blank(8);
    world.wire(1).post_recv(PeerId(0), Tag(6), space).unwrap();
    world.wire(1).post_recv_loan(PeerId(0), Tag(6), 8).unwrap();
    world.wire(1).post_recv(PeerId(0), Tag(7), blank(8).1).unwrap();
    world.wire(1).cancel_recvs(PeerId(0), Tag(6));
    let taken_back = world.take(1, 2);
    let cancelled = |completion: &Completion| {
        matches!(completion, Completion::RecvFailed { tag: Tag(6), error: TransportError::Cancelled, .. })
    };
    assert!(taken_back.len() == 2 && taken_back.iter().all(cancelled), "{taken_back:?}");
    drop(taken_back);
    assert!(target.write(0..8).is_ok());
    world.wire(0).post_send(to(1, 7, 1), filled(1, 8).1).unwrap();
    assert!(matches!(&world.take(1, 1)[..], [Completion::Received { .. }]), "the other tag still waits");
}
