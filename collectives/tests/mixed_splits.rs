//! All-to-alls in which some ranks give the lengths of parts and others do not, because to them all are the same.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::{Way, blamed, call, floats, group, values};
use gradwire_collectives::{Collective, CollectiveError, Communicator, Reduction, Settings};
use gradwire_transport::Rank;

const BRUCK: &str = "all_to_all:bruck";

/// The elements of the part that `from` gives `to`, where those that `even` tells of have parts of `len` elements only.
fn count(len: usize, even: &dyn Fn(usize) -> bool, from: usize, to: usize) -> usize {
    if even(from) || even(to) { len } else { len + (from + 2 * to) % 5 }
}

/// One such call: who is `even` gives no lengths.
fn exchange(c: &Communicator, len: usize, even: &dyn Fn(usize) -> bool) {
    let (me, n) = (c.rank().index(), c.world_size().get() as usize);
    let told = |from: usize, to: usize| {
        (0..count(len, even, from, to)).map(move |at| (from * 100_000 + to * 1000 + at % 997) as f32)
    };
    let expected: Vec<Vec<f32>> = (0..n).map(|from| told(from, me).collect()).collect();
    let got: Vec<Vec<f32>> = if even(me) {
        let (given, all) = (floats((0..n).flat_map(|to| told(me, to))), floats(vec![0.0; n * len]));
        c.run(call(Collective::AllToAll, &[&given], &[&all])).unwrap();
        values(&all).chunks(len).map(<[f32]>::to_vec).collect()
    } else {
        let given: Vec<_> = (0..n).map(|to| floats(told(me, to))).collect();
        let got: Vec<_> = (0..n).map(|from| floats(vec![0.0; count(len, even, from, me)])).collect();
        c.run(call(Collective::AllToAll, &given.iter().collect::<Vec<_>>(), &got.iter().collect::<Vec<_>>())).unwrap();
        got.iter().map(values).collect()
    };
    assert!(got == expected, "{}: {len}", c.rank());
}

/// Calls of every kind one after the other, so that what is left of one would meet the next.
fn all_kinds(size: u32, way: Way, settings: Settings, lens: &[usize]) {
    let last = size as usize - 1;
    let kinds: [&(dyn Fn(usize) -> bool + Sync); 6] =
        [&|_| true, &|rank| rank == 0, &|rank| rank != last, &|rank| rank % 2 == 1, &|_| false, &|rank| rank != 1];
    group(size, way, settings, |c| {
        for (turn, &len) in lens.iter().enumerate() {
            for even in kinds {
                exchange(c, len, even);
            }
            let sum = floats([turn as f32]);
            c.run(call(Collective::AllReduce { op: Reduction::Sum }, &[], &[&sum])).unwrap();
            assert_eq!(values(&sum), [turn as f32 * size as f32]);
        }
    });
}

#[test]
fn sixteen_ranks_and_more_need_not_all_give_lengths() {
    for (way, size) in [(Way::Tcp, 16), (Way::Tcp, 17), (Way::Shm, 17), (Way::Segment, 16)] {
        // Which would be chosen where messages are dear, as they happen to be when the ranks meet.
        let settings = Settings { algorithms: Some(BRUCK.to_owned()), ..Settings::default() };
        all_kinds(size, way, settings, &[1, 3, 200]);
    }
}

#[test]
fn packed_parts_of_several_messages_need_not_all_be_given_lengths() {
    let settings = Settings { algorithms: Some(BRUCK.to_owned()), ..Settings::default() };
    for (way, size) in [(Way::Tcp, 2), (Way::Tcp, 3), (Way::Shm, 5), (Way::Lanes, 5), (Way::Credit, 6)] {
        all_kinds(size, way, settings.clone(), &[1, 1000, 9000, 20_000, 32_767, 32_768, 32_769, 100_000]);
    }
}

#[test]
fn who_gives_another_length_than_the_even_ones_is_named() {
    let settings = Settings { algorithms: Some(BRUCK.to_owned()), ..Settings::default() };
    for (way, wrong) in [Way::Tcp, Way::Shm].into_iter().flat_map(|way| [3, 5, 100_000].map(|wrong| (way, wrong))) {
        let errors = group(4, way, settings.clone(), |c| {
            let lens: &[usize] = if c.rank() == Rank(2) { &[4, wrong, 4, 4] } else { &[16] };
            let parts = || lens.iter().map(|&len| floats(vec![1.0; len])).collect::<Vec<_>>();
            let (given, got, sum) = (parts(), parts(), floats([1.0]));
            let odd =
                c.run(call(Collective::AllToAll, &given.iter().collect::<Vec<_>>(), &got.iter().collect::<Vec<_>>()));
            // Who has had nothing wrong hears of it in its next call.
            let next = call(Collective::AllReduce { op: Reduction::Sum }, &[], &[&sum]);
            odd.and_then(|()| c.run(next)).unwrap_err()
        });
        for error in &errors {
            let CollectiveError::PartsDiffer { sent, awaited, .. } = error else { panic!("{way:?} {wrong}: {error}") };
            let mut ranks = blamed(error);
            ranks.sort();
            assert_eq!(ranks, [Rank(1), Rank(2)], "{way:?} {wrong}: {error}");
            assert!([*sent, *awaited].contains(&4) && [*sent, *awaited].contains(&(wrong as u64)), "{error}");
        }
    }
}
