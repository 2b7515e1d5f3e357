//! Leadership and the map, at a real etcd.

use super::{Election, Etcd, EtcdError, EtcdSettings, Office};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[path = "running.rs"]
mod running;
use running::RunningEtcd;

fn reach(endpoint: &str) -> Arc<Etcd> {
    let endpoints = vec![endpoint.to_owned()];
    Etcd::new(&EtcdSettings { endpoints, cluster: "test".into(), ..EtcdSettings::default() }).unwrap()
}

fn won(election: Election) -> (Office, Option<Vec<u8>>) {
    match election {
        Election::Won(office, map) => (office, map),
        Election::Lost(who) => panic!("{who} leads"),
    }
}

#[test]
fn one_leads_and_the_next_finds_its_map() {
    let etcd = RunningEtcd::start();
    let (one, two) = (reach(&etcd.endpoint()), reach(&etcd.endpoint()));
    let (office, map) = won(one.stand("one").unwrap());
    assert_eq!(map, None);
    assert!(matches!(two.stand("two").unwrap(), Election::Lost(who) if who == "one"));
    office.keep(b"a map").unwrap();
    assert!(!office.is_lost());
    drop(office);
    let (office, map) = won(two.stand("two").unwrap());
    assert_eq!(map.as_deref(), Some(&b"a map"[..]));
    // A long one, with every byte.
    let long: Vec<u8> = (0..1 << 20).map(|index: u32| index as u8).collect();
    office.keep(&long).unwrap();
    drop(office);
    assert_eq!(won(one.stand("one").unwrap()).1, Some(long));
}

#[test]
fn a_leader_taken_for_dead_changes_nothing() {
    let etcd = RunningEtcd::start();
    let (one, two) = (reach(&etcd.endpoint()), reach(&etcd.endpoint()));
    let (old, _) = won(one.stand("one").unwrap());
    old.keep(b"first").unwrap();
    two.revoke(old.lease);
    let (new, map) = won(two.stand("two").unwrap());
    assert_eq!(map.as_deref(), Some(&b"first"[..]));
    assert!(matches!(old.keep(b"late"), Err(EtcdError::NotLeader)));
    new.keep(b"second").unwrap();
    // It learns by itself that its lease is gone.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !old.is_lost() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    drop((old, new));
    assert_eq!(won(one.stand("one").unwrap()).1.as_deref(), Some(&b"second"[..]));
}

#[test]
fn a_leader_without_etcd_steps_down_and_what_it_kept_is_there_again() {
    let mut etcd = RunningEtcd::start();
    let one = reach(&etcd.endpoint());
    let (office, _) = won(one.stand("one").unwrap());
    office.keep(b"kept").unwrap();
    etcd.kill();
    let error = office.keep(b"not kept").unwrap_err();
    assert!(matches!(error, EtcdError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&etcd.endpoint()), "{error}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !office.is_lost() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(office);
    etcd.restart();
    let deadline = Instant::now() + Duration::from_secs(20);
    // The old lease, which nobody could give back, ends by etcd's clock.
    let map = loop {
        match one.stand("one").unwrap() {
            Election::Won(_, map) => break map,
            Election::Lost(_) => assert!(Instant::now() < deadline),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(map.as_deref(), Some(&b"kept"[..]));
}

#[test]
fn what_is_no_etcd_is_told_from_what_is_not_there() {
    let nowhere = reach("127.0.0.1:1").stand("one").err().unwrap();
    assert!(matches!(nowhere, EtcdError::Unreachable { .. }), "{nowhere}");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\n\r\nno such p").unwrap();
    });
    let other = reach(&address).stand("one").err().unwrap();
    server.join().unwrap();
    assert!(matches!(&other, EtcdError::Refused { status: 404, .. }), "{other}");
    let settings = EtcdSettings { ca: Some("/nonexistent/ca.pem".into()), ..EtcdSettings::default() };
    let missing = Etcd::new(&settings).err().unwrap();
    assert!(missing.to_string().contains("/nonexistent/ca.pem"), "{missing}");
}
