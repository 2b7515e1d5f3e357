//! Does: what a comparison is told by: a summary, a page with curves, the README's table; and rows read back.

use super::peer::Peer;
use super::row::{self, Figure, Kind, Row};
use crate::report::{Chart, Report, Section, Series};
use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- compare: begin -->";
const END: &str = "<!-- compare: end -->";

/// Rows that were told with `--json`; of two alike, the later one.
pub(super) fn read(files: &[PathBuf]) -> Result<Vec<Row>, Box<dyn Error>> {
    let mut rows: Vec<Row> = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
        for line in text.lines() {
            let row: Row = serde_json::from_str(line)
                .map_err(|error| format!("{} has a line that is no row of ours: {error}", file.display()))?;
            rows.retain(|other| (other.kind(), other.elements) != (row.kind(), row.elements));
            rows.push(row);
        }
    }
    rows.sort_by_key(|row| (row.kind(), row.elements));
    Ok(rows)
}

/// How many bars are met, which of our own are not, and who was missing.
pub(super) fn summary(rows: &[Row]) {
    let standings: Vec<_> = rows.iter().filter_map(Row::standing).collect();
    let met = standings.iter().filter(|standing| standing.is_met()).count();
    println!("\n{met} of {} bars against the best peer are met", standings.len());
    for bar in row::own_bars(rows) {
        let met = if bar.ratio <= bar.most { "met" } else { "missed" };
        println!("{}: {:.2}, bar {:.1}, {met}", bar.what, bar.ratio, bar.most);
    }
    for absence in row::absences(rows) {
        println!("without {absence}");
    }
}

/// Adds a section with curves for each kind of row.
pub(super) fn report(report: &Report, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let mut kinds: Vec<_> = rows.iter().map(Row::kind).collect();
    kinds.dedup();
    for kind in kinds {
        let alike: Vec<&Row> = rows.iter().filter(|row| row.kind() == kind).collect();
        let Some(first) = alike.first() else { continue };
        report.add(|| section(kind, first, &alike))?;
    }
    Ok(())
}

fn section(kind: Kind, first: &Row, alike: &[&Row]) -> Result<Section, Box<dyn Error>> {
    let series = |value: fn(&Figure) -> Option<f64>| -> Vec<Series> {
        let point = |row: &&Row, peer: &Peer| Some((row.bytes as f64, value(row.figures.get(peer)?)?));
        let of = |peer: &Peer| Series {
            name: peer.title().to_owned(),
            points: alike.iter().filter_map(|row| point(row, peer)).collect(),
        };
        first.figures.keys().map(of).collect()
    };
    let (layer, wire, ranks, operation, dtype) = kind;
    let id = format!("compare-{}-{}-{layer:?}-{}-{ranks}", operation.name(), dtype.dtype().name(), wire.name());
    let charts = vec![
        Chart::by_bytes("Time of a call", "median, µs", series(Figure::p50)),
        Chart::by_bytes("Time of the slowest calls", "p99, µs", series(Figure::p99)),
        Chart::by_bytes("Bus bandwidth", "GB/s", series(Figure::busbw)),
    ];
    let told: Vec<_> = alike.iter().map(|row| row.told()).collect();
    let section = Section::new(id.to_lowercase(), &format!("Beside peers: {}", first.title()), charts, &told)?;
    // Rows may be of an earlier run.
    Ok(Section { measured_on: format!("{}; {}", first.measured_on, libraries(alike)), ..section })
}

fn libraries(rows: &[&Row]) -> String {
    let all: BTreeSet<&str> = rows.iter().flat_map(|row| row.libraries.values()).map(String::as_str).collect();
    all.into_iter().collect::<Vec<_>>().join(", ")
}

/// Puts the table between the marks of `readme`.
///
/// # Errors
/// A file without the marks, which is left as it is.
pub(super) fn update(readme: &Path, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(readme).map_err(|error| format!("cannot read {}: {error}", readme.display()))?;
    let marks = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let Some((before, after)) = marks else {
        return Err(format!("{} has no lines `{BEGIN}` and `{END}`", readme.display()).into());
    };
    let Some(first) = rows.first() else { return Err("there are no rows".into()) };
    let standings: Vec<_> = rows.iter().filter_map(Row::standing).collect();
    let met = standings.iter().filter(|standing| standing.is_met()).count();
    let all: Vec<&Row> = rows.iter().collect();
    let table = format!(
        "Our median time of a call, and how many times as long the best peer takes; each line in one run, taken in turns. All ranks on one \
         host, loopback: {}; {}. {met} of {} bars are met.\n\n{}",
        first.measured_on,
        libraries(&all),
        standings.len(),
        row::markdown(rows),
    );
    std::fs::write(readme, format!("{before}{BEGIN}\n{table}{END}{after}"))?;
    Ok(())
}
