//! Pure: clipping by a norm over many tables: a clock's sum is closed, its squares are told, and it is applied once somebody who
//! has heard from all shards says by what it is to be multiplied.

use super::{Answer, Apply, Order, Part, Table, Wait, divisor, waited};
use crate::body::{BadBody, Reader, Writer};
use crate::exact_sum::ExactSum;
use crate::header::{FLAG_INLINE, Header, Kind};
use crate::memory::Memory;
use crate::refusal::{Reason, Refusal};
use gradwire_transport::PeerId;
use std::time::Instant;

/// What a clipped table remembers beside its parts.
#[derive(Debug, Default)]
pub(super) struct Clipping {
    /// Who waits for the squares of the clock under way.
    waits: Vec<Wait>,
    /// The last clock that was scaled, with its squares and its scale, for workers who ask late.
    last: Option<(u64, ExactSum, f64)>,
}

impl Clipping {
    /// The last clock that was scaled; who waits asks again.
    pub(super) fn image(&self) -> Self {
        Self { waits: Vec::new(), last: self.last.clone() }
    }

    /// The same, where `clock` is the last one: a later one comes again.
    pub(super) fn at_cut(&self, clock: u64) -> Self {
        Self { waits: Vec::new(), last: self.last.clone().filter(|(last, ..)| *last == clock) }
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.byte(self.last.is_some().into());
        if let Some((clock, squares, scale)) = &self.last {
            out.number(*clock);
            squares.encode(out);
            out.float(*scale);
        }
    }

    pub(super) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let last = match from.byte()? {
            0 => None,
            _ => Some((from.number()?, ExactSum::decode(from)?, from.float()?)),
        };
        Ok(Self { waits: Vec::new(), last })
    }
}

impl Table {
    /// Answers with the sum of squares of this share's gradient at the header's clock, once all workers have contributed.
    pub(crate) fn norm(&mut self, from: Wait, out: &mut Vec<Answer>) -> Result<(), Refusal> {
        self.check_clipped(&from.header)?;
        let clock = from.header.clock;
        match &self.clipping.last {
            Some((last, squares, _)) if *last == clock => out.push(told(&from, squares)),
            _ if self.parts.is_empty() => out.push(told(&from, &ExactSum::default())),
            _ if clock <= self.completed() => {
                let expected = format!("clock {} or later", self.completed());
                return Err(Refusal::new(Reason::Mismatch, self.spec.subject(), "clock of a norm", expected, clock));
            }
            _ => {
                self.clipping.waits.push(from);
                self.tell_squares(out);
            }
        }
        Ok(())
    }

    /// Applies the clock under way with its gradient multiplied by `scale`. Every worker says it; the first counts.
    pub(crate) fn scale(
        &mut self,
        header: &Header,
        scale: f64,
        memory: &mut Memory,
        out: &mut Vec<Answer>,
    ) -> Result<(), Refusal> {
        self.check_clipped(header)?;
        let (clock, completed) = (header.clock, self.completed());
        let mismatch = |what: &str, expected: String, got: String| {
            Err(Refusal::new(Reason::Mismatch, self.spec.subject(), what, expected, got))
        };
        match &self.clipping.last {
            Some((last, _, known)) if *last == clock && known.to_bits() != scale.to_bits() => {
                return mismatch(
                    "scale (do all workers clip the same tables to the same norm?)",
                    known.to_string(),
                    scale.to_string(),
                );
            }
            _ if clock <= completed || self.parts.is_empty() => return Ok(()),
            _ => {}
        }
        let Some(squares) = self.squares().filter(|_| clock == completed + 1) else {
            return mismatch(
                "scale",
                format!("none before all have pushed to clock {}", completed + 1),
                format!("one for clock {clock}"),
            );
        };
        let divisor = divisor(self.spec.combine, self.spec.mode);
        let Self { parts, rates, .. } = self;
        let rule_at = |clock: u64| rates.at(clock);
        let apply = Apply { divisor, rule_at: &rule_at, clipped: true };
        for part in parts {
            part.apply_closed(scale, &apply, memory, out);
        }
        self.clipping.last = Some((clock, squares, scale));
        self.keep_wanted();
        self.tell_squares(out);
        Ok(())
    }

    fn check_clipped(&self, header: &Header) -> Result<(), Refusal> {
        let workers = self.spec.mode.workers().unwrap_or(0);
        if self.spec.clipped && header.client < workers.into() && header.clock > 0 {
            return Ok(());
        }
        let expected = "a table that was opened to be clipped, and one of its workers";
        let got = format!("client {} at clock {}", header.client, header.clock);
        Err(Refusal::new(Reason::Mismatch, self.spec.subject(), "clipping", expected, got))
    }

    /// The squares of the clock under way, where every part's sum is closed.
    fn squares(&self) -> Option<ExactSum> {
        self.parts.iter().try_fold(ExactSum::default(), |mut sum, part| {
            sum.merge(part.closed.as_ref()?);
            Some(sum)
        })
    }

    /// Tells the squares to who waits for them, if they are there.
    pub(super) fn tell_squares(&mut self, out: &mut Vec<Answer>) {
        let clock = self.completed() + 1;
        if !self.clipping.waits.iter().any(|wait| wait.header.clock == clock) {
            return;
        }
        let Some(squares) = self.squares() else { return };
        let ready = self.clipping.waits.extract_if(.., |wait| wait.header.clock == clock);
        out.extend(ready.map(|wait| told(&wait, &squares)));
    }

    pub(super) fn waiting_for_squares(&self) -> usize {
        self.clipping.waits.len()
    }

    pub(super) fn forget_squares(&mut self, peer: PeerId) {
        self.clipping.waits.retain(|wait| wait.to != peer);
    }

    pub(super) fn expire_squares(&mut self, now: Instant, mut refuse: impl FnMut(Wait, Refusal)) {
        let late: Vec<Wait> = self.clipping.waits.extract_if(.., |wait| wait.until <= now).collect();
        for wait in late {
            let missing = self.parts.iter().find(|part| part.closed.is_none()).map(|part| part.waits_for(&wait).1);
            let what = format!("squares of clock {}", wait.header.clock);
            refuse(wait, waited(self.spec.subject(), what, &missing.unwrap_or_default()));
        }
    }
}

impl Part {
    /// Applies a closed sum, multiplied by `scale`, and takes what was held for the next clock.
    fn apply_closed(&mut self, scale: f64, apply: &Apply<'_>, memory: &mut Memory, out: &mut Vec<Answer>) {
        let Order::Clocks(ledger) = &mut self.order else { unreachable!("only clocks are clipped") };
        self.closed = None;
        let clock = ledger.completed() + 1;
        self.values.apply_closed(&(apply.rule_at)(clock), clock, scale);
        ledger.advance();
        self.image_at(clock);
        self.answer_ready(out);
        self.place_held(apply, memory, out);
    }
}

fn told(wait: &Wait, squares: &ExactSum) -> Answer {
    let mut body = Writer::default();
    squares.encode(&mut body);
    let mut header = wait.header.reply(Kind::Done);
    (header.flags, header.payload_bytes) = (FLAG_INLINE, body.0.len() as u64);
    Answer::Told(wait.to, header, body.0)
}
