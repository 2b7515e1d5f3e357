//! Pure: the contributions of the workers to the clocks of a synchronous sparse table, and which parts of them have come.

use super::MAX_PARTS;
use crate::DType;
use crate::body::{BadBody, Reader, Writer};
use crate::memory::Copied;
use crate::staleness::CLOCKS_AHEAD;
use std::collections::BTreeMap;

/// Which parts of a push have come.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parts {
    pub(crate) incarnation: u64,
    total: u32,
    come: u32,
    seen: Vec<u64>,
}

impl Parts {
    /// None of `total` yet.
    pub(crate) fn new(incarnation: u64, total: u32) -> Self {
        Self { incarnation, total, come: 0, seen: vec![0; total.div_ceil(64) as usize] }
    }

    pub(crate) fn has(&self, part: u32) -> bool {
        self.seen.get(part as usize / 64).is_some_and(|word| word & 1 << (part % 64) != 0)
    }

    /// Notes a part that has not come before.
    pub(crate) fn insert(&mut self, part: u32) {
        self.seen[part as usize / 64] |= 1 << (part % 64);
        self.come += 1;
    }

    pub(crate) fn total(&self) -> u32 {
        self.total
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.come == self.total
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.number(self.incarnation);
        out.number(self.total.into());
        self.seen.iter().for_each(|&word| out.number(word));
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let (incarnation, total) = (from.number()?, from.small()?);
        if !(1..=MAX_PARTS).contains(&total) {
            return Err(BadBody("a push has more parts than there may be"));
        }
        let mut parts = Self::new(incarnation, total);
        for word in &mut parts.seen {
            *word = from.number()?;
        }
        parts.come = parts.seen.iter().map(|word| word.count_ones()).sum();
        let beyond = !total.is_multiple_of(64) && parts.seen.last().is_some_and(|word| word >> (total % 64) != 0);
        if beyond || parts.is_whole() || parts.come == 0 {
            return Err(BadBody("the parts of a push contradict each other"));
        }
        Ok(parts)
    }
}

/// A part that waits for its clock: the payload, as it came.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(crate) dtype: DType,
    pub(crate) count: usize,
    pub(crate) payload: Copied,
}

/// What one worker gives to one clock.
#[derive(Clone)]
struct Contribution {
    parts: Parts,
    pieces: Vec<Piece>,
}

/// What the workers have given.
#[derive(Clone)]
pub(crate) struct Gathering {
    workers: u32,
    completed: u64,
    /// Contributions that are whole, for each clock from the one under way.
    whole: [u32; CLOCKS_AHEAD as usize + 1],
    contributions: BTreeMap<(u64, u32), Contribution>,
}

/// What to do with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It has come before.
    Duplicate,
    /// It is to be kept.
    Keep,
    /// Too far ahead: it must come again.
    TooEarly,
    /// It does not belong to the parts that have come.
    Wrong,
}

impl Gathering {
    pub(crate) fn new(workers: u32) -> Self {
        Self { workers, completed: 0, whole: Default::default(), contributions: BTreeMap::new() }
    }

    /// Memory that the contributions of so many workers take beside their payloads, each in a few parts.
    pub(crate) const fn bytes(workers: u32) -> u64 {
        (CLOCKS_AHEAD + 1) * 256 * workers as u64
    }

    /// All clocks up to `completed` are applied, and nothing has come since.
    pub(crate) fn at(workers: u32, completed: u64) -> Self {
        Self { completed, ..Self::new(workers) }
    }

    /// What has come: clock, rank, life of the worker, number of parts, and each part.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (u64, u32, u64, u32, &Piece)> + '_ {
        self.contributions.iter().flat_map(|(&(clock, rank), known)| {
            let parts = &known.parts;
            known.pieces.iter().map(move |piece| (clock, rank, parts.incarnation, parts.total, piece))
        })
    }

    /// The last clock that was applied.
    pub(crate) fn completed(&self) -> u64 {
        self.completed
    }

    /// What to do with part `part` of `total` of what `rank` gives to `clock`. The parts of an earlier life of the worker,
    /// which it did not finish, are given back.
    pub(crate) fn judge(&mut self, clock: u64, rank: u32, [part, total]: [u32; 2], life: u64) -> (Verdict, Vec<Piece>) {
        if clock <= self.completed {
            return (Verdict::Duplicate, Vec::new());
        }
        if clock - self.completed - 1 > CLOCKS_AHEAD {
            return (Verdict::TooEarly, Vec::new());
        }
        let key = (clock, rank);
        let mut stale = Vec::new();
        if self.contributions.get(&key).is_some_and(|known| !known.parts.is_whole() && known.parts.incarnation < life) {
            stale = self.contributions.remove(&key).map(|known| known.pieces).unwrap_or_default();
        }
        let verdict = match self.contributions.get(&key).map(|known| &known.parts) {
            None => Verdict::Keep,
            Some(parts) if parts.is_whole() || parts.has(part) => Verdict::Duplicate,
            Some(parts) if parts.total() != total => Verdict::Wrong,
            Some(_) => Verdict::Keep,
        };
        (verdict, stale)
    }

    /// Keeps a part that was judged so.
    pub(crate) fn keep(&mut self, clock: u64, rank: u32, [part, total]: [u32; 2], life: u64, piece: Piece) {
        let fresh = || Contribution { parts: Parts::new(life, total), pieces: Vec::new() };
        let contribution = self.contributions.entry((clock, rank)).or_insert_with(fresh);
        contribution.parts.insert(part);
        contribution.pieces.push(piece);
        if contribution.parts.is_whole() {
            self.whole[(clock - self.completed - 1) as usize] += 1;
        }
    }

    /// The contributions to the clock under way, in the order of ranks, once all are there: the next clock is under way then.
    pub(crate) fn take(&mut self) -> Option<Vec<Piece>> {
        if !self.is_whole() {
            return None;
        }
        self.completed += 1;
        self.whole.rotate_left(1);
        self.whole[CLOCKS_AHEAD as usize] = 0;
        let later = self.contributions.split_off(&(self.completed + 1, 0));
        let now = std::mem::replace(&mut self.contributions, later);
        Some(now.into_values().flat_map(|contribution| contribution.pieces).collect())
    }

    /// Whether the clock under way could be taken.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole[0] >= self.workers
    }

    /// Clocks that `rank` has contributed to in full.
    pub(crate) fn pushed(&self, rank: u32) -> u64 {
        let gave = |clock: u64| self.contributions.get(&(clock, rank)).is_some_and(|known| known.parts.is_whole());
        (self.completed..).take_while(|&clock| clock == self.completed || gave(clock)).last().unwrap_or(self.completed)
    }

    /// Who has not contributed to the clock under way.
    pub(crate) fn missing(&self) -> impl Iterator<Item = u32> + '_ {
        let gave =
            |rank| self.contributions.get(&(self.completed + 1, rank)).is_some_and(|known| known.parts.is_whole());
        (0..self.workers).filter(move |&rank| !gave(rank))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use proptest::prelude::*;

    fn piece(tag: u64) -> Piece {
        Piece { dtype: DType::F32, count: 0, payload: Memory::new(8).copy(0, &tag.to_le_bytes()).unwrap() }
    }

    fn give(gathering: &mut Gathering, clock: u64, rank: u32, part: [u32; 2], life: u64) -> Verdict {
        let (verdict, _) = gathering.judge(clock, rank, part, life);
        if verdict == Verdict::Keep {
            gathering.keep(clock, rank, part, life, piece(u64::from(rank) * 100 + u64::from(part[0])));
        }
        verdict
    }

    proptest! {
        #[test]
        fn any_order_with_repeats_gives_each_clock_every_part_once_by_rank(
            seed in any::<u64>(), workers in 1u32..5, repeats in 0usize..20,
        ) {
            let parts = |rank: u32| rank % 3 + 1;
            let mut deliveries: Vec<(u64, u32, u32)> = (1..=4)
                .flat_map(|clock| (0..workers).flat_map(move |rank| (0..parts(rank)).map(move |part| (clock, rank, part))))
                .collect();
            let mut state = seed;
            let mut random = |below: usize| {
                state = super::super::initial::mix(state);
                state as usize % below
            };
            for _ in 0..repeats {
                deliveries.push(deliveries[random(deliveries.len())]);
            }
            (1..deliveries.len()).rev().for_each(|n| deliveries.swap(n, random(n + 1)));
            let mut gathering = Gathering::new(workers);
            let mut clocks = 0;
            while !deliveries.is_empty() {
                let (clock, rank, part) = deliveries.remove(0);
                match give(&mut gathering, clock, rank, [part, parts(rank)], 1) {
                    Verdict::TooEarly => deliveries.push((clock, rank, part)),
                    verdict => prop_assert!(verdict != Verdict::Wrong),
                }
                while let Some(pieces) = gathering.take() {
                    clocks += 1;
                    let mut tags: Vec<u64> = pieces.iter()
                        .map(|piece| u64::from_le_bytes(piece.payload[..].try_into().unwrap())).collect();
                    prop_assert!(tags.iter().is_sorted_by_key(|tag| *tag / 100));
                    tags.sort_unstable();
                    let expected: Vec<u64> = (0..workers)
                        .flat_map(|rank| (0..parts(rank)).map(move |part| u64::from(rank) * 100 + u64::from(part))).collect();
                    prop_assert_eq!(tags, expected);
                }
            }
            prop_assert_eq!((clocks, gathering.completed()), (4, 4));
        }
    }

    #[test]
    fn a_worker_that_begins_anew_replaces_what_it_left_unfinished() {
        let mut gathering = Gathering::new(2);
        assert_eq!(give(&mut gathering, 1, 0, [0, 3], 5), Verdict::Keep);
        assert_eq!(give(&mut gathering, 1, 0, [1, 2], 5), Verdict::Wrong);
        let (verdict, stale) = gathering.judge(1, 0, [0, 1], 6);
        assert_eq!((verdict, stale.len()), (Verdict::Keep, 1));
        gathering.keep(1, 0, [0, 1], 6, piece(0));
        assert_eq!((gathering.pushed(0), gathering.pushed(1)), (1, 0));
        assert_eq!(gathering.missing().collect::<Vec<_>>(), [1]);
        assert_eq!(give(&mut gathering, 1, 0, [0, 1], 7), Verdict::Duplicate);
        assert_eq!(give(&mut gathering, 5, 0, [0, 1], 7), Verdict::TooEarly);
    }
}
