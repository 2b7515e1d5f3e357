//! Pure: which seat serves which shard, as the coordinator has decided it last.

use crate::Epoch;
use crate::body::{BadBody, Reader, Writer};

/// Most shards of a cluster.
pub(super) const MAX_SHARDS: usize = 4096;
/// Most processes that are drained: more than a coordinator has connections.
const MAX_LEAVING: usize = 1 << 17;

/// A place in a server process that can hold one shard, for one life of it: a seat that has lost its shard takes a new number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seating {
    /// Its number, drawn at random.
    pub seat: u64,
    /// The number of its process, which all seats of it share.
    pub process: u64,
    /// Where it listens.
    pub address: String,
}

/// Who serves a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardSeats {
    /// The epoch in which its primary became that.
    pub term: Epoch,
    /// Answers clients.
    pub primary: Option<Seating>,
    /// Has everything that was acknowledged, and takes over.
    pub backup: Option<Seating>,
    /// On its way to being the backup.
    pub candidate: Option<Seating>,
    /// Whether the shard has once had all the copies that it shall have: before, no client is sent to it.
    pub formed: bool,
    /// The checkpoint that its first primary begins with; empty where it begins with nothing.
    pub origin: String,
}

/// The map of a cluster. The one with the greater epoch holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterMap {
    /// Its version; 0 before there is any.
    pub epoch: Epoch,
    /// Copies that each shard shall have beside its primary: 0 or 1.
    pub replicas: u32,
    /// By shard.
    pub shards: Vec<ShardSeats>,
    /// The numbers of processes that were told to hand over what they have: they get no part.
    pub leaving: Vec<u64>,
}

/// What a seat is, by a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Primary,
    Backup,
    Candidate,
}

impl ClusterMap {
    /// The addresses of the primaries, once clients may be sent to all of them.
    pub fn addresses(&self) -> Option<Vec<String>> {
        let ready = |shard: &ShardSeats| Some(shard.primary.as_ref().filter(|_| shard.formed)?.address.clone());
        if self.shards.is_empty() { None } else { self.shards.iter().map(ready).collect() }
    }

    /// What is missing until clients may come, for people.
    pub fn missing(&self) -> String {
        let open = (0u32..).zip(&self.shards).find(|(_, shard)| shard.primary.is_none() || !shard.formed);
        match open {
            None if self.shards.is_empty() => "too few servers have joined".to_owned(),
            None => "nothing".to_owned(),
            Some((shard, seats)) if seats.primary.is_none() => format!("shard {shard} has no server"),
            Some((shard, _)) => format!("shard {shard} has no backup yet"),
        }
    }

    /// Which shard a seat has a part in, and which.
    pub(crate) fn part_of(&self, seat: u64) -> Option<(u32, Part)> {
        let is = |who: &Option<Seating>| who.as_ref().is_some_and(|who| who.seat == seat);
        (0..).zip(&self.shards).find_map(|(shard, seats)| {
            let parts =
                [(&seats.primary, Part::Primary), (&seats.backup, Part::Backup), (&seats.candidate, Part::Candidate)];
            parts.into_iter().find(|(who, _)| is(who)).map(|(_, part)| (shard, part))
        })
    }

    /// The map as the body of a message.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.number(self.epoch.0);
        out.number(self.replicas.into());
        out.number(self.shards.len() as u64);
        for shard in &self.shards {
            out.number(shard.term.0);
            out.byte(shard.formed.into());
            out.text(&shard.origin);
            for who in [&shard.primary, &shard.backup, &shard.candidate] {
                out.byte(who.is_some().into());
                if let Some(who) = who {
                    who.encode(&mut out);
                }
            }
        }
        out.number(self.leaving.len() as u64);
        self.leaving.iter().for_each(|&process| out.number(process));
        out.0
    }

    /// The map that a message holds.
    ///
    /// # Errors
    /// `BadBody` for anything else.
    pub fn decode(body: &[u8]) -> Result<Self, BadBody> {
        let mut from = Reader(body);
        let map = Self::decode_from(&mut from)?;
        from.end()?;
        Ok(map)
    }

    pub(super) fn decode_from(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let epoch = Epoch(from.number()?);
        let replicas = u32::try_from(from.number()?).map_err(|_| BadBody("too many replicas"))?;
        let count = from.count(12)?;
        if count > MAX_SHARDS {
            return Err(BadBody("too many shards"));
        }
        let shards = (0..count).map(|_| {
            let (term, formed, origin) = (Epoch(from.number()?), from.byte()? != 0, from.text()?.to_owned());
            let mut who = || if from.byte()? == 0 { Ok(None) } else { Seating::decode(from).map(Some) };
            Ok(ShardSeats { term, formed, origin, primary: who()?, backup: who()?, candidate: who()? })
        });
        let shards = shards.collect::<Result<_, BadBody>>()?;
        let count = from.count(8)?;
        if count > MAX_LEAVING {
            return Err(BadBody("too many processes that leave"));
        }
        let leaving = (0..count).map(|_| from.number()).collect::<Result<_, BadBody>>()?;
        Ok(Self { epoch, replicas, shards, leaving })
    }
}

impl Seating {
    fn encode(&self, out: &mut Writer) {
        out.number(self.seat);
        out.number(self.process);
        out.text(&self.address);
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        Ok(Self { seat: from.number()?, process: from.number()?, address: from.text()?.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_comes_back_as_it_was_and_no_piece_of_it_does() {
        let seating = |seat| Some(Seating { seat, process: seat * 10, address: format!("10.0.0.{seat}:7070") });
        let nobody = ShardSeats { origin: "checkpoint-1".to_owned(), ..ShardSeats::default() };
        let first = ShardSeats { term: Epoch(3), primary: seating(1), candidate: seating(2), ..nobody };
        let nobody = ShardSeats::default();
        let second = ShardSeats { term: Epoch(5), primary: seating(3), backup: seating(4), formed: true, ..nobody };
        let mut map = ClusterMap { epoch: Epoch(9), replicas: 1, shards: vec![first, second], leaving: vec![7, 30] };
        let body = map.encode();
        assert_eq!(ClusterMap::decode(&body), Ok(map.clone()));
        for cut in 0..body.len() {
            assert!(ClusterMap::decode(&body[..cut]).is_err());
        }
        assert_eq!((map.part_of(2), map.part_of(4)), (Some((0, Part::Candidate)), Some((1, Part::Backup))));
        assert_eq!((map.part_of(9), map.addresses()), (None, None));
        assert_eq!(map.missing(), "shard 0 has no backup yet");
        map.shards[0].formed = true;
        assert_eq!(map.addresses().unwrap(), ["10.0.0.1:7070", "10.0.0.3:7070"]);
    }
}
