//! Does: runs one schedule on a wire, step by step as messages come; any schedule, any wire.

use crate::call::Buffers;
use crate::fingerprint::{Notes, Said};
use crate::plan::Plan;
use crate::reduce::{finish, fold, reduce_into};
use crate::{Action, CollectiveError, DType, Reduction, Span, StepId};
use gradwire_transport::{
    Envelope, Overlap, PeerId, PostError, Rank, RecvLoan, Region, RegionSlice, RegionSliceMut, Tag, TransportError,
    Wire, WorldSize,
};
use std::sync::{Arc, LazyLock};

mod unpacking;

/// Messages posted and not yet ended, per link and direction: with segments of 128 KiB a megabyte, as much as a socket takes in one
/// call, which is quicker than in several, and enough to keep a wire busy while a segment is reduced.
const IN_FLIGHT: usize = 8;

/// Why a schedule stopped.
#[derive(Debug)]
pub(crate) enum Halt {
    /// A rank's message carries another fingerprint or length than ours: it called something else.
    Differs,
    /// A rank gives its part of an all-to-all alone, where this one packs: so must this one do, by [`Execution::unpack`].
    Alone,
    /// A rank sent us another number of elements than we awaited, in a call in which only we two can know.
    Parts { from: Rank, sent: u64, awaited: u64 },
    /// The wire failed.
    Wire(TransportError),
    /// Our own mistake, or a buffer that two operations were given.
    Call(CollectiveError),
}

/// A message that came for this execution.
pub(crate) enum Came {
    Sent,
    Received { note: u64, bytes: usize, slice: RegionSliceMut },
    Arrived { note: u64, loan: RecvLoan },
}

/// A schedule under way.
pub(crate) struct Execution {
    plan: Arc<Plan>,
    buffers: Buffers,
    tag: Tag,
    notes: Notes,
    dtype: DType,
    op: Reduction,
    world_size: WorldSize,
    waits_for: Vec<u8>,
    remaining: usize,
    links: Vec<Link>,
    folds: Vec<Fold>,
    local: Vec<StepId>,
    /// What came before this rank could put it in its place.
    early: Vec<(Rank, u64, RegionSliceMut, usize)>,
}

#[derive(Clone, Copy, Default)]
struct Link {
    sends_posted: usize,
    sends_ended: usize,
    recvs_posted: usize,
    recvs_ended: usize,
    /// Of what was posted while this rank packed, and has not ended.
    packed_sends: usize,
    packed_recvs: usize,
}

struct Fold {
    step: StepId,
    loans: Vec<Option<RecvLoan>>,
    missing: usize,
}

/// What an execution is made from.
pub(crate) struct Order {
    pub(crate) plan: Arc<Plan>,
    pub(crate) buffers: Buffers,
    pub(crate) tag: Tag,
    pub(crate) notes: Notes,
    pub(crate) dtype: DType,
    pub(crate) op: Reduction,
}

impl Execution {
    /// Gets ready; nothing is posted before the first [`Execution::advance`].
    pub(crate) fn new(order: Order, world_size: WorldSize) -> Self {
        let Order { plan, buffers, tag, notes, dtype, op } = order;
        Self {
            waits_for: plan.waits_for.clone(),
            remaining: plan.schedule.steps.len(),
            links: vec![Link::default(); plan.links.len()],
            folds: Vec::new(),
            local: first_local(&plan),
            early: Vec::new(),
            plan,
            buffers,
            tag,
            notes,
            dtype,
            op,
            world_size,
        }
    }

    /// The conversation of this execution.
    pub(crate) fn tag(&self) -> Tag {
        self.tag
    }

    /// Whether every step has ended, and all that was posted.
    pub(crate) fn is_done(&self) -> bool {
        self.remaining == 0 && self.links.iter().all(|link| link.packed_sends + link.packed_recvs == 0)
    }

    /// The ranks that messages are exchanged with.
    pub(crate) fn peers(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.plan.links.iter().map(|link| PeerId::from(link.rank))
    }

    /// The scratch, to be used again.
    pub(crate) fn into_buffers(self) -> Buffers {
        self.buffers
    }

    /// Does all that can be done now: local steps, and posting what is ready.
    pub(crate) fn advance(&mut self, wire: &mut dyn Wire) -> Result<(), Halt> {
        self.fold_complete()?;
        while let Some(step) = self.local.pop() {
            self.run_local(step)?;
            self.end(step);
        }
        for at in 0..self.links.len() {
            self.post_recvs(at, wire)?;
            self.post_sends(at, wire)?;
        }
        Ok(())
    }

    /// Takes what the wire reports of the link to `peer`.
    pub(crate) fn on_message(&mut self, peer: PeerId, came: Came) -> Result<(), Halt> {
        let Some(at) = self.plan.link(Rank(peer.0)) else { return Err(Halt::Differs) };
        match came {
            Came::Sent if self.links[at].packed_sends > 0 => self.links[at].packed_sends -= 1,
            Came::Sent => {
                let step = self.plan.links[at].sends[self.links[at].sends_ended];
                self.links[at].sends_ended += 1;
                self.end(step);
            }
            Came::Received { note, bytes, slice } if self.links[at].packed_recvs > 0 => {
                self.links[at].packed_recvs -= 1;
                self.take_alone(at, note, &slice[..bytes])?;
            }
            Came::Received { note, bytes, slice } => {
                if self.said(at, note) == Said::Alone {
                    self.links[at].recvs_ended += 1;
                    self.early.push((Rank(peer.0), note, slice, bytes));
                    return Err(Halt::Alone);
                }
                self.compare(at, note)?;
                if bytes != slice.len() {
                    return Err(Halt::Differs);
                }
                drop(slice);
                let step = self.next_recv(at);
                self.end(step);
            }
            Came::Arrived { note, loan } if self.plan.links[at].may_pack => {
                self.links[at].recvs_posted -= 1;
                self.take_alone(at, note, &loan)?;
            }
            Came::Arrived { note, loan } => {
                self.compare(at, note)?;
                let step = self.next_recv(at);
                self.combine(step, self.plan.links[at].number, loan)?;
            }
        }
        Ok(())
    }

    /// What `note`, with a message of `peer` that did not fit, says of who is wrong.
    pub(crate) fn misfit(&self, peer: PeerId, note: u64) -> Halt {
        let compared = self.plan.link(Rank(peer.0)).map(|at| self.compare(at, note));
        compared.and_then(Result::err).unwrap_or(Halt::Differs)
    }

    fn said(&self, at: usize, note: u64) -> Said {
        self.notes.said(self.plan.links[at].number, note)
    }

    fn compare(&self, at: usize, note: u64) -> Result<(), Halt> {
        match self.said(at, note) {
            Said::Same => Ok(()),
            Said::Len { sent, awaited } => Err(Halt::Parts { from: self.plan.links[at].rank, sent, awaited }),
            Said::Packed | Said::Alone | Said::Other => Err(Halt::Differs),
        }
    }

    fn next_recv(&mut self, at: usize) -> StepId {
        let step = self.plan.links[at].recvs[self.links[at].recvs_ended];
        self.links[at].recvs_ended += 1;
        step
    }

    fn combine(&mut self, step: StepId, from: usize, loan: RecvLoan) -> Result<(), Halt> {
        match self.plan.schedule.steps[step as usize].action {
            Action::RecvReduce { span, .. } => {
                let mut own = self.write(span)?;
                if loan.len() != own.len() {
                    return Err(Halt::Differs);
                }
                reduce_into(self.dtype, self.op, &mut own, &loan).map_err(|error| self.unsupported(&error))?;
                drop(own);
                self.end(step);
                Ok(())
            }
            Action::FoldAll { span, .. } => self.collect(step, span, from, loan),
            _ => unreachable!("only reducing steps post receives by loan"),
        }
    }

    fn collect(&mut self, step: StepId, span: Span, from: usize, loan: RecvLoan) -> Result<(), Halt> {
        if loan.len() != span.len * self.dtype.bytes() {
            return Err(Halt::Differs);
        }
        let size = self.plan.members;
        let at = self.folds.iter().position(|fold| fold.step == step).unwrap_or_else(|| {
            self.folds.push(Fold { step, loans: (0..size).map(|_| None).collect(), missing: size - 1 });
            self.folds.len() - 1
        });
        let begun = &mut self.folds[at];
        begun.loans[from] = Some(loan);
        begun.missing -= 1;
        self.fold_complete()
    }

    /// Folds what has come whole. A fold waits for this rank's own sends of the memory that it writes.
    fn fold_complete(&mut self) -> Result<(), Halt> {
        let mut at = 0;
        while at < self.folds.len() {
            let step = self.folds[at].step;
            let Action::FoldAll { own, span } = self.plan.schedule.steps[step as usize].action else {
                unreachable!("only folds are collected")
            };
            let (region, range) = self.buffers.resolve(span);
            let blocked =
                self.links.iter().any(|link| link.sends_posted > link.sends_ended) && region.write(range).is_err();
            if self.folds[at].missing > 0 || blocked {
                at += 1;
                continue;
            }
            let whole = self.folds.swap_remove(at);
            self.fold_now(&whole, own, span)?;
            self.end(step);
        }
        Ok(())
    }

    fn fold_now(&self, whole: &Fold, own: Span, span: Span) -> Result<(), Halt> {
        if own != span {
            self.copy(own, span)?;
        }
        let size = self.world_size.get() as usize;
        let others: Vec<&[u8]> = whole.loans.iter().flatten().map(|loan| &**loan).collect();
        let mut result = self.write(span)?;
        fold(self.dtype, self.op, &mut result, self.plan.me, &others, None, size)
            .map_err(|error| self.unsupported(&error))
    }

    fn run_local(&mut self, step: StepId) -> Result<(), Halt> {
        match self.plan.schedule.steps[step as usize].action {
            Action::Copy { from, into } => self.copy(from, into),
            Action::Join => Ok(()),
            Action::Finish { span } => {
                let mut bytes = self.write(span)?;
                finish(self.dtype, self.op, &mut bytes, self.world_size.get() as usize)
                    .map_err(|error| self.unsupported(&error))
            }
            _ => unreachable!("only local steps are queued as local"),
        }
    }

    fn copy(&self, from: Span, into: Span) -> Result<(), Halt> {
        // An all-gather that was given its own part of the output.
        if self.buffers.are_same(from, into) {
            return Ok(());
        }
        let from = self.read(from)?;
        self.write(into)?.copy_from_slice(&from);
        Ok(())
    }

    fn post_recvs(&mut self, at: usize, wire: &mut dyn Wire) -> Result<(), Halt> {
        let plan = Arc::clone(&self.plan);
        let (steps, peer) = (&plan.links[at].recvs, PeerId::from(plan.links[at].rank));
        while let Some(&step) = steps.get(self.links[at].recvs_posted) {
            let link = self.links[at];
            let full = link.recvs_posted - link.recvs_ended >= IN_FLIGHT || link.packed_recvs > 0;
            if self.waits_for[step as usize] > 0 || full {
                break;
            }
            let posted = match plan.schedule.steps[step as usize].action {
                Action::Recv { .. } if plan.links[at].may_pack => {
                    refused(wire.post_recv_loan(peer, self.tag, unpacking::MOST_BYTES))
                }
                Action::Recv { span, .. } => refused(wire.post_recv(peer, self.tag, self.write(span)?)),
                Action::RecvToken { .. } => refused(wire.post_recv(peer, self.tag, empty())),
                Action::RecvReduce { span, .. } | Action::FoldAll { span, .. } => {
                    refused(wire.post_recv_loan(peer, self.tag, span.len * self.dtype.bytes()))
                }
                _ => unreachable!("a link's receives are receives"),
            };
            if !posted.map_err(Halt::Wire)? {
                break;
            }
            self.links[at].recvs_posted += 1;
        }
        Ok(())
    }

    fn post_sends(&mut self, at: usize, wire: &mut dyn Wire) -> Result<(), Halt> {
        let plan = Arc::clone(&self.plan);
        let (steps, peer) = (&plan.links[at].sends, PeerId::from(plan.links[at].rank));
        while let Some(&step) = steps.get(self.links[at].sends_posted) {
            let link = self.links[at];
            if self.waits_for[step as usize] > 0 || link.sends_posted - link.sends_ended >= IN_FLIGHT {
                break;
            }
            let slice = match plan.schedule.steps[step as usize].action {
                Action::Send { span, .. } => self.read(span)?,
                _ => nothing(),
            };
            let to = Envelope { peer, tag: self.tag, note: self.notes.to(plan.links[at].number) };
            if !refused(wire.post_send(to, slice)).map_err(Halt::Wire)? {
                break;
            }
            self.links[at].sends_posted += 1;
        }
        Ok(())
    }

    fn end(&mut self, step: StepId) {
        self.remaining -= 1;
        let plan = Arc::clone(&self.plan);
        for &follower in plan.followers(step) {
            self.waits_for[follower as usize] -= 1;
            if self.waits_for[follower as usize] == 0 && is_local(&plan.schedule.steps[follower as usize].action) {
                self.local.push(follower);
            }
        }
    }

    fn read(&self, span: Span) -> Result<RegionSlice, Halt> {
        let (region, range) = self.buffers.resolve(span);
        region.read(range).map_err(|overlap| self.overlap(overlap))
    }

    fn write(&self, span: Span) -> Result<RegionSliceMut, Halt> {
        let (region, range) = self.buffers.resolve(span);
        region.write(range).map_err(|overlap| self.overlap(overlap))
    }

    fn overlap(&self, overlap: Overlap) -> Halt {
        let reason = format!("{overlap}: give each operation under way memory of its own");
        Halt::Call(CollectiveError::Invalid { call: format!("{:?} of {}", self.op, self.dtype.name()), reason })
    }

    fn unsupported(&self, error: &dyn std::fmt::Display) -> Halt {
        let call = format!("{:?} of {}", self.op, self.dtype.name());
        Halt::Call(CollectiveError::Invalid { call, reason: error.to_string() })
    }
}

/// The steps of `plan` that can be done at once, without a message.
fn first_local(plan: &Plan) -> Vec<StepId> {
    let steps = (0u32..).zip(&plan.schedule.steps);
    steps.filter(|(id, step)| plan.waits_for[*id as usize] == 0 && is_local(&step.action)).map(|(id, _)| id).collect()
}

/// Whether a step needs no message.
fn is_local(action: &Action) -> bool {
    matches!(action, Action::Copy { .. } | Action::Finish { .. } | Action::Join)
}

/// `Ok(false)` for a full queue, which empties as operations end.
fn refused<T>(posted: Result<(), PostError<T>>) -> Result<bool, TransportError> {
    match posted {
        Ok(()) => Ok(true),
        Err(PostError { error: TransportError::QueueFull { .. }, .. }) => Ok(false),
        Err(PostError { error, .. }) => Err(error),
    }
}

/// The payload of a token.
fn nothing() -> RegionSlice {
    EMPTY.read(0..0).expect("no bytes of no bytes can always be lent")
}

fn empty() -> RegionSliceMut {
    EMPTY.write(0..0).expect("no bytes of no bytes can always be lent")
}

static EMPTY: LazyLock<Arc<Region>> = LazyLock::new(|| Region::zeroed(0));
