//! Does: point-to-point messages of the group's users, beside the collectives: send, recv, recv from any rank.

use crate::call::Piece;
use crate::error::Operation;
use crate::pending::{Done, Ticket};
use crate::verdict::Member;
use crate::{CollectiveError, Verdict};
use gradwire_transport::{
    Envelope, Overlap, PeerId, PeerName, PostError, Rank, RegionSlice, RegionSliceMut, RemoteSlice, Tag,
    TransportError, Wire,
};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Marks the conversations of users' messages; the user's tag is in the low 32 bits.
const USER: u64 = 1 << 62;
/// Marks, among them, reads of other ranks' devices.
const FETCHES: u64 = 1 << 61;

/// A send or receive that a user asked for.
pub(crate) struct Message {
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) kind: Kind,
    pub(crate) tag: u32,
    pub(crate) piece: Piece,
    /// For a fetch, in place of the piece.
    pub(crate) fetch: Option<Fetch>,
    pub(crate) deadline: Instant,
    pub(crate) timeout: Duration,
    /// Whether its user has been told that it was late: it stays in its place until the wire is done with it.
    pub(crate) over: bool,
}

/// Memory of another rank's device, and where it goes in ours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fetch {
    pub(crate) own: RemoteSlice,
    pub(crate) remote: RemoteSlice,
}

impl Message {
    /// Its length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.fetch.map_or(self.piece.range.len(), |fetch| fetch.remote.bytes as usize)
    }
}

/// What to do with a message, and with whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Send(Rank),
    Recv(Rank),
    RecvAny,
    /// Read a rank's device, which does nothing about it.
    Fetch(Rank),
}

/// The users' messages under way.
pub(crate) struct Messages {
    group: String,
    members: Vec<PeerName>,
    posted: HashMap<(PeerId, Tag, bool), VecDeque<Message>>,
    any: VecDeque<Message>,
    waiting: VecDeque<Message>,
    /// Operations that ended since the last look.
    pub(crate) ended: Vec<(Arc<Ticket>, Result<Done, CollectiveError>)>,
}

impl Messages {
    pub(crate) fn new(group: String, members: Vec<PeerName>) -> Self {
        Self {
            group,
            members,
            posted: HashMap::new(),
            any: VecDeque::new(),
            waiting: VecDeque::new(),
            ended: Vec::new(),
        }
    }

    /// Whether a completion with this tag belongs here.
    pub(crate) fn owns(tag: Tag) -> bool {
        tag.0 & USER != 0
    }

    /// Starts `message`, or keeps it until the wire's queue has room. Receives meet messages in the order of their calls.
    pub(crate) fn begin(&mut self, message: Message, wire: &mut dyn Wire) {
        let same = |other: &Message| other.kind == message.kind && other.tag == message.tag;
        if self.waiting.iter().any(same) {
            return self.waiting.push_back(message);
        }
        self.post(message, wire);
    }

    fn post(&mut self, message: Message, wire: &mut dyn Wire) {
        let own = if message.fetch.is_some() { FETCHES } else { 0 };
        let tag = Tag(USER | own | u64::from(message.tag));
        let range = message.piece.range.clone();
        let posted = match message.kind {
            Kind::Fetch(from) => fetch(&message, Envelope { peer: from.into(), tag, note: 0 }, wire),
            Kind::RecvAny => return self.any.push_back(message),
            Kind::Send(to) => match message.piece.region.read(range) {
                Ok(slice) => {
                    let note = slice.len() as u64;
                    told(wire.post_send(Envelope { peer: to.into(), tag, note }, slice))
                }
                Err(overlap) => Err(invalid("send", overlap)),
            },
            Kind::Recv(from) => match message.piece.region.write(range) {
                Ok(slice) => told(wire.post_recv(from.into(), tag, slice)),
                Err(overlap) => Err(invalid("recv", overlap)),
            },
        };
        let (peer, sends) = match message.kind {
            Kind::Send(to) => (PeerId::from(to), true),
            Kind::Recv(from) | Kind::Fetch(from) => (PeerId::from(from), false),
            Kind::RecvAny => unreachable!("returned above"),
        };
        match posted {
            Ok(true) => self.posted.entry((peer, tag, sends)).or_default().push_back(message),
            Ok(false) => self.waiting.push_back(message),
            Err(Failure::Wire(error)) => self.fail(message, Rank(peer.0), &error),
            Err(Failure::Call(error)) => self.ended.push((message.ticket, Err(error))),
        }
    }

    /// Looks for messages that receives from any rank wait for, and posts what the wire had no room for.
    pub(crate) fn advance(&mut self, wire: &mut dyn Wire) {
        for _ in 0..self.any.len() {
            let Some(mut message) = self.any.pop_front() else { break };
            match wire.probe(Tag(USER | u64::from(message.tag))) {
                Some(found) => {
                    message.kind = Kind::Recv(Rank(found.from.peer.0));
                    self.begin(message, wire);
                }
                None => self.any.push_back(message),
            }
        }
        for message in std::mem::take(&mut self.waiting) {
            self.begin(message, wire);
        }
    }

    /// A send ended well.
    pub(crate) fn on_sent(&mut self, to: Envelope, slice: RegionSlice) {
        drop(slice);
        if let Some(message) = self.next(to.peer, to.tag, true).filter(|message| !message.over) {
            self.ended.push((message.ticket, Ok(Done::default())));
        }
    }

    /// A receive was met.
    pub(crate) fn on_received(&mut self, from: Envelope, bytes: usize, slice: RegionSliceMut) {
        let capacity = slice.len();
        drop(slice);
        let next = self.next(from.peer, from.tag, false).filter(|message| !message.over);
        let Some(message) = next else { return };
        let expected_bytes = if message.fetch.is_some() { message.bytes() } else { capacity };
        let source = Rank(from.peer.0);
        let outcome = if bytes == expected_bytes {
            Ok(Done { source: Some(source), bytes })
        } else {
            Err(CollectiveError::WrongLength { from: source, tag: message.tag, expected_bytes, got_bytes: bytes })
        };
        self.ended.push((message.ticket, outcome));
    }

    /// A send (`sends`) or a receive failed.
    pub(crate) fn on_failed(&mut self, peer: PeerId, tag: Tag, sends: bool, error: &TransportError) {
        match self.next(peer, tag, sends).filter(|message| !message.over) {
            // It was taken back with one before it that was late.
            Some(message) if matches!(error, TransportError::Cancelled) => self.waiting.push_back(message),
            Some(message) => self.fail(message, Rank(peer.0), error),
            None => {}
        }
    }

    /// Ends what is past its deadline.
    pub(crate) fn expire(&mut self, now: Instant, wire: &mut dyn Wire) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        let late = |message: &Message| now >= message.deadline && !message.over;
        let mut posted = std::mem::take(&mut self.posted);
        for ((peer, tag, sends), queue) in &mut posted {
            let mut taken_back = false;
            for message in queue.iter_mut().filter(|message| late(message)) {
                message.over = true;
                taken_back |= !*sends;
                let error = self.timeout(message, vec![Rank(peer.0)]);
                self.ended.push((Arc::clone(&message.ticket), Err(error)));
            }
            if taken_back {
                // All of them; those that are not late are posted again.
                wire.cancel_recvs(*peer, *tag);
            }
        }
        self.posted = posted;
        let mut unposted = Vec::new();
        for queue in [&mut self.any, &mut self.waiting] {
            let (late, left): (VecDeque<_>, VecDeque<_>) = std::mem::take(queue).into_iter().partition(late);
            unposted.extend(late);
            *queue = left;
        }
        for message in unposted {
            let missing = match message.kind {
                Kind::RecvAny => Vec::new(),
                Kind::Send(rank) | Kind::Recv(rank) | Kind::Fetch(rank) => vec![rank],
            };
            let error = self.timeout(&message, missing);
            self.ended.push((message.ticket, Err(error)));
        }
    }

    /// The next deadline.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let all = self.posted.values().flatten().chain(&self.any).chain(&self.waiting);
        all.filter(|message| !message.over).map(|message| message.deadline).min()
    }

    /// Whether something must be looked for again and again.
    pub(crate) fn probes(&self) -> bool {
        !self.any.is_empty()
    }

    /// Ends everything with the group's verdict.
    pub(crate) fn end_all(&mut self, verdict: &Verdict) {
        let queues: Vec<_> = self.posted.drain().flat_map(|(_, queue)| queue).collect();
        let rest = self.any.drain(..).chain(self.waiting.drain(..)).collect::<Vec<_>>();
        for message in queues.into_iter().chain(rest).filter(|message| !message.over) {
            let error = verdict.error(self.operation(&message), &self.members);
            self.ended.push((message.ticket, Err(error)));
        }
    }

    fn next(&mut self, peer: PeerId, tag: Tag, sends: bool) -> Option<Message> {
        self.posted.get_mut(&(peer, tag, sends))?.pop_front()
    }

    fn fail(&mut self, message: Message, peer: Rank, error: &TransportError) {
        let error = match error {
            TransportError::MessageTooLong { bytes, capacity, .. } => CollectiveError::WrongLength {
                from: peer,
                tag: message.tag,
                expected_bytes: *capacity,
                got_bytes: *bytes,
            },
            TransportError::PeerLost { cause, .. } => CollectiveError::RankFailed {
                operation: Box::new(self.operation(&message)),
                ranks: vec![Member::of(peer, &self.members)],
                cause: crate::control::words(&cause.to_string()).to_owned(),
            },
            other => CollectiveError::Transport(other.clone()),
        };
        self.ended.push((message.ticket, Err(error)));
    }

    fn timeout(&self, message: &Message, missing: Vec<Rank>) -> CollectiveError {
        Verdict::Late { missing, waited: message.timeout }.error(self.operation(message), &self.members)
    }

    fn operation(&self, message: &Message) -> Operation {
        let bytes = message.bytes();
        let call = match message.kind {
            Kind::Fetch(from) => format!("reading {bytes} bytes of the device of {from}"),
            Kind::Send(to) => format!("send of {bytes} bytes to {to}"),
            Kind::Recv(from) => format!("recv of {bytes} bytes from {from}"),
            Kind::RecvAny => format!("recv of {bytes} bytes from any rank"),
        };
        Operation { call, sequence: u64::from(message.tag), group: self.group.clone() }
    }
}

enum Failure {
    Wire(TransportError),
    Call(CollectiveError),
}

fn fetch(message: &Message, from: Envelope, wire: &mut dyn Wire) -> Result<bool, Failure> {
    let (Some(fetch), Some(device)) = (message.fetch, wire.device_sided()) else {
        let (setting, reason) = ("access to devices".to_owned(), "no wire of the group has it".to_owned());
        return Err(Failure::Wire(TransportError::Config { setting, reason }));
    };
    told(device.post_get_to_device(from, fetch.own, fetch.remote).map_err(|error| PostError { error, slice: () }))
}

/// `Ok(false)` for a full queue.
fn told<T>(posted: Result<(), PostError<T>>) -> Result<bool, Failure> {
    match posted {
        Ok(()) => Ok(true),
        Err(PostError { error: TransportError::QueueFull { .. }, .. }) => Ok(false),
        Err(PostError { error, .. }) => Err(Failure::Wire(error)),
    }
}

fn invalid(call: &str, overlap: Overlap) -> Failure {
    let reason = format!("{overlap}: give each operation under way memory of its own");
    Failure::Call(CollectiveError::Invalid { call: call.to_owned(), reason })
}
