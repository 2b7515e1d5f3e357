//! Does: which memory the device knows: registered at first use, kept while room lasts, forgotten by age.
//!
//! An entry holds its region, so its memory can be neither freed nor mapped anew while the device may reach it: an address
//! that is found here is the memory that was registered, for certain.

#![allow(unsafe_code)]

use super::adapter::{Access, Adapter, Key};
use crate::{Region, RegisterError};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Entries looked at for one that covers an address: several regions may begin before it.
const LOOK_BACK: usize = 16;

struct Entry {
    end: usize,
    key: Key,
    access: Access,
    uses: u32,
    last_use: u64,
    /// `None` for memory of the wire's own, which stays.
    region: Option<Arc<Region>>,
}

/// Registered memory in use; to be given back by [`Registrations::release`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Lease {
    start: usize,
    serial: u64,
    pub(super) local: u32,
    pub(super) remote: u32,
}

/// Counted since the start; nothing moves on a warm data path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegistrationCount {
    /// Registrations made.
    pub made: u64,
    /// Registrations given up for want of room.
    pub evicted: u64,
    /// Bytes of callers' memory registered now.
    pub bytes: usize,
}

/// All registrations of one device.
pub(super) struct Registrations {
    entries: BTreeMap<(usize, u64), Entry>,
    limit_bytes: usize,
    serial: u64,
    clock: u64,
    count: RegistrationCount,
}

impl Registrations {
    /// Of callers' memory at most `limit_bytes` are kept while nobody uses them.
    pub(super) fn new(limit_bytes: usize) -> Self {
        let count = RegistrationCount::default();
        Self { entries: BTreeMap::new(), limit_bytes, serial: 0, clock: 0, count }
    }

    pub(super) fn count(&self) -> RegistrationCount {
        self.count
    }

    /// The registration that covers `bytes` from `start` on, if there is one.
    pub(super) fn find(&mut self, start: usize, bytes: usize, access: Access) -> Option<Lease> {
        let end = start.checked_add(bytes)?;
        let near = self.entries.range_mut(..=(start, u64::MAX)).rev().take(LOOK_BACK);
        let allows = |entry: &Entry| entry.access == access || entry.access == Access::Write;
        let (&(start, serial), entry) = near.into_iter().find(|(_, entry)| end <= entry.end && allows(entry))?;
        self.clock += 1;
        (entry.last_use, entry.uses) = (self.clock, entry.uses + 1);
        Some(Lease { start, serial, local: entry.key.local, remote: entry.key.remote })
    }

    /// The registration of `range` of `region`, made if need be: of the whole region, so that other parts of it are found too.
    ///
    /// # Errors
    /// The device's, once everything that is not in use has been given up for it.
    pub(super) fn lease(
        &mut self,
        adapter: &mut dyn Adapter,
        region: &Arc<Region>,
        range: Range<usize>,
        access: Access,
    ) -> Result<Lease, RegisterError> {
        let used = region.as_ptr() as usize + range.start;
        if let Some(lease) = self.find(used, range.len(), access) {
            return Ok(lease);
        }
        let region = region.lasting();
        let (first, whole) = (region.as_ptr() as usize, region.len() <= self.limit_bytes / 2);
        let (start, end) = if whole { (first, first + region.len()) } else { (used, used + range.len()) };
        self.make_room(adapter, (end - start).min(self.limit_bytes));
        let (key, access) = match self.register(adapter, start..end, access) {
            Err(_) => {
                self.make_room(adapter, self.limit_bytes);
                self.register(adapter, start..end, access)?
            }
            Ok(made) => made,
        };
        self.count.bytes += end - start;
        self.insert(start..end, key, access, Some(Arc::clone(region)));
        self.find(used, range.len(), access).ok_or_else(|| unreachable!("it was just put in"))
    }

    /// Memory that may be written may also be sent; memory that may only be read is registered for that alone.
    fn register(
        &mut self,
        adapter: &mut dyn Adapter,
        range: Range<usize>,
        access: Access,
    ) -> Result<(Key, Access), RegisterError> {
        let start = range.start as *mut u8;
        // SAFETY: the entry keeps the region, and with it the mapping, until it is deregistered.
        let wide = unsafe { adapter.register(start, range.len(), Access::Write) };
        let made = match (wide, access) {
            (Ok(key), _) => (key, Access::Write),
            // SAFETY: as above.
            (Err(_), Access::Read) => (unsafe { adapter.register(start, range.len(), Access::Read) }?, Access::Read),
            (Err(error), _) => return Err(error),
        };
        self.count.made += 1;
        Ok(made)
    }

    /// Registers memory of the wire's own, which stays.
    ///
    /// # Safety
    /// It stays mapped for as long as the adapter lives.
    ///
    /// # Errors
    /// The device's.
    pub(super) unsafe fn keep(
        &mut self,
        adapter: &mut dyn Adapter,
        start: *mut u8,
        bytes: usize,
    ) -> Result<(), RegisterError> {
        // SAFETY: promised by the caller.
        let key = unsafe { adapter.register(start, bytes, Access::Write) }?;
        self.count.made += 1;
        self.insert(start as usize..start as usize + bytes, key, Access::Write, None);
        Ok(())
    }

    fn insert(&mut self, range: Range<usize>, key: Key, access: Access, region: Option<Arc<Region>>) {
        self.serial += 1;
        self.clock += 1;
        let entry = Entry { end: range.end, key, access, uses: 0, last_use: self.clock, region };
        self.entries.insert((range.start, self.serial), entry);
    }

    /// Nothing of the lease is under way any more.
    pub(super) fn release(&mut self, lease: Lease) {
        if let Some(entry) = self.entries.get_mut(&(lease.start, lease.serial)) {
            entry.uses -= 1;
        }
    }

    /// Gives up what is registered of `region` and not in use.
    pub(super) fn forget(&mut self, adapter: &mut dyn Adapter, region: &Arc<Region>) {
        let of_it = |entry: &Entry| entry.region.as_ref().is_some_and(|known| Arc::ptr_eq(known, region.lasting()));
        let idle = self.entries.iter().filter(|(_, entry)| entry.uses == 0 && of_it(entry));
        let idle: Vec<(usize, u64)> = idle.map(|(&key, _)| key).collect();
        idle.into_iter().for_each(|key| self.give_up(adapter, key));
    }

    fn give_up(&mut self, adapter: &mut dyn Adapter, key: (usize, u64)) {
        if let Some(entry) = self.entries.remove(&key) {
            adapter.deregister(entry.key.handle);
            self.count.bytes -= entry.end - key.0;
        }
    }

    /// Gives up registrations until `bytes` more have room: first of memory that nobody else holds any more, then of what was
    /// not used for longest.
    fn make_room(&mut self, adapter: &mut dyn Adapter, bytes: usize) {
        while self.count.bytes + bytes > self.limit_bytes {
            let idle = self.entries.iter().filter(|(_, entry)| entry.uses == 0 && entry.region.is_some());
            let held = |entry: &Entry| entry.region.as_ref().is_some_and(|region| Arc::strong_count(region) > 1);
            let Some((&oldest, _)) = idle.min_by_key(|(_, entry)| (held(entry), entry.last_use)) else { return };
            self.give_up(adapter, oldest);
            self.count.evicted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::{Fabric, Loopback};
    use super::*;

    fn adapter() -> Loopback {
        Fabric::default().adapter()
    }

    #[test]
    fn memory_is_registered_once_and_found_in_every_part() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(1 << 20));
        let region = Region::zeroed(1000);
        for range in [0..1000, 0..1, 999..1000, 3..700] {
            let lease = registrations.lease(&mut adapter, &region, range, Access::Write).unwrap();
            registrations.release(lease);
        }
        assert_eq!(registrations.count(), RegistrationCount { made: 1, evicted: 0, bytes: 1000 });
        assert!(
            registrations.find(region.as_ptr() as usize, 1001, Access::Read).is_none(),
            "longer than what is known"
        );
        assert!(registrations.find(region.as_ptr() as usize - 1, 2, Access::Read).is_none());
    }

    #[test]
    fn the_oldest_goes_first_and_what_is_in_use_stays() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(3000));
        let regions: Vec<_> = (0..4).map(|_| Region::zeroed(1000)).collect();
        let lease = |registrations: &mut Registrations, adapter: &mut Loopback, at: usize| {
            registrations.lease(adapter, &regions[at], 0..1000, Access::Read).unwrap()
        };
        let held = lease(&mut registrations, &mut adapter, 0);
        for at in [1, 2, 1, 3] {
            let lease = lease(&mut registrations, &mut adapter, at);
            registrations.release(lease);
        }
        let known = |registrations: &mut Registrations, at: usize| {
            let found = registrations.find(regions[at].as_ptr() as usize, 1000, Access::Read);
            found.inspect(|&lease| registrations.release(lease)).is_some()
        };
        assert_eq!([0, 1, 2, 3].map(|at| known(&mut registrations, at)), [true, true, false, true]);
        assert_eq!(registrations.count(), RegistrationCount { made: 4, evicted: 1, bytes: 3000 });
        registrations.release(held);
        assert_eq!(adapter.registered(), 3);
    }

    #[test]
    fn a_region_of_more_than_half_the_room_is_registered_in_the_parts_that_are_used() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(1000));
        let region = Region::zeroed(5000);
        for start in [0, 400, 2000] {
            let lease = registrations.lease(&mut adapter, &region, start..start + 400, Access::Write).unwrap();
            registrations.release(lease);
        }
        assert_eq!(registrations.count(), RegistrationCount { made: 3, evicted: 1, bytes: 800 });
    }

    #[test]
    fn memory_that_was_registered_is_found_through_another_s_region_until_it_is_forgotten() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(10_000));
        let stretch = Region::zeroed(4096);
        let first = registrations.lease(&mut adapter, &stretch, 0..4096, Access::Write).unwrap();
        registrations.release(first);
        let start = std::ptr::NonNull::new(stretch.as_ptr().wrapping_add(1024)).unwrap();
        for _ in 0..3 {
            // SAFETY: the part lies within the stretch, which it keeps alive, and nobody reads or writes it.
            let tensor = unsafe { Region::from_raw(start, 1000, Box::new(Arc::clone(&stretch))) };
            let lease = registrations.lease(&mut adapter, &tensor, 0..1000, Access::Write).unwrap();
            assert_eq!((lease.start, lease.local), (first.start, first.local));
            registrations.release(lease);
            let watch = Arc::downgrade(&tensor);
            drop(tensor);
            assert!(watch.upgrade().is_none(), "the tensor itself is not held");
        }
        assert_eq!(registrations.count(), RegistrationCount { made: 1, evicted: 0, bytes: 4096 });
        let held = registrations.lease(&mut adapter, &stretch, 0..4096, Access::Read).unwrap();
        registrations.forget(&mut adapter, &stretch);
        assert_eq!(adapter.registered(), 1, "it is in use");
        registrations.release(held);
        registrations.forget(&mut adapter, &stretch);
        assert_eq!((adapter.registered(), registrations.count().bytes), (0, 0));
        let watch = Arc::downgrade(&stretch);
        drop(stretch);
        assert!(watch.upgrade().is_none());
    }

    #[test]
    fn memory_that_is_used_by_one_after_the_other_is_registered_once_and_holds_no_user() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(10_000));
        let memory = Region::zeroed(4096);
        for range in [0..4096, 1024..2048] {
            let user = Region::of_slice(memory.write(range).unwrap());
            let lease = registrations.lease(&mut adapter, &user, 1..1000, Access::Write).unwrap();
            registrations.release(lease);
            drop(user);
            assert!(memory.write(0..4096).is_ok(), "nobody uses it any more");
        }
        assert_eq!(registrations.count(), RegistrationCount { made: 1, evicted: 0, bytes: 4096 });
        let user = Region::of_slice(memory.write(0..1).unwrap());
        registrations.forget(&mut adapter, &user);
        assert_eq!(adapter.registered(), 0);
    }

    #[test]
    fn memory_that_nobody_else_holds_goes_before_what_is_older() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(2000));
        let pooled = Region::zeroed(1000);
        for region in [Arc::clone(&pooled), Region::zeroed(1000), Region::zeroed(1000)] {
            let lease = registrations.lease(&mut adapter, &region, 0..1000, Access::Write).unwrap();
            registrations.release(lease);
        }
        assert!(registrations.find(pooled.as_ptr() as usize, 1000, Access::Write).is_some());
        assert_eq!(registrations.count(), RegistrationCount { made: 3, evicted: 1, bytes: 2000 });
    }

    #[test]
    fn what_is_registered_is_kept_alive() {
        let (mut adapter, mut registrations) = (adapter(), Registrations::new(1000));
        let region = Region::zeroed(100);
        let watch = Arc::downgrade(&region);
        let lease = registrations.lease(&mut adapter, &region, 0..100, Access::Write).unwrap();
        registrations.release(lease);
        drop(region);
        assert!(watch.upgrade().is_some(), "or its addresses could become another's");
        registrations.make_room(&mut adapter, 1000);
        assert!(watch.upgrade().is_none());
    }
}
