//! Does: what may be done with registered memory, and what may not.

use crate::end::{BYTES, End, LINK, pair, shared};
use gradwire_transport::RegisterError;
use gradwire_transport::verbs::adapter::{Access, Adapter, Remote, Span, What, Work};
use gradwire_transport::verbs::status::REMOTE_ACCESS;
use rustix::mm::{MapFlags, ProtFlags};
use std::sync::atomic::Ordering;

#[test]
#[ignore = "needs an RDMA device"]
fn exposed_memory_is_read_and_written_by_offsets() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Exposed);
    assert!(a.key.first < 4096 && b.key.first < 4096, "no address is told");
    a.fill(0, 5000, 1);
    b.fill(600_000, 300_000, 2);
    a.post(1, a.span(0, 5000), Work::Write(b.place(100), None));
    assert_eq!(a.wait_for_one(), (1, What::Done));
    a.post(2, a.span(8, 300_000), Work::Read(b.place(600_000)));
    assert_eq!(a.wait_for_one(), (2, What::Done));
    a.assert_filled(8, 300_000, 2);
    // A short send too, though its address is none that the processor could read.
    a.fill(3000, 16, 5);
    b.post_recv(3, b.span(7000, 16));
    a.post(4, a.span(3000, 16), Work::Send);
    assert_eq!(b.wait_for_one(), (3, What::Received(16, None)));
    assert_eq!(a.wait_for_one(), (4, What::Done));
    b.assert_filled(100, 5000, 1);
    b.assert_filled(7000, 16, 5);
}

#[test]
#[ignore = "needs an RDMA device"]
fn soft_roce_takes_no_dma_buf_and_says_so() {
    let _link = shared();
    let answers = gradwire_transport::verbs::ask_for_dma_bufs().unwrap();
    assert!(!answers.is_empty());
    for answer in answers.iter().filter(|answer| answer.device.starts_with("rxe")) {
        let error = answer.answer.as_ref().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()), "{answer:?}");
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn an_access_that_the_peer_does_not_allow_fails_at_the_sender() {
    let _link = shared();
    for what in ["write behind", "read behind", "read what may only be written", "another key", "withdrawn"] {
        let (mut a, mut b) = pair(if what.contains("only") { Access::Write } else { Access::Exposed });
        let own = a.span(0, 64);
        let behind = b.place(BYTES - 63);
        let work = match what {
            "write behind" => Work::Write(behind, None),
            "read behind" => Work::Read(behind),
            "read what may only be written" => Work::Read(b.place(0)),
            "another key" => Work::Write(Remote { key: b.key.remote ^ 0x55, ..b.place(0) }, None),
            _ => {
                b.device.deregister(b.key.handle);
                Work::Write(b.place(0), None)
            }
        };
        a.post(1, own, work);
        let status = a.failure();
        assert_eq!(status.code, REMOTE_ACCESS, "{what}: {status}");
        // The memory that was not to be touched was not.
        assert!((0..BYTES).all(|at| b.memory[at].load(Ordering::Relaxed) == at as u8), "{what}");
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn a_peer_that_asks_for_too_much_is_told_of_by_words_or_by_failures() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Exposed);
    b.post_recv(1, b.span(0, 64));
    a.post(1, a.span(0, 64), Work::Write(b.place(BYTES), Some(1)));
    assert_eq!(a.failure().code, REMOTE_ACCESS);
    // Which of both, devices differ in; the receive ends in any case.
    let (number, what) = b.wait_for_one();
    assert_eq!(number, 1);
    assert!(matches!(what, What::Failed(_)), "{what:?}");
    println!("the owner hears {what:?} and {:?}", b.troubles);
}

#[test]
#[ignore = "needs an RDMA device"]
fn memory_that_may_only_be_read_is_sent_from_but_not_opened_for_writing() {
    let _link = shared();
    let (mut a, mut b) = pair(Access::Write);
    let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let (none, private) = (std::ptr::null_mut(), MapFlags::PRIVATE);
    // SAFETY: a new mapping anywhere, of a program that nobody changes while it runs; it stays until the process ends.
    let program = unsafe { rustix::mm::mmap(none, 8192, ProtFlags::READ, private, &file, 0) }.unwrap();
    // SAFETY: as above.
    let zeros = unsafe { rustix::mm::mmap_anonymous(none, 8192, ProtFlags::READ, private) }.unwrap();
    for (number, (start, first)) in (1..).zip([(program, *b"\x7fELF"), (zeros, [0; 4])]) {
        // SAFETY: the mapping stays until the process ends.
        let key = unsafe { a.device.register(start.cast(), 8192, Access::Read) }.unwrap();
        b.post_recv(number, b.span(0, 8192));
        a.post(number, Span { address: start.addr() as u64, bytes: 8192, key: key.local }, Work::Send);
        assert_eq!(b.wait_for_one(), (number, What::Received(8192, None)));
        assert_eq!(a.wait_for_one(), (number, What::Done));
        for (at, byte) in first.iter().enumerate() {
            assert_eq!(b.memory[at].load(Ordering::Relaxed), *byte);
        }
        a.device.deregister(key.handle);
        // SAFETY: as above.
        let error = unsafe { a.device.register(start.cast(), 8192, Access::Write) }.unwrap_err();
        assert!(matches!(&error, RegisterError::Device { bytes: 8192, .. }), "{error}");
    }
}

#[test]
#[ignore = "needs an RDMA device"]
fn the_limit_of_locked_memory_is_named() {
    use rustix::process::{Resource, Rlimit};
    use rustix::thread::CapabilitySet;
    // Alone, since the limit is the process's.
    let _alone = LINK.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (mut a, _) = End::new(Access::Write);
    let before = rustix::process::getrlimit(Resource::Memlock);
    let low = Rlimit { current: Some(64 << 10), maximum: before.maximum };
    rustix::process::setrlimit(Resource::Memlock, low).unwrap();
    // A thread of its own gives up the capability that lifts the limit.
    let registered = std::thread::scope(|scope| {
        let register = || {
            let mut held = rustix::thread::capabilities(None).unwrap();
            held.effective.remove(CapabilitySet::IPC_LOCK);
            rustix::thread::set_capabilities(None, held).unwrap();
            // SAFETY: the memory stays until the device is dropped, which comes first.
            unsafe { a.device.register(a.memory.as_ptr().cast_mut().cast(), BYTES, Access::Write) }
        };
        scope.spawn(register).join().unwrap()
    });
    rustix::process::setrlimit(Resource::Memlock, before).unwrap();
    let error = registered.unwrap_err();
    assert!(matches!(error, RegisterError::LockedMemoryLimit { bytes: BYTES, limit_bytes: 65_536 }), "{error}");
}
