//! Does: puts requests on the wire, as many as keep it busy.

use super::engine::{Cargo, Engine, Phase};
use crate::header::{FLAG_AGAIN, FLAG_INLINE, HEADER_BYTES};
use crate::protocol::{INLINE_BYTES, PAYLOAD, POSTED_SENDS, REQUEST, value};
use gradwire_transport::{Envelope, LossCause, PeerId, TransportError};

impl Engine {
    /// Posts what may go to every shard; whether anything went.
    pub(super) fn post_queues(&mut self) -> bool {
        let mut moved = false;
        for at in 0..self.shards.len() {
            while self.shards[at].is_up() && self.shards[at].sending < POSTED_SENDS {
                let Some(&slot) = self.shards[at].queue.front() else { break };
                if !self.post(slot) {
                    break;
                }
                self.shards[at].queue.pop_front();
                moved = true;
            }
        }
        moved
    }

    /// Posts one request. False when the wire has no room now, or has lost the peer; nothing is lost then.
    fn post(&mut self, slot: u32) -> bool {
        let Some(entry) = self.entries[slot as usize].as_mut() else { return true };
        let peer = PeerId(entry.request.shard);
        if let Some(target) = entry.request.target.take() {
            match self.wire.post_recv(peer, value(slot), target) {
                Ok(()) => entry.receiving = true,
                Err(refused) => {
                    entry.request.target = Some(refused.slice);
                    return false;
                }
            }
        }
        let bytes = entry.request.cargo.bytes();
        let mut header = entry.request.header;
        header.epoch = self.shards[peer.index()].epoch;
        header.payload_bytes = bytes.len() as u64;
        let behind = if bytes.len() <= INLINE_BYTES { bytes } else { &[] };
        if !behind.is_empty() {
            header.flags |= FLAG_INLINE;
        }
        if entry.sent_before {
            header.flags |= FLAG_AGAIN;
        }
        let Some(mut loan) = self.wire.lend(peer, HEADER_BYTES + behind.len()) else { return false };
        loan[..HEADER_BYTES].copy_from_slice(&header.encode());
        loan[HEADER_BYTES..].copy_from_slice(behind);
        if behind.len() < bytes.len() {
            let Cargo::Slice(slice) = &entry.request.cargo else { unreachable!("a body is short") };
            let again = slice.region().read(slice.range()).expect("whoever may read may read once more");
            let envelope = Envelope { peer, tag: PAYLOAD, note: slot.into() };
            if self.wire.post_send(envelope, again).is_err() {
                return false;
            }
            entry.sending += 1;
            self.shards[peer.index()].sending += 1;
        }
        if let Err(refused) = self.wire.post_loan(Envelope { peer, tag: REQUEST, note: slot.into() }, loan) {
            // The payload has gone without its header. A new connection pairs them again.
            let cause = LossCause::Aborted(refused.error.to_string());
            let name = Box::new(self.wire.name(peer));
            self.wire.disconnect(peer, TransportError::PeerLost { peer: name, cause });
            return false;
        }
        (entry.phase, entry.owed, entry.sent_before) = (Phase::Sent, true, true);
        true
    }
}
