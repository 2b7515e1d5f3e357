//! Does: keeps buffers for messages that wait for their receive, or are lent; reused, so that a warm wire allocates nothing.

use crate::region::BufferHome;
use std::sync::{Mutex, PoisonError};

/// Smallest buffer; every class holds twice as much as the one before.
const SMALLEST: usize = 4 << 10;
const CLASSES: usize = 12;
/// Bytes kept for later in one class.
const KEPT_BYTES: usize = 8 << 20;

/// Buffers by size class.
#[derive(Default)]
pub(crate) struct Pool {
    free: Mutex<[Vec<Vec<u8>>; CLASSES]>,
}

impl Pool {
    /// A buffer of at least `bytes`; its contents are whatever was there.
    pub(crate) fn take(&self, bytes: usize) -> Vec<u8> {
        let Some(class) = class_of(bytes) else { return vec![0; bytes] };
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner)[class].pop();
        free.unwrap_or_else(|| vec![0; SMALLEST << class])
    }
}

impl BufferHome for Pool {
    fn take_back(&self, buffer: Vec<u8>) {
        let Some(class) = class_of(buffer.len()).filter(|class| buffer.len() == SMALLEST << class) else { return };
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free[class].len() * (SMALLEST << class) < KEPT_BYTES {
            free[class].push(buffer);
        }
    }
}

fn class_of(bytes: usize) -> Option<usize> {
    (0..CLASSES).find(|class| bytes <= SMALLEST << class)
}
