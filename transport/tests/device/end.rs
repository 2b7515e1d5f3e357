//! Does: one end of a connection, for tests.

use gradwire_transport::verbs::adapter::{Access, Adapter, Endpoint, Event, Key, Remote, Span, Trouble, What, Work};
use gradwire_transport::verbs::device::Device;
use gradwire_transport::verbs::settings::VerbsConfig;
use gradwire_transport::verbs::status::Status;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Once, RwLock, RwLockReadGuard};
use std::time::Duration;

pub const BYTES: usize = 1 << 20;
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Held for writing by the test that takes the port's link away from all.
pub static LINK: RwLock<()> = RwLock::new(());
/// Errors that were logged: what could not be freed.
pub static ERRORS: AtomicUsize = AtomicUsize::new(0);

/// One end of a connection, with memory that the peer may write.
pub struct End {
    pub device: Device,
    pub queue_pair: u32,
    pub key: Key,
    pub memory: Vec<AtomicU8>,
    pub events: Vec<Event>,
    pub troubles: Vec<Trouble>,
}

impl End {
    pub fn new(access: Access) -> (Self, Endpoint) {
        let mut device = open();
        let memory: Vec<AtomicU8> = (0..BYTES).map(|at| AtomicU8::new(at as u8)).collect();
        // SAFETY: the memory stays until the device is dropped, which comes first.
        let key = unsafe { device.register(memory.as_ptr().cast_mut().cast(), BYTES, access) }.unwrap();
        let endpoint = device.open().unwrap();
        let end =
            Self { device, queue_pair: endpoint.queue_pair, key, memory, events: Vec::new(), troubles: Vec::new() };
        (end, endpoint)
    }

    pub fn span(&self, offset: usize, bytes: usize) -> Span {
        assert!(offset + bytes <= BYTES);
        let address = self.key.first + offset as u64;
        Span { address, bytes: bytes as u32, key: self.key.local }
    }

    pub fn place(&self, offset: usize) -> Remote {
        Remote { address: self.span(offset, 0).address, key: self.key.remote }
    }

    pub fn post(&mut self, number: u64, span: Span, work: Work) {
        self.device.post(self.queue_pair, number, span, work, true).unwrap();
    }

    pub fn post_recv(&mut self, number: u64, span: Span) {
        self.device.post_recv(self.queue_pair, number, span).unwrap();
    }

    /// Fills with a pattern that tells place and seed.
    pub fn fill(&self, offset: usize, bytes: usize, seed: u8) {
        for at in 0..bytes {
            self.memory[offset + at].store(pattern(at, seed), Ordering::Relaxed);
        }
    }

    pub fn assert_filled(&self, offset: usize, bytes: usize, seed: u8) {
        for at in 0..bytes {
            assert_eq!(self.memory[offset + at].load(Ordering::Relaxed), pattern(at, seed), "byte {at} of {bytes}");
        }
    }

    /// The events of `count` requests, slept for rather than spun for.
    pub fn wait(&mut self, count: usize) -> Vec<Event> {
        loop {
            self.device.poll(&mut self.events);
            if self.events.len() < count {
                self.device.arm();
                self.device.poll(&mut self.events);
            }
            if self.events.len() >= count {
                return std::mem::take(&mut self.events);
            }
            let woken = readable(&self.device, DEADLINE);
            assert!(woken, "slept for too long with {:?}, {:?} of {count}", self.events, self.troubles);
            self.device.wake_up(&mut self.troubles);
        }
    }

    pub fn wait_for_one(&mut self) -> (u64, What) {
        let events = self.wait(1);
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!(events[0].queue_pair, self.queue_pair);
        (events[0].number, events[0].what)
    }

    pub fn failure(&mut self) -> Status {
        match self.wait_for_one() {
            (_, What::Failed(status)) => status,
            other => panic!("it should fail: {other:?}"),
        }
    }
}

fn pattern(at: usize, seed: u8) -> u8 {
    (at as u8).wrapping_mul(7) ^ (at >> 8) as u8 ^ seed
}

/// Nobody takes the link away while the guard lives.
pub fn shared() -> RwLockReadGuard<'static, ()> {
    LINK.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A device, as chosen by default.
pub fn open() -> Device {
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| tracing::subscriber::set_global_default(CountErrors).unwrap());
    let (device, reason) = Device::open(&VerbsConfig::default(), &[]).expect("these tests need an RDMA device");
    assert!(reason.starts_with(&device.name()), "{reason}");
    device
}

/// Two ends, connected.
pub fn pair(access: Access) -> (End, End) {
    let ((mut a, to_a), (mut b, to_b)) = (End::new(access), End::new(access));
    a.device.connect(a.queue_pair, &to_b).unwrap();
    b.device.connect(b.queue_pair, &to_a).unwrap();
    (a, b)
}

pub fn readable(device: &Device, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).unwrap();
    let fd = device.sleep_on();
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

struct CountErrors;

impl tracing::Subscriber for CountErrors {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        eprintln!("logged: {event:?}");
        ERRORS.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}
