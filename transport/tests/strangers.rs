//! Who has no business at a TCP wire's door: garbage, the slow, the wrong token, the wrong process. The wire outlives them all.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_transport::{
    Acceptance, Completion, Config, Envelope, Identity, PeerId, Rank, Region, Tag, TcpWire, TransportError, Wire,
    WorldSize,
};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

fn identity(rank: u32) -> Identity {
    let host = "localhost".to_owned();
    Identity {
        rank: Some(Rank(rank)),
        host,
        pid: std::process::id(),
        boot_id: String::new(),
        nonce: u64::from(rank) + 100,
        rdma: false,
        memory: false,
    }
}

fn wire(rank: u32, token: &str, accept: Acceptance) -> TcpWire {
    let config = Config { token: Some(token.to_owned()), ..Config::default() };
    TcpWire::new(&config, identity(rank), accept).unwrap()
}

/// Runs `visit` against a listening wire (rank 0 of 2, token "right") that is polled meanwhile; the wire afterwards.
fn visited(visit: impl FnOnce(SocketAddr) + Send) -> TcpWire {
    let mut host = wire(0, "right", Acceptance::Ranks(WorldSize::new(2).unwrap()));
    let address = host.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            visit(address);
            over.store(true, Ordering::Release);
        });
        let (until, mut done) = (Instant::now() + PATIENCE, Vec::new());
        while !over.load(Ordering::Acquire) {
            assert!(Instant::now() < until, "the visit does not end");
            host.poll(Instant::now(), &mut done);
            std::thread::yield_now();
        }
        assert!(!done.iter().any(|event| matches!(event, Completion::PeerUp(_))), "a stranger was let in: {done:?}");
    });
    host
}

/// A good peer still comes in, and a message goes through.
fn assert_open(mut host: TcpWire) {
    let address = host.addresses()[0];
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || {
            let mut guest = wire(1, "right", Acceptance::Nobody);
            guest.dial(PeerId(0), Some(100), &[address], Instant::now() + PATIENCE).unwrap();
            let region = Region::from_vec(b"hello".to_vec());
            guest.post_send(Envelope { peer: PeerId(0), tag: Tag(1), note: 7 }, region.read(0..5).unwrap()).unwrap();
            guest.shutdown(Instant::now() + PATIENCE);
        });
        let (until, mut done, mut heard) = (Instant::now() + PATIENCE, Vec::new(), false);
        while !heard {
            assert!(Instant::now() < until, "a good peer is not heard");
            host.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                match completion {
                    Completion::PeerUp(peer) => host.post_recv_loan(peer, Tag(1), 10).unwrap(),
                    Completion::Arrived(arrival) => heard = &*arrival.loan == b"hello" && arrival.from.note == 7,
                    _ => {}
                }
            }
        }
        guest.join().unwrap();
    });
}

/// Reads until the other end closes, or gives up.
fn closed(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = [0; 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn garbage_is_shown_the_door_and_good_peers_still_come_in() {
    let host = visited(|address| {
        let greetings: [&[u8]; 5] = [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            &[0xff; 4096],
            &[0; 64],
            // A record of 1,000 bytes that is no hello.
            &[&1000u16.to_le_bytes()[..], &[7; 1000]].concat(),
            // The mark of a hello, and then nothing that makes sense.
            &[&60u16.to_le_bytes()[..], b"GWH4", &[0xfe; 56]].concat(),
        ];
        for greeting in greetings {
            let mut stream = TcpStream::connect(address).unwrap();
            // The wire may close before it has read everything.
            let _ = stream.write_all(greeting);
            assert!(closed(stream), "kept talking to {greeting:?}");
        }
    });
    assert_open(host);
}

#[test]
fn many_who_say_nothing_do_not_keep_others_out() {
    let host = visited(|address| {
        let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut half = TcpStream::connect(address).unwrap();
        half.write_all(&[60]).unwrap();
        // Half of them go, the others are cut off when their time is up.
        drop(silent.into_iter().step_by(2).collect::<Vec<_>>());
        assert!(closed(half), "a hello may not take for ever");
    });
    assert_open(host);
}

#[test]
fn another_token_is_refused_at_once_and_both_ends_know_why() {
    let host = visited(|address| {
        for token in ["wrong", ""] {
            let mut guest = wire(1, token, Acceptance::Nobody);
            let began = Instant::now();
            let refused = guest.dial(PeerId(0), Some(100), &[address], Instant::now() + PATIENCE).unwrap_err();
            assert!(matches!(refused, TransportError::Authentication { .. }), "{refused}");
            assert!(refused.to_string().contains("GRADWIRE_TOKEN"), "{refused}");
            assert!(began.elapsed() < PATIENCE / 4, "a wrong token is not tried again");
        }
    });
    assert_open(host);
}

#[test]
fn the_address_of_a_process_that_is_gone_is_called_stale() {
    let host = visited(|address| {
        let mut guest = wire(1, "right", Acceptance::Nobody);
        let until = Instant::now() + Duration::from_millis(300);
        let refused = guest.dial(PeerId(0), Some(99), &[address], until).unwrap_err().to_string();
        assert!(refused.contains("no longer there") && refused.contains(&address.to_string()), "{refused}");
    });
    assert_open(host);
}

#[test]
fn an_address_that_nobody_listens_at_is_passed_over() {
    let mut host = wire(0, "t", Acceptance::Ranks(WorldSize::new(2).unwrap()));
    let good = host.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    // Bound and dropped: nobody listens there now.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || {
            wire(1, "t", Acceptance::Nobody).dial(PeerId(0), Some(100), &[gone, good], Instant::now() + PATIENCE)
        });
        while !guest.is_finished() {
            host.poll(Instant::now(), &mut Vec::new());
        }
        guest.join().unwrap().unwrap();
    });
}

#[test]
fn an_address_that_does_not_answer_leaves_the_others_their_time() {
    let mut host = wire(0, "t", Acceptance::Ranks(WorldSize::new(2).unwrap()));
    let good = host.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    // The system takes the call; nobody says a word.
    let mute = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let [first, second, last] = mute.each_ref().map(|listener| listener.local_addr().unwrap());
    let began = Instant::now();
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || {
            let until = began + Duration::from_millis(2000);
            wire(1, "t", Acceptance::Nobody).dial(PeerId(0), Some(100), &[first, second, good, last], until)
        });
        while !guest.is_finished() {
            host.poll(Instant::now(), &mut Vec::new());
        }
        guest.join().unwrap().unwrap();
    });
    assert!(began.elapsed() < Duration::from_millis(1800), "two of four took {:?} of 2 s", began.elapsed());
}

#[test]
fn the_address_that_was_good_is_tried_first_the_next_time() {
    let mut host = wire(0, "t", Acceptance::Ranks(WorldSize::new(2).unwrap()));
    let good = host.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = [mute.local_addr().unwrap(), good];
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || {
            let mut guest = wire(1, "t", Acceptance::Nobody);
            for _ in 0..3 {
                guest.dial(PeerId(0), Some(100), &addresses, Instant::now() + Duration::from_millis(2000)).unwrap();
            }
        });
        while !guest.is_finished() {
            host.poll(Instant::now(), &mut Vec::new());
        }
        guest.join().unwrap();
    });
    mute.set_nonblocking(true).unwrap();
    let calls = std::iter::from_fn(|| mute.accept().ok()).count();
    assert_eq!(calls, 1, "an address that did not answer was tried again before the one that did");
}

#[test]
fn a_listener_that_speaks_a_byte_at_a_time_holds_nobody_beyond_the_deadline() {
    let drip = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = drip.local_addr().unwrap();
    let dripping = std::thread::spawn(move || {
        let (mut stream, _) = drip.accept().unwrap();
        // A record of 500 bytes, which ends only when nobody listens any more.
        for byte in 500u16.to_le_bytes().into_iter().chain([7; 400]) {
            if stream.write_all(&[byte]).is_err() {
                return true;
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        false
    });
    let until = Instant::now() + Duration::from_millis(300);
    let refused = wire(1, "t", Acceptance::Nobody).dial(PeerId(0), None, &[address], until);
    assert!(matches!(refused, Err(TransportError::Unreachable { .. })), "{refused:?}");
    assert!(dripping.join().unwrap(), "it listened for as long as something came");
}

#[test]
fn who_did_not_hear_its_welcome_may_call_again_and_another_of_its_rank_may_not() {
    let mut host = wire(0, "right", Acceptance::Ranks(WorldSize::new(2).unwrap()));
    let address = host.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let dialled = |identity: Identity| {
        move || {
            let config = Config { token: Some("right".to_owned()), ..Config::default() };
            let mut guest = TcpWire::new(&config, identity, Acceptance::Nobody).unwrap();
            guest.dial(PeerId(0), Some(100), &[address], Instant::now() + PATIENCE).map(|()| guest)
        }
    };
    let other = Identity { nonce: 7, ..identity(1) };
    let mut done = Vec::new();
    let mut guests = Vec::new();
    for identity in [identity(1), identity(1), other] {
        let call = std::thread::spawn(dialled(identity));
        let until = Instant::now() + PATIENCE;
        while !call.is_finished() {
            assert!(Instant::now() < until, "the call does not end");
            host.poll(Instant::now(), &mut done);
            std::thread::yield_now();
        }
        guests.push(call.join().unwrap());
    }
    assert!(guests[0].is_ok() && guests[1].is_ok());
    let refused = guests[2].as_ref().err().expect("another process has this rank").to_string();
    assert!(refused.contains("two processes were started with one rank"), "{refused}");
    let ups = done.iter().filter(|event| matches!(event, Completion::PeerUp(_))).count();
    assert_eq!(ups, 2, "{done:?}");
}
