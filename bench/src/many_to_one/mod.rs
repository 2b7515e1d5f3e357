//! Does: many-to-one, the pattern of a parameter server: N processes push to one. Goodput, fairness, loss and latency as N grows.

mod count;
mod device;
mod member;
mod phases;
mod plain;
mod receiver;
mod row;
mod sender;
mod stamp;

pub(crate) use member::MemberOptions;

use crate::collective::Way;
use crate::family::Family;
use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::{help, machine, plural, sizes};
use clap::Args;
use row::{About, Cc, Row, Shape, Switch};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Starting and ending 65 processes on a busy machine, beside what they measure.
const BESIDE: Duration = Duration::from_secs(100);
/// The network for `--shape`, carried along so that the program needs no files.
const NETNS_CLUSTER: &str = include_str!("../../../scripts/netns-cluster");
/// Longest push: what one message by loan may hold.
const MOST_BYTES: usize = 4 << 20;
const MOST_SENDERS: u32 = 64;
const MOST_SOURCE: usize = 4 << 30;

#[derive(Args)]
#[command(after_help = help::MANY_TO_ONE)]
pub(crate) struct Options {
    /// How many processes send, from 1 to 64: 16, or several: 1,4,16, or 1..64 for the powers of two in between
    #[arg(long, default_value = "1..16", value_parser = counts)]
    senders: Counts,
    /// Which way bytes go
    #[arg(long, value_enum, default_value = "tcp")]
    wire: Way,
    /// Behind links of this rate and a switch with this buffer, such as 1gbit:64kb (network namespaces; needs root)
    #[arg(long, value_name = "RATE:BUFFER")]
    shape: Option<Shape>,
    /// Each process in a guest of its own, with a kernel and a soft-RoCE device of its own, that this script starts
    /// (scripts/softroce-vm of this project); for --wire verbs without RDMA hardware
    #[arg(long, value_name = "SCRIPT")]
    guests: Option<PathBuf>,
    /// How the network is kept from being overrun, several in turns: none,credit; and plain, sockets without this library
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none,credit")]
    cc: Vec<Cc>,
    /// Bytes of a push, from 32 to 4m; 256 KiB is what the parameter server sends as one part
    #[arg(long, value_name = "SIZE", default_value = "256k", value_parser = sizes::parse)]
    bytes: usize,
    /// Pushes that a sender has under way at once, from 1 to 64
    #[arg(long, default_value_t = 4)]
    depth: usize,
    /// Memory that all senders together push from, each from its share of it in turns, up to 4 GiB: the same for every number of
    /// senders, so that few do not push from caches that are too small for many. By default a sender has a buffer for each push
    /// that it may have under way
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = sizes::parse)]
    source: usize,
    /// Seconds to measure each row, from 0.1 to 600
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds to push before measuring, from 0 to 60
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    warm_up: f64,
    /// A line for each sender too
    #[arg(long)]
    each: bool,
    /// One JSON object a line instead of the table, each sender in it
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// Numbers of senders.
#[derive(Clone, Debug, PartialEq)]
struct Counts(Vec<u32>);

fn counts(text: &str) -> Result<Counts, String> {
    let wrong = || format!("give numbers from 1 to {MOST_SENDERS}: 16, or 1,4,16, or 1..64");
    let number = |text: &str| text.parse().ok().filter(|n| (1..=MOST_SENDERS).contains(n)).ok_or_else(wrong);
    if let Some((first, last)) = text.split_once("..") {
        let (first, last) = (number(first)?, number(last)?);
        let doubled = std::iter::successors(Some(first), |n| Some(n * 2));
        let mut counts: Vec<u32> = doubled.take_while(|n| *n < last).collect();
        counts.push(last);
        return if first <= last { Ok(Counts(counts)) } else { Err(wrong()) };
    }
    text.split(',').map(number).collect::<Result<_, _>>().map(Counts)
}

/// One member of a measurement.
pub(crate) fn member(options: &MemberOptions) -> Result<(), Box<dyn Error>> {
    match (options.rank, options.cc) {
        (0, Cc::Plain) => plain::receive(options),
        (_, Cc::Plain) => plain::send(options),
        (0, _) => receiver::receive(options),
        _ => sender::send(options),
    }
}

/// Refuses what goes by no such wire.
fn check_wire(options: &Options) -> Result<(), Box<dyn Error>> {
    if options.shape.is_some() && options.wire != Way::Tcp {
        return Err("--shape is about a network: use --wire tcp".into());
    }
    if options.wire == Way::Auto {
        return Err("name a wire: --wire tcp, shm or verbs".into());
    }
    if options.wire != Way::Tcp && options.cc.contains(&Cc::Plain) {
        return Err("--cc plain has sockets: use --wire tcp".into());
    }
    if options.guests.is_some() && options.wire != Way::Verbs {
        return Err("--guests have soft-RoCE devices: use --wire verbs".into());
    }
    Ok(())
}

/// Measures every number of senders and prints a row for each.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let sound = (stamp::LEAST_BYTES..=MOST_BYTES).contains(&options.bytes) && (1..=64).contains(&options.depth);
    if !sound || !(0.1..=600.0).contains(&options.seconds) || !(0.0..=60.0).contains(&options.warm_up) {
        let least = stamp::LEAST_BYTES;
        return Err(format!(
            "give {least} <= --bytes <= {MOST_BYTES}, 1 <= --depth <= 64, 0.1 <= --seconds <= 600, 0 <= --warm-up <= 60"
        )
        .into());
    }
    if options.source > MOST_SOURCE {
        return Err(format!("give --source <= {MOST_SOURCE}").into());
    }
    check_wire(options)?;
    let report = Report::open(options.report.as_deref())?;
    let about = About {
        host: machine::host(),
        wire: options.wire,
        shape: options.shape.clone(),
        bytes: options.bytes,
        depth: options.depth,
        source: options.source,
    };
    let title = format!(
        "many to one: pushes of {} bytes, {} under way a sender{}, {}",
        options.bytes,
        options.depth,
        if options.source > 0 { format!(", from {} bytes of all", options.source) } else { String::new() },
        path(options)
    );
    if !options.json {
        println!("{title}; {}", machine::described());
        if options.shape.is_some() {
            let most = row::MOST_SHARE_OF_LINK * 100.0;
            println!("(of a link's rate, payload can be {most:.1} %: the rest are headers of packets of 1500 bytes)");
        }
        println!("{}", Row::head());
    }
    let mut rows = Vec::new();
    let runs = options.senders.0.iter().flat_map(|senders| options.cc.iter().map(|cc| (*senders, *cc)));
    let runs: Vec<_> = runs.collect();
    let progress = Progress::start(runs.len());
    for (senders, cc) in runs {
        progress.next(format!("{} by {}", plural(senders, "sender"), cc.name()));
        let row = measure(options, &about, senders, cc)?;
        if options.json {
            println!("{}", serde_json::to_string(&row)?);
        } else {
            println!("{}", row.line());
            row.sender_lines().take_while(|_| options.each).for_each(|line| println!("{line}"));
        }
        rows.push(row);
    }
    if !options.json && options.shape.is_none() {
        row::judge(&rows).iter().for_each(|verdict| println!("{verdict}"));
    }
    drop(progress);
    report.add(|| section(options, &title, &rows))
}

fn path(options: &Options) -> String {
    match (&options.shape, options.wire) {
        (Some(shape), _) => {
            format!("TCP over links of {} and a switch buffer of {} (network namespaces)", shape.rate, shape.buffer)
        }
        (None, Way::Tcp) => "TCP over loopback".to_owned(),
        (None, way) if options.guests.is_some() => {
            format!("{}, each process in a guest with a soft-RoCE device under emulation", way.title())
        }
        (None, way) => way.title().to_owned(),
    }
}

/// One row: starts the members, waits for them, reads what they saw.
fn measure(options: &Options, about: &About, senders: u32, cc: Cc) -> Result<Row, Box<dyn Error>> {
    let folder = tempfile::Builder::new().prefix("gradwire-bench-").tempdir()?;
    let mut family = Family::default();
    let whole = Duration::from_secs_f64(options.seconds + options.warm_up) + BESIDE;
    let stats = folder.path().join("switch");
    if let Some(script) = &options.guests {
        // A guest sees the host's files; what it writes is kept where it is shared.
        let mut command = Command::new("bash");
        command.arg(script).args(["-n", &(senders + 1).to_string(), "-m", "512M", "--share"]).arg(folder.path());
        command.args(["-t", &whole.as_secs().to_string(), "--", "bash", "-c"]);
        command.arg("exec \"$@\" --rank $SOFTROCE_RANK --ip $SOFTROCE_IP").arg("member");
        add_member(command.arg(std::env::current_exe()?), options, (senders, cc), folder.path());
        family.start("the guests".to_owned(), &mut command)?;
    } else if let Some(shape) = &options.shape {
        let script = folder.path().join("netns-cluster");
        std::fs::write(&script, NETNS_CLUSTER)?;
        let mut command = Command::new("bash");
        command.arg(script).args([
            "--hosts",
            &(senders + 1).to_string(),
            "--rate",
            &shape.rate,
            "--buffer",
            &shape.buffer,
        ]);
        command.args(["--timeout", &whole.as_secs().to_string(), "--plain", "--stats"]).arg(&stats).arg("--");
        add_member(command.arg(std::env::current_exe()?), options, (senders, cc), folder.path());
        family.start("the network of namespaces".to_owned(), &mut command)?;
    } else {
        for rank in 0..=senders {
            let mut command = Command::new(std::env::current_exe()?);
            add_member(&mut command, options, (senders, cc), folder.path());
            command.args(["--rank", &rank.to_string(), "--ip", "127.0.0.1"]);
            let name = if rank == 0 { "the receiver".to_owned() } else { format!("sender {rank}") };
            family.start(name, &mut command)?;
        }
    }
    family.wait(&format!("measuring {}", plural(senders, "sender")), Instant::now() + whole)?;
    let read = |rank: u32| std::fs::read(folder.path().join(format!("result-{rank}.json")));
    let taken = serde_json::from_slice(&read(0)?)?;
    let pushed = (1..=senders).map(|rank| Ok(serde_json::from_slice(&read(rank)?)?));
    let pushed = pushed.collect::<Result<_, Box<dyn Error>>>()?;
    let switch = if options.shape.is_some() { Switch::parse(&std::fs::read_to_string(&stats)?) } else { None };
    Ok(Row::new(about, cc, &taken, pushed, switch))
}

fn add_member(command: &mut Command, options: &Options, (senders, cc): (u32, Cc), folder: &Path) {
    command.args(["many-to-one-member", "--senders", &senders.to_string(), "--folder"]).arg(folder);
    command.args(["--wire", options.wire.name(), "--cc", cc.name(), "--bytes", &options.bytes.to_string()]);
    command.args(["--depth", &options.depth.to_string(), "--seconds", &options.seconds.to_string()]);
    command.args(["--warm-up", &options.warm_up.to_string()]);
    command.args(["--buffers", &row::buffers((options.bytes, options.depth), options.source, senders).to_string()]);
}

fn section(options: &Options, title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let line = |name: &str, value: fn(&Row) -> f64| {
        let each = move |cc: Cc| Series {
            name: format!("{name}, {}", if cc == Cc::None { "no credit" } else { cc.name() }),
            points: rows.iter().filter(|row| row.cc == cc).map(|row| (row.senders as f64, value(row))).collect(),
        };
        row::ALL.map(each).into_iter().filter(|series| !series.points.is_empty()).collect::<Vec<_>>()
    };
    let by_senders = |title: &str, y: &str, y_log: bool, series: Vec<Vec<Series>>| Chart {
        title: title.to_owned(),
        x: "senders".to_owned(),
        y: y.to_owned(),
        x_log: true,
        y_log,
        series: series.concat(),
    };
    let charts = vec![
        by_senders("Goodput of all senders", "GB/s", false, vec![line("goodput", |row| row.goodput_gb_per_s)]),
        by_senders("Fairness", "Jain's index of goodput", false, vec![line("Jain", |row| row.jain)]),
        by_senders("Time of a push", "µs", true, vec![line("p50", |row| row.p50_us), line("p99", |row| row.p99_us)]),
        by_senders("Segments sent again", "segments", false, vec![line("retransmits", |row| row.retransmits as f64)]),
    ];
    let shape = options.shape.as_ref().map_or(String::new(), |shape| format!("-{}-{}", shape.rate, shape.buffer));
    let id = format!("many-to-one-{}{shape}-{}", options.wire.name(), options.bytes);
    Section::new(id, title, charts, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_senders_are_read_in_three_ways() {
        let read = |text| counts(text).map(|counts| counts.0);
        assert_eq!(read("16"), Ok(vec![16]));
        assert_eq!(read("1,4,3"), Ok(vec![1, 4, 3]));
        assert_eq!((read("1..64"), read("3..7")), (Ok(vec![1, 2, 4, 8, 16, 32, 64]), Ok(vec![3, 6, 7])));
        for wrong in ["", "0", "65", "a", "4..1", "1,,2", "1..65"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
