//! Does: lets many threads wait for the end of an access.

use crate::TransportError;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How an access ended.
type Outcome = Result<(), TransportError>;

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    callbacks: Vec<Box<dyn FnOnce() + Send>>,
}

#[derive(Default)]
struct Ticket {
    state: Mutex<State>,
    ended: Condvar,
}

/// A read or write under way. Dropping it does not stop it.
#[derive(Clone, Default)]
pub struct Access(Arc<Ticket>);

impl Access {
    /// Waits until it has ended, at most `timeout`; `None`: it goes on.
    pub fn wait(&self, timeout: Duration) -> Option<Outcome> {
        let open = |state: &mut State| state.outcome.is_none();
        let waited = self.0.ended.wait_timeout_while(self.state(), timeout, open);
        waited.unwrap_or_else(PoisonError::into_inner).0.outcome.clone()
    }

    /// Whether it has ended.
    pub fn is_done(&self) -> bool {
        self.state().outcome.is_some()
    }

    /// Runs `callback` when it ends: on the thread that moves bytes, so it must be short; or at once on this one.
    pub fn on_done(&self, callback: impl FnOnce() + Send + 'static) {
        let mut state = self.state();
        if state.outcome.is_none() {
            return state.callbacks.push(Box::new(callback));
        }
        drop(state);
        callback();
    }

    /// It has ended; only the first end counts.
    pub(super) fn end(&self, outcome: Outcome) {
        let mut state = self.state();
        if state.outcome.is_some() {
            return;
        }
        state.outcome = Some(outcome);
        let callbacks = std::mem::take(&mut state.callbacks);
        drop(state);
        self.0.ended.notify_all();
        callbacks.into_iter().for_each(|callback| callback());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Access({:?})", self.state().outcome)
    }
}
