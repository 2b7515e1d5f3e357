//! Does: keeps buffers for messages that wait for their receive, or are lent; reused, so that a warm wire allocates nothing.

use crate::region::BufferHome;
use std::sync::{Mutex, PoisonError};

/// Smallest buffer; every class holds twice as much as the one before.
const SMALLEST: usize = 4 << 10;
const CLASSES: usize = 12;
/// Bytes kept for later in one class, in any case; and the most, for as long as so many are needed at once.
const KEPT_BYTES: usize = 8 << 20;
const MOST_KEPT_BYTES: usize = 128 << 20;
/// Of so many buffers that come back in a row, those that were never needed meanwhile are let go.
const FORGET_TURNS: u32 = 4096;

/// Buffers by size class.
#[derive(Default)]
pub(crate) struct Pool {
    classes: Mutex<[Class; CLASSES]>,
}

/// Buffers of one size.
#[derive(Default)]
struct Class {
    free: Vec<Vec<u8>>,
    /// The fewest that were free, of late.
    fewest: usize,
    turns: u32,
}

impl Class {
    fn take(&mut self) -> Option<Vec<u8>> {
        let taken = self.free.pop();
        self.fewest = self.fewest.min(self.free.len());
        taken
    }

    fn take_back(&mut self, buffer: Vec<u8>) {
        let bytes = buffer.len();
        if self.free.len() < MOST_KEPT_BYTES / bytes {
            self.free.push(buffer);
        }
        self.turns += 1;
        if self.turns >= FORGET_TURNS {
            let needed = self.free.len() - self.fewest;
            self.free.truncate(needed.max(KEPT_BYTES / bytes));
            (self.fewest, self.turns) = (self.free.len(), 0);
        }
    }
}

impl Pool {
    /// A buffer of at least `bytes`; its contents are whatever was there.
    pub(crate) fn take(&self, bytes: usize) -> Vec<u8> {
        let Some(class) = class_of(bytes) else { return vec![0; bytes] };
        let free = self.classes.lock().unwrap_or_else(PoisonError::into_inner)[class].take();
        free.unwrap_or_else(|| vec![0; SMALLEST << class])
    }
}

impl BufferHome for Pool {
    fn take_back(&self, buffer: Vec<u8>) {
        let Some(class) = class_of(buffer.len()).filter(|class| buffer.len() == SMALLEST << class) else { return };
        self.classes.lock().unwrap_or_else(PoisonError::into_inner)[class].take_back(buffer);
    }
}

fn class_of(bytes: usize) -> Option<usize> {
    (0..CLASSES).find(|class| bytes <= SMALLEST << class)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const BYTES: usize = 1 << 20;

    fn kept(pool: &Pool) -> usize {
        pool.classes.lock().unwrap().iter().map(|class| class.free.iter().map(Vec::len).sum::<usize>()).sum()
    }

    /// Takes `count` buffers at once, and gives them back; where they lie.
    fn turn(pool: &Pool, count: usize) -> BTreeSet<usize> {
        let buffers: Vec<Vec<u8>> = (0..count).map(|_| pool.take(BYTES)).collect();
        let places = buffers.iter().map(|buffer| buffer.as_ptr().addr()).collect();
        buffers.into_iter().for_each(|buffer| pool.take_back(buffer));
        places
    }

    #[test]
    fn as_many_are_kept_as_are_lent_at_once_and_no_more_for_long() {
        let pool = Pool::default();
        let first = turn(&pool, 64);
        assert_eq!((kept(&pool), turn(&pool, 64)), (64 * BYTES, first), "a warm pool makes none anew");
        turn(&pool, 200);
        assert_eq!(kept(&pool), MOST_KEPT_BYTES);
        for _ in 0..2 * FORGET_TURNS {
            turn(&pool, 1);
        }
        assert_eq!(kept(&pool), KEPT_BYTES);
    }

    #[test]
    fn a_buffer_of_a_strange_size_is_not_kept() {
        let pool = Pool::default();
        pool.take_back(vec![0; 5000]);
        pool.take_back(pool.take(64 << 20));
        assert_eq!(kept(&pool), 0);
    }
}
