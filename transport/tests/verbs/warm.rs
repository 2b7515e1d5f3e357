//! A warm data path registers nothing and allocates nothing.

#![allow(unsafe_code)]

use crate::promises::verbs_wires;
use gradwire_transport::verbs::VerbsCount;
use gradwire_transport::{Completion, Config, Envelope, PeerId, Region, Tag, VerbsWire, Wire};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting what each thread asks of it.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: every call is the system's, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the trait's promises, which are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }
}

/// Sends and receives one message of `bytes` each way, one posted and one lent.
fn exchange(wires: &mut [VerbsWire], regions: &[Arc<Region>; 2], bytes: usize, done: &mut Vec<Completion>) {
    let to = |peer| Envelope { peer: PeerId(peer), tag: Tag(1), note: 9 };
    wires[0].post_send(to(1), regions[0].read(0..bytes).unwrap()).unwrap();
    wires[1].post_recv(PeerId(0), Tag(1), regions[1].write(0..bytes).unwrap()).unwrap();
    let mut loan = wires[1].lend(PeerId(0), bytes).unwrap();
    loan.fill(3);
    wires[1].post_loan(to(0), loan).unwrap();
    wires[0].post_recv_loan(PeerId(1), Tag(1), bytes).unwrap();
    let (mut open, until) = (3, Instant::now() + Duration::from_secs(20));
    while open > 0 {
        assert!(Instant::now() < until, "{open} operations are open");
        wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), done));
        for completion in done.drain(..) {
            match completion {
                Completion::Sent { .. } | Completion::Received { .. } => open -= 1,
                Completion::Arrived(arrival) => {
                    assert!(arrival.loan.len() == bytes && arrival.loan.iter().all(|&byte| byte == 3));
                    open -= 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn nothing_is_registered_or_allocated_once_warm() {
    let config = Config::default();
    let mut wires = verbs_wires(&config, 2, || crate::open(&config.verbs));
    let regions = [Region::zeroed(3 << 20), Region::zeroed(3 << 20)];
    let (sizes, mut done) = ([10, 8000, 9000, 70_000, 1 << 20, 3 << 20], Vec::with_capacity(64));
    for _ in 0..10 {
        sizes.iter().for_each(|&bytes| exchange(&mut wires, &regions, bytes, &mut done));
    }
    let (before, allocated) = (counts(&wires), ALLOCATIONS.get());
    for _ in 0..20 {
        sizes.iter().for_each(|&bytes| exchange(&mut wires, &regions, bytes, &mut done));
    }
    assert_eq!(ALLOCATIONS.get() - allocated, 0, "allocations in 240 warm messages");
    assert_eq!(counts(&wires), before);
    assert!(before.iter().all(|count| count.registrations.made > 0 && count.copied == 0 && count.failures == 0));
}

fn counts(wires: &[VerbsWire]) -> [VerbsCount; 2] {
    [wires[0].count(), wires[1].count()]
}
