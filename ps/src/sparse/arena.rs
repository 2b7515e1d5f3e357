//! Pure: rows of one length, in chunks that never move: a new row costs no allocation of its own.

use crate::kernel::Real;

/// What a chunk aims at. The memory behind it is the system's zeros until rows are written.
const CHUNK_BYTES: usize = 2 << 20;
/// Rows begin where cache lines do, if their length lets them.
const LINE_BYTES: usize = 64;

struct Chunk<C> {
    memory: Vec<C>,
    /// Where the first row begins.
    start: usize,
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
            let spare = LINE_BYTES / size_of::<C>();
            let memory = vec![C::default(); (self.stride << self.shift) + spare];
            let start = memory.as_ptr().align_offset(LINE_BYTES).min(spare);
            self.chunks.push(Chunk { memory, start });
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
        &self.chunks[chunk].memory[range]
    }

    pub(crate) fn row_mut(&mut self, row: u32) -> &mut [C] {
        let (chunk, range) = self.place(row);
        &mut self.chunks[chunk].memory[range]
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
