//! Memory that a group hands out, over queue pairs of one process: the device is told of it once.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::over_verbs;
use gradwire_collectives::{Call, Collective, Communicator, DType, Reduction, Settings};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{Config, tcp};
use std::time::Duration;

fn sum(group: &Communicator, elements: usize) -> *mut u8 {
    let memory = group.allocate(4 * elements).unwrap();
    let piece = memory.piece();
    piece.region.write(piece.range.clone()).unwrap().copy_from_slice(&1f32.to_le_bytes().repeat(elements));
    let call = Call {
        collective: Collective::AllReduce { op: Reduction::Sum },
        dtype: DType::F32,
        input: vec![],
        output: vec![memory.piece()],
        timeout: Some(Duration::from_secs(60)),
    };
    group.run(call).unwrap();
    assert_eq!(memory.as_ptr() as usize % 4096, 0, "it begins on a page");
    let bytes = piece.region.read(piece.range).unwrap();
    assert!(bytes.chunks(4).all(|value| value == 2f32.to_le_bytes()));
    memory.as_ptr()
}

#[test]
fn memory_of_the_group_is_registered_when_it_is_made_and_never_again() {
    let fabric = Fabric::default();
    let (a, b) = tcp::pair(&Config::default(), &Config::default()).unwrap();
    let end = |tcp, own| over_verbs(tcp, own, &fabric, Settings::default());
    let groups = [end(a, 0), end(b, 1)];
    let both = |elements| {
        let [first, second] = std::thread::scope(|scope| {
            groups
                .each_ref()
                .map(|group| scope.spawn(move || sum(group, elements) as usize))
                .map(|one| one.join().unwrap())
        });
        [first, second]
    };
    let sizes = [1000, 300_000, 2_000_000];
    let places = sizes.map(both);
    let warm = fabric.registrations();
    assert!(warm > 2 * sizes.len(), "{warm}");
    for _ in 0..5 {
        assert_eq!(sizes.map(both), places, "the same memory serves again");
    }
    assert_eq!(fabric.registrations(), warm, "a use of it registers nothing");
    let made = groups[0].allocate(50 << 20).unwrap();
    assert_eq!(fabric.registrations(), warm + 1, "before its first use");
    assert!(!made.is_empty());
}
