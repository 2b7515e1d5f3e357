//! Does: what a server with a coordinator does beside serving: hears maps, calls its primary, sends and takes the log.

use super::{Connection, Server, TICK};
use crate::control::{Line, Sighting};
use crate::header::{HEADER_BYTES, Header};
use crate::protocol::{LOG, POSTED_ENTRIES, REPLY, REPLY_BYTES, REQUEST};
use crate::replica::{MAX_ENTRY_BYTES, PRIMARY};
use crate::status::{Role, Standing};
use gradwire_transport::{Arrival, Envelope, PeerId, TransportError, Wake};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the log that may wait to be sent: enough to bridge a pause of the backup, and little beside a table.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// With fewer, a new backup is told more of what was before.
const FEW_BYTES: usize = 8 << 20;
/// The longest that calling a primary may take, and the pause after it.
const DIAL: Duration = Duration::from_millis(250);
const AGAIN: Duration = Duration::from_millis(20);
/// Pause until a report that has not shown in a map goes again.
const REPEAT: Duration = Duration::from_millis(200);

/// What the copying of one shard has under way.
#[derive(Default)]
pub(super) struct Copying {
    waiting_bytes: usize,
    backup: Option<PeerId>,
    /// Whether requests were left unserved since too much waits.
    pub(super) stalled: bool,
    reported: Option<(Sighting, Instant)>,
    next_dial: Option<Instant>,
}

impl Copying {
    pub(super) fn is_full(&self) -> bool {
        self.waiting_bytes > MAX_WAITING_BYTES
    }

    /// Whom the seat follows is closed. Its connection's end is told by the wire's next turn; only then another is called.
    pub(super) fn call_later(&mut self, now: Instant) {
        self.next_dial = Some(now + AGAIN);
    }

    /// A connection is closed: what waited for it goes nowhere.
    pub(super) fn forget(&mut self, connection: &Connection) {
        self.waiting_bytes -= connection.log.iter().map(|entry| entry.len()).sum::<usize>();
    }
}

impl Server {
    /// Joins a cluster: maps come, and reports go, by `line`.
    pub(crate) fn join(&mut self, line: Arc<Line>) {
        self.line = Some(line);
    }

    /// Wakes the thread that runs it.
    pub(crate) fn waker(&self) -> Arc<dyn Wake> {
        self.wire.waker()
    }

    /// Why the seat has ended, if it has.
    pub(crate) fn over(&self) -> Option<&str> {
        self.seat.over()
    }

    /// How long until the seat wants to be told that time passes.
    pub(super) fn pause(&self) -> Duration {
        let waits = self.seat.standing().role == Role::Backup && !self.connections.contains_key(&PRIMARY);
        if waits { AGAIN } else { TICK }
    }

    /// Hears maps and tells what was seen.
    pub(super) fn mind_the_line(&mut self, now: Instant) {
        let Some(line) = self.line.clone() else { return };
        if let Some(map) = line.newer_than(self.seat.standing().epoch) {
            let before = self.seat.standing();
            if let Some((name, place)) = self.seat.origin_in(&map) {
                self.begin_with(name, place);
            }
            if self.seat.over().is_some() {
                return;
            }
            self.seat.hear(&map, now, &mut self.actions);
            self.act();
            let Standing { role, shard, epoch, .. } = self.seat.standing();
            if before.role != role {
                tracing::info!(shard, role = role.name(), epoch = epoch.0, address = %self.address, "this seat has a new part");
            }
        }
        if let Some(address) = self.seat.dial().map(str::to_owned)
            && self.copying.next_dial.is_none_or(|next| next <= now)
        {
            self.call_primary(&address, now);
        }
        let Some(report) = self.seat.report() else { return };
        let again = self.copying.reported.is_none_or(|(last, when)| last != report || now >= when + REPEAT);
        if again {
            tracing::info!(?report, "tells the coordinator");
            self.copying.reported = Some((report, now));
            line.tell(report);
        }
    }

    /// Reads what this seat begins with. Nobody is served by it meanwhile.
    fn begin_with(&mut self, name: &str, place: (u32, u32)) {
        let (limits, id) = self.seat.measures();
        let read = match &self.keeper {
            Some(keeper) => keeper.read(name, place, limits, id),
            None => Err("no place of checkpoints is known: start the servers with --checkpoint-dir".to_owned()),
        };
        match &read {
            Ok(_) => tracing::info!(name, shard = place.0, "restored a checkpoint"),
            Err(why) => tracing::error!(name, shard = place.0, why, "the checkpoint to begin with cannot be had"),
        }
        self.seat.begin_with(read);
    }

    fn call_primary(&mut self, address: &str, now: Instant) {
        match self.wire.call(PRIMARY, address, now + DIAL) {
            Ok(()) => {
                self.connections.insert(PRIMARY, Connection::default());
                (0..POSTED_ENTRIES).for_each(|_| self.receive(PRIMARY, LOG, MAX_ENTRY_BYTES));
                self.receive(PRIMARY, REPLY, REPLY_BYTES);
                self.seat.dialled(now, &mut self.actions);
                self.act();
            }
            Err(error) => {
                tracing::info!(address, %error, "the primary does not answer yet");
                self.copying.next_dial = Some(Instant::now() + AGAIN);
            }
        }
    }

    pub(super) fn take_entry(&mut self, arrival: Arrival, now: Instant) {
        if arrival.from.peer != PRIMARY {
            return self.close(arrival.from.peer, "it sent a log, and is not the primary".to_owned());
        }
        self.seat.take_entry(&arrival.loan, now, &mut self.actions);
        drop(arrival);
        self.act();
        self.receive(PRIMARY, LOG, MAX_ENTRY_BYTES);
    }

    /// Sends what waits, answers what came, and serves those who had to wait for it.
    pub(super) fn copy(&mut self, now: Instant) {
        self.seat.answer(&mut self.actions);
        self.act();
        if let Some(backup) = self.copying.backup {
            self.send_log(backup);
            while self.copying.waiting_bytes < FEW_BYTES && self.seat.tell_more(now, &mut self.actions) {
                self.act();
            }
        }
        if self.copying.stalled && !self.copying.is_full() && !self.seat.is_full() {
            self.copying.stalled = false;
            let peers: Vec<PeerId> = self.connections.keys().copied().collect();
            peers.into_iter().for_each(|peer| self.serve(peer, now));
        }
    }

    pub(super) fn ship(&mut self, to: PeerId, bytes: Arc<Vec<u8>>) {
        let Some(connection) = self.connections.get_mut(&to) else { return };
        self.copying.waiting_bytes += bytes.len();
        self.copying.backup = Some(to);
        connection.log.push_back(bytes);
        self.send_log(to);
    }

    fn send_log(&mut self, to: PeerId) {
        let Some(connection) = self.connections.get_mut(&to) else { return };
        while let Some(entry) = connection.log.front() {
            let Some(mut loan) = self.wire.lend(to, entry.len()) else { return };
            loan.copy_from_slice(entry);
            match self.wire.post_loan(Envelope { peer: to, tag: LOG, note: 0 }, loan) {
                Err(refused) if matches!(refused.error, TransportError::QueueFull { .. }) => return,
                // The peer is lost: its own completion says so.
                Err(_) => return,
                Ok(()) => {}
            }
            self.copying.waiting_bytes -= entry.len();
            connection.log.pop_front();
        }
    }

    /// Sends a request to our primary. One that finds no room is said again with the next tick.
    pub(super) fn tell(&mut self, to: PeerId, header: Header) {
        let Some(mut loan) = self.wire.lend(to, HEADER_BYTES) else { return };
        loan.copy_from_slice(&header.encode());
        if let Err(refused) = self.wire.post_loan(Envelope { peer: to, tag: REQUEST, note: 0 }, loan) {
            tracing::debug!(error = %refused.error, "the primary could not be told");
        }
    }
}
