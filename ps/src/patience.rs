//! Pure: how long to look for more before sleeping, learned from how long it took to come.
//!
//! A sleeper's waking costs tens of microseconds, which is more than many answers take. So whoever has just been busy
//! looks on for a while, as long as what it waits for lately came soon, and not at all where it did not: the way that KVM
//! polls before it halts a processor (Linux, Documentation/virt/kvm/halt-polling.rst).

use std::time::Duration;

/// The first step from not looking at all.
const FIRST: Duration = Duration::from_micros(20);

/// The longest that is ever looked for, unless a setting says otherwise: a few wakings' worth.
pub(crate) const MOST: Duration = Duration::from_micros(200);

/// How long to look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    most: Duration,
    now: Duration,
}

impl Patience {
    /// Never looks for longer than `most`; begins by sleeping at once.
    pub(crate) const fn new(most: Duration) -> Self {
        Self { most, now: Duration::ZERO }
    }

    /// Whether to look on, `idle` after something came.
    pub(crate) fn looks_on(&self, idle: Duration) -> bool {
        idle < self.now
    }

    /// Something came `idle` after the one before.
    pub(crate) fn learn(&mut self, idle: Duration) {
        if idle > self.most {
            self.now /= 2;
            if self.now < FIRST {
                self.now = Duration::ZERO;
            }
        } else if idle >= self.now {
            self.now = (self.now * 2).max(FIRST).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn after(waits: &[u64]) -> Patience {
        let mut patience = Patience::new(MOST);
        waits.iter().for_each(|&wait| patience.learn(us(wait)));
        patience
    }

    #[test]
    fn who_is_answered_soon_looks_for_the_next_answer() {
        assert!(!after(&[]).looks_on(Duration::ZERO));
        let patience = after(&[50; 5]);
        assert!(patience.looks_on(us(50)) && !patience.looks_on(us(81)), "twice what it takes, at the most");
    }

    #[test]
    fn nobody_looks_for_longer_than_the_most() {
        assert!(!after(&[199; 20]).looks_on(MOST));
        let mut none = Patience::new(Duration::ZERO);
        (0..20).for_each(|_| none.learn(us(1)));
        assert!(!none.looks_on(Duration::ZERO));
    }

    #[test]
    fn who_waits_in_vain_soon_sleeps_at_once() {
        let waits: Vec<u64> = [[150; 8], [5000; 8]].concat();
        assert!(!after(&waits).looks_on(Duration::ZERO));
    }
}
