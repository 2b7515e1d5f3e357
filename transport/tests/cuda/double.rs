//! Does: builds the double of CUDA's driver, with settings and counters in a file beside it.
#![allow(dead_code)] // Each test uses a part.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The longest that a stream may take to pass its last events.
const SETTLING: Duration = Duration::from_secs(5);

/// A setting of a double, by its place.
#[derive(Clone, Copy)]
pub enum Setting {
    Devices = 0,
    DelayUs = 1,
    FailCall = 2,
    FailAfter = 3,
    FailCode = 4,
    StreamValues = 5,
    DmaBuf = 6,
}

/// A counter of a double, by its place.
#[derive(Clone, Copy, Debug)]
pub enum Counter {
    DeviceBytes = 16,
    PinnedBytes = 17,
    Streams = 18,
    Events = 19,
    Contexts = 20,
    Copies = 21,
    MostCopiesAtOnce = 23,
    Flushes = 24,
    Launches = 25,
    Opened = 26,
    Modules = 27,
}

/// A call that can be told to fail.
#[derive(Clone, Copy, Debug)]
pub enum Failing {
    Init = 1,
    Retain = 2,
    Alloc = 3,
    HostAlloc = 4,
    Stream = 5,
    Event = 6,
    CopyIn = 7,
    CopyOut = 8,
    Record = 9,
    Launch = 10,
    Open = 11,
    Share = 12,
    Compile = 13,
}

/// A driver of its own: what is set and counted in one is not in another.
pub struct Double {
    folder: TempDir,
    control: File,
}

impl Double {
    /// A driver with `devices` devices that can wait for values.
    pub fn new(devices: i64) -> Self {
        static BUILT: OnceLock<Vec<u8>> = OnceLock::new();
        let folder = TempDir::new().unwrap();
        let built = BUILT.get_or_init(|| build(&folder.path().join("built.so")));
        fs::write(folder.path().join("libcuda.so"), built).unwrap();
        let path = folder.path().join("libcuda.so.control");
        let control = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        control.set_len(4096).unwrap();
        let double = Self { folder, control };
        double.set(Setting::Devices, devices);
        double.set(Setting::StreamValues, 1);
        double
    }

    /// The file that stands for libcuda.so.1.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("libcuda.so")
    }

    pub fn set(&self, setting: Setting, value: i64) {
        self.control.write_all_at(&value.to_le_bytes(), 8 * setting as u64).unwrap();
    }

    /// Has `call` fail with `code` after it has gone well `times` times.
    pub fn fail(&self, call: Failing, times: i64, code: i64) {
        self.set(Setting::FailAfter, times);
        self.set(Setting::FailCode, code);
        self.set(Setting::FailCall, call as i64);
    }

    pub fn fail_no_more(&self) {
        self.set(Setting::FailCall, 0);
    }

    pub fn count(&self, counter: Counter) -> i64 {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, 8 * counter as u64).unwrap();
        i64::from_le_bytes(bytes)
    }

    /// Device memory, pinned memory, streams, events, contexts, others' memory and programs that are held: all as it is now, but for
    /// events. As with a real driver, one that is given back goes when its stream has passed it, which is waited for.
    pub fn held(&self) -> [i64; 7] {
        use Counter::{Contexts, DeviceBytes, Events, Modules, Opened, PinnedBytes, Streams};
        let mut held =
            [DeviceBytes, PinnedBytes, Streams, Events, Contexts, Opened, Modules].map(|counter| self.count(counter));
        let until = Instant::now() + SETTLING;
        while held[3] != 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
            held[3] = self.count(Events);
        }
        held
    }
}

fn build(target: &Path) -> Vec<u8> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../transport/tests/cuda/driver_double.c");
    let flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread", "-o"];
    let status = Command::new("cc").args(flags).arg(target).arg(source).status().unwrap();
    assert!(status.success(), "the double of CUDA's driver is built by a C compiler: install gcc");
    fs::read(target).unwrap()
}
