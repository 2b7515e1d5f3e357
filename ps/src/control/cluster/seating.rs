//! Pure: which server process gets a part that nobody has, and who makes room where those with room have a part of that shard already.

use super::{Cluster, Process, Seating};
use std::collections::HashSet;

impl Process {
    fn has_room(&self) -> bool {
        !self.leaving && self.seats.iter().any(|(.., used)| !used)
    }

    fn parts(&self) -> usize {
        self.seats.iter().filter(|(.., used)| *used).count()
    }
}

impl Cluster {
    /// The processes that have a part of `shard`, its primary's first.
    pub(super) fn processes_of(&self, shard: u32) -> Vec<u64> {
        self.map.shards[shard as usize].chain().map(|(who, _)| who.process).collect()
    }

    /// A seat without a part, of a process that is none of `but`: of the one with the fewest parts.
    pub(super) fn take_seat(&mut self, but: &[u64]) -> Option<Seating> {
        let able = self.processes.iter().filter(|&(number, process)| !but.contains(number) && process.has_room());
        let best = able.min_by_key(|&(&number, process)| (process.parts(), number));
        let process = *best?.0;
        let seats = &mut self.processes.get_mut(&process)?.seats;
        let (seat, address, used) = seats.iter_mut().find(|(.., used)| !used)?;
        *used = true;
        Some(Seating { seat: *seat, process, address: address.clone() })
    }

    /// Where only processes have room that have a part of `shard`: takes a copy that serves nobody yet from its process, which comes
    /// again with room, to one of those.
    pub(super) fn make_room(&mut self, shard: u32) {
        // A place that was left is used until its process comes again: one move at a time, or copies would go round for ever.
        let is_left = |&(seat, _, used): &(u64, String, bool)| used && self.map.part_of(seat).is_none();
        if self.processes.values().any(|process| process.seats.iter().any(is_left)) {
            return;
        }
        let Some((moved, seat)) = self.movable(shard, &mut HashSet::new()) else { return };
        self.remove(moved, seat);
        let seating = self.take_seat(&self.processes_of(moved));
        self.change(moved, |seats| seats.candidate = seating);
    }

    /// The first step of a chain of moves (an augmenting path of the matching of shards to processes; Kuhn 1955) at whose end
    /// `shard` has one more copy: a copy, and its seat, of a shard that a process with room may have.
    fn movable(&self, shard: u32, tried: &mut HashSet<u64>) -> Option<(u32, u64)> {
        let own = self.processes_of(shard);
        let mut others: Vec<u64> = self.processes.keys().copied().filter(|process| !own.contains(process)).collect();
        others.sort_unstable();
        for process in others {
            if !tried.insert(process) || self.processes[&process].leaving {
                continue;
            }
            for moved in 0..self.map.shards.len() as u32 {
                let Some(seat) = self.idle_copy(moved, process) else { continue };
                let its = self.processes_of(moved);
                if self.processes.iter().any(|(number, process)| !its.contains(number) && process.has_room()) {
                    return Some((moved, seat));
                }
                if let Some(further) = self.movable(moved, tried) {
                    return Some(further);
                }
            }
        }
        None
    }

    /// The seat of `process` with a copy of `shard` that serves nobody: one on its way, or, while none is, any where not all are there
    /// for clients to come.
    fn idle_copy(&self, shard: u32, process: u64) -> Option<u64> {
        let seats = &self.map.shards[shard as usize];
        let backups = seats.backups.iter().filter(|_| !seats.formed && seats.candidate.is_none());
        seats.candidate.iter().chain(backups).find(|who| who.process == process).map(|who| who.seat)
    }
}
