//! Does: times the kernels that collectives sum with, beside what this machine's memory gives to the plainest loops.

use crate::progress::Progress;
use crate::report::{Chart, Report, Section, Series};
use crate::statistics::{percentile, sorted};
use crate::{help, machine, sizes};
use clap::Args;
use gradwire_collectives::reduce::reduce_into;
use gradwire_collectives::{DType, Reduction};
use gradwire_transport::shm::copy_streaming;
use half::bf16;
use serde::Serialize;
use std::error::Error;
use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

/// Each sample moves at least this much, so that the clock does not count.
const SAMPLE_BYTES: usize = 4 << 20;

#[derive(Args)]
#[command(after_help = help::MEMORY)]
pub(crate) struct Options {
    /// Bytes of each operand, each size in turn, multiples of 64: 32k fits the first cache, 256m fits none
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "32k,1m,16m,256m", value_parser = sizes::parse)]
    bytes: Vec<usize>,
    /// Samples of each kernel and size, taken in turns
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// One JSON object a line instead of the table
    #[arg(long)]
    json: bool,
    /// Adds plots to the page in this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// What is measured. The bytes that count are those that a kernel names, read or written, as STREAM counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kernel {
    /// `a = b`, by the standard library: the limit of copies.
    Copy,
    /// `a = b + s * c` over floats: the limit of sums (McCalpin, STREAM).
    Triad,
    /// Ours: a copy past the caches.
    CopyStreaming,
    /// Ours: `a = a + b`.
    SumF32,
    /// Ours: `a = a + b`, summed in 32 bits.
    SumBf16,
}

const KERNELS: [Kernel; 5] = [Kernel::Copy, Kernel::Triad, Kernel::CopyStreaming, Kernel::SumF32, Kernel::SumBf16];

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy (limit)",
            Self::Triad => "triad (limit)",
            Self::CopyStreaming => "copy_streaming",
            Self::SumF32 => "sum float32",
            Self::SumBf16 => "sum bfloat16",
        }
    }

    fn dtype(self) -> &'static str {
        match self {
            Self::Copy | Self::CopyStreaming => "bytes",
            Self::Triad | Self::SumF32 => "float32",
            Self::SumBf16 => "bfloat16",
        }
    }

    /// Operands that are read or written.
    fn operands(self) -> usize {
        if matches!(self, Self::Copy | Self::CopyStreaming) { 2 } else { 3 }
    }

    fn limit(self) -> Self {
        if self.operands() == 2 { Self::Copy } else { Self::Triad }
    }
}

#[derive(Serialize)]
struct Row {
    host: String,
    wire: &'static str,
    ranks: u32,
    kernel: Kernel,
    dtype: &'static str,
    bytes: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    gb_per_s: f64,
    /// Of what the plain loop of as many operands reached in the same run.
    of_limit: f64,
}

/// The operands. Floats apart from bytes, so that the plain loops need no conversion.
struct Operands {
    a: Vec<u8>,
    b: Vec<u8>,
    floats: [Vec<f32>; 3],
}

impl Operands {
    fn new(bytes: usize) -> Self {
        let floats = |start: f32| (0..bytes / 4).map(|i| start + (i % 64) as f32).collect();
        Self { a: vec![1; bytes], b: vec![2; bytes], floats: [floats(0.0), floats(1.0), floats(2.0)] }
    }

    fn run(&mut self, kernel: Kernel) {
        let [x, y, z] = &mut self.floats;
        let sum = |dtype, a: &mut [u8], b: &[u8]| reduce_into(dtype, Reduction::Sum, a, b).expect("floats have a sum");
        match kernel {
            Kernel::Copy => self.a.copy_from_slice(&self.b),
            Kernel::Triad => x.iter_mut().zip(y.iter().zip(z.iter())).for_each(|(x, (y, z))| *x = y + 3.0 * z),
            Kernel::CopyStreaming => copy_streaming(&mut self.a, &self.b),
            Kernel::SumF32 => sum(DType::F32, &mut self.a, &self.b),
            Kernel::SumBf16 => sum(DType::BF16, &mut self.a, &self.b),
        }
        black_box((&mut self.a, x));
    }
}

/// Measures and prints.
pub(crate) fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    if options.rounds == 0 || options.bytes.iter().any(|bytes| *bytes < 64 || !bytes.is_multiple_of(64)) {
        return Err("give at least one round, and multiples of 64 bytes".into());
    }
    let report = Report::open(options.report.as_deref())?;
    verify()?;
    let title = "memory: kernels beside the limit of this machine, one thread";
    if !options.json {
        println!("{title}; {}", machine::described());
        println!("{:>16} {:>12} {:>12} {:>12} {:>10} {:>9}", "kernel", "bytes", "p50 us", "p99 us", "GB/s", "of limit");
    }
    let mut rows = Vec::new();
    let progress = Progress::start(options.bytes.len() * (options.rounds + 1));
    for &bytes in &options.bytes {
        for row in measure(options, bytes, &progress) {
            if options.json {
                println!("{}", serde_json::to_string(&row)?);
            } else {
                let Row { kernel, p50_us, p99_us, gb_per_s, of_limit, .. } = &row;
                println!(
                    "{:>16} {bytes:>12} {p50_us:>12.1} {p99_us:>12.1} {gb_per_s:>10.2} {:>7.1} %",
                    kernel.name(),
                    of_limit * 100.0
                );
            }
            rows.push(row);
        }
    }
    drop(progress);
    report.add(|| section(title, &rows))
}

fn measure(options: &Options, bytes: usize, progress: &Progress) -> Vec<Row> {
    let mut operands = Operands::new(bytes);
    let repeats = (SAMPLE_BYTES / bytes).max(1);
    let mut times = [const { Vec::new() }; KERNELS.len()];
    for round in 0..=options.rounds {
        progress.next(format!("all kernels over {bytes} bytes"));
        for (at, &kernel) in KERNELS.iter().enumerate() {
            let began = Instant::now();
            (0..repeats).for_each(|_| operands.run(kernel));
            let took = began.elapsed().as_secs_f64() / repeats as f64;
            // The first round warms up.
            if round > 0 {
                times[at].push(took * 1e6);
            }
            // Floats of endless sums would become slow, or infinite.
            operands.a.fill(1);
        }
    }
    let times = times.map(sorted);
    let speed = |kernel: Kernel| {
        let at = KERNELS.iter().position(|other| *other == kernel).expect("every kernel is in the table");
        (bytes * kernel.operands()) as f64 / percentile(&times[at], 50) / 1e3
    };
    let row = |(at, &kernel): (usize, &Kernel)| Row {
        host: machine::host(),
        wire: "memory",
        ranks: 1,
        kernel,
        dtype: kernel.dtype(),
        bytes,
        rounds: options.rounds,
        p50_us: percentile(&times[at], 50),
        p99_us: percentile(&times[at], 99),
        gb_per_s: speed(kernel),
        of_limit: speed(kernel) / speed(kernel.limit()),
    };
    KERNELS.iter().enumerate().map(row).collect()
}

/// Every kernel's result against one element at a time, with a length that is no multiple of a vector.
fn verify() -> Result<(), String> {
    let count = 4099;
    let values = |scale: f32| (0..count).map(move |i| ((i * 7919) % 1021) as f32 * scale);
    let bytes32 = |scale| values(scale).flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let bytes16 = |scale| values(scale).flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>();
    let refused = |error: gradwire_collectives::reduce::UnsupportedReduction| error.to_string();
    let mut sum = bytes32(0.37);
    reduce_into(DType::F32, Reduction::Sum, &mut sum, &bytes32(1.91)).map_err(refused)?;
    let expected: Vec<u8> = values(0.37).zip(values(1.91)).flat_map(|(a, b)| (a + b).to_le_bytes()).collect();
    let mut sum16 = bytes16(0.37);
    reduce_into(DType::BF16, Reduction::Sum, &mut sum16, &bytes16(1.91)).map_err(refused)?;
    let rounded = |v: f32| bf16::from_f32(v).to_f32();
    let pairs = values(0.37).zip(values(1.91));
    let expected16: Vec<u8> = pairs.flat_map(|(a, b)| bf16::from_f32(rounded(a) + rounded(b)).to_le_bytes()).collect();
    let mut copied = vec![0; expected.len()];
    copy_streaming(&mut copied, &expected);
    let right = [
        ("sum float32", sum == expected),
        ("sum bfloat16", sum16 == expected16),
        ("copy_streaming", copied == expected),
    ];
    match right.iter().find(|(_, right)| !right) {
        Some((kernel, _)) => Err(format!("{kernel} gives a wrong result: nothing was timed")),
        None => Ok(()),
    }
}

fn section(title: &str, rows: &[Row]) -> Result<Section, Box<dyn Error>> {
    let series = KERNELS.map(|kernel| Series {
        name: kernel.name().to_owned(),
        points: rows.iter().filter(|row| row.kernel == kernel).map(|row| (row.bytes as f64, row.gb_per_s)).collect(),
    });
    let chart = Chart {
        title: "Memory".to_owned(),
        x: "bytes of an operand".to_owned(),
        y: "GB/s".to_owned(),
        x_log: true,
        y_log: false,
        series: series.into(),
    };
    Section::new("memory".to_owned(), title, vec![chart], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_right_and_every_one_gets_a_row() {
        verify().unwrap();
        let options = Options { bytes: vec![4096], rounds: 2, json: true, report: None };
        let rows = measure(&options, 4096, &Progress::start(3));
        assert_eq!(rows.len(), KERNELS.len());
        assert!(rows.iter().all(|row| row.gb_per_s > 0.0 && row.of_limit > 0.0));
        assert_eq!(rows[0].of_limit, 1.0);
    }
}
