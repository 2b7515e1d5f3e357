//! Does: times push, pull and push_pull of a dense table, in turns with a plain TCP echo of messages as long, or the same over TCP;
//! or, by the files below, workers at once, pushes beside a checkpoint, a sparse table.

mod snapshot;
mod sparse;
mod workers;

use crate::collective::Way;
use crate::echo::{self, Echo};
use crate::family::Family;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use crate::{help, machine, plural, sizes};
use clap::{Args, ValueEnum};
use gradwire_ps::{Checkpoints, Client, ClientSettings, DType, DenseTable, LocalServers, ServerSettings, TableOptions};
use gradwire_transport::{Config, FileStore, Region, Store};
use serde::Serialize;
use std::error::Error;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// What an echo says where the parameter server sends a header only.
const SHORT: usize = 64;
/// Rounds before it is timed.
const WARM_UP: usize = 5;
/// Sums of whole numbers stay exact in float32 up to here.
const EXACT: usize = 1 << 24;

#[derive(Args)]
#[command(after_help = help::PS)]
pub(crate) struct Options {
    /// Bytes of the table, float32, each size in turn: multiples of 4 up to 1g
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "4k,64k,1m,16m,64m", value_parser = sizes::parse)]
    bytes: Vec<usize>,
    /// Servers that the table is divided among, all in one process of their own
    #[arg(long, default_value_t = 1)]
    shards: u32,
    /// Which way bytes go
    #[arg(long, value_enum, default_value = "tcp")]
    wire: Way,
    /// Timed calls of each kind and size; fewer of those above 1 MiB, never under 10
    #[arg(long, default_value_t = 500)]
    rounds: usize,
    /// Time push_pull by so many workers at once instead, in turns: 1,2,4,8, each up to 64
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64), conflicts_with = "against")]
    workers: Vec<u32>,
    /// Time pushes to a state of --bytes in all instead, while a checkpoint of it is written and while none is, in turns
    #[arg(long, conflicts_with_all = ["against", "workers", "rounds"])]
    snapshot: bool,
    /// Time pushes and pulls of a sparse table of so many rows instead, by random ids
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u64).range(1..=1 << 32), conflicts_with_all = ["bytes", "against", "workers", "snapshot"])]
    sparse: Option<u64>,
    /// Ids of a call, each number in turn, with --sparse; their rows may be 1 GiB
    #[arg(long, value_delimiter = ',', default_value = "256,4096,65536", requires = "sparse", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    ids: Vec<u32>,
    /// Elements of a row, float32, with --sparse
    #[arg(long, default_value_t = 64, requires = "sparse", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    dim: u32,
    /// Also time this, in turns with ours [default: nothing]
    #[arg(long, value_enum)]
    against: Option<Against>,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Against {
    /// A plain TCP connection that carries messages as long, both ways, and does nothing with them
    Echo,
    /// The same calls over TCP, to the same servers
    Tcp,
}

impl Against {
    fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Tcp => "tcp",
        }
    }
}

/// The process with the servers.
#[derive(Args)]
pub(crate) struct PeerOptions {
    #[arg(long)]
    folder: PathBuf,
    #[arg(long)]
    shards: u32,
    /// Where checkpoints are kept, if any are
    #[arg(long)]
    checkpoints: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Operation {
    Push,
    Pull,
    PushPull,
}

const OPERATIONS: [(Operation, &str); 3] =
    [(Operation::Push, "push"), (Operation::Pull, "pull"), (Operation::PushPull, "push_pull")];

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    /// This one, and the process with the servers.
    ranks: u32,
    shards: u32,
    operation: Operation,
    dtype: &'static str,
    bytes: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    /// Payload there and back.
    goodput_gb_per_s: f64,
    /// What was timed in turns with it, how long that took, and how many times as long as ours: above 1, ours is quicker.
    against: Option<&'static str>,
    against_p50_us: Option<f64>,
    against_p99_us: Option<f64>,
    of_against: Option<f64>,
}

/// Serves until its standard input ends: with whoever started it.
pub(crate) fn peer(options: &PeerOptions) -> Result<(), Box<dyn Error>> {
    let checkpoints = options.checkpoints.clone().map(|place| Checkpoints { place, keep: 1 });
    let servers = LocalServers::start(options.shards, ServerSettings { checkpoints, ..ServerSettings::default() })?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let store = FileStore::new(&options.folder)?;
    store.set("echo", listener.local_addr()?.to_string().as_bytes())?;
    store.set("servers", servers.addresses().join(" ").as_bytes())?;
    std::thread::spawn(move || echo::serve(&listener));
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    servers.stop();
    Ok(())
}

/// Measures and prints.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let sound = |bytes: &usize| (4..=1 << 30).contains(bytes) && bytes.is_multiple_of(4);
    if options.shards == 0 || options.rounds == 0 || !options.bytes.iter().all(sound) {
        return Err("give at least one shard and one round, and --bytes in multiples of 4 up to 1g".into());
    }
    let report = Report::open(options.report.as_deref())?;
    let folder = tempfile::Builder::new().prefix("gradwire-bench-").tempdir()?;
    let checkpoints = folder.path().join("checkpoints");
    let _family = servers(options, folder.path(), options.snapshot.then_some(&checkpoints))?;
    let store = FileStore::new(folder.path())?;
    let read = |key| Ok::<_, Box<dyn Error>>(String::from_utf8(store.get(key, Instant::now() + PATIENCE)?)?);
    let addresses: Vec<String> = read("servers")?.split(' ').map(str::to_owned).collect();
    if !options.workers.is_empty() {
        return workers::run(&addresses, options, &report);
    }
    if let Some(rows) = options.sparse {
        return sparse::run(&addresses, rows, options, &report);
    }
    if options.snapshot {
        return snapshot::run(&addresses, &checkpoints, options, &report);
    }
    let client = Client::connect(&addresses, settings(options.wire))?;
    let mut echo = match options.against {
        Some(Against::Echo) => Some(Echo::connect(read("echo")?.parse()?)?),
        _ => None,
    };
    let plain = match options.against {
        Some(Against::Tcp) => Some(Client::connect(&addresses, settings(Way::Tcp))?),
        _ => None,
    };
    let (shards, way) = (plural(options.shards, "shard"), way(options.wire));
    let title = format!("parameter server: a dense float32 table on {shards}, {way}");
    if !options.json {
        println!("{title}; {}", machine::described());
        print_head(options);
    }
    let mut rows = Vec::new();
    let progress = Progress::start(options.bytes.len() * OPERATIONS.len());
    for &bytes in &options.bytes {
        let mut table = Table::open(&client, &format!("bench-{bytes}"), bytes)?;
        let over_tcp = |client| Table::open(client, &format!("bench-{bytes}-tcp"), bytes);
        let mut plain = plain.as_ref().map(over_tcp).transpose()?;
        for (operation, name) in OPERATIONS {
            progress.next(format!("{name} of {bytes} bytes"));
            let other = match (echo.as_mut(), plain.as_mut()) {
                (Some(echo), _) => Some(Other::Echo(Mirror::new(echo, operation, bytes)?)),
                (None, Some(table)) => Some(Other::Tcp(table)),
                (None, None) => None,
            };
            let row = measure(options, &mut table, operation, other)?;
            print(&row, options.json)?;
            rows.push(row);
        }
        table.check()?;
        plain.as_mut().map_or(Ok(()), Table::check)?;
    }
    client.close();
    drop(progress);
    report.add(|| section(options, &title, &rows))
}

fn print_head(options: &Options) {
    let other = options.against.map_or("-", Against::name);
    let (median, of) = (format!("{other} p50 us"), format!("of {other}"));
    println!(
        "{:>10} {:>12} {:>7} {:>11} {:>11} {:>13} {median:>12} {of:>8}",
        "operation", "bytes", "rounds", "p50 us", "p99 us", "goodput GB/s"
    );
}

fn print(row: &Row, json: bool) -> Result<(), Box<dyn Error>> {
    if json {
        println!("{}", serde_json::to_string(row)?);
        return Ok(());
    }
    let Row { operation, bytes, rounds, p50_us, p99_us, goodput_gb_per_s, against_p50_us, of_against, .. } = row;
    let name = OPERATIONS.iter().find(|(other, _)| other == operation).map_or("", |(_, name)| name);
    let or_dash = |value: &Option<f64>, places| value.map_or("-".to_owned(), |v| format!("{v:.places$}"));
    println!(
        "{name:>10} {bytes:>12} {rounds:>7} {p50_us:>11.1} {p99_us:>11.1} {goodput_gb_per_s:>13.3} {:>12} {:>8}",
        or_dash(against_p50_us, 1),
        or_dash(of_against, 3)
    );
    Ok(())
}

/// What a client is made with.
fn settings(wire: Way) -> ClientSettings {
    let default = ClientSettings::default();
    let transport = Config { wire: wire.choice(), ..default.transport };
    ClientSettings { timeout: PATIENCE, transport, ..default }
}

/// How bytes go, for people.
fn way(wire: Way) -> String {
    if wire == Way::Tcp { "TCP over loopback".to_owned() } else { wire.title().to_owned() }
}

/// Starts the process with the servers, which ends with what is given back.
fn servers(options: &Options, folder: &Path, checkpoints: Option<&PathBuf>) -> Result<Family, Box<dyn Error>> {
    let mut family = Family::default();
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("ps-peer").arg("--folder").arg(folder).args(["--shards", &options.shards.to_string()]);
    if let Some(checkpoints) = checkpoints {
        command.arg("--checkpoints").arg(checkpoints);
    }
    family.start("the servers".to_owned(), command.stdin(Stdio::piped()))?;
    Ok(family)
}

/// A table, and what ought to be in it.
struct Table {
    table: DenseTable,
    gradient: Arc<Region>,
    values: Arc<Region>,
    pushes: usize,
}

impl Table {
    fn open(client: &Client, name: &str, bytes: usize) -> Result<Self, Box<dyn Error>> {
        let gradient = (0..bytes / 4).flat_map(|i| element(i).to_le_bytes()).collect();
        let table = client.dense(name, &[bytes / 4], DType::F32, TableOptions::default())?;
        Ok(Self { table, gradient: Region::from_vec(gradient), values: Region::zeroed(bytes), pushes: 0 })
    }

    fn call(&mut self, operation: Operation) -> Result<(), Box<dyn Error>> {
        let bytes = self.gradient.len();
        let (gradient, into) = (self.gradient.read(0..bytes)?, self.values.write(0..bytes)?);
        self.pushes += usize::from(operation != Operation::Pull);
        let pending = match operation {
            Operation::Push => self.table.push(gradient)?,
            Operation::Pull => self.table.pull(into)?,
            Operation::PushPull => self.table.push_pull(gradient, into)?,
        };
        pending.wait(None)?;
        Ok(())
    }

    /// Whether every push counted once, and what is pulled is their sum.
    fn check(&mut self) -> Result<(), Box<dyn Error>> {
        self.call(Operation::Pull)?;
        let values = self.values.read(0..self.values.len())?;
        for (i, four) in values.as_chunks::<4>().0.iter().enumerate() {
            let (got, expected) = (f32::from_le_bytes(*four), element(i) * self.pushes as f32);
            if got != expected {
                let pushes = self.pushes;
                return Err(format!("element {i} is {got} after {pushes} pushes, not {expected}").into());
            }
        }
        Ok(())
    }
}

fn element(at: usize) -> f32 {
    (at % 61) as f32
}

fn measure(
    options: &Options,
    table: &mut Table,
    operation: Operation,
    mut other: Option<Other<'_>>,
) -> Result<Row, Box<dyn Error>> {
    let bytes = table.gradient.len();
    let rounds = (options.rounds * (1 << 20) / bytes).clamp(10, options.rounds.max(10));
    if table.pushes + rounds + WARM_UP > EXACT / 61 {
        return Err("fewer rounds, please: the sums would no longer be exact, and could not be checked".into());
    }
    table.call(operation)?;
    table.check()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds + WARM_UP {
        let began = Instant::now();
        table.call(operation)?;
        let took = began.elapsed();
        let other = other.as_mut().map(|other| other.call(operation)).transpose()?;
        if round >= WARM_UP {
            ours.push(took.as_secs_f64() * 1e6);
            theirs.extend(other.map(|took| took.as_secs_f64() * 1e6));
        }
    }
    let (ours, theirs) = (sorted(ours), sorted(theirs));
    let p50 = percentile(&ours, 50);
    let payload = if operation == Operation::PushPull { 2 * bytes } else { bytes };
    let their = |percent| (!theirs.is_empty()).then(|| percentile(&theirs, percent));
    Ok(Row {
        host: machine::host(),
        wire: options.wire.name(),
        ranks: 2,
        shards: options.shards,
        operation,
        dtype: "float32",
        bytes,
        rounds,
        p50_us: p50,
        p99_us: percentile(&ours, 99),
        goodput_gb_per_s: payload as f64 / p50 / 1e3,
        against: options.against.map(Against::name),
        against_p50_us: their(50),
        against_p99_us: their(99),
        of_against: their(50).map(|their| their / p50),
    })
}

/// What is timed in turns with a table.
enum Other<'a> {
    Echo(Mirror<'a>),
    Tcp(&'a mut Table),
}

impl Other<'_> {
    fn call(&mut self, operation: Operation) -> Result<Duration, Box<dyn Error>> {
        match self {
            Self::Echo(mirror) => Ok(mirror.call()?),
            Self::Tcp(table) => {
                let began = Instant::now();
                table.call(operation)?;
                Ok(began.elapsed())
            }
        }
    }
}

/// The echo's side of an operation: messages of the same lengths.
struct Mirror<'a> {
    echo: &'a mut Echo,
    message: Vec<u8>,
    answer: Vec<u8>,
}

impl<'a> Mirror<'a> {
    fn new(echo: &'a mut Echo, operation: Operation, bytes: usize) -> Result<Self, Box<dyn Error>> {
        let (ask, answer) = match operation {
            Operation::Push => (bytes, SHORT),
            Operation::Pull => (SHORT, bytes),
            Operation::PushPull => (bytes, bytes),
        };
        let whole: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
        let mut back = vec![0; bytes];
        echo.call(&whole, &mut back)?;
        if back != whole {
            return Err("the echo gives back something else".into());
        }
        Ok(Self { echo, message: vec![3; ask], answer: vec![0; answer] })
    }

    fn call(&mut self) -> std::io::Result<Duration> {
        let began = Instant::now();
        self.echo.call(&self.message, &mut self.answer)?;
        Ok(began.elapsed())
    }
}

fn section(options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    type Value = fn(&Row) -> Option<f64>;
    let lines = |ours: Value, theirs: Value| {
        let line = |operation: Operation, name: String, value: Value| {
            let mine = rows.iter().filter(|row| row.operation == operation);
            Series { name, points: mine.filter_map(|row| Some((row.bytes as f64, value(row)?))).collect() }
        };
        let against = options.against.map_or("", Against::name);
        let both = |(operation, name): (Operation, &str)| {
            [line(operation, name.to_owned(), ours), line(operation, format!("{against} for {name}"), theirs)]
        };
        OPERATIONS.into_iter().flat_map(both).collect()
    };
    let charts = vec![
        Chart::by_bytes("Median time of a call", "µs", lines(|row| Some(row.p50_us), |row| row.against_p50_us)),
        Chart::by_bytes(
            "Time of the slowest calls",
            "p99, µs",
            lines(|row| Some(row.p99_us), |row| row.against_p99_us),
        ),
        Chart::by_bytes("Goodput", "GB/s", lines(|row| Some(row.goodput_gb_per_s), |_| None)),
    ];
    Section::new(format!("ps-{}-shards-{}", options.shards, options.wire.name()), title, charts, rows)
}
