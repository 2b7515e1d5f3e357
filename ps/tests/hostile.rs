//! Does: clients that lie, stammer, hold back and die; the server refuses them by name and serves the others.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_ps::header::{FLAG_INLINE, HEADER_BYTES, Header, Kind};
use gradwire_ps::{
    Client, ClientSettings, DType, Eviction, KeyRange, Limits, LocalServers, Mode, ServerSettings, SparseOptions,
    TableId, TableOptions,
};
use gradwire_transport::{
    Acceptance, Completion, Config, Envelope, Identity, LossCause, PeerId, Region, Tag, TcpWire, TransportError, Wire,
};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const REQUEST: Tag = Tag(1);
const PAYLOAD: Tag = Tag(2);
const LONG: Option<Duration> = Some(Duration::from_secs(20));

fn servers() -> LocalServers {
    let limits = Limits { memory_bytes: 64 << 20, ..Limits::default() };
    LocalServers::start(1, ServerSettings { limits, ..ServerSettings::default() }).unwrap()
}

/// A good client, to see that the server still serves.
fn all_is_well(servers: &LocalServers) {
    let client = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
    let name = format!("fine {:?}", Instant::now());
    let table = client.dense(&name, &[100_000], DType::F32, TableOptions::default()).unwrap();
    let ones = Region::from_vec(1.0f32.to_le_bytes().repeat(100_000));
    let out = Region::zeroed(400_000);
    let call = table.push_pull(ones.read(0..400_000).unwrap(), out.write(0..400_000).unwrap()).unwrap();
    call.wait(LONG).unwrap();
    assert_eq!(out.read(0..400_000).unwrap()[..], ones.read(0..400_000).unwrap()[..]);
}

/// A client that speaks the wire's language, and says on it what it likes.
struct Liar(TcpWire);

impl Liar {
    fn new(servers: &LocalServers) -> Self {
        let me = Identity {
            rank: None,
            host: "liar".into(),
            pid: 1,
            boot_id: String::new(),
            nonce: 5,
            rdma: false,
            memory: false,
        };
        let mut wire = TcpWire::new(&Config::default(), me, Acceptance::Nobody).unwrap();
        let address = servers.addresses()[0].parse().unwrap();
        wire.dial(PeerId(0), None, &[address], Instant::now() + Duration::from_secs(5)).unwrap();
        Self(wire)
    }

    fn say(&mut self, tag: Tag, bytes: &[u8]) {
        let mut loan = self.0.lend(PeerId(0), bytes.len()).unwrap();
        loan.copy_from_slice(bytes);
        // Refused once the server has had enough of us.
        let _ = self.0.post_loan(Envelope { peer: PeerId(0), tag, note: 0 }, loan);
    }

    /// The next `count` answers of the server.
    fn answers(&mut self, count: usize) -> Vec<Header> {
        (0..count).for_each(|_| self.0.post_recv_loan(PeerId(0), Tag(3), 1 << 20).unwrap());
        let (until, mut done) = (Instant::now() + Duration::from_secs(10), Vec::new());
        let mut answers = Vec::new();
        while answers.len() < count {
            assert!(Instant::now() < until, "{} answers of {count} came", answers.len());
            self.0.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                let Completion::Arrived(arrival) = completion else { panic!("{completion:?}") };
                answers.push(Header::decode(&arrival.loan).unwrap());
            }
            self.0.park(until.min(Instant::now() + Duration::from_millis(50)));
        }
        answers
    }

    /// Why the server closed the connection.
    fn farewell(&mut self) -> String {
        let (until, mut done) = (Instant::now() + Duration::from_secs(10), Vec::new());
        while Instant::now() < until {
            self.0.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                if let Completion::PeerDown { error: TransportError::PeerLost { cause, .. }, .. } = completion {
                    return match cause {
                        LossCause::Aborted(reason) => reason,
                        other => other.to_string(),
                    };
                }
            }
            self.0.park(until);
        }
        panic!("the server kept the connection");
    }
}

fn hello() -> Vec<u8> {
    let header = Header { client: 77, incarnation: 1, sequence: 1, ..Header::new(Kind::Hello) };
    header.encode().to_vec()
}

fn with_body(header: Header, body: &[u8]) -> Vec<u8> {
    [&header.encode()[..], body].concat()
}

#[test]
fn requests_that_are_none_end_the_connection_and_nothing_else() {
    let servers = servers();
    let push = Header { client: 77, incarnation: 1, ..Header::new(Kind::Push) };
    let mut damaged = push.encode();
    damaged[20] ^= 1;
    let inline = |payload_bytes| Header { flags: FLAG_INLINE, payload_bytes, ..push };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("noise", b"GET / HTTP/1.1\r\n\r\n".repeat(10), "does not begin with GWPS"),
        ("too short", vec![b'G'; 10], "no header"),
        ("empty", vec![], "no header"),
        ("damaged", damaged.to_vec(), "checksum"),
        ("2^60 bytes announced", Header { payload_bytes: 1 << 60, ..push }.encode().to_vec(), "1152921504606846976"),
        ("2^60 bytes behind it", with_body(inline(1 << 60), &[0; 8]), "1152921504606846976"),
        ("fewer behind it", with_body(inline(64), &[0; 8]), "behind it"),
        ("unannounced", with_body(push, &[0; 8]), "announces them elsewhere"),
        ("too long", vec![b'G'; 1 << 20], "are taken"),
    ];
    for (what, bytes, reason) in cases {
        let mut liar = Liar::new(&servers);
        liar.say(REQUEST, &hello());
        liar.say(REQUEST, &bytes);
        let farewell = liar.farewell();
        assert!(farewell.contains(reason), "{what}: {farewell}");
    }
    let mut liar = Liar::new(&servers);
    liar.say(PAYLOAD, &vec![0; 2 << 20]);
    assert!(liar.farewell().contains("are taken"));
    all_is_well(&servers);
}

#[test]
fn requests_out_of_place_are_refused_and_change_nothing() {
    let servers = servers();
    let mut liar = Liar::new(&servers);
    let me = Header { client: 77, incarnation: 1, ..Header::new(Kind::Push) };
    let claims = [
        Header { kind: Kind::Pull, table: TableId(1), ..me },
        Header { kind: Kind::Push, keys: KeyRange { start: 0, end: u64::MAX }, ..me },
        Header { kind: Kind::Open, ..me },
        Header { kind: Kind::Barrier, keys: KeyRange { start: 0, end: u64::MAX }, ..me },
        Header { kind: Kind::Done, ..me },
        Header { kind: Kind::SetRate, client: 78, ..me },
        Header { kind: Kind::Status, keys: KeyRange { start: u64::MAX, end: u64::MAX }, ..me },
    ];
    // Before the hello, and after it.
    for round in 0..2 {
        for header in claims {
            liar.say(REQUEST, &header.encode());
        }
        if round == 0 {
            liar.say(REQUEST, &hello());
        }
    }
    let mut answers = 0;
    for _ in 0..2 * claims.len() + 1 {
        liar.0.post_recv_loan(PeerId(0), Tag(3), 1 << 20).unwrap();
    }
    let (until, mut done) = (Instant::now() + Duration::from_secs(10), Vec::new());
    while answers < 2 * claims.len() + 1 && Instant::now() < until {
        liar.0.poll(Instant::now(), &mut done);
        for completion in done.drain(..) {
            let Completion::Arrived(arrival) = completion else { panic!("{completion:?}") };
            let header = Header::decode(&arrival.loan).unwrap();
            let fine = answers == claims.len() || answers == 2 * claims.len();
            assert_eq!(header.kind == Kind::Done, fine, "answer {answers}: {header:?}");
            answers += 1;
        }
        liar.0.park(until.min(Instant::now() + Duration::from_millis(50)));
    }
    assert_eq!(answers, 2 * claims.len() + 1);
    all_is_well(&servers);
}

#[test]
fn sockets_that_are_no_clients_do_not_disturb_anybody() {
    let servers = servers();
    let connect = || TcpStream::connect(&servers.addresses()[0]).unwrap();
    let mut silent: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0x02, 0x00, 0xff], &[0; 64]] {
        let mut stream = connect();
        let _ = stream.write_all(bytes);
        silent.push(stream);
    }
    all_is_well(&servers);
    let mut noisy = connect();
    let _ = noisy.write_all(&[0xff; 1 << 16]);
    noisy.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert!(matches!(noisy.read(&mut [0; 64]), Ok(0) | Err(_)), "it was not let in");
    all_is_well(&servers);
}

#[test]
fn a_client_that_dies_between_a_header_and_its_payload_leaves_nothing_behind() {
    let servers = servers();
    for _ in 0..10 {
        let mut liar = Liar::new(&servers);
        liar.say(REQUEST, &hello());
        let header = Header { client: 77, incarnation: 1, payload_bytes: 100_000, ..Header::new(Kind::Push) };
        liar.say(REQUEST, &header.encode());
        drop(liar);
    }
    all_is_well(&servers);
    assert_eq!(HEADER_BYTES, 100);
}

#[test]
fn a_table_too_large_for_the_server_is_refused_with_both_sizes() {
    let servers = servers();
    let client = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
    for shape in [vec![1 << 30], vec![1 << 29, 1 << 29]] {
        let error = client.dense("huge", &shape, DType::F32, TableOptions::default()).err().unwrap();
        assert!(error.to_string().contains("memory: expected at most 67108864 bytes"), "{error}");
    }
    let beyond = client.dense("huge", &[1 << 40, 1 << 40], DType::F32, TableOptions::default()).err().unwrap();
    assert!(beyond.to_string().contains("2^60"), "{beyond}");
    all_is_well(&servers);
}

#[test]
fn a_client_far_ahead_fills_its_own_share_and_no_more_and_loses_nothing() {
    let limits = Limits { memory_bytes: 64 << 20, client_bytes: 5 << 20, ..Limits::default() };
    let servers = LocalServers::start(1, ServerSettings { limits, ..ServerSettings::default() }).unwrap();
    let worker =
        |n| Client::connect(servers.addresses(), ClientSettings { worker: Some(n), ..Default::default() }).unwrap();
    let (first, second) = (worker(0), worker(1));
    let options = || TableOptions { mode: Mode::Sync { workers: 2 }, ..TableOptions::default() };
    let tables = [&first, &second].map(|client| client.dense("w", &[1 << 20], DType::F32, options()).unwrap());
    let before = first.status().unwrap()[0].memory_bytes;
    let ones = Region::from_vec(1.0f32.to_le_bytes().repeat(1 << 20));
    // 4 MiB a clock: the second worker's second one does not fit beside its first.
    let push = |n: usize| tables[n].push(ones.read(0..4 << 20).unwrap()).unwrap();
    let ahead: Vec<_> = (0..4).map(|_| push(1)).collect();
    let _ = ahead[3].wait(Some(Duration::from_millis(300)));
    let taken = first.status().unwrap()[0].memory_bytes - before;
    assert!(taken <= 5 << 20, "{taken} bytes are held for one client");
    all_is_well(&servers);
    (0..4).for_each(|_| assert!(push(0).wait(LONG).is_ok()));
    ahead.iter().for_each(|pending| assert!(pending.wait(LONG).is_ok()));
    let out = Region::zeroed(4 << 20);
    tables[0].pull(out.write(0..4 << 20).unwrap()).unwrap().wait(LONG).unwrap();
    assert_eq!(out.read(0..4 << 20).unwrap()[..], 8.0f32.to_le_bytes().repeat(1 << 20)[..]);
}

/// A request about the sparse table "s", of rows of 4 floats, that lies about itself.
fn sparse(kind: Kind, ids: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        kind,
        table: TableId::of("s"),
        client: 77,
        incarnation: 1,
        epoch: gradwire_ps::Epoch(1),
        sequence: 1,
        clock: 1,
        keys: KeyRange { start: 0, end: ids },
        dtype: Some(DType::F32),
        flags: FLAG_INLINE,
        payload_bytes: payload.len() as u64,
        ..Header::new(kind)
    };
    with_body(header, payload)
}

/// Part `part` of `parts` of a push of these ids and a gradient of zeros for each.
fn part(part: u32, parts: u32, ids: &[u64]) -> Vec<u8> {
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    [&part.to_le_bytes()[..], &parts.to_le_bytes(), &ids, &vec![0; ids.len() * 2]].concat()
}

#[test]
fn ids_and_counts_that_lie_are_refused_and_take_no_memory() {
    for mode in [Mode::Async, Mode::Sync { workers: 100 }, Mode::Ssp { workers: 100, staleness: 2 }] {
        let servers = servers();
        let client = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
        let options = SparseOptions { mode, ..SparseOptions::default() };
        client.sparse("s", 4, DType::F32, options).unwrap();
        let before = client.status().unwrap()[0].memory_bytes;
        let two = part(0, 1, &[1, 2]);
        let claims = [
            sparse(Kind::SparsePush, u64::MAX, &two),
            sparse(Kind::SparsePush, 1 << 60, &two),
            sparse(Kind::SparsePush, 3, &two),
            sparse(Kind::SparsePush, 2, &two[..40]),
            sparse(Kind::SparsePush, 0, &[]),
            sparse(Kind::SparsePush, 2, &part(0, 1, &[2, 1])),
            sparse(Kind::SparsePush, 2, &part(0, 1, &[1, 1])),
            sparse(Kind::SparsePush, 2, &part(1, 1, &[1, 2])),
            sparse(Kind::SparsePush, 2, &part(0, 0, &[1, 2])),
            sparse(Kind::SparsePush, 2, &part(7, u32::MAX, &[1, 2])),
            sparse(Kind::SparsePull, u64::MAX, &[0; 16]),
            sparse(Kind::SparsePull, 1 << 40, &[0; 16]),
            sparse(Kind::SparsePull, 3, &[0; 16]),
            sparse(Kind::SparsePull, 2, &[0; 16]),
            sparse(Kind::Push, 2, &two),
            sparse(Kind::OpenSparse, 2, &two),
        ];
        let mut liar = Liar::new(&servers);
        liar.say(REQUEST, &hello());
        claims.iter().for_each(|claim| liar.say(REQUEST, claim));
        let answers = liar.answers(1 + claims.len());
        for (n, answer) in answers.iter().enumerate() {
            assert_eq!(answer.kind == Kind::Done, n == 0, "{mode}: answer {n}: {answer:?}");
        }
        let status = client.status().unwrap();
        assert_eq!((status[0].memory_bytes, status[0].sparse[0].rows), (before, 0), "{mode}");
        all_is_well(&servers);
    }
}

#[test]
fn a_sparse_table_that_would_outgrow_the_server_is_refused_and_keeps_what_it_has() {
    let servers = servers();
    let client = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
    let eviction = Some(Eviction::Lru);
    let huge = SparseOptions { capacity: Some(1 << 40), eviction, ..SparseOptions::default() };
    let error = client.sparse("huge", 64, DType::F32, huge).err().unwrap();
    assert!(error.to_string().contains("memory: expected at most 67108864 bytes"), "{error}");
    let table = client.sparse("growing", 1024, DType::F32, SparseOptions::default()).unwrap();
    let ones = Region::from_vec(1.0f32.to_le_bytes().repeat(1024 * 1024));
    let push = |first: u64| {
        let ids = Region::from_vec((first..first + 1024).flat_map(u64::to_le_bytes).collect());
        let call = table.push(&ids.read(0..ids.len()).unwrap(), &ones.read(0..ones.len()).unwrap()).unwrap();
        call.wait(LONG)
    };
    let refused = (0..100).map(|n| push(n * 1024)).find_map(Result::err).expect("100 times 4 MiB do not fit 64 MiB");
    assert!(refused.to_string().contains("memory"), "{refused}");
    assert!(client.status().unwrap()[0].memory_bytes <= 66 << 20);
    push(0).expect("rows that are there may be pushed to");
    all_is_well(&servers);
}

#[test]
fn who_asks_and_does_not_read_is_owed_no_more_than_a_link_holds_and_gets_all_once_it_reads() {
    const ASKED: u32 = 600;
    let servers = servers();
    let client = Client::connect(servers.addresses(), ClientSettings::default()).unwrap();
    // A row is an answer of 256 KiB: all of them together are 150 MiB, and the bound is 32 MiB.
    client.sparse("s", 1 << 16, DType::F32, SparseOptions::default()).unwrap();
    let mut liar = Liar::new(&servers);
    liar.say(REQUEST, &hello());
    liar.answers(1);
    let mut done = Vec::new();
    for slot in 0..ASKED {
        let mut pull = Header::decode(&sparse(Kind::SparsePull, 1, &7u64.to_le_bytes())).unwrap();
        pull.slot = slot;
        liar.say(REQUEST, &with_body(pull, &7u64.to_le_bytes()));
        liar.0.poll(Instant::now(), &mut done);
    }
    let mut served = || {
        liar.0.poll(Instant::now(), &mut done);
        client.status().unwrap()[0].sparse[0].pulls
    };
    let until = Instant::now() + Duration::from_secs(20);
    while served() < 128 {
        assert!(Instant::now() < until, "{} are served", served());
    }
    let more = (0..50).map(|_| served()).max();
    // Some lie in the wire's own buffers.
    assert!(more < Some(256), "{more:?} of {ASKED} are made, which nobody reads");
    for slot in 0..ASKED {
        liar.0.post_recv_loan(PeerId(0), Tag(1 << 32 | u64::from(slot)), 1 << 18).unwrap();
    }
    let mut come = 0;
    while come < ASKED {
        assert!(Instant::now() < until, "{come} of {ASKED} have come");
        liar.0.poll(Instant::now(), &mut done);
        for completion in done.drain(..) {
            if let Completion::Arrived(arrival) = completion {
                assert_eq!(arrival.loan.len(), 1 << 18);
                come += 1;
            }
        }
        liar.0.park(until.min(Instant::now() + Duration::from_millis(50)));
    }
    all_is_well(&servers);
}
