//! Does: RDMA queue pairs between each two ranks that do better with them.

use super::Forming;
use super::pairs::Pairs;
use crate::verbs::device::Device;
use crate::verbs::{self, VerbsWire};
use crate::{Beside, PeerId, Rank, TransportError, Wire, Words, select};
use std::time::Instant;

impl Forming {
    /// Exchanges proposals with every rank that this one does not share memory with, and connects to those that have verbs too.
    pub(super) fn connect_verbs(
        &mut self,
        all_share: bool,
        pairs: &mut Pairs,
        deadline: Instant,
    ) -> Result<(), TransportError> {
        let (me, choice) = (self.spec.rank, self.spec.config.wire);
        let shared = |other: Rank| all_share || pairs.better.iter().any(|wire| wire.has(other.into()));
        let others: Vec<Rank> = self.spec.world_size.ranks().filter(|&other| other != me).collect();
        let tried: Vec<Rank> = others.into_iter().filter(|&other| select::tries_verbs(choice, shared(other))).collect();
        if tried.is_empty() {
            return Ok(());
        }
        let opened = Device::open(&self.spec.config.verbs, &self.wire.local_addresses());
        let (mut wire, device) = match opened {
            Ok((device, reason)) => (Ok(VerbsWire::new(&self.spec.config, Box::new(device))), reason),
            Err(error) => (Err(error.to_string()), String::new()),
        };
        for &other in &tried {
            let proposal = self.proposal_for(other, wire.as_mut());
            self.say(other, Words::TAG, &proposal)?;
        }
        for &other in &tried {
            let theirs = self.hear(other, Words::TAG, deadline)?;
            let refusal = match &mut wire {
                Ok(wire) => consider(wire, other, &theirs),
                Err(why) => Some(format!("this end: {why}")),
            };
            if let Some(refusal) = &refusal {
                select::check_verbs(choice, refusal)?;
            }
            let reason = &mut pairs.reasons[other.index()];
            *reason = match refusal {
                None => format!("RDMA by {device}"),
                Some(refusal) if reason.is_empty() => format!("no RDMA: {refusal}"),
                Some(refusal) => format!("{reason}; no RDMA: {refusal}"),
            };
        }
        if let Ok(wire) = wire {
            pairs.better.push(Box::new(wire));
        }
        Ok(())
    }

    /// What to tell `other`: queue pairs for it, or why there are none.
    fn proposal_for(&self, other: Rank, wire: Result<&mut VerbsWire, &mut String>) -> Vec<u8> {
        let made = match wire {
            Ok(wire) => {
                let peer = PeerId::from(other);
                let attached = wire.attach(peer, self.wire.name(peer), Instant::now());
                attached.map_err(|error| error.to_string()).map(|()| wire.next_words())
            }
            Err(why) => Err(why.clone()),
        };
        let words = match made {
            Ok(Some((_, words))) => words,
            Ok(None) => Words::Proposal(verbs::refusal("it has nothing to say")),
            Err(why) => Words::Proposal(verbs::refusal(&why)),
        };
        words.encode()
    }
}

/// Connects to `other` by what it proposes; why not, where that cannot be.
fn consider(wire: &mut VerbsWire, other: Rank, theirs: &[u8]) -> Option<String> {
    let peer = PeerId::from(other);
    let Some(Words::Proposal(proposal)) = Words::decode(theirs) else { return Some("it speaks otherwise".to_owned()) };
    if let Some(refusal) = wire.refusal(peer, &proposal) {
        wire.forget(peer);
        return Some(refusal);
    }
    wire.hear(peer, Words::Proposal(proposal), Instant::now());
    None
}
