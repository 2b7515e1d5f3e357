//! Does: servers with TLS, as the binary starts them, and clients that trust them, or do not.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "../../transport/tests/authority/mod.rs"]
mod authority;
mod running;

use authority::{Authority, load};
use gradwire_ps::{Client, ClientSettings, DType, PsError, TableOptions};
use gradwire_transport::{Config, Region, TlsFiles, TransportError, WireChoice};
use running::{Running, command};

fn settings(files: &TlsFiles) -> ClientSettings {
    let default = ClientSettings::default();
    ClientSettings { transport: Config { tls: load(files), wire: WireChoice::Tcp, ..default.transport }, ..default }
}

#[test]
fn parameters_come_and_go_over_mutual_tls_and_by_no_other_way() {
    let authority = Authority::new();
    let (cert, key) = authority.sign(&["localhost", "127.0.0.1"], 2200);
    let (cert, key, ca) = (cert.to_str().unwrap(), key.to_str().unwrap(), authority.ca());
    let arguments = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca.to_str().unwrap()];
    let running = Running::start(2, &arguments);
    let by_name: Vec<String> = running.addresses.iter().map(|at| at.replace("127.0.0.1", "localhost")).collect();
    let client = Client::connect(&by_name, settings(&authority.files(&["a worker"]))).unwrap();
    let table = client.dense("w", &[1 << 20], DType::F32, TableOptions::default()).unwrap();
    let (ones, out) = (Region::from_vec(1.0f32.to_le_bytes().repeat(1 << 20)), Region::zeroed(4 << 20));
    for round in 1..=3 {
        let (gradient, into) = (ones.read(0..4 << 20).unwrap(), out.write(0..4 << 20).unwrap());
        table.push_pull(gradient, into).unwrap().wait(None).unwrap();
        assert_eq!(out.read(0..4 << 20).unwrap()[..], (round as f32).to_le_bytes().repeat(1 << 20)[..]);
    }
    for files in [TlsFiles::default(), authority.caller(), Authority::new().caller()] {
        match Client::connect(&running.addresses, settings(&files)).err().unwrap() {
            PsError::Transport(TransportError::Tls { address, .. }) => assert_eq!(address, running.addresses[0]),
            other => panic!("{other}"),
        }
    }
    let ask = |more: &[&str]| {
        let servers = running.addresses.join(",");
        let arguments = [&["status", "--servers", &servers][..], more].concat();
        let output = command(&arguments).output().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let (well, said) = ask(&["--tls-ca", ca.to_str().unwrap(), "--tls-cert", cert, "--tls-key", key]);
    assert!(well && said.contains("[1048576]"), "{said}");
    let (well, said) = ask(&["--tls-ca", ca.to_str().unwrap()]);
    assert!(!well && said.contains("GRADWIRE_TLS_CERT"), "{said}");
}

#[test]
fn off_loopback_tls_will_do_and_rdma_by_name_will_not() {
    let authority = Authority::new();
    let (cert, key) = authority.sign(&["ps.example"], 2200);
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let mut running = Running::start(1, &["--listen", "0.0.0.0:0", "--tls-cert", cert, "--tls-key", key]);
    running.signal("-TERM");
    let (code, _, log) = running.end();
    assert!(code == Some(0) && log.contains("--tls-client-ca"), "{log}");
    let both = command(&["serve", "--transport", "verbs", "--tls-cert", cert, "--tls-key", key]).output().unwrap();
    let said = String::from_utf8(both.stderr).unwrap();
    assert!(!both.status.success() && said.contains("not encrypted"), "{said}");
}
