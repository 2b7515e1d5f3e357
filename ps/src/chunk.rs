//! Pure: a chunk of a shard's state: a version, a kind, a table's id (0: none), and a body.

use crate::TableId;
use crate::body::{BadBody, Reader, Writer};
use crate::refusal::Refusal;
use crate::shard_map::MAX_PART_BYTES;

/// The version that is written.
pub const VERSION: u8 = 3;
/// The longest chunk: what a table has beside its numbers may take as much as its longest part. A client's longest row
/// with its optimizer's state is shorter.
pub const MAX_CHUNK_BYTES: usize = 2 * MAX_PART_BYTES + (64 << 10);
/// Numbers in one chunk.
pub(crate) const PIECE_BYTES: usize = MAX_PART_BYTES;
/// Why bytes are not the state of a shard.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadState {
    /// Another version wrote it.
    #[error("it is of version {version}, and this program reads version {VERSION}: use the program that wrote it")]
    Version {
        /// The version that it says.
        version: u8,
    },
    /// It cannot be read.
    #[error(transparent)]
    Body(#[from] BadBody),
    /// What it tells does not fit what it told before.
    #[error("{subject}: {what}")]
    Contradiction {
        /// The table that it is about.
        subject: String,
        /// What does not fit.
        what: &'static str,
    },
    /// The table may not be here.
    #[error(transparent)]
    Refused(Box<Refusal>),
}

impl From<Refusal> for BadState {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

/// What a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ChunkKind {
    /// Clients.
    Members = 1,
    /// What a dense table is.
    Dense = 2,
    /// Which calls a part has counted.
    Part = 3,
    /// Numbers of a part.
    Numbers = 4,
    /// A contribution to a part that waits for its turn.
    Held = 5,
    /// What a sparse table is, and which calls it has counted.
    Sparse = 6,
    /// Ids that were evicted.
    Evicted = 7,
    /// Counts of ids that are not admitted yet.
    Sketch = 8,
    /// Rows with their ids.
    Rows = 9,
    /// A part of a push that waits for its clock.
    Piece = 10,
    /// Which parts of a push that is not whole have been applied.
    UnderWay = 11,
    /// The table is whole.
    End = 12,
}

impl ChunkKind {
    const ALL: [Self; 12] = [
        Self::Members,
        Self::Dense,
        Self::Part,
        Self::Numbers,
        Self::Held,
        Self::Sparse,
        Self::Evicted,
        Self::Sketch,
        Self::Rows,
        Self::Piece,
        Self::UnderWay,
        Self::End,
    ];
}

/// Begins a chunk.
pub(crate) fn chunk(kind: ChunkKind, table: TableId) -> Writer {
    let mut out = Writer::default();
    out.byte(VERSION);
    out.byte(kind as u8);
    out.number(table.0);
    out
}

/// Reads a chunk's beginning.
pub(crate) fn open(bytes: &[u8]) -> Result<(ChunkKind, TableId, Reader<'_>), BadState> {
    if bytes.len() > MAX_CHUNK_BYTES {
        return Err(BadBody("a chunk is too long").into());
    }
    let mut from = Reader(bytes);
    let version = from.byte()?;
    if version != VERSION {
        return Err(BadState::Version { version });
    }
    let kind = from.byte()?;
    let kind = ChunkKind::ALL.into_iter().find(|known| *known as u8 == kind).ok_or(BadBody("no such kind of chunk"))?;
    Ok((kind, TableId(from.number()?), from))
}
