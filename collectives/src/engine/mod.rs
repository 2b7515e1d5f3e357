//! Does: owns the wire of a group and moves everything that is under way, one turn at a time. Whoever drives it (the
//! caller of a blocking operation, or the progress thread) holds it alone.

use crate::call::{Buffers, Call, Shape};
use crate::control::{CONTROL, Control};
use crate::execution::{Came, Execution, Halt, Order};
use crate::fingerprint::Notes;
use crate::inquiry::Inquiry;
use crate::local::Local;
use crate::messages::{Message, Messages};
use crate::nan;
use crate::pending::{Done, Outcome, Ticket};
use crate::plans::Plans;
use crate::recorder::What;
use crate::trace::Trace;
use crate::verdict::Verdict;
use crate::wishes::Wishes;
use crate::{CollectiveError, Fingerprint, Reduction};
use gradwire_transport::{
    Arrival, Completion, LossCause, PeerId, PeerName, Rank, Region, Tag, Traffic, TransportError, Wire, WireKind,
    WorldSize,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

mod failure;

pub(crate) use failure::Stop;

/// Collectives of one group that may be under way at once; more wait their turn. Four hide the latency of small ones.
const CONCURRENT: usize = 4;
/// How many past calls a rank can still tell of when it is asked.
const REMEMBERED: usize = 64;

/// A collective, checked and numbered.
pub(crate) struct Job {
    pub(crate) call: Call,
    pub(crate) shape: Shape,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) sequence: u64,
    pub(crate) called: Instant,
    pub(crate) timeout: Duration,
}

/// A collective that is not carried out by its own call.
pub(crate) struct Queued {
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) job: Job,
}

impl Job {
    pub(crate) fn deadline(&self) -> Instant {
        self.called + self.timeout
    }
}

struct Running {
    ticket: Arc<Ticket>,
    job: Job,
    execution: Execution,
    stopped: bool,
}

/// Everything that belongs to a group.
pub(crate) struct Engine {
    pub(crate) wire: Box<dyn Wire>,
    pub(crate) rank: Rank,
    pub(crate) world_size: WorldSize,
    pub(crate) group: String,
    pub(crate) members: Vec<PeerName>,
    pub(crate) plans: Plans,
    pub(crate) local: Option<Box<Local>>,
    pub(crate) unfinished: Arc<AtomicUsize>,
    pub(crate) wishes: Arc<Wishes>,
    pub(crate) ended: usize,
    /// Whether what this rank gives is looked through for NaN.
    pub(crate) checks_nan: bool,
    pub(crate) trace: Arc<Trace>,
    queue: VecDeque<Queued>,
    running: Vec<Running>,
    messages: Messages,
    begun: u64,
    remembered: VecDeque<(u64, u64)>,
    inquiry: Option<Inquiry>,
    /// Who asked about a collective that had not begun here.
    asked: Vec<(PeerId, u64)>,
    watched: Instant,
    odd_length: Option<Rank>,
    /// Whether what this rank was to give has NaN, so that the group is about to end.
    found_nan: bool,
    lost: Vec<Option<LossCause>>,
    at_segment: Option<u64>,
    heard: Option<(u64, Verdict, Instant)>,
    absent: Option<Rank>,
    hearing: bool,
    over: Option<Verdict>,
    scratch: Vec<Arc<Region>>,
    done: Vec<Completion>,
}

impl Engine {
    /// An engine over `wire`, on which peer i is rank i.
    pub(crate) fn new(
        (wire, news): (Box<dyn Wire>, Vec<Completion>),
        (rank, world_size): (Rank, WorldSize),
        (group, members): (String, Vec<PeerName>),
        plans: Plans,
        local: Option<Box<Local>>,
        trace: Arc<Trace>,
    ) -> Self {
        let mut engine = Self {
            messages: Messages::new(group.clone(), members.clone()),
            wire,
            rank,
            world_size,
            group,
            members,
            plans,
            local,
            unfinished: Arc::new(AtomicUsize::new(0)),
            wishes: Arc::new(Wishes::default()),
            asked: Vec::new(),
            watched: Instant::now(),
            ended: 0,
            checks_nan: false,
            trace,
            queue: VecDeque::new(),
            running: Vec::new(),
            begun: 0,
            remembered: VecDeque::with_capacity(REMEMBERED),
            inquiry: None,
            odd_length: None,
            found_nan: false,
            lost: vec![None; world_size.get() as usize],
            at_segment: None,
            heard: None,
            absent: None,
            hearing: false,
            over: None,
            scratch: Vec::new(),
            done: news,
        };
        for peer in engine.others() {
            engine.listen(peer);
        }
        engine
    }

    /// Takes a collective; they begin in order.
    pub(crate) fn submit(&mut self, queued: Queued) {
        queued.ticket.set_record(self.note(&queued.job));
        match self.over.clone() {
            Some(verdict) => self.fail(&queued.ticket, &queued.job, &verdict),
            None => self.queue.push_back(queued),
        }
    }

    /// Whether a collective can be carried out at once at the segment, provided that nothing is under way.
    pub(crate) fn is_free(&self) -> bool {
        self.local.is_some() && self.over.is_none() && !self.wishes.any()
    }

    /// Carries out a collective at the segment, where the group [is free](Self::is_free) and nothing is under way.
    pub(crate) fn run_now(&mut self, job: &Job) -> Result<(), CollectiveError> {
        let record = self.note(job);
        let outcome = self.run_at_segment(job);
        self.trace.end(record, outcome.is_ok());
        outcome
    }

    /// Remembers a collective; where the record of the group has it.
    fn note(&mut self, job: &Job) -> u64 {
        self.begun = self.begun.max(job.sequence + 1);
        if self.remembered.len() == REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back((job.sequence, job.fingerprint.0));
        if !self.asked.is_empty() {
            self.look_ahead(job);
            self.answer_late(job.sequence);
        }
        let what = What::Collective { number: job.sequence, fingerprint: job.fingerprint };
        self.trace.begin(what, job.called)
    }

    /// Takes what other threads want; whether there was anything.
    pub(crate) fn take_wishes(&mut self) -> bool {
        if !self.wishes.any() {
            return false;
        }
        let (messages, abort) = self.wishes.take();
        messages.into_iter().for_each(|message| self.submit_message(message));
        if let Some(reason) = abort {
            self.end_group(Verdict::Aborted { reason }, true);
        }
        true
    }

    /// Takes a user's message.
    pub(crate) fn submit_message(&mut self, message: Message) {
        self.trace.begin_message(&message);
        self.messages.begin(message, &mut *self.wire);
        if let Some(verdict) = &self.over {
            self.messages.end_all(verdict);
        }
        self.settle_messages();
    }

    /// Moves everything that can be moved now; whether anything did.
    pub(crate) fn turn(&mut self, now: Instant) -> bool {
        if self.over.is_some() {
            return false;
        }
        let mut moved = self.begin_queued(now);
        moved |= self.poll(now);
        self.advance();
        self.look_at_clock(now);
        moved
    }

    /// When the clock must be looked at again though nothing moves.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let collectives = self.running.iter().filter(|running| !running.stopped).map(|running| running.job.deadline());
        let inquiry = self.inquiry.as_ref().map(Inquiry::until);
        let heard = self.heard.as_ref().map(|(.., until)| *until);
        collectives.chain(self.messages.deadline()).chain(inquiry).chain(heard).min()
    }

    /// Whether something must be looked for again and again, so that a long sleep is not possible.
    pub(crate) fn probes(&self) -> bool {
        self.messages.probes()
    }

    /// What was exchanged with `peer` over the wire.
    pub(crate) fn traffic(&self, peer: Rank) -> Traffic {
        self.wire.traffic(peer.into())
    }

    /// By which wire `peer` is reached now, and why, where that is not what the group was formed with.
    pub(crate) fn way(&self, peer: Rank) -> (WireKind, Option<String>) {
        (self.wire.kind(peer.into()), self.wire.reason(peer.into()))
    }

    /// The verdict that ended the group.
    pub(crate) fn verdict(&self) -> Option<&Verdict> {
        self.over.as_ref()
    }

    fn begin_queued(&mut self, now: Instant) -> bool {
        let mut moved = false;
        while self.running.len() < CONCURRENT && !self.found_nan {
            let Some(queued) = self.queue.pop_front() else { break };
            moved = true;
            if self.local.is_some() {
                let outcome = self.run_at_segment(&queued.job);
                self.finish(&queued.ticket, outcome.map(|()| Done::default()));
            } else {
                self.begin(queued, now);
            }
        }
        moved
    }

    fn run_at_segment(&mut self, job: &Job) -> Result<(), CollectiveError> {
        let nan = self.first_nan(job);
        let Some(mut local) = self.local.take() else {
            let reason = "the group's shared memory is in use".to_owned();
            return Err(CollectiveError::Aborted { reason });
        };
        self.at_segment = Some(job.sequence);
        self.absent = None;
        let meanwhile = &mut |missing: &[Rank]| self.while_waiting(missing);
        let outcome = match nan {
            None => local.run(job, meanwhile),
            Some(element) => local.refuse(job, element, meanwhile),
        };
        self.at_segment = None;
        self.local = Some(local);
        outcome.map_err(|stop| match stop {
            // Others may be in it, and would meet this rank's next call.
            Stop::Call(error) => {
                let reason = format!("{} could not go on: {error}", self.rank);
                self.end_at_segment(job, Some(Verdict::Aborted { reason }));
                error
            }
            Stop::Verdict(verdict) => self.end_at_segment(job, Some(verdict)),
            Stop::Poisoned => self.end_at_segment(job, None),
        })
    }

    /// The first NaN of what this rank gives in `job`, where it is looked for. Sums of several ranks are not this one's.
    fn first_nan(&self, job: &Job) -> Option<u64> {
        let looked_for = self.checks_nan && !job.shape.across;
        looked_for.then(|| nan::first_of(&job.call, self.rank)).flatten()
    }

    /// Says of `job` from now on that this rank would give NaN in it, where it would; whether it does.
    fn look_ahead(&mut self, job: &Job) -> bool {
        let Some(element) = self.first_nan(job) else { return false };
        let said = self.remembered.iter_mut().find(|(number, _)| *number == job.sequence);
        said.into_iter().for_each(|(_, call)| *call = Fingerprint::of_nan(element).0);
        true
    }

    fn begin(&mut self, queued: Queued, now: Instant) {
        self.found_nan = self.look_ahead(&queued.job);
        let Queued { ticket, job } = queued;
        let plan = self.plans.plan(&job.call, &job.shape, self.rank, self.world_size);
        let scratch_bytes = plan.schedule.scratch_len * job.call.dtype.bytes();
        let scratch = (scratch_bytes > 0).then(|| self.take_scratch(scratch_bytes));
        let order = Order {
            plan,
            buffers: Buffers::new(&job.call, scratch),
            tag: Tag(job.sequence),
            notes: self.notes(&job),
            dtype: job.call.dtype,
            op: job.call.collective.reduction().unwrap_or(Reduction::Sum),
        };
        let execution = Execution::new(order, self.world_size);
        if job.call.collective.is_many_to_one() {
            self.wire.mark(execution.tag(), true);
        }
        let needed: Vec<Rank> = execution.peers().map(|peer| Rank(peer.0)).collect();
        self.running.push(Running { ticket, job, execution, stopped: self.found_nan });
        let at = self.running.len() - 1;
        if self.found_nan {
            // Others may have found one, too: all name the same rank. Nothing more begins here.
            return self.inquire(at, Duration::ZERO, now);
        }
        // Who left in good order may have sent all that it had to send before.
        let died = |rank: Rank| self.lost[rank.index()].clone().filter(|cause| !matches!(cause, LossCause::Goodbye));
        let lost: Vec<(Rank, LossCause)> = needed.into_iter().filter_map(|rank| Some((rank, died(rank)?))).collect();
        if !lost.is_empty() {
            return self.end_for_lost(&lost);
        }
        if let Err(halt) = self.running[at].execution.advance(&mut *self.wire) {
            self.halt(at, halt, now);
        }
    }

    /// What goes with the messages of `job`.
    fn notes(&self, job: &Job) -> Notes {
        let between = |peer| job.shape.between(&job.call.collective, self.rank, peer);
        if job.shape.packed && !job.shape.across {
            return Notes::Packed(job.fingerprint.of_len(job.shape.len));
        }
        if job.shape.across || self.world_size.ranks().all(|peer| between(peer).is_none()) {
            return Notes::All(job.fingerprint);
        }
        let each = |(give, get)| (job.fingerprint.of_len(give), job.fingerprint.of_len(get));
        Notes::Each(self.world_size.ranks().map(|peer| each(between(peer).unwrap_or_default())).collect())
    }

    fn take_scratch(&mut self, bytes: usize) -> Arc<Region> {
        match self.scratch.iter().position(|region| region.len() >= bytes) {
            Some(at) => self.scratch.swap_remove(at),
            None => Region::zeroed(bytes.next_power_of_two()),
        }
    }

    fn poll(&mut self, now: Instant) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.wire.poll(now, &mut done);
        let moved = !done.is_empty();
        let mut fallen = false;
        for completion in done.drain(..) {
            fallen |= matches!(completion, Completion::PeerDown { .. });
            self.dispatch(completion, now);
        }
        self.done = done;
        if fallen {
            self.judge_losses(now);
        }
        self.settle_messages();
        moved
    }

    fn dispatch(&mut self, completion: Completion, now: Instant) {
        match completion {
            Completion::Sent { to, slice } if Messages::owns(to.tag) => self.messages.on_sent(to, slice),
            Completion::Received { from, slice, bytes } if Messages::owns(from.tag) => {
                self.messages.on_received(from, bytes, slice);
            }
            Completion::SendFailed { to, slice, error } if Messages::owns(to.tag) => {
                drop(slice);
                self.messages.on_failed(to.peer, to.tag, true, &error);
            }
            Completion::RecvFailed { peer, tag, slice, error } if Messages::owns(tag) => {
                drop(slice);
                self.messages.on_failed(peer, tag, false, &error);
            }
            Completion::Arrived(Arrival { from, loan }) if from.tag == CONTROL => {
                let message = Control::decode(&loan);
                drop(loan);
                self.listen(from.peer);
                self.on_control(Rank(from.peer.0), message);
            }
            Completion::Sent { to, slice } => {
                drop(slice);
                self.on_message(to.peer, to.tag, Came::Sent, now);
            }
            Completion::Received { from, slice, bytes } => {
                self.on_message(from.peer, from.tag, Came::Received { note: from.note, bytes, slice }, now);
            }
            Completion::Arrived(Arrival { from, loan }) => {
                self.on_message(from.peer, from.tag, Came::Arrived { note: from.note, loan }, now);
            }
            Completion::SendFailed { to, error, .. } => self.on_failed(to.peer, to.tag, error, now),
            Completion::RecvFailed { peer, tag, error, .. } => match error {
                TransportError::MessageTooLong { note, .. } => self.on_misfit(peer, tag, note, now),
                error => self.on_failed(peer, tag, error, now),
            },
            Completion::PeerDown { peer, error } => self.lost[peer.index()] = Some(failure::cause_of(error)),
            _ => {}
        }
    }

    fn on_message(&mut self, peer: PeerId, tag: Tag, came: Came, now: Instant) {
        let Some(at) = self.running.iter().position(|running| running.execution.tag() == tag && !running.stopped)
        else {
            return;
        };
        let mut moved = self.running[at].execution.on_message(peer, came);
        if matches!(moved, Err(Halt::Alone)) {
            moved = self.unpack(at);
        }
        if let Err(halt) = moved {
            if matches!(halt, Halt::Differs) {
                self.odd_length = Some(Rank(peer.0));
            }
            self.halt(at, halt, now);
        }
    }

    /// A rank gives its part of an all-to-all alone, so this one does, too.
    fn unpack(&mut self, at: usize) -> Result<(), Halt> {
        let job = &mut self.running[at].job;
        job.shape.packed = false;
        let plan = self.plans.plan(&job.call, &job.shape, self.rank, self.world_size);
        let notes = self.notes(&self.running[at].job);
        self.running[at].execution.unpack(plan, notes, &mut *self.wire)
    }

    fn advance(&mut self) {
        let now = Instant::now();
        for at in (0..self.running.len()).rev() {
            let Some(running) = self.running.get_mut(at) else { continue };
            if running.stopped {
                continue;
            }
            if let Err(halt) = running.execution.advance(&mut *self.wire) {
                self.halt(at, halt, now);
            } else if self.running[at].execution.is_done() {
                let Running { ticket, job, execution, .. } = self.running.remove(at);
                if job.call.collective.is_many_to_one() {
                    self.wire.mark(execution.tag(), false);
                }
                self.scratch.extend(execution.into_buffers().take_scratch());
                self.finish(&ticket, Ok(Done::default()));
            }
        }
        self.messages.advance(&mut *self.wire);
    }

    fn settle_messages(&mut self) {
        for (ticket, outcome) in std::mem::take(&mut self.messages.ended) {
            self.finish(&ticket, outcome);
        }
    }

    fn finish(&mut self, ticket: &Ticket, outcome: Outcome) {
        if !ticket.is_done() {
            self.ended += 1;
            if let Some(record) = ticket.record() {
                self.trace.end(record, outcome.is_ok());
            }
            ticket.finish(outcome);
            self.unfinished.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn others(&self) -> Vec<PeerId> {
        self.world_size.ranks().filter(|rank| *rank != self.rank).map(PeerId::from).collect()
    }
}
