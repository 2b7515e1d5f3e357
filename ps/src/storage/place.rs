//! Does: opens what checkpoints are kept in, a folder or a bucket of S3's kind, and says what is wrong with it.

use crate::checkpoint::BadCheckpoint;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, RetryConfig};
use std::time::Duration;

/// Bytes of one part of an object in a bucket: of 10,000 parts, as many as S3 takes, an object may have 156 GiB.
const BUCKET_PART: usize = 16 << 20;
/// Bytes that are handed to a disk at once.
const FOLDER_PART: usize = 5 << 20;
/// For how long what failed is tried again, and how often.
const RETRY: Duration = Duration::from_secs(60);
const RETRIES: usize = 6;

/// An open place.
pub(super) struct Place {
    pub(super) store: Box<dyn ObjectStore>,
    /// Bytes of a part of an object that is uploaded at once.
    pub(super) part: usize,
    /// Whether it is on another machine.
    pub(super) remote: bool,
}

/// Whether `place` is a bucket's address, not a folder.
pub(crate) fn is_bucket(place: &str) -> bool {
    place.contains("://") && !place.starts_with("file://")
}

/// Opens `place`: a path, a `file://` address of a folder, or `s3://BUCKET/PREFIX`. A folder is made where it is not there.
pub(super) fn open(place: &str) -> Result<Place, BadCheckpoint> {
    if is_bucket(place) { bucket(place) } else { folder(place.strip_prefix("file://").unwrap_or(place)) }
}

fn folder(path: &str) -> Result<Place, BadCheckpoint> {
    make_folder(std::path::Path::new(path)).map_err(|error| BadCheckpoint::new(path, error))?;
    let store = LocalFileSystem::new_with_prefix(path).map_err(|error| BadCheckpoint::new(path, error))?;
    // An object, and the folders above it, are on the disk before its writing ends; so a manifest, which comes last, names
    // none that a power cut could take back.
    // Of a checkpoint that is removed no empty folder is left, which each later look would go through.
    let store = store.with_fsync(true).with_automatic_cleanup(true);
    Ok(Place { store: Box::new(store), part: FOLDER_PART, remote: false })
}

fn bucket(address: &str) -> Result<Place, BadCheckpoint> {
    let wrong = |what: String| BadCheckpoint::new(address, what);
    let (scheme, rest) = address.split_once("://").unwrap_or_default();
    if scheme != "s3" {
        let what = format!(
            "{scheme}:// is not known: give a folder, or s3://BUCKET/PREFIX (MinIO, Ceph and others speak S3 too)"
        );
        return Err(wrong(what));
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(wrong("it names no bucket: s3://BUCKET/PREFIX".to_owned()));
    }
    let prefix = Path::parse(prefix.trim_end_matches('/')).map_err(|error| wrong(error.to_string()))?;
    // The crate leaves it to its users which cryptography TLS uses; where somebody has chosen already, that one is used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY, ..RetryConfig::default() };
    let store = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry).build();
    let store = store.map_err(|error| wrong(with_remedy(&error)))?;
    Ok(Place { store: Box::new(PrefixStore::new(store, prefix)), part: BUCKET_PART, remote: true })
}

/// What went wrong at a bucket, and where to look.
pub(super) fn with_remedy(error: &object_store::Error) -> String {
    format!(
        "{error}; see that the bucket is there, that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the machine's role) may list, \
         read, write and delete in it, and that AWS_REGION, or AWS_ENDPOINT_URL for a store that is not Amazon's, is right"
    )
}

/// Makes the folder and those above it that are missing, each on the disk before it counts.
fn make_folder(path: &std::path::Path) -> std::io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    // The parent of a relative path of one part is the folder that the program runs in.
    let above = path.parent().map(|above| if above.as_os_str().is_empty() { std::path::Path::new(".") } else { above });
    if let Some(above) = above {
        make_folder(above)?;
    }
    std::fs::create_dir(path).or_else(|error| if path.is_dir() { Ok(()) } else { Err(error) })?;
    above.map_or(Ok(()), |above| std::fs::File::open(above)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_checkpoint_can_be_kept_in_is_refused_with_the_reason() {
        for (place, reason) in [
            ("ftp://host/folder", "ftp:// is not known"),
            ("gs://bucket/run", "gs:// is not known"),
            ("s3://", "names no bucket"),
            ("s3:///run", "names no bucket"),
            ("s3://bucket/a//b", "empty path segment"),
        ] {
            let refused = open(place).err().map(|bad| bad.to_string()).unwrap_or_default();
            assert!(refused.contains(place) && refused.contains(reason), "{place}: {refused}");
        }
    }

    #[test]
    fn folders_and_buckets_are_told_apart() {
        assert!(is_bucket("s3://bucket") && is_bucket("gs://bucket/run"));
        assert!(!is_bucket("/data/run") && !is_bucket("run") && !is_bucket("file:///data/run"));
    }
}
