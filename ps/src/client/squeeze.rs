//! Does: a table's gradients and values, shortened for the way; what gradients lose is kept for the next ones.

use super::pending::LastStep;
use crate::codec::{Codec, NotFinite};
use crate::dense::{narrow, widen};
use crate::memory::Shelf;
use crate::{DType, KeyRange};
use gradwire_transport::{Region, RegionSlice, RegionSliceMut};
use std::sync::Arc;

const OURS: &str = "nobody else holds this buffer";

/// One client's end of a compressed table.
#[derive(Default)]
pub(super) struct Squeeze {
    /// What the gradients so far have lost, an element each; empty where nothing is fed back.
    residual: Vec<f32>,
    /// A part's elements.
    block: Vec<f32>,
    shelf: Shelf,
}

impl Squeeze {
    /// The gradient of each part as `codec` writes it. On an error nothing has changed.
    pub(super) fn gradient(
        &mut self,
        codec: Codec,
        (dtype, gradient): (DType, &[u8]),
        parts: &[(u32, KeyRange)],
    ) -> Result<Vec<RegionSlice>, NotFinite> {
        if codec.feeds_back() {
            let finite = |bytes: &[u8], start: usize, block: &mut Vec<f32>| {
                block.resize(bytes.len() / dtype.bytes(), 0.0);
                narrow(dtype, bytes, block);
                let bad = block.iter().position(|value| !value.is_finite());
                bad.map_or(Ok(()), |at| Err(NotFinite { index: start + at, value: block[at] }))
            };
            for (at, bytes) in gradient.chunks(LOOK * dtype.bytes()).enumerate() {
                finite(bytes, at * LOOK, &mut self.block)?;
            }
            self.residual.resize(gradient.len() / dtype.bytes(), 0.0);
        }
        let (buffer, places) = self.room(codec, parts);
        for ((_, keys), place) in parts.iter().zip(&places) {
            let mut to = buffer.write(place.clone()).expect(OURS);
            let elements = keys.bytes(1);
            self.block.resize(elements.len(), 0.0);
            narrow(dtype, &gradient[keys.bytes(dtype.bytes())], &mut self.block);
            let residual = self.residual.get_mut(elements).unwrap_or(&mut []);
            codec.encode_gradient(&mut self.block, residual, &mut to)?;
        }
        Ok(places.into_iter().map(|place| buffer.read(place).expect("it is only read")).collect())
    }

    /// Where the encoded value of each part goes, and how it gets into `into` once all are there.
    pub(super) fn value(
        &mut self,
        codec: Codec,
        dtype: DType,
        parts: &Arc<[(u32, KeyRange)]>,
        mut into: RegionSliceMut,
    ) -> (Vec<RegionSliceMut>, LastStep) {
        let (buffer, places) = self.room(codec, parts);
        let targets = places.iter().map(|place| buffer.write(place.clone()).expect(OURS)).collect();
        let parts = Arc::clone(parts);
        let last_step = move || {
            let mut block = Vec::new();
            for ((_, keys), place) in parts.iter().zip(places) {
                let bytes = buffer.read(place).expect("all that was awaited has come");
                block.resize(keys.bytes(1).len(), 0.0);
                codec.decode(&bytes, &mut block);
                widen(dtype, &block, &mut into[keys.bytes(dtype.bytes())]);
            }
        };
        (targets, Box::new(last_step))
    }

    /// A buffer for all parts, and where each lies in it.
    fn room(&mut self, codec: Codec, parts: &[(u32, KeyRange)]) -> (Arc<Region>, Vec<std::ops::Range<usize>>) {
        let mut end = 0;
        let each = |(_, keys): &(u32, KeyRange)| {
            let start = end;
            end += codec.bytes(keys.bytes(1).len()).expect("what travels as it is was never handed over");
            start..end
        };
        let places: Vec<_> = parts.iter().map(each).collect();
        (self.shelf.take(end), places)
    }
}

/// Elements that are looked at together.
const LOOK: usize = 4096;
