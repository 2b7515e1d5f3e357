//! Does: draws a chart, as SVG for the page and as PNG for papers and slides.

use super::{Chart, Section, Series};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::error::Error;
use std::path::Path;
use std::sync::Once;

const SIZE: (u32, u32) = (640, 400);
/// PNGs are drawn this much larger.
const FINER: u32 = 2;
/// Okabe and Ito's colours, which colour-blind people tell apart.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
/// Room for the names of series, beside the plot: over it they would hide points.
const NAMES_WIDTH: u32 = 170;
const FONT: &str = "sans-serif";

/// The chart as an SVG element.
pub(super) fn svg(chart: &Chart, section: &Section) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    draw(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), chart, section, 1)?;
    Ok(text)
}

/// Writes the chart as a PNG.
pub(super) fn png(chart: &Chart, section: &Section, path: &Path) -> Result<(), Box<dyn Error>> {
    let size = (SIZE.0 * FINER, SIZE.1 * FINER);
    draw(&BitMapBackend::new(path, size).into_drawing_area(), chart, section, FINER)
}

fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    chart: &Chart,
    section: &Section,
    scale: u32,
) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    // Of our own: a server has no fonts.
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // It fails for what is not a font.
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    area.fill(&WHITE)?;
    let edge = 8 * scale;
    let mut area = area.margin(edge, edge, edge, edge).titled(&chart.title, (FONT, 20 * scale))?;
    for line in [&section.title, &section.measured_on].into_iter().flat_map(|text| wrapped(text)) {
        area = area.titled(&line, (FONT, 11 * scale))?;
    }
    let width = area.dim_in_pixel().0;
    let (plot, beside) =
        area.split_horizontally(width - if chart.series.len() > 1 { NAMES_WIDTH * scale } else { edge });
    if chart.series.len() > 1 {
        names(&beside, chart, scale)?;
    }
    let points = || chart.series.iter().flat_map(|series| &series.points);
    let x = bounds(points().map(|point| point.0), chart.x_log.then_some(2.0));
    let y = bounds(points().map(|point| point.1), chart.y_log.then_some(10.0));
    let (log_x, log_y) = (|| (x.0..x.1).log_scale().base(2.0), || (y.0..y.1).log_scale());
    let mut builder = ChartBuilder::on(&plot);
    builder.x_label_area_size(36 * scale).y_label_area_size(64 * scale);
    // The kind of an axis is a type, so each pair of kinds has its call.
    match (chart.x_log, chart.y_log) {
        (false, false) => lines(builder.build_cartesian_2d(x.0..x.1, y.0..y.1)?, chart, scale)?,
        (true, false) => lines(builder.build_cartesian_2d(log_x(), y.0..y.1)?, chart, scale)?,
        (false, true) => lines(builder.build_cartesian_2d(x.0..x.1, log_y())?, chart, scale)?,
        (true, true) => lines(builder.build_cartesian_2d(log_x(), log_y())?, chart, scale)?,
    }
    area.present()?;
    Ok(())
}

fn lines<'a, B: DrawingBackend + 'a, X, Y>(
    mut context: ChartContext<'a, B, Cartesian2d<X, Y>>,
    chart: &Chart,
    scale: u32,
) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    context
        .configure_mesh()
        .x_desc(&chart.x)
        .y_desc(&chart.y)
        .x_label_formatter(&|value| if chart.x.starts_with("bytes") { bytes_label(*value) } else { label(*value) })
        .y_label_formatter(&|value| label(*value))
        .label_style((FONT, 12 * scale))
        .axis_desc_style((FONT, 13 * scale))
        .light_line_style(WHITE)
        .draw()?;
    for (at, Series { points, .. }) in chart.series.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        context.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2 * scale)))?;
        context.draw_series(points.iter().map(|point| Circle::new(*point, 3 * scale, colour.filled())))?;
    }
    Ok(())
}

/// Draws the name of each series beside a stroke of its colour.
fn names<B: DrawingBackend>(area: &DrawingArea<B, Shift>, chart: &Chart, scale: u32) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    let at = |units: usize| i32::try_from(units * scale as usize).expect("a chart is small");
    for (number, Series { name, .. }) in chart.series.iter().enumerate() {
        let (y, colour) = (at(14 + 20 * number), COLOURS[number % COLOURS.len()]);
        area.draw(&PathElement::new(vec![(at(10), y), (at(28), y)], colour.stroke_width(2 * scale)))?;
        area.draw(&Text::new(name.as_str(), (at(34), y - at(5)), (FONT, 12 * scale)))?;
    }
    Ok(())
}

/// From where to where an axis goes: from 0, or on a logarithmic one between powers of its base.
fn bounds(values: impl Iterator<Item = f64>, base: Option<f64>) -> (f64, f64) {
    let usable = values.filter(|value| value.is_finite() && (base.is_none() || *value > 0.0));
    let (least, most) = usable.fold((f64::INFINITY, 0.0), |(least, most): (f64, f64), v| (least.min(v), most.max(v)));
    match base {
        _ if most <= 0.0 => (if base.is_some() { 0.1 } else { 0.0 }, 1.0),
        None => (0.0, most * 1.1),
        Some(base) => {
            let power = |value: f64, round: fn(f64) -> f64| base.powf(round(value.log(base) * 0.999_999));
            let (from, to) = (power(least, f64::floor), power(most, f64::ceil));
            (from, if to > from { to } else { from * base })
        }
    }
}

/// Sizes go by powers of two.
fn bytes_label(value: f64) -> String {
    match value {
        v if v >= f64::from(1 << 30) => format!("{:.0} GiB", v / f64::from(1 << 30)),
        v if v >= f64::from(1 << 20) => format!("{:.0} MiB", v / f64::from(1 << 20)),
        v if v >= 1024.0 => format!("{:.0} KiB", v / 1024.0),
        v => format!("{v:.0}"),
    }
}

fn label(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.0}G", v / 1e9),
        v if v >= 1e6 => format!("{:.0}M", v / 1e6),
        v if v >= 1e4 => format!("{:.0}k", v / 1e3),
        v if v >= 10.0 || v == 0.0 => format!("{v:.0}"),
        v => format!("{v:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

/// A text as lines that fit above a chart.
fn wrapped(text: &str) -> Vec<String> {
    const MOST: usize = 100;
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= MOST => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_title_has_lines_and_loses_no_word() {
        assert_eq!(wrapped("TCP over loopback"), ["TCP over loopback"]);
        let long = "many words ".repeat(25) + "over loopback";
        let lines = wrapped(&long);
        assert!(lines.len() == 3 && lines.iter().all(|line| line.chars().count() <= 100), "{lines:?}");
        assert_eq!(lines.join(" "), long);
        assert!(wrapped("").is_empty());
    }
}
