//! Pure: everything of this crate that reads bytes from elsewhere, by name: for those who feed it what nobody should send.

use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::hello::Hello;
use crate::rendezvous::{HostIdentity, Record, requests};
use crate::{Identity, LinkCosts, Rank, ShmOffer, Tag, Words, group, reach, verbs};

/// Something that reads bytes which may be anything.
#[derive(Clone, Copy)]
pub struct Decoder {
    /// What the bytes are said to be.
    pub name: &'static str,
    /// Some that are.
    pub samples: fn() -> Vec<Vec<u8>>,
    /// Puts the checksums of changed bytes right, so that what lies behind them is reached.
    pub seal: fn(&mut [u8]),
    /// Reads. Panics where what it read breaks a promise.
    pub decode: fn(&[u8]),
    /// The most memory that reading may hold at once: so many bytes, and so many more for each that it is given.
    pub most: (u64, u64),
}

impl Decoder {
    /// A decoder of bytes without a checksum.
    pub const fn new(name: &'static str, samples: fn() -> Vec<Vec<u8>>, decode: fn(&[u8]), most: (u64, u64)) -> Self {
        Self { name, samples, seal: |_| (), decode, most }
    }
}

/// All of this crate.
pub fn all() -> Vec<Decoder> {
    let mut all = vec![
        Decoder { seal: seal_frame, ..Decoder::new("frame", frames, frame, (0, 0)) },
        Decoder::new("hello", hellos, hello, (1 << 10, 4)),
        Decoder::new("rendezvous record", records, record, (8 << 10, 8)),
        Decoder::new("requests to the rendezvous", stores, store, (4 << 10, 4)),
        Decoder::new("costs of links", costs, cost, (256, 0)),
        Decoder::new("offer of shared memory", offers, offer, (1 << 10, 0)),
        Decoder::new("offer of a group's segment", group_offers, group_offer, (1 << 10, 2)),
        Decoder::new("words of a wire beside", words, word, (0, 2)),
    ];
    all.extend(verbs::decoders::ALL);
    all.extend(reach::decoders::ALL);
    all
}

fn frames() -> Vec<Vec<u8>> {
    let kinds = [
        (Kind::Eager, 77, 77, 5),
        (Kind::Announce, 1 << 19, 0, 5),
        (Kind::Data, 1 << 19, 4096, 8192),
        (Kind::Abort, 0, 11, 0),
        (Kind::Grant, 512, 0, 0),
        (Kind::Terms, 1 << 18, 0, 1 << 14),
    ];
    let header = |(kind, total, length, note)| Header { kind, id: 3, tag: Tag(9), note, total, length };
    kinds.map(|kind| header(kind).encode().to_vec()).to_vec()
}

fn seal_frame(bytes: &mut [u8]) {
    if let Some((body, [a, b, c, d, ..])) = bytes.split_at_mut_checked(40) {
        [*a, *b, *c, *d] = crc32c::crc32c(body).to_le_bytes();
    }
}

fn frame(bytes: &[u8]) {
    const MOST: usize = 1 << 20;
    let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else { return };
    if let Ok(header) = Header::decode(bytes, MOST) {
        assert_eq!(Header::decode(&header.encode(), MOST), Ok(header));
        let carries = matches!(header.kind, Kind::Eager | Kind::Data | Kind::Announce);
        assert!(!carries || header.total <= MOST as u64, "a message over the limit was taken");
        assert!(header.length as usize <= MOST, "a frame over the limit was taken");
    }
}

fn hellos() -> Vec<Vec<u8>> {
    let identity = |rank: Option<u32>| Identity {
        rank: rank.map(Rank),
        host: "héron".into(),
        pid: 77,
        boot_id: "b".repeat(36),
        nonce: 5,
        rdma: rank.is_some(),
        memory: rank.is_none(),
    };
    let hello = |rank| Hello { identity: identity(rank), wants: 9, lane: 1, lanes: 2, challenge: [7; 16] };
    [None, Some(3)].map(|rank| hello(rank).encode()).to_vec()
}

fn hello(bytes: &[u8]) {
    if let Ok(hello) = Hello::decode(bytes) {
        assert!(hello.lane < hello.lanes, "a lane that there is not was taken");
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
}

fn records() -> Vec<Vec<u8>> {
    let home = HostIdentity { host: "a".into(), boot_id: "x".repeat(36), net_namespace: "net:[1]".into() };
    let addresses = ["10.0.0.1:5", "127.0.0.1:5", "[fd00::1]:5"].map(|address| address.parse().expect("it is one"));
    [0, 3]
        .map(|count| Record { home: home.clone(), pid: 4, nonce: 5, addresses: addresses[..count].to_vec() }.encode())
        .to_vec()
}

fn record(bytes: &[u8]) {
    if let Some(record) = Record::decode(bytes) {
        assert_eq!(Record::decode(&record.encode()).as_ref(), Some(&record));
        assert!(record.addresses_from(&HostIdentity::default()).len() <= record.addresses.len());
    }
}

fn stores() -> Vec<Vec<u8>> {
    vec![requests::write(requests::SET, "rank 0", b"value"), requests::write(requests::GET, "rank 1", b"")]
}

fn store(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok((kind, key, value)) = requests::read(&mut rest) {
        if matches!(kind, requests::SET | requests::GET) {
            assert_eq!(requests::read(&mut &requests::write(kind, &key, &value)[..]).ok(), Some((kind, key, value)));
        }
    }
}

fn costs() -> Vec<Vec<u8>> {
    vec![LinkCosts::default().encode()]
}

fn cost(bytes: &[u8]) {
    if let Some(costs) = LinkCosts::decode(bytes) {
        assert_eq!(LinkCosts::decode(&costs.encode()), Some(costs));
    }
}

fn offers() -> Vec<Vec<u8>> {
    let numbers = [7u64 << 32 | 9, 1 << 60, 1 << 40].map(u64::to_le_bytes);
    vec![[&b"GWS1"[..], numbers.as_flattened()].concat()]
}

fn offer(bytes: &[u8]) {
    if let Ok(offer) = ShmOffer::decode(bytes) {
        assert_eq!(&offer.encode()[..], bytes);
    }
}

fn group_offers() -> Vec<Vec<u8>> {
    vec![b"7 9 18446744073709551612 1099511627776".to_vec()]
}

fn group_offer(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        group::offer_again(text);
    }
}

fn words() -> Vec<Vec<u8>> {
    vec![Words::Proposal(vec![1, 2, 3]).encode(), Words::Frame(vec![4; 40]).encode()]
}

fn word(bytes: &[u8]) {
    if let Some(words) = Words::decode(bytes) {
        assert_eq!(words.encode(), bytes);
    }
}
