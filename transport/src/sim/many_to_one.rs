//! Does: tries credit on simulated wires: many send to one, over delay and loss, cut off for a while, or dead with a grant in hand.

use super::{Death, FaultPlan, LinkPlan, Manner, Moment, Partition, SimNetwork, SimWire};
use crate::{Completion, Config, CreditSettings, Envelope, PeerId, Region, Tag, Wire, WorldSize};
use proptest::prelude::*;
use std::time::{Duration, Instant};

const MS: Duration = Duration::from_millis(1);
const RECEIVER: PeerId = PeerId(0);
/// After which a silent sender is given up: long, so that whoever waited for it would show.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A message that is to come.
#[derive(Clone, Debug)]
struct Planned {
    sender: u32,
    bytes: usize,
    urgent: bool,
    at: Duration,
}

/// Peer 0, to whom all others send.
struct Lab {
    network: SimNetwork,
    wires: Vec<SimWire>,
    start: Instant,
    now: Instant,
    /// What came: when, from whom, which, and how long it was.
    came: Vec<(Duration, u32, u64, usize)>,
    /// Receives that have failed; of each peer, messages that it was told have gone, and that have come.
    failed: usize,
    sent: Vec<u64>,
    heard: Vec<u64>,
    /// The most that was on its way, and that might have been.
    most: u64,
    most_budget: u64,
    outstanding: u64,
}

impl Lab {
    fn new(seed: u64, plan: FaultPlan, senders: u32) -> Self {
        let config = Config { credit: Some(CreditSettings::default()), timeout: TIMEOUT, ..Config::default() };
        let start = Instant::now();
        let network = SimNetwork::new(seed, plan, start);
        let wires = network.group(WorldSize::new(senders + 1).unwrap(), &config);
        let none = vec![0; senders as usize + 1];
        Self {
            network,
            wires,
            start,
            now: start,
            came: Vec::new(),
            failed: 0,
            sent: none.clone(),
            heard: none,
            most: 0,
            most_budget: 0,
            outstanding: 0,
        }
    }

    /// Posts a message and its receive; whether its sender still lives.
    fn post(&mut self, planned: &Planned, note: u64) -> bool {
        let tag = Tag(note | if planned.urgent { Tag::CONTROL_BIT } else { 0 });
        let source = Region::from_vec(vec![note as u8; planned.bytes]);
        let to = Envelope { peer: RECEIVER, tag, note };
        let posted = self.wires[planned.sender as usize].post_send(to, source.read(0..planned.bytes).unwrap());
        let space = Region::zeroed(planned.bytes).write(0..planned.bytes).unwrap();
        let awaited = self.wires[0].post_recv(PeerId(planned.sender), tag, space);
        posted.is_ok() && awaited.is_ok()
    }

    /// Lets the next thing happen, at `until` at the latest; whether there was any.
    fn step(&mut self, until: Duration) -> bool {
        let Some(next) = self.network.next_event().filter(|next| *next <= self.start + until) else {
            self.now = self.now.max(self.start + until);
            return false;
        };
        self.now = self.now.max(next);
        let mut done = Vec::new();
        for (at, wire) in self.wires.iter_mut().enumerate() {
            wire.poll(self.now, &mut done);
            for completion in done.drain(..) {
                match completion {
                    Completion::Received { from, slice, bytes } => {
                        assert!(slice[..bytes].iter().all(|byte| *byte == from.note as u8), "wrong bytes");
                        self.heard[from.peer.index()] += 1;
                        self.came.push((self.now - self.start, from.peer.0, from.note, bytes));
                    }
                    Completion::Sent { .. } => self.sent[at] += 1,
                    Completion::RecvFailed { .. } => self.failed += 1,
                    _ => {}
                }
            }
        }
        self.check();
        true
    }

    /// Lets all happen that happens up to `until`.
    fn run(&mut self, until: Duration) {
        while self.step(until) {}
    }

    /// What is on its way is what credit knows of, and no more than it may be.
    fn check(&mut self) {
        let mut core = self.network.core();
        let on_the_way =
            (1..self.wires.len() as u32).map(|sender| core.asked_for_on_the_way(PeerId(sender), RECEIVER)).sum();
        let credit = core.node(RECEIVER).credit.as_ref().expect("it grants");
        let (outstanding, late, budget) = (credit.outstanding(), credit.late(), credit.budget());
        self.most = self.most.max(on_the_way);
        self.most_budget = self.most_budget.max(budget);
        assert!(on_the_way <= outstanding, "{on_the_way} bytes are on their way, of {outstanding} that were granted");
        // What slow senders hold is lent to others up to half the budget, what late ones hold, all of it.
        let bound = self.most_budget * 3 / 2;
        assert!(
            outstanding <= self.outstanding || outstanding - late <= bound,
            "{outstanding} bytes were granted, {late} to late ones, with a budget of {budget}"
        );
        self.outstanding = outstanding;
    }

    fn outstanding(&self) -> u64 {
        self.network.core().node(RECEIVER).credit.as_ref().expect("it grants").outstanding()
    }
}

fn link(delay: Duration, bytes_per_s: u64) -> LinkPlan {
    // No two things happen at one instant.
    LinkPlan { delay, jitter: Duration::from_micros(3), bytes_per_s, ..LinkPlan::default() }
}

/// Jain's index of what came of each sender.
fn jain(came: &[(Duration, u32, u64, usize)], senders: u32) -> f64 {
    let of = |sender| came.iter().filter(|one| one.1 == sender).map(|one| one.3 as f64).sum::<f64>();
    let (sum, squares) = (1..=senders).map(of).fold((0.0, 0.0), |(a, b), x| (a + x, b + x * x));
    sum * sum / (f64::from(senders) * squares)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    /// Whoever lives and is heard again in time delivers all, however many others die with grants in hand or are cut off; what
    /// is on its way stays within the bound, and at the end nothing is counted as on its way.
    #[test]
    fn all_of_the_living_comes_and_never_more_at_once_than_the_bound(
        seed in any::<u64>(),
        messages in prop::collection::vec((1u32..11, 1usize..500_000, any::<bool>(), 0u64..20_000), 1..50),
        deaths in prop::collection::vec((1u32..11, 0u64..30_000, any::<bool>()), 0..5),
        cut in prop::option::of((0u64..20_000, 1u64..400, prop::collection::vec(1u32..11, 1..6))),
        (delay_us, rate, lost) in (5u64..2000, 5_000_000u64..3_000_000_000, 0u32..100_000),
    ) {
        let us = Duration::from_micros;
        let kinds = [Manner::Silent, Manner::Killed];
        let death = |&(peer, at, killed): &(u32, u64, bool)| {
            Death { peer: PeerId(peer), moment: Moment::At(us(at)), manner: kinds[usize::from(killed)] }
        };
        let partition = cut.iter().map(|(from, ms, side)| {
            Partition { from: us(*from), until: us(*from) + MS * *ms as u32, side: side.iter().copied().map(PeerId).collect() }
        });
        let plan = FaultPlan {
            link: LinkPlan { lost_per_million: lost, twice_per_million: lost, ..link(us(delay_us), rate) },
            deaths: deaths.iter().map(death).collect(),
            partitions: partition.collect(),
            ..FaultPlan::default()
        };
        let mut planned: Vec<Planned> = messages
            .into_iter()
            .map(|(sender, bytes, urgent, at)| Planned { sender, bytes, urgent, at: us(at) })
            .collect();
        planned.sort_by_key(|planned| planned.at);
        let mut lab = Lab::new(seed, plan, 10);
        for (note, planned) in (0..).zip(&planned) {
            lab.run(planned.at);
            lab.post(planned, note);
        }
        lab.run(Duration::from_secs(100));
        for sender in (1..11).filter(|sender| !deaths.iter().any(|(dead, ..)| dead == sender)) {
            let wanted = (0u64..).zip(&planned).filter(|(_, one)| one.sender == sender);
            let wanted: Vec<_> = wanted.map(|(note, one)| (note, one.bytes)).collect();
            let came = lab.came.iter().filter(|one| one.1 == sender);
            let mut came: Vec<_> = came.map(|(_, _, note, bytes)| (*note, *bytes)).collect();
            came.sort_unstable();
            prop_assert_eq!(&came, &wanted, "of sender {}", sender);
            prop_assert_eq!(lab.sent[sender as usize], wanted.len() as u64);
        }
        prop_assert_eq!(lab.outstanding(), 0);
    }
}

#[test]
fn equal_senders_have_equal_shares_also_where_much_is_lost() {
    for (senders, lost) in [(2, 0), (8, 0), (8, 30_000)] {
        let plan = LinkPlan { lost_per_million: lost, ..link(Duration::from_micros(50), 1_000_000_000) };
        let mut lab = Lab::new(9, FaultPlan { link: plan, ..FaultPlan::default() }, senders);
        let (mut posted, mut note) = (vec![0; senders as usize + 1], 0);
        let end = MS * 50;
        while lab.now - lab.start < end {
            for sender in 1..=senders {
                while posted[sender as usize] < lab.heard[sender as usize] + 8 {
                    lab.post(&Planned { sender, bytes: 100_000, urgent: false, at: Duration::ZERO }, note);
                    (posted[sender as usize], note) = (posted[sender as usize] + 1, note + 1);
                }
            }
            lab.step(end);
            let (least, most) = (lab.heard[1..].iter().min().unwrap(), lab.heard[1..].iter().max().unwrap());
            // A rest that is granted with what is before it makes turns differ a little; whoever had all its turns at once would be
            // eight messages ahead.
            assert!(lost > 0 || most - least <= 5, "{senders}: {:?}", lab.heard);
        }
        let jain = jain(&lab.came, senders);
        assert!(lab.came.len() > 10 * senders as usize && jain > 0.99, "{senders}: {} came, {jain}", lab.came.len());
        assert!(lab.most <= lab.most_budget * 3 / 2, "{} of {}", lab.most, lab.most_budget);
    }
}

#[test]
fn urgent_messages_pass_what_others_send_however_long_they_are() {
    let mut lab = Lab::new(4, FaultPlan { link: link(MS / 20, 1_000_000_000), ..FaultPlan::default() }, 10);
    let planned = |sender, bytes, urgent| Planned { sender, bytes, urgent, at: Duration::ZERO };
    (1..9).for_each(|sender| assert!(lab.post(&planned(sender, 8 << 20, false), u64::from(sender))));
    lab.run(MS * 5);
    assert!(lab.post(&planned(9, 400_000, false), 9) && lab.post(&planned(10, 400_000, true), 10));
    lab.run(MS * 10_000);
    let when = |note| lab.came.iter().find(|one| one.2 == note).unwrap().0 - MS * 5;
    // Of four grants three are the urgent one's, where one of nine would be the other's.
    assert!(when(10) * 4 < when(9), "the urgent one took {:?}, the other {:?}", when(10), when(9));
    assert_eq!(lab.came.len(), 10);
}

#[test]
fn senders_that_die_with_all_the_credit_in_hand_hold_up_nobody() {
    for manner in [Manner::Silent, Manner::Killed] {
        // They are granted what they never get to send.
        let death = |peer| Death { peer: PeerId(peer), moment: Moment::At(MS * 400), manner };
        let slow = LinkPlan { bytes_per_s: 1000, ..link(MS, 0) };
        let plan = FaultPlan {
            link: link(MS, 1_000_000_000),
            links: (1..6).map(|peer| (PeerId(peer), RECEIVER, slow)).collect(),
            deaths: (1..6).map(death).collect(),
            ..FaultPlan::default()
        };
        let mut lab = Lab::new(2, plan, 8);
        let planned = |sender, at| Planned { sender, bytes: 1 << 20, urgent: false, at };
        (1..6).for_each(|sender| assert!(lab.post(&planned(sender, Duration::ZERO), u64::from(sender))));
        lab.run(MS * 390);
        let (held, budget) = (lab.outstanding(), lab.most_budget);
        assert!(held * 8 > budget * 7 && lab.came.is_empty(), "{held} of {budget} are in their hands");
        (6..9).for_each(|sender| assert!(lab.post(&planned(sender, MS * 390), u64::from(sender))));
        lab.run(MS * 1000);
        assert_eq!(lab.came.len(), 3, "the living are done long before the dead are given up");
        lab.run(MS * 8000);
        assert_eq!((lab.came.len(), lab.failed, lab.outstanding()), (3, 5, 0));
    }
}
