//! Memory of a peer written and read without its help, on the wires that can.

use super::*;
use gradwire_transport::{OneSided, TransportError};

/// Two wires with one-sided access, and a way to let time pass.
pub struct OneSidedPair<W> {
    pub wires: [W; 2],
    pub done: [Vec<Completion>; 2],
    pub turn: Box<dyn FnMut() -> Instant>,
}

impl<W: OneSided> OneSidedPair<W> {
    fn take(&mut self, at: usize, count: usize) -> Vec<Completion> {
        let until = (self.turn)() + PATIENCE;
        while self.done[at].len() < count {
            let now = (self.turn)();
            assert!(now < until, "nothing more came: {:?}", self.done);
            for (wire, done) in self.wires.iter_mut().zip(&mut self.done) {
                wire.poll(now, done);
            }
        }
        std::mem::take(&mut self.done[at])
    }
}

pub fn puts_and_gets_reach_exposed_memory<W: OneSided>(make: fn() -> OneSidedPair<W>) {
    let mut pair = make();
    let (memory, slice) = blank(1 << 20);
    let remote = pair.wires[1].expose(PeerId(0), slice).unwrap();
    assert_eq!(remote.bytes, 1 << 20);
    let part = gradwire_transport::RemoteSlice { offset: 1000, bytes: 300_000, ..remote };
    pair.wires[0].post_put(to(1, 1, 0), filled(5, 300_000).1, part).unwrap();
    // A message after the put finds the bytes there.
    pair.wires[0].post_send(to(1, 2, 0), filled(0, 0).1).unwrap();
    pair.wires[1].post_recv(PeerId(0), Tag(2), blank(0).1).unwrap();
    assert!(matches!(&pair.take(1, 1)[..], [Completion::Received { .. }]));
    assert_eq!(pair.take(0, 2).len(), 2);
    let (_, space) = blank(300_010);
    let wider = gradwire_transport::RemoteSlice { offset: 995, bytes: 300_010, ..remote };
    pair.wires[0].post_get(to(1, 3, 9), space, wider).unwrap();
    match &pair.take(0, 1)[..] {
        [Completion::Received { from, slice, bytes: 300_010 }] => {
            assert_eq!(from.note, 9);
            assert_eq!(&slice[5..300_005], &pattern(5, 300_000)[..]);
            assert!(slice[..5].iter().chain(&slice[300_005..]).all(|&byte| byte == 0));
        }
        other => panic!("{other:?}"),
    }
    let back = pair.wires[1].withdraw(remote).unwrap();
    assert_eq!(&back[1000..1010], &pattern(5, 10)[..]);
    drop(back);
    assert!(memory.write(0..1 << 20).is_ok() && pair.wires[1].withdraw(remote).is_none());
}

pub fn an_access_outside_of_what_is_exposed_ends_the_connection<W: OneSided>(make: fn() -> OneSidedPair<W>) {
    for outside in [1 << 12, 1 << 60] {
        let mut pair = make();
        let (memory, slice) = blank(1 << 12);
        let remote = pair.wires[1].expose(PeerId(0), slice).unwrap();
        let wrong = gradwire_transport::RemoteSlice { offset: outside, bytes: 10, ..remote };
        pair.wires[0].post_put(to(1, 1, 0), filled(5, 10).1, wrong).unwrap();
        let done = pair.take(0, 2);
        assert!(matches!(&done[..], [Completion::PeerDown { .. }, Completion::SendFailed { .. }]), "{done:?}");
        assert!(matches!(&pair.take(1, 1)[..], [Completion::PeerDown { .. }]));
        let back = pair.wires[1].withdraw(remote).unwrap();
        assert!(back.iter().all(|&byte| byte == 0));
        drop(back);
        assert!(memory.write(0..1 << 12).is_ok());
    }
    let mut pair = make();
    let remote = pair.wires[1].expose(PeerId(0), blank(10).1).unwrap();
    let refused = pair.wires[0].post_put(to(1, 1, 0), filled(5, 11).1, remote).unwrap_err();
    assert!(matches!(refused.error, TransportError::MessageTooLong { bytes: 11, capacity: 10, .. }));
}
