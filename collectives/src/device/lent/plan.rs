//! Pure: how ranks carry a call out by memory of their devices which all of them reach: what each copies and folds in every round,
//! and when all take a step.
//!
//! Every rank lends the others a slot of two sets. A round's first phase puts what this rank gives into one set of its own slot;
//! after a step of all the others read it. The next round has the other set, and before a set is written anew two rounds later,
//! all have taken the first step of the round between, so have read what they wanted of it. Reductions fold in the order of the
//! ranks, and only one rank makes each element of what several get: the same bits on all.

use crate::Collective;
use crate::chunk::chunk;
use crate::device::cut::{Side, even};
use gradwire_transport::Rank;
use gradwire_transport::cuda::MOST_SOURCES;
use std::ops::Range;

/// Bytes of a set: long enough that what a step takes is little beside what a device does between two.
pub(crate) const SET_BYTES: usize = 16 << 20;
/// Sets of a slot.
pub(crate) const SETS: usize = 2;
/// Parts begin on such borders: a multiple of every element's length, and of what a kernel reads at once.
pub(crate) const LINE: usize = 64;

/// Bytes of this rank's tensors, or of a rank's slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Piece { side: Side, piece: usize, range: Range<usize> },
    Slot { rank: usize, range: Range<usize> },
}

/// What a device does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Copy {
        from: Place,
        to: Place,
    },
    /// One place of each rank, in their order.
    Fold {
        from: Vec<Place>,
        into: Place,
    },
}

/// What this rank's device does in each phase; all take a step between two.
pub(crate) type Round = Vec<Vec<Task>>;

/// A call, as rank `rank` of `ranks` sees it.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) collective: &'a Collective,
    pub(crate) element_bytes: usize,
    /// Bytes of each piece.
    pub(crate) input: &'a [usize],
    pub(crate) output: &'a [usize],
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

impl Seen<'_> {
    /// Its rounds, for sets of `set_bytes`. `None` where not every rank knows all lengths, or there are too many ranks.
    pub(crate) fn rounds(self, set_bytes: usize) -> Option<Vec<Round>> {
        let (.., len) = even(self.collective, (self.input, self.output), self.ranks)?;
        // No rank reads more than a set's bytes of the others in a phase.
        let parts = match self.collective {
            Collective::ReduceScatter { .. } | Collective::AllToAll | Collective::AllGather => self.ranks,
            _ => 1,
        };
        let most = set_bytes / parts / LINE * LINE;
        if most == 0 || len % self.element_bytes != 0 || self.ranks > MOST_SOURCES {
            return None;
        }
        let round = |start: usize| self.round(len, start..len.min(start + most));
        Some((0..len).step_by(most).map(round).collect())
    }

    fn round(self, len: usize, range: Range<usize>) -> Round {
        let (me, n, width) = (self.rank, self.ranks, range.len());
        // The round's bytes of a part, one after the other in one piece or each in a piece of its own.
        let place = |side: Side, part: usize| {
            let pieces = if side == Side::Input { self.input } else { self.output };
            let (piece, first) = if pieces.len() == 1 { (0, part * len) } else { (part, 0) };
            Place::Piece { side, piece, range: first + range.start..first + range.end }
        };
        let (input, output) = (|part| place(Side::Input, part), |part| place(Side::Output, part));
        let slot = |rank: usize| Place::Slot { rank, range: 0..width };
        // Where slots hold a part for each rank, each begins on a border.
        let share = width.next_multiple_of(LINE);
        let for_rank = |rank: usize, to: usize| Place::Slot { rank, range: to * share..to * share + width };
        let copy = |from: Place, to: Place| Task::Copy { from, to };
        let only = |is: bool, task: Task| if is { vec![task] } else { vec![] };
        let all = || (0..n).map(slot).collect();
        match self.collective {
            Collective::AllReduce { .. } | Collective::Reduce { .. } => {
                let root = self.collective.root().map(Rank::index);
                let takes = root.is_none_or(|root| root == me);
                let put = vec![copy(output(0), slot(me))];
                // Of two, who gets the result folds all of it: as many bytes, a step less.
                if n == 2 {
                    return vec![put, only(takes, Task::Fold { from: all(), into: output(0) })];
                }
                let own = |rank: usize| {
                    let lines = chunk(width.div_ceil(LINE), n, rank);
                    (lines.start * LINE).min(width)..(lines.end * LINE).min(width)
                };
                let of = |rank: usize, range: Range<usize>| Place::Slot { rank, range };
                let fold = Task::Fold { from: (0..n).map(|rank| of(rank, own(me))).collect(), into: of(me, own(me)) };
                let take = |rank: usize| {
                    let Range { start, end } = own(rank);
                    let to =
                        Place::Piece { side: Side::Output, piece: 0, range: range.start + start..range.start + end };
                    copy(of(rank, start..end), to)
                };
                vec![put, vec![fold], if takes { (0..n).map(take).collect() } else { vec![] }]
            }
            Collective::Broadcast { root } => {
                let root = root.index();
                vec![only(root == me, copy(output(0), slot(root))), only(root != me, copy(slot(root), output(0)))]
            }
            Collective::AllGather => {
                let others = (0..n).filter(|rank| *rank != me);
                let take = others.map(|rank| copy(slot(rank), output(rank))).collect();
                vec![vec![copy(input(0), slot(me)), copy(input(0), output(me))], take]
            }
            Collective::ReduceScatter { .. } => {
                let put = (0..n).map(|to| copy(input(to), for_rank(me, to))).collect();
                let from = (0..n).map(|rank| for_rank(rank, me)).collect();
                vec![put, vec![Task::Fold { from, into: output(0) }]]
            }
            // All-to-all; others are not even.
            _ => {
                let put = (0..n).map(|to| copy(input(to), for_rank(me, to))).collect();
                vec![put, (0..n).map(|rank| copy(for_rank(rank, me), output(rank))).collect()]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reduction;

    struct Memory {
        input: Vec<Vec<u8>>,
        output: Vec<Vec<u8>>,
        /// Each byte with the phase in which it was written, and in which it was last read.
        slot: Vec<(u8, usize, usize)>,
    }

    fn pieces(parts: usize, len: usize, one: bool, value: impl Fn(usize) -> u8) -> Vec<Vec<u8>> {
        let bytes: Vec<u8> = (0..parts * len).map(value).collect();
        if one { vec![bytes] } else { (0..parts).map(|part| bytes[part * len..(part + 1) * len].to_vec()).collect() }
    }

    fn read(all: &mut [Memory], me: usize, place: &Place, set: usize, size: usize, phase: usize) -> Vec<u8> {
        match place {
            Place::Piece { side: Side::Input, piece, range } => all[me].input[*piece][range.clone()].to_vec(),
            Place::Piece { side: Side::Output, piece, range } => all[me].output[*piece][range.clone()].to_vec(),
            Place::Slot { rank, range } => {
                assert!(range.end <= size, "a place lies within its set");
                let bytes = &mut all[*rank].slot[set * size + range.start..set * size + range.end];
                bytes
                    .iter_mut()
                    .map(|(byte, written, last)| {
                        // What another rank has written is read after a step only.
                        assert!(*rank == me || *written < phase);
                        *last = phase;
                        *byte
                    })
                    .collect()
            }
        }
    }

    fn write(all: &mut [Memory], me: usize, place: &Place, bytes: &[u8], (set, size, phase): (usize, usize, usize)) {
        match place {
            Place::Piece { side: Side::Input, .. } => panic!("what a rank gives is not written"),
            Place::Piece { side: Side::Output, piece, range } => {
                all[me].output[*piece][range.clone()].copy_from_slice(bytes)
            }
            Place::Slot { rank, range } => {
                assert!(*rank == me && range.end <= size, "a rank writes its own slot only");
                let slot = &mut all[me].slot[set * size + range.start..set * size + range.end];
                for ((byte, written, last), new) in slot.iter_mut().zip(bytes) {
                    // Another may still read what it read in a phase that no step of all has ended.
                    assert!(*last < phase || *written == phase || me == *rank && *last == phase);
                    (*byte, *written) = (*new, phase);
                }
            }
        }
    }

    /// Lets all ranks do each phase, one rank after the other, and tells what they have.
    fn carry_out(
        collective: &Collective,
        n: usize,
        len: usize,
        one: bool,
        size: usize,
        steps: &mut usize,
    ) -> Vec<Memory> {
        let root = collective.root().map(Rank::index);
        let (inputs, outputs) = match collective {
            Collective::AllReduce { .. } | Collective::Reduce { .. } | Collective::Broadcast { .. } => (0, 1),
            Collective::AllGather => (1, n),
            Collective::ReduceScatter { .. } => (n, 1),
            _ => (n, n),
        };
        let mut all: Vec<Memory> = (0..n)
            .map(|rank| Memory {
                input: if inputs == 0 { vec![] } else { pieces(inputs, len, one || inputs == 1, |i| given(rank, i)) },
                output: pieces(outputs, len, one || outputs == 1, |i| if inputs == 0 { given(rank, i) } else { 0 }),
                slot: vec![(0, 0, 0); SETS * size],
            })
            .collect();
        let lens = |pieces: &[Vec<u8>]| pieces.iter().map(Vec::len).collect::<Vec<_>>();
        let plans: Vec<Vec<Round>> = (0..n)
            .map(|rank| {
                let (input, output) = (lens(&all[rank].input), lens(&all[rank].output));
                let seen = Seen { collective, element_bytes: 1, input: &input, output: &output, rank, ranks: n };
                seen.rounds(size).unwrap()
            })
            .collect();
        let mut phase = 0;
        for round in 0..plans[0].len() {
            assert!(plans.iter().all(|plan| plan.len() == plans[0].len()));
            for number in 0..plans[0][round].len() {
                // Between a round's last phase and the next one's first there is no step.
                phase += usize::from(number > 0);
                for (me, plan) in plans.iter().enumerate() {
                    assert_eq!(plan[round].len(), plans[0][round].len(), "all take as many steps");
                    for task in &plan[round][number] {
                        let set = round % SETS;
                        let (bytes, to) = match task {
                            Task::Copy { from, to } => (read(&mut all, me, from, set, size, phase), to),
                            Task::Fold { from, into } => {
                                let given = from.iter().map(|place| read(&mut all, me, place, set, size, phase));
                                let sum = |a: Vec<u8>, b: Vec<u8>| {
                                    a.iter().zip(&b).map(|(a, b)| a.wrapping_mul(3).wrapping_add(*b)).collect()
                                };
                                (given.reduce(sum).unwrap(), into)
                            }
                        };
                        write(&mut all, me, to, &bytes, (set, size, phase));
                    }
                }
            }
        }
        *steps = phase;
        assert!(root.is_none_or(|root| root < n));
        all
    }

    fn given(rank: usize, i: usize) -> u8 {
        (rank * 37 + i * 5 + i / 256) as u8
    }

    /// What a fold in the order of the ranks makes: not the same in any other order.
    fn folded(n: usize, i: usize) -> u8 {
        (1..n).fold(given(0, i), |sum, rank| sum.wrapping_mul(3).wrapping_add(given(rank, i)))
    }

    #[test]
    fn every_collective_gives_all_ranks_what_is_theirs_and_no_slot_is_read_while_it_is_written() {
        let op = Reduction::Sum;
        for n in [2, 3, 4, 7] {
            for len in [0, 1, 63, 64, 1000, 5000] {
                for (size, one) in [(1024, false), (1024, true), (4096, false)] {
                    let root = Rank(n as u32 - 1);
                    let mut steps = 0;
                    let mut run = |collective: Collective| carry_out(&collective, n, len, one, size, &mut steps);
                    for rank in run(Collective::AllReduce { op }) {
                        assert!((0..len).all(|i| rank.output[0][i] == folded(n, i)));
                    }
                    for (rank, memory) in run(Collective::Reduce { op, root }).iter().enumerate() {
                        let expected = |i| if rank == root.index() { folded(n, i) } else { given(rank, i) };
                        assert!((0..len).all(|i| memory.output[0][i] == expected(i)));
                    }
                    for memory in run(Collective::Broadcast { root }) {
                        assert!((0..len).all(|i| memory.output[0][i] == given(root.index(), i)));
                    }
                    for memory in run(Collective::AllGather) {
                        let all = memory.output.concat();
                        assert!((0..n * len).all(|i| all[i] == given(i / len, i % len)));
                    }
                    for (rank, memory) in run(Collective::ReduceScatter { op }).iter().enumerate() {
                        assert!((0..len).all(|i| memory.output[0][i] == folded(n, rank * len + i)));
                    }
                    // Of several pieces no rank knows the others' lengths.
                    if one {
                        for (rank, memory) in run(Collective::AllToAll).iter().enumerate() {
                            let all = memory.output.concat();
                            assert!((0..n * len).all(|i| all[i] == given(i / len, rank * len + i % len)));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn two_ranks_take_one_step_a_round_and_uneven_calls_have_no_rounds() {
        let mut steps = 0;
        carry_out(&Collective::AllReduce { op: Reduction::Sum }, 2, 5000, true, 1024, &mut steps);
        assert_eq!(steps, 5);
        let seen = |input, output| Seen {
            collective: &Collective::AllGather,
            element_bytes: 4,
            input,
            output,
            rank: 0,
            ranks: 2,
        };
        assert_eq!(seen(&[8], &[8, 16]).rounds(1024), None);
        let seen = Seen { ranks: MOST_SOURCES + 1, ..seen(&[8], &[8 * (MOST_SOURCES + 1)]) };
        assert_eq!(seen.rounds(1024), None);
    }
}
