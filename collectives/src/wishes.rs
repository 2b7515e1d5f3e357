//! Does: keeps what other threads want of an engine that one thread holds: it may hold it for as long as ranks are late.

use crate::messages::Message;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

type Watch = Box<dyn Fn() -> bool + Send + Sync>;

/// What is wanted, and not yet seen by who holds the engine.
#[derive(Default)]
pub(crate) struct Wishes {
    any: AtomicBool,
    list: Mutex<List>,
    watch: OnceLock<Watch>,
    closed: OnceLock<Instant>,
}

#[derive(Default)]
struct List {
    messages: Vec<Message>,
    abort: Option<String>,
}

impl Wishes {
    /// Whether there is anything.
    pub(crate) fn any(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// Wants `message` begun.
    pub(crate) fn send(&self, message: Message) {
        self.list().messages.push(message);
        self.any.store(true, Ordering::SeqCst);
    }

    /// Wants the group ended.
    pub(crate) fn abort(&self, reason: String) {
        self.list().abort.get_or_insert(reason);
        self.any.store(true, Ordering::SeqCst);
    }

    /// All that is wanted.
    pub(crate) fn take(&self) -> (Vec<Message>, Option<String>) {
        self.any.store(false, Ordering::SeqCst);
        let mut list = self.list();
        (std::mem::take(&mut list.messages), list.abort.take())
    }

    /// Has waits for other ranks end `until` then.
    pub(crate) fn close(&self, until: Instant) {
        // Who closes again has nothing to add.
        let _ = self.closed.set(until);
    }

    /// Whether they have to end.
    pub(crate) fn is_closed(&self, now: Instant) -> bool {
        self.closed.get().is_some_and(|until| now >= *until)
    }

    /// Sets who is asked now and then, by a thread that waits, whether to give the group up.
    pub(crate) fn set_watch(&self, watch: Watch) {
        // A second one has nothing to add: the first stays.
        let _ = self.watch.set(watch);
    }

    /// Whether a waiting thread is to give the group up.
    pub(crate) fn gives_up(&self) -> bool {
        self.watch.get().is_some_and(|watch| watch())
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
