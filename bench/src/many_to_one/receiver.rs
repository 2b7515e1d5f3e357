//! Does: the one: takes pushes from all senders, checks each, says so, and counts while it is time to.

use super::count::Count;
use super::device::{Refused, refused};
use super::member::{MEASURE, MemberOptions, NAP, PHASE, PUSH, STOP, TAKEN, WHOLE};
use super::phases::Phases;
use super::stamp;
use gradwire_transport::{Arrival, Completion, Envelope, LossCause, PeerId, Tag, TransportError, Wire};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::error::Error;
use std::time::{Duration, Instant};

/// What the receiver has counted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Taken {
    /// How long it counted.
    pub(super) seconds: f64,
    /// Pushes of each sender in that time, by rank from 1 on; of one that came across its beginning or end, the share of its
    /// time that lay within. Senders that take turns end a push almost at once: whole pushes would be too coarse.
    pub(super) pushes: Vec<f64>,
    /// What the receiver's RDMA devices counted in that time.
    pub(super) refused: Option<Refused>,
}

struct Receiver<'a> {
    options: &'a MemberOptions,
    wire: Box<dyn Wire>,
    phases: Phases,
    /// The next push of each sender.
    next: Vec<u64>,
    counts: Vec<Count>,
    refused: Option<Refused>,
    left: u32,
    /// Words that the wire had no room for.
    words: VecDeque<Envelope>,
}

/// Receives until everybody has left.
pub(super) fn receive(options: &MemberOptions) -> Result<(), Box<dyn Error>> {
    let deadline = options.deadline();
    let wire = options.meet_senders()?;
    let senders = options.senders as usize;
    let mut receiver = Receiver {
        options,
        wire,
        phases: Phases::new(Instant::now(), options.warm_up, options.seconds),
        next: vec![0; senders + 1],
        counts: vec![Count::new(Instant::now()); senders + 1],
        refused: None,
        left: options.senders,
        words: VecDeque::new(),
    };
    for sender in 1..=options.senders {
        for _ in 0..options.depth {
            receiver.post(PeerId(sender))?;
        }
    }
    let mut done = Vec::new();
    while receiver.left > 0 {
        let now = Instant::now();
        if now > deadline {
            return Err(format!("{} senders had not ended in time", receiver.left).into());
        }
        receiver.wire.poll(now, &mut done);
        let moved = !done.is_empty();
        for completion in done.drain(..) {
            receiver.complete(completion)?;
        }
        for word in std::mem::take(&mut receiver.words) {
            receiver.say(word)?;
        }
        let due = receiver.turn(Instant::now())?;
        if !moved {
            receiver.wire.park(due.min(Instant::now() + NAP));
        }
    }
    let seconds = receiver.phases.window.ok_or("everybody left before it was measured")?;
    let pushes = receiver.counts[1..].iter().map(|count| count.pushes).collect();
    options.leave(&Taken { seconds, pushes, refused: receiver.refused })?;
    receiver.wire.shutdown(Instant::now() + Duration::from_secs(1));
    Ok(())
}

impl Receiver<'_> {
    fn post(&mut self, peer: PeerId) -> Result<(), TransportError> {
        self.wire.post_recv_loan(peer, PUSH, self.options.bytes).map_err(|refused| refused.error)
    }

    fn complete(&mut self, completion: Completion) -> Result<(), Box<dyn Error>> {
        match completion {
            Completion::Arrived(arrival) => self.take(arrival),
            Completion::PeerDown { error: TransportError::PeerLost { cause: LossCause::Goodbye, .. }, .. }
                if self.phases.is_ending() =>
            {
                self.left -= 1;
                Ok(())
            }
            Completion::PeerDown { error, .. } => Err(error.into()),
            Completion::RecvFailed { error, .. } if !self.phases.is_ending() => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn take(&mut self, arrival: Arrival) -> Result<(), Box<dyn Error>> {
        let peer = arrival.from.peer;
        let (at, sequence, whole) = (peer.index(), arrival.from.note & !WHOLE, arrival.from.note & WHOLE != 0);
        let expected = self.next[at];
        if sequence != expected
            || arrival.loan.len() != self.options.bytes
            || !stamp::is_right(&arrival.loan, peer.0, sequence, whole)
        {
            return Err(format!("push {expected} of sender {} came wrong (it says it is {sequence})", peer.0).into());
        }
        drop(arrival);
        self.next[at] += 1;
        self.counts[at].came(Instant::now());
        self.post(peer)?;
        self.say(Envelope { peer, tag: TAKEN, note: sequence })
    }

    fn say(&mut self, word: Envelope) -> Result<(), Box<dyn Error>> {
        let Some(mut loan) = self.wire.lend(word.peer, 1) else {
            self.words.push_back(word);
            return Ok(());
        };
        loan[0] = 0;
        match self.wire.post_loan(word, loan) {
            Err(refused) if matches!(refused.error, TransportError::QueueFull { .. }) => self.words.push_back(word),
            // Its own completion tells of its end.
            Err(_) | Ok(()) => {}
        }
        Ok(())
    }

    fn say_to_all(&mut self, tag: Tag, note: u64) -> Result<(), Box<dyn Error>> {
        (1..=self.options.senders).try_for_each(|sender| self.say(Envelope { peer: PeerId(sender), tag, note }))
    }

    /// Goes on to the next phase where it is time; when to look again.
    fn turn(&mut self, now: Instant) -> Result<Instant, Box<dyn Error>> {
        let all_have_come = self.next[1..].iter().all(|next| *next > 0);
        if let Some(note) = self.phases.turn(now, all_have_come) {
            if note == MEASURE {
                self.counts.iter_mut().for_each(|count| count.begin(now));
                self.refused = refused();
            } else if note == STOP {
                self.counts.iter_mut().for_each(|count| count.end(now));
                self.refused = refused().zip(self.refused).map(|(now, before)| now - before);
            }
            self.say_to_all(PHASE, note)?;
        }
        Ok(self.phases.due(now))
    }
}
