//! Does: times push_pull of one synchronous table by several workers at once, each with a connection of its own.

use super::{Options, WARM_UP, element, settings, way};
use crate::collective::Way;
use crate::machine;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use gradwire_ps::{Client, ClientSettings, DType, DenseTable, Mode, TableOptions};
use gradwire_transport::Region;
use serde::Serialize;
use std::error::Error;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// How often each number of workers has its turn.
const TURNS: usize = 5;

type Fault = Box<dyn Error + Send + Sync>;

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    /// The workers, and the process with the servers.
    ranks: u32,
    shards: usize,
    operation: &'static str,
    dtype: &'static str,
    bytes: usize,
    workers: u32,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    /// Payload of all workers, there and back, by the whole time: the median of the turns.
    goodput_gb_per_s: f64,
    /// Of the goodput of the first number of workers.
    of_first: f64,
}

/// What one worker saw.
struct Seen {
    began: Instant,
    ended: Instant,
    calls: Vec<f64>,
}

/// Measures the numbers of workers in turns, for each size, and prints a line for each.
pub(super) fn run(addresses: &[String], options: &Options, report: &Report) -> Result<(), Box<dyn Error>> {
    let Options { workers: counts, bytes: sizes, rounds, json, wire, .. } = options;
    let (rounds, json, wire) = (*rounds, *json, *wire);
    let shards = crate::plural(options.shards, "shard");
    let title = format!(
        "parameter server: push_pull by workers at once, a synchronous float32 table on {shards}, {}",
        way(wire)
    );
    if !json {
        println!("{title}; {}", machine::described());
        println!(
            "{:>12} {:>7} {:>11} {:>11} {:>13} {:>8}",
            "bytes", "workers", "p50 us", "p99 us", "goodput GB/s", "of first"
        );
    }
    let mut rows = Vec::new();
    let progress = Progress::start(sizes.len() * TURNS * counts.len());
    for &bytes in sizes {
        let rounds = (rounds * (1 << 20) / bytes).clamp(10, rounds.max(10));
        let mut turns = vec![(Vec::new(), Vec::new()); counts.len()];
        for turn in 0..TURNS {
            for (&workers, (goodputs, calls)) in counts.iter().zip(&mut turns) {
                progress.next(format!("{bytes} bytes by {}", crate::plural(workers, "worker")));
                let name = format!("bench-{bytes}-{workers}-{turn}");
                let seen = together((addresses, wire), &name, workers, bytes, rounds)?;
                goodputs.push(goodput(&seen, bytes, rounds).ok_or("no worker, no goodput")?);
                calls.extend(seen.into_iter().flat_map(|seen| seen.calls));
            }
        }
        let first = percentile(&sorted(turns.first().map_or(Vec::new(), |turn| turn.0.clone())), 50);
        for (&workers, (goodputs, calls)) in counts.iter().zip(turns) {
            let (goodputs, calls) = (sorted(goodputs), sorted(calls));
            let row = Row {
                host: machine::host(),
                wire: wire.name(),
                ranks: workers + 1,
                shards: addresses.len(),
                operation: "push_pull",
                dtype: "float32",
                bytes,
                workers,
                rounds,
                p50_us: percentile(&calls, 50),
                p99_us: percentile(&calls, 99),
                goodput_gb_per_s: percentile(&goodputs, 50),
                of_first: percentile(&goodputs, 50) / first,
            };
            print(&row, json)?;
            rows.push(row);
        }
    }
    drop(progress);
    report.add(|| section(options, &title, &rows))
}

fn print(row: &Row, json: bool) -> Result<(), Box<dyn Error>> {
    let Row { bytes, workers, p50_us, p99_us, goodput_gb_per_s, of_first, .. } = row;
    match json {
        true => println!("{}", serde_json::to_string(row)?),
        false => {
            println!("{bytes:>12} {workers:>7} {p50_us:>11.1} {p99_us:>11.1} {goodput_gb_per_s:>13.3} {of_first:>8.3}")
        }
    }
    Ok(())
}

/// Curves over the number of workers, one for each size.
fn section(options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let chart = |title: &str, y: &str, y_log: bool, value: fn(&Row) -> f64| {
        let line = |&bytes: &usize| Series {
            name: format!("{bytes} bytes"),
            points: rows.iter().filter(|row| row.bytes == bytes).map(|row| (row.workers.into(), value(row))).collect(),
        };
        let (title, x, y) = (title.to_owned(), "workers".to_owned(), y.to_owned());
        Chart { title, x, y, x_log: true, y_log, series: options.bytes.iter().map(line).collect() }
    };
    let charts = vec![
        chart("Goodput of all workers", "GB/s", false, |row| row.goodput_gb_per_s),
        chart("Median time of a call", "µs", true, |row| row.p50_us),
        chart("Time of the slowest calls", "p99, µs", true, |row| row.p99_us),
    ];
    Section::new(format!("ps-workers-{}-shards-{}", options.shards, options.wire.name()), title, charts, rows)
}

/// GB/s from the first beginning to the last end.
fn goodput(seen: &[Seen], bytes: usize, rounds: usize) -> Option<f64> {
    let began = seen.iter().map(|seen| seen.began).min()?;
    let ended = seen.iter().map(|seen| seen.ended).max()?;
    Some((2 * bytes * rounds * seen.len()) as f64 / (ended - began).as_secs_f64() / 1e9)
}

fn together(
    servers: (&[String], Way),
    name: &str,
    workers: u32,
    bytes: usize,
    rounds: usize,
) -> Result<Vec<Seen>, Box<dyn Error>> {
    let start = Barrier::new(workers as usize);
    let results: Vec<Result<Seen, Fault>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|worker| {
                let start = &start;
                scope.spawn(move || {
                    let ready = Worker::open(servers, name, (worker, workers), bytes);
                    // Also of one that failed: the others would wait for ever.
                    start.wait();
                    ready?.measure(rounds)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a worker panicked".into()))).collect()
    });
    results.into_iter().map(|result| result.map_err(|error| error.to_string().into())).collect()
}

struct Worker {
    client: Client,
    table: DenseTable,
    gradient: Arc<Region>,
    values: Arc<Region>,
    workers: u32,
    pushes: usize,
}

impl Worker {
    fn open(
        (addresses, wire): (&[String], Way),
        name: &str,
        (worker, workers): (u32, u32),
        bytes: usize,
    ) -> Result<Self, Fault> {
        let settings = ClientSettings { worker: Some(worker), ..settings(wire) };
        let client = Client::connect(addresses, settings)?;
        let options = TableOptions { mode: Mode::Sync { workers }, ..TableOptions::default() };
        let table = client.dense(name, &[bytes / 4], DType::F32, options)?;
        let gradient = (0..bytes / 4).flat_map(|i| element(i).to_le_bytes()).collect();
        Ok(Self {
            client,
            table,
            gradient: Region::from_vec(gradient),
            values: Region::zeroed(bytes),
            workers,
            pushes: 0,
        })
    }

    fn call(&mut self) -> Result<Duration, Fault> {
        let bytes = self.gradient.len();
        let (gradient, into) = (self.gradient.read(0..bytes)?, self.values.write(0..bytes)?);
        let began = Instant::now();
        self.table.push_pull(gradient, into)?.wait(None)?;
        self.pushes += 1;
        Ok(began.elapsed())
    }

    /// Every push of every worker counted once: checked before anything is timed, and after.
    fn check(&self) -> Result<(), Fault> {
        let values = self.values.read(0..self.values.len())?;
        for (i, four) in values.as_chunks::<4>().0.iter().enumerate() {
            let (got, pushes) = (f32::from_le_bytes(*four), self.pushes * self.workers as usize);
            let expected = element(i) * pushes as f32;
            if got != expected {
                return Err(format!("element {i} is {got} after {pushes} pushes, not {expected}").into());
            }
        }
        Ok(())
    }

    fn measure(mut self, rounds: usize) -> Result<Seen, Fault> {
        for _ in 0..WARM_UP {
            self.call()?;
            self.check()?;
        }
        let began = Instant::now();
        let calls = (0..rounds).map(|_| Ok(self.call()?.as_secs_f64() * 1e6)).collect::<Result<_, Fault>>()?;
        let ended = Instant::now();
        self.check()?;
        self.client.close();
        Ok(Seen { began, ended, calls })
    }
}
