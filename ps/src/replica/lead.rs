//! Pure: a primary's side of the log: what the backup must have before a client is answered.

use super::backup::MAX_EARLY_BYTES;
use super::log::{Entry, What};
use crate::control::Sighting;
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::shard::{Action, Shard};
use crate::state::{Image, Telling};
use crate::{ClusterMap, Epoch};
use gradwire_transport::PeerId;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Silence after which a backup counts as lost: less than [`super::backup::PATIENCE`], so that a primary which is cut off stops
/// before another takes over.
const PATIENCE: Duration = Duration::from_secs(2);
/// Answers that may wait for the backup; beyond it, nothing more is taken from clients.
const MAX_HELD: usize = 1 << 16;

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

/// What a primary keeps of its backup.
pub(super) struct Lead {
    term: Epoch,
    sequence: u64,
    follower: Option<Follower>,
    /// A backup that is gone: until a map without it comes, it may have taken over.
    fence: Option<u64>,
    held: VecDeque<(u64, Action)>,
}

impl Lead {
    pub(super) fn new(term: Epoch) -> Self {
        Self { term, sequence: 0, follower: None, fence: None, held: VecDeque::new() }
    }

    pub(super) fn term(&self) -> Epoch {
        self.term
    }

    /// Entries of the log, and how many of them the backup has; `None` without a backup.
    pub(super) fn place(&self) -> (u64, Option<u64>) {
        (self.sequence, self.follower.as_ref().filter(|it| it.holding).map(|it| it.applied))
    }

    /// Whether answers wait for a map.
    pub(super) fn is_fenced(&self) -> bool {
        self.fence.is_some()
    }

    /// Whether too much waits for the backup to take more.
    pub(super) fn is_full(&self) -> bool {
        let early = |it: &Follower| !it.holding && it.early_bytes > MAX_EARLY_BYTES / 2;
        self.held.len() >= MAX_HELD || self.follower.as_ref().is_some_and(early)
    }

    fn holds(&self) -> bool {
        self.fence.is_some() || self.follower.as_ref().is_some_and(|it| it.holding && it.applied < self.sequence)
    }

    fn ship(&self, what: What<'_>, peer: PeerId, now: Instant, out: &mut Vec<Action>) {
        let Some(follower) = &self.follower else { return };
        let at_us = u64::try_from(now.saturating_duration_since(follower.began).as_micros()).unwrap_or(u64::MAX);
        let entry = Entry { term: self.term, sequence: self.sequence, peer, at_us, what };
        out.push(Action::Ship { to: follower.peer, bytes: entry.encode() });
    }

    fn log(&mut self, what: What<'_>, peer: PeerId, now: Instant, out: &mut Vec<Action>) {
        self.sequence += 1;
        if let (Some(follower), What::Request(_, payload)) = (&mut self.follower, &what) {
            follower.early_bytes += if follower.holding { 0 } else { HEADER_BYTES + payload.len() };
        }
        self.ship(what, peer, now, out);
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
        if self.follower.is_some() && changes(header.kind) && shard.is_replicated(header) {
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
        if self.follower.is_some() {
            self.log(What::Gone, peer, now, out);
        }
        self.hold(shard, first, out);
        self.held.retain(
            |(_, action)| !matches!(action, Action::Reply { to, .. } | Action::Value { to, .. } if *to == peer),
        );
    }

    /// `shard` has refused what had waited too long, if anything.
    pub(super) fn expired(&mut self, shard: &Shard, now: Instant, (first, out): (usize, &mut Vec<Action>)) {
        if self.follower.is_some() && out.len() > first {
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

    /// A seat wants to follow. It is let in once the map names it, and the shard can be copied; until then it asks again.
    pub(super) fn follow(
        &mut self,
        shard: &mut Shard,
        (from, seat): (PeerId, u64),
        named: bool,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let busy = self.follower.is_some() || self.fence.is_some();
        if !named || busy || !shard.make_ready_to_copy(out) {
            return;
        }
        self.follower = Some(Follower {
            peer: from,
            seat,
            applied: 0,
            goal: u64::MAX,
            holding: false,
            heard: now,
            began: now,
            images: shard.images(now),
            telling: None,
            early_bytes: 0,
            whole: false,
        });
        self.ship(What::Welcome(shard.key()), from, now, out);
        for chunk in shard.members_chunks() {
            self.ship(What::Piece(&chunk), from, now, out);
        }
    }

    /// There is room: tells a new backup one more chunk of what was before.
    pub(super) fn tell_more(&mut self, now: Instant, out: &mut Vec<Action>) -> bool {
        let Some(follower) = self.follower.as_mut().filter(|it| !it.whole) else { return false };
        loop {
            if let Some(chunk) = follower.telling.as_mut().and_then(Iterator::next) {
                self.ship(What::Piece(&chunk), PeerId(0), now, out);
                return true;
            }
            follower.telling = follower.images.pop_front().map(Image::telling);
            if follower.telling.is_none() {
                (follower.whole, follower.goal) = (true, self.sequence);
                self.ship(What::Whole, PeerId(0), now, out);
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
        self.release(out);
    }

    /// Whether `peer` is the backup's connection, which is closed.
    pub(super) fn lost(&mut self, peer: PeerId) -> bool {
        let Some(follower) = self.follower.take_if(|it| it.peer == peer) else { return false };
        if follower.holding {
            self.fence = Some(follower.seat);
        }
        true
    }

    /// A new map has come, in which this seat still is the primary.
    pub(super) fn hear(&mut self, map: &ClusterMap, out: &mut Vec<Action>) {
        self.fence.take_if(|seat| map.part_of(*seat).is_none());
        if let Some(follower) = self.follower.take_if(|it| map.part_of(it.seat).is_none()) {
            out.push(Action::Close { peer: follower.peer, reason: "it is not the backup any more".to_owned() });
        }
        self.release(out);
    }

    /// Time passes: says that we are there, and looks whether the backup is.
    pub(super) fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        let Some(follower) = &self.follower else { return };
        if now.saturating_duration_since(follower.heard) > PATIENCE {
            let (peer, reason) = (follower.peer, format!("it has said nothing for {} s", PATIENCE.as_secs()));
            self.lost(peer);
            out.push(Action::Close { peer, reason });
        } else {
            self.ship(What::Beat, PeerId(0), now, out);
        }
    }

    /// What the coordinator must hear, until it has.
    pub(super) fn report(&self, shard: u32, by: u64, map: &ClusterMap) -> Option<Sighting> {
        if let Some(whom) = self.fence {
            return Some(Sighting::Lost { shard, by, whom });
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
