//! Does: the verbs wire as the sockets beside it know it: how links begin, break, go on, and end.

use super::link::{Link, Phase};
use super::proposal::{Conclusion, Proposal, conclude};
use super::wire::VerbsWire;
use crate::beside::{Beside, Words};
use crate::credit::Credit;
use crate::{Completion, LossCause, OneSided, PeerId, PeerName, RegisterError, TransportError};
use rustix::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a stopped queue pair may take to tell what became of its receives.
const DRAIN: Duration = Duration::from_millis(50);
/// How long a peer has to answer a proposal before its host is asked for. The first one it awaits, and must have answered by then.
const ANSWER: Duration = Duration::from_secs(5);
/// How long nothing may come of a peer that something is awaited of before its device is asked.
const PROBE: Duration = Duration::from_secs(2);
/// How long what a peer sent before its goodbye may still be on its way.
const LAST_FRAMES: Duration = Duration::from_millis(50);

impl VerbsWire {
    /// Makes a link to `peer`, which is on the sockets beside this wire already. It comes up once both ends have heard each
    /// other's proposal; what is posted until then waits.
    ///
    /// # Errors
    /// The device's, where the link's memory cannot be registered: use another wire.
    pub fn attach(&mut self, peer: PeerId, name: PeerName, now: Instant) -> Result<(), RegisterError> {
        let configs = (&self.config, &self.verbs);
        let link = Link::new((peer, name, now), configs, Arc::clone(&self.pool), &mut self.nic)?;
        let at = peer.index();
        if self.links.len() <= at {
            self.links.resize_with(at + 1, || None);
        }
        self.links[at] = Some(Box::new(link));
        self.propose(at, now);
        Ok(())
    }

    /// Whether the link to `peer` has been connected, by whichever means.
    pub fn is_up(&self, peer: PeerId) -> bool {
        self.links
            .get(peer.index())
            .and_then(Option::as_ref)
            .is_some_and(|link| !matches!(link.phase, Phase::Apart { .. }))
    }

    /// Why the link to `peer` cannot begin, by our own first proposal and by the one that came; `None`: it can.
    fn refusal(&self, peer: PeerId, theirs: &Words) -> Option<String> {
        let ours = self.links.get(peer.index())?.as_ref()?.ours.as_ref()?;
        let Words::Proposal(theirs) = theirs else { return Some("the other end speaks otherwise".to_owned()) };
        match Proposal::decode(theirs).map(|theirs| conclude(ours, &theirs)) {
            Some(Conclusion::Connect(..)) => None,
            Some(Conclusion::Sockets(reason)) => Some(reason),
            None => Some("the other end's proposal makes no sense".to_owned()),
        }
    }

    fn propose(&mut self, at: usize, now: Instant) {
        let timeout = self.config.timeout;
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        let proposal = link.propose(now, &mut self.nic);
        link.patience = if link.epoch == 0 { ANSWER } else { patience(Duration::ZERO, timeout) };
        for (lane, queue_pair) in link.lanes.iter().map(|lane| lane.queue_pair).enumerate() {
            self.routes.extend(queue_pair.map(|queue_pair| (queue_pair, (at, lane))));
        }
        let peer = link.peer;
        self.words.push_back((peer, Words::Proposal(proposal.encode())));
    }

    /// Sees to a link whose queue pairs have failed, or whose peer does not answer.
    pub(super) fn see_to(&mut self, at: usize, now: Instant, done: &mut Vec<Completion>) {
        let Some(link) = self.at(at).filter(|link| link.lost.is_none()) else { return };
        match link.phase {
            Phase::Apart { since: Some(since) } if now.saturating_duration_since(since) >= link.patience => {
                let (peer, waited) = (link.peer, now.saturating_duration_since(since));
                if link.epoch == 0 || waited >= self.config.timeout {
                    self.end(at, LossCause::Silent(waited), done);
                } else if !self.doubts.contains(&peer) {
                    self.doubts.push_back(peer);
                }
            }
            Phase::Up if link.fault.is_some() => {
                self.break_off(at, now, done);
                self.propose(at, now);
            }
            Phase::Up => self.probe(at, now),
            _ => {}
        }
    }

    /// Asks whether a peer's device is there, where something is awaited of it and nothing has come for a while: a host that
    /// vanishes closes no connection.
    fn probe(&mut self, at: usize, now: Instant) {
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        if std::mem::take(&mut link.active) {
            link.heard = now;
        }
        if link.is_waiting() && !link.probing && now.saturating_duration_since(link.heard) >= PROBE {
            link.send_probe(&mut self.nic);
            link.heard = now;
        }
    }

    /// Ends the queue pairs of a link, having taken all that came by them, for another try.
    fn break_off(&mut self, at: usize, now: Instant, done: &mut Vec<Completion>) {
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        if let Some(fault) = &link.fault {
            tracing::warn!(peer = %link.name, %fault, epoch = link.epoch, "queue pairs failed; they are connected anew");
            link.failures.push(now);
            link.last_fault = Some(fault.clone());
            self.count.failures += 1;
        }
        link.phase = Phase::Apart { since: None };
        link.epoch += 1;
        for queue_pair in link.lanes.iter().filter_map(|lane| lane.queue_pair) {
            self.nic.adapter.stop(queue_pair);
        }
        let until = Instant::now() + DRAIN;
        while self.at(at).is_some_and(|link| link.lanes.iter().any(|lane| lane.posted > 0)) {
            if !self.take_events(done) && Instant::now() >= until {
                break;
            }
        }
        let mut looked = Ok(false);
        if let Some(Some(link)) = self.links.get_mut(at) {
            link.close(&mut self.nic);
            // Nothing is written any more: what is there counts as received.
            looked = link.look(&mut self.nic, done);
        }
        if let Err(broken) = looked {
            self.end(at, LossCause::Protocol(broken.to_owned()), done);
        }
        self.routes.retain(|_, (other, _)| *other != at);
    }

    /// Takes a peer's proposal.
    fn consider(&mut self, at: usize, theirs: Proposal, now: Instant, done: &mut Vec<Completion>) {
        let Some(link) = self.at(at).filter(|link| link.lost.is_none()) else { return };
        if theirs.epoch == link.epoch + 1 && !matches!(link.phase, Phase::Apart { .. }) {
            // The peer's queue pairs failed first.
            self.break_off(at, now, done);
            self.propose(at, now);
        }
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        if theirs.epoch != link.epoch || link.ours.is_none() {
            let cause = LossCause::Protocol(format!("a proposal for epoch {} in epoch {}", theirs.epoch, link.epoch));
            return self.end(at, cause, done);
        }
        let resumed = link.resume(&theirs, &mut self.nic, done);
        let lanes: Vec<u32> = link.lanes.iter().filter_map(|lane| lane.queue_pair).collect();
        self.routes.retain(|pair, (other, _)| *other != at || lanes.contains(pair));
        match resumed {
            Err(broken) => self.end(at, LossCause::Protocol(broken.to_owned()), done),
            Ok(false) => {
                self.break_off(at, now, done);
                self.propose(at, now);
            }
            Ok(true) => self.resumed(at, done),
        }
    }

    fn resumed(&mut self, at: usize, done: &mut Vec<Completion>) {
        let must = self.must;
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        match &link.phase {
            Phase::Sockets(reason) if must => {
                let why = format!("GRADWIRE_TRANSPORT=verbs lets no other wire take over, but {reason}");
                let cause = link
                    .last_fault
                    .clone()
                    .map_or(LossCause::Aborted(why), |fault| LossCause::QueuePair(Arc::new(fault)));
                self.end(at, cause, done);
            }
            Phase::Sockets(reason) => {
                tracing::warn!(peer = %link.name, reason, "going on over sockets");
                self.count.fallbacks += 1;
            }
            _ if link.epoch > 0 => {
                tracing::info!(peer = %link.name, epoch = link.epoch, "queue pairs are connected again");
                self.count.reconnects += 1;
            }
            _ => {}
        }
    }
}

impl Beside for VerbsWire {
    fn greet(&mut self, peer: PeerId, name: PeerName, now: Instant) -> Result<Words, String> {
        self.attach(peer, name, now).map_err(|error| error.to_string())?;
        let ours = self.words.iter().position(|(other, _)| *other == peer).and_then(|at| self.words.remove(at));
        ours.map(|(_, words)| words).ok_or_else(|| "it has nothing to say".to_owned())
    }

    fn accept(&mut self, peer: PeerId, theirs: Words, now: Instant) -> Option<String> {
        let refusal = self.refusal(peer, &theirs);
        match &refusal {
            Some(_) => self.forget(peer),
            None => self.hear(peer, theirs, now),
        }
        refusal
    }

    fn forget(&mut self, peer: PeerId) {
        if let Some(slot) = self.links.get_mut(peer.index())
            && let Some(mut link) = slot.take()
        {
            link.close(&mut self.nic);
            self.credit.iter_mut().for_each(|credit| credit.gone(peer));
            self.routes.retain(|_, (at, _)| *at != peer.index());
            self.words.retain(|(other, _)| *other != peer);
        }
    }

    fn leave(&mut self) -> bool {
        let mut left = self.words.is_empty();
        for link in self.links.iter_mut().flatten().filter(|link| link.lost.is_none()) {
            left &= link.leave(&mut self.nic);
        }
        left
    }

    fn has(&self, peer: PeerId) -> bool {
        self.links.get(peer.index()).is_some_and(Option::is_some)
    }

    fn detach(&mut self, peer: PeerId, error: TransportError) {
        let mut done = std::mem::take(&mut self.pending);
        let left = matches!(error, TransportError::PeerLost { cause: LossCause::Goodbye, .. });
        let until = Instant::now() + if left { LAST_FRAMES } else { Duration::ZERO };
        loop {
            let any = self.take_events(&mut done);
            let Some(link) = self.at(peer.index()) else { break };
            let expected = left && matches!(link.phase, Phase::Up) && !link.heard_goodbye && link.fault.is_none();
            if link.lost.is_some() || (!any && (!expected || Instant::now() >= until)) {
                break;
            }
        }
        if let Some(Some(link)) = self.links.get_mut(peer.index()) {
            link.end(&error, &mut self.nic, &mut done);
            self.routes.retain(|_, (at, _)| *at != peer.index());
        }
        self.pending = done;
    }

    fn fall_asleep(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.pending);
        let now = Instant::now();
        self.polls = 0;
        self.flush(now, &mut done);
        let mut any = false;
        for link in self.links.iter_mut().flatten() {
            any |= link.cease_to_watch(now, &mut self.nic);
        }
        self.nic.adapter.arm();
        any |= self.take_events(&mut done);
        self.pending = done;
        !any && self.pending.is_empty() && self.words.is_empty()
    }

    fn sleep_on(&self) -> BorrowedFd<'_> {
        self.nic.adapter.sleep_on()
    }

    fn wake_up(&mut self) {
        self.look_around();
    }

    fn deadline(&self) -> Option<Instant> {
        let apart = |link: &Link| match link.phase {
            _ if link.lost.is_some() => None,
            Phase::Apart { since: Some(since) } => Some(since + link.patience),
            Phase::Up if link.is_waiting() && !link.probing => Some(link.heard + PROBE),
            _ => None,
        };
        let nap =
            |link: &Link| link.ring.watcher.nap().filter(|_| matches!(link.phase, Phase::Up) && link.lost.is_none());
        self.links
            .iter()
            .flatten()
            .flat_map(|link| [apart(link), nap(link)])
            .flatten()
            .chain(self.credit.as_ref().and_then(Credit::deadline))
            .min()
    }

    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        Some(self)
    }

    fn speaks(&self) -> bool {
        true
    }

    fn next_words(&mut self) -> Option<(PeerId, Words)> {
        self.words.pop_front()
    }

    fn next_doubt(&mut self) -> Option<PeerId> {
        self.doubts.pop_front()
    }

    fn settle(&mut self, peer: PeerId, is_there: bool, now: Instant) {
        let (at, timeout) = (peer.index(), self.config.timeout);
        let Some(Some(link)) = self.links.get_mut(at) else { return };
        let Phase::Apart { since: Some(since) } = link.phase else { return };
        let waited = now.saturating_duration_since(since);
        if is_there {
            link.patience = patience(waited, timeout);
        } else {
            let mut done = std::mem::take(&mut self.pending);
            self.end(at, LossCause::Silent(waited), &mut done);
            self.pending = done;
        }
    }

    fn hear(&mut self, peer: PeerId, words: Words, now: Instant) {
        let mut done = std::mem::take(&mut self.pending);
        let at = peer.index();
        match words {
            Words::Proposal(bytes) => match Proposal::decode(&bytes) {
                Some(theirs) => self.consider(at, theirs, now, &mut done),
                None => self.end(at, LossCause::Protocol("a proposal that makes no sense".to_owned()), &mut done),
            },
            Words::Memory(_) => {
                self.end(at, LossCause::Protocol("an offer of memory to queue pairs".to_owned()), &mut done);
            }
            Words::Frame(bytes) => {
                let Some(Some(link)) =
                    self.links.get_mut(at).filter(|link| link.as_ref().is_some_and(|link| link.lost.is_none()))
                else {
                    self.pending = done;
                    return;
                };
                if let Err(broken) = link.carry_in(&bytes, &mut self.nic, &mut done) {
                    self.end(at, LossCause::Protocol(broken.to_owned()), &mut done);
                }
            }
        }
        self.pending = done;
    }
}

/// For how long in all an answer is awaited before the peer's host is asked for again, where it has been for `waited`: not beyond
/// the `timeout`, at which the peer is given up whatever its host says.
fn patience(waited: Duration, timeout: Duration) -> Duration {
    (waited + ANSWER).min(timeout)
}

#[cfg(test)]
mod tests {
    use super::super::loopback::Fabric;
    use super::*;
    use crate::{Config, Envelope, Region, Tag, Wire};

    const TIMEOUT: Duration = Duration::from_secs(100);

    fn ends(fabric: &Fabric, timeout: Duration, now: Instant) -> [VerbsWire; 2] {
        let config = Config { timeout, ..Config::default() };
        [1, 0].map(|peer| {
            let mut wire = VerbsWire::new(&config, Box::new(fabric.adapter()));
            let name = PeerName { rank: None, host: String::new(), pid: peer, address: String::new() };
            wire.attach(PeerId(peer), name, now).unwrap();
            wire
        })
    }

    /// Carries what the ends say to each other, until they have nothing more to say.
    fn talk(ends: &mut [VerbsWire; 2], now: Instant) {
        while ends.iter().any(|end| !end.words.is_empty()) {
            for from in [0, 1] {
                while let Some((_, words)) = ends[from].next_words() {
                    ends[1 - from].hear(PeerId(from as u32), words, now);
                }
            }
        }
    }

    /// Two ends that were connected; the queue pairs of the first have failed, under a message.
    fn broken(now: Instant) -> [VerbsWire; 2] {
        broken_with(TIMEOUT, now)
    }

    fn broken_with(timeout: Duration, now: Instant) -> [VerbsWire; 2] {
        let fabric = Fabric::default();
        let mut ends = ends(&fabric, timeout, now);
        talk(&mut ends, now);
        assert!(ends[0].is_up(PeerId(1)) && ends[1].is_up(PeerId(0)));
        fabric.fail_at_random(1, 1_000_000, 1);
        let region = Region::from_vec(vec![7; 100]);
        let to = Envelope { peer: PeerId(1), tag: Tag(1), note: 0 };
        ends[0].post_send(to, region.read(0..100).unwrap()).unwrap();
        while ends[0].is_up(PeerId(1)) {
            ends[0].poll(now, &mut Vec::new());
        }
        ends
    }

    /// What the end says of its peer at `now`, when it is asked twice.
    fn silence(end: &mut VerbsWire, now: Instant) -> Option<Duration> {
        let mut done = Vec::new();
        (0..2).for_each(|_| end.poll(now, &mut done));
        done.iter().find_map(|completion| match completion {
            Completion::PeerDown { error: TransportError::PeerLost { cause: LossCause::Silent(time), .. }, .. } => {
                Some(*time)
            }
            _ => None,
        })
    }

    #[test]
    fn a_peer_that_rests_on_a_host_that_is_there_is_waited_for_and_goes_on() {
        let now = Instant::now();
        let mut ends = broken(now);
        let mut later = now;
        for _ in 0..4 {
            assert_eq!(ends[0].deadline(), Some(later + ANSWER));
            later += ANSWER;
            assert_eq!((silence(&mut ends[0], later), ends[0].next_doubt()), (None, Some(PeerId(1))));
            assert_eq!(ends[0].next_doubt(), None);
            ends[0].settle(PeerId(1), true, later);
            assert_eq!((silence(&mut ends[0], later), ends[0].next_doubt()), (None, None));
        }
        // The other one wakes up.
        talk(&mut ends, later);
        ends[1].post_recv_loan(PeerId(0), Tag(1), 100).unwrap();
        let (until, mut came) = (Instant::now() + Duration::from_secs(20), Vec::new());
        while !came.iter().any(|completion| matches!(completion, Completion::Arrived(_))) {
            assert!(Instant::now() < until, "{came:?}");
            ends[0].poll(later, &mut Vec::new());
            ends[1].poll(later, &mut came);
            talk(&mut ends, later);
        }
    }

    #[test]
    fn a_peer_whose_host_does_not_acknowledge_is_given_up_at_once() {
        let now = Instant::now();
        let [mut end, _] = broken(now);
        assert_eq!((silence(&mut end, now + ANSWER), end.next_doubt()), (None, Some(PeerId(1))));
        end.settle(PeerId(1), false, now + ANSWER);
        assert_eq!(silence(&mut end, now + ANSWER), Some(ANSWER));
    }

    #[test]
    fn a_peer_that_never_answers_is_given_up_soon_at_first_and_at_the_timeout_later() {
        let now = Instant::now();
        let [mut first, _] = ends(&Fabric::default(), TIMEOUT, now);
        assert_eq!(silence(&mut first, now + ANSWER), Some(ANSWER));
        let [mut end, _] = broken(now);
        assert_eq!(silence(&mut end, now + TIMEOUT - ANSWER), None);
        end.settle(PeerId(1), true, now + TIMEOUT - ANSWER);
        assert_eq!(silence(&mut end, now + TIMEOUT), Some(TIMEOUT));
    }

    #[test]
    fn a_peer_that_never_answers_is_looked_at_again_at_the_timeout_not_after_it() {
        let seconds = Duration::from_secs;
        let looks = |waited: u64, timeout: u64| patience(seconds(waited), seconds(timeout)).as_secs();
        assert_eq!([looks(0, 100), looks(5, 100), looks(94, 100)], [5, 10, 99]);
        assert_eq!([looks(95, 100), looks(96, 100), looks(99, 100), looks(0, 3), looks(7, 3)], [100, 100, 100, 3, 3]);
        let now = Instant::now();
        let [mut end, _] = broken(now);
        end.settle(PeerId(1), true, now + TIMEOUT - seconds(2));
        assert_eq!(end.deadline(), Some(now + TIMEOUT));
        assert_eq!(silence(&mut end, now + TIMEOUT - seconds(1)), None);
        assert_eq!(silence(&mut end, now + TIMEOUT), Some(TIMEOUT));
    }

    #[test]
    fn a_timeout_shorter_than_the_usual_wait_for_an_answer_is_kept_too() {
        let (now, short) = (Instant::now(), ANSWER / 2);
        let [mut end, _] = broken_with(short, now);
        assert_eq!((silence(&mut end, now + short / 2), end.deadline()), (None, Some(now + short)));
        assert_eq!(silence(&mut end, now + short), Some(short));
    }
}
