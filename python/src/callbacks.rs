//! Does: runs Python callbacks of ended operations on threads of their own, never on the one that moves bytes.
//!
//! A callback may start and wait for another collective (PyTorch's PowerSGD hook does), so one that waits must not keep the
//! next from running: the pool grows while all its threads are busy, and threads that find nothing to do leave.

use pyo3::prelude::*;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Threads at most; callbacks beyond wait in the queue, which the operations under way bound.
const MOST_THREADS: usize = 512;
/// How long a thread waits for work before it leaves.
const IDLE: Duration = Duration::from_secs(5);

struct Queue {
    waiting: VecDeque<Py<PyAny>>,
    idle: usize,
    threads: usize,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue { waiting: VecDeque::new(), idle: 0, threads: 0 });
static BELL: Condvar = Condvar::new();

/// Has `callback` called without arguments, soon. Needs no GIL.
pub(crate) fn call_soon(callback: Py<PyAny>) {
    let mut queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
    queue.waiting.push_back(callback);
    if queue.idle >= queue.waiting.len() || queue.threads >= MOST_THREADS {
        drop(queue);
        BELL.notify_one();
        return;
    }
    let name = "gradwire-done".to_owned();
    match std::thread::Builder::new().name(name).spawn(work) {
        Ok(_) => queue.threads += 1,
        // Those that are there will come to it.
        Err(error) => eprintln!("gradwire: no thread for a callback: {error}"),
    }
}

fn work() {
    let mut queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(callback) = queue.waiting.pop_front() {
            drop(queue);
            run(callback);
            queue = QUEUE.lock().unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        queue.idle += 1;
        let (again, wait) = BELL.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
        queue = again;
        queue.idle -= 1;
        if wait.timed_out() && queue.waiting.is_empty() {
            queue.threads -= 1;
            return;
        }
    }
}

fn run(callback: Py<PyAny>) {
    // None: the interpreter is going down, and nobody is left to be told.
    let _ = Python::try_attach(|py| {
        if let Err(error) = callback.call0(py) {
            error.write_unraisable(py, Some(callback.bind(py)));
        }
        drop(callback);
    });
}
