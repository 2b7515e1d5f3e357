//! Does: checks calls, numbers them and hands them to the engine; waits for their end.

use crate::call::{Call, Shape};
use crate::choose::Chooser;
use crate::driver::{Ran, Shared};
use crate::engine::Job;
use crate::pending::{Done, Ticket};
use crate::{Collective, CollectiveError, DType, Fingerprint};
use gradwire_transport::{Rank, WorldSize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The way to a group's engine, for all who make calls.
#[derive(Clone)]
pub(crate) struct Submitter {
    pub(crate) shared: Arc<Shared>,
    pub(crate) rank: Rank,
    pub(crate) world_size: WorldSize,
    pub(crate) chooser: Chooser,
    /// Who and where this rank is, for those who hear that it gave the group up.
    pub(crate) who: String,
}

impl Submitter {
    /// Hands `call` to the engine; it moves when somebody waits, or by the progress thread.
    pub(crate) fn submit(&self, call: Call) -> Result<Arc<Ticket>, CollectiveError> {
        let make = self.prepare(call)?;
        Ok(self.shared.submit_job(make))
    }

    /// Hands `call` to the engine, among the ranks in this one's place on their hosts, in the name of a call of all.
    ///
    /// The call is one of a group of as many ranks as there are hosts; averages divide by all ranks.
    pub(crate) fn submit_across(&self, call: Call, fingerprint: Fingerprint) -> Result<Arc<Ticket>, CollectiveError> {
        let across = self.chooser.hosts().and_then(|hosts| hosts.across(self.rank));
        let (members, me) = across.expect("called where all hosts have as many ranks");
        let size = WorldSize::new(members.len() as u32).expect("a rank is on a host");
        let shape = Shape { across: true, ..call.shape(me, size)? };
        let timeout = call.timeout.unwrap_or_else(|| self.shared.timeout());
        let called = Instant::now();
        Ok(self.shared.submit_job(move |sequence| Job { call, shape, fingerprint, sequence, called, timeout }))
    }

    /// Hands `call` to the engine, among all ranks, as a part of another call and in that one's name.
    pub(crate) fn submit_for(&self, call: Call, fingerprint: Fingerprint) -> Result<Arc<Ticket>, CollectiveError> {
        let make = self.prepare(call)?;
        Ok(self.shared.submit_job(move |sequence| Job { fingerprint, ..make(sequence) }))
    }

    /// Carries out `call` from this thread.
    pub(crate) fn run(&self, call: Call) -> Result<(), CollectiveError> {
        self.run_made(self.prepare(call)?)
    }

    /// Has all ranks take a step, within `timeout`, in the name of a call that does its work elsewhere: who is in another one is found out.
    pub(crate) fn step(&self, fingerprint: Fingerprint, timeout: Duration) -> Result<(), CollectiveError> {
        let (collective, dtype) = (Collective::Barrier, DType::U8);
        let make = self.prepare(Call { collective, dtype, input: vec![], output: vec![], timeout: Some(timeout) })?;
        self.run_made(move |sequence| Job { fingerprint, ..make(sequence) })
    }

    fn run_made(&self, make: impl FnOnce(u64) -> Job) -> Result<(), CollectiveError> {
        match self.shared.run_job(make) {
            Ran::Here(outcome) => outcome,
            Ran::Queued(ticket) => self.finish(&ticket),
        }
    }

    /// Checks `call`, and tells how its job is made once it has a number.
    fn prepare(&self, call: Call) -> Result<impl FnOnce(u64) -> Job + use<>, CollectiveError> {
        let mut shape = call.shape(self.rank.index(), self.world_size)?;
        shape.packed = shape.packed && self.chooser.packs(call.dtype, shape.len, self.world_size);
        let ordered = self.chooser.orders(&call.collective, call.dtype);
        let fingerprint = shape.fingerprint(&call.collective, call.dtype, ordered);
        let timeout = call.timeout.unwrap_or_else(|| self.shared.timeout());
        let call = call.apart(self.rank.index(), self.world_size.get() as usize)?;
        let called = Instant::now();
        Ok(move |sequence| Job { call, shape, fingerprint, sequence, called, timeout })
    }

    /// Waits for the end of what was handed over; the caller's thread drives it meanwhile.
    pub(crate) fn finish(&self, ticket: &Ticket) -> Result<(), CollectiveError> {
        self.shared.wait(ticket, None);
        match ticket.outcome() {
            Some(outcome) => outcome.map(|Done { .. }| ()),
            None => Err(CollectiveError::Aborted { reason: "the communicator is closed".to_owned() }),
        }
    }

    /// Ends the group on every rank.
    pub(crate) fn abort(&self, reason: &str) {
        self.shared.abort(format!("{} aborted: {reason}", self.who));
    }
}
