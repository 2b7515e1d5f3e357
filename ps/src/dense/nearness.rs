//! Pure: pushes to a part with bounded staleness: applied as they come, parked while their sender is too far ahead.

use super::{Answer, Order, Part, Wait};
use crate::bounded::Turn;
use crate::memory::{Copied, Memory};
use crate::rates::Rates;
use crate::values::{Gradient, Source};
use crate::{DType, header::Kind};
use gradwire_transport::PeerId;
use std::time::Instant;

/// A push that waits until others come nearer. It is not counted yet.
pub(super) struct Parked {
    from: Wait,
    dtype: DType,
    bytes: Copied,
}

impl Part {
    /// Takes a push. Whether it was a duplicate; `None` when it must come again.
    pub(super) fn push_bounded(
        &mut self,
        from: &Wait,
        gradient: Gradient<'_>,
        (rates, divisor): (&Rates, f64),
        memory: &mut Memory,
        out: &mut Vec<Answer>,
    ) -> Option<bool> {
        let Order::Bounded { progress, .. } = &self.order else { unreachable!("only bounded parts park") };
        match progress.turn(from.header.clock, rank(from)) {
            Turn::TooEarly => return None,
            Turn::Wait => {
                let bytes = memory.copy(from.header.client, gradient.1)?;
                self.parked.push(Parked { from: *from, dtype: gradient.0, bytes });
                return Some(false);
            }
            Turn::Duplicate => {
                self.wait_or_answer(*from, out);
                return Some(true);
            }
            Turn::Now => self.apply_bounded(from, gradient, rates, divisor, out),
        }
        loop {
            let Order::Bounded { progress, .. } = &self.order else { return Some(false) };
            let turn = |parked: &Parked| progress.turn(parked.from.header.clock, rank(&parked.from));
            let ready = |parked: &Parked| matches!(turn(parked), Turn::Now | Turn::Duplicate);
            let Some(at) = self.parked.iter().position(ready) else { return Some(false) };
            let counted = turn(&self.parked[at]) == Turn::Duplicate;
            let Parked { from, dtype, bytes } = self.parked.swap_remove(at);
            if counted {
                // It came twice while it waited.
                self.wait_or_answer(from, out);
            } else {
                self.apply_bounded(&from, (dtype, &bytes), rates, divisor, out);
            }
            memory.give_back(bytes);
        }
    }

    fn apply_bounded(
        &mut self,
        from: &Wait,
        gradient: Gradient<'_>,
        rates: &Rates,
        divisor: f64,
        out: &mut Vec<Answer>,
    ) {
        let Order::Bounded { progress, applied } = &mut self.order else { return };
        *applied += 1;
        self.values.apply(&rates.at(from.header.clock), *applied, divisor, Source::Only(gradient));
        progress.advance(rank(from));
        self.wait_or_answer(*from, out);
        self.answer_ready(out);
    }

    fn unpark(&mut self, which: impl Fn(&Parked) -> bool, memory: &mut Memory) -> Vec<Wait> {
        let out = self.parked.extract_if(.., |parked| which(parked));
        out.map(|parked| {
            memory.give_back(parked.bytes);
            parked.from
        })
        .collect()
    }

    /// Forgets the pushes of a connection: they were not counted, and come again over the next one.
    pub(super) fn unpark_of(&mut self, peer: PeerId, memory: &mut Memory) {
        self.unpark(|parked| parked.from.to == peer, memory);
    }

    /// Takes out all pushes that wait.
    pub(super) fn unpark_all(&mut self, memory: &mut Memory) -> Vec<Wait> {
        self.unpark(|_| true, memory)
    }

    /// Takes out the pushes that have waited too long.
    pub(super) fn unpark_late(&mut self, now: Instant, memory: &mut Memory) -> Vec<Wait> {
        self.unpark(|parked| parked.from.until <= now, memory)
    }

    /// How far all workers must have come before `wait` is answered, less the staleness.
    pub(super) fn needs(wait: &Wait) -> u64 {
        if wait.header.kind == Kind::Push { wait.header.clock - 1 } else { wait.header.clock }
    }
}

fn rank(from: &Wait) -> u32 {
    u32::try_from(from.header.client).expect("checked against the number of workers")
}
