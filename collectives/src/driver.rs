//! Does: shares one engine between the threads of a process: callers drive it while they wait, the progress thread when
//! nobody waits, and a caller that comes while the progress thread drives takes over from it.

use crate::CollectiveError;
use crate::engine::{Engine, Job, Queued};
use crate::messages::Message;
use crate::patience::Patience;
use crate::pending::Ticket;
use crate::wishes::Wishes;
use gradwire_transport::Wake;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Longest sleep of a thread that waits for another: insurance against a lost wake-up, never the usual way to wake.
const NAP: Duration = Duration::from_millis(50);
/// Longest sleep of a driver at the wire.
const LONG: Duration = Duration::from_secs(1);
/// How often a caller looks whether the progress thread has let go; that takes a few microseconds, or a very long time.
const TRIES: u32 = 200;
/// Of so many collectives at the segment, one at least goes by way of who drives, and the wire is looked at.
const WIRE_LOOK: u64 = 64;
/// Sleep of a driver that must look for messages from any rank.
const PROBE: Duration = Duration::from_millis(1);

/// An engine and all who want something of it.
pub(crate) struct Shared {
    engine: Mutex<Engine>,
    inbox: Mutex<Inbox>,
    /// Rung for the progress thread.
    bell: Condvar,
    /// Rung for callers that wait while another drives.
    ended: Condvar,
    claimants: AtomicU32,
    parked: AtomicBool,
    closing: AtomicBool,
    driven: AtomicBool,
    /// Whether collectives go by the segment, where who begins one stays until all have come.
    at_segment: bool,
    /// Whether there is a progress thread.
    has_thread: AtomicBool,
    unfinished: Arc<AtomicUsize>,
    wishes: Arc<Wishes>,
    timeout_ms: AtomicU64,
    waker: Arc<dyn Wake>,
    patience: Patience,
}

#[derive(Default)]
struct Inbox {
    jobs: Vec<Queued>,
    sequence: u64,
    waiters: usize,
    thread_sleeps: bool,
}

/// What has become of a collective that was to be carried out at once.
pub(crate) enum Ran {
    /// It has ended.
    Here(Result<(), CollectiveError>),
    /// It waits its turn.
    Queued(Arc<Ticket>),
}

/// A caller drives, until this is dropped: also where it panics, so that nobody waits for it for ever.
struct Driven<'a>(&'a AtomicBool);

impl<'a> Driven<'a> {
    fn begin(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::Release);
        Self(flag)
    }
}

impl Drop for Driven<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Shared {
    pub(crate) fn new(engine: Engine, waker: Arc<dyn Wake>, patience: Patience, timeout: Duration) -> Self {
        let shared = Self {
            unfinished: Arc::clone(&engine.unfinished),
            wishes: Arc::clone(&engine.wishes),
            at_segment: engine.local.is_some(),
            has_thread: AtomicBool::new(false),
            engine: Mutex::new(engine),
            inbox: Mutex::new(Inbox::default()),
            bell: Condvar::new(),
            ended: Condvar::new(),
            claimants: AtomicU32::new(0),
            parked: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            driven: AtomicBool::new(false),
            timeout_ms: AtomicU64::new(0),
            waker,
            patience,
        };
        shared.set_timeout(timeout);
        shared
    }

    /// The engine, for a moment: whoever drives it lets go.
    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.claimants.fetch_add(1, Ordering::SeqCst);
        self.wake_driver();
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        self.claimants.fetch_sub(1, Ordering::SeqCst);
        engine
    }

    /// Ends the group, also while another thread holds the engine and waits for ranks.
    pub(crate) fn abort(&self, reason: String) {
        self.wishes.abort(reason);
        loop {
            self.wake_driver();
            match self.engine.try_lock() {
                Ok(mut engine) => engine.take_wishes(),
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().take_wishes(),
                Err(TryLockError::WouldBlock) if self.wishes.any() => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                Err(TryLockError::WouldBlock) => true,
            };
            return self.ring();
        }
    }

    /// What other threads want of the engine.
    pub(crate) fn wishes(&self) -> &Wishes {
        &self.wishes
    }

    pub(crate) fn set_timeout(&self, timeout: Duration) {
        let ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.timeout_ms.store(ms.min(u64::from(u32::MAX)), Ordering::Relaxed);
    }

    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed))
    }

    /// Collectives submitted so far.
    pub(crate) fn sequence(&self) -> u64 {
        self.inbox().sequence
    }

    /// Queues the collective that `make` makes from its number.
    pub(crate) fn submit_job(&self, make: impl FnOnce(u64) -> Job) -> Arc<Ticket> {
        self.queue(&mut self.inbox(), make)
    }

    /// Carries out the collective that `make` makes from its number at the segment, from this thread, where nothing is under
    /// way; else queues it. Now and then it is queued anyway, so that who drives also looks at the wire.
    pub(crate) fn run_job(&self, make: impl FnOnce(u64) -> Job) -> Ran {
        let Ok(mut engine) = self.engine.try_lock() else { return Ran::Queued(self.submit_job(make)) };
        let mut inbox = self.inbox();
        let busy = self.unfinished.load(Ordering::Acquire) > 0 || self.claimants.load(Ordering::SeqCst) > 0;
        if busy || inbox.sequence.is_multiple_of(WIRE_LOOK) || !engine.is_free() {
            return Ran::Queued(self.queue(&mut inbox, make));
        }
        let job = make(inbox.sequence);
        inbox.sequence += 1;
        drop(inbox);
        let driven = Driven::begin(&self.driven);
        let outcome = engine.run_now(&job);
        let others = std::mem::take(&mut engine.ended) > 0;
        drop((driven, engine));
        if others || self.unfinished.load(Ordering::Acquire) > 0 {
            self.ring_waiters();
            self.ring_thread();
        }
        Ran::Here(outcome)
    }

    fn queue(&self, inbox: &mut Inbox, make: impl FnOnce(u64) -> Job) -> Arc<Ticket> {
        let (job, ticket) = (make(inbox.sequence), Arc::new(Ticket::default()));
        inbox.sequence += 1;
        self.unfinished.fetch_add(1, Ordering::AcqRel);
        inbox.jobs.push(Queued { ticket: Arc::clone(&ticket), job });
        ticket
    }

    /// Queues a user's message.
    pub(crate) fn submit_message(&self, message: Message) {
        self.unfinished.fetch_add(1, Ordering::AcqRel);
        self.wishes.send(message);
    }

    /// Tells whoever drives, or sleeps, that there is something new.
    pub(crate) fn ring(&self) {
        self.wake_driver();
        self.ring_thread();
        self.ring_waiters();
    }

    fn ring_thread(&self) {
        if self.inbox().thread_sleeps {
            self.bell.notify_all();
        }
    }

    fn ring_waiters(&self) {
        if self.inbox().waiters > 0 {
            self.ended.notify_all();
        }
    }

    /// Drives the engine, or waits for who does, until `ticket` has ended or `until` has passed.
    pub(crate) fn wait(&self, ticket: &Ticket, until: Option<Instant>) {
        let over = || ticket.is_done() || until.is_some_and(|until| Instant::now() >= until);
        while !over() {
            if self.driven.load(Ordering::Acquire) {
                // Another caller drives until its own operation ends; it rings then, and whenever something ends.
                self.wait_for_driver(ticket, None, || self.driven.load(Ordering::Acquire));
                continue;
            }
            let Some(mut engine) = self.take_over(&over) else {
                self.wait_for_driver(ticket, None, || true);
                continue;
            };
            let driven = Driven::begin(&self.driven);
            self.drive(&mut engine, &|| over() || self.claimants.load(Ordering::SeqCst) > 0, until);
            drop((driven, engine));
            // Who aborts or describes the group wants it for a moment, and must not wait for our operation to end.
            while self.claimants.load(Ordering::SeqCst) > 0 && !over() {
                std::thread::yield_now();
            }
            if self.unfinished.load(Ordering::Acquire) > 0 {
                self.ring_waiters();
                self.ring_thread();
            }
        }
    }

    /// Waits for who drives until `ticket` has ended or `until` has passed, and not longer: drives only where that can be left again,
    /// or nobody else would.
    pub(crate) fn wait_at_most(&self, ticket: &Ticket, until: Instant) {
        if !self.at_segment || !self.has_thread.load(Ordering::Acquire) {
            return self.wait(ticket, Some(until));
        }
        self.ring_thread();
        while !ticket.is_done() && Instant::now() < until {
            self.wait_for_driver(ticket, Some(until), || true);
        }
    }

    /// Says that there is a progress thread.
    pub(crate) fn set_has_thread(&self) {
        self.has_thread.store(true, Ordering::Release);
    }

    /// The engine, from the progress thread where that one has it; None where it does not let go: it waits for ranks at the
    /// shared segment.
    fn take_over(&self, over: &dyn Fn() -> bool) -> Option<MutexGuard<'_, Engine>> {
        let try_lock = || match self.engine.try_lock() {
            Ok(engine) => Some(engine),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(engine) = try_lock() {
            return Some(engine);
        }
        self.claimants.fetch_add(1, Ordering::SeqCst);
        self.wake_driver();
        let mut engine = None;
        for _ in 0..TRIES {
            engine = try_lock();
            if engine.is_some() || over() || self.driven.load(Ordering::Acquire) {
                break;
            }
            std::thread::yield_now();
        }
        self.claimants.fetch_sub(1, Ordering::SeqCst);
        engine
    }

    /// Who drives rings when its own operation ends, and whenever something ends.
    fn wait_for_driver(&self, ticket: &Ticket, until: Option<Instant>, still: impl Fn() -> bool) {
        let nap = until.map_or(NAP, |until| NAP.min(until.saturating_duration_since(Instant::now())));
        let mut inbox = self.inbox();
        if ticket.is_done() || !still() {
            return;
        }
        inbox.waiters += 1;
        let (mut inbox, _) = self.ended.wait_timeout(inbox, nap).unwrap_or_else(PoisonError::into_inner);
        inbox.waiters -= 1;
    }

    /// The life of the progress thread.
    pub(crate) fn run_progress(&self) {
        let mut settled = false;
        while !self.closing.load(Ordering::Acquire) {
            let idle = || {
                self.unfinished.load(Ordering::Acquire) == 0
                    || self.driven.load(Ordering::Acquire)
                    || self.claimants.load(Ordering::SeqCst) > 0
            };
            let mut inbox = self.inbox();
            if idle() && !self.closing.load(Ordering::Acquire) {
                // Nothing is under way: sleep until the bell. With work that others drive, look again soon.
                inbox.thread_sleeps = true;
                let nap = if settled { LONG } else { NAP };
                let (mut inbox, nap) = self.bell.wait_timeout(inbox, nap).unwrap_or_else(PoisonError::into_inner);
                inbox.thread_sleeps = false;
                drop(inbox);
                settled = nap.timed_out() && idle() && self.is_settled();
                continue;
            }
            drop(inbox);
            if let Ok(mut engine) = self.engine.try_lock() {
                let stop = || {
                    self.unfinished.load(Ordering::Acquire) == 0
                        || self.claimants.load(Ordering::SeqCst) > 0
                        || self.closing.load(Ordering::Acquire)
                };
                self.drive(&mut engine, &stop, None);
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Whether the group can be left alone. Where the wire still owes something to a peer it is driven, until somebody has a call
    /// for it.
    fn is_settled(&self) -> bool {
        let nothing = || self.unfinished.load(Ordering::Acquire) == 0;
        let Ok(mut engine) = self.engine.try_lock() else { return false };
        if nothing() && engine.wire.owes() {
            let claimed = || self.claimants.load(Ordering::SeqCst) > 0 || self.closing.load(Ordering::Acquire);
            self.drive(&mut engine, &|| !nothing() || claimed(), None);
            return false;
        }
        nothing()
    }

    /// Makes the progress thread end; where it waits for other ranks at the segment, then at the latest.
    pub(crate) fn stop(&self, until: Instant) {
        self.wishes.close(until);
        self.closing.store(true, Ordering::Release);
        self.ring();
    }

    /// Leaves the group in good order: what was handed over until now is sent.
    pub(crate) fn close(&self, until: Instant) {
        let mut engine = self.engine();
        self.take_in(&mut engine);
        engine.close(until);
    }

    fn drive(&self, engine: &mut Engine, over: &dyn Fn() -> bool, until: Option<Instant>) {
        let mut idle = 0;
        while !over() {
            let taken = self.take_in(engine);
            let moved = engine.turn(Instant::now());
            if std::mem::take(&mut engine.ended) > 0 {
                self.ring_waiters();
            }
            if taken || moved {
                idle = 0;
            } else if idle < self.patience.looks {
                idle += 1;
                self.patience.pause();
            } else {
                self.park(engine, over, until);
            }
        }
    }

    fn park(&self, engine: &mut Engine, over: &dyn Fn() -> bool, until: Option<Instant>) {
        self.parked.store(true, Ordering::SeqCst);
        // Whoever came before the flag was up is seen here; whoever comes after it wakes the wire.
        if !over() && self.inbox().jobs.is_empty() && !self.wishes.any() && self.claimants.load(Ordering::SeqCst) == 0 {
            let nap = if engine.probes() { PROBE } else { LONG };
            let latest = Instant::now() + nap;
            let wake = [engine.next_deadline(), until].into_iter().flatten().fold(latest, Instant::min);
            engine.wire.park(wake);
        }
        self.parked.store(false, Ordering::SeqCst);
    }

    fn take_in(&self, engine: &mut Engine) -> bool {
        let wished = engine.take_wishes();
        let jobs = {
            let mut inbox = self.inbox();
            if inbox.jobs.is_empty() {
                return wished;
            }
            std::mem::take(&mut inbox.jobs)
        };
        jobs.into_iter().for_each(|job| engine.submit(job));
        true
    }

    fn wake_driver(&self) {
        if self.parked.load(Ordering::SeqCst) {
            self.waker.wake();
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
