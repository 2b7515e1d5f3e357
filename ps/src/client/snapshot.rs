//! Does: asks all shards for a checkpoint at clocks that they share.

use super::Client;
use crate::body::Writer;
use crate::checkpoint::name_at;
use crate::header::{Header, Kind};
use crate::refusal::Reason;
use crate::shard::CLOCK;
use crate::{Mode, PsError, ShardStatus, TableId};
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How far apart clocks of tables may be that are pushed to in every step: as far as a worker may be ahead.
const TOGETHER: u64 = 3;
/// How often clocks are chosen anew, each time further ahead: while one asks, training goes on.
const TRIES: u32 = 10;

/// How often tables that some servers do not have are looked at anew, and the pause before: one that is being opened comes everywhere.
const LOOKS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);

/// A checkpoint that was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its name: what `--restore` takes.
    pub name: String,
    /// Bytes over all shards.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// The clock of each synchronous table in it.
    pub clocks: BTreeMap<String, u64>,
}

/// The clock at which to take each table: (name, whether its clocks are completed together, clock). Synchronous tables that
/// are about as far are taken at the same clock, since they belong to the same steps.
fn clocks(status: &[ShardStatus], ahead: u64) -> BTreeMap<String, (bool, u64)> {
    let dense =
        status.iter().flat_map(|shard| &shard.tables).map(|table| (&table.spec.name, table.spec.mode, table.clock));
    let sparse =
        status.iter().flat_map(|shard| &shard.sparse).map(|table| (&table.spec.name, table.spec.mode, table.clock));
    let mut all: BTreeMap<String, (bool, u64)> = BTreeMap::new();
    for (name, mode, clock) in dense.chain(sparse) {
        let known = all.entry(name.clone()).or_insert((matches!(mode, Mode::Sync { .. }), 0));
        known.1 = known.1.max(clock);
    }
    let mut sync: Vec<u64> = all.values().filter(|(sync, _)| *sync).map(|(_, clock)| *clock).collect();
    sync.sort_unstable();
    for (sync_table, clock) in all.values_mut() {
        if *sync_table {
            let near = sync.iter().rev().find(|&&other| other <= *clock + TOGETHER);
            *clock = near.map_or(*clock, |&near| near.max(*clock)) + ahead;
        }
    }
    all
}

/// What would be missing in a checkpoint of these servers that counts as whole, and what to do, if anything: parts of tables that
/// others have, or nobody.
fn missing(status: &[ShardStatus]) -> Option<String> {
    let mut all: BTreeMap<&str, Vec<(usize, u32, u32)>> = BTreeMap::new();
    for (at, shard) in status.iter().enumerate() {
        let dense = shard.tables.iter().map(|table| (&table.spec.name, table.spec.shard, table.spec.shards));
        let sparse = shard.sparse.iter().map(|table| (&table.spec.name, table.spec.shard, table.spec.shards));
        for (name, part, parts) in dense.chain(sparse) {
            all.entry(name).or_default().push((at, part, parts));
        }
    }
    let asked = status.len();
    for (name, parts) in all {
        if let Some((at, part, of)) = parts.iter().find(|&&(at, part, of)| (at, asked) != (part as usize, of as usize))
        {
            return Some(format!(
                "server {at} of the {asked} that are asked has part {part} of {of} of table {name:?}: ask all {of} servers of it, in the order in which its clients give them (gradwire-ps snapshot --servers ... --every)"
            ));
        }
        if parts.len() < asked {
            let without = (0..asked).find(|at| parts.iter().all(|(has, ..)| has != at)).unwrap_or_default();
            return Some(format!(
                "server {without} of the {asked} that are asked does not have table {name:?}, others do: if it was lost there, restore all of them or open it again; if it lies on other servers too, ask all of them"
            ));
        }
    }
    None
}

impl Client {
    /// Writes a checkpoint of all tables where the servers keep theirs. Blocks until it is written; training goes on meanwhile.
    ///
    /// Synchronous tables are taken at one clock on all shards, the last or one soon to come; tables that are pushed to in
    /// every step at the same one. Others are taken as they are when the request arrives at each shard.
    ///
    /// # Errors
    /// `Invalid` where parts of a table are on other servers, or on none; `Refused` where a server keeps no checkpoints or could not
    /// write; `Timeout` where the clock does not come within
    /// `timeout` since a worker does not push.
    pub fn snapshot(&self, timeout: Duration) -> Result<Checkpoint, PsError> {
        let begun = Instant::now();
        let mut ahead = 0;
        for _ in 1..TRIES {
            match self.snapshot_at(ahead, timeout, begun) {
                Err(PsError::Refused { refusal, .. })
                    if refusal.reason == Reason::Mismatch && refusal.what == CLOCK =>
                {
                    ahead = (ahead * 2).max(1);
                }
                other => return other,
            }
        }
        self.snapshot_at(ahead, timeout, begun)
    }

    /// What all servers have, once each of them has its part of every table.
    fn whole_status(&self) -> Result<Vec<ShardStatus>, PsError> {
        let mut looks = 1;
        loop {
            let status = self.status()?;
            let Some(missing) = missing(&status) else { return Ok(status) };
            if looks == LOOKS {
                return Err(PsError::invalid("writing a checkpoint, which would not be whole", missing));
            }
            looks += 1;
            std::thread::sleep(PAUSE);
        }
    }

    fn snapshot_at(&self, ahead: u64, timeout: Duration, begun: Instant) -> Result<Checkpoint, PsError> {
        let status = self.whole_status()?;
        let clocks = clocks(&status, ahead);
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Each try has a name of its own, and so has each client.
        let unix_ms = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX).saturating_add(ahead);
        let name = format!("{}-{:08x}", name_at(unix_ms), std::process::id());
        let shards = self.core.map.shards();
        let wait_ms = u32::try_from(timeout.as_millis().max(1)).unwrap_or(u32::MAX);
        let requests = (0..shards).map(|shard| {
            let mut body = Writer::default();
            body.text(&name);
            [shard, shards].into_iter().for_each(|number| body.number(number.into()));
            let here = &status[shard as usize];
            let here = here.tables.iter().map(|table| &table.spec.name).chain(here.sparse.iter().map(|t| &t.spec.name));
            let here: Vec<&String> = here.collect();
            body.number(here.len() as u64);
            for table in here {
                body.number(TableId::of(table).0);
                body.number(clocks.get(table).map_or(0, |(_, clock)| *clock));
            }
            self.core.request(shard, Header { wait_ms, ..Header::new(Kind::Snapshot) }, body.0)
        });
        let pending = self.core.start("writing", &format!("checkpoint {name}").into(), requests.collect())?;
        pending.wait(None)?;
        let bodies = pending.call.bodies();
        let bytes = bodies.iter().filter_map(|(_, body)| body.as_slice().try_into().ok()).map(u64::from_le_bytes).sum();
        let clocks =
            clocks.into_iter().filter(|(_, (sync, _))| *sync).map(|(name, (_, clock))| (name, clock)).collect();
        Ok(Checkpoint { name, bytes, took: begun.elapsed(), clocks })
    }
}
