//! Does: forms a group: ranks meet at the store, connect each to each, and find out who shares a host.

mod hosts;
mod measure;
mod pairs;
mod queue_pairs;

use crate::mesh::Mesh;
use crate::rendezvous::{HostIdentity, InterfaceFilter, Record, Store, addresses};
use crate::select::{self, Locality};
use crate::shm::{GroupSegment, SegmentOffer};
use crate::{
    Acceptance, Completion, Config, Envelope, Identity, LinkCosts, LossCause, PeerId, PeerName, Rank, Region, Tag,
    TcpWire, TransportError, Wire, WireKind, WorldSize,
};
use pairs::Pairs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long one record's addresses are tried before the record is read again: a restarted rank leaves a new one.
const TRY: Duration = Duration::from_millis(500);
/// The conversations of a group's making.
const OFFER: Tag = Tag(Tag::CONTROL_BIT | 1);
const ANSWER: Tag = Tag(Tag::CONTROL_BIT | 2);
const DECISION: Tag = Tag(Tag::CONTROL_BIT | 3);
const MAX_TEXT: usize = 512;

/// What a group is formed from.
pub struct GroupSpec {
    /// Tells groups in one store apart.
    pub name: String,
    /// This process's rank.
    pub rank: Rank,
    /// The number of ranks.
    pub world_size: WorldSize,
    /// Where all meet.
    pub store: Arc<dyn Store>,
    /// Settings, alike on all ranks.
    pub config: Config,
}

/// The way to one other rank.
#[derive(Clone, Debug)]
pub struct Link {
    /// Who.
    pub peer: PeerName,
    /// By which wire.
    pub kind: WireKind,
    /// Why by this one.
    pub reason: String,
}

/// A group that is complete.
pub struct Group {
    /// The wire, on which peer i is rank i.
    pub wire: Box<dyn Wire>,
    /// This process's rank.
    pub rank: Rank,
    /// The number of ranks.
    pub world_size: WorldSize,
    /// Every rank's name, by rank.
    pub members: Vec<PeerName>,
    /// The way to every other rank.
    pub links: Vec<Link>,
    /// The memory that all share, where all are on one host.
    pub segment: Option<GroupSegment>,
    /// For every rank, the lowest rank of its host; all ranks have the same table.
    pub hosts: Vec<u32>,
    /// What messages cost; all ranks have the same.
    pub costs: LinkCosts,
    /// What befell peers while the group formed: whoever uses the wire hears of it first.
    pub news: Vec<Completion>,
}

/// Forms the group; returns once every rank is connected to every other.
///
/// # Errors
/// `Timeout` naming the ranks that did not come, and where they were looked for; `Authentication` for another token;
/// `Config` for a wire that was asked for and cannot be had.
pub fn form_group(spec: GroupSpec, deadline: Instant) -> Result<Group, TransportError> {
    let began = Instant::now();
    let mut forming = Forming::begin(spec)?;
    forming.publish()?;
    for rank in forming.spec.world_size.ranks().take(forming.spec.rank.index()) {
        forming.dial(rank, began, deadline)?;
    }
    forming.accept(began, deadline)?;
    let shared = forming.share(deadline)?;
    let mut pairs = forming.pair_up(deadline)?;
    forming.connect_verbs(shared.0.is_some(), &mut pairs, deadline)?;
    let hosts = forming.hosts(shared.0.is_some(), &pairs, deadline)?;
    let mut group = forming.finish(shared, pairs, hosts);
    if group.segment.is_none() && group.world_size.get() > 1 {
        measure::measure(&mut group, deadline)?;
    }
    Ok(group)
}

struct Forming {
    spec: GroupSpec,
    home: HostIdentity,
    nonce: u64,
    wire: TcpWire,
    here: Vec<bool>,
    done: Vec<Completion>,
}

impl Forming {
    fn begin(spec: GroupSpec) -> Result<Self, TransportError> {
        select::check_encryption(spec.config.wire, spec.config.tls.is_some())?;
        let home = home();
        let mut nonce = [0; 8];
        getrandom::fill(&mut nonce).expect("the system gives random bytes");
        let nonce = u64::from_le_bytes(nonce) | 1;
        let identity = Identity {
            rank: Some(spec.rank),
            host: home.host.clone(),
            pid: std::process::id(),
            boot_id: home.boot_id.clone(),
            nonce,
            rdma: false,
            memory: false,
        };
        let wire = TcpWire::new(&spec.config, identity, Acceptance::Ranks(spec.world_size))?;
        let here = vec![false; spec.world_size.get() as usize];
        Ok(Self { spec, home, nonce, wire, here, done: Vec::new() })
    }

    /// Listens, and tells the others where.
    fn publish(&mut self) -> Result<(), TransportError> {
        if self.spec.world_size.get() == 1 {
            return Ok(());
        }
        let filter = self.spec.config.socket_ifname.as_deref().map(InterfaceFilter::parse).unwrap_or_default();
        let all = addresses(&filter)?;
        let six = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let four = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let (port, only_four) = match self.wire.listen(six) {
            Ok(address) => (address.port(), false),
            Err(_) => (self.wire.listen(four)?.port(), true),
        };
        let usable = all.into_iter().filter(|ip: &IpAddr| ip.is_ipv4() || !only_four);
        let addresses = usable.map(|ip| SocketAddr::new(ip, port)).collect();
        let record = Record { home: self.home.clone(), pid: std::process::id(), nonce: self.nonce, addresses };
        self.spec.store.set(&self.key(self.spec.rank), &record.encode())
    }

    fn key(&self, rank: Rank) -> String {
        format!("gradwire/{}/{}", self.spec.name, rank.0)
    }

    /// Connects to a lower rank, reading its record again until it is that of a process that is there.
    fn dial(&mut self, rank: Rank, began: Instant, deadline: Instant) -> Result<(), TransportError> {
        let mut tried = String::new();
        loop {
            let Ok(bytes) = self.spec.store.get(&self.key(rank), deadline) else {
                return Err(self.absent(&[rank], "it left no address in the store", began));
            };
            if let Some(record) = Record::decode(&bytes) {
                let addresses = record.addresses_from(&self.home);
                let until = deadline.min(Instant::now() + TRY);
                match self.wire.dial(rank.into(), Some(record.nonce), &addresses, until) {
                    Ok(()) => {
                        self.came(rank.into());
                        return Ok(());
                    }
                    Err(
                        error @ (TransportError::Authentication { .. }
                        | TransportError::Tls { .. }
                        | TransportError::Config { .. }),
                    ) => {
                        return Err(error);
                    }
                    Err(error) => tried = format!("pid {} on {}: {error}", record.pid, record.home.host),
                }
            }
            // Others may be calling us meanwhile.
            self.poll();
            if Instant::now() >= deadline {
                return Err(self.absent(&[rank], &tried, began));
            }
        }
    }

    /// Waits for the higher ranks, and calls lower ones again that have gone meanwhile.
    fn accept(&mut self, began: Instant, deadline: Instant) -> Result<(), TransportError> {
        self.here[self.spec.rank.index()] = true;
        loop {
            self.poll();
            let missing: Vec<Rank> = self.spec.world_size.ranks().filter(|rank| !self.here[rank.index()]).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.absent(&missing, "they did not connect to us", began));
            }
            match missing.iter().find(|&&rank| rank < self.spec.rank) {
                Some(&gone) => self.dial(gone, began, deadline)?,
                None => self.wire.park(deadline.min(Instant::now() + Duration::from_millis(100))),
            }
        }
    }

    fn absent(&self, ranks: &[Rank], why: &str, began: Instant) -> TransportError {
        let who: Vec<String> = ranks.iter().map(ToString::to_string).collect();
        let what = format!(
            "{} of group {} ({} ranks): {why}. Are they running, with the same world size and store? Does a firewall stand \
             between (GRADWIRE_PORT_RANGE), or must another interface be used (GRADWIRE_SOCKET_IFNAME)?",
            who.join(", "),
            self.spec.name,
            self.spec.world_size.get()
        );
        TransportError::Timeout { what, waited: began.elapsed() }
    }

    fn poll(&mut self) {
        let mut done = Vec::new();
        self.wire.poll(Instant::now(), &mut done);
        for completion in done {
            match completion {
                Completion::PeerUp(up) => self.came(up),
                other => {
                    if let Completion::PeerDown { peer, error } = &other {
                        // Who has left in order, or gave the group up and said so, had all it needed.
                        self.here[peer.index()] &= said_why(error);
                    }
                    self.done.push(other);
                }
            }
        }
    }

    /// A rank is connected. It may be so twice, having given up a call that it did not hear answered in time.
    fn came(&mut self, rank: PeerId) {
        self.here[rank.index()] = true;
        self.done.retain(|earlier| !matches!(earlier, Completion::PeerDown { peer, .. } if *peer == rank));
    }

    /// Finds out who shares this host; where all do, makes the segment that all share.
    fn share(&mut self, deadline: Instant) -> Result<(Option<GroupSegment>, Locality), TransportError> {
        let (rank, size) = (self.spec.rank, self.spec.world_size);
        let boots: Vec<String> = size.ranks().map(|other| self.boot_id(other)).collect();
        if let Some(locality) = select::before_proof(self.spec.config.wire, &boots) {
            select::check(self.spec.config.wire, &locality)?;
            return Ok((None, locality));
        }
        let (mut segment, mut refusal) = (None, String::new());
        if rank == Rank(0) {
            let made = GroupSegment::create(size);
            let offer = made.as_ref().map_or_else(|error| format!("!{error}"), |made| encode_offer(&made.offer()));
            size.ranks().skip(1).try_for_each(|other| self.say(other, OFFER, offer.as_bytes()))?;
            for other in size.ranks().skip(1) {
                let answer = self.hear_text(other, ANSWER, deadline)?;
                if !answer.is_empty() {
                    refusal = format!("{other}: {answer}");
                }
            }
            size.ranks().skip(1).try_for_each(|other| self.say(other, DECISION, refusal.as_bytes()))?;
            segment = made.ok();
        } else {
            let offer = self.hear_text(Rank(0), OFFER, deadline)?;
            let opened = match decode_offer(&offer) {
                Some(offer) => GroupSegment::open(&offer, rank, size).map_err(|error| error.to_string()),
                None => Err(offer),
            };
            self.say(Rank(0), ANSWER, opened.as_ref().err().map_or("", String::as_str).as_bytes())?;
            refusal = self.hear_text(Rank(0), DECISION, deadline)?;
            segment = opened.ok().or(segment);
        }
        let locality = select::after_proof(&refusal);
        select::check(self.spec.config.wire, &locality)?;
        Ok((segment.filter(|_| locality.shared), locality))
    }

    fn boot_id(&self, rank: Rank) -> String {
        match self.wire.identity(rank.into()) {
            Some(identity) => identity.boot_id.clone(),
            None => self.home.boot_id.clone(),
        }
    }

    fn say(&mut self, to: Rank, tag: Tag, words: &[u8]) -> Result<(), TransportError> {
        self.say_bytes(to, tag, words.iter().copied().take(MAX_TEXT).collect())
    }

    fn say_bytes(&mut self, to: Rank, tag: Tag, bytes: Vec<u8>) -> Result<(), TransportError> {
        let region = Region::from_vec(bytes);
        let slice = region.read(0..region.len()).expect("nobody else has this region");
        self.wire.post_send(Envelope { peer: to.into(), tag, note: 0 }, slice).map_err(|refused| refused.error)
    }

    fn hear_text(&mut self, from: Rank, tag: Tag, deadline: Instant) -> Result<String, TransportError> {
        Ok(String::from_utf8_lossy(&self.hear(from, tag, deadline)?).into_owned())
    }

    fn hear(&mut self, from: Rank, tag: Tag, deadline: Instant) -> Result<Vec<u8>, TransportError> {
        self.hear_bytes(from, tag, MAX_TEXT, deadline)
    }

    fn hear_bytes(&mut self, from: Rank, tag: Tag, most: usize, deadline: Instant) -> Result<Vec<u8>, TransportError> {
        let began = Instant::now();
        self.wire.post_recv_loan(from.into(), tag, most).map_err(|refused| refused.error)?;
        loop {
            self.poll();
            // Others may have gone meanwhile, having all they needed; whoever drives the group hears of it later.
            let ours = |completion: &Completion| match completion {
                Completion::Arrived(arrival) => arrival.from.peer == from.into() && arrival.from.tag == tag,
                Completion::RecvFailed { peer, tag: awaited, .. } => *peer == from.into() && *awaited == tag,
                _ => false,
            };
            match self.done.iter().position(ours).map(|at| self.done.swap_remove(at)) {
                Some(Completion::Arrived(arrival)) => return Ok(arrival.loan.to_vec()),
                Some(Completion::RecvFailed { error, .. }) => return Err(error),
                _ => {}
            }
            if Instant::now() >= deadline {
                return Err(self.absent(&[from], "it does not answer about shared memory", began));
            }
            self.wire.park(deadline.min(Instant::now() + Duration::from_millis(100)));
        }
    }

    fn finish(self, (segment, locality): (Option<GroupSegment>, Locality), pairs: Pairs, hosts: Vec<u32>) -> Group {
        let own = PeerName {
            rank: Some(self.spec.rank),
            host: self.home.host.clone(),
            pid: std::process::id(),
            address: "this process".to_owned(),
        };
        let name = |rank: Rank| if rank == self.spec.rank { own.clone() } else { self.wire.name(PeerId::from(rank)) };
        let members: Vec<PeerName> = self.spec.world_size.ranks().map(name).collect();
        let link = |peer: &PeerName| {
            let rank = peer.rank.filter(|&rank| rank != self.spec.rank)?;
            let better = pairs.better.iter().find(|wire| wire.has(rank.into())).map(|wire| wire.kind(rank.into()));
            let kind = if segment.is_some() { WireKind::Shm } else { better.unwrap_or(WireKind::Tcp) };
            let reason = if segment.is_some() { &locality.reason } else { &pairs.reasons[rank.index()] };
            Some(Link { peer: peer.clone(), kind, reason: reason.clone() })
        };
        let links = members.iter().filter_map(link).collect();
        // Who had all it needed may have left already.
        let early =
            self.done.into_iter().filter(|completion| matches!(completion, Completion::PeerDown { .. })).collect();
        let others = self.spec.world_size.ranks().filter(|&rank| rank != self.spec.rank).map(PeerId::from);
        let (wire, news): (Box<dyn Wire>, _) = match pairs.better {
            better if better.is_empty() => (Box::new(self.wire), early),
            better => (Box::new(Mesh::new(self.wire, better, others, early)), Vec::new()),
        };
        let costs = LinkCosts::default();
        Group {
            wire,
            rank: self.spec.rank,
            world_size: self.spec.world_size,
            members,
            links,
            segment,
            hosts,
            costs,
            news,
        }
    }
}

/// Where this process runs.
pub fn home() -> HostIdentity {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let net_namespace = std::fs::read_link("/proc/self/ns/net").map(|path| path.display().to_string());
    HostIdentity {
        host: read("/proc/sys/kernel/hostname"),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        net_namespace: net_namespace.unwrap_or_default(),
    }
}

fn said_why(error: &TransportError) -> bool {
    matches!(error, TransportError::PeerLost { cause: LossCause::Goodbye | LossCause::Aborted(_), .. })
}

fn encode_offer(offer: &SegmentOffer) -> String {
    format!("{} {} {} {}", offer.pid, offer.fd, offer.nonce, offer.bytes)
}

fn decode_offer(text: &str) -> Option<SegmentOffer> {
    let mut words = text.split(' ');
    let mut next = || words.next();
    let (pid, fd) = (next()?.parse().ok()?, next()?.parse().ok()?);
    Some(SegmentOffer { pid, fd, nonce: next()?.parse().ok()?, bytes: next()?.parse().ok()? })
}

/// Reads an offer, and panics where it would not come back as it was.
pub(crate) fn offer_again(text: &str) {
    if let Some(offer) = decode_offer(text) {
        let told = encode_offer(&offer);
        assert!(decode_offer(&told).is_some_and(|again| encode_offer(&again) == told), "an offer has changed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;
    use proptest::prelude::*;

    /// Polls `forming` until `enough` says so.
    fn until(forming: &mut Forming, enough: impl Fn(&Forming) -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !enough(forming) {
            assert!(Instant::now() < until, "nothing more comes: {:?}", forming.done);
            forming.poll();
        }
    }

    fn spec(store: &Arc<MemoryStore>, rank: u32) -> GroupSpec {
        let (store, world_size) = (Arc::clone(store) as Arc<dyn Store>, WorldSize::new(2).unwrap());
        GroupSpec { name: "g".to_owned(), rank: Rank(rank), world_size, store, config: Config::default() }
    }

    /// Rank 1's process, which calls rank 0 at its group's beginning.
    fn calls(zero: &mut Forming) -> TcpWire {
        let identity = Identity { rank: Some(Rank(1)), nonce: 77, ..zero.wire.own_identity().clone() };
        let mut one = TcpWire::new(&Config::default(), identity, Acceptance::Nobody).unwrap();
        let port = zero.wire.addresses()[0].port();
        let (nonce, address) = (zero.nonce, SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let call = std::thread::spawn(move || {
            one.dial(PeerId(0), Some(nonce), &[address], Instant::now() + Duration::from_secs(20)).map(|()| one)
        });
        until(zero, |zero| zero.here[1] && call.is_finished());
        call.join().unwrap().unwrap()
    }

    fn losses(forming: &Forming) -> usize {
        forming.done.iter().filter(|completion| matches!(completion, Completion::PeerDown { .. })).count()
    }

    #[test]
    fn who_has_gone_without_a_word_does_not_count_as_here_until_it_comes_again() {
        let mut zero = Forming::begin(spec(&Arc::default(), 0)).unwrap();
        zero.publish().unwrap();
        for _ in 0..2 {
            drop(calls(&mut zero));
            until(&mut zero, |zero| losses(zero) == 1);
            assert!(!zero.here[1]);
        }
        let _one = calls(&mut zero);
        assert!(zero.here[1] && losses(&zero) == 0, "{:?}", zero.done);
    }

    #[test]
    fn who_had_all_it_needed_and_left_in_order_or_gave_up_counts_as_here() {
        for gives_up in [false, true] {
            let mut zero = Forming::begin(spec(&Arc::default(), 0)).unwrap();
            zero.publish().unwrap();
            let mut one = calls(&mut zero);
            let leaves = std::thread::spawn(move || {
                if gives_up {
                    let (peer, cause) = (Box::new(one.name(PeerId(0))), LossCause::Aborted("enough".to_owned()));
                    one.disconnect(PeerId(0), TransportError::PeerLost { peer, cause });
                }
                one.shutdown(Instant::now() + Duration::from_secs(20));
            });
            until(&mut zero, |zero| losses(zero) == 1);
            assert!(zero.here[1], "gives up: {gives_up}: {:?}", zero.done);
            leaves.join().unwrap();
        }
    }

    #[test]
    fn a_lower_rank_that_died_is_called_again_where_its_next_process_listens() {
        let store = Arc::default();
        let (began, deadline) = (Instant::now(), Instant::now() + Duration::from_secs(20));
        let zero = || {
            let mut zero = Forming::begin(spec(&store, 0)).unwrap();
            zero.publish().unwrap();
            zero
        };
        let (mut first, mut one) = (zero(), Forming::begin(spec(&store, 1)).unwrap());
        let call = std::thread::spawn(move || one.dial(Rank(0), began, deadline).map(|()| one));
        until(&mut first, |_| call.is_finished());
        drop(first);
        let mut one = call.join().unwrap().unwrap();
        until(&mut one, |one| losses(one) == 1);
        let mut next = zero();
        let accepts = std::thread::spawn(move || one.accept(began, deadline).map(|()| one));
        until(&mut next, |next| next.here[1] && accepts.is_finished());
        let one = accepts.join().unwrap().unwrap();
        assert!(one.here[0] && losses(&one) == 0, "{:?}", one.done);
    }

    proptest! {
        #[test]
        fn a_text_is_an_offer_that_comes_back_or_none(text in ".*", numbers: [i64; 4]) {
            [text, numbers.map(|number| number.to_string()).join(" ")].iter().for_each(|text| offer_again(text));
        }
    }
}
