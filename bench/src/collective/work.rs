//! Does: one collective with its buffers: fills them, calls it, looks at every element of the result, takes its time.

use clap::ValueEnum;
use gradwire_collectives::{Call, Collective, Communicator, DType, Piece, Reduction};
use gradwire_transport::{Rank, Region};
use half::bf16;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Calls that are not counted, after the one that is verified.
const WARM_UP: usize = 3;

/// A collective by its name; sums, and rank 0 as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // The names say it all.
pub(crate) enum Operation {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Reduce,
    AllToAll,
    Gather,
    Scatter,
    Barrier,
}

impl Operation {
    pub(crate) fn collective(self) -> Collective {
        let (op, root) = (Reduction::Sum, Rank(0));
        match self {
            Self::AllReduce => Collective::AllReduce { op },
            Self::ReduceScatter => Collective::ReduceScatter { op },
            Self::AllGather => Collective::AllGather,
            Self::Broadcast => Collective::Broadcast { root },
            Self::Reduce => Collective::Reduce { op, root },
            Self::AllToAll => Collective::AllToAll,
            Self::Gather => Collective::Gather { root },
            Self::Scatter => Collective::Scatter { root },
            Self::Barrier => Collective::Barrier,
        }
    }

    /// `all_reduce`.
    pub(crate) fn name(self) -> &'static str {
        self.collective().name()
    }

    /// busbw ÷ algbw, as nccl-tests has it: what a link moves for each byte of the largest buffer.
    pub(crate) fn bus_factor(self, ranks: u32) -> f64 {
        let n = f64::from(ranks);
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::Broadcast | Self::Reduce => 1.0,
            Self::Barrier => 0.0,
            _ => (n - 1.0) / n,
        }
    }

    /// Whether the largest buffer has a part for each rank.
    fn has_parts(self) -> bool {
        !matches!(self, Self::AllReduce | Self::Broadcast | Self::Reduce | Self::Barrier)
    }
}

/// The type of the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Element {
    /// 32-bit floats
    Float32,
    /// 16-bit floats with 8 bits of exponent
    Bfloat16,
}

impl Element {
    pub(crate) fn dtype(self) -> DType {
        if self == Self::Float32 { DType::F32 } else { DType::BF16 }
    }
}

/// What is to be done: `elements` are those of the largest buffer of a rank; element i of what rank r gives is
/// `(i + r) % modulus`, so that a wrong place and a wrong rank show, and every partial sum is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) operation: Operation,
    pub(crate) element: Element,
    pub(crate) elements: usize,
    pub(crate) modulus: usize,
}

impl Load {
    /// Of about `elements` elements: as many for each of `ranks` ranks, where each has a part, and at least one.
    pub(crate) fn new(operation: Operation, element: Element, elements: usize, ranks: u32) -> Self {
        let n = ranks as usize;
        let elements = match operation {
            Operation::Barrier => 0,
            _ if operation.has_parts() => (elements / n).max(1) * n,
            _ => elements.max(1),
        };
        // bfloat16 holds every whole number up to 256, and odd periods do not fit the lengths of parts.
        let modulus = if element == Element::Float32 { 97 } else { (256 / n).saturating_sub(1).max(1) };
        Self { operation, element, elements, modulus }
    }

    /// Bytes of the largest buffer.
    pub(crate) fn bytes(self) -> usize {
        self.elements * self.element.dtype().bytes()
    }

    fn values(self, rank: usize, range: Range<usize>) -> impl Iterator<Item = f32> {
        range.map(move |i| ((i + rank) % self.modulus) as f32)
    }

    /// What comes out on `rank`; `None` where it gets nothing.
    fn expected(self, rank: usize, ranks: usize) -> Option<Vec<f32>> {
        let part = self.elements / ranks;
        let sum = |range: Range<usize>| {
            range.map(|i| (0..ranks).map(|rank| ((i + rank) % self.modulus) as f32).sum()).collect()
        };
        let own = rank * part..(rank + 1) * part;
        Some(match self.operation {
            Operation::Barrier => return None,
            Operation::Reduce | Operation::Gather if rank != 0 => return None,
            Operation::AllReduce | Operation::Reduce => sum(0..self.elements),
            Operation::ReduceScatter => sum(own),
            Operation::Broadcast => self.values(0, 0..self.elements).collect(),
            Operation::Scatter => self.values(0, own).collect(),
            Operation::AllGather | Operation::Gather => {
                (0..ranks).flat_map(|from| self.values(from, 0..part)).collect()
            }
            Operation::AllToAll => (0..ranks).flat_map(|from| self.values(from, own.clone())).collect(),
        })
    }
}

/// A load with its buffers, on one rank.
pub(crate) struct Work<'a> {
    communicator: &'a Communicator,
    load: Load,
    call: Call,
    give: Option<Arc<Region>>,
    get: Option<Arc<Region>>,
}

impl<'a> Work<'a> {
    /// Gets the buffers ready.
    pub(crate) fn new(communicator: &'a Communicator, load: Load) -> Self {
        let (rank, n) = (communicator.rank().index(), communicator.world_size().get() as usize);
        let (part, width) = (load.elements / n, load.element.dtype().bytes());
        let root = rank == 0;
        let filled = |count: usize| Some(Region::from_vec(bytes(load.element, load.values(rank, 0..count))));
        let empty = |count: usize| Some(Region::zeroed(count * width));
        let (give, get) = match load.operation {
            Operation::Barrier => (None, None),
            Operation::AllReduce | Operation::Reduce | Operation::Broadcast => (None, filled(load.elements)),
            Operation::ReduceScatter => (filled(load.elements), empty(part)),
            Operation::AllGather => (filled(part), empty(load.elements)),
            Operation::AllToAll => (filled(load.elements), empty(load.elements)),
            Operation::Gather => (filled(part), empty(load.elements).filter(|_| root)),
            Operation::Scatter => (filled(load.elements).filter(|_| root), empty(part)),
        };
        let pieces = |region: &Option<Arc<Region>>| match region {
            None => vec![],
            Some(region) if load.operation == Operation::AllToAll => {
                let piece =
                    |at: usize| Piece { region: Arc::clone(region), range: at * part * width..(at + 1) * part * width };
                (0..n).map(piece).collect()
            }
            Some(region) => vec![Piece::whole(Arc::clone(region))],
        };
        let call = Call {
            collective: load.operation.collective(),
            dtype: load.element.dtype(),
            input: pieces(&give),
            output: pieces(&get),
            timeout: None,
        };
        Self { communicator, load, call, give, get }
    }

    /// Makes one call, looks at every element, and leaves zeros, which stay zeros however often they are summed.
    pub(crate) fn verify(&self) -> Result<(), Box<dyn Error>> {
        self.communicator.run(self.call.clone())?;
        let (rank, n) = (self.communicator.rank(), self.communicator.world_size().get() as usize);
        let expected = self.load.expected(rank.index(), n);
        if let (Some(get), Some(expected)) = (&self.get, expected) {
            let result = get.read(0..get.len())?;
            for (i, (got, expected)) in floats(self.load.element, &result).zip(expected).enumerate() {
                if got != expected {
                    let name = self.load.operation.name();
                    return Err(format!("{rank}: element {i} of {name} is {got}, not {expected}").into());
                }
            }
        }
        for region in [&self.give, &self.get].into_iter().flatten() {
            region.write(0..region.len())?.fill(0);
        }
        Ok(())
    }

    /// Seconds of each of `calls` calls on this rank, each after a barrier.
    pub(crate) fn times(&self, calls: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        let barrier =
            Call { collective: Collective::Barrier, dtype: DType::F32, input: vec![], output: vec![], timeout: None };
        let mut times = Vec::with_capacity(calls);
        for at in 0..calls + WARM_UP {
            self.communicator.run(barrier.clone())?;
            let call = self.call.clone();
            let began = Instant::now();
            self.communicator.run(call)?;
            if at >= WARM_UP {
                times.push(began.elapsed().as_secs_f64());
            }
        }
        Ok(times)
    }
}

/// Per call, the longest time of any rank.
pub(crate) fn longest(communicator: &Communicator, times: &[f64]) -> Result<Vec<f64>, Box<dyn Error>> {
    let region = Region::from_vec(times.iter().copied().flat_map(f64::to_le_bytes).collect());
    communicator.run(Call {
        collective: Collective::AllReduce { op: Reduction::Max },
        dtype: DType::F64,
        input: vec![],
        output: vec![Piece::whole(Arc::clone(&region))],
        timeout: None,
    })?;
    let bytes = region.read(0..region.len())?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|eight| f64::from_le_bytes(*eight)).collect())
}

fn bytes(element: Element, values: impl Iterator<Item = f32>) -> Vec<u8> {
    match element {
        Element::Float32 => values.flat_map(f32::to_le_bytes).collect(),
        Element::Bfloat16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

fn floats(element: Element, bytes: &[u8]) -> Box<dyn Iterator<Item = f32> + '_> {
    match element {
        Element::Float32 => Box::new(bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four))),
        Element::Bfloat16 => Box::new(bytes.as_chunks::<2>().0.iter().map(|two| bf16::from_le_bytes(*two).to_f32())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_have_a_part_for_each_rank_and_sums_that_are_exact() {
        for ranks in [1, 2, 3, 8, 64] {
            let load = Load::new(Operation::AllToAll, Element::Bfloat16, 1, ranks);
            assert_eq!(load.elements, ranks as usize);
            assert!((load.modulus - 1) * ranks as usize <= 256, "{load:?}");
            assert_eq!(Load::new(Operation::Broadcast, Element::Float32, 7, ranks).bytes(), 28);
        }
    }

    #[test]
    fn every_rank_expects_its_own_result() {
        let load = |operation| Load::new(operation, Element::Float32, 4, 2);
        assert_eq!(load(Operation::AllReduce).expected(1, 2).unwrap(), [1.0, 3.0, 5.0, 7.0]);
        assert_eq!(load(Operation::ReduceScatter).expected(1, 2).unwrap(), [5.0, 7.0]);
        assert_eq!(load(Operation::AllGather).expected(1, 2).unwrap(), [0.0, 1.0, 1.0, 2.0]);
        assert_eq!(load(Operation::AllToAll).expected(1, 2).unwrap(), [2.0, 3.0, 3.0, 4.0]);
        assert_eq!(load(Operation::Scatter).expected(1, 2).unwrap(), [2.0, 3.0]);
        assert_eq!(load(Operation::Gather).expected(1, 2), None);
    }
}
