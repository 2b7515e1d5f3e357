//! Does: times pushes while a checkpoint is written and while none is, in turns.

use super::{EXACT, Options, PATIENCE, element, settings, way};
use crate::collective::Way;
use crate::machine;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use gradwire_ps::{Checkpoints, Client, ClientSettings, DType, DenseTable, LocalServers, ServerSettings, TableOptions};
use gradwire_transport::Region;
use serde::Serialize;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often each of both has its turn.
const TURNS: usize = 5;
/// Bytes of a table: of so many at least a state is made, and they are pushed to one after the other.
const TABLE_BYTES: usize = 16 << 20;
/// The shortest turn without a checkpoint; the others are as long as the last checkpoint took.
const SHORTEST: Duration = Duration::from_millis(200);

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    /// This one, and the process with the servers.
    ranks: u32,
    shards: u32,
    operation: &'static str,
    dtype: &'static str,
    bytes: usize,
    tables: usize,
    turns: usize,
    /// The median time of a checkpoint, and the least it wrote.
    snapshot_s: f64,
    snapshot_bytes: u64,
    pushes: usize,
    /// Of a push while a checkpoint is written, and while none is.
    p50_us: f64,
    p99_us: f64,
    without_p50_us: f64,
    without_p99_us: f64,
    /// How much less is pushed a second while a checkpoint is written, from 0 to 1: the median of the turns.
    slower: f64,
}

struct Tables {
    all: Vec<DenseTable>,
    gradient: Arc<Region>,
    pushes: Vec<usize>,
    next: usize,
}

/// Measures a state of each size on the servers at `addresses`, which keep checkpoints in `folder`.
pub(super) fn run(
    addresses: &[String],
    folder: &Path,
    options: &Options,
    report: &Report,
) -> Result<(), Box<dyn Error>> {
    let Options { bytes: sizes, json, wire, .. } = options;
    let (json, wire) = (*json, *wire);
    let shards = crate::plural(options.shards, "shard");
    let title = format!("parameter server: pushes while a checkpoint is written, and without, {shards}, {}", way(wire));
    if !json {
        println!("{title}; {}", machine::described());
        println!(
            "{:>12} {:>7} {:>11} {:>12} {:>12} {:>12} {:>12} {:>8}",
            "bytes", "tables", "snapshot s", "p50 us", "p99 us", "with p50 us", "with p99 us", "slower"
        );
    }
    let mut rows = Vec::new();
    let progress = Progress::start(sizes.len() * (TURNS + 1));
    for &bytes in sizes {
        let row = measure((addresses, wire), folder, bytes, &progress)?;
        if json {
            println!("{}", serde_json::to_string(&row)?);
        } else {
            let Row { tables, snapshot_s, without_p50_us, without_p99_us, p50_us, p99_us, slower, .. } = row;
            println!(
                "{bytes:>12} {tables:>7} {snapshot_s:>11.2} {without_p50_us:>12.1} {without_p99_us:>12.1} {p50_us:>12.1} {p99_us:>12.1} {slower:>8.3}"
            );
        }
        rows.push(row);
    }
    drop(progress);
    report.add(|| section(options, &title, &rows))
}

fn section(options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let line = |name: &str, value: fn(&Row) -> f64| Series {
        name: name.to_owned(),
        points: rows.iter().map(|row| (row.bytes as f64, value(row))).collect(),
    };
    let times = vec![
        line("p50", |row| row.without_p50_us),
        line("p99", |row| row.without_p99_us),
        line("p50, checkpoint", |row| row.p50_us),
        line("p99, checkpoint", |row| row.p99_us),
    ];
    let kept = line("with a checkpoint", |row| 1.0 - row.slower);
    let (title_of_kept, x) = ("Pushes a second beside a checkpoint".to_owned(), "bytes of the state".to_owned());
    let y = "of those without".to_owned();
    let charts = vec![
        Chart::by_bytes("Time of a push, by bytes of the state", "µs", times),
        Chart::by_bytes("Time of a checkpoint", "s", vec![line("snapshot", |row| row.snapshot_s)]),
        Chart { title: title_of_kept, x, y, x_log: true, y_log: false, series: vec![kept] },
    ];
    let id = format!("ps-snapshot-{}-shards-{}", options.shards, options.wire.name());
    Section::new(id, title, charts, rows)
}

fn measure(
    (addresses, wire): (&[String], Way),
    folder: &Path,
    bytes: usize,
    progress: &Progress,
) -> Result<Row, Box<dyn Error>> {
    let (client, asking) = (Client::connect(addresses, settings(wire))?, Client::connect(addresses, settings(wire))?);
    let mut tables = Tables::open(&client, bytes)?;
    (0..tables.all.len()).try_for_each(|_| tables.push().map(drop))?;
    let mut length = SHORTEST;
    let (mut without, mut with, mut ratios, mut written) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // The first turn warms up: memory for copies is new to the servers then.
    for turn in 0..=TURNS {
        progress.next(format!("a state of {bytes} bytes"));
        let until = Instant::now() + length;
        let alone = tables.push_while(|| Instant::now() < until)?;
        let (disturbed, checkpoint) = std::thread::scope(|scope| {
            let snapshot = scope.spawn(|| asking.snapshot(PATIENCE));
            let times = tables.push_while(|| !snapshot.is_finished());
            (times, snapshot.join())
        });
        let (disturbed, checkpoint) = (disturbed?, checkpoint.map_err(|_| "the asking thread panicked")??);
        length = checkpoint.took.max(SHORTEST);
        if turn > 0 {
            let rate = |times: &[f64]| times.len() as f64 / times.iter().sum::<f64>();
            ratios.push(1.0 - rate(&disturbed) / rate(&alone));
            without.extend(alone);
            with.extend(disturbed);
            written.push(checkpoint);
        }
    }
    tables.check()?;
    client.close();
    asking.close();
    let shards = u32::try_from(addresses.len())?;
    verify(folder, shards, &tables, &written.last().ok_or("no turn, no checkpoint")?.name)?;
    let (without, with) = (sorted(without), sorted(with));
    let took = sorted(written.iter().map(|checkpoint| checkpoint.took.as_secs_f64()).collect());
    Ok(Row {
        host: machine::host(),
        wire: wire.name(),
        ranks: 2,
        shards,
        operation: "push",
        dtype: "float32",
        bytes,
        tables: tables.all.len(),
        turns: TURNS,
        snapshot_s: percentile(&took, 50),
        snapshot_bytes: written.iter().map(|checkpoint| checkpoint.bytes).min().unwrap_or(0),
        pushes: without.len() + with.len(),
        p50_us: percentile(&with, 50),
        p99_us: percentile(&with, 99),
        without_p50_us: percentile(&without, 50),
        without_p99_us: percentile(&without, 99),
        slower: percentile(&sorted(ratios), 50),
    })
}

impl Tables {
    fn open(client: &Client, bytes: usize) -> Result<Self, Box<dyn Error>> {
        let count = bytes.div_ceil(TABLE_BYTES);
        let each = bytes / count / 4;
        let open = |n| client.dense(&format!("bench-{bytes}-{n}"), &[each], DType::F32, TableOptions::default());
        let all = (0..count).map(open).collect::<Result<Vec<_>, _>>()?;
        let gradient = Region::from_vec((0..each).flat_map(|i| element(i).to_le_bytes()).collect());
        Ok(Self { pushes: vec![0; all.len()], all, gradient, next: 0 })
    }

    /// Pushes to the next table; how many microseconds it took.
    fn push(&mut self) -> Result<f64, Box<dyn Error>> {
        let at = self.next % self.all.len();
        let began = Instant::now();
        self.all[at].push(self.gradient.read(0..self.gradient.len())?)?.wait(None)?;
        self.next += 1;
        self.pushes[at] += 1;
        if self.pushes[at] > EXACT / 61 {
            return Err("a larger state, please: the sums would no longer be exact, and could not be checked".into());
        }
        Ok(began.elapsed().as_secs_f64() * 1e6)
    }

    fn push_while(&mut self, go_on: impl Fn() -> bool) -> Result<Vec<f64>, Box<dyn Error>> {
        let mut times = vec![self.push()?];
        while go_on() {
            times.push(self.push()?);
        }
        Ok(times)
    }

    /// Every element of every table is the sum of as many pushes as were made.
    fn check(&self) -> Result<(), Box<dyn Error>> {
        let values = Region::zeroed(self.gradient.len());
        for (table, &pushes) in self.all.iter().zip(&self.pushes) {
            table.pull(values.write(0..values.len())?)?.wait(None)?;
            are_sums(&values, &[pushes])?;
        }
        Ok(())
    }
}

/// Every element is the sum of one of these numbers of pushes.
fn are_sums(values: &Arc<Region>, pushes: &[usize]) -> Result<(), Box<dyn Error>> {
    for (i, four) in values.read(0..values.len())?.as_chunks::<4>().0.iter().enumerate() {
        let got = f32::from_le_bytes(*four);
        if !pushes.iter().any(|&pushes| got == element(i) * pushes as f32) {
            return Err(format!("element {i} is {got}, which is not {} times one of {pushes:?}", element(i)).into());
        }
    }
    Ok(())
}

/// Every element of the checkpoint holds whole pushes: as many as one of the shards says, or one more, where the cut came in the
/// middle of a push, since each shard takes an asynchronous table as it is.
fn verify(folder: &Path, shards: u32, tables: &Tables, name: &str) -> Result<(), Box<dyn Error>> {
    let place = folder.to_str().ok_or("the folder's path is not UTF-8")?.to_owned();
    let settings = ServerSettings { checkpoints: Some(Checkpoints { place, keep: 1 }), ..ServerSettings::default() };
    let (servers, _) = LocalServers::restore(shards, settings, Some(name))?;
    let client = Client::connect(servers.addresses(), ClientSettings::default())?;
    let told = client.status()?;
    let values = Region::zeroed(tables.gradient.len());
    for known in &tables.all {
        let table = client.dense(known.name(), &[values.len() / 4], DType::F32, TableOptions::default())?;
        table.pull(values.write(0..values.len())?)?.wait(None)?;
        let here = told.iter().flat_map(|shard| &shard.tables).filter(|table| table.spec.name == known.name());
        let pushes: Vec<usize> =
            here.filter_map(|table| usize::try_from(table.clock).ok()).flat_map(|n| [n, n + 1]).collect();
        are_sums(&values, &pushes)?;
    }
    client.close();
    servers.stop();
    Ok(())
}
