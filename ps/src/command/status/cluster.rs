//! Pure: who serves which shard of a cluster, and how far its backups are, as a table or as JSON.

use super::{aligned, row};
use gradwire_ps::{ClusterMap, Seating, ShardStatus};
use serde_json::{Value, json};

/// An object a shard, with what `holds` tells of its primary where that answered.
pub(super) fn to_json(map: &ClusterMap, status: &[ShardStatus], holds: Vec<Value>) -> Value {
    let mut holds = holds.into_iter();
    let shards = map.shards.iter().enumerate().map(|(shard, seats)| {
        let of = |who: &Option<Seating>| who.as_ref().map(|who| who.address.clone());
        let standing = status.get(shard).map(|status| status.standing);
        json!({
            "shard": shard,
            "epoch": map.epoch.0,
            "since_epoch": seats.term.0,
            "primary": of(&seats.primary),
            "primary_leaves": leaves(map, &seats.primary),
            "backups": seats.backups.iter().map(|who| &*who.address).collect::<Vec<_>>(),
            "candidate": of(&seats.candidate),
            "log": standing.map(|standing| standing.log),
            "backups_have": standing.and_then(|standing| standing.backup),
            "lag": standing.and_then(|standing| standing.lag()),
            "holds": holds.next(),
        })
    });
    Value::from(shards.collect::<Vec<_>>())
}

/// A line a shard. The log counts from the epoch since which its primary is that.
pub(super) fn to_text(map: &ClusterMap, status: &[ShardStatus]) -> String {
    let mut rows = vec![row(["SHARD", "PRIMARY", "BACKUPS", "SINCE EPOCH", "LOG", "BACKUPS HAVE"])];
    for (shard, seats) in map.shards.iter().enumerate() {
        let of = |who: &Option<Seating>| who.as_ref().map_or("none", |who| &*who.address).to_owned();
        let candidate = seats.candidate.as_ref().map(|who| format!("{} (on its way)", who.address));
        let backups: Vec<String> = seats.backups.iter().map(|who| who.address.clone()).chain(candidate).collect();
        let backups = if backups.is_empty() { "none".to_owned() } else { backups.join(", ") };
        let standing = status.get(shard).map(|status| status.standing);
        let number = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let (log, has) = (number(standing.map(|it| it.log)), number(standing.and_then(|it| it.backup)));
        let primary = of(&seats.primary) + if leaves(map, &seats.primary) { " (drained)" } else { "" };
        rows.push(row([&shard.to_string(), &primary, &backups, &seats.term.0.to_string(), &log, &has]));
    }
    format!("epoch {}, missing: {}\n\n{}\n", map.epoch.0, map.missing(), aligned(&rows))
}

/// Whether a server was told to hand over what it has.
fn leaves(map: &ClusterMap, who: &Option<Seating>) -> bool {
    who.as_ref().is_some_and(|who| map.leaving.contains(&who.process))
}
