//! Pure: when a receiver lets senders begin, when it counts, and when all is over.

use super::member::{MEASURE, NAP, START, STOP};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    /// Waiting for a first push of everybody, of which every byte is checked.
    Meeting,
    Warming,
    Measuring,
    /// Waiting for a last push of everybody, and for their goodbye.
    Ending,
}

/// The receiver's phases.
pub(super) struct Phases {
    phase: Phase,
    began: Instant,
    warm_up: Duration,
    seconds: Duration,
    /// Seconds that were measured.
    pub(super) window: Option<f64>,
}

impl Phases {
    /// Waits for everybody.
    pub(super) fn new(now: Instant, warm_up: f64, seconds: f64) -> Self {
        let (warm_up, seconds) = (Duration::from_secs_f64(warm_up), Duration::from_secs_f64(seconds));
        Self { phase: Phase::Meeting, began: now, warm_up, seconds, window: None }
    }

    /// Whether senders are to leave.
    pub(super) fn is_ending(&self) -> bool {
        self.phase == Phase::Ending
    }

    /// Goes on to the next phase where it is time; what to tell the senders then.
    pub(super) fn turn(&mut self, now: Instant, all_have_come: bool) -> Option<u64> {
        let (phase, note) = match self.phase {
            Phase::Meeting if all_have_come => (Phase::Warming, START),
            Phase::Warming if now >= self.began + self.warm_up => (Phase::Measuring, MEASURE),
            Phase::Measuring if now >= self.began + self.seconds => {
                self.window = Some((now - self.began).as_secs_f64());
                (Phase::Ending, STOP)
            }
            _ => return None,
        };
        (self.phase, self.began) = (phase, now);
        Some(note)
    }

    /// When to look again.
    pub(super) fn due(&self, now: Instant) -> Instant {
        match self.phase {
            Phase::Warming => self.began + self.warm_up,
            Phase::Measuring => self.began + self.seconds,
            Phase::Meeting | Phase::Ending => now + NAP,
        }
    }
}
