//! Ranks that lend each other memory of their CUDA devices, on one host and over RDMA, against a double of the driver whose kernels are
//! those of fold.cu: the bits that the host's processors make, nothing by way of the host, and what is done where one rank cannot.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

#[path = "common/beside_host.rs"]
mod beside_host;
mod common;
#[path = "../../transport/tests/cuda/double.rs"]
mod double;
#[path = "common/on_device.rs"]
mod on_device;

use beside_host::{LONG, ROUNDS, SUM, bits, compare, on_device, on_host, on_hosts, settings};
use common::{Way, group, group_of, group_over_verbs};
use double::{Counter, Double, Failing, Setting};
use gradwire_collectives::{Call, Collective, Communicator, DType, DeviceCall, Reduction, Settings};
use gradwire_transport::Rank;
use gradwire_transport::cuda::Stream;
use gradwire_transport::verbs::Fabric;
use on_device::{all, device, get, overwrite, put, soon};
use std::time::Duration;

#[test]
fn every_kernel_makes_the_bits_that_the_host_makes() {
    let double = Double::new(2);
    for size in [2, 3] {
        group(size, Way::Segment, settings(&double), |c| {
            let stream = Stream::new(&device(&double, c.rank().0 % 2)).unwrap();
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64] {
                for op in [Reduction::Sum, Reduction::Avg, Reduction::Product, Reduction::Min, Reduction::Max] {
                    // Its end is not on a border of 16 bytes.
                    let own = bits(u64::from(c.rank().0) + 100 * u64::from(op as u32 as u8), LONG);
                    compare(c, &stream, (Collective::AllReduce { op }, dtype), &[], &[own]);
                }
            }
            let words = c.describe().to_string();
            assert!(
                words.contains("from device to device by CUDA IPC, 32 MiB lent, folded there (NVRTC 99.1, sm_90)"),
                "{words}"
            );
        });
        assert!(double.count(Counter::Launches) >= 30 * i64::from(size), "every reduction was made on the device");
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn memory_off_the_border_of_16_bytes_is_folded_one_by_one_to_the_same_bits() {
    let double = Double::new(1);
    group(3, Way::Segment, settings(&double), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64] {
            for op in [Reduction::Sum, Reduction::Avg, Reduction::Product, Reduction::Min, Reduction::Max] {
                let (collective, off) = (Collective::ReduceScatter { op }, dtype.bytes());
                let whole = bits(c.rank().0.into(), LONG * 3);
                let (input, _coming) = put(&stream, &whole);
                let (memory, _going) = put(&stream, &vec![7; off + LONG]);
                let output = vec![memory.slice(off..off + LONG).unwrap()];
                let call = DeviceCall { collective, dtype, input: vec![all(&input)], output, timeout: None };
                c.start_on_device(call, &stream).unwrap().wait(None).unwrap().unwrap();
                let expected = on_host(c, (collective, dtype), &[whole], &[vec![0; LONG]]);
                let got = get(&stream, &memory);
                assert!(got[..off] == vec![7; off] && got[off..] == expected[0], "{op:?} of {dtype}");
            }
        }
    });
    assert!(double.count(Counter::Launches) >= 3 * 30);
}

/// Every collective of several rounds, against the same over the host's memory.
fn every_collective(double: &Double, c: &Communicator) {
    let (n, op) = (c.world_size().get() as usize, Reduction::Sum);
    let root = Rank(c.world_size().get() - 1);
    let stream = Stream::new(&device(double, 0)).unwrap();
    let part = ROUNDS / n / 4 * 4;
    let own = bits(c.rank().0.into(), part);
    let whole = bits(c.rank().0.into(), part * n);
    let parts: Vec<_> = whole.chunks(part).map(<[u8]>::to_vec).collect();
    let zeros = |bytes: usize| vec![0; bytes];
    for collective in [Collective::AllReduce { op }, Collective::Reduce { op, root }, Collective::Broadcast { root }] {
        compare(c, &stream, (collective, DType::F32), &[], std::slice::from_ref(&whole));
    }
    let one = std::slice::from_ref(&own);
    compare(c, &stream, (Collective::AllGather, DType::F32), one, &[zeros(part * n)]);
    compare(c, &stream, (Collective::AllGather, DType::U8), one, &vec![zeros(part); n]);
    compare(c, &stream, (Collective::ReduceScatter { op }, DType::F32), std::slice::from_ref(&whole), &[zeros(part)]);
    compare(c, &stream, (Collective::ReduceScatter { op }, DType::F32), &parts, &[zeros(part)]);
    compare(c, &stream, (Collective::AllToAll, DType::F32), std::slice::from_ref(&whole), &[zeros(part * n)]);
}

#[test]
fn every_collective_goes_from_device_to_device_in_several_rounds() {
    for size in [2, 3] {
        let double = Double::new(1);
        group(size, Way::Segment, settings(&double), |c| every_collective(&double, c));
        assert!(double.count(Counter::Launches) > 0);
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn over_rdma_the_card_reads_other_hosts_devices_and_no_byte_comes_to_the_host() {
    for size in [2, 3] {
        let (double, fabric) = (Double::new(1), Fabric::default());
        double.set(Setting::DmaBuf, 1);
        fabric.take_dma_bufs();
        group_over_verbs(
            size,
            &fabric,
            |_| settings(&double),
            |c| {
                every_collective(&double, c);
                let words = c.describe().to_string();
                let way = "from device to device by GPU-direct RDMA by dma-buf of loopback port";
                assert!(words.contains(way) && words.contains(", 48 MiB lent, folded there"), "{words}");
                // A ring's bytes: what the others have of this rank's part, and the others' parts; and next to nothing else.
                let stream = Stream::new(&device(&double, 0)).unwrap();
                let (memory, _coming) = put(&stream, &vec![0; ROUNDS]);
                let before = c.describe().links.iter().map(|link| link.traffic.received_bytes).sum::<u64>();
                on_device(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&memory)).unwrap();
                let came = c.describe().links.iter().map(|link| link.traffic.received_bytes).sum::<u64>() - before;
                let ring = 2 * (ROUNDS / size as usize * (size as usize - 1)) as u64;
                assert!(came.abs_diff(ring) < 64 << 10, "{came} bytes came, of {ring}");
            },
        );
        assert!(double.count(Counter::Launches) > 0 && double.count(Counter::Flushes) > 0);
        assert_eq!((double.held(), fabric.queue_pairs()), ([0; 7], 0));
    }
}

#[test]
fn shorter_calls_go_from_device_to_device_above_the_bytes_from_which_all_are_alike() {
    let (double, fabric, alike) = (Double::new(1), Fabric::default(), 64 << 10);
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let own = |_| Settings { cuda_alike: alike, ..settings(&double) };
    group_over_verbs(2, &fabric, own, |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let (seed, op) = (u64::from(c.rank().0), Reduction::Avg);
        let launches = |calls: &dyn Fn()| {
            let barrier = || c.run(common::call(Collective::Barrier, &[], &[])).unwrap();
            barrier();
            let before = double.count(Counter::Launches);
            barrier();
            calls();
            barrier();
            let launched = double.count(Counter::Launches) - before;
            barrier();
            launched
        };
        let reduce = |bytes| compare(c, &stream, (SUM, DType::F32), &[], &[bits(seed, bytes)]);
        assert_eq!(launches(&|| reduce(alike + 4)), 2);
        let parts = [bits(seed, alike), bits(seed + 7, alike)];
        let scatter = || compare(c, &stream, (Collective::ReduceScatter { op }, DType::F32), &parts, &[vec![0; alike]]);
        assert_eq!(launches(&scatter), 2);
        compare(c, &stream, (Collective::AllGather, DType::F32), &parts[..1], &vec![vec![0; alike]; 2]);
        compare(
            c,
            &stream,
            (Collective::Gather { root: Rank(0) }, DType::F32),
            &parts[..1],
            &[vec![0; alike], vec![0; alike]][..2 - 2 * seed as usize],
        );
        // Up to there, a rank may hand in its host's memory.
        let given = bits(seed, alike);
        let mixed = || {
            if c.rank() == Rank(1) {
                on_host(c, (SUM, DType::F32), &[], std::slice::from_ref(&given));
            } else {
                let (memory, _coming) = put(&stream, &given);
                on_device(c, &stream, (SUM, DType::F32), &[], &[memory]).unwrap();
            }
        };
        assert_eq!(launches(&mixed), 0);
        assert!(c.explain(&SUM, DType::F32, alike + 4).reason.contains("folded on the devices (rank 0 was told to"));
        assert!(c.explain(&SUM, DType::F32, alike).reason.contains("on the hosts (a rank may hand in"));
    });
    assert_eq!((double.held(), fabric.queue_pairs()), ([0; 7], 0));
}

#[test]
fn a_card_that_reads_no_device_says_why_and_all_goes_by_way_of_the_host() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    double.set(Setting::DmaBuf, 1);
    group_over_verbs(
        2,
        &fabric,
        |_| on_hosts(&double),
        |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            compare(c, &stream, (SUM, DType::F32), &[], &[bits(c.rank().0.into(), LONG)]);
            let told = c.describe().to_string();
            let words = "do not reach each other (rank 0: no GPU-direct RDMA: loopback port";
            assert!(told.contains(words), "{told}");
        },
    );
    assert_eq!((double.held(), double.count(Counter::Launches)), ([0; 7], 0));
}

#[test]
fn what_was_lent_to_no_avail_is_given_back_while_the_group_goes_on() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let other = |rank: Rank| Settings { cuda_direct: rank == Rank(0), ..on_hosts(&double) };
    group_over_verbs(2, &fabric, other, |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        compare(c, &stream, (SUM, DType::F32), &[], &[bits(c.rank().0.into(), LONG)]);
        c.run(common::call(Collective::Barrier, &[], &[])).unwrap();
        // The thread that streams wait for frees nothing: that may wait for the streams.
        assert!(double.count(Counter::DeviceBytes) >= 32 << 20, "rank 0's slot");
        c.run(common::call(Collective::Barrier, &[], &[])).unwrap();
        compare(c, &stream, (SUM, DType::F32), &[], &[bits(c.rank().0.into(), LONG)]);
        c.run(common::call(Collective::Barrier, &[], &[])).unwrap();
        assert!(double.count(Counter::DeviceBytes) < 32 << 20, "both ranks' tensors at most");
        let told = c.describe().to_string();
        assert!(told.contains("do not reach each other (rank 1: told not to by GRADWIRE_CUDA_DIRECT=0)"), "{told}");
    });
    assert_eq!(double.held(), [0; 7]);
}

#[test]
fn a_card_that_fails_ends_the_group_on_all() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let errors = group_over_verbs(
        2,
        &fabric,
        |_| settings(&double),
        |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let (memory, _coming) = put(&stream, &bits(1, LONG));
            on_device(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&memory)).unwrap();
            let barrier = Call {
                collective: Collective::Barrier,
                dtype: DType::U8,
                input: vec![],
                output: vec![],
                timeout: None,
            };
            c.run(barrier.clone()).unwrap();
            if c.rank() == Rank(0) {
                fabric.go_down();
            }
            // Messages go on by sockets; what only the card can do ends here.
            c.run(barrier).unwrap();
            on_device(c, &stream, (SUM, DType::F32), &[], &[memory]).unwrap_err().to_string()
        },
    );
    assert!(errors.iter().any(|error| error.contains("no RDMA any more")), "{errors:?}");
    assert_eq!(double.held(), [0; 7]);
}

#[test]
fn where_one_rank_lends_nothing_or_has_no_compiler_all_go_by_way_of_the_host() {
    let double = Double::new(1);
    let missing = || double.path().with_extension("missing");
    let own = |rank: Rank, other: Settings| if rank == Rank(1) { other } else { settings(&double) };
    let cases = [
        (
            Settings { cuda_direct: false, ..on_hosts(&double) },
            "staged too, as devices do not reach each other (rank 1: told not to by GRADWIRE_CUDA_DIRECT=0",
        ),
        (Settings { nvrtc: Some(missing()), ..settings(&double) }, "by CUDA IPC, 32 MiB lent, reductions staged ("),
    ];
    for (other, words) in cases {
        group_of(
            2,
            Way::Segment,
            |rank| own(rank, other.clone()),
            |c| {
                let stream = Stream::new(&device(&double, 0)).unwrap();
                let given = bits(c.rank().0.into(), LONG);
                compare(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&given));
                compare(c, &stream, (Collective::Broadcast { root: Rank(1) }, DType::F32), &[], &[given]);
                let told = c.describe().to_string();
                assert!(told.contains(words), "{told}");
            },
        );
    }
    // What the driver or the compiler refuses is told, too.
    for (failing, code, words) in [
        (
            Failing::Share,
            801,
            "reach each other (rank 0: cuIpcGetMemHandle failed on CUDA device 0: an error that it does not name (801)",
        ),
        (Failing::Compile, 6, "reductions staged (no kernels for CUDA devices: "),
    ] {
        double.fail(failing, 0, code);
        group(2, Way::Segment, settings(&double), |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            // Another type than before: what was compiled once stays.
            compare(c, &stream, (SUM, DType::F32), &[], &[bits(c.rank().0.into(), LONG)]);
            let told = c.describe().to_string();
            assert!(told.contains(words) || failing as i64 == Failing::Compile as i64, "{told}");
        });
        double.fail_no_more();
    }
    // Once each where devices lend each other nothing, by what is brought to them, and once each where what was compiled stayed.
    assert_eq!((double.held(), double.count(Counter::Launches)), ([0; 7], 4));
}

#[test]
fn streams_are_ordered_around_what_devices_lend_each_other() {
    let double = Double::new(1);
    double.set(Setting::DelayUs, 300);
    group(2, Way::Segment, settings(&double), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let floats = |value: usize| (value as f32).to_le_bytes().repeat(LONG / 4);
        let (memory, _coming) = put(&stream, &floats(0));
        let (mut reads, mut writes, mut calls) = (Vec::new(), Vec::new(), Vec::new());
        for step in 1..6 {
            writes.push(overwrite(&stream, &memory, &floats(step)));
            let call = DeviceCall {
                collective: SUM,
                dtype: DType::F32,
                input: vec![],
                output: vec![all(&memory)],
                timeout: None,
            };
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
    assert_eq!(double.held(), [0; 7]);
}

#[test]
fn a_launch_that_fails_or_another_device_ends_the_group_on_all_and_nothing_is_left_behind() {
    for other_device in [false, true] {
        let double = Double::new(2);
        let errors = group(2, Way::Segment, settings(&double), |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let (memory, _coming) = put(&stream, &bits(1, LONG));
            on_device(c, &stream, (SUM, DType::F32), &[], std::slice::from_ref(&memory)).unwrap();
            let second = Stream::new(&device(&double, 1)).unwrap();
            let (elsewhere, _going) = put(&second, &bits(1, LONG));
            c.run(Call {
                collective: Collective::Barrier,
                dtype: DType::U8,
                input: vec![],
                output: vec![],
                timeout: None,
            })
            .unwrap();
            if c.rank() == Rank(1) && other_device {
                return on_device(c, &second, (SUM, DType::F32), &[], &[elsewhere]).unwrap_err();
            }
            if !other_device {
                double.fail(Failing::Launch, 1, 719);
            }
            on_device(c, &stream, (SUM, DType::F32), &[], &[memory]).unwrap_err()
        });
        let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        let words =
            if other_device { "go by memory of device 0, and this one is on device 1" } else { "cuLaunchKernel" };
        assert!(errors.iter().all(|error| error.to_string().contains(words)), "{text}");
        assert_eq!(double.held(), [0; 7]);
    }
}

#[test]
fn a_rank_that_never_calls_is_named_by_those_that_wait_for_it() {
    let double = Double::new(1);
    let errors = group(2, Way::Segment, settings(&double), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let (memory, _coming) = put(&stream, &bits(1, LONG));
        let timeout = Some(Duration::from_millis(300));
        let call =
            DeviceCall { collective: SUM, dtype: DType::F32, input: vec![], output: vec![all(&memory)], timeout };
        if c.rank() == Rank(1) {
            std::thread::sleep(Duration::from_millis(900));
            return None;
        }
        c.start_on_device(call, &stream).unwrap().wait(None).unwrap().err()
    });
    assert_eq!(common::blamed(errors[0].as_ref().unwrap()), [Rank(1)]);
}

#[test]
fn a_rank_that_calls_something_else_is_named_on_all() {
    let calls = [
        (Collective::AllReduce { op: Reduction::Max }, DType::F32, LONG, "all_reduce max of 1179654 float32"),
        (SUM, DType::I32, LONG, "all_reduce sum of 1179654 int32"),
        (SUM, DType::F32, LONG + 4, "all_reduce sum of 1179655 float32"),
        (Collective::Broadcast { root: Rank(1) }, DType::F32, LONG, "broadcast of 1179654 float32 with root 1"),
    ];
    for (collective, dtype, bytes, words) in calls {
        let double = Double::new(1);
        let plain = Settings { deterministic: false, ..settings(&double) };
        let errors = group(2, Way::Segment, plain, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            let (memory, _coming) = put(&stream, &bits(1, bytes));
            let (whole, other) = (memory.slice(0..LONG).unwrap(), c.rank() == Rank(1));
            on_device(c, &stream, (SUM, DType::F32), &[], &[put(&stream, &bits(2, LONG)).0]).unwrap();
            let (collective, dtype) = if other { (collective, dtype) } else { (SUM, DType::F32) };
            let output = vec![if other { all(&memory) } else { whole }];
            let call = DeviceCall { collective, dtype, input: vec![], output, timeout: None };
            c.start_on_device(call, &stream).unwrap().wait(None).unwrap().unwrap_err()
        });
        for error in errors {
            assert_eq!(common::blamed(&error), [Rank(1)]);
            assert!(error.to_string().contains(words), "{error}");
        }
        assert_eq!(double.held(), [0; 7]);
    }
}
