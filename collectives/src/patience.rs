//! Does: waits a moment for the wire, before sleeping at it: by spinning where each rank has a core of its own, else by letting
//! the other ranks have this one.

/// Looks at the wire without any movement, with a core for each rank: some 20 us at shared memory, and longer at sockets, each of
/// which is read.
const LOOKS: u32 = 2000;
/// The same where ranks share cores, each after all others of this core have had their turn. Spinning would keep from their
/// work those who are waited for, and sleeping costs them a wake-up each.
const LOOKS_IN_TURN: u32 = 20;

/// How a driver waits before it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Patience {
    /// Looks without any movement before it sleeps.
    pub(crate) looks: u32,
    yields: bool,
}

impl Patience {
    /// Of one of `ranks` on a host of so many `cores`.
    pub(crate) fn new(ranks: usize, cores: usize) -> Self {
        let yields = ranks > cores;
        Self { looks: if yields { LOOKS_IN_TURN } else { LOOKS }, yields }
    }

    /// Between two looks.
    pub(crate) fn pause(self) {
        if self.yields { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_cores_give_theirs_away_and_look_less_often() {
        for (ranks, cores, shares) in [(1, 1, false), (2, 2, false), (3, 2, true), (2, 1, true)] {
            let patience = Patience::new(ranks, cores);
            assert_eq!(patience.yields, shares, "{ranks} ranks on {cores} cores");
            assert_eq!(patience.looks == LOOKS_IN_TURN, shares);
        }
    }
}
