//! Does: writes checkpoints to a folder or a bucket through `object_store`, and reads them; the one home of that crate, on a runtime
//! of its own.

mod place;

pub(crate) use place::is_bucket;

use crate::checkpoint::{
    BadCheckpoint, MAX_MANIFEST_BYTES, Manifest, Object, frame, is_name, manifest_file, place_of, stem, unframe,
};
use crate::shard::{Cut, Limits, Shard};
use crate::state::Builder;
use object_store::path::Path;
use object_store::{ObjectStoreExt, WriteMultipart};
use place::Place;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout};

/// Bytes that are read, or handed to the store, at once.
const READ_BYTES: u64 = 8 << 20;
/// Uploads of parts of one object under way.
const UPLOADS: usize = 2;
/// For each part of the time that writes, this many are rest: servers and workers want the processor and the memory more. Most
/// where there are no cores beside theirs.
const REST: u32 = 3;
const REST_OF_FEW_CORES: u32 = 14;
const FEW_CORES: usize = 4;

/// How often writing sees whether it is to end, whatever the store does.
const LOOK: Duration = Duration::from_millis(50);
/// The longest that a store may take to answer the first question.
const GREETING: Duration = Duration::from_secs(15);

/// Where checkpoints lie.
pub(crate) struct Storage {
    at: Place,
    runtime: Runtime,
    place: String,
    cancelled: Arc<AtomicBool>,
    /// For so many parts of rest one of work.
    rest: u32,
    /// Drawn at random: what a server that was taken for dead still writes never mixes with what its successor does.
    writer: u64,
}

impl Storage {
    /// Opens `place`: a folder, as a path or a `file://` address, made where it is not there; or `s3://BUCKET/PREFIX`, where it
    /// is asked whether it may be read.
    pub(crate) fn open(place: &str) -> Result<Self, BadCheckpoint> {
        let wrong = |what: String| BadCheckpoint::new(place, what);
        let at = place::open(place)?;
        let writer = crate::dial::random().map_err(|error| wrong(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(UPLOADS).build();
        let runtime = runtime.map_err(|error| wrong(error.to_string()))?;
        if at.remote {
            let listed = runtime.block_on(async { timeout(GREETING, at.store.list_with_delimiter(None)).await });
            let listed = listed.map_err(|_| wrong(format!("no answer within {} s", GREETING.as_secs())))?;
            listed.map_err(|error| wrong(place::with_remedy(&error)))?;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let rest = if cores <= FEW_CORES { REST_OF_FEW_CORES } else { REST };
        Ok(Self { at, runtime, place: place.to_owned(), cancelled: Arc::default(), rest, writer })
    }

    /// The same, where nobody else wants the processor: without rest.
    pub(crate) fn alone(self) -> Self {
        Self { rest: 0, ..self }
    }

    /// Once set, writing ends with an error.
    pub(crate) fn canceller(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }

    /// Writes what a shard gives, the manifest last; how many bytes.
    pub(crate) fn write(&self, snapshot: &Cut) -> Result<u64, BadCheckpoint> {
        let (shard, shards) = snapshot.place;
        let folder = Path::from(snapshot.name.as_str());
        let stem = format!("{}.{:016x}", stem(shard, shards), self.writer);
        self.until_cancelled(async {
            let mut objects = Vec::new();
            let mut clients = snapshot.clients.iter().cloned();
            let file = format!("{stem}.clients");
            objects.push(self.write_object(&folder, String::new(), file, 0, &mut clients).await?);
            for table in &snapshot.tables {
                let file = format!("{stem}.{:016x}", table.id().0);
                let name = table.name().to_owned();
                objects.push(self.write_object(&folder, name, file, table.clock(), &mut table.chunks()).await?);
            }
            let bytes = objects.iter().map(|object| object.bytes).sum();
            let manifest = Manifest { name: snapshot.name.clone(), shard, shards, objects };
            let path = folder.clone().join(manifest_file(shard, shards));
            let put = self.at.store.put(&path, manifest.encode().into()).await;
            put.map_err(|error| BadCheckpoint::new(path.to_string(), error))?;
            Ok(bytes)
        })
    }

    /// Drives `writing` to its end, or to where it is cancelled: a store that does not answer holds no server up.
    fn until_cancelled<T>(&self, writing: impl Future<Output = Result<T, BadCheckpoint>>) -> Result<T, BadCheckpoint> {
        self.runtime.block_on(async {
            let mut writing = pin!(writing);
            loop {
                match timeout(LOOK, &mut writing).await {
                    Ok(done) => return done,
                    Err(_) if self.cancelled.load(Ordering::Relaxed) => return Err(self.stopped(&self.place)),
                    Err(_) => {}
                }
            }
        })
    }

    fn stopped(&self, object: &str) -> BadCheckpoint {
        BadCheckpoint::new(object, "the server is being stopped")
    }

    async fn write_object(
        &self,
        folder: &Path,
        table: String,
        file: String,
        clock: u64,
        chunks: &mut (dyn Iterator<Item = Vec<u8>> + '_),
    ) -> Result<Object, BadCheckpoint> {
        let path = folder.clone().join(file.as_str());
        let wrong = |error: object_store::Error| BadCheckpoint::new(path.to_string(), error);
        let upload = self.at.store.put_multipart(&path).await.map_err(wrong)?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, self.at.part);
        let mut object = Object { table, file, clock, bytes: 0, crc32c: 0 };
        if let Err(bad) = self.write_chunks(&path, &mut upload, chunks, &mut object).await {
            // Parts of what is given up would cost their owner money for as long as the bucket keeps them.
            if let Err(error) = upload.abort().await {
                tracing::warn!(%path, why = %error, "parts of a half-written object may be left");
            }
            return Err(bad);
        }
        upload.finish().await.map_err(wrong)?;
        Ok(object)
    }

    async fn write_chunks(
        &self,
        path: &Path,
        upload: &mut WriteMultipart,
        chunks: &mut (dyn Iterator<Item = Vec<u8>> + '_),
        object: &mut Object,
    ) -> Result<(), BadCheckpoint> {
        let (mut buffer, mut begun) = (Vec::new(), Instant::now());
        for chunk in chunks {
            buffer.clear();
            frame(&chunk, &mut buffer);
            object.bytes += buffer.len() as u64;
            object.crc32c = crc32c::crc32c_append(object.crc32c, &buffer);
            let room = upload.wait_for_capacity(UPLOADS).await;
            room.map_err(|error| BadCheckpoint::new(path.to_string(), error))?;
            upload.write(&buffer);
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(self.stopped(path.as_ref()));
            }
            if begun.elapsed() > Duration::from_millis(2) {
                // What is under way to a bucket goes on meanwhile.
                sleep(begun.elapsed() * self.rest).await;
                begun = Instant::now();
            }
        }
        Ok(())
    }

    /// The names of all checkpoints of which all shards are there, the latest first.
    pub(crate) fn whole(&self) -> Result<Vec<String>, BadCheckpoint> {
        self.whole_of(None)
    }

    /// The same; of those that so many shards have written, where a number is given.
    fn whole_of(&self, wanted: Option<u32>) -> Result<Vec<String>, BadCheckpoint> {
        let wrong = |error: object_store::Error| BadCheckpoint::new(self.place.as_str(), error);
        self.runtime.block_on(async {
            let folders = self.at.store.list_with_delimiter(None).await.map_err(wrong)?.common_prefixes;
            let mut names = Vec::new();
            for folder in folders {
                let name = folder.filename().unwrap_or_default().to_owned();
                let places = self.places(&name).await?;
                let is_whole = |&(come, shards)| come == shards && wanted.is_none_or(|wanted| wanted == shards);
                if is_name(&name) && places.values().any(is_whole) {
                    names.push(name);
                }
            }
            names.sort_unstable_by(|one, other| other.cmp(one));
            Ok(names)
        })
    }

    /// Whether this place is a checkpoint itself, not one that keeps several.
    pub(crate) fn is_one(&self) -> Result<bool, BadCheckpoint> {
        self.runtime.block_on(async { Ok(!self.places("").await?.is_empty()) })
    }

    /// For each number of shards, how many manifests of it there are in folder `name`.
    async fn places(&self, name: &str) -> Result<BTreeMap<u32, (u32, u32)>, BadCheckpoint> {
        let listed = self.at.store.list_with_delimiter(Some(&Path::from(name))).await;
        let listed = listed.map_err(|error| BadCheckpoint::new(name, error))?.objects;
        let mut places = BTreeMap::new();
        for (_, shards) in listed.iter().filter_map(|object| place_of(object.location.filename()?)) {
            places.entry(shards).or_insert((0, shards)).0 += 1;
        }
        Ok(places)
    }

    /// Removes what shard `place` has of checkpoints older than the `keep` latest whole ones of as many shards: what others, cut
    /// otherwise, write to the same place pushes none of ours out.
    pub(crate) fn prune(&self, place: (u32, u32), keep: usize) -> Result<(), BadCheckpoint> {
        let names = self.whole_of(Some(place.1))?;
        let Some(oldest) = names.get(keep.max(1) - 1) else { return Ok(()) };
        let wrong = |error: object_store::Error| BadCheckpoint::new(self.place.as_str(), error);
        let (stem, manifest) = (format!("{}.", stem(place.0, place.1)), manifest_file(place.0, place.1));
        self.runtime.block_on(async {
            let folders = self.at.store.list_with_delimiter(None).await.map_err(wrong)?.common_prefixes;
            for folder in folders.iter().filter(|folder| folder.filename().is_some_and(|name| name < oldest.as_str())) {
                let listed = self.at.store.list_with_delimiter(Some(folder)).await.map_err(wrong)?.objects;
                let of_ours = |path: &Path| path.filename().is_some_and(|file| file.starts_with(&stem));
                let mut ours: Vec<Path> = listed.into_iter().map(|object| object.location).filter(of_ours).collect();
                // The manifest first, so that what is left is never taken for whole.
                ours.sort_by_key(|path| path.filename() != Some(manifest.as_str()));
                for path in ours {
                    self.at.store.delete(&path).await.map_err(wrong)?;
                }
            }
            Ok(())
        })
    }

    /// Reads checkpoint `name`, cut into `shards` shards, whatever number wrote it: those of `wanted`, each with its instance.
    pub(crate) fn read(
        &self,
        name: &str,
        shards: u32,
        limits: &Limits,
        wanted: &[(u32, u64)],
    ) -> Result<Vec<Shard>, BadCheckpoint> {
        if !is_name(name) {
            return Err(BadCheckpoint::new(name, "it is not the name of a checkpoint"));
        }
        let now = Instant::now();
        self.runtime.block_on(async {
            let places = self.places(name).await?;
            let written = places.values().find(|(come, shards)| come == shards);
            let &(_, written) = written.ok_or_else(|| {
                let what = format!("it is not whole: manifests of shards are missing (there are {places:?})");
                BadCheckpoint::new(name, what)
            })?;
            let builder = |&(shard, instance)| Builder::new(limits.clone(), instance, (shard, shards), now);
            let mut builders: Vec<Builder> = wanted.iter().map(builder).collect();
            for shard in 0..written {
                // Of a map that is cut alike, each shard has all that it needs by itself.
                let one = wanted.iter().position(|&(wanted, _)| wanted == shard);
                let into = match one {
                    _ if written != shards => &mut builders[..],
                    Some(at) => &mut builders[at..=at],
                    None => continue,
                };
                self.read_shard(name, (shard, written), into).await?;
            }
            let finish = |builder: Builder| builder.finish().map_err(|error| BadCheckpoint::new(name, error));
            builders.into_iter().map(finish).collect()
        })
    }

    async fn read_shard(&self, name: &str, place: (u32, u32), into: &mut [Builder]) -> Result<(), BadCheckpoint> {
        let path = Path::from(name).join(manifest_file(place.0, place.1));
        let wrong = |error: object_store::Error| BadCheckpoint::new(path.to_string(), error);
        let size = self.at.store.head(&path).await.map_err(wrong)?.size;
        if size > MAX_MANIFEST_BYTES {
            return Err(BadCheckpoint::new(path.to_string(), "it is too long"));
        }
        let bytes = self.at.store.get_range(&path, 0..size).await.map_err(wrong)?;
        let manifest = Manifest::decode(&bytes, name, place)?;
        for object in &manifest.objects {
            self.read_object(name, object, into).await?;
        }
        Ok(())
    }

    async fn read_object(&self, name: &str, object: &Object, into: &mut [Builder]) -> Result<(), BadCheckpoint> {
        let path = Path::from(name).join(object.file.as_str());
        let wrong = |what: &dyn std::fmt::Display| BadCheckpoint::new(path.to_string(), what);
        let size = self.at.store.head(&path).await.map_err(|error| wrong(&error))?.size;
        if size != object.bytes {
            return Err(wrong(&format!("it has {size} bytes of {}: it was cut or changed", object.bytes)));
        }
        let (mut at, mut crc, mut buffer) = (0, 0, Vec::new());
        while at < size {
            let range = at..size.min(at + READ_BYTES);
            at = range.end;
            let bytes = self.at.store.get_range(&path, range).await.map_err(|error| wrong(&error))?;
            crc = crc32c::crc32c_append(crc, &bytes);
            buffer.extend_from_slice(&bytes);
            let mut start = 0;
            while let Some((chunk, taken)) = unframe(&buffer[start..]).map_err(|what| wrong(&what))? {
                into.iter_mut().try_for_each(|builder| builder.take(chunk)).map_err(|error| wrong(&error))?;
                start += taken;
            }
            buffer.drain(..start);
        }
        if !buffer.is_empty() || crc != object.crc32c {
            return Err(wrong(&"its checksum does not fit: it was changed"));
        }
        Ok(())
    }
}
