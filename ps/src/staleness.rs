//! Pure: when a push counts, and when a value may be read. This is where exactly-once and bit-equal sums come from.

use crate::body::{BadBody, Reader, Writer};
use std::fmt;

/// Clocks beyond the one under way that a worker may push to: it can send ahead while others catch up, within bounds.
pub const CLOCKS_AHEAD: u64 = 2;
/// Calls of one client on one table that may be unacknowledged: the server remembers as many sequence numbers.
pub const WINDOW: u64 = 64;
/// Most workers of a synchronous table.
pub const MAX_WORKERS: u32 = 1 << 16;

/// How a table treats the pushes of several clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// At each clock the contributions of all `workers` are summed in the order of their ranks, then applied once. A pull
    /// waits for the worker's own last clock. Results do not depend on who comes first.
    Sync {
        /// How many workers contribute, numbered from 0.
        workers: u32,
    },
    /// Each push is applied when it arrives, but no worker gets further than `staleness` clocks ahead of another: its
    /// `c`-th push waits until all have made `c - 1 - staleness`, and a pull after it until all have made `c - staleness`
    /// (stale synchronous parallel; Ho et al., NIPS 2013).
    Ssp {
        /// How many workers push, numbered from 0.
        workers: u32,
        /// Clocks that the first may be ahead of the last.
        staleness: u32,
    },
    /// Each push is applied when it arrives; a pull reads what is there.
    Async,
}

impl Mode {
    /// How many workers push, where they are counted.
    pub const fn workers(&self) -> Option<u32> {
        match *self {
            Self::Sync { workers } | Self::Ssp { workers, .. } => Some(workers),
            Self::Async => None,
        }
    }

    /// What is wrong with the number of workers, if anything.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self.workers() {
            Some(workers) if !(1..=MAX_WORKERS).contains(&workers) => Err(workers.to_string()),
            _ => Ok(()),
        }
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        let (kind, staleness) = match *self {
            Self::Async => (0, 0),
            Self::Sync { .. } => (1, 0),
            Self::Ssp { staleness, .. } => (2, staleness),
        };
        out.byte(kind);
        out.number(self.workers().unwrap_or(0).into());
        out.number(staleness.into());
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let kind = from.byte()?;
        let mut small = || u32::try_from(from.number()?).map_err(|_| BadBody("a number is too large"));
        let (workers, staleness) = (small()?, small()?);
        match kind {
            0 => Ok(Self::Async),
            1 => Ok(Self::Sync { workers }),
            2 => Ok(Self::Ssp { workers, staleness }),
            _ => Err(BadBody("no such mode")),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sync { workers } => write!(f, "sync({workers} workers)"),
            Self::Ssp { workers, staleness } => write!(f, "ssp({workers} workers, staleness {staleness})"),
            Self::Async => write!(f, "async"),
        }
    }
}

/// What to do with a contribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was counted before: acknowledge it, change nothing.
    Duplicate,
    /// The first to count at the clock under way: the sum begins with it.
    Begin,
    /// It is next in order: add it to the sum.
    Add,
    /// Keep it until those before it have come.
    Hold,
    /// Too far ahead: nothing was changed, it must come again later.
    TooEarly,
}

/// Who has contributed what to one part of a synchronous table.
///
/// The sum at a clock is `((g0 + g1) + g2) + …`. As `g0 + g1` and `g1 + g0` are the same bits, either may begin; from rank
/// 2 on each waits for all before it.
#[derive(Clone, Debug)]
pub struct ClockLedger {
    workers: u32,
    completed: u64,
    summed: u32,
    one_before_zero: bool,
    seen: [Vec<u64>; CLOCKS_AHEAD as usize + 1],
}

impl ClockLedger {
    /// Nobody has pushed to it yet.
    pub fn new(workers: u32) -> Self {
        assert!((1..=MAX_WORKERS).contains(&workers), "{workers} workers were checked before");
        let words = (workers as usize).div_ceil(64);
        Self { workers, completed: 0, summed: 0, one_before_zero: false, seen: std::array::from_fn(|_| vec![0; words]) }
    }

    /// Memory that the contributions of so many workers take.
    pub(crate) const fn bytes(workers: u32) -> u64 {
        (CLOCKS_AHEAD + 1) * 8 * workers.div_ceil(64) as u64
    }

    /// A ledger of which clocks up to `completed` are done, and nothing has come since.
    pub(crate) fn at(workers: u32, completed: u64) -> Self {
        Self { completed, ..Self::new(workers) }
    }

    /// The same, without what has come since the last complete clock.
    pub(crate) fn restarted(&self) -> Self {
        Self::at(self.workers, self.completed)
    }

    /// Whether a sum is under way.
    pub(crate) fn has_sum(&self) -> bool {
        self.summed > 0 || self.one_before_zero
    }

    /// Contributions that have come and are in no sum.
    pub(crate) fn held(&self) -> u64 {
        let come: u32 = self.seen.iter().flatten().map(|word| word.count_ones()).sum();
        u64::from(come - self.summed - u32::from(self.one_before_zero))
    }

    /// Whether the contribution of `rank` to `clock` has come, and is in no sum.
    pub(crate) fn holds(&self, clock: u64, rank: u32) -> bool {
        let summed = clock == self.completed + 1 && (rank < self.summed || self.one_before_zero && rank == 1);
        clock > self.completed && rank < self.workers && self.has(clock, rank) && !summed
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.number(self.completed);
        out.number(self.summed.into());
        out.byte(self.one_before_zero.into());
        self.seen.iter().flatten().for_each(|&word| out.number(word));
    }

    pub(crate) fn decode(from: &mut Reader<'_>, workers: u32) -> Result<Self, BadBody> {
        let mut ledger = Self::at(workers, from.counter()?);
        (ledger.summed, ledger.one_before_zero) = (from.small()?, from.byte()? != 0);
        for word in ledger.seen.iter_mut().flatten() {
            *word = from.number()?;
        }
        let next = ledger.completed + 1;
        let beyond = ledger
            .seen
            .iter()
            .any(|words| !workers.is_multiple_of(64) && words[words.len() - 1] >> (workers % 64) != 0);
        let counted = ledger.summed <= workers && (0..ledger.summed).all(|rank| ledger.has(next, rank));
        let early = !ledger.one_before_zero || (workers > 1 && ledger.summed == 0 && ledger.has(next, 1));
        if beyond || !counted || !early {
            return Err(BadBody("its contributions contradict each other"));
        }
        Ok(ledger)
    }

    /// The last clock of which the sum has been applied.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Whether all contributions to the clock under way are in the sum.
    pub fn is_whole(&self) -> bool {
        self.summed == self.workers
    }

    /// The sum of the clock under way has been applied: the next clock is under way.
    pub fn advance(&mut self) {
        assert!(self.is_whole(), "a clock is applied when its sum is whole");
        self.completed += 1;
        self.summed = 0;
        self.seen.rotate_left(1);
        if let Some(last) = self.seen.last_mut() {
            last.fill(0);
        }
    }

    /// Judges the contribution of `rank` to `clock` and counts it, unless it is a duplicate or too early.
    pub fn admit(&mut self, clock: u64, rank: u32) -> Verdict {
        if clock <= self.completed || self.has(clock, rank) {
            return Verdict::Duplicate;
        }
        let ahead = clock - self.completed - 1;
        if ahead > CLOCKS_AHEAD {
            return Verdict::TooEarly;
        }
        self.seen[ahead as usize][rank as usize / 64] |= 1 << (rank % 64);
        if ahead > 0 { Verdict::Hold } else { self.place(rank) }
    }

    /// What to do with a held contribution to the clock under way, now that others have come or the clock has begun.
    pub fn place(&mut self, rank: u32) -> Verdict {
        match (rank, self.summed, self.one_before_zero) {
            (1, 0, false) => {
                self.one_before_zero = true;
                Verdict::Begin
            }
            (0, 0, true) => {
                self.one_before_zero = false;
                self.summed = 2;
                Verdict::Add
            }
            (0, 0, false) => {
                self.summed = 1;
                Verdict::Begin
            }
            (rank, summed, false) if rank == summed => {
                self.summed += 1;
                Verdict::Add
            }
            _ => Verdict::Hold,
        }
    }

    /// Whether a contribution, were it admitted now, would have to be kept.
    pub fn would_hold(&self, clock: u64, rank: u32) -> bool {
        if clock != self.completed + 1 {
            return clock > self.completed;
        }
        match (rank, self.summed, self.one_before_zero) {
            (0, 0, _) | (1, 0, false) => false,
            (rank, summed, one_before_zero) => one_before_zero || rank != summed,
        }
    }

    /// Whether nobody has contributed anything yet.
    pub fn is_untouched(&self) -> bool {
        self.completed == 0 && self.seen.iter().flatten().all(|&word| word == 0)
    }

    /// Whether `rank` has contributed to `clock`.
    pub fn has(&self, clock: u64, rank: u32) -> bool {
        if clock <= self.completed {
            return true;
        }
        let seen = usize::try_from(clock - self.completed - 1).ok().and_then(|ahead| self.seen.get(ahead));
        seen.is_some_and(|words| words[rank as usize / 64] & 1 << (rank % 64) != 0)
    }

    /// Whether a contribution to `clock` may be acknowledged: it is under way or done. Until then its sender must not hurry on.
    pub fn has_begun(&self, clock: u64) -> bool {
        clock <= self.completed + 1
    }

    /// The next clock that `rank` has not contributed to.
    pub fn next_clock(&self, rank: u32) -> u64 {
        (self.completed + 1..).find(|&clock| !self.has(clock, rank)).expect("clocks do not end")
    }

    /// Who has not contributed to the clock under way.
    pub fn missing(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.workers).filter(|&rank| !self.has(self.completed + 1, rank))
    }
}

/// Which calls of one client, in one life of it, an asynchronous part has applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The client's life.
    pub incarnation: u64,
    highest: u64,
    applied: u64,
}

/// What a window says of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// New: apply it.
    New,
    /// Applied before.
    Duplicate,
    /// From an earlier life of the client.
    Stale,
}

impl Window {
    /// Nothing of this life has been applied.
    pub const fn new(incarnation: u64) -> Self {
        Self { incarnation, highest: 0, applied: 0 }
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        [self.incarnation, self.highest, self.applied].into_iter().for_each(|number| out.number(number));
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        Ok(Self { incarnation: from.number()?, highest: from.number()?, applied: from.number()? })
    }

    /// What either has counted, of the later life.
    pub(crate) fn merged(self, other: Self) -> Self {
        let key = |window: &Self| (window.incarnation, window.highest);
        let (late, early) = if key(&self) >= key(&other) { (self, other) } else { (other, self) };
        if early.incarnation < late.incarnation {
            return late;
        }
        let step = late.highest - early.highest;
        Self { applied: late.applied | if step < WINDOW { early.applied << step } else { 0 }, ..late }
    }

    /// Whether call `sequence` of life `incarnation` has been counted.
    pub fn contains(&self, incarnation: u64, sequence: u64) -> bool {
        let mut copy = *self;
        incarnation == self.incarnation && copy.admit(incarnation, sequence) == Call::Duplicate
    }

    /// Judges call `sequence` (from 1) of life `incarnation` and counts it when it is new.
    ///
    /// A client keeps at most [`WINDOW`] calls unacknowledged, so what lies further back has been applied.
    pub fn admit(&mut self, incarnation: u64, sequence: u64) -> Call {
        if incarnation < self.incarnation {
            return Call::Stale;
        }
        if incarnation > self.incarnation {
            *self = Self::new(incarnation);
        }
        if sequence > self.highest {
            let step = sequence - self.highest;
            self.applied = if step < WINDOW { self.applied << step } else { 0 } | 1;
            self.highest = sequence;
            return Call::New;
        }
        let back = self.highest - sequence;
        if back >= WINDOW || self.applied & 1 << back != 0 {
            return Call::Duplicate;
        }
        self.applied |= 1 << back;
        Call::New
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// Delivers contributions in the given order; the order in which each clock's sum took them, as `((a b) c)`.
    fn sums(workers: u32, deliveries: &[(u64, u32)]) -> Vec<Vec<u32>> {
        let mut ledger = ClockLedger::new(workers);
        let (mut held, mut sum, mut sums): (HashSet<(u64, u32)>, Vec<u32>, _) =
            (HashSet::new(), Vec::new(), Vec::new());
        let mut again: Vec<(u64, u32)> = deliveries.to_vec();
        while !again.is_empty() {
            for (clock, rank) in std::mem::take(&mut again) {
                let would_hold = ledger.would_hold(clock, rank) && !ledger.has(clock, rank);
                let verdict = ledger.admit(clock, rank);
                assert_eq!(would_hold, matches!(verdict, Verdict::Hold | Verdict::TooEarly));
                match verdict {
                    Verdict::Begin => sum = vec![rank],
                    Verdict::Add => sum.push(rank),
                    Verdict::Hold => assert!(held.insert((clock, rank)), "held twice"),
                    Verdict::TooEarly => again.push((clock, rank)),
                    Verdict::Duplicate => {}
                }
                loop {
                    if ledger.is_whole() {
                        ledger.advance();
                        sums.push(std::mem::take(&mut sum));
                    }
                    let now = ledger.completed() + 1;
                    let next = (0..workers).find(|&rank| {
                        held.contains(&(now, rank)) && {
                            let verdict = ledger.place(rank);
                            match verdict {
                                Verdict::Begin => sum = vec![rank],
                                Verdict::Add => sum.push(rank),
                                _ => {}
                            }
                            verdict != Verdict::Hold
                        }
                    });
                    match next {
                        Some(rank) => held.remove(&(now, rank)),
                        None => break,
                    };
                }
            }
        }
        assert!(held.is_empty());
        sums
    }

    fn in_rank_order(sum: &[u32], workers: u32) -> bool {
        let mut sorted = sum.to_vec();
        if workers > 1 {
            sorted[..2].sort_unstable();
        }
        sorted == (0..workers).collect::<Vec<_>>()
    }

    #[test]
    fn every_order_of_four_workers_sums_in_rank_order() {
        let mut orders = vec![vec![]];
        for n in 0..4u32 {
            orders = orders
                .iter()
                .flat_map(|order: &Vec<u32>| {
                    (0..=order.len()).map(move |at| {
                        let mut order = order.clone();
                        order.insert(at, n);
                        order
                    })
                })
                .collect();
        }
        assert_eq!(orders.len(), 24);
        for order in orders {
            let deliveries: Vec<_> = order.iter().map(|&rank| (1, rank)).collect();
            let sums = sums(4, &deliveries);
            assert_eq!(sums.len(), 1);
            assert!(in_rank_order(&sums[0], 4), "{order:?} gave {sums:?}");
        }
    }

    #[test]
    fn a_duplicate_in_any_place_is_not_counted() {
        let plain: Vec<(u64, u32)> = (1..=3).flat_map(|clock| (0..3).map(move |rank| (clock, rank))).collect();
        for copy in 0..plain.len() {
            for at in copy..=plain.len() {
                let mut deliveries = plain.clone();
                deliveries.insert(at, plain[copy]);
                assert_eq!(sums(3, &deliveries).len(), 3);
            }
        }
    }

    #[test]
    fn who_is_missing_and_what_comes_next_can_be_told() {
        let mut ledger = ClockLedger::new(3);
        ledger.admit(1, 2);
        ledger.admit(2, 2);
        assert_eq!(ledger.missing().collect::<Vec<_>>(), [0, 1]);
        assert_eq!((ledger.next_clock(2), ledger.next_clock(0)), (3, 1));
        assert!(ledger.has_begun(1) && !ledger.has_begun(2));
        assert_eq!(ledger.admit(4, 2), Verdict::TooEarly);
        assert!(!ledger.has(4, 2) && !ledger.has(u64::MAX, 2));
    }

    #[test]
    fn a_window_forgets_the_last_life_and_refuses_it_afterwards() {
        let mut window = Window::new(5);
        assert_eq!(window.admit(5, 1), Call::New);
        assert_eq!(window.admit(6, 1), Call::New);
        assert_eq!(window.admit(5, 2), Call::Stale);
        assert_eq!(window.admit(6, 1), Call::Duplicate);
        assert_eq!(window.admit(6, u64::MAX), Call::New);
        assert_eq!(window.admit(6, 2), Call::Duplicate);
    }

    proptest! {
        #[test]
        fn any_order_with_repeats_gives_rank_order_sums(
            workers in 1u32..6, clocks in 1u64..5, seed in any::<u64>(), repeats in 0usize..20,
        ) {
            let mut deliveries: Vec<(u64, u32)> =
                (1..=clocks).flat_map(|clock| (0..workers).map(move |rank| (clock, rank))).collect();
            let mut state = seed | 1;
            let mut random = move |below: usize| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as usize % below
            };
            for _ in 0..repeats {
                let copy = deliveries[random(deliveries.len())];
                deliveries.push(copy);
            }
            for n in (1..deliveries.len()).rev() {
                deliveries.swap(n, random(n + 1));
            }
            let sums = sums(workers, &deliveries);
            prop_assert_eq!(sums.len() as u64, clocks);
            prop_assert!(sums.iter().all(|sum| in_rank_order(sum, workers)));
        }

        #[test]
        fn a_window_counts_each_call_once(calls in proptest::collection::vec(1u64..=WINDOW, 1..300)) {
            let mut window = Window::new(1);
            let mut known = HashSet::new();
            for call in calls {
                let expected = if known.insert(call) { Call::New } else { Call::Duplicate };
                prop_assert_eq!(window.admit(1, call), expected);
            }
        }
    }
}
