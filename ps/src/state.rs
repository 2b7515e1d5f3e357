//! Pure: what a shard holds, as chunks of bytes of bounded length, and back: for checkpoints and for copies.
//!
//! The chunks of a table follow each other: its head, then for a dense table each part with its numbers and the contributions
//! that wait; for a sparse one what it keeps beside its rows, then the rows; at last its end. The reader trusts nothing: what
//! is told must be what is still awaited.

mod builder;

pub use builder::Builder;

pub use crate::chunk::{BadState, MAX_CHUNK_BYTES, VERSION};

use crate::chunk::{ChunkKind, chunk};
use crate::dense::TableImage;
use crate::sparse::SparseImage;
use crate::{Mode, SparseSpec, TableId, TableSpec};

/// Clients in one chunk.
const CLIENTS: usize = 4096;

/// A table as it was at one moment. Its numbers are shared with the shard until that writes them.
pub enum Image {
    /// A dense table.
    Dense(Box<DenseState>),
    /// A sparse table.
    Sparse(Box<SparseState>),
}

/// A dense table as it was at one moment.
pub struct DenseState(pub(crate) TableImage);

/// A sparse table as it was at one moment.
pub struct SparseState(pub(crate) SparseImage);

type Chunks<'a> = Box<dyn Iterator<Item = Vec<u8>> + Send + 'a>;

self_cell::self_cell! {
    struct ChunksOf {
        owner: Image,
        #[not_covariant]
        dependent: Chunks,
    }
}

/// The chunks of an image that it keeps, made one at a time.
pub(crate) struct Telling(ChunksOf);

impl Iterator for Telling {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        self.0.with_dependent_mut(|_, chunks| chunks.next())
    }
}

impl Image {
    /// Its chunks, for whoever takes them over time.
    pub(crate) fn telling(self) -> Telling {
        Telling(ChunksOf::new(self, Image::chunks))
    }

    /// Its chunks, each at most [`MAX_CHUNK_BYTES`] long.
    pub fn chunks(&self) -> Chunks<'_> {
        match self {
            Self::Dense(state) => Box::new(state.0.chunks()),
            Self::Sparse(state) => Box::new(state.0.chunks()),
        }
    }

    /// The table.
    pub fn id(&self) -> TableId {
        TableId::of(self.name())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Dense(state) => &state.0.spec.name,
            Self::Sparse(state) => &state.0.spec.name,
        }
    }

    /// What it is, where it is dense.
    pub fn dense(&self) -> Option<&TableSpec> {
        if let Self::Dense(state) = self { Some(&state.0.spec) } else { None }
    }

    /// What it is, where it is sparse.
    pub fn sparse(&self) -> Option<&SparseSpec> {
        if let Self::Sparse(state) = self { Some(&state.0.spec) } else { None }
    }

    /// How its pushes meet.
    pub fn mode(&self) -> Mode {
        match self {
            Self::Dense(state) => state.0.spec.mode,
            Self::Sparse(state) => state.0.spec.mode,
        }
    }

    /// The last clock that was complete; in asynchronous mode, the pushes that had been applied.
    pub fn clock(&self) -> u64 {
        match self {
            Self::Dense(state) => state.0.completed(),
            Self::Sparse(state) => state.0.completed(),
        }
    }
}

/// The chunks that tell of clients.
pub(crate) fn members(members: &crate::members::Members) -> Vec<Vec<u8>> {
    let bodies = members.bodies(CLIENTS).into_iter();
    let chunk = |body: Vec<u8>| [chunk(ChunkKind::Members, TableId(0)).0, body].concat();
    bodies.map(chunk).collect()
}
