//! Does: speaks with the coordinator for all seats of this process, on a thread of its own, so that no seat waits for it.

use super::{ClusterMap, Join, Sighting};
use crate::dial::{self, Dialer};
use crate::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use crate::protocol::{POSTED_REPLIES, REPLY, REPLY_BYTES, REQUEST};
use crate::{Epoch, PsError};
use gradwire_transport::{Completion, Config, Envelope, LossCause, PeerId, TransportError, Wake, WireChoice};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often this process says that it is there: several times within a lease.
const BEAT: Duration = Duration::from_millis(500);
/// The longest that calling the coordinator may take, and the pause after it.
const DIAL: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(100);
/// How long a coordinator may leave what it is told every [`BEAT`] unanswered: one whose host is gone closes nothing.
const UNANSWERED: Duration = Duration::from_secs(2);
/// How long no coordinator may lead before it is said, and said again.
const SILENCE: Duration = Duration::from_secs(5);
const COORDINATOR: PeerId = PeerId(0);

/// What a seat and the agent of its process share.
pub(crate) struct Line {
    seat: u64,
    address: String,
    seat_waker: Arc<dyn Wake>,
    agent_waker: Arc<dyn Wake>,
    epoch: AtomicU64,
    map: Mutex<Arc<ClusterMap>>,
    reports: Mutex<Vec<Sighting>>,
}

impl Line {
    /// The map, where it is newer.
    pub(crate) fn newer_than(&self, epoch: Epoch) -> Option<Arc<ClusterMap>> {
        let newer = self.epoch.load(Ordering::Acquire) > epoch.0;
        newer.then(|| Arc::clone(&self.map.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Tells the coordinator, as soon as it can be reached.
    pub(crate) fn tell(&self, report: Sighting) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        if !reports.contains(&report) {
            reports.push(report);
        }
        self.agent_waker.wake();
    }

    fn hear(&self, map: &Arc<ClusterMap>) {
        *self.map.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(map);
        self.epoch.store(map.epoch.0, Ordering::Release);
        self.seat_waker.wake();
    }
}

/// What the agent's thread and the seats' threads share.
struct Shared {
    process: u64,
    lines: Mutex<HashMap<u64, Arc<Line>>>,
    waker: Arc<dyn Wake>,
    stop: AtomicBool,
    /// Whether the seats have changed: the coordinator is to be told at once.
    changed: AtomicBool,
    /// Whether this process wants to end, and whether the coordinator has answered since it was told so.
    leaving: AtomicBool,
    answered: AtomicBool,
    map: Mutex<Arc<ClusterMap>>,
}

/// The agent of a server process. It stops when this is dropped.
pub(crate) struct Agent {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    /// Begins to speak with the coordinator at one of `addresses`.
    pub(crate) fn start(addresses: Vec<String>, config: &Config) -> Result<Self, PsError> {
        // What is said is little, and must come through wherever sockets do.
        let config = Config { wire: WireChoice::Tcp, credit: None, ..config.clone() };
        let wire = dial::dialer(&config, &addresses)?;
        let shared = Arc::new(Shared {
            process: dial::random()?,
            lines: Mutex::default(),
            waker: wire.waker(),
            stop: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            map: Mutex::default(),
        });
        let talk = Talk {
            wire,
            addresses,
            shared: Arc::clone(&shared),
            map: Arc::default(),
            connected: false,
            turn: 0,
            told_of_leaving: false,
            heard: false,
            last: Instant::now(),
            why: String::new(),
        };
        let thread = std::thread::Builder::new().name("gradwire-agent".to_owned()).spawn(move || talk.run());
        let thread = thread.map_err(|error| TransportError::io("start the agent's thread", error))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A seat has come.
    pub(crate) fn seat(&self, seat: u64, address: String, seat_waker: Arc<dyn Wake>) -> Arc<Line> {
        let line = Arc::new(Line {
            seat,
            address,
            seat_waker,
            agent_waker: Arc::clone(&self.shared.waker),
            epoch: AtomicU64::new(0),
            map: Mutex::default(),
            reports: Mutex::default(),
        });
        self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner).insert(seat, Arc::clone(&line));
        self.shared.changed.store(true, Ordering::Release);
        self.shared.waker.wake();
        line
    }

    /// This process wants to end: the coordinator is to take all parts from its seats.
    pub(crate) fn withdraw(&self) {
        self.shared.leaving.store(true, Ordering::Release);
        self.shared.changed.store(true, Ordering::Release);
        self.shared.waker.wake();
    }

    /// The shards of which this process has a part, once the coordinator knows that it wants to end.
    pub(crate) fn parts_left(&self) -> Option<Vec<u32>> {
        if !self.shared.answered.load(Ordering::Acquire) {
            return None;
        }
        let map = Arc::clone(&self.shared.map.lock().unwrap_or_else(PoisonError::into_inner));
        let lines = self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner);
        Some(lines.keys().filter_map(|&seat| map.part_of(seat)).map(|(shard, _)| shard).collect())
    }

    /// A seat has ended.
    pub(crate) fn leave(&self, seat: u64) {
        self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner).remove(&seat);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.waker.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the agent's thread panicked");
        }
    }
}

struct Talk {
    wire: Box<dyn Dialer>,
    addresses: Vec<String>,
    shared: Arc<Shared>,
    map: Arc<ClusterMap>,
    connected: bool,
    /// Whether this connection has brought a map.
    heard: bool,
    /// When it last said anything, or was called.
    last: Instant,
    /// Why the last one brought none.
    why: String,
    turn: usize,
    /// Whether the coordinator was told that this process wants to end.
    told_of_leaving: bool,
}

impl Talk {
    fn run(mut self) {
        let mut beat = Instant::now();
        let mut said = Instant::now();
        let mut done = Vec::new();
        while !self.shared.stop.load(Ordering::Acquire) {
            let now = Instant::now();
            if !self.connected && now >= beat {
                self.call();
                beat = if self.connected { now } else { Instant::now() + AGAIN };
            }
            if self.heard {
                said = now;
            } else if now.saturating_duration_since(said) >= SILENCE {
                said = now;
                tracing::warn!(
                    addresses = self.addresses.join(","),
                    why = self.why,
                    "no coordinator leads: data goes on"
                );
            }
            let changed = self.shared.changed.swap(false, Ordering::AcqRel);
            if self.connected && (now >= beat || changed) {
                beat = now + BEAT;
                self.join();
            }
            if self.connected {
                self.pass_on_sightings();
            }
            if self.connected && now.saturating_duration_since(self.last) >= UNANSWERED {
                let name = Box::new(self.wire.name(COORDINATOR));
                let cause = LossCause::Aborted(format!("it has said nothing for {} s", UNANSWERED.as_secs()));
                self.wire.disconnect(COORDINATOR, TransportError::PeerLost { peer: name, cause });
            }
            self.wire.poll(now, &mut done);
            if done.is_empty() {
                self.wire.park(beat);
            }
            for completion in done.drain(..) {
                match completion {
                    Completion::Arrived(arrival) if arrival.from.tag == REPLY => {
                        self.hear(&arrival.loan);
                        let _ = self.wire.post_recv_loan(COORDINATOR, REPLY, REPLY_BYTES);
                    }
                    Completion::PeerDown { error, .. } => {
                        match self.heard {
                            true => {
                                tracing::warn!(%error, "the coordinator is gone: data goes on, but nobody takes over meanwhile")
                            }
                            // One of several, that does not lead.
                            false => self.why = error.to_string(),
                        }
                        (self.connected, self.heard) = (false, false);
                        beat = beat.min(Instant::now() + AGAIN);
                    }
                    _ => {}
                }
            }
        }
        self.wire.shutdown(Instant::now() + DIAL);
    }

    fn call(&mut self) {
        let address = &self.addresses[self.turn % self.addresses.len()];
        self.turn += 1;
        match self.wire.call(COORDINATOR, address, Instant::now() + DIAL) {
            Ok(()) => {
                (self.connected, self.heard, self.last) = (true, false, Instant::now());
                // A peer that is lost meanwhile is reported by its own completion.
                (0..POSTED_REPLIES).for_each(|_| drop(self.wire.post_recv_loan(COORDINATOR, REPLY, REPLY_BYTES)));
            }
            Err(error) => self.why = error.to_string(),
        }
    }

    fn lines(&self) -> Vec<Arc<Line>> {
        self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn join(&mut self) {
        let seats = self.lines().iter().map(|line| (line.seat, line.address.clone())).collect();
        let leaving = self.shared.leaving.load(Ordering::Acquire);
        self.told_of_leaving |= leaving;
        let join = Join { process: self.shared.process, leaving, seats, known: ClusterMap::clone(&self.map) };
        self.say(Kind::Join, &join.encode());
    }

    fn pass_on_sightings(&mut self) {
        for line in self.lines() {
            let reports = std::mem::take(&mut *line.reports.lock().unwrap_or_else(PoisonError::into_inner));
            reports.into_iter().for_each(|report| self.say(Kind::Sighting, &report.encode()));
        }
    }

    /// Says something. What finds no room is said again by whoever wanted it said.
    fn say(&mut self, kind: Kind, body: &[u8]) {
        let header = Header { flags: FLAG_INLINE, payload_bytes: body.len() as u64, ..Header::new(kind) };
        let Some(mut loan) = self.wire.lend(COORDINATOR, HEADER_BYTES + body.len()) else { return };
        loan[..HEADER_BYTES].copy_from_slice(&header.encode());
        loan[HEADER_BYTES..].copy_from_slice(body);
        let _ = self.wire.post_loan(Envelope { peer: COORDINATOR, tag: REQUEST, note: 0 }, loan);
    }

    fn hear(&mut self, bytes: &[u8]) {
        self.last = Instant::now();
        if bytes.len() == HEADER_BYTES {
            // No news.
            return;
        }
        let map = bytes.get(HEADER_BYTES..).map(ClusterMap::decode);
        let Some(Ok(map)) = map else {
            tracing::error!("what the coordinator says is no map: it must be of the same version");
            return;
        };
        if !self.heard {
            self.heard = true;
            let address = &self.addresses[(self.turn - 1) % self.addresses.len()];
            tracing::info!(address, epoch = map.epoch.0, "reached the coordinator");
        }
        // A coordinator that was started anew may not know yet what we know.
        if map.epoch >= self.map.epoch {
            self.map = Arc::new(map);
            *self.shared.map.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&self.map);
            self.shared.answered.store(self.told_of_leaving, Ordering::Release);
            self.lines().iter().for_each(|line| line.hear(&self.map));
        }
    }
}
