//! Pure: how much a shard may hold, how much it holds, and buffers that are used again.

use gradwire_transport::Region;
use std::collections::HashMap;
use std::ops::Deref;
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
    client_limit: u64,
    /// Bytes of copies that are not given back, by client.
    held: HashMap<u64, u64>,
}

/// A copy, on the account of a client until it is given back.
#[derive(Clone, Debug)]
pub(crate) struct Copied {
    bytes: Vec<u8>,
    client: u64,
}

impl Deref for Copied {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Memory {
    pub(crate) fn new(limit: u64) -> Self {
        Self { used: 0, limit, free: Vec::new(), client_limit: u64::MAX, held: HashMap::new() }
    }

    /// The same, of which copies for one client take at most `bytes`.
    pub(crate) fn with_client_limit(self, bytes: u64) -> Self {
        Self { client_limit: bytes, ..self }
    }

    /// Bytes of copies that wait for this client's turn.
    pub(crate) fn held_for(&self, client: u64) -> u64 {
        self.held.get(&client).copied().unwrap_or(0)
    }

    /// Sets `bytes` aside; false when there is no room.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        let fits = self.has_room(bytes);
        if fits {
            self.used += bytes;
        }
        fits
    }

    /// Whether `bytes` more fit. Free buffers make way where they would not.
    pub(crate) fn has_room(&mut self, bytes: u64) -> bool {
        self.make_way(bytes);
        self.used.checked_add(bytes).is_some_and(|used| used <= self.limit)
    }

    /// What took `before` bytes takes `after`.
    pub(crate) fn resize(&mut self, before: u64, after: u64) {
        self.used = self.used - before + after;
        self.make_way(0);
    }

    /// Lets go of free buffers where `bytes` more would not fit beside them.
    fn make_way(&mut self, bytes: u64) {
        if self.used.saturating_add(bytes) > self.limit {
            let freed: u64 = std::mem::take(&mut self.free).iter().map(|buffer| buffer.capacity() as u64).sum();
            self.used -= freed;
        }
    }

    /// A copy of `bytes`, on the account of `client`; `None` when there is no room, or not for that client.
    pub(crate) fn copy(&mut self, client: u64, bytes: &[u8]) -> Option<Copied> {
        let held = self.held_for(client).checked_add(bytes.len() as u64)?;
        if held > self.client_limit {
            return None;
        }
        let reused = self.free.iter().position(|buffer| buffer.capacity() >= bytes.len());
        let mut buffer = match reused {
            Some(at) => self.free.swap_remove(at),
            None => self.take(bytes.len() as u64).then(|| Vec::with_capacity(bytes.len()))?,
        };
        buffer.clear();
        buffer.extend_from_slice(bytes);
        if !bytes.is_empty() {
            self.held.insert(client, held);
        }
        Some(Copied { bytes: buffer, client })
    }

    /// Takes back what [`Memory::copy`] gave.
    pub(crate) fn give_back(&mut self, Copied { bytes, client }: Copied) {
        match self.held_for(client).saturating_sub(bytes.len() as u64) {
            0 => self.held.remove(&client),
            left => self.held.insert(client, left),
        };
        self.free.push(bytes);
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
    fn one_client_cannot_take_what_others_need() {
        let mut memory = Memory::new(1000).with_client_limit(100);
        let copies: Vec<_> = [60, 40, 0].map(|bytes| memory.copy(1, &vec![1; bytes]).unwrap()).into();
        assert!(memory.copy(1, &[1]).is_none());
        assert_eq!((memory.held_for(1), memory.held_for(2)), (100, 0));
        let other = memory.copy(2, &[2; 100]).unwrap();
        copies.into_iter().for_each(|copy| memory.give_back(copy));
        assert_eq!((memory.held_for(1), memory.held_for(2)), (0, 100));
        let again = memory.copy(1, &[1; 50]).unwrap();
        [other, again].into_iter().for_each(|copy| memory.give_back(copy));
        assert!(memory.held.is_empty());
    }

    #[test]
    fn memory_is_counted_and_buffers_are_used_again() {
        let mut memory = Memory::new(100);
        assert!(memory.take(60) && !memory.take(41));
        let copy = memory.copy(0, &[1; 30]).unwrap();
        assert!(memory.copy(0, &[1; 30]).is_none());
        memory.give_back(copy);
        assert_eq!(memory.copy(0, &[2; 20]).unwrap()[..], [2; 20]);
        assert_eq!(memory.used, 90);
    }
    #[test]
    fn buffers_that_nobody_uses_make_way_for_whatever_needs_the_room() {
        let idle = || {
            let mut memory = Memory::new(100);
            let copies: Vec<_> = (0..3).map(|client| memory.copy(client, &[1; 20]).unwrap()).collect();
            copies.into_iter().for_each(|copy| memory.give_back(copy));
            assert_eq!(memory.used, 60);
            memory
        };
        let mut memory = idle();
        assert!(memory.take(40) && memory.used == 100, "they stay where there is room beside them");
        let mut memory = idle();
        assert!(memory.take(90) && memory.used == 90);
        let mut memory = idle();
        assert!(memory.has_room(41) && !memory.has_room(101) && !memory.has_room(u64::MAX));
        let mut memory = idle();
        assert!(memory.take(30));
        memory.resize(30, 100);
        assert!(memory.used == 100 && !memory.take(1));
    }
}
