//! Does: says on stderr, every few seconds, how far a long run is; stdout is for its rows.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a run is heard of, in seconds, unless `--progress` says otherwise.
pub(crate) const USUAL_PACE_S: f64 = 5.0;

/// What `--progress` says: the same for all that this process measures.
static PACE_S: OnceLock<f64> = OnceLock::new();

/// Has runs heard of every so many seconds; of 0, never.
pub(crate) fn set_pace(seconds: f64) {
    // It is set once, as the program begins.
    let _ = PACE_S.set(seconds);
}

/// The same for a process that this one starts.
pub(crate) fn flags() -> [String; 2] {
    ["--progress".to_owned(), pace().to_string()]
}

fn pace() -> f64 {
    *PACE_S.get_or_init(|| USUAL_PACE_S)
}

/// A run that is heard of until this is dropped. A thread of its own speaks, so that a call that takes long, or hangs, is heard
/// of too; it sleeps in between.
pub(crate) struct Progress {
    shared: Arc<Shared>,
    speaker: Option<JoinHandle<()>>,
}

struct Shared {
    place: Mutex<Place>,
    over: Condvar,
}

/// How far it is.
struct Place {
    steps: usize,
    step: usize,
    what: String,
    is_over: bool,
}

impl Progress {
    /// A run of so many steps.
    pub(crate) fn start(steps: usize) -> Self {
        let pace = Some(pace()).filter(|pace| *pace > 0.0).map(Duration::from_secs_f64);
        // In one write, so that it comes between the lines of others; where nobody listens any more, the run still counts.
        Self::saying(steps, pace, |line| drop(std::io::stderr().write_all(format!("{line}\n").as_bytes())))
    }

    fn saying(steps: usize, pace: Option<Duration>, say: impl Fn(&str) + Send + 'static) -> Self {
        let place = Place { steps, step: 0, what: "starting".to_owned(), is_over: false };
        let shared = Arc::new(Shared { place: Mutex::new(place), over: Condvar::new() });
        let speaker = pace.map(|pace| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.speak(pace, &say))
        });
        Self { shared, speaker }
    }

    /// The next step begins: `what`.
    pub(crate) fn next(&self, what: String) {
        let mut place = self.shared.place();
        place.step += 1;
        place.what = what;
    }

    /// The same step has come to `what`.
    pub(crate) fn at(&self, what: String) {
        self.shared.place().what = what;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.shared.place().is_over = true;
        self.shared.over.notify_all();
        if let Some(speaker) = self.speaker.take() {
            // It ends at once, and cannot fail but by its own panic, which it has told.
            let _ = speaker.join();
        }
    }
}

impl Shared {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn speak(&self, pace: Duration, say: &impl Fn(&str)) {
        let began = Instant::now();
        let mut place = self.place();
        loop {
            let waited = self.over.wait_timeout_while(place, pace, |place| !place.is_over);
            place = waited.unwrap_or_else(PoisonError::into_inner).0;
            if place.is_over {
                return;
            }
            say(&place.said(began.elapsed()));
        }
    }
}

impl Place {
    fn said(&self, elapsed: Duration) -> String {
        let Self { steps, step, what, .. } = self;
        format!("{:.0} s: step {step} of {steps}, {what}", elapsed.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_run_is_heard_of_again_and_again_with_its_step_until_it_is_over() {
        let (say, heard) = mpsc::channel();
        let progress = Progress::saying(3, Some(Duration::from_millis(1)), move |line| {
            // The test may have heard enough.
            let _ = say.send(line.to_owned());
        });
        let until = |end: &str| {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !heard.recv_timeout(Duration::from_secs(10)).unwrap().ends_with(end) {
                assert!(Instant::now() < deadline, "never {end}");
            }
        };
        until(" s: step 0 of 3, starting");
        progress.next("a push".to_owned());
        until(" s: step 1 of 3, a push");
        until(" s: step 1 of 3, a push");
        progress.at("half of it".to_owned());
        until(" s: step 1 of 3, half of it");
        progress.next("a pull".to_owned());
        until(" s: step 2 of 3, a pull");
        drop(progress);
        while heard.try_recv().is_ok() {}
        assert_eq!(heard.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }

    #[test]
    fn a_short_run_and_one_that_nobody_wants_to_hear_of_say_nothing() {
        for pace in [None, Some(Duration::from_secs(600))] {
            let (say, heard) = mpsc::channel();
            let began = Instant::now();
            let progress = Progress::saying(1, pace, move |line| drop(say.send(line.to_owned())));
            progress.next("a push".to_owned());
            drop(progress);
            assert!(heard.recv().is_err() && began.elapsed() < Duration::from_secs(60));
        }
    }
}
