//! Does: the waist, for TCP.

use super::incoming::Receive;
use super::outgoing::Cargo;
use super::{FEW, Link, TcpWire, silence};
use crate::region::Loan;
use crate::{
    Completion, Envelope, Identity, LossCause, PeerId, PeerName, PostError, Probe, Region, RegionSlice, RegionSliceMut,
    RegisterError, SendLoan, Tag, Traffic, TransportError, Wake, Wire, WireKind,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that one poll hands over: whoever takes them gives their memory back while it lies in the processor's cache, and what
/// comes next is written there. Only what was handed over counts, so that who polls until nothing comes leaves nothing.
const POLL_BYTES: u64 = 256 << 10;
/// Longest message that is written when it is posted; longer ones wait for what is posted next, and go with it by the next poll.
const AT_ONCE_BYTES: usize = 32 << 10;
/// How often the listeners are looked at while the wire is polled.
const DOOR_TURNS: u32 = 64;
/// Longest message that can be lent.
const LOAN_BYTES: usize = 4 << 20;
/// How long a closed connection's last bytes are waited for.
const LINGER: Duration = Duration::from_millis(100);

impl TcpWire {
    fn room(&self, peer: PeerId, queued: usize) -> Result<(), TransportError> {
        if queued < self.config.queue_depth {
            return Ok(());
        }
        Err(TransportError::QueueFull { peer: Box::new(self.name(peer)), queued })
    }

    /// Whether an operation with `peer` can be posted.
    fn ready(&mut self, peer: PeerId, sends: bool) -> Result<&mut Link, TransportError> {
        let link = self.link(peer)?;
        if let Some(lost) = &link.lost
            && sends
        {
            return Err(lost.clone());
        }
        let queued = if sends { link.outgoing.len() } else { link.incoming.len() };
        self.room(peer, queued)?;
        self.link(peer)
    }

    fn post_cargo(&mut self, to: Envelope, cargo: Cargo) -> Result<(), (TransportError, Cargo)> {
        let result = self.ready(to.peer, true);
        match result {
            Ok(link) => {
                let at_once = cargo.len() <= AT_ONCE_BYTES && !link.wants_to_write();
                link.push(to, cargo);
                if at_once {
                    // Where nothing is before it: this is what a small message's latency is made of.
                    let _ = link.write_lanes();
                }
                Ok(())
            }
            Err(error) => Err((error, cargo)),
        }
    }

    fn post_receive(&mut self, peer: PeerId, tag: Tag, receive: Receive) -> Result<(), (TransportError, Receive)> {
        match self.ready(peer, false) {
            Ok(link) if link.lost.is_some() && link.incoming.probe(tag).is_none() => {
                Err((link.lost.clone().unwrap_or(TransportError::Closed), receive))
            }
            Ok(link) => {
                let reply = link.incoming.post(tag, receive);
                link.reply(reply);
                self.grant_to(peer);
                Ok(())
            }
            Err(error) => Err((error, receive)),
        }
    }

    /// Forgets clients whose end was told a poll ago: a server outlives any number of them.
    fn forget_lost(&mut self) {
        let identities = &mut self.identities;
        self.links.retain(|peer, link| {
            let over = link.lost.is_some() && std::mem::replace(&mut link.told, true);
            if over {
                identities.remove(peer);
            }
            !over
        });
    }

    fn let_in(&mut self, now: Instant) {
        let live = self.links.values().filter(|link| link.lost.is_none()).count();
        let identities = &self.identities;
        // Who calls again did not hear our welcome in time, and has no other connection to us.
        let taken = |peer: PeerId, who: &Identity| identities.get(&peer).is_some_and(|here| here != who);
        for arrived in self.entrance.advance(&self.me, now, live, taken) {
            if arrived.streams.iter().all(|stream| stream.socket().set_nonblocking(true).is_ok()) {
                self.install(arrived.peer, arrived.identity, arrived.address, arrived.streams);
                self.pending.push(Completion::PeerUp(arrived.peer));
            }
        }
    }

    /// Descriptors to sleep on, with what to wait for: the bell, the door, every lane, or what watches them all.
    fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let mut fds = vec![PollFd::new(&self.bell.0, PollFlags::IN), PollFd::new(&self.watch, PollFlags::IN)];
        fds.extend(self.entrance.listeners().map(|listener| PollFd::new(listener, PollFlags::IN)));
        fds.extend(self.entrance.guest_streams().map(|stream| PollFd::new(stream, PollFlags::IN)));
        for link in self.links.values() {
            for lane in link.lanes.iter().filter(|lane| lane.stream.watched.is_none()) {
                let flags = if link.is_blocked(lane) { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
                fds.push(PollFd::new(&lane.stream, flags));
            }
        }
        fds
    }

    /// Lists the links to be looked at: all where they are few, else those that have something to do, by the system's word too.
    fn begin_round(&mut self) {
        let Self { watch, links, round, .. } = self;
        let few = links.len() <= FEW;
        if !few {
            watch.ready(|peer| {
                if let Some(link) = links.get_mut(&peer) {
                    link.ready = true;
                }
            });
        }
        round.extend(links.iter_mut().filter_map(|(&peer, link)| (few || link.is_busy()).then_some(peer)));
    }

    /// Moves what can be moved, by the links that are left of the last round and then by a new one, and stops where enough has been
    /// handed over: so each has its turn, and the system is asked once a round.
    fn progress(&mut self, done: &mut Vec<Completion>) {
        let (mut handed, mut fresh) = (0, false);
        loop {
            let Some(peer) = self.round.pop_front() else {
                if std::mem::replace(&mut fresh, true) {
                    return;
                }
                self.begin_round();
                continue;
            };
            let Some(link) = self.links.get_mut(&peer) else { continue };
            let before = link.incoming.received.0;
            link.progress(done);
            handed += link.incoming.received.0 - before;
            if handed >= POLL_BYTES {
                return;
            }
        }
    }

    /// Sleeps as [`Wire::park`] does, and until one of `beside` is readable.
    pub(crate) fn park_beside(&mut self, until: Instant, beside: &[BorrowedFd<'_>]) {
        let until = self.entrance.deadline().into_iter().chain(self.credit_deadline()).fold(until, Instant::min);
        let ahead = self.config.tls.is_some() && self.links.values().any(|link| link.is_ahead());
        let wait = if ahead { Duration::ZERO } else { until.saturating_duration_since(Instant::now()) };
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        self.links.values_mut().for_each(|link| link.wait_for_room());
        let mut fds = self.poll_fds();
        fds.extend(beside.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)));
        // Interrupted or refused, the caller polls and comes back.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        let rung = !fds[0].revents().is_empty();
        drop(fds);
        if rung {
            let mut counter = [0; 8];
            // Empty already: another wake-up has taken it.
            let _ = rustix::io::read(&self.bell.0, &mut counter);
        }
        // Whoever stands at the door is let in at the next poll.
        self.turns = DOOR_TURNS - 1;
    }
}

impl Wire for TcpWire {
    fn kind(&self, _peer: PeerId) -> WireKind {
        WireKind::Tcp
    }

    fn name(&self, peer: PeerId) -> PeerName {
        match self.links.get(&peer) {
            Some(link) => link.name.clone(),
            _ => PeerName { rank: None, host: "unknown".to_owned(), pid: 0, address: "unknown".to_owned() },
        }
    }

    fn traffic(&self, peer: PeerId) -> Traffic {
        self.links.get(&peer).map(|link| link.traffic()).unwrap_or_default()
    }

    fn register(&mut self, _region: &Arc<Region>) -> Result<(), RegisterError> {
        Ok(())
    }

    fn post_send(&mut self, to: Envelope, slice: RegionSlice) -> Result<(), PostError<RegionSlice>> {
        self.post_cargo(to, Cargo::Slice(slice)).map_err(|(error, cargo)| match cargo {
            Cargo::Slice(slice) => PostError { error, slice },
            Cargo::Loan(_) => unreachable!("a slice was posted"),
        })
    }

    fn post_recv(&mut self, peer: PeerId, tag: Tag, slice: RegionSliceMut) -> Result<(), PostError<RegionSliceMut>> {
        self.post_receive(peer, tag, Receive::Slice(slice)).map_err(|(error, receive)| match receive {
            Receive::Slice(slice) => PostError { error, slice },
            Receive::Loan(_) => unreachable!("a slice was posted"),
        })
    }

    fn post_recv_loan(&mut self, peer: PeerId, tag: Tag, max_bytes: usize) -> Result<(), PostError<()>> {
        self.post_receive(peer, tag, Receive::Loan(max_bytes)).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn lend(&mut self, _peer: PeerId, bytes: usize) -> Option<SendLoan> {
        let home: Arc<dyn crate::region::BufferHome> = Arc::clone(&self.pool) as _;
        (bytes <= LOAN_BYTES).then(|| SendLoan(Loan::of_buffer(self.pool.take(bytes), bytes, home)))
    }

    fn max_loan_bytes(&self) -> usize {
        LOAN_BYTES
    }

    fn post_loan(&mut self, to: Envelope, loan: SendLoan) -> Result<(), PostError<()>> {
        self.post_cargo(to, Cargo::Loan(loan)).map_err(|(error, _)| PostError { error, slice: () })
    }

    fn probe(&mut self, tag: Tag) -> Option<Probe> {
        self.links.values().find_map(|link| link.incoming.probe(tag)).map(|(from, bytes)| Probe { from, bytes })
    }

    fn mark(&mut self, tag: Tag, many_to_one: bool) {
        if self.config.credit.is_some_and(|settings| settings.marked) {
            self.links.values_mut().for_each(|link| link.mark(tag, many_to_one));
        }
    }

    fn cancel_recvs(&mut self, peer: PeerId, tag: Tag) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.incoming.cancel(tag, &TransportError::Cancelled, &mut self.pending);
        }
    }

    fn disconnect(&mut self, peer: PeerId, error: TransportError) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.abort(error, &mut self.pending);
        }
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        self.turns = self.turns.wrapping_add(1);
        if self.entrance.is_public() {
            self.forget_lost();
        }
        if self.entrance.is_open()
            && (!self.entrance.is_empty() || self.turns.is_multiple_of(DOOR_TURNS) || self.links.is_empty())
        {
            self.let_in(now);
        }
        done.append(&mut self.pending);
        self.progress(done);
        if now.saturating_duration_since(self.asked) >= silence::EVERY {
            self.asked = now;
            self.links.values_mut().for_each(|link| link.end_if_silent(done));
        }
        self.grant_to_all();
    }

    fn park(&mut self, until: Instant) {
        self.park_beside(until, &[]);
    }

    fn owes(&self) -> bool {
        self.links.values().any(|link| link.lost.is_none() && link.wants_to_write())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as _
    }

    fn shutdown(&mut self, until: Instant) {
        let mut done = Vec::new();
        // Large messages still have to be asked for; a goodbye that overtakes them ends them. It keeps some time for itself.
        let asked_for = until - LINGER.min(until.saturating_duration_since(Instant::now()) / 2);
        while Instant::now() < asked_for
            && self.links.values().any(|link| link.lost.is_none() && link.outgoing.len() > 0)
        {
            self.poll(Instant::now(), &mut done);
            done.clear();
            self.park(asked_for.min(Instant::now() + Duration::from_millis(10)));
        }
        for link in self.links.values_mut() {
            link.say_goodbye();
        }
        while Instant::now() < until && self.links.values().any(|link| link.lost.is_none() && link.wants_to_write()) {
            self.poll(Instant::now(), &mut done);
            done.clear();
            self.park(until.min(Instant::now() + Duration::from_millis(10)));
        }
        for lane in self.links.values_mut().flat_map(|link| &mut link.lanes) {
            lane.stream.end_writing();
        }
        // Closing with bytes unread would cut off what we sent last; a peer that reads our goodbye closes its end.
        let until = until.min(Instant::now() + LINGER);
        while Instant::now() < until && self.links.values().any(|link| link.lost.is_none()) {
            self.poll(Instant::now(), &mut done);
            done.clear();
            self.park(until.min(Instant::now() + Duration::from_millis(5)));
        }
        for link in self.links.values_mut() {
            link.fail(LossCause::Goodbye, &mut done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pair;
    use super::*;
    use crate::{Config, Tls, TlsFiles};

    /// One end says goodbye and closes its socket by a reset, as a host does to which something is sent later. What the other
    /// one is told, who polls only then; `sends`: and has sent so many bytes.
    fn end_of(config: &Config, sends: Option<usize>) -> LossCause {
        let (mut here, mut there) = pair(config, config).unwrap();
        let mut done = Vec::new();
        there.links.values_mut().for_each(|link| link.say_goodbye());
        while there.owes() {
            there.poll(Instant::now(), &mut done);
        }
        for lane in there.links.values().flat_map(|link| &link.lanes) {
            rustix::net::sockopt::set_socket_linger(lane.stream.socket(), Some(Duration::ZERO)).unwrap();
        }
        // All of its sockets, without a word.
        there.links.clear();
        if let Some(bytes) = sends {
            let region = Region::zeroed(bytes);
            let to = Envelope { peer: PeerId(1), tag: Tag(1), note: 0 };
            here.post_send(to, region.read(0..region.len()).unwrap()).unwrap();
        }
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < until, "nothing is told of the end");
            here.poll(Instant::now(), &mut done);
            let told = done.drain(..).find_map(|completion| match completion {
                Completion::PeerDown { error: TransportError::PeerLost { cause, .. }, .. } => Some(cause),
                _ => None,
            });
            if let Some(cause) = told {
                return cause;
            }
        }
    }

    #[test]
    fn a_goodbye_counts_although_the_connection_is_then_reset() {
        for (lanes, tls) in [(1, None), (3, None), (1, tls()), (3, tls())] {
            let sealed = tls.is_some();
            let config = Config { lanes, tls, ..Config::default() };
            // A short message is written when it is posted, before anything is read.
            for sends in [None, Some(100), Some(1 << 20)] {
                for _ in 0..20 {
                    let cause = end_of(&config, sends);
                    assert!(
                        matches!(cause, LossCause::Goodbye),
                        "{lanes} lanes, sealed {sealed}, sends {sends:?}: {cause}"
                    );
                }
            }
        }
    }

    /// TLS by a certificate that vouches for itself.
    fn tls() -> Option<Arc<Tls>> {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let [cert, key] = ["crt", "key"].map(|name| folder.path().join(name));
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        Tls::load(&TlsFiles { cert: Some(cert.clone()), key: Some(key), ca: Some(cert), ..TlsFiles::default() })
            .unwrap()
    }

    /// Two ends, of which the second sends `count` messages of `bytes` that the first one has no receives for.
    fn unasked(here: &Config, there: &Config, count: u32, bytes: usize) -> (TcpWire, TcpWire, Vec<Completion>) {
        let (mut here, mut there) = pair(here, there).unwrap();
        let region = Region::zeroed(bytes);
        let (mut done, mut sent) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let to = Envelope { peer: PeerId(0), tag: Tag(1), note: 0 };
            if there.post_send(to, region.read(0..bytes).unwrap()).is_err() {
                // It has been cut off already.
                break;
            }
            there.poll(Instant::now(), &mut sent);
            here.poll(Instant::now(), &mut done);
        }
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until {
            there.poll(Instant::now(), &mut sent);
            here.poll(Instant::now(), &mut done);
        }
        done.retain(|completion| !matches!(completion, Completion::PeerUp(_)));
        (here, there, done)
    }

    #[test]
    fn a_peer_that_sends_more_than_the_window_unasked_is_cut_off() {
        let here = Config { window_bytes: 64 << 10, ..Config::default() };
        let there = Config { window_bytes: 64 << 20, ..here.clone() };
        for (count, bytes) in [(1, 1 << 20), (20, 8000), (1100, 1)] {
            let (here, _, done) = unasked(&here, &there, count, bytes);
            let [Completion::PeerDown { error: TransportError::PeerLost { cause, .. }, .. }] = &done[..] else {
                panic!("{count} messages of {bytes} bytes: {done:?}")
            };
            assert!(matches!(cause, LossCause::Protocol(why) if why.contains("65536")), "{cause}");
            assert!(here.links.values().all(|link| link.incoming.unread() <= 64 << 10));
        }
    }

    #[test]
    fn a_window_full_of_messages_that_nobody_waits_for_yet_ends_nothing() {
        let config = Config { window_bytes: 64 << 10, queue_depth: 4, ..Config::default() };
        for (count, bytes) in [(500, 0), (16, 4000), (2, 32 << 10)] {
            let (mut here, mut there, done) = unasked(&config, &config, count, bytes);
            assert!(done.is_empty(), "{count} messages of {bytes} bytes: {done:?}");
            let (mut done, mut came) = (Vec::new(), 0);
            let until = Instant::now() + Duration::from_secs(20);
            while came < count {
                assert!(Instant::now() < until, "{came} of {count} messages of {bytes} bytes have come");
                if here.links[&PeerId(1)].incoming.len() == 0 {
                    here.post_recv_loan(PeerId(1), Tag(1), bytes).unwrap();
                }
                there.poll(Instant::now(), &mut Vec::new());
                here.poll(Instant::now(), &mut done);
                for completion in done.drain(..) {
                    assert!(matches!(completion, Completion::Arrived(_)), "{completion:?}");
                    came += 1;
                }
            }
            assert!(here.links.values().all(|link| link.incoming.unread() == 0));
        }
    }
}
