//! Does: all-reduce over memory of CUDA devices by staging, beside the same over pinned memory of the host and the bare copies, in
//! one process: each rank is a thread.

use crate::sizes;
use crate::statistics::{percentile, sorted};
use clap::Args;
use gradwire_collectives::{Call, Collective, Communicator, DType, DeviceCall, Piece, Reduction, Settings};
use gradwire_transport::cuda::{Device, DeviceMemory, Driver, Stream};
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
overlap = (host + copies) / staged: 1 where copies and wire wait for each other, up to 2 where neither does."
)]
pub(crate) struct Options {
    /// File of CUDA's driver, instead of libcuda.so.1
    #[arg(long, env = "GRADWIRE_CUDA_LIBRARY", value_name = "FILE")]
    library: Option<PathBuf>,
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
    host: f64,
    copies: f64,
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
                let wire = if options.shm { WireChoice::Shm } else { WireChoice::Tcp };
                let config = Config { wire, ..Config::default() };
                let spec = GroupSpec { name: "gpu".into(), rank, world_size, store, config };
                let group = form_group(spec, Instant::now() + PATIENCE)?;
                let settings = Settings { same_host: options.shm, ..Settings::default() };
                measure(&Communicator::new(group, "gpu", settings)?, &device, options)
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
    println!("{:>12} {:>12} {:>12} {:>12} {:>8}", "bytes", "staged us", "host us", "copies us", "overlap");
    for Row { bytes, staged, host, copies } in rows {
        let overlap = (host + copies) / staged;
        println!("{bytes:>12} {staged:>12.1} {host:>12.1} {copies:>12.1} {overlap:>8.2}");
    }
}

fn measure(group: &Communicator, device: &Arc<Device>, options: &Options) -> Result<Vec<Row>, Failure> {
    let stream = Stream::new(device)?;
    options.sizes.iter().map(|size| one_size(group, &stream, size / 4 * 4, usize::from(options.calls))).collect()
}

fn one_size(group: &Communicator, stream: &Stream, bytes: usize, calls: usize) -> Result<Row, Failure> {
    let memory = DeviceMemory::allocate(stream.device(), bytes)?;
    let host = stream.device().pin(bytes)?;
    fill(&host, group.rank().0 as f32 + 1.0)?;
    bring(stream, &host, &memory)?;
    staged(group, stream, &memory)?;
    fetch(stream, &memory, &host)?;
    let ranks = group.world_size().get() as f32;
    let expected = (ranks * (ranks + 1.0) / 2.0).to_le_bytes();
    if host.read(0..bytes)?.chunks_exact(4).any(|value| value != expected) {
        return Err(format!("the sum over {bytes} bytes is wrong").into());
    }
    fill(&host, 0.0)?;
    let (mut all, mut times) = ([Vec::new(), Vec::new(), Vec::new()], [0.0; 3]);
    for call in 0..WARM_UP + calls {
        times[0] = timed(|| staged(group, stream, &memory))?;
        times[1] = timed(|| over_host(group, &host))?;
        times[2] = timed(|| fetch(stream, &memory, &host).and_then(|()| bring(stream, &host, &memory)))?;
        if call >= WARM_UP {
            all.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
        }
    }
    let [staged, host, copies] = all.map(|times| percentile(&sorted(times), 50));
    Ok(Row { bytes, staged, host, copies })
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

fn staged(group: &Communicator, stream: &Stream, memory: &Arc<DeviceMemory>) -> Result<(), Failure> {
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
