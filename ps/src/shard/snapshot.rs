//! Pure: a snapshot that is being taken: each synchronous table at the clock that was asked for, the others at once.

use super::{Action, Checkpointing, Shard, Wait, refuse, unknown};
use crate::TableId;
use crate::body::{BadBody, Reader};
use crate::checkpoint::is_name;
use crate::header::{FLAG_INLINE, Header, Kind};
use crate::refusal::{Reason, Refusal};
use crate::state::{DenseState, Image, SparseState};
use gradwire_transport::PeerId;
use std::fmt;
use std::time::Instant;

/// What the refusal of a snapshot at a clock that is past says does not agree.
pub(crate) const CLOCK: &str = "clock of a snapshot";

/// What a shard gives to a checkpoint.
pub struct Cut {
    /// The checkpoint's name.
    pub name: String,
    /// Which shard this is, of how many.
    pub place: (u32, u32),
    /// The chunks that tell of its clients.
    pub clients: Vec<Vec<u8>>,
    /// Its tables.
    pub tables: Vec<Image>,
}

impl fmt::Debug for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of shard {:?}, {} tables", self.name, self.place, self.tables.len())
    }
}

/// A snapshot of which some tables have not come to their clocks.
pub(super) struct Awaited {
    wait: Wait,
    name: String,
    place: (u32, u32),
    tables: Vec<(TableId, u64)>,
}

fn decode(payload: &[u8], wait: &Wait) -> Result<Awaited, BadBody> {
    let mut from = Reader(payload);
    let name = from.text()?.to_owned();
    let place = (from.small()?, from.small()?);
    if !is_name(&name) || place.0 >= place.1 {
        return Err(BadBody("no such name or shard"));
    }
    let tables = (0..from.count(16)?).map(|_| Ok((TableId(from.number()?), from.number()?)));
    let tables = tables.collect::<Result<_, BadBody>>()?;
    from.end()?;
    Ok(Awaited { wait: *wait, name, place, tables })
}

impl Shard {
    /// Begins a snapshot, which takes the place of one that is awaited. Refused where a table is past its clock.
    pub(super) fn snapshot(
        &mut self,
        wait: &Wait,
        payload: &[u8],
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let malformed = |bad| Refusal::new(Reason::Malformed, "snapshot", "body", "a name and clocks", bad);
        let asked = decode(payload, wait).map_err(malformed)?;
        if let Some(known) = self
            .awaited
            .as_mut()
            .filter(|known| known.name == asked.name && known.wait.header.client == wait.header.client)
        {
            // Its connection was lost meanwhile: it goes on.
            known.wait = *wait;
            return Ok(());
        }
        if let Some(before) = self.disarm() {
            out.push(Self::superseded((before.wait.to, before.wait.header), &before.name, &asked.name));
        }
        let header = wait.header;
        for &(id, clock) in &asked.tables {
            let (subject, part, past) = match (self.tables.get(&id), self.sparse.get(&id)) {
                (Some(table), _) => {
                    // One without its values would be restored as nothing but zeros.
                    table.check_there()?;
                    (table.spec.subject(), (table.spec.shard, table.spec.shards), table.past(clock))
                }
                (None, Some(table)) => (table.spec.subject(), (table.spec.shard, table.spec.shards), table.past(clock)),
                (None, None) => return Err(unknown(&Header { table: id, ..header })),
            };
            if part != asked.place {
                // It would count as whole without the parts that others hold.
                let expected = format!(
                    "all {} servers of the table, in its clients' order, this one as number {}",
                    part.1, part.0
                );
                let got = format!("{} servers, this one as number {}", asked.place.1, asked.place.0);
                return Err(Refusal::new(Reason::Mismatch, subject, "who is asked for a checkpoint", expected, got));
            }
            if let Some(past) = past {
                return Err(Refusal::new(Reason::Mismatch, subject, CLOCK, format!("at least {past}"), clock));
            }
        }
        for &(id, clock) in &asked.tables {
            if let Some(table) = self.tables.get_mut(&id) {
                table.arm(Some(clock));
            }
        }
        for &(id, clock) in &asked.tables {
            if let Some(table) = self.sparse.get_mut(&id) {
                table.arm(clock, now);
            }
        }
        self.awaited = Some(asked);
        Ok(())
    }

    /// Ends what is awaited: nothing is kept for it any more.
    fn disarm(&mut self) -> Option<Awaited> {
        let awaited = self.awaited.take()?;
        self.tables.values_mut().for_each(|table| table.arm(None));
        self.sparse.values_mut().for_each(|table| table.disarm());
        Some(awaited)
    }

    /// Hands the snapshot over, once every table has come to its clock.
    pub(super) fn finish_snapshot(&mut self, now: Instant, out: &mut Vec<Action>) {
        let Some(awaited) = &self.awaited else { return };
        let ready = |id: &TableId| {
            self.tables.get(id).is_none_or(|table| table.is_cut())
                && self.sparse.get(id).is_none_or(|table| table.is_cut())
        };
        if !awaited.tables.iter().all(|(id, _)| ready(id)) {
            return;
        }
        let Some(Awaited { wait, name, place, tables }) = self.awaited.take() else { return };
        let mut images = Vec::with_capacity(tables.len());
        for (id, _) in tables {
            if let Some(table) = self.tables.get_mut(&id) {
                images.push(Image::Dense(Box::new(DenseState(table.take_cut()))));
            } else if let Some(table) = self.sparse.get_mut(&id) {
                images.push(Image::Sparse(Box::new(SparseState(table.take_cut(now)))));
            }
        }
        let cut = Cut { name, place, clients: self.members_chunks(), tables: images };
        out.push(Action::Store { to: wait.to, header: wait.header, cut: Box::new(cut) });
    }

    /// Gives up a snapshot that has waited too long.
    pub(super) fn expire_snapshot(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.awaited.as_ref().is_some_and(|awaited| awaited.wait.until <= now)
            && let Some(Awaited { wait, name, .. }) = self.disarm()
        {
            let got = "some that did not come so far (do all workers still push?)";
            let refusal = Refusal::new(Reason::Waited, format!("snapshot {name}"), CLOCK, "all tables at theirs", got);
            refuse(wait.to, &wait.header, &refusal, out);
        }
    }

    /// Answers who asked for a snapshot that was stored in so many bytes, or why it was not.
    pub(crate) fn stored(wait: (PeerId, Header), stored: Result<u64, String>) -> Action {
        match stored {
            Ok(bytes) => {
                let mut header = wait.1.reply(Kind::Done);
                (header.flags, header.payload_bytes) = (FLAG_INLINE, 8);
                Action::Reply { to: wait.0, header, body: bytes.to_le_bytes().to_vec() }
            }
            Err(why) => refused(wait, &Refusal::new(Reason::Limit, "snapshot", "checkpoint", "to be written", why)),
        }
    }

    /// Refuses a snapshot since the one `before` is still being written.
    pub(crate) fn still_storing(wait: (PeerId, Header), name: &str, before: &str) -> Action {
        let (subject, expected) = (format!("snapshot {name}"), "none that is still being written (ask less often)");
        refused(wait, &Refusal::new(Reason::Limit, subject, "checkpoint under way", expected, before))
    }

    /// Refuses a snapshot that waits since its client has asked for a later one.
    pub(crate) fn superseded(wait: (PeerId, Header), name: &str, later: &str) -> Action {
        refused(wait, &Refusal::new(Reason::Superseded, "snapshot", "name", later, name))
    }

    /// The shard was made from a checkpoint: clients of the process before must notice, since what they pushed since is gone.
    pub(crate) fn mark_restored(&mut self) {
        self.restored = true;
    }

    /// Checkpoints of it are kept; who asks for them, where that is not known better.
    pub(crate) fn keep_checkpoints(&mut self, how: Checkpointing) {
        if self.limits.checkpoints == Checkpointing::Never {
            self.limits.checkpoints = how;
        }
    }

    /// Which shard it is of how many, where whoever runs all of them asks for checkpoints as tables want them.
    pub(crate) fn take_place(&mut self, (shard, shards): (u32, u32)) {
        if matches!(self.limits.checkpoints, Checkpointing::AsWanted { .. }) {
            self.limits.checkpoints = Checkpointing::AsWanted { shard, shards };
        }
    }

    /// What tells this process from others at the same address.
    pub(crate) fn instance(&self) -> u64 {
        self.instance
    }
}

fn refused((to, header): (PeerId, Header), refusal: &Refusal) -> Action {
    let mut out = Vec::new();
    refuse(to, &header, refusal, &mut out);
    out.remove(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::Writer;
    use crate::shard_map::{MAX_PART_BYTES, part_elements};
    use crate::{DType, Epoch, Limits, Mode, TableSpec, open_body};

    /// What a shard answers to who asks for a snapshot of one table as the part `asked`, of which it has the part `has`.
    fn answer(has: (u32, u32), asked: (u32, u32)) -> Vec<Action> {
        let now = Instant::now();
        let mut shard = Shard::new(Limits::default(), 7);
        let header = |kind| Header { client: 0, incarnation: 1, epoch: Epoch(1), sequence: 1, ..Header::new(kind) };
        let part_elements = part_elements(10, has.1, DType::F32, MAX_PART_BYTES);
        let whole = crate::shard::tests::spec("w", 10, Mode::Async);
        let spec = TableSpec { shards: has.1, shard: has.0, part_elements, ..whole };
        let mut body = Writer::default();
        body.text("checkpoint-1");
        [asked.0.into(), asked.1.into(), 1, spec.id().0, 0].into_iter().for_each(|number| body.number(number));
        let mut out = Vec::new();
        for (header, payload) in [
            (header(Kind::Hello), Vec::new()),
            (Header { table: spec.id(), ..header(Kind::Open) }, open_body(&spec)),
            (header(Kind::Snapshot), body.0),
        ] {
            out.clear();
            let header = Header { payload_bytes: payload.len() as u64, ..header };
            shard.handle(PeerId(0), &header, &payload, now, &mut out);
        }
        out
    }

    #[test]
    fn a_part_of_a_table_is_no_part_of_a_checkpoint_that_is_cut_otherwise() {
        assert!(matches!(&answer((1, 2), (1, 2))[..], [Action::Store { cut, .. }] if cut.place == (1, 2)));
        for (has, asked) in [((0, 2), (0, 1)), ((1, 2), (0, 1)), ((1, 2), (0, 2)), ((0, 1), (0, 2))] {
            match &answer(has, asked)[..] {
                [Action::Reply { header, body, .. }] if header.kind == Kind::Refused => {
                    let said = Refusal::decode(header.status, body).unwrap().to_string();
                    let remedy = format!("all {} servers of the table", has.1);
                    assert!(said.contains("table \"w\"") && said.contains(&remedy), "{said}");
                }
                other => panic!("{has:?} {asked:?}: {other:?}"),
            }
        }
    }
}
