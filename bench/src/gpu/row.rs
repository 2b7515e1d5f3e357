//! Pure: what the ways to sum over a device's memory took, as rows, tables and charts.

use super::Taken;
use crate::report::{Chart, Series};
use crate::statistics::percentile;
use serde::Serialize;
use std::fmt::Write;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Timed {
    /// The all-reduce over device memory, by way of the host
    Staged,
    /// The same from device to device
    Lent,
    /// The same over pinned memory of the host
    Host,
    /// Out of the device and back, bare
    Copies,
    /// Within the device
    Copy,
    /// The kernel that sums two buffers of the device into one
    Sum,
}

/// All, in the order in which they take turns.
pub(super) const WAYS: [Timed; 6] = [Timed::Staged, Timed::Lent, Timed::Host, Timed::Copies, Timed::Copy, Timed::Sum];

impl Timed {
    fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Lent => "lent",
            Self::Host => "host",
            Self::Copies => "copies",
            Self::Copy => "copy",
            Self::Sum => "sum",
        }
    }

    fn operation(self) -> &'static str {
        match self {
            Self::Staged | Self::Lent | Self::Host => "all_reduce",
            Self::Copies | Self::Copy => "copy",
            Self::Sum => "sum",
        }
    }

    /// Buffers of the device that are read or written, where nothing else is.
    fn operands(self) -> Option<usize> {
        match self {
            Self::Copy => Some(2),
            Self::Sum => Some(3),
            _ => None,
        }
    }
}

/// One way at one size.
#[derive(Serialize)]
pub(super) struct Row {
    host: String,
    device: String,
    wire: &'static str,
    /// Threads of one process; all of them do it at once.
    ranks: u32,
    way: Timed,
    operation: &'static str,
    dtype: &'static str,
    bytes: usize,
    rounds: usize,
    p50_us: f64,
    p99_us: f64,
    /// Bytes of the device's memory read and written a second, by the median; null where a wire or the host has a part in it.
    device_gb_per_s: Option<f64>,
}

/// What is the same for all rows of a run.
pub(super) struct About {
    pub(super) host: String,
    pub(super) device: String,
    pub(super) ranks: u32,
    pub(super) is_shm: bool,
}

impl About {
    pub(super) fn title(&self) -> String {
        let wire = if self.is_shm { "shared memory" } else { "loopback TCP" };
        format!("all-reduce of float32 on {}, {} ranks by {wire}, staged through the host", self.device, self.ranks)
    }

    fn wire(&self, way: Timed) -> &'static str {
        match way {
            Timed::Staged | Timed::Host if self.is_shm => "shm",
            Timed::Staged | Timed::Host => "tcp",
            Timed::Lent => "device",
            Timed::Copies | Timed::Copy | Timed::Sum => "memory",
        }
    }

    /// A row for each way that there is.
    pub(super) fn rows<'a>(&'a self, taken: &'a Taken) -> impl Iterator<Item = Row> + 'a {
        let bytes = taken.bytes;
        taken.times.iter().map(move |(way, times)| {
            let p50_us = percentile(times, 50);
            Row {
                host: self.host.clone(),
                device: self.device.clone(),
                wire: self.wire(*way),
                ranks: self.ranks,
                way: *way,
                operation: way.operation(),
                dtype: if way.operation() == "copy" { "bytes" } else { "float32" },
                bytes,
                rounds: times.len(),
                p50_us,
                p99_us: percentile(times, 99),
                device_gb_per_s: way.operands().map(|operands| (operands * bytes) as f64 / p50_us / 1e3),
            }
        })
    }

    /// The medians as people read them: of all ranks, and of the device alone.
    pub(super) fn tables(&self, rows: &[Row]) -> String {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let mut sizes: Vec<usize> = rows.iter().map(|row| row.bytes).collect();
        sizes.dedup();
        let of = |way, bytes| rows.iter().find(|row| row.way == way && row.bytes == bytes);
        let us = |way, bytes| of(way, bytes).map(|row| row.p50_us);
        let mut text = format!(
            "{:>12} {:>12} {:>12} {:>12} {:>8} {:>12}\n",
            "bytes", "staged us", "host us", "copies us", "overlap", "lent us"
        );
        for &bytes in &sizes {
            let [staged, host, copies] = [Timed::Staged, Timed::Host, Timed::Copies].map(|way| us(way, bytes));
            let overlap = staged.zip(host).zip(copies).map(|((staged, host), copies)| (host + copies) / staged);
            let [staged, host, copies] =
                [staged, host, copies].map(|us| us.map_or_else(|| "-".to_owned(), |us| format!("{us:.1}")));
            let (overlap, lent) = (number(overlap), number(us(Timed::Lent, bytes)));
            // A String takes all that is written.
            let _ = writeln!(text, "{bytes:>12} {staged:>12} {host:>12} {copies:>12} {overlap:>8} {lent:>12}");
        }
        let _ = writeln!(text, "on {} alone: bytes read and written", self.device);
        let _ = writeln!(text, "{:>12} {:>12} {:>12} {:>8}", "bytes", "copy GB/s", "sum GB/s", "share");
        for &bytes in &sizes {
            let rate = |way| of(way, bytes).and_then(|row| row.device_gb_per_s);
            let (copy, sum) = (rate(Timed::Copy), rate(Timed::Sum));
            let share = sum.zip(copy).map(|(sum, copy)| sum / copy);
            let _ = writeln!(text, "{bytes:>12} {:>12} {:>12} {:>8}", number(copy), number(sum), number(share));
        }
        text
    }

    pub(super) fn id(&self) -> String {
        format!("gpu-{}-{}", self.ranks, self.wire(Timed::Staged))
    }

    pub(super) fn charts(&self, rows: &[Row]) -> Vec<Chart> {
        let lines = |value: fn(&Row) -> Option<f64>, wanted: fn(Timed) -> bool| {
            let line = |way: Timed| {
                let mine = rows.iter().filter(|row| row.way == way);
                let points = mine.filter_map(|row| Some((row.bytes as f64, value(row)?))).collect();
                Series { name: way.name().to_owned(), points }
            };
            WAYS.into_iter().filter(|way| wanted(*way)).map(line).collect()
        };
        let of_all = |way: Timed| way.operands().is_none();
        vec![
            Chart::by_bytes("Time of a call", "median, µs", lines(|row| Some(row.p50_us), of_all)),
            Chart::by_bytes("Time of the slowest calls", "p99, µs", lines(|row| Some(row.p99_us), of_all)),
            Chart::by_bytes("The device alone: read and written", "GB/s", lines(|row| row.device_gb_per_s, |_| true)),
        ]
    }
}
