//! Does: memory that is handed to collectives again and again: it begins on a page, is made known to the device once, and is
//! kept for the next that ask for as much.

use crate::Piece;
use gradwire_transport::Region;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4096;
/// Blocks of up to this many bytes are cut from stretches, so that one registration serves many.
const SMALL: usize = 256 << 10;
const STRETCH: usize = 1 << 20;
/// Larger blocks that nobody has are given up beyond this many bytes: pinned memory is taken from everybody else.
const KEPT_BYTES: usize = 256 << 20;

/// Part of a region; the pool is where it is known who has it.
struct Block {
    region: Arc<Region>,
    range: Range<usize>,
}

/// Memory of a group, in somebody's hands. Dropping it, on any thread, gives it back to the group, or frees it if that is gone.
pub struct Memory {
    /// `None` only while it is dropped.
    block: Option<Block>,
    bytes: usize,
    home: Arc<Mutex<Idle>>,
}

impl Memory {
    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        let block = self.block();
        block.region.as_ptr().wrapping_add(block.range.start)
    }

    /// Bytes that were asked for.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether none were.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The bytes, for a call.
    pub fn piece(&self) -> Piece {
        let Block { region, range } = self.block();
        Piece { region: Arc::clone(region), range: range.start..range.start + self.bytes }
    }

    fn block(&self) -> &Block {
        self.block.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            lock(&self.home).take_back(block);
        }
    }
}

#[derive(Default)]
struct Idle {
    small: BTreeMap<usize, Vec<Block>>,
    /// The longest idle first.
    large: VecDeque<Block>,
    large_bytes: usize,
}

impl Idle {
    fn take_back(&mut self, block: Block) {
        let bytes = block.range.len();
        if bytes <= SMALL {
            return self.small.entry(bytes).or_default().push(block);
        }
        self.large_bytes += bytes;
        self.large.push_back(block);
    }

    fn take(&mut self, class: usize) -> Option<Block> {
        if class <= SMALL {
            return self.small.get_mut(&class)?.pop();
        }
        let at = self.large.iter().rposition(|block| block.range.len() == class)?;
        self.large_bytes -= class;
        self.large.remove(at)
    }
}

fn lock(idle: &Mutex<Idle>) -> MutexGuard<'_, Idle> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The memory of one group that nobody has.
#[derive(Default)]
pub(crate) struct MemoryPool(Arc<Mutex<Idle>>);

impl MemoryPool {
    /// A block of `bytes` that is there.
    pub(crate) fn take(&self, bytes: usize) -> Option<Memory> {
        let block = lock(&self.0).take(class_of(bytes))?;
        Some(self.hand_out(block, bytes))
    }

    fn hand_out(&self, block: Block, bytes: usize) -> Memory {
        Memory { block: Some(block), bytes, home: Arc::clone(&self.0) }
    }

    /// A region for blocks of `bytes`, of which there is none, to be [`MemoryPool::add`]ed once the device knows it. `None`:
    /// there is not so much memory.
    pub(crate) fn stretch(bytes: usize) -> Option<Arc<Region>> {
        let class = class_of(bytes);
        let whole = if class <= SMALL { STRETCH } else { class }.checked_add(PAGE)?;
        // Asked for once without being touched: a `vec!` that is refused would end the process.
        Vec::<u8>::new().try_reserve_exact(whole).ok()?;
        Some(Region::zeroed(whole))
    }

    /// Adds a region of blocks of `bytes`, and hands the first one out.
    pub(crate) fn add(&self, region: &Arc<Region>, bytes: usize) -> Memory {
        let class = class_of(bytes);
        let first = (region.as_ptr() as usize).wrapping_neg() % PAGE;
        let block =
            |at: usize| Block { region: Arc::clone(region), range: first + at * class..first + (at + 1) * class };
        let mut idle = lock(&self.0);
        (1..(region.len() - first) / class).for_each(|at| idle.take_back(block(at)));
        drop(idle);
        self.hand_out(block(0), bytes)
    }

    /// Regions beyond what is kept, to be taken from the device: nobody has any of their bytes.
    pub(crate) fn surplus(&self) -> Vec<Arc<Region>> {
        let mut idle = lock(&self.0);
        let mut given_up = Vec::new();
        while idle.large_bytes > KEPT_BYTES
            && let Some(block) = idle.large.pop_front()
        {
            idle.large_bytes -= block.range.len();
            given_up.push(block.region);
        }
        given_up
    }
}

/// The length of blocks that serve `bytes`: a power of two, or for large ones a multiple of an eighth of it.
fn class_of(bytes: usize) -> usize {
    let above = bytes.max(PAGE).checked_next_power_of_two().unwrap_or(usize::MAX);
    if above <= SMALL { above } else { bytes.checked_next_multiple_of(above / 8).unwrap_or(usize::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(pool: &MemoryPool, bytes: usize) -> Memory {
        pool.take(bytes).unwrap_or_else(|| pool.add(&MemoryPool::stretch(bytes).unwrap(), bytes))
    }

    #[test]
    fn blocks_begin_on_pages_do_not_overlap_and_come_back_from_any_thread() {
        let pool = MemoryPool::default();
        let mut before = Vec::new();
        for _ in 0..3 {
            let all: Vec<_> = [0, 1, 5000, 5000, SMALL, SMALL + 1, 3 << 20].map(|bytes| get(&pool, bytes)).into();
            let mut starts: Vec<_> = all.iter().map(|memory| (memory.as_ptr() as usize, memory.len())).collect();
            starts.sort_unstable();
            assert!(starts.iter().all(|(start, _)| start % PAGE == 0));
            assert!(starts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0 && pair[0].0 < pair[1].0));
            let addresses: Vec<_> = starts.into_iter().map(|(start, _)| start).collect();
            assert!(before.is_empty() || before == addresses, "the same memory serves again");
            before = addresses;
            std::thread::spawn(move || drop(all)).join().unwrap();
        }
        assert_eq!(lock(&pool.0).large_bytes, class_of(SMALL + 1) + (3 << 20));
    }

    #[test]
    fn what_is_idle_beyond_the_bound_is_given_up_the_oldest_first() {
        let pool = MemoryPool::default();
        let each = KEPT_BYTES / 2;
        let all: Vec<_> = (0..3).map(|_| get(&pool, each)).collect();
        let oldest = all[0].as_ptr() as usize;
        assert!(pool.surplus().is_empty(), "it is all in use");
        drop(all);
        let given_up = pool.surplus();
        assert_eq!(given_up.iter().map(|region| region.len()).collect::<Vec<_>>(), [each + PAGE]);
        assert!((given_up[0].as_ptr() as usize..).take(PAGE).any(|start| start == oldest));
        let watch = Arc::downgrade(&given_up[0]);
        drop(given_up);
        assert!(watch.upgrade().is_none(), "and freed");
        assert!(pool.surplus().is_empty());
    }

    #[test]
    fn memory_outlives_its_group_and_more_than_there_is_is_refused() {
        let pool = MemoryPool::default();
        let memory = get(&pool, 100);
        let watch = Arc::downgrade(&memory.piece().region);
        drop(pool);
        assert!(watch.upgrade().is_some());
        drop(memory);
        assert!(watch.upgrade().is_none());
        assert!(MemoryPool::stretch(usize::MAX / 2).is_none() && MemoryPool::stretch(usize::MAX).is_none());
    }
}
