//! Does: calls on a dense table, cut into a request for each part of each shard.

use super::engine::{Cargo, NewRequest};
use super::pending::LastStep;
use super::squeeze::Squeeze;
use super::{Core, Pending};
use crate::header::{FLAG_AGAIN, Header, Kind};
use crate::rally::NOTHING;
use crate::schedule::rate_body;
use crate::shard_map::{part_elements, parts};
use crate::spec::open_body;
use crate::{
    Codec, Combine, Compression, DType, KeyRange, Mode, PsError, Recovery, Schedule, TableId, TableSpec, UpdateRule,
};
use gradwire_transport::{Region, RegionSlice, RegionSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How a table treats what is pushed to it; the same for all its clients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TableOptions {
    /// What is done with gradients. Default: they are added.
    pub rule: UpdateRule,
    /// How pushes of several clients meet. Default: asynchronous.
    pub mode: Mode,
    /// How the contributions to a clock become one gradient. Default: their sum.
    pub combine: Combine,
    /// Whether each clock's gradient waits for [`crate::Client::clip`] before it is applied. Default: it does not.
    pub clipped: bool,
    /// What becomes of it when a server dies. Default: it is gone.
    pub recovery: Recovery,
    /// How gradients and values travel. Default: as they are.
    pub compression: Compression,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self {
            rule: UpdateRule::Sum,
            mode: Mode::Async,
            combine: Combine::Sum,
            clipped: false,
            recovery: Recovery::None,
            compression: Compression::default(),
        }
    }
}

/// A table that is cut over all shards. Copies are the same table.
#[derive(Clone)]
pub struct DenseTable {
    core: Arc<Core>,
    table: Arc<Table>,
}

pub(super) struct Table {
    spec: TableSpec,
    options: TableOptions,
    shape: Vec<usize>,
    elements: usize,
    subject: Arc<str>,
    /// Which shard holds which part.
    parts: Arc<[(u32, KeyRange)]>,
    squeeze: Mutex<Squeeze>,
    /// Pushes made by this client. Held while a call is submitted, so that clocks are submitted in their order.
    pushed: Mutex<u64>,
    /// What this client must know should a server lose the table.
    memory: Memory,
}

/// What is remembered of a table that its workers may have to give again.
struct Memory {
    /// The clock of the last pull that ended well.
    pulled: Arc<AtomicU64>,
    /// The learning rates that were set, from which clocks on.
    rates: Mutex<Vec<(u64, Schedule)>>,
}

/// Opens a table on every shard, once a client.
pub(super) fn open(
    core: &Arc<Core>,
    name: &str,
    shape: &[usize],
    dtype: DType,
    options: TableOptions,
) -> Result<DenseTable, PsError> {
    let mut tables = core.tables.lock().unwrap_or_else(PoisonError::into_inner);
    let shards = core.map.shards();
    let mut spec = TableSpec {
        name: name.to_owned(),
        shape: shape.iter().map(|&size| size as u64).collect(),
        dtype,
        rule: options.rule,
        mode: options.mode,
        combine: options.combine,
        clipped: options.clipped,
        recovery: options.recovery,
        compression: options.compression,
        shards,
        shard: 0,
        part_elements: 1,
    };
    let invalid = PsError::of_own_refusal;
    spec.check().map_err(invalid)?;
    let elements = spec.elements().expect("the spec was checked");
    spec.part_elements = part_elements(elements, shards, dtype, core.most_bytes);
    if let Some(known) = tables.get(name) {
        return match known.spec.disagreement(&spec) {
            Some(refusal) => Err(invalid(refusal)),
            None => Ok(DenseTable { core: Arc::clone(core), table: Arc::clone(known) }),
        };
    }
    let subject: Arc<str> = spec.subject().into();
    let requests = (0..shards).map(|shard| {
        let header = Header { table: spec.id(), ..Header::new(Kind::Open) };
        core.request(shard, header, open_body(&TableSpec { shard, ..spec.clone() }))
    });
    let pushed = core.start("opening", &subject, requests.collect())?.wait(None)?.clock;
    let of_shard =
        |shard: u32| parts(core.map.range(elements, shard), spec.part_elements).map(move |keys| (shard, keys));
    let per_shard: Vec<Vec<_>> = (0..shards).map(|shard| of_shard(shard).collect()).collect();
    let longest = per_shard.iter().map(Vec::len).max().unwrap_or(0);
    // In turn from each shard, so that all of them work from the start.
    let parts = (0..longest).flat_map(|n| per_shard.iter().filter_map(move |parts| parts.get(n).copied())).collect();
    let table = Table {
        options,
        shape: shape.to_vec(),
        elements: usize::try_from(elements).map_err(|_| PsError::invalid(&*subject, "it does not fit this machine"))?,
        subject,
        parts,
        squeeze: Mutex::default(),
        pushed: Mutex::new(pushed),
        memory: Memory { pulled: Arc::new(AtomicU64::new(NOTHING)), rates: Mutex::default() },
        spec,
    };
    let table = Arc::new(table);
    tables.insert(name.to_owned(), Arc::clone(&table));
    Ok(DenseTable { core: Arc::clone(core), table })
}

/// Where the elements of each part go, what is left to do once all are there, and how they come.
type Targets = (Vec<Option<RegionSliceMut>>, Option<LastStep>, Codec);

/// What a call carries for one part.
type PartOf<'a> = (Cargo, Option<RegionSliceMut>, &'a (u32, KeyRange));

impl DenseTable {
    /// Adds a gradient of the table's own type, one element for each of the table.
    ///
    /// In synchronous mode this is this worker's contribution to its next clock, and is acknowledged once that clock has
    /// begun; at most two pushes run ahead of the slowest worker. `gradient` stays in use until the call is done.
    ///
    /// # Errors
    /// `Invalid` for a gradient of another size, or on a synchronous table for a client that is not one of its workers;
    /// nothing was sent.
    pub fn push(&self, gradient: RegionSlice) -> Result<Pending, PsError> {
        self.push_as(gradient, self.dtype())
    }

    /// Adds a gradient of type `dtype`: a shorter one than the table's travels as it is and is widened by the server.
    ///
    /// # Errors
    /// As [`DenseTable::push`]; `Invalid` for `float64` into a table that has fewer bits.
    pub fn push_as(&self, gradient: RegionSlice, dtype: DType) -> Result<Pending, PsError> {
        self.call(Kind::Push, Some((gradient, dtype)), None)
    }

    /// Reads the table into `into`. In synchronous mode a worker gets the value of its own last clock, and waits for it.
    ///
    /// # Errors
    /// `Invalid` for a buffer of another size, or one that is in use; nothing was sent.
    pub fn pull(&self, into: RegionSliceMut) -> Result<Pending, PsError> {
        self.call(Kind::Pull, None, Some((into, self.compression().pull)))
    }

    /// [`DenseTable::pull`] of the value in full, also where the table's values travel compressed.
    ///
    /// # Errors
    /// As [`DenseTable::pull`].
    pub fn pull_whole(&self, into: RegionSliceMut) -> Result<Pending, PsError> {
        self.call(Kind::Pull, None, Some((into, Codec::Whole)))
    }

    /// Adds a gradient and reads what comes of it, with one request for each part: the answer leaves when the clock is done.
    ///
    /// # Errors
    /// As [`DenseTable::push`] and [`DenseTable::pull`].
    pub fn push_pull(&self, gradient: RegionSlice, into: RegionSliceMut) -> Result<Pending, PsError> {
        self.push_pull_as(gradient, self.dtype(), into)
    }

    /// [`DenseTable::push_pull`] with a gradient of type `dtype`.
    ///
    /// # Errors
    /// As [`DenseTable::push_as`] and [`DenseTable::pull`].
    pub fn push_pull_as(&self, gradient: RegionSlice, dtype: DType, into: RegionSliceMut) -> Result<Pending, PsError> {
        self.call(Kind::PushPull, Some((gradient, dtype)), Some((into, self.compression().pull)))
    }

    /// Writes the table's first values, unless another client does or anybody has pushed. Blocks until they are there.
    ///
    /// True when they are ours. If the client that writes them dies in the middle, the next one's are taken.
    ///
    /// # Errors
    /// As [`DenseTable::push`]; `Timeout` when the client that writes them does not finish.
    pub fn init(&self, values: RegionSlice) -> Result<bool, PsError> {
        self.check_size(values.len(), self.dtype())?;
        let header = Header { table: self.table.spec.id(), ..Header::new(Kind::ClaimInit) };
        let ask = |verb, header| {
            let request = self.core.request(0, header, Vec::new());
            self.core.start(verb, &self.table.subject, vec![request])?.wait(None)
        };
        let claim = ask("claiming the first values of", header)?.clock;
        if claim == 0 {
            return Ok(false);
        }
        let slices = self.read_parts(&values, self.dtype())?;
        drop(values);
        let requests = slices.into_iter().zip(self.table.parts.iter()).map(|(slice, part)| {
            let header = Header { kind: Kind::Init, sequence: claim, ..header };
            self.data((Cargo::Slice(slice), None, part), header, None)
        });
        self.core.start("writing the first values of", &self.table.subject, requests.collect())?.wait(None)?;
        // The claim is in place of a sequence, so it is not drawn anew.
        let end = Header { kind: Kind::EndInit, sequence: claim, epoch: self.core.map.epoch, ..header };
        let request = NewRequest { header: end, ..self.core.request(0, end, Vec::new()) };
        let ended = self.core.start("ending the first values of", &self.table.subject, vec![request])?.wait(None)?;
        Ok(ended.clock == claim)
    }

    /// Sets the learning rate: in synchronous mode from this worker's next push on, for which all workers that set one must
    /// agree; in asynchronous mode at once. Blocks until the servers know.
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
    /// As [`DenseTable::set_learning_rate`]; `Invalid` for a schedule whose numbers make no sense.
    pub fn set_schedule(&self, schedule: &Schedule) -> Result<(), PsError> {
        self.check_worker()?;
        schedule.check().map_err(|why| PsError::invalid(&*self.table.subject, why))?;
        let pushed = self.pushed();
        self.remember_rate(*pushed + 1, schedule);
        let pending = self.tell_rate(*pushed + 1, schedule, 0)?;
        drop(pushed);
        pending.wait(None).map(|_| ())
    }

    fn tell_rate(&self, clock: u64, schedule: &Schedule, flags: u8) -> Result<Pending, PsError> {
        let requests = (0..self.core.map.shards()).map(|shard| {
            let header = Header { table: self.table.spec.id(), clock, flags, ..Header::new(Kind::SetRate) };
            self.core.request(shard, header, rate_body(schedule))
        });
        self.core.start("setting the learning rate of", &self.table.subject, requests.collect())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.table.spec.name
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.table.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.table.elements
    }

    /// Type of its elements.
    pub fn dtype(&self) -> DType {
        self.table.spec.dtype
    }

    /// How it treats what is pushed, as it was opened.
    pub fn options(&self) -> TableOptions {
        self.table.options
    }

    /// Pushes that this worker has made: the clock that its next pull will show.
    pub fn clock(&self) -> u64 {
        *self.pushed()
    }

    fn pushed(&self) -> MutexGuard<'_, u64> {
        self.table.pushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock of the value that the last pull which ended well has brought: what counts in [`crate::Client::recover`].
    pub fn pulled(&self) -> Option<u64> {
        let clock = self.table.memory.pulled.load(Ordering::Acquire);
        (clock != NOTHING).then_some(clock)
    }

    /// Remembers a pull of the value at `clock` once it has ended well, for a table that may have to be given again.
    fn remember_pull(&self, clock: u64, last_step: Option<LastStep>) -> Option<LastStep> {
        if self.options().recovery != Recovery::Workers {
            return last_step;
        }
        let pulled = Arc::clone(&self.table.memory.pulled);
        Some(Box::new(move || {
            last_step.into_iter().for_each(|step| step());
            pulled.store(clock, Ordering::Release);
        }))
    }

    fn remember_rate(&self, clock: u64, schedule: &Schedule) {
        if self.options().recovery == Recovery::Workers {
            let past = self.pulled().unwrap_or(0);
            let mut rates = self.rates();
            rates.retain(|(known, _)| *known < clock);
            rates.push((clock, schedule.clone()));
            // Of those that began in the past, the last still holds.
            let begun = rates.partition_point(|(known, _)| *known <= past);
            rates.drain(..begun.saturating_sub(1));
        }
    }

    fn rates(&self) -> MutexGuard<'_, Vec<(u64, Schedule)>> {
        self.table.memory.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The learning rates that were set for clocks up to `clock`.
    pub(super) fn rates_by(&self, clock: u64) -> Vec<(u64, Schedule)> {
        self.rates().iter().filter(|(known, _)| *known <= clock).cloned().collect()
    }

    /// Counts this client's pushes from `clock` on, and tells the learning rates of later clocks again.
    pub(super) fn go_on_from(&self, clock: u64) -> Result<(), PsError> {
        let mut pushed = self.pushed();
        *pushed = clock;
        let later: Vec<_> = self.rates().iter().filter(|(known, _)| *known > clock).cloned().collect();
        for (clock, schedule) in later {
            // A server that has gone beyond it knows it.
            self.tell_rate(clock, &schedule, FLAG_AGAIN)?.wait(None)?;
        }
        Ok(())
    }

    /// Writes of the parts that `shards` have, out of a buffer that holds the whole table.
    pub(super) fn values_for(
        &self,
        shards: &[u32],
        values: &RegionSlice,
        header: Header,
    ) -> Result<Vec<NewRequest>, PsError> {
        let slices = self.read_parts(values, self.dtype())?.into_iter().zip(self.table.parts.iter());
        let wanted = slices.filter(|(_, (shard, _))| shards.contains(shard));
        let write = |(slice, part)| {
            let sequence = self.core.next_sequence();
            self.data((Cargo::Slice(slice), None, part), Header { sequence, ..header }, None)
        };
        Ok(wanted.map(write).collect())
    }

    pub(super) fn spec(&self) -> &TableSpec {
        &self.table.spec
    }

    pub(super) fn subject(&self) -> &Arc<str> {
        &self.table.subject
    }

    /// How many workers push to it, where they are counted.
    pub(super) fn workers(&self) -> u32 {
        self.table.spec.mode.workers().unwrap_or(0)
    }

    pub(super) fn id(&self) -> TableId {
        self.table.spec.id()
    }

    /// Whether this client may clip it now.
    pub(super) fn check_clipped(&self) -> Result<(), PsError> {
        self.check_worker()?;
        let reason = match (self.options().clipped, self.clock()) {
            (false, _) => "it was not opened to be clipped: its gradients are applied at once",
            (true, 0) => "nothing has been pushed to it yet: push first",
            (true, _) => return Ok(()),
        };
        Err(PsError::invalid(&*self.table.subject, reason))
    }

    fn is_synchronous(&self) -> bool {
        self.table.spec.mode.workers().is_some()
    }

    pub(super) fn check_size(&self, bytes: usize, dtype: DType) -> Result<(), PsError> {
        let expected = self.table.elements * dtype.bytes();
        if bytes == expected {
            return Ok(());
        }
        let shape = &self.table.shape;
        let reason =
            format!("a buffer of {bytes} bytes does not hold shape {shape:?} of {dtype}, which is {expected} bytes");
        Err(PsError::invalid(&*self.table.subject, reason))
    }

    pub(super) fn check_worker(&self) -> Result<(), PsError> {
        self.core.check_worker(self.table.spec.mode, &self.table.subject)
    }

    fn call(
        &self,
        kind: Kind,
        gradient: Option<(RegionSlice, DType)>,
        into: Option<(RegionSliceMut, Codec)>,
    ) -> Result<Pending, PsError> {
        let dtype = gradient.as_ref().map_or(self.dtype(), |(_, dtype)| *dtype);
        if let Some((slice, dtype)) = &gradient {
            self.check_worker()?;
            self.check_size(slice.len(), *dtype)?;
            if !dtype.pushes_to(self.dtype()) {
                let reason =
                    format!("a gradient of {dtype} loses bits in a table of {}: convert it first", self.dtype());
                return Err(PsError::invalid(&*self.table.subject, reason));
            }
        }
        if let Some((into, _)) = &into {
            self.check_size(into.len(), self.dtype())?;
        }
        // What is kept of a compressed gradient belongs to the next push, so pushes are compressed in their order.
        let mut pushed = self.pushed();
        let (targets, last_step, answer) = self.targets(into)?;
        let (cargo, dtype, codec) = self.cargo(gradient, dtype)?;
        *pushed += u64::from(kind.pushes());
        let clock = if self.is_synchronous() { *pushed } else { 0 };
        let header = Header {
            kind,
            table: self.table.spec.id(),
            clock,
            // A pull is told from others of its slot by a number of its own.
            sequence: if kind.pushes() { *pushed } else { self.core.next_sequence() },
            dtype: Some(dtype),
            codec: codec.code() | answer.code() << 4,
            ..Header::new(kind)
        };
        let lane = Some(self.is_synchronous());
        let parts = cargo.into_iter().zip(targets).zip(self.table.parts.iter());
        let requests = parts.map(|((cargo, target), part)| self.data((cargo, target, part), header, lane)).collect();
        let last_step = if kind.pulls() { self.remember_pull(*pushed, last_step) } else { last_step };
        let verb = match kind {
            Kind::Push => "push to",
            Kind::Pull => "pull of",
            _ => "push_pull of",
        };
        self.core.start_with(verb, &self.table.subject, requests, last_step)
    }

    /// What each part's request carries, of which type once it is read, and by which codec.
    fn cargo(
        &self,
        gradient: Option<(RegionSlice, DType)>,
        dtype: DType,
    ) -> Result<(Vec<Cargo>, DType, Codec), PsError> {
        let Some((slice, dtype)) = gradient else {
            return Ok((self.table.parts.iter().map(|_| Cargo::Nothing).collect(), dtype, Codec::Whole));
        };
        let codec = self.compression().push;
        if codec == Codec::Whole {
            return Ok((self.read_parts(&slice, dtype)?.into_iter().map(Cargo::Slice).collect(), dtype, codec));
        }
        let parts = self.squeeze().gradient(codec, (dtype, &slice), &self.table.parts);
        let parts = parts.map_err(|bad| PsError::invalid(&*self.table.subject, bad.to_string()))?;
        Ok((parts.into_iter().map(Cargo::Slice).collect(), DType::F32, codec))
    }

    /// Where the elements of each part go, what is left to do with them, and the codec they come in.
    fn targets(&self, into: Option<(RegionSliceMut, Codec)>) -> Result<Targets, PsError> {
        let (slices, last_step, codec) = match into {
            None => return Ok((self.table.parts.iter().map(|_| None).collect(), None, Codec::Whole)),
            Some((into, Codec::Whole)) => (self.write_parts(into)?, None, Codec::Whole),
            Some((into, codec)) => {
                let (slices, last_step) = self.squeeze().value(codec, self.dtype(), &self.table.parts, into);
                (slices, Some(last_step), codec)
            }
        };
        Ok((slices.into_iter().map(Some).collect(), last_step, codec))
    }

    fn squeeze(&self) -> MutexGuard<'_, Squeeze> {
        self.table.squeeze.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compression(&self) -> Compression {
        self.table.spec.compression
    }

    fn data(&self, (cargo, target, &(shard, keys)): PartOf<'_>, header: Header, lane: Option<bool>) -> NewRequest {
        let dtype = header.dtype.or(Some(self.dtype()));
        let header = Header { keys, epoch: self.core.map.epoch, dtype, ..header };
        let fragile = lane.is_some() && self.options().recovery == Recovery::Workers;
        NewRequest { shard, header, cargo, target, lane, keep_body: false, fragile }
    }

    /// The parts of a buffer that holds the whole table, to read.
    fn read_parts(&self, slice: &RegionSlice, dtype: DType) -> Result<Vec<RegionSlice>, PsError> {
        let start = slice.range().start;
        let each = |&(_, keys): &(u32, KeyRange)| {
            let bytes = keys.bytes(dtype.bytes());
            slice.region().read(start + bytes.start..start + bytes.end)
        };
        let parts: Result<_, _> = self.table.parts.iter().map(each).collect();
        parts.map_err(|overlap| PsError::invalid(&*self.table.subject, overlap.to_string()))
    }

    /// The parts of a buffer that holds the whole table, to write.
    fn write_parts(&self, slice: RegionSliceMut) -> Result<Vec<RegionSliceMut>, PsError> {
        let (region, start): (Arc<Region>, _) = (Arc::clone(slice.region()), slice.range().start);
        // The whole must be given back before its parts can be had.
        drop(slice);
        let each = |&(_, keys): &(u32, KeyRange)| {
            let bytes = keys.bytes(self.dtype().bytes());
            region.write(start + bytes.start..start + bytes.end)
        };
        let parts: Result<_, _> = self.table.parts.iter().map(each).collect();
        parts.map_err(|overlap| PsError::invalid(&*self.table.subject, overlap.to_string()))
    }
}
