//! Does: brings what links report to the wire's credit, and what it grants to the links.

use super::{Link, TcpWire};
use crate::PeerId;
use std::net::SocketAddr;
use std::time::Instant;

impl TcpWire {
    /// A new connection: whether what comes on it is granted in portions.
    pub(super) fn begin_credit(&mut self, peer: PeerId, link: &mut Link, address: SocketAddr) {
        let Some(credit) = &mut self.credit else { return };
        // It may be a second connection of a peer that had not heard our welcome.
        credit.gone(peer);
        let near = address.ip().to_canonical().is_loopback();
        if let Some(settings) = self.config.credit.filter(|settings| settings.loopback || !near) {
            link.grant_in_portions(settings.marked);
        }
    }

    /// A receive of `peer` has been posted, and may have met a message.
    pub(super) fn grant_to(&mut self, peer: PeerId) {
        let (Some(credit), Some(link)) = (&mut self.credit, self.links.get_mut(&peer)) else { return };
        let Some(portions) = link.portions().filter(|portions| !portions.wants.is_empty()) else { return };
        portions.wants.drain(..).for_each(|want| credit.want(peer, want));
        self.hand_out();
    }

    /// After every link has been looked at.
    pub(super) fn grant_to_all(&mut self) {
        let Some(credit) = &mut self.credit else { return };
        let now = Instant::now();
        for (&peer, link) in &mut self.links {
            if link.lost.is_some() {
                credit.gone(peer);
            } else if let Some(portions) = link.portions() {
                let came = std::mem::take(&mut portions.came);
                if came > 0 {
                    credit.came(peer, came, now);
                }
                portions.wants.drain(..).for_each(|want| credit.want(peer, want));
            }
        }
        self.hand_out();
    }

    fn hand_out(&mut self) {
        let Some(credit) = &mut self.credit else { return };
        credit.grant(Instant::now(), &mut self.grants);
        for grant in self.grants.drain(..) {
            if let Some(link) = self.links.get_mut(&grant.to) {
                let idle = !link.wants_to_write();
                link.grant(&grant);
                if idle {
                    // At once: until it is there, nothing comes. A connection that breaks here is found by the next poll.
                    let _ = link.write_lanes();
                }
            }
        }
    }

    /// When credit is to be looked at again though nothing comes.
    pub(super) fn credit_deadline(&self) -> Option<Instant> {
        self.credit.as_ref()?.deadline()
    }
}
