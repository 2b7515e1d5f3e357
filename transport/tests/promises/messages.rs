//! A message arrives whole, or both ends hear why not.

use super::*;
use gradwire_transport::TransportError;

pub fn messages_of_every_size_arrive_whole(make: Make) {
    let mut world = make(&Config::default(), 2);
    let sizes: Vec<usize> = (0..=8)
        .chain([31, 32, 33, 47, 48, 49, 63, 64, 65, 4095, 4096, 4097, 65_535, 65_536, 65_537, 262_143, 262_145])
        .chain([524_288, 524_289, 1 << 20, 8 << 20, (8 << 20) + 3])
        .collect();
    for (k, &bytes) in (0u64..).zip(&sizes) {
        let (source, slice) = filled(k, bytes);
        let (target, space) = blank(bytes);
        world.wire(1).post_recv(PeerId(0), Tag(k), space).unwrap();
        world.wire(0).post_send(to(1, k, k + 100), slice).unwrap();
        let (sent, received) = (world.take(0, 1), world.take(1, 1));
        assert!(matches!(&sent[..], [Completion::Sent { to, .. }] if to.tag == Tag(k)), "{sent:?}");
        match &received[..] {
            [Completion::Received { from, bytes: got, .. }] => {
                assert_eq!((from.peer, from.tag, from.note, *got), (PeerId(0), Tag(k), k + 100, bytes));
            }
            other => panic!("{other:?}"),
        }
        drop((sent, received));
        assert_eq!(&*target.read(0..bytes).unwrap(), &pattern(k, bytes)[..], "{bytes} bytes");
        assert!(source.write(0..bytes).is_ok() && target.write(0..bytes).is_ok(), "the slices came back");
    }
    let total: u64 = sizes.iter().map(|&bytes| bytes as u64).sum();
    let (sent, received) = (world.wire(0).traffic(PeerId(1)), world.wire(1).traffic(PeerId(0)));
    assert_eq!((sent.sent_bytes, sent.sent_messages), (total, sizes.len() as u64));
    assert_eq!((received.received_bytes, received.received_messages), (total, sizes.len() as u64));
    assert_eq!((sent.received_bytes, received.sent_messages), (0, 0));
}

pub fn messages_that_fill_a_frame_pass_among_large_ones(make: Make) {
    let mut world = make(&Config::default(), 2);
    for bytes in (8100..=8136).chain([16_256, 32_000]) {
        // Large ones come the other way, on all of a wire's ways at once.
        for (from, bytes) in [(0, 1 << 20), (1, bytes)] {
            let (target, space) = blank(bytes);
            world.wire(1 - from as usize).post_recv(PeerId(from), Tag(1), space).unwrap();
            world.wire(from as usize).post_send(to(1 - from, 1, 0), filled(3, bytes).1).unwrap();
            world.take(from as usize, 1);
            let received = world.take(1 - from as usize, 1);
            assert!(matches!(received[..], [Completion::Received { .. }]), "{received:?}");
            drop(received);
            assert_eq!(&*target.read(0..bytes).unwrap(), &pattern(3, bytes)[..], "{bytes} bytes");
        }
    }
}

pub fn a_receive_may_be_longer_than_its_message(make: Make) {
    let mut world = make(&Config::default(), 2);
    for bytes in [0, 5, 5000, 300_000] {
        let (target, space) = blank(400_000);
        world.wire(1).post_recv(PeerId(0), Tag(1), space).unwrap();
        world.wire(0).post_send(to(1, 1, 0), filled(3, bytes).1).unwrap();
        let received = world.take(1, 1);
        assert!(matches!(&received[..], [Completion::Received { bytes: got, .. }] if *got == bytes), "{received:?}");
        drop(received);
        let all = target.read(0..400_000).unwrap();
        assert_eq!(&all[..bytes], &pattern(3, bytes)[..]);
        assert!(all[bytes..].iter().all(|&byte| byte == 0), "nothing was written behind the message");
        world.take(0, 1);
    }
}

pub fn a_message_that_does_not_fit_fails_and_the_next_passes(make: Make) {
    let mut world = make(&Config::default(), 2);
    let (target, space) = blank(10);
    world.wire(1).post_recv(PeerId(0), Tag(1), space).unwrap();
    world.wire(0).post_send(to(1, 1, 7), filled(0, 2 << 20).1).unwrap();
    for completion in world.take(0, 1).iter().chain(&world.take(1, 1)) {
        match completion {
            Completion::SendFailed { error, .. } | Completion::RecvFailed { error, .. } => {
                let TransportError::MessageTooLong { note: 7, bytes, capacity: 10, .. } = error else {
                    panic!("{error:?}")
                };
                assert_eq!(*bytes, 2 << 20);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(target.write(0..10).is_ok());
    // A small one fails where it is received; its sender may have been done with it.
    world.wire(1).post_recv_loan(PeerId(0), Tag(1), 10).unwrap();
    world.wire(0).post_send(to(1, 1, 0), filled(0, 11).1).unwrap();
    let done = world.take(1, 1);
    assert!(
        matches!(&done[..], [Completion::RecvFailed { error: TransportError::MessageTooLong { .. }, .. }]),
        "{done:?}"
    );
    // And one that came before its receive.
    world.wire(0).post_send(to(1, 1, 0), filled(0, 3000).1).unwrap();
    world.settle();
    world.wire(1).post_recv(PeerId(0), Tag(1), blank(2999).1).unwrap();
    let done = world.take(1, 1);
    assert!(
        matches!(&done[..], [Completion::RecvFailed { error: TransportError::MessageTooLong { .. }, .. }]),
        "{done:?}"
    );
    world.wire(1).post_recv(PeerId(0), Tag(1), blank(500).1).unwrap();
    world.wire(0).post_send(to(1, 1, 0), filled(0, 5).1).unwrap();
    let done = world.take(1, 1);
    assert!(matches!(&done[..], [Completion::Received { bytes: 5, .. }]), "{done:?}");
}

pub fn a_full_queue_gives_the_slice_back(make: Make) {
    let mut world = make(&Config { queue_depth: 4, window_bytes: 1000, ..Config::default() }, 2);
    let mut refused = None;
    for k in 0..6 {
        if let Err(error) = world.wire(0).post_send(to(1, 1, k), filled(k, 1000).1) {
            refused.get_or_insert(error);
        }
    }
    let refused = refused.expect("six do not fit a queue of four");
    assert!(matches!(refused.error, TransportError::QueueFull { queued: 4, .. }), "{:?}", refused.error);
    assert_eq!(refused.slice.len(), 1000);
    for _ in 0..4 {
        world.wire(1).post_recv(PeerId(0), Tag(2), blank(8).1).unwrap();
    }
    let refused = world.wire(1).post_recv(PeerId(0), Tag(2), blank(8).1).unwrap_err();
    assert!(matches!(refused.error, TransportError::QueueFull { queued: 4, .. }), "{:?}", refused.error);
    assert_eq!(refused.slice.len(), 8);
}

pub fn nobody_is_sent_to_who_is_not_there(make: Make) {
    let mut world = make(&Config::default(), 2);
    let refused = world.wire(0).post_send(to(9, 1, 0), filled(0, 7).1).unwrap_err();
    assert!(matches!(refused.error, TransportError::UnknownPeer(9)), "{:?}", refused.error);
    assert_eq!(refused.slice.len(), 7);
    assert!(world.wire(0).post_recv(PeerId(9), Tag(1), blank(1).1).is_err());
}
