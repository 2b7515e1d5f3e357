//! Does: an operation under way, as its owner sees it.

use crate::CollectiveError;
use gradwire_transport::Rank;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a completed operation has to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Who sent it: for receives.
    pub source: Option<Rank>,
    /// Length of the message: for receives.
    pub bytes: usize,
}

pub(crate) type Outcome = Result<Done, CollectiveError>;
type Callback = Box<dyn FnOnce(&Outcome) + Send>;

/// The state that the engine and the owner of an operation share.
#[derive(Default)]
pub(crate) struct Ticket {
    finished: AtomicBool,
    /// One more than its number in the record of the group; 0: none.
    record: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    callbacks: Vec<Callback>,
}

impl Ticket {
    /// Whether the operation has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Says where the group's record has it.
    pub(crate) fn set_record(&self, number: u64) {
        self.record.store(number + 1, Ordering::Relaxed);
    }

    /// Where the group's record has it, if it does.
    pub(crate) fn record(&self) -> Option<u64> {
        self.record.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Ends the operation and runs its callbacks on this thread. A second end changes nothing.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let callbacks = {
            let mut state = self.state();
            if state.outcome.is_some() {
                return;
            }
            state.outcome = Some(outcome.clone());
            std::mem::take(&mut state.callbacks)
        };
        self.finished.store(true, Ordering::Release);
        callbacks.into_iter().for_each(|callback| callback(&outcome));
    }

    /// How it ended; `None` while it is under way.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.state().outcome.clone()
    }

    /// Runs `callback` when the operation ends: at once, on this thread, where it has.
    pub(crate) fn on_done(&self, callback: Callback) {
        let outcome = {
            let mut state = self.state();
            match &state.outcome {
                Some(outcome) => outcome.clone(),
                None => return state.callbacks.push(callback),
            }
        };
        callback(&outcome);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
