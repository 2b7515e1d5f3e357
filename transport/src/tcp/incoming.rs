//! Pure: the messages from one peer: which receive each meets, where its bytes go, in which order they end.

use super::outgoing::MESSAGE_COST;
use crate::frame::Header;
use crate::pool::Pool;
use crate::region::{BufferHome, Loan};
use crate::{Arrival, Completion, Envelope, PeerId, PeerName, RecvLoan, RegionSliceMut, Tag, TransportError};
use std::collections::VecDeque;
use std::sync::Arc;

/// A receive that somebody posted.
pub(super) enum Receive {
    Slice(RegionSliceMut),
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

enum Store {
    /// Not sent yet: it has been announced.
    Awaited,
    /// In memory of ours, once the first byte is there: what many peers have under way at once takes none until then, and what
    /// was just given back, still in the processor's cache, is used again for the next.
    Due,
    /// In memory of ours.
    Buffer(Vec<u8>),
    /// Straight into the receive's slice.
    Direct,
    /// Nowhere: it does not fit.
    Nowhere,
}

struct Landing {
    serial: u64,
    from: Envelope,
    id: u32,
    total: usize,
    got: usize,
    eager: bool,
    store: Store,
    receive: Option<Receive>,
}

impl Landing {
    fn complete(&self) -> bool {
        match self.store {
            Store::Awaited => false,
            Store::Nowhere if !self.eager => true,
            _ => self.got == self.total,
        }
    }
}

/// What a match asks of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Grant { id: u32, bytes: u64, tag: Tag },
    Refuse(u32, usize),
}

/// Everything that comes from one peer.
pub(super) struct Incoming {
    peer: PeerId,
    posted: VecDeque<(Tag, Receive)>,
    landings: VecDeque<Landing>,
    serial: u64,
    pool: Arc<Pool>,
    unread: u64,
    /// Bytes of the window that have been taken and not yet told.
    pub(super) credit_due: u64,
    /// Payload bytes and messages handed over.
    pub(super) received: (u64, u64),
}

impl Incoming {
    pub(super) fn new(peer: PeerId, pool: Arc<Pool>) -> Self {
        Self {
            peer,
            posted: VecDeque::new(),
            landings: VecDeque::new(),
            serial: 0,
            pool,
            unread: 0,
            credit_due: 0,
            received: (0, 0),
        }
    }

    /// The peer.
    pub(super) fn peer(&self) -> PeerId {
        self.peer
    }

    /// Receives that no message has met.
    pub(super) fn len(&self) -> usize {
        self.posted.len()
    }

    /// Messages that no receive has met.
    pub(super) fn unmatched(&self) -> usize {
        self.landings.iter().filter(|landing| landing.receive.is_none()).count()
    }

    /// What eager messages that were not handed over take of the window.
    pub(super) fn unread(&self) -> u64 {
        self.unread
    }

    /// A message begins: eager, or announced. Tells its serial, and what to answer.
    pub(super) fn begin(&mut self, header: &Header, eager: bool) -> (u64, Option<Reply>) {
        let from = Envelope { peer: self.peer, tag: header.tag, note: header.note };
        let total = usize::try_from(header.total).expect("the header was checked against the limit");
        let receive = self
            .posted
            .iter()
            .position(|(tag, _)| *tag == header.tag)
            .and_then(|at| self.posted.remove(at))
            .map(|(_, receive)| receive);
        let serial = self.serial;
        self.serial += 1;
        if eager {
            self.unread += header.total + MESSAGE_COST;
        }
        let mut landing = Landing { serial, from, id: header.id, total, got: 0, eager, store: Store::Awaited, receive };
        let reply = match &landing.receive {
            Some(_) => self.settle(&mut landing),
            None => {
                if eager {
                    landing.store = Store::Buffer(self.pool.take(total));
                }
                None
            }
        };
        self.landings.push_back(landing);
        (serial, reply)
    }

    /// Decides where the bytes of a message go that has met its receive and of which none has come.
    fn settle(&self, landing: &mut Landing) -> Option<Reply> {
        let receive = landing.receive.as_ref()?;
        let capacity = receive.capacity();
        if landing.total > capacity {
            landing.store = Store::Nowhere;
            return (!landing.eager).then_some(Reply::Refuse(landing.id, capacity));
        }
        landing.store = match receive {
            Receive::Slice(_) => Store::Direct,
            Receive::Loan(_) => Store::Due,
        };
        let (id, bytes, tag) = (landing.id, landing.total as u64, landing.from.tag);
        (!landing.eager).then_some(Reply::Grant { id, bytes, tag })
    }

    /// A receive is posted: it meets the earliest message of its tag that has met none.
    pub(super) fn post(&mut self, tag: Tag, receive: Receive) -> Option<Reply> {
        let at = self.landings.iter().position(|landing| landing.receive.is_none() && landing.from.tag == tag);
        let Some(at) = at else {
            self.posted.push_back((tag, receive));
            return None;
        };
        let mut landing = self.landings.remove(at).expect("the index was just found");
        landing.receive = Some(receive);
        let reply = match landing.store {
            Store::Awaited => self.settle(&mut landing),
            _ => None,
        };
        self.landings.insert(at, landing);
        reply
    }

    /// The message of a granted `id`; `None` for one that nobody granted.
    pub(super) fn granted(&self, id: u32, offset: u64, length: u32) -> Option<u64> {
        let landing = self.landings.iter().find(|landing| !landing.eager && landing.id == id)?;
        let end = usize::try_from(offset).ok()?.checked_add(length as usize)?;
        let wanted = matches!(landing.store, Store::Direct | Store::Due | Store::Buffer(_)) && end <= landing.total;
        wanted.then_some(landing.serial)
    }

    /// Where bytes of message `serial` from `offset` on are to be put; `None`: nowhere.
    pub(super) fn space(&mut self, serial: u64, offset: usize, length: usize) -> Option<&mut [u8]> {
        let landing = self.landings.iter_mut().find(|landing| landing.serial == serial)?;
        let end = offset + length;
        if matches!(landing.store, Store::Due) {
            landing.store = Store::Buffer(self.pool.take(landing.total));
        }
        match (&mut landing.store, &mut landing.receive) {
            (Store::Buffer(buffer), _) => buffer.get_mut(offset..end),
            (Store::Direct, Some(Receive::Slice(slice))) => slice.get_mut(offset..end),
            _ => None,
        }
    }

    /// `bytes` of message `serial` have come; its tag, where they had been asked for.
    pub(super) fn came(&mut self, serial: u64, bytes: usize) -> Option<Tag> {
        let landing = self.landings.iter_mut().find(|landing| landing.serial == serial)?;
        landing.got += bytes;
        (!landing.eager).then_some(landing.from.tag)
    }

    /// The earliest message of `tag` that has met no receive, with its serial.
    pub(super) fn probe(&self, tag: Tag) -> Option<(Envelope, usize)> {
        let landing = self.landings.iter().find(|landing| landing.receive.is_none() && landing.from.tag == tag)?;
        Some((landing.from, landing.total))
    }

    /// Takes back the receives of `tag` that no message has met.
    pub(super) fn cancel(&mut self, tag: Tag, error: &TransportError, done: &mut Vec<Completion>) {
        for (other, receive) in std::mem::take(&mut self.posted) {
            if other == tag {
                done.push(failed(self.peer, tag, receive, error.clone()));
            } else {
                self.posted.push_back((other, receive));
            }
        }
    }

    /// Whether a message has come whole and met its receive.
    pub(super) fn has_news(&self) -> bool {
        self.landings.iter().any(|landing| landing.receive.is_some() && landing.complete())
    }

    /// Reports what has ended, in order within each tag.
    pub(super) fn report(&mut self, name: &PeerName, done: &mut Vec<Completion>) {
        let mut at = 0;
        while at < self.landings.len() {
            let landing = &self.landings[at];
            let tag = landing.from.tag;
            let ready = landing.receive.is_some() && landing.complete();
            if !ready || self.landings.iter().take(at).any(|earlier| earlier.from.tag == tag) {
                at += 1;
                continue;
            }
            if let Some(landing) = self.landings.remove(at) {
                self.hand_over(landing, name, done);
            }
        }
    }

    fn hand_over(&mut self, landing: Landing, name: &PeerName, done: &mut Vec<Completion>) {
        let Landing { from, total, eager, store, receive, .. } = landing;
        if eager {
            let cost = total as u64 + MESSAGE_COST;
            (self.unread, self.credit_due) = (self.unread - cost, self.credit_due + cost);
        }
        let Some(receive) = receive else { return };
        let capacity = receive.capacity();
        if total > capacity {
            if let Store::Buffer(buffer) = store {
                self.pool.take_back(buffer);
            }
            let (peer, Envelope { tag, note, .. }) = (Box::new(name.clone()), from);
            let error = TransportError::MessageTooLong { peer, tag, note, bytes: total, capacity };
            done.push(failed(from.peer, from.tag, receive, error));
            return;
        }
        self.received.0 += total as u64;
        self.received.1 += 1;
        done.push(match (receive, store) {
            (Receive::Slice(mut slice), Store::Buffer(buffer)) => {
                slice[..total].copy_from_slice(&buffer[..total]);
                self.pool.take_back(buffer);
                Completion::Received { from, slice, bytes: total }
            }
            (Receive::Slice(slice), _) => Completion::Received { from, slice, bytes: total },
            (Receive::Loan(_), store) => {
                let buffer = match store {
                    Store::Buffer(buffer) => buffer,
                    // It is empty.
                    _ => self.pool.take(total),
                };
                let home: Arc<dyn BufferHome> = Arc::clone(&self.pool) as Arc<dyn BufferHome>;
                Completion::Arrived(Arrival { from, loan: RecvLoan(Loan::of_buffer(buffer, total, home)) })
            }
        });
    }

    /// Ends everything with `error`, but for messages that have come whole: those can still be received.
    pub(super) fn end_all(&mut self, name: &PeerName, error: &TransportError, done: &mut Vec<Completion>) {
        self.report(name, done);
        for mut landing in std::mem::take(&mut self.landings) {
            match landing.receive.take() {
                Some(receive) => done.push(failed(self.peer, landing.from.tag, receive, error.clone())),
                None if landing.complete() => self.landings.push_back(landing),
                None => {}
            }
        }
        for (tag, receive) in std::mem::take(&mut self.posted) {
            done.push(failed(self.peer, tag, receive, error.clone()));
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
