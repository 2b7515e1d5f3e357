//! Does: asks a running server or coordinator for its report, from another thread: it answers between two turns.

use crate::gauges::Report;
use gradwire_transport::Wake;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A server or a coordinator, as others see it.
#[derive(Clone)]
pub struct Monitor<R = Report> {
    questions: Arc<Questions<R>>,
    /// Of who answers now.
    waker: Arc<Mutex<Arc<dyn Wake>>>,
}

impl<R> Monitor<R> {
    pub(crate) fn new(questions: Arc<Questions<R>>, waker: Arc<dyn Wake>) -> Self {
        Self { questions, waker: Arc::new(Mutex::new(waker)) }
    }

    /// From now on another server answers: its waker, for the questions that it is to answer.
    pub(crate) fn turn_to(&self, waker: Arc<dyn Wake>) -> Arc<Questions<R>> {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = waker;
        Arc::clone(&self.questions)
    }

    /// What it tells; `None` where it does not answer within `patience`, or has stopped.
    pub fn report(&self, patience: Duration) -> Option<R> {
        let answer = self.questions.ask()?;
        self.waker.lock().unwrap_or_else(PoisonError::into_inner).wake();
        answer.recv_timeout(patience).ok()
    }
}

/// Who waits for a report.
pub(crate) struct Questions<R = Report> {
    any: AtomicBool,
    senders: Mutex<Option<Vec<Sender<R>>>>,
}

impl<R> Default for Questions<R> {
    fn default() -> Self {
        Self { any: AtomicBool::new(false), senders: Mutex::new(None) }
    }
}

/// Most who may wait at once; beyond, nobody is listening any more.
const MOST: usize = 64;

impl<R> Questions<R> {
    /// From now on questions are answered.
    pub(crate) fn open(&self) {
        self.locked().get_or_insert_with(Vec::new);
    }

    /// Nobody is answered any more.
    pub(crate) fn close(&self) {
        *self.locked() = None;
    }

    /// Those who wait, where there are any: costs one look at a flag otherwise.
    pub(crate) fn take(&self) -> Vec<Sender<R>> {
        if !self.any.load(Ordering::Relaxed) || !self.any.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        self.locked().as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn ask(&self) -> Option<Receiver<R>> {
        let (sender, receiver) = channel();
        let mut locked = self.locked();
        let senders = locked.as_mut().filter(|senders| senders.len() < MOST)?;
        senders.push(sender);
        self.any.store(true, Ordering::Release);
        Some(receiver)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Option<Vec<Sender<R>>>> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
