//! Does: keeps measurements in a folder, and shows them all on one page that needs nothing else.

mod page;
mod plot;

use crate::machine;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::path::{Path, PathBuf};

/// One line of a chart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// One picture.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    pub(crate) x_log: bool,
    pub(crate) y_log: bool,
    pub(crate) series: Vec<Series>,
}

impl Chart {
    /// Curves over sizes: both axes logarithmic.
    pub(crate) fn by_bytes(title: &str, y: &str, series: Vec<Series>) -> Self {
        let (title, x, y) = (title.to_owned(), "bytes".to_owned(), y.to_owned());
        Self { title, x, y, x_log: true, y_log: true, series }
    }
}

/// One measurement. A later one of the same `id` takes its place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Section {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) measured_on: String,
    pub(crate) charts: Vec<Chart>,
    /// All rows, as `--json` tells them.
    pub(crate) rows: Vec<serde_json::Value>,
}

impl Section {
    /// What this machine has just measured. Charts of what was not measured are left out.
    pub(crate) fn new(
        id: String,
        title: &str,
        mut charts: Vec<Chart>,
        rows: &[impl Serialize],
    ) -> Result<Self, Box<dyn Error>> {
        charts.iter_mut().for_each(|chart| chart.series.retain(|series| !series.points.is_empty()));
        charts.retain(|chart| !chart.series.is_empty());
        let rows = rows.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
        Ok(Self { id, title: title.to_owned(), measured_on: machine::described(), charts, rows })
    }
}

/// A folder with `index.html`, and for each measurement a JSON file and PNGs.
pub(crate) struct Report {
    /// Where one is wanted.
    folder: Option<PathBuf>,
}

impl Report {
    /// The report in `folder`, if one is wanted; the folder is made where it is missing. It is opened before anything is
    /// measured, so that a run does not end without a place for its rows.
    pub(crate) fn open(folder: Option<&Path>) -> Result<Self, Box<dyn Error>> {
        if let Some(folder) = folder {
            std::fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
        }
        Ok(Self { folder: folder.map(Path::to_owned) })
    }

    /// Adds a measurement, if a report is wanted, and makes the page anew.
    pub(crate) fn add(&self, section: impl FnOnce() -> Result<Section, Box<dyn Error>>) -> Result<(), Box<dyn Error>> {
        match &self.folder {
            Some(folder) => Self::put(folder, section()?),
            None => Ok(()),
        }
    }

    fn put(folder: &Path, section: Section) -> Result<(), Box<dyn Error>> {
        for (at, chart) in section.charts.iter().enumerate() {
            plot::png(chart, &section, &folder.join(format!("{}-{}.png", section.id, at + 1)))?;
        }
        std::fs::write(folder.join(format!("{}.json", section.id)), serde_json::to_vec_pretty(&section)?)?;
        let mut sections = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let section: Section = serde_json::from_slice(&std::fs::read(&path)?)
                    .map_err(|error| format!("{} is no measurement of ours: {error}", path.display()))?;
                sections.push(section);
            }
        }
        sections.sort_by(|a, b| a.id.cmp(&b.id));
        let page = folder.join("index.html");
        std::fs::write(&page, page::html(&sections)?)?;
        eprintln!("{} of {} is in {}", section.id, section.measured_on, page.display());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_holds_every_measurement_once_with_its_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let section = |id: &str, best: f64| Section {
            id: id.to_owned(),
            title: format!("title of {id} <{best}>"),
            measured_on: "a machine".to_owned(),
            charts: vec![Chart {
                title: "Goodput".to_owned(),
                x: "senders".to_owned(),
                y: "GB/s".to_owned(),
                x_log: true,
                y_log: false,
                series: vec![Series { name: "all".to_owned(), points: vec![(1.0, 0.0), (64.0, best)] }],
            }],
            rows: vec![serde_json::json!({"senders": 1, "goodput_gb_per_s": best, "per_sender": [1, 2]})],
        };
        let report = Report::open(Some(folder.path())).unwrap();
        report.add(|| Ok(section("first", 1.5))).unwrap();
        report.add(|| Ok(section("second", 2.5))).unwrap();
        report.add(|| Ok(section("first", 3.5))).unwrap();
        let page = std::fs::read_to_string(folder.path().join("index.html")).unwrap();
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(page.contains("title of first &lt;3.5&gt;") && page.contains("title of second &lt;2.5&gt;"));
        assert!(!page.contains("1.5&gt;") && !page.contains("http://") || page.contains("http://www.w3.org/2000/svg"));
        let png = std::fs::read(folder.path().join("first-1.png")).unwrap();
        assert_eq!(&png[1..4], b"PNG");
    }
}
