//! Pure: what a server tells of itself, and how it travels.

use crate::body::{BadBody, Reader, Writer};
use crate::{Epoch, SparseSpec, TableSpec};

/// One shard as it is now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ShardStatus {
    /// Bytes taken by tables and waiting contributions.
    pub memory_bytes: u64,
    /// The most that may be taken.
    pub memory_limit_bytes: u64,
    /// What the server is to the shard.
    pub standing: Standing,
    /// The tables it holds a share of, by name.
    pub tables: Vec<TableStatus>,
    /// The sparse tables it holds a share of, by name.
    pub sparse: Vec<SparseStatus>,
    /// The clients that are connected.
    pub clients: Vec<ClientStatus>,
}

/// What a server is to a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// It has the shard by itself, without a coordinator.
    #[default]
    Alone,
    /// It has none yet.
    Spare,
    /// It has a copy, and takes over.
    Backup,
    /// It answers clients.
    Primary,
    /// It has lost its backup, and answers once the coordinator has heard so: that one may have taken over.
    Fenced,
}

impl Role {
    const ALL: [Self; 5] = [Self::Alone, Self::Spare, Self::Backup, Self::Primary, Self::Fenced];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Spare => "spare",
            Self::Backup => "backup",
            Self::Primary => "primary",
            Self::Fenced => "primary, waiting for the coordinator",
        }
    }
}

/// What a server is to a shard, and at which place of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// What it is.
    pub role: Role,
    /// To which shard.
    pub shard: u32,
    /// The epoch of the map that it has heard last.
    pub epoch: Epoch,
    /// Entries of the log since its primary became that, as far as it has them.
    pub log: u64,
    /// How many of them the backup has; none without a backup.
    pub backup: Option<u64>,
}

impl Standing {
    /// Entries of the log that the backup does not have yet; none without a backup.
    pub fn lag(&self) -> Option<u64> {
        Some(self.log.saturating_sub(self.backup?))
    }

    fn encode(&self, out: &mut Writer) {
        out.byte(self.role as u8);
        out.number(self.shard.into());
        out.number(self.epoch.0);
        out.number(self.log);
        out.byte(self.backup.is_some().into());
        out.number(self.backup.unwrap_or(0));
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let role = from.byte()?;
        let role =
            Role::ALL.into_iter().find(|known| *known as u8 == role).ok_or(BadBody("no such part of a server"))?;
        let (shard, epoch, log) = (from.small()?, Epoch(from.number()?), from.number()?);
        let (has_backup, backup) = (from.byte()? != 0, from.number()?);
        Ok(Self { role, shard, epoch, log, backup: has_backup.then_some(backup) })
    }
}

/// A table's share of a shard.
#[derive(Clone, Debug, PartialEq)]
pub struct TableStatus {
    /// What it is.
    pub spec: TableSpec,
    /// Elements held by this shard.
    pub elements: u64,
    /// Memory taken for them.
    pub bytes: u64,
    /// The last clock that is complete; in asynchronous mode, pushes applied.
    pub clock: u64,
    /// Parts of pushes that were counted.
    pub pushes: u64,
    /// Parts of pulls that were asked for.
    pub pulls: u64,
    /// Parts of pushes that came again, and were not counted.
    pub duplicates: u64,
    /// Requests that wait for other workers.
    pub waiting: u64,
    /// Bytes of the gradients as they came, duplicates too.
    pub pushed_bytes: u64,
    /// Bytes that the same gradients have in the table's type.
    pub pushed_whole_bytes: u64,
    /// Bytes of the values that were asked for, as they leave.
    pub pulled_bytes: u64,
    /// Bytes that the same values have in the table's type.
    pub pulled_whole_bytes: u64,
}

impl TableStatus {
    fn encode(&self, out: &mut Writer) {
        self.spec.encode(out);
        let Self { elements, bytes, clock, pushes, pulls, duplicates, waiting, .. } = *self;
        let Self { pushed_bytes, pushed_whole_bytes, pulled_bytes, pulled_whole_bytes, .. } = *self;
        let travelled = [pushed_bytes, pushed_whole_bytes, pulled_bytes, pulled_whole_bytes];
        let numbers = [elements, bytes, clock, pushes, pulls, duplicates, waiting];
        numbers.into_iter().chain(travelled).for_each(|number| out.number(number));
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        Ok(Self {
            spec: TableSpec::decode(from)?,
            elements: from.number()?,
            bytes: from.number()?,
            clock: from.number()?,
            pushes: from.number()?,
            pulls: from.number()?,
            duplicates: from.number()?,
            waiting: from.number()?,
            pushed_bytes: from.number()?,
            pushed_whole_bytes: from.number()?,
            pulled_bytes: from.number()?,
            pulled_whole_bytes: from.number()?,
        })
    }
}

/// A sparse table's share of a shard.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseStatus {
    /// What it is.
    pub spec: SparseSpec,
    /// Rows held by this shard.
    pub rows: u64,
    /// Memory set aside for them, with their optimizer's state and their index.
    pub bytes: u64,
    /// The last clock that is complete; in asynchronous mode, pushes applied.
    pub clock: u64,
    /// Parts of pushes that were counted.
    pub pushes: u64,
    /// Parts of pulls that were asked for.
    pub pulls: u64,
    /// Parts of pushes that came again, and were not counted.
    pub duplicates: u64,
    /// Requests that wait for other workers.
    pub waiting: u64,
    /// Rows that were evicted.
    pub evicted: u64,
    /// Gradients that were dropped since their ids had no row yet.
    pub unadmitted: u64,
    /// Bytes of the pushes as they came, ids and duplicates too.
    pub pushed_bytes: u64,
    /// Bytes of the values that were asked for.
    pub pulled_bytes: u64,
}

impl SparseStatus {
    fn encode(&self, out: &mut Writer) {
        self.spec.encode(out);
        let Self { rows, bytes, clock, pushes, pulls, duplicates, waiting, evicted, unadmitted, .. } = *self;
        let numbers = [rows, bytes, clock, pushes, pulls, duplicates, waiting, evicted, unadmitted];
        numbers.into_iter().chain([self.pushed_bytes, self.pulled_bytes]).for_each(|number| out.number(number));
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        Ok(Self {
            spec: SparseSpec::decode(from)?,
            rows: from.number()?,
            bytes: from.number()?,
            clock: from.number()?,
            pushes: from.number()?,
            pulls: from.number()?,
            duplicates: from.number()?,
            waiting: from.number()?,
            evicted: from.number()?,
            unadmitted: from.number()?,
            pushed_bytes: from.number()?,
            pulled_bytes: from.number()?,
        })
    }
}

/// A connected client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStatus {
    /// Its number: the worker's rank, or one drawn at random.
    pub client: u64,
    /// Its host, as it says.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// The address that it came from.
    pub address: String,
    /// Payload bytes that came from it.
    pub received_bytes: u64,
    /// Payload bytes that went to it.
    pub sent_bytes: u64,
}

/// Tables, and clients, told in one message.
pub(crate) const PAGE: usize = 256;

impl ShardStatus {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.number(self.memory_bytes);
        out.number(self.memory_limit_bytes);
        self.standing.encode(&mut out);
        out.number(self.tables.len() as u64);
        self.tables.iter().for_each(|table| table.encode(&mut out));
        out.number(self.sparse.len() as u64);
        self.sparse.iter().for_each(|table| table.encode(&mut out));
        out.number(self.clients.len() as u64);
        for client in &self.clients {
            out.number(client.client);
            out.text(&client.host);
            out.number(client.pid.into());
            out.text(&client.address);
            out.number(client.received_bytes);
            out.number(client.sent_bytes);
        }
        out.0
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, BadBody> {
        let mut from = Reader(body);
        let (memory_bytes, memory_limit_bytes) = (from.number()?, from.number()?);
        let standing = Standing::decode(&mut from)?;
        let tables = (0..from.count(64)?).map(|_| TableStatus::decode(&mut from)).collect::<Result<_, _>>()?;
        let sparse = (0..from.count(64)?).map(|_| SparseStatus::decode(&mut from)).collect::<Result<_, _>>()?;
        let clients = (0..from.count(32)?)
            .map(|_| {
                Ok(ClientStatus {
                    client: from.number()?,
                    host: from.text()?.to_owned(),
                    pid: u32::try_from(from.number()?).map_err(|_| BadBody("no such process id"))?,
                    address: from.text()?.to_owned(),
                    received_bytes: from.number()?,
                    sent_bytes: from.number()?,
                })
            })
            .collect::<Result<_, BadBody>>()?;
        from.end()?;
        Ok(Self { memory_bytes, memory_limit_bytes, standing, tables, sparse, clients })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoders::one_status as status;
    use proptest::prelude::*;

    #[test]
    fn a_status_comes_back_as_it_was_and_no_piece_of_it_does() {
        let body = status().encode();
        assert_eq!(ShardStatus::decode(&body), Ok(status()));
        for cut in 0..body.len() {
            assert!(ShardStatus::decode(&body[..cut]).is_err());
        }
    }

    /// What is read from hostile bytes can be told, and is then read as the same. As bytes: floats that are no numbers differ.
    fn assert_stays_itself(body: &[u8]) {
        if let Ok(read) = ShardStatus::decode(body) {
            let told = read.encode();
            assert_eq!(ShardStatus::decode(&told).map(|again| again.encode()), Ok(told));
        }
    }

    proptest! {
        #[test]
        fn a_status_that_was_changed_is_refused_or_read_as_another(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            more in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut body = status().encode();
            for (at, byte) in changes {
                let at = at.index(body.len());
                body[at] = byte;
            }
            body.extend(more);
            assert_stays_itself(&body);
        }

        #[test]
        fn random_bytes_are_no_status_or_one_that_can_be_told(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            assert_stays_itself(&body);
        }
    }
}
