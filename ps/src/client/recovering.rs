//! Does: gives servers the tables again that they have lost, with all other workers.

use super::reach::RESTORED;
use super::{Core, DenseTable};
use crate::header::{Header, Kind};
use crate::rally::{NOTHING, decided, offer_body};
use crate::schedule::rates_body;
use crate::shard::AGAIN;
use crate::spec::open_body;
use crate::{KeyRange, PsError, Recovery, TableSpec};
use gradwire_transport::RegionSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause before servers that are not there yet are tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the others are waited for before they are called again, at first; twice as long each time, so many times.
const CALL: Duration = Duration::from_millis(500);
const DOUBLINGS: u32 = 4;

/// A table, and the value of it that this worker pulled last.
type Has<'a> = (&'a DenseTable, RegionSlice);

pub(super) fn recover(core: &Arc<Core>, tables: &[Has<'_>], timeout: Duration) -> Result<Vec<u64>, PsError> {
    let first = tables.first().ok_or_else(|| PsError::invalid("recovery", "name at least one table"))?;
    for (table, values) in tables {
        table.check_recovered(values)?;
        if table.workers() != first.0.workers() {
            let reason = "all tables of one recovery have the same workers: recover the others by themselves";
            return Err(PsError::invalid(table.name(), reason));
        }
    }
    let ids: Vec<_> = tables.iter().map(|(table, _)| table.id()).collect();
    core.driver.abandon(&ids);
    let (begun, mut calls) = (Instant::now(), 0);
    loop {
        let patience = (CALL * (1 << calls)).min(timeout.saturating_sub(begun.elapsed()));
        match attempt(core, tables, patience) {
            Ok(Some(clocks)) => {
                tracing::info!(tables = tables.len(), took = ?begun.elapsed(), "recovered");
                return Ok(clocks);
            }
            Ok(None) => tracing::info!("another worker begins the recovery anew"),
            Err(error) if is_passing(&error) && begun.elapsed() < timeout => {
                tracing::warn!(%error, "the recovery goes on when the servers are there");
                std::thread::sleep(PAUSE);
            }
            // Whoever began to wait for our pushes meanwhile has not heard the call.
            Err(error @ PsError::Timeout { .. }) if begun.elapsed() < timeout => {
                tracing::warn!(%error, "the recovery waits for other workers, and calls them again");
                calls = (calls + 1).min(DOUBLINGS);
            }
            Err(error) => return Err(error),
        }
        if begun.elapsed() >= timeout {
            let what = "all workers and servers to recover the same tables".to_owned();
            return Err(PsError::Timeout { what, waited: begun.elapsed() });
        }
    }
}

/// Whether a server that is started again may mend it.
fn is_passing(error: &PsError) -> bool {
    matches!(error, PsError::ServerLost { cause, .. } if cause != RESTORED)
}

/// Recovers once, waiting so long for the others to offer. `None` where a worker began anew in the middle.
fn attempt(core: &Arc<Core>, tables: &[Has<'_>], patience: Duration) -> Result<Option<Vec<u64>>, PsError> {
    let shards = core.map.shards();
    let subject: Arc<str> = format!("{} tables", tables.len()).into();
    let everywhere = |kind, clock, body: &dyn Fn(&DenseTable, u32) -> Vec<u8>| {
        let each = tables.iter().flat_map(|(table, _)| (0..shards).map(move |shard| (*table, shard)));
        let request = |(table, shard): (&DenseTable, u32)| {
            core.request(shard, Header { table: table.id(), clock, ..Header::new(kind) }, body(table, shard))
        };
        each.map(request).collect()
    };
    // Whatever this worker sent before is behind us on each connection once this is answered.
    let spec = |table: &DenseTable, shard| open_body(&TableSpec { shard, ..table.spec().clone() });
    let open = || core.start("opening again", &subject, everywhere(Kind::Open, AGAIN, &spec))?.wait(None);
    open()?;
    let keys = KeyRange { start: 0, end: u64::from(tables[0].0.workers()) };
    let meet = |kind, clock, wait_ms, body| {
        let header = Header { table: tables[0].0.id(), clock, keys, wait_ms, ..Header::new(kind) };
        core.start("recovering", &subject, vec![core.request(0, header, body)])
    };
    let has = tables.iter().map(|(table, _)| (table.id(), table.pulled().unwrap_or(NOTHING)));
    let wait_ms = u32::try_from(patience.as_millis().max(1)).unwrap_or(u32::MAX);
    let offered = meet(Kind::Offer, 0, wait_ms, offer_body(has))?;
    offered.wait(None)?;
    let body = offered.call.bodies().pop().map(|(_, body)| body).unwrap_or_default();
    let (round, decisions) = decided(&body, tables.len()).map_err(|bad| PsError::Protocol {
        shard: 0,
        address: String::new(),
        reason: bad.to_string(),
    })?;
    // Servers may have been started anew while the others came: whoever goes on has met the processes that have the values.
    open()?;
    for ((table, values), &(clock, worker)) in tables.iter().zip(&decisions) {
        if clock == NOTHING {
            let reason = "no worker has pulled it, so nobody has its values: write them with init";
            return Err(PsError::invalid(table.name(), reason));
        }
        if core.worker.map(u64::from) == Some(worker) {
            give(core, table, values, clock)?;
        }
    }
    if meet(Kind::Restored, round, 0, Vec::new())?.wait(None)?.clock != round {
        return Ok(None);
    }
    let clocks: Vec<u64> = decisions.into_iter().map(|(clock, _)| clock).collect();
    for ((table, _), &clock) in tables.iter().zip(&clocks) {
        table.go_on_from(clock)?;
    }
    Ok(Some(clocks))
}

/// Writes a table where it was lost.
fn give(core: &Arc<Core>, table: &DenseTable, values: &RegionSlice, clock: u64) -> Result<(), PsError> {
    let rates = rates_body(&table.rates_by(clock + 1));
    let header = Header { table: table.id(), clock, ..Header::new(Kind::Restart) };
    let requests = (0..core.map.shards()).map(|shard| core.request(shard, header, rates.clone())).collect();
    let restarted = core.start("restarting", table.subject(), requests)?;
    restarted.wait(None)?;
    let wanted: Vec<u32> =
        restarted.call.bodies().into_iter().filter(|(_, body)| body == &[1]).map(|(shard, _)| shard).collect();
    tracing::info!(table = table.name(), clock, shards = ?wanted, "gives its values again");
    let requests = table.values_for(&wanted, values, Header { kind: Kind::Restore, ..header })?;
    core.start("restoring", table.subject(), requests)?.wait(None)?;
    Ok(())
}

impl DenseTable {
    fn check_recovered(&self, values: &RegionSlice) -> Result<(), PsError> {
        self.check_worker()?;
        if self.options().recovery != Recovery::Workers {
            let reason =
                format!("it was opened with recovery={:?}, not \"workers\"", self.options().recovery.to_string());
            return Err(PsError::invalid(&**self.subject(), reason));
        }
        self.check_size(values.len(), self.dtype())
    }
}
