//! Pure: rows of one length, in chunks that never move: a new row costs no allocation of its own.

use crate::kernel::Real;
use std::sync::Arc;

/// What a chunk aims at. The memory behind it is the system's zeros until rows are written.
const CHUNK_BYTES: usize = 2 << 20;
/// Rows begin where cache lines do, if their length lets them.
const LINE_BYTES: usize = 64;

#[derive(Clone)]
struct Chunk<C> {
    memory: Memory<C>,
    /// Where the first row begins.
    start: usize,
}

/// Memory of our own, or shared with an image until it is written. Two kinds, so that writing asks no counter.
#[derive(Clone)]
enum Memory<C> {
    Own(Vec<C>),
    Shared(Arc<Vec<C>>),
}

impl<C: Real> Chunk<C> {
    fn all(&self) -> &[C] {
        match &self.memory {
            Memory::Own(memory) => memory,
            Memory::Shared(memory) => memory,
        }
    }

    /// Makes the memory our own: a copy, where an image still holds it.
    #[cold]
    fn unshare(&mut self) {
        let Memory::Shared(shared) = std::mem::replace(&mut self.memory, Memory::Own(Vec::new())) else { return };
        match Arc::try_unwrap(shared) {
            Ok(memory) => self.memory = Memory::Own(memory),
            Err(shared) => {
                let spare = LINE_BYTES / size_of::<C>();
                let rows = &shared[self.start..shared.len() - (spare - self.start)];
                let mut fresh = Self::new(rows.len());
                if let Memory::Own(memory) = &mut fresh.memory {
                    memory[fresh.start..fresh.start + rows.len()].copy_from_slice(rows);
                }
                *self = fresh;
            }
        }
    }

    fn new(elements: usize) -> Self {
        let spare = LINE_BYTES / size_of::<C>();
        let memory = vec![C::default(); elements + spare];
        let start = memory.as_ptr().align_offset(LINE_BYTES).min(spare);
        Self { memory: Memory::Own(memory), start }
    }
}

/// Rows, by number.
pub(crate) struct Arena<C> {
    /// Elements of a row.
    stride: usize,
    /// A chunk holds this power of two of rows.
    shift: u32,
    chunks: Vec<Chunk<C>>,
    rows: u32,
    free: Vec<u32>,
}

impl<C: Real> Arena<C> {
    /// An arena of rows of `stride` elements. `most`: more rows will never be wanted.
    pub(crate) fn new(stride: usize, most: Option<u64>) -> Self {
        let each = (stride * size_of::<C>()).max(1);
        let wanted = most.unwrap_or(u64::MAX).clamp(1, (CHUNK_BYTES / each).max(1) as u64);
        Self { stride, shift: (wanted + 1).ilog2(), chunks: Vec::new(), rows: 0, free: Vec::new() }
    }

    /// Bytes that one more chunk takes.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        ((self.stride << self.shift) * size_of::<C>() + LINE_BYTES) as u64
    }

    /// Chunks that `more` new rows would need.
    pub(crate) fn chunks_for(&self, more: u64) -> u64 {
        let room = ((self.chunks.len() as u64) << self.shift) - u64::from(self.rows) + self.free.len() as u64;
        more.saturating_sub(room).div_ceil(1 << self.shift)
    }

    /// Chunks there are.
    pub(crate) fn chunks(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// A row to be written, from those given back or from a chunk.
    pub(crate) fn take(&mut self) -> u32 {
        if let Some(row) = self.free.pop() {
            return row;
        }
        let row = self.rows;
        assert!(row < u32::MAX, "a shard holds fewer than 2^32 rows of a table: give it more shards");
        if (row >> self.shift) as usize == self.chunks.len() {
            self.chunks.push(Chunk::new(self.stride << self.shift));
        }
        self.rows += 1;
        row
    }

    /// Gives a row back.
    pub(crate) fn give_back(&mut self, row: u32) {
        self.free.push(row);
    }

    pub(crate) fn row(&self, row: u32) -> &[C] {
        let (chunk, range) = self.place(row);
        &self.chunks[chunk].all()[range]
    }

    pub(crate) fn row_mut(&mut self, row: u32) -> &mut [C] {
        let chunk = &mut self.chunks[(row >> self.shift) as usize];
        if matches!(chunk.memory, Memory::Shared(_)) {
            chunk.unshare();
        }
        let (at, range) = self.place(row);
        match &mut self.chunks[at].memory {
            Memory::Own(memory) => &mut memory[range],
            Memory::Shared(_) => unreachable!("it was made our own"),
        }
    }

    /// The rows as they are now. They are shared until they are written: a chunk is copied then.
    pub(crate) fn image(&mut self) -> Self {
        for chunk in &mut self.chunks {
            if let Memory::Own(memory) = &mut chunk.memory {
                chunk.memory = Memory::Shared(Arc::new(std::mem::take(memory)));
            }
        }
        let (stride, shift, chunks) = (self.stride, self.shift, self.chunks.clone());
        Self { stride, shift, chunks, rows: self.rows, free: Vec::new() }
    }

    #[inline]
    fn place(&self, row: u32) -> (usize, std::ops::Range<usize>) {
        let chunk = (row >> self.shift) as usize;
        let start = self.chunks[chunk].start + (row as usize & ((1 << self.shift) - 1)) * self.stride;
        (chunk, start..start + self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_what_is_written_to_them_and_come_again_once_given_back() {
        for stride in [1usize, 16, 65, 600_000] {
            let mut arena = Arena::<f32>::new(stride, None);
            let rows: Vec<u32> = (0..9).map(|_| arena.take()).collect();
            for &row in &rows {
                arena.row_mut(row).fill(row as f32);
            }
            for &row in &rows {
                assert!(arena.row(row).len() == stride && arena.row(row).iter().all(|&value| value == row as f32));
                assert!(stride % 16 != 0 || arena.row(row).as_ptr().align_offset(LINE_BYTES) == 0);
            }
            arena.give_back(rows[4]);
            assert_eq!(arena.take(), rows[4]);
        }
    }

    #[test]
    fn an_image_keeps_the_rows_as_they_were() {
        let mut arena = Arena::<f32>::new(16, Some(4));
        let rows: Vec<u32> = (0..9).map(|_| arena.take()).collect();
        rows.iter().for_each(|&row| arena.row_mut(row).fill(row as f32));
        let image = arena.image();
        rows.iter().for_each(|&row| arena.row_mut(row).fill(-1.0));
        for &row in &rows {
            assert!(image.row(row).iter().all(|&value| value == row as f32));
            assert!(arena.row(row).iter().all(|&value| value == -1.0));
            assert_eq!(arena.row(row).as_ptr().align_offset(LINE_BYTES), 0);
        }
        drop(image);
        let before = arena.image();
        let address = before.row(0).as_ptr();
        drop(before);
        arena.row_mut(0).fill(2.0);
        assert_eq!(arena.row(0).as_ptr(), address, "nobody else holds it, so nothing is copied");
    }

    #[test]
    fn chunks_are_counted_before_they_are_taken() {
        let mut arena = Arena::<f64>::new(1 << 16, None);
        assert_eq!((arena.chunks_for(0), arena.chunks_for(1), arena.chunks_for(5)), (0, 1, 2));
        let first = arena.take();
        assert_eq!((arena.chunks(), arena.chunks_for(3), arena.chunks_for(4)), (1, 0, 1));
        arena.give_back(first);
        assert_eq!(arena.chunks_for(4), 0);
        // A table of few rows takes no chunk of many.
        assert!(Arena::<f32>::new(4, Some(10)).chunk_bytes() <= 16 * 16 + 64);
    }
}
