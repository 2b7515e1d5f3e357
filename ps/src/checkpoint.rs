//! Pure: what a checkpoint is made of: names, manifests, frames. What may be half written says so.
//!
//! A checkpoint is a folder. Each shard writes an object for its clients and one for each table, frames of chunks, and last of
//! all its manifest, which tells the length and checksum of each. It is whole when the manifests of all shards are there.

use crate::chunk::MAX_CHUNK_BYTES;
use serde_json::{Value, json};

/// The first words of a manifest.
const MAGIC: &str = "gradwire-checkpoint 1 crc32c=";
/// Before each chunk: its length and its checksum.
pub(crate) const FRAME_BYTES: usize = 8;
/// The longest manifest that is read.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// One object of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    /// The table's name; empty for the clients.
    pub(crate) table: String,
    pub(crate) file: String,
    pub(crate) clock: u64,
    pub(crate) bytes: u64,
    pub(crate) crc32c: u32,
}

/// What a shard wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) name: String,
    pub(crate) shard: u32,
    pub(crate) shards: u32,
    pub(crate) objects: Vec<Object>,
}

/// Why a checkpoint cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {what}")]
pub(crate) struct BadCheckpoint {
    pub(crate) object: String,
    pub(crate) what: String,
}

impl BadCheckpoint {
    pub(crate) fn new(object: impl Into<String>, what: impl ToString) -> Self {
        Self { object: object.into(), what: what.to_string() }
    }
}

/// Whether `name` may be a checkpoint's: it becomes a part of paths.
pub(crate) fn is_name(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=64).contains(&name.len()) && name.bytes().all(fine)
}

/// The name of a checkpoint begun at that time: later ones sort behind earlier ones.
pub(crate) fn name_at(unix_ms: u64) -> String {
    format!("checkpoint-{unix_ms:015}")
}

pub(crate) fn stem(shard: u32, shards: u32) -> String {
    format!("shard-{shard}-of-{shards}")
}

pub(crate) fn manifest_file(shard: u32, shards: u32) -> String {
    format!("{}.manifest", stem(shard, shards))
}

/// The shard and the number of shards of which `file` is the manifest.
pub(crate) fn place_of(file: &str) -> Option<(u32, u32)> {
    let (shard, shards) = file.strip_prefix("shard-")?.strip_suffix(".manifest")?.split_once("-of-")?;
    let place = (shard.parse().ok()?, shards.parse().ok()?);
    (manifest_file(place.0, place.1) == file && place.0 < place.1).then_some(place)
}

/// Appends a chunk with its frame.
pub(crate) fn frame(chunk: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(chunk.len()).expect("a chunk is short");
    out.extend(length.to_le_bytes());
    out.extend(crc32c::crc32c(chunk).to_le_bytes());
    out.extend_from_slice(chunk);
}

/// The length of the chunk whose frame begins with `head`.
pub(crate) fn chunk_bytes(head: &[u8]) -> Result<usize, &'static str> {
    let length = head.first_chunk().map_or(0, |length| u32::from_le_bytes(*length)) as usize;
    if length > MAX_CHUNK_BYTES { Err("a chunk is longer than there may be") } else { Ok(length) }
}

/// The chunk at the head of `bytes` and what it takes; `None` where it has not all come.
pub(crate) fn unframe(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, &'static str> {
    let Some(([_, _, _, _, sum @ ..], rest)) = bytes.split_first_chunk::<FRAME_BYTES>() else { return Ok(None) };
    let length = chunk_bytes(bytes)?;
    let Some(chunk) = rest.get(..length) else { return Ok(None) };
    if crc32c::crc32c(chunk) != u32::from_le_bytes(*sum) {
        return Err("a chunk's checksum does not fit: the file was changed");
    }
    Ok(Some((chunk, FRAME_BYTES + length)))
}

impl Manifest {
    pub(crate) fn encode(&self) -> String {
        let objects = self.objects.iter().map(|object| {
            json!({
                "table": object.table,
                "file": object.file,
                "clock": object.clock,
                "bytes": object.bytes,
                "crc32c": object.crc32c,
            })
        });
        let objects: Vec<Value> = objects.collect();
        let told = json!({ "name": self.name, "shard": self.shard, "shards": self.shards, "objects": objects });
        let told = format!("{told:#}\n");
        format!("{MAGIC}{:08x}\n{told}", crc32c::crc32c(told.as_bytes()))
    }

    /// Reads a manifest that lies in folder `name` as the file of `place`.
    pub(crate) fn decode(bytes: &[u8], name: &str, place: (u32, u32)) -> Result<Self, BadCheckpoint> {
        let wrong = |what: &str| BadCheckpoint::new(format!("{name}/{}", manifest_file(place.0, place.1)), what);
        let text = std::str::from_utf8(bytes).map_err(|_| wrong("it is not text"))?;
        let told = text.strip_prefix(MAGIC).and_then(|rest| rest.split_once('\n'));
        let (sum, told) = told.ok_or_else(|| wrong("it is not a manifest of this version"))?;
        if u32::from_str_radix(sum, 16).ok() != Some(crc32c::crc32c(told.as_bytes())) {
            return Err(wrong("its checksum does not fit: it was cut or changed"));
        }
        let told: Value = serde_json::from_str(told).map_err(|error| wrong(&error.to_string()))?;
        let objects = told["objects"].as_array().map(Vec::as_slice).unwrap_or_default();
        let object = |object: &Value| {
            Some(Object {
                table: object["table"].as_str()?.to_owned(),
                file: object["file"].as_str().filter(|file| !file.contains('/') && !file.is_empty())?.to_owned(),
                clock: object["clock"].as_u64()?,
                bytes: object["bytes"].as_u64()?,
                crc32c: u32::try_from(object["crc32c"].as_u64()?).ok()?,
            })
        };
        let objects: Option<Vec<Object>> = objects.iter().map(object).collect();
        let manifest = Self {
            name: told["name"].as_str().unwrap_or_default().to_owned(),
            shard: place.0,
            shards: place.1,
            objects: objects.ok_or_else(|| wrong("an object is not described in full"))?,
        };
        let said = (told["shard"].as_u64(), told["shards"].as_u64());
        if manifest.name != name || said != (Some(place.0.into()), Some(place.1.into())) {
            return Err(wrong("it belongs to another checkpoint"));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_comes_back_and_none_that_was_cut_or_changed_does() {
        let object = Object { table: "w/\"é\"".into(), file: "a.table".into(), clock: 7, bytes: 1 << 40, crc32c: 9 };
        let manifest = Manifest { name: name_at(17), shard: 1, shards: 3, objects: vec![object; 2] };
        let bytes = manifest.encode().into_bytes();
        assert_eq!(Manifest::decode(&bytes, &manifest.name, (1, 3)), Ok(manifest.clone()));
        assert!(Manifest::decode(&bytes, &manifest.name, (2, 3)).is_err());
        assert!(Manifest::decode(&bytes, "another", (1, 3)).is_err());
        for at in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..at], &manifest.name, (1, 3)).is_err());
            let mut changed = bytes.clone();
            changed[at] ^= 4;
            assert!(Manifest::decode(&changed, &manifest.name, (1, 3)).is_err(), "byte {at}");
        }
    }

    #[test]
    fn names_are_safe_in_paths_and_sort_by_time() {
        assert!(name_at(9) < name_at(10) && name_at(1 << 40) < name_at(1 << 44) && is_name(&name_at(5)));
        assert!(["", "..", "a/b", "a\\b", &"x".repeat(65)].iter().all(|name| !is_name(name)));
        assert_eq!(place_of("shard-1-of-3.manifest"), Some((1, 3)));
        for other in ["shard-3-of-3.manifest", "shard-1-of-3.table", "shard-01-of-3.manifest", "shard--of-.manifest"] {
            assert_eq!(place_of(other), None);
        }
    }

    #[test]
    fn a_frame_is_whole_or_awaited_or_wrong() {
        let mut bytes = Vec::new();
        frame(b"abc", &mut bytes);
        assert_eq!(unframe(&bytes), Ok(Some((&b"abc"[..], 11))));
        assert!((0..11).all(|cut| unframe(&bytes[..cut]) == Ok(None)));
        bytes[9] ^= 1;
        assert!(unframe(&bytes).is_err() && unframe(&[0xff; 8]).is_err());
    }
}
