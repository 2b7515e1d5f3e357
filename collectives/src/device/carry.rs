//! Does: carries out one call over a device's memory: round by round through pinned buffers.

use super::DeviceCall;
use super::cut::{self, Act, Round, SLOTS, Side};
use super::lane::Lane;
use super::lent::{Leg, Lending};
use super::worker::Entry;
use crate::call::{Call, Piece};
use crate::pending::{Outcome, Ticket};
use crate::submitter::Submitter;
use crate::{CollectiveError, Fingerprint};
use gradwire_transport::cuda::{Copying, CudaError, DeviceSlice, Event};
use gradwire_transport::{Overlap, Region, RegionSlice, RegionSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A call, ready to be carried out.
pub(crate) struct Carry {
    pub(crate) call: DeviceCall,
    pub(crate) rounds: Vec<Round>,
    /// Memory for a call of one round that is larger than the ring's buffers.
    pub(crate) large: Option<Arc<Region>>,
    pub(crate) lane: Arc<Lane>,
    pub(crate) lending: Arc<Lending>,
    /// What the caller's stream had been given when it called.
    pub(crate) ready: Event,
    pub(crate) submitter: Submitter,
    /// Its place among the calls that are not handed over in full.
    pub(crate) entry: Option<Entry>,
    /// Whether the group was closed or given up.
    pub(crate) over: Arc<AtomicBool>,
    pub(crate) deadline: Instant,
}

/// How often a wait for the device looks whether the group is over.
const LOOK: Duration = Duration::from_millis(50);

/// What goes by way of the host: a call, or what a part of one has between hosts.
struct Staging<'a> {
    call: &'a DeviceCall,
    rounds: &'a [Round],
    /// Where it is a part of a call: which, and in the name of which call.
    part: Option<(Leg, Fingerprint)>,
    reads_output: bool,
    writes_output: bool,
}

/// A buffer of the ring, as its round stands.
#[derive(Default)]
struct Slot {
    fetching: Vec<Copying<RegionSliceMut>>,
    with_group: Option<Arc<Ticket>>,
    storing: Vec<Copying<RegionSlice>>,
}

impl Carry {
    /// Carries it out. However it ends, the device is done with the call's memory then, and later calls may go to the group. What
    /// it holds of the device's memory is given back: freeing that may wait for streams which wait for this call.
    pub(crate) fn run(mut self) -> (Outcome, DeviceCall) {
        let mut entry = self.entry.take();
        let outcome = match self.between_devices() {
            Ok(true) => Ok(()),
            Ok(false) => {
                let (reads_output, writes_output) =
                    cut::uses_of_output(&self.call.collective, self.submitter.rank.index());
                let (call, rounds) = (&self.call, self.rounds.as_slice());
                let staging = Staging { call, rounds, part: None, reads_output, writes_output };
                self.stage(&staging, &mut entry)
            }
            Err(error) => Err(error),
        };
        drop(entry);
        if let Err(error) = &outcome
            && matches!(
                error,
                CollectiveError::Cuda(_) | CollectiveError::Transport(_) | CollectiveError::Invalid { .. }
            )
        {
            // The other ranks wait for a part that will not come.
            self.submitter.abort(&format!("{}: {error}", self.call.words()));
        }
        (outcome.map(|()| crate::Done::default()), self.call)
    }

    /// Carries it out from device to device, where that can be: a call of which all ranks know that all hand in memory of one.
    fn between_devices(&mut self) -> Result<bool, CollectiveError> {
        let (lending, (input, output)) = (Arc::clone(&self.lending), self.call.lens());
        let ranks = self.submitter.world_size.get() as usize;
        let is_known = cut::even(&self.call.collective, (&input, &output), ranks).is_some();
        if is_known && cut::is_alike(&self.rounds, lending.alike) { lending.carry(self) } else { Ok(false) }
    }

    /// What `call`, a part of this one, has by way of the host: a collective for each of as many rounds as all ranks have. However it
    /// ends, the device is done with the memory then.
    pub(super) fn across(
        &self,
        call: &DeviceCall,
        rounds: usize,
        part: (Leg, Fingerprint),
    ) -> Result<(), CollectiveError> {
        let (input, output) = call.lens();
        let rounds = cut::in_turn(&input, &output, rounds);
        let (reads_output, writes_output) = cut::uses_of_output(&call.collective, self.submitter.rank.index());
        let staging = Staging { call, rounds: &rounds, part: Some(part), reads_output, writes_output };
        self.stage(&staging, &mut None)
    }

    /// Leaves `entry` once all is with the group. However it ends, the device is done with the memory then.
    fn stage(&self, staging: &Staging<'_>, entry: &mut Option<Entry>) -> Result<(), CollectiveError> {
        let mut slots: [Slot; SLOTS] = Default::default();
        let outcome = self.in_rounds(staging, &mut slots, entry);
        let (fetching, storing): (Vec<_>, Vec<_>) = slots.into_iter().map(|slot| (slot.fetching, slot.storing)).unzip();
        Copying::let_go(fetching.into_iter().flatten());
        Copying::let_go(storing.into_iter().flatten());
        outcome
    }

    fn in_rounds(
        &self,
        staging: &Staging<'_>,
        slots: &mut [Slot; SLOTS],
        entry: &mut Option<Entry>,
    ) -> Result<(), CollectiveError> {
        self.lane.out.wait_for(&self.ready)?;
        self.lane.into.wait_for(&self.ready)?;
        for act in cut::order(staging.rounds.len()) {
            match act {
                Act::Fetch(round) => {
                    let slot = &mut slots[round % SLOTS];
                    self.settle(&mut slot.storing)?;
                    slot.fetching = self.fetch(staging, round)?;
                }
                Act::Exchange(round) => {
                    let slot = &mut slots[round % SLOTS];
                    self.settle(&mut slot.fetching)?;
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    let call = staging.call.staged(&staging.rounds[round], self.buffer(round), Some(left));
                    slot.with_group = Some(match staging.part {
                        Some((Leg::BetweenHosts, name)) => self.submitter.submit_across(call, name)?,
                        Some((Leg::Come | Leg::Go, name)) => self.submitter.submit_for(call, name)?,
                        None => self.submitter.submit(call)?,
                    });
                    if round + 1 == staging.rounds.len() {
                        *entry = None;
                    }
                }
                Act::Store(round) => {
                    let slot = &mut slots[round % SLOTS];
                    let ticket = slot.with_group.take().expect("a round is handed to the group before it is stored");
                    self.submitter.finish(&ticket)?;
                    slot.storing = if staging.writes_output { self.store(staging, round)? } else { Vec::new() };
                }
            }
        }
        slots.iter_mut().try_for_each(|slot| self.settle(&mut slot.storing))
    }

    /// Waits until all `copies` are done; those that are not when this fails stay where they are.
    pub(super) fn settle<H>(&self, copies: &mut Vec<Copying<H>>) -> Result<(), CollectiveError> {
        for copy in copies.iter() {
            loop {
                let now = Instant::now();
                match copy.event().wait("a copy", self.deadline.min(now + LOOK)) {
                    Ok(()) => break,
                    Err(CudaError::Timeout { .. }) if self.over.load(Ordering::Acquire) => {
                        let reason = format!("{}: the group was closed or given up", self.call.words());
                        return Err(CollectiveError::Aborted { reason });
                    }
                    Err(CudaError::Timeout { .. }) if now + LOOK < self.deadline => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        copies.clear();
        Ok(())
    }

    fn buffer(&self, round: usize) -> &Arc<Region> {
        self.large.as_ref().unwrap_or(&self.lane.slots[round % SLOTS])
    }

    fn fetch(&self, staging: &Staging<'_>, round: usize) -> Result<Vec<Copying<RegionSliceMut>>, CollectiveError> {
        let (buffer, reads_output) = (self.buffer(round), staging.reads_output);
        let parts = staging.rounds[round].parts.iter().filter(|part| part.side == Side::Input || reads_output);
        parts
            .map(|part| {
                let host = buffer.write(part.at..part.at + part.range.len()).map_err(|error| self.busy(&error))?;
                Ok(self.lane.out.copy_out(staging.call.part(part), host)?)
            })
            .collect()
    }

    fn store(&self, staging: &Staging<'_>, round: usize) -> Result<Vec<Copying<RegionSlice>>, CollectiveError> {
        let buffer = self.buffer(round);
        let parts = staging.rounds[round].parts.iter().filter(|part| part.side == Side::Output);
        parts
            .map(|part| {
                let host = buffer.read(part.at..part.at + part.range.len()).map_err(|error| self.busy(&error))?;
                Ok(self.lane.into.copy_in(host, staging.call.part(part))?)
            })
            .collect()
    }

    /// A wire that failed has not given the buffer back yet.
    fn busy(&self, error: &Overlap) -> CollectiveError {
        let reason = format!("{}: a pinned buffer is still with a wire ({error})", self.call.words());
        CollectiveError::Aborted { reason }
    }
}

impl DeviceCall {
    /// The same call over the round's part of it, in `buffer`.
    pub(crate) fn staged(&self, round: &Round, buffer: &Arc<Region>, timeout: Option<Duration>) -> Call {
        let side = |side: Side, pieces: usize| {
            let parts: Vec<_> = round.parts.iter().filter(|part| part.side == side).collect();
            let piece = |range| Piece { region: Arc::clone(buffer), range };
            match parts.as_slice() {
                // One piece that holds all ranks' parts lies in one piece here, too.
                [first, .., last] if pieces == 1 => vec![piece(first.at..last.at + last.range.len())],
                parts => parts.iter().map(|part| piece(part.at..part.at + part.range.len())).collect(),
            }
        };
        Call {
            collective: self.collective,
            dtype: self.dtype,
            input: side(Side::Input, self.input.len()),
            output: side(Side::Output, self.output.len()),
            timeout,
        }
    }

    fn part(&self, part: &cut::Part) -> DeviceSlice {
        let pieces = if part.side == Side::Input { &self.input } else { &self.output };
        pieces[part.piece].part(part.range.clone())
    }

    /// What all ranks must say the same of, of a call whose parts all ranks know.
    pub(crate) fn fingerprint(&self, submitter: &Submitter) -> Fingerprint {
        let (input, output) = self.lens();
        let ranks = submitter.world_size.get() as usize;
        let bytes = cut::even(&self.collective, (&input, &output), ranks).map_or(0, |(.., bytes)| bytes);
        let ordered = submitter.chooser.orders(&self.collective, self.dtype);
        Fingerprint::of(&self.collective, self.dtype, bytes / self.dtype.bytes(), ordered)
    }

    pub(crate) fn words(&self) -> String {
        format!("{} of {} on CUDA", self.collective.name(), self.dtype.name())
    }

    pub(crate) fn lens(&self) -> (Vec<usize>, Vec<usize>) {
        let lens = |pieces: &[DeviceSlice]| pieces.iter().map(|piece| piece.len()).collect();
        (lens(&self.input), lens(&self.output))
    }
}
