//! Does: memory of devices that a network card reads and writes itself, where it can; else the same bytes by way of the host. The
//! card is the loopback adapter, which maps what the double exports; a real one's refusal is tested in `tests/device`.

use crate::promises::{blank, filled, pattern, to, verbs_wires};
use crate::{copy_in, device, soon};
use gradwire_transport::cuda::{DeviceMemory, Stream, Way};
use gradwire_transport::verbs::{Fabric, VerbsWire};
use gradwire_transport::{Completion, Config, DeviceSided, OneSided, PeerId, RemoteSlice, Wire};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::double::{Counter, Double, Setting};

const BYTES: usize = 3 << 20;

pub(crate) fn wires(fabric: &Fabric) -> [VerbsWire; 2] {
    let wires = verbs_wires(&Config::default(), 2, || Box::new(fabric.adapter()));
    wires.try_into().unwrap_or_else(|_| unreachable!("two wires were asked for"))
}

/// The next completion of the first wire.
fn next(wires: &mut [VerbsWire; 2]) -> Completion {
    let (until, mut done) = (Instant::now() + Duration::from_secs(30), [Vec::new(), Vec::new()]);
    loop {
        for (wire, done) in wires.iter_mut().zip(&mut done) {
            wire.poll(Instant::now(), done);
        }
        assert!(done[1].is_empty(), "the other end has nothing to do: {done:?}");
        if let Some(first) = done[0].pop() {
            return first;
        }
        assert!(Instant::now() < until, "nothing came");
    }
}

fn held_by(stream: &Stream, memory: &Arc<DeviceMemory>) -> Vec<u8> {
    let host = stream.device().pin(memory.len()).unwrap();
    let whole = (memory.slice(0..memory.len()).unwrap(), host.write(0..memory.len()).unwrap());
    stream.copy_out(whole.0, whole.1).unwrap().wait(soon()).unwrap().to_vec()
}

#[test]
fn a_card_that_takes_dma_bufs_moves_bytes_between_devices_without_a_copy() {
    let (double, fabric) = (Double::new(2), Fabric::default());
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let devices = [device(&double, 0), device(&double, 1)];
    let memory = devices.each_ref().map(|device| DeviceMemory::allocate(device, BYTES).unwrap());
    let streams = devices.each_ref().map(|device| Stream::new(device).unwrap());
    for (at, seed) in [(0, 1), (1, 2)] {
        let host = devices[at].pin(BYTES).unwrap();
        host.write(0..BYTES).unwrap().copy_from_slice(&pattern(seed, BYTES));
        copy_in(&streams[at], &host, &memory[at]);
    }
    let copies = double.count(Counter::Copies);
    let mut wires = wires(&fabric);
    // Neither begins on a page, and neither is a whole allocation.
    let expose = |wire: &mut VerbsWire, memory: &Arc<DeviceMemory>| {
        let (way, remote) = wire.expose_device(memory.slice(100..BYTES - 1).unwrap());
        assert!(matches!(way, Way::DmaBuf { .. }), "{way}");
        assert!(way.to_string().contains("GPU-direct RDMA by dma-buf of loopback port"), "{way}");
        remote.unwrap()
    };
    let own = expose(&mut wires[0], &memory[0]);
    let theirs = expose(&mut wires[1], &memory[1]);
    let part = |whole: RemoteSlice, offset, bytes| RemoteSlice { offset, bytes, ..whole };
    // A put of more than one work request holds, a get, and one of a few bytes, which must not go inline.
    let more = (BYTES / 2) as u64 + 7;
    wires[0].post_put_from_device(to(1, 1, 0), part(own, 11, more), part(theirs, 5000, more)).unwrap();
    assert!(wires[0].withdraw_device(own).is_none(), "it is in use");
    assert!(matches!(next(&mut wires), Completion::Sent { .. }));
    wires[0].post_get_to_device(to(1, 2, 9), part(own, 0, 11), part(theirs, 0, 11)).unwrap();
    assert!(matches!(next(&mut wires), Completion::Received { bytes: 11, from, .. } if from.note == 9));
    wires[0].post_put_from_device(to(1, 3, 0), part(own, 2, 3), part(theirs, 4000, 3)).unwrap();
    assert!(matches!(next(&mut wires), Completion::Sent { .. }));
    assert_eq!(wires[0].traffic(PeerId(1)).sent_bytes, more + 3);
    assert_eq!(double.count(Counter::Copies), copies, "nothing is staged");
    assert_eq!(double.count(Counter::Flushes), 1, "what was fetched is flushed");
    let (first, second) = (pattern(1, BYTES), pattern(2, BYTES));
    let mut expected = [first.clone(), second.clone()];
    expected[1][5100..5100 + more as usize].copy_from_slice(&first[111..111 + more as usize]);
    expected[0][100..111].copy_from_slice(&second[100..111]);
    expected[1][4100..4103].copy_from_slice(&second[102..105]);
    for at in 0..2 {
        assert!(held_by(&streams[at], &memory[at]) == expected[at], "device {at}");
    }
    let outside = wires[0].post_put_from_device(to(1, 4, 0), part(own, own.bytes - 1, 2), theirs).unwrap_err();
    assert!(outside.to_string().contains("not exposed here"), "{outside}");
    assert_eq!(wires[0].withdraw_device(own).unwrap().len(), BYTES - 101);
    assert!(wires[0].withdraw_device(own).is_none());
    drop((wires, memory, streams, devices));
    assert_eq!((double.held(), fabric.queue_pairs()), ([0; 7], 0), "the card held the memory, and no longer does");
}

#[test]
fn host_memory_and_a_device_s_meet_in_one_access() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    double.set(Setting::DmaBuf, 1);
    fabric.take_dma_bufs();
    let device = device(&double, 0);
    let (memory, stream) = (DeviceMemory::allocate(&device, 5000).unwrap(), Stream::new(&device).unwrap());
    let mut wires = wires(&fabric);
    let remote = wires[1].expose_device(memory.slice(0..5000).unwrap()).1.unwrap();
    wires[0].post_put(to(1, 1, 0), filled(4, 5000).1, remote).unwrap();
    assert!(matches!(next(&mut wires), Completion::Sent { .. }));
    assert!(held_by(&stream, &memory) == pattern(4, 5000));
    wires[0].post_get(to(1, 2, 0), blank(5000).1, remote).unwrap();
    match next(&mut wires) {
        Completion::Received { slice, bytes: 5000, .. } => assert!(slice[..] == pattern(4, 5000)[..]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_direct_says_why_and_goes_by_the_host() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    let device = device(&double, 0);
    let (memory, stream) = (DeviceMemory::allocate(&device, 5000).unwrap(), Stream::new(&device).unwrap());
    let mut wires = wires(&fabric);
    let why = |wires: &mut [VerbsWire; 2]| match wires[1].expose_device(memory.slice(0..5000).unwrap()) {
        (Way::Staged { reason }, None) => reason,
        other => panic!("{other:?}"),
    };
    let reason = why(&mut wires);
    assert!(reason.contains("cuMemGetHandleForAddressRange failed on CUDA device 0"), "{reason}");
    double.set(Setting::DmaBuf, 1);
    let reason = why(&mut wires);
    assert!(
        reason.starts_with("loopback port 1 refuses dma-buf: Operation not supported (95)")
            && (reason.ends_with("nvidia_peermem is not loaded")
                || std::path::Path::new("/sys/module/nvidia_peermem").exists()),
        "{reason}"
    );
    // Then the owner exposes memory of the host, and copies.
    let host = device.pin(5000).unwrap();
    let remote = wires[1].expose(PeerId(0), host.write(0..5000).unwrap()).unwrap();
    wires[0].post_put(to(1, 1, 0), filled(6, 5000).1, remote).unwrap();
    assert!(matches!(next(&mut wires), Completion::Sent { .. }));
    drop(wires[1].withdraw(remote).unwrap());
    copy_in(&stream, &host, &memory);
    assert!(held_by(&stream, &memory) == pattern(6, 5000));
}
