//! Does: many clients whose gradients, and one client whose values, come in portions that the receiver grants.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{Client, ClientSettings, DType, LocalServers, ServerSettings, TableOptions};
use gradwire_transport::{Config, CreditSettings, Region, WireChoice};
use std::time::Duration;

const LONG: Option<Duration> = Some(Duration::from_secs(30));
const ELEMENTS: usize = 700_001;

fn granting() -> Config {
    // Loopback has no queue to protect, and is granted credit only where it is asked for.
    let credit = CreditSettings { loopback: true, ..CreditSettings::default() };
    Config { credit: Some(credit), wire: WireChoice::Tcp, ..Config::default() }
}

fn gradient() -> impl Iterator<Item = f32> {
    (0..ELEMENTS).map(|n| (n % 67) as f32)
}

#[test]
fn pushes_of_many_clients_count_once_though_one_dies_in_the_middle_of_its_own() {
    let servers = LocalServers::start(2, ServerSettings { transport: granting(), ..Default::default() }).unwrap();
    let addresses = servers.addresses().to_vec();
    let connect = move || {
        let client = Client::connect(&addresses, ClientSettings { transport: granting(), ..Default::default() });
        client.unwrap()
    };
    let rounds = 3;
    let pushers: Vec<_> = (0..4)
        .map(|_| {
            let client = connect();
            std::thread::spawn(move || {
                let table = client.dense("w", &[ELEMENTS], DType::F32, TableOptions::default()).unwrap();
                let region = Region::from_vec(gradient().flat_map(f32::to_le_bytes).collect());
                for _ in 0..rounds {
                    table.push(region.read(0..region.len()).unwrap()).unwrap().wait(LONG).unwrap();
                }
            })
        })
        .collect();
    let quitter = connect();
    let other = quitter.dense("other", &[ELEMENTS], DType::F32, TableOptions::default()).unwrap();
    let region = Region::from_vec(gradient().flat_map(f32::to_le_bytes).collect());
    // Many parts are announced, a few of them granted, when it leaves without having sent them.
    let under_way = other.push(region.read(0..region.len()).unwrap()).unwrap();
    quitter.close();
    assert!(under_way.is_done());
    pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
    let reader = connect();
    let table = reader.dense("w", &[ELEMENTS], DType::F32, TableOptions::default()).unwrap();
    let values = Region::zeroed(ELEMENTS * 4);
    table.pull(values.write(0..values.len()).unwrap()).unwrap().wait(LONG).unwrap();
    let values = values.read(0..values.len()).unwrap();
    let pushes = (4 * rounds) as f32;
    for (n, (got, one)) in values.as_chunks::<4>().0.iter().zip(gradient()).enumerate() {
        assert_eq!(f32::from_le_bytes(*got), pushes * one, "element {n}");
    }
}
