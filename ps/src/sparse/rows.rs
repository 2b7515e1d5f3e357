//! Pure: the rows of one shard of a sparse table: found by id, made, updated, read, evicted.

mod image;

pub(crate) use image::{Restore, RowsImage};

use super::admission::Sketch;
use super::arena::Arena;
use super::evicted::Evicted;
use super::gathering::Gathering;
use super::index::Index;
use super::initial::table_key;
use super::usage::Usage;
use super::{Batch, Ids, Initializer, SparseSpec};
use crate::bounded::Progress;
use crate::kernel::{self, Real, Step};
use crate::{Adam, Codec, DType, Mode, UpdateRule};
use hashbrown::HashTable;

/// Rows that are looked for at a time, so that the memory of many is on its way at once.
const AHEAD: usize = 32;
/// The most that one row takes beside its elements: index, marks, and their slack while they grow.
const MOST_EXTRA: u64 = 64;
/// Rows evicted at once for their age; the rest go with the next call.
const SWEEP: usize = 1 << 14;

/// The rows of a table, whatever they are computed in.
pub(crate) trait Rows: Restore + Send {
    /// Number of rows.
    fn len(&self) -> u64;
    /// Bytes taken.
    fn bytes(&self) -> u64;
    /// How many of `ids` have no row.
    fn absent(&self, ids: Ids<'_>) -> u64;
    /// Bytes that `more` new rows could take at most.
    fn bytes_for(&self, more: u64) -> u64;
    /// Makes the rows that are absent.
    fn make(&mut self, ids: Ids<'_>, now_ms: u64);
    /// Writes the row of each id to `out`, as `codec` does, or in the table's type; where there is none, what it would begin with.
    fn read(&self, ids: Ids<'_>, codec: Codec, out: &mut [u8]);
    /// Applies `rule`, for the table's `n`-th time, to the row of each id.
    fn apply(&mut self, rule: &UpdateRule, n: u64, batch: &Batch<'_>, divisor: f64, now_ms: u64);
    /// Adds a contribution to the sum that is being made.
    fn add(&mut self, batch: &Batch<'_>);
    /// Applies `rule` to the rows of the sum, in the order of their ids, and empties it.
    fn apply_sum(&mut self, rule: &UpdateRule, n: u64, divisor: f64, now_ms: u64);
    /// Evicts rows whose time is up.
    fn expire(&mut self, now_ms: u64);
    /// What was evicted, and how often an id was not admitted.
    fn told(&self) -> (&Evicted, u64);
}

/// No rows yet; [`least_bytes`] are set aside. `key`: any number that clients do not know.
pub(crate) fn new(spec: &SparseSpec, key: u64) -> Box<dyn Rows> {
    match spec.dtype {
        DType::F64 => Box::new(Store::<f64>::new(spec, key)),
        _ => Box::new(Store::<f32>::new(spec, key)),
    }
}

/// Bytes to set aside before a table of `spec` is made: where it has a capacity, all that it will take.
pub(crate) fn least_bytes(spec: &SparseSpec) -> u64 {
    let computed = if spec.dtype == DType::F64 { 8 } else { 4 };
    let [first, second] = spec.rule.state_of_row(spec.dim as usize);
    let row = ((spec.dim as usize + first + second) * computed) as u64 + MOST_EXTRA;
    let full = spec.share().map_or(0, |share| share.saturating_mul(row));
    let sketch = if spec.admission > 1 { Sketch::bytes_for(expected_rows(spec)) } else { 0 };
    let of_workers = match spec.mode {
        Mode::Sync { workers } => Gathering::bytes(workers),
        Mode::Ssp { workers, .. } => Progress::bytes(workers),
        Mode::Async => 0,
    };
    // A table costs something even while it holds nothing.
    full.saturating_add(sketch).saturating_add(8192 + of_workers)
}

/// About how many rows there will be.
fn expected_rows(spec: &SparseSpec) -> u64 {
    spec.share().unwrap_or(1 << 20)
}

/// `rule` at its `n`-th application. Adam is that of `torch.optim.SparseAdam`, which adds epsilon before it corrects the root.
fn step_of<C: Real>(rule: &UpdateRule, n: u64) -> Step<C> {
    let UpdateRule::Adam(adam) = *rule else { return Step::new(rule, n) };
    let correction = (1.0 - adam.beta2.powi(i32::try_from(n).unwrap_or(i32::MAX))).sqrt();
    Step::new(&UpdateRule::Adam(Adam { epsilon: adam.epsilon / correction, ..adam }), n)
}

/// Rows of elements that are computed as `C`: the values, then the optimizer's state, without a gap.
struct Store<C> {
    dtype: DType,
    dim: usize,
    state: [usize; 2],
    first_state: C,
    initializer: Initializer,
    table: u64,
    share: Option<u64>,
    index: Index,
    arena: Arena<C>,
    usage: Option<Usage>,
    sketch: Option<Sketch>,
    unadmitted: u64,
    evicted: Evicted,
    sum: Sum<C>,
}

/// Contributions of several clients, added up.
#[derive(Default)]
struct Sum<C> {
    slots: HashTable<u32>,
    ids: Vec<u64>,
    values: Vec<C>,
}

impl<C: Real> Store<C> {
    fn new(spec: &SparseSpec, key: u64) -> Self {
        let dim = usize::try_from(spec.dim).expect("the spec was checked");
        let state = spec.rule.state_of_row(dim);
        let share = spec.share();
        Self {
            dtype: spec.dtype,
            dim,
            state,
            first_state: C::of(spec.rule.first_state()),
            initializer: spec.initializer,
            table: table_key(spec.seed, spec.id()),
            share,
            index: Index::new(key),
            arena: Arena::new(dim + state[0] + state[1], share),
            usage: spec.eviction.map(|eviction| Usage::new(eviction, share.unwrap_or(0))),
            sketch: (spec.admission > 1).then(|| Sketch::new(spec.admission, expected_rows(spec), key)),
            unadmitted: 0,
            evicted: Evicted::default(),
            sum: Sum::default(),
        }
    }

    /// The row of `id` to be updated: made if need be; none where it is not admitted.
    fn used(&mut self, id: u64, now_ms: u64) -> Option<u32> {
        if let Some(row) = self.index.find(id) {
            if let Some(usage) = &mut self.usage {
                usage.touch(row, now_ms);
            }
            return Some(row);
        }
        let admitted = self.sketch.as_mut().is_none_or(|sketch| sketch.admits(id));
        if !admitted || !self.has_room() {
            self.unadmitted += 1;
            return None;
        }
        Some(self.insert(id, now_ms))
    }

    /// Whether one more row may be made, now or after an eviction.
    fn has_room(&mut self) -> bool {
        if self.share.is_none_or(|share| self.index.len() < share) {
            return true;
        }
        let weakest = self.usage.as_ref().and_then(Usage::weakest);
        weakest.inspect(|&(row, id)| self.evict(row, id)).is_some()
    }

    fn insert(&mut self, id: u64, now_ms: u64) -> u32 {
        let row = self.arena.take();
        let (value, state) = self.arena.row_mut(row).split_at_mut(self.dim);
        self.initializer.fill(self.table, id, value);
        state.fill(self.first_state);
        self.index.insert(id, row);
        if let Some(usage) = &mut self.usage {
            usage.begin(row, id, now_ms);
        }
        row
    }

    fn evict(&mut self, row: u32, id: u64) {
        self.index.remove(id);
        self.arena.give_back(row);
        self.evicted.push(id);
        if let Some(usage) = &mut self.usage {
            usage.end(row);
        }
    }

    fn update(&mut self, step: &Step<C>, row: u32, gradient: &mut [C], divisor: f64) {
        if divisor != 1.0 {
            let divisor = C::of(divisor);
            gradient.iter_mut().for_each(|gradient| *gradient = *gradient / divisor);
        }
        let (value, state) = self.arena.row_mut(row).split_at_mut(self.dim);
        let (first, second) = state.split_at_mut(self.state[0]);
        step.run(value, gradient, first, second);
    }

    /// Looks for the rows of `ids`, a block at a time, with the memory of the next block asked for before.
    fn in_blocks(&self, ids: Ids<'_>, mut each: impl FnMut(&[u64], &[Option<u32>])) {
        let mut blocks = ids.blocks::<AHEAD>();
        let mut next = blocks.next();
        next.iter().for_each(|(ids, count)| ids[..*count].iter().for_each(|&id| self.index.prefetch(id)));
        while let Some((ids, count)) = next {
            next = blocks.next();
            next.iter().for_each(|(ids, count)| ids[..*count].iter().for_each(|&id| self.index.prefetch(id)));
            let mut rows = [None; AHEAD];
            rows.iter_mut().zip(&ids[..count]).for_each(|(row, &id)| *row = self.index.find(id));
            each(&ids[..count], &rows[..count]);
        }
    }

    /// Writes one row, as `codec` does, or in the table's type.
    fn store(&self, id: u64, row: Option<u32>, codec: Codec, scratch: &mut (Vec<C>, Vec<f32>), out: &mut [u8]) {
        let (first, narrow) = scratch;
        let row = match row {
            Some(row) => &self.arena.row(row)[..self.dim],
            None => {
                self.initializer.fill(self.table, id, first);
                first
            }
        };
        if codec == Codec::Whole {
            return C::store(self.dtype, row, out);
        }
        narrow.iter_mut().zip(row).for_each(|(to, &value)| *to = value.into() as f32);
        codec.encode_values(narrow, out);
    }
}

impl<C: Real> Rows for Store<C> {
    fn len(&self) -> u64 {
        self.index.len()
    }

    fn bytes(&self) -> u64 {
        let sum = self.sum.slots.allocation_size() + 8 * self.sum.ids.capacity();
        let sum = sum + size_of::<C>() * self.sum.values.capacity();
        let marks = self.usage.as_ref().map_or(0, Usage::bytes) + self.sketch.as_ref().map_or(0, Sketch::bytes);
        self.arena.chunks() * self.arena.chunk_bytes() + self.index.bytes() + marks + sum as u64
    }

    fn absent(&self, ids: Ids<'_>) -> u64 {
        let mut absent = 0;
        self.in_blocks(ids, |_, rows| absent += rows.iter().filter(|row| row.is_none()).count());
        absent as u64
    }

    fn bytes_for(&self, more: u64) -> u64 {
        self.arena.chunks_for(more) * self.arena.chunk_bytes() + more * MOST_EXTRA
    }

    fn make(&mut self, ids: Ids<'_>, now_ms: u64) {
        for id in ids.iter() {
            if self.index.find(id).is_none() {
                self.insert(id, now_ms);
            }
        }
    }

    fn read(&self, ids: Ids<'_>, codec: Codec, out: &mut [u8]) {
        let mut out = out.chunks_exact_mut(codec.bytes(self.dim).unwrap_or(self.dim * self.dtype.bytes()));
        let mut scratch = (vec![C::default(); self.dim], vec![0.0; self.dim]);
        // A block's rows are on their way while the next one's are looked for.
        let mut before: ([u64; AHEAD], [Option<u32>; AHEAD], usize) = ([0; AHEAD], [None; AHEAD], 0);
        let mut flush = |(ids, rows, count): &([u64; AHEAD], [Option<u32>; AHEAD], usize)| {
            for ((id, row), out) in ids.iter().zip(rows).take(*count).zip(&mut out) {
                self.store(*id, *row, codec, &mut scratch, out);
            }
        };
        self.in_blocks(ids, |ids, rows| {
            rows.iter().flatten().for_each(|&row| kernel::prefetch(&self.arena.row(row)[..self.dim]));
            flush(&before);
            before.0[..ids.len()].copy_from_slice(ids);
            before.1[..ids.len()].copy_from_slice(rows);
            before.2 = ids.len();
        });
        flush(&before);
    }

    fn apply(&mut self, rule: &UpdateRule, n: u64, batch: &Batch<'_>, divisor: f64, now_ms: u64) {
        let step = step_of::<C>(rule, n);
        let mut gradient = vec![C::default(); self.dim];
        let mut rows = batch.rows.chunks_exact(self.dim * batch.dtype.bytes());
        for (ids, count) in batch.ids.blocks::<AHEAD>() {
            for row in ids[..count].iter().filter_map(|&id| self.index.find(id)) {
                kernel::prefetch(self.arena.row(row));
            }
            for (&id, bytes) in ids[..count].iter().zip(&mut rows) {
                if let Some(row) = self.used(id, now_ms) {
                    C::load(batch.dtype, bytes, &mut gradient);
                    self.update(&step, row, &mut gradient, divisor);
                }
            }
        }
    }

    fn add(&mut self, batch: &Batch<'_>) {
        let Sum { slots, ids, values } = &mut self.sum;
        let dim = self.dim;
        let each = dim * batch.dtype.bytes();
        let mut gradient = vec![C::default(); dim];
        for (id, bytes) in batch.ids.iter().zip(batch.rows.chunks_exact(each)) {
            C::load(batch.dtype, bytes, &mut gradient);
            let hash = super::initial::mix(id ^ self.table);
            if let Some(&slot) = slots.find(hash, |&slot| ids[slot as usize] == id) {
                let sum = &mut values[slot as usize * dim..(slot as usize + 1) * dim];
                sum.iter_mut().zip(&gradient).for_each(|(sum, gradient)| *sum += *gradient);
                continue;
            }
            let slot = u32::try_from(ids.len()).expect("a sum has fewer than 2^32 rows: memory ends before");
            ids.push(id);
            values.extend_from_slice(&gradient);
            slots.insert_unique(hash, slot, |&slot| super::initial::mix(ids[slot as usize] ^ self.table));
        }
    }

    fn apply_sum(&mut self, rule: &UpdateRule, n: u64, divisor: f64, now_ms: u64) {
        let step = step_of::<C>(rule, n);
        let mut sum = std::mem::take(&mut self.sum);
        // Which rows are made and evicted then depends on nothing but the ids.
        let mut order: Vec<u32> = (0..sum.ids.len() as u32).collect();
        order.sort_unstable_by_key(|&slot| sum.ids[slot as usize]);
        for slot in order {
            if let Some(row) = self.used(sum.ids[slot as usize], now_ms) {
                let at = slot as usize * self.dim;
                self.update(&step, row, &mut sum.values[at..at + self.dim], divisor);
            }
        }
        sum.slots.clear();
        sum.ids.clear();
        sum.values.clear();
        self.sum = sum;
    }

    fn expire(&mut self, now_ms: u64) {
        for _ in 0..SWEEP {
            let Some((row, id)) = self.usage.as_ref().and_then(|usage| usage.expired(now_ms)) else { return };
            self.evict(row, id);
        }
    }

    fn told(&self) -> (&Evicted, u64) {
        (&self.evicted, self.unadmitted)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cut, Eviction, Gradients};
    use super::*;
    use crate::{Adagrad, Combine, Mode, Sgd};
    use std::time::Duration;

    fn spec(rule: UpdateRule) -> SparseSpec {
        SparseSpec {
            name: "rows".into(),
            dim: 3,
            dtype: DType::F32,
            rule,
            mode: Mode::Async,
            combine: Combine::Sum,
            initializer: Initializer::Uniform { low: -1.0, high: 1.0 },
            seed: 1,
            capacity: None,
            eviction: None,
            admission: 1,
            recovery: crate::Recovery::None,
            compression: crate::Compression::NONE,
            max_grad_norm: None,
            shards: 1,
            shard: 0,
        }
    }

    fn bytes_of(ids: &[u64]) -> Vec<u8> {
        ids.iter().flat_map(|id| id.to_le_bytes()).collect()
    }

    fn read(rows: &dyn Rows, id: u64) -> [f32; 3] {
        let mut out = [0; 12];
        rows.read(Ids::known(&bytes_of(&[id])), Codec::Whole, &mut out);
        [0, 4, 8].map(|at| f32::from_le_bytes([out[at], out[at + 1], out[at + 2], out[at + 3]]))
    }

    /// Pushes `value` times the id to each of `ids`.
    fn push(rows: &mut dyn Rows, rule: UpdateRule, ids: &[u64], value: f32, now_ms: u64) {
        let gradients: Vec<u8> = ids.iter().flat_map(|&id| [value * id as f32; 3]).flat_map(f32::to_le_bytes).collect();
        let cut = Cut::new(&bytes_of(ids), 1);
        let mut payload = Vec::new();
        cut.payload(0..cut.len(), [0, 1], &Gradients { dtype: DType::F32, dim: 3, bytes: &gradients }, &mut payload);
        rows.apply(&rule, 1, &Batch::known(&payload, DType::F32, cut.len()), 1.0, now_ms);
    }

    #[test]
    fn a_row_is_what_it_would_begin_with_until_somebody_pushes() {
        let rule = UpdateRule::Sum;
        let mut rows = new(&spec(rule), 5);
        let before = read(&*rows, 70);
        assert_eq!((rows.len(), rows.bytes()), (0, 0));
        push(&mut *rows, rule, &[70, 3, 70], 0.5, 0);
        assert_eq!((rows.len(), read(&*rows, 70)), (2, before.map(|value| value + 70.0)));
        rows.make(Ids::known(&bytes_of(&[9])), 0);
        assert_eq!((rows.len(), read(&*rows, 9)), (3, read(&*new(&spec(rule), 6), 9)));
    }

    #[test]
    fn values_and_state_lie_side_by_side_and_rows_do_not_touch_each_other() {
        let rule = UpdateRule::Adagrad(Adagrad { learning_rate: 1.0, row_wise: true, ..Adagrad::default() });
        let mut rows = new(&spec(rule), 5);
        let ids: Vec<u64> = (0..3000).collect();
        let before: Vec<_> = ids.iter().map(|&id| read(&*rows, id)).collect();
        push(&mut *rows, rule, &ids, 2.0, 0);
        push(&mut *rows, rule, &[7], 2.0, 0);
        for (&id, before) in ids.iter().zip(before).skip(1) {
            // A step of g / sqrt(mean(g²)) = 1; after the second one sqrt(2) times less.
            let steps = if id == 7 { 1.0 + 1.0 / 2f32.sqrt() } else { 1.0 };
            for (after, before) in read(&*rows, id).into_iter().zip(before) {
                assert!((after - (before - steps)).abs() < 1e-5, "{id}");
            }
        }
    }

    #[test]
    fn a_full_table_evicts_what_was_used_least_and_tells_so() {
        let rule = UpdateRule::Sum;
        let lru = SparseSpec { capacity: Some(2), eviction: Some(Eviction::Lru), ..spec(rule) };
        let mut rows = new(&lru, 5);
        for id in [1, 2, 1, 3] {
            push(&mut *rows, rule, &[id], 1.0, 0);
        }
        assert_eq!((rows.len(), rows.told().0.since(0, 9)), (2, (0, vec![2], 1)));
        assert_eq!(read(&*rows, 2), read(&*new(&lru, 5), 2), "it begins anew");
        assert_ne!(read(&*rows, 1), read(&*new(&lru, 5), 1));
    }

    #[test]
    fn rows_live_as_long_as_they_are_used() {
        let rule = UpdateRule::Sum;
        let ttl = SparseSpec { eviction: Some(Eviction::Ttl(Duration::from_secs(1))), ..spec(rule) };
        let mut rows = new(&ttl, 5);
        push(&mut *rows, rule, &[1, 2], 1.0, 0);
        push(&mut *rows, rule, &[1], 1.0, 900);
        rows.expire(1_000);
        assert_eq!((rows.len(), rows.told().0.since(0, 9).1), (1, vec![2]));
        rows.expire(1_900);
        assert_eq!(rows.len(), 0);
    }

    #[test]
    fn an_id_gets_a_row_once_it_has_come_often_enough() {
        let rule = UpdateRule::Sgd(Sgd { learning_rate: 1.0, ..Sgd::default() });
        let mut rows = new(&SparseSpec { admission: 3, ..spec(rule) }, 5);
        let first = read(&*rows, 4);
        push(&mut *rows, rule, &[4], 1.0, 0);
        push(&mut *rows, rule, &[4, 5], 1.0, 0);
        assert_eq!((rows.len(), read(&*rows, 4), rows.told().1), (0, first, 3));
        push(&mut *rows, rule, &[4], 1.0, 0);
        assert_eq!((rows.len(), read(&*rows, 4)), (1, first.map(|value| value - 4.0)));
    }

    #[test]
    fn a_sum_of_contributions_is_applied_once_whatever_their_ids() {
        let rule = UpdateRule::Sum;
        let mut rows = new(&spec(rule), 5);
        let before = [1, 2, 3].map(|id| read(&*rows, id)[0]);
        for (ids, value) in [(vec![1u64, 2], 1.0f32), (vec![2, 3], 10.0)] {
            let mut payload = vec![0, 0, 0, 0, 1, 0, 0, 0];
            payload.extend(bytes_of(&ids));
            payload.extend(ids.iter().flat_map(|_| [value; 3]).flat_map(f32::to_le_bytes));
            rows.add(&Batch::known(&payload, DType::F32, 2));
        }
        rows.apply_sum(&rule, 1, 2.0, 0);
        let after = [1, 2, 3].map(|id| read(&*rows, id)[0]);
        assert_eq!(after, [before[0] + 0.5, before[1] + 5.5, before[2] + 5.0]);
        rows.apply_sum(&rule, 2, 2.0, 0);
        assert_eq!(after, [1, 2, 3].map(|id| read(&*rows, id)[0]));
    }
}
