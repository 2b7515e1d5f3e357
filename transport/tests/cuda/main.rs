//! CUDA's door, against a double of its driver: what it opens, what it refuses, and that nothing is left behind.
#![allow(unsafe_code)] // For memory that is handed in by its address, which is what is tested.
#![allow(clippy::unwrap_used)] // A test that unwraps fails where it should.

mod double;
mod gpu_direct;
#[macro_use]
#[path = "../promises/mod.rs"]
#[allow(dead_code, unused_macros, unused_imports)] // Two wires on a network of their own are what is used.
mod promises;

use double::{Counter, Double, Failing, Setting};
use gradwire_transport::cuda::{CudaError, Device, DeviceMemory, Driver, Gate, PinnedCount, PinnedPool, Stream};
use gradwire_transport::verbs::Fabric;
use gradwire_transport::{Region, Wire};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn device(double: &Double, ordinal: u32) -> Arc<Device> {
    Driver::load(Some(&double.path())).unwrap().device(ordinal).unwrap()
}

fn filled(device: &Arc<Device>, bytes: impl IntoIterator<Item = u8>) -> Arc<Region> {
    let bytes: Vec<u8> = bytes.into_iter().collect();
    let region = device.pin(bytes.len()).unwrap();
    region.write(0..bytes.len()).unwrap().copy_from_slice(&bytes);
    region
}

fn copy_in(stream: &Stream, from: &Arc<Region>, to: &Arc<DeviceMemory>) {
    let copying = stream.copy_in(from.read(0..from.len()).unwrap(), to.slice(0..to.len()).unwrap()).unwrap();
    copying.wait(soon()).unwrap();
}

#[test]
fn a_missing_driver_is_named_with_the_remedy() {
    let error = Driver::load(Some(Path::new("/nowhere/libcuda.so.1"))).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, CudaError::NoDriver { .. }) && text.contains("/nowhere/libcuda.so.1"), "{text}");
    assert!(text.contains("install NVIDIA's driver") && text.contains(".cpu()"), "{text}");
}

#[test]
fn a_driver_that_lacks_a_function_is_an_error_that_names_it() {
    let error = Driver::load(Some(Path::new("libc.so.6"))).unwrap_err();
    assert_eq!(error, CudaError::TooOld { library: "libc.so.6".into(), symbol: "cuInit" });
}

#[test]
fn a_driver_that_does_not_start_or_sees_no_device_says_so() {
    let double = Double::new(1);
    double.fail(Failing::Init, 0, 999);
    assert!(matches!(Driver::load(Some(&double.path())), Err(CudaError::NoDriver { .. })));
    double.fail(Failing::Init, 0, 100);
    assert_eq!(Driver::load(Some(&double.path())).unwrap_err(), CudaError::NoDevice { ordinal: 0, count: 0 });
    double.fail_no_more();
    let driver = Driver::load(Some(&double.path())).unwrap();
    assert_eq!(driver.device(1).unwrap_err(), CudaError::NoDevice { ordinal: 1, count: 1 });
    assert_eq!(driver.device(0).unwrap().name().unwrap(), "Double 0");
}

#[test]
fn bytes_go_to_the_device_and_come_back() {
    let double = Double::new(1);
    let device = device(&double, 0);
    let stream = Stream::new(&device).unwrap();
    let memory = DeviceMemory::allocate(&device, 10_000).unwrap();
    let source = filled(&device, (0..10_000).map(|i| (i % 251) as u8));
    copy_in(&stream, &source, &memory);
    let target = device.pin(5_000).unwrap();
    let out = stream.copy_out(memory.slice(2_000..7_000).unwrap(), target.write(0..5_000).unwrap()).unwrap();
    let back = out.wait(soon()).unwrap();
    assert!(back.iter().enumerate().all(|(i, byte)| *byte == ((i + 2_000) % 251) as u8));
    assert!(memory.slice(0..10_001).is_err());
    let other = stream.copy_out(memory.slice(0..3).unwrap(), device.pin(4).unwrap().write(0..4).unwrap());
    assert_eq!(other.err(), Some(CudaError::Length { from: 3, to: 4 }));
}

#[test]
fn a_stream_waits_at_a_gate_and_another_for_its_mark_while_the_host_goes_on() {
    let double = Double::new(1);
    let device = device(&double, 0);
    let (writer, reader, gate) =
        (Stream::new(&device).unwrap(), Stream::new(&device).unwrap(), Gate::new(&device).unwrap());
    let memory = DeviceMemory::allocate(&device, 4096).unwrap();
    copy_in(&writer, &filled(&device, vec![1; 4096]), &memory);
    let (source, target) = (filled(&device, vec![2; 4096]), device.pin(4096).unwrap());
    for number in 1..20 {
        assert!(gate.hold(&writer, number).unwrap());
        let into = writer.copy_in(source.read(0..4096).unwrap(), memory.slice(0..4096).unwrap()).unwrap();
        reader.wait_for(&writer.mark().unwrap()).unwrap();
        let out = reader.copy_out(memory.slice(0..4096).unwrap(), target.write(0..4096).unwrap()).unwrap();
        assert!(!into.is_done().unwrap() && !out.is_done().unwrap(), "the gate is shut");
        let held = Instant::now() + Duration::from_millis(1);
        assert!(matches!(into.event().wait("a test", held), Err(CudaError::Timeout { what: "a test", .. })));
        assert!(target.read(0..1).is_err(), "the copy holds its target");
        gate.open(number);
        let back = out.wait(soon()).unwrap();
        assert!(back.iter().all(|byte| *byte == 2), "the copy out came after the copy in");
    }
}

#[test]
fn a_device_without_gates_says_so_and_a_gate_that_goes_lets_all_through() {
    let double = Double::new(1);
    let device = device(&double, 0);
    let (stream, gate) = (Stream::new(&device).unwrap(), Gate::new(&device).unwrap());
    double.set(Setting::StreamValues, 0);
    assert!(!gate.hold(&stream, 1).unwrap());
    double.set(Setting::StreamValues, 1);
    assert!(gate.hold(&stream, 1).unwrap());
    let mark = stream.mark().unwrap();
    assert!(!mark.is_reached().unwrap());
    drop(gate);
    mark.wait("the gate that went", soon()).unwrap();
}

#[test]
fn memory_by_its_address_must_be_of_the_device_that_it_is_said_to_be_of() {
    let double = Double::new(2);
    let (first, second) = (device(&double, 0), device(&double, 1));
    let memory = DeviceMemory::allocate(&first, 8192).unwrap();
    let pinned = first.pin(64).unwrap();
    let taken = |address, bytes, device: &Arc<Device>| {
        let keep = Box::new(Arc::clone(&memory));
        // SAFETY: only made, never copied, where the memory is not what it is said to be.
        unsafe { DeviceMemory::from_raw(address, bytes, Arc::clone(device), keep) }
    };
    let found = |error: CudaError| match error {
        CudaError::WrongMemory { found, .. } => found,
        other => panic!("{other}"),
    };
    assert_eq!(taken(memory.address() + 100, 8092, &first).unwrap().len(), 8092);
    assert_eq!(found(taken(memory.address(), 8192, &second).unwrap_err()), "it is of device 0");
    assert_eq!(found(taken(memory.address() + 1, 8192, &first).unwrap_err()), "the driver does not know it");
    assert_eq!(found(taken(pinned.as_ptr() as u64, 64, &first).unwrap_err()), "it is memory of the host");
    assert_eq!(found(taken(u64::MAX - 1, 64, &first).unwrap_err()), "it goes beyond all memory");
    assert!(taken(0, 0, &first).unwrap().is_empty(), "an empty tensor may have no address");
}

#[test]
fn the_host_cannot_touch_device_memory_by_accident() {
    let double = Double::new(1);
    let memory = DeviceMemory::allocate(&device(&double, 0), 1).unwrap();
    // Addresses of x86-64 and AArch64 end below 2^57 and 2^52.
    assert!(memory.address() > 1 << 57);
}

fn round_trip(double: &Double) -> Result<(), CudaError> {
    let device = Driver::load(Some(&double.path()))?.device(0)?;
    let stream = Stream::new(&device)?;
    let memory = DeviceMemory::allocate(&device, 100)?;
    let pinned = device.pin(100)?;
    stream.copy_in(pinned.read(0..100).unwrap(), memory.slice(0..100).unwrap())?.wait(soon())?;
    stream.copy_out(memory.slice(0..100).unwrap(), pinned.write(0..100).unwrap())?.wait(soon())?;
    Ok(())
}

#[test]
fn every_call_that_fails_is_named_and_nothing_is_left_behind() {
    let double = Double::new(1);
    let all = [
        (Failing::Retain, "cuDevicePrimaryCtxRetain"),
        (Failing::Alloc, "cuMemAlloc"),
        (Failing::HostAlloc, "cuMemHostAlloc"),
        (Failing::Stream, "cuStreamCreate"),
        (Failing::Event, "cuEventCreate"),
        (Failing::CopyIn, "cuMemcpyHtoDAsync"),
        (Failing::CopyOut, "cuMemcpyDtoHAsync"),
    ];
    for (failing, call) in all {
        double.fail(failing, 0, 2);
        let error = round_trip(&double).unwrap_err();
        assert!(
            matches!(&error, CudaError::Refused { call: named, code: 2, name, .. } if *named == call
            && name == "CUDA_ERROR_OUT_OF_MEMORY"),
            "{error}"
        );
        assert_eq!(double.held(), [0; 7], "{failing:?}");
    }
    double.fail_no_more();
    round_trip(&double).unwrap();
    assert_eq!((double.held(), double.count(Counter::Copies)), ([0; 7], 3));
    double.fail(Failing::Record, 0, 700);
    let text = round_trip(&double).unwrap_err().to_string();
    assert!(text.contains("cuEventRecord") && text.contains("start the process anew"), "{text}");
}

#[test]
fn pinned_memory_is_used_again_by_all_and_given_up_beyond_a_bound() {
    let double = Double::new(1);
    let device = device(&double, 0);
    let pool = PinnedPool::of(&device);
    assert!(Arc::ptr_eq(&pool, &PinnedPool::of(&device)));
    let first = pool.take(100_000).unwrap();
    let (address, slice) = (first.as_ptr(), first.read(0..10).unwrap());
    drop(first);
    assert_ne!(pool.take(100_000).unwrap().as_ptr(), address, "a slice of it is out");
    drop(slice);
    assert_eq!(pool.count(), PinnedCount { made: 2, reused: 0, given_up: 0, bytes: 2 << 17 });
    let both = [pool.take(70_000).unwrap(), pool.take(1 << 17).unwrap()];
    assert_eq!(pool.count(), PinnedCount { made: 2, reused: 2, given_up: 0, bytes: 2 << 17 });
    drop(both);
    let large: Vec<_> = (0..3).map(|_| pool.take(100 << 20).unwrap()).collect();
    assert!(pool.take(1).unwrap().len() <= 1 << 17, "a large one is not used for a byte");
    assert_eq!(double.count(Counter::PinnedBytes) as usize, pool.count().bytes);
    drop(large);
    drop(pool.take(100_000).unwrap());
    let PinnedCount { given_up, bytes, .. } = pool.count();
    assert!(given_up > 0 && bytes <= 256 << 20, "{bytes} bytes");
    assert_eq!(double.count(Counter::PinnedBytes) as usize, bytes);
    drop(pool);
    assert_eq!(double.count(Counter::PinnedBytes), 0, "the last who has the pool takes it along");
}

#[test]
fn pinned_memory_that_a_network_card_knows_is_used_again_and_registered_once() {
    let (double, fabric) = (Double::new(1), Fabric::default());
    let pool = PinnedPool::of(&device(&double, 0));
    let [mut wire, other] = gpu_direct::wires(&fabric);
    let (before, mut address) = (fabric.registrations(), None);
    for reused in 0..3 {
        let buffer = pool.take(100_000).unwrap();
        wire.register(&buffer).unwrap();
        assert_eq!(*address.get_or_insert(buffer.as_ptr()), buffer.as_ptr());
        assert_eq!((pool.count().made, pool.count().reused), (1, reused));
        assert_eq!(fabric.registrations(), before + 1);
    }
    // One that is registered and idle is not given up, since that would free nothing.
    let large: Vec<_> = (0..3).map(|_| pool.take(100 << 20).unwrap()).collect();
    wire.register(&large[0]).unwrap();
    drop(large);
    drop(pool.take(4 << 20).unwrap());
    let PinnedCount { given_up, bytes, .. } = pool.count();
    assert!(given_up > 0 && bytes <= 256 << 20, "{bytes} bytes");
    assert_eq!(double.count(Counter::PinnedBytes) as usize, bytes);
    drop((wire, other, pool));
    assert_eq!(double.count(Counter::PinnedBytes), 0, "the card has let go of all");
}

#[test]
fn a_pool_gives_up_all_that_is_idle_before_it_refuses() {
    let double = Double::new(1);
    let device = device(&double, 0);
    let pool = PinnedPool::of(&device);
    drop(pool.take(1 << 20).unwrap());
    double.fail(Failing::HostAlloc, 0, 2);
    assert!(matches!(pool.take(8 << 20), Err(CudaError::Refused { call: "cuMemHostAlloc", code: 2, .. })));
    assert_eq!((pool.count().bytes, double.count(Counter::PinnedBytes)), (0, 0));
}
