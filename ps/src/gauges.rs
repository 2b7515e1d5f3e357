//! Pure: what a server counts for those who watch it: requests by their kind, time from arrival to answer.

use crate::header::{Header, Kind};
use crate::{Reason, ShardStatus};
use gradwire_transport::PeerId;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Upper bounds of the classes that durations are counted in, in microseconds: thrice the one before, about.
pub const LATENCY_BOUNDS_US: [u64; 14] =
    [10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000];

/// Durations, counted in classes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Latencies {
    /// How many fell into each class, and beyond the last.
    pub counts: [u64; LATENCY_BOUNDS_US.len() + 1],
    /// Their sum.
    pub total: Duration,
}

impl Latencies {
    fn add(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let class = LATENCY_BOUNDS_US.partition_point(|bound| *bound < us);
        self.counts[class] += 1;
        self.total += took;
    }
}

/// What a server tells whoever watches it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Tables, memory and clients.
    pub status: ShardStatus,
    /// From the arrival of a push to its answer; for a fused push and pull too.
    pub push: Latencies,
    /// From the arrival of a pull to its answer.
    pub pull: Latencies,
    /// Requests refused, by reason.
    pub refused: Vec<(Reason, u64)>,
    /// Time since each client's last request, in the order of [`Report::status`].
    pub idle: Vec<Duration>,
    /// Bytes of each client's contributions that wait, in that order.
    pub waiting_bytes: Vec<u64>,
}

/// A request without an answer.
#[derive(Debug)]
struct Asked {
    kind: Kind,
    since: Instant,
}

/// Most requests without an answer that are looked after: far more than honest clients have.
const MOST_ASKED: usize = 1 << 20;

/// Counters of one shard.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    push: Latencies,
    pull: Latencies,
    refused: BTreeMap<u16, u64>,
    /// Requests without an answer: of which connection, in which slot.
    asked: HashMap<(PeerId, u32), Asked>,
    seen: HashMap<PeerId, Instant>,
}

impl Gauges {
    /// A request goes to the shard.
    pub(crate) fn ask(&mut self, from: PeerId, header: &Header, now: Instant) {
        self.seen.insert(from, now);
        if self.asked.len() < MOST_ASKED {
            self.asked.insert((from, header.slot), Asked { kind: header.kind, since: now });
        }
    }

    /// It is answered.
    pub(crate) fn answer(&mut self, to: PeerId, header: &Header, now: Instant) {
        let Some(Asked { kind, since }) = self.asked.remove(&(to, header.slot)) else { return };
        let took = now.saturating_duration_since(since);
        match (header.kind, kind) {
            (Kind::Refused, _) => *self.refused.entry(header.status).or_default() += 1,
            (Kind::Later, _) => {}
            (_, Kind::Push | Kind::PushPull | Kind::SparsePush) => self.push.add(took),
            (_, Kind::Pull | Kind::SparsePull) => self.pull.add(took),
            _ => {}
        }
    }

    /// A connection is closed.
    pub(crate) fn gone(&mut self, peer: PeerId) {
        self.seen.remove(&peer);
        self.asked.retain(|(other, _), _| *other != peer);
    }

    /// All of it, with `status`, whose clients are reached by `peers`.
    pub(crate) fn report(&self, status: ShardStatus, peers: &[PeerId], now: Instant) -> Report {
        let idle =
            peers.iter().map(|peer| self.seen.get(peer).map_or(Duration::ZERO, |seen| now.duration_since(*seen)));
        Report {
            push: self.push.clone(),
            pull: self.pull.clone(),
            refused: self.refused.iter().map(|(status, count)| (Reason::of_status(*status), *count)).collect(),
            idle: idle.collect(),
            waiting_bytes: Vec::new(),
            status,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_when_it_is_answered_and_refusals_apart() {
        let (mut gauges, start) = (Gauges::default(), Instant::now());
        let later = |us| start + Duration::from_micros(us);
        let header = |kind, slot| Header { slot, ..Header::new(kind) };
        let asked = [header(Kind::Push, 1), header(Kind::Pull, 2), header(Kind::PushPull, 3), header(Kind::Pull, 4)];
        for header in &asked {
            gauges.ask(PeerId(0), header, start);
        }
        gauges.answer(PeerId(0), &asked[0].reply(Kind::Done), later(10));
        gauges.answer(PeerId(0), &asked[1].reply(Kind::Done), later(31));
        let refused = Header { status: Reason::Waited as u16, ..asked[2].reply(Kind::Refused) };
        gauges.answer(PeerId(0), &refused, later(99));
        // Another connection's slot of that number.
        gauges.answer(PeerId(1), &asked[3].reply(Kind::Done), later(99));
        let report = gauges.report(ShardStatus::default(), &[PeerId(0), PeerId(1)], later(50));
        assert_eq!((report.push.counts[0], report.push.counts.iter().sum::<u64>()), (1, 1));
        assert_eq!((report.pull.counts[2], report.pull.counts.iter().sum::<u64>()), (1, 1));
        assert_eq!(report.pull.total, Duration::from_micros(31));
        assert_eq!(report.refused, [(Reason::Waited, 1)]);
        assert_eq!(report.idle, [Duration::from_micros(50), Duration::ZERO]);
        gauges.gone(PeerId(0));
        assert!(gauges.asked.is_empty() && gauges.seen.is_empty());
    }
}
