//! Does: RDMA queue pairs between each two ranks that do better with them.

use super::Forming;
use super::pairs::Pairs;
use crate::mesh::open_device;
use crate::verbs::{VerbsWire, refusal};
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
        let mut opened =
            open_device(&self.spec.config, &self.wire.local_addresses()).map_err(|error| error.to_string());
        let mut ours = Vec::new();
        for &other in &tried {
            let words = self.words_for(other, opened.as_mut().map(|(wire, _)| wire));
            self.say(other, Words::TAG, &words.clone().unwrap_or_else(|why| Words::Proposal(refusal(&why))).encode())?;
            ours.push(words);
        }
        for (&other, ours) in tried.iter().zip(ours) {
            let theirs = self.hear(other, Words::TAG, deadline)?;
            let refused = match (&mut opened, ours, Words::decode(&theirs)) {
                (Ok((wire, _)), Ok(_), Some(theirs)) => wire.accept(other.into(), theirs, Instant::now()),
                (_, Err(why), _) => Some(format!("this end: {why}")),
                _ => Some("the other end speaks otherwise".to_owned()),
            };
            if let Some(why) = &refused {
                select::check_verbs(choice, why)?;
            }
            let device = opened.as_ref().map_or("", |(_, device)| device);
            let reason = &mut pairs.reasons[other.index()];
            *reason = match refused {
                None => format!("RDMA by {device}"),
                Some(why) if reason.is_empty() => format!("no RDMA: {why}"),
                Some(why) => format!("{reason}; no RDMA: {why}"),
            };
        }
        if let Ok((wire, _)) = opened {
            pairs.better.push(Box::new(wire));
        }
        Ok(())
    }

    fn words_for(&self, other: Rank, wire: Result<&mut VerbsWire, &mut String>) -> Result<Words, String> {
        let peer = PeerId::from(other);
        wire.map_err(|why| why.clone())?.greet(peer, self.wire.name(peer), Instant::now())
    }
}
