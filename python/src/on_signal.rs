//! Does: writes the records of this process's groups when it gets a signal, by a thread that only waits for that: also while all others
//! wait for ranks, and without Python. The program goes on.

use crate::{errors, forked};
use gradwire_collectives::TraceWriter;
use pyo3::prelude::*;
use signal_hook::consts::{SIGHUP, SIGIO, SIGQUIT, SIGURG, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Signals that mean nothing to a program that has not said so; all others end, stop or wake it, or tell of a fault.
const FREE: [i32; 7] = [SIGUSR1, SIGUSR2, SIGHUP, SIGQUIT, SIGURG, SIGWINCH, SIGIO];

/// What is listened for in this process, and for which groups.
struct Listening {
    /// Of which generation of forks: a child has none of its parent's threads.
    generation: u32,
    signals: Vec<i32>,
    writers: Vec<TraceWriter>,
}

static LISTENING: Mutex<Listening> = Mutex::new(Listening { generation: 0, signals: Vec::new(), writers: Vec::new() });

fn listening() -> MutexGuard<'static, Listening> {
    let mut listening = LISTENING.lock().unwrap_or_else(PoisonError::into_inner);
    if listening.generation != forked::generation() {
        *listening = Listening { generation: forked::generation(), signals: Vec::new(), writers: Vec::new() };
    }
    listening
}

/// The signal that `text` means: `USR2`, `SIGUSR2` or `12`.
///
/// # Errors
/// Why it cannot be had, and which can.
pub(crate) fn parse(text: &str) -> Result<i32, String> {
    let name = |signal: i32| signal_name(signal).unwrap_or_default().trim_start_matches("SIG");
    let (wanted, upper) = (text.trim(), text.trim().to_uppercase());
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    let is_it = |signal: &i32| wanted.parse() == Ok(*signal) || short == name(*signal);
    FREE.into_iter().find(is_it).ok_or_else(|| {
        let free: Vec<String> = FREE.map(|signal| format!("{} ({signal})", name(signal))).into();
        format!("`{text}` is not a signal that is free for this: use one of {}", free.join(", "))
    })
}

/// Has `signal` write the records from now on.
///
/// # Errors
/// `GradwireError` where the handler or the thread cannot be had.
pub(crate) fn listen(signal: i32) -> PyResult<()> {
    let mut listening = listening();
    if listening.signals.contains(&signal) {
        return Ok(());
    }
    let failed = |error| errors::plain(format!("GRADWIRE_TRACE_SIGNAL: cannot listen for signal {signal}: {error}"));
    let mut signals = Signals::new([signal]).map_err(failed)?;
    let write = move || signals.forever().for_each(|_| write_all());
    std::thread::Builder::new().name("gradwire-trace".to_owned()).spawn(write).map_err(failed)?;
    listening.signals.push(signal);
    Ok(())
}

/// Has the record of one more group written.
pub(crate) fn add(writer: TraceWriter) {
    let mut listening = listening();
    listening.writers.retain(TraceWriter::is_live);
    listening.writers.push(writer);
}

fn write_all() {
    let writers = listening().writers.clone();
    for written in writers.iter().filter_map(TraceWriter::write) {
        // Whoever sent the signal looks for a file, and here where there is none.
        match written {
            Ok(path) => eprintln!("gradwire: the record of the last operations is in {}", path.display()),
            Err(error) => eprintln!("gradwire: the record of the last operations is not written: {error}"),
        }
    }
}
