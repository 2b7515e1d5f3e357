//! Two ends that do not trust each other, or of which one has no TLS: each is told what is wrong and what to do.

#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod authority;

use authority::{Authority, load};
use gradwire_transport::{
    Acceptance, Completion, Config, Envelope, Identity, PeerId, Region, Tag, TcpWire, Tls, TlsFiles, TransportError,
    Wire, WireChoice, open_verbs,
};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

fn wire(files: &TlsFiles, accept: Acceptance) -> TcpWire {
    let host = "localhost".to_owned();
    let me = Identity { rank: None, host, pid: 1, boot_id: String::new(), nonce: 7, rdma: false, memory: false };
    TcpWire::new(&Config { tls: load(files), ..Config::default() }, me, accept).unwrap()
}

/// What comes of a call to `host` by an end with `theirs` of one with `ours`, and the guests that it let in.
fn meet(ours: &TlsFiles, theirs: &TlsFiles, host: Option<&str>) -> (Result<(), TransportError>, usize) {
    let mut here = wire(ours, Acceptance::Anyone { max_peers: 8 });
    let address = here.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    std::thread::scope(|scope| {
        let call = scope.spawn(move || {
            let mut there = wire(theirs, Acceptance::Nobody);
            let called = there.dial_host(PeerId(0), None, host, &[address], Instant::now() + PATIENCE);
            if called.is_ok() {
                let region = Region::from_vec(vec![5; 300_000]);
                let to = Envelope { peer: PeerId(0), tag: Tag(1), note: 0 };
                there.post_send(to, region.read(0..300_000).unwrap()).unwrap();
                there.shutdown(Instant::now() + PATIENCE);
            }
            called
        });
        let (until, mut done, mut heard) = (Instant::now() + PATIENCE, Vec::new(), 0);
        while !call.is_finished() {
            assert!(Instant::now() < until, "the call does not end");
            here.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                match completion {
                    Completion::PeerUp(peer) => here.post_recv_loan(peer, Tag(1), 300_000).unwrap(),
                    Completion::Arrived(arrival) => heard += usize::from(arrival.loan[..] == vec![5; 300_000]),
                    _ => {}
                }
            }
            std::thread::yield_now();
        }
        (call.join().unwrap(), heard)
    })
}

/// The same, of ends that must not come together: what the caller is told.
fn refusal(ours: &TlsFiles, theirs: &TlsFiles, host: Option<&str>) -> String {
    let (result, heard) = meet(ours, theirs, host);
    assert_eq!(heard, 0, "a message came through");
    match result {
        Err(error @ TransportError::Tls { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn ends_of_one_authority_come_together_by_address_by_name_and_by_a_name_that_was_set() {
    let authority = Authority::new();
    let caller = authority.caller();
    for (names, host) in [("127.0.0.1", None), ("localhost", Some("localhost"))] {
        let (result, heard) = meet(&authority.files(&[names]), &caller, host);
        assert_eq!((result.is_ok(), heard), (true, 1), "{names}: {result:?}");
    }
    let named = TlsFiles { server_name: Some("ps.example".to_owned()), ..caller };
    assert!(meet(&authority.files(&["ps.example"]), &named, None).0.is_ok());
}

#[test]
fn a_certificate_that_does_not_hold_is_refused_with_the_reason_and_the_remedy() {
    let (authority, other) = (Authority::new(), Authority::new());
    let good = authority.files(&["127.0.0.1"]);
    let said = refusal(&good, &other.caller(), None);
    assert!(said.contains("127.0.0.1:") && said.contains("not signed by the CA") && said.contains("tls-ca"), "{said}");
    let said = refusal(&good, &authority.caller(), Some("ps.example"));
    assert!(said.contains("not for ps.example") && said.contains("tls-server-name"), "{said}");
    let (cert, key) = authority.sign(&["127.0.0.1"], 2001);
    let old = TlsFiles { cert: Some(cert), key: Some(key), ..TlsFiles::default() };
    let said = refusal(&old, &authority.caller(), None);
    assert!(said.contains("has expired") && said.contains("new certificate"), "{said}");
}

#[test]
fn an_end_without_tls_and_one_with_it_tell_each_other() {
    let authority = Authority::new();
    let (plain, sealed) = (TlsFiles::default(), authority.files(&["127.0.0.1"]));
    let said = refusal(&sealed, &plain, None);
    assert!(said.contains("takes only TLS") && said.contains("GRADWIRE_TLS_CA"), "{said}");
    let said = refusal(&plain, &authority.caller(), None);
    assert!(said.contains("does not speak TLS"), "{said}");
}

#[test]
fn callers_are_asked_for_certificates_where_that_is_wanted() {
    let (authority, other) = (Authority::new(), Authority::new());
    let here = TlsFiles { client_ca: Some(authority.ca()), ..authority.files(&["127.0.0.1"]) };
    assert!(meet(&here, &authority.files(&["a worker"]), None).0.is_ok());
    let strange = TlsFiles { ca: Some(authority.ca()), ..other.files(&["a worker"]) };
    let (cert, key) = authority.sign(&["late"], 2001);
    let late = TlsFiles { cert: Some(cert), key: Some(key), ..authority.caller() };
    for theirs in [authority.caller(), strange, late] {
        let said = refusal(&here, &theirs, None);
        assert!(said.contains("certificate of ours") && said.contains("GRADWIRE_TLS_CERT"), "{said}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    let good = authority.files(&["localhost"]);
    let (_, other_key) = authority.sign(&["other"], 2200);
    let cases = [
        (TlsFiles { key: None, ..good.clone() }, "tls-key"),
        (TlsFiles { cert: None, ..good.clone() }, "tls-cert"),
        (TlsFiles { key: Some(other_key), ..good.clone() }, "does not fit"),
        (TlsFiles { ca: Some("/nowhere/ca.pem".into()), ..good.clone() }, "/nowhere/ca.pem"),
        (TlsFiles { ca: good.key.clone(), ..good.clone() }, "no certificate in it"),
        (TlsFiles { server_name: Some("x".into()), ..TlsFiles::default() }, "tls-ca"),
        (TlsFiles { client_ca: Some(authority.ca()), ..authority.caller() }, "tls-client-ca"),
    ];
    for (files, said) in cases {
        let error = Tls::load(&files).unwrap_err().to_string();
        assert!(error.contains(said), "{files:?}: {error}");
    }
    let error = wire(&authority.caller(), Acceptance::Anyone { max_peers: 1 }).listen(([127, 0, 0, 1], 0).into());
    assert!(error.unwrap_err().to_string().contains("tls-cert"));
}

#[test]
fn rdma_that_was_asked_for_by_name_is_refused_beside_tls() {
    let config = Config { tls: load(&Authority::new().caller()), ..Config::default() };
    let both = Config { wire: WireChoice::Verbs, ..config.clone() };
    let refused = open_verbs(&both, &[]).err().unwrap().to_string();
    assert!(refused.contains("not encrypted") && refused.contains("tcp"), "{refused}");
    assert!(open_verbs(&config, &[]).unwrap().is_none());
}
