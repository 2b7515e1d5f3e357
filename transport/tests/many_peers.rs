//! More peers than a wire looks at one by one.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_transport::{Acceptance, Completion, Config, Envelope, Identity, PeerId, Tag, TcpWire, Wire};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const PEERS: usize = 12;

fn wire(nonce: u64, accept: Acceptance) -> TcpWire {
    let me =
        Identity { rank: None, host: "h".into(), pid: 1, boot_id: String::new(), nonce, rdma: false, memory: false };
    TcpWire::new(&Config::default(), me, accept).unwrap()
}

/// Polls until `enough` of what came suffices.
fn gather(wire: &mut TcpWire, enough: impl Fn(&[Completion]) -> bool) -> Vec<Completion> {
    let (until, mut done) = (Instant::now() + Duration::from_secs(10), Vec::new());
    while !enough(&done) {
        assert!(Instant::now() < until, "only {done:?}");
        wire.poll(Instant::now(), &mut done);
        wire.park(Instant::now() + Duration::from_millis(10));
    }
    done
}

#[test]
fn a_receive_that_meets_what_came_before_it_is_told_without_another_byte() {
    let mut server = wire(1, Acceptance::Anyone { max_peers: PEERS });
    let address = server.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let clients = std::thread::spawn(move || {
        let dial = |nonce| {
            let mut client = wire(nonce, Acceptance::Nobody);
            client.dial(PeerId(0), None, &[address], Instant::now() + Duration::from_secs(10)).unwrap();
            let mut loan = client.lend(PeerId(0), 1).unwrap();
            loan[0] = 7;
            client.post_loan(Envelope { peer: PeerId(0), tag: Tag(3), note: nonce }, loan).unwrap();
            client
        };
        (0..PEERS as u64).map(|n| dial(n + 2)).collect::<Vec<_>>()
    });
    let up = gather(&mut server, |done| done.len() >= PEERS);
    let mut clients = clients.join().unwrap();
    // The clients are done sending, so everything is here or in the sockets: take it in before anything is posted.
    for _ in 0..PEERS {
        gather(&mut server, |_| true);
    }
    for completion in up {
        let Completion::PeerUp(peer) = completion else { panic!("{completion:?}") };
        server.post_recv_loan(peer, Tag(3), 16).unwrap();
        let done = gather(&mut server, |done| !done.is_empty());
        assert!(
            matches!(&done[..], [Completion::Arrived(arrival)] if arrival.from.peer == peer && arrival.loan[..] == [7])
        );
    }
    clients.iter_mut().for_each(|client| client.shutdown(Instant::now() + Duration::from_millis(100)));
}

#[test]
fn clients_that_have_gone_are_forgotten_once_their_end_was_told() {
    let mut server = wire(1, Acceptance::Anyone { max_peers: 2 });
    let address = server.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    for round in 0..40 {
        let client = std::thread::spawn(move || {
            let mut client = wire(round + 2, Acceptance::Nobody);
            client.dial(PeerId(0), None, &[address], Instant::now() + Duration::from_secs(10)).unwrap();
            client
        });
        let up = gather(&mut server, |done| !done.is_empty());
        let [Completion::PeerUp(peer)] = up[..] else { panic!("{up:?}") };
        assert!(server.identity(peer).is_some());
        drop(client.join().unwrap());
        let down = gather(&mut server, |done| !done.is_empty());
        assert!(matches!(down[..], [Completion::PeerDown { peer: gone, .. }] if gone == peer), "{down:?}");
        assert_eq!(server.name(peer).host, "h", "whoever reports the end can still say whose it was");
        server.poll(Instant::now(), &mut Vec::new());
        server.poll(Instant::now(), &mut Vec::new());
        assert!(server.identity(peer).is_none());
    }
}
