//! Does: measures what messages cost when a group has formed: between two ranks of one host and two of two, while the others
//! wait for rank 0 to tell the result.

use super::Group;
use crate::link_cost::{self, LinkCost, LinkCosts};
use crate::{Completion, Envelope, PeerId, Rank, Region, RegionSlice, Tag, TransportError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Not a control message: those do not go by the better wire that is to be measured.
const PROBE: Tag = Tag(1 << 61);
const REPORT: Tag = Tag(Tag::CONTROL_BIT | 10);
const COSTS: Tag = Tag(Tag::CONTROL_BIT | 11);
/// Exchanges of each kind: the quickest counts, the others met something else on their way.
const TIMES: u32 = 6;
/// Short messages at once.
const BURST: u32 = 16;
/// A long message.
const LONG_BYTES: usize = 256 << 10;
const SHORT_BYTES: usize = 8;
/// Turns of polling before a sleep.
const SPINS: u32 = 2000;

/// Puts the costs into `group`, the same on all ranks.
///
/// # Errors
/// `Timeout` where a rank does not answer; `PeerLost` where it has gone.
pub(super) fn measure(group: &mut Group, deadline: Instant) -> Result<(), TransportError> {
    let me = group.rank;
    let lowest = |rank: Rank| group.hosts.get(rank.index()).copied().unwrap_or(rank.0);
    let ranks = || group.world_size.ranks();
    // The first two of one host, and the first of the first two hosts.
    let near = ranks().find_map(|one| Some((one, ranks().find(|&two| two > one && lowest(two) == lowest(one))?)));
    let far = ranks().find(|&two| lowest(two) != lowest(Rank(0))).map(|two| (Rank(0), two));
    let mut costs = LinkCosts { measured: true, ..LinkCosts::default() };
    costs.cores = std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1));
    let (sends, receives) = (Region::zeroed(LONG_BYTES), Region::zeroed(LONG_BYTES));
    let mut meter = Meter { group, deadline, sends, receives, open: 0 };
    for (pair, inside) in [(near, true), (far, false)] {
        let Some((asks, answers)) = pair else { continue };
        if me == asks {
            let cost = meter.ask(answers)?;
            if inside { costs.near = cost } else { costs.far = cost }
        } else if me == answers {
            meter.answer(asks)?;
        }
    }
    if let Some((asks, _)) = near.filter(|(asks, _)| *asks != Rank(0)) {
        if me == asks {
            meter.say(Rank(0), REPORT, costs.encode())?;
        } else if me == Rank(0) {
            let said = meter.hear(asks, REPORT, link_cost::ENCODED_BYTES)?;
            costs.near = LinkCosts::decode(&said).map_or(costs.near, |said| said.near);
        }
    }
    if me == Rank(0) {
        let others: Vec<Rank> = meter.group.world_size.ranks().skip(1).collect();
        others.into_iter().try_for_each(|rank| meter.say(rank, COSTS, costs.encode()))?;
    } else {
        let said = meter.hear(Rank(0), COSTS, link_cost::ENCODED_BYTES)?;
        costs = LinkCosts::decode(&said).unwrap_or_default();
    }
    meter.settle()?;
    group.costs = costs;
    Ok(())
}

/// A group whose links are measured, with memory that serves again: a device knows it after its first use.
struct Meter<'a> {
    group: &'a mut Group,
    deadline: Instant,
    sends: Arc<Region>,
    receives: Arc<Region>,
    /// Sends that have not ended.
    open: usize,
}

impl Meter<'_> {
    /// Times exchanges with `peer`, who answers each.
    fn ask(&mut self, peer: Rank) -> Result<LinkCost, TransportError> {
        let short = self.quickest(peer, 1, SHORT_BYTES)?;
        let burst = self.quickest(peer, BURST, SHORT_BYTES)?;
        let long = self.quickest(peer, 1, LONG_BYTES)?;
        let latency_ns = short / 2.0;
        // The answer is short, whatever was asked.
        let message_ns = (burst - short).max(0.0) / f64::from(BURST - 1);
        let byte_ns = (long - short).max(0.0) / (LONG_BYTES - SHORT_BYTES) as f64;
        Ok(LinkCost { latency_ns, message_ns, byte_ns })
    }

    fn quickest(&mut self, peer: Rank, messages: u32, bytes: usize) -> Result<f64, TransportError> {
        let mut quickest = f64::INFINITY;
        for _ in 0..TIMES {
            let began = Instant::now();
            (0..messages).try_for_each(|_| self.probe(peer, bytes))?;
            self.hear(peer, PROBE, SHORT_BYTES)?;
            quickest = quickest.min(began.elapsed().as_nanos() as f64);
        }
        Ok(quickest)
    }

    fn answer(&mut self, peer: Rank) -> Result<(), TransportError> {
        for (messages, bytes) in [(1, SHORT_BYTES), (BURST, SHORT_BYTES), (1, LONG_BYTES)] {
            for _ in 0..TIMES {
                (0..messages).try_for_each(|_| self.hear(peer, PROBE, bytes).map(drop))?;
                self.probe(peer, SHORT_BYTES)?;
            }
        }
        Ok(())
    }

    fn probe(&mut self, to: Rank, bytes: usize) -> Result<(), TransportError> {
        let slice = self.sends.read(0..bytes).expect("this memory is never written");
        self.post(to, PROBE, slice)
    }

    fn say(&mut self, to: Rank, tag: Tag, bytes: Vec<u8>) -> Result<(), TransportError> {
        let region = Region::from_vec(bytes);
        let slice = region.read(0..region.len()).expect("nobody else has this region");
        self.post(to, tag, slice)
    }

    fn post(&mut self, to: Rank, tag: Tag, slice: RegionSlice) -> Result<(), TransportError> {
        self.group
            .wire
            .post_send(Envelope { peer: to.into(), tag, note: 0 }, slice)
            .map_err(|refused| refused.error)?;
        self.open += 1;
        Ok(())
    }

    /// Waits until every send has ended: whoever uses the wire next would take the end for one of its own.
    fn settle(&mut self) -> Result<(), TransportError> {
        let (mut done, began) = (Vec::new(), Instant::now());
        while self.open > 0 {
            self.group.wire.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                self.open -= note(completion, &mut self.group.news);
            }
            let now = Instant::now();
            if self.open > 0 && now >= self.deadline {
                let what = "ranks to take what was sent while links were measured".to_owned();
                return Err(TransportError::Timeout { what, waited: began.elapsed() });
            }
            if self.open > 0 {
                self.group.wire.park(self.deadline.min(now + Duration::from_millis(1)));
            }
        }
        Ok(())
    }

    fn hear(&mut self, from: Rank, tag: Tag, most: usize) -> Result<Vec<u8>, TransportError> {
        let (began, peer) = (Instant::now(), PeerId::from(from));
        let slice = self.receives.write(0..most).expect("one receive at a time has this memory");
        let wire = &mut self.group.wire;
        let mut heard = None;
        wire.post_recv(peer, tag, slice).map_err(|refused| refused.error)?;
        let (mut done, mut idle) = (Vec::new(), 0);
        loop {
            wire.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                match completion {
                    Completion::Received { from, slice, bytes } if (from.peer, from.tag) == (peer, tag) => {
                        heard = Some(slice[..bytes].to_vec());
                    }
                    Completion::RecvFailed { peer: lost, error, .. } if lost == peer => return Err(error),
                    other => self.open -= note(other, &mut self.group.news),
                }
            }
            if let Some(heard) = heard.take() {
                return Ok(heard);
            }
            let now = Instant::now();
            if now >= self.deadline {
                let what = format!("{from} to answer while links are measured: is it alive, or stopped?");
                return Err(TransportError::Timeout { what, waited: began.elapsed() });
            }
            if idle < SPINS {
                idle += 1;
                std::hint::spin_loop();
            } else {
                wire.park(self.deadline.min(now + Duration::from_millis(100)));
            }
        }
    }
}

/// How many of our sends `completion` ends. What befell a peer is kept for whoever uses the wire next.
fn note(completion: Completion, news: &mut Vec<Completion>) -> usize {
    match completion {
        Completion::Sent { .. } | Completion::SendFailed { .. } => 1,
        down @ Completion::PeerDown { .. } => {
            news.push(down);
            0
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LossCause, PeerName};

    #[test]
    fn who_is_lost_meanwhile_is_told_to_whoever_comes_next() {
        let name = PeerName { rank: Some(Rank(2)), host: "h".into(), pid: 3, address: "a".into() };
        let error = TransportError::PeerLost { peer: Box::new(name), cause: LossCause::Closed };
        let mut news = Vec::new();
        let slice = Region::zeroed(1).read(0..1).unwrap();
        let to = Envelope { peer: PeerId(2), tag: PROBE, note: 0 };
        assert_eq!(note(Completion::Sent { to, slice }, &mut news), 1);
        assert_eq!(note(Completion::PeerDown { peer: PeerId(2), error }, &mut news), 0);
        assert!(matches!(news[..], [Completion::PeerDown { peer: PeerId(2), .. }]));
    }
}
