//! Does: memory of a GPU, which soft-RoCE does not reach: what it answers to a dma-buf that is one, and to an address of no memory
//! of the host; how a buffer's way is told; and, on hardware, that the card moves its bytes.

use crate::double::{Double, Setting};
use crate::end::{open, shared};
use crate::promises::verbs_wires;
use gradwire_transport::cuda::{DeviceMemory, Driver, Stream, Way};
use gradwire_transport::verbs::VerbsWire;
use gradwire_transport::verbs::adapter::{Adapter, Foreign};
use gradwire_transport::{Completion, Config, DeviceSided, Envelope, PeerId, RegisterError, Tag, Wire};
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use std::time::{Duration, Instant};

const BYTES: usize = 8192;

#[repr(C)]
struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// A dma-buf of the host's memory, as the kernel's udmabuf makes them; without that, a file that is none.
fn dma_buf() -> OwnedFd {
    let memory = rustix::fs::memfd_create("udmabuf", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, BYTES as u64).unwrap();
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
    let Ok(maker) = std::fs::File::options().read(true).write(true).open("/dev/udmabuf") else {
        println!("no /dev/udmabuf here: a file that is no dma-buf is registered instead");
        return memory;
    };
    let create = Create { memfd: memory.as_raw_fd().cast_unsigned(), flags: 1, offset: 0, size: BYTES as u64 };
    // UDMABUF_CREATE, as linux/udmabuf.h has it.
    // SAFETY: the structure is the one that this call reads, and is there meanwhile.
    let made = unsafe { libc::ioctl(maker.as_raw_fd(), 0x4018_7542, &raw const create) };
    assert!(made >= 0, "udmabuf: {}", std::io::Error::last_os_error());
    println!("a real dma-buf of /dev/udmabuf is registered");
    // SAFETY: it was made for us, and nobody else closes it.
    unsafe { OwnedFd::from_raw_fd(made) }
}

fn answer(error: RegisterError) -> i32 {
    match error {
        RegisterError::Device { bytes: BYTES, source, .. } => source.raw_os_error().unwrap_or(0),
        other => panic!("{other}"),
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn soft_roce_refuses_a_dma_buf_and_an_address_that_is_none_of_the_host_s() {
    let _link = shared();
    let (mut device, file) = (open(), dma_buf());
    assert!(device.name().starts_with("rxe"), "this is for soft-RoCE: `--skip soft_roce` elsewhere");
    let memory = Foreign { address: 0x7100_0000_0000_0000, bytes: BYTES, dma_buf: Some((file.as_fd(), 0)) };
    // SAFETY: the file holds the memory.
    let refused = unsafe { device.register_foreign(memory) }.unwrap_err();
    assert_eq!(answer(refused), Errno::OPNOTSUPP.raw_os_error());
    // SAFETY: no processor's address, so nothing can be registered.
    let refused = unsafe { device.register_foreign(Foreign { dma_buf: None, ..memory }) }.unwrap_err();
    assert!(answer(refused) != 0);
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_gpu_s_memory_is_staged_on_soft_roce_and_the_way_says_why() {
    let _link = shared();
    let device = open();
    assert!(device.name().starts_with("rxe"), "this is for soft-RoCE: `--skip soft_roce` elsewhere");
    let double = Double::new(1);
    double.set(Setting::DmaBuf, 1);
    let gpu = Driver::load(Some(&double.path())).unwrap().device(0).unwrap();
    let memory = DeviceMemory::allocate(&gpu, BYTES).unwrap();
    let mut wire = VerbsWire::new(&Config::default(), Box::new(device));
    let (way, remote) = wire.expose_device(memory.slice(0..BYTES).unwrap());
    assert!(matches!(way, Way::Staged { .. }) && remote.is_none());
    let text = way.to_string();
    assert!(text.contains(" refuses dma-buf: Operation not supported (95); nvidia_peermem is not loaded"), "{text}");
    drop((wire, memory, gpu));
    assert_eq!(double.held(), [0; 7]);
}

/// What no soft-RoCE and no double shows. `GRADWIRE_CUDA_LIBRARY` may name the driver.
#[test]
#[ignore = "needs an RDMA card that reaches a GPU"]
fn on_hardware_a_card_moves_a_gpu_s_bytes() {
    let _link = shared();
    let path = std::env::var_os("GRADWIRE_CUDA_LIBRARY");
    let gpu = Driver::load(path.as_ref().map(std::path::Path::new)).unwrap().device(0).unwrap();
    let memory = [(); 2].map(|()| DeviceMemory::allocate(&gpu, BYTES).unwrap());
    let host = gpu.pin(BYTES).unwrap();
    host.write(0..BYTES).unwrap().iter_mut().enumerate().for_each(|(at, byte)| *byte = (at % 251) as u8);
    let (stream, soon) = (Stream::new(&gpu).unwrap(), Instant::now() + Duration::from_secs(30));
    let whole = host.read(0..BYTES).unwrap();
    drop(stream.copy_in(whole, memory[0].slice(0..BYTES).unwrap()).unwrap().wait(soon).unwrap());
    let mut wires = verbs_wires(&Config::default(), 2, || Box::new(open()));
    let mut expose = |at: usize| {
        let (way, remote) = wires[at].expose_device(memory[at].slice(0..BYTES).unwrap());
        println!("buffer {at}: {way}");
        remote.expect("this card reaches this GPU")
    };
    let (own, theirs) = (expose(0), expose(1));
    let to = Envelope { peer: PeerId(1), tag: Tag(1), note: 0 };
    wires[0].post_put_from_device(to, own, theirs).unwrap();
    let mut done = Vec::new();
    while done.is_empty() {
        wires.iter_mut().for_each(|wire| wire.poll(Instant::now(), &mut done));
        assert!(Instant::now() < soon, "nothing came");
    }
    assert!(matches!(done[..], [Completion::Sent { .. }]), "{done:?}");
    gpu.flush_rdma_writes().unwrap();
    let back = gpu.pin(BYTES).unwrap();
    let copy = stream.copy_out(memory[1].slice(0..BYTES).unwrap(), back.write(0..BYTES).unwrap()).unwrap();
    assert!(copy.wait(soon).unwrap().iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
}
