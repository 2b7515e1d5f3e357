//! Does: writes checkpoints as files of safetensors, and makes checkpoints of those.

use crate::checkpoint::{is_name, name_at, place_of};
use crate::shard::{Cut, Limits};
use crate::state::{Builder, Image};
use crate::storage::{Storage, is_bucket};
use crate::tensors::{metadata, shard_of_file, tensors};
use crate::{PsError, dial};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What was exported or imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchanged {
    /// The checkpoint's name.
    pub name: String,
    /// Tables in it.
    pub tables: usize,
    /// Bytes of what was written.
    pub bytes: u64,
}

fn wrong(what: &Path, why: impl ToString) -> PsError {
    PsError::invalid(what.display().to_string(), why.to_string())
}

/// What servers held together is held here.
fn limits(memory_bytes: u64) -> Limits {
    Limits { memory_bytes, client_bytes: memory_bytes, ..Limits::default() }
}

/// Writes a checkpoint, of any number of shards, to one file of safetensors: `checkpoint` is its folder or `s3://` address, or
/// that of several, of which the latest whole one is taken. Takes memory for all of it, at most `memory_bytes`, and once more for
/// the largest table.
///
/// # Errors
/// `Invalid` where it is missing, cut or changed, or was taken when workers stood at different clocks (with bounded staleness);
/// or the file cannot be written: none is left then.
pub fn export_checkpoint(checkpoint: &Path, file: &Path, memory_bytes: u64) -> Result<Exchanged, PsError> {
    let (place, name) = find(checkpoint)?;
    let text = place.to_str().ok_or_else(|| wrong(&place, "its path is not UTF-8"))?;
    let storage = Storage::open(text).map_err(|bad| wrong(&place, bad))?;
    let latest = || storage.whole().map_err(|bad| wrong(&place, bad)).map(|all| all.into_iter().next());
    let name = match name {
        Some(name) => name,
        None => latest()?.ok_or_else(|| wrong(&place, "there is no whole checkpoint"))?,
    };
    // The tables grow no older while they are read.
    let now = Instant::now();
    let made =
        storage.read(&name, 1, &limits(memory_bytes), &[(0, dial::random()?)]).map_err(|bad| wrong(&place, bad))?;
    let mut shard = made.into_iter().next().ok_or_else(|| wrong(&place, "it has no shard"))?;
    let images: Vec<Image> = shard.table_ids().into_iter().filter_map(|id| shard.image(id, now)).collect();
    let clients = shard.members_chunks();
    let tensors = tensors(&images, &clients).map_err(|bad| wrong(checkpoint, bad))?;
    let told = metadata(&images, &name);
    // Beside the file first, so that there is all of it or none.
    safetensors::serialize_to_file(tensors, Some(told), file).map_err(|error| wrong(file, error))?;
    let synced = File::open(file).and_then(|file| file.sync_all().and_then(|()| file.metadata()));
    let bytes = synced.map_err(|error| wrong(file, error))?.len();
    Ok(Exchanged { name, tables: images.len(), bytes })
}

/// Makes a checkpoint in `folder`, or at an `s3://` address, of a file that [`export_checkpoint`] wrote: the latest one there, to be
/// restored at any number of shards. Takes memory for the file, and at most `memory_bytes` for the tables.
///
/// # Errors
/// `Invalid` where the file was cut, is another program's, or does not fit what it says of itself; nothing is written then.
pub fn import_checkpoint(file: &Path, folder: &Path, memory_bytes: u64) -> Result<Exchanged, PsError> {
    let bytes = fs::read(file).map_err(|error| wrong(file, error))?;
    let (now, instance) = (Instant::now(), dial::random()?);
    let builder = Builder::new(limits(memory_bytes), instance, (0, 1), now);
    let mut shard = shard_of_file(&bytes, builder, now).map_err(|bad| wrong(file, bad))?;
    drop(bytes);
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = format!("{}-{:08x}", name_at(u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)), std::process::id());
    let tables: Vec<Image> = shard.table_ids().into_iter().filter_map(|id| shard.image(id, now)).collect();
    let count = tables.len();
    let cut = Cut { name: name.clone(), place: (0, 1), clients: shard.members_chunks(), tables };
    let text = folder.to_str().ok_or_else(|| wrong(folder, "its path is not UTF-8"))?;
    let storage = Storage::open(text).map_err(|bad| wrong(folder, bad))?.alone();
    let bytes = storage.write(&cut).map_err(|bad| wrong(folder, bad))?;
    Ok(Exchanged { name, tables: count, bytes })
}

/// The folder or bucket that keeps checkpoints, and the name of that which is meant, where `checkpoint` is one.
fn find(checkpoint: &Path) -> Result<(PathBuf, Option<String>), PsError> {
    if let Some(address) = checkpoint.to_str().filter(|address| is_bucket(address)) {
        let address = address.trim_end_matches('/');
        let open = Storage::open(address).and_then(|storage| storage.is_one());
        return Ok(match address.rsplit_once('/') {
            Some((place, name)) if open.map_err(|bad| wrong(checkpoint, bad))? => (place.into(), Some(name.to_owned())),
            _ => (address.into(), None),
        });
    }
    let checkpoint = fs::canonicalize(checkpoint).map_err(|error| wrong(checkpoint, error))?;
    let files = fs::read_dir(&checkpoint).map_err(|error| wrong(&checkpoint, error))?;
    let is_manifest = |file: fs::DirEntry| place_of(file.file_name().to_str()?).map(|_| ());
    let is_one = files.flatten().find_map(is_manifest).is_some();
    let name = checkpoint.file_name().and_then(|name| name.to_str()).filter(|name| is_one && is_name(name));
    match (name, checkpoint.parent()) {
        (Some(name), Some(place)) => Ok((place.to_owned(), Some(name.to_owned()))),
        _ => Ok((checkpoint, None)),
    }
}
