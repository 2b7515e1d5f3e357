//! Does: a primary and its backup, between which everything arrives at once.

use gradwire_ps::header::{Header, Kind};
use gradwire_ps::replica::Seat;
use gradwire_ps::shard::{Action, Limits};
use gradwire_ps::{
    Cluster, ClusterMap, Combine, DType, Eviction, Initializer, Join, KeyRange, Mode, Recovery, Sighting, SparseSpec,
    UpdateRule, open_sparse_body,
};
use gradwire_transport::PeerId;
use std::time::{Duration, Instant};

const BACKUP: PeerId = PeerId(5);
const CLIENT: PeerId = PeerId(6);

struct Pair {
    now: Instant,
    primary: Seat,
    backup: Seat,
    epoch: gradwire_ps::Epoch,
}

impl Pair {
    fn new() -> Self {
        let now = Instant::now();
        let mut cluster = Cluster::new(1, 1);
        for seat in [10, 20] {
            let seats = vec![(seat, seat.to_string())];
            cluster.join(Join { process: seat, leaving: false, seats, known: ClusterMap::default() }, now);
        }
        let [primary, backup] = [10, 20].map(|seat| Seat::spare(seat, Limits::default()));
        let mut pair = Self { now, primary, backup, epoch: cluster.map().epoch };
        let mut out = Vec::new();
        pair.primary.hear(cluster.map(), now, &mut out);
        pair.backup.hear(cluster.map(), now, &mut out);
        pair.backup.dialled(now, &mut out);
        pair.carry(out);
        assert_eq!(pair.primary.report(), Some(Sighting::Synced { shard: 0, by: 10, whom: 20 }));
        cluster.report(Sighting::Synced { shard: 0, by: 10, whom: 20 }, now);
        pair.epoch = cluster.map().shards[0].term;
        let mut out = Vec::new();
        pair.primary.hear(cluster.map(), now, &mut out);
        pair.backup.hear(cluster.map(), now, &mut out);
        pair.carry(out);
        pair
    }

    /// Carries what one has for the other until nothing is left.
    fn carry(&mut self, mut out: Vec<Action>) {
        loop {
            let mut next = Vec::new();
            for action in out {
                match action {
                    Action::Ship { bytes, .. } => self.backup.take_entry(&bytes, self.now, &mut next),
                    Action::Tell { header, .. } => self.primary.handle(BACKUP, &header, &[], self.now, &mut next),
                    Action::Reply { header, .. } => assert_eq!(header.kind, Kind::Done),
                    other => panic!("{other:?}"),
                }
            }
            self.primary.tell_more(self.now, &mut next);
            self.backup.answer(&mut next);
            if next.is_empty() {
                return assert_eq!((self.primary.over(), self.backup.over()), (None, None));
            }
            out = next;
        }
    }

    fn ask(&mut self, header: Header, payload: &[u8]) {
        let header = Header { incarnation: 1, epoch: self.epoch, payload_bytes: payload.len() as u64, ..header };
        let mut out = Vec::new();
        self.primary.handle(CLIENT, &header, payload, self.now, &mut out);
        self.carry(out);
    }

    /// Rows of the first table that the primary has, and the backup.
    fn rows(&self) -> [u64; 2] {
        [&self.primary, &self.backup].map(|seat| seat.shard().status(0).sparse[0].rows)
    }
}

#[test]
fn rows_whose_time_is_up_go_at_both_at_once_though_nobody_asks_for_anything() {
    let spec = SparseSpec {
        name: "rows".into(),
        dim: 1,
        dtype: DType::F32,
        rule: UpdateRule::Sum,
        mode: Mode::Async,
        combine: Combine::Sum,
        initializer: Initializer::Zeros,
        seed: 0,
        capacity: None,
        eviction: Some(Eviction::Ttl(Duration::from_secs(1))),
        admission: 1,
        recovery: Recovery::Replicate { copies: 1 },
        compression: gradwire_ps::Compression::NONE,
        max_grad_norm: None,
        shards: 1,
        shard: 0,
    };
    let mut pair = Pair::new();
    pair.ask(Header { sequence: 1, ..Header::new(Kind::Hello) }, &[]);
    pair.ask(Header { table: spec.id(), ..Header::new(Kind::OpenSparse) }, &open_sparse_body(&spec));
    let ids = 0..40u64;
    let head = [0u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
    let body = [head, ids.clone().flat_map(u64::to_le_bytes).collect(), vec![0; 160]].concat();
    let keys = KeyRange { start: 0, end: 40 };
    let push = Header { table: spec.id(), keys, dtype: Some(DType::F32), sequence: 1, ..Header::new(Kind::SparsePush) };
    pair.ask(push, &body);
    assert_eq!(pair.rows(), [40, 40]);
    pair.now += Duration::from_secs(2);
    let mut out = Vec::new();
    pair.primary.tick(pair.now, &mut out);
    pair.carry(out);
    assert_eq!(pair.rows(), [0, 0]);
}
