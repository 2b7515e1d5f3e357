//! Does: times pushes and pulls of a sparse table by random ids, over the wire; every row that comes is looked at.

use super::{Options, WARM_UP, settings, way};
use crate::chance::mixed;
use crate::collective::Way;
use crate::machine;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use gradwire_ps::{Client, DType, SparseOptions, SparseTable};
use gradwire_transport::Region;
use serde::Serialize;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows that one call makes, before anything is timed.
const MADE_AT_ONCE: u64 = 1 << 14;
/// What elements are made of: sums of so small numbers stay exact.
const NUMBERS: u64 = 61;

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    /// This one, and the process with the servers.
    ranks: u32,
    shards: u32,
    operation: &'static str,
    dtype: &'static str,
    rows: u64,
    dim: usize,
    ids: usize,
    /// Of the values, or gradients, of a call.
    bytes: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    /// By the median.
    rows_per_s: f64,
    /// Of values, or gradients, without ids.
    goodput_gb_per_s: f64,
}

/// Values of a call.
const MOST_BYTES: u64 = 1 << 30;
const OPERATIONS: [&str; 2] = ["sparse_pull", "sparse_push"];

/// Makes a table of so many rows on the servers at `addresses`, measures, and prints a line for each operation and number of ids.
pub(super) fn run(
    addresses: &[String],
    table_rows: u64,
    options: &Options,
    report: &Report,
) -> Result<(), Box<dyn Error>> {
    let &Options { json, wire, shards, dim, .. } = options;
    let most = options.ids.iter().max().map_or(0, |ids| 4 * u64::from(dim) * u64::from(*ids));
    if most > MOST_BYTES {
        return Err(format!(
            "a call would have {most} bytes, of at most {MOST_BYTES}: give fewer --ids, or a smaller --dim"
        )
        .into());
    }
    let pushes: u64 = options.ids.iter().map(|ids| (rounds(options, *ids) + WARM_UP) as u64 * u64::from(*ids)).sum();
    if pushes > u64::from(u16::MAX) * table_rows / 2 {
        return Err("fewer rounds, please: some row would be pushed to more often than can be counted".into());
    }
    let client = Client::connect(addresses, settings(wire))?;
    let mut table = Sparse::open(&client, table_rows, dim as usize)?;
    let progress = Progress::start(1 + OPERATIONS.len() * options.ids.len());
    table.make(&progress)?;
    let of = crate::plural(shards, "shard");
    let title =
        format!("parameter server: a sparse float32 table of {table_rows} rows of {dim} on {of}, {}", way(wire));
    if !json {
        println!("{title}; {}", machine::described());
        println!(
            "{:>12} {:>8} {:>7} {:>11} {:>11} {:>12} {:>13}",
            "operation", "ids", "rounds", "p50 us", "p99 us", "M rows/s", "goodput GB/s"
        );
    }
    let mut rows = Vec::new();
    for &ids in &options.ids {
        table.take(ids as usize);
        for operation in OPERATIONS {
            progress.next(format!("{operation} of {ids} ids"));
            let row = table.measure(operation, (wire, shards), rounds(options, ids))?;
            print(&row, json)?;
            rows.push(row);
        }
        table.pull()?;
    }
    client.close();
    drop(progress);
    report.add(|| section(options, &title, &rows))
}

/// Fewer of calls with more than 1 MiB.
fn rounds(options: &Options, ids: u32) -> usize {
    let bytes = 4 * options.dim as usize * ids as usize;
    (options.rounds * (1 << 20) / bytes).clamp(10, options.rounds.max(10))
}

fn print(row: &Row, json: bool) -> Result<(), Box<dyn Error>> {
    if json {
        println!("{}", serde_json::to_string(row)?);
        return Ok(());
    }
    let Row { operation, ids, rounds, p50_us, p99_us, rows_per_s, goodput_gb_per_s, .. } = row;
    let millions = rows_per_s / 1e6;
    println!(
        "{operation:>12} {ids:>8} {rounds:>7} {p50_us:>11.1} {p99_us:>11.1} {millions:>12.3} {goodput_gb_per_s:>13.3}"
    );
    Ok(())
}

fn section(options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let lines = |value: fn(&Row) -> f64, what: &str| {
        OPERATIONS.map(|operation| {
            let mine = rows.iter().filter(|row| row.operation == operation);
            let points = mine.map(|row| (row.bytes as f64, value(row))).collect();
            Series { name: format!("{operation}{what}"), points }
        })
    };
    let times = [lines(|row| row.p50_us, ", p50"), lines(|row| row.p99_us, ", p99")].concat();
    let charts = vec![
        Chart::by_bytes("Time of a call, by bytes of values", "µs", times),
        Chart::by_bytes("Rows a second, by bytes of values", "rows/s", lines(|row| row.rows_per_s, "").into()),
        Chart::by_bytes("Goodput, by bytes of values", "GB/s", lines(|row| row.goodput_gb_per_s, "").into()),
    ];
    Section::new(format!("ps-sparse-{}-shards-{}", options.shards, options.wire.name()), title, charts, rows)
}

/// A table, and what ought to be in it.
struct Sparse {
    table: SparseTable,
    rows: u64,
    dim: usize,
    /// How often each row was pushed to.
    pushes: Vec<u16>,
    /// Of one call.
    ids: Vec<u64>,
    gradients: Arc<Region>,
    values: Arc<Region>,
    seed: u64,
}

impl Sparse {
    fn open(client: &Client, rows: u64, dim: usize) -> Result<Self, Box<dyn Error>> {
        let table = client.sparse("bench-sparse", dim, DType::F32, SparseOptions::default())?;
        Ok(Self {
            table,
            rows,
            dim,
            pushes: vec![0; usize::try_from(rows)?],
            ids: Vec::new(),
            gradients: Region::zeroed(0),
            values: Region::zeroed(0),
            seed: 0,
        })
    }

    /// Calls have so many ids from now on.
    fn take(&mut self, ids: usize) {
        let bytes = 4 * self.dim * ids;
        self.ids = vec![0; ids];
        (self.gradients, self.values) = (Region::zeroed(bytes), Region::zeroed(bytes));
    }

    /// Pushes to each row once: it is there then.
    fn make(&mut self, progress: &Progress) -> Result<(), Box<dyn Error>> {
        progress.next("making rows".to_owned());
        for first in (0..self.rows).step_by(MADE_AT_ONCE as usize) {
            progress.at(format!("{first} of {} rows are made", self.rows));
            let ids: Vec<u64> = (first..self.rows.min(first + MADE_AT_ONCE)).collect();
            let gradients = Region::zeroed(4 * self.dim * ids.len());
            self.push(&ids, &gradients)?;
        }
        Ok(())
    }

    /// A push of each row's own numbers, and how long it took.
    fn push(&mut self, ids: &[u64], gradients: &Arc<Region>) -> Result<Duration, Box<dyn Error>> {
        let all = 0..gradients.len();
        let mut to = gradients.write(all.clone())?;
        for (row, id) in to.chunks_exact_mut(4 * self.dim).zip(ids) {
            row.as_chunks_mut().0.iter_mut().zip(0..).for_each(|(four, at)| *four = element(*id, at).to_le_bytes());
            self.pushes[*id as usize] += 1;
        }
        drop(to);
        let ids = region(ids);
        let (ids, gradients) = (ids.read(0..ids.len())?, gradients.read(all)?);
        let began = Instant::now();
        self.table.push(&ids, &gradients)?.wait(None)?;
        Ok(began.elapsed())
    }

    /// A pull of the ids of the last call, whose rows are checked, and how long it took.
    fn pull(&mut self) -> Result<Duration, Box<dyn Error>> {
        let (ids, all) = (region(&self.ids), 0..self.values.len());
        let asked = ids.read(0..ids.len())?;
        let began = Instant::now();
        self.table.pull(&asked, self.values.write(all.clone())?)?.wait(None)?;
        let took = began.elapsed();
        for (row, id) in self.values.read(all)?.chunks_exact(4 * self.dim).zip(&self.ids) {
            let pushes = f32::from(self.pushes[*id as usize]);
            for (four, at) in row.as_chunks::<4>().0.iter().zip(0..) {
                let (got, expected) = (f32::from_le_bytes(*four), element(*id, at) * pushes);
                if got != expected {
                    return Err(
                        format!("element {at} of row {id} is {got} after {pushes} pushes, not {expected}").into()
                    );
                }
            }
        }
        Ok(took)
    }

    fn draw(&mut self) {
        let Self { ids, rows, seed, .. } = self;
        for id in ids {
            *seed = seed.wrapping_add(1);
            *id = mixed(*seed) % *rows;
        }
    }

    fn measure(
        &mut self,
        operation: &'static str,
        (wire, shards): (Way, u32),
        rounds: usize,
    ) -> Result<Row, Box<dyn Error>> {
        let mut took = Vec::new();
        for round in 0..rounds + WARM_UP {
            self.draw();
            let call = if operation == "sparse_push" {
                let (ids, gradients) = (self.ids.clone(), Arc::clone(&self.gradients));
                let call = self.push(&ids, &gradients)?;
                if round < WARM_UP {
                    self.pull()?;
                }
                call
            } else {
                self.pull()?
            };
            if round >= WARM_UP {
                took.push(call.as_secs_f64() * 1e6);
            }
        }
        let (took, ids, dim) = (sorted(took), self.ids.len(), self.dim);
        let p50_us = percentile(&took, 50);
        Ok(Row {
            host: machine::host(),
            wire: wire.name(),
            ranks: 2,
            shards,
            operation,
            dtype: "float32",
            rows: self.rows,
            dim,
            ids,
            bytes: 4 * dim * ids,
            rounds,
            p50_us,
            p99_us: percentile(&took, 99),
            rows_per_s: ids as f64 / p50_us * 1e6,
            goodput_gb_per_s: (4 * dim * ids) as f64 / p50_us / 1e3,
        })
    }
}

fn element(id: u64, at: u64) -> f32 {
    (id.wrapping_add(at) % NUMBERS) as f32
}

fn region(ids: &[u64]) -> Arc<Region> {
    Region::from_vec(ids.iter().flat_map(|id| id.to_le_bytes()).collect())
}
