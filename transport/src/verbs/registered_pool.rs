//! Does: the wire's own registered memory: buffers by size class, carved from slabs, lent out and taken back from any thread.

#![allow(unsafe_code)]

use super::adapter::Adapter;
use super::registrations::Registrations;
use crate::RegisterError;
use crate::region::{Loan, LoanHome};
use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Smallest buffer; every class holds twice as much as the one before.
const SMALLEST: usize = 16 << 10;
/// The largest buffer is of 4 MiB.
const CLASSES: usize = 9;
/// Longest buffer.
pub(super) const LARGEST: usize = SMALLEST << (CLASSES - 1);
const PAGE: usize = 4096;
/// Buffers of the small classes are carved from slabs of this size, so that few registrations serve many.
const SLAB: usize = 1 << 20;

/// Memory of the pool, and where it lies.
pub(super) struct Lent {
    pub(super) loan: Loan,
    pub(super) address: usize,
}

struct Slabs {
    free: [Vec<NonNull<u8>>; CLASSES],
    all: Vec<(NonNull<u8>, Layout)>,
    bytes: usize,
}

// SAFETY: the pointers are to heap memory that this value owns.
unsafe impl Send for Slabs {}

/// The memory; outlives the wire while loans are out.
struct Home(Mutex<Slabs>);

impl Home {
    fn slabs(&self) -> MutexGuard<'_, Slabs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoanHome for Home {
    /// A ticket is the buffer's address with its class in the low bits, which are free: buffers begin on pages.
    fn give_back(&self, ticket: u64) {
        let (class, address) = (ticket as usize % PAGE, ticket as usize / PAGE * PAGE);
        if let Some(start) = NonNull::new(address as *mut u8) {
            self.slabs().free[class].push(start);
        }
    }
}

impl Drop for Slabs {
    fn drop(&mut self) {
        for &(start, layout) in &self.all {
            // SAFETY: it was allocated with this layout, and no loan is out, since each holds the home.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
        }
    }
}

/// The pool of one wire.
pub(super) struct RegisteredPool {
    home: Arc<Home>,
    limit_bytes: usize,
}

impl RegisteredPool {
    /// At most `limit_bytes` in all.
    pub(super) fn new(limit_bytes: usize) -> Self {
        let slabs = Slabs { free: std::array::from_fn(|_| Vec::new()), all: Vec::new(), bytes: 0 };
        Self { home: Arc::new(Home(Mutex::new(slabs))), limit_bytes }
    }

    /// A buffer of `bytes`, registered; `None` where everything is lent out, or it is longer than the longest.
    ///
    /// # Errors
    /// The device's, when more memory was to be registered.
    pub(super) fn take(
        &self,
        bytes: usize,
        adapter: &mut dyn Adapter,
        registrations: &mut Registrations,
    ) -> Result<Option<Lent>, RegisterError> {
        let Some(class) = (0..CLASSES).find(|class| bytes <= SMALLEST << class) else { return Ok(None) };
        if self.home.slabs().free[class].is_empty() && !self.grow(class, adapter, registrations)? {
            return Ok(None);
        }
        let Some(start) = self.home.slabs().free[class].pop() else { return Ok(None) };
        let (address, home) = (start.as_ptr() as usize, Arc::clone(&self.home) as Arc<dyn LoanHome>);
        // SAFETY: the buffer is of the home's memory, holds `bytes`, and is in nobody's hands until it is given back.
        let loan = unsafe { Loan::new(start, bytes, (address + class) as u64, home) };
        Ok(Some(Lent { loan, address }))
    }

    /// Adds a slab of buffers; whether there was room for it.
    fn grow(
        &self,
        class: usize,
        adapter: &mut dyn Adapter,
        registrations: &mut Registrations,
    ) -> Result<bool, RegisterError> {
        let each = SMALLEST << class;
        let bytes = SLAB.max(each);
        let mut slabs = self.home.slabs();
        if slabs.bytes + bytes > self.limit_bytes {
            return Ok(false);
        }
        let layout = Layout::from_size_align(bytes, PAGE).expect("a power of two above a page");
        // SAFETY: the layout is not empty.
        let Some(start) = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }) else { return Ok(false) };
        // SAFETY: the wire drops its adapter before its pool, so the memory outlives the registration.
        if let Err(error) = unsafe { registrations.keep(adapter, start.as_ptr(), bytes) } {
            // SAFETY: it was just allocated with this layout, and nobody has it.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
            return Err(error);
        }
        slabs.all.push((start, layout));
        slabs.bytes += bytes;
        for at in 0..bytes / each {
            // SAFETY: it lies within the slab.
            let buffer = unsafe { start.add(at * each) };
            slabs.free[class].push(buffer);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::Fabric;
    use super::*;

    #[test]
    fn buffers_come_back_from_any_thread_and_are_registered_once() {
        let (mut adapter, mut registrations) = (Fabric::default().adapter(), Registrations::new(0));
        let pool = RegisteredPool::new(8 << 20);
        for round in 0..20 {
            let lent: Vec<_> = [1, 16_384, 16_385, 300_000, 4 << 20]
                .map(|bytes| pool.take(bytes, &mut adapter, &mut registrations).unwrap().unwrap())
                .into();
            for (at, a) in lent.iter().enumerate() {
                assert_eq!(a.address % PAGE, 0);
                assert!(lent[..at].iter().all(|b| b.address != a.address));
            }
            let last = registrations.count().made;
            assert!(round == 0 || last == 4, "nothing is registered once warm: {last}");
            std::thread::spawn(move || drop(lent)).join().unwrap();
        }
        assert!(pool.take((4 << 20) + 1, &mut adapter, &mut registrations).unwrap().is_none());
        let big = pool.take(4 << 20, &mut adapter, &mut registrations).unwrap();
        assert!(pool.take(4 << 20, &mut adapter, &mut registrations).unwrap().is_none(), "the bound of the whole");
        drop(big);
        assert!(pool.take(4 << 20, &mut adapter, &mut registrations).unwrap().is_some());
    }
}
