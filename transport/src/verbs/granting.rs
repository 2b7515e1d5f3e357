//! Does: brings what links report to the wire's credit, and lets them answer what was announced once it is granted.
//!
//! A write is one-sided: its receiver hears of it when all of it is there. So messages are granted whole here, not in portions;
//! the device cuts and paces what a queue pair sends.

use super::link::{Link, Out};
use super::wire::VerbsWire;
use crate::credit::Held;
use crate::inbox::Reply;
use std::time::Instant;

impl Link {
    /// Answers an announced message that has met its receive; where credit is granted, once it is.
    pub(super) fn answer(&mut self, reply: Reply) {
        let reply = match &mut self.held {
            Some(held) => held.hold(reply, &self.inbox),
            None => Some(reply),
        };
        self.queue.extend(reply.map(Out::Answer));
    }

    /// A granted message of `bytes` is there.
    pub(super) fn count_came(&mut self, bytes: usize) {
        if let Some(held) = &mut self.held {
            held.count(bytes);
        }
    }

    /// Whether messages wait of which credit has not been told.
    pub(super) fn wants_credit(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.has_wants())
    }
}

impl VerbsWire {
    /// Grants what may come now; links write the answers when they are flushed.
    pub(super) fn grant_to_all(&mut self) {
        let Some(credit) = &mut self.credit else { return };
        let now = Instant::now();
        for link in self.links.iter_mut().flatten() {
            Held::report(link.held.as_mut(), link.peer, link.lost.is_some(), credit, now);
        }
        credit.grant(now, &mut self.granted);
        for grant in self.granted.drain(..) {
            let Some(Some(link)) = self.links.get_mut(grant.to.index()) else { continue };
            let reply = link.held.as_mut().and_then(|held| held.granted(&grant));
            link.queue.extend(reply.map(Out::Answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::Fabric;
    use super::*;
    use crate::{Beside, Completion, Config, CreditSettings, Envelope, PeerId, PeerName, Region, Tag, Wire};
    use std::time::Duration;

    const BYTES: usize = 1 << 20;
    const URGENT: Tag = Tag(Tag::CONTROL_BIT | 9);

    /// A receiver that grants, and senders, of which each is connected to it.
    fn wires(senders: u32) -> Vec<VerbsWire> {
        let fabric = Fabric::default();
        let config = Config { credit: Some(CreditSettings::default()), ..Config::default() };
        let mut wires: Vec<_> = (0..=senders).map(|_| VerbsWire::new(&config, Box::new(fabric.adapter()))).collect();
        for sender in 1..=senders {
            let ends = [(0, sender), (sender, 0)];
            let words = ends.map(|(here, there)| {
                let name = PeerName { rank: None, host: String::new(), pid: there, address: String::new() };
                wires[here as usize].attach(PeerId(there), name, Instant::now()).unwrap();
                wires[here as usize].next_words().unwrap().1
            });
            for ((here, there), words) in ends.into_iter().zip(words.into_iter().rev()) {
                wires[here as usize].hear(PeerId(there), words, Instant::now());
            }
        }
        wires
    }

    /// The last of all that are offered is urgent.
    const OFFERS: [(u32, Tag); 7] =
        [(1, Tag(1)), (1, Tag(2)), (2, Tag(1)), (1, Tag(3)), (2, Tag(2)), (2, Tag(3)), (2, URGENT)];

    /// Wires whose receiver has been offered all that, and has posted the receives within `time`.
    fn offered(time: Duration, until: Instant) -> Vec<VerbsWire> {
        loop {
            let mut wires = wires(2);
            for (sender, tag) in OFFERS {
                let to = Envelope { peer: PeerId(0), tag, note: 0 };
                wires[sender as usize].post_send(to, Region::zeroed(BYTES).read(0..BYTES).unwrap()).unwrap();
            }
            while OFFERS.iter().any(|(_, tag)| wires[0].probe(*tag).is_none()) {
                assert!(Instant::now() < until);
                wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), &mut Vec::new()));
            }
            let spaces = OFFERS.map(|_| Region::zeroed(BYTES).write(0..BYTES).unwrap());
            let began = Instant::now();
            for ((sender, tag), space) in OFFERS.into_iter().zip(spaces) {
                wires[0].post_recv(PeerId(sender), tag, space).unwrap();
            }
            if began.elapsed() < time {
                return wires;
            }
            assert!(Instant::now() < until);
        }
    }

    #[test]
    fn an_urgent_message_comes_before_all_that_wait_however_long_it_is() {
        let until = Instant::now() + Duration::from_secs(20);
        // What is granted counts as slow after half a millisecond, and then others are granted more.
        let mut wires = offered(Duration::from_micros(400), until);
        let (mut order, mut done) = (Vec::new(), Vec::new());
        while order.len() < OFFERS.len() {
            assert!(Instant::now() < until, "{order:?}");
            wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), &mut done));
            order.extend(done.drain(..).filter_map(|completion| match completion {
                Completion::Received { from, .. } => Some(from.tag),
                _ => None,
            }));
        }
        // Two whole messages were asked for before it was known.
        assert!(order[..3].contains(&URGENT), "{order:?}");
    }
}
