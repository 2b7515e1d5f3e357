//! Plans carried out by ranks that take turns: right results, and nothing read while it is written.

use super::hierarchy::Between;
use super::*;
use crate::Reduction;
use crate::device::cut::{SLOT_BYTES, in_turn};
use crate::hosts::Hosts;

struct Memory {
    input: Vec<Vec<u8>>,
    output: Vec<Vec<u8>>,
    /// Each byte with the phase in which it was written, and in which another rank has last read it.
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
                    if *rank != me {
                        *last = phase;
                    }
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
                // Another may still read what it read in a phase that no step of all has ended. Nothing is read before phase 1.
                assert!(*last < phase || *last == 0);
                (*byte, *written) = (*new, phase);
            }
        }
    }
}

/// A call under test.
#[derive(Clone, Copy)]
struct Under<'a> {
    collective: Collective,
    /// Bytes of a part.
    len: usize,
    /// Whether parts lie in one piece.
    one: bool,
    /// Bytes of a set.
    size: usize,
    /// Where ranks are, and how those of different hosts reach each other; else all are alike.
    hosts: Option<(&'a Hosts, Between)>,
    /// In which order things are combined shows, or does not.
    combine: fn(u8, u8) -> u8,
}

impl Under<'_> {
    fn begin(&self, n: usize) -> Vec<Memory> {
        let (inputs, outputs) = match self.collective {
            Collective::AllReduce { .. } | Collective::Reduce { .. } | Collective::Broadcast { .. } => (0, 1),
            Collective::AllGather => (1, n),
            Collective::ReduceScatter { .. } => (n, 1),
            _ => (n, n),
        };
        let all = |parts: usize, value: &dyn Fn(usize) -> u8| match parts {
            0 => vec![],
            _ => pieces(parts, self.len, self.one || parts == 1, value),
        };
        (0..n)
            .map(|rank| Memory {
                input: all(inputs, &|i| given(rank, i)),
                output: all(outputs, &|i| if inputs == 0 { given(rank, i) } else { 0 }),
                slot: vec![(0, 0, 0); SETS * self.size],
            })
            .collect()
    }

    fn plan(&self, memory: &Memory, rank: usize, ranks: usize) -> Option<Vec<Round>> {
        let lens = |pieces: &[Vec<u8>]| pieces.iter().map(Vec::len).collect::<Vec<_>>();
        let (input, output) = (lens(&memory.input), lens(&memory.output));
        let collective = &self.collective;
        let seen = Seen { collective, element_bytes: 1, input: &input, output: &output, rank, ranks };
        match self.hosts {
            Some((hosts, between)) => seen.rounds_by_hosts(hosts, between, self.size),
            None => seen.rounds(self.size),
        }
    }

    /// Lets all of `n` ranks do each phase, one rank after the other; what they have then, and after how many steps.
    fn carry_out(&self, n: usize) -> (Vec<Memory>, usize) {
        let mut all = self.begin(n);
        let plans: Vec<Vec<Round>> =
            all.iter().enumerate().map(|(rank, memory)| self.plan(memory, rank, n).unwrap()).collect();
        let mut phase = 0;
        for round in 0..plans[0].len() {
            assert!(plans.iter().all(|plan| plan.len() == plans[0].len()));
            for number in 0..plans[0][round].len() {
                // Between a round's last phase and the next one's first there is no step.
                phase += usize::from(number > 0);
                for (me, plan) in plans.iter().enumerate() {
                    assert_eq!(plan[round].len(), plans[0][round].len(), "all take as many steps");
                    for task in &plan[round][number] {
                        self.do_task(&mut all, me, task, (round % SETS, phase));
                    }
                }
                let now: Vec<_> = plans.iter().map(|plan| plan[round][number].last()).collect();
                let rounds = now.iter().map(|task| matches!(task, Some(Task::Across { .. })));
                assert!(rounds.clone().all(|is| is) || !rounds.into_iter().any(|is| is));
                self.do_across(&mut all, &now, (round % SETS, phase));
            }
        }
        (all, phase)
    }

    fn do_task(&self, all: &mut [Memory], me: usize, task: &Task, (set, phase): (usize, usize)) {
        let (bytes, to) = match task {
            Task::Copy { from, to } => (read(all, me, from, set, self.size, phase), to),
            Task::Fold { from, into, .. } => {
                let given = from.iter().map(|place| read(all, me, place, set, self.size, phase));
                (given.reduce(|a, b| self.fold(&a, &b)).unwrap(), into)
            }
            Task::Across { .. } => return,
        };
        write(all, me, to, &bytes, (set, self.size, phase));
    }

    fn fold(&self, a: &[u8], b: &[u8]) -> Vec<u8> {
        a.iter().zip(b).map(|(a, b)| (self.combine)(*a, *b)).collect()
    }

    /// What ranks in one place have between their hosts, once all have come so far.
    fn do_across(&self, all: &mut [Memory], now: &[Option<&Task>], (set, phase): (usize, usize)) {
        let Some((hosts, _)) = self.hosts else { return };
        let mut turns = None;
        for place in 0..hosts.most() {
            let members: Vec<usize> = hosts.iter().map(|ranks| ranks[place].index()).collect();
            let mut given = Vec::new();
            let mut targets = Vec::new();
            for &member in &members {
                let Some(Task::Across { input, output, rounds, .. }) = now[member] else { return };
                assert_eq!(*turns.get_or_insert(*rounds), *rounds, "all ranks make as many calls");
                let from = if input.is_empty() { output } else { input };
                let bytes = from.iter().map(|place| read(all, member, place, set, self.size, phase));
                given.push(bytes.collect::<Vec<_>>());
                targets.push(output);
            }
            for turn in 0..turns.unwrap() {
                for (me, (member, output)) in members.iter().zip(&targets).enumerate() {
                    let part = |parts: &Vec<Vec<u8>>, number: usize| {
                        parts[turn * parts.len() / turns.unwrap() + number].clone()
                    };
                    let results: Vec<Vec<u8>> = match self.collective {
                        Collective::AllGather => given.iter().map(|parts| part(parts, 0)).collect(),
                        collective => {
                            let number = if matches!(collective, Collective::ReduceScatter { .. }) { me } else { 0 };
                            let mine = given.iter().map(|parts| part(parts, number));
                            vec![mine.reduce(|a, b| self.fold(&a, &b)).unwrap()]
                        }
                    };
                    let each = output.len() / turns.unwrap();
                    assert_eq!(each, results.len());
                    for (place, bytes) in output[turn * each..].iter().zip(results) {
                        write(all, *member, place, &bytes, (set, self.size, phase));
                    }
                }
            }
        }
    }
}

fn given(rank: usize, i: usize) -> u8 {
    (rank * 37 + i * 5 + i / 256) as u8
}

/// Not the same in another order.
fn in_order(a: u8, b: u8) -> u8 {
    a.wrapping_mul(3).wrapping_add(b)
}

/// What a fold in the order of the ranks makes.
fn folded(combine: fn(u8, u8) -> u8, n: usize, i: usize) -> u8 {
    (1..n).fold(given(0, i), |sum, rank| combine(sum, given(rank, i)))
}

/// Every rank of `n` has what is its own.
fn check(under: Under<'_>, n: usize) {
    let (all, len) = (under.carry_out(n).0, under.len);
    let sum = |i| folded(under.combine, n, i);
    for (rank, memory) in all.iter().enumerate() {
        let output = memory.output.concat();
        let expected = |i: usize| match under.collective {
            Collective::AllReduce { .. } => sum(i),
            Collective::Reduce { root, .. } if root.index() == rank => sum(i),
            Collective::Reduce { .. } => given(rank, i),
            Collective::Broadcast { root } => given(root.index(), i),
            Collective::AllGather => given(i / len, i % len),
            Collective::ReduceScatter { .. } => sum(rank * len + i),
            _ => given(i / len, rank * len + i % len),
        };
        assert!((0..output.len()).all(|i| output[i] == expected(i)), "{:?} of {n}, rank {rank}", under.collective);
    }
}

const LENS: [usize; 6] = [0, 1, 63, 64, 1000, 5000];

#[test]
fn every_collective_gives_all_ranks_what_is_theirs_and_no_slot_is_read_while_it_is_written() {
    let op = Reduction::Sum;
    for n in [2, 3, 4, 7] {
        let root = Rank(n as u32 - 1);
        let all = [
            Collective::AllReduce { op },
            Collective::Reduce { op, root },
            Collective::Broadcast { root },
            Collective::AllGather,
            Collective::ReduceScatter { op },
            Collective::AllToAll,
        ];
        for len in LENS {
            for (size, one) in [(1024, false), (1024, true), (4096, false)] {
                // Of several pieces of an all-to-all no rank knows the others' lengths.
                for collective in all.into_iter().filter(|collective| one || *collective != Collective::AllToAll) {
                    check(Under { collective, len, one, size, hosts: None, combine: in_order }, n);
                }
            }
        }
    }
}

#[test]
fn ranks_of_several_hosts_have_the_same_by_way_of_one_of_each() {
    let op = Reduction::Sum;
    let worlds: [&[u32]; 4] = [&[0, 0, 1, 1], &[0, 1, 0, 1, 0, 1], &[0, 0, 0, 1, 1, 1, 2, 2, 2], &[5, 5, 9, 9, 7, 7]];
    let all = [Collective::AllReduce { op }, Collective::AllGather, Collective::ReduceScatter { op }];
    for world in worlds {
        let (hosts, n) = (Hosts::new(world), world.len());
        for (len, one) in LENS.into_iter().flat_map(|len| [(len, true), (len, false)]) {
            for (collective, between) in
                all.into_iter().flat_map(|all| [(all, Between::Staged), (all, Between::Direct)])
            {
                if between == Between::Staged || collective == all[0] {
                    let hosts = Some((&hosts, between));
                    check(Under { collective, len, one, size: 1024, hosts, combine: u8::wrapping_add }, n);
                }
            }
        }
    }
}

impl Place {
    fn len(&self) -> usize {
        match self {
            Self::Piece { range, .. } | Self::Slot { range, .. } => range.len(),
        }
    }
}

#[test]
fn what_goes_by_way_of_hosts_is_a_rank_s_share() {
    let hosts = Hosts::new(&[0, 0, 0, 0, 1, 1, 1, 1]);
    let all = Collective::AllReduce { op: Reduction::Sum };
    let seen = Seen { collective: &all, element_bytes: 4, input: &[], output: &[64 << 20], rank: 5, ranks: 8 };
    let rounds = seen.rounds_by_hosts(&hosts, Between::Staged, SET_BYTES).unwrap();
    let staged = |task: &Task| match task {
        Task::Across { output, .. } => output.iter().map(Place::len).sum(),
        _ => 0,
    };
    assert_eq!(rounds.iter().flatten().flatten().map(staged).sum::<usize>(), 16 << 20);
    // Between devices: what this rank reads on the other host is its half of its share, twice.
    let rounds = seen.rounds_by_hosts(&hosts, Between::Direct, SET_BYTES).unwrap();
    let far = |place: &&Place| matches!(place, Place::Slot { rank: 0..4, .. });
    let read = |task: &Task| match task {
        Task::Copy { from, .. } => Some(from).filter(far).map_or(0, Place::len),
        Task::Fold { from, .. } => from.iter().filter(far).map(Place::len).sum(),
        Task::Across { .. } => unreachable!("nothing is staged"),
    };
    assert_eq!(rounds.iter().flatten().flatten().map(read).sum::<usize>(), 16 << 20);
}

#[test]
fn what_is_staged_fits_the_ring_and_keeps_it_at_work() {
    let op = Reduction::Sum;
    for (hosts, each) in [(2, 2), (2, 8), (3, 2), (16, 8)] {
        let ranks = hosts * each;
        let world: Vec<u32> = (0..ranks as u32).map(|rank| rank / each as u32).collect();
        let len = 64 << 20;
        let all = [
            (Collective::AllReduce { op }, vec![], vec![len]),
            (Collective::AllGather, vec![len], vec![len * ranks]),
            (Collective::ReduceScatter { op }, vec![len * ranks], vec![len]),
        ];
        for (collective, input, output) in &all {
            let seen = Seen { collective, element_bytes: 4, input, output, rank: ranks - 1, ranks };
            let plan = seen.rounds_by_hosts(&Hosts::new(&world), Between::Staged, SET_BYTES).unwrap();
            for task in plan.iter().flatten().flatten() {
                let Task::Across { input, output, rounds, .. } = task else { continue };
                let lens = |places: &[Place]| places.iter().map(Place::len).collect::<Vec<_>>();
                let turns = in_turn(&lens(input), &lens(output), *rounds);
                assert!(turns.iter().all(|turn| turn.bytes <= SLOT_BYTES), "{hosts} hosts of {each}: {collective:?}");
            }
            let across = |task: &&Task| matches!(task, Task::Across { .. });
            let Some(Task::Across { rounds, .. }) = plan[0].iter().flatten().find(across) else {
                panic!("something is staged")
            };
            assert!(*rounds >= 2, "{hosts} hosts of {each}: {collective:?} in {rounds}");
        }
    }
}

#[test]
fn hosts_that_are_not_alike_or_one_of_each_and_what_has_no_such_way_have_no_rounds_by_hosts() {
    let (op, avg) = (Reduction::Sum, Reduction::Avg);
    let (two, one) = (&[0, 0, 1, 1][..], &[0, 1, 2, 3][..]);
    let reduce = |op| Collective::AllReduce { op };
    for (world, collective, between, is_there) in [
        (two, reduce(op), Between::Staged, true),
        (two, reduce(avg), Between::Staged, true),
        (two, reduce(avg), Between::Direct, false),
        (two, Collective::Broadcast { root: Rank(0) }, Between::Staged, false),
        (&[0, 0, 0, 1], reduce(op), Between::Staged, false),
        (one, reduce(op), Between::Staged, false),
        (&[0, 0, 0, 0], reduce(op), Between::Direct, false),
    ] {
        let output = &[4096];
        let seen = Seen { collective: &collective, element_bytes: 4, input: &[], output, rank: 1, ranks: 4 };
        let rounds = seen.rounds_by_hosts(&Hosts::new(world), between, SET_BYTES);
        assert_eq!(rounds.is_some(), is_there, "{world:?} {collective:?} {between:?}");
    }
}

#[test]
fn two_ranks_take_one_step_a_round_and_uneven_calls_have_no_rounds() {
    let collective = Collective::AllReduce { op: Reduction::Sum };
    let under = Under { collective, len: 5000, one: true, size: 1024, hosts: None, combine: in_order };
    assert_eq!(under.carry_out(2).1, 5);
    let seen =
        |input, output| Seen { collective: &Collective::AllGather, element_bytes: 4, input, output, rank: 0, ranks: 2 };
    assert_eq!(seen(&[8], &[8, 16]).rounds(1024), None);
    let seen = Seen { ranks: MOST_SOURCES + 1, ..seen(&[8], &[8 * (MOST_SOURCES + 1)]) };
    assert_eq!(seen.rounds(1024), None);
}
