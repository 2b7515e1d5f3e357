//! What ends a sleep.

use super::*;

pub fn park_ends_by_data_by_a_wake_and_by_the_clock(make: Make) {
    let mut world = make(&Config::default(), 2);
    // By the clock: not earlier, and not never.
    let until = Instant::now() + Duration::from_millis(30);
    while Instant::now() < until {
        world.wire(1).park(until);
    }
    let began = Instant::now();
    world.wire(1).park(began);
    world.wire(1).waker().wake();
    world.wire(1).park(began + PATIENCE);
    let waker = world.wire(1).waker();
    std::thread::scope(|scope| {
        scope.spawn(move || waker.wake());
        world.wire(1).park(began + PATIENCE);
    });
    let (target, space) = blank(9);
    world.wire(1).post_recv(PeerId(0), Tag(1), space).unwrap();
    world.turn();
    world.wire(0).post_send(to(1, 1, 0), filled(1, 9).1).unwrap();
    let now = world.now();
    world.wires[0].as_mut().unwrap().poll(now, &mut world.done[0]);
    while world.done[1].is_empty() && began.elapsed() < PATIENCE {
        world.wire(1).park(began + PATIENCE);
        world.turn();
    }
    world.done[1].clear();
    assert_eq!(&*target.read(0..9).unwrap(), &pattern(1, 9)[..]);
    assert!(began.elapsed() < PATIENCE / 2);
}

/// Two threads that sleep whenever nothing comes: a wake-up that gets lost shows as a sleep to the end of the patience.
pub fn no_wake_up_is_lost_between_two_sleepers(make: Make) {
    let mut world = make(&Config { window_bytes: 200_000, ..Config::default() }, 2);
    if world.simulated.is_some() {
        return; // Nobody sleeps there.
    }
    const ROUNDS: u64 = 300;
    let size = |k: u64| [8, 30_000, 70_000, 0, 1 << 20][(k % 5) as usize];
    let began = Instant::now();
    let play = |mut wire: Box<dyn Wire>, me: u32| {
        let mut done = Vec::new();
        let (target, source) = (Region::zeroed(1 << 20), Region::from_vec(pattern(3, 1 << 20)));
        for k in 0..ROUNDS {
            wire.post_recv(PeerId(1 - me), Tag(k), target.write(0..size(k)).unwrap()).unwrap();
            let send = |wire: &mut Box<dyn Wire>| {
                wire.post_send(to(1 - me, k, k), source.read(0..size(k)).unwrap()).unwrap();
            };
            if me == 0 {
                send(&mut wire);
            }
            // One is told of at once, or the sleep is ended by what comes: never by the clock.
            let mut open = 2;
            while open > 0 {
                wire.poll(Instant::now(), &mut done);
                for completion in done.drain(..) {
                    // Who has played the last round leaves.
                    if k == ROUNDS - 1 && matches!(completion, Completion::PeerDown { .. }) {
                        continue;
                    }
                    open -= 1;
                    match completion {
                        Completion::Received { from, .. } if me == 1 && from.note == k => send(&mut wire),
                        Completion::Received { .. } | Completion::Sent { .. } => {}
                        other => panic!("{other:?}"),
                    }
                }
                if open > 0 {
                    wire.park(Instant::now() + PATIENCE);
                }
            }
        }
        // What was sent last is delivered while the wire is driven, or shut down.
        wire.shutdown(Instant::now() + PATIENCE);
    };
    let (a, b) = (world.wires[0].take().unwrap(), world.wires[1].take().unwrap());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| play(b, 1));
        play(a, 0);
        other.join().unwrap();
    });
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
}
