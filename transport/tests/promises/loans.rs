//! The wire's own memory: written and read in place, given back in any order, from any thread.

use super::*;

pub fn posted_and_lent_go_together_in_all_four_ways(make: Make) {
    let mut world = make(&Config::default(), 2);
    for (k, bytes) in (0u64..).zip([0, 1, 40, 5000, 65_536, 65_537, 200_000, 262_144, 262_145, 1 << 20]) {
        for (lent_out, lent_in) in [(false, false), (false, true), (true, false), (true, true)] {
            if lent_out {
                let mut loan = world.wire(0).lend(PeerId(1), bytes).unwrap();
                assert_eq!(loan.len(), bytes);
                loan.copy_from_slice(&pattern(k, bytes));
                world.wire(0).post_loan(to(1, 3, k), loan).unwrap();
            } else {
                world.wire(0).post_send(to(1, 3, k), filled(k, bytes).1).unwrap();
            }
            if lent_in {
                world.wire(1).post_recv_loan(PeerId(0), Tag(3), bytes).unwrap();
            } else {
                world.wire(1).post_recv(PeerId(0), Tag(3), blank(bytes).1).unwrap();
            }
            match &world.take(1, 1)[..] {
                [Completion::Arrived(a)] if lent_in => assert_eq!((a.from.note, &*a.loan), (k, &pattern(k, bytes)[..])),
                [Completion::Received { from, slice, .. }] => {
                    assert_eq!((from.note, &**slice), (k, &pattern(k, bytes)[..]));
                }
                other => panic!("{bytes} bytes: {other:?}"),
            }
            world.until(|world| lent_out || !world.done[0].is_empty());
            world.done[0].clear();
        }
    }
    assert!(world.wire(0).lend(PeerId(1), usize::MAX).is_none());
    assert!(world.wire(0).max_loan_bytes() >= 1 << 20);
}

pub fn loans_given_back_make_room(make: Make) {
    let mut world = make(&Config { window_bytes: 1 << 20, ..Config::default() }, 2);
    for k in 0..200 {
        world.wire(0).post_send(to(1, 1, k), filled(k, 100_000).1).unwrap();
        world.wire(1).post_recv_loan(PeerId(0), Tag(1), 100_000).unwrap();
        let arrived = world.take(1, 1);
        assert!(matches!(&arrived[..], [Completion::Arrived(arrival)] if arrival.from.note == k), "{arrived:?}");
    }
}

pub fn loans_are_given_back_in_any_order_from_any_thread(make: Make) {
    let mut world = make(&Config::default(), 2);
    let mut held = Vec::new();
    let bytes = |k: u64| [100, 40_000, 200_000, 8][(k % 4) as usize];
    for k in 0..300 {
        let mut loan = world.wire(0).lend(PeerId(1), bytes(k)).unwrap();
        loan.copy_from_slice(&pattern(k, bytes(k)));
        world.wire(0).post_loan(to(1, 1, k), loan).unwrap();
        world.wire(1).post_recv_loan(PeerId(0), Tag(1), 200_000).unwrap();
        match world.take(1, 1).pop() {
            Some(Completion::Arrived(arrival)) => held.push(arrival),
            other => panic!("{other:?}"),
        }
        // Many are held at once, and the one in the middle goes first; all still hold what was sent.
        if held.len() == 50 {
            let back: Vec<_> = held.drain(10..40).rev().collect();
            std::thread::spawn(move || drop(back)).join().unwrap();
        }
        for arrival in &held {
            assert_eq!(&*arrival.loan, &pattern(arrival.from.note, bytes(arrival.from.note))[..]);
        }
    }
}

pub fn a_loan_not_posted_is_given_back(make: Make) {
    let mut world = make(&Config::default(), 2);
    for k in 0..300 {
        let loan = world.wire(0).lend(PeerId(1), 200_000).unwrap();
        if k % 3 == 0 {
            std::thread::spawn(move || drop(loan)).join().unwrap();
        }
    }
    world.wire(0).post_send(to(1, 1, 0), filled(1, 2 << 20).1).unwrap();
    world.wire(1).post_recv(PeerId(0), Tag(1), blank(2 << 20).1).unwrap();
    world.take(1, 1);
}

pub fn loans_that_nobody_receives_hold_up_no_other_tag(make: Make) {
    let mut world = make(&Config::default(), 2);
    for k in 0..60 {
        let mut loan = world.wire(0).lend(PeerId(1), 200_000).unwrap();
        loan.copy_from_slice(&pattern(k, 200_000));
        world.wire(0).post_loan(to(1, k, k), loan).unwrap();
        world.turn();
    }
    world.wire(0).post_send(to(1, 1000, 0), filled(9, 3 << 20).1).unwrap();
    world.wire(1).post_recv(PeerId(0), Tag(1000), blank(3 << 20).1).unwrap();
    world.take(1, 1);
    for k in (0..60).rev() {
        world.wire(1).post_recv_loan(PeerId(0), Tag(k), 200_000).unwrap();
        match &world.take(1, 1)[..] {
            [Completion::Arrived(arrival)] => assert_eq!(&*arrival.loan, &pattern(k, 200_000)[..]),
            other => panic!("{other:?}"),
        }
    }
}
