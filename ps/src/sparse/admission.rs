//! Pure: how often an id has come that has no row yet: a count-min sketch of fixed size, which never counts too little until
//! it forgets (Cormode and Muthukrishnan, 2005; aged as in TinyLFU, Einziger et al., 2017).

use super::initial::mix;

/// Counters that an id raises: the least of them is its count.
const HASHES: usize = 4;
/// The most that can be asked for.
pub(crate) const MOST: u8 = 250;

/// Counts of ids.
#[derive(Clone)]
pub(crate) struct Sketch {
    key: u64,
    wanted: u8,
    counters: Vec<u8>,
    raised: u64,
}

impl Sketch {
    /// Admits an id the `wanted`-th time. `rows`: about how many there will be.
    pub(crate) fn new(wanted: u8, rows: u64, key: u64) -> Self {
        Self { key, wanted, counters: vec![0; Self::bytes_for(rows) as usize], raised: 0 }
    }

    /// Its secret, how often it was raised, and its counters.
    pub(crate) fn parts(&self) -> (u64, u64, &[u8]) {
        (self.key, self.raised, &self.counters)
    }

    /// Takes up counters from the `first` on of another of the same size; false where there are none such.
    pub(crate) fn restore(&mut self, key: u64, raised: u64, first: usize, counters: &[u8]) -> bool {
        let end = first.saturating_add(counters.len());
        (self.key, self.raised) = (key, raised.min(8 * self.counters.len() as u64));
        self.counters.get_mut(first..end).map(|to| to.copy_from_slice(counters)).is_some()
    }

    /// Bytes that a sketch for so many rows takes.
    pub(crate) fn bytes_for(rows: u64) -> u64 {
        rows.saturating_mul(4).clamp(1 << 16, 1 << 24).next_power_of_two()
    }

    /// Bytes taken.
    pub(crate) fn bytes(&self) -> u64 {
        self.counters.len() as u64
    }

    /// `id` has come. Whether that is often enough.
    pub(crate) fn admits(&mut self, id: u64) -> bool {
        let hash = mix(id ^ self.key);
        let (first, step) = (hash as u32, (hash >> 32) as u32 | 1);
        let mask = self.counters.len() - 1;
        let at: [usize; HASHES] =
            std::array::from_fn(|n| first.wrapping_add(step.wrapping_mul(n as u32)) as usize & mask);
        let least = at.iter().map(|&at| self.counters[at]).min().unwrap_or(0);
        // Only the least are raised (conservative update), which keeps others from being counted along.
        at.iter().for_each(|&at| self.counters[at] = self.counters[at].max(least.saturating_add(1)));
        self.raised += 1;
        if self.raised > 8 * self.counters.len() as u64 {
            self.raised = 0;
            self.counters.iter_mut().for_each(|counter| *counter /= 2);
        }
        least.saturating_add(1) >= self.wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_admitted_when_it_has_come_often_enough() {
        let mut sketch = Sketch::new(3, 1000, 1);
        let early: usize = (0..1000).filter(|&id| sketch.admits(id) | sketch.admits(id)).count();
        assert_eq!(early, 0, "the sketch has room for each of them");
        assert!((0..1000).all(|id| sketch.admits(id)));
    }

    #[test]
    fn what_comes_seldom_is_forgotten_and_the_memory_stays_as_it_was() {
        let mut sketch = Sketch::new(2, 1, 1);
        let bytes = sketch.bytes();
        assert!(!sketch.admits(7));
        let mut halved = 0;
        while sketch.raised > 0 {
            sketch.admits(1000 + halved);
            halved += 1;
        }
        assert!(halved < 8 * bytes + 2 && sketch.bytes() == bytes);
        assert!(sketch.counters.iter().all(|&counter| counter < 128));
    }
}
