//! Does: writes measurements as one page of HTML, with its pictures in it.

use super::{Section, plot};
use serde_json::Value;
use std::error::Error;
use std::fmt::Write;

const HEAD: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><title>gradwire, measured</title>
<meta name=\"viewport\" content=\"width=device-width\">
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; background: #fff }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1rem }
.on { color: #555 }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg { max-width: 100%; height: auto }
.rows { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th { color: #555; font-weight: 600 }
</style></head><body>
<h1>gradwire, measured</h1>
<p>Every result was verified before it was timed. 1 GB is 10⁹ bytes; p50 and p99 are the values that half, and 99 in 100, of all
measured calls did not exceed. What a figure was measured on stands above it; none says anything of another machine.</p>
";

/// The page.
pub(super) fn html(sections: &[Section]) -> Result<String, Box<dyn Error>> {
    let mut page = HEAD.to_owned();
    for section in sections {
        writeln!(page, "<h2 id=\"{}\">{}</h2>", escaped(&section.id), escaped(&section.title))?;
        writeln!(page, "<p class=\"on\">Measured on {}</p>\n<div class=\"charts\">", escaped(&section.measured_on))?;
        for chart in &section.charts {
            page.push_str(&plot::svg(chart, section)?);
        }
        page.push_str("</div>\n");
        table(&mut page, &section.rows)?;
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

/// Rows as a table; what is within them in turn stays in the JSON file.
fn table(page: &mut String, rows: &[Value]) -> std::fmt::Result {
    let Some(Value::Object(first)) = rows.first() else { return Ok(()) };
    let names: Vec<&String> = first.iter().filter(|(_, value)| !value.is_array()).map(|(name, _)| name).collect();
    page.push_str("<div class=\"rows\"><table><tr>");
    names.iter().try_for_each(|name| write!(page, "<th>{}</th>", escaped(&name.replace('_', " "))))?;
    page.push_str("</tr>\n");
    for row in rows {
        page.push_str("<tr>");
        names.iter().try_for_each(|name| write!(page, "<td>{}</td>", escaped(&cell(&row[name.as_str()]))))?;
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
    Ok(())
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "–".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            let number = number.as_f64().unwrap_or_default();
            if number.abs() >= 100.0 { format!("{number:.0}") } else { format!("{number:.4}") }
        }
        Value::Object(fields) => {
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name} {}", cell(value))).collect();
            fields.join(", ").replace('_', " ")
        }
        other => other.to_string(),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
