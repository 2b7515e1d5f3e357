//! Pure: one peer's end of a simulated connection: its frames on their way, and what has come from the other end.

use crate::credit::{Held, UNASKED_BYTES, UNASKED_WINDOW};
use crate::flights::{Cargo, Flights};
use crate::inbox::{Inbox, Payload, Reply};
use crate::pool::Pool;
use crate::slab::Slab;
use crate::{
    Completion, Config, Envelope, LossCause, PeerId, PeerName, RegionSliceMut, RemoteSlice, Traffic, TransportError,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// What a message takes of the window beside its bytes.
const MESSAGE_COST: u64 = 64;
/// Bytes of a frame beside its payload.
const FRAME_BYTES: usize = 64;

/// What travels.
pub(super) enum Frame {
    /// Its message has been given up: only its number still counts.
    Void,
    Eager {
        flight: u64,
        to: Envelope,
        cargo: Cargo,
    },
    Announce {
        id: u64,
        to: Envelope,
        bytes: usize,
    },
    /// Leave to send message `id` up to byte `until`.
    Grant {
        id: u64,
        key: u64,
        until: u64,
    },
    Refuse {
        id: u64,
        capacity: usize,
    },
    /// Bytes of a message that was asked for.
    Data {
        flight: u64,
        key: u64,
        cargo: Arc<Cargo>,
        bytes: Range<usize>,
    },
    Credit(u64),
    Put {
        flight: u64,
        cargo: Cargo,
        remote: RemoteSlice,
    },
    Get {
        key: u64,
        remote: RemoteSlice,
    },
    Got {
        key: u64,
        bytes: Vec<u8>,
    },
    Goodbye,
    Abort(String),
}

impl Frame {
    /// What it takes of a link's bandwidth.
    pub(super) fn bytes(&self) -> usize {
        FRAME_BYTES
            + match self {
                Self::Eager { cargo, .. } | Self::Put { cargo, .. } => cargo.len(),
                Self::Data { bytes, .. } => bytes.len(),
                Self::Got { bytes, .. } => bytes.len(),
                Self::Abort(text) => text.len(),
                _ => 0,
            }
    }

    fn cost(bytes: usize) -> u64 {
        bytes as u64 + MESSAGE_COST
    }
}

/// A frame that the other end has not acknowledged.
pub(super) struct Sent {
    pub(super) frame: Frame,
    pub(super) since: Instant,
}

/// A message that the other end has been told of, and how far it has asked for it.
struct Offer {
    flight: u64,
    cargo: Arc<Cargo>,
    asked: usize,
}

/// One end.
pub(super) struct Link {
    pub(super) peer: PeerId,
    pub(super) name: PeerName,
    pub(super) inbox: Inbox,
    pub(super) flights: Flights,
    pub(super) lost: Option<TransportError>,
    /// Reads of the other end's memory under way.
    pub(super) gets: Slab<(Envelope, RegionSliceMut)>,
    /// Frames that are not acknowledged, from number `first` on.
    pub(super) frames: VecDeque<Sent>,
    pub(super) first: u64,
    /// When the frames so far have left.
    pub(super) busy_until: Instant,
    /// The next frame to be taken from the other end, and those that came before their turn.
    pub(super) expected: u64,
    pub(super) early: BTreeSet<u64>,
    /// Whether a goodbye follows what was posted.
    pub(super) closing: bool,
    /// What waits for credit, where we grant it.
    pub(super) held: Option<Held>,
    announced: BTreeMap<u64, Offer>,
    max_unmatched: usize,
    next_id: u64,
    eager_bytes: usize,
    window_bytes: u64,
    window: u64,
    told: u64,
    sent: (u64, u64),
}

impl Link {
    /// An end with settings `config`; `theirs` are the other end's.
    pub(super) fn new(
        (peer, name): (PeerId, PeerName),
        (config, theirs): (&Config, &Config),
        pool: Arc<Pool>,
        now: Instant,
    ) -> Self {
        let unasked = |config: &Config| if grants(config) { UNASKED_WINDOW } else { usize::MAX };
        let eager_bytes = if grants(theirs) { UNASKED_BYTES } else { usize::MAX };
        Self {
            peer,
            inbox: Inbox::new(peer, name.clone(), pool),
            name,
            flights: Flights::default(),
            lost: None,
            gets: Slab::default(),
            frames: VecDeque::new(),
            first: 0,
            busy_until: now,
            expected: 0,
            early: BTreeSet::new(),
            closing: false,
            held: grants(config).then(Held::default),
            announced: BTreeMap::new(),
            max_unmatched: config.queue_depth + config.window_bytes / 64,
            next_id: 0,
            eager_bytes: config.eager_bytes.min(eager_bytes),
            window_bytes: config.window_bytes.min(unasked(config)) as u64,
            window: config.window_bytes.min(unasked(theirs)) as u64,
            told: 0,
            sent: (0, 0),
        }
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic::of(self.sent, self.inbox.received)
    }

    /// The frame that a message begins with: all of it where the window has room, else word of it.
    pub(super) fn begin(&mut self, to: Envelope, cargo: Cargo) -> Frame {
        let flight = self.flights.begin(to);
        let bytes = cargo.len();
        if bytes <= self.eager_bytes && Frame::cost(bytes) <= self.window {
            self.window -= Frame::cost(bytes);
            return Frame::Eager { flight, to, cargo };
        }
        let id = self.next_id;
        self.next_id += 1;
        self.announced.insert(id, Offer { flight, cargo: Arc::new(cargo), asked: 0 });
        Frame::Announce { id, to, bytes }
    }

    /// The answer to an announced message that has met its receive; none where it waits for credit.
    pub(super) fn answer(&mut self, reply: Reply) -> Option<Frame> {
        let reply = match &mut self.held {
            Some(held) => held.hold(reply, &self.inbox)?,
            None => reply,
        };
        Some(match reply {
            Reply::Grant { id, key, .. } => Frame::Grant { id, key, until: self.inbox.bytes_of(key) as u64 },
            Reply::Refuse { id, capacity } => Frame::Refuse { id, capacity },
        })
    }

    /// The frame that gives the other end its window back, once it is worth one.
    pub(super) fn credit(&mut self) -> Option<Frame> {
        let due = self.inbox.taken - self.told;
        (due >= self.window_bytes / 4).then(|| {
            self.told = self.inbox.taken;
            Frame::Credit(due)
        })
    }

    /// The frame that takes leave, once nothing waits to be asked for (`now_or_never`: at once).
    pub(super) fn goodbye(&mut self, now_or_never: bool) -> Option<Frame> {
        let due = self.closing && self.lost.is_none() && (now_or_never || self.announced.is_empty());
        due.then(|| {
            self.closing = false;
            Frame::Goodbye
        })
    }

    /// Takes a frame of the other end, in its turn; what to answer.
    ///
    /// # Errors
    /// Why the connection ends.
    pub(super) fn take(
        &mut self,
        frame: &Frame,
        turn: u64,
        done: &mut Vec<Completion>,
    ) -> Result<Option<Frame>, LossCause> {
        let from = |to: &Envelope| Envelope { peer: self.peer, tag: to.tag, note: to.note };
        let protocol = |what: &str| LossCause::Protocol(what.to_owned());
        if self.inbox.unmatched() > self.max_unmatched {
            return Err(LossCause::Protocol(format!(
                "more than {} messages that nobody waits for",
                self.max_unmatched
            )));
        }
        match frame {
            Frame::Eager { to, cargo, .. } => {
                self.inbox.deliver(from(to), Payload::Bytes(cargo), Frame::cost(cargo.len()), turn, done);
            }
            Frame::Announce { id, to, bytes } => {
                let reply = self.inbox.announce(from(to), *bytes, *id, turn, done);
                return Ok(reply.and_then(|reply| self.answer(reply)));
            }
            Frame::Grant { id, key, until } => {
                let data = self.asked(*id, *key, *until);
                return data.map(Some).ok_or_else(|| protocol("it granted what was not offered"));
            }
            Frame::Refuse { id, capacity } => {
                let Offer { flight, cargo, .. } =
                    self.announced.remove(id).ok_or_else(|| protocol("it refused what was not offered"))?;
                let cargo = Arc::into_inner(cargo).ok_or_else(|| protocol("it refused what it had asked for"))?;
                let Envelope { tag, note, .. } = self.flights.to(flight).expect("what is offered is under way");
                let (peer, bytes) = (Box::new(self.name.clone()), cargo.len());
                let error = TransportError::MessageTooLong { peer, tag, note, bytes, capacity: *capacity };
                self.flights.end(flight, cargo.into_slice(), Some(error), done);
            }
            Frame::Data { key, cargo, bytes, .. } => {
                self.held.iter_mut().for_each(|held| held.count(bytes.len()));
                let part = Payload::Bytes(&cargo[bytes.clone()]);
                self.inbox.fill(*key, bytes.start as u64, part, done).map_err(protocol)?;
            }
            Frame::Credit(bytes) => self.window += bytes,
            Frame::Got { key, bytes } => {
                if let Some((from, mut slice)) = self.gets.remove(*key) {
                    slice[..bytes.len()].copy_from_slice(bytes);
                    done.push(Completion::Received { from, slice, bytes: bytes.len() });
                }
            }
            Frame::Goodbye => return Err(LossCause::Goodbye),
            Frame::Abort(text) => return Err(LossCause::Aborted(text.clone())),
            Frame::Void | Frame::Put { .. } | Frame::Get { .. } => {}
        }
        Ok(None)
    }

    /// The bytes of message `id`, `key` to the other end, that it now asks for, up to byte `until`.
    fn asked(&mut self, id: u64, key: u64, until: u64) -> Option<Frame> {
        let offer = self.announced.get_mut(&id)?;
        let bytes = offer.asked..usize::try_from(until).ok()?;
        if bytes.end > offer.cargo.len() || (bytes.is_empty() && !offer.cargo.is_empty()) {
            return None;
        }
        offer.asked = bytes.end;
        let data = Frame::Data { flight: offer.flight, key, cargo: Arc::clone(&offer.cargo), bytes };
        if offer.asked == offer.cargo.len() {
            self.announced.remove(&id);
        }
        Some(data)
    }

    /// The other end has taken every frame before number `next`.
    pub(super) fn acknowledged(&mut self, next: u64, done: &mut Vec<Completion>) {
        while self.first < next
            && let Some(sent) = self.frames.pop_front()
        {
            self.first += 1;
            match sent.frame {
                Frame::Eager { flight, cargo, .. } => self.gone(flight, cargo, done),
                Frame::Data { flight, cargo, .. } => {
                    // Whoever holds the last part of a message holds it alone.
                    if let Some(cargo) = Arc::into_inner(cargo) {
                        self.gone(flight, cargo, done);
                    }
                }
                Frame::Put { flight, cargo, .. } => self.flights.end(flight, cargo.into_slice(), None, done),
                _ => {}
            }
        }
    }

    /// A message has been taken whole.
    fn gone(&mut self, flight: u64, cargo: Cargo, done: &mut Vec<Completion>) {
        self.sent.0 += cargo.len() as u64;
        self.sent.1 += 1;
        self.flights.end(flight, cargo.into_slice(), None, done);
    }

    /// Ends everything with `error`. Frames keep their numbers, so that a last word can follow them.
    pub(super) fn end(&mut self, error: &TransportError, done: &mut Vec<Completion>) {
        if self.lost.is_some() {
            return;
        }
        self.lost = Some(error.clone());
        done.push(Completion::PeerDown { peer: self.peer, error: error.clone() });
        for sent in &mut self.frames {
            match std::mem::replace(&mut sent.frame, Frame::Void) {
                Frame::Eager { flight, cargo, .. } | Frame::Put { flight, cargo, .. } => {
                    self.flights.end(flight, cargo.into_slice(), Some(error.clone()), done);
                }
                Frame::Data { flight, cargo, .. } => {
                    if let Some(cargo) = Arc::into_inner(cargo) {
                        self.flights.end(flight, cargo.into_slice(), Some(error.clone()), done);
                    }
                }
                last @ (Frame::Goodbye | Frame::Abort(_)) => sent.frame = last,
                _ => {}
            }
        }
        for Offer { flight, cargo, .. } in std::mem::take(&mut self.announced).into_values() {
            if let Some(cargo) = Arc::into_inner(cargo) {
                self.flights.end(flight, cargo.into_slice(), Some(error.clone()), done);
            }
        }
        for (Envelope { peer, tag, .. }, slice) in self.gets.take_all() {
            done.push(Completion::RecvFailed { peer, tag, slice: Some(slice), error: error.clone() });
        }
        self.inbox.end_all(error, done);
    }
}

/// Whether an end with settings `config` grants what comes: of conversations that are marked, it knows nothing.
pub(super) fn grants(config: &Config) -> bool {
    config.credit.is_some_and(|settings| !settings.marked)
}
