//! Does: what copies cost and are worth: pushes to a table with a copy in turns with one without, and servers killed under load.

mod house;
mod kills;

pub(crate) use house::{PeerOptions, peer};

use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use crate::{help, machine, sizes};
use clap::Args;
use clap::builder::ArgPredicate;
use gradwire_ps::{Client, DType, DenseTable, Recovery, TableOptions};
use gradwire_transport::Region;
use house::{House, PATIENCE};
use serde::Serialize;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

const OPERATIONS: [&str; 2] = ["push", "pull"];
/// Rounds before it is timed.
const WARM_UP: usize = 5;

#[derive(Args)]
#[command(after_help = help::RECOVERY)]
pub(crate) struct Options {
    /// Bytes of the table, float32, each size in turn, multiples of 4 up to 1g; with --kills one size [default: 4k,64k,1m,16m; with --kills 4k]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "4k,64k,1m,16m", default_value_if("kills", ArgPredicate::IsPresent, "4k"), hide_default_value = true, value_parser = sizes::parse)]
    bytes: Vec<usize>,
    /// Shards, each with copies in other processes; from 1 to 16
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    shards: u32,
    /// Copies of each shard, from 1 to 7, and of servers one more: with --kills, all but one of them are killed at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=7))]
    copies: u32,
    /// Timed calls of each kind and size; fewer of those above 1 MiB, never under 10
    #[arg(long, default_value_t = 300)]
    rounds: usize,
    /// Instead: kill servers so often while workers push ones, each time in new processes, and count what is there
    #[arg(long, value_name = "N", conflicts_with = "rounds", value_parser = clap::value_parser!(u32).range(1..))]
    kills: Option<u32>,
    /// Workers that push meanwhile, from 1 to 16, with --kills
    #[arg(long, default_value_t = 3, requires = "kills", value_parser = clap::value_parser!(u32).range(1..=16))]
    workers: u32,
    /// Pushes of each worker, at least 10, with --kills
    #[arg(long, default_value_t = 300, requires = "kills", value_parser = clap::value_parser!(u32).range(10..=1 << 20))]
    pushes: u32,
    /// Number that victims and moments are drawn from, with --kills: the same one draws the same again
    #[arg(long, default_value_t = 1, requires = "kills")]
    seed: u64,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    /// This one, and the processes with the servers; the coordinator is on no call's way.
    ranks: u32,
    shards: u32,
    copies: u32,
    operation: &'static str,
    dtype: &'static str,
    bytes: usize,
    rounds: usize,
    /// With copies.
    p50_us: f64,
    p99_us: f64,
    /// Without.
    none_p50_us: f64,
    none_p99_us: f64,
    /// How many times as long it takes with a copy, by the medians.
    price: f64,
}

/// Measures and prints.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let sound = |bytes: &usize| (4..=1 << 30).contains(bytes) && bytes.is_multiple_of(4);
    if options.rounds == 0 || !options.bytes.iter().all(sound) {
        return Err("give at least one round, and --bytes in multiples of 4 up to 1g".into());
    }
    let report = Report::open(options.report.as_deref())?;
    if let Some(kills) = options.kills {
        return kills::run(options, kills, &report);
    }
    let copies = options.copies;
    let house = House::start(options.shards, copies)?;
    let client = house.client(None)?;
    let title = format!(
        "recovery: a dense float32 table with {} elsewhere, in turns with one without; one host, TCP over loopback",
        copies_of(copies)
    );
    if !options.json {
        println!("{title}; {}", machine::described());
        println!(
            "{:>10} {:>12} {:>7} {:>12} {:>12} {:>12} {:>12} {:>7}",
            "operation", "bytes", "rounds", "none p50 us", "p99 us", "copy p50 us", "p99 us", "price"
        );
    }
    let mut rows = Vec::new();
    let progress = Progress::start(2 * options.bytes.len());
    for &bytes in &options.bytes {
        let open = |recovery| Ones::open(&client, &format!("{recovery}-{bytes}"), bytes, recovery);
        let mut tables = [open(Recovery::None)?, open(Recovery::Replicate { copies })?];
        for name in OPERATIONS {
            progress.next(format!("{name} of {bytes} bytes"));
            let row = measure(options, name, bytes, &mut tables)?;
            print(&row, options.json)?;
            rows.push(row);
        }
        tables.iter_mut().try_for_each(Ones::check)?;
    }
    drop(progress);
    report.add(|| section(options, &title, &rows))
}

fn print(row: &Row, json: bool) -> Result<(), Box<dyn Error>> {
    let Row { operation, bytes, rounds, none_p50_us, none_p99_us, p50_us, p99_us, price, .. } = row;
    match json {
        true => println!("{}", serde_json::to_string(row)?),
        false => println!(
            "{operation:>10} {bytes:>12} {rounds:>7} {none_p50_us:>12.1} {none_p99_us:>12.1} {p50_us:>12.1} {p99_us:>12.1} \
             {price:>7.2}"
        ),
    }
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
    let beside =
        |none: fn(&Row) -> f64, with: fn(&Row) -> f64| [lines(none, ", none"), lines(with, ", copies")].concat();
    let medians = beside(|row| row.none_p50_us, |row| row.p50_us);
    let slowest = beside(|row| row.none_p99_us, |row| row.p99_us);
    let (x, y, price) = ("bytes".to_owned(), "times as long".to_owned(), lines(|row| row.price, ""));
    let charts = vec![
        Chart::by_bytes("Median time of a call", "µs", medians),
        Chart::by_bytes("Time of the slowest calls", "p99, µs", slowest),
        Chart { title: "Price of copies".to_owned(), x, y, x_log: true, y_log: false, series: price.into() },
    ];
    Section::new(format!("recovery-{}-shards-{}-copies", options.shards, options.copies), title, charts, rows)
}

fn copies_of(copies: u32) -> String {
    if copies == 1 { "a copy".to_owned() } else { format!("{copies} copies") }
}

fn measure(options: &Options, name: &'static str, bytes: usize, tables: &mut [Ones; 2]) -> Result<Row, Box<dyn Error>> {
    let rounds = (options.rounds * (1 << 20) / bytes).clamp(10, options.rounds.max(10));
    let mut took = [Vec::new(), Vec::new()];
    for round in 0..rounds + WARM_UP {
        for (table, took) in tables.iter_mut().zip(&mut took) {
            let began = Instant::now();
            if name == "push" {
                table.push()?
            } else {
                table.pull()?
            };
            let micros = began.elapsed().as_secs_f64() * 1e6;
            if round >= WARM_UP {
                took.push(micros);
            }
        }
    }
    let [none, copied] = took.map(sorted);
    let (none_p50_us, p50_us) = (percentile(&none, 50), percentile(&copied, 50));
    Ok(Row {
        host: machine::host(),
        copies: options.copies,
        wire: "tcp",
        ranks: options.copies + 2,
        shards: options.shards,
        operation: name,
        dtype: "float32",
        bytes,
        rounds,
        p50_us,
        p99_us: percentile(&copied, 99),
        none_p50_us,
        none_p99_us: percentile(&none, 99),
        price: p50_us / none_p50_us,
    })
}

/// A table that ones are pushed to.
struct Ones {
    table: DenseTable,
    ones: Arc<Region>,
    values: Arc<Region>,
    pushes: u32,
}

impl Ones {
    fn open(client: &Client, name: &str, bytes: usize, recovery: Recovery) -> Result<Self, Box<dyn Error>> {
        let table =
            client.dense(name, &[bytes / 4], DType::F32, TableOptions { recovery, ..TableOptions::default() })?;
        let mut opened = Self {
            table,
            ones: Region::from_vec(1f32.to_le_bytes().repeat(bytes / 4)),
            values: Region::zeroed(bytes),
            pushes: 0,
        };
        opened.push()?;
        opened.check()?;
        Ok(opened)
    }

    fn push(&mut self) -> Result<(), Box<dyn Error>> {
        self.pushes += 1;
        self.table.push(self.ones.read(0..self.ones.len())?)?.wait(Some(PATIENCE))?;
        Ok(())
    }

    fn pull(&mut self) -> Result<(), Box<dyn Error>> {
        self.table.pull(self.values.write(0..self.values.len())?)?.wait(Some(PATIENCE))?;
        Ok(())
    }

    /// Whether every push counted once.
    fn check(&mut self) -> Result<(), Box<dyn Error>> {
        self.pull()?;
        let expected = self.pushes as f32;
        match wrong(&self.values, expected)? {
            0 => Ok(()),
            wrong => Err(format!("{wrong} elements are not {expected}").into()),
        }
    }
}

/// How many elements are not `expected`.
fn wrong(values: &Arc<Region>, expected: f32) -> Result<usize, Box<dyn Error>> {
    let values = values.read(0..values.len())?;
    Ok(values.as_chunks().0.iter().filter(|&&bytes| f32::from_le_bytes(bytes) != expected).count())
}
