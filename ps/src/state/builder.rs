//! Pure: a shard that is being made from chunks, its own or those of all shards of a map that is cut anew.

use crate::TableId;
use crate::body::BadBody;
use crate::chunk::{BadState, ChunkKind, open};
use crate::dense::DenseBuilder;
use crate::members::Members;
use crate::memory::Memory;
use crate::shard::{Limits, Shard};
use crate::sparse::SparseBuilder;
use std::collections::BTreeMap;
use std::time::Instant;

/// Makes a shard from chunks. They are told table by table; where the map is cut anew, all shards one after the other.
pub struct Builder {
    limits: Limits,
    instance: u64,
    place: (u32, u32),
    now: Instant,
    members: Members,
    memory: Memory,
    dense: BTreeMap<TableId, DenseBuilder>,
    sparse: BTreeMap<TableId, SparseBuilder>,
}

impl Builder {
    /// Nothing yet. The shard is to be the `shard`-th of `shards`; `limits` and `instance` as for [`Shard::new`].
    pub fn new(limits: Limits, instance: u64, (shard, shards): (u32, u32), now: Instant) -> Self {
        let (members, memory) = (Members::new(limits.clients), Memory::new(limits.memory_bytes));
        let (dense, sparse) = (BTreeMap::new(), BTreeMap::new());
        Self { limits, instance, place: (shard, shards), now, members, memory, dense, sparse }
    }

    /// Takes the next chunk. After an error there is no way on: make another builder.
    ///
    /// # Errors
    /// Where the chunk does not fit what came before; `Refused` where there is no room for it.
    pub fn take(&mut self, chunk: &[u8]) -> Result<(), BadState> {
        let (kind, table, mut from) = open(chunk)?;
        match kind {
            ChunkKind::Members => {
                self.members.restore(&mut from)?;
                Ok(from.end()?)
            }
            ChunkKind::Dense => self.dense_head(table, &mut from),
            ChunkKind::Sparse => self.sparse_head(table, &mut from),
            _ => match (self.dense.get_mut(&table), self.sparse.get_mut(&table)) {
                (Some(dense), _) => dense.take(kind, &mut from, &mut self.memory),
                (None, Some(sparse)) => sparse.take(kind, &mut from, &mut self.memory),
                (None, None) => Err(BadBody("a chunk of a table that was not told").into()),
            },
        }
    }

    fn room(&self) -> Result<(), BadState> {
        let full = self.dense.len() + self.sparse.len() >= self.limits.tables;
        if full { Err(BadBody("more tables than there may be").into()) } else { Ok(()) }
    }

    fn dense_head(&mut self, table: TableId, from: &mut crate::body::Reader<'_>) -> Result<(), BadState> {
        if let Some(known) = self.dense.get_mut(&table) {
            return known.more(from);
        }
        self.room()?;
        let dense = DenseBuilder::new(from, self.place, &mut self.memory)?;
        if dense.id() != table || self.sparse.contains_key(&table) {
            return Err(BadBody("a table under another's id").into());
        }
        self.dense.insert(table, dense);
        Ok(())
    }

    fn sparse_head(&mut self, table: TableId, from: &mut crate::body::Reader<'_>) -> Result<(), BadState> {
        if let Some(known) = self.sparse.get_mut(&table) {
            return known.more(from);
        }
        self.room()?;
        let sparse = SparseBuilder::new(from, self.place, (self.instance, self.now), &mut self.memory)?;
        if sparse.id() != table || self.dense.contains_key(&table) {
            return Err(BadBody("a table under another's id").into());
        }
        self.sparse.insert(table, sparse);
        Ok(())
    }

    /// The shard, once all of it has come.
    ///
    /// # Errors
    /// Where something is missing, by its table's name.
    pub fn finish(self) -> Result<Shard, BadState> {
        let mut shard = Shard::new(self.limits, self.instance);
        let mut memory = self.memory.with_client_limit(shard.limits().client_bytes);
        for (id, dense) in self.dense {
            shard.tables.insert(id, dense.finish()?);
        }
        for (id, sparse) in self.sparse {
            shard.sparse.insert(id, sparse.finish(&mut memory)?);
        }
        (shard.members, shard.memory) = (self.members, memory);
        Ok(shard)
    }

    /// The tables alone, to be taken into a shard that is there: those of the same name are replaced.
    ///
    /// # Errors
    /// As [`Builder::finish`].
    pub fn finish_into(self, shard: &mut Shard) -> Result<(), BadState> {
        let made = self.finish()?;
        for id in made.tables.keys().chain(made.sparse.keys()) {
            shard.drop_table(*id);
        }
        shard.memory.used += made.memory.used;
        shard.tables.extend(made.tables);
        shard.sparse.extend(made.sparse);
        Ok(())
    }
}
