//! A caller and who is called, on one host: they share memory where both want to, and use sockets where they cannot.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_transport::{
    Acceptance, Beside, Completion, Config, Envelope, Identity, LossCause, Mesh, PeerId, ShmWire, Tag, TcpWire,
    TransportError, Wire, WireChoice, WireKind,
};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SERVER: PeerId = PeerId(0);
const TAG: Tag = Tag(5);
const LONG: Duration = Duration::from_secs(20);

fn identity(nonce: u64, boot_id: &str, memory: bool) -> Identity {
    let host = "h".to_owned();
    Identity { rank: None, host, pid: std::process::id(), boot_id: boot_id.into(), nonce, rdma: false, memory }
}

fn memory() -> Vec<Box<dyn Beside>> {
    vec![Box::new(ShmWire::new(&Config::default()).unwrap())]
}

/// Gives back what comes, until it is to stop; tells by which wire callers came, and why they went.
struct Echo {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<(Vec<WireKind>, Vec<TransportError>)>>,
}

impl Echo {
    fn start(shares: bool) -> Self {
        let max_peers = 100;
        let me = identity(1, "boot", shares);
        let mut tcp = TcpWire::new(&Config::default(), me, Acceptance::Anyone { max_peers }).unwrap();
        let address = tcp.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let better = if shares { memory() } else { Vec::new() };
        let mut mesh = Mesh::meeting(tcp, better, WireChoice::Auto);
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut kinds, mut ends, mut done) = (Vec::new(), Vec::new(), Vec::new());
            while !flag.load(Ordering::SeqCst) {
                mesh.poll(Instant::now(), &mut done);
                for completion in done.drain(..) {
                    match completion {
                        Completion::PeerUp(peer) => {
                            kinds.push(mesh.kind(peer));
                            // It may have gone already.
                            let _ = mesh.post_recv_loan(peer, TAG, 1 << 20);
                        }
                        Completion::PeerDown { error, .. } => ends.push(error),
                        Completion::Arrived(arrival) => {
                            let mut back = mesh.lend(arrival.from.peer, arrival.loan.len()).unwrap();
                            back.copy_from_slice(&arrival.loan);
                            mesh.post_loan(arrival.from, back).unwrap();
                            let _ = mesh.post_recv_loan(arrival.from.peer, TAG, 1 << 20);
                        }
                        _ => {}
                    }
                }
                mesh.park(Instant::now() + Duration::from_millis(5));
            }
            (kinds, ends)
        });
        Self { address, stop, thread: Some(thread) }
    }

    fn end(mut self) -> (Vec<WireKind>, Vec<TransportError>) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn caller(echo: &Echo, me: Identity, choice: WireChoice) -> Result<Mesh, TransportError> {
    let tcp = TcpWire::new(&Config::default(), me, Acceptance::Nobody)?;
    let mut mesh = Mesh::meeting(tcp, memory(), choice);
    mesh.call(SERVER, None, &[echo.address], Instant::now() + LONG).map(|()| mesh)
}

/// Says something of this length, and hears it back.
fn ask(mesh: &mut Mesh, bytes: usize) {
    let said: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
    mesh.post_recv_loan(SERVER, TAG, bytes).unwrap();
    let mut loan = mesh.lend(SERVER, bytes).unwrap();
    loan.copy_from_slice(&said);
    mesh.post_loan(Envelope { peer: SERVER, tag: TAG, note: 0 }, loan).unwrap();
    let (mut done, until) = (Vec::new(), Instant::now() + LONG);
    loop {
        mesh.poll(Instant::now(), &mut done);
        let heard = done.drain(..).find_map(|completion| match completion {
            Completion::Arrived(arrival) => Some(arrival.loan.to_vec()),
            Completion::PeerDown { error, .. } => panic!("{error}"),
            _ => None,
        });
        match heard {
            Some(heard) => return assert_eq!(heard, said),
            None => assert!(Instant::now() < until, "no answer"),
        }
        mesh.park(Instant::now() + Duration::from_millis(5));
    }
}

#[test]
fn both_share_memory_where_both_want_to() {
    let echo = Echo::start(true);
    for choice in [WireChoice::Auto, WireChoice::Shm] {
        let mut mesh = caller(&echo, identity(2, "boot", true), choice).unwrap();
        assert_eq!(mesh.kind(SERVER), WireKind::Shm);
        [1, 3000, 100_000, 1 << 20].into_iter().for_each(|bytes| ask(&mut mesh, bytes));
        // Called again, as after a loss.
        mesh.disconnect(SERVER, TransportError::Closed);
        mesh.call(SERVER, None, &[echo.address], Instant::now() + LONG).unwrap();
        ask(&mut mesh, 5000);
        mesh.shutdown(Instant::now() + LONG);
    }
    let (kinds, ends) = echo.end();
    assert_eq!(kinds, [WireKind::Shm; 4]);
    let left = |error: &&TransportError| matches!(error, TransportError::PeerLost { cause: LossCause::Goodbye, .. });
    assert_eq!(ends.iter().filter(left).count(), 2, "{ends:?}");
}

#[test]
fn who_cannot_share_uses_sockets_or_is_told_why_not() {
    let (shares, plain) = (Echo::start(true), Echo::start(false));
    let cases = [
        (&shares, identity(2, "another boot", true), "boot id differs"),
        (&shares, identity(3, "boot", false), "this end shares none"),
        (&plain, identity(4, "boot", true), "the other end shares none"),
    ];
    for (echo, me, why) in cases {
        let mut mesh = caller(echo, me.clone(), WireChoice::Auto).unwrap();
        assert_eq!(mesh.kind(SERVER), WireKind::Tcp, "{why}");
        ask(&mut mesh, 100_000);
        let refused = caller(echo, me, WireChoice::Shm).map(drop).unwrap_err();
        assert!(matches!(refused, TransportError::Config { .. }) && refused.to_string().contains(why), "{refused}");
    }
    for echo in [shares, plain] {
        assert!(echo.end().0.iter().all(|kind| *kind == WireKind::Tcp));
    }
}

#[test]
fn memory_is_shared_with_so_many_callers_and_sockets_do_for_the_others() {
    let echo = Echo::start(true);
    let mut callers: Vec<Mesh> =
        (0..34).map(|nonce| caller(&echo, identity(nonce + 2, "boot", true), WireChoice::Auto).unwrap()).collect();
    callers.iter_mut().for_each(|mesh| ask(mesh, 10_000));
    let kinds: Vec<WireKind> = callers.iter().map(|mesh| mesh.kind(SERVER)).collect();
    assert_eq!(kinds, [vec![WireKind::Shm; 32], vec![WireKind::Tcp; 2]].concat());
    // The place of one that has left is another's.
    callers.remove(0).shutdown(Instant::now() + LONG);
    let until = Instant::now() + LONG;
    while caller(&echo, identity(99, "boot", true), WireChoice::Shm).is_err() {
        assert!(Instant::now() < until, "its place stays taken");
    }
    let _ = echo.end();
}
