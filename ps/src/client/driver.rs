//! Does: finds a thread to drive the engine: whoever waits, or else a thread of our own, which otherwise sleeps.

use super::engine::{Engine, NewRequest};
use super::pending::Call;
use crate::TableId;
use crate::patience::Patience;
use gradwire_transport::Wake;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long our own thread leaves a new call to a caller who is about to wait for it: less than a caller would notice.
const GRACE: Duration = Duration::from_micros(300);
/// The longest sleep of a driver: deadlines of requests are kept to within this.
const TICK: Duration = Duration::from_millis(100);
/// How long a call without a deadline of its own waits: requests end by theirs long before.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Drives the engine of one client.
pub(super) struct Driver {
    engine: Mutex<Engine>,
    inbox: Mutex<Vec<(Arc<Call>, Vec<NewRequest>)>>,
    state: Mutex<State>,
    /// For callers who wait while another thread drives.
    followers: Condvar,
    /// For our own thread.
    progress: Condvar,
    waker: Arc<dyn Wake>,
    patience: Mutex<Patience>,
    /// What `state.closed` says, to be read without its lock.
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    driving: bool,
    followers: usize,
    /// Calls under way.
    calls: usize,
    dozing: bool,
    closed: bool,
}

impl Driver {
    pub(super) fn new(engine: Engine, waker: Arc<dyn Wake>, spin: Duration) -> Self {
        Self {
            engine: Mutex::new(engine),
            inbox: Mutex::new(Vec::new()),
            state: Mutex::new(State::default()),
            followers: Condvar::new(),
            progress: Condvar::new(),
            waker,
            patience: Mutex::new(Patience::new(spin)),
            closed: AtomicBool::new(false),
        }
    }

    /// Starts our own thread.
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        let driver = Arc::clone(self);
        std::thread::Builder::new().name("gradwire-ps".to_owned()).spawn(move || driver.progress())
    }

    /// Puts a call under way. False when the client is closed.
    pub(super) fn submit(&self, call: &Arc<Call>, requests: Vec<NewRequest>) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        state.calls += 1;
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner).push((Arc::clone(call), requests));
        if state.driving {
            drop(state);
            self.waker.wake();
            return true;
        }
        // What can go at once goes now, from this thread.
        state.driving = true;
        drop(state);
        self.turn();
        self.step_back();
        true
    }

    /// Waits until `call` is done; false after `timeout`.
    pub(super) fn wait(&self, call: &Call, timeout: Option<Duration>) -> bool {
        let deadline = Instant::now() + timeout.unwrap_or(FOREVER).min(FOREVER);
        while !call.is_done() {
            let mut state = self.lock();
            if call.is_done() {
                break;
            }
            if Instant::now() >= deadline {
                return false;
            }
            if !state.driving && !state.closed {
                state.driving = true;
                drop(state);
                self.drive(deadline, || call.is_done());
                self.step_back();
                continue;
            }
            state.followers += 1;
            if state.followers == 1 {
                // Where our own thread drives, it makes way.
                self.waker.wake();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = self.followers.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            let mut state = waited.0;
            state.followers -= 1;
        }
        true
    }

    /// Gives up all that is under way about these tables.
    pub(super) fn abandon(&self, tables: &[TableId]) {
        // Whoever sleeps with the engine makes way.
        self.waker.wake();
        let finished = {
            let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
            self.take_inbox(&mut engine);
            engine.abandon(tables);
            engine.take_finished()
        };
        self.finish(finished);
    }

    /// Ends everything: calls under way fail, and new ones are refused.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.closed.store(true, Ordering::Release);
        self.progress.notify_all();
        self.waker.wake();
        while state.driving {
            state.followers += 1;
            state = self.followers.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
            state.followers -= 1;
        }
        state.driving = true;
        drop(state);
        let finished = {
            let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
            self.take_inbox(&mut engine);
            engine.close();
            engine.take_finished()
        };
        self.finish(finished);
        self.step_back();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_inbox(&self, engine: &mut Engine) {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.drain(..).for_each(|(call, requests)| engine.begin(&call, requests));
    }

    /// One turn of the engine; whether anything moved.
    fn turn(&self) -> bool {
        let (moved, finished) = {
            let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
            self.take_inbox(&mut engine);
            let moved = engine.turn(Instant::now());
            (moved, engine.take_finished())
        };
        self.finish(finished);
        moved
    }

    fn finish(&self, finished: Vec<Arc<Call>>) {
        if finished.is_empty() {
            return;
        }
        finished.iter().for_each(|call| call.finish());
        let mut state = self.lock();
        state.calls -= finished.len();
        if state.followers > 0 {
            self.followers.notify_all();
        }
    }

    /// Drives until `enough` or the deadline. The caller has made itself the driver.
    fn drive(&self, deadline: Instant, enough: impl Fn() -> bool) {
        // There is one driver at a time.
        let mut patience = self.patience.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = Instant::now();
        loop {
            let moved = self.turn();
            let now = Instant::now();
            let idle = now.saturating_duration_since(last);
            if moved {
                patience.learn(idle);
                last = now;
            }
            if enough() || self.closed.load(Ordering::Acquire) {
                return;
            }
            if moved {
                continue;
            }
            if patience.looks_on(idle) {
                // Whoever is waited for may want this very core.
                std::thread::yield_now();
            } else {
                if now >= deadline {
                    return;
                }
                let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
                if self.inbox.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
                    engine.park(deadline.min(now + TICK));
                }
            }
        }
    }

    /// Lets somebody else drive.
    fn step_back(&self) {
        let mut state = self.lock();
        state.driving = false;
        if state.followers > 0 {
            self.followers.notify_all();
        } else if state.calls > 0 && !state.dozing {
            self.progress.notify_one();
        }
    }

    /// Our own thread: drives what nobody waits for.
    fn progress(&self) {
        let mut state = self.lock();
        loop {
            if state.closed {
                return;
            }
            if state.calls == 0 || state.driving || state.followers > 0 {
                state = self.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.dozing = true;
            state = self.progress.wait_timeout(state, GRACE).unwrap_or_else(PoisonError::into_inner).0;
            state.dozing = false;
            if state.closed || state.calls == 0 || state.driving || state.followers > 0 {
                continue;
            }
            state.driving = true;
            drop(state);
            self.drive(Instant::now() + FOREVER, || {
                let state = self.lock();
                state.closed || state.calls == 0 || state.followers > 0
            });
            self.step_back();
            state = self.lock();
        }
    }
}
