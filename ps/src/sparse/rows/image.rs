//! Pure: the rows of a table as they were at one moment, as chunks, and how rows come back from those.

use super::{Evicted, Rows, Sketch, Store};
use crate::TableId;
use crate::body::{BadBody, Reader};
use crate::chunk::{ChunkKind, PIECE_BYTES, chunk};
use crate::kernel::Real;

/// Rows as they were at one moment.
pub(crate) trait RowsImage: Send {
    /// Their chunks.
    fn chunks(&self, id: TableId) -> Box<dyn Iterator<Item = Vec<u8>> + Send + '_>;
}

/// How rows come back from chunks.
pub(crate) trait Restore {
    /// The rows as they are now. Cheap but for the marks of use, which are copied. No sum is under way between requests.
    fn image(&mut self) -> Box<dyn RowsImage>;
    /// Takes up rows, of those that are `ours`. `later`: tenths of a second to add to their last use; `room`: whether there
    /// is memory for so many bytes. How many rows were told.
    fn restore(
        &mut self,
        from: &mut Reader<'_>,
        ours: &dyn Fn(u64) -> bool,
        later: u32,
        room: &mut dyn FnMut(u64) -> bool,
    ) -> Result<u64, BadBody>;
    /// Takes up what was evicted; where the table is cut anew, only how many ids were not admitted.
    fn restore_evicted(&mut self, from: &mut Reader<'_>, exact: bool) -> Result<(), BadBody>;
    /// Takes up counts of ids that were not admitted.
    fn restore_sketch(&mut self, from: &mut Reader<'_>) -> Result<(), BadBody>;
    /// Brings the rows of several shards into the order of eviction; false where there are more than may be.
    fn settle(&mut self) -> bool;
}

/// What a row is told with: its id, how often it was used, and when last.
const MARK_BYTES: usize = 16;

struct Image<C> {
    rows: Store<C>,
}

impl<C: Real> RowsImage for Image<C> {
    fn chunks(&self, id: TableId) -> Box<dyn Iterator<Item = Vec<u8>> + Send + '_> {
        let rows = &self.rows;
        let mut evicted = chunk(ChunkKind::Evicted, id);
        evicted.number(rows.unadmitted);
        rows.evicted.encode(&mut evicted);
        let sketch = rows.sketch.iter().flat_map(move |sketch| sketch_chunks(sketch, id));
        let each = MARK_BYTES + rows.stride() * size_of::<C>();
        let at_once = (PIECE_BYTES / each).max(1);
        let mut all: Box<dyn Iterator<Item = (u64, u32)> + Send + '_> = match &rows.usage {
            Some(usage) => Box::new(usage.iter()),
            None => Box::new(rows.index.iter()),
        };
        let rows = std::iter::from_fn(move || {
            let mut out = chunk(ChunkKind::Rows, id);
            let head = out.0.len();
            for (id, row) in all.by_ref().take(at_once) {
                out.number(id);
                let (uses, used) = rows.usage.as_ref().map_or((0, 0), |usage| usage.uses(row));
                out.0.extend(uses.to_le_bytes());
                out.0.extend(used.to_le_bytes());
                let at = out.0.len();
                out.0.resize(at + rows.stride() * size_of::<C>(), 0);
                C::store(C::DTYPE, rows.arena.row(row), &mut out.0[at..]);
            }
            (out.0.len() > head).then_some(out.0)
        });
        Box::new(std::iter::once(evicted.0).chain(sketch).chain(rows))
    }
}

fn sketch_chunks(sketch: &Sketch, id: TableId) -> impl Iterator<Item = Vec<u8>> + '_ {
    let (key, raised, counters) = sketch.parts();
    counters.chunks(PIECE_BYTES).enumerate().map(move |(n, counters)| {
        let mut out = chunk(ChunkKind::Sketch, id);
        [key, raised, (n * PIECE_BYTES) as u64].into_iter().for_each(|number| out.number(number));
        out.0.extend_from_slice(counters);
        out.0
    })
}

impl<C: Real> Store<C> {
    fn stride(&self) -> usize {
        self.dim + self.state[0] + self.state[1]
    }
}

impl<C: Real> Restore for Store<C> {
    fn image(&mut self) -> Box<dyn RowsImage> {
        let rows = Self {
            dtype: self.dtype,
            dim: self.dim,
            state: self.state,
            first_state: self.first_state,
            initializer: self.initializer,
            table: self.table,
            share: self.share,
            index: self.index.clone(),
            arena: self.arena.image(),
            usage: self.usage.clone(),
            sketch: self.sketch.clone(),
            unadmitted: self.unadmitted,
            evicted: self.evicted.clone(),
            sum: super::Sum::default(),
        };
        Box::new(Image { rows })
    }

    fn restore(
        &mut self,
        from: &mut Reader<'_>,
        ours: &dyn Fn(u64) -> bool,
        later: u32,
        room: &mut dyn FnMut(u64) -> bool,
    ) -> Result<u64, BadBody> {
        let bytes = self.stride() * size_of::<C>();
        let all = from.rest();
        if all.is_empty() || !all.len().is_multiple_of(MARK_BYTES + bytes) {
            return Err(BadBody("rows of another length"));
        }
        let count = (all.len() / (MARK_BYTES + bytes)) as u64;
        if !room(self.bytes_for(count)) {
            return Err(BadBody("no memory for its rows: allow more"));
        }
        for told in all.chunks_exact(MARK_BYTES + bytes) {
            let mut from = Reader(told);
            let id = from.number()?;
            let marks = from.number()?;
            if !ours(id) {
                continue;
            }
            if self.index.find(id).is_some() {
                return Err(BadBody("a row comes twice"));
            }
            let row = self.arena.take();
            C::load(C::DTYPE, from.rest(), self.arena.row_mut(row));
            self.index.insert(id, row);
            if let Some(usage) = &mut self.usage {
                usage.restore(row, id, (marks as u32, ((marks >> 32) as u32).saturating_add(later)));
            }
        }
        Ok(count)
    }

    fn restore_evicted(&mut self, from: &mut Reader<'_>, exact: bool) -> Result<(), BadBody> {
        let unadmitted = from.number()?;
        let evicted = Evicted::decode(from)?;
        from.end()?;
        self.unadmitted = self.unadmitted.saturating_add(unadmitted);
        if exact {
            self.evicted = evicted;
        }
        Ok(())
    }

    fn restore_sketch(&mut self, from: &mut Reader<'_>) -> Result<(), BadBody> {
        let (key, raised, first) = (from.number()?, from.number()?, from.number()?);
        let first = usize::try_from(first).map_err(|_| BadBody("a number is too large"))?;
        let fits = self.sketch.as_mut().is_some_and(|sketch| sketch.restore(key, raised, first, from.rest()));
        if fits { Ok(()) } else { Err(BadBody("counts of ids for a table of another size")) }
    }

    fn settle(&mut self) -> bool {
        if let Some(usage) = &mut self.usage {
            usage.sort();
        }
        while self.share.is_some_and(|share| self.index.len() > share) {
            let Some((row, id)) = self.usage.as_ref().and_then(|usage| usage.weakest()) else { return false };
            self.evict(row, id);
        }
        true
    }
}
