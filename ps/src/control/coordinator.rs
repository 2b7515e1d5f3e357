//! Does: the coordinator: hears servers, decides by [`Cluster`], tells the map to them and to whoever asks.

use super::right::Right;
use super::{Cluster, ClusterMap, Join, Moves, Processes, Sighting};
use crate::body::{Reader, Writer};
use crate::etcd::EtcdSettings;
use crate::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use crate::monitor::{Monitor, Questions};
use crate::protocol::{REPLY, REQUEST};
use crate::refusal::{Reason, Refusal};
use crate::{Dialer, PsError, Stopper, dial};
use gradwire_transport::{Completion, Config, Envelope, LossCause, PeerId, TransportError, WireChoice};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often leases are looked at.
const TICK: Duration = Duration::from_millis(200);
/// The longest word of a server: seats and a map.
const WORD_BYTES: usize = 4 << 20;
/// Words of one peer that may come at once.
const LISTENING: usize = 8;
/// Servers and clients connected at once.
const MAX_PEERS: usize = 1 << 16;

/// Settings of a coordinator.
#[derive(Clone, Debug)]
pub struct CoordinatorSettings {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The secret of servers and clients. Needed off loopback.
    pub token: Option<String>,
    /// Listen off loopback without a token or TLS.
    pub insecure: bool,
    /// Shards of the cluster.
    pub shards: u32,
    /// Copies of each beside the first: 0 to 7.
    pub replicas: u32,
    /// Where the map is kept, and which of several coordinators leads; without it, this one decides alone.
    pub etcd: Option<EtcdSettings>,
    /// The checkpoint that a cluster begins with; one that goes on has what it has.
    pub restore: Option<String>,
    /// Settings of the wire, of which it takes those about sockets.
    pub transport: Config,
}

impl CoordinatorSettings {
    /// Whether a coordinator may start so.
    ///
    /// # Errors
    /// `Invalid` off loopback without a token and without TLS, for numbers that cannot be, and for a checkpoint where there are no
    /// copies.
    pub fn check(&self) -> Result<(), PsError> {
        let open = self.token.as_ref().is_none_or(String::is_empty) && self.transport.tls.is_none();
        dial::check_open(self.listen, open && !self.insecure)?;
        if !(1..=super::map::MAX_SHARDS as u32).contains(&self.shards) || self.replicas > super::MAX_REPLICAS {
            return Err(PsError::invalid(
                "starting a coordinator",
                format!("it takes 1 to 4096 shards, and 0 to {} replicas of each", super::MAX_REPLICAS),
            ));
        }
        if self.restore.is_some() && self.replicas == 0 {
            let reason =
                "without copies clients come before it is read: serve without a coordinator, or with --replicas 1";
            return Err(PsError::invalid("beginning a cluster with a checkpoint", reason));
        }
        Ok(())
    }
}

/// What a coordinator tells whoever watches it.
#[derive(Clone, Debug)]
pub struct CoordinatorReport {
    /// Whether it decides: of several, one does. One that does not knows nothing of the cluster.
    pub leads: bool,
    /// The map as it is.
    pub map: ClusterMap,
    /// Shards that the cluster shall have.
    pub shards: u32,
    /// The server processes that it knows.
    pub processes: Processes,
    /// Seats without a part.
    pub spare_seats: usize,
    /// How often shards have got another primary since it was started, by its decision.
    pub moves: Moves,
}

/// A coordinator.
pub struct Coordinator {
    wire: Box<dyn Dialer>,
    address: SocketAddr,
    cluster: Cluster,
    /// A cluster that nobody has joined.
    empty: Cluster,
    right: Right,
    /// The connections of server processes: they are told every map.
    servers: HashSet<PeerId>,
    questions: Arc<Questions<CoordinatorReport>>,
    stop: Arc<AtomicBool>,
}

impl Coordinator {
    /// Listens; it answers once it runs.
    ///
    /// # Errors
    /// As [`CoordinatorSettings::check`]; `Invalid` for certificates that cannot be read; `Transport` when the address cannot be had.
    pub fn bind(settings: CoordinatorSettings) -> Result<Self, PsError> {
        settings.check()?;
        let token = settings.token.filter(|token| !token.is_empty());
        let config = Config { token, wire: WireChoice::Tcp, credit: None, ..settings.transport };
        let (wire, address) = dial::listener(&config, settings.listen, (dial::random()?, MAX_PEERS))?;
        let cluster = Cluster::new(settings.shards, settings.replicas);
        let empty = cluster.beginning_with(settings.restore.unwrap_or_default());
        // Etcd tells what was; else servers do.
        let empty = if settings.etcd.is_some() { empty } else { empty.listening_first(Instant::now()) };
        let right = Right::new(settings.etcd.as_ref(), address.to_string())?;
        let stop = Arc::new(AtomicBool::new(false));
        let (servers, questions) = (HashSet::new(), Arc::default());
        Ok(Self { wire, address, cluster: empty.clone(), empty, right, servers, questions, stop })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A handle to stop it with.
    pub fn stopper(&self) -> Stopper {
        Stopper::new(Arc::clone(&self.stop), self.wire.waker())
    }

    /// What others ask for its reports.
    pub fn monitor(&mut self) -> Monitor<CoordinatorReport> {
        self.questions.open();
        Monitor::new(Arc::clone(&self.questions), self.wire.waker())
    }

    fn report(&self) -> CoordinatorReport {
        let cluster = &self.cluster;
        CoordinatorReport {
            leads: self.right.holds(),
            map: cluster.map().clone(),
            shards: cluster.shards(),
            processes: cluster.processes(),
            spare_seats: cluster.spare_seats(),
            moves: cluster.moves(),
        }
    }

    /// Coordinates until it is stopped.
    ///
    /// # Errors
    /// `Invalid` where the map that etcd keeps is of another cluster, or of another version.
    pub fn run(&mut self) -> Result<(), PsError> {
        let mut done = Vec::new();
        let mut tick = Instant::now() + TICK;
        while !self.stop.load(Ordering::Acquire) {
            self.look_at_the_right()?;
            for asker in self.questions.take() {
                // Who does not wait any more needs no answer.
                let _ = asker.send(self.report());
            }
            let now = Instant::now();
            self.wire.poll(now, &mut done);
            if done.is_empty() {
                let idle = self.right.next().unwrap_or(now + Duration::from_secs(60));
                self.wire.park(if self.servers.is_empty() { idle } else { tick });
            }
            for completion in done.drain(..) {
                self.complete(completion, Instant::now());
            }
            if now >= tick {
                tick = now + TICK;
                if self.right.holds() && self.cluster.tick(now) {
                    self.publish();
                }
            }
        }
        self.questions.close();
        self.wire.shutdown(Instant::now() + TICK);
        Ok(())
    }

    /// Begins to lead where nobody does, and ends where another one may.
    fn look_at_the_right(&mut self) -> Result<(), PsError> {
        if !self.right.holds() {
            self.step_down();
        }
        let Some(map) = self.right.stand(Instant::now())? else { return Ok(()) };
        let restored = self.cluster.restore(map, Instant::now());
        restored.map_err(|reason| PsError::invalid("leading the cluster of that name", reason))
    }

    /// Knows nothing any more, and sends the servers to whoever leads: first, since etcd may be slow to hear of it.
    fn step_down(&mut self) {
        for peer in std::mem::take(&mut self.servers) {
            self.turn_away(peer);
        }
        self.cluster = self.empty.clone().counting_from(self.cluster.moves());
        self.right.give_up();
    }

    /// Keeps the map that was just decided, then tells it: what was told is never forgotten. False where it was not kept, and
    /// this coordinator decides nothing any more.
    fn publish(&mut self) -> bool {
        let kept = self.right.keep(self.cluster.map());
        if kept {
            self.tell_all()
        } else {
            self.step_down()
        }
        kept
    }

    fn complete(&mut self, completion: Completion, now: Instant) {
        match completion {
            Completion::PeerUp(peer) => (0..LISTENING).for_each(|_| self.listen(peer)),
            Completion::Arrived(arrival) if arrival.from.tag == REQUEST => {
                let peer = arrival.from.peer;
                let heard = self.take(peer, &arrival.loan, now);
                drop(arrival);
                match heard {
                    Ok(()) => self.listen(peer),
                    Err(reason) => self.close(peer, reason),
                }
            }
            Completion::RecvFailed { peer, error: TransportError::MessageTooLong { bytes, .. }, .. } => {
                self.close(peer, format!("a word of {bytes} bytes, of which {WORD_BYTES} are taken"));
            }
            Completion::PeerDown { peer, .. } => drop(self.servers.remove(&peer)),
            _ => {}
        }
    }

    fn take(&mut self, peer: PeerId, bytes: &[u8], now: Instant) -> Result<(), String> {
        if !self.right.holds() {
            self.turn_away(peer);
            return Ok(());
        }
        let header = Header::decode(bytes).map_err(|error| error.to_string())?;
        let body = &bytes[HEADER_BYTES..];
        let (changed, known) = match header.kind {
            Kind::Join => {
                let join = Join::decode(body).map_err(|bad| bad.to_string())?;
                self.cluster.check(&join.known)?;
                let is_new = self.servers.insert(peer);
                // Who leaves waits to hear that we know.
                let known = Some(join.known.epoch).filter(|_| !is_new && !join.leaving);
                (self.cluster.join(join, now), known)
            }
            Kind::Sighting => {
                let report = Sighting::decode(body).map_err(|bad| bad.to_string())?;
                let changed = self.cluster.report(report, now);
                match report {
                    Sighting::Lost { .. } => tracing::warn!(?report, changed, "a server has lost another"),
                    Sighting::Synced { .. } => tracing::info!(?report, changed, "a backup is complete"),
                }
                (changed, None)
            }
            Kind::Map => (false, None),
            Kind::Drain => return self.drain(peer, &header, body, now),
            kind => return Err(format!("a {kind:?}, which is for servers: this is the coordinator")),
        };
        if changed {
            self.publish();
        } else if known != Some(self.cluster.map().epoch) {
            self.tell(peer, &header);
        } else {
            // No news, but a sign of life.
            self.say(peer, header.reply(Kind::Done), &[]);
        }
        Ok(())
    }

    /// The server at an address is to have no part any more; answered with the shards that are still there.
    fn drain(&mut self, peer: PeerId, header: &Header, body: &[u8], now: Instant) -> Result<(), String> {
        let mut from = Reader(body);
        let address = from.text().map_err(|bad| bad.to_string())?;
        let Some((left, changed)) = self.cluster.drain(address, now) else {
            let expected = format!("one of {}", self.cluster.addresses().join(", "));
            let refusal = Refusal::new(Reason::Mismatch, "server", "address", expected, address);
            self.say(peer, header.reply(Kind::Refused), &refusal.encode());
            return Ok(());
        };
        tracing::info!(address, "this server is to hand over what it has");
        if changed && !self.publish() {
            self.turn_away(peer);
            return Ok(());
        }
        let mut body = Writer::default();
        body.number(left.len() as u64);
        left.into_iter().for_each(|shard| body.number(shard.into()));
        self.say(peer, header.reply(Kind::Done), &body.0);
        Ok(())
    }

    fn listen(&mut self, peer: PeerId) {
        // A peer that is lost meanwhile is reported by its own completion.
        let _ = self.wire.post_recv_loan(peer, REQUEST, WORD_BYTES);
    }

    fn close(&mut self, peer: PeerId, reason: String) {
        let name = self.wire.name(peer);
        tracing::warn!(host = name.host, pid = name.pid, address = name.address, reason, "closing a connection");
        self.end(peer, reason);
    }

    /// Sends a peer to whoever leads.
    fn turn_away(&mut self, peer: PeerId) {
        self.end(peer, self.right.refusal());
    }

    fn end(&mut self, peer: PeerId, reason: String) {
        let (peer_name, cause) = (Box::new(self.wire.name(peer)), LossCause::Aborted(reason));
        self.wire.disconnect(peer, TransportError::PeerLost { peer: peer_name, cause });
    }

    fn tell_all(&mut self) {
        let map = self.cluster.map();
        for (shard, seats) in map.shards.iter().enumerate() {
            let [primary, candidate] =
                [&seats.primary, &seats.candidate].map(|who| who.as_ref().map_or("none", |who| &*who.address));
            let backups = seats.backups.iter().map(|who| &*who.address).collect::<Vec<_>>().join(" ");
            tracing::info!(epoch = map.epoch.0, shard, primary, backups, candidate, "map");
        }
        let servers: Vec<PeerId> = self.servers.iter().copied().collect();
        servers.into_iter().for_each(|peer| self.tell(peer, &Header::new(Kind::Join)));
    }

    /// Tells the map. A server that has no room for it now says again what it knows, and is told then.
    fn tell(&mut self, peer: PeerId, request: &Header) {
        let body = self.cluster.map().encode();
        self.say(peer, request.reply(Kind::Done), &body);
    }

    fn say(&mut self, peer: PeerId, header: Header, body: &[u8]) {
        let header = Header { flags: FLAG_INLINE, payload_bytes: body.len() as u64, ..header };
        let Some(mut loan) = self.wire.lend(peer, HEADER_BYTES + body.len()) else { return };
        loan[..HEADER_BYTES].copy_from_slice(&header.encode());
        loan[HEADER_BYTES..].copy_from_slice(body);
        let _ = self.wire.post_loan(Envelope { peer, tag: REPLY, note: 0 }, loan);
    }
}
