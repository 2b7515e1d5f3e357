//! Does: peers that come and go: how a caller and who is called agree on a better wire than the sockets between them.
//!
//! Each tells in its hello whether it shares memory with peers of its host, and whether it has queue pairs to offer. Where both
//! do, the caller offers the one, or proposes the other, at once, and is answered, before either side tells of the other.

use super::Mesh;
use crate::verbs::device::Device;
use crate::verbs::{VerbsWire, refusal};
use crate::{
    Beside, Completion, Config, Identity, LossCause, PeerId, TcpWire, TransportError, Wire, WireChoice, Words, select,
};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// How long a caller may take to propose.
const PROPOSAL: Duration = Duration::from_secs(5);

/// A caller that has said hello and will propose.
pub(super) struct Guest {
    peer: PeerId,
    until: Instant,
}

impl Mesh {
    /// A wire whose peers are called by [`Mesh::call`], or call. With both ends' consent they are reached by `better`; whether
    /// who calls consents, `choice` says.
    pub fn meeting(tcp: TcpWire, better: Vec<Box<dyn Beside>>, choice: WireChoice) -> Self {
        Self { mixed: true, public: true, choice, ..Self::new(tcp, better, [], Vec::new()) }
    }

    /// Connects to the process at one of `addresses`, on `host`, and makes it `peer`, by the best wire that both have.
    ///
    /// # Errors
    /// As [`TcpWire::dial`]; `Timeout` where the other end does not answer a proposal; `Config` where shared memory or verbs were
    /// asked for by name and cannot be had.
    pub fn call(
        &mut self,
        peer: PeerId,
        host: Option<&str>,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<(), TransportError> {
        self.better.iter_mut().for_each(|wire| wire.forget(peer));
        self.down.retain(|gone| *gone != peer);
        self.ending.retain(|ending| ending.peer != peer);
        self.hear_no_more_of(peer);
        self.tcp.dial_host(peer, None, host, addresses, deadline)?;
        let shared = self.share(peer, deadline).and_then(|shared| match shared {
            Ok(()) => Ok(true),
            Err(why) => {
                tracing::debug!(peer = %self.tcp.name(peer), why, "no shared memory");
                select::check_memory(self.choice, &why).map(|()| false)
            }
        });
        let joined = shared.and_then(|shared| if shared { Ok(()) } else { self.propose(peer, deadline) });
        joined.inspect_err(|error| self.tcp.disconnect(peer, error.clone()))
    }

    /// What the sockets still have to tell of a last connection to `peer` would be taken for the next one's end.
    fn hear_no_more_of(&mut self, peer: PeerId) {
        let mut came = std::mem::take(&mut self.early);
        self.tcp.poll(Instant::now(), &mut came);
        came.retain(|completion| !matches!(completion, Completion::PeerDown { peer: gone, .. } if *gone == peer));
        self.early = came;
    }

    /// Offers memory to who has been called; why there is none between us.
    fn share(&mut self, peer: PeerId, deadline: Instant) -> Result<Result<(), String>, TransportError> {
        let (own, other) = (self.tcp.own_identity(), self.tcp.identity(peer));
        let unlike = match other {
            _ if !own.memory => Some("this end shares none".to_owned()),
            Some(other) if !other.memory => Some("the other end shares none".to_owned()),
            Some(other) => select::pair_before_proof(self.choice, &own.boot_id, &other.boot_id),
            None => Some("the other end is gone".to_owned()),
        };
        let name = self.tcp.name(peer);
        let Some(wire) = self.better.iter_mut().find(|wire| wire.shares()).filter(|_| unlike.is_none()) else {
            return Ok(Err(unlike.unwrap_or_default()));
        };
        // Without an offer, the other end is told so.
        let offer = wire.offer_memory();
        self.say(peer, &Words::Memory(offer.clone().unwrap_or_default()));
        let answer = self.answer_of(peer, deadline)?;
        let attached = match (offer, answer) {
            (Err(why), _) => Err(why),
            (Ok(_), Words::Memory(why)) if why.is_empty() => {
                let wire = self.better.iter_mut().find(|wire| wire.shares());
                // It counts on the memory by now: without it, nothing would reach it.
                let attached = wire.map_or(Ok(()), |wire| wire.attach_offered(peer, name));
                Ok(attached.map_err(|why| TransportError::io("share memory with it", std::io::Error::other(why)))?)
            }
            (Ok(_), Words::Memory(why)) => Err(String::from_utf8_lossy(&why).into_owned()),
            (Ok(_), _) => Err("the other end answers otherwise".to_owned()),
        };
        if attached.is_err() {
            self.better.iter_mut().filter(|wire| wire.shares()).for_each(|wire| wire.forget(peer));
        }
        Ok(attached)
    }

    /// Proposes queue pairs to who has been called, where both have some.
    fn propose(&mut self, peer: PeerId, deadline: Instant) -> Result<(), TransportError> {
        let (choice, own, other) = (self.choice, self.tcp.own_identity(), self.tcp.identity(peer));
        if !(own.rdma && other.is_some_and(|other| other.rdma)) {
            let whose = if own.rdma { "the other end" } else { "this end" };
            return select::check_verbs(choice, &format!("{whose} has no RDMA device"));
        }
        let same_host = !own.boot_id.is_empty() && other.is_some_and(|other| other.boot_id == own.boot_id);
        let name = self.tcp.name(peer);
        let Some(wire) = self.better.iter_mut().find(|wire| wire.speaks()) else { return Ok(()) };
        let ours = if select::tries_verbs(choice, same_host) {
            wire.greet(peer, name, Instant::now())
        } else {
            Err("both ends are on one host".to_owned())
        };
        let words = ours.clone().unwrap_or_else(|why| Words::Proposal(refusal(&why)));
        self.say(peer, &words);
        let theirs = self.answer_of(peer, deadline)?;
        let refused = match (ours, self.better.iter_mut().find(|wire| wire.has(peer))) {
            (Ok(_), Some(wire)) => wire.accept(peer, theirs, Instant::now()),
            (Err(why), _) => Some(why),
            (Ok(_), None) => Some("the link is gone already".to_owned()),
        };
        match refused {
            None => self.begin_listening(peer),
            Some(why) => {
                tracing::debug!(peer = %self.tcp.name(peer), why, "reached over sockets");
                select::check_verbs(choice, &why)?;
            }
        }
        Ok(())
    }

    /// Waits for the answer to our first proposal; what else happens meanwhile is told later.
    fn answer_of(&mut self, peer: PeerId, deadline: Instant) -> Result<Words, TransportError> {
        let began = Instant::now();
        let deadline = deadline.max(began + Duration::from_millis(100)).min(began + PROPOSAL);
        self.listen(peer);
        loop {
            let mut came = Vec::new();
            self.tcp.poll(Instant::now(), &mut came);
            let mut answer = None;
            for completion in came {
                match completion {
                    Completion::Arrived(arrival) if arrival.from.peer == peer && arrival.from.tag == Words::TAG => {
                        answer = Words::decode(&arrival.loan).map(Ok);
                    }
                    // What came at the same time is not lost with it.
                    Completion::PeerDown { peer: gone, error } if gone == peer => answer = Some(Err(error)),
                    other => self.early.push(other),
                }
            }
            if let Some(answer) = answer {
                return answer;
            }
            if Instant::now() >= deadline {
                let what = format!("{} to answer how it is best reached", self.tcp.name(peer));
                return Err(TransportError::Timeout { what, waited: began.elapsed() });
            }
            self.tcp.park(deadline);
        }
    }

    /// Somebody has called. Who will propose is told of once that is settled.
    pub(super) fn take_in(&mut self, peer: PeerId, now: Instant, done: &mut Vec<Completion>) {
        if self.public && (self.may_share(peer) || self.may_propose(peer)) {
            self.guests.push(Guest { peer, until: now + PROPOSAL });
            self.listen(peer);
        } else {
            done.push(Completion::PeerUp(peer));
        }
    }

    /// Whether who has called will offer memory.
    fn may_share(&self, peer: PeerId) -> bool {
        let (own, other) = (self.tcp.own_identity(), self.tcp.identity(peer));
        let alike = |other: &Identity| other.memory && !own.boot_id.is_empty() && other.boot_id == own.boot_id;
        own.memory && other.is_some_and(alike)
    }

    /// Whether who has called will propose queue pairs, where it has not come to share memory.
    fn may_propose(&self, peer: PeerId) -> bool {
        self.tcp.own_identity().rdma && self.tcp.identity(peer).is_some_and(|identity| identity.rdma)
    }

    /// A guest offers memory: takes it, or says why not, and tells of the guest unless it will propose.
    fn take_offer(&mut self, peer: PeerId, offer: &[u8], done: &mut Vec<Completion>) {
        let name = self.tcp.name(peer);
        let wire = self.better.iter_mut().find(|wire| wire.shares()).filter(|_| !offer.is_empty());
        let taken =
            wire.map_or_else(|| Err("nothing was offered".to_owned()), |wire| wire.take_memory(peer, name, offer));
        let why = taken.as_ref().err().cloned().unwrap_or_default();
        self.say(peer, &Words::Memory(why.into_bytes()));
        if let Err(why) = &taken {
            tracing::debug!(peer = %self.tcp.name(peer), why, "no shared memory");
        }
        if taken.is_ok() || !self.may_propose(peer) {
            self.turn_away(peer);
            done.push(Completion::PeerUp(peer));
        }
    }

    /// A guest offers memory, or proposes: answers it, and tells of it.
    pub(super) fn settle(&mut self, peer: PeerId, theirs: Words, now: Instant, done: &mut Vec<Completion>) {
        if let Words::Memory(offer) = theirs {
            return self.take_offer(peer, &offer, done);
        }
        self.turn_away(peer);
        let name = self.tcp.name(peer);
        let Some(wire) = self.better.iter_mut().find(|wire| wire.speaks()) else { return };
        let (ours, refused) = match wire.greet(peer, name, now) {
            Ok(ours) => (ours, wire.accept(peer, theirs, now)),
            Err(why) => (Words::Proposal(refusal(&why)), Some(why)),
        };
        self.say(peer, &ours);
        match refused {
            None => self.begin_listening(peer),
            Some(why) => tracing::debug!(peer = %self.tcp.name(peer), why, "reached over sockets"),
        }
        done.push(Completion::PeerUp(peer));
    }

    /// Expects no proposal of `peer` any more.
    pub(super) fn turn_away(&mut self, peer: PeerId) {
        self.guests.retain(|guest| guest.peer != peer);
    }

    pub(super) fn is_guest(&self, peer: PeerId) -> bool {
        self.guests.iter().any(|guest| guest.peer == peer)
    }

    /// Turns away guests that do not propose, and forgets peers whose end has been told.
    pub(super) fn tidy_up(&mut self, now: Instant) {
        if !self.public {
            return;
        }
        let late: Vec<PeerId> = self.guests.iter().filter(|guest| guest.until <= now).map(|guest| guest.peer).collect();
        for peer in late {
            self.turn_away(peer);
            let cause = LossCause::Silent(PROPOSAL);
            let error = TransportError::PeerLost { peer: Box::new(self.tcp.name(peer)), cause };
            self.tcp.disconnect(peer, error);
        }
        for peer in std::mem::take(&mut self.down) {
            self.better.iter_mut().for_each(|wire| wire.forget(peer));
        }
    }
}

/// A wire over the RDMA device that fits best, with the reason for the choice. `local`: addresses by which peers are reached.
///
/// # Errors
/// `Config` or `Io` with why there is none.
pub(crate) fn open_device(config: &Config, local: &[IpAddr]) -> Result<(VerbsWire, String), TransportError> {
    if config.tls.is_some() {
        let (setting, reason) = ("GRADWIRE_TLS".to_owned(), select::NO_TLS_OVER_RDMA.to_owned());
        return Err(TransportError::Config { setting, reason });
    }
    let (device, reason) = Device::open(&config.verbs, local)?;
    Ok((VerbsWire::new(config, Box::new(device)), reason))
}

/// As `open_device`, for peers that come and go; `None` where `config` wants none, or this host has none.
///
/// # Errors
/// `Config` with the reason, where verbs were asked for by name.
pub fn open_verbs(config: &Config, local: &[IpAddr]) -> Result<Option<(VerbsWire, String)>, TransportError> {
    select::check_encryption(config.wire, config.tls.is_some())?;
    if !select::tries_verbs(config.wire, false) {
        return Ok(None);
    }
    open_device(config, local).map(Some).or_else(|error| {
        select::check_verbs(config.wire, &error.to_string())?;
        tracing::debug!(%error, "no RDMA");
        Ok(None)
    })
}
