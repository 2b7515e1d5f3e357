//! Pure: one shard of the parameter server. A request and its payload go in, what is to be sent comes out.

mod checks;
mod copies;
mod first_values;
mod image;
mod limits;
mod restoring;
mod snapshot;

use limits::check_waiting;
pub use limits::{Checkpointing, Limits};
pub(crate) use restoring::AGAIN;
pub(crate) use snapshot::CLOCK;
pub use snapshot::Cut;

use crate::body::{Reader, Writer};
use crate::dense::{Answer, Table, Wait};
use crate::header::{FLAG_CHECKED, FLAG_INLINE, Header, Kind};
use crate::members::Members;
use crate::memory::{Memory, Shelf};
use crate::rally::Rallies;
use crate::refusal::{Reason, Refusal};
use crate::shard_map::{Epoch, MAX_PART_BYTES};
use crate::sparse::{Means, Packing, SparseTable};
use crate::status::{PAGE, ShardStatus, Standing, TableStatus};
use crate::unpacking::{Unpacking, check_answer_codec};
use crate::{Recovery, Schedule, SparseSpec, TableId, TableSpec};
use checks::{check_pusher, expect_elements, not_for_a_shard, there, unknown};
use first_values::release_init;
use gradwire_transport::{PeerId, RegionSlice};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Evicted ids in one answer.
pub(crate) const MOST_EVICTED: usize = 1 << 14;

/// Something to be done by whoever drives the shard.
#[derive(Debug)]
pub enum Action {
    /// Send this header, with the body behind it.
    Reply {
        /// To whom.
        to: PeerId,
        /// The header; it says the body's length.
        header: Header,
        /// A refusal, a status; mostly empty, which takes no memory.
        body: Vec<u8>,
    },
    /// Send these elements to the tag of `header.slot`, with `header.clock` as the note.
    Value {
        /// To whom.
        to: PeerId,
        /// The reply.
        header: Header,
        /// The value, in place.
        slice: RegionSlice,
    },
    /// Close this connection.
    Close {
        /// Whose.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// Store this, and tell how many bytes it took.
    Store {
        /// Whom to tell.
        to: PeerId,
        /// The request.
        header: Header,
        /// What to store.
        cut: Box<Cut>,
    },
    /// Send what [`Shard::status`] tells, with the traffic of the connections.
    Status {
        /// To whom.
        to: PeerId,
        /// The reply, without a body.
        header: Header,
    },
    /// Send this entry of the log to the backup.
    Ship {
        /// The backup.
        to: PeerId,
        /// The entry.
        bytes: Arc<Vec<u8>>,
    },
    /// Send this header to the primary, as a request.
    Tell {
        /// The primary.
        to: PeerId,
        /// The request.
        header: Header,
    },
}

/// One shard: its tables and clients.
pub struct Shard {
    limits: Limits,
    epoch: Epoch,
    instance: u64,
    /// Any number that clients do not know; a copy's is the first one's, so that both do alike.
    key: u64,
    pub(crate) tables: BTreeMap<TableId, Table>,
    pub(crate) sparse: BTreeMap<TableId, SparseTable>,
    pub(crate) members: Members,
    pub(crate) memory: Memory,
    shelf: Shelf,
    answers: Vec<Answer>,
    unpacking: Unpacking,
    packing: Packing,
    awaited: Option<snapshot::Awaited>,
    rallies: Rallies,
    restored: bool,
}

impl Shard {
    /// A shard without tables. `instance` tells this process from others at the same address.
    pub fn new(limits: Limits, instance: u64) -> Self {
        Self {
            members: Members::new(limits.clients),
            memory: Memory::new(limits.memory_bytes).with_client_limit(limits.client_bytes),
            epoch: Epoch(1),
            instance,
            key: instance,
            tables: BTreeMap::new(),
            sparse: BTreeMap::new(),
            shelf: Shelf::default(),
            answers: Vec::new(),
            unpacking: Unpacking::default(),
            packing: Packing::default(),
            awaited: None,
            rallies: Rallies::new(instance),
            restored: false,
            limits,
        }
    }

    /// Takes one request. What is to be done is appended to `out`.
    pub fn handle(&mut self, from: PeerId, header: &Header, payload: &[u8], now: Instant, out: &mut Vec<Action>) {
        match self.check(from, header, payload) {
            Ok(()) => self.replay(from, header, payload, now, out),
            Err(refusal) => refuse(from, header, &refusal, out),
        }
    }

    /// Takes one request that has been checked, here or where it came first.
    pub(crate) fn replay(
        &mut self,
        from: PeerId,
        header: &Header,
        payload: &[u8],
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let patience = match header.wait_ms {
            0 => self.limits.patience,
            ms => self.limits.patience.min(Duration::from_millis(ms.into())),
        };
        let wait = Wait { to: from, header: *header, until: now + patience };
        if let Err(refusal) = self.dispatch(&wait, payload, now, out) {
            refuse(from, header, &refusal, out);
        }
        if self.awaited.is_some() {
            self.finish_snapshot(now, out);
        }
        for answer in self.answers.drain(..) {
            match answer {
                Answer::Told(to, header, body) => out.push(Action::Reply { to, header, body }),
                Answer::Counted(to, header) => out.push(Action::Reply { to, header, body: Vec::new() }),
                Answer::Value(to, header, slice) => out.push(Action::Value { to, header, slice }),
                Answer::Refused(wait, refusal) => refuse(wait.to, &wait.header, &refusal, out),
            }
        }
    }

    fn check(&self, from: PeerId, header: &Header, payload: &[u8]) -> Result<(), Refusal> {
        let malformed = |what: &str, expected: String, got: String| {
            Err(Refusal::new(Reason::Malformed, "request", what, expected, got))
        };
        if header.kind.is_reply() || header.kind.is_control() {
            return malformed("kind", "a client's request".to_owned(), format!("{:?}", header.kind));
        }
        if header.payload_bytes != payload.len() as u64 {
            return malformed("payload", format!("{} bytes", header.payload_bytes), format!("{} bytes", payload.len()));
        }
        if header.flags & FLAG_CHECKED != 0 && crc32c::crc32c(payload) != header.payload_crc {
            let sum = crc32c::crc32c(payload);
            return malformed("payload checksum", format!("{:#010x}", header.payload_crc), format!("{sum:#010x}"));
        }
        if header.kind == Kind::Hello {
            return Ok(());
        }
        self.members.check(from, header)?;
        if header.epoch != self.epoch && header.kind != Kind::Status {
            return Err(Refusal::new(Reason::WrongEpoch, "request", "epoch", self.epoch.0, header.epoch.0));
        }
        Ok(())
    }

    fn dispatch(&mut self, wait: &Wait, payload: &[u8], now: Instant, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        match header.kind {
            Kind::Hello => self.hello(wait, out),
            Kind::Open => self.open(wait, payload, out),
            Kind::ClaimInit => self.claim_init(wait, out),
            Kind::Init => self.init(wait, payload, out),
            Kind::EndInit => self.end_init(wait, out),
            Kind::Push | Kind::PushPull => self.push(wait, payload, out),
            Kind::Pull => self.pull(wait),
            Kind::OpenSparse => self.open_sparse(wait, payload, now, out),
            Kind::SparsePush | Kind::SparsePull => self.sparse_data(wait, payload, now, out),
            Kind::Evicted => self.evicted(wait, out),
            Kind::Snapshot => self.snapshot(wait, payload, now, out),
            Kind::Offer | Kind::Restart | Kind::Restore | Kind::Restored => self.recovering(wait, payload, out),
            Kind::SetRate => {
                let mut from = Reader(payload);
                let schedule = Schedule::decode(&mut from).and_then(|schedule| from.end().map(|()| schedule));
                let malformed = |bad| Refusal::new(Reason::Malformed, "request", "learning rate", "a schedule", bad);
                let schedule = schedule.map_err(malformed)?;
                match self.sparse.get_mut(&header.table) {
                    Some(table) => table.set_rate(header, schedule)?,
                    None => self.table(header)?.set_rate(header, schedule)?,
                }
                done(wait, header.clock, out);
                Ok(())
            }
            Kind::Norm => {
                let table = there(&mut self.tables, header)?;
                check_waiting(table.waiting(), || table.spec.subject(), &self.limits)?;
                table.norm(*wait, &mut self.answers)
            }
            Kind::Scale => {
                let wrong = |_| Refusal::new(Reason::Malformed, "request", "scale", "8 bytes", payload.len());
                let scale = payload.try_into().map(f64::from_le_bytes).map_err(wrong)?;
                let table = there(&mut self.tables, header)?;
                table.scale(header, scale, &mut self.memory, &mut self.answers)?;
                done(wait, header.clock, out);
                Ok(())
            }
            Kind::Barrier => {
                self.members.barrier(*wait)?.iter().for_each(|wait| done(wait, 0, out));
                Ok(())
            }
            Kind::Status => {
                out.push(Action::Status { to: wait.to, header: header.reply(Kind::Done) });
                Ok(())
            }
            Kind::Follow | Kind::Applied | Kind::Join | Kind::Sighting | Kind::Map | Kind::Drain => {
                Err(not_for_a_shard(header))
            }
            Kind::Done | Kind::Refused | Kind::Later => Err(not_for_a_shard(header)),
        }
    }

    fn hello(&mut self, wait: &Wait, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        if let Some(before) = self.members.hello(wait.to, header)? {
            self.gone(before, out);
            let reason = format!("client {} has connected anew", header.client);
            out.push(Action::Close { peer: before, reason });
        }
        let mut reply = header.reply(Kind::Done);
        reply.epoch = self.epoch;
        reply.clock = self.instance;
        reply.status = self.restored.into();
        reply.keys.end = reply.keys.start.saturating_add(MAX_PART_BYTES as u64);
        out.push(Action::Reply { to: wait.to, header: reply, body: Vec::new() });
        Ok(())
    }

    fn open(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        let mut from = Reader(payload);
        let spec = TableSpec::decode(&mut from).and_then(|spec| from.end().map(|()| spec));
        let spec =
            spec.map_err(|bad| Refusal::new(Reason::Malformed, "request to open a table", "body", "a table", bad))?;
        spec.check()?;
        if spec.id() != header.table {
            let subject = spec.subject();
            return Err(Refusal::new(
                Reason::Malformed,
                subject,
                "id",
                format!("{:#x}", spec.id().0),
                format!("{:#x}", header.table.0),
            ));
        }
        let again = header.clock == AGAIN && spec.recovery == Recovery::Workers;
        if let Some(table) = self.tables.get_mut(&header.table) {
            if let Some(refusal) = table.spec.disagreement(&spec) {
                return Err(refusal);
            }
            if again {
                table.recall(header.client, |wait, refusal| refuse(wait.to, &wait.header, &refusal, out));
            }
        } else {
            self.check_new(header, spec.subject())?;
            spec.recovery.check(&self.limits, (spec.shard, spec.shards), spec.subject())?;
            let mut table = Table::new(spec, &mut self.memory)?;
            if again {
                table.mark_lost();
            }
            self.tables.insert(header.table, table);
        }
        let pushed = self.tables.get(&header.table).map_or(0, |table| table.pushed_by(header.client));
        done(wait, pushed, out);
        Ok(())
    }

    /// Whether one more table may be made under the header's id.
    fn check_new(&self, header: &Header, subject: String) -> Result<(), Refusal> {
        if self.tables.contains_key(&header.table) || self.sparse.contains_key(&header.table) {
            let got = "another of that name";
            return Err(Refusal::new(Reason::Mismatch, subject, "kind of table", "dense and sparse to differ", got));
        }
        if self.tables.len() + self.sparse.len() >= self.limits.tables {
            let expected = format!("at most {}", self.limits.tables);
            return Err(Refusal::new(Reason::Limit, subject, "tables", expected, self.limits.tables + 1));
        }
        Ok(())
    }

    fn table(&mut self, header: &Header) -> Result<&mut Table, Refusal> {
        there(&mut self.tables, header)
    }

    fn push(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        let table = there(&mut self.tables, header)?;
        let part = table.part(header.keys)?;
        let fits = header.dtype.is_some_and(|dtype| dtype.pushes_to(table.spec.dtype));
        let payload = match header.payload_codec() {
            0 => {
                expect_elements(table, header, fits)?;
                payload
            }
            _ => self.unpacking.gradient(header, payload, &table.spec)?,
        };
        check_answer_codec(header, table.spec.compression.pull, || table.spec.subject())?;
        check_pusher(header, table.spec.mode, || table.spec.subject())?;
        check_waiting(table.waiting_at(part), || table.spec.subject(), &self.limits)?;
        if !table.push(part, wait, payload, (&self.members, &mut self.memory), &mut self.answers)? {
            out.push(Action::Reply { to: wait.to, header: header.reply(Kind::Later), body: Vec::new() });
        }
        Ok(())
    }

    fn pull(&mut self, wait: &Wait) -> Result<(), Refusal> {
        let header = &wait.header;
        let table = there(&mut self.tables, header)?;
        let part = table.part(header.keys)?;
        if header.dtype != Some(table.spec.dtype) {
            let got = header.dtype.map_or("none", |dtype| dtype.name());
            return Err(Refusal::new(Reason::Mismatch, table.spec.subject(), "dtype", table.spec.dtype, got));
        }
        check_answer_codec(header, table.spec.compression.pull, || table.spec.subject())?;
        check_waiting(table.waiting_at(part), || table.spec.subject(), &self.limits)?;
        table.pull(part, *wait, &mut self.answers);
        Ok(())
    }

    fn open_sparse(&mut self, wait: &Wait, payload: &[u8], now: Instant, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        let mut from = Reader(payload);
        let spec = SparseSpec::decode(&mut from).and_then(|spec| from.end().map(|()| spec));
        let malformed = |bad| Refusal::new(Reason::Malformed, "request to open a table", "body", "a sparse table", bad);
        let spec = spec.map_err(malformed)?;
        spec.check()?;
        if spec.id() != header.table {
            let (expected, got) = (format!("{:#x}", spec.id().0), format!("{:#x}", header.table.0));
            return Err(Refusal::new(Reason::Malformed, spec.subject(), "id", expected, got));
        }
        if let Some(table) = self.sparse.get(&header.table) {
            if let Some(refusal) = table.spec.disagreement(&spec) {
                return Err(refusal);
            }
        } else {
            self.check_new(header, spec.subject())?;
            spec.recovery.check(&self.limits, (spec.shard, spec.shards), spec.subject())?;
            let table = SparseTable::new(spec, self.key, now, &mut self.memory)?;
            self.sparse.insert(header.table, table);
        }
        let table = self.sparse.get(&header.table).ok_or_else(|| unknown(header))?;
        done(wait, table.pushed_by(header.client), out);
        Ok(())
    }

    fn sparse_data(&mut self, wait: &Wait, payload: &[u8], now: Instant, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        let table = self.sparse.get_mut(&header.table).ok_or_else(|| unknown(header))?;
        let subject = || table.spec.subject();
        check_waiting(table.waiting(), subject, &self.limits)?;
        if header.keys.start != u64::from(table.spec.shard) {
            return Err(Refusal::new(Reason::Malformed, subject(), "shard", table.spec.shard, header.keys.start));
        }
        let Self { members, memory, shelf, answers, packing, .. } = self;
        let mut means = Means { members, memory, shelf, now, out: answers };
        let taken = if header.kind == Kind::SparsePush {
            check_pusher(header, table.spec.mode, subject)?;
            let payload = packing.unpack(header, payload, &table.spec)?;
            table.push(wait, payload, &mut means)?
        } else {
            table.pull(wait, payload, &mut means)?
        };
        if !taken {
            out.push(Action::Reply { to: wait.to, header: header.reply(Kind::Later), body: Vec::new() });
        }
        Ok(())
    }

    /// Answers with how many ids are lost, the number to ask from next, and the ids.
    fn evicted(&mut self, wait: &Wait, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let table = self.sparse.get(&wait.header.table).ok_or_else(|| unknown(&wait.header))?;
        let (lost, ids, next) = table.evicted(wait.header.clock, MOST_EVICTED);
        let mut body = Writer::default();
        [lost, next].into_iter().chain(ids).for_each(|number| body.number(number));
        let mut header = wait.header.reply(Kind::Done);
        (header.flags, header.payload_bytes) = (FLAG_INLINE, body.0.len() as u64);
        out.push(Action::Reply { to: wait.to, header, body: body.0 });
        Ok(())
    }

    /// A connection is closed: nothing waits for it any more.
    pub fn gone(&mut self, peer: PeerId, out: &mut Vec<Action>) {
        self.members.gone(peer);
        self.rallies.gone(peer);
        self.sparse.values_mut().for_each(|table| table.forget(peer, &mut self.memory));
        for table in self.tables.values_mut() {
            table.forget(peer, &mut self.memory);
            release_init(&mut table.init, peer, out);
        }
    }

    /// Refuses what has waited too long, and evicts rows whose time is up. Cheap while nothing waits; to be called some times a
    /// second. Whether rows are gone that copies must let go of at the same time.
    pub fn expire(&mut self, now: Instant, out: &mut Vec<Action>) -> bool {
        self.expire_snapshot(now, out);
        let mut late = |wait: Wait, refusal: Refusal| refuse(wait.to, &wait.header, &refusal, out);
        self.members.expire(now, &mut late);
        self.rallies.expire(now, &mut late);
        let memory = &mut self.memory;
        let waiting = self.tables.values_mut().filter(|table| table.waiting() > 0);
        waiting.for_each(|table| table.expire(now, memory, &mut late));
        let replicated = |table: &SparseTable| table.spec.recovery.replicates();
        let expired = self.sparse.values_mut().map(|table| table.expire(now, memory, &mut late) && replicated(table));
        // All of them, not up to the first.
        expired.filter(|&evicted| evicted).count() > 0
    }

    /// The clients that are connected, with their connections.
    pub fn clients(&self) -> impl Iterator<Item = (u64, PeerId)> + '_ {
        self.members.connected()
    }

    /// Bytes of contributions of `client` that wait.
    pub fn waiting_bytes(&self, client: u64) -> u64 {
        self.memory.held_for(client)
    }

    /// Memory, and one page of tables from the `first`-th on. Clients are for the driver to add, who knows their addresses.
    pub fn status(&self, first: usize) -> ShardStatus {
        let tables = self.tables.values().skip(first).take(PAGE).map(|table| TableStatus {
            spec: table.spec_now(),
            elements: table.keys.len(),
            bytes: table.memory_bytes,
            clock: table.completed(),
            pushes: table.counts.pushes,
            pulls: table.counts.pulls,
            duplicates: table.counts.duplicates,
            pushed_bytes: table.counts.pushed[0],
            pushed_whole_bytes: table.counts.pushed[1],
            pulled_bytes: table.counts.pulled[0],
            pulled_whole_bytes: table.counts.pulled[1],
            waiting: table.waiting() as u64,
        });
        ShardStatus {
            memory_bytes: self.memory.used,
            memory_limit_bytes: self.memory.limit,
            standing: Standing::default(),
            tables: tables.collect(),
            sparse: self.sparse.values().skip(first).take(PAGE).map(SparseTable::status).collect(),
            clients: Vec::new(),
        }
    }
}

fn done(wait: &Wait, clock: u64, out: &mut Vec<Action>) {
    let header = Header { clock, ..wait.header.reply(Kind::Done) };
    out.push(Action::Reply { to: wait.to, header, body: Vec::new() });
}

pub(crate) fn refuse(to: PeerId, header: &Header, refusal: &Refusal, out: &mut Vec<Action>) {
    let body = refusal.encode();
    let mut header = header.reply(Kind::Refused);
    header.flags = FLAG_INLINE;
    header.status = refusal.reason as u16;
    header.payload_bytes = body.len() as u64;
    out.push(Action::Reply { to, header, body });
}

#[cfg(test)]
mod tests;
