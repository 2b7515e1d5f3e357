//! Does: times all-reduce between processes of this host, each started as a copy of this program, or as one rank of several
//! hosts.

use crate::family::Family;
use crate::machine;
use crate::report::{Chart, Report, Section, Series};
use crate::verbs;
use clap::{Args, ValueEnum};
use gradwire_collectives::{Call, Collective, Communicator, DType, Piece, Reduction, Settings};
use gradwire_transport::{Config, GroupSpec, Rank, Region, WireChoice, WorldSize, form_group, open_store};
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::io::BufRead;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Way {
    /// Memory that processes of one host share
    Shm,
    /// TCP
    Tcp,
    /// RDMA verbs, also on one host
    Verbs,
    /// The best that each two ranks have
    Auto,
}

impl Way {
    /// Its name, as it is given.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::Auto => "auto",
        }
    }

    fn choice(self) -> WireChoice {
        match self {
            Self::Shm => WireChoice::Shm,
            Self::Tcp => WireChoice::Tcp,
            Self::Verbs => WireChoice::Verbs,
            Self::Auto => WireChoice::Auto,
        }
    }

    /// Its name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Shm => "shared memory",
            Self::Tcp => "TCP",
            Self::Verbs => "RDMA verbs",
            Self::Auto => "the best wire of each pair",
        }
    }
}

#[derive(Args)]
pub(crate) struct Options {
    /// Processes; more than cores is slower, and says so of the machine
    #[arg(long, default_value_t = 2)]
    ranks: u32,
    /// Which way bytes go
    #[arg(long, value_enum, default_value = "shm")]
    wire: Way,
    /// Be this rank only; the others are started elsewhere [default: as the launcher says]
    #[arg(long, requires = "store")]
    rank: Option<u32>,
    /// Ranks in all, where this is one of them [default: as the launcher says]
    #[arg(long, requires = "store")]
    world_size: Option<u32>,
    /// Where the ranks meet: tcp://HOST:PORT (rank 0 serves it), file:///FOLDER, or env:// (torchrun, mpirun, srun)
    #[arg(long, value_name = "URL", conflicts_with_all = ["ranks", "report"])]
    store: Option<String>,
    /// Smallest buffer, in bytes
    #[arg(long, default_value_t = 8)]
    min_bytes: usize,
    /// Largest buffer, in bytes
    #[arg(long, default_value_t = 64 << 20)]
    max_bytes: usize,
    /// Calls of each size; fewer of large ones, never under 10
    #[arg(long, default_value_t = 1000)]
    rounds: usize,
    #[command(flatten)]
    choice: ChoiceOptions,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// Which algorithm is used.
#[derive(Args, Clone, Debug)]
struct ChoiceOptions {
    /// Algorithms to use, as all_reduce:ring [default: what is expected to take the least]
    #[arg(long, value_name = "COLLECTIVE:ALGORITHM", env = "GRADWIRE_ALGO")]
    algo: Option<String>,
    /// Sum in the order of the ranks, whatever the size
    #[arg(long)]
    deterministic: bool,
    /// Say on stderr what was chosen for each size, from what, and why
    #[arg(long)]
    explain: bool,
}

#[derive(Args)]
pub(crate) struct RankOptions {
    #[arg(long)]
    rank: Option<u32>,
    #[arg(long)]
    ranks: Option<u32>,
    #[arg(long)]
    store: String,
    #[arg(long, value_enum)]
    wire: Way,
    #[arg(long)]
    min_bytes: usize,
    #[arg(long)]
    max_bytes: usize,
    #[arg(long)]
    rounds: usize,
    #[command(flatten)]
    choice: ChoiceOptions,
}

/// One row of the table.
#[derive(Serialize, Deserialize)]
struct Row {
    host: String,
    wire: Way,
    ranks: u32,
    dtype: String,
    bytes: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    algbw_gb_per_s: f64,
    busbw_gb_per_s: f64,
}

/// Starts the ranks, and prints what rank 0 tells.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    if options.ranks == 0 || options.min_bytes < 4 || options.min_bytes > options.max_bytes {
        return Err("give at least one rank, and 4 <= --min-bytes <= --max-bytes".into());
    }
    if let Some(store) = &options.store {
        return one(options, store);
    }
    let folder = tempfile::Builder::new().prefix("gradwire-bench-").tempdir()?;
    let mut family = Family::default();
    let mut told = None;
    for rank in 0..options.ranks {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["rank", "--rank", &rank.to_string(), "--ranks", &options.ranks.to_string()]);
        command.arg("--store").arg(format!("file://{}", folder.path().display()));
        command.args(["--wire", options.wire.name()]);
        command.args(["--min-bytes", &options.min_bytes.to_string(), "--max-bytes", &options.max_bytes.to_string()]);
        command.args(["--rounds", &options.rounds.to_string()]);
        command.args(options.choice.algo.iter().flat_map(|algo| ["--algo", algo]));
        command.args(options.choice.deterministic.then_some("--deterministic"));
        command.args(options.choice.explain.then_some("--explain"));
        if rank == 0 {
            command.stdout(Stdio::piped());
        }
        let child = family.start(format!("rank {rank}"), &mut command)?;
        told = told.or(child.stdout.take());
    }
    let title = format!("all_reduce sum of float32, {} ranks on one host by {}", options.ranks, options.wire.title());
    if !options.json {
        head(&title);
    }
    let mut rows: Vec<Row> = Vec::new();
    for line in told.into_iter().flat_map(|told| std::io::BufReader::new(told).lines()) {
        let line = line?;
        let row: Row = serde_json::from_str(&line)?;
        tell(&row, options.json)?;
        rows.push(row);
    }
    family.wait("ending the ranks", Instant::now() + PATIENCE)?;
    match &options.report {
        Some(folder) => Report::open(folder)?.add(section(options, title, &rows)?),
        None => Ok(()),
    }
}

fn head(title: &str) {
    println!("{title}; {}", machine::described());
    println!("{:>12} {:>8} {:>12} {:>12} {:>10} {:>10}", "bytes", "rounds", "p50 us", "p99 us", "algbw", "busbw GB/s");
}

fn tell(row: &Row, json: bool) -> Result<(), Box<dyn Error>> {
    let Row { bytes, rounds, p50_us, p99_us, algbw_gb_per_s, busbw_gb_per_s, .. } = row;
    match json {
        true => println!("{}", serde_json::to_string(row)?),
        false => println!(
            "{bytes:>12} {rounds:>8} {p50_us:>12.1} {p99_us:>12.1} {algbw_gb_per_s:>10.3} {busbw_gb_per_s:>10.3}"
        ),
    }
    Ok(())
}

/// One rank, for a person or a launcher that starts the others; rank 0 prints.
fn one(options: &Options, store: &str) -> Result<(), Box<dyn Error>> {
    let rank = RankOptions {
        rank: options.rank,
        ranks: options.world_size,
        store: store.to_owned(),
        wire: options.wire,
        min_bytes: options.min_bytes,
        max_bytes: options.max_bytes,
        rounds: options.rounds,
        choice: options.choice.clone(),
    };
    let mut began = options.json;
    take_part(&rank, &mut |row| {
        if !std::mem::replace(&mut began, true) {
            head(&format!("all_reduce sum of float32, {} ranks by {}", row.ranks, options.wire.title()));
        }
        tell(row, options.json)
    })
}

fn section(options: &Options, title: String, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let line = |name: &str, value: fn(&Row) -> f64| Series {
        name: name.to_owned(),
        points: rows.iter().map(|row| (row.bytes as f64, value(row))).collect(),
    };
    let by_bytes = |title: &str, y: &str, series| Chart {
        title: title.to_owned(),
        x: "bytes".to_owned(),
        y: y.to_owned(),
        x_log: true,
        y_log: true,
        series,
    };
    Ok(Section {
        id: format!("all-reduce-{}-{}", options.wire.name(), options.ranks),
        title,
        measured_on: machine::described(),
        charts: vec![
            by_bytes("Bus bandwidth", "GB/s", vec![line("busbw", |row| row.busbw_gb_per_s)]),
            by_bytes("Time of a call", "µs", vec![line("p50", |row| row.p50_us), line("p99", |row| row.p99_us)]),
        ],
        rows: rows.iter().map(serde_json::to_value).collect::<Result<_, _>>()?,
    })
}

/// One rank; rank 0 tells each row as JSON.
pub(crate) fn rank(options: &RankOptions) -> Result<(), Box<dyn Error>> {
    take_part(options, &mut |row| tell(row, true))
}

/// What is done with each row once it is there.
type Tell<'a> = &'a mut dyn FnMut(&Row) -> Result<(), Box<dyn Error>>;

fn take_part(options: &RankOptions, tell: Tell<'_>) -> Result<(), Box<dyn Error>> {
    let env = |name: &str| std::env::var(name).ok();
    let (store, rank, world_size) = open_store(&options.store, options.rank, options.ranks, &env)?;
    let config = Config { wire: options.wire.choice(), verbs: verbs::settings()?, ..Config::default() };
    let spec = GroupSpec { name: "bench".to_owned(), rank, world_size, store, config };
    let group = form_group(spec, Instant::now() + PATIENCE)?;
    let host = group.members.first().map(|name| name.host.clone()).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let ChoiceOptions { algo, deterministic, explain } = options.choice.clone();
    let settings = Settings { timeout: PATIENCE, cores, algorithms: algo, deterministic, ..Settings::default() };
    let communicator = Communicator::new(group, "bench", settings)?;
    let mut bytes = options.min_bytes.next_power_of_two();
    while bytes <= options.max_bytes {
        let rounds = (options.rounds * (256 << 10) / bytes).clamp(10, options.rounds.max(10));
        if explain && rank.0 == 0 {
            let sum = Collective::AllReduce { op: Reduction::Sum };
            eprintln!("{bytes} bytes by {}", communicator.explain(&sum, DType::F32, bytes));
        }
        let row = measure(&communicator, (options.wire, rank, world_size), &host, bytes, rounds)?;
        if rank.0 == 0 {
            tell(&row)?;
        }
        bytes *= 4;
    }
    if explain {
        eprintln!("{}", communicator.describe());
    }
    communicator.close(Duration::from_secs(5));
    Ok(())
}

fn measure(
    communicator: &Communicator,
    (wire, rank, world_size): (Way, Rank, WorldSize),
    host: &str,
    bytes: usize,
    rounds: usize,
) -> Result<Row, Box<dyn Error>> {
    let count = bytes / 4;
    let mine = |rank: u32| (0..count).map(move |i| (i % 97) as f32 + rank as f32);
    let buffer = Region::from_vec(mine(rank.0).flat_map(f32::to_le_bytes).collect());
    let call =
        |collective, output: Vec<Piece>| Call { collective, dtype: DType::F32, input: vec![], output, timeout: None };
    let sum = || call(Collective::AllReduce { op: Reduction::Sum }, vec![Piece::whole(Arc::clone(&buffer))]);
    communicator.run(sum())?;
    let n = world_size.get() as f32;
    let offset = n * (n - 1.0) / 2.0;
    let result = buffer.read(0..bytes)?;
    for (i, four) in result.as_chunks::<4>().0.iter().enumerate() {
        let (got, expected) = (f32::from_le_bytes(*four), (i % 97) as f32 * n + offset);
        if got != expected {
            return Err(format!("{rank}: element {i} of {count} is {got}, not {expected}").into());
        }
    }
    drop(result);
    // Zeros stay zeros, however often they are summed.
    buffer.write(0..bytes)?.fill(0);
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds + 3 {
        communicator.run(call(Collective::Barrier, vec![]))?;
        let began = Instant::now();
        communicator.run(sum())?;
        if round >= 3 {
            times.push(began.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    let (p50, p99) = (times[times.len() / 2], times[(times.len() - 1) * 99 / 100]);
    let algbw = bytes as f64 / p50 / 1e9;
    Ok(Row {
        host: host.to_owned(),
        wire,
        ranks: world_size.get(),
        dtype: "float32".to_owned(),
        bytes,
        rounds,
        p50_us: p50 * 1e6,
        p99_us: p99 * 1e6,
        algbw_gb_per_s: algbw,
        busbw_gb_per_s: algbw * 2.0 * f64::from(world_size.get() - 1) / f64::from(world_size.get()),
    })
}
