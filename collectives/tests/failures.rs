//! What survivors are told when something goes wrong: the same verdict on every rank, naming the culprit.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::{Way, blamed, call, floats, group};
use gradwire_collectives::{Call, Collective, CollectiveError, Piece, Reduction, Settings};
use gradwire_transport::{Rank, Region};
use std::sync::Arc;
use std::time::{Duration, Instant};

const WAYS: [Way; 3] = [Way::Tcp, Way::Shm, Way::Segment];
const SUM: Collective = Collective::AllReduce { op: Reduction::Sum };

#[test]
fn a_rank_that_does_not_come_is_named_by_all_others() {
    for way in WAYS {
        let settings = Settings { timeout: Duration::from_millis(400), ..Settings::default() };
        let gate = std::sync::Barrier::new(4);
        let errors = group(4, way, settings, |c| {
            let buffer = floats(vec![1.0; 50_000]);
            c.run(call(SUM, &[], &[&buffer])).unwrap();
            let error = (c.rank() != Rank(2)).then(|| c.run(call(SUM, &[], &[&buffer])).unwrap_err());
            gate.wait();
            error
        });
        for error in errors.iter().flatten() {
            assert!(matches!(error, CollectiveError::Timeout { .. }), "{way:?}: {error}");
            assert_eq!(blamed(error), [Rank(2)], "{way:?}: {error}");
            assert!(error.to_string().contains("all_reduce"), "{error}");
        }
        assert_eq!(errors.iter().flatten().count(), 3);
    }
}

#[test]
fn a_rank_that_leaves_while_it_is_needed_is_named() {
    for way in WAYS {
        let began = Instant::now();
        let errors = group(3, way, Settings::default(), |c| {
            let buffer = floats(vec![1.0; 50_000]);
            c.run(call(SUM, &[], &[&buffer])).unwrap();
            if c.rank() == Rank(1) {
                return None;
            }
            Some(c.run(call(SUM, &[], &[&buffer])).unwrap_err())
        });
        for error in errors.iter().flatten() {
            assert!(matches!(error, CollectiveError::RankFailed { .. }), "{way:?}: {error}");
            assert_eq!(blamed(error), [Rank(1)], "{way:?}: {error}");
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{way:?}: by the goodbye, not by the deadline");
    }
}

#[test]
fn a_rank_that_calls_something_else_is_named_by_all() {
    for way in WAYS {
        for other in [
            (Collective::AllReduce { op: Reduction::Max }, 5000),
            (SUM, 5001),
            (Collective::Broadcast { root: Rank(0) }, 5000),
        ] {
            let errors = group(3, way, Settings::default(), |c| {
                let (collective, len) = if c.rank() == Rank(2) { other } else { (SUM, 5000) };
                let buffer = floats(vec![1.0; len]);
                c.run(call(collective, &[], &[&buffer])).unwrap_err()
            });
            for error in &errors {
                assert!(matches!(error, CollectiveError::Mismatch { .. }), "{way:?}: {error}");
                assert_eq!(blamed(error), [Rank(2)], "{way:?}: {error}");
            }
        }
    }
}

#[test]
fn doubling_names_the_rank_that_combines_otherwise_or_more() {
    let settings = Settings { algorithms: Some("all_reduce:doubling".into()), ..Settings::default() };
    for odd in [0, 1, 2].map(Rank) {
        for (op, len) in [(Reduction::Max, 5000), (Reduction::Sum, 5001)] {
            let errors = group(3, Way::Tcp, settings.clone(), |c| {
                let (collective, len) = if c.rank() == odd { (Collective::AllReduce { op }, len) } else { (SUM, 5000) };
                let buffer = floats(vec![1.0; len]);
                c.run(call(collective, &[], &[&buffer])).unwrap_err()
            });
            for error in &errors {
                assert_eq!(blamed(error), [odd], "{error}");
            }
        }
    }
}

/// A call of `collective` in which rank 1 gives rank 0 `sent` elements, rank 0 awaits `awaited`, and all else is two elements.
fn odd_parts(rank: Rank, collective: Collective, (sent, awaited): (usize, usize)) -> Call {
    let lens = |odd: bool, at: usize, len: usize| (0..3).map(move |other| if odd && other == at { len } else { 2 });
    let buffers = |lens: &mut dyn Iterator<Item = usize>| lens.map(|len| floats(vec![1.0; len])).collect::<Vec<_>>();
    let gives = || buffers(&mut lens(rank == Rank(1), 0, sent));
    let gets = || buffers(&mut lens(rank == Rank(0), 1, awaited));
    let (input, output) = match collective {
        Collective::Gather { root } if root == rank => (buffers(&mut [2].into_iter()), gets()),
        Collective::Gather { .. } => (gives()[..1].to_vec(), vec![]),
        Collective::Scatter { root } if root == rank => (gives(), buffers(&mut [2].into_iter())),
        Collective::Scatter { .. } => (vec![], gets()[1..2].to_vec()),
        _ => (gives(), gets()),
    };
    call(collective, &input.iter().collect::<Vec<_>>(), &output.iter().collect::<Vec<_>>())
}

#[test]
fn parts_of_which_only_two_ranks_know_the_length_are_compared_by_these() {
    let collectives =
        [Collective::AllToAll, Collective::Gather { root: Rank(0) }, Collective::Scatter { root: Rank(1) }];
    let lens = [(3, 2), (2, 3), (0, 5), (5, 0), (5, 100_000), (100_000, 5), (100_000, 65_536), (65_536, 100_000)];
    for (way, collective) in WAYS.into_iter().flat_map(|way| collectives.map(|collective| (way, collective))) {
        for (sent, awaited) in lens {
            let errors = group(3, way, Settings::default(), |c| {
                let sum = floats(vec![1.0; 3]);
                let odd = c.run(odd_parts(c.rank(), collective, (sent, awaited)));
                // Who has had nothing wrong hears of it in its next call.
                odd.and_then(|()| c.run(call(SUM, &[], &[&sum]))).unwrap_err()
            });
            for error in &errors {
                assert_eq!(blamed(error), [Rank(1), Rank(0)], "{way:?} {collective:?}: {error}");
                let told = format!(") gives {sent} elements to rank 0 (");
                let text = error.to_string();
                assert!(text.contains(&told) && text.contains(&format!("awaits {awaited}:")), "{way:?}: {text}");
            }
        }
    }
}

#[test]
fn who_lists_other_parts_than_the_others_is_named_by_all() {
    for way in WAYS {
        for gather in [true, false] {
            let errors = group(3, way, Settings::default(), |c| {
                let odd = c.rank() == Rank(2);
                let lens = if odd { [4, 3, 5] } else { [3, 4, 5] };
                let parts: Vec<_> = lens.iter().map(|&len| floats(vec![1.0; len])).collect();
                let own = floats(vec![1.0; lens[c.rank().index()]]);
                let all = parts.iter().collect::<Vec<_>>();
                let scatter = Collective::ReduceScatter { op: Reduction::Sum };
                let odd = match gather {
                    true => call(Collective::AllGather, &[&own], &all),
                    false => call(scatter, &all, &[&own]),
                };
                c.run(odd).unwrap_err()
            });
            for error in &errors {
                assert_eq!(blamed(error), [Rank(2)], "{way:?}: {error}");
                assert!(error.to_string().contains("in unequal parts (list "), "{way:?}: {error}");
            }
        }
    }
}

#[test]
fn who_gives_nan_is_named_by_all_that_look_for_it() {
    let settings = Settings { check_nan: true, ..Settings::default() };
    for (way, collective) in WAYS.into_iter().flat_map(|way| [SUM, Collective::AllGather].map(|each| (way, each))) {
        let errors = group(3, way, settings.clone(), |c| {
            let mut values = vec![f32::INFINITY; 5000];
            let (own, all, sum) = (floats(values.clone()), floats(vec![0.0; 15_000]), floats(values.clone()));
            let of = |own: &Arc<Region>, sum| match collective {
                Collective::AllGather => call(collective, &[own], &[&all]),
                _ => call(collective, &[], &[sum]),
            };
            c.run(of(&own, &sum)).unwrap();
            // Its third, among those whose rank it is not.
            values[c.rank().index() + 2] = if c.rank() == Rank(1) { f32::NAN } else { 0.0 };
            c.run(of(&floats(values.clone()), &floats(values))).unwrap_err()
        });
        for error in &errors {
            assert!(matches!(error, CollectiveError::NotANumber { element: 3, .. }), "{way:?}: {error}");
            assert_eq!(blamed(error), [Rank(1)], "{way:?}: {error}");
        }
    }
}

#[test]
fn where_all_give_nan_all_name_the_same_rank() {
    let settings = Settings { check_nan: true, ..Settings::default() };
    for way in WAYS {
        let errors =
            group(3, way, settings.clone(), |c| c.run(call(SUM, &[], &[&floats(vec![f32::NAN; 5000])])).unwrap_err());
        assert!(errors.iter().all(|error| matches!(error, CollectiveError::NotANumber { element: 0, .. })), "{way:?}");
        let named: Vec<_> = errors.iter().map(blamed).collect();
        assert!(named.iter().all(|blamed| *blamed == [Rank(0)]), "{way:?}: {named:?}");
    }
}

#[test]
fn of_several_that_give_nan_all_name_one_and_the_lowest_that_is_not_late() {
    let settings = Settings { check_nan: true, ..Settings::default() };
    // How much later the first of them comes: not, within what the others wait for it, and beyond.
    for (way, late_ms) in WAYS.into_iter().flat_map(|way| [0, 0, 0, 20, 20, 600].map(|late_ms| (way, late_ms))) {
        let errors = group(4, way, settings.clone(), |c| {
            let (me, first) = (c.rank().index(), c.rank() == Rank(1));
            let mut values = vec![1.0; 5000];
            c.run(call(SUM, &[], &[&floats(values.clone())])).unwrap();
            if first || me == 3 {
                values[10 * me] = f32::NAN;
            }
            if first {
                std::thread::sleep(Duration::from_millis(late_ms));
            }
            // With others after it, which must not end well anywhere.
            let calls: Vec<_> = (0..6).map(|_| call(SUM, &[], &[&floats(values.clone())])).collect();
            let begun: Vec<_> = calls.into_iter().map(|call| c.start(call).unwrap()).collect();
            let errors: Vec<_> = begun.iter().map(|pending| pending.wait(None).unwrap().unwrap_err()).collect();
            errors.into_iter().next().unwrap()
        });
        let named: Vec<_> = errors.iter().map(blamed).collect();
        assert!(named.iter().all(|blamed| *blamed == named[0]), "{way:?}, {late_ms} ms: {named:?}");
        // At the segment all wait for all.
        let lowest = if late_ms < 200 || way == Way::Segment { 1 } else { 3 };
        assert_eq!(named[0], [Rank(lowest)], "{way:?}, {late_ms} ms");
        for error in &errors {
            let CollectiveError::NotANumber { element, .. } = error else { panic!("{way:?}: {error}") };
            assert_eq!(*element, 10 * u64::from(lowest), "{way:?}");
        }
    }
}

#[test]
fn nan_passes_where_nobody_looks_for_it() {
    group(2, Way::Segment, Settings::default(), |c| {
        let buffer = floats(vec![f32::NAN; 10]);
        c.run(call(SUM, &[], &[&buffer])).unwrap();
        assert!(common::values(&buffer).iter().all(|value| value.is_nan()));
    });
}

#[test]
fn a_group_is_closed_within_the_time_also_while_another_rank_does_not_come() {
    for way in WAYS {
        let gate = std::sync::Barrier::new(2);
        let settings = Settings { timeout: Duration::from_secs(20), ..Settings::default() };
        group(2, way, settings, |c| {
            let buffer = floats(vec![1.0; 10]);
            c.run(call(SUM, &[], &[&buffer])).unwrap();
            if c.rank() == Rank(1) {
                gate.wait();
                return;
            }
            let pending = c.start(call(SUM, &[], &[&buffer])).unwrap();
            // Until the progress thread is in it.
            std::thread::sleep(Duration::from_millis(200));
            let began = Instant::now();
            c.close(Duration::from_millis(200));
            let took = began.elapsed();
            gate.wait();
            assert!(took < Duration::from_secs(5), "{way:?}: {took:?}");
            assert!(pending.wait(Some(Duration::from_secs(5))).unwrap().is_err());
        });
    }
}

#[test]
fn a_wait_of_so_long_ends_then_also_where_it_would_begin_the_call_and_the_call_goes_on() {
    for way in WAYS {
        let gate = std::sync::Barrier::new(2);
        let settings = Settings { timeout: Duration::from_secs(20), ..Settings::default() };
        group(2, way, settings, |c| {
            for turn in 0..10 {
                let buffer = floats(vec![1.0; 10]);
                c.run(call(SUM, &[], &[&buffer])).unwrap();
                if c.rank() == Rank(0) {
                    let pending = c.start(call(SUM, &[], &[&buffer])).unwrap();
                    let began = Instant::now();
                    let outcome = pending.wait_at_most(Duration::from_millis(20));
                    let took = began.elapsed();
                    gate.wait();
                    assert!(outcome.is_none() && took < Duration::from_secs(5), "{way:?}, turn {turn}: {took:?}");
                    pending.wait_at_most(Duration::from_secs(20)).unwrap().unwrap();
                } else {
                    gate.wait();
                    c.run(call(SUM, &[], &[&buffer])).unwrap();
                }
                assert_eq!(common::values(&buffer), [4.0; 10], "{way:?}, turn {turn}");
            }
        });
    }
}

#[test]
fn what_was_sent_before_the_group_was_closed_arrives() {
    for (way, _) in WAYS.into_iter().flat_map(|way| (0..20).map(move |turn| (way, turn))) {
        group(2, way, Settings::default(), |c| {
            let buffer = floats(vec![c.rank().0 as f32; 100]);
            if c.rank() == Rank(1) {
                c.send(Rank(0), 3, Piece::whole(buffer), None).unwrap();
                return c.close(Duration::from_secs(5));
            }
            c.recv(Some(Rank(1)), 3, Piece::whole(buffer.clone()), None).unwrap().wait(None).unwrap().unwrap();
            assert_eq!(common::values(&buffer), [1.0; 100], "{way:?}");
        });
    }
}

#[test]
fn a_receive_that_is_late_takes_none_of_the_next_with_it() {
    for way in WAYS {
        let gate = std::sync::Barrier::new(2);
        group(2, way, Settings::default(), |c| {
            if c.rank() == Rank(1) {
                gate.wait();
                let sent = [1.0, 2.0].map(|value| c.send(Rank(0), 3, Piece::whole(floats([value])), None).unwrap());
                return sent.iter().for_each(|sent| assert!(sent.wait(None).unwrap().is_ok()));
            }
            let (short, long) = (Some(Duration::from_millis(50)), Some(Duration::from_secs(20)));
            let buffers = [short, long, short, long].map(|timeout| (floats([0.0]), timeout));
            let recv =
                |(buffer, timeout): &(Arc<Region>, _)| c.recv(Some(Rank(1)), 3, Piece::whole(buffer.clone()), *timeout);
            let pending: Vec<_> = buffers.iter().map(|each| recv(each).unwrap()).collect();
            for late in [0, 2] {
                let error = pending[late].wait(None).unwrap().unwrap_err();
                assert!(matches!(error, CollectiveError::Timeout { .. }), "{way:?}: {error}");
            }
            gate.wait();
            for (at, value) in [(1, 1.0), (3, 2.0)] {
                pending[at].wait(None).unwrap().unwrap();
                assert_eq!(common::values(&buffers[at].0), [value], "{way:?}");
            }
        });
    }
}

#[test]
fn a_rank_whose_buffer_is_in_use_lets_no_other_rank_s_call_meet_its_next_one() {
    for way in WAYS {
        let errors = group(2, way, Settings::default(), |c| {
            let (used, free) = (floats(vec![1.0; 10]), floats(vec![5.0; 10]));
            if c.rank() == Rank(1) {
                return vec![c.run(call(SUM, &[], &[&used])).unwrap_err()];
            }
            let _recv = c.recv(Some(Rank(1)), 3, Piece::whole(used.clone()), None).unwrap();
            // Begun before the calls are.
            std::thread::sleep(Duration::from_millis(100));
            [&used, &free].map(|buffer| c.run(call(SUM, &[], &[buffer])).unwrap_err()).into()
        });
        assert!(matches!(errors[0][0], CollectiveError::Invalid { .. }), "{way:?}: {}", errors[0][0]);
        for error in [&errors[0][1], &errors[1][0]] {
            assert!(matches!(error, CollectiveError::Aborted { .. }), "{way:?}: {error}");
            assert!(error.to_string().contains("rank 0 could not go on"), "{way:?}: {error}");
        }
    }
}

#[test]
fn abort_releases_everybody_with_the_reason() {
    for way in WAYS {
        let errors = group(3, way, Settings::default(), |c| {
            let buffer = floats(vec![1.0; 1000]);
            if c.rank() == Rank(0) {
                c.abort("loss is NaN");
            }
            c.run(call(SUM, &[], &[&buffer])).unwrap_err().to_string()
        });
        for error in errors {
            assert!(error.contains("loss is NaN") && error.contains("rank 0"), "{way:?}: {error}");
        }
    }
}

#[test]
fn calls_that_make_no_sense_are_refused_and_the_group_goes_on() {
    group(2, Way::Tcp, Settings::default(), |c| {
        let buffer = floats(vec![1.0; 3]);
        let refused = |call| match c.run(call).unwrap_err() {
            CollectiveError::Invalid { reason, .. } => reason,
            other => panic!("{other}"),
        };
        assert!(refused(call(Collective::Broadcast { root: Rank(7) }, &[], &[&buffer])).contains("2 ranks"));
        assert!(
            refused(call(Collective::ReduceScatter { op: Reduction::Sum }, &[&buffer], &[&buffer]))
                .contains("3 elements")
        );
        assert!(refused(call(SUM, &[], &[])).contains("one output"));
        assert!(c.send(c.rank(), 0, gradwire_collectives::Piece::whole(buffer.clone()), None).is_err());
        c.run(call(SUM, &[], &[&buffer])).unwrap();
        assert_eq!(common::values(&buffer), [2.0; 3]);
    });
}
