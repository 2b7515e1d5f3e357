//! Does: takes the calling thread from the core that it runs on to another one.

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Leaves this core for another of those that the thread may run on; it may come back whenever the system likes.
///
/// Where it may run on this one only, or the system refuses, it stays: slower, never wrong.
pub(super) fn leave() {
    let here = sched_getcpu();
    let Ok(all) = sched_getaffinity(None) else { return };
    let mut others = all;
    if all.count() < 2 || here >= CpuSet::MAX_CPU || !all.is_set(here) {
        return;
    }
    others.unset(here);
    if sched_setaffinity(None, &others).is_ok()
        && let Err(error) = sched_setaffinity(None, &all)
    {
        tracing::warn!(%error, "a thread that left a shared core cannot be given it back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_leaves_its_core_and_may_come_back() {
        let all = sched_getaffinity(None).unwrap();
        // The system may move it at any time; that one of many calls finds it elsewhere is for the call alone to bring about.
        let moved = (0..20).any(|_| {
            let before = sched_getcpu();
            leave();
            sched_getcpu() != before
        });
        assert!(moved || all.count() < 2);
        assert_eq!(sched_getaffinity(None).unwrap(), all);
    }
}
