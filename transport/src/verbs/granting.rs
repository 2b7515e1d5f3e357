//! Does: brings what links report to the wire's credit, and lets them answer what was announced once it is granted.
//!
//! A write is one-sided: its receiver hears of it when all of it is there. So messages are granted whole here, not in portions;
//! the device cuts and paces what a queue pair sends.

use super::link::{Link, Out};
use super::wire::VerbsWire;
use crate::credit::Want;
use crate::inbox::Reply;
use std::collections::BTreeMap;
use std::time::Instant;

/// Announced messages of one peer that wait for credit, and bytes that have come of those that had it.
#[derive(Default)]
pub(super) struct Held {
    replies: BTreeMap<u32, Reply>,
    wants: Vec<Want>,
    next: u32,
    came: u64,
}

impl Link {
    /// Answers an announced message that has met its receive; where credit is granted, once it is.
    pub(super) fn answer(&mut self, reply: Reply) {
        match (&mut self.held, reply) {
            (Some(held), Reply::Grant { key, .. }) if self.inbox.bytes_of(key) > 0 => {
                held.wants.push(Want { id: held.next, bytes: self.inbox.bytes_of(key) as u64, urgent: false });
                held.replies.insert(held.next, reply);
                held.next = held.next.wrapping_add(1);
            }
            (_, reply) => self.queue.push_back(Out::Answer(reply)),
        }
    }

    /// A granted message of `bytes` is there.
    pub(super) fn count_came(&mut self, bytes: usize) {
        if let Some(held) = &mut self.held {
            held.came += bytes as u64;
        }
    }

    /// Whether messages wait of which credit has not been told.
    pub(super) fn wants_credit(&self) -> bool {
        self.held.as_ref().is_some_and(|held| !held.wants.is_empty())
    }
}

impl VerbsWire {
    /// Grants what may come now; links write the answers when they are flushed.
    pub(super) fn grant_to_all(&mut self) {
        let Some(credit) = &mut self.credit else { return };
        let now = Instant::now();
        for link in self.links.iter_mut().flatten() {
            let peer = link.peer;
            if link.lost.is_some() {
                credit.gone(peer);
            } else if let Some(held) = &mut link.held {
                let came = std::mem::take(&mut held.came);
                if came > 0 {
                    credit.came(peer, came, now);
                }
                held.wants.drain(..).for_each(|want| credit.want(peer, want));
            }
        }
        credit.grant(now, &mut self.granted);
        for grant in self.granted.drain(..) {
            let Some(Some(link)) = self.links.get_mut(grant.to.index()) else { continue };
            let reply = link.held.as_mut().and_then(|held| held.replies.remove(&grant.id));
            link.queue.extend(reply.map(Out::Answer));
        }
    }
}
