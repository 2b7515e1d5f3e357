//! What survivors are told when something goes wrong: the same verdict on every rank, naming the culprit.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::{Way, blamed, call, floats, group};
use gradwire_collectives::{Collective, CollectiveError, Reduction, Settings};
use gradwire_transport::Rank;
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
