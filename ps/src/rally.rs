//! Pure: the workers of tables that a server has lost agree from which clock to go on, and who of them gives which table again.
//!
//! All workers offer what they pulled last. Of each table the latest clock counts, since whoever is behind has pushed to it, and
//! the first worker that has it writes it; then all meet once more, so that nobody pushes to what is not yet written. Whoever
//! fails in the middle offers again, which begins a new round for all: what was written stays right, as nobody has gone on.

use crate::TableId;
use crate::body::{BadBody, Reader, Writer};
use crate::dense::{Answer, Wait};
use crate::header::{FLAG_INLINE, Header, Kind};
use crate::refusal::{Reason, Refusal};
use gradwire_transport::PeerId;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// Most groups of tables whose workers meet at once, and of those most that one worker comes to.
const MAX_RALLIES: usize = 1024;
const MAX_OF_ONE: usize = 16;
/// In the place of a clock: nothing was pulled.
pub(crate) const NOTHING: u64 = u64::MAX;

/// Tables, each with the clock that a worker has.
pub(crate) type Offer = Vec<(TableId, u64)>;

enum Stage {
    /// Workers come and say what they have.
    Gathering(BTreeMap<u32, (Wait, Offer)>),
    /// They write, and come again when they have written.
    Writing(BTreeMap<u32, Wait>),
}

/// The workers of a group of tables.
struct Rally {
    workers: u32,
    stage: Stage,
    /// The round under way, and the last that ended.
    round: u64,
    ended: Option<u64>,
}

/// All groups that meet, or have met, by their first table.
pub(crate) struct Rallies {
    rallies: HashMap<TableId, Rally>,
    next_round: u64,
}

impl Rallies {
    /// Nobody has met. `first`: a number that tells rounds of this process from those of others.
    pub(crate) fn new(first: u64) -> Self {
        Self { rallies: HashMap::new(), next_round: first & (u64::MAX >> 2) | 1 }
    }

    /// A worker offers what it has, of tables that are known to be theirs.
    pub(crate) fn offer(&mut self, wait: Wait, offer: Offer, out: &mut Vec<Answer>) -> Result<(), Refusal> {
        let (rank, workers) = worker(&wait.header)?;
        let elsewhere = self.rallies.iter().filter(|(table, rally)| **table != wait.header.table && rally.has(rank));
        if elsewhere.count() >= MAX_OF_ONE {
            let expected = format!("at most {MAX_OF_ONE} at once of one worker");
            return Err(Refusal::new(Reason::Limit, subject(&wait.header), "groups", expected, MAX_OF_ONE + 1));
        }
        if !self.rallies.contains_key(&wait.header.table) && self.rallies.len() >= MAX_RALLIES {
            self.rallies.retain(|_, rally| rally.is_under_way());
        }
        if !self.rallies.contains_key(&wait.header.table) && self.rallies.len() >= MAX_RALLIES {
            let expected = format!("at most {MAX_RALLIES}");
            return Err(Refusal::new(Reason::Limit, subject(&wait.header), "groups", expected, MAX_RALLIES + 1));
        }
        let rally = self.rallies.entry(wait.header.table).or_insert_with(|| Rally {
            workers,
            stage: Stage::Gathering(BTreeMap::new()),
            round: 0,
            ended: None,
        });
        if rally.workers != workers {
            return Err(Refusal::new(Reason::Mismatch, subject(&wait.header), "workers", rally.workers, workers));
        }
        let mut offers = match std::mem::replace(&mut rally.stage, Stage::Gathering(BTreeMap::new())) {
            Stage::Gathering(offers) => offers,
            Stage::Writing(waits) => {
                out.extend(waits.into_values().map(|wait| told_round(&wait, 0)));
                BTreeMap::new()
            }
        };
        let other = offers.values().map(|(_, other)| other).find(|other| !same_tables(other, &offer));
        if let Some(other) = other {
            let (expected, got) = (format!("{} tables", other.len()), format!("{} or others", offer.len()));
            rally.stage = Stage::Gathering(offers);
            let what = "tables (all workers recover the same ones, in the same order)";
            return Err(Refusal::new(Reason::Mismatch, subject(&wait.header), what, expected, got));
        }
        offers.insert(rank, (wait, offer));
        if offers.len() < workers as usize {
            rally.stage = Stage::Gathering(offers);
            return Ok(());
        }
        rally.round = self.next_round;
        self.next_round += 1;
        rally.stage = decide(rally.round, offers, out);
        Ok(())
    }

    /// A worker has written what it was to.
    pub(crate) fn restored(&mut self, wait: Wait, out: &mut Vec<Answer>) -> Result<(), Refusal> {
        let (rank, workers) = worker(&wait.header)?;
        let round = wait.header.clock;
        let Some(rally) = self.rallies.get_mut(&wait.header.table).filter(|rally| rally.workers == workers) else {
            out.push(told_round(&wait, 0));
            return Ok(());
        };
        match &mut rally.stage {
            _ if rally.ended == Some(round) => out.push(told_round(&wait, round)),
            Stage::Writing(waits) if rally.round == round => {
                waits.insert(rank, wait);
                if waits.len() == workers as usize {
                    out.extend(std::mem::take(waits).values().map(|wait| told_round(wait, round)));
                    rally.ended = Some(round);
                    rally.stage = Stage::Gathering(BTreeMap::new());
                }
            }
            _ => out.push(told_round(&wait, 0)),
        }
        Ok(())
    }

    /// A connection is closed: who it belongs to comes again over the next one.
    pub(crate) fn gone(&mut self, peer: PeerId) {
        for rally in self.rallies.values_mut() {
            match &mut rally.stage {
                Stage::Gathering(offers) => offers.retain(|_, (wait, _)| wait.to != peer),
                Stage::Writing(waits) => waits.retain(|_, wait| wait.to != peer),
            }
        }
    }

    /// Takes out those who have waited too long, with who did not come.
    pub(crate) fn expire(&mut self, now: Instant, mut refuse: impl FnMut(Wait, Refusal)) {
        for rally in self.rallies.values_mut() {
            let came: Vec<u32> = match &rally.stage {
                Stage::Gathering(offers) => offers.keys().copied().collect(),
                Stage::Writing(waits) => waits.keys().copied().collect(),
            };
            let late: Vec<Wait> = match &mut rally.stage {
                Stage::Gathering(offers) => {
                    offers.extract_if(.., |_, (wait, _)| wait.until <= now).map(|(_, (wait, _))| wait).collect()
                }
                Stage::Writing(waits) => {
                    waits.extract_if(.., |_, wait| wait.until <= now).map(|(_, wait)| wait).collect()
                }
            };
            for wait in late {
                let missing: Vec<String> =
                    (0..rally.workers).filter(|rank| !came.contains(rank)).take(16).map(|it| it.to_string()).collect();
                let got = format!("nothing from worker {}", missing.join(", "));
                let what = "recovery";
                refuse(wait, Refusal::new(Reason::Waited, subject(&wait.header), what, "all workers to come", got));
            }
        }
    }
}

impl Rally {
    fn has(&self, rank: u32) -> bool {
        match &self.stage {
            Stage::Gathering(offers) => offers.contains_key(&rank),
            Stage::Writing(waits) => waits.contains_key(&rank),
        }
    }

    fn is_under_way(&self) -> bool {
        !matches!(&self.stage, Stage::Gathering(offers) if offers.is_empty())
    }
}

/// Tells every worker the clock of each table and who writes it.
fn decide(round: u64, offers: BTreeMap<u32, (Wait, Offer)>, out: &mut Vec<Answer>) -> Stage {
    let tables = offers.values().next().map_or(0, |(_, offer)| offer.len());
    let mut body = Writer::default();
    body.number(round);
    for at in 0..tables {
        let has = offers.iter().filter_map(|(rank, (_, offer))| Some((offer.get(at)?.1, *rank)));
        let has = has.filter(|(clock, _)| *clock != NOTHING);
        // The latest clock, and of those who have it the first.
        let (clock, rank) = has.max_by_key(|(clock, rank)| (*clock, u32::MAX - rank)).unwrap_or((NOTHING, 0));
        body.number(clock);
        body.number(rank.into());
    }
    for (wait, _) in offers.values() {
        let mut header = wait.header.reply(Kind::Done);
        (header.flags, header.payload_bytes) = (FLAG_INLINE, body.0.len() as u64);
        out.push(Answer::Told(wait.to, header, body.0.clone()));
    }
    Stage::Writing(BTreeMap::new())
}

fn same_tables(one: &Offer, other: &Offer) -> bool {
    one.iter().map(|(table, _)| table).eq(other.iter().map(|(table, _)| table))
}

fn told_round(wait: &Wait, round: u64) -> Answer {
    Answer::Counted(wait.to, Header { clock: round, ..wait.header.reply(Kind::Done) })
}

fn subject(header: &Header) -> String {
    format!("recovery of table {:#x}", header.table.0)
}

/// Which worker asks, of how many.
fn worker(header: &Header) -> Result<(u32, u32), Refusal> {
    let workers = u32::try_from(header.keys.len()).ok().filter(|workers| *workers <= crate::staleness::MAX_WORKERS);
    let found =
        workers.and_then(|workers| Some((u32::try_from(header.client).ok().filter(|it| *it < workers)?, workers)));
    found.ok_or_else(|| {
        let got = format!("client {} of {}", header.client, header.keys.len());
        Refusal::new(Reason::Mismatch, subject(header), "who recovers", "one of the table's workers", got)
    })
}

/// What a worker has, as a body.
pub(crate) fn offer_body(offer: impl ExactSizeIterator<Item = (TableId, u64)>) -> Vec<u8> {
    let mut out = Writer::default();
    out.number(offer.len() as u64);
    offer.for_each(|(table, clock)| [table.0, clock].into_iter().for_each(|number| out.number(number)));
    out.0
}

/// What such a body says.
pub(crate) fn read_offer(payload: &[u8]) -> Result<Offer, BadBody> {
    let mut from = Reader(payload);
    let tables = (0..from.count(16)?).map(|_| Ok((TableId(from.number()?), from.number()?)));
    let tables = tables.collect::<Result<_, BadBody>>()?;
    from.end()?;
    Ok(tables)
}

/// What was decided about so many tables: the round, and of each table the clock and who writes it.
pub(crate) fn decided(body: &[u8], tables: usize) -> Result<(u64, Vec<(u64, u64)>), BadBody> {
    let mut from = Reader(body);
    let round = from.number()?;
    let each = (0..tables).map(|_| Ok((from.number()?, from.number()?))).collect::<Result<_, BadBody>>()?;
    from.end()?;
    Ok((round, each))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KeyRange;
    use std::time::Duration;

    fn wait(kind: Kind, rank: u64, clock: u64) -> Wait {
        let keys = KeyRange { start: 0, end: 3 };
        let header = Header { table: TableId(7), client: rank, clock, keys, ..Header::new(kind) };
        Wait { to: PeerId(rank as u32), header, until: Instant::now() + Duration::from_secs(60) }
    }

    fn offer(rallies: &mut Rallies, rank: u64, clocks: [u64; 2]) -> Vec<Answer> {
        let mut out = Vec::new();
        let offer = [(TableId(7), clocks[0]), (TableId(9), clocks[1])].into_iter();
        rallies.offer(wait(Kind::Offer, rank, 0), offer.collect(), &mut out).unwrap();
        out
    }

    fn restored(rallies: &mut Rallies, rank: u64, round: u64) -> Vec<u64> {
        let mut out = Vec::new();
        rallies.restored(wait(Kind::Restored, rank, round), &mut out).unwrap();
        rounds(&out)
    }

    fn rounds(answers: &[Answer]) -> Vec<u64> {
        let clock = |answer: &Answer| match answer {
            Answer::Counted(_, header) => header.clock,
            other => panic!("{other:?}"),
        };
        answers.iter().map(clock).collect()
    }

    fn decision(answers: &[Answer]) -> (u64, Vec<(u64, u64)>) {
        match answers {
            [Answer::Told(_, _, first), Answer::Told(_, _, second), Answer::Told(_, _, third)] => {
                assert!(first == second && second == third);
                decided(first, 2).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_latest_clock_counts_and_the_first_who_has_it_writes() {
        let mut rallies = Rallies::new(40);
        assert!(offer(&mut rallies, 2, [5, 4]).is_empty() && offer(&mut rallies, 0, [4, 4]).is_empty());
        let (round, tables) = decision(&offer(&mut rallies, 1, [5, NOTHING]));
        assert_eq!((round, tables), (41, vec![(5, 1), (4, 0)]));
        assert!(restored(&mut rallies, 0, round).is_empty() && restored(&mut rallies, 2, round).is_empty());
        assert_eq!(restored(&mut rallies, 1, round), [round; 3]);
        assert_eq!(restored(&mut rallies, 1, round), [round], "one whose answer was lost asks again");
    }

    #[test]
    fn who_fails_in_the_middle_begins_a_round_for_all() {
        let mut rallies = Rallies::new(1);
        for rank in 0..2 {
            assert!(offer(&mut rallies, rank, [1, 1]).is_empty());
        }
        let (first, _) = decision(&offer(&mut rallies, 2, [1, 1]));
        assert!(restored(&mut rallies, 0, first).is_empty());
        assert_eq!(rounds(&offer(&mut rallies, 1, [1, 1])), [0], "who waited is to offer anew");
        assert_eq!(restored(&mut rallies, 2, first), [0]);
        assert!(offer(&mut rallies, 0, [1, 1]).is_empty());
        let (second, _) = decision(&offer(&mut rallies, 2, [1, 1]));
        assert_ne!(first, second);
        assert_eq!(restored(&mut rallies, 0, first), [0], "of a round that was given up");
    }

    #[test]
    fn who_does_not_come_is_named_and_who_speaks_of_other_tables_is_refused() {
        let mut rallies = Rallies::new(1);
        offer(&mut rallies, 0, [1, 1]);
        let mut out = Vec::new();
        let refused = rallies.offer(wait(Kind::Offer, 1, 0), vec![(TableId(7), 1)], &mut out);
        assert!(refused.unwrap_err().to_string().contains("same ones"));
        assert!(rallies.offer(wait(Kind::Offer, 3, 0), Vec::new(), &mut out).is_err(), "three workers are 0, 1 and 2");
        for table in 100..100 + MAX_OF_ONE as u64 + 1 {
            let mut wait = wait(Kind::Offer, 2, 0);
            wait.header.table = TableId(table);
            let taken = rallies.offer(wait, vec![(TableId(table), 1)], &mut out);
            assert_eq!(taken.is_ok(), table < 100 + MAX_OF_ONE as u64, "one worker fills no memory with offers");
        }
        rallies.gone(PeerId(2));
        let mut late = Vec::new();
        rallies.expire(Instant::now() + Duration::from_secs(61), |wait, refusal| late.push((wait, refusal)));
        assert!(
            matches!(&late[..], [(wait, refusal)]
            if wait.header.client == 0 && refusal.to_string().contains("worker 1, 2")),
            "{late:?}"
        );
        offer(&mut rallies, 0, [1, 1]);
        rallies.gone(PeerId(0));
        assert!(offer(&mut rallies, 1, [1, 1]).is_empty() && offer(&mut rallies, 2, [1, 1]).is_empty());
    }
}
