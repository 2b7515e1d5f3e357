//! Pure: the messages on their way to one peer: which may go at once, which must be asked for, in which order they end.

use crate::frame::{Header, Kind};
use crate::{Completion, Envelope, RegionSlice, SendLoan, Tag, TransportError};
use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::Arc;

/// Bytes of a large message sent before another frame may go: little enough that control messages do not wait long.
pub(super) const PIECE_BYTES: usize = 256 << 10;
/// What a message costs of the window beside its payload, so that empty ones are bounded too.
pub(super) const MESSAGE_COST: u64 = 64;

/// The bytes of a message.
pub(super) enum Cargo {
    Slice(RegionSlice),
    Loan(SendLoan),
}

impl Deref for Cargo {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Slice(slice) => slice,
            Self::Loan(loan) => loan,
        }
    }
}

/// What follows a header on a lane.
pub(super) enum Payload {
    Nothing,
    Text(Vec<u8>),
    Message { serial: u64, cargo: Cargo },
    Piece { serial: u64, cargo: Arc<Cargo>, start: usize, end: usize },
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Text(text) => text,
            Self::Message { cargo, .. } => cargo,
            Self::Piece { cargo, start, end, .. } => &cargo[*start..*end],
        }
    }
}

struct Flight {
    serial: u64,
    to: Envelope,
    ended: Option<(Option<RegionSlice>, Option<TransportError>)>,
}

struct Large {
    serial: u64,
    id: u32,
    cargo: Arc<Cargo>,
    next: usize,
    /// What the peer has asked for so far.
    asked: usize,
    left: usize,
}

/// Everything that is to go to one peer.
pub(super) struct Outgoing {
    urgent: VecDeque<(Header, Payload)>,
    announced: Vec<(u32, u64, Cargo)>,
    large: VecDeque<Large>,
    flights: VecDeque<Flight>,
    serial: u64,
    id: u32,
    /// Bytes sent unasked that the peer has not taken yet, and how many there may be.
    unasked: u64,
    window: u64,
    eager: usize,
}

impl Outgoing {
    pub(super) fn new(window: usize) -> Self {
        Self {
            urgent: VecDeque::new(),
            announced: Vec::new(),
            large: VecDeque::new(),
            flights: VecDeque::new(),
            serial: 0,
            id: 0,
            unasked: 0,
            window: window as u64,
            eager: window / 2,
        }
    }

    /// Operations under way.
    pub(super) fn len(&self) -> usize {
        self.flights.len()
    }

    /// Whether there is nothing left to write, lanes' current frames aside.
    pub(super) fn is_idle(&self) -> bool {
        self.urgent.is_empty() && self.large.iter().all(|large| large.next == large.asked)
    }

    /// Queues a message: whole where it is no longer than `most` and the window has room, else announced.
    pub(super) fn push(&mut self, to: Envelope, cargo: Cargo, most: usize) {
        let serial = self.serial;
        self.serial += 1;
        self.flights.push_back(Flight { serial, to, ended: None });
        let (total, cost) = (cargo.len() as u64, cargo.len() as u64 + MESSAGE_COST);
        let header = Header { kind: Kind::Announce, id: self.id, tag: to.tag, note: to.note, total, length: 0 };
        if cargo.len() <= self.eager.min(most) && self.unasked + cost <= self.window {
            self.unasked += cost;
            let length = u32::try_from(total).expect("an eager message fits the window");
            self.urgent.push_back((Header { kind: Kind::Eager, length, ..header }, Payload::Message { serial, cargo }));
        } else {
            self.announced.push((self.id, serial, cargo));
            self.id = self.id.wrapping_add(1);
            self.urgent.push_back((header, Payload::Nothing));
        }
    }

    /// Queues a frame that is no message.
    pub(super) fn control(&mut self, header: Header, text: Vec<u8>) {
        self.urgent.push_back((header, if text.is_empty() { Payload::Nothing } else { Payload::Text(text) }));
    }

    /// The peer wants message `id` up to byte `until`; whether that ends it, there being no bytes to send. `None`: it was
    /// never announced, or is not as long, or has been asked for as far already.
    pub(super) fn on_grant(&mut self, id: u32, until: u64) -> Option<bool> {
        let asked = usize::try_from(until).ok()?;
        if let Some(large) = self.large.iter_mut().find(|large| large.id == id) {
            large.asked = Some(asked).filter(|asked| large.asked < *asked && *asked <= large.cargo.len())?;
            return Some(false);
        }
        let at = self.announced.iter().position(|(other, ..)| *other == id)?;
        let left = self.announced[at].2.len();
        if asked > left || (asked == 0 && left > 0) {
            return None;
        }
        let (id, serial, cargo) = self.announced.remove(at);
        if left == 0 {
            self.end(serial, cargo);
        } else {
            self.large.push_back(Large { serial, id, cargo: Arc::new(cargo), next: 0, asked, left });
        }
        Some(left == 0)
    }

    /// The peer grants: from now on at most `eager` bytes go unasked in one message, and `window` in all.
    pub(super) fn on_terms(&mut self, eager: u64, window: u64) {
        self.eager = self.eager.min(usize::try_from(eager).unwrap_or(usize::MAX));
        self.window = self.window.min(window);
    }

    /// The peer's receive is too small for message `id`, which must have been announced; the peer's envelope of it.
    pub(super) fn on_refuse(&mut self, id: u32) -> Option<(u64, Envelope, usize)> {
        let at = self.announced.iter().position(|(other, ..)| *other == id)?;
        let (_, serial, cargo) = self.announced.remove(at);
        let bytes = cargo.len();
        let flight = self.flights.iter_mut().find(|flight| flight.serial == serial)?;
        let slice = match cargo {
            Cargo::Slice(slice) => Some(slice),
            Cargo::Loan(_) => None,
        };
        flight.ended = Some((slice, None));
        Some((serial, flight.to, bytes))
    }

    /// Marks a refused message as failed with `error`.
    pub(super) fn fail(&mut self, serial: u64, error: TransportError) {
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.serial == serial)
            && let Some((_, failed)) = &mut flight.ended
        {
            *failed = Some(error);
        }
    }

    /// The peer has taken `bytes` of the window. `None`: more than it was given.
    pub(super) fn on_credit(&mut self, bytes: u64) -> Option<()> {
        self.unasked = self.unasked.checked_sub(bytes)?;
        Some(())
    }

    /// The next frame for lane `lane`: all but the pieces of large messages go on lane 0, so that they keep their order.
    pub(super) fn next(&mut self, lane: usize) -> Option<(Header, Payload)> {
        if lane == 0
            && let Some(frame) = self.urgent.pop_front()
        {
            return Some(frame);
        }
        let large = self.large.iter_mut().find(|large| large.next < large.asked)?;
        let (start, end) = (large.next, large.asked.min(large.next + PIECE_BYTES));
        large.next = end;
        let header = Header {
            kind: Kind::Data,
            id: large.id,
            tag: Tag(0),
            note: start as u64,
            total: large.cargo.len() as u64,
            length: u32::try_from(end - start).expect("a piece is small"),
        };
        Some((header, Payload::Piece { serial: large.serial, cargo: Arc::clone(&large.cargo), start, end }))
    }

    /// Takes back a frame that [`next`](Self::next) gave, of which nothing has been written; of several, the last one first.
    pub(super) fn put_back(&mut self, header: Header, payload: Payload) {
        let Payload::Piece { serial, start, .. } = payload else {
            self.urgent.push_front((header, payload));
            return;
        };
        if let Some(large) = self.large.iter_mut().find(|large| large.serial == serial) {
            large.next = start;
        }
    }

    /// A frame has been written whole. Tells the payload bytes of a message that has now gone.
    pub(super) fn written(&mut self, payload: Payload) -> Option<usize> {
        match payload {
            Payload::Nothing | Payload::Text(_) => None,
            Payload::Message { serial, cargo } => {
                let bytes = cargo.len();
                self.end(serial, cargo);
                Some(bytes)
            }
            Payload::Piece { serial, cargo, start, end } => {
                drop(cargo);
                let at = self.large.iter().position(|large| large.serial == serial)?;
                self.large[at].left -= end - start;
                if self.large[at].left > 0 {
                    return None;
                }
                let large = self.large.remove(at)?;
                let bytes = large.cargo.len();
                let cargo = Arc::into_inner(large.cargo).expect("every piece of it has been written");
                self.end(serial, cargo);
                Some(bytes)
            }
        }
    }

    fn end(&mut self, serial: u64, cargo: Cargo) {
        let slice = match cargo {
            Cargo::Slice(slice) => Some(slice),
            Cargo::Loan(_) => None,
        };
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.serial == serial) {
            flight.ended = Some((slice, None));
        }
    }

    /// Whether a message has gone, or failed, that nobody has been told of.
    pub(super) fn has_news(&self) -> bool {
        self.flights.iter().any(|flight| flight.ended.is_some())
    }

    /// Reports what has ended, in the order of posting within each tag.
    pub(super) fn report(&mut self, done: &mut Vec<Completion>) {
        let mut at = 0;
        while at < self.flights.len() {
            let flight = &self.flights[at];
            let waits =
                flight.ended.is_none() || self.flights.iter().take(at).any(|earlier| earlier.to.tag == flight.to.tag);
            if waits {
                at += 1;
            } else if let Some(Flight { to, ended: Some((Some(slice), error)), .. }) = self.flights.remove(at) {
                done.push(match error {
                    None => Completion::Sent { to, slice },
                    Some(error) => Completion::SendFailed { to, slice, error },
                });
            }
        }
    }

    /// Ends everything with `error`; `writing`: payloads that lanes had begun.
    pub(super) fn end_all(&mut self, writing: Vec<Payload>, error: &TransportError, done: &mut Vec<Completion>) {
        self.report(done);
        let queued = std::mem::take(&mut self.urgent).into_iter().map(|(_, payload)| payload);
        for payload in writing.into_iter().chain(queued) {
            if let Payload::Message { serial, cargo } = payload {
                self.end(serial, cargo);
            }
        }
        for (_, serial, cargo) in std::mem::take(&mut self.announced) {
            self.end(serial, cargo);
        }
        for large in std::mem::take(&mut self.large) {
            if let Some(cargo) = Arc::into_inner(large.cargo) {
                self.end(large.serial, cargo);
            }
        }
        for Flight { to, ended, .. } in std::mem::take(&mut self.flights) {
            if let Some((Some(slice), _)) = ended {
                done.push(Completion::SendFailed { to, slice, error: error.clone() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PeerId, Region};

    #[test]
    fn frames_that_are_put_back_come_again_in_their_order_and_what_is_urgent_before_pieces() {
        let mut outgoing = Outgoing::new(1 << 10);
        let post = |outgoing: &mut Outgoing, bytes: usize| {
            let slice = Region::zeroed(bytes).read(0..bytes).unwrap();
            outgoing.push(
                Envelope { peer: PeerId(1), tag: Tag(7), note: bytes as u64 },
                Cargo::Slice(slice),
                usize::MAX,
            );
        };
        [3, 5, 2 * PIECE_BYTES + 1].into_iter().for_each(|bytes| post(&mut outgoing, bytes));
        let all = |outgoing: &mut Outgoing| std::iter::from_fn(|| outgoing.next(0)).collect::<Vec<_>>();
        let words = |frames: &[(Header, Payload)]| frames.iter().map(|(header, _)| *header).collect::<Vec<_>>();
        assert_eq!(outgoing.next(0).unwrap().0.length, 3);
        outgoing.on_grant(0, 2 * PIECE_BYTES as u64 + 1).unwrap();
        let frames = all(&mut outgoing);
        let expected = words(&frames);
        assert_eq!(
            expected.iter().map(|header| header.kind).collect::<Vec<_>>(),
            [Kind::Eager, Kind::Announce, Kind::Data, Kind::Data, Kind::Data]
        );
        // The first has gone; all others come back, and what is said meanwhile goes before the pieces.
        frames.into_iter().skip(1).rev().for_each(|(header, payload)| outgoing.put_back(header, payload));
        outgoing.control(Header::control(Kind::Credit, 0, 1), Vec::new());
        let again = words(&all(&mut outgoing));
        assert_eq!((again[0], again[1].kind, &again[2..]), (expected[1], Kind::Credit, &expected[2..]));
    }
}
