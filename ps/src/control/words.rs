//! Pure: what server processes tell the coordinator.

use super::map::MAX_SHARDS;
use crate::ClusterMap;
use crate::body::{BadBody, Reader, Writer};

/// A server process is there, with these seats. Said again and again: it is the sign of life, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The number of the process, drawn at random.
    pub process: u64,
    /// The numbers of its seats, and where each listens.
    pub seats: Vec<(u64, String)>,
    /// The latest map that it has heard: by it a coordinator that was started anew knows what is.
    pub known: ClusterMap,
}

/// What a seat has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sighting {
    /// `whom`, the other end of the log of `shard`, is gone.
    Lost {
        /// Which shard.
        shard: u32,
        /// Who says so.
        by: u64,
        /// Who is gone.
        whom: u64,
    },
    /// The candidate `whom` has everything now; from here on nothing is acknowledged that it does not have.
    Synced {
        /// Which shard.
        shard: u32,
        /// Who says so.
        by: u64,
        /// Who has everything.
        whom: u64,
    },
}

impl Join {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.number(self.process);
        out.number(self.seats.len() as u64);
        for (seat, address) in &self.seats {
            out.number(*seat);
            out.text(address);
        }
        out.0.extend(self.known.encode());
        out.0
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, BadBody> {
        let mut from = Reader(body);
        let process = from.number()?;
        let count = from.count(10)?;
        if count > MAX_SHARDS {
            return Err(BadBody("too many seats"));
        }
        let seats =
            (0..count).map(|_| Ok((from.number()?, from.text()?.to_owned()))).collect::<Result<_, BadBody>>()?;
        let known = ClusterMap::decode_from(&mut from)?;
        from.end()?;
        Ok(Self { process, seats, known })
    }
}

impl Sighting {
    pub(crate) fn encode(self) -> Vec<u8> {
        let kind = u8::from(matches!(self, Self::Synced { .. }));
        let (Self::Lost { shard, by, whom } | Self::Synced { shard, by, whom }) = self;
        let mut out = Writer::default();
        out.byte(kind);
        [shard.into(), by, whom].into_iter().for_each(|number| out.number(number));
        out.0
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, BadBody> {
        let mut from = Reader(body);
        let kind = from.byte()?;
        let shard = u32::try_from(from.number()?).map_err(|_| BadBody("no such shard"))?;
        let (by, whom) = (from.number()?, from.number()?);
        from.end()?;
        match kind {
            0 => Ok(Self::Lost { shard, by, whom }),
            1 => Ok(Self::Synced { shard, by, whom }),
            _ => Err(BadBody("no such report")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_as_they_were_and_no_piece_of_them_does() {
        let join = Join { process: 7, seats: vec![(1, "a:1".into()), (2, "b:2".into())], known: ClusterMap::default() };
        let body = join.encode();
        assert_eq!(Join::decode(&body), Ok(join));
        assert!((0..body.len()).all(|cut| Join::decode(&body[..cut]).is_err()));
        for report in [Sighting::Lost { shard: 3, by: 1, whom: 2 }, Sighting::Synced { shard: 0, by: 9, whom: 8 }] {
            let body = report.encode();
            assert_eq!(Sighting::decode(&body), Ok(report));
            assert!((0..body.len()).all(|cut| Sighting::decode(&body[..cut]).is_err()));
        }
    }
}
