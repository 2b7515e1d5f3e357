//! Pure: inputs whose memory lies within the outputs, though they came as regions of their own, whose ledgers do not know of
//! each other: as tensors that are views of one another do.

use crate::call::{Call, Piece};
use crate::{Collective, CollectiveError};
use gradwire_transport::Region;
use std::ops::Range;
use std::sync::Arc;

impl Call {
    /// The same call, whose inputs share no memory with its outputs, but for an all-gather that is given its own part of the
    /// output, which is then said to be that very piece. Other inputs that overlap are copied first.
    ///
    /// # Errors
    /// `Invalid` where another operation writes such an input.
    pub(crate) fn apart(mut self, rank: usize, size: usize) -> Result<Self, CollectiveError> {
        let own = self.own_part(rank, size);
        for at in 0..self.input.len() {
            let input = addresses(&self.input[at]);
            if !self.output.iter().map(addresses).any(|output| input.start < output.end && output.start < input.end) {
                continue;
            }
            self.input[at] = match &own {
                Some(own) if addresses(own) == input => own.clone(),
                _ => self.copied(&self.input[at])?,
            };
        }
        Ok(self)
    }

    /// Whether this rank gives what lies in its part of the output already.
    pub(crate) fn is_in_place(&self, rank: usize, size: usize) -> bool {
        let own = self.own_part(rank, size);
        own.zip(self.input.first()).is_some_and(|(own, input)| own.is(input) && !own.range.is_empty())
    }

    /// Where an all-gather puts what this rank gives.
    fn own_part(&self, rank: usize, size: usize) -> Option<Piece> {
        if self.collective != Collective::AllGather {
            return None;
        }
        match self.output.as_slice() {
            [all] if size > 1 => {
                let bytes = all.range.len() / size;
                let start = all.range.start + bytes * rank;
                Some(Piece { region: Arc::clone(&all.region), range: start..start + bytes })
            }
            parts => parts.get(rank).cloned(),
        }
    }

    fn copied(&self, piece: &Piece) -> Result<Piece, CollectiveError> {
        let bytes = piece.region.read(piece.range.clone()).map_err(|overlap| CollectiveError::Invalid {
            call: self.words(),
            reason: format!("{overlap}: give each operation under way memory of its own"),
        })?;
        Ok(Piece::whole(Region::from_vec(bytes.to_vec())))
    }
}

impl Piece {
    /// Whether both are the same bytes of the same region.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.region, &other.region) && self.range == other.range
    }
}

/// Where a piece lies; nothing overlaps an empty one.
fn addresses(piece: &Piece) -> Range<usize> {
    let start = piece.region.as_ptr() as usize + piece.range.start;
    start..start + piece.range.len()
}
