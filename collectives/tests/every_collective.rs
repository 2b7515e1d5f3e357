//! Every collective, on every way that bytes can go, against what it should give.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::{Way, call, floats, group, values};
use gradwire_collectives::{Call, Collective, Piece, Reduction, Settings};
use gradwire_transport::Rank;
use std::sync::Arc;

const WAYS: [Way; 4] = [Way::Tcp, Way::Credit, Way::Shm, Way::Segment];
/// Both sides of 8 KiB are there, up to which one step at the segment does.
const LENGTHS: [usize; 9] = [0, 1, 2, 3, 1000, 2048, 2049, 40_000, 300_001];

/// Element `i` of rank `rank`'s buffer: tells both, and is exact in every sum below.
fn mark(rank: u32, i: usize) -> f32 {
    (rank as usize * 1000 + i % 997) as f32
}

fn everywhere(body: impl Fn(Way, u32)) {
    for way in WAYS {
        for size in [1, 2, 3, 4] {
            body(way, size);
        }
    }
}

#[test]
fn all_reduce_sums_and_averages() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            for len in LENGTHS {
                for op in [Reduction::Sum, Reduction::Max, Reduction::Avg] {
                    let buffer = floats((0..len).map(|i| mark(c.rank().0, i)));
                    c.run(call(Collective::AllReduce { op }, &[], &[&buffer])).unwrap();
                    let sum = |i| (0..size).map(|rank| mark(rank, i)).sum::<f32>();
                    for (i, value) in values(&buffer).into_iter().enumerate() {
                        let expected = match op {
                            Reduction::Sum => sum(i),
                            Reduction::Max => mark(size - 1, i),
                            _ => sum(i) / size as f32,
                        };
                        assert_eq!(value, expected, "{way:?}, {size} ranks, {op:?}, element {i} of {len}");
                    }
                }
            }
        });
    });
}

#[test]
fn every_algorithm_of_all_reduce_gives_all_ranks_the_same_bits() {
    let all = ["ring", "direct", "short", "doubling", "halving", "double_tree", "hierarchical", "leaders"];
    for (algorithm, size) in all.into_iter().flat_map(|a| [(a, 3), (a, 6)]) {
        // Hosts of three ranks, of two, and of one.
        let hosts = Some((0..size).map(|rank| [0, 1, 0, 0, 1, 2][rank as usize]).collect());
        let settings = Settings { algorithms: Some(format!("all_reduce:{algorithm}")), hosts, ..Settings::default() };
        let results = group(size, Way::Tcp, settings, |c| {
            [0, 1, 7, 5000, 300_001].map(|len| {
                // Thirds: each order of the sum rounds in its own way.
                let buffer = floats((0..len).map(|i| mark(c.rank().0, i) / 3.0));
                c.run(call(Collective::AllReduce { op: Reduction::Avg }, &[], &[&buffer])).unwrap();
                values(&buffer)
            })
        });
        for (rank, result) in results.iter().enumerate() {
            for (first, own) in results[0].iter().zip(result) {
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert!(bits(first) == bits(own), "{algorithm}: rank {rank} of {size} differs from rank 0");
                for (i, value) in own.iter().enumerate() {
                    let expected = (0..size).map(|rank| mark(rank, i)).sum::<f32>() / (3 * size) as f32;
                    let bound = 4.0 * f32::EPSILON * expected.abs();
                    assert!((value - expected).abs() <= bound, "{algorithm}, {size} ranks, element {i}: {value}");
                }
            }
        }
    }
}

#[test]
fn every_algorithm_of_what_is_moved_or_reduced_to_one_brings_the_same() {
    let all = [
        "reduce:tree;broadcast:tree;all_gather:bruck;all_to_all:bruck",
        "reduce:chain;broadcast:chain;all_gather:hierarchical;reduce_scatter:hierarchical",
        "reduce:double_tree;broadcast:double_tree;all_gather:ring",
        "reduce:direct;broadcast:hierarchical;all_gather:direct",
    ];
    for (algorithms, size) in all.into_iter().flat_map(|a| [(a, 2), (a, 5)]) {
        let hosts = Some((0..size).map(|rank| [0, 1, 0, 1, 1][rank as usize]).collect());
        let settings = Settings { algorithms: Some(algorithms.to_owned()), hosts, ..Settings::default() };
        group(size, Way::Tcp, settings, |c| {
            let (me, n, root) = (c.rank().index(), size as usize, Rank(size - 1));
            for len in [0, 1, 1000, 100_003] {
                let own = || floats((0..len).map(|i| mark(c.rank().0, i)));
                let sum = |i: usize| (0..size).map(|rank| mark(rank, i)).sum::<f32>();
                let buffer = own();
                c.run(call(Collective::Reduce { op: Reduction::Avg, root }, &[], &[&buffer])).unwrap();
                let mean = |i| if me == n - 1 { sum(i) / size as f32 } else { mark(me as u32, i) };
                assert_eq!(values(&buffer), (0..len).map(mean).collect::<Vec<_>>(), "{algorithms}, reduce, {len}");
                c.run(call(Collective::Broadcast { root: Rank(0) }, &[], &[&buffer])).unwrap();
                let expected: Vec<f32> = (0..len).map(|i| mark(0, i)).collect();
                assert_eq!(values(&buffer), expected, "{algorithms}, broadcast, {len}");
                let all = floats(vec![0.0; len * n]);
                c.run(call(Collective::AllGather, &[&own()], &[&all])).unwrap();
                let expected: Vec<f32> = (0..size).flat_map(|rank| (0..len).map(move |i| mark(rank, i))).collect();
                assert_eq!(values(&all), expected, "{algorithms}, all_gather, {len}");
                let input = floats((0..len * n).map(|i| mark(c.rank().0, i)));
                let part = floats(vec![0.0; len]);
                c.run(call(Collective::ReduceScatter { op: Reduction::Sum }, &[&input], &[&part])).unwrap();
                let expected: Vec<f32> = (me * len..(me + 1) * len).map(sum).collect();
                assert_eq!(values(&part), expected, "{algorithms}, reduce_scatter, {len}");
                c.run(call(Collective::AllToAll, &[&input], &[&all])).unwrap();
                let theirs = |rank| (me * len..(me + 1) * len).map(move |i| mark(rank, i));
                assert_eq!(values(&all), (0..size).flat_map(theirs).collect::<Vec<_>>(), "{algorithms}, all_to_all");
            }
        });
    }
}

#[test]
fn broadcast_and_reduce_know_their_root() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            for len in LENGTHS {
                for root in (0..size).map(Rank) {
                    let buffer = floats((0..len).map(|i| mark(c.rank().0, i)));
                    c.run(call(Collective::Broadcast { root }, &[], &[&buffer])).unwrap();
                    let expected: Vec<f32> = (0..len).map(|i| mark(root.0, i)).collect();
                    assert_eq!(values(&buffer), expected, "{way:?}, broadcast from {root} of {size}, {len}");

                    let buffer = floats((0..len).map(|i| mark(c.rank().0, i)));
                    c.run(call(Collective::Reduce { op: Reduction::Sum, root }, &[], &[&buffer])).unwrap();
                    if c.rank() == root {
                        let expected: Vec<f32> = (0..len).map(|i| (0..size).map(|r| mark(r, i)).sum()).collect();
                        assert_eq!(values(&buffer), expected, "{way:?}, reduce to {root} of {size}, {len}");
                    }
                }
            }
        });
    });
}

#[test]
fn all_gather_and_gather_keep_every_rank_s_part_in_its_place() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            for len in LENGTHS {
                // Parts of different lengths: rank r has len + r elements.
                let mine = floats((0..len + c.rank().index()).map(|i| mark(c.rank().0, i)));
                let all: Vec<_> = (0..size as usize).map(|rank| floats(vec![0.0; len + rank])).collect();
                c.run(call(Collective::AllGather, &[&mine], &all.iter().collect::<Vec<_>>())).unwrap();
                for (rank, part) in (0..size).zip(&all) {
                    let expected: Vec<f32> = (0..len + rank as usize).map(|i| mark(rank, i)).collect();
                    assert_eq!(values(part), expected, "{way:?}, part of {rank} of {size}");
                }
                let root = Rank(size - 1);
                let all: Vec<_> = (0..size as usize).map(|rank| floats(vec![0.0; len + rank])).collect();
                let output: Vec<_> = if c.rank() == root { all.iter().collect() } else { vec![] };
                c.run(call(Collective::Gather { root }, &[&mine], &output)).unwrap();
                for (rank, part) in (0..size).zip(&all).filter(|_| c.rank() == root) {
                    let expected: Vec<f32> = (0..len + rank as usize).map(|i| mark(rank, i)).collect();
                    assert_eq!(values(part), expected, "{way:?}, gathered part of {rank} of {size}");
                }
            }
        });
    });
}

#[test]
fn all_gather_takes_what_lies_in_the_output_already() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            for len in LENGTHS {
                let (me, n) = (c.rank().index(), size as usize);
                let all = floats((0..len * n).map(|i| if i / len == me { mark(me as u32, i) } else { -1.0 }));
                let own = Piece { region: Arc::clone(&all), range: me * len * 4..(me + 1) * len * 4 };
                let whole = call(Collective::AllGather, &[], &[&all]);
                c.run(Call { input: vec![own], ..whole }).unwrap();
                let expected: Vec<f32> = (0..len * n).map(|i| mark((i / len) as u32, i)).collect();
                assert_eq!(values(&all), expected, "{way:?}, {size} ranks, {len}");
            }
        });
    });
}

#[test]
fn reduce_scatter_and_scatter_give_every_rank_its_part() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            for len in LENGTHS {
                let (me, n) = (c.rank().index(), size as usize);
                let input = floats((0..len * n).map(|i| mark(c.rank().0, i)));
                let mine = floats(vec![0.0; len]);
                c.run(call(Collective::ReduceScatter { op: Reduction::Sum }, &[&input], &[&mine])).unwrap();
                let sum = |i: usize| (0..size).map(|rank| mark(rank, i)).sum::<f32>();
                let expected: Vec<f32> = (0..len).map(|i| sum(me * len + i)).collect();
                assert_eq!(values(&mine), expected, "{way:?}, {size} ranks, {len}");

                let mine = floats(vec![0.0; len]);
                let given: Vec<_> = if me == 0 { vec![&input] } else { vec![] };
                c.run(call(Collective::Scatter { root: Rank(0) }, &given, &[&mine])).unwrap();
                let expected: Vec<f32> = (0..len).map(|i| mark(0, me * len + i)).collect();
                assert_eq!(values(&mine), expected, "{way:?}, scattered to {me} of {size}, {len}");
            }
        });
    });
}

#[test]
fn all_to_all_exchanges_parts_of_any_length() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            for len in [0, 1, 1000, 2043, 100_000] {
                // Rank a gives rank b len + a + 2b elements, all saying from whom to whom.
                let count = |from: usize, to: usize| len + from + 2 * to;
                let (me, n) = (c.rank().index(), size as usize);
                let given: Vec<_> = (0..n).map(|to| floats(vec![(me * 100 + to) as f32; count(me, to)])).collect();
                let got: Vec<_> = (0..n).map(|from| floats(vec![0.0; count(from, me)])).collect();
                c.run(call(Collective::AllToAll, &given.iter().collect::<Vec<_>>(), &got.iter().collect::<Vec<_>>()))
                    .unwrap();
                for (from, part) in got.iter().enumerate() {
                    assert_eq!(
                        values(part),
                        vec![(from * 100 + me) as f32; count(from, me)],
                        "{way:?}, {from} to {me}"
                    );
                }
            }
        });
    });
}

/// Now and then a rank stores what others will read in another way, to see which takes less time; here within 40 rounds of
/// each length.
#[test]
fn however_it_is_stored_nothing_old_is_read() {
    for size in [2, 3] {
        group(size, Way::Segment, Settings::default(), |c| {
            let (me, n) = (c.rank().0, size as usize);
            for (len, turn) in
                [300, 2048, 5001, 40_000].into_iter().flat_map(|len| (0..40).map(move |turn| (len, turn)))
            {
                let given = |rank, i| mark(rank, i) + (turn * 7) as f32;
                let sum = |i| (0..size).map(|rank| given(rank, i)).sum::<f32>();
                let own = |len| floats((0..len).map(|i| given(me, i)));
                let buffer = own(len);
                c.run(call(Collective::AllReduce { op: Reduction::Sum }, &[], &[&buffer])).unwrap();
                assert!(values(&buffer) == (0..len).map(sum).collect::<Vec<_>>(), "all_reduce of {len}, turn {turn}");
                let part = floats(vec![0.0; len]);
                let scatter = Collective::ReduceScatter { op: Reduction::Sum };
                c.run(call(scatter, &[&own(len * n)], &[&part])).unwrap();
                let first = me as usize * len;
                let expected: Vec<f32> = (first..first + len).map(sum).collect();
                assert!(values(&part) == expected, "reduce_scatter of {len}, turn {turn}");
                let all = floats(vec![0.0; len * n]);
                c.run(call(Collective::AllGather, &[&own(len)], &[&all])).unwrap();
                let expected: Vec<f32> = (0..size).flat_map(|rank| (0..len).map(move |i| given(rank, i))).collect();
                assert!(values(&all) == expected, "all_gather of {len}, turn {turn}");
                c.run(call(Collective::AllToAll, &[&own(len * n)], &[&all])).unwrap();
                let theirs = |rank| (first..first + len).map(move |i| given(rank, i));
                assert!(
                    values(&all) == (0..size).flat_map(theirs).collect::<Vec<_>>(),
                    "all_to_all of {len}, turn {turn}"
                );
            }
        });
    }
}

#[test]
fn a_barrier_lets_nobody_pass_before_all_have_come() {
    use std::sync::atomic::{AtomicU32, Ordering};
    everywhere(|way, size| {
        let come = AtomicU32::new(0);
        group(size, way, Settings::default(), |c| {
            for round in 1..=50 {
                come.fetch_add(1, Ordering::SeqCst);
                c.run(call(Collective::Barrier, &[], &[])).unwrap();
                assert!(come.load(Ordering::SeqCst) >= round * size, "{way:?}");
            }
        });
    });
}

#[test]
fn many_under_way_at_once_end_in_any_order_of_waiting() {
    everywhere(|way, size| {
        group(size, way, Settings::default(), |c| {
            let buffers: Vec<_> = (0..40).map(|k| floats(vec![mark(c.rank().0, k); 1 + 7000 * (k % 5)])).collect();
            let sum = Collective::AllReduce { op: Reduction::Sum };
            let pending: Vec<_> = buffers.iter().map(|buffer| c.start(call(sum, &[], &[buffer])).unwrap()).collect();
            for (k, pending) in pending.iter().enumerate().rev() {
                pending.wait(None).unwrap().unwrap();
                let expected: f32 = (0..size).map(|rank| mark(rank, k)).sum();
                assert!(values(&buffers[k]).into_iter().all(|value| value == expected), "{way:?}, number {k}");
            }
        });
    });
}

#[test]
fn messages_find_their_receives_by_rank_and_tag() {
    for way in WAYS {
        group(3, way, Settings::default(), |c| {
            let (right, left) = (c.rank().right(c.world_size()), c.rank().left(c.world_size()));
            let all = |region: &std::sync::Arc<gradwire_transport::Region>| {
                gradwire_collectives::Piece::whole(std::sync::Arc::clone(region))
            };
            for len in [1, 100_000] {
                let (one, two) = (floats(vec![1.0; len]), floats(vec![2.0; len]));
                let (a, b) = (floats(vec![0.0; len]), floats(vec![0.0; len]));
                // Received in the other order than sent, and receives first: nobody may block.
                let receives =
                    [c.recv(Some(left), 2, all(&b), None).unwrap(), c.recv(Some(left), 1, all(&a), None).unwrap()];
                let sends = [c.send(right, 1, all(&one), None).unwrap(), c.send(right, 2, all(&two), None).unwrap()];
                for pending in receives.iter().chain(&sends) {
                    pending.wait(None).unwrap().unwrap();
                }
                assert_eq!((values(&a), values(&b)), (vec![1.0; len], vec![2.0; len]), "{way:?}");
            }
            // Everybody sends to rank 0, which takes them as they come.
            let buffer = floats(vec![c.rank().0 as f32; 10]);
            if c.rank() == Rank(0) {
                let mut seen = vec![];
                for _ in 0..2 {
                    let done = c.recv(None, 9, all(&buffer), None).unwrap().wait(None).unwrap().unwrap();
                    assert_eq!(values(&buffer), vec![done.source.unwrap().0 as f32; 10]);
                    seen.push(done.source.unwrap());
                }
                seen.sort();
                assert_eq!(seen, [Rank(1), Rank(2)]);
            } else {
                c.send(Rank(0), 9, all(&buffer), None).unwrap().wait(None).unwrap().unwrap();
            }
        });
    }
}
