//! What only simulated networks do: replay, partitions, slow peers, planned deaths.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_transport::sim::{Death, LinkPlan, Manner, Moment, Partition, Slow};
use gradwire_transport::{
    Completion, Config, Envelope, FaultPlan, LossCause, PeerId, Region, SimNetwork, SimWire, Tag, TransportError, Wire,
    WorldSize,
};
use std::time::{Duration, Instant};

const MS: Duration = Duration::from_millis(1);

struct Lab {
    network: SimNetwork,
    wires: Vec<SimWire>,
    start: Instant,
    now: Instant,
    /// What came to whom, when.
    log: Vec<(Duration, usize, String)>,
}

impl Lab {
    fn new(seed: u64, plan: FaultPlan, config: &Config, count: u32) -> Self {
        let start = Instant::now();
        let network = SimNetwork::new(seed, plan, start);
        let wires = network.group(WorldSize::new(count).unwrap(), config);
        Self { network, wires, start, now: start, log: Vec::new() }
    }

    fn send(&mut self, from: usize, to: u32, note: u64, bytes: usize) -> Result<(), TransportError> {
        let slice = Region::zeroed(bytes).read(0..bytes).unwrap();
        let to = Envelope { peer: PeerId(to), tag: Tag(note % 3), note };
        self.wires[from].post_send(to, slice).map_err(|refused| refused.error)
    }

    fn receive(&mut self, at: usize, from: u32, note: u64, bytes: usize) {
        let slice = Region::zeroed(bytes).write(0..bytes).unwrap();
        self.wires[at].post_recv(PeerId(from), Tag(note % 3), slice).unwrap();
    }

    /// Lets everything happen that happens within `time`.
    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            let mut done = Vec::new();
            for (at, wire) in self.wires.iter_mut().enumerate() {
                wire.poll(self.now, &mut done);
                let when = self.now - self.start;
                self.log.extend(done.drain(..).map(|completion| (when, at, format!("{completion:?}"))));
            }
            match self.network.next_event() {
                Some(next) if next <= until => self.now = next,
                _ if self.now < until => self.now = until,
                _ => break,
            }
        }
    }
}

fn rough() -> FaultPlan {
    let link = LinkPlan {
        delay: MS,
        jitter: MS * 3,
        bytes_per_s: 100_000_000,
        lost_per_million: 200_000,
        twice_per_million: 200_000,
    };
    FaultPlan { link, ..FaultPlan::default() }
}

#[test]
fn the_same_seed_gives_the_same_events_at_the_same_times() {
    let play = |seed| {
        let mut lab = Lab::new(seed, rough(), &Config::default(), 3);
        for note in 0..60 {
            let (from, to) = ((note % 3) as usize, ((note + 1 + note % 2) % 3) as u32);
            lab.send(from, to, note, (note * 3000) as usize).unwrap();
            lab.receive(to as usize, from as u32, note, 200_000);
            lab.run(MS);
        }
        lab.run(MS * 2000);
        assert_eq!(lab.log.len(), 120, "every operation ended");
        lab.log
    };
    assert_eq!(play(5), play(5));
    assert_ne!(play(5), play(6));
}

#[test]
fn bandwidth_and_delay_tell_when_a_message_comes() {
    let link = LinkPlan { delay: MS * 10, bytes_per_s: 1_000_000, ..LinkPlan::default() };
    let mut lab = Lab::new(1, FaultPlan { link, ..FaultPlan::default() }, &Config::default(), 2);
    lab.send(0, 1, 0, 50_000).unwrap();
    lab.receive(1, 0, 0, 50_000);
    lab.run(MS * 1000);
    let (when, at, what) = &lab.log[0];
    assert!(*at == 1 && what.starts_with("Received"), "{what}");
    assert!(*when >= MS * 60 && *when < MS * 61, "{when:?}");
}

#[test]
fn a_short_partition_heals_and_nothing_is_lost() {
    let cut = Partition { from: MS * 5, until: MS * 500, side: vec![PeerId(0)] };
    let plan = FaultPlan { partitions: vec![cut], ..rough() };
    let mut lab = Lab::new(3, plan, &Config::default(), 2);
    for note in 0..30 {
        lab.send(0, 1, note, 1000).unwrap();
        lab.receive(1, 0, note, 1000);
        lab.run(MS);
    }
    lab.run(MS * 5000);
    let received: Vec<_> = lab.log.iter().filter(|(_, at, what)| *at == 1 && what.starts_with("Received")).collect();
    assert_eq!(received.len(), 30);
    assert!(received.iter().all(|(when, ..)| *when < MS * 12 || *when >= MS * 500), "{received:?}");
}

#[test]
fn a_long_partition_ends_both_sides_by_silence() {
    let cut = Partition { from: MS * 5, until: MS * 5000, side: vec![PeerId(2)] };
    let plan = FaultPlan { partitions: vec![cut], ..FaultPlan::default() };
    let config = Config { timeout: MS * 200, ..Config::default() };
    let mut lab = Lab::new(3, plan, &config, 3);
    lab.receive(0, 2, 0, 10);
    lab.run(MS * 1000);
    let downs: Vec<_> = lab.log.iter().filter(|(_, _, what)| what.starts_with("PeerDown")).collect();
    // Both of the others lose peer 2, which loses both; the one receive fails.
    assert_eq!((downs.len(), lab.log.len()), (4, 5), "{:?}", lab.log);
    assert!(downs.iter().all(|(when, _, what)| *when == MS * 205 && what.contains("Silent")), "{downs:?}");
}

#[test]
fn a_slow_peer_is_late_but_whole() {
    let slow = Slow { peer: PeerId(1), from: Duration::ZERO, until: MS * 100, extra: MS * 40 };
    let plan = FaultPlan { slow: vec![slow], ..FaultPlan::default() };
    let mut lab = Lab::new(3, plan, &Config::default(), 3);
    for to in [1, 2] {
        lab.send(0, to, 0, 10).unwrap();
        lab.receive(to as usize, 0, 0, 10);
    }
    lab.run(MS * 1000);
    let when = |who| lab.log.iter().find(|(_, at, what)| *at == who && what.starts_with("Received")).unwrap().0;
    assert_eq!((when(1), when(2)), (MS * 40, Duration::ZERO));
}

#[test]
fn a_peer_dies_at_its_third_message() {
    for (manner, after) in [(Manner::Killed, Duration::ZERO), (Manner::Silent, MS * 200)] {
        let death = Death { peer: PeerId(1), moment: Moment::Message(2), manner };
        let plan = FaultPlan { deaths: vec![death], ..FaultPlan::default() };
        let config = Config { timeout: MS * 200, ..Config::default() };
        let mut lab = Lab::new(3, plan, &config, 2);
        for note in 0..3 {
            lab.receive(0, 1, note, 10);
        }
        lab.send(1, 0, 0, 10).unwrap();
        lab.send(1, 0, 1, 10).unwrap();
        lab.run(MS * 10);
        assert!(matches!(lab.send(1, 0, 2, 10), Err(TransportError::Closed)));
        lab.run(MS * 1000);
        let seen: Vec<_> = lab.log.iter().filter(|(_, at, _)| *at == 0).collect();
        let kinds: Vec<&str> = seen.iter().map(|(_, _, what)| what.split(' ').next().unwrap()).collect();
        assert_eq!(kinds, ["Received", "Received", "PeerDown", "RecvFailed"]);
        assert_eq!(seen[2].0, MS * 10 + after);
    }
}

#[test]
fn a_planned_death_comes_at_its_time() {
    let death = Death { peer: PeerId(0), moment: Moment::At(MS * 30), manner: Manner::Killed };
    let plan = FaultPlan { deaths: vec![death], ..FaultPlan::default() };
    let mut lab = Lab::new(3, plan, &Config::default(), 2);
    lab.run(MS * 100);
    let mut seen = lab.log.iter().map(|(when, at, what)| (*when, *at, what.contains("PeerDown")));
    assert_eq!(seen.next(), Some((MS * 30, 0, true)));
    assert_eq!(seen.next(), Some((MS * 30, 1, true)));
    assert_eq!(seen.next(), None);
}

#[test]
fn a_peer_that_comes_later_is_told_to_those_before() {
    let network = SimNetwork::new(1, FaultPlan::default(), Instant::now());
    let mut server = network.wire(PeerId(7), &Config::default());
    let mut client = network.wire(PeerId(2), &Config::default());
    let (mut done, now) = (Vec::new(), Instant::now());
    server.poll(now, &mut done);
    assert!(matches!(&done[..], [Completion::PeerUp(PeerId(2))]), "{done:?}");
    client.shutdown(now);
    done.clear();
    server.poll(now + MS, &mut done);
    let goodbye = |error: &TransportError| matches!(error, TransportError::PeerLost { cause: LossCause::Goodbye, .. });
    assert!(matches!(&done[..], [Completion::PeerDown { peer: PeerId(2), error }] if goodbye(error)), "{done:?}");
}
