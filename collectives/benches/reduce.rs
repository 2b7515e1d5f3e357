//! Does: measures the kernels against what the memory of this machine allows, in the same run.
//!
//! `cargo bench -p gradwire-collectives --bench reduce` prints first a table of interleaved rounds, in which every kernel
//! is a share of a triad (`a[i] += s * b[i]`, the same traffic: two reads, one write) and of a plain copy; then criterion's
//! own figures of each kernel, to compare with earlier runs (`-- NAME` limits those to names that contain it).

use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire_collectives::reduce::fold;
use gradwire_collectives::{DType, Reduction};
use gradwire_transport::shm::copy_streaming;
use std::hint::black_box;
use std::time::Instant;

/// Bytes of a buffer: for the second-level cache, the third, and memory.
const SIZES: [usize; 3] = [64 << 10, 4 << 20, 64 << 20];
/// Rounds of the table.
const ROUNDS: usize = 21;
/// Bytes of a case's turn in a round, at least.
const TURN_BYTES: usize = 16 << 20;

/// One thing to measure.
struct Case {
    name: String,
    /// Streams of a buffer's length that it reads or writes.
    streams: usize,
    run: Box<dyn Fn(&mut Buffers)>,
}

/// Memory of the cases, all of the same length.
struct Buffers {
    own: Vec<u8>,
    others: [Vec<u8>; 3],
}

impl Buffers {
    /// Zeros: sums stay finite however often they are made, and no case meets slow denormal numbers.
    fn new(bytes: usize) -> Self {
        // Written once, or all pages would be one and the same.
        let zeros = || (0..bytes).map(|_| black_box(0)).collect::<Vec<u8>>();
        Self { own: zeros(), others: [zeros(), zeros(), zeros()] }
    }
}

fn cases() -> Vec<Case> {
    let limit = |name: &str, streams, run| Case { name: name.to_owned(), streams, run };
    let mut cases = vec![
        limit("triad", 3, Box::new(|b: &mut Buffers| triad(black_box(&mut b.own), &b.others[0]))),
        limit("copy", 2, Box::new(|b: &mut Buffers| black_box(&mut b.own).copy_from_slice(&b.others[0]))),
        limit("copy_streaming", 2, Box::new(|b: &mut Buffers| copy_streaming(black_box(&mut b.own), &b.others[0]))),
    ];
    let kernels = [
        (DType::F32, Reduction::Sum, 1),
        (DType::F32, Reduction::Avg, 1),
        (DType::F32, Reduction::Max, 1),
        (DType::F32, Reduction::Product, 1),
        (DType::F32, Reduction::Sum, 3),
        (DType::F64, Reduction::Sum, 1),
        (DType::BF16, Reduction::Sum, 1),
        (DType::BF16, Reduction::Max, 1),
        (DType::BF16, Reduction::Avg, 1),
        (DType::BF16, Reduction::Sum, 3),
        (DType::BF16, Reduction::Avg, 2),
        (DType::F16, Reduction::Sum, 1),
        (DType::F16, Reduction::Max, 1),
        (DType::F16, Reduction::Avg, 1),
        (DType::F16, Reduction::Sum, 3),
        (DType::F8E4M3Fn, Reduction::Sum, 1),
        (DType::F8E5M2, Reduction::Max, 1),
        (DType::I32, Reduction::Sum, 1),
        (DType::I64, Reduction::Max, 1),
        (DType::I64, Reduction::Avg, 1),
        (DType::U8, Reduction::Sum, 1),
        (DType::Bool, Reduction::Max, 1),
    ];
    cases.extend(kernels.map(|(dtype, op, others)| kernel(dtype, op, others)));
    cases
}

/// A fold of this rank's buffer with `others` more.
fn kernel(dtype: DType, op: Reduction, others: usize) -> Case {
    let run = move |b: &mut Buffers| {
        let inputs: [&[u8]; 3] = [&b.others[0], &b.others[1], &b.others[2]];
        fold(dtype, op, black_box(&mut b.own), 0, &inputs[..others], None, others + 1).expect("it means something");
    };
    Case { name: format!("{dtype} {} of {}", op.name(), others + 1), streams: others + 2, run: Box::new(run) }
}

/// `own[i] += 0.5 * other[i]`, as the compiler makes it for any x86-64.
#[inline(never)]
fn triad(own: &mut [u8], other: &[u8]) {
    for (own, other) in own.as_chunks_mut().0.iter_mut().zip(other.as_chunks().0) {
        *own = (f32::from_le_bytes(*own) + 0.5 * f32::from_le_bytes(*other)).to_le_bytes();
    }
}

/// What the measured code does is right: four ones are four, a copy copies.
fn verify() {
    let sum = |dtype, one: &[u8], four: &[u8]| {
        let (mut own, ones) = (one.repeat(5000), one.repeat(5000));
        fold(dtype, Reduction::Sum, &mut own, 2, &[&ones, &ones, &ones], None, 4).expect("it means something");
        assert!(own == four.repeat(5000), "four ones of {dtype}");
        let mut copied = vec![0; own.len()];
        copy_streaming(&mut copied, &own);
        assert!(copied == own, "a copy of {dtype}");
    };
    sum(DType::F32, &1f32.to_le_bytes(), &4f32.to_le_bytes());
    sum(DType::F64, &1f64.to_le_bytes(), &4f64.to_le_bytes());
    sum(DType::BF16, &half::bf16::ONE.to_le_bytes(), &half::bf16::from_f32(4.0).to_le_bytes());
    sum(DType::F16, &half::f16::ONE.to_le_bytes(), &half::f16::from_f32(4.0).to_le_bytes());
}

/// Rounds in which every case takes its turn, so that a change of the machine's pace meets all of them.
fn table(bytes: usize) {
    let (cases, mut buffers) = (cases(), Buffers::new(bytes));
    let turns = (TURN_BYTES / bytes).max(1);
    let mut seconds: Vec<Vec<f64>> = vec![Vec::with_capacity(ROUNDS); cases.len()];
    for round in 0..=ROUNDS {
        for (case, seconds) in cases.iter().zip(&mut seconds) {
            // Once unmeasured: its own buffers are in the cache then, if they fit.
            (case.run)(&mut buffers);
            let start = Instant::now();
            (0..turns).for_each(|_| (case.run)(&mut buffers));
            if round > 0 {
                seconds.push(start.elapsed().as_secs_f64() / turns as f64);
            }
        }
    }
    println!("\n{} KiB a buffer, one thread, {ROUNDS} interleaved rounds; GB/s of bytes read and written", bytes >> 10);
    println!("{:<22} {:>10} {:>10} {:>8} {:>9} {:>8}", "case", "p50 us", "p99 us", "GB/s", "of triad", "of copy");
    let mut limits = Vec::new();
    for (case, seconds) in cases.iter().zip(&mut seconds) {
        seconds.sort_by(f64::total_cmp);
        let (p50, p99) = (seconds[ROUNDS / 2], seconds[ROUNDS - 1]);
        let rate = (case.streams * bytes) as f64 / p50 / 1e9;
        limits.push(rate);
        let share = |at: usize| limits.get(at).map_or(String::new(), |limit| format!("{:.2}", rate / limit));
        let (triad, copy) = (share(0), share(1));
        println!("{:<22} {:>10.1} {:>10.1} {rate:>8.1} {triad:>9} {copy:>8}", case.name, p50 * 1e6, p99 * 1e6);
    }
}

fn main() {
    verify();
    // `cargo test --benches` passes `--test`: then it is enough that everything runs.
    if !std::env::args().any(|argument| argument == "--test") {
        SIZES.into_iter().for_each(table);
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("reduce/64KiB");
    let mut buffers = Buffers::new(SIZES[0]);
    for case in cases() {
        group.throughput(Throughput::Bytes((case.streams * SIZES[0]) as u64));
        group.bench_function(BenchmarkId::from_parameter(&case.name), |b| b.iter(|| (case.run)(&mut buffers)));
    }
    group.finish();
    criterion.final_summary();
}
