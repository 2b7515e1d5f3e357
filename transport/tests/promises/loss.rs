//! How a peer goes, and what becomes of what was posted.

use super::*;
use gradwire_transport::{LossCause, TransportError};

pub fn a_peer_that_dies_fails_everything_posted_once(make: Make) {
    let mut world = make(&Config::default(), 2);
    let (source, slice) = filled(1, 4 << 20);
    let (target, space) = blank(64);
    world.wire(0).post_send(to(1, 1, 0), slice).unwrap();
    world.wire(0).post_recv(PeerId(1), Tag(2), space).unwrap();
    world.wire(0).post_recv_loan(PeerId(1), Tag(3), 64).unwrap();
    world.wires[1] = None;
    let died = world.now();
    world.until(|world| world.done[0].len() >= 4);
    let after = world.now() - died;
    assert!(after < Duration::from_millis(300), "{after:?}");
    world.settle();
    let done = std::mem::take(&mut world.done[0]);
    assert_eq!(done.len(), 4, "{done:?}");
    match &done[0] {
        Completion::PeerDown { peer: PeerId(1), error: TransportError::PeerLost { cause, .. } } => {
            assert!(matches!(cause, LossCause::Closed), "{cause}");
        }
        other => panic!("{other:?}"),
    }
    drop(done);
    assert!(source.write(0..4 << 20).is_ok() && target.write(0..64).is_ok());
    assert_eq!(world.wire(0).post_send(to(1, 1, 0), filled(1, 1).1).unwrap_err().slice.len(), 1);
    assert_eq!(world.wire(0).post_recv(PeerId(1), Tag(1), blank(1).1).unwrap_err().slice.len(), 1);
}

pub fn one_peer_that_dies_takes_no_other_with_it(make: Make) {
    let mut world = make(&Config::default(), 3);
    world.wires[2] = None;
    world.until(|world| !world.done[0].is_empty() && !world.done[1].is_empty());
    for done in &mut world.done[..2] {
        assert!(matches!(&done[..], [Completion::PeerDown { peer: PeerId(2), .. }]), "{done:?}");
        done.clear();
    }
    world.wire(0).post_send(to(1, 1, 5), filled(1, 300_000).1).unwrap();
    world.wire(1).post_recv(PeerId(0), Tag(1), blank(300_000).1).unwrap();
    assert!(matches!(&world.take(1, 1)[..], [Completion::Received { from, .. }] if from.note == 5));
}

pub fn a_goodbye_comes_after_everything_that_was_sent(make: Make) {
    let mut world = make(&Config::default(), 2);
    world.wire(0).post_send(to(1, 1, 0), filled(1, 5000).1).unwrap();
    let until = world.now() + PATIENCE;
    world.wire(0).shutdown(until);
    world.wires[0] = None;
    let done = world.take(1, 1);
    assert!(is_goodbye(&done[0]), "{done:?}");
    // What it sent before can still be received.
    let (target, space) = blank(5000);
    world.wire(1).post_recv(PeerId(0), Tag(1), space).unwrap();
    assert!(matches!(&world.take(1, 1)[..], [Completion::Received { bytes: 5000, .. }]));
    assert_eq!(&*target.read(0..5000).unwrap(), &pattern(1, 5000)[..]);
}

pub fn shutdown_waits_for_large_messages(make: Make) {
    let mut world = make(&Config::default(), 2);
    let mut targets = Vec::new();
    for k in 0..3 {
        world.wire(0).post_send(to(1, k, k), filled(k, 3 << 20).1).unwrap();
        let (target, space) = blank(3 << 20);
        world.wire(1).post_recv(PeerId(0), Tag(k), space).unwrap();
        targets.push(target);
    }
    let until = world.now() + PATIENCE;
    let mut leaver = world.wires[0].take().unwrap();
    let leave = move || {
        leaver.shutdown(until);
        drop(leaver);
    };
    if world.is_simulated() {
        // Never blocks there; from another thread it would race with time, which jumps while nothing happens.
        leave();
        world.until(|world| world.done[1].len() >= 4);
    } else {
        std::thread::scope(|scope| {
            scope.spawn(leave);
            world.until(|world| world.done[1].len() >= 4);
        });
    }
    let done = std::mem::take(&mut world.done[1]);
    assert!(is_goodbye(&done[3]), "{:?}", done[3]);
    drop(done);
    for (k, target) in (0..).zip(targets) {
        assert_eq!(&*target.read(0..3 << 20).unwrap(), &pattern(k, 3 << 20)[..]);
    }
}

pub fn disconnect_tells_the_reason(make: Make) {
    let mut world = make(&Config::default(), 2);
    let (source, slice) = filled(1, 2 << 20);
    world.wire(0).post_send(to(1, 1, 0), slice).unwrap();
    let peer = Box::new(world.wire(0).name(PeerId(1)));
    let cause = LossCause::Aborted("the loss is NaN".into());
    world.wire(0).disconnect(PeerId(1), TransportError::PeerLost { peer, cause });
    let (a, b) = (world.take(0, 2), world.take(1, 1));
    assert!(matches!(&a[..], [Completion::PeerDown { .. }, Completion::SendFailed { .. }]), "{a:?}");
    match &b[..] {
        [Completion::PeerDown { error, .. }] => assert!(error.to_string().contains("the loss is NaN"), "{error}"),
        other => panic!("{other:?}"),
    }
    drop(a);
    assert!(source.write(0..2 << 20).is_ok());
}

fn is_goodbye(completion: &Completion) -> bool {
    matches!(completion, Completion::PeerDown { error: TransportError::PeerLost { cause: LossCause::Goodbye, .. }, .. })
}
