//! Does: times pushes and pulls of a sparse table by random ids, over the wire; every row that comes is looked at.

use super::{Options, WARM_UP, settings, way};
use crate::chance::mixed;
use crate::collective::Way;
use crate::machine;
use crate::statistics::{percentile, sorted};
use gradwire_ps::{Client, DType, SparseOptions, SparseTable};
use gradwire_transport::Region;
use serde::Serialize;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows that one call makes, before anything is timed.
const MADE_AT_ONCE: u64 = 1 << 14;
/// After so many it is told how many there are.
const TOLD: u64 = 1 << 19;
/// What elements are made of: sums of so small numbers stay exact.
const NUMBERS: u64 = 61;

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    shards: u32,
    operation: &'static str,
    dtype: &'static str,
    rows: u64,
    dim: usize,
    ids: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    /// By the median.
    rows_per_s: f64,
    /// Of values, or gradients, without ids.
    goodput_gb_per_s: f64,
}

/// Makes a table of so many rows on the servers at `addresses`, measures, and prints a line for each operation.
pub(super) fn run(addresses: &[String], rows: u64, options: &Options) -> Result<(), Box<dyn Error>> {
    let &Options { json, wire, rounds, shards, .. } = options;
    let client = Client::connect(addresses, settings(wire))?;
    let mut table = Sparse::open(&client, rows, options)?;
    table.make()?;
    if !json {
        let (of, dim) = (crate::plural(shards, "shard"), table.dim);
        println!("a sparse float32 table of {rows} rows of {dim} on {of}, {}; {}", way(wire), machine::described());
        println!(
            "{:>12} {:>8} {:>7} {:>11} {:>11} {:>12} {:>13}",
            "operation", "ids", "rounds", "p50 us", "p99 us", "M rows/s", "goodput GB/s"
        );
    }
    for operation in ["sparse_pull", "sparse_push"] {
        let row = table.measure(operation, (wire, shards), rounds)?;
        if json {
            println!("{}", serde_json::to_string(&row)?);
        } else {
            let Row { ids, rounds, p50_us, p99_us, rows_per_s, goodput_gb_per_s, .. } = row;
            let millions = rows_per_s / 1e6;
            println!(
                "{operation:>12} {ids:>8} {rounds:>7} {p50_us:>11.1} {p99_us:>11.1} {millions:>12.3} {goodput_gb_per_s:>13.3}"
            );
        }
    }
    table.pull()?;
    client.close();
    Ok(())
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
    fn open(client: &Client, rows: u64, options: &Options) -> Result<Self, Box<dyn Error>> {
        let (dim, ids) = (options.dim as usize, options.ids as usize);
        let table = client.sparse("bench-sparse", dim, DType::F32, SparseOptions::default())?;
        let bytes = 4 * dim * ids;
        Ok(Self {
            table,
            rows,
            dim,
            pushes: vec![0; usize::try_from(rows)?],
            ids: vec![0; ids],
            gradients: Region::zeroed(bytes),
            values: Region::zeroed(bytes),
            seed: 0,
        })
    }

    /// Pushes to each row once: it is there then.
    fn make(&mut self) -> Result<(), Box<dyn Error>> {
        for first in (0..self.rows).step_by(MADE_AT_ONCE as usize) {
            if first % TOLD == 0 {
                eprint!("\r{first} of {} rows are made   ", self.rows);
            }
            let ids: Vec<u64> = (first..self.rows.min(first + MADE_AT_ONCE)).collect();
            let gradients = Region::zeroed(4 * self.dim * ids.len());
            self.push(&ids, &gradients)?;
        }
        eprintln!("\r{} rows are made{:20}", self.rows, "");
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
        let most = usize::from(u16::MAX) * self.pushes.len() / 2;
        if (rounds + WARM_UP) * self.ids.len() > most {
            return Err("fewer rounds, please: some row would be pushed to more often than can be counted".into());
        }
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
            shards,
            operation,
            dtype: "float32",
            rows: self.rows,
            dim,
            ids,
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
