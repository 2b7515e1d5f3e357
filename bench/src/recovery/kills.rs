//! Does: kills all servers but one while workers push ones, again and again, and looks whether N workers times K pushes are N·K.

use super::house::{House, PATIENCE};
use super::{Options, copies_of, wrong};
use crate::chance::mixed;
use crate::machine;
use crate::statistics::{percentile, sorted};
use gradwire_ps::{DType, Mode, Recovery, TableOptions};
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
    kill: u32,
    mode: String,
    bytes: usize,
    workers: u32,
    pushes: u32,
    /// Pushes of all workers that had ended before.
    after: u64,
    copies: u32,
    /// The server that was left.
    left: usize,
    exact: bool,
    /// The longest push of any worker: while nobody served the shard, nothing was acknowledged.
    longest_push_ms: f64,
    median_push_ms: f64,
}

/// Kills and prints.
///
/// # Errors
/// Where one push was lost, or counted twice.
pub(super) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let bytes = *options.bytes.first().ok_or("give --bytes")?;
    if !options.json {
        println!(
            "{} workers push ones, {} times each, to a table of {bytes} bytes with {} elsewhere; all servers but one are killed \
             at once; loopback, seed {}; {}",
            options.workers,
            options.pushes,
            copies_of(options.copies),
            options.seed,
            machine::described()
        );
        println!(
            "{:>5} {:>27} {:>7} {:>7} {:>6} {:>16} {:>15}",
            "kill", "mode", "after", "left", "exact", "longest push ms", "median push ms"
        );
    }
    let (mut longest, mut inexact) = (Vec::new(), 0);
    for kill in 0..options.kills {
        let row = once(options, kill, bytes)?;
        let Row { mode, after, left, exact, longest_push_ms, median_push_ms, .. } = &row;
        if options.json {
            println!("{}", serde_json::to_string(&row)?);
        } else {
            println!(
                "{kill:>5} {mode:>27} {after:>7} {left:>7} {exact:>6} {longest_push_ms:>16.1} {median_push_ms:>15.2}"
            );
        }
        longest.push(*longest_push_ms);
        inexact += u32::from(!exact);
    }
    let longest = sorted(longest);
    if !options.json {
        println!(
            "{} of {} exact; longest push: median {:.0} ms, worst {:.0} ms",
            options.kills - inexact,
            options.kills,
            percentile(&longest, 50),
            percentile(&longest, 100)
        );
    }
    if inexact == 0 { Ok(()) } else { Err(format!("{inexact} kills lost a push, or counted one twice").into()) }
}

fn once(options: &Options, kill: u32, bytes: usize) -> Result<Row, Box<dyn Error>> {
    let Options { workers, pushes, copies, .. } = *options;
    let modes = [Mode::Async, Mode::Sync { workers }, Mode::Ssp { workers, staleness: 1 }];
    let mode = modes[kill as usize % modes.len()];
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
            let table = client.dense("ones", &[bytes / 4], DType::F32, table)?;
            let ones = Region::from_vec(1f32.to_le_bytes().repeat(bytes / 4));
            let mut took = Vec::new();
            for _ in 0..pushes {
                let began = Instant::now();
                table.push(ones.read(0..bytes)?)?.wait(Some(PATIENCE))?;
                took.push(began.elapsed().as_secs_f64() * 1e3);
                done.fetch_add(1, Ordering::Relaxed);
            }
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
        kill,
        mode: mode.to_string(),
        bytes,
        workers,
        pushes,
        after,
        copies,
        left,
        exact: wrong(&values, (workers * pushes) as f32)? == 0,
        longest_push_ms: percentile(&took, 100),
        median_push_ms: percentile(&took, 50),
    })
}
