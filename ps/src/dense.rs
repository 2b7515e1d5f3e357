//! Pure: a dense table's share of one shard: its parts, what has been pushed to them, and who waits for what.

use crate::header::{FLAG_AGAIN, Header, Kind};
use crate::refusal::{Reason, Refusal};
use crate::shard_map::{Epoch, ShardMap, parts};
use crate::staleness::{Call, ClockLedger, Verdict, Window};
use crate::values::{self, Source, Values};
use crate::{Combine, DType, KeyRange, Mode, TableSpec, UpdateRule};
use gradwire_transport::{PeerId, RegionSlice};
use std::collections::HashMap;
use std::time::Instant;

/// Clients whose calls one part remembers; beyond it, those of the client that started first are forgotten.
const MAX_WINDOWS: usize = 4096;

/// Memory for contributions that wait for their turn, reused from clock to clock.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Bytes in tables, contributions and free buffers.
    pub(crate) used: u64,
    /// The most there may be.
    pub(crate) limit: u64,
    free: Vec<Vec<u8>>,
}

impl Memory {
    pub(crate) fn new(limit: u64) -> Self {
        Self { used: 0, limit, free: Vec::new() }
    }

    /// Sets `bytes` aside; false when there is no room.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        let fits = self.used.checked_add(bytes).is_some_and(|used| used <= self.limit);
        if fits {
            self.used += bytes;
        }
        fits
    }

    fn copy(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let reused = self.free.iter().position(|buffer| buffer.capacity() >= bytes.len());
        let mut buffer = match reused {
            Some(at) => self.free.swap_remove(at),
            None if self.take(bytes.len() as u64) => Vec::with_capacity(bytes.len()),
            None => {
                // Too small ones are no use to anybody while there is no room.
                let freed: u64 = std::mem::take(&mut self.free).iter().map(|buffer| buffer.capacity() as u64).sum();
                self.used -= freed;
                self.take(bytes.len() as u64).then(|| Vec::with_capacity(bytes.len()))?
            }
        };
        buffer.clear();
        buffer.extend_from_slice(bytes);
        Some(buffer)
    }

    fn give_back(&mut self, buffer: Vec<u8>) {
        self.free.push(buffer);
    }
}

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
}

struct Held {
    clock: u64,
    rank: u32,
    dtype: DType,
    bytes: Vec<u8>,
}

enum Order {
    Clocks(ClockLedger),
    Arrival { windows: HashMap<u64, Window>, applied: u64 },
}

/// One part of a table: what one message carries.
pub(crate) struct Part {
    keys: KeyRange,
    values: Box<dyn Values>,
    order: Order,
    held: Vec<Held>,
    waits: Vec<Wait>,
    init_claim: u64,
}

/// A learning rate and the clock from which it holds.
#[derive(Clone, Copy, Debug)]
struct Rate {
    clock: u64,
    rate: f64,
    client: u64,
    sequence: u64,
}

/// How a clock's sum is applied.
struct Apply<'a> {
    divisor: f64,
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

/// Counters of a table on one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) pushes: u64,
    pub(crate) pulls: u64,
    pub(crate) duplicates: u64,
}

/// A table's share of a shard.
pub(crate) struct Table {
    pub(crate) spec: TableSpec,
    pub(crate) keys: KeyRange,
    pub(crate) init: Init,
    pub(crate) counts: Counts,
    pub(crate) memory_bytes: u64,
    parts: Vec<Part>,
    rates: Vec<Rate>,
}

impl Table {
    /// The share of the shard that `spec` names, all 0. The spec has been checked.
    pub(crate) fn new(spec: TableSpec, memory: &mut Memory) -> Result<Self, Refusal> {
        let elements = spec.elements().expect("the spec was checked");
        let map = ShardMap::new(Epoch(1), spec.shards).expect("the spec was checked");
        let keys = map.range(elements, spec.shard);
        let sums = matches!(spec.mode, Mode::Sync { workers: 2.. });
        let each = values::bytes_per_element(spec.dtype, &spec.rule, sums);
        let count = keys.len().div_ceil(spec.part_elements);
        // A part costs something even where it holds one element.
        let memory_bytes = keys.len().saturating_mul(each).saturating_add(count.saturating_mul(256));
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
            rates: Vec::new(),
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
        let of_part = |part: &Part| match &part.order {
            Order::Clocks(ledger) => u32::try_from(client)
                .ok()
                .filter(|rank| matches!(self.spec.mode, Mode::Sync { workers } if *rank < workers))
                .map_or(ledger.completed(), |rank| ledger.next_clock(rank) - 1),
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
        self.parts.iter().map(|part| part.waits.len()).sum::<usize>() + self.init.waits.len()
    }

    /// Requests that wait for one part.
    pub(crate) fn waiting_at(&self, part: usize) -> usize {
        self.parts[part].waits.len()
    }

    /// Sets the learning rate from `clock` on. Clients that set it for the same clock must agree.
    pub(crate) fn set_rate(&mut self, header: &Header, rate: f64) -> Result<(), Refusal> {
        let subject = self.spec.subject();
        if self.spec.rule.learning_rate().is_none() {
            let rule = self.spec.rule;
            return Err(Refusal::new(Reason::Mismatch, subject, "update rule", "one with a learning rate", rule));
        }
        let checked = self.spec.rule.with_learning_rate(rate).check();
        checked.map_err(|why| Refusal::new(Reason::Malformed, subject.clone(), "learning rate", "at least 0", why))?;
        if self.spec.mode == Mode::Async {
            self.spec.rule = self.spec.rule.with_learning_rate(rate);
            return Ok(());
        }
        let new = Rate { clock: header.clock, rate, client: header.client, sequence: header.sequence };
        let completed = self.completed();
        let known = self.rates.iter_mut().find(|known| known.clock == new.clock);
        match known {
            Some(known) if known.client == new.client => {
                if new.sequence > known.sequence {
                    *known = new;
                }
            }
            Some(known) if known.rate.to_bits() != rate.to_bits() => {
                let what =
                    format!("learning rate at clock {} (client {} and client {})", new.clock, known.client, new.client);
                return Err(Refusal::new(Reason::Mismatch, subject, what, known.rate, rate));
            }
            Some(_) => {}
            // Sent again, and its clock complete: it came before its client's push to that clock, so it was heeded.
            None if completed >= new.clock && header.flags & FLAG_AGAIN != 0 => {}
            None if completed >= new.clock => {
                let expected = format!("a clock after {completed}");
                return Err(Refusal::new(Reason::Mismatch, subject, "clock of a learning rate", expected, new.clock));
            }
            None => {
                let at = self.rates.partition_point(|known| known.clock < new.clock);
                self.rates.insert(at, new);
            }
        }
        self.forget_old_rates();
        Ok(())
    }

    /// Folds rates that hold for every clock still to come into the rule.
    fn forget_old_rates(&mut self) {
        let next = self.completed() + 1;
        let past = self.rates.partition_point(|rate| rate.clock <= next);
        // The last of them holds at the next clock, and may still be set anew for it.
        for rate in self.rates.drain(..past.saturating_sub(1)) {
            self.spec.rule = self.spec.rule.with_learning_rate(rate.rate);
        }
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
        memory: &mut Memory,
        out: &mut Vec<Answer>,
    ) -> Result<bool, Refusal> {
        let header = &from.header;
        let gradient = (header.dtype.expect("checked before"), payload);
        let divisor = match (self.spec.combine, self.spec.mode) {
            (Combine::Mean, Mode::Sync { workers }) => f64::from(workers),
            _ => 1.0,
        };
        let Self { parts, rates, spec, counts, .. } = self;
        let part = &mut parts[at];
        let rule_at = |clock: u64| {
            let last = rates.iter().rev().find(|rate| rate.clock <= clock);
            last.map_or(spec.rule, |rate| spec.rule.with_learning_rate(rate.rate))
        };
        let duplicate = match &mut part.order {
            Order::Arrival { windows, applied } => {
                let duplicate = match admit(windows, header) {
                    Call::New => {
                        *applied += 1;
                        part.values.apply(&spec.rule, *applied, 1.0, Source::Only(gradient));
                        false
                    }
                    Call::Duplicate => true,
                    Call::Stale => return Err(superseded(header)),
                };
                part.answer(*from, out);
                duplicate
            }
            Order::Clocks(_) => {
                let apply = Apply { divisor, rule_at: &rule_at };
                match part.contribute(from, gradient, &apply, memory, out) {
                    None => return Ok(false),
                    Some(duplicate) => duplicate,
                }
            }
        };
        counts.pushes += u64::from(!duplicate);
        counts.duplicates += u64::from(duplicate);
        Ok(true)
    }

    /// Answers a pull, now or when its clock is complete.
    pub(crate) fn pull(&mut self, at: usize, from: Wait, out: &mut Vec<Answer>) {
        self.counts.pulls += 1;
        self.parts[at].wait_or_answer(from, out);
    }

    /// Forgets what `peer` waits for.
    pub(crate) fn forget(&mut self, peer: PeerId) {
        self.parts.iter_mut().for_each(|part| part.waits.retain(|wait| wait.to != peer));
        self.init.waits.retain(|wait| wait.to != peer);
    }

    /// Takes out the requests that have waited too long, with who they waited for.
    pub(crate) fn expire(&mut self, now: Instant, mut refuse: impl FnMut(Wait, Refusal)) {
        let subject = self.spec.subject();
        for part in &mut self.parts {
            let late = part.waits.extract_if(.., |wait| wait.until <= now);
            for wait in late {
                let Order::Clocks(ledger) = &part.order else { continue };
                let missing: Vec<String> = ledger.missing().take(16).map(|rank| rank.to_string()).collect();
                let what = format!("clock {} of {}", ledger.completed() + 1, part.keys);
                let got = format!("nothing from worker {}", missing.join(", "));
                refuse(wait, Refusal::new(Reason::Waited, subject.clone(), what, "pushes of all workers", got));
            }
        }
        for wait in self.init.waits.extract_if(.., |wait| wait.until <= now) {
            let holder = self.init.holder.map_or(0, |(client, ..)| client);
            let got = format!("none yet from client {holder}");
            refuse(wait, Refusal::new(Reason::Waited, subject.clone(), "first values", "all of them", got));
        }
    }
}

fn admit(windows: &mut HashMap<u64, Window>, header: &Header) -> Call {
    if windows.len() >= MAX_WINDOWS && !windows.contains_key(&header.client) {
        let oldest = windows.iter().min_by_key(|(_, window)| window.incarnation).map(|(&client, _)| client);
        oldest.map(|client| windows.remove(&client));
    }
    let window = windows.entry(header.client).or_insert(Window::new(header.incarnation));
    window.admit(header.incarnation, header.sequence)
}

/// The refusal for a client whose place a later process has taken.
pub(crate) fn superseded(header: &Header) -> Refusal {
    let subject = format!("client {}", header.client);
    let expected = "the latest process of that number (give each worker its own)";
    Refusal::new(Reason::Superseded, subject, "incarnation", expected, header.incarnation)
}

impl Part {
    fn new(keys: KeyRange, spec: &TableSpec) -> Self {
        let elements = usize::try_from(keys.len()).expect("a part is small");
        let order = match spec.mode {
            Mode::Sync { workers } => Order::Clocks(ClockLedger::new(workers)),
            Mode::Async => Order::Arrival { windows: HashMap::new(), applied: 0 },
        };
        let values = values::new(spec.dtype, &spec.rule, elements);
        Self { keys, values, order, held: Vec::new(), waits: Vec::new(), init_claim: 0 }
    }

    fn completed(&self) -> u64 {
        match &self.order {
            Order::Clocks(ledger) => ledger.completed(),
            Order::Arrival { applied, .. } => *applied,
        }
    }

    fn is_untouched(&self) -> bool {
        match &self.order {
            Order::Clocks(ledger) => ledger.is_untouched(),
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
        let kept = if ledger.would_hold(clock, rank) { Some(memory.copy(gradient.1)?) } else { None };
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
            let clock = ledger.completed() + 1;
            self.values.apply(&(apply.rule_at)(clock), clock, apply.divisor, source);
            ledger.advance();
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
            Order::Clocks(ledger) if header.kind == Kind::Push => ledger.has_begun(header.clock),
            Order::Clocks(ledger) => header.clock <= ledger.completed(),
        }
    }

    fn wait_or_answer(&mut self, from: Wait, out: &mut Vec<Answer>) {
        if self.is_ready(&from.header) { self.answer(from, out) } else { self.waits.push(from) }
    }

    fn answer(&self, from: Wait, out: &mut Vec<Answer>) {
        let mut header = from.header.reply(Kind::Done);
        header.clock = self.completed();
        out.push(if from.header.kind.pulls() {
            Answer::Value(from.to, header, self.values.read())
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
