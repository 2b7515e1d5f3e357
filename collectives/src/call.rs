//! Pure: a call of a collective, checked before anything is sent.

use crate::{Collective, CollectiveError, DType, Fingerprint, Place, Span};
use gradwire_transport::{Rank, Region, WorldSize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a region: a tensor, or a part of one.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The memory.
    pub region: Arc<Region>,
    /// Which bytes of it.
    pub range: Range<usize>,
}

impl Piece {
    /// All of `region`.
    pub fn whole(region: Arc<Region>) -> Self {
        let range = 0..region.len();
        Self { region, range }
    }
}

/// A collective to be carried out.
///
/// All-reduce, reduce and broadcast work in place in `output[0]`, with no input. All-gather and gather take `input[0]` and
/// fill one output per rank, of any lengths, or one output that holds all ranks' parts (gather: only at the root).
/// Reduce-scatter and scatter take one input per rank, or one that holds all (scatter: only at the root), and fill
/// `output[0]`. All-to-all takes and fills one piece per rank, of any lengths, or one that holds equal parts for all. Which of
/// the two a rank does is its own affair. Inputs may lie within outputs: all-gather takes its own part of the output as it is, all
/// else is copied first.
#[derive(Clone, Debug)]
pub struct Call {
    /// What to do.
    pub collective: Collective,
    /// Of which elements.
    pub dtype: DType,
    /// What this rank gives.
    pub input: Vec<Piece>,
    /// What this rank gets.
    pub output: Vec<Piece>,
    /// How long it may take; `None`: the group's time-out.
    pub timeout: Option<Duration>,
}

/// The call's buffers, and the elements that each rank's part has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers {
    input: Vec<Piece>,
    output: Vec<Piece>,
    scratch: Option<Arc<Region>>,
    element_bytes: usize,
}

/// What the schedule of a call is made from: elements per rank, where ranks have parts of their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Elements of the whole in-place buffer, or of this rank's part.
    pub(crate) len: usize,
    /// Elements that this rank gives each rank, or of each rank's part; empty where there are no parts.
    pub(crate) input: Vec<usize>,
    /// Elements that this rank gets from each rank; empty where there are no parts.
    pub(crate) output: Vec<usize>,
    /// Whether an all-to-all is packed: all parts of all ranks have `len` elements, by the callers' word.
    pub(crate) packed: bool,
    /// Whether only the ranks in this one's place on their hosts take part, one of each host.
    pub(crate) across: bool,
}

impl Shape {
    /// The most elements that a rank's part has: what ranks with parts of different lengths all know.
    pub(crate) fn longest(&self) -> usize {
        self.input.iter().chain(&self.output).copied().max().unwrap_or(0).max(self.len)
    }

    /// What all ranks must say the same of, for a call of this shape.
    pub(crate) fn fingerprint(&self, collective: &Collective, dtype: DType, ordered: bool) -> Fingerprint {
        let parts = if matches!(collective, Collective::AllGather) { &self.output } else { &self.input };
        match collective {
            Collective::Gather { .. } | Collective::Scatter { .. } | Collective::AllToAll => {
                Fingerprint::of(collective, dtype, 0, ordered)
            }
            _ if parts.iter().all(|part| *part == self.len) => Fingerprint::of(collective, dtype, self.len, ordered),
            _ => Fingerprint::of_unequal(collective, dtype, parts, ordered),
        }
    }

    /// The elements that go from rank `me` to rank `peer` and come from it, where only these two know.
    pub(crate) fn between(&self, collective: &Collective, me: Rank, peer: Rank) -> Option<(usize, usize)> {
        let of = |lens: &[usize]| lens.get(peer.index()).copied();
        match *collective {
            Collective::AllToAll if !self.packed => Some((of(&self.input)?, of(&self.output)?)),
            Collective::Gather { root } if root == me => Some((0, of(&self.output)?)),
            Collective::Gather { root } if root == peer => Some((self.len, 0)),
            Collective::Scatter { root } if root == me => Some((of(&self.input)?, 0)),
            Collective::Scatter { root } if root == peer => Some((0, self.len)),
            _ => None,
        }
    }
}

impl Call {
    /// The call in words, for errors.
    pub(crate) fn words(&self) -> String {
        format!("{} of {}", self.collective.name(), self.dtype.name())
    }

    /// Checks the pieces against the collective and tells the shape; nothing has been sent when this fails.
    pub(crate) fn shape(&self, rank: usize, world_size: WorldSize) -> Result<Shape, CollectiveError> {
        let size = world_size.get() as usize;
        if let Some(root) = self.collective.root()
            && !world_size.contains(root)
        {
            return Err(self.invalid(format!("root is {root}, but the group has {size} ranks")));
        }
        if let Some(op) = self.collective.reduction() {
            crate::reduce::check(self.dtype, op).map_err(|error| self.invalid(error.to_string()))?;
        }
        let root = self.collective.root().is_none_or(|root| root.index() == rank);
        // Also those that this collective does not look at.
        self.input.iter().try_for_each(|piece| self.check_piece("input", piece))?;
        self.output.iter().try_for_each(|piece| self.check_piece("output", piece))?;
        let only = |what: &str, pieces: &[Piece]| self.only(what, pieces);
        let parts = |what: &str, pieces: &[Piece]| self.parts(self.elements(pieces), what, size);
        Ok(match self.collective {
            Collective::Barrier => Shape { len: 0, input: vec![], output: vec![], packed: false, across: false },
            Collective::AllReduce { .. } | Collective::Reduce { .. } | Collective::Broadcast { .. } => Shape {
                len: only("output", &self.output)?,
                input: vec![],
                output: vec![],
                packed: false,
                across: false,
            },
            Collective::AllGather | Collective::Gather { .. } => {
                let len = only("input", &self.input)?;
                let output = if root { parts("output", &self.output)? } else { vec![] };
                self.same(len, output.get(rank), "input", "its own part of the output")?;
                Shape { len, input: vec![], output, packed: false, across: false }
            }
            Collective::ReduceScatter { .. } | Collective::Scatter { .. } => {
                let len = only("output", &self.output)?;
                let input = if root { parts("input", &self.input)? } else { vec![] };
                self.same(len, input.get(rank), "output", "its own part of the input")?;
                Shape { len, input, output: vec![], packed: false, across: false }
            }
            Collective::AllToAll => {
                let packed = size > 1 && self.input.len() == 1 && self.output.len() == 1;
                let lens = |what: &str, pieces: &[Piece]| match packed {
                    true => parts(what, pieces),
                    false => self.each(self.elements(pieces), what, size),
                };
                let (input, output) = (lens("input", &self.input)?, lens("output", &self.output)?);
                self.same(input[rank], output.get(rank), "input from itself", "output to itself")?;
                Shape { len: if packed { input[rank] } else { 0 }, input, output, packed, across: false }
            }
        })
    }

    fn check_piece(&self, what: &str, piece: &Piece) -> Result<(), CollectiveError> {
        let (bytes, len) = (self.dtype.bytes(), piece.range.len());
        if piece.range.end > piece.region.len() || len % bytes != 0 {
            return Err(self.invalid(format!(
                "{what} of {len} bytes is not a whole number of {bytes}-byte elements within its {} bytes of memory",
                piece.region.len()
            )));
        }
        Ok(())
    }

    /// The elements of each piece, which have been checked.
    fn elements(&self, pieces: &[Piece]) -> Vec<usize> {
        pieces.iter().map(|piece| piece.range.len() / self.dtype.bytes()).collect()
    }

    /// The elements of the one piece that there is to be.
    fn only(&self, what: &str, pieces: &[Piece]) -> Result<usize, CollectiveError> {
        match pieces {
            [piece] => Ok(piece.range.len() / self.dtype.bytes()),
            _ => Err(self.invalid(format!("takes one {what}, got {}", pieces.len()))),
        }
    }

    fn each(&self, lens: Vec<usize>, what: &str, size: usize) -> Result<Vec<usize>, CollectiveError> {
        if lens.len() == size {
            return Ok(lens);
        }
        Err(self.invalid(format!("takes one {what} for each of the {size} ranks, got {}", lens.len())))
    }

    fn parts(&self, lens: Vec<usize>, what: &str, size: usize) -> Result<Vec<usize>, CollectiveError> {
        match lens.as_slice() {
            [all] if all % size == 0 => Ok(vec![all / size; size]),
            [all] => Err(self.invalid(format!(
                "{what} of {all} elements cannot be cut into {size} equal parts: pad it, or give one {what} for each rank"
            ))),
            _ => self.each(lens, what, size),
        }
    }

    fn same(&self, len: usize, other: Option<&usize>, one: &str, two: &str) -> Result<(), CollectiveError> {
        match other {
            Some(&other) if other != len => {
                Err(self.invalid(format!("{one} has {len} elements, but {two} has {other}: they must be equal")))
            }
            _ => Ok(()),
        }
    }

    fn invalid(&self, reason: String) -> CollectiveError {
        CollectiveError::Invalid { call: self.words(), reason }
    }
}

impl Buffers {
    /// The call's buffers with `scratch` for the schedule.
    pub(crate) fn new(call: &Call, scratch: Option<Arc<Region>>) -> Self {
        Self { input: call.input.clone(), output: call.output.clone(), scratch, element_bytes: call.dtype.bytes() }
    }

    /// The memory of `span`, which lies within one piece (schedules never cross from one rank's part to another's).
    pub(crate) fn resolve(&self, span: Span) -> (&Arc<Region>, Range<usize>) {
        let (mut start, bytes) = (span.start * self.element_bytes, span.len * self.element_bytes);
        let pieces = match span.place {
            Place::Input => &self.input,
            Place::Output => &self.output,
            Place::Scratch => {
                let scratch = self.scratch.as_ref().expect("a schedule with scratch spans is given scratch");
                return (scratch, start..start + bytes);
            }
        };
        for piece in pieces {
            if start < piece.range.len() {
                let first = piece.range.start + start;
                assert!(start + bytes <= piece.range.len(), "a span lies within one piece");
                return (&piece.region, first..first + bytes);
            }
            start -= piece.range.len();
        }
        unreachable!("a span lies within the call's buffers, which were checked against the shape")
    }

    /// Whether both are the same memory.
    pub(crate) fn are_same(&self, one: Span, other: Span) -> bool {
        let ((one, bytes), (other, others)) = (self.resolve(one), self.resolve(other));
        Arc::ptr_eq(one, other) && bytes == others
    }

    /// Gives the scratch back for the next call.
    pub(crate) fn take_scratch(&mut self) -> Option<Arc<Region>> {
        self.scratch.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_checked_where_nobody_looks_at_them_too() {
        let piece = |bytes| Piece::whole(Region::zeroed(bytes));
        let beyond = Piece { range: 0..16, ..piece(8) };
        let (reduce, gather) =
            (Collective::AllReduce { op: crate::Reduction::Sum }, Collective::Gather { root: Rank(0) });
        for (collective, input, output) in [
            (reduce, piece(7), piece(8)),
            (reduce, beyond.clone(), piece(8)),
            (reduce, piece(8), piece(7)),
            (gather, piece(8), beyond),
            (gather, piece(8), piece(7)),
        ] {
            let call = Call { collective, dtype: DType::F32, input: vec![input], output: vec![output], timeout: None };
            let error = call.shape(1, WorldSize::new(2).unwrap()).unwrap_err().to_string();
            assert!(error.contains("is not a whole number of 4-byte elements within its"), "{error}");
        }
    }
}
