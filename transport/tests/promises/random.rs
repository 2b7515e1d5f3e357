//! Operations drawn at random: whatever the mix, every message is met once, whole, in order, and everything comes back.

use super::*;
use std::collections::{HashMap, VecDeque};

const SIZES: [usize; 7] = [0, 30, 3000, 40_000, 60_000, 250_000, 700_000];
const OPERATIONS: u64 = 1000;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// What has been posted, and what is expected of it; a way is (from, to, tag).
#[derive(Default)]
struct Ledger {
    /// Messages sent and not yet received, in order: note and length.
    sent: HashMap<(u32, u32, u64), VecDeque<(u64, usize)>>,
    /// Receives to be posted for messages already sent.
    owed: Vec<(u32, u32, u64, usize)>,
    regions: Vec<Arc<Region>>,
    arrivals: Vec<gradwire_transport::Arrival>,
    received: u64,
}

impl Ledger {
    fn check(&mut self, at: u32, completion: Completion, random: &mut Random) {
        let (from, bytes) = match &completion {
            Completion::Received { from, bytes, .. } => (*from, *bytes),
            Completion::Arrived(arrival) => (arrival.from, arrival.loan.len()),
            Completion::Sent { .. } => return,
            other => panic!("{other:?}"),
        };
        let way = (from.peer.0, at, from.tag.0);
        let expected = self.sent.get_mut(&way).and_then(VecDeque::pop_front);
        assert_eq!(expected, Some((from.note, bytes)), "{way:?}");
        let expected = pattern(from.note, bytes);
        match completion {
            Completion::Received { slice, .. } => assert_eq!(&slice[..bytes], &expected[..]),
            Completion::Arrived(arrival) => {
                assert_eq!(&*arrival.loan, &expected[..]);
                // Some are held for a while, and given back in no order.
                self.arrivals.push(arrival);
                if self.arrivals.len() > 12 {
                    self.arrivals.swap_remove(random.below(12) as usize);
                }
            }
            _ => {}
        }
        self.received += 1;
    }
}

pub fn a_thousand_random_operations_come_out_right(make: Make) {
    for seed in 1..4u64 {
        println!("seed {seed}");
        let mut random = Random(seed);
        let mut world = make(&Config { window_bytes: 200_000, ..Config::default() }, 3);
        let mut ledger = Ledger::default();
        let mut posted = 0;
        let until = world.now() + PATIENCE;
        while ledger.received < OPERATIONS / 2 {
            if posted < OPERATIONS / 2 && random.below(2) == 0 {
                send(&mut world, &mut ledger, &mut random, posted);
                posted += 1;
            } else if !ledger.owed.is_empty() && (posted == OPERATIONS / 2 || random.below(2) == 0) {
                receive(&mut world, &mut ledger, &mut random);
            }
            world.turn();
            for at in 0..3 {
                for completion in std::mem::take(&mut world.done[at as usize]) {
                    ledger.check(at, completion, &mut random);
                }
            }
            assert!(world.now() < until, "seed {seed}: {} of {posted} messages came", ledger.received);
        }
        world.settle();
        world.done.iter_mut().for_each(Vec::clear);
        for region in &ledger.regions {
            assert!(region.write(0..region.len()).is_ok(), "seed {seed}: a slice did not come back");
        }
        let total = |side: fn(&gradwire_transport::Traffic) -> (u64, u64), world: &mut World| {
            let ways = (0..3).flat_map(|a| (0..3).map(move |b| (a, b))).filter(|(a, b)| a != b);
            let all: Vec<_> = ways.map(|(a, b)| side(&world.wire(a).traffic(PeerId(b as u32)))).collect();
            all.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
        };
        let sent = total(|traffic| (traffic.sent_bytes, traffic.sent_messages), &mut world);
        let received = total(|traffic| (traffic.received_bytes, traffic.received_messages), &mut world);
        assert_eq!((sent, sent.1), (received, OPERATIONS / 2));
    }
}

fn send(world: &mut World, ledger: &mut Ledger, random: &mut Random, note: u64) {
    let from = random.below(3) as u32;
    let peer = (from + 1 + random.below(2) as u32) % 3;
    let (tag, bytes) = (random.below(5), SIZES[random.below(SIZES.len() as u64) as usize]);
    let wire = world.wire(from as usize);
    if random.below(3) == 0
        && let Some(mut loan) = wire.lend(PeerId(peer), bytes)
    {
        loan.copy_from_slice(&pattern(note, bytes));
        wire.post_loan(to(peer, tag, note), loan).unwrap();
    } else {
        let (region, slice) = filled(note, bytes);
        wire.post_send(to(peer, tag, note), slice).unwrap();
        ledger.regions.push(region);
    }
    ledger.sent.entry((from, peer, tag)).or_default().push_back((note, bytes));
    ledger.owed.push((from, peer, tag, bytes));
}

fn receive(world: &mut World, ledger: &mut Ledger, random: &mut Random) {
    let which = random.below(ledger.owed.len() as u64) as usize;
    let (from, peer, tag, _) = ledger.owed[which];
    // The earliest owed of this way, so that the lengths match those of the messages.
    let first = ledger.owed.iter().position(|owed| (owed.0, owed.1, owed.2) == (from, peer, tag)).unwrap();
    let (.., bytes) = ledger.owed.remove(first);
    let extra = [0, 0, 17][random.below(3) as usize];
    if random.below(2) == 0 {
        let (region, space) = blank(bytes + extra);
        ledger.regions.push(region);
        world.wire(peer as usize).post_recv(PeerId(from), Tag(tag), space).unwrap();
    } else {
        world.wire(peer as usize).post_recv_loan(PeerId(from), Tag(tag), bytes + extra).unwrap();
    }
}
