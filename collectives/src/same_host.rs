//! Does: collectives of ranks on one host by the segment that they share: no messages, rounds that stay in cache.
//!
//! Every reduction adds in rank order, whatever the length and the round, and only its owner computes it: the same bits on
//! every rank, for every cut of the data.

mod moving;

use crate::call::Call;
use crate::chunk::chunk;
use crate::pieces::{part, within};
use crate::reduce::{UnsupportedReduction, finish, fold};
use crate::{Collective, DType, Fingerprint, Reduction};
use gradwire_transport::GroupSegment;
use gradwire_transport::shm::{Deadline, Storing, WaitError, Way, copy_streaming};
use gradwire_transport::{Rank, WorldSize};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Up to here what a rank gives goes with its step as a letter, and everybody folds everything: one step in all.
const SHORT_BYTES: usize = 8 << 10;
/// What stands before the parts in a letter, where ranks do not know each other's lengths: the longest that this one knows.
const LENGTH_BYTES: usize = 8;
/// From here on results go past the cache: they do not fit it, and an ordinary store would first read what it overwrites.
const STREAM_BYTES: usize = 512 << 10;

/// Why a collective stopped.
#[derive(Debug)]
pub(crate) enum Stopped<E> {
    /// While waiting.
    Wait(WaitError<E>),
    /// A rank called something else.
    Differs { rank: Rank, expected: u64, got: u64 },
    /// A rank would have given NaN.
    NotANumber { rank: Rank, element: u64 },
    /// A rank gave another as many bytes as that one did not await.
    Parts { sender: Rank, receiver: Rank, sent: u64, awaited: u64 },
    /// The reduction means nothing for the type.
    Unsupported(UnsupportedReduction),
}

impl<E> From<WaitError<E>> for Stopped<E> {
    fn from(error: WaitError<E>) -> Self {
        Self::Wait(error)
    }
}

impl<E> From<UnsupportedReduction> for Stopped<E> {
    fn from(error: UnsupportedReduction) -> Self {
        Self::Unsupported(error)
    }
}

/// What one collective is run with.
pub(crate) struct Turn<'a, E> {
    pub(crate) dtype: DType,
    pub(crate) fingerprint: u64,
    pub(crate) deadline: Deadline,
    pub(crate) idle: &'a mut dyn FnMut(&[Rank]) -> Result<(), E>,
    pub(crate) greeted: bool,
}

/// This rank's end of the group's segment.
pub(crate) struct SameHost {
    pub(crate) segment: GroupSegment,
    rank: Rank,
    world_size: WorldSize,
    storing: Storing,
    lap: Lap,
}

/// A round: how it is stored, and for how long it has kept this rank busy, where that is timed.
struct Lap {
    bytes: usize,
    way: Way,
    since: Option<Instant>,
    busy: Duration,
}

impl Lap {
    const IDLE: Self = Self { bytes: 0, way: Way { past: false, timed: false }, since: None, busy: Duration::ZERO };

    fn begin(bytes: usize, way: Way) -> Self {
        Self { bytes, way, since: way.timed.then(Instant::now), busy: Duration::ZERO }
    }

    /// From here on it waits for others.
    fn pause(&mut self) {
        self.busy += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }

    /// It waits no longer.
    fn resume(&mut self) {
        self.since = self.way.timed.then(Instant::now);
    }
}

type Done<E> = Result<(), Stopped<E>>;

impl SameHost {
    pub(crate) fn new(segment: GroupSegment, rank: Rank, world_size: WorldSize) -> Self {
        Self { segment, rank, world_size, storing: Storing::both(), lap: Lap::IDLE }
    }

    /// Whether this rank gives what lies in its part of the output already.
    pub(crate) fn is_in_place(&self, call: &Call) -> bool {
        call.is_in_place(self.rank.index(), self.world_size.get() as usize)
    }

    /// Carries out `collective`. `input` and `output` are as in `Call`: one piece, one a rank, or none; for an all-gather, none
    /// also where this rank's part of the output holds it already.
    pub(crate) fn run<E>(
        &mut self,
        collective: &Collective,
        input: &[&[u8]],
        output: &mut [&mut [u8]],
        mut turn: Turn<'_, E>,
    ) -> Done<E> {
        self.segment.arrive(turn.fingerprint);
        let turn = &mut turn;
        match *collective {
            Collective::AllReduce { op } => self.all_reduce(op, output[0], turn),
            Collective::Reduce { op, root } => self.reduce(op, root, output[0], turn),
            Collective::Broadcast { root } => self.broadcast(root, output[0], turn),
            Collective::AllGather => self.gather(None, input.first().copied(), output, turn),
            Collective::Gather { root } => self.gather(Some(root), input.first().copied(), output, turn),
            Collective::ReduceScatter { op } => self.reduce_scatter(op, input, output[0], turn),
            Collective::AllToAll => self.all_to_all(input, output, turn),
            Collective::Scatter { root } => self.scatter(root, input, output[0], turn),
            Collective::Barrier => self.step(turn),
        }?;
        // A collective of no elements takes its step too: that is how all learn that all called the same.
        if turn.greeted { Ok(()) } else { self.step(turn) }
    }

    /// A step of all; the first of a collective also tells whether all called the same.
    fn step<E>(&mut self, turn: &mut Turn<'_, E>) -> Done<E> {
        self.step_and(turn, || {})
    }

    /// The same; while this rank's word is on its way to the others, `own` does what needs none of them.
    fn step_and<E>(&mut self, turn: &mut Turn<'_, E>, own: impl FnOnce()) -> Done<E> {
        self.lap.pause();
        self.segment.step(&mut turn.deadline, turn.idle, own)?;
        self.lap.resume();
        if std::mem::replace(&mut turn.greeted, true) {
            return Ok(());
        }
        let said = |rank: Rank| self.segment.arrived(rank);
        let own = Fingerprint(turn.fingerprint);
        if own.nan().is_none() && self.world_size.ranks().all(|rank| said(rank) == turn.fingerprint) {
            return Ok(());
        }
        let gives_nan = |rank| Fingerprint(said(rank)).nan().map(|element| Stopped::NotANumber { rank, element });
        if let Some(stopped) = self.world_size.ranks().find_map(gives_nan) {
            return Err(stopped);
        }
        let count = |call: u64| self.world_size.ranks().filter(|&rank| said(rank) == call).count();
        // Most are taken to be right; at a tie, the lowest rank.
        let expected = self
            .world_size
            .ranks()
            .map(said)
            .fold(said(Rank(0)), |best, call| if count(call) > count(best) { call } else { best });
        let rank = self.world_size.ranks().find(|&rank| said(rank) != expected).unwrap_or(self.rank);
        Err(Stopped::Differs { rank, expected, got: said(rank) })
    }

    /// Begins what of `bytes` every rank both gives and takes: how it is stored is tried, now and then.
    fn begin(&mut self, bytes: usize) {
        self.lap = Lap::begin(bytes, self.storing.next(bytes));
    }

    /// Begins what of `bytes` only some give, or take: who gives would see but a half of what it costs.
    fn begin_one_sided(&mut self, bytes: usize) {
        self.lap = Lap::begin(bytes, Way { past: self.storing.past(bytes), timed: false });
    }

    /// Ends what was begun.
    fn end(&mut self) {
        self.lap.pause();
        let lap = std::mem::replace(&mut self.lap, Lap::IDLE);
        if lap.way.timed {
            self.storing.took(lap.bytes, lap.way.past, lap.busy);
        }
    }

    /// Ends a round of slots.
    fn end_round(&mut self) {
        self.end();
        self.segment.next_round();
    }

    /// Puts `bytes` into this rank's slot from `at` on.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        copy(self.segment.mine(at..at + bytes.len()), bytes, self.lap.way.past);
    }

    /// Puts `bytes` into this rank's letter from `at` on.
    fn write(&mut self, at: usize, bytes: &[u8]) {
        copy(&mut self.segment.letter(at + bytes.len())[at..], bytes, self.lap.way.past);
    }

    /// The pieces of `len` bytes that fit a slot, in whole elements.
    fn rounds(&self, len: usize, dtype: DType, share: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let most = (self.segment.slot_bytes() / share / 64 * 64).max(dtype.bytes()) / dtype.bytes() * dtype.bytes();
        (0..len).step_by(most).map(move |start| start..len.min(start + most))
    }

    /// Bytes of `rank`'s part of a round of `len` bytes.
    fn part(&self, len: usize, dtype: DType, rank: Rank) -> Range<usize> {
        let part = chunk(len / dtype.bytes(), self.world_size.get() as usize, rank.index());
        part.start * dtype.bytes()..part.end * dtype.bytes()
    }

    /// Where, in a slot of parts of `width` bytes, `writer` puts what is for `reader`: it has none for itself.
    fn place(writer: Rank, reader: Rank, width: usize) -> usize {
        (reader.index() - usize::from(reader > writer)) * width
    }

    fn others(&self) -> impl Iterator<Item = Rank> + Clone + use<> {
        let me = self.rank;
        self.world_size.ranks().filter(move |rank| *rank != me)
    }

    fn all_reduce<E>(&mut self, op: Reduction, buffer: &mut [u8], turn: &mut Turn<'_, E>) -> Done<E> {
        let (n, dtype) = (self.world_size.get() as usize, turn.dtype);
        if n == 1 {
            return Ok(finish(dtype, op, buffer, 1)?);
        }
        if buffer.len() <= SHORT_BYTES {
            if buffer.is_empty() {
                return Ok(());
            }
            self.begin(buffer.len());
            self.write(0, buffer);
            self.step(turn)?;
            let (letters, all) = (self.segment.letters(), 0..buffer.len());
            self.fold_all(op, dtype, |rank| letters.of(rank, all.clone()), buffer)?;
            self.end();
            return Ok(());
        }
        crate::reduce::check(dtype, op)?;
        if n == 2 && buffer.len() >= STREAM_BYTES {
            return self.exchange(op, buffer, turn);
        }
        let stream = buffer.len() >= STREAM_BYTES;
        for range in self.rounds(buffer.len(), dtype, 1) {
            let round = &mut buffer[range];
            let own = self.part(round.len(), dtype, self.rank);
            self.begin(round.len());
            for part in [0..own.start, own.end..round.len()] {
                self.put(part.start, &round[part]);
            }
            self.step(turn)?;
            self.fold_into_slot(op, dtype, &own, &mut round[own.clone()])?;
            self.step(turn)?;
            let others = self.segment.others();
            for rank in self.others() {
                let part = self.part(round.len(), dtype, rank);
                copy(&mut round[part.clone()], others.of(rank, part), stream);
            }
            self.end_round();
        }
        Ok(())
    }

    /// All-reduce of two ranks: each folds everything. As many bytes cross from core to core as where each folds a half, in half
    /// the steps, and every result is written once.
    fn exchange<E>(&mut self, op: Reduction, buffer: &mut [u8], turn: &mut Turn<'_, E>) -> Done<E> {
        for range in self.rounds(buffer.len(), turn.dtype, 1) {
            let all = 0..range.len();
            let round = &mut buffer[range];
            self.begin(round.len());
            self.put(0, round);
            self.step(turn)?;
            self.fold_others(op, turn.dtype, |_| all.clone(), round)?;
            self.end_round();
        }
        Ok(())
    }

    /// Folds the `slot` of each other rank with `own`, this rank's, in rank order into `own`.
    fn fold_others(
        &self,
        op: Reduction,
        dtype: DType,
        slot: impl Fn(Rank) -> Range<usize>,
        own: &mut [u8],
    ) -> Result<(), UnsupportedReduction> {
        let others = self.segment.others();
        self.fold_all(op, dtype, |rank| others.of(rank, slot(rank)), own)
    }

    /// Folds what each other rank gives with `own`, this rank's, in rank order into `own`.
    fn fold_all<'a>(
        &self,
        op: Reduction,
        dtype: DType,
        given: impl Fn(Rank) -> &'a [u8],
        own: &mut [u8],
    ) -> Result<(), UnsupportedReduction> {
        let (n, at) = (self.world_size.get() as usize, self.rank.index());
        let mut few: [&[u8]; 8] = [&[]; 8];
        if n <= few.len() {
            self.others().zip(&mut few).for_each(|(rank, input)| *input = given(rank));
            return fold(dtype, op, own, at, &few[..n - 1], None, n);
        }
        let many: Vec<&[u8]> = self.others().map(given).collect();
        fold(dtype, op, own, at, &many, None, n)
    }

    /// The same, where this rank's own result also goes to its slot, for the others to copy.
    fn fold_into_slot(
        &mut self,
        op: Reduction,
        dtype: DType,
        range: &Range<usize>,
        own: &mut [u8],
    ) -> Result<(), UnsupportedReduction> {
        self.fold_others(op, dtype, |_| range.clone(), own)?;
        self.put(range.start, own);
        Ok(())
    }

    fn reduce<E>(&mut self, op: Reduction, root: Rank, buffer: &mut [u8], turn: &mut Turn<'_, E>) -> Done<E> {
        let dtype = turn.dtype;
        crate::reduce::check(dtype, op)?;
        if self.world_size.get() == 1 {
            return Ok(finish(dtype, op, buffer, 1)?);
        }
        if buffer.len() <= SHORT_BYTES {
            if self.rank != root {
                self.begin_one_sided(buffer.len());
                self.write(0, buffer);
                return self.step(turn);
            }
            self.step(turn)?;
            let (letters, all) = (self.segment.letters(), 0..buffer.len());
            return Ok(self.fold_all(op, dtype, |rank| letters.of(rank, all.clone()), buffer)?);
        }
        for range in self.rounds(buffer.len(), dtype, 1) {
            let round = &mut buffer[range];
            let own = self.part(round.len(), dtype, self.rank);
            self.begin_one_sided(round.len());
            self.put(0, round);
            self.step(turn)?;
            if self.rank == root {
                self.fold_others(op, dtype, |_| own.clone(), &mut round[own.clone()])?;
            } else {
                // The others' own buffers stay as they are: the sum is made in a buffer of its own, then shown.
                let mut sum = round[own.clone()].to_vec();
                self.fold_into_slot(op, dtype, &own, &mut sum)?;
            }
            self.step(turn)?;
            if self.rank == root {
                let others = self.segment.others();
                for rank in self.others() {
                    let part = self.part(round.len(), dtype, rank);
                    round[part.clone()].copy_from_slice(others.of(rank, part));
                }
            }
            self.end_round();
        }
        Ok(())
    }

    fn reduce_scatter<E>(
        &mut self,
        op: Reduction,
        input: &[&[u8]],
        output: &mut [u8],
        turn: &mut Turn<'_, E>,
    ) -> Done<E> {
        let (n, dtype, size) = (self.world_size.get() as usize, turn.dtype, self.world_size);
        crate::reduce::check(dtype, op)?;
        let own = part(input, self.rank, size);
        if n == 1 {
            output.copy_from_slice(own);
            return Ok(finish(dtype, op, output, 1)?);
        }
        // Parts of different lengths are possible: all take the rounds of the longest.
        let longest = size.ranks().map(|rank| part(input, rank, size).len()).max().unwrap_or(0);
        let width = self.letter_width();
        if longest <= width {
            self.begin(longest);
            self.put_letter(input, width);
            self.step_and(turn, || output.copy_from_slice(own))?;
            let (letters, len) = (self.segment.letters(), output.len());
            let slot = |from| Self::place(from, self.rank, width);
            self.fold_all(op, dtype, |from| letters.of(from, slot(from)..slot(from) + len), output)?;
            self.end();
            return Ok(());
        }
        for range in self.rounds(longest, dtype, n - 1) {
            self.begin(range.len());
            self.put_parts(input, &range);
            let mine = within(&range, output.len());
            // The fold finds it in the cache.
            self.step_and(turn, || output[mine.clone()].copy_from_slice(&own[mine.clone()]))?;
            let slot = |from| {
                let at = Self::place(from, self.rank, range.len());
                at..at + mine.len()
            };
            self.fold_others(op, dtype, slot, &mut output[mine.clone()])?;
            self.end_round();
        }
        Ok(())
    }

    /// Bytes of the parts for other ranks that a letter has room for.
    fn letter_width(&self) -> usize {
        SHORT_BYTES / (self.world_size.get() as usize - 1).max(1)
    }

    /// Puts what is for each other rank into this rank's letter, in places of `width` bytes.
    fn put_letter(&mut self, input: &[&[u8]], width: usize) {
        for rank in self.others() {
            self.write(Self::place(self.rank, rank, width), part(input, rank, self.world_size));
        }
    }

    /// Puts what of `range` is for each other rank into this rank's slot.
    fn put_parts(&mut self, input: &[&[u8]], range: &Range<usize>) {
        for rank in self.others() {
            let part = part(input, rank, self.world_size);
            let theirs = within(range, part.len());
            let at = Self::place(self.rank, rank, range.len());
            self.put(at, &part[theirs]);
        }
    }
}

fn copy(into: &mut [u8], from: &[u8], stream: bool) {
    if stream { copy_streaming(into, from) } else { into.copy_from_slice(from) }
}
