//! Does: an all-to-all in which some ranks pack parts for several others in one message, since to them all parts are of one length, and
//! others do not, since they were told lengths and cannot know that all are the same.
//!
//! Who does not pack sends each rank its part alone. A packing rank awaits what came through every other rank, so it meets such a
//! part in place of a packed message, from a rank that does not pack or that has met one itself; then it begins anew and
//! sends all its parts alone. What it had packed before is passed over: on each link it comes first, and says so.

use super::{Execution, Halt, Link, first_local};
use crate::Action;
use crate::choose::SEGMENT_BYTES;
use crate::fingerprint::{Notes, Said};
use crate::plan::Plan;
use gradwire_transport::{PeerId, Rank, Wire};
use std::sync::Arc;

/// The longest message of such an all-to-all, packed or not.
pub(super) const MOST_BYTES: usize = SEGMENT_BYTES;

impl Execution {
    /// Begins anew with `plan`, in which this rank gives every other its part alone, and its `notes`.
    pub(crate) fn unpack(&mut self, plan: Arc<Plan>, notes: Notes, wire: &mut dyn Wire) -> Result<(), Halt> {
        let mut links = vec![Link::default(); plan.links.len()];
        for (link, begun) in self.plan.links.iter().zip(&self.links) {
            let at = plan.link(link.rank).expect("every rank is sent its part");
            links[at].packed_sends = begun.sends_posted - begun.sends_ended;
            links[at].packed_recvs = begun.recvs_posted - begun.recvs_ended;
            if links[at].packed_recvs > 0 {
                wire.cancel_recvs(link.rank.into(), self.tag);
            }
        }
        (self.links, self.notes, self.local) = (links, notes, first_local(&plan));
        (self.waits_for, self.remaining) = (plan.waits_for.clone(), plan.schedule.steps.len());
        self.plan = plan;
        for (from, note, slice, bytes) in std::mem::take(&mut self.early) {
            let at = self.plan.link(from).expect("every rank sends its part");
            self.take_alone(at, note, &slice[..bytes])?;
        }
        Ok(())
    }

    /// Takes note of a receive from `peer` that was taken back; whether it was one of those that [`unpack`](Self::unpack) takes
    /// back.
    pub(crate) fn on_cancelled(&mut self, peer: PeerId) -> bool {
        let Some(at) = self.plan.link(Rank(peer.0)) else { return false };
        let link = &mut self.links[at];
        let known = link.packed_recvs > 0;
        link.packed_recvs -= usize::from(known);
        known
    }

    /// Takes a message that was received wherever there was room: a part alone goes to its place.
    pub(super) fn take_alone(&mut self, at: usize, note: u64, bytes: &[u8]) -> Result<(), Halt> {
        if self.said(at, note) == Said::Packed {
            return Ok(());
        }
        self.compare(at, note)?;
        let Some(&step) = self.plan.links[at].recvs.get(self.links[at].recvs_ended) else { return Err(Halt::Differs) };
        let Action::Recv { span, .. } = self.plan.schedule.steps[step as usize].action else {
            return Err(Halt::Differs);
        };
        let mut place = self.write(span)?;
        if place.len() != bytes.len() {
            return Err(Halt::Differs);
        }
        place.copy_from_slice(bytes);
        drop(place);
        self.links[at].recvs_posted += 1;
        let step = self.next_recv(at);
        self.end(step);
        Ok(())
    }
}
