//! Pure: a shard as named tensors, and a shard made of them; with `exchange.rs` the home of `safetensors`.
//!
//! A table's values have its name; what else is kept of it has a name behind that: `w::exp_avg`. A sparse table is a tensor of
//! ids and tensors with a row for each. All that is not numbers lies as frames of chunks in `w::state`.

mod layout;
mod read;

pub(crate) use layout::{Source, header};
pub(crate) use read::shard_of_file;

use crate::checkpoint::{BadCheckpoint, FRAME_BYTES, frame};
use crate::chunk::{ChunkKind, open};
use crate::state::Image;
use crate::values::{Field, bytes_of};
use crate::{DType, SparseSpec, TableSpec, UpdateRule};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};

/// The key of what we say about a file of ours.
pub(crate) const MARK: &str = "gradwire";
/// The tensor that tells of clients.
const CLIENTS: &str = "::clients";
/// Before each row of a chunk: its id, its uses, and when it was used last.
const ID: Column = Column { name: "ids", dtype: Dtype::U64, offset: 0, bytes: 8, width: None };
const USES: Column = Column { name: "uses", dtype: Dtype::U32, offset: 8, bytes: 4, width: None };
const USED: Column = Column { name: "used", dtype: Dtype::U32, offset: 12, bytes: 4, width: None };

/// What lies at one place of each row.
#[derive(Clone, Copy)]
struct Column {
    /// What stands behind the table's name; empty for its values.
    name: &'static str,
    dtype: Dtype,
    offset: usize,
    bytes: usize,
    /// Numbers in it, where it is a row of them.
    width: Option<usize>,
}

/// A tensor, whose bytes are made when they are written, in pieces of at most a chunk.
pub(crate) struct Tensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
    make: Box<dyn Fn() -> Pieces<'a> + 'a>,
}

pub(crate) type Pieces<'a> = Box<dyn Iterator<Item = Vec<u8>> + 'a>;

impl<'a> Tensor<'a> {
    /// Its bytes, one piece after the other.
    pub(crate) fn pieces(&self) -> Pieces<'a> {
        (self.make)()
    }
}

const fn dtype_of(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// The type that a table of `dtype` is computed in.
const fn computed(dtype: DType) -> (Dtype, usize) {
    if matches!(dtype, DType::F64) { (Dtype::F64, 8) } else { (Dtype::F32, 4) }
}

/// What the states of `rule` are called where they are known, in PyTorch or in the paper.
const fn states(rule: &UpdateRule) -> [&'static str; 2] {
    match rule {
        UpdateRule::Adam(_) => ["exp_avg", "exp_avg_sq"],
        UpdateRule::Ftrl(_) => ["z", "n"],
        UpdateRule::Adagrad(_) => ["sum", ""],
        UpdateRule::Sgd(_) | UpdateRule::Sum | UpdateRule::Replace => ["momentum_buffer", ""],
    }
}

fn named(table: &str, what: &str) -> String {
    if what.is_empty() { table.to_owned() } else { format!("{table}::{what}") }
}

/// The name of a dense table's tensor, and its type.
fn field(spec: &TableSpec, field: Field) -> (String, Dtype) {
    let [first, second] = states(&spec.rule);
    let (what, dtype) = match field {
        Field::Value => ("", dtype_of(spec.dtype)),
        Field::Wide => ("full", computed(spec.dtype).0),
        Field::First => (first, computed(spec.dtype).0),
        Field::Second => (second, computed(spec.dtype).0),
        Field::Sum => ("sum_under_way", computed(spec.dtype).0),
    };
    (named(&spec.name, what), dtype)
}

/// What a row of a sparse table is made of, and its bytes.
fn columns(spec: &SparseSpec) -> (Vec<Column>, usize) {
    let (dtype, each) = computed(spec.dtype);
    let dim = spec.dim as usize;
    let widths = std::iter::once(dim).chain(spec.rule.state_of_row(dim));
    let [first, second] = states(&spec.rule);
    let (mut all, mut offset) = (vec![ID], USED.offset + USED.bytes);
    all.extend([USES, USED].into_iter().filter(|_| spec.eviction.is_some()));
    for (name, width) in ["", first, second].into_iter().zip(widths).filter(|(_, width)| *width > 0) {
        all.push(Column { name, dtype, offset, bytes: width * each, width: Some(width) });
        offset += width * each;
    }
    (all, offset)
}

/// All tensors of these tables and of `clients`.
///
/// # Errors
/// Where two tensors would have one name.
pub(crate) fn tensors<'a>(
    images: &'a [Image],
    clients: &'a [Vec<u8>],
) -> Result<Vec<(String, Tensor<'a>)>, BadCheckpoint> {
    let mut all = vec![(CLIENTS.to_owned(), framed(|| Box::new(clients.iter().cloned())))];
    for image in images {
        match image {
            Image::Dense(state) => {
                let spec = &state.0.spec;
                let shape: Vec<usize> = spec.shape.iter().map(|&size| size as usize).collect();
                let elements: usize = shape.iter().product();
                all.extend(state.0.fields().map(|(known, _)| {
                    let (name, dtype) = field(spec, known);
                    let bytes = elements * bytes_of(known, spec.dtype);
                    let make = move || -> Pieces<'a> {
                        let found = state.0.fields().find(|(field, _)| *field == known);
                        Box::new(found.into_iter().flat_map(|(_, parts)| parts))
                    };
                    (name, Tensor { dtype, shape: shape.clone(), bytes, make: Box::new(make) })
                }));
            }
            Image::Sparse(state) => {
                let (columns, record) = columns(&state.0.spec);
                let rows = usize::try_from(state.0.count()).unwrap_or(usize::MAX);
                all.extend(columns.into_iter().map(|column| {
                    let shape = std::iter::once(rows).chain(column.width).collect();
                    let (dtype, bytes) = (column.dtype, rows * column.bytes);
                    let make = move || column_of(image, column, record);
                    (named(image.name(), column.name), Tensor { dtype, shape, bytes, make: Box::new(make) })
                }));
            }
        }
        all.push((
            named(image.name(), "state"),
            framed(|| Box::new(image.chunks().filter(|chunk| !is_numbers(chunk)))),
        ));
    }
    let mut names = BTreeSet::new();
    match all.iter().find(|(name, _)| !names.insert(name.as_str())) {
        Some((name, _)) => Err(BadCheckpoint::new(name.as_str(), "two tensors would have this name: rename a table")),
        None => Ok(all),
    }
}

fn is_numbers(chunk: &[u8]) -> bool {
    matches!(open(chunk), Ok((ChunkKind::Numbers | ChunkKind::Rows, ..)))
}

/// A tensor of chunks. They are made twice, so that they need not be held: to know how long they are, and to be written.
fn framed<'a>(chunks: impl Fn() -> Pieces<'a> + 'a) -> Tensor<'a> {
    let bytes = chunks().map(|chunk| FRAME_BYTES + chunk.len()).sum();
    let make = move || -> Pieces<'a> {
        Box::new(chunks().map(|chunk| {
            let mut framed = Vec::with_capacity(FRAME_BYTES + chunk.len());
            frame(&chunk, &mut framed);
            framed
        }))
    };
    Tensor { dtype: Dtype::U8, shape: vec![bytes], bytes, make: Box::new(make) }
}

fn column_of(image: &Image, column: Column, record: usize) -> Pieces<'_> {
    Box::new(image.chunks().filter_map(move |chunk| {
        let (ChunkKind::Rows, _, mut body) = open(&chunk).ok()? else { return None };
        let rows = body.rest().chunks_exact(record);
        let of_column = rows.map(|row| &row[column.offset..column.offset + column.bytes]);
        Some(of_column.collect::<Vec<_>>().concat())
    }))
}

/// What is said about the file, for people and for [`shard_of_file`].
pub(crate) fn metadata(images: &[Image], checkpoint: &str) -> HashMap<String, String> {
    let tables = images.iter().map(|image| (image.name().to_owned(), about(image)));
    let tables: serde_json::Map<String, Value> = tables.collect();
    let told = json!({ "version": 1, "checkpoint": checkpoint, "tables": tables });
    HashMap::from([(MARK.to_owned(), told.to_string())])
}

fn about(image: &Image) -> Value {
    let (clock, mode) = (image.clock(), image.mode().to_string());
    match image {
        Image::Dense(state) => {
            let spec = &state.0.spec;
            json!({
                "kind": "dense", "clock": clock, "mode": mode, "shape": spec.shape, "dtype": spec.dtype.name(),
                "update_rule": spec.rule.to_string(), "combine": format!("{:?}", spec.combine).to_lowercase(),
                "clipped": spec.clipped, "compression": spec.compression.to_string(),
            })
        }
        Image::Sparse(state) => {
            let spec = &state.0.spec;
            json!({
                "kind": "sparse", "clock": clock, "mode": mode, "dim": spec.dim, "dtype": spec.dtype.name(),
                "rows": state.0.count(), "update_rule": spec.rule.to_string(), "capacity": spec.capacity,
                "combine": format!("{:?}", spec.combine).to_lowercase(), "initializer": spec.initializer.to_string(),
                "seed": spec.seed, "admission": spec.admission, "compression": spec.compression.to_string(),
                "max_grad_norm": spec.max_grad_norm,
            })
        }
    }
}
