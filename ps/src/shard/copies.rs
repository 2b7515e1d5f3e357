//! Pure: what a shard knows of its tables that have copies elsewhere.

use super::{Action, Limits, Shard};
use crate::dense::{Table, Wait};
use crate::header::{Header, Kind};
use crate::shard_map::Epoch;
use crate::state::Image;
use crate::{Recovery, TableId};
use std::collections::VecDeque;
use std::time::Instant;

impl Shard {
    fn recovery(&self, table: TableId) -> Option<Recovery> {
        let dense = self.tables.get(&table).map(|table| table.spec.recovery);
        dense.or_else(|| self.sparse.get(&table).map(|table| table.spec.recovery))
    }

    /// Whether what this request does must be done at a copy as well: who the clients are, and what is in replicated tables.
    pub(crate) fn is_replicated(&self, header: &Header) -> bool {
        matches!(header.kind, Kind::Hello | Kind::Barrier)
            || self.recovery(header.table).is_some_and(Recovery::replicates)
    }

    /// Whether a table is known that has no copy.
    pub(crate) fn is_only_here(&self, table: TableId) -> bool {
        self.recovery(table).is_some_and(|recovery| !recovery.replicates())
    }

    /// Makes ready for being copied: what waits without being counted is to come again. False while first values are being
    /// written: then it must wait.
    pub(crate) fn make_ready_to_copy(&mut self, out: &mut Vec<Action>) -> bool {
        let replicated = |table: &&mut Table| table.spec.recovery.replicates();
        if self.tables.values_mut().filter(replicated).any(|table| table.init.holder.is_some()) {
            return false;
        }
        let mut waits: Vec<Wait> = self.members.take_waiting().collect();
        for table in self.tables.values_mut() {
            waits.extend(table.take_parked(&mut self.memory));
        }
        for table in self.sparse.values_mut() {
            waits.extend(table.take_parked(&mut self.memory));
        }
        let later =
            |wait: Wait| Action::Reply { to: wait.to, header: wait.header.reply(Kind::Later), body: Vec::new() };
        out.extend(waits.into_iter().map(later));
        true
    }

    /// The replicated tables as they are now.
    pub(crate) fn images(&mut self, now: Instant) -> VecDeque<Image> {
        let ids = self.table_ids().into_iter().filter(|&id| self.recovery(id).is_some_and(Recovery::replicates));
        let ids: Vec<TableId> = ids.collect();
        ids.into_iter().filter_map(|id| self.image(id, now)).collect()
    }

    /// What it may hold.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The number by which it does what depends on one that clients do not know.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// Does alike what depends on such a number.
    pub(crate) fn take_key(&mut self, key: u64) {
        self.key = key;
    }

    /// Nobody is connected any more: a copy, whose connections were another server's, takes over.
    pub(crate) fn forget_connections(&mut self) {
        let peers: Vec<_> = self.clients().map(|(_, peer)| peer).collect();
        let mut nobody = Vec::new();
        peers.into_iter().for_each(|peer| self.gone(peer, &mut nobody));
    }

    /// It takes tables that so many copies can be had of.
    pub(crate) fn take_replicas(&mut self, replicas: u32) {
        self.limits.replicas = replicas;
    }

    /// The shard answers clients from here on, and tells them this epoch.
    pub(crate) fn begin_epoch(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }
}
