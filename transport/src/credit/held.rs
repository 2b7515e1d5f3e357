//! Pure: announced messages of one peer that have met their receives and wait for credit, where a wire answers by the inbox's reply.

use super::{Credit, Grant, Want};
use crate::inbox::{Inbox, Reply};
use crate::{PeerId, Tag};
use std::collections::BTreeMap;
use std::time::Instant;

/// Answers that are held back, and what credit has not been told yet.
#[derive(Default)]
pub(crate) struct Held {
    /// By the name that credit knows the message by: the answer, and the message's length.
    replies: BTreeMap<u32, (Reply, u64)>,
    wants: Vec<Want>,
    next: u32,
    came: u64,
}

impl Held {
    /// Keeps back the answer to a message of `inbox`; gives back one that need not wait: a refusal, or leave to send nothing.
    pub(crate) fn hold(&mut self, reply: Reply, inbox: &Inbox) -> Option<Reply> {
        let Reply::Grant { key, .. } = reply else { return Some(reply) };
        let Some((tag, bytes)) = inbox.asked(key).filter(|(_, bytes)| *bytes > 0) else { return Some(reply) };
        let (id, bytes) = (self.next, bytes as u64);
        self.wants.push(Want { id, bytes, urgent: tag.0 & Tag::CONTROL_BIT != 0 });
        self.replies.insert(id, (reply, bytes));
        self.next = self.next.wrapping_add(1);
        None
    }

    /// Bytes have come that were granted.
    pub(crate) fn count(&mut self, bytes: usize) {
        self.came += bytes as u64;
    }

    /// Whether messages wait of which credit has not been told.
    pub(crate) fn has_wants(&self) -> bool {
        !self.wants.is_empty()
    }

    /// Tells the credit of `peer`: that it is gone, or what has come of it, and what waits.
    pub(crate) fn report(held: Option<&mut Self>, peer: PeerId, is_gone: bool, credit: &mut Credit, now: Instant) {
        match held {
            _ if is_gone => credit.gone(peer),
            Some(held) => held.tell(peer, credit, now),
            None => {}
        }
    }

    fn tell(&mut self, peer: PeerId, credit: &mut Credit, now: Instant) {
        let came = std::mem::take(&mut self.came);
        if came > 0 {
            credit.came(peer, came, now);
        }
        self.wants.drain(..).for_each(|want| credit.want(peer, want));
    }

    /// The answer that a grant lets go, which may go on later where it was not granted whole.
    pub(crate) fn granted(&mut self, grant: &Grant) -> Option<Reply> {
        let (reply, bytes) = *self.replies.get(&grant.id)?;
        if grant.until >= bytes {
            self.replies.remove(&grant.id);
        }
        Some(reply)
    }
}
