//! Pure: reports as text that Prometheus reads (exposition format 0.0.4).

mod coordinator;

pub(crate) use coordinator::to_text as of_coordinator;

use gradwire_ps::{LATENCY_BOUNDS_US, Latencies, Report, Role};
use std::fmt::Write;

/// A metric: its name, kind and help, and a line a value, each with its labels.
struct Family {
    text: String,
    name: &'static str,
}

impl Family {
    fn new(name: &'static str, kind: &str, help: &str) -> Self {
        Self { text: format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"), name }
    }

    fn add(&mut self, labels: &str, value: impl std::fmt::Display) {
        self.add_as("", labels, value);
    }

    fn add_as(&mut self, suffix: &str, labels: &str, value: impl std::fmt::Display) {
        // A string takes all that is written to it.
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = writeln!(self.text, "{}{suffix}{labels} {value}", self.name);
    }
}

/// All metrics of these shards; `None`: one that does not answer.
pub(crate) fn to_text(shards: &[Option<Report>]) -> String {
    let mut up = Family::new("gradwire_up", "gauge", "Whether the shard answers.");
    shards.iter().enumerate().for_each(|(n, report)| up.add(&shard_label(n), u8::from(report.is_some())));
    let answering: Vec<(usize, &Report)> =
        shards.iter().enumerate().filter_map(|(n, report)| Some((n, report.as_ref()?))).collect();
    let families = [vec![up], of_shards(&answering), of_tables(&answering), of_clients(&answering)];
    families.into_iter().flatten().map(|family| family.text).collect()
}

fn shard_label(n: usize) -> String {
    format!("shard=\"{n}\"")
}

fn of_shards(shards: &[(usize, &Report)]) -> Vec<Family> {
    let mut used = Family::new("gradwire_memory_bytes", "gauge", "Bytes in tables and waiting contributions.");
    let mut limit = Family::new("gradwire_memory_limit_bytes", "gauge", "The most that may be taken.");
    let mut clients = Family::new("gradwire_clients", "gauge", "Clients that are connected.");
    let mut refused = Family::new("gradwire_refused_total", "counter", "Requests refused.");
    let mut role = Family::new("gradwire_role", "gauge", "1 for what the server is to a shard of its cluster.");
    let mut log = Family::new("gradwire_log_entries", "gauge", "Entries of the log since the primary became that.");
    let mut lag = Family::new("gradwire_log_lag", "gauge", "Entries of the log that the backup does not have yet.");
    let push = "From a push's arrival to its answer, waiting for other workers included.";
    let mut push = Family::new("gradwire_push_seconds", "histogram", push);
    let mut pull = Family::new("gradwire_pull_seconds", "histogram", "From a pull's arrival to its answer.");
    for (n, report) in shards {
        let shard = shard_label(*n);
        used.add(&shard, report.status.memory_bytes);
        limit.add(&shard, report.status.memory_limit_bytes);
        clients.add(&shard, report.status.clients.len());
        let standing = report.status.standing;
        if standing.role != Role::Alone {
            let of = format!("{shard},of_shard=\"{}\"", standing.shard);
            role.add(&format!("{of},role=\"{}\"", standing.role.name()), 1);
            log.add(&of, standing.log);
            standing.lag().into_iter().for_each(|entries| lag.add(&of, entries));
        }
        for (reason, count) in &report.refused {
            refused.add(&format!("{shard},reason=\"{reason:?}\""), count);
        }
        histogram(&mut push, &shard, &report.push);
        histogram(&mut pull, &shard, &report.pull);
    }
    vec![used, limit, clients, refused, role, log, lag, push, pull]
}

fn histogram(family: &mut Family, labels: &str, latencies: &Latencies) {
    let mut below = 0;
    for (bound, count) in LATENCY_BOUNDS_US.iter().zip(latencies.counts) {
        below += count;
        family.add_as("_bucket", &format!("{labels},le=\"{}\"", *bound as f64 / 1e6), below);
    }
    let all: u64 = latencies.counts.iter().sum();
    family.add_as("_bucket", &format!("{labels},le=\"+Inf\""), all);
    family.add_as("_sum", labels, latencies.total.as_secs_f64());
    family.add_as("_count", labels, all);
}

fn of_tables(shards: &[(usize, &Report)]) -> Vec<Family> {
    let counter = |name, help| Family::new(name, "counter", help);
    let gauge = |name, help| Family::new(name, "gauge", help);
    let mut families = [
        counter("gradwire_pushes_total", "Parts of pushes that were counted."),
        counter("gradwire_pulls_total", "Parts of pulls that were asked for."),
        counter("gradwire_duplicates_total", "Parts of pushes that came again and were not counted."),
        counter("gradwire_pushed_bytes_total", "Payload bytes of pushes, duplicates too."),
        counter("gradwire_pulled_bytes_total", "Bytes of values that were asked for."),
        gauge("gradwire_clock", "The last clock that is complete; asynchronous: pushes applied."),
        gauge("gradwire_waiting", "Requests that wait for other workers."),
        gauge("gradwire_table_bytes", "Memory of the table."),
        gauge("gradwire_table_elements", "Elements, of a sparse table rows, that are here."),
    ];
    for (n, report) in shards {
        let dense = report.status.tables.iter().map(|t| {
            (
                &t.spec.name,
                [t.pushed_bytes, t.pulled_bytes],
                [t.pushes, t.pulls, t.duplicates],
                [t.clock, t.waiting, t.bytes, t.elements],
            )
        });
        let sparse = report.status.sparse.iter().map(|t| {
            (
                &t.spec.name,
                [t.pushed_bytes, t.pulled_bytes],
                [t.pushes, t.pulls, t.duplicates],
                [t.clock, t.waiting, t.bytes, t.rows],
            )
        });
        for (name, bytes, counts, levels) in dense.chain(sparse) {
            let labels = format!("{},table=\"{}\"", shard_label(*n), escaped(name));
            let values = counts.into_iter().chain(bytes).chain(levels);
            families.iter_mut().zip(values).for_each(|(family, value)| family.add(&labels, value));
        }
    }
    families.into()
}

fn of_clients(shards: &[(usize, &Report)]) -> Vec<Family> {
    let mut received = Family::new("gradwire_client_received_bytes_total", "counter", "Payload bytes from the client.");
    let mut sent = Family::new("gradwire_client_sent_bytes_total", "counter", "Payload bytes to the client.");
    let mut idle = Family::new("gradwire_client_idle_seconds", "gauge", "Time since the client's last request.");
    let help = "Bytes of the client's contributions that wait for others.";
    let mut waiting = Family::new("gradwire_client_waiting_bytes", "gauge", help);
    for (n, report) in shards {
        let numbers = report.idle.iter().zip(&report.waiting_bytes);
        for (client, (since, bytes)) in report.status.clients.iter().zip(numbers) {
            let (shard, number, host) = (shard_label(*n), client.client, escaped(&client.host));
            let labels = format!("{shard},client=\"{number}\",host=\"{host}\",pid=\"{}\"", client.pid);
            received.add(&labels, client.received_bytes);
            sent.add(&labels, client.sent_bytes);
            idle.add(&labels, since.as_secs_f64());
            waiting.add(&labels, bytes);
        }
    }
    vec![received, sent, idle, waiting]
}

/// A name as a label's value.
fn escaped(name: &str) -> String {
    name.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradwire_ps::{Epoch, ShardStatus, Standing};

    #[test]
    fn a_hostile_name_stays_within_its_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn a_primary_tells_what_its_backup_lacks_and_a_server_by_itself_tells_of_no_log() {
        let standing = Standing { role: Role::Primary, shard: 3, epoch: Epoch(4), log: 9, backup: Some(7) };
        let report = |standing| Report {
            status: ShardStatus { standing, ..ShardStatus::default() },
            push: Latencies::default(),
            pull: Latencies::default(),
            refused: Vec::new(),
            idle: Vec::new(),
            waiting_bytes: Vec::new(),
        };
        let text = to_text(&[Some(report(standing)), Some(report(Standing { backup: None, ..standing }))]);
        assert!(text.contains("gradwire_role{shard=\"0\",of_shard=\"3\",role=\"primary\"} 1\n"), "{text}");
        assert!(text.contains("gradwire_log_lag{shard=\"0\",of_shard=\"3\"} 2\n"), "{text}");
        assert!(!text.contains("gradwire_log_lag{shard=\"1\""), "without a backup there is no lag");
        assert!(!to_text(&[Some(report(Standing::default()))]).contains("gradwire_log_entries{"));
    }

    #[test]
    fn a_shard_that_does_not_answer_is_told_to_be_down() {
        assert!(to_text(&[None]).contains("gradwire_up{shard=\"0\"} 0\n"));
    }
}
