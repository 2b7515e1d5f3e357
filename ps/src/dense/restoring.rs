//! Pure: a table that a server has lost, until its workers have given its values again.

use super::{ClockLedger, Order, Table, Wait};
use crate::Schedule;
use crate::header::Header;
use crate::rates::Rates;
use crate::refusal::{Reason, Refusal};

/// What is still missing of a table that was lost.
#[derive(Debug)]
pub(super) struct Lost {
    /// The clock from which it goes on, once that is said.
    clock: Option<u64>,
    /// Which parts have their values.
    come: Vec<bool>,
}

impl Table {
    /// A new table in the place of one that another server had: nobody may use it before its values have come.
    pub(crate) fn mark_lost(&mut self) {
        self.lost = Some(Lost { clock: None, come: vec![false; self.parts.len()] });
    }

    /// Refuses a request about values that are not there yet.
    pub(crate) fn check_there(&self) -> Result<(), Refusal> {
        if self.lost.is_none() {
            return Ok(());
        }
        let (expected, got) =
            ("one whose values are there", "one that a server has lost: all its workers are to recover it");
        Err(Refusal::new(Reason::UnknownTable, self.spec.subject(), "table", expected, got))
    }

    /// Takes out what all workers but `by`, who recovers the table, wait for: they would wait for its push, and it for them.
    /// Whoever only reads waits on; who is no worker takes out nothing.
    pub(crate) fn recall(&mut self, by: u64, mut refuse: impl FnMut(Wait, Refusal)) {
        let workers = u64::from(self.spec.mode.workers().unwrap_or(0));
        let is_other = |client: u64| by < workers && client < workers && client != by;
        let parts = self.parts.iter_mut();
        for wait in parts.flat_map(|part| part.waits.extract_if(.., |wait| is_other(wait.header.client))) {
            let (expected, got) = ("all its workers to recover it", format!("worker {by}, who has begun to"));
            refuse(wait, Refusal::new(Reason::Recovering, self.spec.subject(), "recovery", expected, got));
        }
    }

    /// The table goes on from the header's clock, with these learning rates from those clocks on. Whether its values are wanted:
    /// not where it was never lost.
    pub(crate) fn restart(&mut self, header: &Header, rates: Vec<(u64, Schedule)>) -> Result<bool, Refusal> {
        let clock = header.clock;
        if clock >> 62 != 0 {
            let subject = self.spec.subject();
            return Err(Refusal::new(Reason::Malformed, subject, "clock", "one that can be counted on from", clock));
        }
        let Some(lost) = &mut self.lost else { return Ok(false) };
        self.rates = Rates::given(self.spec.rule, rates, self.spec.subject())?;
        lost.clock = Some(clock);
        lost.come.fill(false);
        (self.init.done, self.init.holder) = (true, None);
        self.lost.take_if(|lost| lost.come.is_empty());
        Ok(true)
    }

    /// Writes the values of a part. Nothing is changed where they have come, or the table was never lost.
    pub(crate) fn restore(&mut self, at: usize, header: &Header, bytes: &[u8]) -> Result<(), Refusal> {
        let Some(lost) = &mut self.lost else { return Ok(()) };
        if lost.clock != Some(header.clock) {
            let expected = lost.clock.map_or("none yet".to_owned(), |clock| clock.to_string());
            return Err(Refusal::new(
                Reason::Mismatch,
                self.spec.subject(),
                "clock to go on from",
                expected,
                header.clock,
            ));
        }
        if std::mem::replace(&mut lost.come[at], true) {
            return Ok(());
        }
        let part = &mut self.parts[at];
        part.values.restart(bytes, header.clock);
        part.order = Order::Clocks(ClockLedger::at(self.spec.mode.workers().unwrap_or(1), header.clock));
        self.lost.take_if(|lost| lost.come.iter().all(|come| *come));
        Ok(())
    }
}
