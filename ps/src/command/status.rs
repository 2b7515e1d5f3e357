//! Does: `gradwire-ps status`: prints what running servers hold, as tables or as JSON.

mod cluster;

use super::servers::Servers;
use super::show_bytes;
use clap::Args;
use gradwire_ps::{ClientSettings, ClusterMap, Compression, ShardStatus, SparseStatus, TableStatus};
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;

/// Flags of `status`.
#[derive(Args)]
pub(crate) struct Status {
    #[command(flatten)]
    servers: Servers,
    /// Seconds to wait for the servers
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    timeout: u64,
    /// Print JSON: a list with an object a shard
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(crate) fn run(self) -> Result<(), String> {
        let timeout = Duration::from_secs(self.timeout);
        let settings = ClientSettings { timeout, reconnect: timeout, ..ClientSettings::default() };
        let map = self.servers.map(settings.clone())?;
        // Of a cluster that is not complete yet, only the map can be told.
        let addresses = map.as_ref().map_or_else(|| Some(self.servers.addresses.clone()), ClusterMap::addresses);
        let status = match &addresses {
            Some(_) => self.servers.connect(settings)?.status().map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        let addresses = addresses.unwrap_or_default();
        let shards = status.iter().zip(&addresses).map(|(shard, address)| to_json(shard, address));
        let mut out = std::io::stdout().lock();
        let written = match (&map, self.json) {
            (None, true) => writeln!(out, "{}", Value::from(shards.collect::<Vec<_>>())),
            (Some(map), true) => writeln!(out, "{}", cluster::to_json(map, &status, shards.collect())),
            (None, false) => write!(out, "{}", to_text(&status, &addresses)),
            (Some(map), false) => write!(out, "{}{}", cluster::to_text(map, &status), to_text(&status, &addresses)),
        };
        written.map_err(|error| format!("writing the status: {error}"))
    }
}

fn sparse_to_json(table: &SparseStatus) -> Value {
    json!({
        "name": table.spec.name,
        "dim": table.spec.dim,
        "dtype": table.spec.dtype.name(),
        "rule": table.spec.rule.to_string(),
        "mode": table.spec.mode.to_string(),
        "recovery": table.spec.recovery.to_string(),
        "rows": table.rows,
        "capacity": table.spec.share(),
        "bytes": table.bytes,
        "clock": table.clock,
        "pushes": table.pushes,
        "pulls": table.pulls,
        "duplicates": table.duplicates,
        "waiting": table.waiting,
        "compression": table.spec.compression.to_string(),
        "max_grad_norm": table.spec.max_grad_norm,
        "pushed_bytes": table.pushed_bytes,
        "pulled_bytes": table.pulled_bytes,
        "evicted": table.evicted,
        "unadmitted": table.unadmitted,
    })
}

fn to_json(shard: &ShardStatus, address: &str) -> Value {
    let tables = shard.tables.iter().map(|table| {
        json!({
            "name": table.spec.name,
            "shape": table.spec.shape,
            "dtype": table.spec.dtype.name(),
            "rule": table.spec.rule.to_string(),
            "mode": table.spec.mode.to_string(),
            "recovery": table.spec.recovery.to_string(),
            "elements": table.elements,
            "bytes": table.bytes,
            "clock": table.clock,
            "pushes": table.pushes,
            "pulls": table.pulls,
            "duplicates": table.duplicates,
            "waiting": table.waiting,
            "compression": table.spec.compression.to_string(),
            "clipped": table.spec.clipped,
            "pushed_bytes": table.pushed_bytes,
            "pushed_whole_bytes": table.pushed_whole_bytes,
            "pulled_bytes": table.pulled_bytes,
            "pulled_whole_bytes": table.pulled_whole_bytes,
        })
    });
    let sparse = shard.sparse.iter().map(sparse_to_json);
    let clients = shard.clients.iter().map(|client| {
        json!({
            "client": client.client,
            "host": client.host,
            "pid": client.pid,
            "address": client.address,
            "received_bytes": client.received_bytes,
            "sent_bytes": client.sent_bytes,
        })
    });
    json!({
        "address": address,
        "memory_bytes": shard.memory_bytes,
        "memory_limit_bytes": shard.memory_limit_bytes,
        "tables": tables.collect::<Vec<_>>(),
        "sparse": sparse.collect::<Vec<_>>(),
        "clients": clients.collect::<Vec<_>>(),
    })
}

/// The heads of columns.
const TABLES: [&str; 17] = [
    "SHARD",
    "TABLE",
    "SHAPE",
    "DTYPE",
    "MODE",
    "RULE",
    "COMPRESSION",
    "CLIPPED",
    "HERE",
    "MEMORY",
    "CLOCK",
    "PUSHES",
    "PULLS",
    "AGAIN",
    "WAITING",
    "PUSHED",
    "PULLED",
];
const SPARSE: [&str; 17] = [
    "SHARD",
    "SPARSE TABLE",
    "DIM",
    "DTYPE",
    "MODE",
    "RULE",
    "COMPRESSION",
    "MAX GRAD NORM",
    "ROWS",
    "MEMORY",
    "CLOCK",
    "PUSHES",
    "PULLS",
    "AGAIN",
    "WAITING",
    "EVICTED",
    "UNADMITTED",
];

fn to_text(status: &[ShardStatus], addresses: &[String]) -> String {
    let (mut tables, mut sparse) = (vec![row(TABLES)], vec![row(SPARSE)]);
    let mut clients = vec![row(["SHARD", "CLIENT", "HOST", "PID", "ADDRESS", "RECEIVED", "SENT"])];
    let mut text = String::new();
    for (n, (shard, address)) in status.iter().zip(addresses).enumerate() {
        let (used, limit) = (show_bytes(shard.memory_bytes), show_bytes(shard.memory_limit_bytes));
        text += &format!("shard {n} at {address}: {used} of {limit} in use\n");
        tables.extend(shard.tables.iter().map(|table| table_row(n, table)));
        sparse.extend(shard.sparse.iter().map(|table| sparse_row(n, table)));
        for client in &shard.clients {
            let worker = if client.client >> 32 == 0 { client.client.to_string() } else { "-".to_owned() };
            clients.push(row([
                &n.to_string(),
                &worker,
                &client.host,
                &client.pid.to_string(),
                &client.address,
                &show_bytes(client.received_bytes),
                &show_bytes(client.sent_bytes),
            ]));
        }
    }
    let lists = [tables, sparse, clients];
    lists.iter().filter(|list| list.len() > 1).fold(text, |text, list| text + "\n" + &aligned(list))
}

fn table_row(shard: usize, table: &TableStatus) -> Vec<String> {
    let (spec, rule) = (&table.spec, table.spec.rule.to_string());
    row([
        &shard.to_string(),
        &spec.name,
        &format!("{:?}", spec.shape),
        spec.dtype.name(),
        &spec.mode.to_string(),
        rule.split('(').next().unwrap_or(&rule),
        &shortened(spec.compression),
        // By which norm, over which tables, their workers know.
        if spec.clipped { "yes" } else { "no" },
        &table.elements.to_string(),
        &show_bytes(table.bytes),
        &table.clock.to_string(),
        &table.pushes.to_string(),
        &table.pulls.to_string(),
        &table.duplicates.to_string(),
        &table.waiting.to_string(),
        &travelled(table.pushed_bytes, table.pushed_whole_bytes),
        &travelled(table.pulled_bytes, table.pulled_whole_bytes),
    ])
}

/// How a table travels: one word where both ways are alike.
fn shortened(compression: Compression) -> String {
    let Compression { push, pull } = compression;
    if push == pull { push.to_string() } else { compression.to_string() }
}

/// Bytes that travelled, and how many they stood for where these are not as many.
fn travelled(bytes: u64, whole: u64) -> String {
    if bytes == whole { show_bytes(bytes) } else { format!("{} for {}", show_bytes(bytes), show_bytes(whole)) }
}

fn sparse_row(shard: usize, table: &SparseStatus) -> Vec<String> {
    let (spec, rule) = (&table.spec, table.spec.rule.to_string());
    row([
        &shard.to_string(),
        &spec.name,
        &spec.dim.to_string(),
        spec.dtype.name(),
        &spec.mode.to_string(),
        rule.split('(').next().unwrap_or(&rule),
        &shortened(spec.compression),
        &spec.max_grad_norm.map_or("none".to_owned(), |most| most.to_string()),
        &table.rows.to_string(),
        &show_bytes(table.bytes),
        &table.clock.to_string(),
        &table.pushes.to_string(),
        &table.pulls.to_string(),
        &table.duplicates.to_string(),
        &table.waiting.to_string(),
        &table.evicted.to_string(),
        &table.unadmitted.to_string(),
    ])
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Rows with their columns below each other.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}
