//! Does: shared memory between each two ranks that turn out to share a host.

use super::Forming;
use crate::select;
use crate::{Beside, PeerId, Rank, ShmOffer, ShmWire, Tag, TransportError, Wire};
use std::time::Instant;

/// The conversations about it: the lower rank offers, the higher one says whether it could open, the lower one whether both
/// may use it. An empty answer is consent.
const OFFER: Tag = Tag(Tag::CONTROL_BIT | 4);
const ANSWER: Tag = Tag(Tag::CONTROL_BIT | 5);
const DECISION: Tag = Tag(Tag::CONTROL_BIT | 6);

/// The better ways to other ranks than sockets, and for each rank why it is reached as it is.
pub(super) struct Pairs {
    pub(super) better: Vec<Box<dyn Beside>>,
    pub(super) reasons: Vec<String>,
}

impl Forming {
    /// Offers memory to the ranks behind this one and takes that of those before it, as far as they may share a host.
    pub(super) fn pair_up(&mut self, deadline: Instant) -> Result<Pairs, TransportError> {
        let (me, size, choice) = (self.spec.rank, self.spec.world_size, self.spec.config.wire);
        let own = self.boot_id(me);
        let before = |other| select::pair_before_proof(choice, &own, &self.boot_id(other)).unwrap_or_default();
        let mut reasons: Vec<String> = size.ranks().map(before).collect();
        let near = |other: &Rank| *other != me && reasons[other.index()].is_empty();
        let (behind, before): (Vec<Rank>, Vec<Rank>) = size.ranks().filter(near).partition(|other| *other > me);
        if behind.is_empty() && before.is_empty() {
            return Ok(Pairs { better: Vec::new(), reasons });
        }
        let mut wire = ShmWire::new(&self.spec.config)?;
        let mut made = Vec::new();
        for &other in &behind {
            let offered = wire.offer();
            let bytes = offered.as_ref().map_or(Vec::new(), |(offer, _)| offer.encode().to_vec());
            self.say(other, OFFER, &bytes)?;
            made.push(offered.map(|(_, end)| end));
        }
        let mut taken = Vec::new();
        for &other in &before {
            let offer = self.hear(other, OFFER, deadline)?;
            let end = ShmOffer::decode(&offer).and_then(|offer| wire.accept(&offer));
            let refusal = end.as_ref().err().map(ToString::to_string).unwrap_or_default();
            self.say(other, ANSWER, refusal.as_bytes())?;
            taken.push(end);
        }
        for (&other, end) in behind.iter().zip(made) {
            let answer = self.hear_text(other, ANSWER, deadline)?;
            let refusal = match end {
                Ok(end) if answer.is_empty() => {
                    wire.attach(PeerId::from(other), self.wire.name(other.into()), end).err()
                }
                Ok(_) => None,
                Err(error) => Some(error),
            };
            let refusal = refusal.map_or(answer, |error| error.to_string());
            self.say(other, DECISION, refusal.as_bytes())?;
            reasons[other.index()] = select::pair_after_proof(&refusal);
        }
        for (&other, end) in before.iter().zip(taken) {
            let refusal = self.hear_text(other, DECISION, deadline)?;
            if refusal.is_empty() {
                wire.attach(PeerId::from(other), self.wire.name(other.into()), end?)?;
            }
            reasons[other.index()] = select::pair_after_proof(&refusal);
        }
        Ok(Pairs { better: vec![Box::new(wire)], reasons })
    }
}
