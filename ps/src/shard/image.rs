//! Pure: what outlives a shard's connections, as it is at one moment.

use super::Shard;
use crate::TableId;
use crate::state::{self, DenseState, Image, SparseState};
use std::time::Instant;

impl Shard {
    /// The ids of all tables.
    pub fn table_ids(&self) -> Vec<TableId> {
        self.tables.keys().chain(self.sparse.keys()).copied().collect()
    }

    /// A table as it is now, with all that was counted. Numbers are shared with the shard,
    /// which copies what it writes while the image is held.
    pub fn image(&mut self, table: TableId, now: Instant) -> Option<Image> {
        if let Some(table) = self.tables.get(&table) {
            return Some(Image::Dense(Box::new(DenseState(table.image()))));
        }
        let table = self.sparse.get_mut(&table)?;
        Some(Image::Sparse(Box::new(SparseState(table.image(now)))))
    }

    /// Who the clients are, as chunks for [`state::Builder::take`].
    pub fn members_chunks(&self) -> Vec<Vec<u8>> {
        state::members(&self.members)
    }

    /// Everything, as chunks for [`state::Builder::take`].
    pub fn chunks(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let mut chunks = self.members_chunks();
        for table in self.table_ids() {
            chunks.extend(self.image(table, now).iter().flat_map(Image::chunks));
        }
        chunks
    }

    /// Forgets a table.
    pub(crate) fn drop_table(&mut self, table: TableId) {
        let dense = self.tables.remove(&table).map_or(0, |table| table.memory_bytes);
        let sparse = self.sparse.remove(&table).map_or(0, |table| table.memory_bytes());
        self.memory.used -= dense + sparse;
    }
}
