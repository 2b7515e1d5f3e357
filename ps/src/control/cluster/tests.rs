//! What the coordinator decides, by a clock that the tests turn.

use super::*;

struct Bench {
    cluster: Cluster,
    now: Instant,
}

impl Bench {
    fn new(shards: u32) -> Self {
        Self { cluster: Cluster::new(shards, 1), now: Instant::now() }
    }

    fn join(&mut self, process: u64, seats: &[u64]) -> bool {
        self.join_knowing(process, seats, ClusterMap::default())
    }

    fn join_knowing(&mut self, process: u64, seats: &[u64], known: ClusterMap) -> bool {
        let seats = seats.iter().map(|&seat| (seat, format!("host:{seat}"))).collect();
        self.cluster.join(Join { process, leaving: false, seats, known }, self.now)
    }

    fn seats(&self, shard: usize) -> [u64; 3] {
        let seats = &self.cluster.map().shards[shard];
        [seats.primary.as_ref(), seats.backups.first(), seats.candidate.as_ref()]
            .map(|who| who.map_or(0, |who| who.seat))
    }

    fn formed() -> Self {
        let mut bench = Self::new(1);
        assert!(!bench.join(1, &[10]) && bench.join(2, &[20]));
        assert_eq!(bench.seats(0), [10, 0, 20]);
        assert_eq!(bench.cluster.map().addresses(), None);
        assert!(bench.cluster.report(Sighting::Synced { shard: 0, by: 10, whom: 20 }, bench.now));
        assert_eq!((bench.seats(0), bench.cluster.map().addresses().unwrap().len()), ([10, 20, 0], 1));
        bench
    }
}

#[test]
fn parts_go_to_different_processes_and_only_once_all_seats_are_there() {
    let mut bench = Bench::new(2);
    assert!(!bench.join(1, &[10, 11, 12, 13]), "one process is no backup of itself");
    assert!(bench.join(2, &[20, 21]));
    let map = bench.cluster.map();
    for shard in &map.shards {
        assert_ne!(shard.primary.as_ref().unwrap().process, shard.candidate.as_ref().unwrap().process);
    }
    assert_ne!(map.shards[0].primary.as_ref().unwrap().process, map.shards[1].primary.as_ref().unwrap().process);
    let before = map.clone();
    assert!(!bench.join(2, &[20, 21]), "said again, it changes nothing");
    assert_eq!(*bench.cluster.map(), before);
}

/// Lets copies come, and seats that lost their part begin anew, until nothing changes; whether clients may come.
fn forms(bench: &mut Bench, processes: &[Vec<u64>]) -> bool {
    let mut seats = processes.to_vec();
    let mut next = 1_000_000;
    for _ in 0..30 {
        let map = bench.cluster.map().clone();
        for (number, seats) in (1..).zip(&mut seats) {
            // What had a part and has none any more comes with another number.
            for seat in seats.iter_mut() {
                let was = bench.cluster.processes[&number].seats.iter().any(|(other, _, used)| other == seat && *used);
                if was && map.part_of(*seat).is_none() {
                    next += 1;
                    *seat = next;
                }
            }
            bench.join(number, seats);
        }
        let map = bench.cluster.map().clone();
        for (shard, of) in (0..).zip(&map.shards) {
            let chain: Vec<u64> = of.chain().map(|(who, _)| who.process).collect();
            assert!((1..chain.len()).all(|at| !chain[..at].contains(&chain[at])), "{chain:?}");
            if let Some(whom) = of.candidate.as_ref().map(|who| who.seat) {
                let by = of.before(whom).unwrap().seat;
                bench.cluster.report(Sighting::Synced { shard, by, whom }, bench.now);
            }
        }
    }
    bench.cluster.map().addresses().is_some()
}

#[test]
fn where_there_are_seats_enough_every_shard_gets_its_copies() {
    let all = (2..=5u32).flat_map(|count| (0..4usize.pow(count)).map(move |code| (count, code)));
    let rooms = all.map(|(count, code)| (0..count).map(|at| 1 + code / 4usize.pow(at) % 4).collect::<Vec<usize>>());
    let (mut failed, mut cases) = (Vec::new(), 0);
    for rooms in rooms {
        for (shards, replicas) in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (3, 2), (4, 2), (3, 3)] {
            let useful: usize = rooms.iter().map(|room| *room.min(&(shards as usize))).sum();
            // With several copies each, servers of different sizes may be filled so that one must go which serves already.
            let even = rooms.iter().all(|room| room == &rooms[0]);
            if useful < (shards * (1 + replicas)) as usize || replicas > 1 && !even {
                continue;
            }
            cases += 1;
            let seats = |(process, room): (u64, &usize)| (0..*room as u64).map(|seat| process * 100 + seat).collect();
            let processes: Vec<Vec<u64>> = (1..).zip(&rooms).map(seats).collect();
            let mut bench = Bench { cluster: Cluster::new(shards, replicas), now: Instant::now() };
            for (number, seats) in (1..).zip(&processes) {
                bench.join(number, seats);
            }
            if !forms(&mut bench, &processes) {
                failed.push((shards, replicas, rooms.clone()));
            }
        }
    }
    assert!(cases > 3000 && failed.is_empty(), "{} of {cases}: {:?}", failed.len(), &failed[..failed.len().min(10)]);
}

#[test]
fn of_two_ends_that_each_say_the_other_is_gone_the_first_is_believed() {
    let lost = |by, whom| Sighting::Lost { shard: 0, by, whom };
    let mut bench = Bench::formed();
    let term = bench.cluster.map().shards[0].term;
    assert!(bench.cluster.report(lost(20, 10), bench.now));
    assert!(bench.cluster.map().shards[0].term > term);
    assert!(!bench.cluster.report(lost(10, 20), bench.now));
    assert_eq!(bench.seats(0), [20, 0, 0]);
    let mut bench = Bench::formed();
    assert!(bench.cluster.report(lost(10, 20), bench.now));
    assert!(!bench.cluster.report(lost(20, 10), bench.now));
    assert_eq!((bench.seats(0), bench.cluster.map().shards[0].term), ([10, 0, 0], term));
    assert!(!bench.join(2, &[20]), "a seat that was dropped gets no part again");
    assert!(bench.join(2, &[21]) && bench.seats(0) == [10, 0, 21]);
    assert!(!bench.cluster.report(Sighting::Synced { shard: 0, by: 10, whom: 20 }, bench.now));
}

#[test]
fn of_a_chain_the_first_takes_over_and_the_neighbours_of_one_that_is_gone_find_each_other() {
    let lost = |by, whom| Sighting::Lost { shard: 0, by, whom };
    let synced = |by, whom| Sighting::Synced { shard: 0, by, whom };
    let formed = || {
        let mut bench = Bench { cluster: Cluster::new(1, 3), now: Instant::now() };
        (1..=3).for_each(|process| assert!(!bench.join(process, &[process * 10]), "too few for three copies"));
        bench.join(4, &[40]);
        assert!(bench.cluster.report(synced(10, 20), bench.now) && !bench.cluster.report(synced(10, 30), bench.now));
        assert!(bench.cluster.report(synced(20, 30), bench.now));
        assert_eq!(bench.cluster.map().addresses(), None, "clients come once it has all its copies");
        assert!(bench.cluster.report(synced(30, 40), bench.now));
        assert!(bench.cluster.map().addresses().is_some());
        bench
    };
    let chain = |bench: &Bench| bench.cluster.map().shards[0].chain().map(|(who, _)| who.seat).collect::<Vec<_>>();
    let mut bench = formed();
    assert!(!bench.cluster.report(lost(10, 30), bench.now), "they are no neighbours");
    assert!(bench.cluster.report(lost(30, 20), bench.now) && chain(&bench) == [10, 30, 40]);
    assert!(!bench.cluster.report(lost(20, 30), bench.now) && !bench.cluster.report(lost(20, 10), bench.now));
    let term = bench.cluster.map().shards[0].term;
    assert!(bench.cluster.report(lost(30, 10), bench.now) && chain(&bench) == [30, 40]);
    assert!(bench.cluster.map().shards[0].term > term);
    // One that comes goes to the end.
    assert!(bench.join(5, &[50]) && chain(&bench) == [30, 40, 50]);
    assert!(bench.cluster.report(lost(30, 40), bench.now) && chain(&bench) == [30, 50]);
    assert_eq!(bench.cluster.map().part_of(50), Some((0, Part::Candidate)), "it has nothing yet");
    // Two are silent at once, and the primary is one of them.
    let mut bench = formed();
    bench.now += LEASE / 2;
    for process in [3, 4] {
        bench.join(process, &[process * 10]);
    }
    bench.now += LEASE / 2;
    assert!(bench.cluster.tick(bench.now) && chain(&bench) == [30, 40]);
    // Who leaves hands over to the first that stays.
    let mut bench = formed();
    bench.cluster.drain("host:20", bench.now);
    bench.cluster.drain("host:10", bench.now);
    assert_eq!(chain(&bench), [30, 40]);
}

#[test]
fn silence_hands_over_after_the_lease_and_an_only_copy_waits_for_its_server() {
    let mut bench = Bench::formed();
    bench.now += LEASE / 2;
    bench.join(2, &[20]);
    assert!(!bench.cluster.tick(bench.now));
    bench.now += LEASE / 2;
    assert!(bench.cluster.tick(bench.now) && bench.seats(0) == [20, 0, 0]);
    bench.now += LEASE;
    assert!(!bench.cluster.tick(bench.now), "nobody else has it");
    assert!(!bench.join(2, &[20]) && bench.seats(0) == [20, 0, 0]);
    bench.now += LEASE;
    bench.cluster.tick(bench.now);
    assert!(bench.join(3, &[30]), "a new server begins anew");
    assert_eq!((bench.seats(0), bench.cluster.map().addresses()), ([30, 0, 0], None));
}

#[test]
fn who_leaves_hands_its_shards_over_and_an_only_copy_is_copied_first() {
    let mut bench = Bench::formed();
    assert_eq!(bench.cluster.drain("nowhere:1", bench.now), None);
    assert_eq!(bench.cluster.drain("host:10", bench.now), Some((Vec::new(), true)));
    assert_eq!(bench.seats(0), [20, 0, 0], "its backup is there, and nobody takes its place");
    assert!(!bench.join(1, &[11]) && bench.seats(0) == [20, 0, 0], "who leaves gets no part");
    let leaving =
        Join { process: 2, leaving: true, seats: vec![(20, "host:20".to_owned())], known: ClusterMap::default() };
    assert!(!bench.cluster.join(leaving, bench.now), "it has the only copy");
    assert_eq!(bench.cluster.drain("host:20", bench.now), Some((vec![0], true)));
    assert!(bench.join(3, &[30]) && bench.seats(0) == [20, 0, 30]);
    assert!(bench.cluster.report(Sighting::Synced { shard: 0, by: 20, whom: 30 }, bench.now));
    assert_eq!(bench.seats(0), [30, 0, 0]);
}

#[test]
fn a_primary_that_is_drained_keeps_its_shard_while_its_backup_is_silent() {
    let drained = || {
        let mut bench = Bench::formed();
        bench.now += LATELY;
        bench.join(1, &[10]);
        assert_eq!(bench.cluster.drain("host:10", bench.now), Some((vec![0], true)));
        assert_eq!(bench.seats(0), [10, 20, 0], "its backup may be dead, and all with it");
        bench
    };
    let mut late = drained();
    assert!(late.join(2, &[20]) && late.seats(0) == [20, 0, 0]);
    let mut dead = drained();
    dead.now += LEASE - LATELY;
    dead.join(1, &[10]);
    assert!(dead.cluster.tick(dead.now) && dead.seats(0) == [10, 0, 0]);
    assert!(dead.join(3, &[30]) && dead.seats(0) == [10, 0, 30]);
    dead.cluster.report(Sighting::Synced { shard: 0, by: 10, whom: 30 }, dead.now);
    assert_eq!(dead.seats(0), [30, 0, 0]);
    // A coordinator that has just begun has heard nobody.
    let map = drained().cluster.map().clone();
    let mut next = Bench::new(1);
    next.cluster.restore(map, next.now).unwrap();
    next.join(1, &[10]);
    assert_eq!(next.seats(0), [10, 20, 0]);
    assert!(next.join(2, &[20]) && next.seats(0) == [20, 0, 0]);
}

#[test]
fn a_coordinator_started_anew_learns_the_map_from_any_server() {
    let mut bench = Bench::formed();
    bench.cluster.report(Sighting::Lost { shard: 0, by: 20, whom: 10 }, bench.now);
    let known = bench.cluster.map().clone();
    let mut anew = Bench::new(1);
    assert!(!anew.join(3, &[30]), "alone it makes no cluster");
    assert!(anew.join_knowing(2, &[20], known.clone()));
    assert_eq!(anew.seats(0), [20, 0, 30]);
    assert!(anew.cluster.map().epoch > known.epoch && anew.cluster.map().shards[0].formed);
    anew.join_knowing(1, &[10], ClusterMap { epoch: Epoch(1), ..known });
    assert_eq!(anew.seats(0), [20, 0, 30]);
}

#[test]
fn a_copy_that_failed_makes_room_for_the_next_one() {
    let mut bench = Bench::new(1);
    assert!(!bench.join(1, &[10]) && bench.join(2, &[20]));
    assert!(!bench.cluster.tick(bench.now));
    // It could not hold the copy, and began anew with another number.
    bench.join(2, &[21]);
    assert!(bench.cluster.tick(bench.now));
    assert_eq!(bench.seats(0), [10, 0, 21]);
}

#[test]
fn what_a_map_before_gave_to_one_server_only_waits_for_it() {
    let mut bench = Bench::formed();
    bench.cluster.report(Sighting::Lost { shard: 0, by: 10, whom: 20 }, bench.now);
    let mut anew = Bench::new(1);
    anew.cluster.restore(bench.cluster.map().clone(), anew.now).unwrap();
    anew.now += GRACE - LEASE;
    anew.cluster.tick(anew.now);
    assert!(anew.join(3, &[30]) && anew.seats(0) == [10, 0, 30], "its server may be slow to find this coordinator");
    assert!(!anew.join(1, &[10]) && anew.seats(0) == [10, 0, 30]);
    let mut gone = Bench::new(1);
    gone.cluster.restore(bench.cluster.map().clone(), gone.now).unwrap();
    gone.now += GRACE;
    gone.cluster.tick(gone.now);
    assert!(gone.join(3, &[30]) && gone.seats(0) == [30, 0, 0]);
}

#[test]
fn a_drain_is_remembered_by_the_coordinator_that_comes_next() {
    let mut bench = Bench::formed();
    let (left, changed) = bench.cluster.drain("host:20", bench.now).unwrap();
    assert!(left.is_empty() && changed && bench.seats(0) == [10, 0, 0]);
    let again = bench.cluster.drain("host:20", bench.now).unwrap();
    assert_eq!(again, (vec![], false));
    let map = bench.cluster.map().clone();
    let mut next = Bench { cluster: Cluster::new(1, 1), now: bench.now };
    next.cluster.restore(map, next.now).unwrap();
    next.join(1, &[10]);
    // A seat that has lost its part comes with a new number.
    next.join(2, &[21]);
    assert_eq!(next.seats(0), [10, 0, 0], "who is drained gets no part");
    next.join(3, &[30]);
    assert_eq!(next.seats(0), [10, 0, 30]);
    next.now += GRACE;
    next.join(1, &[10]);
    next.join(2, &[21]);
    next.join(3, &[30]);
    assert!(!next.cluster.tick(next.now) && next.cluster.map().leaving == [2]);
    // Silent for a while, it is drained still.
    next.now += LEASE;
    next.join(1, &[10]);
    next.join(3, &[30]);
    next.cluster.tick(next.now);
    next.join(2, &[21]);
    assert_eq!((&next.cluster.map().leaving[..], next.cluster.spare_seats()), (&[2][..], 0));
}

#[test]
fn of_many_that_were_drained_the_first_that_are_gone_are_forgotten() {
    let mut bench = Bench::formed();
    for process in 100..200 {
        bench.join(process, &[process]);
        bench.cluster.drain(&format!("host:{process}"), bench.now).unwrap();
        if process >= 110 {
            bench.cluster.processes.remove(&process);
        }
    }
    let leaving = &bench.cluster.map().leaving;
    assert_eq!(
        (leaving.len(), &leaving[..11]),
        (MOST_LEAVING, &[&(100..110).collect::<Vec<_>>()[..], &[146]].concat()[..])
    );
}

#[test]
fn a_primary_that_is_drained_hands_over_although_the_coordinator_changes_meanwhile() {
    let mut bench = Bench::formed();
    bench.cluster.drain("host:20", bench.now).unwrap();
    let (left, _) = bench.cluster.drain("host:10", bench.now).unwrap();
    assert_eq!(left, [0]);
    let mut next = Bench { cluster: Cluster::new(1, 1), now: bench.now };
    next.cluster.restore(bench.cluster.map().clone(), next.now).unwrap();
    next.join(1, &[10]);
    next.join(3, &[30]);
    assert_eq!(next.seats(0), [10, 0, 30]);
    next.cluster.report(Sighting::Synced { shard: 0, by: 10, whom: 30 }, next.now);
    assert_eq!(next.seats(0), [30, 0, 0]);
}

#[test]
fn a_coordinator_started_anew_begins_no_cluster_before_servers_of_one_could_come() {
    let mut before = Bench { cluster: Cluster::new(1, 0), now: Instant::now() };
    assert!(before.join(1, &[10]));
    let map = before.cluster.map().clone();
    let mut bench = Bench { cluster: Cluster::new(1, 0).listening_first(before.now), now: before.now };
    // One that was started with it is always the first to come.
    assert!(!bench.join(2, &[20]));
    bench.now += FIRST - Duration::from_millis(1);
    assert!(!bench.cluster.tick(bench.now));
    bench.join_knowing(1, &[10], map.clone());
    assert_eq!(*bench.cluster.map(), map);
    bench.now += FIRST;
    assert!(!bench.cluster.tick(bench.now) && bench.seats(0) == [10, 0, 0]);
    // Where nobody knows of any, it begins by itself.
    let mut bench = Bench { cluster: Cluster::new(1, 0).listening_first(before.now), now: before.now };
    bench.join(2, &[20]);
    bench.now += FIRST;
    assert!(bench.cluster.tick(bench.now) && bench.seats(0) == [20, 0, 0]);
}

#[test]
fn a_cluster_begins_with_its_checkpoint_until_it_has_copies_and_never_again() {
    let mut bench = Bench { cluster: Cluster::new(1, 1).beginning_with("one".to_owned()), now: Instant::now() };
    let origin = |bench: &Bench| bench.cluster.map().shards[0].origin.clone();
    assert!(!bench.join(1, &[10]) && bench.join(2, &[20]));
    assert_eq!((bench.seats(0), origin(&bench)), ([10, 0, 20], "one".to_owned()));
    // Its primary could not read it, and began anew with another number.
    bench.join(1, &[11]);
    assert_eq!((bench.seats(0), origin(&bench)), ([11, 0, 0], "one".to_owned()));
    bench.join(2, &[21]);
    assert!(bench.cluster.report(Sighting::Synced { shard: 0, by: 11, whom: 21 }, bench.now));
    assert_eq!(bench.seats(0), [11, 21, 0]);
    // Both are gone, with what was pushed since: what they began with would be taken for it.
    bench.now += 2 * LEASE;
    bench.cluster.tick(bench.now);
    assert!(!bench.join(5, &[50]) && bench.seats(0) == [11, 21, 0], "it may be the coordinator that is cut off");
    bench.now += GRACE;
    bench.join(5, &[50]);
    bench.cluster.tick(bench.now);
    assert!(bench.seats(0)[0] == 50 && origin(&bench).is_empty());
}

#[test]
fn a_map_of_another_size_is_of_another_cluster() {
    let map = Bench::formed().cluster.map().clone();
    let now = Instant::now();
    assert!(Cluster::new(2, 1).restore(map.clone(), now).unwrap_err().contains("is to have 2 with 1: see --shards"));
    assert!(Cluster::new(1, 0).restore(map.clone(), now).unwrap_err().contains("is to have 1 with 0"));
    let mut other = Bench::new(2);
    other.join_knowing(1, &[10], map.clone());
    assert_eq!(other.cluster.map().epoch, Epoch(0));
    assert_eq!(Cluster::new(1, 1).restore(map, now), Ok(()));
}

#[test]
fn moves_and_processes_are_counted_by_their_kind() {
    let counted = |bench: &Bench| bench.cluster.processes();
    let mut bench = Bench::formed();
    bench.join(3, &[30]);
    assert_eq!(counted(&bench), Processes { serving: 2, spare: 1, ..Processes::default() });
    assert_eq!(bench.cluster.moves(), Moves::default());
    bench.cluster.report(Sighting::Lost { shard: 0, by: 20, whom: 10 }, bench.now);
    bench.cluster.report(Sighting::Synced { shard: 0, by: 20, whom: 30 }, bench.now);
    assert_eq!(bench.cluster.moves(), Moves { fail_overs: 1, ..Moves::default() });
    bench.cluster.drain("host:20", bench.now);
    assert_eq!(bench.seats(0), [30, 0, 0]);
    assert_eq!(bench.cluster.moves(), Moves { fail_overs: 1, hand_overs: 1, losses: 0 });
    assert_eq!(counted(&bench), Processes { serving: 1, leaving: 1, spare: 1, ..Processes::default() });
    // All who had it are gone; who comes begins anew.
    bench.now += LEASE;
    bench.cluster.tick(bench.now);
    bench.join(4, &[40]);
    assert_eq!(
        (bench.seats(0), bench.cluster.moves()),
        ([40, 0, 0], Moves { fail_overs: 1, hand_overs: 1, losses: 1 })
    );
    let map = bench.cluster.map().clone();
    let mut next = Bench { cluster: Cluster::new(1, 1).counting_from(bench.cluster.moves()), now: bench.now };
    next.cluster.restore(map, next.now).unwrap();
    assert_eq!(counted(&next), Processes { awaited: 1, ..Processes::default() }, "it has said nothing to this one yet");
    assert_eq!(next.cluster.moves(), bench.cluster.moves());
}
