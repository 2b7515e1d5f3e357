//! Ranks of several hosts, several on each, whose calls over memory of CUDA devices go by hosts, against a double of the driver: what
//! the host's memory gives, a rank's share and no more between hosts, and what is done where it cannot be.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "common/beside_host.rs"]
mod beside_host;
mod common;
#[path = "../../transport/tests/cuda/double.rs"]
mod double;
#[path = "common/on_device.rs"]
mod on_device;

use beside_host::{LONG, ROUNDS, SUM, bits, compare, on_device, on_hosts, settings, small};
use common::{group_on_hosts, group_over_verbs_on};
use double::{Counter, Double, Setting};
use gradwire_collectives::{Collective, DType, Reduction, Settings};
use gradwire_transport::Rank;
use gradwire_transport::cuda::Stream;
use gradwire_transport::verbs::Fabric;
use on_device::{device, put};

#[test]
fn between_hosts_that_reach_no_device_each_rank_has_its_own_share_staged() {
    let worlds: [&[u32]; 2] = [&[0, 0, 1, 1], &[4, 2, 4, 2, 3, 3]];
    for world in worlds {
        let double = Double::new(1);
        let plain = |_| Settings { deterministic: false, ..settings(&double) };
        group_on_hosts(world, plain, |c| {
            let (n, seed) = (world.len(), u64::from(c.rank().0));
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let zeros = |bytes: usize| vec![0; bytes];
            // Several rounds on four ranks, one on six; with an end that is no border.
            let (all, len) = if n == 4 { (18 << 20, (33 << 20) + 12) } else { (6 << 20, LONG) };
            let part = (all / n / 4 + 1) * 4;
            for (op, dtype) in [
                (Reduction::Avg, DType::F32),
                (Reduction::Sum, DType::BF16),
                (Reduction::Product, DType::I32),
                (Reduction::Avg, DType::I64),
            ] {
                compare(c, &stream, (Collective::AllReduce { op }, dtype), &[], &[small(dtype, seed, LONG)]);
            }
            for (op, dtype) in
                [(Reduction::Sum, DType::F32), (Reduction::Avg, DType::F32), (Reduction::Max, DType::I32)]
            {
                let whole = small(dtype, seed, part * n);
                compare(c, &stream, (Collective::ReduceScatter { op }, dtype), &[whole], &[zeros(part)]);
            }
            compare(c, &stream, (SUM, DType::F32), &[], &[small(DType::F32, seed, len)]);
            let own = bits(seed, part);
            compare(c, &stream, (Collective::AllGather, DType::U8), std::slice::from_ref(&own), &vec![zeros(part); n]);
            compare(c, &stream, (Collective::AllGather, DType::F32), &[own], &[zeros(part * n)]);
            // What has no such way goes by way of the host as a whole.
            let root = Rank(1);
            compare(c, &stream, (Collective::Broadcast { root }, DType::F32), &[], &[bits(seed, LONG)]);
            let op = Reduction::Sum;
            compare(c, &stream, (Collective::Reduce { op, root }, DType::F32), &[], &[small(DType::F32, seed, LONG)]);
            let words = c.describe().to_string();
            assert!(words.contains("inside each host by CUDA IPC, 32 MiB lent, folded there (NVRTC 99.1"), "{words}");
            assert!(words.contains("; between hosts each rank's share staged"), "{words}");
        });
        assert!(double.count(Counter::Launches) > 0);
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn a_rank_s_share_is_all_that_it_sends_to_other_hosts() {
    let double = Double::new(1);
    let plain = |_| Settings { deterministic: false, ..settings(&double) };
    let world = &[0, 0, 0, 0, 1, 1, 1, 1];
    group_on_hosts(world, plain, |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let (memory, _coming) = put(&stream, &vec![0; ROUNDS]);
        let call = || on_device(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&memory)).unwrap();
        let came = || {
            let links = c.describe().links;
            links.iter().map(|link| (link.rank.index(), link.traffic.received_bytes)).collect::<Vec<_>>()
        };
        call();
        let before = came();
        call();
        let me = c.rank().index();
        for ((rank, before), (_, now)) in before.into_iter().zip(came()) {
            let expected = if rank == (me + 4) % 8 { (ROUNDS / 4) as u64 } else { 0 };
            assert!((now - before).abs_diff(expected) < 64 << 10, "{} bytes came from {rank}", now - before);
        }
    });
}

#[test]
fn over_rdma_a_card_reads_a_rank_s_share_of_other_hosts_devices() {
    let (double, fabric, world) = (Double::new(1), Fabric::default(), &[0, 0, 1, 1]);
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let plain = |_| Settings { deterministic: false, ..settings(&double) };
    group_over_verbs_on(world, &fabric, plain, |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let (seed, me) = (u64::from(c.rank().0), c.rank().index());
        let given = small(DType::F32, seed, ROUNDS);
        compare(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&given));
        // What has no way by hosts has that of ranks that are all alike.
        compare(c, &stream, (Collective::AllReduce { op: Reduction::Avg }, DType::F32), &[], &[given]);
        compare(c, &stream, (Collective::Broadcast { root: Rank(2) }, DType::F32), &[], &[bits(seed, LONG)]);
        let words = c.describe().to_string();
        assert!(words.contains("by GPU-direct RDMA by dma-buf of loopback port"), "{words}");
        assert!(words.contains("and CUDA IPC, 48 MiB lent") && words.contains("; all_reduce inside each host first"));
        let (memory, _coming) = put(&stream, &vec![0; ROUNDS]);
        let came = || {
            let links = c.describe().links;
            links.iter().map(|link| (link.rank.index(), link.traffic.received_bytes)).collect::<Vec<_>>()
        };
        let before = came();
        on_device(c, &stream, (SUM, DType::F32), &[], &[memory]).unwrap();
        for ((rank, before), (_, now)) in before.into_iter().zip(came()) {
            let expected = if rank == (me + 2) % 4 { (ROUNDS / 2) as u64 } else { 0 };
            assert!((now - before).abs_diff(expected) < 64 << 10, "{} bytes came from {rank}", now - before);
        }
    });
    assert_eq!((double.held(), fabric.queue_pairs()), ([0; 7], 0));
}

#[test]
fn what_is_to_be_in_the_order_of_the_ranks_and_hosts_that_are_not_alike_go_by_way_of_the_host() {
    let cases: [(&[u32], bool); 2] = [(&[0, 0, 1, 1], true), (&[0, 0, 1], false)];
    for (world, deterministic) in cases {
        let double = Double::new(1);
        let settings = |_| Settings { deterministic, ..on_hosts(&double) };
        group_on_hosts(world, settings, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let given = if deterministic { bits(c.rank().0.into(), LONG) } else { small(DType::F32, 1, LONG) };
            compare(c, &stream, (SUM, DType::F32), &[], &[given]);
            let told = c.describe().to_string();
            let words = "do not reach each other (rank 0: a rank is reached by tcp, which reads no device)";
            assert!(deterministic || told.contains(words), "{told}");
        });
        assert_eq!((double.held(), double.count(Counter::Launches)), ([0; 7], 0));
    }
}

#[test]
fn a_rank_that_dies_between_hosts_or_calls_something_else_ends_the_call_on_all() {
    let world = &[0, 0, 1, 1];
    for dies in [true, false] {
        let double = Double::new(1);
        let plain = |_| Settings { deterministic: false, ..settings(&double) };
        let errors = group_on_hosts(world, plain, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let (memory, _coming) = put(&stream, &small(DType::F32, 1, LONG));
            let call = |collective| on_device(c, &stream, (collective, DType::F32), &[], std::slice::from_ref(&memory));
            call(SUM).unwrap();
            if c.rank() == Rank(3) {
                if dies {
                    c.abort("a test");
                    return None;
                }
                return call(Collective::AllReduce { op: Reduction::Max }).err();
            }
            call(SUM).err()
        });
        for error in errors.iter().take(3) {
            let error = error.as_ref().unwrap();
            match dies {
                true => assert!(error.to_string().contains("rank 3"), "{error}"),
                false => assert_eq!(common::blamed(error), [Rank(3)]),
            }
        }
        assert_eq!(double.held(), [0; 7]);
    }
}
