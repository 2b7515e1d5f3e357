//! Does: stopping, closing, dying, and what is left.

use crate::end::{DEADLINE, ERRORS, End, LINK, pair, readable, shared};
use gradwire_transport::verbs::adapter::{Access, Adapter, Endpoint, What, Work};
use gradwire_transport::verbs::status::{FLUSHED, REMOTE_ACCESS, RETRIES};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[test]
#[ignore = "needs an RDMA device"]
fn stopping_ends_all_that_is_posted_in_events() {
    let _link = shared();
    let (mut a, _b) = pair(Access::Write);
    let limits = a.device.limits();
    for number in 0..limits.recv_depth {
        a.post_recv(number as u64, a.span(0, 8));
    }
    // The peer has posted nothing, so the first is asked again and again, and none is done.
    for number in 0..limits.send_depth {
        a.device.post(a.queue_pair, 10_000 + number as u64, a.span(0, 8), Work::Send, false).unwrap();
    }
    a.device.stop(a.queue_pair);
    let mut ended: Vec<u64> = Vec::new();
    for event in a.wait(limits.recv_depth + limits.send_depth) {
        let What::Failed(status) = event.what else { panic!("{event:?}") };
        // Where posting takes long, the device has given up on the first by itself.
        assert!(status.code == FLUSHED || event.number == 10_000, "{status}");
        assert_eq!(event.queue_pair, a.queue_pair);
        ended.push(event.number);
    }
    ended.sort_unstable();
    let posted = (0..limits.recv_depth).chain((0..limits.send_depth).map(|number| 10_000 + number));
    assert_eq!(ended, posted.map(|number| number as u64).collect::<Vec<_>>());
    assert!(a.troubles.iter().all(|trouble| !trouble.fatal), "{:?}", a.troubles);
}

#[test]
#[ignore = "needs an RDMA device"]
fn stopping_before_connecting_ends_the_receives_too_or_closing_forgets_them() {
    let _link = shared();
    let (mut a, _) = End::new(Access::Write);
    a.post_recv(1, a.span(0, 8));
    a.device.stop(a.queue_pair);
    a.device.close(a.queue_pair);
    a.device.poll(&mut a.events);
    assert!(a.events.is_empty(), "{:?}", a.events);
    assert!(a.device.post_recv(a.queue_pair, 1, a.span(0, 8)).is_err());
    assert!(a.device.post(a.queue_pair, 1, a.span(0, 8), Work::Send, true).is_err());
}

#[test]
#[ignore = "needs an RDMA device"]
fn an_address_that_cannot_be_reached_is_named() {
    let _link = shared();
    let (mut a, own) = End::new(Access::Write);
    let nowhere = Endpoint { gid: [0; 16], ..own };
    let error = a.device.connect(a.queue_pair, &nowhere).unwrap_err().to_string();
    assert!(
        error.contains(&a.device.name()) && error.contains("at ::") && error.contains("GRADWIRE_IB_HCA"),
        "{error}"
    );
}

#[test]
#[ignore = "needs an RDMA device"]
fn no_event_of_a_closed_queue_pair_comes_and_those_of_others_stay() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Write);
    let (second, _) = {
        let (to_a, to_b) = (a.device.open().unwrap(), b.device.open().unwrap());
        a.device.connect(to_a.queue_pair, &to_b).unwrap();
        b.device.connect(to_b.queue_pair, &to_a).unwrap();
        (to_a.queue_pair, to_b.queue_pair)
    };
    for number in 0..10 {
        a.post_recv(number, a.span(0, 8));
        a.device.post_recv(second, 100 + number, a.span(0, 8)).unwrap();
    }
    a.device.stop(a.queue_pair);
    a.device.stop(second);
    a.device.close(a.queue_pair);
    let events = a.wait(10);
    assert_eq!(events.iter().map(|event| event.number).collect::<Vec<_>>(), (100..110).collect::<Vec<_>>());
    assert!(events.iter().all(|event| event.queue_pair == second));
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_peer_that_is_gone_fails_the_next_request_within_seconds() {
    let _link = shared();
    for work in ["send", "write", "read"] {
        let (mut a, mut b) = pair(Access::Write);
        let place = b.place(0);
        b.device.close(b.queue_pair);
        let began = Instant::now();
        a.post(
            1,
            a.span(0, 64),
            match work {
                "send" => Work::Send,
                "write" => Work::Write(place, Some(1)),
                _ => Work::Read(place),
            },
        );
        let status = a.failure();
        println!("{work}: {status} after {:?}", began.elapsed());
        assert!([REMOTE_ACCESS, RETRIES].contains(&status.code), "{status}");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_hundred_starts_and_ends_leave_nothing() {
    // Alone, since it counts what the process holds open.
    let _alone = LINK.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    drop(pair(Access::Write));
    let before = descriptors();
    for round in 0..100 {
        let (mut a, mut b) = pair(Access::Exposed);
        b.post_recv(1, b.span(0, 64));
        a.post(2, a.span(0, 64), Work::Send);
        assert_eq!(b.wait_for_one(), (1, What::Received(64, None)));
        // In a third each: closed in good order, dropped in the middle of work, stopped first.
        match round % 3 {
            0 => a.device.close(a.queue_pair),
            1 => b.post_recv(1, b.span(0, 64)),
            _ => a.device.stop(a.queue_pair),
        }
    }
    assert_eq!(descriptors(), before);
    assert_eq!(ERRORS.load(Ordering::Relaxed), 0, "something could not be freed: see the log above");
}

#[test]
#[ignore = "needs an RDMA device, and may take the link of its interface away"]
fn a_link_that_is_lost_and_found_is_told_in_words() {
    let _alone = LINK.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (mut a, _) = End::new(Access::Write);
    let name = a.device.name();
    let interface = name.trim_end_matches(')').rsplit(", ").next().unwrap().to_owned();
    let set = |state: &str| {
        let status = std::process::Command::new("ip").args(["link", "set", "dev", &interface, state]).status().unwrap();
        assert!(status.success(), "ip link set dev {interface} {state}");
    };
    let mut hear = |word: &str| {
        let began = Instant::now();
        while !a.troubles.iter().any(|trouble| trouble.what.contains(word) && !trouble.fatal) {
            assert!(began.elapsed() < DEADLINE, "no `{word}` in {:?}", a.troubles);
            readable(&a.device, Duration::from_secs(1));
            a.device.wake_up(&mut a.troubles);
        }
    };
    set("down");
    hear("lost its link");
    set("up");
    hear("active again");
    println!("{:?}", a.troubles);
}
