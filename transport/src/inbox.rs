//! Pure: the messages from one peer: which receive each meets, where its bytes go, in which order they are told.
//!
//! Per tag the k-th message meets the k-th receive, so a tag's queue holds messages of which a first few are matched, or
//! receives, but not unmatched ones of both kinds. Messages end in order within their tag, whatever order they fill in.

use crate::pool::Pool;
use crate::region::{BufferHome, Loan};
use crate::slab::{Slab, TagMap};
use crate::{
    Arrival, Completion, Envelope, PeerId, PeerName, PostError, RecvLoan, RegionSliceMut, Tag, TransportError, short,
};
use std::collections::VecDeque;
use std::sync::Arc;

/// Empty queues kept for later.
const SPARE: usize = 64;

/// A receive that somebody posted.
pub(crate) enum Receive {
    Slice(RegionSliceMut),
    /// In the wire's memory; at most so many bytes.
    Loan(usize),
}

impl Receive {
    fn capacity(&self) -> usize {
        match self {
            Self::Slice(slice) => slice.len(),
            Self::Loan(most) => *most,
        }
    }
}

/// The refusal of a slice that was posted.
///
/// # Panics
/// For a receive by loan: those are posted by themselves.
pub(crate) fn refused((error, receive): (TransportError, Receive)) -> PostError<RegionSliceMut> {
    match receive {
        Receive::Slice(slice) => PostError { error, slice },
        Receive::Loan(_) => unreachable!("a slice was posted"),
    }
}

/// Bytes that have arrived.
pub(crate) enum Payload<'a> {
    /// To be copied.
    Bytes(&'a [u8]),
    /// In the wire's memory, which may be handed on as it is.
    Loan(RecvLoan),
}

impl Payload<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Loan(loan) => loan,
        }
    }
}

enum Store {
    /// Not asked for yet.
    Announced,
    /// Asked for; nothing has come.
    Granted,
    Buffer(Vec<u8>),
    Loan(RecvLoan),
    /// Straight into the receive's slice.
    Direct,
    /// Nowhere: it does not fit.
    Nowhere,
}

/// What an announced message that has met its receive asks of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Send message `id`, and call it `key`; in one stretch of memory if `whole`.
    Grant { id: u64, key: u64, whole: bool },
    /// Message `id` does not fit.
    Refuse { id: u64, capacity: usize },
}

struct Message {
    from: Envelope,
    bytes: usize,
    got: usize,
    /// The peer's name for an announced message.
    id: u64,
    /// What it takes of the sender's window.
    cost: u64,
    /// When it came, among those of all peers.
    turn: u64,
    complete: bool,
    store: Store,
    receive: Option<Receive>,
}

#[derive(Default)]
struct Queue {
    posted: VecDeque<Receive>,
    messages: VecDeque<u64>,
    matched: usize,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.posted.is_empty() && self.messages.is_empty()
    }
}

/// Everything that comes from one peer.
pub(crate) struct Inbox {
    peer: PeerId,
    name: PeerName,
    pool: Arc<Pool>,
    queues: TagMap<Queue>,
    spare: Vec<Queue>,
    /// The tag whose queue was emptied last.
    last: Option<Tag>,
    messages: Slab<Message>,
    posted: usize,
    unmatched: usize,
    /// What has been taken of the sender's window, since the start.
    pub(crate) taken: u64,
    /// Payload bytes and messages handed over.
    pub(crate) received: (u64, u64),
}

impl Inbox {
    pub(crate) fn new(peer: PeerId, name: PeerName, pool: Arc<Pool>) -> Self {
        Self {
            peer,
            name,
            pool,
            queues: TagMap::default(),
            spare: Vec::new(),
            last: None,
            messages: Slab::default(),
            posted: 0,
            unmatched: 0,
            taken: 0,
            received: (0, 0),
        }
    }

    /// Receives that no message has met.
    pub(crate) fn posted(&self) -> usize {
        self.posted
    }

    /// Messages that no receive has met.
    pub(crate) fn unmatched(&self) -> usize {
        self.unmatched
    }

    /// A message has come whole, unasked; `cost` of the sender's window goes back when it is handed over.
    #[inline(always)]
    pub(crate) fn deliver(
        &mut self,
        from: Envelope,
        payload: Payload<'_>,
        cost: u64,
        turn: u64,
        done: &mut Vec<Completion>,
    ) {
        if let Payload::Bytes(bytes) = payload
            && self.deliver_at_once(from, bytes, cost, done)
        {
            return;
        }
        self.deliver_later(from, payload, cost, turn, done);
    }

    /// Delivers what does not meet its receive's slice at once.
    fn deliver_later(
        &mut self,
        from: Envelope,
        payload: Payload<'_>,
        cost: u64,
        turn: u64,
        done: &mut Vec<Completion>,
    ) {
        let (receive, alone) = self.meet(from.tag);
        let bytes = payload.bytes().len();
        let mut message =
            Message { from, bytes, got: bytes, id: 0, cost, turn, complete: true, store: Store::Nowhere, receive };
        self.put(&mut message, payload);
        if alone && message.receive.is_some() {
            self.hand_over(message, done);
        } else {
            self.enqueue(message);
        }
    }

    /// Copies a message straight into the slice that waits for it, if one does and nothing is before it; whether it did.
    #[inline(always)]
    fn deliver_at_once(&mut self, from: Envelope, bytes: &[u8], cost: u64, done: &mut Vec<Completion>) -> bool {
        let Some(queue) = self.queues.get_mut(&from.tag) else { return false };
        let fits = |receive: &mut Receive| matches!(receive, Receive::Slice(slice) if slice.len() >= bytes.len());
        if !queue.messages.is_empty() {
            return false;
        }
        let Some(Receive::Slice(mut slice)) = queue.posted.pop_front_if(fits) else { return false };
        let empty = queue.posted.is_empty();
        short::copy(&mut slice, bytes);
        self.posted -= 1;
        self.taken += cost;
        self.received.0 += bytes.len() as u64;
        self.received.1 += 1;
        done.push(Completion::Received { from, slice, bytes: bytes.len() });
        if empty {
            self.put_away(from.tag);
        }
        true
    }

    /// A message is offered; what to answer once it has met its receive, which may be now.
    pub(crate) fn announce(
        &mut self,
        from: Envelope,
        bytes: usize,
        id: u64,
        turn: u64,
        done: &mut Vec<Completion>,
    ) -> Option<Reply> {
        let (receive, _) = self.meet(from.tag);
        let store = Store::Announced;
        let key = self.enqueue(Message { from, bytes, got: 0, id, cost: 0, turn, complete: false, store, receive });
        self.settle(key, done)
    }

    /// A receive is posted; what to answer where it has met an announced message.
    pub(crate) fn post(&mut self, tag: Tag, receive: Receive, done: &mut Vec<Completion>) -> Option<Reply> {
        let spare = &mut self.spare;
        let queue = self.queues.entry(tag).or_insert_with(|| spare.pop().unwrap_or_default());
        let Some(&key) = queue.messages.get(queue.matched) else {
            queue.posted.push_back(receive);
            self.posted += 1;
            return None;
        };
        queue.matched += 1;
        self.unmatched -= 1;
        self.messages.get_mut(key)?.receive = Some(receive);
        let reply = self.settle(key, done);
        self.report(tag, done);
        reply
    }

    /// Bytes from `offset` on of a message that was granted as `key`.
    ///
    /// # Errors
    /// What the peer did wrong.
    pub(crate) fn fill(
        &mut self,
        key: u64,
        offset: u64,
        payload: Payload<'_>,
        done: &mut Vec<Completion>,
    ) -> Result<(), &'static str> {
        let message = self.messages.get_mut(key).ok_or("bytes of a message that is not under way")?;
        let length = payload.bytes().len();
        if matches!(message.store, Store::Announced | Store::Nowhere | Store::Loan(_)) || message.complete {
            return Err("bytes of a message that was not asked for");
        }
        if offset != message.got as u64 || length > message.bytes - message.got {
            return Err("bytes that do not follow those before");
        }
        let (start, end) = (message.got, message.got + length);
        let whole = length == message.bytes;
        match (&mut message.store, &mut message.receive, payload) {
            (Store::Direct, Some(Receive::Slice(slice)), payload) => {
                slice[start..end].copy_from_slice(payload.bytes());
            }
            (store @ Store::Granted, _, Payload::Loan(loan)) if whole => *store = Store::Loan(loan),
            (store, _, payload) => {
                if matches!(store, Store::Granted) {
                    *store = Store::Buffer(self.pool.take(message.bytes));
                }
                if let Store::Buffer(buffer) = store {
                    buffer[start..end].copy_from_slice(payload.bytes());
                }
            }
        }
        message.got = end;
        if end == message.bytes {
            message.complete = true;
            let tag = message.from.tag;
            self.report(tag, done);
        }
        Ok(())
    }

    /// Conversation and length of a message that was granted as `key`.
    pub(crate) fn asked(&self, key: u64) -> Option<(Tag, usize)> {
        self.messages.get(key).map(|message| (message.from.tag, message.bytes))
    }

    /// Length of a message that was granted as `key`.
    pub(crate) fn bytes_of(&self, key: u64) -> usize {
        self.asked(key).map_or(0, |(_, bytes)| bytes)
    }

    /// The slice that a message granted as `key` fills: a device writes it, and [`Inbox::filled`] follows.
    pub(crate) fn slice_of(&self, key: u64) -> Option<&RegionSliceMut> {
        match self.messages.get(key)?.receive.as_ref()? {
            Receive::Slice(slice) => Some(slice),
            Receive::Loan(_) => None,
        }
    }

    /// A device has filled the slice of a message that was granted as `key`.
    ///
    /// # Errors
    /// What the peer did wrong.
    pub(crate) fn filled(&mut self, key: u64, done: &mut Vec<Completion>) -> Result<(), &'static str> {
        let message = self.messages.get_mut(key).ok_or("bytes of a message that is not under way")?;
        if !matches!(message.store, Store::Direct) || message.complete {
            return Err("bytes of a message that was not asked for");
        }
        (message.got, message.complete) = (message.bytes, true);
        let tag = message.from.tag;
        self.report(tag, done);
        Ok(())
    }

    /// The earliest message of `tag` that has met no receive: when it came, from whom, its length.
    pub(crate) fn probe(&self, tag: Tag) -> Option<(u64, Envelope, usize)> {
        let queue = self.queues.get(&tag)?;
        let message = self.messages.get(*queue.messages.get(queue.matched)?)?;
        Some((message.turn, message.from, message.bytes))
    }

    /// Whether the earliest unmatched message of `tag` has come whole.
    pub(crate) fn has_whole(&self, tag: Tag) -> bool {
        let first = self.queues.get(&tag).and_then(|queue| queue.messages.get(queue.matched));
        first.and_then(|key| self.messages.get(*key)).is_some_and(|message| message.complete)
    }

    /// Takes back the receives of `tag` that no message has met.
    pub(crate) fn cancel(&mut self, tag: Tag, error: &TransportError, done: &mut Vec<Completion>) {
        let Some(queue) = self.queues.get_mut(&tag) else { return };
        self.posted -= queue.posted.len();
        for receive in queue.posted.drain(..) {
            done.push(failed(self.peer, tag, receive, error.clone()));
        }
        self.tidy(tag);
    }

    /// Ends everything with `error`, but for messages that have come whole: those can still be received.
    pub(crate) fn end_all(&mut self, error: &TransportError, done: &mut Vec<Completion>) {
        let mut tags: Vec<Tag> = self.queues.keys().copied().collect();
        tags.sort_unstable();
        for tag in tags {
            let Some(queue) = self.queues.get_mut(&tag) else { continue };
            let keys = std::mem::take(&mut queue.messages);
            let matched = std::mem::take(&mut queue.matched);
            for (at, key) in keys.into_iter().enumerate() {
                let Some(message) = self.messages.get_mut(key) else { continue };
                if at >= matched && message.complete {
                    if let Some(queue) = self.queues.get_mut(&tag) {
                        queue.messages.push_back(key);
                    }
                    continue;
                }
                self.unmatched -= usize::from(at >= matched);
                if let Some(Message { receive: Some(receive), .. }) = self.messages.remove(key) {
                    done.push(failed(self.peer, tag, receive, error.clone()));
                }
            }
            self.cancel(tag, error, done);
        }
    }

    /// The receive that the next message of `tag` meets, and whether nothing of this tag is before it.
    fn meet(&mut self, tag: Tag) -> (Option<Receive>, bool) {
        let Some(queue) = self.queues.get_mut(&tag) else { return (None, true) };
        let (receive, alone) = (queue.posted.pop_front(), queue.messages.is_empty());
        self.posted -= usize::from(receive.is_some());
        if alone && queue.posted.is_empty() {
            self.tidy(tag);
        }
        (receive, alone)
    }

    fn enqueue(&mut self, message: Message) -> u64 {
        let (tag, matched) = (message.from.tag, message.receive.is_some());
        let key = self.messages.insert(message);
        let spare = &mut self.spare;
        let queue = self.queues.entry(tag).or_insert_with(|| spare.pop().unwrap_or_default());
        queue.messages.push_back(key);
        queue.matched += usize::from(matched);
        self.unmatched += usize::from(!matched);
        key
    }

    /// Puts a payload that has come whole where it belongs.
    fn put(&self, message: &mut Message, payload: Payload<'_>) {
        let fits = message.receive.as_ref().is_none_or(|receive| message.bytes <= receive.capacity());
        message.store = match (&mut message.receive, payload) {
            _ if !fits => Store::Nowhere,
            (Some(Receive::Slice(slice)), payload) => {
                slice[..message.bytes].copy_from_slice(payload.bytes());
                Store::Direct
            }
            (Some(Receive::Loan(_)), Payload::Loan(loan)) => Store::Loan(loan),
            // The wire's own memory goes back at once where nobody waits for what is in it.
            (_, payload) => {
                let mut buffer = self.pool.take(message.bytes);
                buffer[..message.bytes].copy_from_slice(payload.bytes());
                Store::Buffer(buffer)
            }
        };
    }

    /// Decides where an announced message that has met its receive will go.
    fn settle(&mut self, key: u64, done: &mut Vec<Completion>) -> Option<Reply> {
        let message = self.messages.get_mut(key).filter(|message| matches!(message.store, Store::Announced))?;
        let receive = message.receive.as_ref()?;
        let (id, capacity) = (message.id, receive.capacity());
        if message.bytes > capacity {
            (message.store, message.complete) = (Store::Nowhere, true);
            let tag = message.from.tag;
            self.report(tag, done);
            return Some(Reply::Refuse { id, capacity });
        }
        let whole = matches!(receive, Receive::Loan(_));
        message.store = if whole { Store::Granted } else { Store::Direct };
        Some(Reply::Grant { id, key, whole })
    }

    /// Hands over what is complete, in order, within `tag`.
    fn report(&mut self, tag: Tag, done: &mut Vec<Completion>) {
        while let Some(queue) = self.queues.get_mut(&tag)
            && queue.matched > 0
            && let Some(&key) = queue.messages.front()
            && self.messages.get(key).is_some_and(|message| message.complete)
        {
            queue.messages.pop_front();
            queue.matched -= 1;
            if let Some(message) = self.messages.remove(key) {
                self.hand_over(message, done);
            }
        }
        self.tidy(tag);
    }

    fn hand_over(&mut self, message: Message, done: &mut Vec<Completion>) {
        let Message { from, bytes, cost, store, receive, .. } = message;
        self.taken += cost;
        let Some(receive) = receive else { return };
        let capacity = receive.capacity();
        if bytes > capacity {
            if let Store::Buffer(buffer) = store {
                self.pool.take_back(buffer);
            }
            let (peer, Envelope { tag, note, .. }) = (Box::new(self.name.clone()), from);
            let error = TransportError::MessageTooLong { peer, tag, note, bytes, capacity };
            done.push(failed(from.peer, from.tag, receive, error));
            return;
        }
        self.received.0 += bytes as u64;
        self.received.1 += 1;
        done.push(match (receive, store) {
            (Receive::Slice(mut slice), Store::Buffer(buffer)) => {
                slice[..bytes].copy_from_slice(&buffer[..bytes]);
                self.pool.take_back(buffer);
                Completion::Received { from, slice, bytes }
            }
            (Receive::Slice(slice), _) => Completion::Received { from, slice, bytes },
            (Receive::Loan(_), Store::Loan(loan)) => Completion::Arrived(Arrival { from, loan }),
            (Receive::Loan(_), store) => {
                let Store::Buffer(buffer) = store else { unreachable!("a complete message lies somewhere") };
                let home: Arc<dyn BufferHome> = Arc::clone(&self.pool) as _;
                Completion::Arrived(Arrival { from, loan: RecvLoan(Loan::of_buffer(buffer, bytes, home)) })
            }
        });
    }

    /// Puts the queue of `tag` away where nothing is in it.
    fn tidy(&mut self, tag: Tag) {
        if self.queues.get(&tag).is_some_and(Queue::is_empty) {
            self.put_away(tag);
        }
    }

    /// The queue of `tag` is empty. The last one that was is kept: a conversation often goes on in the same tag.
    fn put_away(&mut self, tag: Tag) {
        if self.last == Some(tag) {
            return;
        }
        if let Some(before) = self.last.replace(tag)
            && self.queues.get(&before).is_some_and(Queue::is_empty)
            && let Some(queue) = self.queues.remove(&before)
            && self.spare.len() < SPARE
        {
            self.spare.push(queue);
        }
    }
}

fn failed(peer: PeerId, tag: Tag, receive: Receive, error: TransportError) -> Completion {
    let slice = match receive {
        Receive::Slice(slice) => Some(slice),
        Receive::Loan(_) => None,
    };
    Completion::RecvFailed { peer, tag, slice, error }
}
