//! Pure: the side of the log of whom another follows, a primary or a backup: what that one must have before a client is answered,
//! or before it is told to whom we follow.

use super::log::{Entry, MAX_EARLY_BYTES, TURN, What, passed_on};
use super::tail::Tail;
use crate::control::{SeatPart, Sighting};
use crate::header::{Header, Kind};
use crate::shard::{Action, Shard};
use crate::state::{Image, Telling};
use crate::{ClusterMap, Epoch, ShardSeats};
use gradwire_transport::PeerId;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Silence after which a backup counts as lost: less than [`super::backup::PATIENCE`], so that a primary which is cut off stops
/// before another takes over.
const PATIENCE: Duration = Duration::from_secs(2);
/// Answers that may wait for the backup, and bytes of the log; beyond it, nothing more is taken from clients.
const MAX_HELD: usize = 1 << 16;
const MAX_TAIL_BYTES: usize = 128 << 20;

/// Who follows.
struct Follower {
    peer: PeerId,
    seat: u64,
    /// Entries that it has.
    applied: u64,
    /// Which entries it must have to have everything, and whether answers wait for it since.
    goal: u64,
    holding: bool,
    heard: Instant,
    began: Instant,
    /// What was before the log began, and has not been told.
    images: VecDeque<Image>,
    telling: Option<Telling>,
    /// Bytes of the log that came before it had everything, which it must keep.
    early_bytes: usize,
    /// Whether all of that has been told.
    whole: bool,
}

impl Follower {
    /// A time as it counts it.
    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    /// Whether it has been sent much before it has everything.
    fn is_early(&self) -> bool {
        !self.holding && self.early_bytes > MAX_EARLY_BYTES / 2
    }
}

/// A seat that must follow and does not.
struct Fence {
    seat: u64,
    /// When it counts as gone: until a map without it comes, it may have taken over.
    until: Instant,
    due: bool,
}

/// What a seat keeps of the one that follows it.
pub(super) struct Lead {
    term: Epoch,
    sequence: u64,
    follower: Option<Follower>,
    fence: Option<Fence>,
    held: VecDeque<(u64, Action)>,
    /// Of a shard with several backups: who follows the one that follows us may come to us.
    tail: Option<Tail>,
    /// What was told to whom we follow.
    confirmed: u64,
}

impl Lead {
    pub(super) fn new(term: Epoch) -> Self {
        Self { term, sequence: 0, follower: None, fence: None, held: VecDeque::new(), tail: None, confirmed: 0 }
    }

    pub(super) fn term(&self) -> Epoch {
        self.term
    }

    /// Entries of the log, and how many of them the backups have; `None` without a backup.
    pub(super) fn place(&self) -> (u64, Option<u64>) {
        (self.sequence, self.follower.as_ref().filter(|it| it.holding).map(|it| it.applied))
    }

    /// Whether answers wait for a map, or for a backup that is to come.
    pub(super) fn is_fenced(&self) -> bool {
        self.fence.is_some()
    }

    /// The log begins here with what comes after entry `sequence`.
    pub(super) fn begin_after(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    /// Whether nobody follows, nor is awaited.
    pub(super) fn is_free(&self) -> bool {
        self.follower.is_none() && self.fence.is_none()
    }

    /// Whether too much waits for the backup to take more.
    pub(super) fn is_full(&self) -> bool {
        let kept = self.tail.as_ref().map_or(0, Tail::bytes);
        self.held.len() >= MAX_HELD || kept > MAX_TAIL_BYTES || self.follower.as_ref().is_some_and(Follower::is_early)
    }

    fn holds(&self) -> bool {
        self.fence.is_some() || self.follower.as_ref().is_some_and(|it| it.holding && it.applied < self.sequence)
    }

    /// Whether what happens must be known to one that follows, or that will.
    fn logs(&self) -> bool {
        self.follower.is_some() || self.fence.is_some() && self.tail.is_some()
    }

    /// What all that follow have, for whom we follow.
    pub(super) fn confirmed(&mut self) -> u64 {
        let all = match (&self.fence, &self.follower) {
            (Some(_), _) => 0,
            (None, Some(follower)) if follower.holding => follower.applied,
            // It would have to keep too much while its copy is made: those before us wait, and their clients.
            (None, Some(follower)) if follower.is_early() => 0,
            (None, _) => self.sequence,
        };
        self.confirmed = self.confirmed.max(all);
        self.confirmed
    }

    /// What is no entry, and has no number.
    fn say(&self, what: What<'_>, now: Instant, out: &mut Vec<Action>) {
        let Some(follower) = &self.follower else { return };
        let (term, sequence, at_us) = (self.term, self.sequence, follower.micros(now));
        let bytes = Entry { term, sequence, peer: PeerId(0), at_us, what }.encode();
        out.push(Action::Ship { to: follower.peer, bytes: Arc::new(bytes) });
    }

    /// Something was done.
    fn log(&mut self, what: What<'_>, peer: PeerId, at: Instant, out: &mut Vec<Action>) {
        self.sequence += 1;
        let at_us = self.follower.as_ref().map_or(0, |it| it.micros(at));
        self.pass(Entry { term: self.term, sequence: self.sequence, peer, at_us, what }.encode(), at, out);
    }

    /// Entry `sequence`, which whom we follow has sent, was done.
    pub(super) fn relay(&mut self, sequence: u64, entry: &[u8], at: Instant, out: &mut Vec<Action>) {
        self.sequence = sequence;
        if self.logs() {
            let at_us = self.follower.as_ref().map_or(0, |it| it.micros(at));
            self.pass(passed_on(entry, self.term, at_us), at, out);
        }
    }

    /// Sends the last entry on, and keeps it where it may have to be sent again.
    fn pass(&mut self, entry: Vec<u8>, at: Instant, out: &mut Vec<Action>) {
        let bytes = Arc::new(entry);
        if let Some(tail) = &mut self.tail {
            tail.push(self.sequence, at, &bytes);
        }
        if let Some(follower) = &mut self.follower {
            follower.early_bytes += if follower.holding { 0 } else { bytes.len() };
            out.push(Action::Ship { to: follower.peer, bytes });
        }
    }

    /// `shard` has taken a request; its actions are those of `out` from `first` on. Logs it where it changed what a backup
    /// must have, and keeps the answers until it does.
    pub(super) fn took(
        &mut self,
        shard: &Shard,
        (from, header, payload): (PeerId, &Header, &[u8]),
        now: Instant,
        (first, out): (usize, &mut Vec<Action>),
    ) {
        if self.logs() && changes(header.kind) && shard.is_replicated(header) {
            let mine = |to: &PeerId, reply: &Header| {
                *to == from && reply.slot == header.slot && matches!(reply.kind, Kind::Refused | Kind::Later)
            };
            let refused =
                out[first..].iter().any(|it| matches!(it, Action::Reply { to, header, .. } if mine(to, header)));
            if !refused {
                self.log(What::Request(*header, payload), from, now, out);
            }
        }
        self.hold(shard, first, out);
    }

    /// A client's connection is closed.
    pub(super) fn gone(&mut self, shard: &Shard, peer: PeerId, now: Instant, (first, out): (usize, &mut Vec<Action>)) {
        if self.logs() {
            self.log(What::Gone, peer, now, out);
        }
        self.hold(shard, first, out);
        self.held.retain(
            |(_, action)| !matches!(action, Action::Reply { to, .. } | Action::Value { to, .. } if *to == peer),
        );
    }

    /// `shard` has refused what had waited too long, if anything, and `evicted` rows whose time was up, or none.
    pub(super) fn expired(
        &mut self,
        shard: &Shard,
        evicted: bool,
        now: Instant,
        (first, out): (usize, &mut Vec<Action>),
    ) {
        if self.logs() && (evicted || out.len() > first) {
            self.log(What::Expire, PeerId(0), now, out);
        }
        self.hold(shard, first, out);
    }

    /// Puts answers aside that depend on entries which the backup does not have.
    fn hold(&mut self, shard: &Shard, first: usize, out: &mut Vec<Action>) {
        if !self.holds() {
            return;
        }
        let waits = |action: &mut Action| match action {
            Action::Reply { header, .. } | Action::Value { header, .. } => !shard.is_only_here(header.table),
            _ => false,
        };
        let sequence = self.sequence;
        self.held.extend(out.extract_if(first.., waits).map(|action| (sequence, action)));
    }

    fn release(&mut self, out: &mut Vec<Action>) {
        let ready = match (&self.fence, &self.follower) {
            (Some(_), _) => return,
            (None, Some(follower)) if follower.holding => follower.applied,
            (None, _) => u64::MAX,
        };
        while let Some((_, action)) = self.held.pop_front_if(|(sequence, _)| *sequence <= ready) {
            out.push(action);
        }
    }

    /// A seat that has nothing wants to follow, and the shard is ready to be copied: tells it what was before `at`, by the clock of
    /// the log, and all since.
    pub(super) fn follow(
        &mut self,
        shard: &mut Shard,
        (from, seat): (PeerId, u64),
        (at, now): (Instant, Instant),
        out: &mut Vec<Action>,
    ) {
        self.follower = Some(Follower {
            peer: from,
            seat,
            applied: 0,
            goal: u64::MAX,
            holding: false,
            heard: now,
            began: at,
            images: shard.images(at),
            telling: None,
            early_bytes: 0,
            whole: false,
        });
        self.say(What::Welcome(shard.key()), at, out);
        for chunk in shard.members_chunks() {
            self.say(What::Piece(&chunk), at, out);
        }
    }

    /// The shard was made ready for `seat`, which follows the last backup.
    pub(super) fn prepared(&mut self, seat: u64, now: Instant, out: &mut Vec<Action>) {
        if self.logs() {
            self.log(What::Prepare(seat), PeerId(0), now, out);
        }
    }

    /// This seat has taken over, with the connections of nobody.
    pub(super) fn take_over(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.logs() {
            self.log(What::TookOver, PeerId(0), now, out);
        }
    }

    /// A backup whose neighbour is gone comes to us, with every entry up to `sequence`.
    pub(super) fn resume(&mut self, (from, seat): (PeerId, u64), sequence: u64, now: Instant, out: &mut Vec<Action>) {
        let Some(fence) = self.fence.as_mut().filter(|fence| fence.seat == seat) else { return };
        let Some((began, entries)) = self.tail.as_ref().and_then(|tail| tail.since(sequence)) else {
            // It lacks what nobody has any more: it has to begin anew.
            fence.due = true;
            return;
        };
        self.fence = None;
        let follower = Follower {
            peer: from,
            seat,
            applied: sequence,
            goal: sequence,
            holding: true,
            heard: now,
            began: began.unwrap_or(now),
            images: VecDeque::new(),
            telling: None,
            early_bytes: 0,
            whole: true,
        };
        let resume = Entry { term: self.term, sequence, peer: PeerId(0), at_us: 0, what: What::Resume };
        out.push(Action::Ship { to: from, bytes: Arc::new(resume.encode()) });
        let again = entries.iter().map(|(at, entry)| passed_on(entry, self.term, follower.micros(*at)));
        out.extend(again.map(|bytes| Action::Ship { to: from, bytes: Arc::new(bytes) }));
        self.follower = Some(follower);
        self.release(out);
    }

    /// There is room: tells a new backup one more chunk of what was before.
    pub(super) fn tell_more(&mut self, now: Instant, out: &mut Vec<Action>) -> bool {
        let Some(follower) = self.follower.as_mut().filter(|it| !it.whole) else { return false };
        loop {
            if let Some(chunk) = follower.telling.as_mut().and_then(Iterator::next) {
                self.say(What::Piece(&chunk), now, out);
                return true;
            }
            follower.telling = follower.images.pop_front().map(Image::telling);
            if follower.telling.is_none() {
                (follower.whole, follower.goal) = (true, self.sequence);
                self.say(What::Whole, now, out);
                return true;
            }
        }
    }

    /// The backup has every entry up to `sequence`.
    pub(super) fn applied(&mut self, from: PeerId, sequence: u64, now: Instant, out: &mut Vec<Action>) {
        let Some(follower) = self.follower.as_mut().filter(|it| it.peer == from) else { return };
        follower.heard = now;
        follower.applied = follower.applied.max(sequence.min(self.sequence));
        if !follower.holding && follower.applied >= follower.goal {
            (follower.holding, follower.goal) = (true, self.sequence);
        }
        if let Some(tail) = self.tail.as_mut().filter(|_| follower.holding) {
            tail.forget(follower.applied);
        }
        self.release(out);
    }

    /// Whether `peer` is the backup's connection, which is closed.
    pub(super) fn lost(&mut self, peer: PeerId, now: Instant) -> bool {
        let Some(follower) = self.follower.take_if(|it| it.peer == peer) else { return false };
        if follower.holding {
            self.fence = Some(Fence { seat: follower.seat, until: now, due: true });
        }
        true
    }

    /// A new map has come, by which `seat` still has this part.
    pub(super) fn hear(&mut self, map: &ClusterMap, at: &ShardSeats, seat: u64, now: Instant, out: &mut Vec<Action>) {
        self.term = at.term;
        let next = at.after(seat).map(|(who, part)| (who.seat, part));
        let is_next = |seat: u64| next.is_some_and(|(next, _)| next == seat);
        if let Some(follower) = self.follower.take_if(|it| !is_next(it.seat)) {
            out.push(Action::Close { peer: follower.peer, reason: "it is not the next backup any more".to_owned() });
        }
        self.fence.take_if(|fence| !is_next(fence.seat));
        if let Some((next, SeatPart::Backup)) = next
            && self.is_free()
        {
            // It has lost whom it followed, and finds us by the same map.
            self.fence = Some(Fence { seat: next, until: now + TURN, due: false });
        }
        if map.replicas > 1 && !self.logs() {
            self.tail = Some(Tail::after_entry(self.sequence));
        }
        self.release(out);
    }

    /// Time passes: says that we are there, and looks whether who follows is.
    pub(super) fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        if let Some(fence) = &mut self.fence {
            fence.due |= now >= fence.until;
        }
        let Some(follower) = &self.follower else { return };
        if now.saturating_duration_since(follower.heard) > PATIENCE {
            let (peer, reason) = (follower.peer, format!("it has said nothing for {} s", PATIENCE.as_secs()));
            self.lost(peer, now);
            out.push(Action::Close { peer, reason });
        } else {
            self.say(What::Beat, now, out);
        }
    }

    /// What the coordinator must hear, until it has.
    pub(super) fn report(&self, shard: u32, by: u64, map: &ClusterMap) -> Option<Sighting> {
        if let Some(fence) = &self.fence {
            return fence.due.then_some(Sighting::Lost { shard, by, whom: fence.seat });
        }
        let follower = self.follower.as_ref().filter(|it| it.holding && it.applied >= it.goal)?;
        let candidate = map.shards.get(shard as usize).and_then(|seats| seats.candidate.as_ref());
        let named = candidate.is_some_and(|candidate| candidate.seat == follower.seat);
        named.then_some(Sighting::Synced { shard, by, whom: follower.seat })
    }
}

/// Whether a request of this kind may change what a backup must have.
fn changes(kind: Kind) -> bool {
    match kind {
        Kind::Pull | Kind::SparsePull | Kind::Status | Kind::Evicted => false,
        // Who asks for a norm, or for a checkpoint, waits for an answer and changes nothing: it asks the next primary again.
        Kind::Norm | Kind::Snapshot => false,
        // About tables that have no copy.
        Kind::Offer | Kind::Restart | Kind::Restore | Kind::Restored => false,
        Kind::Follow | Kind::Applied | Kind::Join | Kind::Sighting | Kind::Map | Kind::Drain => false,
        Kind::Done | Kind::Refused | Kind::Later => false,
        Kind::Hello | Kind::Open | Kind::ClaimInit | Kind::Init | Kind::EndInit | Kind::SetRate | Kind::Barrier => true,
        Kind::Push | Kind::PushPull | Kind::Scale | Kind::OpenSparse | Kind::SparsePush => true,
    }
}
