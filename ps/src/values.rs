//! Pure: the numbers of one part of a dense table: value, optimizer state, and the sum that is being made.

use crate::exact_sum::ExactSum;
use crate::kernel::{self, BLOCK, Real, Step};
use crate::{DType, UpdateRule};
use gradwire_transport::{Region, RegionSlice, RegionSliceMut};
use std::sync::Arc;

/// A gradient as it arrived.
pub(crate) type Gradient<'a> = (DType, &'a [u8]);

/// What an update takes as the gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// The sum made so far and the last contribution, added in the same pass.
    SumAnd(Gradient<'a>),
    /// One contribution alone.
    Only(Gradient<'a>),
    /// The sum made so far, multiplied.
    Closed {
        /// By what.
        scale: f64,
    },
}

/// Numbers of a part that are kept, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// The value, in the table's type.
    Value,
    /// The value in full, where it is stored in fewer bits.
    Wide,
    /// The optimizer's first state.
    First,
    /// Its second state.
    Second,
    /// The sum of the clock under way.
    Sum,
}

/// Numbers as they were at one moment: shared with their part until that writes them, which it does in a copy.
#[derive(Debug)]
pub(crate) enum Numbers {
    Bytes(RegionSlice),
    F32(Arc<[f32]>),
    F64(Arc<[f64]>),
}

/// A type to compute in whose numbers can be shared.
trait Shared: Real {
    fn share(numbers: &Arc<[Self]>) -> Numbers;
}

impl Shared for f32 {
    fn share(numbers: &Arc<[Self]>) -> Numbers {
        Numbers::F32(Arc::clone(numbers))
    }
}

impl Shared for f64 {
    fn share(numbers: &Arc<[Self]>) -> Numbers {
        Numbers::F64(Arc::clone(numbers))
    }
}

impl Numbers {
    /// Appends bytes `range`, little-endian.
    pub(crate) fn append(&self, range: std::ops::Range<usize>, out: &mut Vec<u8>) {
        fn store<C: Real>(numbers: &[C], range: std::ops::Range<usize>, out: &mut Vec<u8>) {
            let (at, each) = (out.len(), size_of::<C>());
            out.resize(at + range.len(), 0);
            C::store(C::DTYPE, &numbers[range.start / each..range.end / each], &mut out[at..]);
        }
        match self {
            Self::Bytes(slice) => out.extend_from_slice(&slice[range]),
            Self::F32(numbers) => store(numbers, range, out),
            Self::F64(numbers) => store(numbers, range, out),
        }
    }

    /// Bytes in all.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Bytes(slice) => slice.len(),
            Self::F32(numbers) => 4 * numbers.len(),
            Self::F64(numbers) => 8 * numbers.len(),
        }
    }
}

/// Bytes that an element of `field` takes in a table of `dtype`.
pub(crate) const fn bytes_of(field: Field, dtype: DType) -> usize {
    match (field, dtype) {
        (Field::Value, _) | (_, DType::F64) => dtype.bytes(),
        _ => 4,
    }
}

/// The numbers of a part, whatever they are computed in.
pub(crate) trait Values: Send {
    /// What is kept, as it is now; the sum only where it is asked for. Cheap: nothing is copied until it is written.
    fn image(&self, with_sum: bool) -> Vec<(Field, Numbers)>;
    /// Writes elements of `field` from the `first` on; false where there are none such.
    fn put(&mut self, field: Field, first: usize, bytes: &[u8]) -> bool;
    /// `sum = gradient`.
    fn begin(&mut self, gradient: Gradient<'_>);
    /// `sum += gradient`.
    fn add(&mut self, gradient: Gradient<'_>);
    /// Applies `rule` for the `n`-th time, from 1, to the gradient divided by `divisor`.
    fn apply(&mut self, rule: &UpdateRule, n: u64, divisor: f64, source: Source<'_>);
    /// Keeps the gradient divided by `divisor` as the sum, and tells the exact sum of its squares (in 64 bits each).
    fn close(&mut self, divisor: f64, source: Source<'_>) -> ExactSum;
    /// Applies `rule` for the `n`-th time to the closed sum times `scale`.
    fn apply_closed(&mut self, rule: &UpdateRule, n: u64, scale: f64);
    /// Makes `bytes`, in the table's type, the value.
    fn write(&mut self, bytes: &[u8]);
    /// The same, of a part without any state: the `n`-th time that a rule is applied was the last one, and the next the first.
    fn restart(&mut self, bytes: &[u8], n: u64);
    /// The `n` from which the rule's times are counted.
    fn born(&self) -> u64;
    /// Counts the rule's times from the `n`-th on.
    fn set_born(&mut self, n: u64);
    /// How often the value has been written: tells one value from another.
    fn version(&self) -> u64;
    /// The value, in the table's type, as it is now: later updates leave these bytes alone.
    fn read(&self) -> RegionSlice;
}

/// The numbers of a part of `elements` elements of type `dtype`, all 0.
pub(crate) fn new(dtype: DType, rule: &UpdateRule, elements: usize) -> Box<dyn Values> {
    match dtype {
        DType::F64 => Box::new(Dense::<f64>::new(dtype, rule, elements)),
        _ => Box::new(Dense::<f32>::new(dtype, rule, elements)),
    }
}

/// Bytes that a part takes for each element at most: the value and its copy while it is read, state and sum.
pub(crate) fn bytes_per_element(dtype: DType, rule: &UpdateRule, sums: bool) -> u64 {
    let computed = if dtype == DType::F64 { 8 } else { 4 };
    let wide = usize::from(dtype.bytes() != computed);
    (2 * dtype.bytes() + computed * (wide + rule.state_per_element() + usize::from(sums))) as u64
}

struct Dense<C> {
    dtype: DType,
    elements: usize,
    version: u64,
    born: u64,
    value: Arc<Region>,
    /// Earlier values that were being sent when the next one was written.
    spare: Vec<Arc<Region>>,
    /// The value in full where it is stored in fewer bits.
    wide: Arc<[C]>,
    state: [Arc<[C]>; 2],
    sum: Arc<[C]>,
}

fn filled<C: Real>(first: C, elements: usize) -> Arc<[C]> {
    std::iter::repeat_n(first, elements).collect()
}

impl<C: Real> Dense<C> {
    fn new(dtype: DType, rule: &UpdateRule, elements: usize) -> Self {
        let filled = |first: f64, wanted: bool| filled(C::of(first), if wanted { elements } else { 0 });
        let (state, first) = (rule.state_per_element(), rule.first_state());
        Self {
            dtype,
            elements,
            version: 0,
            born: 0,
            value: Region::zeroed(elements * dtype.bytes()),
            spare: Vec::new(),
            wide: filled(0.0, dtype != C::DTYPE),
            state: [filled(first, state > 0), filled(first, state > 1)],
            sum: Arc::default(),
        }
    }

    /// The value, to write. Where it is being sent, a copy takes its place, so that neither waits for the other.
    fn writable(&mut self) -> RegionSliceMut {
        self.version += 1;
        let all = 0..self.value.len();
        if let Ok(slice) = self.value.write(all.clone()) {
            return slice;
        }
        let free = self.spare.iter().position(|region| region.write(all.clone()).is_ok());
        let fresh = match free {
            Some(at) => self.spare.swap_remove(at),
            None => Region::zeroed(all.end),
        };
        let before = std::mem::replace(&mut self.value, fresh);
        let mut slice = self.value.write(all.clone()).expect("nobody else knows this region");
        slice.copy_from_slice(&before.read(all).expect("it is only being read"));
        // Two are enough for a table whose readers keep up; slower readers keep theirs alive by themselves.
        if self.spare.len() < 2 {
            self.spare.push(before);
        }
        slice
    }
}

impl<C: Shared> Values for Dense<C> {
    fn image(&self, with_sum: bool) -> Vec<(Field, Numbers)> {
        let [first, second] = &self.state;
        let mut image = vec![(Field::Value, Numbers::Bytes(self.read()))];
        let kept = [(Field::Wide, &self.wide), (Field::First, first), (Field::Second, second)];
        let kept = kept.into_iter().chain(with_sum.then_some((Field::Sum, &self.sum)));
        image.extend(kept.filter(|(_, all)| !all.is_empty()).map(|(field, all)| (field, C::share(all))));
        image
    }

    fn put(&mut self, field: Field, first: usize, bytes: &[u8]) -> bool {
        let Self { wide, state: [one, two], sum, .. } = self;
        let numbers = match field {
            Field::Value => {
                let start = first * self.dtype.bytes();
                return match self.writable().get_mut(start..start + bytes.len()) {
                    Some(to) => {
                        to.copy_from_slice(bytes);
                        true
                    }
                    None => false,
                };
            }
            Field::Wide => wide,
            Field::First => one,
            Field::Second => two,
            Field::Sum => {
                if sum.is_empty() {
                    *sum = filled(C::default(), self.elements);
                }
                sum
            }
        };
        let to = Arc::make_mut(numbers).get_mut(first..first + bytes.len() / size_of::<C>());
        to.map(|to| C::load(C::DTYPE, bytes, to)).is_some()
    }

    fn begin(&mut self, (dtype, gradient): Gradient<'_>) {
        if self.sum.is_empty() {
            self.sum = filled(C::default(), self.elements);
        }
        kernel::begin(Arc::make_mut(&mut self.sum), dtype, gradient);
    }

    fn add(&mut self, (dtype, gradient): Gradient<'_>) {
        kernel::add(Arc::make_mut(&mut self.sum), dtype, gradient);
    }

    fn apply(&mut self, rule: &UpdateRule, n: u64, divisor: f64, source: Source<'_>) {
        let step = Step::<C>::new(rule, n.saturating_sub(self.born).max(1));
        let mut bytes = self.writable();
        let (mut value, mut gradient) = ([C::default(); BLOCK], [C::default(); BLOCK]);
        let [first, second] = self.state.each_mut().map(Arc::make_mut);
        let wide = Arc::make_mut(&mut self.wide);
        for start in (0..self.elements).step_by(BLOCK) {
            let end = self.elements.min(start + BLOCK);
            let gradient = &mut gradient[..end - start];
            gather(&self.sum, source, start..end, gradient);
            divide(gradient, divisor);
            let stored = &mut bytes[start * self.dtype.bytes()..end * self.dtype.bytes()];
            let block = |state: &[C]| if state.is_empty() { 0..0 } else { start..end };
            let (of_first, of_second) = (block(first), block(second));
            let (first, second) = (&mut first[of_first], &mut second[of_second]);
            if let Some(value) = C::in_place(self.dtype, stored) {
                step.run(value, gradient, first, second);
                continue;
            }
            let value = &mut value[..end - start];
            match wide.get(start..end) {
                Some(wide) => value.copy_from_slice(wide),
                None => C::load(self.dtype, stored, value),
            }
            step.run(value, gradient, first, second);
            if let Some(wide) = wide.get_mut(start..end) {
                wide.copy_from_slice(value);
            }
            C::store(self.dtype, value, stored);
        }
    }

    fn close(&mut self, divisor: f64, source: Source<'_>) -> ExactSum {
        if self.sum.is_empty() {
            self.sum = filled(C::default(), self.elements);
        }
        let all = Arc::make_mut(&mut self.sum);
        let (mut squares, mut gradient) = (ExactSum::default(), [C::default(); BLOCK]);
        for start in (0..self.elements).step_by(BLOCK) {
            let end = self.elements.min(start + BLOCK);
            let gradient = &mut gradient[..end - start];
            gather(all, source, start..end, gradient);
            divide(gradient, divisor);
            all[start..end].copy_from_slice(gradient);
            for value in gradient {
                let value: f64 = (*value).into();
                squares.add(value * value);
            }
        }
        squares
    }

    fn apply_closed(&mut self, rule: &UpdateRule, n: u64, scale: f64) {
        self.apply(rule, n, 1.0, Source::Closed { scale });
    }

    fn write(&mut self, bytes: &[u8]) {
        self.writable().copy_from_slice(bytes);
        if !self.wide.is_empty() {
            C::load(self.dtype, bytes, Arc::make_mut(&mut self.wide));
        }
    }

    fn restart(&mut self, bytes: &[u8], n: u64) {
        self.write(bytes);
        self.born = n;
    }

    fn born(&self) -> u64 {
        self.born
    }

    fn set_born(&mut self, n: u64) {
        self.born = n;
    }

    fn version(&self) -> u64 {
        self.version
    }

    fn read(&self) -> RegionSlice {
        self.value.read(0..self.value.len()).expect("a value is written within one call")
    }
}

fn divide<C: Real>(gradient: &mut [C], divisor: f64) {
    if divisor != 1.0 {
        let divisor = C::of(divisor);
        gradient.iter_mut().for_each(|gradient| *gradient = *gradient / divisor);
    }
}

/// The gradient of elements `range`, out of its source.
fn gather<C: Real>(sum: &[C], source: Source<'_>, range: std::ops::Range<usize>, to: &mut [C]) {
    let of = |(dtype, bytes): Gradient<'_>, to: &mut [C]| {
        C::load(dtype, &bytes[range.start * dtype.bytes()..range.end * dtype.bytes()], to);
    };
    match source {
        Source::Only(gradient) => of(gradient, to),
        Source::Closed { scale } => {
            let scale = C::of(scale);
            to.iter_mut().zip(&sum[range]).for_each(|(to, sum)| *to = *sum * scale);
        }
        Source::SumAnd(gradient) => {
            of(gradient, to);
            to.iter_mut().zip(&sum[range.clone()]).for_each(|(to, sum)| *to = *sum + *to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn bytes(floats: &[f32]) -> Vec<u8> {
        floats.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn every_source_and_block_gives_the_same_sum() {
        for elements in [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7] {
            let part = |n: usize| bytes(&(0..elements).map(|e| (e * n) as f32).collect::<Vec<_>>());
            let (one, two) = (part(1), part(2));
            let expected: Vec<f32> = (0..elements).map(|e| (3 * e) as f32 / 2.0).collect();
            let mut values = new(DType::F32, &UpdateRule::Replace, elements);
            values.begin((DType::F32, &one));
            values.apply(&UpdateRule::Replace, 1, 2.0, Source::SumAnd((DType::F32, &two)));
            assert_eq!(floats(&values.read()), expected);
            values.begin((DType::F32, &two));
            values.add((DType::F32, &two));
            values.add((DType::F32, &one));
            values.apply(&UpdateRule::Replace, 1, 4.0, Source::SumAnd((DType::F32, &one)));
            assert_eq!(floats(&values.read()), expected);
            values.apply(&UpdateRule::Sum, 2, 1.0, Source::Only((DType::F32, &one)));
            assert_eq!(floats(&values.read())[elements - 1], 2.5 * (elements - 1) as f32);
        }
    }

    #[test]
    fn a_value_that_is_being_read_stays_as_it_was() {
        let mut values = new(DType::F32, &UpdateRule::Sum, 3);
        let ones = bytes(&[1.0; 3]);
        let held: Vec<_> = (0..5)
            .map(|_| {
                let before = values.read();
                values.apply(&UpdateRule::Sum, 1, 1.0, Source::Only((DType::F32, &ones)));
                before
            })
            .collect();
        for (n, before) in held.iter().enumerate() {
            assert_eq!(floats(before), [n as f32; 3]);
        }
        assert_eq!(floats(&values.read()), [5.0; 3]);
    }

    #[test]
    fn a_short_type_loses_nothing_between_updates() {
        let mut values = new(DType::BF16, &UpdateRule::Sum, 1);
        let one = bf16::ONE.to_le_bytes();
        for _ in 0..1000 {
            values.apply(&UpdateRule::Sum, 1, 1.0, Source::Only((DType::BF16, &one)));
        }
        // Summed in eight bits it would stand still at 256.
        assert_eq!(values.read()[..], bf16::from_f32(1000.0).to_le_bytes());
        values.write(&bf16::from_f32(2.0).to_le_bytes());
        values.apply(&UpdateRule::Sum, 1, 1.0, Source::Only((DType::F32, &0.5f32.to_le_bytes())));
        assert_eq!(values.read()[..], bf16::from_f32(2.5).to_le_bytes());
    }
}
