//! Does: carries out collectives of a group whose ranks are all on one host, by the segment that they share.

use crate::call::Piece;
use crate::engine::{Job, Stop};
use crate::same_host::{SameHost, Stopped, Turn};
use crate::verdict::Verdict;
use crate::{Collective, CollectiveError, Fingerprint};
use gradwire_transport::shm::{Deadline, WaitError};
use gradwire_transport::{GroupSegment, Overlap, Rank, RegionSlice, RegionSliceMut, WorldSize};

/// What a rank that waits does meanwhile; it is told who is missing.
pub(crate) type Meanwhile<'a> = &'a mut dyn FnMut(&[Rank]) -> Result<(), Stop>;

/// The group's segment, and how much has gone through it.
pub(crate) struct Local {
    host: SameHost,
    bytes: u64,
}

impl Local {
    pub(crate) fn new(segment: GroupSegment, rank: Rank, world_size: WorldSize) -> Self {
        Self { host: SameHost::new(segment, rank, world_size), bytes: 0 }
    }

    /// Bytes of this rank's buffers that went through the segment.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Carries out `job`, calling `meanwhile` while it waits for other ranks.
    pub(crate) fn run(&mut self, job: &Job, meanwhile: Meanwhile<'_>) -> Result<(), Stop> {
        let call = &job.call;
        // Lent once, as a part of the output.
        let given: &[Piece] = if self.host.is_in_place(call) { &[] } else { &call.input };
        let read = |piece: &Piece| piece.region.read(piece.range.clone()).map_err(|overlap| refused(overlap, job));
        let write = |piece: &Piece| piece.region.write(piece.range.clone()).map_err(|overlap| refused(overlap, job));
        if given.len() <= 1 && call.output.len() <= 1 {
            // The usual call, without a list of anything.
            let input = given.first().map(read).transpose()?;
            let mut output = call.output.first().map(write).transpose()?;
            let (given, mut taken) = (input.as_deref(), output.as_deref_mut());
            return self.run_with(job, given.as_slice(), taken.as_mut_slice(), meanwhile);
        }
        let input: Vec<RegionSlice> = given.iter().map(read).collect::<Result<_, _>>()?;
        let mut output: Vec<RegionSliceMut> = call.output.iter().map(write).collect::<Result<_, _>>()?;
        let given: Vec<&[u8]> = input.iter().map(|slice| &**slice).collect();
        let mut taken: Vec<&mut [u8]> = output.iter_mut().map(|slice| &mut **slice).collect();
        self.run_with(job, &given, &mut taken, meanwhile)
    }

    /// Tells all, as they come to `job`, that this rank would give NaN in it, as its element `element`.
    pub(crate) fn refuse(&mut self, job: &Job, element: u64, meanwhile: Meanwhile<'_>) -> Result<(), Stop> {
        let turn = Turn { fingerprint: Fingerprint::of_nan(element).0, ..turn(job, meanwhile) };
        self.host.run(&Collective::Barrier, &[], &mut [], turn).map_err(|stopped| stop(stopped, job))
    }

    fn run_with(
        &mut self,
        job: &Job,
        given: &[&[u8]],
        taken: &mut [&mut [u8]],
        meanwhile: Meanwhile<'_>,
    ) -> Result<(), Stop> {
        let bytes = given.iter().map(|slice| slice.len()).chain(taken.iter().map(|slice| slice.len())).max();
        self.host
            .run(&job.call.collective, given, taken, turn(job, meanwhile))
            .map_err(|stopped| stop(stopped, job))?;
        self.bytes += bytes.unwrap_or(0) as u64;
        Ok(())
    }

    /// Releases everybody who waits at the segment.
    pub(crate) fn abort(&mut self) {
        self.host.segment.poison();
    }
}

fn turn<'a>(job: &Job, meanwhile: Meanwhile<'a>) -> Turn<'a, Stop> {
    Turn {
        dtype: job.call.dtype,
        fingerprint: job.fingerprint.0,
        deadline: Deadline::At(job.deadline()),
        idle: meanwhile,
        greeted: false,
    }
}

fn refused(overlap: Overlap, job: &Job) -> Stop {
    let reason = format!("{overlap}: give each operation under way memory of its own");
    Stop::Call(CollectiveError::Invalid { call: job.call.words(), reason })
}

fn stop(stopped: Stopped<Stop>, job: &Job) -> Stop {
    match stopped {
        Stopped::Wait(WaitError::Idle(stop)) => stop,
        Stopped::Wait(WaitError::Timeout(missing)) => Stop::Verdict(Verdict::Late { missing, waited: job.timeout }),
        Stopped::Wait(WaitError::Poisoned) => Stop::Poisoned,
        Stopped::Differs { rank, expected, got } => Stop::Verdict(Verdict::Differs { rank, expected, got }),
        Stopped::NotANumber { rank, element } => Stop::Verdict(Verdict::NotANumber { rank, element }),
        Stopped::Parts { sender, receiver, sent, awaited } => {
            let elements = |bytes: u64| bytes / job.call.dtype.bytes() as u64;
            Stop::Verdict(Verdict::Parts { sender, receiver, sent: elements(sent), awaited: elements(awaited) })
        }
        Stopped::Unsupported(error) => {
            Stop::Call(CollectiveError::Invalid { call: job.call.words(), reason: error.to_string() })
        }
    }
}
