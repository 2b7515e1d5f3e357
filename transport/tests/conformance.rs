//! What every wire promises, tested on every wire that this machine has.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.
use gradwire_transport::{
    Completion, Config, Envelope, LossCause, PeerId, Region, RegionSlice, RegionSliceMut, Tag, TransportError, Wire,
    tcp,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// Two wires of one process, each the other's peer: `PeerId(1)` on the first, `PeerId(0)` on the second.
type Pair = (Box<dyn Wire>, Box<dyn Wire>);
type MakePair = fn(&Config) -> Pair;

fn tcp_pair(config: &Config) -> Pair {
    let (a, b) = tcp::pair(config, config).unwrap();
    (Box::new(a), Box::new(b))
}

fn tcp_lanes(config: &Config) -> Pair {
    tcp_pair(&Config { lanes: 3, ..config.clone() })
}

/// Polls both wires until `enough` says so; fails after a while.
fn drive(
    pair: &mut Pair,
    mut enough: impl FnMut(&[Completion], &[Completion]) -> bool,
) -> (Vec<Completion>, Vec<Completion>) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let until = Instant::now() + PATIENCE;
    while !enough(&a, &b) {
        pair.0.poll(Instant::now(), &mut a);
        pair.1.poll(Instant::now(), &mut b);
        assert!(Instant::now() < until, "nothing more came: {a:?} {b:?}");
    }
    (a, b)
}

fn to(peer: u32, tag: u64, note: u64) -> Envelope {
    Envelope { peer: PeerId(peer), tag: Tag(tag), note }
}

/// Bytes that tell their place and their message.
fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|i| (i.wrapping_mul(31).wrapping_add(seed * 7).wrapping_add(i >> 8)) as u8).collect()
}

fn filled(seed: u64, bytes: usize) -> (Arc<Region>, RegionSlice) {
    let region = Region::from_vec(pattern(seed, bytes));
    let slice = region.read(0..bytes).unwrap();
    (region, slice)
}

fn blank(bytes: usize) -> (Arc<Region>, RegionSliceMut) {
    let region = Region::zeroed(bytes);
    let slice = region.write(0..bytes).unwrap();
    (region, slice)
}

fn messages_of_every_size_arrive_whole(make: MakePair) {
    let mut pair = make(&Config::default());
    let sizes = [0, 1, 47, 48, 49, 4096, 65_535, 65_536, 65_537, 524_288, 524_289, 1 << 20, (8 << 20) + 3];
    for (k, &bytes) in (0u64..).zip(&sizes) {
        let (source, slice) = filled(k, bytes);
        let (target, space) = blank(bytes);
        pair.1.post_recv(PeerId(0), Tag(k), space).unwrap();
        pair.0.post_send(to(1, k, k + 100), slice).unwrap();
        let (a, b) = drive(&mut pair, |a, b| !a.is_empty() && !b.is_empty());
        assert!(matches!(&a[..], [Completion::Sent { to, .. }] if to.tag == Tag(k)), "{a:?}");
        match &b[..] {
            [Completion::Received { from, bytes: got, .. }] => assert_eq!((from.note, *got), (k + 100, bytes)),
            other => panic!("{other:?}"),
        }
        drop((a, b));
        assert_eq!(&*target.read(0..bytes).unwrap(), &pattern(k, bytes)[..], "{bytes} bytes");
        assert!(source.write(0..bytes).is_ok(), "the slice came back");
    }
    let total: u64 = sizes.iter().map(|&bytes| bytes as u64).sum();
    let (sent, received) = (pair.0.traffic(PeerId(1)), pair.1.traffic(PeerId(0)));
    assert_eq!((sent.sent_bytes, sent.sent_messages), (total, sizes.len() as u64));
    assert_eq!((received.received_bytes, received.received_messages), (total, sizes.len() as u64));
}

fn tags_do_not_wait_for_each_other(make: MakePair) {
    let mut pair = make(&Config { window_bytes: 100_000, ..Config::default() });
    // Ten times the window, unmatched; then received in the other order.
    for k in 0..50 {
        pair.0.post_send(to(1, k, k), filled(k, 20_000).1).unwrap();
    }
    let mut targets = Vec::new();
    for k in (0..50).rev() {
        let (target, space) = blank(20_000);
        pair.1.post_recv(PeerId(0), Tag(k), space).unwrap();
        drive(&mut pair, |_, b| !b.is_empty());
        targets.push((k, target));
    }
    for (k, target) in targets {
        assert_eq!(&*target.read(0..20_000).unwrap(), &pattern(k, 20_000)[..]);
    }
}

fn messages_of_one_tag_keep_their_order(make: MakePair) {
    let mut pair = make(&Config { window_bytes: 64_000, ..Config::default() });
    let sizes: Vec<usize> = (0..60).map(|k| [10, 40_000, 0, 300_000, 5][k % 5]).collect();
    for (k, &bytes) in (0u64..).zip(&sizes) {
        pair.0.post_send(to(1, 7, k), filled(k, bytes).1).unwrap();
        if k % 2 == 0 {
            pair.1.post_recv(PeerId(0), Tag(7), blank(300_000).1).unwrap();
        } else {
            pair.1.post_recv_loan(PeerId(0), Tag(7), 300_000).unwrap();
        }
    }
    let (a, b) = drive(&mut pair, |a, b| a.len() == 60 && b.len() == 60);
    for (k, completion) in (0u64..).zip(&a) {
        assert!(matches!(completion, Completion::Sent { to, .. } if to.note == k), "{completion:?}");
    }
    for (k, completion) in (0u64..).zip(&b) {
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

fn lent_memory_carries_messages(make: MakePair) {
    let mut pair = make(&Config::default());
    for (k, bytes) in [0, 1, 5000, 200_000].into_iter().enumerate() {
        let mut loan = pair.0.lend(PeerId(1), bytes).unwrap();
        loan.copy_from_slice(&pattern(k as u64, bytes));
        pair.0.post_loan(to(1, 3, 9), loan).unwrap();
        pair.1.post_recv_loan(PeerId(0), Tag(3), bytes).unwrap();
        let (_, b) = drive(&mut pair, |_, b| !b.is_empty());
        match &b[..] {
            [Completion::Arrived(arrival)] => assert_eq!(&*arrival.loan, &pattern(k as u64, bytes)[..]),
            other => panic!("{other:?}"),
        }
    }
    assert!(pair.0.lend(PeerId(1), usize::MAX).is_none());
}

fn loans_given_back_make_room(make: MakePair) {
    let mut pair = make(&Config { window_bytes: 1 << 20, ..Config::default() });
    for k in 0..200 {
        pair.0.post_send(to(1, 1, k), filled(k, 100_000).1).unwrap();
        pair.1.post_recv_loan(PeerId(0), Tag(1), 100_000).unwrap();
        drive(&mut pair, |_, b| matches!(b, [Completion::Arrived(arrival)] if arrival.from.note == k));
    }
}

fn a_message_that_does_not_fit_fails_and_the_next_passes(make: MakePair) {
    let mut pair = make(&Config::default());
    pair.1.post_recv(PeerId(0), Tag(1), blank(10).1).unwrap();
    pair.0.post_send(to(1, 1, 0), filled(0, 2 << 20).1).unwrap();
    let (a, b) = drive(&mut pair, |a, b| !a.is_empty() && !b.is_empty());
    for completion in a.iter().chain(&b) {
        match completion {
            Completion::SendFailed { error, .. } | Completion::RecvFailed { error, .. } => {
                assert!(
                    matches!(error, TransportError::MessageTooLong { bytes, capacity: 10, .. } if *bytes == 2 << 20)
                );
            }
            other => panic!("{other:?}"),
        }
    }
    // A small one fails where it is received; its sender may have been done with it.
    pair.1.post_recv_loan(PeerId(0), Tag(1), 10).unwrap();
    pair.0.post_send(to(1, 1, 0), filled(0, 11).1).unwrap();
    let (_, b) = drive(&mut pair, |_, b| !b.is_empty());
    assert!(matches!(&b[..], [Completion::RecvFailed { error: TransportError::MessageTooLong { .. }, .. }]), "{b:?}");
    pair.1.post_recv(PeerId(0), Tag(1), blank(500).1).unwrap();
    pair.0.post_send(to(1, 1, 0), filled(0, 5).1).unwrap();
    let (_, b) = drive(&mut pair, |_, b| !b.is_empty());
    assert!(matches!(&b[..], [Completion::Received { bytes: 5, .. }]), "{b:?}");
}

fn probe_finds_and_cancel_takes_back(make: MakePair) {
    let mut pair = make(&Config::default());
    assert_eq!(pair.1.probe(Tag(5)), None);
    pair.0.post_send(to(1, 5, 77), filled(1, 30).1).unwrap();
    let until = Instant::now() + PATIENCE;
    while pair.1.probe(Tag(5)).is_none() && Instant::now() < until {
        pair.1.poll(Instant::now(), &mut Vec::new());
    }
    let found = pair.1.probe(Tag(5)).unwrap();
    assert_eq!((found.from.peer, found.from.note, found.bytes), (PeerId(0), 77, 30));
    let (target, space) = blank(8);
    pair.1.post_recv(PeerId(0), Tag(6), space).unwrap();
    pair.1.cancel_recvs(PeerId(0), Tag(6));
    let (_, b) = drive(&mut pair, |_, b| !b.is_empty());
    assert!(matches!(&b[..], [Completion::RecvFailed { error: TransportError::Cancelled, .. }]), "{b:?}");
    drop(b);
    assert!(target.write(0..8).is_ok());
}

fn a_full_queue_gives_the_slice_back(make: MakePair) {
    let mut pair = make(&Config { queue_depth: 4, window_bytes: 1000, ..Config::default() });
    let mut refused = None;
    for k in 0..6 {
        if let Err(error) = pair.0.post_send(to(1, 1, k), filled(k, 1000).1) {
            refused.get_or_insert(error);
        }
    }
    let refused = refused.expect("six do not fit a queue of four");
    assert!(matches!(refused.error, TransportError::QueueFull { queued: 4, .. }), "{:?}", refused.error);
    assert_eq!(refused.slice.len(), 1000);
}

fn a_peer_that_dies_fails_everything_posted_once(make: MakePair) {
    let (mut a, b) = make(&Config::default());
    let (source, slice) = filled(1, 4 << 20);
    let (target, space) = blank(64);
    a.post_send(to(1, 1, 0), slice).unwrap();
    a.post_recv(PeerId(1), Tag(2), space).unwrap();
    a.post_recv_loan(PeerId(1), Tag(3), 64).unwrap();
    drop(b);
    let (mut done, died) = (Vec::new(), Instant::now());
    while done.len() < 4 && died.elapsed() < PATIENCE {
        a.poll(Instant::now(), &mut done);
    }
    assert!(died.elapsed() < Duration::from_millis(300), "{:?}", died.elapsed());
    a.poll(Instant::now(), &mut done);
    assert_eq!(done.len(), 4, "{done:?}");
    assert!(matches!(&done[0], Completion::PeerDown { peer: PeerId(1), .. }));
    drop(done);
    assert!(source.write(0..4 << 20).is_ok() && target.write(0..64).is_ok());
    assert!(a.post_send(to(1, 1, 0), filled(1, 1).1).is_err());
}

fn a_goodbye_comes_after_everything_that_was_sent(make: MakePair) {
    let (mut a, mut b) = make(&Config::default());
    a.post_send(to(1, 1, 0), filled(1, 5000).1).unwrap();
    a.shutdown(Instant::now() + PATIENCE);
    drop(a);
    let mut done = Vec::new();
    let until = Instant::now() + PATIENCE;
    while done.is_empty() && Instant::now() < until {
        b.poll(Instant::now(), &mut done);
    }
    let goodbye = |completion: &Completion| {
        matches!(
            completion,
            Completion::PeerDown { error: TransportError::PeerLost { cause: LossCause::Goodbye, .. }, .. }
        )
    };
    assert!(done.iter().any(goodbye), "{done:?}");
    // What it sent before can still be received.
    let (target, space) = blank(5000);
    b.post_recv(PeerId(0), Tag(1), space).unwrap();
    while target.read(0..1).is_err() && Instant::now() < until {
        b.poll(Instant::now(), &mut done);
        done.clear();
    }
    assert_eq!(&*target.read(0..5000).unwrap(), &pattern(1, 5000)[..]);
}

fn disconnect_tells_the_reason(make: MakePair) {
    let mut pair = make(&Config::default());
    let peer = Box::new(pair.0.name(PeerId(1)));
    let cause = LossCause::Aborted("the loss is NaN".into());
    pair.0.disconnect(PeerId(1), TransportError::PeerLost { peer, cause });
    let (a, b) = drive(&mut pair, |a, b| !a.is_empty() && !b.is_empty());
    assert!(matches!(&a[..], [Completion::PeerDown { .. }]), "{a:?}");
    match &b[..] {
        [Completion::PeerDown { error, .. }] => assert!(error.to_string().contains("the loss is NaN"), "{error}"),
        other => panic!("{other:?}"),
    }
}

fn park_ends_by_data_by_a_wake_and_by_the_clock(make: MakePair) {
    let mut pair = make(&Config::default());
    // By the clock: not earlier, and not never.
    let until = Instant::now() + Duration::from_millis(30);
    while Instant::now() < until {
        pair.1.park(until);
    }
    let waker = pair.1.waker();
    let began = Instant::now();
    waker.wake();
    pair.1.park(Instant::now() + PATIENCE);
    let (target, space) = blank(9);
    pair.1.post_recv(PeerId(0), Tag(1), space).unwrap();
    pair.1.poll(Instant::now(), &mut Vec::new());
    pair.0.post_send(to(1, 1, 0), filled(1, 9).1).unwrap();
    pair.0.poll(Instant::now(), &mut Vec::new());
    let mut done = Vec::new();
    while done.is_empty() && began.elapsed() < PATIENCE {
        pair.1.park(Instant::now() + PATIENCE);
        pair.1.poll(Instant::now(), &mut done);
    }
    drop(done);
    assert_eq!(&*target.read(0..9).unwrap(), &pattern(1, 9)[..]);
    assert!(began.elapsed() < PATIENCE / 2);
}

fn a_thousand_random_operations_come_out_right(make: MakePair) {
    for seed in 1..4u64 {
        println!("seed {seed}");
        let mut state = seed;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut pair = make(&Config { window_bytes: 200_000, ..Config::default() });
        // Per tag: notes sent and not yet received, in order, each telling its size.
        let mut open: Vec<Vec<(u64, usize)>> = vec![Vec::new(); 8];
        let (mut sent, mut received) = (0u64, 0u64);
        let mut done = Vec::new();
        while received < 350 {
            let tag = random(8);
            if sent < 350 && random(2) == 0 {
                let bytes = [0, 30, 3000, 60_000, 250_000][random(5) as usize];
                pair.0.post_send(to(1, tag, sent), filled(sent, bytes).1).unwrap();
                open[tag as usize].push((sent, bytes));
                sent += 1;
            } else if !open[tag as usize].is_empty() {
                let (note, bytes) = open[tag as usize].remove(0);
                if random(2) == 0 {
                    pair.1.post_recv(PeerId(0), Tag(tag), blank(bytes).1).unwrap();
                } else {
                    pair.1.post_recv_loan(PeerId(0), Tag(tag), bytes).unwrap();
                }
                let until = Instant::now() + PATIENCE;
                while done.is_empty() {
                    pair.0.poll(Instant::now(), &mut Vec::new());
                    pair.1.poll(Instant::now(), &mut done);
                    assert!(Instant::now() < until, "seed {seed}: message {note} of {bytes} bytes does not come");
                }
                match done.pop().unwrap() {
                    Completion::Received { from, slice, .. } => {
                        assert_eq!((from.note, &*slice), (note, &pattern(note, bytes)[..]))
                    }
                    Completion::Arrived(a) => assert_eq!((a.from.note, &*a.loan), (note, &pattern(note, bytes)[..])),
                    other => panic!("{other:?}"),
                }
                assert!(done.is_empty());
                received += 1;
            }
        }
    }
}

macro_rules! promises {
    ($($wire:ident by $make:expr;)*) => {
        $(mod $wire {
            promises!(@each $make, messages_of_every_size_arrive_whole, tags_do_not_wait_for_each_other,
                messages_of_one_tag_keep_their_order, lent_memory_carries_messages, loans_given_back_make_room,
                a_message_that_does_not_fit_fails_and_the_next_passes, probe_finds_and_cancel_takes_back,
                a_full_queue_gives_the_slice_back, a_peer_that_dies_fails_everything_posted_once,
                a_goodbye_comes_after_everything_that_was_sent, disconnect_tells_the_reason,
                park_ends_by_data_by_a_wake_and_by_the_clock, a_thousand_random_operations_come_out_right);
        })*
    };
    (@each $make:expr, $($promise:ident),*) => {
        $(#[test]
        fn $promise() {
            super::$promise($make);
        })*
    };
}

promises! {
    over_tcp by super::tcp_pair;
    over_tcp_lanes by super::tcp_lanes;
}
