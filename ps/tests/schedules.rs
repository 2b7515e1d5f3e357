//! Does: learning rates that servers work out by themselves, from a schedule that was set once.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use gradwire_ps::{
    Client, ClientSettings, Course, DType, DenseTable, Ftrl, LocalServers, Mode, PsError, Schedule, ServerSettings,
    Sgd, SparseOptions, TableOptions, UpdateRule, WarmUp,
};
use gradwire_transport::Region;
use std::time::Duration;

const ELEMENTS: usize = 40_000;
const RULE: UpdateRule =
    UpdateRule::Sgd(Sgd { learning_rate: 1.0, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false });

fn client(servers: &LocalServers, worker: u32) -> Client {
    let settings = ClientSettings { worker: Some(worker), timeout: Duration::from_secs(20), ..Default::default() };
    Client::connect(servers.addresses(), settings).unwrap()
}

fn dense(client: &Client, mode: Mode) -> DenseTable {
    client.dense("w", &[ELEMENTS], DType::F64, TableOptions { rule: RULE, mode, ..TableOptions::default() }).unwrap()
}

fn ones() -> gradwire_transport::RegionSlice {
    let ones = Region::from_vec((0..ELEMENTS).flat_map(|_| 1.0f64.to_le_bytes()).collect());
    ones.read(0..ELEMENTS * 8).unwrap()
}

/// The value of every element: they are all equal.
fn value(table: &DenseTable) -> f64 {
    let out = Region::zeroed(ELEMENTS * 8);
    table.pull(out.write(0..ELEMENTS * 8).unwrap()).unwrap().wait(None).unwrap();
    let bytes = out.read(0..ELEMENTS * 8).unwrap();
    let numbers: Vec<f64> = bytes.chunks(8).map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap())).collect();
    assert!(numbers.iter().all(|number| *number == numbers[0]));
    numbers[0]
}

fn schedule() -> Schedule {
    Schedule {
        warm_up: Some(WarmUp { steps: 3, from: 0.25 }),
        course: Course::Cosine { rate: 0.5, least: 0.125, steps: 4 },
    }
}

#[test]
fn a_synchronous_table_follows_its_schedule_from_the_next_clock_on_whatever_the_number_of_shards() {
    for shards in [1, 3] {
        let servers = LocalServers::start(shards, ServerSettings::default()).unwrap();
        let clients = [client(&servers, 0), client(&servers, 1)];
        let tables = clients.each_ref().map(|client| dense(client, Mode::Sync { workers: 2 }));
        let mut expected = 0.0;
        for clock in 1..=12u64 {
            if clock == 3 {
                tables.iter().for_each(|table| table.set_schedule(&schedule()).unwrap());
            }
            if clock == 11 {
                tables.iter().for_each(|table| table.set_learning_rate(0.0625).unwrap());
            }
            let calls = tables.each_ref().map(|table| table.push(ones()).unwrap());
            assert!(calls.iter().all(|call| call.wait(None).is_ok()));
            let rate = match clock {
                ..3 => 1.0,
                3..11 => schedule().at(clock - 3),
                _ => 0.0625,
            };
            expected += -rate * 2.0;
            assert_eq!(value(&tables[clock as usize % 2]).to_bits(), f64::to_bits(expected), "clock {clock}");
        }
    }
}

#[test]
fn workers_with_different_schedules_for_one_clock_are_told() {
    let servers = LocalServers::start(1, ServerSettings::default()).unwrap();
    let clients = [client(&servers, 0), client(&servers, 1)];
    let tables = clients.each_ref().map(|client| dense(client, Mode::Sync { workers: 2 }));
    tables[0].set_schedule(&schedule()).unwrap();
    tables[1].set_schedule(&schedule()).unwrap();
    let other = Schedule { warm_up: None, ..schedule() };
    let refused = tables[1].set_schedule(&other).unwrap_err();
    assert!(refused.to_string().contains("learning rate at clock 1"), "{refused}");
    let bad = Schedule::from(Course::List(vec![]));
    assert!(matches!(tables[0].set_schedule(&bad), Err(PsError::Invalid { .. })));
    let ftrl = TableOptions { rule: UpdateRule::Ftrl(Ftrl::default()), ..TableOptions::default() };
    let ftrl = clients[0].dense("ftrl", &[4], DType::F32, ftrl).unwrap();
    let to_zero = Schedule::from(Course::Cosine { rate: 0.1, least: 0.0, steps: 9 });
    let refused = ftrl.set_schedule(&to_zero).unwrap_err();
    assert!(refused.to_string().contains("FTRL divides by it"), "{refused}");
}

#[test]
fn without_common_clocks_a_schedule_holds_at_once_and_goes_by_pushes() {
    let servers = LocalServers::start(2, ServerSettings::default()).unwrap();
    let client = client(&servers, 0);
    let list = Schedule::from(Course::List(vec![0.5, 0.25, 0.125]));
    for mode in [Mode::Async, Mode::Ssp { workers: 1, staleness: 2 }] {
        let options = TableOptions { rule: RULE, mode, ..TableOptions::default() };
        let table = client.dense(&mode.to_string(), &[ELEMENTS], DType::F64, options).unwrap();
        let push = || assert!(table.push(ones()).unwrap().wait(None).is_ok());
        push();
        table.set_schedule(&list).unwrap();
        (0..5).for_each(|_| push());
        assert_eq!(value(&table), -(1.0 + 0.5 + 0.25 + 3.0 * 0.125));
    }
    let sparse = SparseOptions { rule: RULE, mode: Mode::Sync { workers: 1 }, ..SparseOptions::default() };
    let table = client.sparse("rows", 1, DType::F64, sparse).unwrap();
    table.set_schedule(&list).unwrap();
    let (ids, one) = (Region::from_vec(7u64.to_le_bytes().to_vec()), Region::from_vec(1.0f64.to_le_bytes().to_vec()));
    let (ids, one) = (ids.read(0..8).unwrap(), one.read(0..8).unwrap());
    (0..4).for_each(|_| assert!(table.push(&ids, &one).unwrap().wait(None).is_ok()));
    let out = Region::zeroed(8);
    table.pull(&ids, out.write(0..8).unwrap()).unwrap().wait(None).unwrap();
    assert_eq!(out.read(0..8).unwrap()[..], (-1.0f64).to_le_bytes());
}
