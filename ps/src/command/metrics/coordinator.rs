//! Pure: the report of a coordinator as metrics: who is there, and which shards have somebody.

use super::Family;
use gradwire_ps::{CoordinatorReport, ShardSeats};

/// All metrics of a coordinator; `None`: it does not answer. One that does not lead knows nothing of the cluster, and says so.
pub(crate) fn to_text(report: Option<&CoordinatorReport>) -> String {
    let mut up = gauge("gradwire_coordinator_up", "Whether the coordinator answers.");
    up.add("", u8::from(report.is_some()));
    let Some(report) = report else { return up.text };
    let mut leads = gauge("gradwire_coordinator_leads", "Whether it decides: of several, one does.");
    leads.add("", u8::from(report.leads));
    let moves = report.moves;
    let [mut fail_overs, mut hand_overs, mut losses] = [
        counter(
            "gradwire_coordinator_fail_overs_total",
            "Backups that took over as the primary was gone, by this coordinator's decision.",
        ),
        counter("gradwire_coordinator_hand_overs_total", "Backups that took over as the primary was to end."),
        counter(
            "gradwire_coordinator_losses_total",
            "Shards that began anew without what they held, as all who had it were gone.",
        ),
    ];
    for (family, count) in
        [(&mut fail_overs, moves.fail_overs), (&mut hand_overs, moves.hand_overs), (&mut losses, moves.losses)]
    {
        family.add("", count);
    }
    let mut families = vec![up, leads, fail_overs, hand_overs, losses];
    if report.leads {
        families.extend(of_cluster(report));
    }
    families.into_iter().map(|family| family.text).collect()
}

fn gauge(name: &'static str, help: &str) -> Family {
    Family::new(name, "gauge", help)
}

fn counter(name: &'static str, help: &str) -> Family {
    Family::new(name, "counter", help)
}

fn of_cluster(report: &CoordinatorReport) -> Vec<Family> {
    let (map, processes) = (&report.map, report.processes);
    let mut epoch = gauge("gradwire_coordinator_epoch", "Version of the map.");
    epoch.add("", map.epoch.0);
    let mut wanted = gauge("gradwire_coordinator_replicas", "Copies that each shard shall have beside its primary.");
    wanted.add("", map.replicas);
    let mut servers = gauge("gradwire_coordinator_servers", "Server processes by what they are to the cluster.");
    for (state, count) in [
        ("serving", processes.serving),
        ("spare", processes.spare),
        ("leaving", processes.leaving),
        ("awaited", processes.awaited),
    ] {
        servers.add(&format!("state=\"{state}\""), count);
    }
    let mut spare = gauge("gradwire_coordinator_spare_seats", "Seats without a part of a shard.");
    spare.add("", report.spare_seats);
    let mut shards = gauge(
        "gradwire_coordinator_shards",
        "Shards by state: whole, short of copies, not formed yet, or without an owner.",
    );
    let nobody = ShardSeats::default();
    for state in ["whole", "short", "forming", "without_owner"] {
        // Before the cluster has begun there is none in the map.
        let all = (0..report.shards as usize).map(|shard| map.shards.get(shard).unwrap_or(&nobody));
        let count = all.filter(|seats| state_of(seats, map.replicas) == state).count();
        shards.add(&format!("state=\"{state}\""), count);
    }
    vec![epoch, wanted, servers, spare, shards]
}

/// What a shard is, to whoever must act.
fn state_of(seats: &ShardSeats, replicas: u32) -> &'static str {
    match (&seats.primary, seats.formed) {
        (None, _) => "without_owner",
        (Some(_), false) => "forming",
        (Some(_), true) if seats.backups.len() < replicas as usize => "short",
        (Some(_), true) => "whole",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradwire_ps::{ClusterMap, Epoch, Moves, Processes, Seating};

    fn report(leads: bool) -> CoordinatorReport {
        let seating = |seat| Seating { seat, process: seat, address: format!("10.0.0.{seat}:7000") };
        let whole =
            ShardSeats { primary: Some(seating(1)), backups: vec![seating(2)], formed: true, ..ShardSeats::default() };
        let short = ShardSeats { backups: Vec::new(), ..whole.clone() };
        let forming = ShardSeats { formed: false, ..short.clone() };
        let map = ClusterMap { epoch: Epoch(9), replicas: 1, shards: vec![whole, short, forming], leaving: vec![] };
        CoordinatorReport {
            leads,
            map,
            shards: 4,
            processes: Processes { serving: 2, leaving: 1, ..Processes::default() },
            spare_seats: 3,
            moves: Moves { fail_overs: 5, ..Moves::default() },
        }
    }

    #[test]
    fn each_shard_is_in_one_state_and_each_server_too() {
        let text = to_text(Some(&report(true)));
        for line in [
            "up 1",
            "leads 1",
            "epoch 9",
            "replicas 1",
            "fail_overs_total 5",
            "losses_total 0",
            "spare_seats 3",
            "servers{state=\"serving\"} 2",
            "servers{state=\"leaving\"} 1",
            "servers{state=\"spare\"} 0",
            "shards{state=\"whole\"} 1",
            "shards{state=\"short\"} 1",
            "shards{state=\"forming\"} 1",
            "shards{state=\"without_owner\"} 1",
        ] {
            assert!(text.contains(&format!("\ngradwire_coordinator_{line}\n")), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn one_that_does_not_lead_tells_of_no_cluster_and_one_that_is_silent_is_down() {
        let text = to_text(Some(&report(false)));
        assert!(text.contains("gradwire_coordinator_leads 0\n") && !text.contains("_shards"), "{text}");
        assert!(to_text(None).ends_with("gradwire_coordinator_up 0\n"));
    }
}
