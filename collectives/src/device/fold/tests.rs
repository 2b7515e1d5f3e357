//! Where it takes less, by the figures of real machines, and what all ranks make of what each has measured.

use super::*;
use crate::Reduction;
use crate::hosts::Hosts;
use gradwire_transport::{LinkCost, LinkCosts, Rank};

const SUM: Collective = Collective::AllReduce { op: Reduction::Sum };
const SCATTER: Collective = Collective::ReduceScatter { op: Reduction::Sum };
const MIB: usize = 1 << 20;

/// GB/s as nanoseconds a byte, after some microseconds.
fn pace(begin_us: f64, gb_per_s: f64) -> Pace {
    Pace { begin_ns: begin_us * 1e3, byte_ns: 1.0 / gb_per_s }
}

/// A server's GPU: 16 lanes of PCIe 4, a device that reads 2 TB/s, NVLink, one thread of the host that sums at 10 GB/s.
fn server() -> Rates {
    let copies = pace(10.0, 25.0);
    Rates { host_ns: [0.1; 6], out: copies, into: copies, fold: pace(8.0, 2000.0), reach: pace(10.0, 200.0) }
}

/// Ranks on as many hosts, or on one, whose network moves so much.
fn network(ranks: u32, gb_per_s: f64, hosts: &[u32]) -> (Chooser, WorldSize) {
    let far = LinkCost { latency_ns: 10_000.0, message_ns: 1_000.0, byte_ns: 1.0 / gb_per_s };
    let near = LinkCost { latency_ns: 1_000.0, message_ns: 300.0, byte_ns: 0.1 };
    let costs = LinkCosts { near, far, cores: 64, measured: true };
    (Chooser::default().on(Hosts::new(hosts), costs), WorldSize::new(ranks).unwrap())
}

fn apart(ranks: u32, gb_per_s: f64) -> (Chooser, WorldSize) {
    network(ranks, gb_per_s, &(0..ranks).collect::<Vec<_>>())
}

fn expected(
    rates: Rates,
    way: Way,
    (chooser, world_size): &(Chooser, WorldSize),
    collective: &Collective,
    bytes: usize,
) -> Expected {
    rates.expected(way, Asked { collective, dtype: DType::F32, bytes, world_size: *world_size }, chooser)
}

#[test]
fn a_device_folds_what_is_brought_to_it_where_the_host_is_slower_than_network_and_bus() {
    for ranks in [2, 8] {
        // 100 Gb/s: the bus has room for what comes and goes once more, while the host would sum.
        let quick = apart(ranks, 12.5);
        for collective in [SUM, SCATTER] {
            let bytes = if collective == SUM { 64 * MIB } else { 64 * MIB / ranks as usize };
            let staged = expected(server(), Way::Brought, &quick, &collective, bytes);
            assert_eq!(staged.place(), FoldPlace::Device, "{collective:?} of {ranks}: {staged:?}");
        }
        // A bus of 3 GB/s, as of four old lanes, is what all wait for: what crosses it once more costs more than any sum.
        let bus = pace(10.0, 3.0);
        let narrow = Rates { out: bus, into: bus, ..server() };
        let staged = expected(narrow, Way::Brought, &quick, &SUM, 64 * MIB);
        assert_eq!(staged.place(), FoldPlace::Host, "{ranks}: {staged:?}");
        // So does a host that sums as fast as the links are expected to with it, beside a network as fast as the bus.
        let strong = Rates { host_ns: [0.02; 6], ..server() };
        let staged = expected(strong, Way::Brought, &apart(ranks, 50.0), &SUM, 64 * MIB);
        assert_eq!(staged.place(), FoldPlace::Host, "{ranks}: {staged:?}");
    }
}

#[test]
fn ranks_that_reach_each_others_devices_fold_there_unless_they_are_reached_slowly() {
    let one_host = network(8, 12.5, &[0; 8]);
    for bytes in [5 * MIB, 64 * MIB, 1024 * MIB] {
        let lent = expected(server(), Way::Lent, &one_host, &SUM, bytes);
        assert_eq!(lent.place(), FoldPlace::Device, "{bytes}: {lent:?}");
        assert!(lent.host_ns > 3.0 * lent.device_ns, "{bytes}: {lent:?}");
    }
    // What is reached by way of two bridges at half a GB/s, beside hosts that sum 30 GB/s.
    let slow = Rates { reach: pace(50.0, 0.5), host_ns: [0.033; 6], ..server() };
    let lent = expected(slow, Way::Lent, &one_host, &SUM, 64 * MIB);
    assert_eq!(lent.place(), FoldPlace::Host, "{lent:?}");
    // The numbers: put, read, read what others have folded; 64 MiB by 2 TB/s and 200 GB/s.
    let lent = expected(server(), Way::Lent, &one_host, &SUM, 64 * MIB);
    let bytes = (64 * MIB) as f64;
    let least = bytes / 2000.0 + 2.0 * bytes / 200.0;
    assert!(lent.device_ns > least && lent.device_ns < 1.5 * least, "{least} {lent:?}");
}

#[test]
fn hosts_of_several_ranks_fold_inside_on_their_devices_and_stage_a_share() {
    let hosts = [0, 0, 0, 0, 1, 1, 1, 1];
    let two = network(8, 12.5, &hosts);
    let way = Way::ByHosts { each: 4, hosts: WorldSize::new(2).unwrap() };
    for collective in [SUM, SCATTER] {
        let bytes = if collective == SUM { 64 * MIB } else { 8 * MIB };
        let by_hosts = expected(server(), way, &two, &collective, bytes);
        assert_eq!(by_hosts.place(), FoldPlace::Device, "{collective:?}: {by_hosts:?}");
    }
    // What a host sends is what it takes, at least: of two hosts, the buffer once.
    let by_hosts = expected(server(), way, &two, &SUM, 64 * MIB);
    let shares = (64 * MIB) as f64 / 4.0 / 12.5;
    assert!(by_hosts.device_ns > shares, "{by_hosts:?}");
    let slow = Rates { fold: pace(5e3, 1.0), reach: pace(5e3, 0.2), ..server() };
    assert_eq!(expected(slow, way, &two, &SUM, 64 * MIB).place(), FoldPlace::Host);
}

#[test]
fn all_ranks_choose_by_the_slowest_and_the_type_counts_on_the_host() {
    let slow_bus = Rates { into: pace(10.0, 1.0), out: pace(10.0, 1.0), ..server() };
    let slow_host = Rates { host_ns: [1.0; 6], ..server() };
    let all = Rates::slowest([server(), slow_bus, slow_host]);
    assert_eq!(all, Rates { host_ns: [1.0; 6], ..slow_bus });
    assert_eq!(Rates::slowest([slow_host, server(), slow_bus]), all);
    // One type that the host sums slowly is folded on the devices, and another not.
    let mut rates = Rates { host_ns: [0.02; 6], ..server() };
    let at = DeviceKernels::TYPES.iter().position(|dtype| *dtype == DType::F16).unwrap();
    rates.host_ns[at] = 2.0;
    let (chooser, world_size) = apart(2, 50.0);
    let place = |dtype| {
        let asked = Asked { collective: &SUM, dtype, bytes: 64 * MIB, world_size };
        Folding::Measured(rates, Way::Brought).place(asked, &chooser)
    };
    assert_eq!((place(DType::F32), place(DType::F16)), (FoldPlace::Host, FoldPlace::Device));
}

#[test]
fn the_choice_is_told_with_its_figures() {
    let (chooser, world_size) = apart(2, 12.5);
    let words = Folding::Measured(server(), Way::Brought).words(&chooser, world_size).unwrap();
    for part in [
        "host folds float32 at 10.0 GB/s, copies out 25.0 GB/s after 10 us, in 25.0 GB/s",
        "its device folds 2000.0 GB/s after 8 us; all_reduce of 8 MiB on the devices (expected: ",
        " us on the hosts)",
    ] {
        assert!(words.contains(part), "{words}");
    }
    let lent = Folding::Measured(server(), Way::Lent).words(&chooser, world_size).unwrap();
    assert!(lent.contains(", others' 200.0 GB/s after 10 us;"), "{lent}");
    let told = Folding::Told(3, Way::Lent);
    assert!(told.words(&chooser, world_size).unwrap().contains("rank 3 was told to by GRADWIRE_CUDA_REDUCE=device"));
    assert!(Folding::OnHosts(String::new()).words(&chooser, world_size).is_none());
    let asked = |collective, dtype| Asked { collective, dtype, bytes: 64 * MIB, world_size };
    let reduce = Collective::Reduce { op: Reduction::Sum, root: Rank(0) };
    let by_hosts = Folding::Told(0, Way::ByHosts { each: 2, hosts: world_size });
    let ordered = Chooser::new(None, true).unwrap();
    for (folding, chooser, collective, dtype, place) in [
        (&told, &chooser, &SUM, DType::F32, "on the devices (rank 3"),
        (&told, &chooser, &SUM, DType::U8, "on the hosts (no kernel folds uint8 so)"),
        (&told, &chooser, &reduce, DType::F32, "on the devices"),
        (&by_hosts, &chooser, &reduce, DType::F32, "on the hosts (this call has no other way)"),
        (&by_hosts, &ordered, &SUM, DType::F32, "on the hosts (this call has no other way)"),
        (&by_hosts, &ordered, &SUM, DType::I32, "on the devices"),
        (&Folding::Told(0, Way::Brought), &chooser, &reduce, DType::F32, "on the hosts (this call"),
        (&Folding::OnHosts("rank 1: none".to_owned()), &chooser, &SUM, DType::F32, "on the hosts (rank 1: none)"),
    ] {
        let words = folding.told(asked(collective, dtype), chooser);
        assert!(words.starts_with(place), "{words}");
    }
}
