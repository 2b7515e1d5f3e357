//! Every schedule, run by a small interpreter in random order, for worlds of 1 to 17: right results, no deadlock, no byte
//! read while it is written.

use super::*;
use crate::plan::Plan;
use std::collections::VecDeque;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Waiting,
    Posted,
    Ended,
}

struct Runner {
    plan: Plan,
    buffers: [Vec<u64>; 3],
    state: Vec<State>,
    folded: Vec<Vec<Option<Vec<u64>>>>,
    posted: Vec<(usize, usize)>,
}

impl Runner {
    fn new(schedule: Schedule, rank: Rank, world_size: WorldSize, input: Vec<u64>, output: Vec<u64>) -> Self {
        let plan = Plan::new(schedule, rank.index(), &world_size.ranks().collect::<Vec<_>>());
        let (steps, links) = (plan.schedule.steps.len(), plan.links.len());
        let scratch = vec![0; plan.schedule.scratch_len];
        let folded = vec![vec![None; world_size.get() as usize]; steps];
        Self {
            plan,
            buffers: [input, output, scratch],
            state: vec![State::Waiting; steps],
            folded,
            posted: vec![(0, 0); links],
        }
    }

    fn place(&mut self, span: Span) -> &mut [u64] {
        &mut self.buffers[span.place as usize][span.start..span.start + span.len]
    }

    /// Whether writing (else reading) `span` now would meet a posted step that holds it.
    fn held(&self, span: Span, write: bool) -> bool {
        let overlap = |other: Span| {
            other.place == span.place && other.start < span.start + span.len && span.start < other.start + other.len
        };
        self.plan.schedule.steps.iter().zip(&self.state).any(|(step, state)| {
            *state == State::Posted
                && match step.action {
                    Action::Send { span, .. } => write && overlap(span),
                    Action::Recv { span, .. } => overlap(span),
                    _ => false,
                }
        })
    }

    fn is_ready(&self, step: StepId) -> bool {
        let after = self.plan.schedule.steps[step as usize].after;
        after.iter().flatten().all(|&earlier| self.state[earlier as usize] == State::Ended)
    }
}

use crate::{StepId, schedule::Step};

/// What is between ranks.
struct Between {
    /// `sent[a][b]` holds what a has sent b.
    sent: Vec<Vec<VecDeque<Vec<u64>>>>,
    /// `open[b][a]`: how many receives from a have been posted by b; with `waits`, a send ends only when it has its receive.
    open: Vec<Vec<usize>>,
    waits: bool,
}

/// Runs all ranks to the end.
fn run(mut ranks: Vec<Runner>, random: &mut Random) -> Vec<Runner> {
    let n = ranks.len();
    let waits = random.0 % 2 == 1;
    let mut wires = Between { sent: vec![vec![VecDeque::new(); n]; n], open: vec![vec![0; n]; n], waits };
    let mut stuck = 0;
    while ranks.iter().any(|rank| rank.state.iter().any(|state| *state != State::Ended)) {
        let me = random.below(n);
        let moved = turn(me, &mut ranks[me], &mut wires, random);
        stuck = if moved { 0 } else { stuck + 1 };
        assert!(stuck < 2000 * n, "deadlock: {:?}", ranks.iter().map(|rank| &rank.state).collect::<Vec<_>>());
    }
    assert!(wires.sent.iter().flatten().all(VecDeque::is_empty), "a message that nobody received");
    ranks
}

/// One rank does one thing: whether it found any.
fn turn(me: usize, rank: &mut Runner, wires: &mut Between, random: &mut Random) -> bool {
    for at in 0..rank.plan.links.len() {
        let link = &rank.plan.links[at];
        let peer = link.rank.index();
        wires.open[me][peer] = link.recvs.iter().take_while(|&&step| rank.is_ready(step)).count();
        // Post the next of each direction, or end what is posted, in order.
        let (sends, recvs) = (link.sends.clone(), link.recvs.clone());
        let (sent, received) = rank.posted[at];
        if let Some(&step) = sends.get(sent)
            && rank.is_ready(step)
            && rank.state[step as usize] == State::Waiting
        {
            if let Action::Send { span, .. } = rank.plan.schedule.steps[step as usize].action {
                assert!(!rank.held(span, false), "rank {me}, step {step}: reads what is being written");
            }
            rank.state[step as usize] = State::Posted;
            return true;
        }
        if let Some(&step) = sends.get(sent)
            && rank.state[step as usize] == State::Posted
            && (!wires.waits || wires.open[peer][me] > sent)
            && random.below(2) == 0
        {
            let message = match rank.plan.schedule.steps[step as usize].action {
                Action::Send { span, .. } => rank.place(span).to_vec(),
                _ => vec![],
            };
            wires.sent[me][peer].push_back(message);
            rank.state[step as usize] = State::Ended;
            rank.posted[at].0 += 1;
            return true;
        }
        if let Some(&step) = recvs.get(received)
            && rank.is_ready(step)
            && receive(rank, step, (me, at, peer), wires)
        {
            return true;
        }
    }
    local(rank)
}

fn receive(rank: &mut Runner, step: StepId, (me, at, peer): (usize, usize, usize), wires: &mut Between) -> bool {
    let Step { action, .. } = rank.plan.schedule.steps[step as usize];
    if let Action::Recv { span, .. } = action
        && rank.state[step as usize] == State::Waiting
    {
        assert!(!rank.held(span, true), "rank {me}, step {step}: writes what somebody holds");
        rank.state[step as usize] = State::Posted;
        return true;
    }
    let Some(message) = wires.sent[peer][me].pop_front() else { return false };
    rank.posted[at].1 += 1;
    match action {
        Action::Recv { span, .. } => rank.place(span).copy_from_slice(&message),
        Action::RecvReduce { span, .. } => {
            assert!(!rank.held(span, true), "rank {me}, step {step}: combines into what somebody holds");
            rank.place(span).iter_mut().zip(&message).for_each(|(own, more)| *own = own.wrapping_add(*more));
        }
        Action::FoldAll { span, .. } => {
            assert_eq!(message.len(), span.len);
            rank.folded[step as usize][peer] = Some(message);
            return true;
        }
        _ => assert!(message.is_empty()),
    }
    rank.state[step as usize] = State::Ended;
    true
}

fn local(rank: &mut Runner) -> bool {
    for step in 0..rank.state.len() {
        let id = StepId::try_from(step).unwrap();
        if rank.state[step] != State::Waiting || !rank.is_ready(id) {
            continue;
        }
        match rank.plan.schedule.steps[step].action {
            Action::Copy { from, into } => {
                assert!(!rank.held(from, false) && !rank.held(into, true));
                let bytes = rank.place(from).to_vec();
                rank.place(into).copy_from_slice(&bytes);
            }
            Action::Finish { span } => assert!(!rank.held(span, true)),
            Action::Join => {}
            Action::FoldAll { own, span } => {
                let all: Vec<_> = rank.folded[step].iter().flatten().cloned().collect();
                // A fold waits for this rank's own sends of the same memory.
                if all.len() + 1 < rank.folded[step].len() || rank.held(span, true) {
                    continue;
                }
                let own = rank.place(own).to_vec();
                let sum = |i: usize| all.iter().fold(own[i], |sum, more| sum.wrapping_add(more[i]));
                let sums: Vec<u64> = (0..span.len).map(sum).collect();
                rank.place(span).copy_from_slice(&sums);
            }
            _ => continue,
        }
        rank.state[step] = State::Ended;
        return true;
    }
    false
}

/// What rank `rank` holds at place `i`: tells both.
fn mark(rank: usize, i: usize) -> u64 {
    (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (i as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn marks(rank: usize, len: usize) -> Vec<u64> {
    (0..len).map(|i| mark(rank, i)).collect()
}

fn sums(n: usize, range: Range<usize>) -> Vec<u64> {
    range.map(|i| (0..n).fold(0u64, |sum, rank| sum.wrapping_add(mark(rank, i)))).collect()
}

use std::ops::Range;

/// Runs `make` for every world and many lengths; `make` gives each rank's schedule, input, output and what should come out.
fn everywhere(make: impl Fn(Rank, WorldSize, usize) -> (Schedule, Vec<u64>, Vec<u64>, Option<Vec<u64>>)) {
    for n in (1..=17).chain([33]) {
        let world_size = WorldSize::new(n).unwrap();
        let n = n as usize;
        // The largest world takes long to simulate: less of it.
        let (lens, seeds) =
            if n > 17 { (vec![1, n + 1], 1) } else { (vec![0, 1, n - 1, n, n + 1, 100, 20 * n + 3], 3) };
        for len in lens {
            for seed in 0..seeds {
                let (mut ranks, mut expected) = (Vec::new(), Vec::new());
                for rank in world_size.ranks() {
                    let (schedule, input, output, result) = make(rank, world_size, len);
                    ranks.push(Runner::new(schedule, rank, world_size, input, output));
                    expected.push(result);
                }
                for (rank, (runner, expected)) in run(ranks, &mut Random(seed)).into_iter().zip(expected).enumerate() {
                    if let Some(expected) = expected {
                        assert_eq!(runner.buffers[1], expected, "rank {rank} of {n}, {len} elements, seed {seed}");
                    }
                }
            }
        }
    }
}

const SEGMENT: usize = 7;

/// Hosts of two ranks or one at the end, taken in turn: ranks of one host are not neighbours.
fn even(size: WorldSize) -> Hosts {
    let hosts = size.get().div_ceil(2);
    Hosts::new(&(0..size.get()).map(|rank| rank % hosts).collect::<Vec<_>>())
}

/// Hosts of 1, 2, 3, ... ranks.
fn uneven(size: WorldSize) -> Hosts {
    Hosts::new(&(0..size.get()).map(|rank| (8 * rank + 1).isqrt().div_ceil(2)).collect::<Vec<_>>())
}

#[test]
fn all_reduces_sum() {
    type Make = fn(Rank, WorldSize, usize) -> Schedule;
    let algorithms: [Make; 10] = [
        |rank, size, len| halving_doubling::all_reduce(rank, size, len, SEGMENT, true),
        |rank, size, len| tree::all_reduce(tree::Kind::DoubleBinary, rank, size, len, SEGMENT, true),
        |rank, size, len| tree::all_reduce(tree::Kind::Binomial, rank, size, len, SEGMENT, true),
        |rank, size, len| hierarchical::all_reduce(rank, &uneven(size), len, SEGMENT, true),
        |rank, size, len| hierarchical::all_reduce(rank, &even(size), len, SEGMENT, true),
        |rank, size, len| hierarchical::all_reduce_by_leaders(rank, &uneven(size), len, SEGMENT, true),
        |rank, size, len| ring::all_reduce(rank, size, len, SEGMENT, true),
        |rank, size, len| direct::all_reduce(rank, size, len, SEGMENT),
        |rank, size, len| recursive_doubling::all_reduce(rank, size, len, SEGMENT, true),
        |rank, size, len| direct::all_reduce_short(rank, size, len, SEGMENT),
    ];
    for algorithm in algorithms {
        everywhere(|rank, size, len| {
            let n = size.get() as usize;
            (algorithm(rank, size, len), vec![], marks(rank.index(), len), Some(sums(n, 0..len)))
        });
    }
}

#[test]
fn a_ring_sends_no_more_than_it_must() {
    for n in 2..=17 {
        let size = WorldSize::new(n).unwrap();
        let len = 1000 * n as usize;
        for rank in size.ranks() {
            let sent: usize = ring::all_reduce(rank, size, len, 64, false)
                .steps
                .iter()
                .map(|step| if let Action::Send { span, .. } = step.action { span.len } else { 0 })
                .sum();
            let bound = 2 * (n as usize - 1) * (1000 + 64);
            assert!(sent <= bound, "{rank} of {n} sends {sent} elements, of {bound}");
        }
    }
}

#[test]
fn doubling_takes_as_many_rounds_as_the_world_doubles() {
    for n in 2..=33 {
        let size = WorldSize::new(n).unwrap();
        for rank in size.ranks() {
            let schedule = recursive_doubling::all_reduce(rank, size, 100, 100, false);
            let sends = schedule.steps.iter().filter(|step| matches!(step.action, Action::Send { .. })).count();
            let (rounds, extra) = (n.ilog2() as usize, n - (1 << n.ilog2()));
            let expected = if rank.0 >= n - extra { 1 } else { rounds + usize::from(rank.0 < extra) };
            assert_eq!(sends, expected, "{rank} of {n}");
        }
    }
}

const TREES: [tree::Kind; 3] = [tree::Kind::Chain, tree::Kind::Binomial, tree::Kind::DoubleBinary];

#[test]
fn reduce_gives_the_root_the_sum_and_leaves_the_others_alone() {
    for tree in TREES.map(Some).into_iter().chain([None]) {
        everywhere(|rank, size, len| {
            let root = Rank(len as u32 % size.get());
            let own = marks(rank.index(), len);
            let expected = if rank == root { sums(size.get() as usize, 0..len) } else { own.clone() };
            let schedule = match tree {
                Some(kind) => tree::reduce(kind, rank, size, root, (len, SEGMENT), true),
                None => direct::reduce(rank, size, root, len, SEGMENT),
            };
            (schedule, vec![], own, Some(expected))
        });
    }
}

#[test]
fn broadcasts_give_everybody_the_root_s() {
    for tree in TREES.map(Some).into_iter().chain([None]) {
        everywhere(|rank, size, len| {
            let root = Rank(len as u32 % size.get());
            let schedule = match tree {
                Some(kind) => tree::broadcast(kind, rank, size, root, len, SEGMENT),
                None => hierarchical::broadcast(rank, &uneven(size), root, len, SEGMENT),
            };
            (schedule, vec![], marks(rank.index(), len), Some(marks(root.index(), len)))
        });
    }
}

fn some(parts: &[Range<usize>]) -> Vec<Option<Range<usize>>> {
    parts.iter().cloned().map(Some).collect()
}

#[test]
fn all_gathers_put_every_part_in_its_place() {
    type Make = fn(Rank, WorldSize, &[Range<usize>]) -> Schedule;
    let algorithms: [Make; 4] = [
        |rank, size, parts| ring::all_gather(rank, size, parts, SEGMENT),
        |rank, size, parts| bruck::all_gather(rank, size, parts, SEGMENT),
        |rank, size, parts| hierarchical::all_gather(rank, &uneven(size), parts, SEGMENT),
        |rank, size, parts| {
            let own = Some(0..parts[rank.index()].len());
            direct::exchange(rank, size, &vec![own; parts.len()], &some(parts), SEGMENT)
        },
    ];
    for algorithm in algorithms {
        everywhere(|rank, size, len| {
            let lens: Vec<usize> = size.ranks().map(|rank| len / (rank.index() + 1)).collect();
            let (parts, total) = (parts(&lens), lens.iter().sum());
            let own = lens[rank.index()];
            let schedule = algorithm(rank, size, &parts);
            let expected = lens.iter().enumerate().flat_map(|(rank, &len)| marks(rank, len)).collect();
            (schedule, marks(rank.index(), own), vec![0; total], Some(expected))
        });
    }
}

#[test]
fn reduce_scatter_gives_everybody_its_part_of_the_sum() {
    for algorithm in [Algorithm::Direct, Algorithm::Hierarchical] {
        everywhere(|rank, size, len| {
            let n = size.get() as usize;
            // Parts of different lengths.
            let parts = parts(&(0..n).map(|rank| (len + rank) % 30).collect::<Vec<_>>());
            let own = parts[rank.index()].clone();
            let schedule = match algorithm {
                Algorithm::Direct => direct::reduce_scatter(rank, size, &parts, SEGMENT),
                _ => hierarchical::reduce_scatter(rank, &uneven(size), &parts, SEGMENT, true),
            };
            // Alone, there is nobody to fold with: that case is made without messages.
            let expected = (n > 1).then(|| sums(n, own.clone()));
            (schedule, marks(rank.index(), parts[n - 1].end), vec![0; own.len()], expected)
        });
    }
}

#[test]
fn bruck_brings_every_part_to_its_rank() {
    everywhere(|rank, size, len| {
        let (n, me, len) = (size.get() as usize, rank.index(), len % 25);
        let expected = (0..n).flat_map(|from| (me * len..(me + 1) * len).map(move |i| mark(from, i))).collect();
        (bruck::all_to_all(rank, size, len, SEGMENT), marks(me, n * len), vec![0; n * len], Some(expected))
    });
}

#[test]
fn what_leaves_a_host_leaves_it_once() {
    for (hosts, each) in [(2, 2), (2, 4), (3, 2), (4, 3)] {
        let size = WorldSize::new(hosts * each).unwrap();
        let of_rank: Vec<u32> = size.ranks().map(|rank| rank.0 / each).collect();
        let len = 12_000;
        let leaves = |make: &dyn Fn(Rank, &Hosts) -> Schedule| {
            let far = |rank: Rank| {
                let steps = make(rank, &Hosts::new(&of_rank)).steps;
                let spans = steps.iter().map(|step| match step.action {
                    Action::Send { to, span } if of_rank[to.index()] != of_rank[rank.index()] => span.len,
                    _ => 0,
                });
                spans.sum::<usize>()
            };
            size.ranks().take(each as usize).map(far).sum::<usize>()
        };
        let (h, n) = (hosts as usize, size.get() as usize);
        let spare = 64 * n; // cuts are rounded to cache lines
        let all_reduce = leaves(&|rank, hosts| hierarchical::all_reduce(rank, hosts, len, 500, false));
        assert!(all_reduce.abs_diff(2 * (h - 1) * len / h) <= spare, "{hosts} x {each}: {all_reduce}");
        let parts = parts(&vec![len / n; n]);
        let reduce_scatter = leaves(&|rank, hosts| hierarchical::reduce_scatter(rank, hosts, &parts, 500, false));
        assert_eq!(reduce_scatter, (h - 1) * len / h, "{hosts} x {each}");
        let all_gather = leaves(&|rank, hosts| hierarchical::all_gather(rank, hosts, &parts, 500));
        assert_eq!(all_gather, (h - 1) * (len / h), "{hosts} x {each}");
    }
}

#[test]
fn exchanges_bring_every_part_to_its_rank() {
    everywhere(|rank, size, len| {
        let (n, me) = (size.get() as usize, rank.index());
        let count = |from: usize, to: usize| (len + from + 3 * to) % 20;
        let give = parts(&(0..n).map(|to| count(me, to)).collect::<Vec<_>>());
        let lens: Vec<usize> = (0..n).map(|from| count(from, me)).collect();
        let expected = (0..n).flat_map(|from| {
            let before: usize = (0..me).map(|to| count(from, to)).sum();
            (before..before + count(from, me)).map(move |i| mark(from, i))
        });
        let input = marks(me, give.last().map_or(0, |last| last.end));
        let output = vec![0; lens.iter().sum()];
        (
            direct::exchange(rank, size, &some(&give), &some(&parts(&lens)), SEGMENT),
            input,
            output,
            Some(expected.collect()),
        )
    });
}

#[test]
fn a_barrier_hears_of_everybody() {
    // Who hears of whom spreads with the tokens; at the end everybody has heard of all.
    for n in 1..=17u32 {
        let size = WorldSize::new(n).unwrap();
        let mut heard: Vec<u64> = (0..n).map(|rank| 1 << rank).collect();
        let rounds = tree::barrier(Rank(0), size).steps.len() / 2;
        for round in 0..rounds {
            let before = heard.clone();
            for rank in size.ranks() {
                let step = tree::barrier(rank, size).steps[2 * round + 1];
                let Action::RecvToken { from } = step.action else { panic!("{step:?}") };
                heard[rank.index()] |= before[from.index()];
            }
        }
        assert!(heard.iter().all(|heard| *heard == (1 << n) - 1), "{n} ranks");
    }
    everywhere(|rank, size, _| (tree::barrier(rank, size), vec![], vec![], None));
}
