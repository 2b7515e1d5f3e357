//! Pure: a shard made of the tensors of a file, of which nothing is trusted.

use super::layout::{Bytes, Layout, Source};
use super::{CLIENTS, Column, MARK, columns, field, named, tensors};
use crate::checkpoint::{BadCheckpoint, FRAME_BYTES, chunk_bytes, unframe};
use crate::chunk::{BadState, ChunkKind, PIECE_BYTES, chunk, open};
use crate::shard::Shard;
use crate::state::Builder;
use crate::values::{self, bytes_of};
use crate::{KeyRange, SparseSpec, TableSpec};
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::time::Instant;

/// What of a table is being read.
enum Table {
    Dense(TableSpec),
    Sparse(SparseSpec),
}

/// A file's tensors, read piece by piece.
struct File<'a>(Layout<'a>);

/// Makes the shard that `builder` is for out of a file. Beside the shard it holds the file's header, at most
/// [`MAX_HEADER_BYTES`](super::layout::MAX_HEADER_BYTES), and what is told to the builder at once, at most two chunks.
///
/// # Errors
/// What is wrong, and with which tensor: of a file that was cut, of another program, or changed so that it means nothing.
pub(crate) fn shard_of_file(source: &dyn Source, mut builder: Builder, now: Instant) -> Result<Shard, BadCheckpoint> {
    let file = File(Layout::read(source)?);
    let foreign = || BadCheckpoint::new("the file", "it was not written by `gradwire-ps export`");
    let told: serde_json::Value =
        serde_json::from_str(file.0.told.get(MARK).ok_or_else(foreign)?).map_err(|_| foreign())?;
    if told["version"] != 1 {
        let what = format!("it is of version {}, and this program reads version 1", told["version"]);
        return Err(BadCheckpoint::new("the file", what));
    }
    let tables = told["tables"].as_object().ok_or_else(foreign)?;
    file.replay(CLIENTS, |chunk| builder.take(chunk).map_err(|bad| BadCheckpoint::new(CLIENTS, bad)))?;
    for name in tables.keys() {
        file.table(name, &mut builder)?;
    }
    let mut shard = builder.finish().map_err(|bad| BadCheckpoint::new("the file", bad))?;
    file.check(&mut shard, tables.len(), now)?;
    Ok(shard)
}

impl File<'_> {
    /// Goes through the chunks in tensor `name`.
    fn replay(
        &self,
        name: &str,
        mut take: impl FnMut(&[u8]) -> Result<(), BadCheckpoint>,
    ) -> Result<(), BadCheckpoint> {
        let bytes = self.0.tensor(name, Dtype::U8)?;
        let wrong = |what: &str| BadCheckpoint::new(name, what);
        let (mut at, mut frame) = (0, Vec::new());
        while at < bytes.len() {
            frame.clear();
            bytes.append(at, FRAME_BYTES, &mut frame)?;
            let chunk = chunk_bytes(&frame).map_err(wrong)?;
            bytes.append(at + FRAME_BYTES as u64, chunk, &mut frame)?;
            let (chunk, taken) = unframe(&frame).map_err(wrong)?.ok_or_else(|| wrong("it ends too early"))?;
            take(chunk)?;
            at += taken as u64;
        }
        Ok(())
    }

    /// Tells a table to `builder` as a shard would, its numbers where they belong among the rest.
    fn table(&self, name: &str, builder: &mut Builder) -> Result<(), BadCheckpoint> {
        let state = named(name, "state");
        let wrong = |bad: BadState| BadCheckpoint::new(name, bad);
        let mut table = None;
        self.replay(&state, |chunk| {
            let (kind, _, mut body) = open(chunk).map_err(wrong)?;
            if let (ChunkKind::End, Some(Table::Sparse(spec))) = (kind, &table) {
                self.rows(spec, builder)?;
            }
            builder.take(chunk).map_err(wrong)?;
            match (kind, &table) {
                (ChunkKind::Dense, _) => {
                    table = Some(Table::Dense(TableSpec::decode(&mut body).map_err(|bad| wrong(bad.into()))?))
                }
                (ChunkKind::Sparse, _) => {
                    table = Some(Table::Sparse(SparseSpec::decode(&mut body).map_err(|bad| wrong(bad.into()))?));
                }
                (ChunkKind::Part, Some(Table::Dense(spec))) => {
                    let told = (body.number(), body.number());
                    let (Ok(start), Ok(count)) = told else {
                        return Err(BadCheckpoint::new(name, "a part ends too early"));
                    };
                    self.numbers(spec, KeyRange { start, end: start.saturating_add(count) }, builder)?;
                }
                _ => {}
            }
            Ok(())
        })
    }

    fn numbers(&self, spec: &TableSpec, keys: KeyRange, builder: &mut Builder) -> Result<(), BadCheckpoint> {
        for (known, _) in values::new(spec.dtype, &spec.rule, 1).image(false) {
            let (name, dtype) = field(spec, known);
            let each = bytes_of(known, spec.dtype) as u64;
            let bytes = self.0.tensor(&name, dtype)?;
            let short = || BadCheckpoint::new(&*name, "it has fewer elements than the table");
            let range = keys.start.checked_mul(each).zip(keys.end.checked_mul(each));
            let (start, end) = range.filter(|&(_, end)| end <= bytes.len()).ok_or_else(short)?;
            for at in (start..end).step_by(PIECE_BYTES) {
                let mut out = chunk(ChunkKind::Numbers, spec.id());
                bytes.append(at, (end - at).min(PIECE_BYTES as u64) as usize, &mut out.0)?;
                builder.take(&out.0).map_err(|bad| BadCheckpoint::new(&*name, bad))?;
            }
        }
        Ok(())
    }

    fn rows(&self, spec: &SparseSpec, builder: &mut Builder) -> Result<(), BadCheckpoint> {
        let (columns, record) = columns(spec);
        let all: Result<Vec<(Column, Bytes<'_>)>, BadCheckpoint> = columns
            .into_iter()
            .map(|column| Ok((column, self.0.tensor(&named(&spec.name, column.name), column.dtype)?)))
            .collect();
        let all = all?;
        let rows = all[0].1.len() / all[0].0.bytes as u64;
        if let Some((column, _)) =
            all.iter().find(|(column, bytes)| Some(bytes.len()) != rows.checked_mul(column.bytes as u64))
        {
            return Err(BadCheckpoint::new(
                named(&spec.name, column.name),
                format!("it has not {rows} rows, as its ids have"),
            ));
        }
        let at_once = (PIECE_BYTES / record).max(1);
        let mut piece = Vec::new();
        for first in (0..rows).step_by(at_once) {
            let count = (rows - first).min(at_once as u64) as usize;
            let mut out = chunk(ChunkKind::Rows, spec.id());
            let head = out.0.len();
            out.0.resize(head + count * record, 0);
            for (column, bytes) in &all {
                piece.clear();
                bytes.append(first * column.bytes as u64, count * column.bytes, &mut piece)?;
                let rows = out.0[head..].chunks_exact_mut(record).zip(piece.chunks_exact(column.bytes));
                rows.for_each(|(row, from)| row[column.offset..column.offset + column.bytes].copy_from_slice(from));
            }
            builder.take(&out.0).map_err(|bad| BadCheckpoint::new(spec.name.as_str(), bad))?;
        }
        Ok(())
    }

    /// What was made has the tensors of the file, of the same shapes, and no others.
    fn check(&self, shard: &mut Shard, tables: usize, now: Instant) -> Result<(), BadCheckpoint> {
        let images: Vec<_> = shard.table_ids().into_iter().filter_map(|id| shard.image(id, now)).collect();
        if images.len() != tables {
            return Err(BadCheckpoint::new(
                "the file",
                format!("it tells of {tables} tables, and holds {}", images.len()),
            ));
        }
        let clients = shard.members_chunks();
        let made: BTreeMap<String, Vec<usize>> =
            tensors(&images, &clients)?.into_iter().map(|(name, tensor)| (name, tensor.shape)).collect();
        if let Some(extra) = self.0.tensors.keys().find(|name| !made.contains_key(*name)) {
            return Err(BadCheckpoint::new(extra.as_str(), "no table has such a tensor"));
        }
        for (name, info) in &self.0.tensors {
            // What is not numbers may be told in another way.
            let free = name == CLIENTS || name.ends_with("::state");
            if let Some(shape) = made.get(name).filter(|shape| !free && **shape != info.shape) {
                let what = format!("its shape is {:?}, and the table's {shape:?}", info.shape);
                return Err(BadCheckpoint::new(name.as_str(), what));
            }
        }
        Ok(())
    }
}
