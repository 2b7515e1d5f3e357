//! Pure: brings what links report to a peer's credit, and what it grants to the network, as the other wires do.

use super::core::{Core, Event, State};
use super::link::Frame;
use crate::PeerId;
use crate::credit::Held;
use crate::inbox::Reply;

impl Core {
    /// Asks for all that `me` grants now, and sees to it that credit is looked at again when it is time.
    pub(super) fn grant(&mut self, me: PeerId) {
        let now = self.now;
        let node = self.node(me);
        // Who leaves has ended its receives.
        let Some(credit) = node.credit.as_mut().filter(|_| node.state == State::Up) else { return };
        for link in node.links.iter_mut().flatten() {
            Held::report(link.held.as_mut(), link.peer, link.lost.is_some(), credit, now);
        }
        let (mut grants, mut frames) = (Vec::new(), Vec::new());
        credit.grant(now, &mut grants);
        for grant in grants {
            let held =
                node.links.get_mut(grant.to.index()).and_then(Option::as_mut).and_then(|link| link.held.as_mut());
            if let Some(Reply::Grant { id, key, .. }) = held.and_then(|held| held.granted(&grant)) {
                frames.push((grant.to, Frame::Grant { id, key, until: grant.until }));
            }
        }
        let look = credit.deadline().map(|at| at.max(now));
        if look != node.look {
            node.look = look;
            if let Some(look) = look {
                self.at(look, Event::Look { at: me });
            }
        }
        frames.into_iter().for_each(|(peer, frame)| self.send(me, peer, frame));
    }

    /// Bytes that `to` has asked for, that `from` has sent and that have not come, each once; sent again or not.
    #[cfg(test)]
    pub(super) fn asked_for_on_the_way(&self, from: PeerId, to: PeerId) -> u64 {
        let (Some(sender), Some(receiver)) = (self.end(from, to), self.end(to, from)) else { return 0 };
        if receiver.lost.is_some() {
            return 0;
        }
        let frames = (sender.first..).zip(&sender.frames).filter(|(number, _)| *number >= receiver.expected);
        let bytes = |frame: &Frame| if let Frame::Data { bytes, .. } = frame { bytes.len() as u64 } else { 0 };
        frames.map(|(_, sent)| bytes(&sent.frame)).sum()
    }
}
