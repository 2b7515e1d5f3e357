//! Pure: which seat serves which shard, as the coordinator has decided it last.

use crate::Epoch;
use crate::body::{BadBody, Reader, Writer};

/// Most shards of a cluster.
pub(super) const MAX_SHARDS: usize = 4096;
/// Most copies of a shard beside its primary: each has a push before it is acknowledged.
pub(crate) const MAX_REPLICAS: u32 = 7;
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
    /// Each has everything that was acknowledged: the first follows the primary, and takes over; each other follows the one before.
    pub backups: Vec<Seating>,
    /// On its way to being the last backup.
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
    /// Copies that each shard shall have beside its primary.
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

impl ShardSeats {
    /// All that have a part, each followed by the next one.
    pub(crate) fn chain(&self) -> impl Iterator<Item = (&Seating, Part)> {
        let backups = self.backups.iter().map(|who| (who, Part::Backup));
        let candidate = self.candidate.iter().map(|who| (who, Part::Candidate));
        self.primary.iter().map(|who| (who, Part::Primary)).chain(backups).chain(candidate)
    }

    /// Whom `seat` follows.
    pub(crate) fn before(&self, seat: u64) -> Option<&Seating> {
        let all: Vec<&Seating> = self.chain().map(|(who, _)| who).collect();
        all.windows(2).find(|pair| pair[1].seat == seat).map(|pair| pair[0])
    }

    /// Who follows `seat`, and as what.
    pub(crate) fn after(&self, seat: u64) -> Option<(&Seating, Part)> {
        self.chain().skip_while(|(who, _)| who.seat != seat).nth(1)
    }
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
            Some((shard, seats)) => {
                format!("shard {shard} has {} of {} backups yet", seats.backups.len(), self.replicas)
            }
        }
    }

    /// Which shard a seat has a part in, and which.
    pub(crate) fn part_of(&self, seat: u64) -> Option<(u32, Part)> {
        (0..)
            .zip(&self.shards)
            .find_map(|(shard, seats)| seats.chain().find(|(who, _)| who.seat == seat).map(|(_, part)| (shard, part)))
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
            for who in [&shard.primary, &shard.candidate] {
                out.byte(who.is_some().into());
                if let Some(who) = who {
                    who.encode(&mut out);
                }
            }
            out.number(shard.backups.len() as u64);
            shard.backups.iter().for_each(|who| who.encode(&mut out));
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
            let (primary, candidate) = (who()?, who()?);
            let count = from.count(18)?;
            if count > MAX_REPLICAS as usize {
                return Err(BadBody("too many backups"));
            }
            let backups = (0..count).map(|_| Seating::decode(from)).collect::<Result<_, BadBody>>()?;
            Ok(ShardSeats { term, formed, origin, primary, backups, candidate })
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
        let seating = |seat| Seating { seat, process: seat * 10, address: format!("10.0.0.{seat}:7070") };
        let nobody = ShardSeats { origin: "checkpoint-1".to_owned(), ..ShardSeats::default() };
        let first = ShardSeats { term: Epoch(3), primary: Some(seating(1)), candidate: Some(seating(2)), ..nobody };
        let second = ShardSeats {
            term: Epoch(5),
            primary: Some(seating(3)),
            backups: vec![seating(4), seating(5)],
            candidate: Some(seating(6)),
            formed: true,
            ..ShardSeats::default()
        };
        let follows = |seat| second.before(seat).map(|who| who.seat);
        assert_eq!([3, 4, 5, 6, 7].map(follows), [None, Some(3), Some(4), Some(5), None]);
        assert_eq!(second.after(5), Some((&seating(6), Part::Candidate)));
        assert_eq!((second.after(3), second.after(6)), (Some((&seating(4), Part::Backup)), None));
        let mut map = ClusterMap { epoch: Epoch(9), replicas: 2, shards: vec![first, second], leaving: vec![7, 30] };
        let body = map.encode();
        assert_eq!(ClusterMap::decode(&body), Ok(map.clone()));
        for cut in 0..body.len() {
            assert!(ClusterMap::decode(&body[..cut]).is_err());
        }
        assert_eq!((map.part_of(2), map.part_of(5)), (Some((0, Part::Candidate)), Some((1, Part::Backup))));
        assert_eq!((map.part_of(9), map.addresses()), (None, None));
        assert_eq!(map.missing(), "shard 0 has 0 of 2 backups yet");
        map.shards[0].formed = true;
        assert_eq!(map.addresses().unwrap(), ["10.0.0.1:7070", "10.0.0.3:7070"]);
    }
}
