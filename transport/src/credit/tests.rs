//! Does: tries credit in a simulated network: senders, a switch with one queue before the receiver, delay, death.

use super::*;
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A grant reaches its sender, which has so many bytes to send by it.
    Granted { sender: u32, bytes: u64 },
    /// Bytes reach the switch.
    Switched { sender: u32, bytes: u64 },
    /// Bytes reach the receiver.
    Came { sender: u32, bytes: u64 },
    /// The receiver looks again.
    Look,
}

/// The path to one receiver.
struct Network {
    credit: Credit,
    start: Instant,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    number: u64,
    /// Of every link, bytes a second.
    rate: f64,
    /// One way.
    delay: Duration,
    /// When each sender's link, and the receiver's, is free.
    busy: Vec<Duration>,
    down_busy: Duration,
    /// Senders that send nothing any more.
    dead: Vec<bool>,
    /// Grants of each message so far, and what has come of each sender.
    granted: BTreeMap<(u32, u32), u64>,
    came: Vec<u64>,
    /// The longest queue in the switch since it was last looked at.
    queue: u64,
    look: Option<Duration>,
}

impl Network {
    fn new(senders: u32, rate: f64, delay: Duration) -> Self {
        Self {
            credit: Credit::new(CreditSettings::default()),
            start: Instant::now(),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            number: 0,
            rate,
            delay,
            busy: vec![Duration::ZERO; senders as usize],
            down_busy: Duration::ZERO,
            dead: vec![false; senders as usize],
            granted: BTreeMap::new(),
            came: vec![0; senders as usize],
            queue: 0,
            look: None,
        }
    }

    fn want(&mut self, sender: u32, id: u32, bytes: u64, urgent: bool) {
        self.credit.want(PeerId(sender), Want { id, bytes, urgent });
        self.granted.insert((sender, id), 0);
    }

    fn at(&mut self, when: Duration, event: Event) {
        self.number += 1;
        self.events.push(Reverse((when, self.number, event)));
    }

    fn takes(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate)
    }

    /// Hands out what the receiver grants now.
    fn grant(&mut self) -> Vec<Grant> {
        let mut grants = Vec::new();
        let before = self.credit.outstanding();
        self.credit.grant(self.start + self.now, &mut grants);
        for grant in &grants {
            let until = self.granted.get_mut(&(grant.to.0, grant.id)).expect("only what is wanted is granted");
            assert!(grant.until > *until, "a grant must go on where the last one ended");
            let bytes = grant.until - *until;
            *until = grant.until;
            self.at(self.now + self.delay, Event::Granted { sender: grant.to.0, bytes });
        }
        let held = |pace| self.credit.senders.values().filter(|s| s.pace == pace).map(Sender::outstanding).sum::<u64>();
        let late = held(Pace::Late);
        let most = self.credit.budget().max(MOST_GRANT * 3 / 2) + held(Pace::Slow).min(self.credit.budget() / 2);
        assert!(grants.is_empty() || self.credit.outstanding() - late <= most, "{before} were out");
        if let Some(deadline) = self.credit.deadline().map(|at| at.saturating_duration_since(self.start))
            && self.look.is_none_or(|look| look <= self.now || deadline < look)
        {
            self.look = Some(deadline.max(self.now));
            self.at(deadline.max(self.now), Event::Look);
        }
        grants
    }

    /// Lets the next thing happen; whether there was any.
    fn step(&mut self) -> bool {
        let Some(Reverse((when, _, event))) = self.events.pop() else { return false };
        self.now = when;
        match event {
            Event::Granted { sender, bytes } if !self.dead[sender as usize] => {
                // Packets go one after the other, so that others come between them at the switch.
                for start in (0..bytes).step_by(1500) {
                    let packet = (bytes - start).min(1500);
                    let ready = self.busy[sender as usize].max(self.now) + self.takes(packet);
                    self.busy[sender as usize] = ready;
                    self.at(ready + self.delay / 2, Event::Switched { sender, bytes: packet });
                }
            }
            Event::Switched { sender, bytes } => {
                let waits = self.down_busy.saturating_sub(self.now);
                self.queue = self.queue.max((waits.as_secs_f64() * self.rate) as u64);
                self.down_busy = self.down_busy.max(self.now) + self.takes(bytes);
                self.at(self.down_busy + self.delay / 2, Event::Came { sender, bytes });
            }
            Event::Came { sender, bytes } => {
                self.came[sender as usize] += bytes;
                self.credit.came(PeerId(sender), bytes, self.start + self.now);
            }
            Event::Granted { .. } | Event::Look => {}
        }
        true
    }
}

/// Lets `senders` push for `seconds` as fast as they are let; the share of the link that they had, and the longest queue
/// once the path was known.
fn saturate(network: &mut Network, senders: u32, bytes: u64, seconds: f64) -> (f64, u64) {
    let mut next = vec![0; senders as usize];
    let mut came_before = 0;
    let (warm, end) = (Duration::from_secs_f64(seconds / 4.0), Duration::from_secs_f64(seconds));
    while network.now < end {
        for sender in 0..senders {
            while network.credit.senders.get(&PeerId(sender)).is_none_or(|s| s.messages[1].len() < 2) {
                network.want(sender, next[sender as usize], bytes, false);
                next[sender as usize] += 1;
            }
        }
        network.grant();
        let was_warm = network.now >= warm;
        assert!(network.step(), "everything has stopped");
        if !was_warm && network.now >= warm {
            (came_before, network.queue) = (network.came.iter().sum(), 0);
        }
    }
    let came = network.came.iter().sum::<u64>() - came_before;
    (came as f64 / (network.rate * (end - warm).as_secs_f64()), network.queue)
}

#[test]
fn many_senders_fill_the_link_alike_and_leave_the_switch_room() {
    for senders in [1, 2, 4, 16, 64] {
        let mut network = Network::new(senders, 125e6, Duration::from_micros(50));
        let (share, queue) = saturate(&mut network, senders, 256 << 10, 0.8);
        let came: Vec<f64> = network.came.iter().map(|bytes| *bytes as f64).collect();
        let (sum, squares) = came.iter().fold((0.0, 0.0), |(a, b), x| (a + x, b + x * x));
        let jain = sum * sum / (f64::from(senders) * squares);
        assert!(share > 0.97, "{senders} senders had {share} of the link");
        assert!(jain > 0.99, "{senders} senders shared it with Jain's index {jain}");
        assert!(queue < 64 << 10, "{senders} senders filled the switch with {queue} bytes");
    }
}

#[test]
fn the_budget_grows_to_what_a_long_fast_path_holds() {
    let mut network = Network::new(4, 3e9, Duration::from_micros(100));
    let (share, _) = saturate(&mut network, 4, 1 << 20, 0.2);
    assert!(share > 0.9, "{share} of the link, with a budget of {}", network.credit.budget());
    assert!(network.credit.budget() < 4 << 20, "the path holds 0.9 MB, not {}", network.credit.budget());
}

#[test]
fn whole_messages_too_fill_a_path_that_holds_more_than_two_of_them() {
    let mut network = Network::new(8, 3e9, Duration::from_micros(300));
    network.credit = Credit::of_whole_messages(CreditSettings::default());
    let (share, _) = saturate(&mut network, 8, 256 << 10, 0.3);
    assert!(share > 0.9, "{share} of the link, with a budget of {}", network.credit.budget());
    assert!(network.credit.budget() < 6 << 20, "the path holds 1.8 MB and a message, not {}", network.credit.budget());
}

#[test]
fn urgent_messages_go_first_and_starve_nobody() {
    let mut network = Network::new(9, 125e6, Duration::from_micros(50));
    for sender in 0..8 {
        network.want(sender, 0, 10 << 20, false);
    }
    let mut others = 0;
    let mut urgents = 0;
    for id in 0..400 {
        network.want(8, id, 8 << 10, id % 2 == 0);
        for grant in network.grant() {
            if grant.to == PeerId(8) { urgents += 1 } else { others += 1 }
        }
        network.step();
    }
    let mut streak = 0;
    while urgents < 400 {
        for grant in network.grant() {
            let urgent = grant.to == PeerId(8);
            (urgents, others) = (urgents + u32::from(urgent), others + u32::from(!urgent));
            streak = if urgent { 0 } else { streak + 1 };
            assert!(streak < 2 || urgents == 400, "urgent messages waited for two others");
        }
        assert!(network.step());
    }
    assert!(others >= urgents / 4, "{others} other grants beside {urgents} urgent ones");
}

#[test]
fn credit_of_who_is_lost_is_given_to_others_at_once() {
    let mut credit = Credit::new(CreditSettings::default());
    let now = Instant::now();
    credit.want(PeerId(1), Want { id: 0, bytes: 1 << 30, urgent: false });
    credit.want(PeerId(2), Want { id: 0, bytes: 1 << 20, urgent: false });
    let mut grants = Vec::new();
    credit.grant(now, &mut grants);
    let held = credit.senders[&PeerId(1)].outstanding();
    assert!(held > 0 && credit.outstanding() <= credit.budget());
    grants.clear();
    credit.grant(now, &mut grants);
    assert!(grants.is_empty(), "nothing has come, so nothing is granted");
    credit.gone(PeerId(1));
    credit.grant(now, &mut grants);
    assert!(!grants.is_empty() && grants.iter().all(|grant| grant.to == PeerId(2)));
    // What it sent before it went still comes, and counts for nothing.
    credit.came(PeerId(1), held, now);
    credit.gone(PeerId(1));
    assert!(credit.outstanding() <= credit.budget());
}

#[test]
fn more_bytes_than_were_granted_count_for_nothing() {
    let mut credit = Credit::new(CreditSettings::default());
    credit.want(PeerId(1), Want { id: 0, bytes: 20_000, urgent: false });
    credit.grant(Instant::now(), &mut Vec::new());
    credit.came(PeerId(1), u64::MAX, Instant::now());
    assert_eq!(credit.outstanding(), 0);
}

#[test]
fn whole_messages_are_granted_two_at_a_time_in_turns() {
    let mut credit = Credit::of_whole_messages(CreditSettings::default());
    let (now, mut grants, mut order) = (Instant::now(), Vec::new(), Vec::new());
    let bytes = 1 << 20;
    for (peer, id) in (0..3).flat_map(|peer| (0..2).map(move |id| (peer, id))) {
        credit.want(PeerId(peer), Want { id, bytes, urgent: false });
    }
    credit.grant(now, &mut grants);
    assert_eq!(grants.len(), 2);
    while let Some(grant) = (!grants.is_empty()).then(|| grants.remove(0)) {
        assert_eq!(grant.until, bytes, "a message is granted whole");
        order.push((grant.to.0, grant.id));
        credit.came(grant.to, bytes, now);
        credit.grant(now, &mut grants);
        assert!(grants.len() <= 2);
    }
    assert_eq!(order, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]);
    assert_eq!(credit.outstanding(), 0);
}

#[test]
fn what_slow_senders_hold_is_lent_to_others_up_to_half_the_budget() {
    // A budget of whole grants, and half of it too.
    let mut credit = Credit::new(CreditSettings { allowance_bytes: 3 * LEAST_GRANT, ..CreditSettings::default() });
    let (start, mut grants) = (Instant::now(), Vec::new());
    for peer in 0..20 {
        credit.want(PeerId(peer), Want { id: 0, bytes: 1 << 20, urgent: false });
    }
    let budget = credit.budget();
    let mut granted = |credit: &mut Credit, at: Duration| {
        grants.clear();
        credit.grant(start + at, &mut grants);
        grants.iter().map(|grant| (grant.to.0, grant.until)).collect::<Vec<_>>()
    };
    let first = granted(&mut credit, Duration::ZERO);
    assert_eq!(first.iter().map(|grant| grant.1).sum::<u64>(), budget);
    assert!(granted(&mut credit, SLOW / 2).is_empty(), "they may be on their way");
    assert_eq!(credit.deadline(), Some(start + SLOW));
    let second = granted(&mut credit, SLOW);
    assert_eq!(second.iter().map(|grant| grant.1).sum::<u64>(), budget / 2);
    assert!(second.iter().all(|grant| !first.contains(grant)), "who is slow gets no more");
    assert!(granted(&mut credit, SLOW * 3).is_empty(), "not even though all are slow now");
    let third = granted(&mut credit, LATE);
    assert!(!third.is_empty() && third.iter().all(|grant| !first.contains(grant) && !second.contains(grant)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever is wanted by senders that live is granted whole and comes, however many others die with grants in hand.
    #[test]
    fn all_that_the_living_want_comes(
        messages in prop::collection::vec((0u32..12, 1u64..400_000, any::<bool>()), 1..60),
        deaths in prop::collection::vec((0u32..12, 0usize..80, any::<bool>()), 0..6),
        rate in 1e7f64..2e9,
        delay_us in 5u64..400,
    ) {
        let mut network = Network::new(12, rate, Duration::from_micros(delay_us));
        for (id, &(sender, bytes, urgent)) in messages.iter().enumerate() {
            network.want(sender, id as u32, bytes, urgent);
        }
        let mut steps = 0;
        loop {
            for &(sender, at, told) in &deaths {
                if at == steps {
                    network.dead[sender as usize] = true;
                    // The system tells of a process that died, not of one that hangs.
                    if told {
                        network.credit.gone(PeerId(sender));
                    }
                }
            }
            network.grant();
            steps += 1;
            if !network.step() {
                break;
            }
        }
        for sender in (0..12).filter(|sender| !deaths.iter().any(|(dead, at, _)| dead == sender && *at < steps)) {
            let wanted: u64 = messages.iter().filter(|message| message.0 == sender).map(|message| message.1).sum();
            prop_assert_eq!(network.came[sender as usize], wanted, "of sender {}", sender);
        }
    }

    /// Senders that always want more never differ by more than two grants.
    #[test]
    fn turns_are_fair_at_every_moment(senders in 2u32..20, bytes in 20_000u64..2_000_000, rate in 5e7f64..3e9) {
        let mut network = Network::new(senders, rate, Duration::from_micros(60));
        let mut next = vec![0; senders as usize];
        for _ in 0..2000 {
            for sender in 0..senders {
                while network.credit.senders.get(&PeerId(sender)).is_none_or(|s| s.messages[1].len() < 2) {
                    network.want(sender, next[sender as usize], bytes, false);
                    next[sender as usize] += 1;
                }
            }
            network.grant();
            prop_assert!(network.step());
            let granted: Vec<u64> = network.credit.senders.values().map(|sender| sender.granted).collect();
            let (least, most) = (granted.iter().min().unwrap(), granted.iter().max().unwrap());
            // A message's rest may be half a grant longer, or any shorter: turns differ by as much over and over, within
            // what one message is.
            let turns = most / bytes + 1;
            prop_assert!(most - least <= MOST_GRANT * 3 / 2 + bytes.min(MOST_GRANT * turns), "{least} to {most}");
        }
    }
}
