//! Pure: a row of the comparison, the bar it is held to, and the tables that people read.

use super::peer::{Layer, Peer};
use crate::collective::{Element, Operation, Way};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// One library's figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Figure {
    /// It was verified and timed.
    Measured { p50_us: f64, p99_us: f64, busbw_gb_per_s: f64, calls: usize },
    /// It was not, and why.
    Absent { absent: String },
}

impl Figure {
    pub(crate) fn p50(&self) -> Option<f64> {
        match self {
            Self::Measured { p50_us, .. } => Some(*p50_us),
            Self::Absent { .. } => None,
        }
    }

    pub(crate) fn p99(&self) -> Option<f64> {
        match self {
            Self::Measured { p99_us, .. } => Some(*p99_us),
            Self::Absent { .. } => None,
        }
    }

    pub(crate) fn busbw(&self) -> Option<f64> {
        match self {
            Self::Measured { busbw_gb_per_s, .. } => Some(*busbw_gb_per_s),
            Self::Absent { .. } => None,
        }
    }
}

/// What is alike within one table.
pub(crate) type Kind = (Layer, Way, u32, Operation, Element);

/// All libraries at one collective and size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) host: String,
    pub(crate) layer: Layer,
    pub(crate) wire: Way,
    pub(crate) ranks: u32,
    pub(crate) operation: Operation,
    pub(crate) dtype: Element,
    pub(crate) elements: usize,
    pub(crate) bytes: usize,
    pub(crate) measured_on: String,
    pub(crate) libraries: BTreeMap<Peer, String>,
    pub(crate) figures: BTreeMap<Peer, Figure>,
}

/// A row as `--json` tells it: with what follows from its figures.
#[derive(Serialize)]
pub(crate) struct Told<'a> {
    #[serde(flatten)]
    row: &'a Row,
    /// Ours.
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    /// The best peer, its median ÷ ours, and what that shall be at least; null where there is nobody to compare.
    best: Option<Peer>,
    ratio: Option<f64>,
    bar: Option<f64>,
}

/// How a row stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Standing {
    pub(crate) best: Peer,
    /// The best peer's time ÷ ours.
    pub(crate) ratio: f64,
    /// What the ratio shall be at least.
    pub(crate) bar: f64,
}

impl Standing {
    pub(crate) fn is_met(self) -> bool {
        self.ratio >= self.bar
    }
}

impl Row {
    /// Our median, in microseconds.
    pub(crate) fn ours(&self) -> Option<f64> {
        self.our_figure().and_then(Figure::p50)
    }

    fn our_figure(&self) -> Option<&Figure> {
        self.figures.iter().find(|(peer, _)| peer.is_ours()).map(|(_, figure)| figure)
    }

    /// With what follows from it.
    pub(crate) fn told(&self) -> Told<'_> {
        let standing = self.standing();
        Told {
            row: self,
            p50_us: self.ours(),
            p99_us: self.our_figure().and_then(Figure::p99),
            best: standing.map(|standing| standing.best),
            ratio: standing.map(|standing| standing.ratio),
            bar: standing.map(|standing| standing.bar),
        }
    }

    /// Beside the best peer; `None` where there is nobody to compare.
    pub(crate) fn standing(&self) -> Option<Standing> {
        let peers = self.figures.iter().filter(|(peer, _)| !peer.is_ours());
        let best = peers.filter_map(|(peer, figure)| Some((*peer, figure.p50()?)));
        let (best, time) = best.min_by(|a, b| a.1.total_cmp(&b.1))?;
        Some(Standing { best, ratio: time / self.ours()?, bar: self.bar() })
    }

    /// The bar: how many times as fast as the best peer we mean to be.
    pub(crate) fn bar(&self) -> f64 {
        let kib64 = self.bytes <= 64 << 10;
        let long = self.bytes >= 64 << 20;
        match (self.layer, self.wire, self.operation) {
            (_, _, operation) if operation != Operation::AllReduce => 1.0,
            (Layer::Torch, Way::Tcp, _) if self.ranks == 2 => 2.0,
            (Layer::Torch, Way::Shm, _) if self.ranks == 2 => 4.0,
            (Layer::Torch, ..) => 1.5,
            (_, Way::Shm, _) if self.ranks > 2 => 1.5,
            (_, Way::Shm, _) if kib64 => 2.0,
            (_, Way::Shm, _) if long => 3.0,
            (_, Way::Shm, _) => 1.3,
            _ if self.ranks > 2 => 1.0,
            _ if kib64 || long => 1.5,
            _ => 1.2,
        }
    }

    /// What is alike within one table.
    pub(crate) fn kind(&self) -> Kind {
        (self.layer, self.wire, self.ranks, self.operation, self.dtype)
    }

    /// `all_reduce of float32, 2 ranks, shared memory, native`.
    pub(crate) fn title(&self) -> String {
        let layer = if self.layer == Layer::Native { "native calls" } else { "through torch.distributed" };
        let (operation, dtype) = (self.operation.name(), self.dtype.dtype().name());
        format!("{operation} of {dtype}, {} ranks on one host, {}, {layer}", self.ranks, self.wire.title())
    }
}

/// A promise about two of our own figures.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct OwnBar {
    pub(crate) what: String,
    /// The one's time ÷ the other's.
    pub(crate) ratio: f64,
    /// What it shall be at most.
    pub(crate) most: f64,
}

/// Reduce-scatter takes at most 0.6 of an all-reduce's time from 1 MiB on; bfloat16 no more than float32 of as many elements.
pub(crate) fn own_bars(rows: &[Row]) -> Vec<OwnBar> {
    let mut bars = Vec::new();
    for row in rows {
        let alike = |other: &&Row| {
            (other.layer, other.wire, other.ranks) == (row.layer, row.wire, row.ranks) && other.elements == row.elements
        };
        let against = |operation, dtype| {
            rows.iter().filter(alike).find(|other| other.operation == operation && other.dtype == dtype)?.ours()
        };
        let Some(ours) = row.ours() else { continue };
        let size = size_of(row.bytes);
        if row.operation == Operation::ReduceScatter
            && row.bytes >= 1 << 20
            && let Some(whole) = against(Operation::AllReduce, row.dtype)
        {
            let what = format!("{} of {size}, of all_reduce", row.title());
            bars.push(OwnBar { what, ratio: ours / whole, most: 0.6 });
        }
        if row.dtype == Element::Bfloat16
            && let Some(long) = against(row.operation, Element::Float32)
        {
            bars.push(OwnBar { what: format!("{} of {size}, of float32", row.title()), ratio: ours / long, most: 1.0 });
        }
    }
    bars
}

/// The head of a text table.
pub(crate) fn head(row: &Row) -> String {
    let mut text = format!("\n{}: median us (bus bandwidth, GB/s)\n{:>10}", row.title(), "bytes");
    for peer in row.figures.keys() {
        let _ = write!(text, " {:>20}", peer.title());
    }
    let _ = write!(text, " {:>9} {:>10} {:>6}", "times", "of", "bar");
    text
}

/// A row as text.
pub(crate) fn line(row: &Row) -> String {
    let mut text = format!("{:>10}", size_of(row.bytes));
    for figure in row.figures.values() {
        let cell = match figure {
            Figure::Measured { p50_us, busbw_gb_per_s, .. } => format!("{} ({busbw_gb_per_s:.2})", time_of(*p50_us)),
            Figure::Absent { .. } => "-".to_owned(),
        };
        let _ = write!(text, " {cell:>20}");
    }
    if let Some(standing) = row.standing() {
        let Standing { best, ratio, bar } = standing;
        let met = if standing.is_met() { "" } else { "  missed" };
        let _ = write!(text, " {ratio:>9.2} {:>10} {bar:>6.1}{met}", best.title());
    }
    text
}

/// Why figures are missing, once each.
pub(crate) fn absences(rows: &[Row]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for row in rows {
        for (peer, figure) in &row.figures {
            if let Figure::Absent { absent } = figure {
                let line = format!("{} ({}, {} ranks): {absent}", peer.title(), row.wire.title(), row.ranks);
                if !all.contains(&line) {
                    all.push(line);
                }
            }
        }
    }
    all
}

/// The rows as Markdown: a line for each kind of row, a column for each size, how many times as fast as the best peer.
pub(crate) fn markdown(rows: &[Row]) -> String {
    let mut sizes: Vec<usize> = rows.iter().map(|row| 4 * row.elements).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let shown: Vec<usize> =
        sizes.into_iter().filter(|bytes| [8, 4096, 65536, 1 << 20, 16 << 20, 64 << 20].contains(bytes)).collect();
    let mut kinds: Vec<_> = rows.iter().map(Row::kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut text = String::from("| ");
    for bytes in &shown {
        let _ = write!(text, "| {} ", size_of(*bytes));
    }
    text.push_str("|\n|---");
    text.push_str(&"|---".repeat(shown.len()));
    text.push_str("|\n");
    for kind in kinds {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.kind() == kind).collect();
        let Some(first) = rows.first() else { continue };
        let layer = if first.layer == Layer::Torch { ", through torch" } else { "" };
        let dtype = if first.dtype == Element::Bfloat16 { " bf16" } else { "" };
        let wire = if first.wire == Way::Tcp { "TCP" } else { "memory" };
        let _ = write!(text, "| {}{dtype}, {} ranks, {wire}{layer} ", first.operation.name(), first.ranks);
        for bytes in &shown {
            let row = rows.iter().find(|row| 4 * row.elements == *bytes);
            let cell = row.and_then(|row| Some((row.ours()?, row.standing()?)));
            match cell {
                Some((ours, standing)) => {
                    let (ratio, best) = (standing.ratio, standing.best.title());
                    let _ = write!(text, "| {} µs, {ratio:.1} × {best} ", time_of(ours));
                }
                None => match row.and_then(|row| row.ours()) {
                    Some(ours) => write!(text, "| {} µs ", time_of(ours)).unwrap_or_default(),
                    None => text.push_str("| – "),
                },
            }
        }
        text.push_str("|\n");
    }
    text
}

pub(crate) fn size_of(bytes: usize) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        bytes if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} B"),
    }
}

fn time_of(microseconds: f64) -> String {
    let digits = if microseconds < 10.0 {
        2
    } else if microseconds < 100.0 {
        1
    } else {
        0
    };
    format!("{microseconds:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(operation: Operation, dtype: Element, elements: usize, times: &[(Peer, f64)]) -> Row {
        let measured = |p50_us: f64| Figure::Measured { p50_us, p99_us: p50_us, busbw_gb_per_s: 1.0, calls: 10 };
        Row {
            host: "h".to_owned(),
            layer: Layer::Native,
            wire: Way::Shm,
            ranks: 2,
            operation,
            dtype,
            elements,
            bytes: elements * dtype.dtype().bytes(),
            measured_on: "a machine".to_owned(),
            libraries: BTreeMap::new(),
            figures: times.iter().map(|(peer, time)| (*peer, measured(*time))).collect(),
        }
    }

    #[test]
    fn a_row_is_held_to_the_best_of_its_peers() {
        let times = [(Peer::Gradwire, 2.0), (Peer::Mpich, 5.0), (Peer::Openmpi, 3.0)];
        let standing = row(Operation::AllReduce, Element::Float32, 1024, &times).standing().unwrap();
        assert_eq!((standing.best, standing.ratio, standing.bar), (Peer::Openmpi, 1.5, 2.0));
        assert!(!standing.is_met());
        assert_eq!(row(Operation::AllReduce, Element::Float32, 1024, &times[..1]).standing(), None);
    }

    #[test]
    fn our_own_figures_are_held_to_each_other_by_their_elements() {
        let ours = |time| [(Peer::Gradwire, time)];
        let rows = [
            row(Operation::AllReduce, Element::Float32, 1 << 20, &ours(10.0)),
            row(Operation::ReduceScatter, Element::Float32, 1 << 20, &ours(7.0)),
            row(Operation::AllReduce, Element::Bfloat16, 1 << 20, &ours(8.0)),
            row(Operation::ReduceScatter, Element::Float32, 1 << 10, &ours(7.0)),
        ];
        let bars: Vec<(f64, f64)> = own_bars(&rows).into_iter().map(|bar| (bar.ratio, bar.most)).collect();
        assert_eq!(bars, [(0.7, 0.6), (0.8, 1.0)]);
    }

    #[test]
    fn tables_say_what_is_missing_and_why() {
        let mut rows =
            [row(Operation::AllReduce, Element::Float32, 1024, &[(Peer::Gradwire, 2.0), (Peer::Mpich, 5.0)])];
        rows[0].figures.insert(Peer::Impi, Figure::Absent { absent: "no wheel".to_owned() });
        assert!(line(&rows[0]).contains(" - ") && head(&rows[0]).contains("Intel MPI"));
        assert_eq!(absences(&rows), ["Intel MPI (shared memory, 2 ranks): no wheel"]);
        assert!(markdown(&rows).contains("| all_reduce, 2 ranks, memory | 2.00 µs, 2.5 × MPICH |"));
        let text = serde_json::to_string(&rows[0].told()).unwrap();
        let back: Row = serde_json::from_str(&text).unwrap();
        assert_eq!(line(&back), line(&rows[0]));
        let told: serde_json::Value = serde_json::from_str(&text).unwrap();
        let told = ["p50_us", "p99_us", "best", "ratio", "bar"].map(|name| told[name].clone());
        assert_eq!(serde_json::json!(told), serde_json::json!([2.0, 2.0, "mpich", 2.5, 2.0]));
    }
}
