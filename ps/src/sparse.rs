//! Pure: sparse tables: rows by 64-bit id, made when they are first pushed to, and what they have in common.

mod admission;
mod arena;
mod batch;
mod clipping;
mod evicted;
mod gathering;
mod index;
mod initial;
mod packing;
mod rows;
mod spec;
mod table;
mod usage;

pub use batch::shard_of;
pub use initial::Initializer;
pub use spec::{Eviction, MAX_DIM, SparseSpec, open_sparse_body};

pub(crate) use batch::{Batch, Cut, Gradients, Ids, MAX_PARTS, PART_BYTES};
pub(crate) use clipping::{add_squares, scale_rows};
pub(crate) use packing::{Packing, unpack_rows};
pub(crate) use table::{Means, SparseBuilder, SparseImage, SparseTable};
