//! Pure: a shard made of the tensors of a file, of which nothing is trusted.

use super::{CLIENTS, Column, MARK, columns, field, named, tensors};
use crate::checkpoint::{BadCheckpoint, unframe};
use crate::chunk::{BadState, ChunkKind, PIECE_BYTES, chunk, open};
use crate::shard::Shard;
use crate::state::Builder;
use crate::values::{self, bytes_of};
use crate::{KeyRange, SparseSpec, TableSpec};
use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensorError, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// What of a table is being read.
enum Table {
    Dense(TableSpec),
    Sparse(SparseSpec),
}

/// A file's tensors.
struct File<'a> {
    tensors: SafeTensors<'a>,
}

/// Makes the shard that `builder` is for out of the bytes of a file.
///
/// # Errors
/// What is wrong, and with which tensor: of a file that was cut, of another program, or changed so that it means nothing.
pub(crate) fn shard_of_file(bytes: &[u8], mut builder: Builder, now: Instant) -> Result<Shard, BadCheckpoint> {
    let whole = |error: SafeTensorError| {
        let what = match error {
            SafeTensorError::MetadataIncompleteBuffer | SafeTensorError::InvalidHeaderLength => {
                "it is not as long as it says: it was cut, or more was written behind it".to_owned()
            }
            other => format!("it is no safetensors file: {other}"),
        };
        BadCheckpoint::new("the file", what)
    };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(whole)?;
    let told = header.metadata().as_ref().and_then(|metadata| metadata.get(MARK));
    let foreign = || BadCheckpoint::new("the file", "it was not written by `gradwire-ps export`");
    let told: serde_json::Value = serde_json::from_str(told.ok_or_else(foreign)?).map_err(|_| foreign())?;
    if told["version"] != 1 {
        let what = format!("it is of version {}, and this program reads version 1", told["version"]);
        return Err(BadCheckpoint::new("the file", what));
    }
    let file = File { tensors: SafeTensors::deserialize(bytes).map_err(whole)? };
    let tables = told["tables"].as_object().ok_or_else(foreign)?;
    file.replay(CLIENTS, |chunk| builder.take(chunk).map_err(|bad| BadCheckpoint::new(CLIENTS, bad)))?;
    for name in tables.keys() {
        file.table(name, &mut builder)?;
    }
    let mut shard = builder.finish().map_err(|bad| BadCheckpoint::new("the file", bad))?;
    file.check(&mut shard, tables.len(), now)?;
    Ok(shard)
}

impl<'a> File<'a> {
    fn bytes(&self, name: &str, dtype: Dtype) -> Result<&'a [u8], BadCheckpoint> {
        let found = self.tensors.tensor(name).map_err(|_| BadCheckpoint::new(name, "the tensor is missing"))?;
        if found.dtype() != dtype {
            let what = format!("its type is {}, and must be {dtype}", found.dtype());
            return Err(BadCheckpoint::new(name, what));
        }
        Ok(found.data())
    }

    /// Goes through the chunks in tensor `name`.
    fn replay(
        &self,
        name: &str,
        mut take: impl FnMut(&[u8]) -> Result<(), BadCheckpoint>,
    ) -> Result<(), BadCheckpoint> {
        let mut rest = self.bytes(name, Dtype::U8)?;
        while let Some((chunk, taken)) = unframe(rest).map_err(|what| BadCheckpoint::new(name, what))? {
            take(chunk)?;
            rest = &rest[taken..];
        }
        if rest.is_empty() { Ok(()) } else { Err(BadCheckpoint::new(name, "it ends too early")) }
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
            let place = |key: u64| key.checked_mul(each).and_then(|at| usize::try_from(at).ok());
            let range = place(keys.start).zip(place(keys.end)).map(|(start, end)| start..end);
            let bytes = range.and_then(|range| self.bytes(&name, dtype).map(|bytes| bytes.get(range)).transpose());
            let bytes =
                bytes.unwrap_or_else(|| Err(BadCheckpoint::new(&*name, "it has fewer elements than the table")))?;
            for piece in bytes.chunks(PIECE_BYTES) {
                let mut out = chunk(ChunkKind::Numbers, spec.id());
                out.0.extend_from_slice(piece);
                builder.take(&out.0).map_err(|bad| BadCheckpoint::new(&*name, bad))?;
            }
        }
        Ok(())
    }

    fn rows(&self, spec: &SparseSpec, builder: &mut Builder) -> Result<(), BadCheckpoint> {
        let (columns, record) = columns(spec);
        let all: Result<Vec<(Column, &[u8])>, BadCheckpoint> = columns
            .into_iter()
            .map(|column| Ok((column, self.bytes(&named(&spec.name, column.name), column.dtype)?)))
            .collect();
        let all = all?;
        let rows = all[0].1.len() / all[0].0.bytes;
        if let Some((column, _)) =
            all.iter().find(|(column, bytes)| Some(bytes.len()) != column.bytes.checked_mul(rows))
        {
            return Err(BadCheckpoint::new(
                named(&spec.name, column.name),
                format!("it has not {rows} rows, as its ids have"),
            ));
        }
        let at_once = (PIECE_BYTES / record).max(1);
        for first in (0..rows).step_by(at_once) {
            let mut out = chunk(ChunkKind::Rows, spec.id());
            for row in first..rows.min(first + at_once) {
                let at = out.0.len();
                out.0.resize(at + record, 0);
                for (column, bytes) in &all {
                    let (from, to) = (row * column.bytes, at + column.offset);
                    out.0[to..to + column.bytes].copy_from_slice(&bytes[from..from + column.bytes]);
                }
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
            tensors(&images, &clients)?.into_iter().map(|(name, tensor)| (name, tensor.shape().to_vec())).collect();
        let known: BTreeSet<&str> = self.tensors.iter().map(|(name, _)| name).collect();
        if let Some(extra) = known.iter().find(|name| !made.contains_key(**name)) {
            return Err(BadCheckpoint::new(*extra, "no table has such a tensor"));
        }
        for (name, view) in self.tensors.iter() {
            // What is not numbers may be told in another way.
            let free = name == CLIENTS || name.ends_with("::state");
            if let Some(shape) = made.get(name).filter(|shape| !free && shape.as_slice() != view.shape()) {
                let what = format!("its shape is {:?}, and the table's {shape:?}", view.shape());
                return Err(BadCheckpoint::new(name, what));
            }
        }
        Ok(())
    }
}
