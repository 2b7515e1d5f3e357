//! Pure: the learning rate at each clock, as clients set it.

use crate::body::{BadBody, Reader, Writer};
use crate::header::{FLAG_AGAIN, Header};
use crate::refusal::{Reason, Refusal};
use crate::schedule::Schedule;
use crate::{Mode, UpdateRule};

/// A schedule, the clock from which it holds, and the clock of its step 0.
#[derive(Clone, Debug)]
struct Rate {
    clock: u64,
    origin: u64,
    schedule: Schedule,
    client: u64,
    sequence: u64,
}

/// Whose rates those of a checkpoint are: anybody may set them anew.
const NOBODY: u64 = u64::MAX;

/// A rule whose learning rate changes.
#[derive(Clone, Debug)]
pub(crate) struct Rates {
    rule: UpdateRule,
    rates: Vec<Rate>,
}

impl Rates {
    pub(crate) fn new(rule: UpdateRule) -> Self {
        Self { rule, rates: Vec::new() }
    }

    /// `rule` with learning rates that hold from those clocks on, as whoever gives a table again says them.
    pub(crate) fn given(rule: UpdateRule, given: Vec<(u64, Schedule)>, subject: String) -> Result<Self, Refusal> {
        let wrong = |expected: &str, got: String| {
            Refusal::new(Reason::Malformed, subject.clone(), "learning rates", expected, got)
        };
        if !given.is_empty() && rule.learning_rate().is_none() {
            return Err(wrong("none, for this rule", rule.to_string()));
        }
        if !given.is_sorted_by(|before, after| before.0 < after.0) {
            return Err(wrong("one a clock, in their order", "others".into()));
        }
        for (_, schedule) in &given {
            let checked = schedule.check().and_then(|()| rule.with_learning_rate(schedule.least()).check());
            checked.map_err(|why| wrong("at least 0", why))?;
        }
        let each = given.into_iter();
        let rates = each.map(|(clock, schedule)| Rate { clock, origin: clock, schedule, client: NOBODY, sequence: 0 });
        Ok(Self { rule, rates: rates.collect() })
    }

    /// The rule as it is at `clock`; in asynchronous mode, for the push of that number.
    pub(crate) fn at(&self, clock: u64) -> UpdateRule {
        let last = self.rates.iter().rev().find(|rate| rate.clock <= clock);
        last.map_or(self.rule, |rate| self.rule.with_learning_rate(rate.schedule.at(clock.saturating_sub(rate.origin))))
    }

    /// Sets the learning rates from the header's clock on; where clocks are not completed together, at once, with step 0 at
    /// the header's clock, or at the next push where none are counted. Clients that set them for the same clock must agree.
    /// `completed`: the last clock that is.
    pub(crate) fn set(
        &mut self,
        header: &Header,
        schedule: Schedule,
        mode: Mode,
        completed: u64,
        subject: String,
    ) -> Result<(), Refusal> {
        if self.rule.learning_rate().is_none() {
            let rule = self.rule;
            return Err(Refusal::new(Reason::Mismatch, subject, "update rule", "one with a learning rate", rule));
        }
        let checked = schedule.check().and_then(|()| self.rule.with_learning_rate(schedule.least()).check());
        checked.map_err(|why| Refusal::new(Reason::Malformed, subject.clone(), "learning rate", "at least 0", why))?;
        let (client, sequence) = (header.client, header.sequence);
        let origin = if mode == Mode::Async { completed + 1 } else { header.clock };
        if !matches!(mode, Mode::Sync { .. }) {
            let again = self.rates.iter().any(|known| known.client == client && known.sequence >= sequence);
            if !(again && header.flags & FLAG_AGAIN != 0) {
                self.rates = vec![Rate { clock: 0, origin, schedule, client, sequence }];
            }
            return Ok(());
        }
        let new = Rate { clock: header.clock, origin, schedule, client, sequence };
        let known = self.rates.iter_mut().find(|known| known.clock == new.clock);
        match known {
            Some(known) if known.client == new.client || known.client == NOBODY => {
                if new.sequence > known.sequence {
                    *known = new;
                }
            }
            Some(known) if known.schedule != new.schedule => {
                let what =
                    format!("learning rate at clock {} (client {} and client {})", new.clock, known.client, new.client);
                let (expected, got) = (format!("{:?}", known.schedule), format!("{:?}", new.schedule));
                return Err(Refusal::new(Reason::Mismatch, subject, what, expected, got));
            }
            Some(_) => {}
            // Sent again, and its clock complete: it came before its client's push to that clock, so it was heeded.
            None if completed >= new.clock && header.flags & FLAG_AGAIN != 0 => {}
            None if completed >= new.clock => {
                let expected = format!("a clock after {completed}");
                return Err(Refusal::new(Reason::Mismatch, subject, "clock of a learning rate", expected, new.clock));
            }
            None => {
                let at = self.rates.partition_point(|known| known.clock < new.clock);
                self.rates.insert(at, new);
            }
        }
        self.forget_old(completed + 1);
        Ok(())
    }

    /// As they hold after `clock`: what was set for later clocks than the next is set again by who goes on from there, and
    /// whoever sets the next one's anew is right.
    pub(crate) fn at_cut(&self, clock: u64) -> Self {
        let kept = self.rates.iter().filter(|rate| rate.clock <= clock + 1);
        let rates = kept.map(|rate| Rate { client: NOBODY, sequence: 0, ..rate.clone() }).collect();
        Self { rule: self.rule, rates }
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        self.rule.encode(out);
        out.number(self.rates.len() as u64);
        for rate in &self.rates {
            out.number(rate.clock);
            out.number(rate.origin);
            rate.schedule.encode(out);
            out.number(rate.client);
            out.number(rate.sequence);
        }
    }

    /// Reads what was encoded, for a table whose rule `fits`.
    pub(crate) fn decode(from: &mut Reader<'_>, fits: impl Fn(UpdateRule) -> bool) -> Result<Self, BadBody> {
        let rule = UpdateRule::decode(from)?;
        let rates = (0..from.count(57)?)
            .map(|_| {
                Ok(Rate {
                    clock: from.number()?,
                    origin: from.number()?,
                    schedule: Schedule::decode(from)?,
                    client: from.number()?,
                    sequence: from.number()?,
                })
            })
            .collect::<Result<Vec<_>, BadBody>>()?;
        let fine = |rate: &Rate| {
            rate.schedule.check().is_ok() && rule.with_learning_rate(rate.schedule.least()).check().is_ok()
        };
        if rule.check().is_err() || !fits(rule) || !rates.iter().all(fine) {
            return Err(BadBody("a learning rate makes no sense"));
        }
        if !rates.is_sorted_by(|before, after| before.clock < after.clock) {
            return Err(BadBody("learning rates are out of order"));
        }
        Ok(Self { rule, rates })
    }

    /// Forgets what holds for no clock still to come.
    fn forget_old(&mut self, next: u64) {
        let past = self.rates.partition_point(|rate| rate.clock <= next);
        // The last of them holds at the next clock, and may still be set anew for it.
        self.rates.drain(..past.saturating_sub(1));
    }
}
