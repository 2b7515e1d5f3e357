//! Pure: receiver-driven credit: how many bytes may be on their way to one receiver, and who may send them next.
//!
//! Many senders and one receiver fill the buffer of the last switch, which drops, and TCP waits. So the receiver asks for
//! bytes in small grants, and never for more at once than the path holds, its bandwidth times its round trip, and a small
//! allowance, which is what may queue; `climb` finds what it holds. Senders take turns; short and control messages go first,
//! but for each fourth grant. Who does not deliver in time gets no further grant and holds nobody up: what a slow sender was
//! granted is not in the network but waits with it for a processor, or was lost, so others use its place, up to half the
//! budget, in case all come at once after all; after longer, all of it. What it was granted is forgotten when it is lost.

mod climb;
mod held;

use crate::PeerId;
use climb::Climb;
pub(crate) use held::Held;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Longest message that may be sent unasked to a receiver that grants: a parameter server's request with a short payload.
pub(crate) const UNASKED_BYTES: usize = 12 << 10;
/// Bytes one peer may have sent unasked: a few requests, little beside a switch's buffer.
pub(crate) const UNASKED_WINDOW: usize = 32 << 10;
/// Grants are of this length or longer: short enough for turns behind a small buffer, long enough to be worth a frame.
const LEAST_GRANT: u64 = 16 << 10;
/// A longer grant than this gains nothing.
const MOST_GRANT: u64 = 256 << 10;
/// Grants that the budget is cut into.
const SHARES: u64 = 8;
/// Urgent grants in a row while others wait.
const STREAK: u32 = 3;
/// A grant is slow after one and a half times what grants take from being made to their first byte, and after this at least.
const SLOW: Duration = Duration::from_micros(500);
/// What grants take is the mean of about so many.
const USUAL_OF: u32 = 16;
/// The least time after which a grant is late: a TCP that has lost a packet repairs it well before.
const LATE: Duration = Duration::from_millis(20);
/// A grant is late after this many round trips.
const LATE_ROUND_TRIPS: u32 = 8;

/// How a receiver grants credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditSettings {
    /// Bytes that may be on their way, beside a grant, whatever the path holds: what may queue in the network. Default 56 KiB,
    /// less than a small switch's buffer.
    pub allowance_bytes: u64,
    /// Bytes on their way at most. Default 16 MiB: 400 Gb/s times 300 µs.
    pub most_bytes: u64,
    /// Whether peers on this very host are granted credit too, over TCP and shared memory. Default false: nothing queues between
    /// them that can be lost; what a sender of shared memory has copied and its receiver has not read is 4 MiB at most, in slots.
    pub loopback: bool,
    /// Whether credit is only for conversations that both ends have marked ([`Wire::mark`](crate::Wire::mark)), and others are
    /// asked for at once, as in a group, which does much else than sending many to one. Over TCP. Default false.
    pub marked: bool,
}

impl Default for CreditSettings {
    fn default() -> Self {
        Self { allowance_bytes: 56 << 10, most_bytes: 16 << 20, loopback: false, marked: false }
    }
}

/// Leave to send message `id` up to byte `until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) to: PeerId,
    pub(crate) id: u32,
    pub(crate) until: u64,
}

/// A message that somebody waits for and that has not been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) id: u32,
    pub(crate) bytes: u64,
    /// Whether it goes before others whatever its length.
    pub(crate) urgent: bool,
}

struct Message {
    id: u32,
    bytes: u64,
    granted: u64,
}

#[derive(Default)]
struct Sender {
    /// Wanted messages: urgent ones, and others.
    messages: [VecDeque<Message>; 2],
    /// Bytes granted, and bytes come, since the start.
    granted: u64,
    came: u64,
    /// Grants of which nothing has come: when, and `granted` before each. The first byte tells the round trip; the last one
    /// would tell the length of the grant.
    under_way: VecDeque<(Instant, u64)>,
    /// When the first grant under way became the first.
    since: Option<Instant>,
    pace: Pace,
}

/// How soon a sender delivers what it was granted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Pace {
    #[default]
    OnTime,
    Slow,
    Late,
}

impl Sender {
    fn outstanding(&self) -> u64 {
        self.granted - self.came
    }
}

/// All credit of one receiver.
pub(crate) struct Credit {
    senders: BTreeMap<PeerId, Sender>,
    /// Senders with urgent messages, and with others, in turn.
    turns: [VecDeque<PeerId>; 2],
    streak: u32,
    outstanding: u64,
    /// What the path holds.
    climb: Climb,
    /// Whether somebody had to wait when credit was last handed out.
    wanted: bool,
    /// Whether messages are granted whole: then the longest one so far, of which two may be on their way.
    whole: Option<u64>,
    /// The shortest time from a grant to its first byte, and the usual one.
    round_trip: Duration,
    usual: Duration,
}

impl Credit {
    pub(crate) fn new(settings: CreditSettings) -> Self {
        Self {
            senders: BTreeMap::new(),
            turns: Default::default(),
            streak: 0,
            outstanding: 0,
            climb: Climb::new(settings.allowance_bytes + LEAST_GRANT, settings.most_bytes),
            wanted: false,
            whole: None,
            round_trip: Duration::MAX,
            usual: Duration::ZERO,
        }
    }

    /// Grants whole messages, for wires that tell of a message only when it is there; at least two at once, so that the next
    /// one comes while the last is taken.
    pub(crate) fn of_whole_messages(settings: CreditSettings) -> Self {
        Self { whole: Some(0), ..Self::new(settings) }
    }

    /// Bytes that may be on their way now.
    pub(crate) fn budget(&self) -> u64 {
        self.climb.budget()
    }

    /// Bytes that are on their way, late ones included.
    #[cfg(test)]
    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Of these, those of senders that are late.
    #[cfg(test)]
    pub(crate) fn late(&self) -> u64 {
        self.senders.values().filter(|sender| sender.pace == Pace::Late).map(Sender::outstanding).sum()
    }

    /// A message of `from` has met its receive.
    pub(crate) fn want(&mut self, from: PeerId, want: Want) {
        if self.whole.is_some_and(|longest| longest < want.bytes) {
            self.whole = Some(want.bytes);
            self.climb.raise(2 * want.bytes);
        }
        let class = usize::from(!(want.urgent || want.bytes <= LEAST_GRANT));
        let messages = &mut self.senders.entry(from).or_default().messages[class];
        if messages.is_empty() {
            self.turns[class].push_back(from);
        }
        messages.push_back(Message { id: want.id, bytes: want.bytes, granted: 0 });
    }

    /// Granted bytes have come from `from`.
    pub(crate) fn came(&mut self, from: PeerId, bytes: u64, now: Instant) {
        let Some(sender) = self.senders.get_mut(&from) else { return };
        // A peer that sends more than it was granted gains nothing by it here.
        let bytes = bytes.min(sender.outstanding());
        sender.came += bytes;
        (sender.pace, sender.since) = (Pace::OnTime, (sender.outstanding() > 0).then_some(now));
        self.outstanding -= bytes;
        while let Some(&(at, start)) = sender.under_way.front()
            && start < sender.came
        {
            sender.under_way.pop_front();
            let took = now.saturating_duration_since(at);
            self.round_trip = self.round_trip.min(took);
            self.usual = (self.usual * (USUAL_OF - 1) + took.min(LATE)) / USUAL_OF;
        }
        self.climb.came(bytes, self.wanted, now);
    }

    /// `peer` is gone: what it was granted will not come.
    pub(crate) fn gone(&mut self, peer: PeerId) {
        if let Some(sender) = self.senders.remove(&peer) {
            self.outstanding -= sender.outstanding();
            self.turns.iter_mut().for_each(|turns| turns.retain(|other| *other != peer));
        }
    }

    /// Everything that may be asked for now.
    pub(crate) fn grant(&mut self, now: Instant, grants: &mut Vec<Grant>) {
        self.wanted = false;
        if self.turns.iter().all(VecDeque::is_empty) {
            return;
        }
        let budget = self.budget();
        let mut counted = self.outstanding - self.mark_pace(now, budget / 2);
        let longest =
            if self.whole.is_some() { u64::MAX / 2 } else { (budget / SHARES).clamp(LEAST_GRANT, MOST_GRANT) };
        while let Some((class, to)) = self.next() {
            let Some(sender) = self.senders.get_mut(&to) else { break };
            let Some(message) = sender.messages[class].front_mut() else { break };
            let left = message.bytes - message.granted;
            // A rest that is shorter than half a grant would be asked for by a frame of its own.
            let bytes = if left < longest + longest / 2 { left } else { longest };
            if counted > 0 && counted + bytes > budget {
                self.wanted = true;
                break;
            }
            message.granted += bytes;
            grants.push(Grant { to, id: message.id, until: message.granted });
            if message.granted == message.bytes {
                sender.messages[class].pop_front();
            }
            sender.under_way.push_back((now, sender.granted));
            sender.granted += bytes;
            sender.since = sender.since.or(Some(now));
            let more = !sender.messages[class].is_empty();
            counted += bytes;
            self.outstanding += bytes;
            self.pass(class, to, more);
        }
    }

    /// When to look again though nothing comes: a grant that is slow or late makes room for others.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let waits = !self.turns.iter().all(VecDeque::is_empty);
        let (slow_after, late_after) = (self.slow_after(), self.late_after());
        let next = |sender: &Sender| match sender.pace {
            Pace::OnTime => Some(sender.since? + slow_after),
            Pace::Slow => Some(sender.since? + late_after),
            Pace::Late => None,
        };
        self.senders.values().filter_map(next).min().filter(|_| waits)
    }

    /// Finds who is slow and who is late; how much of what they hold others may have, of the slow ones' at most `most`.
    fn mark_pace(&mut self, now: Instant, most: u64) -> u64 {
        let (slow_after, late_after) = (self.slow_after(), self.late_after());
        let (mut slow, mut late) = (0, 0);
        for sender in self.senders.values_mut() {
            let waited = sender.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            let pace = match waited {
                waited if waited >= late_after => Pace::Late,
                waited if waited >= slow_after => Pace::Slow,
                _ => Pace::OnTime,
            };
            sender.pace = sender.pace.max(pace);
            match sender.pace {
                Pace::OnTime => {}
                Pace::Slow => slow += sender.outstanding(),
                Pace::Late => late += sender.outstanding(),
            }
        }
        late + slow.min(most)
    }

    fn slow_after(&self) -> Duration {
        SLOW.max(self.usual * 3 / 2).min(self.late_after())
    }

    fn late_after(&self) -> Duration {
        if self.round_trip == Duration::MAX { LATE } else { LATE.max(self.round_trip * LATE_ROUND_TRIPS) }
    }

    /// Whose turn it is, and in which class; not somebody who is slow or late.
    fn next(&mut self) -> Option<(usize, PeerId)> {
        let senders = &self.senders;
        let on_time = |turns: &VecDeque<PeerId>| {
            turns.iter().position(|peer| senders.get(peer).is_some_and(|sender| sender.pace == Pace::OnTime))
        };
        let [urgent, other] = [on_time(&self.turns[0]), on_time(&self.turns[1])];
        let class = match (urgent, other) {
            (None, None) => return None,
            (Some(_), None) => 0,
            (None, Some(_)) => 1,
            (Some(_), Some(_)) => usize::from(self.streak >= STREAK),
        };
        let turns = &mut self.turns[class];
        turns.rotate_left([urgent, other][class].unwrap_or(0));
        turns.front().map(|peer| (class, *peer))
    }

    /// `peer` has had its turn.
    fn pass(&mut self, class: usize, peer: PeerId, more: bool) {
        self.streak = if class == 0 { self.streak + 1 } else { 0 };
        let turns = &mut self.turns[class];
        turns.pop_front();
        if more {
            turns.push_back(peer);
        }
    }
}

#[cfg(test)]
mod tests;
