//! Pure: a dense table as it was at one moment, as chunks, and a table made again from them, cut as it was or anew.

use super::clipping::Clipping;
use super::{Held, Order, Part, Table};
use crate::body::{BadBody, Reader, Writer};
use crate::bounded::Progress;
use crate::chunk::{BadState, ChunkKind, PIECE_BYTES, chunk};
use crate::counts::Counts;
use crate::exact_sum::ExactSum;
use crate::memory::Memory;
use crate::rates::Rates;
use crate::shard_map::{MAX_PART_BYTES, part_elements};
use crate::staleness::{ClockLedger, Window};
use crate::values::{self, Field, Numbers, bytes_of};
use crate::{DType, KeyRange, Mode, TableId, TableSpec};
use std::collections::{BTreeMap, HashMap};

/// A table as it was at one moment.
pub(crate) struct TableImage {
    pub(crate) spec: TableSpec,
    rates: Rates,
    init: (u64, bool),
    counts: Counts,
    clipping: Clipping,
    parts: Vec<PartImage>,
}

/// A part as it was at one moment.
pub(crate) struct PartImage {
    keys: KeyRange,
    init_claim: u64,
    born: u64,
    order: Order,
    /// Squares of a whole sum that waits for its scale.
    closed: Option<ExactSum>,
    fields: Vec<(Field, Numbers)>,
    held: Vec<Held>,
}

/// What a table keeps for an image that is wanted at a clock.
#[derive(Default)]
pub(super) enum Wanted {
    /// None is wanted.
    #[default]
    Nothing,
    /// Its parts have not all come to it.
    Parts,
    /// The rates and the scale as they were then: later clocks forget them.
    Kept(Box<(Rates, Clipping)>),
}

impl Part {
    /// The part as it is, with everything that has come and waits for its turn.
    fn image(&self) -> PartImage {
        let with_sum = matches!(&self.order, Order::Clocks(ledger) if ledger.has_sum());
        PartImage {
            keys: self.keys,
            init_claim: self.init_claim,
            born: self.values.born(),
            order: self.order.clone(),
            closed: self.closed.clone(),
            fields: self.values.image(with_sum),
            held: self.held.clone(),
        }
    }

    /// `clock` is complete: takes the image if it is wanted now.
    pub(super) fn image_at(&mut self, clock: u64) {
        if self.cut_at == Some(clock) {
            self.take_image();
        }
    }

    /// Takes the image that is wanted. At a clock: what has come to later ones is not in it, and comes again.
    pub(super) fn take_image(&mut self) {
        let clean = match &self.order {
            Order::Clocks(ledger) => Some(Order::Clocks(ledger.restarted())),
            _ => None,
        };
        let image = match clean {
            Some(order) => {
                let (keys, init_claim, fields) = (self.keys, self.init_claim, self.values.image(false));
                PartImage { keys, init_claim, born: self.values.born(), order, closed: None, fields, held: Vec::new() }
            }
            None => self.image(),
        };
        (self.cut, self.cut_at) = (Some(Box::new(image)), None);
    }
}

impl Table {
    /// The clock that some part has passed, where an image at `clock` is wanted and cannot be had any more.
    pub(crate) fn past(&self, clock: u64) -> Option<u64> {
        let furthest = self.parts.iter().map(Part::completed).max().unwrap_or(0);
        (matches!(self.spec.mode, Mode::Sync { .. }) && furthest > clock).then_some(furthest)
    }

    /// Wants an image at `clock`, where clocks are completed together; else at once. Or none any more.
    pub(crate) fn arm(&mut self, clock: Option<u64>) {
        let sync = matches!(self.spec.mode, Mode::Sync { .. });
        for part in &mut self.parts {
            (part.cut, part.cut_at) = (None, clock);
            if clock.is_some_and(|clock| !sync || part.completed() == clock) {
                part.take_image();
            }
        }
        self.wanted = if clock.is_some() { Wanted::Parts } else { Wanted::Nothing };
        self.keep_wanted();
    }

    /// Something was counted: once all parts have come to the clock of an image, keeps what is not theirs as it was then.
    pub(super) fn keep_wanted(&mut self) {
        if matches!(self.wanted, Wanted::Parts) && self.is_cut() {
            self.wanted = Wanted::Kept(self.beside_parts());
        }
    }

    /// What an image of the parts that are taken holds beside them.
    fn beside_parts(&self) -> Box<(Rates, Clipping)> {
        let clocks = self.parts.iter().filter_map(|part| part.cut.as_ref()).map(|cut| cut.order.completed());
        let clock = clocks.min().unwrap_or(0);
        Box::new((self.rates.at_cut(clock), self.clipping.at_cut(clock)))
    }

    /// Whether the image that was wanted is taken.
    pub(crate) fn is_cut(&self) -> bool {
        self.parts.iter().all(|part| part.cut.is_some())
    }

    /// The image that was wanted.
    pub(crate) fn take_cut(&mut self) -> TableImage {
        let (rates, clipping) = match std::mem::take(&mut self.wanted) {
            Wanted::Kept(kept) => *kept,
            _ => *self.beside_parts(),
        };
        let parts = self.parts.iter_mut().filter_map(|part| part.cut.take()).map(|cut| *cut).collect();
        let init = (self.init.claim, self.init.done);
        TableImage { spec: self.spec.clone(), rates, init, counts: self.counts, clipping, parts }
    }

    /// The table as it is now. Numbers are shared with it until it writes them; contributions that wait are copied.
    pub(crate) fn image(&self) -> TableImage {
        TableImage {
            spec: self.spec.clone(),
            rates: self.rates.clone(),
            init: (self.init.claim, self.init.done),
            counts: self.counts,
            clipping: self.clipping.image(),
            parts: self.parts.iter().map(Part::image).collect(),
        }
    }
}

impl Order {
    fn encode(&self, out: &mut Writer) {
        match self {
            Self::Clocks(ledger) => ledger.encode(out),
            Self::Bounded { progress, applied } => {
                out.number(*applied);
                progress.encode(out);
            }
            Self::Arrival { windows, applied } => {
                out.number(*applied);
                encode_windows(windows, out);
            }
        }
    }

    fn decode(from: &mut Reader<'_>, mode: Mode) -> Result<Self, BadBody> {
        Ok(match mode {
            Mode::Sync { workers } => Self::Clocks(ClockLedger::decode(from, workers)?),
            Mode::Ssp { workers, staleness } => {
                let applied = from.counter()?;
                Self::Bounded { progress: Progress::decode(from, workers, staleness)?, applied }
            }
            Mode::Async => Self::Arrival { applied: from.counter()?, windows: decode_windows(from)? },
        })
    }

    /// What the parts of a table that is cut anew have counted, where parts that had counted `self` and `other` meet.
    fn merged(self, other: Self) -> Result<Self, &'static str> {
        match (self, other) {
            (Self::Clocks(one), Self::Clocks(other)) if one.completed() == other.completed() => Ok(Self::Clocks(one)),
            (Self::Bounded { progress, applied }, Self::Bounded { progress: other, applied: more })
                if progress == other =>
            {
                Ok(Self::Bounded { progress, applied: applied.max(more) })
            }
            (Self::Arrival { windows, applied }, Self::Arrival { windows: others, applied: more }) => {
                Ok(Self::Arrival { windows: merge_windows(windows, others), applied: applied.max(more) })
            }
            _ => Err(
                "its parts are at different clocks, so it cannot be cut anew: restore it at as many shards as it had",
            ),
        }
    }
}

pub(crate) fn encode_windows(windows: &HashMap<u64, Window>, out: &mut Writer) {
    let mut all: Vec<_> = windows.iter().collect();
    all.sort_unstable_by_key(|(client, _)| **client);
    out.number(all.len() as u64);
    for (client, window) in all {
        out.number(*client);
        window.encode(out);
    }
}

pub(crate) fn decode_windows(from: &mut Reader<'_>) -> Result<HashMap<u64, Window>, BadBody> {
    let count = from.count(32)?;
    if count > super::MAX_WINDOWS {
        return Err(BadBody("it remembers more clients than there may be"));
    }
    (0..count).map(|_| Ok((from.number()?, Window::decode(from)?))).collect()
}

pub(crate) fn merge_windows(mut windows: HashMap<u64, Window>, others: HashMap<u64, Window>) -> HashMap<u64, Window> {
    for (client, other) in others {
        windows.entry(client).and_modify(|window| *window = window.merged(other)).or_insert(other);
    }
    windows
}

impl TableImage {
    /// Which numbers it holds, with their bytes, part after part.
    pub(crate) fn fields(&self) -> impl Iterator<Item = (Field, impl Iterator<Item = Vec<u8>> + '_)> + '_ {
        let known = self.parts.first().map_or(&[][..], |part| &part.fields).iter();
        known.enumerate().map(|(at, (field, _))| {
            let bytes = self.parts.iter().filter_map(move |part| part.fields.get(at)).map(|(_, numbers)| {
                let mut out = Vec::with_capacity(numbers.bytes());
                numbers.append(0..numbers.bytes(), &mut out);
                out
            });
            (*field, bytes)
        })
    }

    /// The clock that every part has completed.
    pub(crate) fn completed(&self) -> u64 {
        self.parts.iter().map(|part| part.order.completed()).min().unwrap_or(0)
    }

    pub(crate) fn chunks(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let id = self.spec.id();
        let mut head = chunk(ChunkKind::Dense, id);
        self.spec.encode(&mut head);
        self.rates.encode(&mut head);
        head.number(self.init.0);
        head.byte(self.init.1.into());
        self.counts.encode(&mut head);
        self.clipping.encode(&mut head);
        let parts = self.parts.iter().flat_map(move |part| part.chunks(id));
        std::iter::once(head.0).chain(parts).chain(std::iter::once(chunk(ChunkKind::End, id).0))
    }
}

impl PartImage {
    fn chunks(&self, id: TableId) -> impl Iterator<Item = Vec<u8>> + '_ {
        let mut head = chunk(ChunkKind::Part, id);
        head.number(self.keys.start);
        head.number(self.keys.len());
        head.number(self.init_claim);
        self.order.encode(&mut head);
        head.byte(self.closed.is_some().into());
        if let Some(squares) = &self.closed {
            squares.encode(&mut head);
        }
        // Seldom there, and not read by those who never write it.
        if self.born > 0 {
            head.number(self.born);
        }
        let numbers = self.fields.iter().flat_map(move |(_, numbers)| {
            let pieces = (0..numbers.bytes()).step_by(PIECE_BYTES);
            pieces.map(move |start| {
                let mut out = chunk(ChunkKind::Numbers, id);
                let end = numbers.bytes().min(start + PIECE_BYTES);
                out.0.reserve(end - start);
                numbers.append(start..end, &mut out.0);
                out.0
            })
        });
        let held = self.held.iter().map(move |held| {
            let mut out = chunk(ChunkKind::Held, id);
            out.number(held.clock);
            out.number(held.rank.into());
            out.byte(held.dtype.code());
            out.0.extend_from_slice(&held.bytes);
            out.0
        });
        std::iter::once(head.0).chain(numbers).chain(held)
    }
}

/// A dense table that is being made from chunks.
pub(crate) struct DenseBuilder {
    table: Table,
    /// Whether it is cut as it was.
    exact: bool,
    /// Which elements have come, of the whole table.
    come: BTreeMap<u64, u64>,
    orders: Vec<Option<Order>>,
    /// What each part keeps.
    fields: Vec<Field>,
    current: Option<Current>,
    /// Whether the end of the shard that is being told has come.
    ended: bool,
}

/// The part that is being told.
struct Current {
    keys: KeyRange,
    fields: Vec<Field>,
    /// Bytes that have come of the first field.
    offset: usize,
    held: u64,
}

impl DenseBuilder {
    /// Takes a head. `place`: which shard this is, of how many.
    pub(crate) fn new(from: &mut Reader<'_>, place: (u32, u32), memory: &mut Memory) -> Result<Self, BadState> {
        let (mut spec, rates, init, counts, clipping) = head(from)?;
        let exact = (spec.shard, spec.shards) == place;
        if spec.shards != place.1 {
            let elements = spec.elements().unwrap_or(0);
            spec.part_elements = part_elements(elements, place.1, spec.dtype, MAX_PART_BYTES);
        }
        (spec.shard, spec.shards) = place;
        spec.check()?;
        let mut table = Table::new(spec, memory)?;
        (table.rates, table.counts) = (rates, counts);
        if exact {
            // Squares are of a share; cut anew, they are nobody's, and whoever asks for them late is told so.
            table.clipping = clipping;
        }
        (table.init.claim, table.init.done) = init;
        let orders = table.parts.iter().map(|_| None).collect();
        let fields = values::new(table.spec.dtype, &table.spec.rule, 1).image(false);
        let fields = fields.into_iter().map(|(field, _)| field).collect();
        Ok(Self { table, exact, come: BTreeMap::new(), orders, fields, current: None, ended: false })
    }

    /// The table's id.
    pub(crate) fn id(&self) -> crate::TableId {
        self.table.spec.id()
    }

    /// Takes the head of the same table from another shard.
    pub(crate) fn more(&mut self, from: &mut Reader<'_>) -> Result<(), BadState> {
        let (mut spec, _, (claim, done), counts, _) = head(from)?;
        if !std::mem::take(&mut self.ended) {
            return Err(self.wrong("a shard of it ends too early"));
        }
        let known = &self.table.spec;
        (spec.shard, spec.shards, spec.part_elements) = (known.shard, known.shards, known.part_elements);
        if let Some(refusal) = known.disagreement(&spec) {
            return Err(refusal.into());
        }
        let init = &mut self.table.init;
        (init.claim, init.done) = (init.claim.max(claim), init.done || done);
        self.table.counts.merge(&counts);
        Ok(())
    }

    fn wrong(&self, what: &'static str) -> BadState {
        BadState::Contradiction { subject: self.table.spec.subject(), what }
    }

    pub(crate) fn take(&mut self, kind: ChunkKind, from: &mut Reader<'_>, memory: &mut Memory) -> Result<(), BadState> {
        if self.ended {
            return Err(self.wrong("it goes on after its end"));
        }
        match kind {
            ChunkKind::Part => self.part(from),
            ChunkKind::Numbers => self.numbers(from.rest()),
            ChunkKind::Held => self.held(from, memory),
            ChunkKind::End => {
                self.ended = true;
                self.end_part()
            }
            _ => Err(self.wrong("a chunk of a sparse table")),
        }
    }

    fn end_part(&mut self) -> Result<(), BadState> {
        match self.current.take() {
            Some(current) if !current.fields.is_empty() => Err(self.wrong("numbers of a part are missing")),
            Some(current) if current.held > 0 => Err(self.wrong("contributions of a part are missing")),
            _ => Ok(()),
        }
    }

    /// The parts of ours that hold some of `keys`.
    fn overlapping(&self, keys: KeyRange) -> std::ops::Range<usize> {
        let parts = &self.table.parts;
        let first = parts.partition_point(|part| part.keys.end <= keys.start);
        first..parts.partition_point(|part| part.keys.start < keys.end).max(first)
    }

    fn part(&mut self, from: &mut Reader<'_>) -> Result<(), BadState> {
        self.end_part()?;
        let spec = &self.table.spec;
        let (start, count, claim) = (from.number()?, from.number()?, from.number()?);
        let order = Order::decode(from, spec.mode)?;
        let closed = match from.byte()? {
            0 => None,
            _ => Some(ExactSum::decode(from)?),
        };
        let born = if from.end().is_ok() { 0 } else { from.counter()? };
        from.end()?;
        let whole = matches!(&order, Order::Clocks(ledger) if ledger.is_whole());
        if whole != closed.is_some() || (whole && !spec.clipped) {
            return Err(self.wrong("a sum that is whole waits for nothing"));
        }
        let most = (MAX_PART_BYTES / spec.dtype.bytes()) as u64;
        let elements = spec.elements().unwrap_or(0);
        let end = start.checked_add(count).filter(|&end| end <= elements && (1..=most).contains(&count));
        let end = end.ok_or_else(|| self.wrong("a part lies outside the table"))?;
        let before = self.come.range(..end).next_back().map_or(0, |(_, &end)| end);
        if before > start {
            return Err(self.wrong("a part comes twice"));
        }
        self.come.insert(start, end);
        let keys = KeyRange { start, end };
        let (has_sum, held) = match &order {
            Order::Clocks(ledger) => (ledger.has_sum(), ledger.held()),
            _ => (false, 0),
        };
        if !self.exact && (has_sum || held > 0) {
            return Err(self.wrong("it was taken in the middle of a clock, so it cannot be cut anew"));
        }
        let overlapping = self.overlapping(keys);
        if self.exact && (overlapping.len() != 1 || self.table.parts[overlapping.start].keys != keys) {
            return Err(self.wrong("a part is not one of its own"));
        }
        for at in overlapping {
            let part = &mut self.table.parts[at];
            part.init_claim = part.init_claim.max(claim);
            // Where older state meets younger, all counts as old: a rule that takes it for young would take too large steps.
            let known = self.orders[at].as_ref().map_or(born, |_| part.values.born());
            part.values.set_born(born.min(known));
            let merged = match self.orders[at].take() {
                Some(known) => known.merged(order.clone()).map_err(|what| self.wrong(what))?,
                None => order.clone(),
            };
            self.orders[at] = Some(merged);
            // Whole sums are told only where they are cut as they were.
            self.table.parts[at].closed.clone_from(&closed);
        }
        let mut fields = self.fields.clone();
        fields.extend(has_sum.then_some(Field::Sum));
        self.current = Some(Current { keys, fields, offset: 0, held });
        Ok(())
    }

    fn numbers(&mut self, bytes: &[u8]) -> Result<(), BadState> {
        let dtype = self.table.spec.dtype;
        let next = self.current.as_ref().and_then(|now| Some((now.keys, *now.fields.first()?, now.offset)));
        let (keys, field, offset) = next.ok_or_else(|| self.wrong("numbers that belong to no part"))?;
        let each = bytes_of(field, dtype);
        let whole = keys.len() as usize * each;
        if bytes.is_empty() || bytes.len() > whole - offset || !bytes.len().is_multiple_of(each) {
            return Err(self.wrong("more numbers than a part has"));
        }
        let start = keys.start + (offset / each) as u64;
        let told = KeyRange { start, end: start + (bytes.len() / each) as u64 };
        for at in self.overlapping(told) {
            let part = &mut self.table.parts[at];
            let (start, end) = (told.start.max(part.keys.start), told.end.min(part.keys.end));
            let piece = &bytes[(start - told.start) as usize * each..(end - told.start) as usize * each];
            if !part.values.put(field, (start - part.keys.start) as usize, piece) {
                return Err(self.wrong("numbers that no part has"));
            }
        }
        if let Some(current) = &mut self.current {
            current.offset += bytes.len();
            if current.offset == whole {
                current.fields.remove(0);
                current.offset = 0;
            }
        }
        Ok(())
    }

    fn held(&mut self, from: &mut Reader<'_>, memory: &mut Memory) -> Result<(), BadState> {
        let (clock, rank) = (from.number()?, from.small()?);
        let dtype = DType::of_code(from.byte()?).ok_or(BadBody("no such dtype"))?;
        let bytes = from.rest();
        let Some(keys) = self.current.as_ref().filter(|now| now.fields.is_empty() && now.held > 0).map(|now| now.keys)
        else {
            return Err(self.wrong("a contribution that nobody counted"));
        };
        let at = self.overlapping(keys).start;
        let counted = matches!(&self.orders[at], Some(Order::Clocks(ledger)) if ledger.holds(clock, rank));
        let again = self.table.parts[at].held.iter().any(|held| (held.clock, held.rank) == (clock, rank));
        let fits = dtype.pushes_to(self.table.spec.dtype) && bytes.len() as u64 == keys.len() * dtype.bytes() as u64;
        if !counted || again || !fits {
            return Err(self.wrong("a contribution that nobody counted"));
        }
        let Some(bytes) = memory.copy(rank.into(), bytes) else {
            return Err(self.wrong("no memory for a contribution that waits"));
        };
        self.table.parts[at].held.push(Held { clock, rank, dtype, bytes });
        if let Some(current) = &mut self.current {
            current.held -= 1;
        }
        Ok(())
    }

    /// The table, once all of it has come.
    pub(crate) fn finish(mut self) -> Result<Table, BadState> {
        if !self.ended {
            return Err(self.wrong("its end is missing"));
        }
        let keys = self.table.keys;
        let come = self.come.iter().map(|(&start, &end)| end.min(keys.end).saturating_sub(start.max(keys.start)));
        if come.sum::<u64>() != keys.len() {
            return Err(self.wrong("some of its parts are missing"));
        }
        for (part, order) in self.table.parts.iter_mut().zip(self.orders) {
            part.order = order.expect("elements of each part have come");
        }
        Ok(self.table)
    }
}

type Head = (TableSpec, Rates, (u64, bool), Counts, Clipping);

fn head(from: &mut Reader<'_>) -> Result<Head, BadState> {
    let spec = TableSpec::decode(from)?;
    spec.check()?;
    let at_rest = spec.rule.with_learning_rate(0.0);
    let rates = Rates::decode(from, |rule| rule.with_learning_rate(0.0) == at_rest)?;
    let init = (from.counter()?, from.byte()? != 0);
    let counts = Counts::decode(from)?;
    let clipping = Clipping::decode(from)?;
    from.end()?;
    Ok((spec, rates, init, counts, clipping))
}
