//! Collectives and messages over memory of CUDA devices, against a double of the driver whose streams run by themselves: the same
//! bits as over the host's memory, in the order of the callers' streams, with nothing left behind.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod common;
#[path = "../../transport/tests/cuda/double.rs"]
mod double;
#[path = "common/on_device.rs"]
mod on_device;

use common::{Way, group};
use double::{Double, Failing, Setting};
use gradwire_collectives::{
    Call, Collective, CollectiveError, Communicator, DType, DeviceCall, Pending, Piece, Reduction, Settings,
};
use gradwire_transport::cuda::{CudaError, DeviceMemory, Stream};
use gradwire_transport::{Rank, Region};
use on_device::{all, device, get, overwrite, put, soon};
use std::sync::Arc;
use std::time::Duration;

/// 4 MiB and a half of floats: two rounds of an all-reduce, and not the same length.
const LONG: usize = (9 << 20) / 8;

/// Thirds, which each order of a sum rounds in its own way; each tells its rank and place.
fn thirds(rank: u32, len: usize) -> Vec<u8> {
    (0..len).flat_map(|i| ((rank as usize * 1000 + i % 997) as f32 / 3.0).to_le_bytes()).collect()
}

fn on_device(
    c: &Communicator,
    stream: &Stream,
    collective: &Collective,
    input: &[&Arc<DeviceMemory>],
    output: &[&Arc<DeviceMemory>],
) -> Result<Pending, CollectiveError> {
    let slices = |memory: &[&Arc<DeviceMemory>]| memory.iter().map(|one| all(one)).collect();
    let (input, output) = (slices(input), slices(output));
    let call = DeviceCall { collective: *collective, dtype: DType::F32, input, output, timeout: None };
    c.start_on_device(call, stream)
}

fn on_host(c: &Communicator, collective: &Collective, input: &[Vec<u8>], output: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let regions = |all: &[Vec<u8>]| all.iter().map(|bytes| Region::from_vec(bytes.clone())).collect::<Vec<_>>();
    let (input, output) = (regions(input), regions(output));
    let pieces = |all: &[Arc<Region>]| all.iter().map(|region| Piece::whole(Arc::clone(region))).collect();
    let (ins, outs) = (pieces(&input), pieces(&output));
    c.run(Call { collective: *collective, dtype: DType::F32, input: ins, output: outs, timeout: None }).unwrap();
    output.iter().map(|region| region.read(0..region.len()).unwrap().to_vec()).collect()
}

/// One call on the device and on the host: the same bits.
fn compare(c: &Communicator, stream: &Stream, collective: &Collective, input: &[Vec<u8>], output: &[Vec<u8>]) {
    let place = |all: &[Vec<u8>]| all.iter().map(|bytes| put(stream, bytes)).unzip::<_, _, Vec<_>, Vec<_>>();
    let ((ins, _coming), (outs, _going)) = (place(input), place(output));
    let pending = on_device(c, stream, collective, &ins.iter().collect::<Vec<_>>(), &outs.iter().collect::<Vec<_>>());
    assert_eq!(pending.unwrap().wait(None).unwrap().err().map(|error| error.to_string()), None);
    let expected = on_host(c, collective, input, output);
    for (memory, expected) in outs.iter().zip(&expected) {
        assert!(get(stream, memory) == *expected, "{collective:?} of {} and {} bytes", memory.len(), expected.len());
    }
}

#[test]
fn every_collective_gives_the_bits_that_it_gives_over_the_hosts_memory() {
    let double = Double::new(2);
    for (way, size) in [(Way::Tcp, 2), (Way::Tcp, 3), (Way::Segment, 2), (Way::Shm, 3), (Way::Tcp, 1)] {
        let settings = Settings { deterministic: true, nvrtc: Some(double.path()), ..Settings::default() };
        group(size, way, settings, |c| {
            let (rank, n, root) = (c.rank().0, size as usize, Rank(size - 1));
            let stream = Stream::new(&device(&double, rank % 2)).unwrap();
            let at_root = |all: Vec<Vec<u8>>| if c.rank() == root { all } else { vec![] };
            for len in [0, 1, 1000, LONG] {
                let own = thirds(rank, len);
                let short = thirds(rank, len / n);
                let both = [vec![thirds(rank, len / n * n)], (0..n).map(|_| short.clone()).collect()];
                let op = Reduction::Avg;
                for collective in
                    [Collective::AllReduce { op }, Collective::Reduce { op, root }, Collective::Broadcast { root }]
                {
                    compare(c, &stream, &collective, &[], std::slice::from_ref(&own));
                }
                for parts in both {
                    let zeros: Vec<_> = parts.iter().map(|part| vec![0; part.len()]).collect();
                    let (one, out) = ([short.clone()], [vec![0; short.len()]]);
                    compare(c, &stream, &Collective::AllGather, &one, &zeros);
                    compare(c, &stream, &Collective::ReduceScatter { op }, &parts, &out);
                    compare(c, &stream, &Collective::AllToAll, &parts, &zeros);
                    compare(c, &stream, &Collective::Gather { root }, &one, &at_root(zeros));
                    compare(c, &stream, &Collective::Scatter { root }, &at_root(parts), &out);
                }
            }
        });
    }
    assert_eq!(double.held(), [0; 7]);
}

#[test]
fn streams_are_ordered_while_the_host_waits_for_nothing() {
    let double = Double::new(1);
    double.set(Setting::DelayUs, 300);
    let op = Reduction::Sum;
    group(2, Way::Tcp, Settings::default(), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let floats = |value: usize| (value as f32).to_le_bytes().repeat(LONG);
        let (memory, _coming) = put(&stream, &floats(0));
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        let mut calls = Vec::new();
        for step in 1..6 {
            // Written, reduced and read by the stream's order alone; each step overwrites what the one before it reads.
            writes.push(overwrite(&stream, &memory, &floats(step)));
            let pending = on_device(c, &stream, &Collective::AllReduce { op }, &[], &[&memory]).unwrap();
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
}

#[test]
fn a_device_without_gates_says_so_and_waiting_brings_the_results_for_every_stream() {
    let double = Double::new(1);
    double.set(Setting::StreamValues, 0);
    group(2, Way::Segment, Settings::default(), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let (memory, _coming) = put(&stream, &1f32.to_le_bytes().repeat(10));
        let op = Reduction::Sum;
        let pending = on_device(c, &stream, &Collective::AllReduce { op }, &[], &[&memory]).unwrap();
        assert!(!pending.order(&stream).unwrap());
        pending.wait(None).unwrap().unwrap();
        assert_eq!(get(&Stream::new(stream.device()).unwrap(), &memory), 2f32.to_le_bytes().repeat(10));
        assert!(c.describe().to_string().contains("CUDA device 0 (Double 0): staged by 4 pinned buffers of 4 MiB"));
    });
}

#[test]
fn calls_over_the_hosts_memory_keep_their_place_among_those_over_a_device() {
    let double = Double::new(1);
    double.set(Setting::DelayUs, 2000);
    group(3, Way::Tcp, Settings::default(), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let op = Reduction::Sum;
        for _ in 0..3 {
            let (memory, _coming) = put(&stream, &thirds(1, LONG));
            let pending = on_device(c, &stream, &Collective::AllReduce { op }, &[], &[&memory]).unwrap();
            let host = on_host(c, &Collective::AllReduce { op }, &[], &[1f32.to_le_bytes().repeat(5)]);
            assert_eq!(host, [3f32.to_le_bytes().repeat(5)]);
            pending.wait(None).unwrap().unwrap();
        }
    });
}

#[test]
fn messages_go_between_devices_and_the_hosts_memory() {
    let double = Double::new(1);
    group(2, Way::Tcp, Settings::default(), |c| {
        let stream = Stream::new(&device(&double, 0)).unwrap();
        let (me, peer) = (c.rank().0, Rank(1 - c.rank().0));
        for bytes in [0, 1, 5000, 6 << 20] {
            let memory = DeviceMemory::allocate(stream.device(), bytes).unwrap();
            let coming = c.recv_to_device(Some(peer), 7, all(&memory), &stream, None).unwrap();
            let (own, _coming) = put(&stream, &vec![me as u8 + 1; bytes]);
            c.send_from_device(peer, 7, all(&own), &stream, None).unwrap().wait(None).unwrap().unwrap();
            assert_eq!(coming.wait(None).unwrap().unwrap().source, Some(peer));
            assert!(get(&stream, &memory) == vec![peer.0 as u8 + 1; bytes]);
            let host = Region::zeroed(bytes);
            let coming = c.recv(None, 8, Piece::whole(Arc::clone(&host)), None).unwrap();
            c.send_from_device(peer, 8, all(&own), &stream, None).unwrap().wait(None).unwrap().unwrap();
            coming.wait(None).unwrap().unwrap();
            assert!(host.read(0..bytes).unwrap().iter().all(|byte| *byte == peer.0 as u8 + 1));
        }
    });
    assert_eq!(double.held(), [0; 7]);
}

#[test]
fn a_copy_that_fails_on_one_rank_ends_the_group_on_all_and_lets_streams_through() {
    let doubles = [Double::new(1), Double::new(1)];
    let errors = group(2, Way::Tcp, Settings::default(), |c| {
        let double = &doubles[c.rank().index()];
        let stream = Stream::new(&device(double, 0)).unwrap();
        let (memory, _coming) = put(&stream, &thirds(0, 4 * LONG));
        if c.rank().0 == 1 {
            double.fail(Failing::CopyIn, 1, 999);
        }
        let op = Reduction::Sum;
        let pending = on_device(c, &stream, &Collective::AllReduce { op }, &[], &[&memory]).unwrap();
        assert!(pending.order(&stream).unwrap());
        let error = pending.wait(None).unwrap().unwrap_err();
        stream.mark().unwrap().wait("the gate", soon()).unwrap();
        error
    });
    assert!(matches!(errors[1], CollectiveError::Cuda(CudaError::Refused { call: "cuMemcpyHtoDAsync", .. })));
    let text = errors[0].to_string();
    assert!(text.contains("rank 1") && text.contains("cuMemcpyHtoDAsync"), "{text}");
    assert_eq!(doubles.map(|double| double.held()), [[0; 7]; 2]);
}

#[test]
fn a_stream_that_never_comes_to_it_is_a_time_out_and_mistakes_are_told_before_anything_is_sent() {
    let double = Double::new(2);
    group(1, Way::Tcp, Settings::default(), |c| {
        let (first, second) = (device(&double, 0), device(&double, 1));
        let (stream, other) = (Stream::new(&first).unwrap(), Stream::new(&second).unwrap());
        let (memory, _coming) = put(&stream, &[0; 12]);
        let op = Reduction::Sum;
        let text = on_device(c, &other, &Collective::AllReduce { op }, &[], &[&memory]).err().unwrap().to_string();
        assert!(text.contains("the stream is of device 1, and a tensor is on device 0"), "{text}");
        let refused = on_device(c, &stream, &Collective::AllReduce { op }, &[&memory, &memory], &[]);
        assert!(matches!(refused, Err(CollectiveError::Invalid { .. })));
        let gate = gradwire_transport::cuda::Gate::new(&first).unwrap();
        assert!(gate.hold(&stream, 1).unwrap());
        let call = DeviceCall {
            collective: Collective::AllReduce { op },
            dtype: DType::F32,
            input: vec![],
            output: vec![all(&memory)],
            timeout: Some(Duration::from_millis(50)),
        };
        let pending = c.start_on_device(call, &stream).unwrap();
        let opener = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pending.wait(Some(Duration::from_millis(500))));
            let early = waiting.join().unwrap();
            gate.open(1);
            early.unwrap_or_else(|| pending.wait(None).unwrap())
        });
        assert!(matches!(opener, Err(CollectiveError::Cuda(CudaError::Timeout { what: "a copy", .. }))), "{opener:?}");
    });
    assert_eq!(double.held(), [0; 7]);
}

/// An all-to-all in which rank 0 alone gives no lengths, of `len` elements a part.
fn one_gives_no_lengths(c: &Communicator, stream: &Stream, len: usize) -> Result<Vec<u8>, CollectiveError> {
    let (rank, n) = (c.rank().0, c.world_size().get() as usize);
    let (given, zeros) = (thirds(rank, len * n), vec![0; len * n * 4]);
    let pieces = if rank == 0 { 1 } else { n };
    let place = |bytes: &[u8]| bytes.chunks(bytes.len() / pieces).map(|part| put(stream, part)).unzip();
    let ((ins, _coming), (outs, _going)): ((Vec<_>, Vec<_>), (Vec<_>, Vec<_>)) = (place(&given), place(&zeros));
    let (ins, outs): (Vec<_>, Vec<_>) = (ins.iter().collect(), outs.iter().collect());
    on_device(c, stream, &Collective::AllToAll, &ins, &outs)?.wait(None).unwrap()?;
    Ok(outs.iter().flat_map(|memory| get(stream, memory)).collect())
}

#[test]
fn short_tensors_need_not_all_be_given_lengths_and_long_ones_say_so() {
    let double = Double::new(1);
    for (way, cuda_direct) in [(Way::Tcp, true), (Way::Tcp, false), (Way::Segment, true)] {
        let algorithms = Some("all_to_all:bruck".to_owned());
        let settings = Settings { nvrtc: Some(double.path()), algorithms, cuda_direct, ..Settings::default() };
        let errors = group(3, way, settings, |c| {
            let stream = Stream::new(&device(&double, 0)).unwrap();
            for len in [1, 1000, 100_000] {
                let first = c.rank().index() * len * 4;
                let expected: Vec<u8> =
                    (0..3).flat_map(|rank| thirds(rank, len * 3)[first..first + len * 4].to_vec()).collect();
                assert!(one_gives_no_lengths(c, &stream, len).unwrap() == expected, "{way:?} {len}");
            }
            one_gives_no_lengths(c, &stream, LONG).unwrap_err().to_string()
        });
        for error in errors {
            assert!(error.contains("give them on all ranks, or on none"), "{way:?} {cuda_direct}: {error}");
        }
    }
}
