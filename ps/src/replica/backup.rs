//! Pure: a backup's side of the log: a copy of the shard that takes what the primary has taken, in the same order.

use super::log::{Entry, What};
use crate::Epoch;
use crate::control::Seating;
use crate::header::{Header, Kind};
use crate::shard::{Action, Shard};
use crate::state::Builder;
use gradwire_transport::PeerId;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Silence after which a primary counts as lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes of the log that may come while the copy is made.
pub(super) const MAX_EARLY_BYTES: usize = 256 << 20;
/// Marks the primary's connections in the copy, so that none is taken for one of ours.
const THEIRS: u32 = 1 << 31;

/// Whom a seat follows, and how far it has come.
pub(super) struct Backup {
    pub(super) primary: Seating,
    pub(super) term: Epoch,
    /// When the log began; `None` until it has.
    began: Option<Instant>,
    connected: bool,
    applied: u64,
    owes_answer: bool,
    heard: Instant,
    /// Whether the primary is gone.
    pub(super) lost: bool,
    scratch: Vec<Action>,
    /// The copy while it is being made, and the entries since, until it is.
    making: Option<Builder>,
    early: VecDeque<Vec<u8>>,
    early_bytes: usize,
}

impl Backup {
    pub(super) fn new(primary: Seating, term: Epoch, now: Instant) -> Self {
        Self {
            primary,
            term,
            began: None,
            connected: false,
            applied: 0,
            owes_answer: false,
            heard: now,
            lost: false,
            scratch: Vec::new(),
            making: None,
            early: VecDeque::new(),
            early_bytes: 0,
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

    /// Whether the log has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.began.is_some()
    }

    /// Where to call the primary, if that is to be done.
    pub(super) fn dial(&self) -> Option<&str> {
        (!self.connected && !self.lost).then_some(&*self.primary.address)
    }

    pub(super) fn dialled(&mut self, now: Instant) {
        (self.connected, self.heard) = (true, now);
    }

    /// The connection to the primary is closed.
    pub(super) fn closed(&mut self) {
        self.connected = false;
        // Before the log has begun it was too early, or the wrong one: the map will tell.
        self.lost |= self.has_begun();
    }

    /// Takes an entry. What is wrong with it, if anything: then this copy is not one any more.
    /// `place`: which shard it is, and of how many.
    pub(super) fn take(
        &mut self,
        shard: &mut Shard,
        place: (u32, u32),
        bytes: &[u8],
        now: Instant,
    ) -> Result<(), String> {
        let entry = Entry::decode(bytes)?;
        self.heard = now;
        if entry.term < self.term {
            return Err(format!("an entry of epoch {}, and {} has begun", entry.term.0, self.term.0));
        }
        if let What::Welcome(key) = entry.what {
            shard.take_key(key);
            self.making = Some(Builder::new(shard.limits().clone(), shard.instance(), place, now));
            (self.began, self.applied) = (Some(now), entry.sequence);
            return Ok(());
        }
        let began = self.began.ok_or("an entry before the log has begun")?;
        self.owes_answer = true;
        match entry.what {
            What::Beat => return Ok(()),
            What::Piece(chunk) => {
                let making = self.making.as_mut().ok_or("a piece of a copy that is whole")?;
                return making.take(chunk).map_err(|error| error.to_string());
            }
            What::Whole => return self.finish(shard, began),
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
        self.apply(shard, &entry, began)
    }

    /// The copy is whole: what came meanwhile is done now.
    fn finish(&mut self, shard: &mut Shard, began: Instant) -> Result<(), String> {
        let making = self.making.take().ok_or("the end of a copy that is whole")?;
        let key = shard.key();
        *shard = making.finish().map_err(|error| error.to_string())?;
        shard.take_key(key);
        while let Some(bytes) = self.early.pop_front() {
            self.apply(shard, &Entry::decode(&bytes)?, began)?;
        }
        self.early_bytes = 0;
        Ok(())
    }

    /// Does what the primary has done.
    fn apply(&mut self, shard: &mut Shard, entry: &Entry<'_>, began: Instant) -> Result<(), String> {
        if entry.sequence <= self.applied {
            // It came twice.
            return Ok(());
        }
        if entry.sequence != self.applied + 1 {
            return Err(format!("entry {} after {}", entry.sequence, self.applied));
        }
        self.applied = entry.sequence;
        let at = began + Duration::from_micros(entry.at_us);
        let (peer, out) = (PeerId(entry.peer.0 | THEIRS), &mut self.scratch);
        match &entry.what {
            What::Request(header, payload) => {
                shard.replay(peer, header, payload, at, out);
                let refused = out.iter().any(|action| match action {
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
            What::Gone => shard.gone(peer, out),
            What::Expire => shard.expire(at, out),
            What::Welcome(_) | What::Piece(_) | What::Whole | What::Beat => {}
        }
        out.clear();
        Ok(())
    }

    /// What the primary is to be told now, if anything.
    pub(super) fn answer(&mut self, seat: u64) -> Option<Header> {
        let told = self.connected && std::mem::take(&mut self.owes_answer);
        told.then(|| Header { client: seat, sequence: self.applied, ..Header::new(Kind::Applied) })
    }

    /// Time passes: asks to follow where the log has not begun, and looks whether the primary is there.
    pub(super) fn tick(&mut self, seat: u64, now: Instant) -> Option<Header> {
        if self.has_begun() {
            self.lost |= now.saturating_duration_since(self.heard) > PATIENCE;
            return None;
        }
        self.connected.then(|| Header { client: seat, epoch: self.term, ..Header::new(Kind::Follow) })
    }
}
