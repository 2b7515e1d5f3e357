//! Does: messages, writes, reads, and the sleep between them.

use crate::end::{BYTES, DEADLINE, End, pair, readable, shared};
use gradwire_transport::TransportError;
use gradwire_transport::verbs::adapter::{Access, Adapter, What, Work};
use gradwire_transport::verbs::device::Device;
use gradwire_transport::verbs::settings::VerbsConfig;
use std::time::Duration;

#[test]
#[ignore = "needs an RDMA device"]
fn limits_and_name_tell_of_the_device() {
    let _link = shared();
    let (device, reason) = Device::open(&VerbsConfig::default(), &[]).unwrap();
    println!("{reason}\n{:?}", device.limits());
    let limits = device.limits();
    assert!(limits.message_bytes >= 1 << 20 && limits.reads >= 1 && limits.send_depth >= 64);
    for (config, word) in [
        (VerbsConfig { hca: Some("=nosuch".to_owned()), ..VerbsConfig::default() }, "GRADWIRE_IB_HCA"),
        (VerbsConfig { gid_index: Some(200), ..VerbsConfig::default() }, "GRADWIRE_IB_GID_INDEX"),
    ] {
        let Err(error @ TransportError::Config { .. }) = Device::open(&config, &[]) else { panic!("{word}") };
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_send_arrives_in_the_receive_that_was_posted_for_it() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Write);
    let inline = a.device.limits().inline_bytes;
    for (number, bytes) in (1..).zip([0, 1, inline, inline + 1, 4096, 4097, 100_000]) {
        a.fill(0, bytes, number as u8);
        b.post_recv(number, b.span(5, BYTES - 5));
        a.post(number + 100, a.span(0, bytes), Work::Send);
        assert_eq!(b.wait_for_one(), (number, What::Received(bytes as u32, None)));
        assert_eq!(a.wait_for_one(), (number + 100, What::Done));
        b.assert_filled(5, bytes, number as u8);
    }
    let mut none = Vec::new();
    b.post_recv(50, b.span(0, 8));
    a.device.post(a.queue_pair, 1, a.span(0, 8), Work::Send, false).unwrap();
    assert_eq!(b.wait_for_one().0, 50);
    a.device.poll(&mut none);
    assert!(none.is_empty(), "nobody asked for a signal: {none:?}");
}

#[test]
#[ignore = "needs an RDMA device"]
fn what_goes_inline_may_change_at_once() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Write);
    let inline = a.device.limits().inline_bytes;
    assert!(inline >= 64, "soft-RoCE and every device that we know let 64 bytes go inline");
    b.post_recv(2, b.span(0, inline));
    a.fill(0, inline, 3);
    // A long write before it, so that it has not gone when the memory changes.
    let rest = BYTES - inline;
    a.device.post(a.queue_pair, 0, a.span(inline, rest), Work::Write(b.place(inline), None), false).unwrap();
    a.post(1, a.span(0, inline), Work::Send);
    a.fill(0, inline, 4);
    assert_eq!(b.wait_for_one(), (2, What::Received(inline as u32, None)));
    b.assert_filled(0, inline, 3);
    assert_eq!(a.wait_for_one(), (1, What::Done));
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_write_lands_unseen_and_its_word_ends_a_receive() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Write);
    for (number, bytes) in (1..).zip([1, 4096, 70_000, BYTES, 0]) {
        a.fill(0, bytes, number as u8);
        b.post_recv(number, b.span(0, 0));
        a.device.post(a.queue_pair, 8, a.span(0, bytes), Work::Write(b.place(0), None), false).unwrap();
        a.post(9, a.span(0, 0), Work::Write(b.place(0), Some(0xfedc_0000 + number as u32)));
        assert_eq!(b.wait_for_one(), (number, What::Received(0, Some(0xfedc_0000 + number as u32))));
        assert_eq!(a.wait_for_one(), (9, What::Done));
        b.assert_filled(0, bytes, number as u8);
        // And both in one.
        a.fill(0, bytes, !(number as u8));
        b.post_recv(number, b.span(0, 0));
        a.post(10, a.span(0, bytes), Work::Write(b.place(0), Some(7)));
        assert_eq!(b.wait_for_one(), (number, What::Received(bytes as u32, Some(7))));
        assert_eq!(a.wait_for_one(), (10, What::Done));
        b.assert_filled(0, bytes, !(number as u8));
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn several_reads_are_under_way_at_once() {
    let _link = shared();
    let (mut a, b) = pair(Access::Exposed);
    let reads = a.device.limits().reads;
    b.fill(0, reads * 10_000, 9);
    for read in 0..reads {
        a.post(read as u64, a.span(read * 10_000, 10_000), Work::Read(b.place(read * 10_000)));
    }
    let done: Vec<u64> = a.wait(reads).iter().map(|event| event.number).collect();
    assert_eq!(done, (0..reads as u64).collect::<Vec<_>>());
    a.assert_filled(0, reads * 10_000, 9);
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_sleeper_is_woken_by_the_next_event_and_by_no_old_one() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Write);
    for number in 0..20 {
        b.post_recv(number, b.span(0, 8));
        b.device.arm();
        b.device.poll(&mut b.events);
        assert!(!readable(&b.device, Duration::ZERO), "nothing has happened yet");
        a.post(number, a.span(0, 8), Work::Send);
        assert!(readable(&b.device, DEADLINE), "the sleeper was not woken");
        b.device.wake_up(&mut b.troubles);
        assert!(!readable(&b.device, Duration::ZERO), "it was woken once");
        assert_eq!(b.wait_for_one().0, number);
        assert_eq!(a.wait_for_one().0, number);
    }
    assert_eq!(b.troubles, []);
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_device_has_room_for_the_events_of_many_queue_pairs() {
    let _link = shared();
    let (mut a, mut b) = (End::new(Access::Write).0, End::new(Access::Write).0);
    let depth = a.device.limits().recv_depth;
    let mut open = Vec::new();
    for _ in 0..40 {
        let (to_a, to_b) = (a.device.open().unwrap(), b.device.open().unwrap());
        a.device.connect(to_a.queue_pair, &to_b).unwrap();
        b.device.connect(to_b.queue_pair, &to_a).unwrap();
        open.push((to_a.queue_pair, to_b.queue_pair));
        for number in 0..depth {
            b.device.post_recv(to_b.queue_pair, number as u64, b.span(0, 8)).unwrap();
        }
        // Something is always in the queue while it grows.
        a.device.post(to_a.queue_pair, 1, a.span(0, 8), Work::Send, true).unwrap();
    }
    assert!(a.wait(open.len()).iter().all(|event| event.what == What::Done));
    for (_, queue_pair) in &open {
        b.device.stop(*queue_pair);
    }
    let events = b.wait(open.len() * depth);
    let received = events.iter().filter(|event| matches!(event.what, What::Received(8, None))).count();
    assert_eq!((events.len(), received), (open.len() * depth, open.len()));
    b.device.wake_up(&mut b.troubles);
    assert_eq!(b.troubles, []);
}
