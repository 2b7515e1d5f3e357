//! Pure: what of `verbs` reads bytes from elsewhere, by name.

use super::adapter::{Endpoint, Remote};
use super::proposal::{MAX_LANES, Means, Proposal};
use super::record::Record;
use crate::Tag;
use crate::decoders::Decoder;

pub(crate) const ALL: [Decoder; 2] = [
    Decoder::new("frame of verbs records", frames, frame, (0, 2)),
    Decoder::new("proposal of queue pairs", proposals, proposal, (16 << 10, 2)),
];

/// One record of each kind.
pub(super) fn samples(payload: &[u8]) -> [Record<'_>; 7] {
    let (tag, note) = (Tag(u64::MAX - 5), 7);
    [
        Record::Eager { tag, note, payload },
        Record::Announce { tag, note, bytes: 1 << 40, id: 3 },
        Record::Grant { id: 9, address: 0xffff_0000_1234_5678, rkey: u32::MAX, key: 17 },
        Record::Refuse { id: 4, capacity: 5 },
        Record::Credit { lane: 3, returned: 1 << 33, taken: 8 },
        Record::Piece { key: u32::MAX, offset: 1 << 33, payload },
        Record::Goodbye,
    ]
}

fn frames() -> Vec<Vec<u8>> {
    let records = samples(&[5; 13]);
    let encoded = records.map(|record| {
        let mut out = vec![0; record.bytes()];
        record.encode(&mut out);
        out
    });
    [&encoded[..1], &encoded[1..]].map(<[Vec<u8>]>::concat).to_vec()
}

fn frame(bytes: &[u8]) {
    let (mut rest, mut again) = (bytes, Vec::with_capacity(bytes.len()));
    while let Ok(record) = Record::decode(&mut rest) {
        assert!(record.bytes() <= bytes.len(), "a record is longer than its frame");
        again.resize(record.bytes(), 0);
        record.encode(&mut again);
        assert_eq!(Record::decode(&mut &again[..]), Ok(record));
    }
}

fn proposals() -> Vec<Vec<u8>> {
    let endpoint = |at| Endpoint { queue_pair: at, packet: 7, lid: 0, mtu_bytes: 4096, reads: 16, gid: [at as u8; 16] };
    let ring = Remote { address: 1 << 50, key: 2 };
    let pairs = Means::QueuePairs { endpoints: vec![endpoint(1), endpoint(2)], receives: 64, ring };
    let proposal = |means| Proposal { epoch: 3, received: vec![5, 1 << 40], means }.encode();
    vec![proposal(pairs), proposal(Means::Sockets("no device".to_owned()))]
}

fn proposal(bytes: &[u8]) {
    let Some(proposal) = Proposal::decode(bytes) else { return };
    assert!(proposal.received.len() <= MAX_LANES, "more lanes than there may be were taken");
    if let Means::QueuePairs { endpoints, receives, .. } = &proposal.means {
        assert!((1..=MAX_LANES).contains(&endpoints.len()) && *receives > 1, "a link that cannot be was taken");
    }
    assert_eq!(Proposal::decode(&proposal.encode()), Some(proposal));
}
