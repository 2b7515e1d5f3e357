//! Pure: one place of a server process: without a shard, with one, or with a copy of one that another has.

use super::backup::Backup;
use super::lead::Lead;
use crate::control::{SeatPart, Sighting};
use crate::header::{Header, Kind};
use crate::refusal::{Reason, Refusal};
use crate::shard::{Action, Checkpointing, Limits, Shard, refuse};
use crate::{ClusterMap, Role, Standing};
use gradwire_transport::PeerId;
use std::time::Instant;

/// The connection that a backup has made to whom it follows, the primary or another backup; all others were made to us.
pub const PRIMARY: PeerId = PeerId(1 << 30);

enum Part {
    /// A shard by itself, without a coordinator.
    Alone,
    /// Nothing yet.
    Spare,
    Backup(Box<Backup>),
    Primary(Box<Lead>),
}

/// What a seat that asks to follow is to have.
enum Asks {
    /// A copy of this one.
    Copy,
    /// That the shard is made ready for it to be copied from the last backup.
    Room,
    /// All after this entry: it has a copy.
    Rest(u64),
}

/// A seat. All that it does is a function of what it is told, so that a backup that is told the same is the same.
pub struct Seat {
    id: u64,
    shard: Shard,
    part: Part,
    map: ClusterMap,
    at: u32,
    over: Option<String>,
}

impl Seat {
    /// A shard without copies.
    pub fn alone(shard: Shard) -> Self {
        Self { id: 0, shard, part: Part::Alone, map: ClusterMap::default(), at: 0, over: None }
    }

    /// A seat that a coordinator will give a part to. `id`: a number that no other seat ever had.
    pub fn spare(id: u64, limits: Limits) -> Self {
        let shard = Shard::new(limits, id);
        Self { id, shard, part: Part::Spare, map: ClusterMap::default(), at: 0, over: None }
    }

    /// Checkpoints of the shard are kept.
    pub(crate) fn keep_checkpoints(&mut self) {
        self.shard.keep_checkpoints(Checkpointing::WhenAsked);
    }

    /// The shard, or the copy.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Why this seat has ended, if it has: begin a new one in its place.
    pub fn over(&self) -> Option<&str> {
        self.over.as_deref()
    }

    /// What the map says of a seat that asks to follow.
    fn asks(&self, header: &Header) -> Option<Asks> {
        if header.kind != Kind::Follow {
            return None;
        }
        let (at, part) = self.map.part_of(header.client).filter(|(at, _)| *at == self.at)?;
        let seats = &self.map.shards[at as usize];
        let mine = seats.after(self.id).is_some_and(|(next, _)| next.seat == header.client);
        match (part, header.sequence.checked_sub(1)) {
            (SeatPart::Candidate, None) if mine => Some(Asks::Copy),
            (SeatPart::Candidate, None) => Some(Asks::Room),
            (SeatPart::Backup, Some(last)) if mine => Some(Asks::Rest(last)),
            _ => None,
        }
    }

    /// Takes a request of a client, or of who follows.
    pub fn handle(&mut self, from: PeerId, header: &Header, payload: &[u8], now: Instant, out: &mut Vec<Action>) {
        let (asks, who) = (self.asks(header), (from, header.client));
        match &mut self.part {
            Part::Alone => self.shard.handle(from, header, payload, now, out),
            Part::Primary(lead) => match header.kind {
                Kind::Follow => match asks {
                    Some(Asks::Copy) if lead.is_free() && self.shard.make_ready_to_copy(out) => {
                        lead.follow(&mut self.shard, who, (now, now), out);
                    }
                    Some(Asks::Room) if self.shard.make_ready_to_copy(out) => lead.prepared(who.1, now, out),
                    Some(Asks::Rest(sequence)) => lead.resume(who, sequence, now, out),
                    // It asks again.
                    _ => {}
                },
                Kind::Applied => lead.applied(from, header.sequence, now, out),
                _ => {
                    let first = out.len();
                    self.shard.handle(from, header, payload, now, out);
                    lead.took(&self.shard, (from, header, payload), now, (first, out));
                }
            },
            Part::Backup(backup) if header.kind == Kind::Follow => match asks {
                Some(Asks::Copy) => {
                    let ask = backup.wanted(who, now);
                    out.extend(ask.map(|header| Action::Tell { to: PRIMARY, header }));
                }
                Some(Asks::Room) => out.push(Action::Tell { to: PRIMARY, header: *header }),
                Some(Asks::Rest(sequence)) => backup.lead.resume(who, sequence, now, out),
                None => {}
            },
            Part::Backup(backup) if header.kind == Kind::Applied => {
                backup.lead.applied(from, header.sequence, now, out);
                backup.owes();
            }
            Part::Spare if header.kind == Kind::Follow => {}
            Part::Spare | Part::Backup(_) => {
                let who = self.map.shards.get(self.at as usize).and_then(|seats| seats.primary.as_ref());
                let expected = format!("the primary, {}", who.map_or("which is not known yet", |who| &who.address));
                let refusal =
                    Refusal::new(Reason::WrongEpoch, format!("shard {}", self.at), "server", expected, "another");
                refuse(from, header, &refusal, out);
            }
        }
    }

    /// A connection is closed.
    pub fn gone(&mut self, peer: PeerId, now: Instant, out: &mut Vec<Action>) {
        match &mut self.part {
            Part::Alone => self.shard.gone(peer, out),
            Part::Spare => {}
            Part::Backup(backup) => {
                if peer == PRIMARY {
                    backup.closed();
                    self.end_where_useless();
                } else {
                    backup.gone(peer, now);
                }
            }
            Part::Primary(lead) => {
                if !lead.lost(peer, now) {
                    let first = out.len();
                    self.shard.gone(peer, out);
                    lead.gone(&self.shard, peer, now, (first, out));
                }
            }
        }
    }

    /// Time passes; to be called some times a second.
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        match &mut self.part {
            Part::Alone => {
                self.shard.expire(now, out);
            }
            Part::Spare => {}
            Part::Backup(backup) => {
                let follow = backup.tick(self.id, now);
                out.extend(follow.map(|header| Action::Tell { to: PRIMARY, header }));
                backup.lead.tick(now, out);
                self.end_where_useless();
            }
            Part::Primary(lead) => {
                let first = out.len();
                let evicted = self.shard.expire(now, out);
                lead.expired(&self.shard, evicted, now, (first, out));
                lead.tick(now, out);
            }
        }
    }

    /// Where whom it follows is to be called, if that is to be done.
    pub fn dial(&self) -> Option<&str> {
        match &self.part {
            Part::Backup(backup) => backup.dial(),
            _ => None,
        }
    }

    /// That has been called.
    pub fn dialled(&mut self, now: Instant, out: &mut Vec<Action>) {
        if let Part::Backup(backup) = &mut self.part {
            backup.dialled(now);
            out.extend(backup.tick(self.id, now).map(|header| Action::Tell { to: PRIMARY, header }));
        }
    }

    /// Whom this seat follows has sent an entry of the log.
    pub fn take_entry(&mut self, bytes: &[u8], now: Instant, out: &mut Vec<Action>) {
        let place = (self.at, self.map.shards.len() as u32);
        if let Part::Backup(backup) = &mut self.part
            && let Err(reason) = backup.take(&mut self.shard, place, bytes, now, out)
        {
            self.over = Some(reason);
        }
    }

    /// Tells whom it follows how far the copy is: once for all entries since last asked.
    pub fn answer(&mut self, out: &mut Vec<Action>) {
        if let Part::Backup(backup) = &mut self.part
            && self.over.is_none()
        {
            out.extend(backup.answer(self.id).map(|header| Action::Tell { to: PRIMARY, header }));
        }
    }

    /// What the coordinator is to be told, again and again until the map shows that it has heard.
    pub fn report(&self) -> Option<Sighting> {
        match &self.part {
            Part::Backup(backup) if backup.lost => {
                Some(Sighting::Lost { shard: self.at, by: self.id, whom: backup.follows.seat })
            }
            Part::Backup(backup) => backup.lead.report(self.at, self.id, &self.map),
            Part::Primary(lead) => lead.report(self.at, self.id, &self.map),
            _ => None,
        }
    }

    /// What this seat is to hold before it hears this map, where that makes it the first primary of a shard which begins with a
    /// checkpoint: the checkpoint's name, the shard, and how many there are.
    pub fn origin_in<'a>(&self, map: &'a ClusterMap) -> Option<(&'a str, (u32, u32))> {
        let (at, part) = map.part_of(self.id).filter(|_| matches!(self.part, Part::Spare))?;
        let origin = &*map.shards[at as usize].origin;
        let place = (at, map.shards.len() as u32);
        (part == SeatPart::Primary && !origin.is_empty()).then_some((origin, place))
    }

    /// What that checkpoint holds, or why it cannot be had: this seat ends then, and nobody takes it for an empty shard.
    pub fn begin_with(&mut self, shard: Result<Shard, String>) {
        match shard {
            Ok(shard) => self.shard = shard,
            Err(why) => self.over = Some(why),
        }
    }

    /// What it may hold, and its number.
    pub(crate) fn measures(&self) -> (&Limits, u64) {
        (self.shard.limits(), self.id)
    }

    /// A map has come.
    pub fn hear(&mut self, map: &ClusterMap, now: Instant, out: &mut Vec<Action>) {
        if map.epoch <= self.map.epoch || matches!(self.part, Part::Alone) {
            return;
        }
        self.map.clone_from(map);
        self.shard.take_replicas(map.replicas);
        let Some((at, part)) = self.map.part_of(self.id) else {
            if !matches!(self.part, Part::Spare) {
                self.over = Some(format!("shard {} has gone to another server", self.at));
            }
            return;
        };
        self.at = at;
        self.shard.take_place((at, map.shards.len() as u32));
        let seats = &self.map.shards[at as usize];
        let term = seats.term;
        match (&mut self.part, part, seats.before(self.id)) {
            (Part::Primary(lead), SeatPart::Primary, _) if lead.term() == term => {
                lead.hear(map, seats, self.id, now, out);
            }
            (Part::Spare, SeatPart::Primary, _) => self.lead(Box::new(Lead::new(term)), now, out),
            (Part::Backup(backup), SeatPart::Primary, _) if backup.is_whole() => {
                out.push(Action::Close { peer: PRIMARY, reason: "this seat has taken over".to_owned() });
                self.shard.forget_connections();
                let lead = std::mem::replace(&mut backup.lead, Box::new(Lead::new(term)));
                self.lead(lead, now, out);
            }
            (Part::Spare, SeatPart::Candidate, Some(follows)) => {
                self.part = Part::Backup(Box::new(Backup::new(follows.clone(), term, now)));
            }
            (Part::Backup(backup), SeatPart::Backup | SeatPart::Candidate, Some(follows))
                if follows.seat == backup.follows.seat =>
            {
                backup.hear(map, seats, self.id, now, out);
                self.end_where_useless();
            }
            (Part::Backup(backup), SeatPart::Backup, Some(follows)) if backup.is_whole() => {
                out.push(Action::Close { peer: PRIMARY, reason: "this seat follows another now".to_owned() });
                backup.turn_to(follows.clone(), now);
                backup.hear(map, seats, self.id, now, out);
            }
            _ => self.over = Some(format!("shard {at} has another primary than the one this seat knew")),
        }
    }

    /// A seat whose primary is gone before the copy was whole can never take over. With a whole copy the coordinator decides: it
    /// may have heard that this is the backup before we have.
    fn end_where_useless(&mut self) {
        if let Part::Backup(backup) = &self.part
            && backup.lost
            && !backup.is_whole()
        {
            self.over = Some(format!("the primary of shard {} was gone before this copy was complete", self.at));
        }
    }

    fn lead(&mut self, mut lead: Box<Lead>, now: Instant, out: &mut Vec<Action>) {
        let seats = &self.map.shards[self.at as usize];
        self.shard.begin_epoch(seats.term);
        lead.hear(&self.map, seats, self.id, now, out);
        lead.take_over(now, out);
        self.part = Part::Primary(lead);
    }

    /// There is room for more of the log: tells a new backup more of what was before. Whether there was any.
    pub fn tell_more(&mut self, now: Instant, out: &mut Vec<Action>) -> bool {
        match &mut self.part {
            Part::Primary(lead) => lead.tell_more(now, out),
            Part::Backup(backup) => backup.lead.tell_more(now, out),
            _ => false,
        }
    }

    /// Whether too much waits for the backup to take more from clients.
    pub fn is_full(&self) -> bool {
        matches!(&self.part, Part::Primary(lead) if lead.is_full())
    }

    /// What the seat is, and at which place of the log.
    pub fn standing(&self) -> Standing {
        let (role, (log, backup)) = match &self.part {
            Part::Alone => (Role::Alone, (0, None)),
            Part::Spare => (Role::Spare, (0, None)),
            Part::Backup(backup) => (Role::Backup, (backup.place(), backup.lead.place().1)),
            Part::Primary(lead) if lead.is_fenced() => (Role::Fenced, lead.place()),
            Part::Primary(lead) => (Role::Primary, lead.place()),
        };
        Standing { role, shard: self.at, epoch: self.map.epoch, log, backup }
    }
}
