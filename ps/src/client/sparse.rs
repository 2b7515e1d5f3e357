//! Does: calls on a sparse table: ids cut by shard, each sent once, rows put back in the order of the call.

use super::engine::{Cargo, NewRequest};
use super::pending::LastStep;
use super::{Core, Pending, clip};
use crate::body::Reader;
use crate::exact_sum::ExactSum;
use crate::header::{Header, Kind};
use crate::memory::Shelf;
use crate::schedule::rate_body;
use crate::shard::MOST_EVICTED;
use crate::sparse::open_sparse_body;
use crate::sparse::{Cut, Gradients, MAX_PARTS, PART_BYTES, Packing, add_squares, scale_rows, unpack_rows};
use crate::{
    Codec, Combine, Compression, DType, Eviction, Initializer, KeyRange, Mode, PsError, Recovery, Schedule, SparseSpec,
    UpdateRule,
};
use gradwire_transport::{Region, RegionSlice, RegionSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a part of a call aims at, so that several are on their way, being worked on and on their way back at once.
const PART_AIM_BYTES: usize = 256 << 10;
const ID_BYTES: usize = 8;

/// How a sparse table treats what is pushed to it; the same for all its clients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SparseOptions {
    /// What is done with gradients. Default: they are added.
    pub rule: UpdateRule,
    /// How pushes of several clients meet. Default: asynchronous.
    pub mode: Mode,
    /// How the contributions to a clock become one gradient. Default: their sum.
    pub combine: Combine,
    /// What a row holds at first. Default: zeros.
    pub initializer: Initializer,
    /// Tells the first values of one training from those of another. Default 0.
    pub seed: u64,
    /// Most rows over all shards. Default: as many as there is memory for.
    pub capacity: Option<u64>,
    /// Which rows make room for others. Default: none, and a push that needs more room is refused.
    pub eviction: Option<Eviction>,
    /// How many pushes an id must come in before it gets a row. Default 1: at once.
    pub admission: u8,
    /// What becomes of it when a server dies. Default: it is gone.
    pub recovery: Recovery,
    /// How rows' gradients and values travel. Default: as they are. What a gradient loses is not kept, and `TopK` cannot be.
    pub compression: Compression,
    /// Each push is multiplied, before it travels, by what brings its L2 norm down to this: that of all its rows on all shards, once
    /// those of an id that comes twice are summed. So it is each worker's own, not that of a clock's sum. Default: none.
    pub max_grad_norm: Option<f64>,
}

impl Default for SparseOptions {
    fn default() -> Self {
        Self {
            rule: UpdateRule::Sum,
            mode: Mode::Async,
            combine: Combine::Sum,
            initializer: Initializer::Zeros,
            seed: 0,
            capacity: None,
            eviction: None,
            admission: 1,
            recovery: Recovery::None,
            compression: Compression::NONE,
            max_grad_norm: None,
        }
    }
}

/// A sparse table over all shards. Copies are the same table.
#[derive(Clone)]
pub struct SparseTable {
    core: Arc<Core>,
    table: Arc<Table>,
}

pub(super) struct Table {
    spec: SparseSpec,
    subject: Arc<str>,
    /// Held while a call is submitted, so that pushes are submitted in their order.
    made: Mutex<Made>,
    shelf: Mutex<Shelf>,
}

/// One part of a push: which of its ids, and what travels.
struct Part {
    shard: u32,
    ids: Range<usize>,
    payload: Vec<u8>,
}

impl Part {
    /// Where the rows begin.
    fn rows_at(&self) -> usize {
        PART_BYTES + self.ids.len() * ID_BYTES
    }
}

/// What this client has asked for so far.
struct Made {
    pushes: u64,
    /// Parts of pushes, by shard.
    parts: Vec<u64>,
    /// The next evicted id, by shard.
    evicted: Vec<u64>,
}

/// Opens a table on every shard, once a client.
pub(super) fn open(
    core: &Arc<Core>,
    name: &str,
    dim: usize,
    dtype: DType,
    options: SparseOptions,
) -> Result<SparseTable, PsError> {
    let mut tables = core.sparse.lock().unwrap_or_else(PoisonError::into_inner);
    let shards = core.map.shards();
    let SparseOptions {
        rule,
        mode,
        combine,
        initializer,
        seed,
        capacity,
        eviction,
        admission,
        recovery,
        compression,
        max_grad_norm,
    } = options;
    let spec = SparseSpec {
        name: name.to_owned(),
        dim: dim as u64,
        dtype,
        rule,
        mode,
        combine,
        initializer,
        seed,
        capacity,
        eviction,
        admission,
        recovery,
        compression,
        max_grad_norm,
        shards,
        shard: 0,
    };
    let invalid = PsError::of_own_refusal;
    spec.check().map_err(invalid)?;
    if let Some(known) = tables.get(name) {
        return match known.spec.disagreement(&spec) {
            Some(refusal) => Err(invalid(refusal)),
            None => Ok(SparseTable { core: Arc::clone(core), table: Arc::clone(known) }),
        };
    }
    let subject: Arc<str> = spec.subject().into();
    let requests = (0..shards).map(|shard| {
        let header = Header { table: spec.id(), ..Header::new(Kind::OpenSparse) };
        core.request(shard, header, open_sparse_body(&SparseSpec { shard, ..spec.clone() }))
    });
    let pushes = core.start("opening", &subject, requests.collect())?.wait(None)?.clock;
    let made = Made { pushes, parts: vec![0; shards as usize], evicted: vec![0; shards as usize] };
    let table = Arc::new(Table { spec, subject, made: Mutex::new(made), shelf: Mutex::default() });
    tables.insert(name.to_owned(), Arc::clone(&table));
    Ok(SparseTable { core: Arc::clone(core), table })
}

impl SparseTable {
    /// Adds a gradient of the table's own type to the row of each id (64 bits each, little-endian).
    ///
    /// Gradients of an id that comes twice are summed first, in the order of the call. Both buffers are free again when this
    /// returns. Every worker of a synchronous table pushes at every clock, if only no ids at all.
    ///
    /// # Errors
    /// `Invalid` for buffers that do not fit each other, and for one who is not a worker; nothing was sent. What servers
    /// refuse is told by the returned call: `Refused` with `Reason::Limit` where a table is full.
    pub fn push(&self, ids: &RegionSlice, gradients: &RegionSlice) -> Result<Pending, PsError> {
        self.push_as(ids, gradients, self.dtype())
    }

    /// [`SparseTable::push`] with gradients of type `dtype`, which loses nothing in the table's.
    ///
    /// # Errors
    /// As [`SparseTable::push`].
    pub fn push_as(&self, ids: &RegionSlice, gradients: &RegionSlice, dtype: DType) -> Result<Pending, PsError> {
        let spec = &self.table.spec;
        self.core.check_worker(spec.mode, &self.table.subject)?;
        self.check(ids, gradients.len(), dtype)?;
        if !dtype.pushes_to(spec.dtype) {
            let reason = format!("a gradient of {dtype} loses bits in a table of {}: convert it first", spec.dtype);
            return Err(self.invalid(reason));
        }
        let cut = Cut::new(ids, spec.shards);
        let from = Gradients { dtype, dim: self.dim(), bytes: gradients };
        let codec = spec.compression.push;
        let parts = self.parts(&cut, ID_BYTES + codec.bytes(self.dim()).unwrap_or(self.dim() * dtype.bytes()));
        if parts.iter().any(|parts| parts.len() > MAX_PARTS as usize) {
            return Err(self.invalid(format!("{} rows are too many for one push: push fewer at a time", cut.len())));
        }
        let payloads = self.pack(&cut, dtype, self.whole_payloads(&cut, &from, &parts))?;
        let dtype = Some(if codec == Codec::Whole { dtype } else { DType::F32 });
        let mut made = self.made();
        made.pushes += 1;
        let clock = if spec.mode.workers().is_some() { made.pushes } else { 0 };
        let requests = payloads.into_iter().map(|Part { shard, ids, payload }| {
            let sequence = &mut made.parts[shard as usize];
            *sequence += 1;
            let header =
                Header { clock, sequence: *sequence, dtype, codec: codec.code(), ..Header::new(Kind::SparsePush) };
            let all = 0..payload.len();
            let slice = Region::from_vec(payload).read(all).expect("nobody else knows this region");
            self.request(shard, header, ids.len(), slice, None)
        });
        let requests = requests.collect();
        self.core.start("push to", &self.table.subject, requests)
    }

    /// The payloads of a push, clipped, in turn for each shard, so that all of them work from the start.
    fn whole_payloads(&self, cut: &Cut, from: &Gradients<'_>, parts: &[Vec<Range<usize>>]) -> Vec<Part> {
        let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
        let each = self.dim() * from.dtype.bytes();
        let mut all = Vec::new();
        for n in 0..longest {
            for (shard, parts) in (0..).zip(parts) {
                let Some(ids) = parts.get(n) else { continue };
                let mut payload = Vec::with_capacity(PART_BYTES + ids.len() * (ID_BYTES + each));
                cut.payload(ids.clone(), [n as u32, parts.len() as u32], from, &mut payload);
                all.push(Part { shard, ids: ids.clone(), payload });
            }
        }
        if let Some(most) = self.table.spec.max_grad_norm {
            let mut squares = ExactSum::default();
            all.iter().for_each(|part| add_squares(from.dtype, &part.payload[part.rows_at()..], &mut squares));
            let scale = clip::scale(squares.value().sqrt(), most);
            if scale != 1.0 {
                for part in &mut all {
                    let at = part.rows_at();
                    scale_rows(from.dtype, &mut part.payload[at..], scale);
                }
            }
        }
        all
    }

    /// The same payloads as they travel.
    fn pack(&self, cut: &Cut, dtype: DType, mut all: Vec<Part>) -> Result<Vec<Part>, PsError> {
        let (codec, form) = (self.table.spec.compression.push, (dtype, self.dim()));
        let mut packing = Packing::default();
        for part in all.iter_mut().filter(|_| codec != Codec::Whole) {
            let mut packed = Vec::with_capacity(part.payload.len());
            let done = packing.pack(codec, form, (&part.payload, part.ids.len()), &mut packed);
            done.map_err(|(row, bad)| self.invalid(format!("id {}: {bad}", cut.id(part.ids.start + row))))?;
            part.payload = packed;
        }
        Ok(all)
    }

    /// Reads the row of each id into `into`, in the order of the call. On a synchronous table a worker gets the rows of its
    /// own last clock, and waits for it. A row that nobody has pushed to is what it would begin with.
    ///
    /// # Errors
    /// `Invalid` for buffers that do not fit each other; nothing was sent.
    pub fn pull(&self, ids: &RegionSlice, mut into: RegionSliceMut) -> Result<Pending, PsError> {
        let spec = &self.table.spec;
        self.check(ids, into.len(), spec.dtype)?;
        let cut = Cut::new(ids, spec.shards);
        let (codec, form) = (spec.compression.pull, (spec.dtype, self.dim()));
        let whole_bytes = self.dim() * spec.dtype.bytes();
        let row_bytes = codec.bytes(self.dim()).unwrap_or(whole_bytes);
        let (rows, wanted) = {
            let mut shelf = self.table.shelf.lock().unwrap_or_else(PoisonError::into_inner);
            (shelf.take(cut.len() * row_bytes), shelf.take(cut.len() * ID_BYTES))
        };
        let ours = "nobody else holds this buffer";
        {
            let mut wanted = wanted.write(0..cut.len() * ID_BYTES).expect(ours);
            let each = wanted.as_chunks_mut().0.iter_mut().enumerate();
            each.for_each(|(n, to)| *to = cut.id(n).to_le_bytes());
        }
        let parts = self.parts(&cut, row_bytes.max(ID_BYTES));
        let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
        let made = self.made();
        let clock = if spec.mode.workers().is_some() { made.pushes } else { 0 };
        let mut requests = Vec::new();
        for n in 0..longest {
            for (shard, parts) in (0..).zip(&parts) {
                let Some(range) = parts.get(n).filter(|range| !range.is_empty()) else { continue };
                let sequence = self.core.next_sequence();
                let (dtype, codec) = (Some(spec.dtype), codec.code() << 4);
                let header = Header { clock, sequence, dtype, codec, ..Header::new(Kind::SparsePull) };
                let slice = wanted.read(range.start * ID_BYTES..range.end * ID_BYTES).expect("it is only read");
                let target = rows.write(range.start * row_bytes..range.end * row_bytes).expect(ours);
                requests.push(self.request(shard, header, range.len(), slice, Some(target)));
            }
        }
        let last_step: LastStep = Box::new(move || {
            let rows = rows.read(0..cut.len() * row_bytes).expect("all that was awaited has come");
            if codec == Codec::Whole {
                cut.scatter(&rows, whole_bytes, &mut into);
            } else {
                cut.scatter(&unpack_rows(codec, form, &rows), whole_bytes, &mut into);
            }
        });
        self.core.start_with("pull of", &self.table.subject, requests, Some(last_step))
    }

    /// The ids that were evicted since this client last asked, shard by shard in their order, and how many more there were
    /// that the servers do not remember any more. Blocks.
    ///
    /// # Errors
    /// `ServerLost`; `Protocol` for an answer that cannot be read.
    pub fn evicted(&self) -> Result<(Vec<u64>, u64), PsError> {
        let (mut ids, mut lost) = (Vec::new(), 0);
        loop {
            let from = self.made().evicted.clone();
            let requests = (0..).zip(&from).map(|(shard, &clock)| {
                let header = Header { table: self.table.spec.id(), clock, ..Header::new(Kind::Evicted) };
                self.core.request(shard, header, Vec::new())
            });
            let pending =
                self.core.start("asking for what was evicted from", &self.table.subject, requests.collect())?;
            pending.wait(None)?;
            let mut more = false;
            for (shard, body) in pending.call.bodies() {
                let mut body = Reader(&body);
                let broken =
                    |bad: crate::BadBody| PsError::Protocol { shard, address: String::new(), reason: bad.to_string() };
                lost += body.number().map_err(broken)?;
                self.made().evicted[shard as usize] = body.number().map_err(broken)?;
                let some = body.0.as_chunks().0;
                ids.extend(some.iter().map(|&id| u64::from_le_bytes(id)));
                more |= some.len() == MOST_EVICTED;
            }
            if !more {
                return Ok((ids, lost));
            }
        }
    }

    /// Sets the learning rate: in synchronous mode from this worker's next push on, for which all workers that set one must
    /// agree; otherwise at once. Blocks until the servers know.
    ///
    /// # Errors
    /// `Refused` for a rule without a learning rate, or where workers differ; `Invalid` for one who is not a worker.
    pub fn set_learning_rate(&self, rate: f64) -> Result<(), PsError> {
        self.set_schedule(&rate.into())
    }

    /// Sets the learning rates of all clocks to come, until others are set: the servers evaluate `schedule`, whose step 0 is
    /// this worker's next push; in asynchronous mode, the next push of anybody. Blocks until the servers know.
    ///
    /// # Errors
    /// As [`SparseTable::set_learning_rate`]; `Invalid` for a schedule whose numbers make no sense.
    pub fn set_schedule(&self, schedule: &Schedule) -> Result<(), PsError> {
        self.core.check_worker(self.table.spec.mode, &self.table.subject)?;
        schedule.check().map_err(|why| PsError::invalid(&*self.table.subject, why))?;
        let made = self.made();
        let requests = (0..self.table.spec.shards).map(|shard| {
            let header = Header { table: self.table.spec.id(), clock: made.pushes + 1, ..Header::new(Kind::SetRate) };
            self.core.request(shard, header, rate_body(schedule))
        });
        let pending = self.core.start("setting the learning rate of", &self.table.subject, requests.collect())?;
        drop(made);
        pending.wait(None).map(|_| ())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.table.spec.name
    }

    /// Elements of a row.
    pub fn dim(&self) -> usize {
        self.table.spec.dim as usize
    }

    /// Type of its elements.
    pub fn dtype(&self) -> DType {
        self.table.spec.dtype
    }

    /// Pushes that this worker has made: the clock that its next pull will show.
    pub fn clock(&self) -> u64 {
        self.made().pushes
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.table.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn invalid(&self, reason: String) -> PsError {
        PsError::invalid(&*self.table.subject, reason)
    }

    fn check(&self, ids: &RegionSlice, bytes: usize, dtype: DType) -> Result<(), PsError> {
        let count = ids.len() / ID_BYTES;
        if !ids.len().is_multiple_of(ID_BYTES) || u32::try_from(count).is_err() {
            return Err(self.invalid(format!("{} bytes are no list of ids, of 8 bytes each", ids.len())));
        }
        let dim = self.dim();
        if count * dim * dtype.bytes() == bytes {
            return Ok(());
        }
        let reason = format!("a buffer of {bytes} bytes does not hold {count} rows of {dim} elements of {dtype}");
        Err(self.invalid(reason))
    }

    /// The parts of each shard, at least one, of rows that travel as `each` bytes.
    fn parts(&self, cut: &Cut, each: usize) -> Vec<Vec<Range<usize>>> {
        let most = (self.core.most_bytes.min(PART_AIM_BYTES).saturating_sub(PART_BYTES) / each).max(1);
        let of_shard = |shard| {
            let all = cut.of_shard(shard);
            let starts = all.clone().step_by(most).map(|start| start..all.end.min(start + most));
            if all.is_empty() { std::iter::once(all).collect() } else { starts.collect() }
        };
        (0..self.table.spec.shards).map(of_shard).collect()
    }

    fn request(
        &self,
        shard: u32,
        header: Header,
        ids: usize,
        slice: RegionSlice,
        target: Option<RegionSliceMut>,
    ) -> NewRequest {
        let start = u64::from(shard);
        let keys = KeyRange { start, end: start + ids as u64 };
        let header = Header { table: self.table.spec.id(), keys, epoch: self.core.map.epoch, ..header };
        let lane = Some(self.table.spec.mode.workers().is_some());
        NewRequest { shard, header, cargo: Cargo::Slice(slice), target, lane, keep_body: false, fragile: false }
    }
}
