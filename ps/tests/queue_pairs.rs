//! Does: clients and servers of one process over queue pairs within it: what they exchange, who breaks, who comes and goes.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

use gradwire_ps::shard::Shard;
use gradwire_ps::{
    Client, ClientSettings, Combine, DType, Dialer, Limits, Mode, PsError, Server, Stopper, TableOptions, UpdateRule,
};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{Acceptance, Config, Identity, Mesh, Region, TcpWire, VerbsWire, WireChoice};
use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;

const LONG: Option<Duration> = Some(Duration::from_secs(60));

fn identity(nonce: u64, rdma: bool) -> Identity {
    Identity { rank: None, host: "h".into(), pid: 1, boot_id: String::new(), nonce, rdma, memory: false }
}

struct Running {
    address: String,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn serve(fabric: &Fabric) -> Running {
    let config = Config::default();
    let mut tcp = TcpWire::new(&config, identity(77, true), Acceptance::Anyone { max_peers: 8 }).unwrap();
    let address = tcp.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let verbs = VerbsWire::new(&config, Box::new(fabric.adapter()));
    let mesh = Mesh::meeting(tcp, vec![Box::new(verbs)], WireChoice::Auto);
    let mut server = Server::on(Box::new(mesh), address, Shard::new(Limits::default(), 77), Duration::ZERO);
    let stopper = server.stopper();
    let thread = std::thread::spawn(move || server.run());
    Running { address: address.to_string(), stopper, thread: Some(thread) }
}

fn settings(worker: Option<u32>) -> ClientSettings {
    ClientSettings { worker, timeout: Duration::from_secs(30), ..ClientSettings::default() }
}

fn dialer(fabric: Option<&Fabric>, choice: WireChoice) -> Box<dyn Dialer> {
    let config = Config { wire: choice, ..Config::default() };
    let tcp = TcpWire::new(&config, identity(5, fabric.is_some()), Acceptance::Nobody).unwrap();
    match fabric {
        Some(fabric) => {
            Box::new(Mesh::meeting(tcp, vec![Box::new(VerbsWire::new(&config, Box::new(fabric.adapter())))], choice))
        }
        None => Box::new(tcp),
    }
}

/// Workers push 1.0 into every element `pushes` times, and all read what came of it.
fn ones_add_up(servers: &[Running], workers: u32, pushes: u32, dial: impl Fn() -> Box<dyn Dialer> + Sync) {
    const ELEMENTS: usize = 300_000;
    let addresses: Vec<String> = servers.iter().map(|server| server.address.clone()).collect();
    let options = TableOptions {
        rule: UpdateRule::Sum,
        mode: Mode::Sync { workers },
        combine: Combine::Sum,
        ..TableOptions::default()
    };
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (addresses, dial) = (&addresses, &dial);
            scope.spawn(move || {
                let client = Client::over(dial(), addresses, settings(Some(worker))).unwrap();
                let table = client.dense("t", &[ELEMENTS], DType::F32, options).unwrap();
                let ones = Region::from_vec(1f32.to_le_bytes().repeat(ELEMENTS));
                let out = Region::zeroed(4 * ELEMENTS);
                for _ in 0..pushes {
                    let (gradient, into) = (ones.read(0..ones.len()).unwrap(), out.write(0..out.len()).unwrap());
                    table.push_pull(gradient, into).unwrap().wait(LONG).unwrap();
                }
                let total = ((workers * pushes) as f32).to_le_bytes();
                let last = out.read(0..out.len()).unwrap();
                let first = f32::from_le_bytes(last[..4].try_into().unwrap());
                assert!(last.chunks(4).all(|value| value == total), "{first} and not {}", workers * pushes);
                client.barrier("end", workers, LONG).unwrap();
            });
        }
    });
}

#[test]
fn ones_add_up_over_queue_pairs() {
    let fabric = Fabric::default();
    let servers = [serve(&fabric), serve(&fabric)];
    ones_add_up(&servers, 3, 10, || dialer(Some(&fabric), WireChoice::Verbs));
    assert_eq!(fabric.not_ready(), 0, "no message may come before its receive");
    assert!(fabric.messages() > 100, "they went by queue pairs");
}

#[test]
fn what_is_pulled_is_written_straight_into_the_worker_s_buffer() {
    let fabric = Fabric::default();
    let server = serve(&fabric);
    let dialer = dialer(Some(&fabric), WireChoice::Verbs);
    let client = Client::over(dialer, std::slice::from_ref(&server.address), settings(Some(0))).unwrap();
    let mode = Mode::Sync { workers: 1 };
    let options = TableOptions { rule: UpdateRule::Sum, mode, ..TableOptions::default() };
    let table = client.dense("t", &[300_000], DType::F32, options).unwrap();
    let (ones, out) = (Region::from_vec(1f32.to_le_bytes().repeat(300_000)), Region::zeroed(1_200_000));
    fabric.watch(&out.read(0..out.len()).unwrap());
    for turn in 1..4 {
        let (gradient, into) = (ones.read(0..ones.len()).unwrap(), out.write(0..out.len()).unwrap());
        table.push_pull(gradient, into).unwrap().wait(LONG).unwrap();
        assert_eq!(fabric.written(), turn * 2 * 1_200_000 - 1_200_000, "push_pull {turn}");
        table.pull(out.write(0..out.len()).unwrap()).unwrap().wait(LONG).unwrap();
        assert_eq!(fabric.written(), turn * 2 * 1_200_000, "pull {turn}");
        let sums = out.read(0..out.len()).unwrap();
        assert!(sums.chunks(4).all(|value| value == (turn as f32).to_le_bytes()));
    }
}

#[test]
fn ones_add_up_while_queue_pairs_break() {
    for seed in 1..4 {
        println!("seed {seed}");
        let fabric = Fabric::default();
        let servers = [serve(&fabric)];
        fabric.fail_at_random(seed, 5000, 40);
        ones_add_up(&servers, 2, 25, || dialer(Some(&fabric), WireChoice::Auto));
        assert_eq!(fabric.not_ready(), 0);
    }
}

#[test]
fn a_client_without_rdma_uses_sockets_and_one_that_insists_is_told_why_not() {
    let fabric = Fabric::default();
    ones_add_up(&[serve(&fabric)], 2, 3, || dialer(None, WireChoice::Auto));
    assert_eq!(fabric.messages(), 0);
    // A server whose device has no queue pair left.
    let server = serve(&fabric);
    fabric.go_down();
    ones_add_up(std::slice::from_ref(&server), 2, 3, || dialer(Some(&fabric), WireChoice::Auto));
    let refused =
        Client::over(dialer(Some(&fabric), WireChoice::Verbs), std::slice::from_ref(&server.address), settings(None));
    let text = refused.err().expect("verbs cannot be had").to_string();
    assert!(text.contains("GRADWIRE_TRANSPORT=verbs") && text.contains("open a queue pair"), "{text}");
}

#[test]
fn clients_come_and_go_and_nothing_of_them_stays() {
    let fabric = Fabric::default();
    let server = serve(&fabric);
    for _ in 0..40 {
        let client = Client::over(
            dialer(Some(&fabric), WireChoice::Verbs),
            std::slice::from_ref(&server.address),
            settings(None),
        );
        let client = client.unwrap();
        assert_eq!(client.status().unwrap().len(), 1);
        client.close();
    }
    let client =
        Client::over(dialer(Some(&fabric), WireChoice::Verbs), std::slice::from_ref(&server.address), settings(None))
            .unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while fabric.queue_pairs() > 2 {
        assert!(std::time::Instant::now() < until, "{} queue pairs are left", fabric.queue_pairs());
        client.status().unwrap();
    }
}

#[test]
fn an_error_of_a_server_comes_over_queue_pairs_too() {
    let fabric = Fabric::default();
    let server = serve(&fabric);
    let client = Client::over(
        dialer(Some(&fabric), WireChoice::Verbs),
        std::slice::from_ref(&server.address),
        settings(Some(0)),
    )
    .unwrap();
    let options = |workers| TableOptions {
        rule: UpdateRule::Sum,
        mode: Mode::Sync { workers },
        combine: Combine::Sum,
        ..TableOptions::default()
    };
    client.dense("t", &[10], DType::F32, options(1)).unwrap();
    let other = Client::over(
        dialer(Some(&fabric), WireChoice::Verbs),
        std::slice::from_ref(&server.address),
        settings(Some(1)),
    )
    .unwrap();
    let refused = other.dense("t", &[11], DType::F32, options(1)).err().expect("another shape");
    assert!(matches!(refused, PsError::Refused { .. }), "{refused}");
}
