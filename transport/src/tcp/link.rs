//! Does: one peer: its lanes, and the frames between us.

use super::incoming::{Incoming, Reply};
use super::lane::{Lane, MOST_FRAMES, Reading, Writing};
use super::outgoing::{Cargo, MESSAGE_COST, Outgoing, Payload};
use super::silence;
use super::stream::Stream;
use crate::credit::{Grant, UNASKED_BYTES, UNASKED_WINDOW, Want};
use crate::frame::{FrameError, HEADER_BYTES, Header, Kind};
use crate::pool::Pool;
use crate::{Completion, Config, Envelope, LossCause, PeerId, PeerName, Tag, Traffic, TransportError};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::Arc;

/// Bytes moved on one lane before others get their turn.
const TURN_BYTES: usize = 1 << 20;

/// A peer that has said hello.
pub(super) struct Link {
    pub(super) name: PeerName,
    pub(super) outgoing: Outgoing,
    pub(super) incoming: Incoming,
    pub(super) lanes: Vec<Lane<Payload>>,
    /// Frames that are being written in one call; empty but then.
    batch: VecDeque<Writing<Payload>>,
    pub(super) lost: Option<TransportError>,
    /// Whether the system has told that a socket has something, and nobody has looked.
    pub(super) ready: bool,
    /// Whether a poll has passed since it was lost, so that its end has been told.
    pub(super) told: bool,
    sent: (u64, u64),
    /// Where what comes is granted in portions: messages that wait for that, and bytes that have come of it.
    portions: Option<Portions>,
    window: usize,
    /// What the peer may send unasked: the window before our terms, which it may not have heard.
    max_unread: u64,
    max_message_bytes: usize,
    max_unmatched: usize,
    said_goodbye: bool,
    heard_goodbye: bool,
}

/// What the wire's credit is told of a link.
#[derive(Default)]
pub(super) struct Portions {
    pub(super) wants: Vec<Want>,
    pub(super) came: u64,
    /// Only these conversations are granted in portions; `None`: all.
    marked: Option<Vec<Tag>>,
}

impl Portions {
    fn are_for(&self, tag: Tag) -> bool {
        self.marked.as_ref().is_none_or(|marked| marked.contains(&tag))
    }
}

impl Link {
    pub(super) fn new(peer: PeerId, name: PeerName, streams: Vec<Stream>, config: &Config, pool: Arc<Pool>) -> Self {
        Self {
            portions: None,
            name,
            outgoing: Outgoing::new(config.window_bytes),
            incoming: Incoming::new(peer, pool),
            lanes: streams.into_iter().map(Lane::new).collect(),
            batch: VecDeque::with_capacity(MOST_FRAMES),
            lost: None,
            ready: false,
            told: false,
            sent: (0, 0),
            window: config.window_bytes,
            max_unread: config.window_bytes as u64,
            max_message_bytes: config.max_message_bytes,
            max_unmatched: config.queue_depth + config.window_bytes / MESSAGE_COST as usize,
            said_goodbye: false,
            heard_goodbye: false,
        }
    }

    pub(super) fn traffic(&self) -> Traffic {
        Traffic::of(self.sent, self.incoming.received)
    }

    /// Whether bytes wait for a socket to take them.
    pub(super) fn wants_to_write(&self) -> bool {
        !self.outgoing.is_idle() || self.lanes.iter().any(|lane| lane.writing.is_some() || lane.stream.holds_back())
    }

    /// Whether there may be bytes to read that no socket tells of.
    pub(super) fn is_ahead(&self) -> bool {
        self.lanes.iter().any(|lane| lane.stream.is_ahead())
    }

    /// Whether operations have ended that nobody has been told of.
    pub(super) fn has_news(&self) -> bool {
        self.outgoing.has_news() || self.incoming.has_news()
    }

    /// Whether there is something to do. A post may have met what had come already, or have been written at once: that is news
    /// without a byte.
    pub(super) fn is_busy(&mut self) -> bool {
        let ready = std::mem::take(&mut self.ready) || self.lanes.iter().any(|lane| lane.stream.watched.is_none());
        ready || self.wants_to_write() || self.has_news() || self.is_ahead()
    }

    /// Before sleeping: has the system tell when sockets that are full have room again.
    pub(super) fn wait_for_room(&mut self) {
        for at in 0..self.lanes.len() {
            let blocked = self.is_blocked(&self.lanes[at]);
            self.lanes[at].stream.wait_for_room(blocked);
        }
    }

    /// Whether a lane waits for room to write.
    pub(super) fn is_blocked(&self, lane: &Lane<Payload>) -> bool {
        !self.outgoing.is_idle() || lane.writing.is_some() || lane.stream.holds_back()
    }

    /// Answers the peer about a message that has met its receive.
    pub(super) fn reply(&mut self, reply: Option<Reply>) {
        match reply {
            Some(Reply::Grant { id, bytes, tag }) => match &mut self.portions {
                Some(portions) if bytes > 0 && portions.are_for(tag) => {
                    portions.wants.push(Want { id, bytes, urgent: tag.0 & Tag::CONTROL_BIT != 0 });
                }
                _ => self.ask(id, bytes),
            },
            Some(Reply::Refuse(id, capacity)) => {
                self.outgoing.control(Header::control(Kind::Refuse, id, capacity as u64), Vec::new());
            }
            None => {}
        }
    }

    fn ask(&mut self, id: u32, until: u64) {
        self.outgoing.control(Header::control(Kind::Grant, id, until), Vec::new());
    }

    /// From now on what comes is granted in portions; tells the peer that little may come unasked. `marked`: only of marked
    /// conversations, which both ends know.
    pub(super) fn grant_in_portions(&mut self, marked: bool) {
        self.portions = Some(Portions { marked: marked.then(Vec::new), ..Portions::default() });
        if marked {
            return;
        }
        self.window = self.window.min(UNASKED_WINDOW);
        let terms = Header::control(Kind::Terms, 0, UNASKED_WINDOW as u64);
        self.outgoing.control(Header { note: UNASKED_BYTES as u64, ..terms }, Vec::new());
    }

    /// Marks a conversation, or no longer.
    pub(super) fn mark(&mut self, tag: Tag, marked: bool) {
        let Some(tags) = self.portions.as_mut().and_then(|portions| portions.marked.as_mut()) else { return };
        tags.retain(|other| *other != tag);
        if marked {
            tags.push(tag);
        }
    }

    /// Queues a message; long ones of a marked conversation are announced, as the peer knows.
    pub(super) fn push(&mut self, to: Envelope, cargo: Cargo) {
        let marked = self.portions.as_ref().is_some_and(|own| own.marked.is_some() && own.are_for(to.tag));
        self.outgoing.push(to, cargo, if marked { UNASKED_BYTES } else { usize::MAX });
    }

    /// What the wire's credit has not been told yet.
    pub(super) fn portions(&mut self) -> Option<&mut Portions> {
        self.portions.as_mut()
    }

    /// Asks for a portion.
    pub(super) fn grant(&mut self, grant: &Grant) {
        self.ask(grant.id, grant.until);
    }

    /// Says goodbye after everything that has been posted.
    pub(super) fn say_goodbye(&mut self) {
        if !self.said_goodbye {
            self.said_goodbye = true;
            self.outgoing.control(Header::control(Kind::Goodbye, 0, 0), Vec::new());
        }
    }

    /// Moves what the sockets give and take; whether anything moved.
    pub(super) fn progress(&mut self, done: &mut Vec<Completion>) -> bool {
        let before = done.len();
        if self.lost.is_some() {
            // What came whole before the end can still be received.
            self.incoming.report(&self.name, done);
            return done.len() > before;
        }
        // What the peer said before it went is taken first: it may tell why.
        let moved = self.read_lanes().and_then(|read| match self.write_lanes() {
            Ok(wrote) => Ok(read || wrote),
            // It may have said why between the two, and have closed what we wrote to.
            Err(cause) => Err(self.read_to_the_end(cause)),
        });
        self.outgoing.report(done);
        self.incoming.report(&self.name, done);
        match moved {
            Ok(moved) => moved || done.len() > before,
            Err(cause) => {
                self.fail(cause, done);
                true
            }
        }
    }

    /// Writes what the sockets take now.
    pub(super) fn write_lanes(&mut self) -> Result<bool, LossCause> {
        if self.incoming.credit_due >= self.window as u64 / 4 {
            let credit = std::mem::take(&mut self.incoming.credit_due);
            self.outgoing.control(Header::control(Kind::Credit, 0, credit), Vec::new());
        }
        let mut moved = false;
        for at in 0..self.lanes.len() {
            let mut budget = TURN_BYTES;
            self.lanes[at].stream.send().map_err(broken)?;
            while budget > 0 && self.gather(at, budget) {
                let result = self.lanes[at].write(&self.batch);
                self.take_written(at, result.as_ref().map_or(0, |written| written.unwrap_or(0)));
                match result {
                    Ok(Some(written)) => {
                        moved = true;
                        budget = budget.saturating_sub(written);
                    }
                    Ok(None) => break,
                    Err(error) => return Err(broken(error)),
                }
            }
        }
        Ok(moved)
    }

    /// Takes the frame that lane `at` has begun and those that are to follow it, about as many bytes as `most`; whether there are any.
    fn gather(&mut self, at: usize, most: usize) -> bool {
        let mut bytes = 0;
        let mut begun = self.lanes[at].writing.take();
        while bytes < most && self.batch.len() < MOST_FRAMES {
            let next = || self.outgoing.next(at).map(|(header, payload)| Writing::new(header, payload));
            let Some(writing) = begun.take().or_else(next) else { break };
            bytes += writing.left();
            self.batch.push_back(writing);
        }
        !self.batch.is_empty()
    }

    /// `bytes` of the frames that were taken have been written: the first that is not whole stays with lane `at`, and others may go
    /// before those behind it.
    fn take_written(&mut self, at: usize, mut bytes: usize) {
        while let Some(mut writing) = self.batch.pop_front() {
            let taken = writing.left().min(bytes);
            bytes -= taken;
            writing.written += taken;
            if writing.left() > 0 {
                self.lanes[at].writing = Some(writing);
                break;
            }
            if let Some(bytes) = self.outgoing.written(writing.payload) {
                self.sent.0 += bytes as u64;
                self.sent.1 += 1;
            }
        }
        while let Some(Writing { frame, payload, .. }) = self.batch.pop_back() {
            self.outgoing.put_back(frame, payload);
        }
    }

    /// Takes what is left to read of a connection that can no more be written to: why it ended, which is `cause` where the peer has
    /// not said.
    fn read_to_the_end(&mut self, cause: LossCause) -> LossCause {
        loop {
            match self.read_lanes() {
                Ok(true) => {}
                Ok(false) | Err(LossCause::Closed) => return cause,
                Err(said) => return said,
            }
        }
    }

    fn read_lanes(&mut self) -> Result<bool, LossCause> {
        let mut moved = false;
        for at in 0..self.lanes.len() {
            let mut budget = TURN_BYTES;
            while budget > 0 && !self.lanes[at].ended {
                self.take_ahead(at)?;
                let lane = &mut self.lanes[at];
                let result = match lane.reading {
                    Some(Reading { landing, offset, left }) => match self.incoming.space(landing, offset, left) {
                        Some(space) => lane.read(space),
                        None => lane.read(&mut []),
                    },
                    None => lane.read(&mut []),
                };
                match result {
                    Ok(Some(filled)) => {
                        moved = true;
                        budget = budget.saturating_sub(filled.max(HEADER_BYTES));
                        self.advance(at, filled);
                        if self.lanes[at].drained {
                            break;
                        }
                    }
                    Ok(None) => break,
                    // The other lanes may end before the goodbye is heard on the first; a process that died ends that too. What
                    // we have sent meanwhile to one that has left ends them by a reset.
                    Err(error) if (self.heard_goodbye || at > 0) && is_end(&error) => {
                        self.lanes[at].ended = true;
                    }
                    Err(error) => return Err(broken(error)),
                }
            }
            self.take_ahead(at)?;
        }
        // A goodbye is heard on one lane; what was sent before it may still be on the others.
        if self.heard_goodbye && self.lanes.iter().all(|lane| lane.ended) {
            return Err(LossCause::Goodbye);
        }
        Ok(moved)
    }

    /// Takes all that has been read ahead on a lane: headers, and payloads.
    fn take_ahead(&mut self, at: usize) -> Result<(), LossCause> {
        loop {
            let lane = &mut self.lanes[at];
            if let Some(Reading { landing, offset, left }) = lane.reading {
                let taken = match self.incoming.space(landing, offset, left) {
                    Some(space) => lane.take_ahead(space),
                    None => lane.skip_ahead(left),
                };
                if taken == 0 {
                    return Ok(());
                }
                self.advance(at, taken);
            } else if let Some(bytes) = lane.next_header() {
                let header = Header::decode(&bytes, self.max_message_bytes).map_err(|error| protocol(&error))?;
                self.on_header(at, &header)?;
            } else {
                return Ok(());
            }
        }
    }

    fn advance(&mut self, at: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        if let Some(reading) = &mut self.lanes[at].reading {
            reading.offset += bytes;
            reading.left -= bytes;
            let (landing, left) = (reading.landing, reading.left);
            if left == 0 {
                self.lanes[at].reading = None;
            }
            let asked_for = self.incoming.came(landing, bytes);
            if let Some(portions) = self.portions.as_mut().filter(|own| asked_for.is_some_and(|tag| own.are_for(tag))) {
                portions.came += bytes as u64;
            }
        }
    }

    fn on_header(&mut self, at: usize, header: &Header) -> Result<(), LossCause> {
        let unknown =
            || LossCause::Protocol(format!("a {:?} for message {}, which is not under way", header.kind, header.id));
        match header.kind {
            Kind::Eager | Kind::Announce => {
                self.check_room(header)?;
                let (landing, reply) = self.incoming.begin(header, header.kind == Kind::Eager);
                self.reply(reply);
                if header.length > 0 {
                    self.lanes[at].reading = Some(Reading { landing, offset: 0, left: header.length as usize });
                }
            }
            Kind::Data => {
                let landing = self.incoming.granted(header.id, header.note, header.length).ok_or_else(unknown)?;
                let offset = usize::try_from(header.note).map_err(|_| unknown())?;
                if header.length > 0 {
                    self.lanes[at].reading = Some(Reading { landing, offset, left: header.length as usize });
                }
            }
            Kind::Grant => {
                self.sent.1 += u64::from(self.outgoing.on_grant(header.id, header.total).ok_or_else(unknown)?)
            }
            Kind::Refuse => {
                let (serial, to, bytes) = self.outgoing.on_refuse(header.id).ok_or_else(unknown)?;
                let capacity = usize::try_from(header.total).unwrap_or(usize::MAX);
                let (peer, Envelope { tag, note, .. }) = (Box::new(self.name.clone()), to);
                self.outgoing.fail(serial, TransportError::MessageTooLong { peer, tag, note, bytes, capacity });
            }
            Kind::Credit => self.outgoing.on_credit(header.total).ok_or_else(unknown)?,
            Kind::Terms => self.outgoing.on_terms(header.note, header.total),
            Kind::Goodbye => {
                self.heard_goodbye = true;
                self.lanes[at].ended = true;
            }
            Kind::Abort => return Err(LossCause::Aborted(self.read_text(at, header.length as usize))),
        }
        Ok(())
    }

    /// Whether a message may come now, as both ends count.
    fn check_room(&self, header: &Header) -> Result<(), LossCause> {
        if self.incoming.unmatched() > self.max_unmatched {
            let most = self.max_unmatched;
            return Err(LossCause::Protocol(format!("more than {most} messages that nobody waits for")));
        }
        if header.kind == Kind::Eager && self.incoming.unread() + header.total + MESSAGE_COST > self.max_unread {
            let most = self.max_unread;
            return Err(LossCause::Protocol(format!("more than {most} bytes that it was not asked for")));
        }
        Ok(())
    }

    /// The text behind an abort, as far as it has come.
    fn read_text(&mut self, at: usize, length: usize) -> String {
        let mut text = vec![0; length];
        let mut have = self.lanes[at].take_ahead(&mut text);
        while have < length {
            match self.lanes[at].read(&mut text[have..]) {
                Ok(Some(more)) if more > 0 => have += more,
                _ => break,
            }
        }
        String::from_utf8_lossy(&text[..have]).into_owned()
    }

    /// Tells the peer why we give up, where the socket takes it at once, and ends everything.
    pub(super) fn abort(&mut self, error: TransportError, done: &mut Vec<Completion>) {
        if self.lost.is_some() {
            return;
        }
        let mut text = error.to_string();
        if let TransportError::PeerLost { cause: LossCause::Aborted(reason), .. } = &error {
            text.clone_from(reason);
        }
        let end = (0..=text.len().min(crate::frame::MAX_TEXT_BYTES)).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
        let length = u32::try_from(text.len()).expect("the text was cut");
        self.outgoing.control(Header { length, ..Header::control(Kind::Abort, 0, 0) }, text.into_bytes());
        // The peer learns of the end by the closed connection in any case.
        let _ = self.write_lanes();
        self.end(error, done);
    }

    /// Ends everything where the peer's host has left what it must answer unanswered for long.
    pub(super) fn end_if_silent(&mut self, done: &mut Vec<Completion>) {
        let silent = self.lanes.iter().filter_map(|lane| silence::of(lane.stream.socket())).max();
        if let Some(silent) = silent {
            self.fail(LossCause::Silent(silent), done);
        }
    }

    /// Whether the peer's host acknowledges what was sent to it some seconds ago.
    pub(super) fn acknowledges(&self) -> bool {
        self.lanes.iter().all(|lane| silence::acknowledges(lane.stream.socket()))
    }

    /// Ends everything.
    pub(super) fn fail(&mut self, cause: LossCause, done: &mut Vec<Completion>) {
        if self.lost.is_some() {
            return;
        }
        let error = TransportError::PeerLost { peer: Box::new(self.name.clone()), cause };
        self.end(error, done);
    }

    fn end(&mut self, error: TransportError, done: &mut Vec<Completion>) {
        done.push(Completion::PeerDown { peer: self.incoming_peer(), error: error.clone() });
        let writing = self.lanes.drain(..).filter_map(|lane| lane.writing.map(|writing| writing.payload)).collect();
        self.outgoing.end_all(writing, &error, done);
        self.incoming.end_all(&self.name, &error, done);
        self.lost = Some(error);
    }

    fn incoming_peer(&self) -> PeerId {
        self.incoming.peer()
    }
}

fn broken(error: io::Error) -> LossCause {
    if is_end(&error) { LossCause::Closed } else { LossCause::Io(Arc::new(error)) }
}

/// Whether it tells that the peer has closed its end.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

fn protocol(error: &FrameError) -> LossCause {
    LossCause::Protocol(error.to_string())
}
