//! A warm data path registers nothing.

use crate::promises::verbs_wires;
use gradwire_transport::{Completion, Config, Envelope, PeerId, Region, Tag, VerbsWire, Wire};
use std::time::{Duration, Instant};

fn exchange(wires: &mut [VerbsWire], regions: &[std::sync::Arc<Region>; 2], bytes: usize) {
    let to = |peer| Envelope { peer: PeerId(peer), tag: Tag(1), note: 9 };
    wires[0].post_send(to(1), regions[0].read(0..bytes).unwrap()).unwrap();
    wires[1].post_recv(PeerId(0), Tag(1), regions[1].write(0..bytes).unwrap()).unwrap();
    let mut loan = wires[1].lend(PeerId(0), bytes).unwrap();
    loan.fill(3);
    wires[1].post_loan(to(0), loan).unwrap();
    wires[0].post_recv_loan(PeerId(1), Tag(1), bytes).unwrap();
    let (mut open, mut done) = (3, Vec::new());
    let until = Instant::now() + Duration::from_secs(20);
    while open > 0 {
        assert!(Instant::now() < until, "{open} operations are open");
        wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), &mut done));
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
fn nothing_is_registered_once_warm() {
    let config = Config::default();
    let mut wires = verbs_wires(&config, 2, || crate::open(&config.verbs));
    let regions = [Region::zeroed(3 << 20), Region::zeroed(3 << 20)];
    let sizes = [10, 8000, 9000, 70_000, 1 << 20, 3 << 20];
    sizes.iter().for_each(|&bytes| exchange(&mut wires, &regions, bytes));
    let before: Vec<_> = wires.iter().map(VerbsWire::count).collect();
    for _ in 0..20 {
        sizes.iter().for_each(|&bytes| exchange(&mut wires, &regions, bytes));
    }
    let after: Vec<_> = wires.iter().map(VerbsWire::count).collect();
    assert_eq!(before, after);
    assert!(before.iter().all(|count| count.registrations.made > 0 && count.copied == 0 && count.failures == 0));
}
