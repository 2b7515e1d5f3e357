//! Pure: the ids and rows of a call: cut by shard and summed where an id comes twice before they travel, read after.

use super::initial::mix;
use super::spec::SparseSpec;
use crate::DType;
use crate::header::Header;
use crate::kernel::Real;
use crate::refusal::{Reason, Refusal};
use crate::shard_map::MAX_PART_BYTES;

/// Parts that one push may be cut into for one shard: about 1 GiB of gradients.
pub(crate) const MAX_PARTS: u32 = 1 << 12;
/// What a payload begins with: the number of its part, and of all parts.
pub(crate) const PART_BYTES: usize = 8;
pub(super) const ID_BYTES: usize = 8;

/// The shard that holds the row of `id`.
pub fn shard_of(id: u64, shards: u32) -> u32 {
    ((u128::from(mix(id)) * u128::from(shards)) >> 64) as u32
}

/// Ids as they travel, each once and in ascending order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids<'a>(&'a [[u8; ID_BYTES]]);

impl<'a> Ids<'a> {
    /// The ids of a pull, which is the whole of `payload`.
    pub(crate) fn of_pull(payload: &'a [u8], header: &Header, spec: &SparseSpec) -> Result<Self, Refusal> {
        let (count, row) = (header.keys.len(), spec.answer_row_bytes(header) as u64);
        if count.checked_mul(row).is_none_or(|bytes| bytes > MAX_PART_BYTES as u64) {
            let expected = format!("at most {MAX_PART_BYTES} bytes of rows");
            return Err(malformed(spec, "ids", expected, format!("{count} rows of {row} bytes")));
        }
        if count.checked_mul(ID_BYTES as u64) != Some(payload.len() as u64) {
            let got = format!("{} bytes", payload.len());
            return Err(malformed(spec, "payload", format!("{count} ids"), got));
        }
        Self::checked(payload, spec)
    }

    /// Ids of which the length has been checked.
    fn checked(payload: &'a [u8], spec: &SparseSpec) -> Result<Self, Refusal> {
        let ids = Self(payload.as_chunks().0);
        if !ids.iter().is_sorted_by(|before, after| before < after) {
            return Err(malformed(spec, "ids", "each once, ascending".to_owned(), "others".to_owned()));
        }
        if let Some(id) = ids.iter().find(|&id| shard_of(id, spec.shards) != spec.shard) {
            let expected = format!("those of shard {} of {}", spec.shard, spec.shards);
            return Err(malformed(spec, "ids", expected, format!("{id}, of another")));
        }
        Ok(ids)
    }

    /// Ids that were checked when they came.
    pub(crate) fn known(payload: &'a [u8]) -> Self {
        Self(payload.as_chunks().0)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The ids, up to `N` at a time, with how many there are of them.
    pub(crate) fn blocks<const N: usize>(&self) -> impl Iterator<Item = ([u64; N], usize)> + use<'a, N> {
        self.0.chunks(N).map(|chunk| {
            let mut ids = [0; N];
            ids.iter_mut().zip(chunk).for_each(|(to, &id)| *to = u64::from_le_bytes(id));
            (ids, chunk.len())
        })
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = u64> + use<'a> {
        self.0.iter().map(|&id| u64::from_le_bytes(id))
    }
}

/// One part of a push.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) part: u32,
    pub(crate) parts: u32,
    pub(crate) ids: Ids<'a>,
    pub(crate) dtype: DType,
    /// A gradient for each id.
    pub(crate) rows: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Reads a payload; nothing of it is trusted, and no memory is taken.
    pub(crate) fn of(payload: &'a [u8], header: &Header, spec: &SparseSpec) -> Result<Self, Refusal> {
        let Some(dtype) = header.dtype.filter(|dtype| dtype.pushes_to(spec.dtype)) else {
            let got = header.dtype.map_or("none", |dtype| dtype.name());
            return Err(Refusal::new(Reason::Mismatch, spec.subject(), "dtype", spec.dtype, got));
        };
        let each = ID_BYTES as u64 + spec.dim * dtype.bytes() as u64;
        let expected = header.keys.len().checked_mul(each).and_then(|bytes| bytes.checked_add(PART_BYTES as u64));
        if expected != Some(payload.len() as u64) {
            let expected = format!("{} rows of {each} bytes with their ids", header.keys.len());
            return Err(malformed(spec, "payload", expected, format!("{} bytes", payload.len())));
        }
        let batch = Self::known(payload, dtype, header.keys.len() as usize);
        if batch.parts > MAX_PARTS || batch.part >= batch.parts {
            let got = format!("part {} of {}", batch.part, batch.parts);
            return Err(malformed(spec, "part", format!("one of at most {MAX_PARTS}"), got));
        }
        Ids::checked(batch.ids.0.as_flattened(), spec)?;
        Ok(batch)
    }

    /// A payload that was checked when it came.
    pub(crate) fn known(payload: &'a [u8], dtype: DType, count: usize) -> Self {
        let (head, rest) = payload.split_at(PART_BYTES);
        let (ids, rows) = rest.split_at(count * ID_BYTES);
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        Self { part: number(0), parts: number(4), ids: Ids::known(ids), dtype, rows }
    }
}

fn malformed(spec: &SparseSpec, what: &str, expected: String, got: String) -> Refusal {
    Refusal::new(Reason::Malformed, spec.subject(), what, expected, got)
}

/// The ids of a call, each once, by shard and then ascending.
pub(crate) struct Cut {
    /// Where each id lies in the call: its shard, itself, its place. Sorted.
    places: Vec<(u32, u64, u32)>,
    /// Where in `places` each id begins, and one past the last.
    starts: Vec<u32>,
    /// Where among the ids each shard begins, and one past the last.
    shards: Vec<usize>,
}

impl Cut {
    /// Cuts the ids of a call, 8 bytes each. There are fewer than 2^32.
    pub(crate) fn new(ids: &[u8], shards: u32) -> Self {
        let each = (0u32..).zip(ids.as_chunks().0);
        let mut places: Vec<(u32, u64, u32)> = each
            .map(|(place, &id)| (shard_of(u64::from_le_bytes(id), shards), u64::from_le_bytes(id), place))
            .collect();
        places.sort_unstable();
        let mut starts: Vec<u32> = Vec::with_capacity(places.len() + 1);
        let mut of_shards = vec![0];
        for (at, &(shard, id, _)) in places.iter().enumerate() {
            if at == 0 || (places[at - 1].0, places[at - 1].1) != (shard, id) {
                of_shards.resize(shard as usize + 1, starts.len());
                starts.push(at as u32);
            }
        }
        of_shards.resize(shards as usize + 1, starts.len());
        starts.push(places.len() as u32);
        Self { places, starts, shards: of_shards }
    }

    /// Number of different ids.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The ids of a shard, as places among all.
    pub(crate) fn of_shard(&self, shard: u32) -> std::ops::Range<usize> {
        self.shards[shard as usize]..self.shards[shard as usize + 1]
    }

    /// The `n`-th id.
    pub(crate) fn id(&self, n: usize) -> u64 {
        self.places[self.starts[n] as usize].1
    }

    /// The places of the `n`-th id in the call.
    fn places(&self, n: usize) -> impl Iterator<Item = usize> + '_ {
        self.places[self.starts[n] as usize..self.starts[n + 1] as usize].iter().map(|&(.., place)| place as usize)
    }

    /// The payload of part `part` of `parts`: ids `range` and for each the sum of its gradients, in the order of the call.
    pub(crate) fn payload(
        &self,
        range: std::ops::Range<usize>,
        part: [u32; 2],
        from: &Gradients<'_>,
        out: &mut Vec<u8>,
    ) {
        part.into_iter().for_each(|number| out.extend(number.to_le_bytes()));
        range.clone().for_each(|n| out.extend(self.id(n).to_le_bytes()));
        match from.dtype {
            DType::F64 => self.sums::<f64>(range, from, out),
            _ => self.sums::<f32>(range, from, out),
        }
    }

    fn sums<C: Real>(&self, range: std::ops::Range<usize>, from: &Gradients<'_>, out: &mut Vec<u8>) {
        let (mut sum, mut next) = (vec![C::default(); from.dim], vec![C::default(); from.dim]);
        for n in range {
            let mut places = self.places(n);
            let first = from.row(places.next().unwrap_or(0));
            let Some(second) = places.next() else {
                out.extend_from_slice(first);
                continue;
            };
            C::load(from.dtype, first, &mut sum);
            for place in std::iter::once(second).chain(places) {
                C::load(from.dtype, from.row(place), &mut next);
                sum.iter_mut().zip(&next).for_each(|(sum, next)| *sum += *next);
            }
            let start = out.len();
            out.resize(start + first.len(), 0);
            C::store(from.dtype, &sum, &mut out[start..]);
        }
    }

    /// Copies rows, one for each id in our order, to where the call wants them.
    pub(crate) fn scatter(&self, rows: &[u8], row_bytes: usize, out: &mut [u8]) {
        for (n, row) in rows.chunks_exact(row_bytes).enumerate() {
            for place in self.places(n) {
                out[place * row_bytes..(place + 1) * row_bytes].copy_from_slice(row);
            }
        }
    }
}

/// The gradients of a call, one for each of its ids.
pub(crate) struct Gradients<'a> {
    pub(crate) dtype: DType,
    pub(crate) dim: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Gradients<'a> {
    fn row(&self, place: usize) -> &'a [u8] {
        let bytes = self.dim * self.dtype.bytes();
        &self.bytes[place * bytes..(place + 1) * bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn every_row_arrives_at_the_shard_of_its_id_summed_in_the_order_of_the_call(
            ids in proptest::collection::vec(0u64..30, 0..100), shards in 1u32..5,
        ) {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            // Numbers of which the sum depends on the order.
            let value = |place: usize| 1.0f32 / (place as f32 + 3.0) * 1e3f32.powi((place % 3) as i32);
            let rows: Vec<u8> = (0..ids.len()).flat_map(|n| [value(n), -value(n)]).flat_map(f32::to_le_bytes).collect();
            let mut expected: BTreeMap<u64, f32> = BTreeMap::new();
            for (place, id) in ids.iter().enumerate() {
                expected.entry(*id).and_modify(|sum| *sum += value(place)).or_insert(value(place));
            }
            let cut = Cut::new(&bytes, shards);
            prop_assert_eq!(cut.len(), expected.len());
            let mut seen = 0;
            let mut pulled = Vec::new();
            for shard in 0..shards {
                let range = cut.of_shard(shard);
                let mut payload = Vec::new();
                let from = Gradients { dtype: DType::F32, dim: 2, bytes: &rows };
                cut.payload(range.clone(), [3, 4], &from, &mut payload);
                let batch = Batch::known(&payload, DType::F32, range.len());
                prop_assert_eq!((batch.part, batch.parts, batch.ids.len()), (3, 4, range.len()));
                prop_assert!(batch.ids.iter().is_sorted_by(|before, after| before < after));
                for (id, row) in batch.ids.iter().zip(batch.rows.chunks(8)) {
                    prop_assert_eq!(shard_of(id, shards), shard);
                    let sum = f32::from_le_bytes([row[0], row[1], row[2], row[3]]);
                    prop_assert_eq!(sum.to_bits(), expected[&id].to_bits());
                    pulled.extend(id.to_le_bytes());
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, expected.len());
            let mut out = vec![0; bytes.len()];
            cut.scatter(&pulled, 8, &mut out);
            prop_assert_eq!(out, bytes);
        }
    }

    #[test]
    fn ids_are_spread_evenly_over_shards() {
        for shards in [2, 3, 7] {
            let mut counts = vec![0; shards as usize];
            (0..10_000).for_each(|id| counts[shard_of(id, shards) as usize] += 1);
            assert!(
                counts.iter().all(|&count| (count as f64 * f64::from(shards) / 1e4 - 1.0).abs() < 0.1),
                "{counts:?}"
            );
        }
    }
}
