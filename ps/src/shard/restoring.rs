//! Pure: the requests by which workers agree about tables that a server has lost, and give them again.

use super::{Action, Shard, Wait, done, expect_elements, unknown};
use crate::header::{FLAG_INLINE, Header, Kind};
use crate::rally::read_offer;
use crate::refusal::{Reason, Refusal};
use crate::schedule::read_rates;
use crate::{Mode, Recovery};

/// In the clock's place of a request to open a table: it was there before, so that a new one waits for its values, and one that
/// is still there lets nobody wait for who recovers it.
pub(crate) const AGAIN: u64 = 1;

impl Shard {
    pub(super) fn recovering(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        match wait.header.kind {
            Kind::Offer => self.offer(wait, payload),
            Kind::Restored => self.rallies.restored(*wait, &mut self.answers),
            Kind::Restart => self.restart(wait, payload, out),
            _ => self.restore(wait, payload, out),
        }
    }

    fn offer(&mut self, wait: &Wait, payload: &[u8]) -> Result<(), Refusal> {
        let header = &wait.header;
        let malformed = |got: String| {
            Refusal::new(Reason::Malformed, "offer", "body", "tables that are here, each once, with clocks", got)
        };
        let offer = read_offer(payload).map_err(|bad| malformed(bad.to_string()))?;
        // What is kept of it is then bounded by what there is.
        if offer.len() > self.tables.len() || offer.first().is_none_or(|(table, _)| *table != header.table) {
            return Err(malformed(format!("{} tables", offer.len())));
        }
        offer.iter().try_for_each(|&(table, _)| self.check_giver(&Header { table, ..*header }))?;
        self.rallies.offer(*wait, offer, &mut self.answers)
    }

    /// Answers with a byte: 1 where values are wanted.
    fn restart(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        let malformed = |bad| Refusal::new(Reason::Malformed, "request", "learning rates", "schedules", bad);
        let rates = read_rates(payload).map_err(malformed)?;
        self.check_giver(header)?;
        let table = self.tables.get_mut(&header.table).ok_or_else(|| unknown(header))?;
        let wanted = table.restart(header, rates)?;
        let mut reply = header.reply(Kind::Done);
        (reply.flags, reply.payload_bytes) = (FLAG_INLINE, 1);
        out.push(Action::Reply { to: wait.to, header: reply, body: vec![wanted.into()] });
        Ok(())
    }

    fn restore(&mut self, wait: &Wait, payload: &[u8], out: &mut Vec<Action>) -> Result<(), Refusal> {
        let header = &wait.header;
        self.check_giver(header)?;
        let table = self.tables.get_mut(&header.table).ok_or_else(|| unknown(header))?;
        let part = table.part(header.keys)?;
        expect_elements(table, header, header.dtype == Some(table.spec.dtype))?;
        table.restore(part, header, payload)?;
        done(wait, header.clock, out);
        Ok(())
    }

    /// Checks that it is a worker of the table who gives it again, and that it may be.
    fn check_giver(&self, header: &Header) -> Result<(), Refusal> {
        let table = self.tables.get(&header.table).ok_or_else(|| unknown(header))?;
        let Mode::Sync { workers } = table.spec.mode else { return Err(unknown(header)) };
        if table.spec.recovery != Recovery::Workers || header.client >= workers.into() {
            let expected = "a table with recovery=\"workers\", and one of them";
            let got = format!("recovery={:?} and client {}", table.spec.recovery.to_string(), header.client);
            return Err(Refusal::new(Reason::Mismatch, table.spec.subject(), "who gives it again", expected, got));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::rates_body;
    use crate::shard::Limits;
    use crate::state::Builder;
    use crate::{Adam, Combine, Compression, DType, Epoch, Ftrl, KeyRange, Schedule, TableSpec, UpdateRule, open_body};
    use gradwire_transport::PeerId;
    use std::time::Instant;

    const KEYS: KeyRange = KeyRange { start: 0, end: 2 };
    const FIRST: [f32; 2] = [0.5, -3.0];

    fn spec() -> TableSpec {
        TableSpec {
            name: "w".into(),
            shape: vec![2],
            dtype: DType::F32,
            rule: UpdateRule::Adam(Adam { learning_rate: 0.1, ..Adam::default() }),
            mode: Mode::Sync { workers: 1 },
            combine: Combine::Sum,
            clipped: false,
            recovery: Recovery::Workers,
            compression: Compression::default(),
            shards: 1,
            shard: 0,
            part_elements: 2,
        }
    }

    fn bytes(floats: [f32; 2]) -> Vec<u8> {
        floats.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// What a shard answers to one request: the header, and the body or the value.
    fn ask(shard: &mut Shard, kind: Kind, clock: u64, payload: &[u8]) -> (Header, Vec<u8>) {
        let data = matches!(kind, Kind::PushPull | Kind::Restore | Kind::Init | Kind::Pull);
        let header = Header {
            table: spec().id(),
            incarnation: 1,
            epoch: Epoch(1),
            clock,
            sequence: clock.max(1),
            dtype: data.then_some(DType::F32),
            keys: if data { KEYS } else { KeyRange { start: 0, end: 1 } },
            payload_bytes: payload.len() as u64,
            ..Header::new(kind)
        };
        let mut out = Vec::new();
        shard.handle(PeerId(0), &header, payload, Instant::now(), &mut out);
        match out.pop() {
            Some(Action::Reply { header, body, .. }) => (header, body),
            Some(Action::Value { header, slice, .. }) => (header, slice.to_vec()),
            other => panic!("{other:?}"),
        }
    }

    fn opened(clock: u64) -> Shard {
        let mut shard = Shard::new(Limits::default(), 1);
        ask(&mut shard, Kind::Hello, 0, &[]);
        assert_eq!(ask(&mut shard, Kind::Open, clock, &open_body(&spec())).0.kind, Kind::Done);
        shard
    }

    fn push(shard: &mut Shard, clock: u64) -> Vec<u8> {
        let (header, value) = ask(shard, Kind::PushPull, clock, &bytes([0.25, 7.0]));
        assert_eq!((header.kind, header.clock), (Kind::Done, clock));
        value
    }

    /// A request for a checkpoint of the table as it is.
    fn snapshot() -> Vec<u8> {
        let mut body = crate::body::Writer::default();
        body.text(&crate::checkpoint::name_at(1));
        [0, 1, 1, spec().id().0, 0].into_iter().for_each(|number| body.number(number));
        body.0
    }

    /// A table that was opened for the first time, with a learning rate that is set.
    fn new_table() -> Shard {
        let mut shard = opened(0);
        ask(&mut shard, Kind::SetRate, 1, &crate::rate_body(&0.7.into()));
        ask(&mut shard, Kind::ClaimInit, 0, &[]);
        ask(&mut shard, Kind::Init, 1, &bytes(FIRST));
        shard
    }

    #[test]
    fn a_table_that_is_given_again_goes_on_as_a_new_one_with_these_values_would() {
        let (mut new, mut again) = (new_table(), opened(AGAIN));
        let rates = rates_body(&[(3, Schedule::from(0.2)), (9, 0.7.into())]);
        assert_eq!(ask(&mut again, Kind::Restart, 9, &rates).1, [1]);
        assert_eq!(ask(&mut again, Kind::PushPull, 10, &bytes(FIRST)).0.kind, Kind::Refused, "it has no values yet");
        assert_eq!(ask(&mut again, Kind::Restore, 8, &bytes([9.0; 2])).0.kind, Kind::Refused, "another clock");
        let (told, why) = ask(&mut again, Kind::Snapshot, 0, &snapshot());
        assert_eq!(told.kind, Kind::Refused, "a checkpoint of zeros");
        assert!(String::from_utf8_lossy(&why).contains("recover"), "{why:?}");
        assert_eq!(ask(&mut again, Kind::Restore, 9, &bytes(FIRST)).0.kind, Kind::Done);
        assert_eq!(ask(&mut again, Kind::Restart, 9, &rates).1, [0], "it has all that it wants");
        assert_eq!(ask(&mut again, Kind::Restore, 9, &bytes([9.0; 2])).0.kind, Kind::Done, "written twice counts once");
        assert_eq!(ask(&mut again, Kind::Pull, 9, &[]).1, bytes(FIRST));
        assert_eq!(push(&mut again, 10), push(&mut new, 1), "Adam begins anew, and so does the count of its steps");

        let mut builder = Builder::new(Limits::default(), 2, (0, 1), Instant::now());
        again.chunks(Instant::now()).iter().for_each(|chunk| builder.take(chunk).unwrap());
        let mut kept = builder.finish().unwrap();
        ask(&mut kept, Kind::Hello, 0, &[]);
        assert_eq!(push(&mut kept, 11), push(&mut new, 2), "a checkpoint keeps that count");
    }

    #[test]
    fn an_offer_of_what_is_not_here_or_not_theirs_is_refused() {
        let mut shard = new_table();
        let id = spec().id();
        let other = crate::TableId(id.0 ^ 1);
        let too_many = [(id, 1), (id, 1)];
        for tables in [&[][..], &[(other, 1)], &[(other, 1), (id, 1)], &too_many] {
            let body = crate::rally::offer_body(tables.iter().copied());
            assert_eq!(ask(&mut shard, Kind::Offer, 0, &body).0.kind, Kind::Refused, "{tables:?}");
        }
        assert_eq!(ask(&mut shard, Kind::Offer, 0, &[1; 9]).0.kind, Kind::Refused);
        let (told, body) = ask(&mut shard, Kind::Offer, 0, &crate::rally::offer_body([(id, 4)].into_iter()));
        assert_eq!((told.kind, crate::rally::decided(&body, 1).unwrap().1), (Kind::Done, vec![(4, 0)]));
    }

    #[test]
    fn a_table_that_was_never_lost_takes_nothing() {
        let mut live = new_table();
        push(&mut live, 1);
        let before = push(&mut live, 2);
        assert_eq!(ask(&mut live, Kind::Open, AGAIN, &open_body(&spec())).0.kind, Kind::Done);
        assert_eq!(ask(&mut live, Kind::Restart, 1, &rates_body(&[])).1, [0]);
        assert_eq!(ask(&mut live, Kind::Restore, 1, &bytes(FIRST)).0.kind, Kind::Done);
        assert_eq!(ask(&mut live, Kind::Pull, 2, &[]).1, before);
        let unordered = rates_body(&[(3, 0.2.into()), (3, 0.1.into())]);
        let mut lost = opened(AGAIN);
        for (clock, body) in [(1, &unordered[..]), (u64::MAX, &rates_body(&[])), (1, &[1])] {
            assert_eq!(ask(&mut lost, Kind::Restart, clock, body).0.kind, Kind::Refused);
        }
    }
    #[test]
    fn weights_that_are_given_again_outlive_the_first_push_to_an_ftrl_table() {
        let ftrl = Ftrl { learning_rate: 0.5, beta: 1.0, l1: 0.25, l2: 0.0 };
        let spec = TableSpec { rule: UpdateRule::Ftrl(ftrl), ..spec() };
        let open = |clock| {
            let mut shard = Shard::new(Limits::default(), 1);
            ask(&mut shard, Kind::Hello, 0, &[]);
            assert_eq!(ask(&mut shard, Kind::Open, clock, &open_body(&spec)).0.kind, Kind::Done);
            shard
        };
        let (mut new, mut again) = (open(0), open(AGAIN));
        ask(&mut new, Kind::ClaimInit, 0, &[]);
        ask(&mut new, Kind::Init, 1, &bytes(FIRST));
        ask(&mut again, Kind::Restart, 9, &rates_body(&[]));
        ask(&mut again, Kind::Restore, 9, &bytes(FIRST));
        // A gradient moves each weight by itself over the paper's slope, (beta + |g|) / alpha, as long as no sign changes.
        let moved = [FIRST[0] - 0.25 / (1.25 / 0.5), FIRST[1] - 7.0 / (8.0 / 0.5)];
        for (shard, clock) in [(&mut new, 1), (&mut again, 10)] {
            let value = push(shard, clock);
            let value: Vec<f32> = value.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            let near = value.iter().zip(moved).all(|(got, expected)| (got - expected).abs() <= 1e-6);
            assert!(near, "{value:?} is not {moved:?}");
        }
    }
}
