//! Does: one of the many: pushes as fast as it is let, and times each push until the receiver says that it has come.

use super::member::{MEASURE, MemberOptions, NAP, PHASE, PUSH, START, STOP, TAKEN, WHOLE};
use super::stamp;
use crate::collective::Way;
use crate::sockets::{self, Sent};
use gradwire_transport::{Completion, Envelope, PeerId, Region, Tag, TransportError, Wire};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Words of the receiver that may come before they are looked at.
const WORDS: usize = 4;
const RECEIVER: PeerId = PeerId(0);

/// What a sender has seen while it was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pushed {
    /// Each push's time, in the order in which they came.
    pub(super) push_us: Vec<f64>,
    /// What its connections sent.
    pub(super) sent: Sent,
}

struct Sender<'a> {
    options: &'a MemberOptions,
    wire: Box<dyn Wire>,
    /// What it pushes from next, the one that has rested longest first.
    idle: VecDeque<Arc<Region>>,
    under_way: VecDeque<Instant>,
    sequence: u64,
    pushing: bool,
    /// What had been sent when measuring began; `None` while it is not time.
    before: Option<Sent>,
    result: Pushed,
    stopped: bool,
}

/// Pushes until the receiver says stop.
pub(super) fn send(options: &MemberOptions) -> Result<(), Box<dyn Error>> {
    let deadline = options.deadline();
    let wire = options.meet_receiver()?;
    let region = |_| Region::from_vec(stamp::pattern(options.rank, options.bytes));
    let mut sender = Sender {
        options,
        wire,
        idle: (0..options.buffers).map(region).collect(),
        under_way: VecDeque::new(),
        sequence: 0,
        pushing: false,
        before: None,
        result: Pushed { push_us: Vec::new(), sent: Sent::default() },
        stopped: false,
    };
    for (tag, count) in [(TAKEN, options.depth + WORDS), (PHASE, WORDS)] {
        (0..count).try_for_each(|_| sender.hear(tag))?;
    }
    sender.push(WHOLE)?;
    let mut done = Vec::new();
    let mut last = false;
    while !(last && sender.under_way.is_empty()) {
        if Instant::now() > deadline {
            return Err("the receiver did not answer in time".into());
        }
        sender.wire.poll(Instant::now(), &mut done);
        let moved = !done.is_empty();
        for completion in done.drain(..) {
            sender.complete(completion)?;
        }
        while sender.pushing && sender.under_way.len() < options.depth && !sender.idle.is_empty() {
            sender.push(0)?;
        }
        if sender.stopped && !last && sender.under_way.is_empty() && !sender.idle.is_empty() {
            sender.push(WHOLE)?;
            last = true;
        }
        if !moved {
            sender.wire.park(Instant::now() + NAP);
        }
    }
    options.leave(&sender.result)?;
    sender.wire.shutdown(Instant::now() + Duration::from_secs(5));
    Ok(())
}

impl Sender<'_> {
    /// What its TCP connections have sent, where those carry the pushes: some kernels tell nothing of them.
    fn sent_so_far(&self) -> std::io::Result<Sent> {
        if self.options.wire == Way::Tcp { sockets::sent() } else { Ok(Sent::default()) }
    }

    fn hear(&mut self, tag: Tag) -> Result<(), TransportError> {
        self.wire.post_recv_loan(RECEIVER, tag, 1).map_err(|refused| refused.error)
    }

    fn push(&mut self, flag: u64) -> Result<(), Box<dyn Error>> {
        let Some(region) = self.idle.pop_front() else { return Ok(()) };
        stamp::stamp(&mut region.write(0..region.len())?, self.options.rank, self.sequence);
        let to = Envelope { peer: RECEIVER, tag: PUSH, note: self.sequence | flag };
        self.under_way.push_back(Instant::now());
        self.wire.post_send(to, region.read(0..region.len())?).map_err(|refused| refused.error)?;
        self.sequence += 1;
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<(), Box<dyn Error>> {
        match completion {
            Completion::Sent { slice, .. } => self.idle.push_back(Arc::clone(slice.region())),
            Completion::Arrived(arrival) if arrival.from.tag == TAKEN => {
                let posted = self.under_way.pop_front().ok_or("a word about a push that was not made")?;
                if self.before.is_some() {
                    self.result.push_us.push(posted.elapsed().as_secs_f64() * 1e6);
                }
                drop(arrival);
                self.hear(TAKEN)?;
            }
            Completion::Arrived(arrival) => match arrival.from.note {
                START => self.pushing = true,
                MEASURE => self.before = Some(self.sent_so_far()?),
                STOP => {
                    (self.pushing, self.stopped) = (false, true);
                    let before = self.before.take().ok_or("an end without a beginning")?;
                    self.result.sent = self.sent_so_far()? - before;
                }
                other => return Err(format!("the unknown phase {other}").into()),
            },
            // Another sender has left.
            Completion::PeerDown { peer, .. } if peer != RECEIVER => {}
            Completion::SendFailed { error, .. }
            | Completion::RecvFailed { error, .. }
            | Completion::PeerDown { error, .. } => return Err(error.into()),
            _ => {}
        }
        Ok(())
    }
}
