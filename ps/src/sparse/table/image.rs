//! Pure: a sparse table as it was at one moment, as chunks, and a table made again from them, cut as it was or anew.

use super::super::gathering::Piece;
use super::super::rows::RowsImage;
use super::{Order, Parts, SparseTable};
use crate::body::{BadBody, Reader, Writer};
use crate::bounded::Progress;
use crate::chunk::{BadState, ChunkKind, chunk};
use crate::counts::Counts;
use crate::dense::{decode_windows, encode_windows, merge_windows};
use crate::header::{Header, Kind};
use crate::memory::Memory;
use crate::rates::Rates;
use crate::sparse::gathering::{Gathering, Verdict};
use crate::sparse::{Batch, shard_of};
use crate::{DType, KeyRange, Mode, SparseSpec};
use std::collections::HashMap;
use std::time::Instant;

/// A table as it was at one moment.
pub(crate) struct SparseImage {
    pub(crate) spec: SparseSpec,
    rates: Rates,
    counts: Counts,
    elapsed_ms: u64,
    completed: u64,
    order: OrderImage,
    count: u64,
    rows: Box<dyn RowsImage>,
}

/// Which calls have been counted. Pushes that wait since their sender is too far ahead are not, and come again.
enum OrderImage {
    Arrival { windows: HashMap<u64, crate::staleness::Window>, pushes: u64 },
    Clocks(Gathering),
    Bounded { progress: Progress, under_way: HashMap<u32, Parts>, pushes: u64 },
}

impl SparseTable {
    /// The table as it is now. Its rows are shared with it until it writes them; contributions that wait are copied.
    pub(crate) fn image(&mut self, now: Instant) -> SparseImage {
        let order = match &self.order {
            Order::Arrival { windows, pushes } => OrderImage::Arrival { windows: windows.clone(), pushes: *pushes },
            Order::Clocks { gathering, .. } => OrderImage::Clocks(gathering.clone()),
            Order::Bounded { progress, under_way, pushes, .. } => {
                OrderImage::Bounded { progress: progress.clone(), under_way: under_way.clone(), pushes: *pushes }
            }
        };
        SparseImage {
            spec: self.spec.clone(),
            rates: self.rates.clone(),
            counts: self.counts,
            elapsed_ms: self.now_ms(now),
            completed: self.completed(),
            order,
            count: self.rows.len(),
            rows: self.rows.image(),
        }
    }

    /// Takes the image that is wanted. At a clock: what has come to later ones is not in it, and comes again.
    pub(super) fn take_image(&mut self, now: Instant) {
        let mut image = self.image(now);
        if let (OrderImage::Clocks(_), Mode::Sync { workers }) = (&image.order, self.spec.mode) {
            image.order = OrderImage::Clocks(Gathering::at(workers, image.completed));
            image.rates = image.rates.at_cut(image.completed);
        }
        (self.cut, self.cut_at) = (Some(Box::new(image)), None);
    }

    /// The clock that is past, where an image at `clock` is wanted and cannot be had any more.
    pub(crate) fn past(&self, clock: u64) -> Option<u64> {
        (matches!(self.spec.mode, Mode::Sync { .. }) && self.completed() > clock).then(|| self.completed())
    }

    /// Wants an image at `clock`, where clocks are completed together; else at once.
    pub(crate) fn arm(&mut self, clock: u64, now: Instant) {
        (self.cut, self.cut_at) = (None, Some(clock));
        if !matches!(self.spec.mode, Mode::Sync { .. }) || self.completed() == clock {
            self.take_image(now);
        }
    }

    /// No image is wanted any more.
    pub(crate) fn disarm(&mut self) {
        (self.cut, self.cut_at) = (None, None);
    }

    /// Whether the image that was wanted is taken.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// The image that was wanted.
    pub(crate) fn take_cut(&mut self, now: Instant) -> SparseImage {
        self.cut.take().map_or_else(|| self.image(now), |cut| *cut)
    }
}

impl SparseImage {
    pub(crate) fn completed(&self) -> u64 {
        self.completed
    }

    /// How many rows there are.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn chunks(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let id = self.spec.id();
        let mut head = chunk(ChunkKind::Sparse, id);
        self.spec.encode(&mut head);
        self.rates.encode(&mut head);
        self.counts.encode(&mut head);
        head.number(self.elapsed_ms);
        self.order.encode(&mut head);
        let waiting: Vec<Vec<u8>> = match &self.order {
            OrderImage::Arrival { .. } => Vec::new(),
            OrderImage::Clocks(gathering) => gathering.pieces().map(|piece| piece_chunk(id, piece)).collect(),
            OrderImage::Bounded { under_way, .. } => {
                let mut all: Vec<_> = under_way.iter().collect();
                all.sort_unstable_by_key(|(rank, _)| **rank);
                let chunks = all.into_iter().map(|(rank, parts)| {
                    let mut out = chunk(ChunkKind::UnderWay, id);
                    out.number((*rank).into());
                    parts.encode(&mut out);
                    out.0
                });
                chunks.collect()
            }
        };
        head.number(waiting.len() as u64);
        head.number(self.count);
        let end = std::iter::once(chunk(ChunkKind::End, id).0);
        std::iter::once(head.0).chain(waiting).chain(self.rows.chunks(id)).chain(end)
    }
}

fn piece_chunk(id: crate::TableId, (clock, rank, life, _, piece): (u64, u32, u64, u32, &Piece)) -> Vec<u8> {
    let mut out = chunk(ChunkKind::Piece, id);
    [clock, rank.into(), life, piece.count as u64].into_iter().for_each(|number| out.number(number));
    out.byte(piece.dtype.code());
    out.0.extend_from_slice(&piece.payload);
    out.0
}

impl OrderImage {
    fn encode(&self, out: &mut Writer) {
        match self {
            Self::Arrival { windows, pushes } => {
                out.number(*pushes);
                encode_windows(windows, out);
            }
            Self::Clocks(gathering) => out.number(gathering.completed()),
            Self::Bounded { progress, pushes, .. } => {
                out.number(*pushes);
                progress.encode(out);
            }
        }
    }

    fn decode(from: &mut Reader<'_>, mode: Mode) -> Result<Self, BadBody> {
        Ok(match mode {
            Mode::Async => Self::Arrival { pushes: from.counter()?, windows: decode_windows(from)? },
            Mode::Sync { workers } => Self::Clocks(Gathering::at(workers, from.counter()?)),
            Mode::Ssp { workers, staleness } => {
                let pushes = from.counter()?;
                let progress = Progress::decode(from, workers, staleness)?;
                Self::Bounded { progress, under_way: HashMap::new(), pushes }
            }
        })
    }

    fn merged(self, other: Self) -> Result<Self, &'static str> {
        match (self, other) {
            (Self::Arrival { windows, pushes }, Self::Arrival { windows: others, pushes: more }) => {
                Ok(Self::Arrival { windows: merge_windows(windows, others), pushes: pushes.max(more) })
            }
            (Self::Clocks(one), Self::Clocks(other)) if one.completed() == other.completed() => Ok(Self::Clocks(one)),
            (Self::Bounded { progress, pushes, .. }, Self::Bounded { progress: other, pushes: more, .. })
                if progress == other =>
            {
                Ok(Self::Bounded { progress, under_way: HashMap::new(), pushes: pushes.max(more) })
            }
            _ => Err("its shards are at different clocks, so it cannot be cut anew: restore it at as many as it had"),
        }
    }
}

/// A sparse table that is being made from chunks.
pub(crate) struct SparseBuilder {
    table: SparseTable,
    exact: bool,
    /// The shards that have been told, of how many.
    told: Vec<u32>,
    shards: u32,
    order: OrderImage,
    /// How old the shard that is being told says it is.
    elapsed_ms: u64,
    /// Chunks of what waits, and rows, that are still to come of it.
    waiting: u64,
    missing_rows: u64,
    /// Whether the end of the shard that is being told has come.
    ended: bool,
}

impl SparseBuilder {
    /// Takes a head. `place`: which shard this is, of how many. `key`: any number that clients do not know.
    pub(crate) fn new(
        from: &mut Reader<'_>,
        place: (u32, u32),
        (key, now): (u64, Instant),
        memory: &mut Memory,
    ) -> Result<Self, BadState> {
        let (mut spec, rates, counts, elapsed_ms, order, [waiting, missing_rows]) = head(from)?;
        let (told, shards) = (spec.shard, spec.shards);
        let exact = (told, shards) == place;
        (spec.shard, spec.shards) = place;
        spec.check()?;
        let mut table = SparseTable::new(spec, key, now, memory)?;
        (table.rates, table.counts, table.opened_ms) = (rates, counts, elapsed_ms);
        let (told, ended) = (vec![told], false);
        Ok(Self { table, exact, told, shards, order, elapsed_ms, waiting, missing_rows, ended })
    }

    /// The table's id.
    pub(crate) fn id(&self) -> crate::TableId {
        self.table.spec.id()
    }

    /// Takes the head of the same table from another shard.
    pub(crate) fn more(&mut self, from: &mut Reader<'_>) -> Result<(), BadState> {
        let (mut spec, _, counts, elapsed_ms, order, [waiting, missing_rows]) = head(from)?;
        if !self.ended {
            return Err(self.wrong("a shard of it ends too early"));
        }
        if spec.shards != self.shards || self.told.contains(&spec.shard) {
            return Err(self.wrong("a shard of it comes twice"));
        }
        self.told.push(spec.shard);
        let known = &self.table.spec;
        (spec.shard, spec.shards) = (known.shard, known.shards);
        if let Some(refusal) = known.disagreement(&spec) {
            return Err(refusal.into());
        }
        self.table.counts.merge(&counts);
        let empty = OrderImage::Clocks(Gathering::new(1));
        let known = std::mem::replace(&mut self.order, empty);
        self.order = known.merged(order).map_err(|what| self.wrong(what))?;
        (self.elapsed_ms, self.ended) = (elapsed_ms, false);
        (self.waiting, self.missing_rows) = (waiting, missing_rows);
        Ok(())
    }

    fn wrong(&self, what: &'static str) -> BadState {
        BadState::Contradiction { subject: self.table.spec.subject(), what }
    }

    pub(crate) fn take(&mut self, kind: ChunkKind, from: &mut Reader<'_>, memory: &mut Memory) -> Result<(), BadState> {
        if self.ended {
            return Err(self.wrong("it goes on after its end"));
        }
        if matches!(kind, ChunkKind::Piece | ChunkKind::UnderWay) {
            let left = self.waiting.checked_sub(1);
            self.waiting = left.ok_or_else(|| self.wrong("more contributions than it has"))?;
        }
        match kind {
            ChunkKind::Piece => self.piece(from, memory)?,
            ChunkKind::UnderWay => self.under_way(from)?,
            ChunkKind::Evicted => self.table.rows.restore_evicted(from, self.exact)?,
            // Ids are counted by a secret of each shard: cut anew, counting begins anew.
            ChunkKind::Sketch if !self.exact => {}
            ChunkKind::Sketch => self.table.rows.restore_sketch(from)?,
            ChunkKind::Rows => self.rows(from, memory)?,
            ChunkKind::End if self.waiting > 0 => return Err(self.wrong("contributions are missing")),
            ChunkKind::End if self.missing_rows > 0 => return Err(self.wrong("rows are missing")),
            ChunkKind::End => self.ended = true,
            _ => return Err(self.wrong("a chunk of a dense table")),
        }
        Ok(())
    }

    fn rows(&mut self, from: &mut Reader<'_>, memory: &mut Memory) -> Result<(), BadState> {
        let SparseTable { spec, rows, opened_ms, .. } = &mut self.table;
        // All shards are told by one clock: the oldest's is not known yet, but ages differ by what the first differs.
        let later = (opened_ms.saturating_sub(self.elapsed_ms) / 100).try_into().unwrap_or(u32::MAX);
        let ours = |id: u64| shard_of(id, spec.shards) == spec.shard;
        let capped = spec.capacity.is_some();
        let mut room = |more: u64| capped || memory.has_room(more);
        let left = self.missing_rows.checked_sub(rows.restore(from, &ours, later, &mut room)?);
        self.missing_rows = left.ok_or_else(|| self.wrong("more rows than it has"))?;
        let SparseTable { spec, rows, .. } = &self.table;
        let over = spec.share().is_some_and(|share| rows.len() > share);
        if self.exact && over {
            return Err(self.wrong("more rows than it has room for"));
        }
        self.table.account(memory);
        Ok(())
    }

    fn piece(&mut self, from: &mut Reader<'_>, memory: &mut Memory) -> Result<(), BadState> {
        let (clock, rank, life, count) = (from.number()?, from.small()?, from.number()?, from.number()?);
        let dtype = DType::of_code(from.byte()?).ok_or(BadBody("no such dtype"))?;
        let payload = from.rest();
        if !self.exact {
            return Err(self.wrong("it was taken in the middle of a clock, so it cannot be cut anew"));
        }
        let shard = u64::from(self.table.spec.shard);
        let end = shard.checked_add(count).ok_or(BadBody("a number is too large"))?;
        let keys = KeyRange { start: shard, end };
        let header = Header { keys, dtype: Some(dtype), ..Header::new(Kind::SparsePush) };
        let batch = Batch::of(payload, &header, &self.table.spec)?;
        let workers = self.table.spec.mode.workers().unwrap_or(0);
        let part = [batch.part, batch.parts];
        let OrderImage::Clocks(gathering) = &mut self.order else {
            return Err(self.wrong("a contribution to a clock, of which it has none"));
        };
        let fits = rank < workers
            && matches!(gathering.judge(clock, rank, part, life), (Verdict::Keep, stale) if stale.is_empty());
        let copy = if fits { memory.copy(rank.into(), payload) } else { None };
        let Some(payload) = copy else { return Err(self.wrong("a contribution that cannot be kept")) };
        gathering.keep(clock, rank, part, life, Piece { dtype, count: batch.ids.len(), payload });
        Ok(())
    }

    fn under_way(&mut self, from: &mut Reader<'_>) -> Result<(), BadState> {
        let (rank, parts) = (from.small()?, Parts::decode(from)?);
        from.end()?;
        if !self.exact {
            return Err(self.wrong("it was taken in the middle of a push, so it cannot be cut anew"));
        }
        let workers = self.table.spec.mode.workers().unwrap_or(0);
        match &mut self.order {
            OrderImage::Bounded { under_way, .. } if rank < workers && !under_way.contains_key(&rank) => {
                under_way.insert(rank, parts);
                Ok(())
            }
            _ => Err(self.wrong("a push that nobody makes")),
        }
    }

    /// The table, once all of it has come.
    pub(crate) fn finish(mut self, memory: &mut Memory) -> Result<SparseTable, BadState> {
        let whole = self.exact || self.told.len() as u64 == u64::from(self.shards);
        if !whole || !self.ended {
            return Err(self.wrong("some of its shards are missing"));
        }
        if matches!(&self.order, OrderImage::Clocks(gathering) if gathering.is_whole()) {
            return Err(self.wrong("a clock that is whole and was not applied"));
        }
        if !self.exact && !self.table.rows.settle() {
            return Err(self.wrong("more rows than a shard has room for: ids are spread unevenly"));
        }
        self.table.order = match self.order {
            OrderImage::Arrival { windows, pushes } => Order::Arrival { windows, pushes },
            OrderImage::Clocks(gathering) => Order::Clocks { gathering, unacknowledged: Vec::new() },
            OrderImage::Bounded { progress, under_way, pushes } => {
                Order::Bounded { progress, under_way, parked: Vec::new(), pushes }
            }
        };
        self.table.account(memory);
        Ok(self.table)
    }
}

type Head = (SparseSpec, Rates, Counts, u64, OrderImage, [u64; 2]);

fn head(from: &mut Reader<'_>) -> Result<Head, BadState> {
    let spec = SparseSpec::decode(from)?;
    spec.check()?;
    let at_rest = spec.rule.with_learning_rate(0.0);
    let rates = Rates::decode(from, |rule| rule.with_learning_rate(0.0) == at_rest)?;
    let counts = Counts::decode(from)?;
    let elapsed_ms = from.counter()?;
    let order = OrderImage::decode(from, spec.mode)?;
    let missing = [from.number()?, from.number()?];
    from.end()?;
    Ok((spec, rates, counts, elapsed_ms, order, missing))
}
