//! Pure: counts one sender's pushes within a stretch of time, to the fraction.

use std::time::Instant;

/// One sender's pushes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Count {
    /// Pushes within the stretch so far.
    pub(super) pushes: f64,
    last: Instant,
    begin: Option<Instant>,
    end: Option<Instant>,
}

impl Count {
    /// Nothing has come, and counting has not begun.
    pub(super) fn new(now: Instant) -> Self {
        Self { pushes: 0.0, last: now, begin: None, end: None }
    }

    /// Pushes count from `now` on.
    pub(super) fn begin(&mut self, now: Instant) {
        self.begin = Some(now);
    }

    /// Pushes count no longer; the one that is under way still does, in part.
    pub(super) fn end(&mut self, now: Instant) {
        self.end = Some(now);
    }

    /// A push has come: it has taken the time since the last one.
    pub(super) fn came(&mut self, now: Instant) {
        if let Some(begin) = self.begin {
            let (from, until) = (self.last.max(begin), self.end.map_or(now, |end| now.min(end)));
            let whole = now.saturating_duration_since(self.last).as_secs_f64();
            let within = until.saturating_duration_since(from).as_secs_f64();
            // Two that came at once were under way together.
            self.pushes += if whole > 0.0 { within / whole } else { f64::from(self.end.is_none()) };
        }
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_push_across_an_edge_counts_for_the_share_of_its_time_within() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut count = Count::new(start);
        count.came(at(100));
        count.begin(at(150));
        for ms in [200, 300, 300, 400] {
            count.came(at(ms));
        }
        count.end(at(425));
        assert!((count.pushes - 3.5).abs() < 1e-9);
        for ms in [500, 600] {
            count.came(at(ms));
        }
        assert!((count.pushes - 3.75).abs() < 1e-9);
        let mut starved = Count::new(start);
        starved.begin(at(100));
        starved.end(at(1100));
        starved.came(at(2000));
        assert!((starved.pushes - 0.5).abs() < 1e-9, "half of its time lay within");
    }
}
