//! Pure: a sparse table's share of one shard: which pushes count, in which order they are applied, who waits for what.

mod image;

pub(crate) use image::{SparseBuilder, SparseImage};

use super::gathering::{Gathering, Parts, Piece, Verdict};
use super::rows::{self, Rows};
use super::{Batch, Ids, SparseSpec};
use crate::bounded::{Progress, Turn};
use crate::counts::Counts;
use crate::dense::{Answer, Wait, admit, divisor, waited};
use crate::header::{Header, Kind};
use crate::members::Members;
use crate::memory::{Copied, Memory, Shelf};
use crate::rates::Rates;
use crate::refusal::{Reason, Refusal};
use crate::schedule::Schedule;
use crate::staleness::{Mode, Window};
use crate::status::SparseStatus;
use crate::unpacking::check_answer_codec;
use crate::{Codec, DType};
use gradwire_transport::PeerId;
use std::collections::HashMap;
use std::time::Instant;

/// A pull that waits, with its ids; or a push that is kept until it may count.
struct Kept {
    from: Wait,
    count: usize,
    payload: Copied,
}

enum Order {
    Arrival { windows: HashMap<u64, Window>, pushes: u64 },
    Clocks { gathering: Gathering, unacknowledged: Vec<Wait> },
    Bounded { progress: Progress, under_way: HashMap<u32, Parts>, parked: Vec<Kept>, pushes: u64 },
}

/// A table's share of a shard.
pub(crate) struct SparseTable {
    pub(crate) spec: SparseSpec,
    counts: Counts,
    rows: Box<dyn Rows>,
    order: Order,
    readers: Vec<Kept>,
    rates: Rates,
    opened: Instant,
    /// How old it was then: more than 0 where it came from elsewhere.
    opened_ms: u64,
    /// What is set aside for it.
    memory_bytes: u64,
    /// What is set aside in any case: all of it where there is a capacity.
    least_bytes: u64,
    /// The clock at which an image is wanted, and the image once it is taken.
    cut_at: Option<u64>,
    cut: Option<Box<SparseImage>>,
}

/// What a shard lends to a call.
pub(crate) struct Means<'a> {
    pub(crate) members: &'a Members,
    pub(crate) memory: &'a mut Memory,
    pub(crate) shelf: &'a mut Shelf,
    pub(crate) now: Instant,
    pub(crate) out: &'a mut Vec<Answer>,
}

impl SparseTable {
    /// The share of the shard that `spec` names, empty. The spec has been checked. `key`: any number that clients do not know.
    pub(crate) fn new(spec: SparseSpec, key: u64, now: Instant, memory: &mut Memory) -> Result<Self, Refusal> {
        let least_bytes = rows::least_bytes(&spec);
        if !memory.take(least_bytes) {
            return Err(no_room(&spec, memory, least_bytes));
        }
        let rows = rows::new(&spec, key);
        let order = match spec.mode {
            Mode::Sync { workers } => Order::Clocks { gathering: Gathering::new(workers), unacknowledged: Vec::new() },
            Mode::Ssp { workers, staleness } => Order::Bounded {
                progress: Progress::new(workers, staleness),
                under_way: HashMap::new(),
                parked: Vec::new(),
                pushes: 0,
            },
            Mode::Async => Order::Arrival { windows: HashMap::new(), pushes: 0 },
        };
        let rates = Rates::new(spec.rule);
        let (counts, readers) = (Counts::default(), Vec::new());
        let (memory_bytes, opened) = (least_bytes, now);
        Ok(Self {
            spec,
            counts,
            rows,
            order,
            readers,
            rates,
            opened,
            opened_ms: 0,
            memory_bytes,
            least_bytes,
            cut_at: None,
            cut: None,
        })
    }

    /// The clock that all workers have completed; in asynchronous mode, the pushes that were applied.
    pub(crate) fn completed(&self) -> u64 {
        match &self.order {
            Order::Arrival { pushes, .. } => *pushes,
            Order::Clocks { gathering, .. } => gathering.completed(),
            Order::Bounded { progress, .. } => progress.slowest(),
        }
    }

    /// Pushes that `client` has made.
    pub(crate) fn pushed_by(&self, client: u64) -> u64 {
        let rank = u32::try_from(client).ok().filter(|&rank| self.spec.mode.workers().is_some_and(|all| rank < all));
        match (&self.order, rank) {
            (Order::Clocks { gathering, .. }, Some(rank)) => gathering.pushed(rank),
            (Order::Bounded { progress, .. }, Some(rank)) => progress.pushed(rank),
            (Order::Arrival { .. }, _) => 0,
            (_, None) => self.completed(),
        }
    }

    /// What is set aside for it.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        let pushes = match &self.order {
            Order::Arrival { .. } => 0,
            Order::Clocks { unacknowledged, .. } => unacknowledged.len(),
            Order::Bounded { parked, .. } => parked.len(),
        };
        self.readers.len() + pushes
    }

    /// Sets the learning rates from the header's clock on.
    pub(crate) fn set_rate(&mut self, header: &Header, schedule: Schedule) -> Result<(), Refusal> {
        let completed = self.completed();
        self.rates.set(header, schedule, self.spec.mode, completed, self.spec.subject())
    }

    /// Counts a part of a push. `Ok(false)`: it cannot be taken now, nothing was changed. `payload` has been checked to be
    /// `batch`.
    pub(crate) fn push(&mut self, from: &Wait, payload: &[u8], means: &mut Means<'_>) -> Result<bool, Refusal> {
        let batch = Batch::of(payload, &from.header, &self.spec)?;
        let now_ms = self.now_ms(means.now);
        self.rows.expire(now_ms);
        let taken = match &self.order {
            Order::Arrival { .. } => self.push_at_once(from, &batch, now_ms, means).map(Some),
            Order::Clocks { .. } => self.push_to_clock(from, payload, &batch, now_ms, means),
            Order::Bounded { .. } => self.push_bounded(from, payload, &batch, now_ms, means),
        };
        self.account(means.memory);
        let Some(duplicate) = taken? else { return Ok(false) };
        self.counts.push(duplicate, [from.header.payload_bytes, payload.len() as u64]);
        Ok(true)
    }

    fn push_at_once(
        &mut self,
        from: &Wait,
        batch: &Batch<'_>,
        now_ms: u64,
        means: &mut Means<'_>,
    ) -> Result<bool, Refusal> {
        let header = &from.header;
        let Order::Arrival { windows, .. } = &self.order else { unreachable!("asked before") };
        let known = windows.get(&header.client);
        if !known.is_some_and(|window| window.contains(header.incarnation, header.sequence)) {
            // Before it counts: what is refused may come again.
            self.check_room(batch.ids, means.memory)?;
        }
        let Order::Arrival { windows, pushes } = &mut self.order else { unreachable!("asked before") };
        let new = admit(windows, header, means.members, || self.spec.subject())?;
        if new {
            *pushes += u64::from(batch.part == 0);
            let step = (*pushes).max(1);
            self.rows.apply(&self.rates.at(step), step, batch, 1.0, now_ms);
        }
        self.acknowledge(from, means.out);
        Ok(!new)
    }

    fn push_to_clock(
        &mut self,
        from: &Wait,
        payload: &[u8],
        batch: &Batch<'_>,
        now_ms: u64,
        means: &mut Means<'_>,
    ) -> Result<Option<bool>, Refusal> {
        let (clock, rank, life) = (from.header.clock, rank(from), from.header.incarnation);
        let part = [batch.part, batch.parts];
        let Order::Clocks { gathering, .. } = &mut self.order else { unreachable!("asked before") };
        let (verdict, stale) = gathering.judge(clock, rank, part, life);
        stale.into_iter().for_each(|piece| means.memory.give_back(piece.payload));
        match verdict {
            Verdict::TooEarly => return Ok(None),
            Verdict::Wrong => return Err(wrong_part(&self.spec, batch)),
            Verdict::Duplicate => {
                self.acknowledge(from, means.out);
                return Ok(Some(true));
            }
            Verdict::Keep => {}
        }
        self.check_room(batch.ids, means.memory)?;
        let Some(copy) = means.memory.copy(from.header.client, payload) else {
            let current = clock == self.completed() + 1;
            // What is further ahead may come again when there is room; this clock could never be completed without it.
            return if current { Err(no_room(&self.spec, means.memory, payload.len() as u64)) } else { Ok(None) };
        };
        if self.spec.eviction.is_none() && self.spec.admission == 1 {
            // At once, so that there is room when the clock is complete. They are what a pull of them gives anyway.
            self.rows.make(batch.ids, now_ms);
        }
        let piece = Piece { dtype: batch.dtype, count: batch.ids.len(), payload: copy };
        let Order::Clocks { gathering, .. } = &mut self.order else { unreachable!("asked before") };
        gathering.keep(clock, rank, part, life, piece);
        self.acknowledge(from, means.out);
        self.complete(now_ms, means);
        Ok(Some(false))
    }

    /// Applies every clock that all workers have contributed to.
    fn complete(&mut self, now_ms: u64, means: &mut Means<'_>) {
        let divisor = divisor(self.spec.combine, self.spec.mode);
        while let Order::Clocks { gathering, .. } = &mut self.order
            && let Some(pieces) = gathering.take()
        {
            let clock = gathering.completed();
            for piece in pieces {
                self.rows.add(&Batch::known(&piece.payload, piece.dtype, piece.count));
                means.memory.give_back(piece.payload);
            }
            self.rows.apply_sum(&self.rates.at(clock), clock, divisor, now_ms);
            if self.cut_at == Some(clock) {
                self.take_image(means.now);
            }
            // Before the next clock can be applied: who waits for this one reads this one.
            self.answer_ready(means);
        }
    }

    fn push_bounded(
        &mut self,
        from: &Wait,
        payload: &[u8],
        batch: &Batch<'_>,
        now_ms: u64,
        means: &mut Means<'_>,
    ) -> Result<Option<bool>, Refusal> {
        let Order::Bounded { progress, under_way, parked, .. } = &mut self.order else { unreachable!("asked before") };
        let (clock, rank) = (from.header.clock, rank(from));
        let mut turn = progress.turn(clock, rank);
        if turn == Turn::Now && has_come(under_way, from, batch, &self.spec)? {
            turn = Turn::Duplicate;
        }
        match turn {
            Turn::TooEarly => return Ok(None),
            Turn::Duplicate => {
                self.acknowledge(from, means.out);
                return Ok(Some(true));
            }
            Turn::Wait => {
                let Some(payload) = means.memory.copy(from.header.client, payload) else { return Ok(None) };
                parked.push(Kept { from: *from, count: batch.ids.len(), payload });
                return Ok(Some(false));
            }
            Turn::Now => {}
        }
        self.check_room(batch.ids, means.memory)?;
        self.apply_bounded(from, batch, now_ms, means);
        self.unpark(now_ms, means);
        Ok(Some(false))
    }

    fn apply_bounded(&mut self, from: &Wait, batch: &Batch<'_>, now_ms: u64, means: &mut Means<'_>) {
        let Order::Bounded { progress, under_way, pushes, .. } = &mut self.order else { unreachable!("asked before") };
        let rank = rank(from);
        let parts = under_way.entry(rank).or_insert_with(|| Parts::new(from.header.incarnation, batch.parts));
        parts.insert(batch.part);
        *pushes += u64::from(batch.part == 0);
        let (step, whole) = ((*pushes).max(1), parts.is_whole());
        if whole {
            under_way.remove(&rank);
            progress.advance(rank);
        }
        let divisor = divisor(self.spec.combine, self.spec.mode);
        self.rows.apply(&self.rates.at(from.header.clock), step, batch, divisor, now_ms);
        self.acknowledge(from, means.out);
        if whole {
            self.answer_ready(means);
        }
    }

    /// Takes the parked parts whose turn has come, as if they came now.
    fn unpark(&mut self, now_ms: u64, means: &mut Means<'_>) {
        loop {
            let Order::Bounded { progress, parked, under_way, .. } = &mut self.order else { return };
            let turn = |kept: &Kept| progress.turn(kept.from.header.clock, rank(&kept.from));
            let Some(at) = parked.iter().position(|kept| matches!(turn(kept), Turn::Now | Turn::Duplicate)) else {
                return;
            };
            let counted = turn(&parked[at]) == Turn::Duplicate;
            let Kept { from, count, payload } = parked.swap_remove(at);
            let batch = Batch::known(&payload, from.header.dtype.unwrap_or(DType::F32), count);
            let come = if counted { Ok(true) } else { has_come(under_way, &from, &batch, &self.spec) };
            match come.and_then(|come| self.check_room(batch.ids, means.memory).map(|()| come)) {
                Ok(true) => self.acknowledge(&from, means.out),
                Ok(false) => self.apply_bounded(&from, &batch, now_ms, means),
                Err(refusal) => means.out.push(Answer::Refused(from, Box::new(refusal))),
            }
            means.memory.give_back(payload);
        }
    }

    /// Answers a pull, now or when its clock is complete. `Ok(false)`: it cannot be kept now.
    pub(crate) fn pull(&mut self, from: &Wait, payload: &[u8], means: &mut Means<'_>) -> Result<bool, Refusal> {
        if from.header.dtype != Some(self.spec.dtype) {
            let got = from.header.dtype.map_or("none", |dtype| dtype.name());
            return Err(Refusal::new(Reason::Mismatch, self.spec.subject(), "dtype", self.spec.dtype, got));
        }
        check_answer_codec(&from.header, self.spec.compression.pull, || self.spec.subject())?;
        let ids = Ids::of_pull(payload, &from.header, &self.spec)?;
        let whole = (ids.len() * self.spec.dim as usize * self.spec.dtype.bytes()) as u64;
        let bytes = [(ids.len() * self.spec.answer_row_bytes(&from.header)) as u64, whole];
        if self.is_ready(&from.header) {
            self.counts.pulls += 1;
            self.counts.values(bytes);
            self.answer(from, ids, means);
            return Ok(true);
        }
        let Some(copy) = means.memory.copy(from.header.client, payload) else { return Ok(false) };
        self.counts.pulls += 1;
        self.counts.values(bytes);
        self.readers.push(Kept { from: *from, count: ids.len(), payload: copy });
        Ok(true)
    }

    fn answer(&self, from: &Wait, ids: Ids<'_>, means: &mut Means<'_>) {
        let bytes = ids.len() * self.spec.answer_row_bytes(&from.header);
        let codec = if from.header.answer_codec() == 0 { Codec::Whole } else { self.spec.compression.pull };
        let buffer = means.shelf.take(bytes);
        self.rows.read(ids, codec, &mut buffer.write(0..bytes).expect("nobody else holds this buffer"));
        let slice = buffer.read(0..bytes).expect("its only writer has given it back");
        let header = Header { clock: self.completed(), ..from.header.reply(Kind::Done) };
        means.out.push(Answer::Value(from.to, header, slice));
    }

    fn is_ready(&self, header: &Header) -> bool {
        match &self.order {
            Order::Arrival { .. } => true,
            Order::Clocks { gathering, .. } => header.clock <= gathering.completed(),
            Order::Bounded { progress, .. } => progress.may_read(header.clock),
        }
    }

    fn answer_ready(&mut self, means: &mut Means<'_>) {
        let mut readers = std::mem::take(&mut self.readers);
        for Kept { from, payload, .. } in readers.extract_if(.., |kept| self.is_ready(&kept.from.header)) {
            self.answer(&from, Ids::known(&payload), means);
            means.memory.give_back(payload);
        }
        self.readers = readers;
        let completed = self.completed();
        if let Order::Clocks { unacknowledged, .. } = &mut self.order {
            for wait in unacknowledged.extract_if(.., |wait| wait.header.clock <= completed + 1) {
                let header = Header { clock: completed, ..wait.header.reply(Kind::Done) };
                means.out.push(Answer::Counted(wait.to, header));
            }
        }
    }

    /// A push is counted: tells so, at a clock ahead once that is under way, so that its sender does not hurry on.
    fn acknowledge(&mut self, from: &Wait, out: &mut Vec<Answer>) {
        let completed = self.completed();
        match &mut self.order {
            Order::Clocks { unacknowledged, .. } if from.header.clock > completed + 1 => unacknowledged.push(*from),
            _ => out.push(Answer::Counted(from.to, Header { clock: completed, ..from.header.reply(Kind::Done) })),
        }
    }

    /// Whether the rows that `ids` need can be made.
    fn check_room(&self, ids: Ids<'_>, memory: &mut Memory) -> Result<(), Refusal> {
        if self.spec.eviction.is_some() && self.spec.capacity.is_some() {
            return Ok(());
        }
        if self.spec.capacity.is_some() && self.spec.admission > 1 {
            // An id that finds no room is not admitted.
            return Ok(());
        }
        let absent = self.rows.absent(ids);
        if let Some(share) = self.spec.share() {
            let wanted = self.rows.len() + absent;
            if absent > 0 && wanted > share {
                let expected = format!("at most {share} on this shard (raise the capacity, or choose an eviction)");
                return Err(Refusal::new(Reason::Limit, self.spec.subject(), "rows", expected, wanted));
            }
            return Ok(());
        }
        let more = if absent == 0 { 0 } else { self.rows.bytes_for(absent) };
        if more > 0 && !memory.has_room(more) {
            return Err(no_room(&self.spec, memory, more));
        }
        Ok(())
    }

    /// Brings what is set aside up to what is taken.
    fn account(&mut self, memory: &mut Memory) {
        let bytes = self.rows.bytes().max(self.least_bytes);
        memory.resize(self.memory_bytes, bytes);
        self.memory_bytes = bytes;
    }

    /// Forgets what `peer` waits for.
    pub(crate) fn forget(&mut self, peer: PeerId, memory: &mut Memory) {
        self.kept_out(|wait| wait.to == peer, memory);
    }

    /// Takes out the pushes that are not counted yet.
    pub(crate) fn take_parked(&mut self, memory: &mut Memory) -> Vec<Wait> {
        let Order::Bounded { parked, .. } = &mut self.order else { return Vec::new() };
        let kept = parked.drain(..).map(|kept| {
            memory.give_back(kept.payload);
            kept.from
        });
        kept.collect()
    }

    /// Takes out what waits and is so.
    fn kept_out(&mut self, so: impl Fn(&Wait) -> bool, memory: &mut Memory) -> Vec<Wait> {
        let mut kept: Vec<Kept> = self.readers.extract_if(.., |kept| so(&kept.from)).collect();
        let mut waits = Vec::new();
        match &mut self.order {
            Order::Arrival { .. } => {}
            Order::Clocks { unacknowledged, .. } => waits.extend(unacknowledged.extract_if(.., |wait| so(wait))),
            Order::Bounded { parked, .. } => kept.extend(parked.extract_if(.., |kept| so(&kept.from))),
        }
        for kept in kept {
            memory.give_back(kept.payload);
            waits.push(kept.from);
        }
        waits
    }

    /// Evicts what is too old, and takes out the requests that have waited too long, with who they waited for. Whether rows are
    /// gone.
    pub(crate) fn expire(&mut self, now: Instant, memory: &mut Memory, mut refuse: impl FnMut(Wait, Refusal)) -> bool {
        let before = self.rows.told().0.count();
        self.rows.expire(self.now_ms(now));
        for wait in self.kept_out(|wait| wait.until <= now, memory) {
            let (clock, missing): (u64, Vec<u32>) = match &self.order {
                Order::Arrival { .. } => continue,
                Order::Clocks { gathering, .. } => (gathering.completed() + 1, gathering.missing().take(16).collect()),
                Order::Bounded { progress, .. } => {
                    let pushes = wait.header.kind == Kind::SparsePush;
                    let clock = wait.header.clock - u64::from(pushes);
                    (clock, progress.missing(clock).take(16).collect())
                }
            };
            refuse(wait, waited(self.spec.subject(), format!("clock {clock}"), &missing));
        }
        self.rows.told().0.count() != before
    }

    /// The ids that were evicted from number `from` on: how many are lost, the ids, the next number.
    pub(crate) fn evicted(&self, from: u64, most: usize) -> (u64, Vec<u64>, u64) {
        self.rows.told().0.since(from, most)
    }

    /// What it is and holds.
    pub(crate) fn status(&self) -> SparseStatus {
        let (evicted, unadmitted) = self.rows.told();
        SparseStatus {
            spec: SparseSpec { rule: self.rates.at(self.completed() + 1), ..self.spec.clone() },
            rows: self.rows.len(),
            bytes: self.memory_bytes,
            clock: self.completed(),
            pushes: self.counts.pushes,
            pulls: self.counts.pulls,
            duplicates: self.counts.duplicates,
            waiting: self.waiting() as u64,
            evicted: evicted.count(),
            unadmitted,
            pushed_bytes: self.counts.pushed[0],
            pulled_bytes: self.counts.pulled[0],
        }
    }

    fn now_ms(&self, now: Instant) -> u64 {
        let here = u64::try_from(now.saturating_duration_since(self.opened).as_millis()).unwrap_or(u64::MAX);
        here.saturating_add(self.opened_ms)
    }
}

fn rank(from: &Wait) -> u32 {
    u32::try_from(from.header.client).expect("checked against the number of workers")
}

/// Whether a part of the push under way has come before. The parts of an earlier life of the worker count no more.
fn has_come(
    under_way: &mut HashMap<u32, Parts>,
    from: &Wait,
    batch: &Batch<'_>,
    spec: &SparseSpec,
) -> Result<bool, Refusal> {
    let rank = rank(from);
    under_way.retain(|&other, parts| other != rank || parts.incarnation >= from.header.incarnation);
    match under_way.get(&rank) {
        Some(parts) if parts.total() != batch.parts => Err(wrong_part(spec, batch)),
        Some(parts) => Ok(parts.has(batch.part)),
        None => Ok(false),
    }
}

fn wrong_part(spec: &SparseSpec, batch: &Batch<'_>) -> Refusal {
    let got = format!("one of {}", batch.parts);
    Refusal::new(Reason::Malformed, spec.subject(), "part", "one of as many as its others", got)
}

fn no_room(spec: &SparseSpec, memory: &Memory, bytes: u64) -> Refusal {
    let left = format!("at most {} bytes, of which {} are taken", memory.limit, memory.used);
    Refusal::new(Reason::Limit, spec.subject(), "memory", left, format!("{bytes} bytes more"))
}
