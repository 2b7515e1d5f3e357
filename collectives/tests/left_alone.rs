//! What a rank has sent comes, whatever breaks on its way, though the rank itself does nothing more with its group.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;

use common::{over_verbs, values};
use gradwire_collectives::{Call, Collective, Communicator, DType, Piece, Settings};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{Config, Rank, Region, tcp};
use std::sync::Arc;
use std::time::Duration;

/// Elements of a broadcast: its root has done its part once they are sent.
const ELEMENTS: usize = 1000;

fn broadcast(group: &Communicator, buffer: &Arc<Region>) {
    let whole = Piece { region: Arc::clone(buffer), range: 0..buffer.len() };
    let call = Call {
        collective: Collective::Broadcast { root: Rank(0) },
        dtype: DType::F32,
        input: vec![],
        output: vec![whole],
        timeout: Some(Duration::from_secs(20)),
    };
    group.run(call).unwrap();
}

#[test]
fn queue_pairs_that_break_under_the_last_message_of_an_idle_rank_are_repaired() {
    for seed in 0..8 {
        let fabric = Fabric::default();
        let (a, b) = tcp::pair(&Config::default(), &Config::default()).unwrap();
        let groups = [over_verbs(a, 0, &fabric, Settings::default()), over_verbs(b, 1, &fabric, Settings::default())];
        let buffers = [7f32, 0.0].map(|value| Region::from_vec(value.to_le_bytes().repeat(ELEMENTS)));
        std::thread::scope(|scope| {
            scope.spawn(|| broadcast(&groups[0], &buffers[0]));
            broadcast(&groups[1], &buffers[1]);
        });
        buffers[0].write(0..buffers[0].len()).unwrap().copy_from_slice(&9f32.to_le_bytes().repeat(ELEMENTS));
        // The next message breaks its queue pair, before it is delivered or after, as the seed has it.
        fabric.fail_at_random(seed, 1_000_000, 1);
        broadcast(&groups[0], &buffers[0]);
        broadcast(&groups[1], &buffers[1]);
        assert_eq!(values(&buffers[1]), [9.0; ELEMENTS], "seed {seed}");
    }
}
