//! Does: times collectives between processes of this host, each started as a copy of this program, or as one rank of several
//! hosts.

mod work;

pub(crate) use work::{Element, Load, Operation, Work};

use crate::family::Family;
use crate::help;
use crate::machine;
use crate::progress::{self, Progress};
use crate::report::{Chart, Report, Section, Series};
use crate::sizes;
use crate::statistics::{percentile, sorted};
use crate::verbs;
use clap::{Args, ValueEnum};
use gradwire_collectives::{Communicator, Settings};
use gradwire_transport::{Config, CreditSettings, GroupSpec, WireChoice, form_group, open_store};
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::io::BufRead;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long ranks wait for each other.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
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

    /// The same, as a setting of the transport.
    pub(crate) fn choice(self) -> WireChoice {
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
#[command(after_help = help::COLLECTIVE)]
pub(crate) struct Options {
    /// Processes of this host, one a rank; where they outnumber cores, they wait for each other's
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
    #[arg(long, value_name = "URL", conflicts_with = "ranks")]
    store: Option<String>,
    /// Type of the elements
    #[arg(long, value_enum, default_value = "float32")]
    dtype: Element,
    /// Smallest buffer, in bytes, as 4096, 64k or 1m; at least 4: the largest that a rank has, as nccl-tests counts it
    #[arg(long, value_name = "SIZE", default_value = "8", value_parser = sizes::parse)]
    min_bytes: usize,
    /// Largest buffer, in bytes
    #[arg(long, value_name = "SIZE", default_value = "64m", value_parser = sizes::parse)]
    max_bytes: usize,
    /// Timed calls of each size; fewer of those above 256 KiB, never under 10
    #[arg(long, default_value_t = 1000)]
    rounds: usize,
    #[command(flatten)]
    choice: ChoiceOptions,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder; of several hosts, that of rank 0
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// Which algorithm is used.
#[derive(Args, Clone, Debug)]
struct ChoiceOptions {
    /// Algorithms to use, as all_reduce:ring or broadcast:tree; one that the collective has not is refused with those that it
    /// has [default: what is expected to take the least]
    #[arg(long, value_name = "COLLECTIVE:ALGORITHM", env = "GRADWIRE_ALGO")]
    algo: Option<String>,
    /// Sum in the order of the ranks, whatever the size
    #[arg(long)]
    deterministic: bool,
    /// Between hosts, over TCP: let all send at once also where all send to one (gather)
    #[arg(long)]
    no_credit: bool,
    /// Say on stderr what was chosen for each size, from what, and why
    #[arg(long)]
    explain: bool,
}

#[derive(Args)]
pub(crate) struct RankOptions {
    #[arg(long, value_enum)]
    operation: Operation,
    #[arg(long, value_enum)]
    dtype: Element,
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
#[derive(Clone, Serialize, Deserialize)]
struct Row {
    operation: Operation,
    host: String,
    wire: Way,
    ranks: u32,
    dtype: Element,
    bytes: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    algbw_gb_per_s: f64,
    busbw_gb_per_s: f64,
}

/// Starts the ranks, and prints what rank 0 tells.
pub(crate) fn run(operation: Operation, options: &Options) -> Result<(), Box<dyn Error>> {
    if options.ranks == 0 || options.min_bytes < 4 || options.min_bytes > options.max_bytes {
        return Err("give at least one rank, and 4 <= --min-bytes <= --max-bytes".into());
    }
    let report = Report::open(options.report.as_deref())?;
    if let Some(store) = &options.store {
        return one(operation, options, store, &report);
    }
    let folder = tempfile::Builder::new().prefix("gradwire-bench-").tempdir()?;
    let mut family = Family::default();
    let mut told = None;
    for rank in 0..options.ranks {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["rank", "--rank", &rank.to_string(), "--ranks", &options.ranks.to_string()]);
        command.args(progress::flags());
        command.arg("--store").arg(format!("file://{}", folder.path().display()));
        command.args([
            "--wire",
            options.wire.name(),
            "--operation",
            &given(&operation),
            "--dtype",
            &given(&options.dtype),
        ]);
        command.args(["--min-bytes", &options.min_bytes.to_string(), "--max-bytes", &options.max_bytes.to_string()]);
        command.args(["--rounds", &options.rounds.to_string()]);
        command.args(options.choice.algo.iter().flat_map(|algo| ["--algo", algo]));
        command.args(options.choice.deterministic.then_some("--deterministic"));
        command.args(options.choice.no_credit.then_some("--no-credit"));
        command.args(options.choice.explain.then_some("--explain"));
        if rank == 0 {
            command.stdout(Stdio::piped());
        }
        let child = family.start(format!("rank {rank}"), &mut command)?;
        told = told.or(child.stdout.take());
    }
    let title =
        format!("{}, {} ranks on one host by {}", what(operation, options), options.ranks, options.wire.title());
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
    report.add(|| section(operation, options, &title, &rows))
}

/// A value as the command line has it.
pub(crate) fn given(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn what(operation: Operation, options: &Options) -> String {
    format!("{} of {}", operation.name(), options.dtype.dtype().name())
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

/// One rank, for a person or a launcher that starts the others; rank 0 prints and reports.
fn one(operation: Operation, options: &Options, store: &str, report: &Report) -> Result<(), Box<dyn Error>> {
    let rank = RankOptions {
        operation,
        dtype: options.dtype,
        rank: options.rank,
        ranks: options.world_size,
        store: store.to_owned(),
        wire: options.wire,
        min_bytes: options.min_bytes,
        max_bytes: options.max_bytes,
        rounds: options.rounds,
        choice: options.choice.clone(),
    };
    let title = |row: &Row| format!("{}, {} ranks by {}", what(operation, options), row.ranks, options.wire.title());
    let mut rows: Vec<Row> = Vec::new();
    take_part(&rank, &mut |row| {
        if rows.is_empty() && !options.json {
            head(&title(row));
        }
        tell(row, options.json)?;
        rows.push(row.clone());
        Ok(())
    })?;
    match rows.first() {
        Some(first) => report.add(|| section(operation, options, &title(first), &rows)),
        // Another rank tells.
        None => Ok(()),
    }
}

fn section(operation: Operation, options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let place = |row: &Row| if operation == Operation::Barrier { row.ranks.into() } else { row.bytes as f64 };
    let line = |name: &str, value: fn(&Row) -> f64| Series {
        name: name.to_owned(),
        points: rows.iter().map(|row| (place(row), value(row))).collect(),
    };
    let dtype = if options.dtype == Element::Float32 { String::new() } else { format!("{}-", given(&options.dtype)) };
    let ranks = rows.first().map_or(options.ranks, |row| row.ranks);
    let id = format!("{}-{dtype}{}-{ranks}", given(&operation), options.wire.name());
    let times = vec![line("p50", |row| row.p50_us), line("p99", |row| row.p99_us)];
    let (title_of_times, y) = ("Time of a call".to_owned(), "µs".to_owned());
    let charts = match operation {
        // It has no bytes, and so no axis of them.
        Operation::Barrier => {
            vec![Chart { title: title_of_times, x: "ranks".to_owned(), y, x_log: false, y_log: false, series: times }]
        }
        _ => vec![
            Chart::by_bytes("Bus bandwidth", "GB/s", vec![line("busbw", |row| row.busbw_gb_per_s)]),
            Chart::by_bytes(&title_of_times, &y, times),
        ],
    };
    Section::new(id, title, charts, rows)
}

/// One rank; rank 0 tells each row as JSON.
pub(crate) fn rank(options: &RankOptions) -> Result<(), Box<dyn Error>> {
    take_part(options, &mut |row| tell(row, true))
}

/// What is done with each row once it is there.
type Tell<'a> = &'a mut dyn FnMut(&Row) -> Result<(), Box<dyn Error>>;

fn take_part(options: &RankOptions, tell: Tell<'_>) -> Result<(), Box<dyn Error>> {
    let ChoiceOptions { algo, deterministic, no_credit, explain } = options.choice.clone();
    let settings = Settings { algorithms: algo, deterministic, ..Settings::default() };
    let (host, communicator) =
        meet(&options.store, (options.rank, options.ranks), (options.wire, !no_credit), settings)?;
    let is_first = communicator.rank().0 == 0;
    let sizes = sizes_of(options);
    // One rank is enough to be heard.
    let progress = is_first.then(|| Progress::start(sizes.len()));
    for bytes in sizes {
        let rounds = (options.rounds * (256 << 10) / bytes).clamp(10, options.rounds.max(10));
        let dtype = options.dtype.dtype();
        let load = Load::new(options.operation, options.dtype, bytes / dtype.bytes(), communicator.world_size().get());
        if let Some(progress) = &progress {
            progress.next(format!("{} of {} bytes", options.operation.name(), load.bytes()));
        }
        if explain && is_first {
            let collective = options.operation.collective();
            eprintln!("{bytes} bytes by {}", communicator.explain(&collective, dtype, bytes));
        }
        let row = measure(&communicator, load, (&host, options.wire), rounds)?;
        if is_first {
            tell(&row)?;
        }
    }
    drop(progress);
    if explain {
        eprintln!("{}", communicator.describe());
    }
    communicator.close(Duration::from_secs(5));
    Ok(())
}

/// What is measured in turn; a barrier has one size.
fn sizes_of(options: &RankOptions) -> Vec<usize> {
    let most = if options.operation == Operation::Barrier { 1 } else { usize::MAX };
    let next = |bytes: &usize| bytes.checked_mul(4);
    let sizes = std::iter::successors(Some(options.min_bytes.next_power_of_two()), next);
    sizes.take_while(|bytes| *bytes <= options.max_bytes).take(most).collect()
}

/// Meets the other ranks; with this host's name.
pub(crate) fn meet(
    store: &str,
    (rank, ranks): (Option<u32>, Option<u32>),
    (wire, credit): (Way, bool),
    settings: Settings,
) -> Result<(String, Communicator), Box<dyn Error>> {
    let env = |name: &str| std::env::var(name).ok();
    let (store, rank, world_size) = open_store(store, rank, ranks, &env)?;
    let config = Config { wire: wire.choice(), verbs: verbs::settings()?, ..Config::default() };
    let credit = credit.then_some(CreditSettings { marked: true, ..CreditSettings::default() });
    let config = Config { credit, ..config };
    let spec = GroupSpec { name: "bench".to_owned(), rank, world_size, store, config };
    let group = form_group(spec, Instant::now() + PATIENCE)?;
    let host = group.members.first().map(|name| name.host.clone()).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let settings = Settings { timeout: PATIENCE, cores, ..settings };
    Ok((host, Communicator::new(group, "bench", settings)?))
}

fn measure(
    communicator: &Communicator,
    load: Load,
    (host, wire): (&str, Way),
    rounds: usize,
) -> Result<Row, Box<dyn Error>> {
    let work = Work::new(communicator, load);
    work.verify()?;
    let times = sorted(work::longest(communicator, &work.times(rounds)?)?);
    let (ranks, p50) = (communicator.world_size().get(), percentile(&times, 50));
    let algbw = load.bytes() as f64 / p50 / 1e9;
    Ok(Row {
        operation: load.operation,
        host: host.to_owned(),
        wire,
        ranks,
        dtype: load.element,
        bytes: load.bytes(),
        rounds,
        p50_us: p50 * 1e6,
        p99_us: percentile(&times, 99) * 1e6,
        algbw_gb_per_s: algbw,
        busbw_gb_per_s: algbw * load.operation.bus_factor(ranks),
    })
}
