//! Does: all-reduce over memory of CUDA devices, by way of the host and from device to device, beside the same over pinned memory of
//! the host and the bare copies; and what folds on the device beside its copies. In one process: each rank is a thread.

mod row;

use crate::progress::Progress;
use crate::report::{Report, Section};
use crate::statistics::sorted;
use crate::{help, machine, sizes};
use clap::Args;
use gradwire_collectives::{
    Call, Collective, Communicator, DType, DeviceCall, DeviceKernels, FoldPlace, Piece, Reduction, Settings,
};
use gradwire_transport::cuda::{Act, Device, DeviceMemory, DeviceSlice, Driver, Stream};
use gradwire_transport::{Config, GroupSpec, MemoryStore, Rank, Region, WireChoice, WorldSize, form_group};
use row::{About, Row, Timed, WAYS};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const SUM: Collective = Collective::AllReduce { op: Reduction::Sum };
/// Runs before those that count: buffers are pinned and connections warmed by then.
const WARM_UP: usize = 3;

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Args, Clone)]
#[command(after_help = help::GPU)]
pub(crate) struct Options {
    /// File of CUDA's driver, instead of libcuda.so.1
    #[arg(long, env = "GRADWIRE_CUDA_LIBRARY", value_name = "FILE")]
    library: Option<PathBuf>,
    /// File of NVRTC, instead of the system's libnvrtc.so
    #[arg(long, env = "GRADWIRE_NVRTC_LIBRARY", value_name = "FILE")]
    nvrtc: Option<PathBuf>,
    /// Ranks, each a thread of this process, from 1 to 16
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: u32,
    /// Use shared memory instead of TCP over loopback, and measure from device to device too
    #[arg(long)]
    shm: bool,
    /// Bytes of the buffer, float32, each size in turn, at least 4
    #[arg(long, visible_alias = "bytes", value_delimiter = ',', default_value = "64k,1m,16m,64m", value_parser = sizes::parse)]
    sizes: Vec<usize>,
    /// Timed calls of each way and size, up to 10000
    #[arg(long, visible_alias = "rounds", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    calls: u16,
    /// One JSON object a line, for each way and size, instead of the tables
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// What one size took: sorted microseconds of each way that there is.
struct Taken {
    bytes: usize,
    times: Vec<(Timed, Vec<f64>)>,
}

/// What a rank measures with.
struct Bench {
    staged: Communicator,
    /// The same ranks, who lend each other memory of their devices.
    lent: Option<Communicator>,
    kernels: Option<DeviceKernels>,
    stream: Stream,
}

/// Measures and prints; nothing is measured without a driver.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    if options.sizes.iter().any(|bytes| *bytes < 4) {
        return Err("give --sizes of at least 4 bytes, one element".into());
    }
    let report = Report::open(options.report.as_deref())?;
    let driver = Driver::load(options.library.as_deref())?;
    let taken = measured(options, driver)?;
    let about =
        About { host: machine::host(), device: driver.device(0)?.name()?, ranks: options.ranks, is_shm: options.shm };
    let rows: Vec<Row> = taken.iter().flat_map(|taken| about.rows(taken)).collect();
    if options.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else {
        println!("{}; {}", about.title(), machine::described());
        print!("{}", about.tables(&rows));
    }
    report.add(|| Section::new(about.id(), &about.title(), about.charts(&rows), &rows))
}

/// What rank 0 saw of each size.
fn measured(options: &Options, driver: &'static Driver) -> Result<Vec<Taken>, Box<dyn Error>> {
    let count = driver.count()?.max(1);
    let world_size = WorldSize::new(options.ranks).ok_or("there is at least one rank")?;
    let store = Arc::new(MemoryStore::default());
    let progress = Progress::start(options.sizes.len());
    let results = std::thread::scope(|scope| {
        let start = |rank: Rank| {
            let store = Arc::clone(&store);
            let progress = Some(&progress).filter(|_| rank == Rank(0));
            scope.spawn(move || -> Result<Vec<Taken>, Failure> {
                let mut bench = Bench::open(options, &driver.device(rank.0 % count)?, (rank, world_size), &store)?;
                let sizes = options.sizes.iter().map(|size| size / 4 * 4);
                let one_size = |bytes| {
                    if let Some(progress) = progress {
                        progress.next(format!("{bytes} bytes"));
                    }
                    bench.one_size(bytes, usize::from(options.calls))
                };
                sizes.map(one_size).collect()
            })
        };
        let threads: Vec<_> = world_size.ranks().map(start).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a rank panicked")).collect::<Result<Vec<_>, _>>()
    })?;
    let mut taken = Vec::new();
    for (rank, result) in results.into_iter().enumerate() {
        let result = result.map_err(|error| format!("rank {rank}: {error}"))?;
        if rank == 0 {
            taken = result;
        }
    }
    Ok(taken)
}

impl Bench {
    fn open(
        options: &Options,
        device: &Arc<Device>,
        (rank, world_size): (Rank, WorldSize),
        store: &Arc<MemoryStore>,
    ) -> Result<Self, Failure> {
        let meet = |name: &str, cuda_direct: bool| -> Result<Communicator, Failure> {
            let wire = if options.shm { WireChoice::Auto } else { WireChoice::Tcp };
            let config = Config { wire, ..Config::default() };
            let spec =
                GroupSpec { name: name.into(), rank, world_size, store: Arc::<MemoryStore>::clone(store), config };
            let nvrtc = options.nvrtc.clone();
            // What is measured is each way, not what would be chosen.
            let cuda_reduce = Some(if cuda_direct { FoldPlace::Device } else { FoldPlace::Host });
            let settings = Settings { same_host: options.shm, cuda_direct, cuda_reduce, nvrtc, ..Settings::default() };
            Ok(Communicator::new(form_group(spec, Instant::now() + PATIENCE)?, name, settings)?)
        };
        let kernels = DeviceKernels::new(device, options.nvrtc.as_deref());
        if let (Err(error), Rank(0)) = (&kernels, rank) {
            eprintln!("{error}");
        }
        let lent = if options.shm { Some(meet("gpu lent", true)?) } else { None };
        let stream = Stream::new(device)?;
        Ok(Self { staged: meet("gpu", false)?, lent, kernels: kernels.ok(), stream })
    }

    fn one_size(&mut self, bytes: usize, calls: usize) -> Result<Taken, Failure> {
        let (stream, staged) = (&self.stream, &self.staged);
        let memory = DeviceMemory::allocate(stream.device(), bytes)?;
        let (one, other) =
            (DeviceMemory::allocate(stream.device(), bytes)?, DeviceMemory::allocate(stream.device(), bytes)?);
        let host = stream.device().pin(bytes)?;
        let (rank, ranks) = (staged.rank().0 as f32, staged.world_size().get() as f32);
        let total = ranks * (ranks + 1.0) / 2.0;
        for group in [Some(staged), self.lent.as_ref()].into_iter().flatten() {
            fill(&host, rank + 1.0)?;
            bring(stream, &host, &memory)?;
            over_device(group, stream, &memory)?;
            expect(stream, &memory, &host, total)?;
        }
        // Which holds the total of all ranks now, and so twice that.
        let fold = self.kernels.as_mut().map(|kernels| kernels.get(DType::F32, Reduction::Sum)).transpose()?;
        if let Some(kernel) = fold {
            work(stream, vec![copying(&memory, &one)?])?;
            work(stream, vec![Act::Fold { kernel, from: vec![all(&memory)?, all(&one)?], into: all(&other)? }])?;
            expect(stream, &other, &host, 2.0 * total)?;
        }
        fill(&host, 0.0)?;
        bring(stream, &host, &memory)?;
        let mut times: [Vec<f64>; WAYS.len()] = Default::default();
        for call in 0..WARM_UP + calls {
            // In the order of WAYS.
            let us = [
                timed(|| over_device(staged, stream, &memory))?,
                self.lent.as_ref().map_or(Ok(0.0), |lent| timed(|| over_device(lent, stream, &memory)))?,
                timed(|| over_host(staged, &host))?,
                timed(|| fetch(stream, &memory, &host).and_then(|()| bring(stream, &host, &memory)))?,
                timed(|| work(stream, vec![copying(&memory, &one)?]))?,
                fold.as_ref().map_or(Ok(0.0), |kernel| {
                    let from = vec![all(&memory)?, all(&one)?];
                    timed(|| work(stream, vec![Act::Fold { kernel, from, into: all(&other)? }]))
                })?,
            ];
            if call >= WARM_UP {
                times.iter_mut().zip(us).for_each(|(all, time)| all.push(time));
            }
        }
        let is_there = |way: &Timed| match way {
            Timed::Lent => self.lent.is_some(),
            Timed::Sum => fold.is_some(),
            _ => true,
        };
        let times = WAYS.into_iter().zip(times.map(sorted)).filter(|(way, _)| is_there(way)).collect();
        Ok(Taken { bytes, times })
    }
}

fn all(memory: &Arc<DeviceMemory>) -> Result<DeviceSlice, Failure> {
    Ok(memory.slice(0..memory.len())?)
}

fn copying(from: &Arc<DeviceMemory>, to: &Arc<DeviceMemory>) -> Result<Act<'static>, Failure> {
    Ok(Act::Copy { from: all(from)?, to: all(to)? })
}

fn work(stream: &Stream, acts: Vec<Act<'_>>) -> Result<(), Failure> {
    stream.work(acts)?.map_or(Ok(()), |working| Ok(working.wait(Instant::now() + PATIENCE).map(drop)?))
}

fn expect(stream: &Stream, memory: &Arc<DeviceMemory>, host: &Arc<Region>, value: f32) -> Result<(), Failure> {
    fetch(stream, memory, host)?;
    if host.read(0..host.len())?.chunks_exact(4).any(|four| four != value.to_le_bytes()) {
        return Err(format!("the sum over {} bytes is wrong", host.len()).into());
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<f64, Failure> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64() * 1e6)
}

fn fill(host: &Arc<Region>, value: f32) -> Result<(), Failure> {
    host.write(0..host.len())?.chunks_exact_mut(4).for_each(|four| four.copy_from_slice(&value.to_le_bytes()));
    Ok(())
}

fn bring(stream: &Stream, host: &Arc<Region>, memory: &Arc<DeviceMemory>) -> Result<(), Failure> {
    let copy = stream.copy_in(host.read(0..host.len())?, memory.slice(0..memory.len())?)?;
    Ok(copy.wait(Instant::now() + PATIENCE).map(drop)?)
}

fn fetch(stream: &Stream, memory: &Arc<DeviceMemory>, host: &Arc<Region>) -> Result<(), Failure> {
    let copy = stream.copy_out(memory.slice(0..memory.len())?, host.write(0..host.len())?)?;
    Ok(copy.wait(Instant::now() + PATIENCE).map(drop)?)
}

fn over_device(group: &Communicator, stream: &Stream, memory: &Arc<DeviceMemory>) -> Result<(), Failure> {
    let output = vec![memory.slice(0..memory.len())?];
    let call = DeviceCall { collective: SUM, dtype: DType::F32, input: vec![], output, timeout: Some(PATIENCE) };
    group.start_on_device(call, stream)?.wait(None).ok_or("it has no end")??;
    Ok(())
}

fn over_host(group: &Communicator, host: &Arc<Region>) -> Result<(), Failure> {
    let output = vec![Piece::whole(Arc::clone(host))];
    let call = Call { collective: SUM, dtype: DType::F32, input: vec![], output, timeout: Some(PATIENCE) };
    Ok(group.run(call)?)
}
