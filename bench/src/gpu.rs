//! Does: all-reduce over memory of CUDA devices, by way of the host and from device to device, beside the same over pinned memory of
//! the host and the bare copies; and what folds on the device beside its copies. In one process: each rank is a thread.

use crate::sizes;
use crate::statistics::{percentile, sorted};
use clap::Args;
use gradwire_collectives::{
    Call, Collective, Communicator, DType, DeviceCall, DeviceKernels, Piece, Reduction, Settings,
};
use gradwire_transport::cuda::{Act, DeviceMemory, DeviceSlice, Driver, Stream};
use gradwire_transport::{Config, GroupSpec, MemoryStore, Rank, Region, WireChoice, WorldSize, form_group};
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
#[command(
    after_help = "Rank i uses device i modulo the number of devices, so that one is enough. Before anything is timed the sums
are checked. staged: the call over device memory; host: the same over pinned memory; copies: out of the device and back, bare.
overlap = (host + copies) / staged: 1 where copies and wire wait for each other, up to 2 where neither does. lent (with --shm): what
is longer than 4 MiB goes from device to device, as processes of one host do it by CUDA IPC; here all ranks are of one process.
The second table is one device alone: bytes read and written a second by a copy, and by the kernel that sums two buffers into one."
)]
pub(crate) struct Options {
    /// File of CUDA's driver, instead of libcuda.so.1
    #[arg(long, env = "GRADWIRE_CUDA_LIBRARY", value_name = "FILE")]
    library: Option<PathBuf>,
    /// File of NVRTC, instead of the system's libnvrtc.so
    #[arg(long, env = "GRADWIRE_NVRTC_LIBRARY", value_name = "FILE")]
    nvrtc: Option<PathBuf>,
    /// How many ranks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    ranks: u32,
    /// Use the hosts' shared memory instead of TCP
    #[arg(long)]
    shm: bool,
    /// Sizes of the buffer
    #[arg(long, value_delimiter = ',', default_value = "64k,1m,16m,64m", value_parser = sizes::parse)]
    sizes: Vec<usize>,
    /// Timed calls a size
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    calls: u16,
}

/// Median microseconds of each way.
struct Row {
    bytes: usize,
    staged: f64,
    lent: Option<f64>,
    host: f64,
    copies: f64,
    /// On the device alone; the second where there is a kernel.
    copy: f64,
    fold: Option<f64>,
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
    let driver = Driver::load(options.library.as_deref())?;
    let count = driver.count()?.max(1);
    let world_size = WorldSize::new(options.ranks).ok_or("there is at least one rank")?;
    let store = Arc::new(MemoryStore::default());
    let results = std::thread::scope(|scope| {
        let start = |rank: Rank| {
            let store = Arc::clone(&store);
            scope.spawn(move || -> Result<Vec<Row>, Failure> {
                let device = driver.device(rank.0 % count)?;
                let meet = |name: &str, cuda_direct: bool| -> Result<Communicator, Failure> {
                    let wire = if options.shm { WireChoice::Auto } else { WireChoice::Tcp };
                    let (store, config) = (Arc::clone(&store), Config { wire, ..Config::default() });
                    let spec = GroupSpec { name: name.into(), rank, world_size, store, config };
                    let nvrtc = options.nvrtc.clone();
                    let settings = Settings { same_host: options.shm, cuda_direct, nvrtc, ..Settings::default() };
                    Ok(Communicator::new(form_group(spec, Instant::now() + PATIENCE)?, name, settings)?)
                };
                let kernels = DeviceKernels::new(&device, options.nvrtc.as_deref());
                if let (Err(error), Rank(0)) = (&kernels, rank) {
                    eprintln!("{error}");
                }
                let lent = if options.shm { Some(meet("gpu lent", true)?) } else { None };
                let stream = Stream::new(&device)?;
                let mut bench = Bench { staged: meet("gpu", false)?, lent, kernels: kernels.ok(), stream };
                let sizes = options.sizes.iter().map(|size| size / 4 * 4);
                sizes.map(|bytes| bench.one_size(bytes, usize::from(options.calls))).collect()
            })
        };
        let threads: Vec<_> = world_size.ranks().map(start).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a rank panicked")).collect::<Result<Vec<_>, _>>()
    })?;
    let mut rows = Vec::new();
    for (rank, result) in results.into_iter().enumerate() {
        let result = result.map_err(|error| format!("rank {rank}: {error}"))?;
        if rank == 0 {
            rows = result;
        }
    }
    print(options, &driver.device(0)?.name()?, &rows);
    Ok(())
}

fn print(options: &Options, device: &str, rows: &[Row]) {
    let wire = if options.shm { "shared memory" } else { "loopback TCP" };
    println!(
        "all-reduce of float32 on {device}, {} ranks by {wire}, staged through the host; {}",
        options.ranks,
        crate::machine::described()
    );
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    println!(
        "{:>12} {:>12} {:>12} {:>12} {:>8} {:>12}",
        "bytes", "staged us", "host us", "copies us", "overlap", "lent us"
    );
    for Row { bytes, staged, host, copies, lent, .. } in rows {
        let overlap = (host + copies) / staged;
        println!("{bytes:>12} {staged:>12.1} {host:>12.1} {copies:>12.1} {overlap:>8.2} {:>12}", number(*lent));
    }
    println!("on {device} alone: bytes read and written");
    println!("{:>12} {:>12} {:>12} {:>8}", "bytes", "copy GB/s", "sum GB/s", "share");
    for Row { bytes, copy, fold, .. } in rows {
        let rate = |moved: f64, us: f64| moved * *bytes as f64 / us / 1e3;
        let (copy, fold) = (rate(2.0, *copy), fold.map(|us| rate(3.0, us)));
        let share = fold.map_or_else(|| "-".to_owned(), |fold| format!("{:.2}", fold / copy));
        println!("{bytes:>12} {copy:>12.2} {:>12} {share:>8}", number(fold));
    }
}

impl Bench {
    fn one_size(&mut self, bytes: usize, calls: usize) -> Result<Row, Failure> {
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
        let mut times: [Vec<f64>; 6] = Default::default();
        for call in 0..WARM_UP + calls {
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
        let [staged, lent, host, copies, copy, summed] = times.map(|times| percentile(&sorted(times), 50));
        let (lent, fold) = (self.lent.is_some().then_some(lent), fold.is_some().then_some(summed));
        Ok(Row { bytes, staged, lent, host, copies, copy, fold })
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
