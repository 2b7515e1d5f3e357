//! Does: threads of a group's calls over devices, each with a queue, and the order that calls over the host's memory keep with
//! them: all ranks must hand collectives to the group in the order in which they were called.

use gradwire_transport::TransportError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Calls that may wait in a queue; who makes more waits for room.
const QUEUE: usize = 1024;

type Work = Box<dyn FnOnce() + Send>;

/// A thread that does one piece of work after the other; started by the first.
pub(crate) struct Worker {
    name: &'static str,
    running: Mutex<Option<(SyncSender<Work>, JoinHandle<()>)>>,
}

impl Worker {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, running: Mutex::default() }
    }

    /// Queues `work`.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn give(&self, work: impl FnOnce() + Send + 'static) -> Result<(), TransportError> {
        let mut running = self.running();
        let (queue, _) = match &mut *running {
            Some(running) => running,
            none => {
                let (send, receive) = sync_channel::<Work>(QUEUE);
                let thread = std::thread::Builder::new()
                    .name(self.name.to_owned())
                    .spawn(move || receive.into_iter().for_each(|work| work()))
                    .map_err(|error| TransportError::io(format!("start the thread {}", self.name), error))?;
                none.insert((send, thread))
            }
        };
        let queue = queue.clone();
        drop(running);
        let gone = |_| TransportError::io("queue a call", std::io::ErrorKind::BrokenPipe);
        queue.send(Box::new(work)).map_err(gone)
    }

    /// Has the thread end once it has done all that was queued, and waits for it.
    pub(crate) fn join(&self) {
        let running = self.running().take();
        if let Some((queue, thread)) = running {
            drop(queue);
            // A panic of the thread has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<(SyncSender<Work>, JoinHandle<()>)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls that have been made, but not yet been handed to the group in full.
#[derive(Default)]
pub(crate) struct Order {
    /// How many of them there are, to be looked at without the lock.
    hint: AtomicUsize,
    /// How many were made ever, and how many of those are handed over; they are in the order in which they were made.
    counts: Mutex<(u64, u64)>,
    left: Condvar,
}

/// One of them. It is handed over, or has failed, when this is dropped.
pub(crate) struct Entry(Arc<Order>);

impl Drop for Entry {
    fn drop(&mut self) {
        self.0.count(|(_, left)| *left += 1);
        self.0.left.notify_all();
    }
}

impl Order {
    /// A call is made.
    pub(crate) fn enter(self: &Arc<Self>) -> Entry {
        self.count(|(entered, _)| *entered += 1);
        Entry(Arc::clone(self))
    }

    fn count(&self, change: impl FnOnce(&mut (u64, u64))) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut counts);
        self.hint.store((counts.0 - counts.1) as usize, Ordering::SeqCst);
    }

    /// Waits until all calls made so far have been handed over; each is, or fails, by its own deadline.
    pub(crate) fn wait(&self) {
        if self.hint.load(Ordering::SeqCst) == 0 {
            return;
        }
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let made = counts.0;
        let _counts = self.left.wait_while(counts, |(_, left)| *left < made).unwrap_or_else(PoisonError::into_inner);
    }
}
