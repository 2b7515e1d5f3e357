//! Does: a call under way, shared by who made it and who drives it.

use super::driver::Driver;
use crate::PsError;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a call came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The smallest clock that a server told: for a pull, that of the value.
    pub clock: u64,
}

/// Called once a call has ended, by the thread that saw it end. It must not wait for other calls.
pub type OnDone = Box<dyn FnOnce(&Result<Done, PsError>) + Send>;

/// What a call does, and to which table, for messages to people.
#[derive(Clone)]
pub(super) struct What {
    pub(super) verb: &'static str,
    pub(super) subject: Arc<str>,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.subject)
    }
}

/// A call of several requests.
pub(super) struct Call {
    pub(super) what: What,
    done: AtomicBool,
    state: Mutex<State>,
}

struct State {
    /// Requests that have not ended.
    left: usize,
    result: Result<Done, PsError>,
    /// Bodies of answers, where the caller wants them, with the shard that they are from.
    bodies: Vec<(u32, Vec<u8>)>,
    callbacks: Vec<OnDone>,
    last_step: Option<LastStep>,
}

/// What is left to do once all requests of a call have ended well, before the call counts as done.
pub(super) type LastStep = Box<dyn FnOnce() + Send>;

impl Call {
    /// A call of `requests` requests. One of none is done.
    pub(super) fn new(what: What, requests: usize, last_step: Option<LastStep>) -> Arc<Self> {
        let state = State {
            left: requests,
            result: Ok(Done { clock: if requests == 0 { 0 } else { u64::MAX } }),
            bodies: Vec::new(),
            callbacks: Vec::new(),
            last_step,
        };
        Arc::new(Self { what, done: AtomicBool::new(requests == 0), state: Mutex::new(state) })
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// One request has ended. Whether it was the last.
    pub(super) fn end(&self, result: Result<Done, PsError>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut state.result, result) {
            (Ok(all), Ok(one)) => all.clock = all.clock.min(one.clock),
            (all @ Ok(_), Err(error)) => *all = Err(error),
            (Err(_), _) => {}
        }
        state.left -= 1;
        state.left == 0
    }

    /// An answer brought a body.
    pub(super) fn keep_body(&self, shard: u32, body: Vec<u8>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).bodies.push((shard, body));
    }

    /// The bodies of the answers, in the order of the shards.
    pub(super) fn bodies(&self) -> Vec<(u32, Vec<u8>)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.bodies.sort_by_key(|(shard, _)| *shard);
        std::mem::take(&mut state.bodies)
    }

    /// Whether a request has failed, so that the others are of no use.
    pub(super) fn has_failed(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).result.is_err()
    }

    /// Makes the end known; to be called once, after the last request ended, and outside every lock.
    pub(super) fn finish(&self) {
        let (last_step, well) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.last_step.take(), state.result.is_ok())
        };
        match last_step {
            Some(last_step) if well => last_step(),
            other => drop(other),
        }
        let (callbacks, result) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            self.done.store(true, Ordering::Release);
            (std::mem::take(&mut state.callbacks), state.result.clone())
        };
        callbacks.into_iter().for_each(|callback| callback(&result));
    }

    fn result(&self) -> Result<Done, PsError> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).result.clone()
    }
}

/// A call under way. Its buffers belong to the wire until it is done; dropping this lets the call go on.
#[derive(Clone)]
pub struct Pending {
    pub(super) call: Arc<Call>,
    pub(super) driver: Arc<Driver>,
}

impl Pending {
    /// Waits until the call has ended, driving the wire from this thread where nobody else does.
    ///
    /// # Errors
    /// What became of the call. `Timeout` when it is still under way after `timeout`: it stays under way, and may be waited
    /// for again. Without a `timeout` the call's own deadline ends it.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Done, PsError> {
        if self.driver.wait(&self.call, timeout) {
            return self.call.result();
        }
        Err(PsError::Timeout { what: self.call.what.to_string(), waited: timeout.unwrap_or_default() })
    }

    /// Whether the call has ended, well or not.
    pub fn is_done(&self) -> bool {
        self.call.is_done()
    }

    /// Calls `callback` once the call has ended: at once, by this thread, where it has.
    pub fn on_done(&self, callback: OnDone) {
        let mut state = self.call.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.call.is_done() {
            state.callbacks.push(callback);
            return;
        }
        drop(state);
        callback(&self.call.result());
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({}, {})", self.call.what, if self.is_done() { "done" } else { "under way" })
    }
}
