//! Does: what an engine does when something goes wrong: asks who is at fault, tells the verdict, ends the group.

use super::{Engine, Job, Queued, Running};
use crate::CollectiveError;
use crate::control::{self, CONTROL, Control};
use crate::error::Operation;
use crate::execution::Halt;
use crate::inquiry::Inquiry;
use crate::pending::Ticket;
use crate::verdict::{Answer, Verdict};
use gradwire_transport::{Completion, Envelope, LossCause, PeerId, Rank, Region, Tag, TransportError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the verdict may take to leave.
const FAREWELL: Duration = Duration::from_millis(100);
/// How often a thread that waits at the segment is asked whether to give up: an interruption may take that long.
const WATCH: Duration = Duration::from_millis(50);

/// Why a collective at the shared segment stopped.
pub(crate) enum Stop {
    /// The call itself cannot be carried out; the group goes on.
    Call(CollectiveError),
    /// The group is over.
    Verdict(Verdict),
    /// Another rank has ended the group; its verdict is on its way.
    Poisoned,
}

impl Engine {
    /// Ends the group: tells the others (where `tell`), fails everything under way and closes the connections.
    pub(crate) fn end_group(&mut self, verdict: Verdict, tell: bool) {
        if self.over.is_some() {
            return;
        }
        if let Some(local) = &mut self.local {
            local.abort();
        }
        if tell {
            self.tell_all(&Control::Verdict { sequence: self.oldest(), verdict: verdict.clone() });
        }
        let reason = match &verdict {
            Verdict::Aborted { reason } => reason.clone(),
            other => other.error(self.group_operation(), &self.members).to_string(),
        };
        self.over = Some(verdict.clone());
        self.fail_all(&verdict);
        self.messages.end_all(&verdict);
        self.settle_messages();
        self.trace.fail(reason.clone());
        for peer in self.others() {
            let name = Box::new(self.wire.name(peer));
            let cause = LossCause::Aborted(control::seal(&reason, &verdict));
            self.wire.disconnect(peer, TransportError::PeerLost { peer: name, cause });
        }
        // What is still lent to the wire comes back here and is dropped.
        self.wire.poll(Instant::now(), &mut self.done);
        self.done.clear();
    }

    /// Leaves in good order; what is still under way fails.
    pub(crate) fn close(&mut self, until: Instant) {
        if self.over.is_none() {
            let verdict = Verdict::Aborted { reason: format!("{} closed the group", self.rank) };
            self.over = Some(verdict.clone());
            self.fail_all(&verdict);
            self.wire.shutdown(until);
            self.messages.end_all(&verdict);
            self.settle_messages();
        }
    }

    /// Waits for a control message of `peer`.
    pub(super) fn listen(&mut self, peer: PeerId) {
        // A refusal means that the peer is lost, which shows by itself.
        let _ = self.wire.post_recv_loan(peer, CONTROL, control::MAX_BYTES);
    }

    /// Takes a control message; what is none of ours is passed over.
    pub(super) fn on_control(&mut self, from: Rank, message: Option<Control>) {
        match message {
            Some(Control::Inquiry { sequence }) => {
                // What has not begun has not been looked through yet.
                if let Some(at) = self.queue.iter().position(|queued| queued.job.sequence == sequence)
                    && let Some(queued) = self.queue.remove(at)
                {
                    self.look_ahead(&queued.job);
                    self.queue.insert(at, queued);
                }
                let answer = self.answer(sequence);
                self.tell(from.into(), &Control::Answer { sequence, answer });
                if answer.fingerprint.is_none() {
                    self.asked.retain(|(peer, _)| *peer != PeerId::from(from));
                    self.asked.push((from.into(), sequence));
                }
            }
            Some(Control::Answer { sequence, answer }) => {
                if let Some(inquiry) = &mut self.inquiry {
                    inquiry.on_answer(from, sequence, answer);
                }
            }
            Some(Control::Verdict { sequence, verdict }) => self.on_verdict(sequence, verdict),
            None => tracing::warn!(%from, "a control message that cannot be read"),
        }
    }

    /// The number of the oldest collective that has not ended here.
    fn oldest(&self) -> u64 {
        let queued = self.queue.iter().map(|queued| &queued.job);
        let running = self.running.iter().map(|running| &running.job).chain(queued).map(|job| job.sequence);
        running.chain(self.at_segment).min().unwrap_or(self.begun)
    }

    /// Another rank has ended the group in collective number `sequence`. Earlier ones, which it has completed, may still
    /// complete here, so that ranks agree on which succeeded.
    fn on_verdict(&mut self, sequence: u64, verdict: Verdict) {
        if self.oldest() < sequence {
            self.heard.get_or_insert((sequence, verdict, Instant::now() + FAREWELL));
        } else {
            self.end_group(verdict, true);
        }
    }

    /// Looks at deadlines and at the inquiry.
    pub(super) fn look_at_clock(&mut self, now: Instant) {
        if self.over.is_some() {
            return;
        }
        if let Some((sequence, verdict, until)) = &self.heard
            && (self.oldest() >= *sequence || now >= *until)
        {
            let verdict = verdict.clone();
            return self.end_group(verdict, true);
        }
        let late = self.running.iter().position(|running| !running.stopped && now >= running.job.deadline());
        if let Some(at) = late
            && self.inquiry.is_none()
        {
            let waited = self.running[at].job.timeout;
            self.inquire(at, waited, now);
        }
        if let Some(inquiry) = &self.inquiry
            && let Some(mut verdict) = inquiry.verdict(now)
        {
            if let (Verdict::Late { waited: Duration::ZERO, .. }, Some(rank)) = (&verdict, self.odd_length) {
                let reason = format!(
                    "{} got a message of another length from {rank} than it had to expect in collective number {}: \
                     every rank must give the same sizes",
                    self.rank,
                    inquiry.sequence()
                );
                verdict = Verdict::Aborted { reason };
            }
            self.end_group(verdict, true);
        }
        self.messages.expire(now, &mut *self.wire);
        self.settle_messages();
    }

    /// The group ended while `job` was at the segment: by our own verdict, or by that of another rank (`None`).
    pub(super) fn end_at_segment(&mut self, job: &Job, verdict: Option<Verdict>) -> CollectiveError {
        // The verdict is about this collective, which has not ended here.
        self.at_segment = Some(job.sequence);
        match (&self.over, verdict) {
            (None, Some(verdict)) => self.end_group(verdict, true),
            (None, None) => self.hear_verdict("a rank ended the group and did not say why".to_owned()),
            (Some(_), _) => {}
        }
        self.at_segment = None;
        if let Some(local) = &mut self.local {
            local.abort();
        }
        match &self.over {
            Some(verdict) => verdict.error(self.operation(job), &self.members),
            None => CollectiveError::Aborted { reason: format!("{} gave the group up", self.rank) },
        }
    }

    /// A collective begins that needs ranks which are `lost`: one that hung up because it gave the group up has died of nothing, and
    /// said why.
    pub(super) fn end_for_lost(&mut self, lost: &[(Rank, LossCause)]) {
        if let Some((_, verdict, _)) = self.heard.take() {
            return self.end_group(verdict, true);
        }
        let dead = lost.iter().find(|(_, cause)| !matches!(cause, LossCause::Aborted(_)));
        match (dead, lost) {
            (Some((rank, cause)), _) => {
                let cause = cause.to_string();
                self.end_group(Verdict::Failed { ranks: vec![*rank], cause }, true);
            }
            (None, [(rank, LossCause::Aborted(reason)), ..]) => self.end_by(&format!("{rank} gave up: {reason}")),
            _ => {}
        }
    }

    /// Another rank has ended the group and said `text`: takes the verdict in it, or waits for it.
    fn end_by(&mut self, text: &str) {
        match control::unseal(text) {
            Some(verdict) => self.end_group(verdict, true),
            None => self.hear_verdict(control::words(text).to_owned()),
        }
    }

    /// Another rank has ended the group: waits a moment for its verdict, which travels apart from the data, before it ends
    /// here with `otherwise`.
    pub(super) fn hear_verdict(&mut self, otherwise: String) {
        if std::mem::replace(&mut self.hearing, true) {
            return;
        }
        let until = Instant::now() + FAREWELL;
        while self.over.is_none() && Instant::now() < until {
            self.poll(Instant::now());
            // What the teller had completed has had its time: a verdict that has been heard counts at once.
            if let Some((_, verdict, _)) = self.heard.take() {
                self.end_group(verdict, true);
            } else if self.over.is_none() {
                self.wire.park(until);
            }
        }
        self.hearing = false;
        if self.over.is_none() {
            self.end_group(Verdict::Aborted { reason: otherwise }, true);
        }
    }

    /// What a rank that waits at the shared segment does meanwhile: everything else of the group.
    pub(super) fn while_waiting(&mut self, missing: &[Rank]) -> Result<(), Stop> {
        let now = Instant::now();
        self.take_wishes();
        if now.saturating_duration_since(self.watched) > WATCH {
            self.watched = now;
            if self.wishes.is_closed(now) {
                let reason = format!("{} closed the group", self.rank);
                return Err(Stop::Verdict(Verdict::Aborted { reason }));
            }
            if self.wishes.gives_up() {
                let reason = format!("{} was interrupted", self.rank);
                return Err(Stop::Verdict(Verdict::Aborted { reason }));
            }
        }
        self.poll(now);
        self.advance();
        self.messages.expire(now, &mut *self.wire);
        self.settle_messages();
        if let Some((_, verdict, until)) = &self.heard
            && now >= *until
        {
            return Err(Stop::Verdict(verdict.clone()));
        }
        if let Some(verdict) = &self.over {
            return Err(Stop::Verdict(verdict.clone()));
        }
        // Who has left will not come any more. It may have taken this step just before, so it must still be missing when we
        // look anew, after its goodbye.
        let left = missing.iter().copied().find(|rank| self.lost[rank.index()].is_some());
        match (left, self.absent) {
            (Some(rank), Some(before)) if rank == before => {
                let cause = LossCause::Goodbye.to_string();
                Err(Stop::Verdict(Verdict::Failed { ranks: vec![rank], cause }))
            }
            _ => {
                self.absent = left;
                Ok(())
            }
        }
    }

    /// Asks all ranks how far they are.
    pub(super) fn inquire(&mut self, at: usize, waited: Duration, now: Instant) {
        if self.inquiry.is_some() {
            return;
        }
        self.running[at].stopped = true;
        let sequence = self.running[at].job.sequence;
        let own = (self.rank, self.answer(sequence));
        self.inquiry = Some(Inquiry::new(sequence, waited, own, self.world_size, now));
        self.tell_all(&Control::Inquiry { sequence });
    }

    /// Tells who asked about collective number `sequence` before it had begun here.
    pub(super) fn answer_late(&mut self, sequence: u64) {
        let answer = self.answer(sequence);
        for (peer, _) in self.asked.extract_if(.., |(_, number)| *number == sequence).collect::<Vec<_>>() {
            self.tell(peer, &Control::Answer { sequence, answer });
        }
    }

    fn answer(&self, sequence: u64) -> Answer {
        let fingerprint = self.remembered.iter().find(|(number, _)| *number == sequence).map(|(_, call)| *call);
        Answer { begun: self.begun, fingerprint }
    }

    fn tell(&mut self, peer: PeerId, message: &Control) {
        let region = Region::from_vec(message.encode());
        let slice = region.read(0..region.len()).expect("nobody else has this region");
        let note = u64::from(matches!(message, Control::Verdict { .. }));
        // A refusal means that the peer is lost: there is nobody to tell.
        let _ = self.wire.post_send(Envelope { peer, tag: CONTROL, note }, slice);
    }

    fn tell_all(&mut self, message: &Control) {
        let there: Vec<PeerId> = self.others().into_iter().filter(|peer| self.lost[peer.index()].is_none()).collect();
        there.iter().for_each(|&peer| self.tell(peer, message));
        if !matches!(message, Control::Verdict { .. }) {
            return;
        }
        let (until, mut left, mut done) = (Instant::now() + FAREWELL, there.len(), Vec::new());
        while left > 0 && Instant::now() < until {
            self.wire.poll(Instant::now(), &mut done);
            for completion in done.drain(..) {
                left -= match completion {
                    Completion::Sent { to, .. } | Completion::SendFailed { to, .. }
                        if to.tag == CONTROL && to.note == 1 =>
                    {
                        1
                    }
                    _ => 0,
                };
            }
            if left > 0 {
                self.wire.park(until);
            }
        }
    }

    pub(super) fn operation(&self, job: &Job) -> Operation {
        Operation { call: job.fingerprint.to_string(), sequence: job.sequence, group: self.group.clone() }
    }

    pub(crate) fn group_operation(&self) -> Operation {
        match self.running.first().map(|running| &running.job).or(self.queue.front().map(|queued| &queued.job)) {
            Some(job) => self.operation(job),
            None => Operation { call: "no collective".to_owned(), sequence: self.begun, group: self.group.clone() },
        }
    }

    fn fail_all(&mut self, verdict: &Verdict) {
        for Running { ticket, job, .. } in std::mem::take(&mut self.running) {
            self.fail(&ticket, &job, verdict);
        }
        for Queued { ticket, job } in std::mem::take(&mut self.queue) {
            self.fail(&ticket, &job, verdict);
        }
    }

    pub(super) fn fail(&mut self, ticket: &Ticket, job: &Job, verdict: &Verdict) {
        let error = verdict.error(self.operation(job), &self.members);
        self.finish(ticket, Err(error));
    }

    pub(super) fn on_failed(&mut self, peer: PeerId, tag: Tag, error: TransportError, now: Instant) {
        let Some(at) = self.running.iter().position(|running| running.execution.tag() == tag && !running.stopped)
        else {
            return;
        };
        if matches!(error, TransportError::Cancelled) && self.running[at].execution.on_cancelled(peer) {
            return;
        }
        if matches!(error, TransportError::MessageTooLong { .. }) {
            self.odd_length = Some(Rank(peer.0));
            self.halt(at, Halt::Differs, now);
        } else {
            self.lost[peer.index()].get_or_insert_with(|| cause_of(error.clone()));
            self.halt(at, Halt::Wire(error), now);
        }
    }

    /// A message of `peer` did not fit, of which it said `note`.
    pub(super) fn on_misfit(&mut self, peer: PeerId, tag: Tag, note: u64, now: Instant) {
        let known = |running: &Running| running.execution.tag() == tag && !running.stopped;
        if let Some(at) = self.running.iter().position(known) {
            self.odd_length = Some(Rank(peer.0));
            let halt = self.running[at].execution.misfit(peer, note);
            self.halt(at, halt, now);
        }
    }

    /// An execution cannot go on.
    pub(super) fn halt(&mut self, at: usize, halt: Halt, now: Instant) {
        self.running[at].stopped = true;
        if let Some((_, verdict, _)) = &self.heard {
            let verdict = verdict.clone();
            return self.end_group(verdict, true);
        }
        match halt {
            Halt::Differs | Halt::Alone => self.inquire(at, Duration::ZERO, now),
            Halt::Parts { from, sent, awaited } => {
                self.end_group(Verdict::Parts { sender: from, receiver: self.rank, sent, awaited }, true);
            }
            Halt::Wire(TransportError::PeerLost { peer, cause }) => match (peer.rank, cause) {
                (Some(rank), cause) if !matches!(cause, LossCause::Aborted(_)) => {
                    self.lost[rank.index()].get_or_insert(cause);
                    self.judge_losses(now);
                    if self.over.is_none() {
                        let cause = LossCause::Goodbye.to_string();
                        self.end_group(Verdict::Failed { ranks: vec![rank], cause }, true);
                    }
                }
                (_, cause) => self.end_by(&format!("{peer}: {cause}")),
            },
            Halt::Wire(error) => self.end_group(Verdict::Aborted { reason: error.to_string() }, true),
            Halt::Call(error) => {
                let ticket = Arc::clone(&self.running[at].ticket);
                self.finish(&ticket, Err(error.clone()));
                self.end_group(Verdict::Aborted { reason: format!("{} could not go on: {error}", self.rank) }, true);
            }
        }
    }

    /// Decides what lost peers mean, after a second look for what the others say of it.
    pub(super) fn judge_losses(&mut self, now: Instant) {
        if self.over.is_some() || self.heard.is_some() || (self.running.is_empty() && self.at_segment.is_none()) {
            return; // the next collective finds it in the table
        }
        let mut more = Vec::new();
        self.wire.poll(now, &mut more);
        for completion in more {
            self.dispatch(completion, now);
        }
        if self.over.is_some() || self.heard.is_some() {
            return;
        }
        let died = |cause: &Option<LossCause>| {
            cause.as_ref().is_some_and(|cause| !matches!(cause, LossCause::Goodbye | LossCause::Aborted(_)))
        };
        let ranks: Vec<Rank> = self.world_size.ranks().filter(|rank| died(&self.lost[rank.index()])).collect();
        let aborted = self.world_size.ranks().find_map(|rank| match &self.lost[rank.index()] {
            Some(LossCause::Aborted(reason)) => Some(format!("{rank} gave up: {reason}")),
            _ => None,
        });
        if let Some(first) = ranks.first()
            && let Some(cause) = &self.lost[first.index()]
        {
            let cause = cause.to_string();
            self.end_group(Verdict::Failed { ranks, cause }, true);
        } else if let Some(reason) = aborted {
            self.end_by(&reason);
        }
    }
}

pub(super) fn cause_of(error: TransportError) -> LossCause {
    match error {
        TransportError::PeerLost { cause, .. } => cause,
        other => LossCause::Protocol(other.to_string()),
    }
}
