//! Pure: what the coordinator decides: which seat serves which shard, who takes over when one is gone.
//!
//! A shard's copies are a chain (van Renesse and Schneider, OSDI 2004): each seat has at least what the next one has, and confirms
//! what all behind it have. One whose follower is gone confirms nothing until it hears a map without that follower, and one that
//! says that whom it follows is gone has closed its log first: so two seats that each say that the other is gone are both heard,
//! and only the first one counts. The first backup takes over; where one in the middle is gone, its neighbours find each other.

use super::map::{ClusterMap, Part, Seating, ShardSeats};
use super::words::{Join, Sighting};
use crate::Epoch;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Silence after which a process counts as gone, where no other end of a log has said so before.
pub const LEASE: Duration = Duration::from_secs(3);

/// Silence after which nothing is handed over to a process, though it does not count as gone: two beats of its agent.
const LATELY: Duration = Duration::from_secs(1);

/// How long a coordinator that begins waits for a shard's only holder, and any for two that fall silent together: many times what
/// servers take to find it.
const GRACE: Duration = Duration::from_secs(15);

/// How long a coordinator that knows nothing listens before it begins a cluster: a server that has lost its own calls again after
/// 0.6 s at most.
const FIRST: Duration = Duration::from_secs(1);

/// Drained processes that are remembered, where some are gone: more than an operator drains before those before have ended.
const MOST_LEAVING: usize = 64;

#[derive(Clone)]
struct Process {
    heard: Instant,
    /// Seats and addresses, and whether each has ever had a part: those that lost theirs get none again.
    seats: Vec<(u64, String, bool)>,
    /// Whether it is to have no part: it is about to end.
    leaving: bool,
}

/// How often shards have got another primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// A backup took over, as the primary was gone.
    pub fail_overs: u64,
    /// A backup took over, as the primary's process wants to end.
    pub hand_overs: u64,
    /// All that had the shard were gone: it began anew without what it held.
    pub losses: u64,
}

/// How many server processes a coordinator knows, each in one of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// Those with a part of a shard.
    pub serving: usize,
    /// Those that are there for when another one dies.
    pub spare: usize,
    /// Those that hand over what they have, to end.
    pub leaving: usize,
    /// Those that the map names, and that have said nothing since this coordinator began.
    pub awaited: usize,
}

/// The coordinator's knowledge.
#[derive(Clone)]
pub struct Cluster {
    map: ClusterMap,
    shards: u32,
    /// The checkpoint that it begins with; empty for none.
    origin: String,
    processes: HashMap<u64, Process>,
    /// Until when nothing that is in somebody's memory is given up: who had it before this coordinator began may still come.
    grace: Option<Instant>,
    /// Before this no cluster begins, however many seats there are: servers of one that is there may still come.
    begins: Option<Instant>,
    /// Shards of which primary and backups are all silent, and since when: it may be this coordinator that is cut off.
    silent: HashMap<u32, Instant>,
    moves: Moves,
}

impl Cluster {
    /// A cluster of `shards` shards with `replicas` copies of each beside the primary, that nobody has joined.
    pub fn new(shards: u32, replicas: u32) -> Self {
        let map = ClusterMap { replicas, ..ClusterMap::default() };
        let (processes, silent) = (HashMap::new(), HashMap::new());
        let (origin, moves) = (String::new(), Moves::default());
        Self { map, shards, origin, processes, grace: None, begins: None, silent, moves }
    }

    /// The same, of a coordinator that began at `now` and may be one started anew: nobody but servers could tell it what was, and
    /// new ones may come before those do.
    pub fn listening_first(self, now: Instant) -> Self {
        Self { begins: Some(now + FIRST), ..self }
    }

    /// The same, which begins with what the checkpoint of that name holds, where it begins at all: not where there is a map.
    pub fn beginning_with(self, origin: String) -> Self {
        Self { origin, ..self }
    }

    /// The same, which has counted so many moves before.
    pub fn counting_from(self, moves: Moves) -> Self {
        Self { moves, ..self }
    }

    /// Shards that it shall have.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// How often shards have got another primary.
    pub fn moves(&self) -> Moves {
        self.moves
    }

    /// The processes that are there.
    pub fn processes(&self) -> Processes {
        let seated = self.map.shards.iter().flat_map(ShardSeats::chain).map(|(who, _)| who.process);
        let (seated, mut counted) = (seated.collect::<HashSet<u64>>(), Processes::default());
        for (number, process) in &self.processes {
            let state = match () {
                () if process.leaving => &mut counted.leaving,
                () if process.seats.is_empty() => &mut counted.awaited,
                () if seated.contains(number) => &mut counted.serving,
                () => &mut counted.spare,
            };
            *state += 1;
        }
        counted
    }

    /// The map as it is.
    pub fn map(&self) -> &ClusterMap {
        &self.map
    }

    /// Processes that are there, and the seats without a part.
    pub fn spare_seats(&self) -> usize {
        let staying = self.processes.values().filter(|process| !process.leaving);
        staying.flat_map(|process| &process.seats).filter(|(.., used)| !used).count()
    }

    /// A process is there. Whether the map has changed.
    pub fn join(&mut self, join: Join, now: Instant) -> bool {
        let before = self.map.epoch;
        if join.known.epoch > self.map.epoch && self.check(&join.known).is_ok() {
            self.adopt(join.known, now);
        }
        let before_it = self.processes.remove(&join.process);
        let (known, leaving) = before_it.map_or((Vec::new(), false), |process| (process.seats, process.leaving));
        let leaving = leaving || join.leaving || self.map.leaving.contains(&join.process);
        let used =
            |seat| self.map.part_of(seat).is_some() || known.iter().any(|&(other, _, used)| other == seat && used);
        let seats = join.seats.into_iter().map(|(seat, address)| (seat, address, used(seat))).collect();
        self.processes.insert(join.process, Process { heard: now, seats, leaving });
        self.assign(now);
        self.map.epoch != before
    }

    /// A seat tells what it has seen. What does not fit the map any more changes nothing. Whether the map has changed.
    pub fn report(&mut self, report: Sighting, now: Instant) -> bool {
        let before = self.map.epoch;
        let (Sighting::Lost { shard, by, whom } | Sighting::Synced { shard, by, whom }) = report;
        let Some(seats) = self.map.shards.get(shard as usize) else { return false };
        let is_next = |first: u64, second: u64| seats.after(first).is_some_and(|(next, _)| next.seat == second);
        let follows = is_next(by, whom);
        if !follows && !is_next(whom, by) {
            return false;
        }
        match report {
            Sighting::Synced { .. } if follows => self.complete(shard, whom),
            Sighting::Synced { .. } => {}
            // Who is on its way cannot be without whom it follows.
            Sighting::Lost { .. } if self.is_candidate(shard, by) => self.remove(shard, by),
            Sighting::Lost { .. } => self.remove(shard, whom),
        }
        self.assign(now);
        self.map.epoch != before
    }

    /// The server at `address` is to have no part any more: each of its shards goes to its backup as soon as one is heard. The
    /// shards that are still there, and whether the map has changed; `None` where nobody is at that address.
    pub fn drain(&mut self, address: &str, now: Instant) -> Option<(Vec<u32>, bool)> {
        let before = self.map.epoch;
        let is_there = |process: &Process| process.seats.iter().any(|(_, other, _)| other == address);
        let number = self.processes.iter().find(|(_, process)| is_there(process)).map(|(&number, _)| number)?;
        self.processes.get_mut(&number)?.leaving = true;
        // In the map, so that whoever coordinates next knows it too.
        if !self.map.leaving.contains(&number) {
            self.forget_who_has_left();
            self.map.leaving.push(number);
            self.map.epoch.0 += 1;
        }
        self.assign(now);
        let is_its = |who: &Option<Seating>| who.as_ref().is_some_and(|who| who.process == number);
        let left = (0..).zip(&self.map.shards).filter(|(_, seats)| is_its(&seats.primary)).map(|(shard, _)| shard);
        Some((left.collect(), self.map.epoch != before))
    }

    /// The addresses of all seats.
    pub fn addresses(&self) -> Vec<&str> {
        self.processes.values().flat_map(|process| &process.seats).map(|(_, address, _)| &**address).collect()
    }

    /// Takes parts from processes that are about to end. A primary keeps its own until it has a backup, and that was heard lately:
    /// who hands over to one that is dead has lost what it had.
    fn relieve(&mut self, now: Instant) {
        for shard in 0..self.map.shards.len() as u32 {
            let leaves = |who: &Seating| self.processes.get(&who.process).is_some_and(|it| it.leaving);
            for (seat, part) in self.those(shard, leaves) {
                let next = self.map.shards[shard as usize].backups.first();
                if part != Part::Primary || next.is_some_and(|next| self.was_heard(next, now)) {
                    self.remove(shard, seat);
                }
            }
        }
    }

    /// Whether a seat is there, and its process has said so lately.
    fn was_heard(&self, who: &Seating, now: Instant) -> bool {
        let is_there = |it: &Process| it.seats.iter().any(|(seat, ..)| *seat == who.seat);
        let heard = |it: &Process| now.saturating_duration_since(it.heard) < LATELY;
        self.processes.get(&who.process).is_some_and(|it| heard(it) && is_there(it))
    }

    /// Seats of a shard's chain that `are` something, the last one first.
    fn those(&self, shard: u32, are: impl Fn(&Seating) -> bool) -> Vec<(u64, Part)> {
        let chain = self.map.shards[shard as usize].chain().filter(|(who, _)| are(who));
        let mut seats: Vec<(u64, Part)> = chain.map(|(who, part)| (who.seat, part)).collect();
        seats.reverse();
        seats
    }

    fn is_candidate(&self, shard: u32, seat: u64) -> bool {
        self.map.shards[shard as usize].candidate.as_ref().is_some_and(|who| who.seat == seat)
    }

    /// The candidate `seat` has everything.
    fn complete(&mut self, shard: u32, seat: u64) {
        if self.is_candidate(shard, seat) {
            let replicas = self.map.replicas as usize;
            self.change(shard, |seats| {
                seats.backups.extend(seats.candidate.take());
                seats.formed |= seats.backups.len() >= replicas;
            });
        }
    }

    /// Takes a seat's part. A primary's goes to its first backup. Who is on its way stays that, though it begins anew where it has
    /// lost whom it follows: it may not have heard of that one yet.
    fn remove(&mut self, shard: u32, seat: u64) {
        let term = Epoch(self.map.epoch.0 + 1);
        let seats = &self.map.shards[shard as usize];
        if let Some(primary) = seats.primary.as_ref().filter(|who| who.seat == seat && !seats.backups.is_empty()) {
            match self.processes.get(&primary.process).is_some_and(|process| process.leaving) {
                true => self.moves.hand_overs += 1,
                false => self.moves.fail_overs += 1,
            }
        }
        self.change(shard, |seats| {
            if seats.primary.as_ref().is_some_and(|who| who.seat == seat) {
                seats.primary = (!seats.backups.is_empty()).then(|| seats.backups.remove(0));
                seats.term = term;
            } else {
                seats.backups.retain(|who| who.seat != seat);
                seats.candidate.take_if(|who| who.seat == seat);
            }
        });
    }

    /// Time passes: who was not heard for [`LEASE`] is gone. Whether the map has changed.
    pub fn tick(&mut self, now: Instant) -> bool {
        let before = self.map.epoch;
        self.processes.retain(|_, process| now.saturating_duration_since(process.heard) < LEASE);
        for shard in 0..self.map.shards.len() as u32 {
            let gone = self.those(shard, |who| !self.has(who));
            let seats = &self.map.shards[shard as usize];
            let copies = 1 + seats.backups.len();
            let silent = gone.iter().filter(|(_, part)| *part != Part::Candidate).count() == copies;
            let since =
                if silent { Some(*self.silent.entry(shard).or_insert(now)) } else { self.silent.remove(&shard) };
            let given_up = silent && since.is_some_and(|since| now.saturating_duration_since(since) >= GRACE);
            for (seat, part) in gone {
                // Nobody has what a primary has where no backup is left; where all are silent, it may be this coordinator.
                let only = part == Part::Primary && self.map.shards[shard as usize].backups.is_empty();
                if part == Part::Candidate || !only && (!silent || given_up) {
                    self.remove(shard, seat);
                }
            }
        }
        self.assign(now);
        self.map.epoch != before
    }

    /// Makes room for one more that is drained. Who is silent may come again, and is drained still: the first that is not there is
    /// forgotten, of many.
    fn forget_who_has_left(&mut self) {
        let gone = self.map.leaving.iter().position(|number| !self.processes.contains_key(number));
        if let Some(at) = gone.filter(|_| self.map.leaving.len() >= MOST_LEAVING) {
            self.map.leaving.remove(at);
        }
    }

    /// Whether who was there before this coordinator began may still be on its way to it.
    fn may_come(&self, now: Instant) -> bool {
        self.grace.is_some_and(|until| now < until)
    }

    /// Goes on from what the coordinator before has decided last.
    ///
    /// # Errors
    /// As [`Cluster::check`].
    pub fn restore(&mut self, map: ClusterMap, now: Instant) -> Result<(), String> {
        self.check(&map)?;
        if !map.shards.is_empty() {
            self.adopt(map, now);
        }
        Ok(())
    }

    /// Whether a map can be of this cluster.
    ///
    /// # Errors
    /// What differs, in words.
    pub fn check(&self, map: &ClusterMap) -> Result<(), String> {
        let (shards, replicas) = (map.shards.len(), map.replicas);
        if shards != 0 && (shards != self.shards as usize || replicas != self.map.replicas) {
            return Err(format!(
                "it has {shards} shards with {replicas} copies of each, and its coordinator is to have {} with {}: see --shards (of \
                 `serve --coordinate`: --cluster-shards) and --replicas",
                self.shards, self.map.replicas
            ));
        }
        Ok(())
    }

    /// Whether a seat is there. Who was not heard since this coordinator began has told no seats yet.
    fn has(&self, who: &Seating) -> bool {
        let process = self.processes.get(&who.process);
        process.is_some_and(|it| it.seats.is_empty() || it.seats.iter().any(|(seat, ..)| *seat == who.seat))
    }

    /// What was, before this coordinator was started. Its processes have a lease to say that they are there.
    fn adopt(&mut self, map: ClusterMap, now: Instant) {
        self.map = map;
        self.grace = Some(now + GRACE);
        for (who, _) in self.map.shards.iter().flat_map(ShardSeats::chain) {
            self.processes.entry(who.process).or_insert(Process { heard: now, seats: Vec::new(), leaving: false });
        }
        for number in &self.map.leaving {
            if let Some(process) = self.processes.get_mut(number) {
                process.leaving = true;
            }
        }
        for process in self.processes.values_mut() {
            for (seat, _, used) in &mut process.seats {
                *used |= self.map.part_of(*seat).is_some();
            }
        }
    }

    fn change(&mut self, shard: u32, change: impl FnOnce(&mut ShardSeats)) {
        change(&mut self.map.shards[shard as usize]);
        self.map.epoch.0 += 1;
    }

    /// Gives parts to seats that have none.
    fn assign(&mut self, now: Instant) {
        self.relieve(now);
        if self.map.shards.is_empty() {
            let wanted = self.shards as usize * (1 + self.map.replicas as usize);
            let is_early = self.begins.is_some_and(|at| now < at);
            if is_early || self.spare_seats() < wanted || self.processes.len() <= self.map.replicas as usize {
                return;
            }
            let first = ShardSeats { origin: self.origin.clone(), ..ShardSeats::default() };
            self.map.shards = vec![first; self.shards as usize];
        }
        for shard in 0..self.shards {
            let is_there = |who: &Seating| {
                let heard = |it: &Process| now.saturating_duration_since(it.heard) < LEASE;
                self.processes.get(&who.process).is_some_and(heard) && self.has(who)
            };
            let seats = &self.map.shards[shard as usize];
            let waits = seats.primary.is_some() && self.may_come(now);
            let lost = seats.primary.as_ref().is_none_or(|primary| !is_there(primary)) && seats.backups.is_empty();
            let lost = lost && !waits;
            if lost && let Some(seating) = self.take_seat(&[]) {
                let seats = &self.map.shards[shard as usize];
                // What it held is gone: whoever comes begins anew, and clients are told by its tables' absence.
                let (term, formed) = (Epoch(self.map.epoch.0 + 1), self.map.replicas == 0);
                self.moves.losses += u64::from(seats.formed);
                // Nothing was ever taken by one that had no copies yet: it begins with the same again.
                let origin = if seats.formed { String::new() } else { seats.origin.clone() };
                let seats = ShardSeats { term, primary: Some(seating), formed, origin, ..ShardSeats::default() };
                self.change(shard, |shard| *shard = seats);
            }
        }
        for shard in 0..self.shards {
            let seats = &self.map.shards[shard as usize];
            let wanted = seats.backups.len() < self.map.replicas as usize && seats.candidate.is_none();
            if !wanted || seats.primary.is_none() {
                continue;
            }
            match self.take_seat(&self.processes_of(shard)) {
                Some(seating) => self.change(shard, |seats| seats.candidate = Some(seating)),
                None => self.make_room(shard),
            }
        }
    }
}

mod seating;
#[cfg(test)]
mod tests;
