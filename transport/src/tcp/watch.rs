//! Does: asks the system which connections have something, at a cost that does not grow with their number.

use super::stream::Stream;
use crate::{PeerId, TransportError};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{Timespec, epoll::Event};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;

/// Connections that are told of at once; others are told of next time, in turn.
const AT_ONCE: usize = 64;

/// All connections of a wire, as the system watches them.
#[derive(Clone)]
pub(super) struct Watch {
    epoll: Arc<OwnedFd>,
    /// Of which process. One that was forked off shares it, and is not to change it.
    process: u32,
}

impl Watch {
    /// Watches nothing yet.
    pub(super) fn new() -> Result<Self, TransportError> {
        let made = epoll::create(epoll::CreateFlags::CLOEXEC);
        let made = made.map_err(|error| TransportError::io("create a descriptor that watches connections", error))?;
        Ok(Self { epoll: Arc::new(made), process: std::process::id() })
    }

    /// Watches a connection of `peer` for what comes, until it is closed.
    pub(super) fn add(&self, stream: &mut Stream, peer: PeerId) -> io::Result<()> {
        epoll::add(&*self.epoll, &*stream, EventData::new_u64(peer.0.into()), EventFlags::IN)?;
        stream.watched = Some(Watched { by: self.clone(), peer, room: false });
        Ok(())
    }

    /// Whose connections have something, or have room again where that is awaited. A peer may be named for each of its lanes.
    pub(super) fn ready(&self, mut each: impl FnMut(PeerId)) {
        let mut events = [MaybeUninit::<Event>::uninit(); AT_ONCE];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Interrupted: the caller comes back.
        if let Ok((ready, _)) = epoll::wait(&*self.epoll, &mut events, Some(&zero)) {
            ready.iter().for_each(|event| each(PeerId(event.data.u64() as u32)));
        }
    }

    fn set(&self, stream: BorrowedFd<'_>, peer: PeerId, room: bool) {
        let flags = if room { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        if let Err(error) = epoll::modify(&*self.epoll, stream, EventData::new_u64(peer.0.into()), flags) {
            tracing::debug!(%error, "a connection could not be watched for room");
        }
    }
}

impl AsFd for Watch {
    /// Readable while any connection has something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// A connection's place among those that are watched.
pub(super) struct Watched {
    by: Watch,
    peer: PeerId,
    /// Whether room to write is waited for.
    room: bool,
}

impl Watched {
    /// Waits for room to write, too, or no more.
    pub(super) fn wait_for_room(&mut self, stream: BorrowedFd<'_>, room: bool) {
        if self.room != room {
            self.room = room;
            self.by.set(stream, self.peer, room);
        }
    }

    /// The connection is being closed. Said expressly, since a process that was forked off may keep its socket open.
    pub(super) fn forget(&self, stream: BorrowedFd<'_>) {
        if self.by.process == std::process::id() {
            // Not watched any more: all that is wanted.
            let _ = epoll::delete(&*self.by.epoll, stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FEW, TcpWire, local_identity};
    use crate::PeerId;
    use crate::{Acceptance, Completion, Config, Envelope, Region, Tag, Wire, WorldSize};
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    /// Peers of one wire, more than it looks at by itself.
    const PEERS: u32 = 3 * FEW as u32;
    /// What the last peer is sent, more than sockets hold, and what the others are.
    const BYTES: [usize; 2] = [24 << 20, 300 << 10];
    /// Longer than the test may take: a sleeper who is not woken fails it.
    const LONG: Duration = Duration::from_secs(120);

    fn wire(rank: u32) -> TcpWire {
        let accept = if rank == 0 { Acceptance::Ranks(WorldSize::new(PEERS + 1).unwrap()) } else { Acceptance::Nobody };
        TcpWire::new(&Config::default(), local_identity(rank), accept).unwrap()
    }

    /// Polls and sleeps until `enough`, which is told of each completion.
    fn drive(wire: &mut TcpWire, mut enough: impl FnMut(&mut TcpWire, Completion) -> bool) {
        let (mut done, end) = (Vec::new(), Instant::now() + LONG / 2);
        loop {
            wire.poll(Instant::now(), &mut done);
            let idle = done.is_empty();
            for completion in std::mem::take(&mut done) {
                if enough(wire, completion) {
                    return;
                }
            }
            if idle {
                wire.park(Instant::now() + LONG);
            }
            assert!(Instant::now() < end, "nobody woke it");
        }
    }

    #[test]
    fn many_peers_wake_a_sleeper_by_what_they_send_and_by_making_room_and_are_told_apart() {
        let mut hub = wire(0);
        let address = hub.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let peer = |rank: u32| {
            let mut wire = wire(rank);
            wire.dial(PeerId(0), Some(1), &[address], Instant::now() + LONG).unwrap();
            let bytes = BYTES[usize::from(rank < PEERS)];
            let into = Region::zeroed(bytes);
            // Sockets are full long before anybody reads.
            std::thread::sleep(Duration::from_millis(if rank < PEERS { 50 } else { 300 }));
            wire.post_recv(PeerId(0), Tag(1), into.write(0..bytes).unwrap()).unwrap();
            drive(&mut wire, |_, completion| matches!(completion, Completion::Received { .. }));
            assert!(into.read(0..bytes).unwrap().iter().all(|&byte| byte == rank as u8));
            let word = Region::from_vec(vec![rank as u8]);
            wire.post_send(Envelope { peer: PeerId(0), tag: Tag(2), note: 0 }, word.read(0..1).unwrap()).unwrap();
            // Some leave, and the others go on.
            drive(&mut wire, |_, completion| matches!(completion, Completion::Sent { .. }));
            wire.shutdown(Instant::now() + Duration::from_secs(5));
        };
        std::thread::scope(|scope| {
            let peers: Vec<_> = (1..=PEERS).map(|rank| scope.spawn(move || peer(rank))).collect();
            let (mut heard, mut gone) = (Vec::new(), 0);
            drive(&mut hub, |hub, completion| {
                match completion {
                    Completion::PeerUp(to) => {
                        let bytes = BYTES[usize::from(to.0 < PEERS)];
                        let value = Region::from_vec(vec![to.0 as u8; bytes]);
                        hub.post_send(Envelope { peer: to, tag: Tag(1), note: 0 }, value.read(0..bytes).unwrap())
                            .unwrap();
                        hub.post_recv_loan(to, Tag(2), 1).unwrap();
                    }
                    Completion::Arrived(arrival) => {
                        assert_eq!(u32::from(arrival.loan[0]), arrival.from.peer.0);
                        heard.push(arrival.from.peer.0);
                    }
                    Completion::PeerDown { .. } => gone += 1,
                    _ => {}
                }
                gone == PEERS
            });
            heard.sort_unstable();
            assert_eq!(heard, (1..=PEERS).collect::<Vec<_>>());
            peers.into_iter().for_each(|peer| peer.join().unwrap());
        });
    }
}
