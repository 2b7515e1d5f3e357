//! Does: latency and bandwidth of RDMA verbs by message size: bare writes, writes with a word, and our messages.

mod bare;
mod meeting;
mod messages;

use crate::collective::given;
use crate::help;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::sizes;
use crate::statistics::{percentile, sorted};
use clap::{Args, ValueEnum};
use gradwire_transport::VerbsConfig;
use gradwire_transport::verbs::adapter::Adapter;
use gradwire_transport::verbs::device::Device;
use meeting::Meeting;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long one step may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Path {
    /// RDMA writes; latency by watching memory, as ib_write_lat and ib_write_bw do
    Write,
    /// RDMA writes with immediate data, each of which meets a receive
    WriteWithImm,
    /// Messages of the verbs wire: post_send and post_recv
    Message,
    /// The same in a group that was formed as every program's is, with its sockets beside the wire
    Group,
}

/// One of the two figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Figure {
    /// Half of a round trip
    Latency,
    /// Many under way at once, one direction
    Bandwidth,
}

#[derive(Args, Clone)]
#[command(after_help = help::VERBS)]
pub(crate) struct Options {
    /// Wait here for the other end, which says what is measured
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "connect")]
    listen: Option<SocketAddr>,
    /// Where the other end listens
    #[arg(long, value_name = "HOST:PORT")]
    connect: Option<String>,
    #[command(flatten)]
    plan: Plan,
    /// One JSON object a line instead of the table
    #[arg(long, conflicts_with = "listen")]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "listen")]
    report: Option<PathBuf>,
}

/// What both ends do.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
struct Plan {
    /// Only these paths, as message,group
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["write", "write-with-imm", "message"])]
    path: Vec<Path>,
    /// Only this figure [default: both]
    #[arg(long, value_enum)]
    only: Option<Figure>,
    /// Smallest message, in bytes, at least 8
    #[arg(long, value_name = "SIZE", default_value = "8", value_parser = sizes::parse)]
    min_bytes: usize,
    /// Largest message, in bytes, at most 8m
    #[arg(long, value_name = "SIZE", default_value = "8m", value_parser = sizes::parse)]
    max_bytes: usize,
    /// Factor from one size to the next
    #[arg(long, default_value_t = 4)]
    step: usize,
    /// Timed messages of each size; fewer of those above 64 KiB, never under 10
    #[arg(long, default_value_t = 1000)]
    rounds: usize,
    /// Messages under way at once for bandwidth, from 1 to 64 [default: 4 MiB worth, from 2 to 64]
    #[arg(long)]
    in_flight: Option<usize>,
    /// Empty polls before a sleep; bare latency always polls [default: 2000 with a core for each end, else 20]
    #[arg(long)]
    spin: Option<u32>,
}

impl Plan {
    fn check(&self) -> Result<(), Box<dyn Error>> {
        let fits = self.min_bytes >= 8 && self.min_bytes <= self.max_bytes && self.max_bytes <= 8 << 20;
        match fits && self.step > 1 && self.rounds > 0 && self.in_flight.is_none_or(|count| (1..=64).contains(&count)) {
            true => Ok(()),
            false => Err("give 8 <= --min-bytes <= --max-bytes <= 8388608, --step 2 or more, --rounds 1 or more and \
                          --in-flight from 1 to 64"
                .into()),
        }
    }

    /// The sizes, each a multiple of a word.
    fn sizes(&self) -> impl Iterator<Item = usize> + use<> {
        let (step, most) = (self.step, self.max_bytes);
        let next = move |bytes: &usize| Some(bytes * step).filter(|bytes| *bytes <= most);
        std::iter::successors(Some(self.min_bytes.next_multiple_of(8)), next)
    }

    /// Paths by sizes.
    fn steps(&self) -> usize {
        self.path.len() * self.sizes().count()
    }

    fn rounds(&self, bytes: usize) -> usize {
        (self.rounds * (64 << 10) / bytes).clamp(10, self.rounds.max(10))
    }

    fn in_flight(&self, bytes: usize) -> usize {
        self.in_flight.unwrap_or_else(|| ((4 << 20) / bytes).clamp(2, 64))
    }

    /// As collectives do it.
    fn spin(&self, meeting: &Meeting) -> u32 {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        self.spin.unwrap_or(if meeting.ends_here <= cores { 2000 } else { 20 })
    }

    fn wants(&self, figure: Figure) -> bool {
        self.only.is_none_or(|only| only == figure)
    }
}

/// One end of a path. The first end begins; both are told the same.
trait End {
    /// The device, port and address.
    fn device(&self) -> String;

    /// Sends a pattern there and back and compares it.
    fn verify(&mut self, bytes: usize) -> Result<(), Box<dyn Error>>;

    /// Round trips, each in seconds.
    fn ping(&mut self, bytes: usize, rounds: usize) -> Result<Vec<f64>, Box<dyn Error>>;

    /// Messages from the first end to the other, so many at once; the seconds from the first to the last's arrival.
    fn stream(&mut self, bytes: usize, count: usize, in_flight: usize) -> Result<f64, Box<dyn Error>>;
}

/// One row of the table.
#[derive(Serialize)]
struct Row {
    title: &'static str,
    host: String,
    wire: &'static str,
    /// The two ends.
    ranks: u32,
    device: String,
    path: Path,
    dtype: &'static str,
    bytes: usize,
    rounds: usize,
    /// Half of a round trip; null where `--only bandwidth` is measured.
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    /// Null where `--only latency` is measured.
    mb_per_s: Option<f64>,
}

/// Measures, with the other end in this process or elsewhere.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    options.plan.check()?;
    let report = Report::open(options.report.as_deref())?;
    if let Some(address) = options.listen {
        return told(Meeting::listen(address)?, attend);
    }
    if let Some(address) = &options.connect {
        return told(Meeting::connect(address)?, |meeting| lead(meeting, options, &report));
    }
    let (first, second) = Meeting::within();
    std::thread::scope(|scope| {
        let other = scope.spawn(move || told(second, attend).map_err(|error| error.to_string()));
        told(first, |meeting| lead(meeting, options, &report))?;
        Ok(other.join().map_err(|_| "the other end panicked")??)
    })
}

/// Does one end's part; the other is told where it fails.
fn told(
    mut meeting: Meeting,
    part: impl FnOnce(&mut Meeting) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let result = part(&mut meeting);
    if let Err(error) = &result {
        meeting.fail(&error.to_string());
    }
    result
}

/// The end that says what is measured, and prints.
fn lead(meeting: &mut Meeting, options: &Options, report: &Report) -> Result<(), Box<dyn Error>> {
    let plan = &options.plan;
    let progress = Progress::start(plan.steps());
    let (mut rows, mut device) = (Vec::new(), String::new());
    meeting.tell("plan", serde_json::to_string(plan)?.as_bytes())?;
    for (at, &path) in plan.path.iter().enumerate() {
        let mut end = open(path, plan, meeting)?;
        device = end.device();
        if at == 0 && !options.json {
            println!("RDMA verbs, {}: {device}", title(&device));
            println!("{:>16} {:>10} {:>8} {:>12} {:>12} {:>12}", "path", "bytes", "rounds", "p50 us", "p99 us", "MB/s");
        }
        for bytes in plan.sizes() {
            progress.next(format!("{} of {bytes} bytes", given(&path)));
            let row = measure(&mut *end, path, plan, bytes, meeting)?;
            print(&row, options.json)?;
            rows.push(row);
        }
        meeting.swap(b"path over")?;
    }
    meeting.end();
    drop(progress);
    report.add(|| section(&device, meeting.ends_here, &rows))
}

fn print(row: &Row, json: bool) -> Result<(), Box<dyn Error>> {
    let text = |figure: Option<f64>| figure.map_or("-".to_owned(), |figure| format!("{figure:.1}"));
    let (p50, p99, rate) = (text(row.p50_us), text(row.p99_us), text(row.mb_per_s));
    match json {
        true => println!("{}", serde_json::to_string(row)?),
        false => {
            println!("{:>16} {:>10} {:>8} {p50:>12} {p99:>12} {rate:>12}", given(&row.path), row.bytes, row.rounds)
        }
    }
    Ok(())
}

fn section(device: &str, ends_here: usize, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let lines = |value: fn(&Row) -> Option<f64>| -> Vec<Series> {
        let line = |path: Path| {
            let mine = rows.iter().filter(|row| row.path == path);
            let points = mine.filter_map(|row| Some((row.bytes as f64, value(row)?))).collect();
            Series { name: given(&path), points }
        };
        Path::value_variants().iter().copied().map(line).collect()
    };
    let charts = vec![
        Chart::by_bytes("Half of a round trip", "median, µs", lines(|row| row.p50_us)),
        Chart::by_bytes("Half of the slowest round trips", "p99, µs", lines(|row| row.p99_us)),
        Chart::by_bytes("Bandwidth, one direction", "MB/s", lines(|row| row.mb_per_s)),
    ];
    let between = if ends_here == 2 { "one process" } else { "two processes" };
    let title = format!("RDMA verbs, {}: {device}, both ends in {between}", title(device));
    Section::new(format!("verbs-{}", between.replace(' ', "-")), &title, charts, rows)
}

/// The other end.
fn attend(meeting: &mut Meeting) -> Result<(), Box<dyn Error>> {
    let plan: Plan = serde_json::from_slice(&meeting.hear("plan")?)?;
    plan.check()?;
    // Who leads from this process says how far both are.
    let progress = (meeting.ends_here == 1).then(|| Progress::start(plan.steps()));
    for &path in &plan.path {
        let mut end = open(path, &plan, meeting)?;
        for bytes in plan.sizes() {
            if let Some(progress) = &progress {
                progress.next(format!("{} of {bytes} bytes", given(&path)));
            }
            measure(&mut *end, path, &plan, bytes, meeting)?;
        }
        meeting.swap(b"path over")?;
    }
    meeting.end();
    Ok(())
}

fn open(path: Path, plan: &Plan, meeting: &mut Meeting) -> Result<Box<dyn End>, Box<dyn Error>> {
    Ok(match path {
        Path::Write => Box::new(bare::Bare::open(plan, false, meeting)?),
        Path::WriteWithImm => Box::new(bare::Bare::open(plan, true, meeting)?),
        Path::Message => Box::new(messages::Messages::open(plan, meeting)?),
        Path::Group => Box::new(messages::Messages::form(plan, meeting)?),
    })
}

fn measure(
    end: &mut dyn End,
    path: Path,
    plan: &Plan,
    bytes: usize,
    meeting: &mut Meeting,
) -> Result<Row, Box<dyn Error>> {
    let rounds = plan.rounds(bytes);
    meeting.swap(b"verify")?;
    end.verify(bytes)?;
    let (mut p50_us, mut p99_us, mut mb_per_s) = (None, None, None);
    if plan.wants(Figure::Latency) {
        meeting.swap(b"latency")?;
        end.ping(bytes, 10.min(rounds))?;
        let times = sorted(end.ping(bytes, rounds)?);
        let half = |percent| Some(percentile(&times, percent) / 2.0 * 1e6);
        (p50_us, p99_us) = (half(50), half(99));
    }
    if plan.wants(Figure::Bandwidth) {
        let in_flight = plan.in_flight(bytes);
        meeting.swap(b"warm up")?;
        end.stream(bytes, in_flight, in_flight)?;
        meeting.swap(b"bandwidth")?;
        let seconds = end.stream(bytes, rounds, in_flight)?;
        mb_per_s = Some((bytes * rounds) as f64 / seconds / 1e6);
    }
    let device = end.device();
    Ok(Row {
        title: title(&device),
        host: meeting.host(),
        wire: "verbs",
        ranks: 2,
        device,
        path,
        dtype: "bytes",
        bytes,
        rounds,
        p50_us,
        p99_us,
        mb_per_s,
    })
}

/// What the figures are worth.
fn title(device: &str) -> &'static str {
    match device.starts_with("rxe") {
        true => "soft-RoCE under emulation: function and ratios, never RDMA speed",
        false => "on this device",
    }
}

/// The device, as this host's environment chooses it.
fn device() -> Result<Box<dyn Adapter>, Box<dyn Error>> {
    Ok(Box::new(Device::open(&settings()?, &[])?.0))
}

/// The settings that this host's environment gives.
pub(crate) fn settings() -> Result<VerbsConfig, Box<dyn Error>> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse()).transpose();
    let default = VerbsConfig::default();
    Ok(VerbsConfig {
        hca: std::env::var("GRADWIRE_IB_HCA").ok(),
        gid_index: number("GRADWIRE_IB_GID_INDEX")?,
        timeout: number("GRADWIRE_IB_TIMEOUT")?.unwrap_or(default.timeout),
        ..default
    })
}

/// When a step that begins now has taken too long.
fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

fn in_time(deadline: Instant, what: &str) -> Result<(), Box<dyn Error>> {
    match Instant::now() < deadline {
        true => Ok(()),
        false => Err(format!("{what}: nothing came within {PATIENCE:?}; see whether the other end still runs").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(path: Path, bytes: usize, latency: Option<f64>, mb_per_s: Option<f64>) -> Row {
        Row {
            title: title("rxe0, port 1"),
            host: "h".to_owned(),
            wire: "verbs",
            ranks: 2,
            device: "rxe0, port 1".to_owned(),
            path,
            dtype: "bytes",
            bytes,
            rounds: 10,
            p50_us: latency,
            p99_us: latency.map(|us| 2.0 * us),
            mb_per_s,
        }
    }

    #[test]
    fn rows_say_where_and_what_and_charts_show_what_was_measured() {
        let rows = [row(Path::Write, 8, Some(1.5), None), row(Path::WriteWithImm, 8, Some(2.5), None)];
        let told = serde_json::to_value(&rows[1]).unwrap();
        let names = ["host", "wire", "ranks", "path", "dtype", "bytes", "p50_us", "p99_us", "mb_per_s"];
        let expected = serde_json::json!(["h", "verbs", 2, "write-with-imm", "bytes", 8, 2.5, 5.0, null]);
        assert_eq!(serde_json::json!(names.map(|name| told[name].clone())), expected);
        let section = section("rxe0, port 1", 2, &rows).unwrap();
        assert!(section.title.contains("soft-RoCE under emulation") && section.title.contains("in one process"));
        let lines: Vec<_> = section.charts.iter().map(|chart| (chart.y.as_str(), chart.series.len())).collect();
        assert_eq!(lines, [("median, µs", 2), ("p99, µs", 2)], "no bandwidth was measured");
        let both = [row(Path::Message, 8, Some(1.5), Some(9.0))];
        assert_eq!(super::section("mlx5_0", 1, &both).unwrap().charts.len(), 3);
    }
}
