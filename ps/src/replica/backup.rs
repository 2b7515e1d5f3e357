//! Pure: a backup's side of the log: a copy of the shard that takes what the primary has taken, in the same order, from the
//! primary or from the backup before it, and passes it on.

use super::lead::Lead;
use super::log::{Entry, MAX_EARLY_BYTES, TURN, What};
use crate::control::Seating;
use crate::header::{Header, Kind};
use crate::shard::{Action, Shard};
use crate::state::Builder;
use crate::{ClusterMap, Epoch, ShardSeats};
use gradwire_transport::PeerId;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Silence after which a primary counts as lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// Marks the primary's connections in the copy, so that none is taken for one of ours.
const THEIRS: u32 = 1 << 31;

/// The least time until the primary is asked again to make ready for a copy.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Whom a seat follows, and how far it has come.
pub(super) struct Backup {
    pub(super) follows: Seating,
    pub(super) term: Epoch,
    /// When the log began, by which entries count their time; `None` until it has.
    began: Option<Instant>,
    /// Whether the log comes, by the connection that there is.
    following: bool,
    connected: bool,
    applied: u64,
    /// When the last entry was done.
    last: Instant,
    owes_answer: bool,
    heard: Instant,
    /// Whether whom it follows is gone.
    pub(super) lost: bool,
    scratch: Vec<Action>,
    /// The copy while it is being made, and the entries since, until it is.
    making: Option<Builder>,
    early: VecDeque<Vec<u8>>,
    early_bytes: usize,
    /// Who follows this one.
    pub(super) lead: Box<Lead>,
    /// A seat that wants a copy of this one, and when the primary was asked to make ready for it.
    wants: Option<(PeerId, u64, Instant)>,
}

impl Backup {
    pub(super) fn new(follows: Seating, term: Epoch, now: Instant) -> Self {
        Self {
            follows,
            term,
            began: None,
            following: false,
            connected: false,
            applied: 0,
            last: now,
            owes_answer: false,
            heard: now,
            lost: false,
            scratch: Vec::new(),
            making: None,
            early: VecDeque::new(),
            early_bytes: 0,
            lead: Box::new(Lead::new(term)),
            wants: None,
        }
    }

    /// Whether this copy is one.
    pub(super) fn is_whole(&self) -> bool {
        self.began.is_some() && self.making.is_none()
    }

    /// Entries of the log that it has.
    pub(super) fn place(&self) -> u64 {
        self.applied
    }

    /// Where to call whom it follows, if that is to be done.
    pub(super) fn dial(&self) -> Option<&str> {
        (!self.connected && !self.lost).then_some(&*self.follows.address)
    }

    pub(super) fn dialled(&mut self, now: Instant) {
        (self.connected, self.heard) = (true, now);
    }

    /// The connection to whom it follows is closed.
    pub(super) fn closed(&mut self) {
        // Before the log came by it, it was too early, or the wrong one: the map will tell.
        self.lost |= self.following;
        (self.connected, self.following) = (false, false);
    }

    /// Whom it followed is gone: from here on it follows another, where that one has what comes after its last entry.
    pub(super) fn turn_to(&mut self, follows: Seating, now: Instant) {
        // That one may have heard of no later term than this seat began in.
        (self.follows, self.heard) = (follows, now);
        (self.connected, self.following, self.lost) = (false, false, false);
    }

    /// A seat wants a copy of this one, and a map says that it shall have it. What the primary is to be told, if anything.
    pub(super) fn wanted(&mut self, (from, seat): (PeerId, u64), now: Instant) -> Option<Header> {
        let asked = self.wants.filter(|(peer, other, _)| (*peer, *other) == (from, seat)).map(|(.., asked)| asked);
        let due = asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK_AGAIN);
        let ready = self.is_whole() && self.following && self.lead.is_free();
        (due && ready).then(|| {
            self.wants = Some((from, seat, now));
            Header { client: seat, epoch: self.term, ..Header::new(Kind::Follow) }
        })
    }

    /// Who follows has told how far it is: whom we follow is told as well.
    pub(super) fn owes(&mut self) {
        self.owes_answer = true;
    }

    /// A connection that was made to this seat is closed.
    pub(super) fn gone(&mut self, peer: PeerId, now: Instant) {
        self.lead.lost(peer, now);
        self.wants.take_if(|(from, ..)| *from == peer);
    }

    /// A new map has come, by which `seat` follows whom it follows.
    pub(super) fn hear(&mut self, map: &ClusterMap, at: &ShardSeats, seat: u64, now: Instant, out: &mut Vec<Action>) {
        self.lead.hear(map, at, seat, now, out);
        // What waited for one that is no backup any more waits no longer.
        self.owes_answer = true;
    }

    /// Takes an entry. What is wrong with it, if anything: then this copy is not one any more.
    /// `place`: which shard it is, and of how many.
    pub(super) fn take(
        &mut self,
        shard: &mut Shard,
        place: (u32, u32),
        bytes: &[u8],
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), String> {
        let entry = Entry::decode(bytes)?;
        self.heard = now;
        if entry.term < self.term {
            return Err(format!("an entry of epoch {}, and {} has begun", entry.term.0, self.term.0));
        }
        if let What::Welcome(key) = entry.what {
            shard.take_key(key);
            self.making = Some(Builder::new(shard.limits().clone(), shard.instance(), place, now));
            (self.began, self.last, self.applied, self.following) = (Some(now), now, entry.sequence, true);
            return Ok(());
        }
        if entry.what == What::Resume && entry.sequence == self.applied {
            // It counts time from this entry on, as we did it.
            (self.began, self.following) = (Some(self.last), true);
            return Ok(());
        }
        let began = self.began.ok_or("an entry before the log has begun")?;
        if !self.following {
            // Of whom it followed before, or of one that has not heard yet how far this copy is.
            return Ok(());
        }
        self.owes_answer = true;
        match entry.what {
            What::Beat => return Ok(()),
            What::Piece(chunk) => {
                let making = self.making.as_mut().ok_or("a piece of a copy that is whole")?;
                return making.take(chunk).map_err(|error| error.to_string());
            }
            What::Whole => return self.finish(shard, began, out),
            _ => {}
        }
        if self.making.is_some() {
            self.early_bytes += bytes.len();
            if self.early_bytes > MAX_EARLY_BYTES {
                return Err(format!("more than {MAX_EARLY_BYTES} bytes of log came while the copy was made"));
            }
            self.early.push_back(bytes.to_vec());
            return Ok(());
        }
        self.apply(shard, (&entry, bytes), began, out)
    }

    /// The copy is whole: what came meanwhile is done now.
    fn finish(&mut self, shard: &mut Shard, began: Instant, out: &mut Vec<Action>) -> Result<(), String> {
        let making = self.making.take().ok_or("the end of a copy that is whole")?;
        let key = shard.key();
        *shard = making.finish().map_err(|error| error.to_string())?;
        shard.take_key(key);
        self.lead.begin_after(self.applied);
        while let Some(bytes) = self.early.pop_front() {
            self.apply(shard, (&Entry::decode(&bytes)?, &bytes), began, out)?;
        }
        self.early_bytes = 0;
        Ok(())
    }

    /// Does what the primary has done, and passes it on.
    fn apply(
        &mut self,
        shard: &mut Shard,
        (entry, bytes): (&Entry<'_>, &[u8]),
        began: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), String> {
        if entry.sequence <= self.applied {
            // It came twice.
            return Ok(());
        }
        if entry.sequence != self.applied + 1 {
            return Err(format!("entry {} after {}", entry.sequence, self.applied));
        }
        self.applied = entry.sequence;
        let at = began + Duration::from_micros(entry.at_us);
        self.last = at;
        let (peer, mine) = (PeerId(entry.peer.0 | THEIRS), &mut self.scratch);
        match &entry.what {
            What::Request(header, payload) => {
                shard.replay(peer, header, payload, at, mine);
                let refused = mine.iter().any(|action| match action {
                    Action::Reply { to, header: reply, .. } => {
                        *to == peer && reply.slot == header.slot && matches!(reply.kind, Kind::Refused | Kind::Later)
                    }
                    _ => false,
                });
                if refused {
                    return Err(format!(
                        "a {:?} that the primary has taken was refused here: has it less memory?",
                        header.kind
                    ));
                }
            }
            What::Gone => shard.gone(peer, mine),
            What::Expire => {
                shard.expire(at, mine);
            }
            What::TookOver => shard.forget_connections(),
            What::Prepare(_) if !shard.make_ready_to_copy(mine) => {
                return Err("the primary was ready to be copied, and this copy is not".to_owned());
            }
            What::Prepare(_) | What::Welcome(_) | What::Piece(_) | What::Whole | What::Beat | What::Resume => {}
        }
        mine.clear();
        self.lead.relay(entry.sequence, bytes, at, out);
        if let What::Prepare(seat) = entry.what
            && let Some((from, ..)) = self.wants.take_if(|(_, wants, _)| *wants == seat)
        {
            self.lead.follow(shard, (from, seat), (at, self.heard), out);
        }
        Ok(())
    }

    /// What whom it follows is to be told now, if anything: how far this copy is, and all behind it.
    pub(super) fn answer(&mut self, seat: u64) -> Option<Header> {
        if !(self.connected && self.following && std::mem::take(&mut self.owes_answer)) {
            return None;
        }
        let sequence = self.lead.confirmed().min(self.applied);
        Some(Header { client: seat, sequence, ..Header::new(Kind::Applied) })
    }

    /// Time passes: asks to follow where the log does not come, and looks whether whom it follows is there.
    pub(super) fn tick(&mut self, seat: u64, now: Instant) -> Option<Header> {
        if self.is_whole() || self.following {
            let patience = if self.following { PATIENCE } else { TURN };
            self.lost |= now.saturating_duration_since(self.heard) > patience;
        }
        // From which entry on: from the beginning, or after the last that it has.
        let next = if self.is_whole() { self.applied + 1 } else { 0 };
        let asks = self.connected && !self.following;
        asks.then(|| Header { client: seat, epoch: self.term, sequence: next, ..Header::new(Kind::Follow) })
    }
}
