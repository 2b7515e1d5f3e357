//! Pure: how much a shard may hold, how much it holds, and buffers that are used again.

use gradwire_transport::Region;
use std::sync::Arc;

/// Bytes that are kept in buffers for answers nobody is reading any more.
const SHELF_BYTES: usize = 16 << 20;

/// Memory for contributions that wait for their turn, reused from clock to clock.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Bytes in tables, contributions and free buffers.
    pub(crate) used: u64,
    /// The most there may be.
    pub(crate) limit: u64,
    free: Vec<Vec<u8>>,
}

impl Memory {
    pub(crate) fn new(limit: u64) -> Self {
        Self { used: 0, limit, free: Vec::new() }
    }

    /// Sets `bytes` aside; false when there is no room.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        let fits = self.used.checked_add(bytes).is_some_and(|used| used <= self.limit);
        if fits {
            self.used += bytes;
        }
        fits
    }

    pub(crate) fn copy(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let reused = self.free.iter().position(|buffer| buffer.capacity() >= bytes.len());
        let mut buffer = match reused {
            Some(at) => self.free.swap_remove(at),
            None if self.take(bytes.len() as u64) => Vec::with_capacity(bytes.len()),
            None => {
                // Too small ones are no use to anybody while there is no room.
                let freed: u64 = std::mem::take(&mut self.free).iter().map(|buffer| buffer.capacity() as u64).sum();
                self.used -= freed;
                self.take(bytes.len() as u64).then(|| Vec::with_capacity(bytes.len()))?
            }
        };
        buffer.clear();
        buffer.extend_from_slice(bytes);
        Some(buffer)
    }

    pub(crate) fn give_back(&mut self, buffer: Vec<u8>) {
        self.free.push(buffer);
    }
}

/// Buffers for answers.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    buffers: Vec<Arc<Region>>,
}

impl Shelf {
    /// A buffer of at least `bytes`. It comes back by itself once nobody holds it, nor any slice of it.
    pub(crate) fn take(&mut self, bytes: usize) -> Arc<Region> {
        let free = self.buffers.iter().filter(|buffer| buffer.len() >= bytes && Arc::strong_count(buffer) == 1);
        if let Some(buffer) = free.min_by_key(|buffer| buffer.len()) {
            return Arc::clone(buffer);
        }
        let buffer = Region::zeroed(bytes.next_power_of_two());
        let kept: usize = self.buffers.iter().map(|buffer| buffer.len()).sum();
        if kept + buffer.len() <= SHELF_BYTES {
            self.buffers.push(Arc::clone(&buffer));
        }
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_once_nobody_holds_a_slice_of_it() {
        let mut shelf = Shelf::default();
        let first = shelf.take(100);
        let address = first.as_ptr();
        let slice = first.read(0..10).unwrap();
        drop(first);
        assert_ne!(shelf.take(100).as_ptr(), address);
        drop(slice);
        assert_eq!(shelf.take(128).as_ptr(), address);
        assert!(shelf.take(SHELF_BYTES + 1).len() > SHELF_BYTES && shelf.buffers.len() == 2);
    }

    #[test]
    fn memory_is_counted_and_buffers_are_used_again() {
        let mut memory = Memory::new(100);
        assert!(memory.take(60) && !memory.take(41));
        let copy = memory.copy(&[1; 30]).unwrap();
        assert!(memory.copy(&[1; 30]).is_none());
        memory.give_back(copy);
        assert_eq!(memory.copy(&[2; 20]).unwrap(), [2; 20]);
        assert_eq!(memory.used, 90);
    }
}
