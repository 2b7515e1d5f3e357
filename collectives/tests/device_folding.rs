//! Where what is on CUDA devices is folded: on the devices, to which it is brought by way of the hosts where they do not reach each
//! other, or on the hosts; told or measured; against a double of the driver. The same bits, and the same place on all ranks.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "common/beside_host.rs"]
mod beside_host;
mod common;
#[path = "../../transport/tests/cuda/double.rs"]
mod double;
#[path = "common/on_device.rs"]
mod on_device;

use beside_host::{LONG, ROUNDS, SUM, bits, compare, on_device, on_hosts, settings, small};
use common::{Way, group, group_changed, group_of, group_over_verbs};
use double::{Counter, Double, Failing, Setting};
use gradwire_collectives::{Collective, Communicator, DType, DeviceCall, FoldPlace, Reduction, Settings};
use gradwire_transport::cuda::Stream;
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{Group, LinkCost, LinkCosts, Rank};
use on_device::{all, device, get, overwrite, put, soon};

const OPS: [Reduction; 5] = [Reduction::Sum, Reduction::Avg, Reduction::Product, Reduction::Min, Reduction::Max];
const TYPES: [DType; 6] = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64];

/// Staged, on devices that reach no other.
fn staged(settings: Settings) -> Settings {
    Settings { cuda_direct: false, ..settings }
}

fn devices(c: &Communicator) -> Vec<String> {
    c.describe().devices
}

#[test]
fn what_is_brought_to_devices_is_folded_to_the_bits_that_hosts_make() {
    for (way, size) in [(Way::Tcp, 2), (Way::Tcp, 3), (Way::Segment, 3), (Way::Shm, 2)] {
        let double = Double::new(2);
        group(size, way, staged(settings(&double)), |c| {
            let (n, seed) = (size as usize, u64::from(c.rank().0));
            let stream = Stream::new(&device(&double, c.rank().0 % 2)).unwrap();
            // All of them by one wire, and by the others one.
            let whole = way == Way::Tcp && size == 3;
            let kernels = TYPES.into_iter().flat_map(|dtype| OPS.map(|op| (dtype, op)));
            for (dtype, op) in kernels.filter(|kernel| whole || *kernel == (DType::BF16, Reduction::Avg)) {
                compare(c, &stream, (Collective::AllReduce { op }, dtype), &[], &[bits(seed, LONG)]);
                if op == Reduction::Avg {
                    let whole = bits(seed, LONG * n);
                    let parts: Vec<_> = whole.chunks(LONG).map(<[u8]>::to_vec).collect();
                    let scatter = (Collective::ReduceScatter { op }, dtype);
                    compare(c, &stream, scatter, &[whole], &[vec![0; LONG]]);
                    compare(c, &stream, scatter, &parts, &[vec![0; LONG]]);
                }
            }
            // Several sets, and an end that is no border.
            compare(c, &stream, (SUM, DType::F32), &[], &[bits(seed, ROUNDS)]);
            let told = devices(c);
            let refusal = "do not reach each other (rank 0: told not to by GRADWIRE_CUDA_DIRECT=0)";
            let brought = "; 16 MiB for what is brought to the device, folded there (NVRTC 99.1, sm_90)";
            assert!(told[1].contains(refusal) && told[1].ends_with(brought), "{told:?}");
            assert!(told[2].contains("folded on the devices wherever a kernel does (rank 0 was told to"), "{told:?}");
        });
        let calls = if way == Way::Tcp && size == 3 { TYPES.len() * (OPS.len() + 2) } else { 3 };
        assert!(double.count(Counter::Launches) > calls as i64 * i64::from(size), "{way:?}");
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn one_rank_that_is_told_to_fold_on_hosts_is_enough_whether_devices_reach_each_other_or_not() {
    for (way, direct) in [(Way::Segment, true), (Way::Tcp, true), (Way::Shm, false)] {
        let double = Double::new(1);
        let own = |rank| if rank == Rank(1) { on_hosts(&double) } else { settings(&double) };
        let own = |rank| Settings { cuda_direct: direct, ..own(rank) };
        group_of(3, way, own, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            compare(c, &stream, (SUM, DType::F32), &[], &[bits(c.rank().0.into(), ROUNDS)]);
            let told = devices(c);
            let words = "reductions staged (rank 1: told not to by GRADWIRE_CUDA_REDUCE=host)";
            assert_eq!(told[1].contains(words), way == Way::Segment, "{told:?}");
            let explained = c.explain(&SUM, DType::F32, LONG).reason;
            let words = "; CUDA tensors are folded on the hosts (rank 1: told not to by GRADWIRE_CUDA_REDUCE=host)";
            assert!(explained.ends_with(words), "{explained}");
            let short = c.explain(&SUM, DType::F32, 4 << 20).reason;
            assert!(!c.explain(&Collective::AllGather, DType::F32, LONG).reason.contains("CUDA"));
            assert!(
                short.ends_with("; CUDA tensors are folded on the hosts (a rank may hand in its host's memory)"),
                "{short}"
            );
        });
        assert_eq!((double.held(), double.count(Counter::Launches)), ([0; 7], 0), "{way:?}");
    }
}

/// Ranks that all have measured, over links of which a byte takes so long.
fn measured<T: Send>(doubles: &[Double], way: Way, byte_ns: f64, body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    let own = |rank: Rank| Settings { cuda_reduce: None, ..settings(&doubles[rank.index() % doubles.len()]) };
    let change = |group: Group| {
        let near = LinkCost { latency_ns: 1e3, message_ns: 1e3, byte_ns };
        Group { costs: LinkCosts { near, far: near, ..LinkCosts::default() }, ..group }
    };
    group_changed(2, way, own, change, body)
}

#[test]
fn all_ranks_fold_where_the_slowest_takes_less_and_say_so_with_the_same_figures() {
    // By slow links, what devices lend each other is quicker; by a slow device that all has to pass twice, the hosts are.
    for (way, byte_ns, delay_us, place) in [(Way::Segment, 500.0, 0, "devices"), (Way::Tcp, 0.1, 20_000, "hosts")] {
        let doubles = if way == Way::Tcp { vec![Double::new(1), Double::new(1)] } else { vec![Double::new(1)] };
        doubles[doubles.len() - 1].set(Setting::DelayUs, delay_us);
        let told = measured(&doubles, way, byte_ns, |c| {
            let double = &doubles[c.rank().index() % doubles.len()];
            let stream = Stream::new(&device(double, 0)).unwrap();
            assert!(!c.explain(&SUM, DType::F32, LONG).reason.contains("CUDA"), "nothing is known yet");
            let given = bits(c.rank().0.into(), LONG);
            compare(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&given));
            let before = double.count(Counter::Launches);
            c.run(common::call(Collective::Barrier, &[], &[])).unwrap();
            compare(c, &stream, (SUM, DType::F32), &[], &[given]);
            c.run(common::call(Collective::Barrier, &[], &[])).unwrap();
            let launched = double.count(Counter::Launches) - before;
            assert_eq!(launched > 0, place == "devices", "{launched} by {way:?}");
            let explained = c.explain(&SUM, DType::F32, LONG).reason;
            assert!(
                explained.contains(&format!("; CUDA tensors are folded on the {place} (expected: ")),
                "{explained}"
            );
            devices(c).pop().unwrap()
        });
        assert!(told[0].contains("the slowest rank's host folds float32 at") && told[0].contains(" GB/s"), "{told:?}");
        assert_eq!(told[0], told[1]);
        assert!(doubles.iter().all(|double| double.held() == [0; 7] && double.count(Counter::Launches) > 0));
    }
}

#[test]
fn what_is_reached_by_a_card_is_measured_by_it() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let own = |_| Settings { cuda_reduce: None, ..settings(&double) };
    let told = group_over_verbs(3, &fabric, own, |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let given = bits(c.rank().0.into(), LONG);
        let came = || c.describe().links.iter().map(|link| link.traffic.received_bytes).sum::<u64>();
        let before = came();
        compare(c, &stream, (Collective::Broadcast { root: Rank(2) }, DType::F32), &[], std::slice::from_ref(&given));
        // A root is brought nothing else: four times two thirds of 2 MiB.
        assert!(c.rank() != Rank(2) || came() - before > 5 << 20, "{} bytes came", came() - before);
        compare(c, &stream, (SUM, DType::F32), &[], &[given]);
        devices(c).pop().unwrap()
    });
    let others = |told: &String| told.contains(", others' ") && told.contains("all_reduce of 8 MiB on the ");
    assert!(told.iter().all(|words| others(words) && *words == told[0]), "{told:?}");
    assert!(double.count(Counter::Flushes) > 0, "the card has read devices");
    assert_eq!((double.held(), fabric.queue_pairs()), ([0; 7], 0));
}

#[test]
fn a_device_that_cannot_be_measured_and_a_rank_that_looks_for_nan_leave_it_to_the_hosts() {
    for fails in [true, false] {
        let double = Double::new(1);
        let own = |rank| Settings { cuda_reduce: None, check_nan: rank == Rank(1) && !fails, ..settings(&double) };
        if fails {
            double.fail(Failing::Launch, 0, 719);
        }
        group_of(2, Way::Tcp, own, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            compare(c, &stream, (SUM, DType::I32), &[], &[bits(c.rank().0.into(), LONG)]);
            let explained = c.explain(&SUM, DType::F32, LONG).reason;
            let words = if fails {
                "on the hosts (rank 0: measuring: cuLaunchKernel failed on CUDA device 0"
            } else {
                "on the hosts (rank 1: GRADWIRE_CHECK_NAN=1 looks through what hosts fold)"
            };
            assert!(explained.contains(words), "{explained}");
        });
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn streams_are_ordered_around_what_is_brought_to_devices() {
    let double = Double::new(1);
    double.set(Setting::DelayUs, 300);
    group(2, Way::Tcp, settings(&double), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let floats = |value: usize| (value as f32).to_le_bytes().repeat(LONG / 4);
        let (memory, _coming) = put(&stream, &floats(0));
        let (mut reads, mut writes, mut calls) = (Vec::new(), Vec::new(), Vec::new());
        for step in 1..6 {
            writes.push(overwrite(&stream, &memory, &floats(step)));
            let (collective, dtype) = (SUM, DType::F32);
            let call = DeviceCall { collective, dtype, input: vec![], output: vec![all(&memory)], timeout: None };
            let pending = c.start_on_device(call, &stream).unwrap();
            assert!(pending.order(&stream).unwrap());
            let host = stream.device().pin(memory.len()).unwrap();
            reads.push(stream.copy_out(all(&memory), host.write(0..memory.len()).unwrap()).unwrap());
            calls.push(pending);
        }
        for (step, read) in (1..).zip(reads) {
            assert!(read.wait(soon()).unwrap().to_vec() == floats(2 * step), "step {step}");
        }
        assert!(calls.iter().all(|call| call.wait(None).unwrap().is_ok()));
    });
    assert!(double.count(Counter::Launches) >= 10);
    assert_eq!(double.held(), [0; 7]);
}

#[test]
fn without_the_order_of_ranks_whole_numbers_and_what_is_exact_are_the_same_at_both_places() {
    let double = Double::new(1);
    let mut results = Vec::new();
    for place in [FoldPlace::Device, FoldPlace::Host] {
        let own = Settings { deterministic: false, cuda_reduce: Some(place), ..settings(&double) };
        results.push(group(3, Way::Tcp, own, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let reduced = |dtype, op| {
                let (memory, _coming) = put(&stream, &small(dtype, c.rank().0.into(), LONG));
                let call = (Collective::AllReduce { op }, dtype);
                on_device(c, &stream, call, &[], std::slice::from_ref(&memory)).unwrap();
                get(&stream, &memory)
            };
            [
                reduced(DType::F32, Reduction::Sum),
                reduced(DType::I64, Reduction::Product),
                reduced(DType::BF16, Reduction::Avg),
            ]
        }));
    }
    assert!(results[0] == results[1]);
    assert!(double.count(Counter::Launches) >= 9);
}

#[test]
fn a_rank_that_calls_something_else_is_named_on_all() {
    for (collective, dtype, bytes, words) in [
        (Collective::AllReduce { op: Reduction::Max }, DType::F32, LONG, "all_reduce max of 1179654 float32"),
        (SUM, DType::I32, LONG, "all_reduce sum of 1179654 int32"),
        (SUM, DType::F32, LONG + 4, "all_reduce sum of 1179655 float32"),
        (SUM, DType::F32, 3 * LONG, "all_reduce sum of 3538962 float32"),
    ] {
        let double = Double::new(1);
        let plain = Settings { deterministic: false, ..settings(&double) };
        let errors = group(2, Way::Tcp, plain, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let call = |call, bytes| on_device(c, &stream, call, &[], &[put(&stream, &bits(1, bytes)).0]);
            call((SUM, DType::F32), LONG).unwrap();
            let other = c.rank() == Rank(1);
            call(if other { (collective, dtype) } else { (SUM, DType::F32) }, if other { bytes } else { LONG })
                .unwrap_err()
        });
        for error in errors {
            assert_eq!(common::blamed(&error), [Rank(1)]);
            assert!(error.to_string().contains(words), "{error}");
        }
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn a_copy_or_a_launch_that_fails_on_one_rank_ends_the_group_on_all_and_nothing_is_left_behind() {
    for (failing, words) in [(Failing::CopyIn, "cuMemcpyHtoDAsync"), (Failing::Launch, "cuLaunchKernel")] {
        let doubles = [Double::new(1), Double::new(1)];
        let own = |rank: Rank| settings(&doubles[rank.index()]);
        let errors = group_of(2, Way::Tcp, own, |c| {
            let double = &doubles[c.rank().index()];
            let stream = Stream::new(&device(double, 0)).unwrap();
            let (memory, _coming) = put(&stream, &bits(1, ROUNDS));
            if c.rank() == Rank(1) {
                double.fail(failing, 1, 999);
            }
            on_device(c, &stream, (SUM, DType::F32), &[], &[memory]).unwrap_err().to_string()
        });
        assert!(errors[1].contains(words), "{errors:?}");
        assert!(errors[0].contains("rank 1") && errors[0].contains(words), "{errors:?}");
        assert_eq!(doubles.map(|double| double.held()), [[0; 7]; 2]);
    }
}
