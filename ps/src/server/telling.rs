//! Does: what a server tells of itself: to clients a page at a time, to who watches all at once.

use super::Server;
use crate::gauges::{Gauges, Report};
use crate::status::{ClientStatus, PAGE, ShardStatus};
use gradwire_transport::PeerId;
use std::time::Instant;

impl Server {
    pub(super) fn status(&self, first: usize) -> Vec<u8> {
        let shard = self.seat.shard();
        let mut status = shard.status(first);
        status.standing = self.seat.standing();
        let clients = shard.clients().skip(first).take(PAGE);
        status.clients = clients.map(|(client, peer)| self.client(client, peer)).collect();
        status.encode()
    }

    fn client(&self, client: u64, peer: PeerId) -> ClientStatus {
        let (name, traffic) = (self.wire.name(peer), self.wire.traffic(peer));
        ClientStatus {
            client,
            host: name.host,
            pid: name.pid,
            address: name.address,
            received_bytes: traffic.received_bytes,
            sent_bytes: traffic.sent_bytes,
        }
    }

    /// All that is told to who watches.
    pub(super) fn report(&self, now: Instant) -> Report {
        let shard = self.seat.shard();
        let mut status = shard.status(0);
        status.standing = self.seat.standing();
        for first in (PAGE..).step_by(PAGE) {
            let ShardStatus { tables, sparse, .. } = shard.status(first);
            if tables.is_empty() && sparse.is_empty() {
                break;
            }
            status.tables.extend(tables);
            status.sparse.extend(sparse);
        }
        // A copy knows its primary's clients, whose connections are not ours.
        let ours = |peer: &PeerId| self.connections.contains_key(peer);
        let (clients, peers): (Vec<_>, Vec<_>) = shard
            .clients()
            .filter(|(_, peer)| ours(peer))
            .map(|(client, peer)| (self.client(client, peer), peer))
            .unzip();
        status.clients = clients;
        let waiting_bytes = status.clients.iter().map(|client| shard.waiting_bytes(client.client)).collect();
        let report = match &self.gauges {
            Some(gauges) => gauges.report(status, &peers, now),
            None => Gauges::default().report(status, &peers, now),
        };
        Report { waiting_bytes, ..report }
    }
}
