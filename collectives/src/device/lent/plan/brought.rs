//! Pure: the same where no rank's device reaches another's, for reductions: what a rank is to fold comes to its device by way of the
//! hosts, in an all-to-all, and what it has folded goes to the others that way, in an all-gather.
//!
//! The set of a rank's own slot is where the others' bytes land; no rank reads another's. Folds are in the order of the ranks.

use super::{LINE, Leg, Place, Round, SLACK, Seen, Task, in_rounds, share};
use crate::Collective;
use crate::device::cut::{Side, even, ring_rounds};
use gradwire_transport::cuda::MOST_SOURCES;
use std::ops::Range;

/// Cuts of more lines are rounded to as many.
const ROUNDED: usize = 64;

impl Seen<'_> {
    /// Its rounds, for a set of `set_bytes`. `None` for other calls, where not every rank knows all lengths, or there are too many ranks.
    pub(crate) fn rounds_brought(self, set_bytes: usize) -> Option<Vec<Round>> {
        let (.., len) = even(self.collective, (self.input, self.output), self.ranks)?;
        let lines = set_bytes / LINE / self.ranks;
        let share_bytes = LINE * if lines > 4 * ROUNDED { lines / ROUNDED * ROUNDED } else { lines };
        let most = match self.collective {
            Collective::AllReduce { .. } => self.ranks * share_bytes,
            Collective::ReduceScatter { .. } => share_bytes,
            _ => return None,
        };
        if most == 0 || len % self.element_bytes != 0 || self.ranks > MOST_SOURCES {
            return None;
        }
        (0..len).step_by(most).map(|start| self.brought(len, start..len.min(start + most))).collect()
    }

    fn brought(self, len: usize, range: Range<usize>) -> Option<Round> {
        let (me, n) = (self.rank, self.ranks);
        let scatters = matches!(self.collective, Collective::ReduceScatter { .. });
        let gives = |rank: usize| match scatters {
            true => self.place(Side::Input, rank, len, &range),
            false => self.place(Side::Output, 0, len, &share(range.clone(), n, rank)),
        };
        let into = if scatters { self.place(Side::Output, 0, len, &range) } else { gives(me) };
        let (own, longest) = match scatters {
            true => (range.len(), range.len()),
            false => (share(range.clone(), n, me).len(), share(range.clone(), n, 0).len()),
        };
        let each = own.next_multiple_of(LINE);
        let all: Vec<Place> = (0..n).map(gives).collect();
        let landed: Vec<Place> =
            (0..n).map(|rank| Place::Slot { rank: me, range: rank * each..rank * each + own }).collect();
        let leg = |leg: Leg, input: &[Place], output: &[Place]| {
            let rounds = ring_rounds(input.len() + output.len(), longest, SLACK)?;
            Some(Task::Across { leg, input: in_rounds(input, rounds), output: in_rounds(output, rounds), rounds })
        };
        let come = leg(Leg::Come, &all, &landed)?;
        let fold = Task::Fold { from: landed, into: into.clone(), whole: true };
        let mut folded = vec![fold];
        if !scatters {
            folded.push(leg(Leg::Go, &[into], &all)?);
        }
        Some(vec![vec![come], folded])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reduction;
    use crate::device::cut::{SLOT_BYTES, in_turn};
    use crate::device::lent::plan::SET_BYTES;

    struct Memory {
        input: Vec<Vec<u8>>,
        output: Vec<Vec<u8>>,
        slot: Vec<u8>,
    }

    impl Memory {
        fn at(&mut self, place: &Place, me: usize) -> &mut [u8] {
            match place {
                Place::Piece { side: Side::Input, piece, range } => &mut self.input[*piece][range.clone()],
                Place::Piece { side: Side::Output, piece, range } => &mut self.output[*piece][range.clone()],
                Place::Slot { rank, range } => {
                    assert_eq!(*rank, me, "nobody reaches another's slot");
                    &mut self.slot[range.clone()]
                }
            }
        }
    }

    fn given(rank: usize, i: usize) -> u8 {
        (rank * 37 + i * 5 + i / 256) as u8
    }

    /// Not the same in another order.
    fn combined(values: impl Iterator<Item = u8>) -> u8 {
        values.reduce(|a, b| a.wrapping_mul(3).wrapping_add(b)).unwrap()
    }

    /// What collectives of all ranks do with these tasks.
    fn exchange(all: &mut [Memory], tasks: &[Task]) {
        let parts = |task: &Task| match task {
            Task::Across { leg, input, output, rounds } => (*leg, input.clone(), output.clone(), *rounds),
            _ => panic!("all ranks make the same"),
        };
        let tasks: Vec<_> = tasks.iter().map(parts).collect();
        let rounds = tasks[0].3;
        for round in 0..rounds {
            let mut moved = Vec::new();
            for (from, (leg, input, _, its)) in tasks.iter().enumerate() {
                assert!(*leg == tasks[0].0 && *its == rounds, "all ranks make as many");
                for (to, (_, _, output, _)) in tasks.iter().enumerate() {
                    let number = if *leg == Leg::Come { to } else { 0 };
                    let source = &input[round * (input.len() / rounds) + number];
                    moved.push((
                        to,
                        output[round * (output.len() / rounds) + from].clone(),
                        all[from].at(source, from).to_vec(),
                    ));
                }
            }
            for (to, place, bytes) in moved {
                all[to].at(&place, to).copy_from_slice(&bytes);
            }
        }
    }

    fn check(collective: Collective, n: usize, len: usize, one: bool, size: usize) {
        let scatters = matches!(collective, Collective::ReduceScatter { .. });
        let mut all: Vec<Memory> = (0..n)
            .map(|rank| {
                let bytes: Vec<u8> = (0..if scatters { n * len } else { len }).map(|i| given(rank, i)).collect();
                let parts = |bytes: Vec<u8>| (0..n).map(|part| bytes[part * len..(part + 1) * len].to_vec()).collect();
                let (input, output) = match (scatters, one) {
                    (false, _) => (vec![], vec![bytes]),
                    (true, true) => (vec![bytes], vec![vec![0; len]]),
                    (true, false) => (parts(bytes), vec![vec![0; len]]),
                };
                Memory { input, output, slot: vec![0; size] }
            })
            .collect();
        let plan = |(rank, memory): (usize, &Memory)| {
            let lens = |pieces: &[Vec<u8>]| pieces.iter().map(Vec::len).collect::<Vec<_>>();
            let (input, output) = (lens(&memory.input), lens(&memory.output));
            let seen =
                Seen { collective: &collective, element_bytes: 1, input: &input, output: &output, rank, ranks: n };
            seen.rounds_brought(size).unwrap()
        };
        let plans: Vec<Vec<Round>> = all.iter().enumerate().map(plan).collect();
        for round in 0..plans[0].len() {
            for phase in 0..plans[0][round].len() {
                for number in 0..plans[0][round][phase].len() {
                    let tasks: Vec<Task> = plans.iter().map(|plan| plan[round][phase][number].clone()).collect();
                    if matches!(tasks[0], Task::Across { .. }) {
                        exchange(&mut all, &tasks);
                        continue;
                    }
                    for (me, task) in tasks.iter().enumerate() {
                        let Task::Fold { from, into, whole: true } = task else { panic!("{task:?}") };
                        let sources: Vec<Vec<u8>> = from.iter().map(|place| all[me].at(place, me).to_vec()).collect();
                        let sum = |i: usize| combined(sources.iter().map(|source| source[i]));
                        let folded: Vec<u8> = (0..sources[0].len()).map(sum).collect();
                        all[me].at(into, me).copy_from_slice(&folded);
                    }
                }
            }
        }
        for (rank, memory) in all.iter().enumerate() {
            let first = if scatters { rank * len } else { 0 };
            let expected = |i| combined((0..n).map(|other| given(other, first + i)));
            let right = |(i, byte): (usize, &u8)| *byte == expected(i);
            assert!(memory.output[0].iter().enumerate().all(right), "{collective:?} of {len} on rank {rank} of {n}");
        }
    }

    #[test]
    fn every_rank_folds_its_share_in_the_order_of_the_ranks_and_all_have_it() {
        let op = Reduction::Sum;
        for n in [2, 3, 4, 7] {
            for len in [0, 1, 63, 64, 1000, 5000] {
                for size in [1024, 4096] {
                    check(Collective::AllReduce { op }, n, len, true, size);
                    check(Collective::ReduceScatter { op }, n, len, true, size);
                    check(Collective::ReduceScatter { op }, n, len, false, size);
                }
            }
        }
        // As many lines that shares are rounded.
        check(Collective::AllReduce { op }, 3, 3 * 70_000 + 1, true, 3 * 40_000);
    }

    #[test]
    fn what_comes_and_goes_fits_the_ring_and_other_calls_have_no_such_rounds() {
        let op = Reduction::Sum;
        for ranks in [2, 3, 8, 31, 32] {
            let (long, parts) = ([(64 << 20) + 8], [(2 << 20) * ranks]);
            for (collective, input, output) in [
                (Collective::AllReduce { op }, &[][..], &long[..]),
                (Collective::ReduceScatter { op }, &parts, &[2 << 20]),
            ] {
                let seen = Seen { collective: &collective, element_bytes: 4, input, output, rank: ranks - 1, ranks };
                let plan = seen.rounds_brought(SET_BYTES).unwrap();
                for task in plan.iter().flatten().flatten() {
                    let Task::Across { input, output, rounds, .. } = task else { continue };
                    let len = |place: &Place| match place {
                        Place::Piece { range, .. } | Place::Slot { range, .. } => range.len(),
                    };
                    let lens = |places: &[Place]| places.iter().map(len).collect::<Vec<_>>();
                    let turns = in_turn(&lens(input), &lens(output), *rounds);
                    assert!(turns.iter().all(|turn| turn.bytes <= SLOT_BYTES), "{ranks} ranks: {collective:?}");
                }
            }
        }
        let root = gradwire_transport::Rank(0);
        for (collective, ranks) in [
            (Collective::Reduce { op, root }, 2),
            (Collective::Broadcast { root }, 2),
            (Collective::AllReduce { op }, MOST_SOURCES + 1),
        ] {
            let seen = Seen { collective: &collective, element_bytes: 4, input: &[], output: &[4096], rank: 0, ranks };
            assert_eq!(seen.rounds_brought(SET_BYTES), None);
        }
    }
}
