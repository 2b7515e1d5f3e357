//! Pure: a dense table's share of one shard: its parts, what has been pushed to them, and who waits for what.

mod clipping;
mod encoded;
mod image;
mod nearness;
mod restoring;

pub(crate) use image::{DenseBuilder, TableImage, decode_windows, encode_windows, merge_windows};

use crate::bounded::Progress;
use crate::counts::Counts;
use crate::exact_sum::ExactSum;
use crate::header::{Header, Kind};
use crate::members::Members;
use crate::memory::{Copied, Memory};
use crate::rates::Rates;
use crate::refusal::{Reason, Refusal};
use crate::shard_map::{Epoch, ShardMap, parts};
use crate::staleness::{Call, ClockLedger, Verdict, Window};
use crate::values::{self, Source, Values};
use crate::{Combine, DType, KeyRange, Mode, Schedule, TableSpec, UpdateRule};
use encoded::{Encoded, encoded_bytes};
pub(crate) use encoded::{narrow, widen};
use gradwire_transport::{PeerId, RegionSlice};
use std::collections::HashMap;
use std::time::Instant;

/// Clients whose calls one part remembers; beyond it, those of a client that is gone are forgotten.
const MAX_WINDOWS: usize = 4096;

/// A request that is answered later.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    pub(crate) to: PeerId,
    pub(crate) header: Header,
    pub(crate) until: Instant,
}

/// What is to be told to a client about a part.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Its push is counted.
    Counted(PeerId, Header),
    /// The value it asked for.
    Value(PeerId, Header, RegionSlice),
    /// What it asked about.
    Told(PeerId, Header, Vec<u8>),
    /// It waited, and now cannot be taken.
    Refused(Wait, Box<Refusal>),
}

#[derive(Clone)]
struct Held {
    clock: u64,
    rank: u32,
    dtype: DType,
    bytes: Copied,
}

#[derive(Clone)]
enum Order {
    Clocks(ClockLedger),
    Arrival { windows: HashMap<u64, Window>, applied: u64 },
    Bounded { progress: Progress, applied: u64 },
}

/// One part of a table: what one message carries.
pub(crate) struct Part {
    keys: KeyRange,
    values: Box<dyn Values>,
    order: Order,
    held: Vec<Held>,
    waits: Vec<Wait>,
    parked: Vec<nearness::Parked>,
    init_claim: u64,
    /// The value as it travels, and its type.
    encoded: Encoded,
    dtype: DType,
    /// The squares of the sum of the clock under way, where it is whole and waits for its scale.
    closed: Option<ExactSum>,
    /// The clock at which an image is wanted, and the image once it is taken.
    cut_at: Option<u64>,
    cut: Option<Box<image::PartImage>>,
}

/// How a clock's sum is applied.
struct Apply<'a> {
    divisor: f64,
    clipped: bool,
    rule_at: &'a dyn Fn(u64) -> UpdateRule,
}

/// Who writes a table's first values.
#[derive(Debug, Default)]
pub(crate) struct Init {
    pub(crate) claim: u64,
    pub(crate) holder: Option<(u64, u64, PeerId)>,
    pub(crate) done: bool,
    pub(crate) waits: Vec<Wait>,
}

/// A table's share of a shard.
pub(crate) struct Table {
    pub(crate) spec: TableSpec,
    pub(crate) keys: KeyRange,
    pub(crate) init: Init,
    pub(crate) counts: Counts,
    pub(crate) memory_bytes: u64,
    parts: Vec<Part>,
    rates: Rates,
    clipping: clipping::Clipping,
    wanted: image::Wanted,
    /// What is missing, where another server had it and is gone.
    lost: Option<restoring::Lost>,
}

impl Table {
    /// The share of the shard that `spec` names, all 0. The spec has been checked.
    pub(crate) fn new(spec: TableSpec, memory: &mut Memory) -> Result<Self, Refusal> {
        let elements = spec.elements().expect("the spec was checked");
        let map = ShardMap::new(Epoch(1), spec.shards).expect("the spec was checked");
        let keys = map.range(elements, spec.shard);
        let sums = spec.clipped || matches!(spec.mode, Mode::Sync { workers: 2.. });
        let each = values::bytes_per_element(spec.dtype, &spec.rule, sums) + encoded_bytes(spec.compression.pull);
        let count = keys.len().div_ceil(spec.part_elements);
        let memory_bytes = keys.len().saturating_mul(each).saturating_add(count.saturating_mul(part_bytes(spec.mode)));
        if !memory.take(memory_bytes) {
            let left = format!("at most {} bytes, of which {} are taken", memory.limit, memory.used);
            return Err(Refusal::new(Reason::Limit, spec.subject(), "memory", left, format!("{memory_bytes} bytes")));
        }
        let parts = parts(keys, spec.part_elements).map(|keys| Part::new(keys, &spec)).collect();
        Ok(Self {
            keys,
            parts,
            init: Init::default(),
            counts: Counts::default(),
            memory_bytes,
            rates: Rates::new(spec.rule),
            clipping: clipping::Clipping::default(),
            wanted: image::Wanted::default(),
            lost: None,
            spec,
        })
    }

    /// The part that holds exactly `keys`.
    pub(crate) fn part(&self, keys: KeyRange) -> Result<usize, Refusal> {
        let at = keys.start.checked_sub(self.keys.start).map(|offset| offset / self.spec.part_elements);
        let found = at
            .and_then(|at| usize::try_from(at).ok())
            .filter(|&at| self.parts.get(at).is_some_and(|part| part.keys == keys));
        found.ok_or_else(|| {
            let expected = format!("a part of {} elements of {}", self.spec.part_elements, self.keys);
            Refusal::new(Reason::Malformed, self.spec.subject(), "keys", expected, keys)
        })
    }

    /// The clock that every part has completed; in asynchronous mode, the pushes that every part has applied.
    pub(crate) fn completed(&self) -> u64 {
        self.parts.iter().map(Part::completed).min().unwrap_or(0)
    }

    /// Pushes that `client` has made to every part.
    pub(crate) fn pushed_by(&self, client: u64) -> u64 {
        let rank = u32::try_from(client).ok().filter(|&rank| self.spec.mode.workers().is_some_and(|all| rank < all));
        let of_part = |part: &Part| match &part.order {
            Order::Clocks(ledger) => rank.map_or(ledger.completed(), |rank| ledger.next_clock(rank) - 1),
            Order::Bounded { progress, .. } => rank.map_or(progress.slowest(), |rank| progress.pushed(rank)),
            Order::Arrival { .. } => 0,
        };
        self.parts.iter().map(of_part).min().unwrap_or(0)
    }

    /// Whether nobody has pushed anything.
    pub(crate) fn is_untouched(&self) -> bool {
        self.parts.iter().all(Part::is_untouched)
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.parts.iter().map(Part::waiting).sum::<usize>() + self.init.waits.len() + self.waiting_for_squares()
    }

    /// Requests that wait for one part.
    pub(crate) fn waiting_at(&self, part: usize) -> usize {
        self.parts[part].waiting()
    }

    /// Sets the learning rates from the header's clock on.
    pub(crate) fn set_rate(&mut self, header: &Header, schedule: Schedule) -> Result<(), Refusal> {
        let completed = self.completed();
        self.rates.set(header, schedule, self.spec.mode, completed, self.spec.subject())
    }

    /// The table as it is now: with the learning rate of the next clock.
    pub(crate) fn spec_now(&self) -> TableSpec {
        TableSpec { rule: self.rates.at(self.completed() + 1), ..self.spec.clone() }
    }

    /// Writes first values, unless a later claim has, or pushes have begun.
    pub(crate) fn write_initial(&mut self, part: usize, claim: u64, bytes: &[u8]) {
        let part = &mut self.parts[part];
        if claim > part.init_claim && part.is_untouched() {
            part.init_claim = claim;
            part.values.write(bytes);
        }
    }

    /// Counts a push. `Ok(false)`: it cannot be taken now, nothing was changed. Answers are appended to `out`.
    pub(crate) fn push(
        &mut self,
        at: usize,
        from: &Wait,
        payload: &[u8],
        (members, memory): (&Members, &mut Memory),
        out: &mut Vec<Answer>,
    ) -> Result<bool, Refusal> {
        let header = &from.header;
        let gradient = (header.dtype.expect("checked before"), payload);
        let divisor = divisor(self.spec.combine, self.spec.mode);
        let Self { parts, rates, counts, .. } = self;
        let part = &mut parts[at];
        let rule_at = |clock: u64| rates.at(clock);
        let duplicate = match &mut part.order {
            Order::Arrival { windows, applied } => {
                let new = admit(windows, header, members, || self.spec.subject())?;
                if new {
                    *applied += 1;
                    part.values.apply(&rates.at(*applied), *applied, 1.0, Source::Only(gradient));
                }
                part.answer(*from, out);
                !new
            }
            Order::Bounded { .. } => match part.push_bounded(from, gradient, (rates, divisor), memory, out) {
                None => return Ok(false),
                Some(duplicate) => duplicate,
            },
            Order::Clocks(_) => {
                let apply = Apply { divisor, rule_at: &rule_at, clipped: self.spec.clipped };
                match part.contribute(from, gradient, &apply, memory, out) {
                    None => return Ok(false),
                    Some(duplicate) => duplicate,
                }
            }
        };
        let whole = header.keys.len() * self.spec.dtype.bytes() as u64;
        counts.push(duplicate, [header.payload_bytes, whole]);
        if header.kind.pulls() {
            counts.values(answered(header, &self.spec));
        }
        self.tell_squares(out);
        self.keep_wanted();
        Ok(true)
    }

    /// Answers a pull, now or when its clock is complete.
    pub(crate) fn pull(&mut self, at: usize, from: Wait, out: &mut Vec<Answer>) {
        self.counts.pulls += 1;
        self.counts.values(answered(&from.header, &self.spec));
        self.parts[at].wait_or_answer(from, out);
    }

    /// Forgets what `peer` waits for.
    pub(crate) fn forget(&mut self, peer: PeerId, memory: &mut Memory) {
        for part in &mut self.parts {
            part.waits.retain(|wait| wait.to != peer);
            part.unpark_of(peer, memory);
        }
        self.init.waits.retain(|wait| wait.to != peer);
        self.forget_squares(peer);
    }

    /// Takes out the pushes that are not counted yet.
    pub(crate) fn take_parked(&mut self, memory: &mut Memory) -> Vec<Wait> {
        self.parts.iter_mut().flat_map(|part| part.unpark_all(memory)).collect()
    }

    /// Takes out the requests that have waited too long, with who they waited for.
    pub(crate) fn expire(&mut self, now: Instant, memory: &mut Memory, mut refuse: impl FnMut(Wait, Refusal)) {
        let subject = self.spec.subject();
        for part in &mut self.parts {
            let mut late: Vec<Wait> = part.waits.extract_if(.., |wait| wait.until <= now).collect();
            late.extend(part.unpark_late(now, memory));
            for wait in late {
                let (clock, missing) = part.waits_for(&wait);
                refuse(wait, waited(subject.clone(), format!("clock {clock} of {}", part.keys), &missing));
            }
        }
        self.expire_squares(now, &mut refuse);
        for wait in self.init.waits.extract_if(.., |wait| wait.until <= now) {
            let holder = self.init.holder.map_or(0, |(client, ..)| client);
            let got = format!("none yet from client {holder}");
            refuse(wait, Refusal::new(Reason::Waited, subject.clone(), "first values", "all of them", got));
        }
    }
}

/// Bytes of the value that a request asks for: as it leaves, and in the table's type.
fn answered(header: &Header, spec: &TableSpec) -> [u64; 2] {
    let whole = header.keys.len() * spec.dtype.bytes() as u64;
    let elements = usize::try_from(header.keys.len()).expect("a part is small");
    let encoded = spec.compression.pull.bytes(elements).filter(|_| header.answer_codec() != 0);
    [encoded.map_or(whole, |bytes| bytes as u64), whole]
}

/// What the gradient of a clock, or of a push, is divided by.
pub(crate) fn divisor(combine: Combine, mode: Mode) -> f64 {
    match combine {
        Combine::Mean => f64::from(mode.workers().unwrap_or(1)),
        Combine::Sum => 1.0,
    }
}

/// The refusal for a request that has waited too long for other workers.
pub(crate) fn waited(subject: String, what: String, missing: &[u32]) -> Refusal {
    let names: Vec<String> = missing.iter().map(u32::to_string).collect();
    let got = format!("nothing from worker {}", names.join(", "));
    Refusal::new(Reason::Waited, subject, what, "pushes of all workers", got)
}

/// Judges a call by the window of its client, and counts it when it is new. Where too many clients are remembered, the one that
/// started first is forgotten: of those that the shard knows no more, else of those without a connection. The call of one that
/// is connected may still come again.
pub(crate) fn admit(
    windows: &mut HashMap<u64, Window>,
    header: &Header,
    members: &Members,
    subject: impl Fn() -> String,
) -> Result<bool, Refusal> {
    if windows.len() >= MAX_WINDOWS && !windows.contains_key(&header.client) {
        let absent = windows.iter().map(|(&client, window)| (members.presence(client), window.incarnation, client));
        let Some((.., client)) = absent.filter(|(presence, ..)| *presence < 2).min() else {
            let expected = format!("at most {MAX_WINDOWS} that are connected");
            return Err(Refusal::new(Reason::Limit, subject(), "clients that push", expected, MAX_WINDOWS + 1));
        };
        windows.remove(&client);
    }
    let window = windows.entry(header.client).or_insert(Window::new(header.incarnation));
    match window.admit(header.incarnation, header.sequence) {
        Call::New => Ok(true),
        Call::Duplicate => Ok(false),
        Call::Stale => Err(superseded(header)),
    }
}

/// The refusal for a client whose place a later process has taken.
pub(crate) fn superseded(header: &Header) -> Refusal {
    let subject = format!("client {}", header.client);
    let expected = "the latest process of that number (give each worker its own)";
    Refusal::new(Reason::Superseded, subject, "incarnation", expected, header.incarnation)
}

impl Order {
    fn completed(&self) -> u64 {
        match self {
            Self::Clocks(ledger) => ledger.completed(),
            Self::Bounded { progress, .. } => progress.slowest(),
            Self::Arrival { applied, .. } => *applied,
        }
    }
}

/// What a part takes beside its elements, even where it holds one: itself, and what it remembers of each worker.
fn part_bytes(mode: Mode) -> u64 {
    1280 + match mode {
        Mode::Sync { workers } => ClockLedger::bytes(workers),
        Mode::Ssp { workers, .. } => Progress::bytes(workers),
        Mode::Async => 0,
    }
}

impl Part {
    fn new(keys: KeyRange, spec: &TableSpec) -> Self {
        let elements = usize::try_from(keys.len()).expect("a part is small");
        let order = match spec.mode {
            Mode::Sync { workers } => Order::Clocks(ClockLedger::new(workers)),
            Mode::Ssp { workers, staleness } => {
                Order::Bounded { progress: Progress::new(workers, staleness), applied: 0 }
            }
            Mode::Async => Order::Arrival { windows: HashMap::new(), applied: 0 },
        };
        let values = values::new(spec.dtype, &spec.rule, elements);
        Self {
            keys,
            values,
            order,
            held: Vec::new(),
            waits: Vec::new(),
            parked: Vec::new(),
            init_claim: 0,
            encoded: Encoded::new(spec.compression.pull),
            dtype: spec.dtype,
            closed: None,
            cut_at: None,
            cut: None,
        }
    }

    fn waiting(&self) -> usize {
        self.waits.len() + self.parked.len()
    }

    /// The clock that `wait` waits for, and who keeps it waiting; no more than fit a line.
    fn waits_for(&self, wait: &Wait) -> (u64, Vec<u32>) {
        match &self.order {
            Order::Clocks(ledger) => (ledger.completed() + 1, ledger.missing().take(16).collect()),
            Order::Bounded { progress, .. } => {
                let clock = Self::needs(wait);
                (clock, progress.missing(clock).take(16).collect())
            }
            Order::Arrival { .. } => (0, Vec::new()),
        }
    }

    fn completed(&self) -> u64 {
        self.order.completed()
    }

    fn is_untouched(&self) -> bool {
        match &self.order {
            Order::Clocks(ledger) => ledger.is_untouched(),
            Order::Bounded { progress, .. } => progress.is_untouched(),
            Order::Arrival { applied, .. } => *applied == 0,
        }
    }

    /// Counts a contribution and applies what it completes. Whether it was a duplicate; `None` when there is no room for it.
    fn contribute(
        &mut self,
        from: &Wait,
        gradient: values::Gradient<'_>,
        apply: &Apply<'_>,
        memory: &mut Memory,
        out: &mut Vec<Answer>,
    ) -> Option<bool> {
        let Order::Clocks(ledger) = &mut self.order else { unreachable!("only clocks have contributions") };
        let clock = from.header.clock;
        let rank = u32::try_from(from.header.client).expect("checked against the number of workers");
        if ledger.has(clock, rank) {
            self.wait_or_answer(*from, out);
            return Some(true);
        }
        let kept =
            if ledger.would_hold(clock, rank) { Some(memory.copy(from.header.client, gradient.1)?) } else { None };
        match (ledger.admit(clock, rank), kept) {
            (Verdict::Hold, Some(bytes)) => self.held.push(Held { clock, rank, dtype: gradient.0, bytes }),
            (_, Some(bytes)) => {
                memory.give_back(bytes);
                return None;
            }
            (verdict, None) => {
                self.waits.push(*from);
                self.place(verdict, gradient, apply, out);
                self.place_held(apply, memory, out);
                self.answer_ready(out);
                return Some(false);
            }
        }
        self.wait_or_answer(*from, out);
        Some(false)
    }

    /// Takes a contribution whose turn it is, and applies the clock when it is the last.
    fn place(&mut self, verdict: Verdict, last: values::Gradient<'_>, apply: &Apply<'_>, out: &mut Vec<Answer>) {
        let Order::Clocks(ledger) = &mut self.order else { unreachable!("only clocks have contributions") };
        if ledger.is_whole() {
            let source = if verdict == Verdict::Begin { Source::Only(last) } else { Source::SumAnd(last) };
            if apply.clipped {
                self.closed = Some(self.values.close(apply.divisor, source));
                return;
            }
            let clock = ledger.completed() + 1;
            self.values.apply(&(apply.rule_at)(clock), clock, apply.divisor, source);
            ledger.advance();
            self.image_at(clock);
            // Before the next clock can be applied: who waits for this one reads this one.
            self.answer_ready(out);
        } else if verdict == Verdict::Begin {
            self.values.begin(last);
        } else {
            self.values.add(last);
        }
    }

    /// Takes held contributions as long as it is the turn of one.
    fn place_held(&mut self, apply: &Apply<'_>, memory: &mut Memory, out: &mut Vec<Answer>) {
        loop {
            let Order::Clocks(ledger) = &mut self.order else { unreachable!("only clocks have contributions") };
            let clock = ledger.completed() + 1;
            let next = self.held.iter().enumerate().find_map(|(at, held)| {
                let verdict = if held.clock == clock { ledger.place(held.rank) } else { Verdict::Hold };
                (verdict != Verdict::Hold).then_some((at, verdict))
            });
            let Some((at, verdict)) = next else { return };
            let held = self.held.swap_remove(at);
            self.place(verdict, (held.dtype, &held.bytes), apply, out);
            memory.give_back(held.bytes);
        }
    }

    /// Whether a request can be answered now.
    fn is_ready(&self, header: &Header) -> bool {
        match &self.order {
            Order::Arrival { .. } => true,
            // A push that waits is parked: one that is asked about here has been applied.
            Order::Bounded { progress, .. } => header.kind == Kind::Push || progress.may_read(header.clock),
            Order::Clocks(ledger) if header.kind == Kind::Push => ledger.has_begun(header.clock),
            Order::Clocks(ledger) => header.clock <= ledger.completed(),
        }
    }

    fn wait_or_answer(&mut self, from: Wait, out: &mut Vec<Answer>) {
        if self.is_ready(&from.header) { self.answer(from, out) } else { self.waits.push(from) }
    }

    fn answer(&mut self, from: Wait, out: &mut Vec<Answer>) {
        let mut header = from.header.reply(Kind::Done);
        header.clock = self.completed();
        out.push(if from.header.kind.pulls() {
            let value = self.values.read();
            let value = match header.answer_codec() {
                0 => value,
                _ => self.encoded.of(self.values.version(), self.dtype, &value),
            };
            Answer::Value(from.to, header, value)
        } else {
            Answer::Counted(from.to, header)
        });
    }

    fn answer_ready(&mut self, out: &mut Vec<Answer>) {
        let mut at = 0;
        while at < self.waits.len() {
            if self.is_ready(&self.waits[at].header) {
                let wait = self.waits.swap_remove(at);
                self.answer(wait, out);
            } else {
                at += 1;
            }
        }
    }
}
