//! Does: says on what a measurement was made.

use std::fs;

/// The machine and the day, in one line.
pub(crate) fn described() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown processor");
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let load = read("/proc/loadavg");
    format!(
        "{}, {cores} cores, Linux {}, {}, load {}",
        model.trim_start_matches([' ', '\t', ':']),
        read("/proc/sys/kernel/osrelease").trim(),
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        load.split(' ').next().unwrap_or("unknown"),
    )
}

/// This host's name.
pub(crate) fn host() -> String {
    gradwire_transport::home().host
}
