//! Does: a store in a folder that all processes see: one file a value, renamed into place, so that none is read half.

use super::{MAX_VALUE_BYTES, Store, timeout};
use crate::TransportError;
use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a file that is not there yet is looked for.
const LOOK: Duration = Duration::from_millis(5);

/// A store in a folder. Use a folder of its own for each run: values of an earlier run are not told apart.
pub struct FileStore {
    folder: PathBuf,
}

impl FileStore {
    /// The store in `folder`, which is made where it is missing.
    ///
    /// # Errors
    /// `Io` when it cannot be made.
    pub fn new(folder: &Path) -> Result<Self, TransportError> {
        fs::create_dir_all(folder).map_err(|error| TransportError::io(format!("make {}", folder.display()), error))?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn path(&self, key: &str) -> PathBuf {
        let mut name = String::with_capacity(key.len());
        for byte in key.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
                other => write!(name, "%{other:02x}").expect("writing to a string does not fail"),
            }
        }
        self.folder.join(name)
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), TransportError> {
        let path = self.path(key);
        // Nobody else's draft: neither another store's in this process nor, in a shared folder, another host's.
        let mut own = [0; 16];
        getrandom::fill(&mut own).expect("the system gives random bytes");
        let draft = self.folder.join(format!(".{:032x}", u128::from_le_bytes(own)));
        fs::write(&draft, value)
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|error| TransportError::io(format!("write {}", path.display()), error))
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, TransportError> {
        let (path, began) = (self.path(key), Instant::now());
        loop {
            match fs::metadata(&path).and_then(|metadata| {
                if metadata.len() > MAX_VALUE_BYTES as u64 {
                    Err(ErrorKind::FileTooLarge.into())
                } else {
                    fs::read(&path)
                }
            }) {
                Ok(value) => return Ok(value),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(TransportError::io(format!("read {}", path.display()), error)),
            }
            if Instant::now() + LOOK >= deadline {
                return Err(timeout(format!("the file {}", path.display()), began));
            }
            std::thread::sleep(LOOK);
        }
    }
}
