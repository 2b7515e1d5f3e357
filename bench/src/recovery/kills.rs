//! Does: kills all servers but one while workers push ones, again and again, and looks whether N workers times K pushes are N·K.

use super::house::{House, PATIENCE};
use super::{Options, copies_of, wrong};
use crate::chance::mixed;
use crate::machine;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use gradwire_ps::{DType, DenseTable, Mode, Recovery, TableOptions};
use gradwire_transport::Region;
use serde::Serialize;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

type Fault = Box<dyn Error + Send + Sync>;

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    /// The workers, and the processes with the servers at first; the coordinator is on no call's way.
    ranks: u32,
    shards: u32,
    kill: u32,
    mode: String,
    operation: &'static str,
    dtype: &'static str,
    bytes: usize,
    workers: u32,
    pushes: u32,
    /// Pushes of all workers that had ended before.
    after: u64,
    copies: u32,
    /// The server that was left.
    left: usize,
    exact: bool,
    /// Of all workers' pushes.
    p50_us: f64,
    p99_us: f64,
    /// The longest push of any worker: while nobody served the shard, nothing was acknowledged.
    longest_push_ms: f64,
}

/// Kills and prints.
///
/// # Errors
/// Where one push was lost, or counted twice.
pub(super) fn run(options: &Options, kills: u32, report: &Report) -> Result<(), Box<dyn Error>> {
    let [bytes] = options.bytes[..] else { return Err("give one size with --kills, such as --bytes 256k".into()) };
    let title = format!(
        "recovery: {} workers push ones, {} times each, to a table of {bytes} bytes with {} elsewhere; all servers but one are \
         killed at once; loopback, seed {}",
        options.workers,
        options.pushes,
        copies_of(options.copies),
        options.seed,
    );
    if !options.json {
        println!("{title}; {}", machine::described());
        println!(
            "{:>5} {:>27} {:>7} {:>7} {:>6} {:>16} {:>15}",
            "kill", "mode", "after", "left", "exact", "longest push ms", "median push ms"
        );
    }
    let (mut rows, progress) = (Vec::new(), Progress::start(kills as usize));
    for kill in 0..kills {
        let mode = mode_of(kill, options.workers);
        progress.next(format!("a kill under {mode} pushes"));
        let row = once(options, kill, bytes)?;
        let Row { mode, after, left, exact, longest_push_ms, p50_us, .. } = &row;
        if options.json {
            println!("{}", serde_json::to_string(&row)?);
        } else {
            let median = p50_us / 1e3;
            println!("{kill:>5} {mode:>27} {after:>7} {left:>7} {exact:>6} {longest_push_ms:>16.1} {median:>15.2}");
        }
        rows.push(row);
    }
    drop(progress);
    let longest = sorted(rows.iter().map(|row| row.longest_push_ms).collect());
    let inexact = rows.iter().filter(|row| !row.exact).count();
    if !options.json {
        println!(
            "{} of {kills} exact; longest push: median {:.0} ms, worst {:.0} ms",
            rows.len() - inexact,
            percentile(&longest, 50),
            percentile(&longest, 100)
        );
    }
    report.add(|| section(options, &title, &rows))?;
    if inexact == 0 { Ok(()) } else { Err(format!("{inexact} kills lost a push, or counted one twice").into()) }
}

/// Every mode in turn.
fn mode_of(kill: u32, workers: u32) -> Mode {
    let modes = [Mode::Async, Mode::Sync { workers }, Mode::Ssp { workers, staleness: 1 }];
    modes[kill as usize % modes.len()]
}

fn section(options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let of_modes = |value: fn(&Row) -> f64, what: &str| {
        let mut series: Vec<Series> = Vec::new();
        for row in rows {
            // `sync(3 workers)` is too long beside a chart, whose title has the number.
            let mode = row.mode.split('(').next().unwrap_or_default();
            let (name, point) = (format!("{mode}{what}"), (f64::from(row.kill), value(row)));
            match series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push(point),
                None => series.push(Series { name, points: vec![point] }),
            }
        }
        series
    };
    let chart = |title: &str, series: Vec<Series>| {
        let (title, x, y) = (title.to_owned(), "kill".to_owned(), "ms".to_owned());
        Chart { title, x, y, x_log: false, y_log: true, series }
    };
    let times = [of_modes(|row| row.p50_us / 1e3, ", p50"), of_modes(|row| row.p99_us / 1e3, ", p99")].concat();
    let charts = vec![
        chart("Longest push of each kill: nobody served meanwhile", of_modes(|row| row.longest_push_ms, "")),
        chart("Time of a push, of all pushes around a kill", times),
    ];
    Section::new(format!("recovery-kills-{}-shards-{}-copies", options.shards, options.copies), title, charts, rows)
}

fn once(options: &Options, kill: u32, bytes: usize) -> Result<Row, Box<dyn Error>> {
    let Options { workers, pushes, copies, .. } = *options;
    let mode = mode_of(kill, workers);
    let drawn = mixed(options.seed ^ u64::from(kill) << 32);
    // From the first pushes to nearly the last ones.
    let after = 1 + drawn % (u64::from(workers * pushes) * 9 / 10);
    let left = (drawn >> 48) as usize % (copies as usize + 1);
    let mut house = House::start(options.shards, copies)?;
    let table = TableOptions { mode, recovery: Recovery::Replicate { copies }, ..TableOptions::default() };
    let done = Arc::new(AtomicU64::new(0));
    let mut running = Vec::new();
    for worker in 0..workers {
        let (client, done) = (house.client(Some(worker))?, Arc::clone(&done));
        running.push(std::thread::spawn(move || {
            let opened = client.dense("ones", &[bytes / 4], DType::F32, table)?;
            let took = push_ones(&opened, bytes, pushes, &done)?;
            client.barrier("pushed", workers, Some(PATIENCE))?;
            Ok::<_, Fault>(took)
        }));
    }
    let deadline = Instant::now() + 2 * PATIENCE;
    while done.load(Ordering::Relaxed) < after && !running.iter().any(|worker| worker.is_finished()) {
        if Instant::now() > deadline {
            return Err("the workers' pushes do not end".into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    house.kill_but(left)?;
    let mut took = Vec::new();
    for worker in running {
        let seen = worker.join().map_err(|_| "a worker panicked")?;
        took.extend(seen.map_err(|error| format!("kill {kill}: {error}"))?);
    }
    let client = house.client(Some(0))?;
    let (table, values) = (client.dense("ones", &[bytes / 4], DType::F32, table)?, Region::zeroed(bytes));
    table.pull(values.write(0..bytes)?)?.wait(Some(PATIENCE))?;
    let took = sorted(took);
    Ok(Row {
        host: machine::host(),
        wire: "tcp",
        ranks: workers + copies + 1,
        shards: options.shards,
        kill,
        mode: mode.to_string(),
        operation: "push",
        dtype: "float32",
        bytes,
        workers,
        pushes,
        after,
        copies,
        left,
        exact: wrong(&values, (workers * pushes) as f32)? == 0,
        p50_us: percentile(&took, 50) * 1e3,
        p99_us: percentile(&took, 99) * 1e3,
        longest_push_ms: percentile(&took, 100),
    })
}

/// Milliseconds of each push.
fn push_ones(table: &DenseTable, bytes: usize, pushes: u32, done: &AtomicU64) -> Result<Vec<f64>, Fault> {
    let ones = Region::from_vec(1f32.to_le_bytes().repeat(bytes / 4));
    let mut took = Vec::new();
    for _ in 0..pushes {
        let began = Instant::now();
        table.push(ones.read(0..bytes)?)?.wait(Some(PATIENCE))?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(took)
}
