//! Does: writes checkpoints as files of safetensors, and makes checkpoints of those.

use crate::checkpoint::{is_name, name_at, place_of};
use crate::shard::{Cut, Limits};
use crate::state::{Builder, Image};
use crate::storage::{Storage, is_bucket};
use crate::tensors::{Source, Tensor, header, metadata, shard_of_file, tensors};
use crate::{PsError, dial};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
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
/// that of several, of which the latest whole one is taken. Takes memory for its tables, at most `memory_bytes`, and beside them for
/// what is read or written at once: 24 MiB.
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
    let mut tensors = tensors(&images, &clients).map_err(|bad| wrong(checkpoint, bad))?;
    let head = header(&mut tensors, metadata(&images, &name)).map_err(|bad| wrong(file, bad))?;
    let bytes = write(file, &head, &tensors).map_err(|error| wrong(file, error))?;
    Ok(Exchanged { name, tables: images.len(), bytes })
}

/// Makes a checkpoint in `folder`, or at an `s3://` address, of a file that [`export_checkpoint`] wrote: the latest one there, to be
/// restored at any number of shards. Takes memory for the tables, at most `memory_bytes`; beside them for the file's header, at
/// most 16 MiB of JSON, and for what is on its way: 7 MiB of the file, which is read in pieces of some 2 MiB at most, and three
/// parts of what is written, of 5 MiB to a folder, 16 MiB to a bucket.
///
/// # Errors
/// `Invalid` where the file was cut, is another program's, or does not fit what it says of itself, with the tensor; nothing is
/// written then.
pub fn import_checkpoint(file: &Path, folder: &Path, memory_bytes: u64) -> Result<Exchanged, PsError> {
    let source = Opened::open(file).map_err(|error| wrong(file, error))?;
    let (now, instance) = (Instant::now(), dial::random()?);
    let builder = Builder::new(limits(memory_bytes), instance, (0, 1), now);
    let mut shard = shard_of_file(&source, builder, now).map_err(|bad| wrong(file, bad))?;
    drop(source);
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

/// Writes all of a file, or none of it; how many bytes.
fn write(file: &Path, head: &[u8], tensors: &[(String, Tensor<'_>)]) -> io::Result<u64> {
    // Beside the file first, for whoever may read what this process writes.
    let mut beside = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(file.parent().unwrap_or_else(|| Path::new(".")))?;
    beside.write_all(head)?;
    for piece in tensors.iter().flat_map(|(_, tensor)| tensor.pieces()) {
        beside.write_all(&piece)?;
    }
    beside.as_file().sync_all()?;
    Ok(beside.persist(file).map_err(|error| error.error)?.metadata()?.len())
}

/// A file that is read where it is asked to be.
struct Opened {
    file: File,
    bytes: u64,
}

impl Opened {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }
}

impl Source for Opened {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::MAX_CHUNK_BYTES;
    use crate::header::{Header, Kind};
    use crate::shard::Shard;
    use crate::{
        Adam, Combine, Compression, DType, Epoch, Initializer, KeyRange, Mode, Recovery, SparseSpec, TableSpec,
        UpdateRule, open_body, open_sparse_body,
    };
    use gradwire_transport::PeerId;
    use std::cell::Cell;

    const ELEMENTS: u64 = 12 << 20;
    const DIM: u64 = 128;
    const IDS: u64 = 16 << 10;
    /// Beside the tables: two chunks, and what is told of them before they are.
    const BESIDE: u64 = 3 * MAX_CHUNK_BYTES as u64;

    fn shard() -> Shard {
        let mut shard = Shard::new(limits(1 << 30), 8);
        let dense = TableSpec {
            name: "w".into(),
            shape: vec![ELEMENTS],
            dtype: DType::F32,
            rule: UpdateRule::Sum,
            mode: Mode::Async,
            combine: Combine::Sum,
            clipped: false,
            recovery: Recovery::None,
            compression: Compression::NONE,
            shards: 1,
            shard: 0,
            part_elements: 1 << 18,
        };
        let rows = SparseSpec {
            name: "rows".into(),
            dim: DIM,
            dtype: DType::F32,
            rule: UpdateRule::Adam(Adam::default()),
            mode: Mode::Async,
            combine: Combine::Sum,
            initializer: Initializer::Zeros,
            seed: 0,
            capacity: None,
            eviction: None,
            admission: 1,
            recovery: Recovery::None,
            compression: Compression::NONE,
            max_grad_norm: None,
            shards: 1,
            shard: 0,
        };
        let me = Header { incarnation: 1, epoch: Epoch(1), sequence: 1, ..Header::new(Kind::Hello) };
        let mut ask = |header: Header, body: &[u8]| {
            shard.handle(
                PeerId(0),
                &Header { payload_bytes: body.len() as u64, ..header },
                body,
                Instant::now(),
                &mut Vec::new(),
            );
        };
        ask(me, &[]);
        ask(Header { kind: Kind::Open, table: dense.id(), ..me }, &open_body(&dense));
        ask(Header { kind: Kind::OpenSparse, table: rows.id(), ..me }, &open_sparse_body(&rows));
        let at_once = 1 << 10;
        for (sequence, first) in (1..).zip((0..IDS).step_by(at_once as usize)) {
            let mut body: Vec<u8> = [0u32, 1].into_iter().flat_map(u32::to_le_bytes).collect();
            body.extend((first..first + at_once).flat_map(u64::to_le_bytes));
            body.extend((0..at_once * DIM).flat_map(|n| (n as f32).to_le_bytes()));
            let (keys, dtype) = (KeyRange { start: 0, end: at_once }, Some(DType::F32));
            ask(Header { kind: Kind::SparsePush, table: rows.id(), sequence, keys, dtype, ..me }, &body);
        }
        shard
    }

    /// Reads, and notes how much at once.
    struct Counting {
        inner: Opened,
        longest: Cell<usize>,
    }

    impl Source for Counting {
        fn bytes(&self) -> u64 {
            self.inner.bytes()
        }

        fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
            self.longest.set(self.longest.get().max(into.len()));
            self.inner.read(at, into)
        }
    }

    /// What `work` made, and the most memory that it held.
    fn held<T>(work: impl FnOnce() -> T) -> (T, u64) {
        let mut done = None;
        let most = allocation_counter::measure(|| done = Some(work())).bytes_max;
        (done.expect("it has been called"), most)
    }

    #[test]
    fn tables_go_out_and_come_in_with_memory_for_a_few_parts_beside_them() {
        let home = tempfile::tempdir().expect("a folder");
        let (file, now) = (home.path().join("a.safetensors"), Instant::now());
        let mut shard = shard();
        let images: Vec<Image> = shard.table_ids().into_iter().filter_map(|id| shard.image(id, now)).collect();
        let clients = shard.members_chunks();
        let (bytes, most) = held(|| {
            let mut tensors = tensors(&images, &clients).expect("no two have one name");
            let head = header(&mut tensors, metadata(&images, "a")).expect("there are few");
            write(&file, &head, &tensors).expect("there is room")
        });
        assert!(bytes > 72 << 20, "{bytes}");
        assert!(most < BESIDE, "going out held {most} bytes beside the tables");

        drop((images, shard));
        let source = Counting { inner: Opened::open(&file).expect("it is there"), longest: Cell::new(0) };
        let builder = Builder::new(limits(1 << 30), 8, (0, 1), now);
        let (shard, most) = held(|| shard_of_file(&source, builder, now).expect("it was just written"));
        let tables = shard.status(0).memory_bytes;
        assert!(tables > 72 << 20, "{tables}");
        assert!(most < tables + BESIDE, "coming in held {most} bytes, of which {tables} are tables");
        assert!(source.longest.get() <= MAX_CHUNK_BYTES, "{} bytes were read at once", source.longest.get());
    }
}
