//! The report: one HTML file that needs nothing else, with plots as SVG in it, for light and dark screens.

use std::fmt::Write;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::demands::Row;
use super::figures::{ROWS, middle, short};
use super::fio;
use super::job::BenchEngine;
use super::results::{Compared, Figure, OfEngine};
use super::sample::{SERIES_MS, Times};

/// A placeholder for the colour of text, which the page's style sheet sets for light and dark screens.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_IN_SVG: &str = "#010203";
const CHART: (u32, u32) = (520, 300);
const BAR_HEIGHT: u32 = 38;
/// Pixels from the left edge to where bars begin; the names of jobs are before that.
const NAMES_WIDTH: u32 = 170;
/// A distribution is drawn up to the percentile above which fewer values than this are left: beyond that it is
/// chance.
const TAIL_LEAST: f64 = 1.0;
const NINES_MAX: f64 = 5.0;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2530; --soft: #5c6773; --page: #fcfcfa; --line: #d5d9de;
  --good: #1b7f3b; --bad: #c02b2b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --page: #14181d; --line: #333b44; --good: #5fd38a; --bad: #ff7b72; }
}
body { color: var(--ink); background: var(--page); font: 15px/1.5 system-ui, sans-serif; max-width: 1120px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .3rem 0; color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } td.n, th.n { text-align: right; }
.met { color: var(--good); } .missed { color: var(--bad); font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
svg { max-width: 100%; height: auto; color: var(--ink); }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: 1.6em; height: 4px; margin-right: .4em; vertical-align: middle; }
.spread { color: var(--soft); font-size: .85em; }
";

/// A colour for each engine, which can be told from the others on white and on black.
fn colour(engine: BenchEngine) -> RGBColor {
    match engine {
        BenchEngine::Vmemd => RGBColor(232, 89, 12),
        BenchEngine::Swap => RGBColor(34, 139, 230),
        BenchEngine::Raw => RGBColor(134, 142, 150),
        BenchEngine::Mem => RGBColor(47, 158, 68),
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// An SVG of this size with what `draw` draws into it.
fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String, Failure> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&area).and_then(|()| Ok(area.present()?));
        drawn.map_err(|error| Failure::new(FailureKind::Other, format!("cannot draw: {error}")))?;
    }
    Ok(text.replace(INK_IN_SVG, "currentColor"))
}

/// The report.
pub(super) fn report(results: &[Compared], rows: &[Row], written: u64) -> Result<String, Failure> {
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>vmemd: benchmark</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>Paging at the limit of the device</h1>\n\
         <p>vmemd {}, {} UTC. Medians of all runs; engines took turns.</p>\n",
        env!("CARGO_PKG_VERSION"),
        fio::utc(written)
    );
    text += &key(&[BenchEngine::Vmemd, BenchEngine::Swap, BenchEngine::Raw, BenchEngine::Mem]);
    if !rows.is_empty() {
        text += "<h2>Verdict</h2>\n";
        text += &verdict(rows);
    }
    if let Some(bars) = ratios(results)? {
        text += "<h2>Throughput of vmemd, in multiples of the others'</h2>\n";
        text += "<p>Touches a second. Above 1, vmemd is faster; the axis is logarithmic.</p>\n";
        text += &bars;
    }
    for compared in results {
        text += &scenario(compared)?;
    }
    text += "</body>\n</html>\n";
    Ok(text)
}

fn key(engines: &[BenchEngine]) -> String {
    let mut text = "<p class=\"key\">".to_owned();
    for engine in engines {
        let RGBColor(red, green, blue) = colour(*engine);
        let what = match engine {
            BenchEngine::Vmemd => "vmemd",
            BenchEngine::Swap => "the kernel's swap",
            BenchEngine::Raw => "the raw device, least traffic",
            BenchEngine::Mem => "plain memory",
        };
        let _ = write!(text, "<span><i style=\"background:rgb({red},{green},{blue})\"></i>{what}</span>");
    }
    text + "</p>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn verdict(rows: &[Row]) -> String {
    let mut text =
        "<div class=\"wide\"><table>\n<tr><th>job</th><th>against</th><th class=\"n\">measured</th>\
         <th>demanded</th>\
                    <th class=\"n\">CPU a miss, µs</th><th class=\"n\">swap's</th><th>verdict</th></tr>\n"
            .to_owned();
    for row in rows {
        for (number, judged) in row.demands.iter().enumerate() {
            let title = if number == 0 { row.title } else { "" };
            let [ours, swaps] = row.cpu_us_per_miss.map(|us| match us {
                Some(us) if number == 0 => format!("{us:.0}"),
                _ => String::new(),
            });
            let (class, verdict) = match judged.met {
                Some(true) => ("met", "met"),
                Some(false) => ("missed", "missed"),
                None => ("", "not measured"),
            };
            let _ = writeln!(
                text,
                "<tr><td>{title}</td><td>{}</td><td class=\"n\">{}</td><td>{}</td><td class=\"n\">{ours}</td>\
                     <td class=\"n\">{swaps}</td><td class=\"{class}\">{verdict}</td></tr>",
                escaped(&judged.against),
                escaped(&judged.shown),
                escaped(&judged.demanded)
            );
        }
    }
    text + "</table></div>\n"
}

/// Two bars for each job: vmemd's throughput divided by swap's, and by the raw device's.
fn ratios(results: &[Compared]) -> Result<Option<String>, Failure> {
    let mut bars: Vec<(String, Vec<(BenchEngine, f64)>)> = Vec::new();
    for compared in results {
        for (number, job) in compared.jobs() {
            let to =
                |to| Some((to, compared.ratio(BenchEngine::Vmemd, to, number, Figure::TouchesPerSecond)?));
            let ratios: Vec<_> =
                [BenchEngine::Swap, BenchEngine::Raw, BenchEngine::Mem].into_iter().filter_map(to).collect();
            if !ratios.is_empty() {
                bars.push((label(compared, &job.name), ratios));
            }
        }
    }
    let all = bars.iter().flat_map(|(_, ratios)| ratios).map(|(_, ratio)| *ratio);
    let (least, most) =
        all.fold((0.5f64, 2.0f64), |(least, most), ratio| (least.min(ratio), most.max(ratio)));
    if bars.is_empty() {
        return Ok(None);
    }
    let height = bars.len() as u32 * BAR_HEIGHT + 40;
    let drawn = svg((2 * CHART.0, height), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_left(NAMES_WIDTH)
            .margin_right(60)
            .x_label_area_size(30)
            .build_cartesian_2d((least * 0.6..most * 1.4).log_scale(), 0.0..bars.len() as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(8)
            .axis_style(INK.mix(0.4))
            .bold_line_style(INK.mix(0.12))
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 14).into_font().color(&INK))
            .x_label_formatter(&|ratio| format!("{} x", short(*ratio)))
            .draw()?;
        let font = |side| ("sans-serif", 14).into_font().color(&INK).pos(Pos::new(side, VPos::Center));
        for (number, (name, ratios)) in bars.iter().enumerate() {
            let top = (bars.len() - number) as f64 - 0.15;
            let thickness = 0.7 / ratios.len() as f64;
            let at = chart.backend_coord(&(1.0, top - 0.35));
            area.draw(&Text::new(name.clone(), (4, at.1), font(HPos::Left)))?;
            for (place, (to, ratio)) in ratios.iter().enumerate() {
                let high = top - place as f64 * thickness;
                let corners = [(1.0, high), (*ratio, high - thickness * 0.9)];
                chart.draw_series([Rectangle::new(corners, colour(*to).filled())])?;
                let end = chart.backend_coord(&(*ratio, high - thickness / 2.0));
                let (side, gap) = if *ratio < 1.0 { (HPos::Right, -5) } else { (HPos::Left, 5) };
                area.draw(&Text::new(short(*ratio), (end.0 + gap, end.1), font(side)))?;
            }
        }
        let one = [(1.0, 0.0), (1.0, bars.len() as f64)];
        chart.draw_series(LineSeries::new(one, INK.mix(0.7).stroke_width(1)))?;
        Ok(())
    })?;
    Ok(Some(format!("<figure>{drawn}</figure>\n")))
}

/// The name of a job by which it is told from those of other files.
fn label(compared: &Compared, job: &str) -> String {
    let name = &compared.scenario.name;
    if compared.scenario.jobs.len() == 1 { name.clone() } else { format!("{name}: {job}") }
}

fn scenario(compared: &Compared) -> Result<String, Failure> {
    let scenario = &compared.scenario;
    let mut text = format!("<h2>{}</h2>\n<p>", escaped(&scenario.name));
    if !scenario.description.is_empty() {
        let _ = write!(text, "{}. ", escaped(&scenario.description));
    }
    let _ = writeln!(
        text,
        "{:#} of memory in {:#}.</p>",
        Size(scenario.memory_bytes()),
        Size(scenario.ram_bytes)
    );
    for of in &compared.engines {
        let name = of.engine.name();
        if let Some(reason) = &of.left_out {
            let _ = writeln!(text, "<p>{name} was left out: {}</p>", escaped(reason));
        }
        for failure in of.failures() {
            let _ = writeln!(text, "<p class=\"missed\">{name}: a run failed: {}</p>", escaped(failure));
        }
    }
    for (number, job) in compared.jobs() {
        if scenario.jobs.len() > 1 {
            let _ = writeln!(text, "<h3>{}</h3>", escaped(&job.name));
        }
        text += "<div class=\"plots\">\n";
        if let Some(drawn) = distribution(compared, number)? {
            text += &drawn;
        }
        if let Some(drawn) = over_time(compared, number)? {
            text += &drawn;
        }
        text += "</div>\n";
        text += &figures(compared, number);
    }
    Ok(text)
}

/// The times of all runs in one histogram.
fn together(of: &OfEngine, job: usize, misses: bool) -> Times {
    let jobs = of.samples().filter_map(|sample| sample.jobs.get(job));
    let times: Vec<&Times> = match misses {
        true => jobs.map(|job| &job.miss_ns).collect(),
        false => jobs.flat_map(|job| [&job.read.times_ns, &job.write.times_ns]).collect(),
    };
    fio::merged(&times)
}

/// The times at the percentiles, with the tail drawn out: each further nine has the same room.
fn distribution(compared: &Compared, job: usize) -> Result<Option<String>, Failure> {
    let of_kind = |misses| -> Vec<(BenchEngine, Vec<(f64, f64)>)> {
        let of = |of: &OfEngine| (of.engine, nines(&together(of, job, misses)));
        compared.engines.iter().map(of).filter(|(_, points)| points.len() > 1).collect()
    };
    let (misses, operations) = (of_kind(true), of_kind(false));
    // An engine without a miss has no line.
    let (lines, what) =
        if misses.len() < operations.len() { (operations, "an operation") } else { (misses, "a miss") };
    let points = || lines.iter().flat_map(|(_, points)| points);
    let most = points().map(|(_, us)| *us).fold(1.0, f64::max);
    let least = points().map(|(_, us)| *us).fold(most, f64::min).max(0.01);
    let nines = points().map(|(nines, _)| *nines).fold(1.0, f64::max);
    if lines.is_empty() {
        return Ok(None);
    }
    let across = Axis { range: 0.0..nines, labels: 6, label: percent };
    let up = Axis { range: least * 0.8..most * 1.3, labels: 10, label: micros };
    let drawn = curves(across, up, &lines)?;
    Ok(Some(format!(
        "<figure><figcaption>How long {what} takes, by percentile</figcaption>{drawn}</figure>\n"
    )))
}

/// One side of a chart.
struct Axis {
    range: Range<f64>,
    labels: usize,
    label: fn(f64) -> String,
}

/// A line an engine, upwards by the logarithm.
fn curves(across: Axis, up: Axis, lines: &[(BenchEngine, Vec<(f64, f64)>)]) -> Result<String, Failure> {
    svg(CHART, |area| {
        let lowest = up.range.start;
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(26)
            .y_label_area_size(54)
            .build_cartesian_2d(across.range, up.range.log_scale())?;
        chart
            .configure_mesh()
            .x_labels(across.labels)
            .y_labels(up.labels)
            .axis_style(INK.mix(0.4))
            .bold_line_style(INK.mix(0.12))
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 14).into_font().color(&INK))
            .x_label_formatter(&|value| (across.label)(*value))
            .y_label_formatter(&|value| (up.label)(*value))
            .draw()?;
        for (engine, points) in lines {
            // Zero has no logarithm.
            let points = points.iter().map(|(at, value)| (*at, value.max(lowest)));
            chart.draw_series(LineSeries::new(points, colour(*engine).stroke_width(2)))?;
        }
        Ok(())
    })
}

/// Percentiles on an axis that gives every further nine the same room, with times in µs.
fn nines(times: &Times) -> Vec<(f64, f64)> {
    let count = times.0.len() as f64;
    let steps = (0..).map(|step| f64::from(step) * 0.02).take_while(|nines| *nines <= NINES_MAX);
    let left = |nines: &f64| 10f64.powf(-nines) * count >= TAIL_LEAST;
    steps
        .take_while(left)
        .map(|nines| (nines, times.0.value_at_quantile(1.0 - 10f64.powf(-nines)).max(1) as f64 / 1000.0))
        .collect()
}

fn percent(nines: f64) -> String {
    match nines.round() as i32 {
        whole if (nines - f64::from(whole)).abs() > 0.01 => String::new(),
        0 => "0 %".to_owned(),
        1 => "90 %".to_owned(),
        2 => "99 %".to_owned(),
        whole => format!("99.{} %", "9".repeat(whole as usize - 2)),
    }
}

fn micros(us: f64) -> String {
    match us {
        us if us >= 999_500.0 => format!("{} s", short(us / 1e6)),
        us if us >= 999.5 => format!("{} ms", short(us / 1e3)),
        us if us >= 0.9995 => format!("{} µs", short(us)),
        us => format!("{} ns", short(us * 1e3)),
    }
}

/// Operations a second in the course of the run with the middle throughput.
fn over_time(compared: &Compared, job: usize) -> Result<Option<String>, Failure> {
    let line = |of: &OfEngine| {
        let (_, sample) = middle(of, job)?;
        let rates = sample.jobs[job].series.iter().map(|count| *count as f64 * 1000.0 / SERIES_MS as f64);
        let seconds = (0..).map(|at| f64::from(at) * SERIES_MS as f64 / 1000.0);
        let mut points: Vec<(f64, f64)> = seconds.zip(rates).collect();
        // The last element is rarely whole.
        if points.len() > 2 {
            points.pop();
        }
        Some((of.engine, points))
    };
    let lines: Vec<(BenchEngine, Vec<(f64, f64)>)> = compared.engines.iter().filter_map(line).collect();
    let points = || lines.iter().flat_map(|(_, points)| points);
    let (end, most) =
        points().fold((0.0f64, 0.0f64), |(end, most), (at, rate)| (end.max(*at), most.max(*rate)));
    if end == 0.0 || most == 0.0 {
        return Ok(None);
    }
    let least = points().map(|(_, rate)| *rate).filter(|rate| *rate > 0.0).fold(most, f64::min);
    let least = least.max(most / 10_000.0);
    let seconds = |seconds: f64| format!("{} s", (seconds * 10.0).round() / 10.0);
    let across = Axis { range: 0.0..end, labels: 8, label: seconds };
    let up = Axis { range: least * 0.7..most * 1.4, labels: 10, label: short };
    let drawn = curves(across, up, &lines)?;
    Ok(Some(format!("<figure><figcaption>Operations a second, over time</figcaption>{drawn}</figure>\n")))
}

fn figures(compared: &Compared, job: usize) -> String {
    let engines: Vec<&OfEngine> =
        compared.engines.iter().filter(|of| of.samples().next().is_some()).collect();
    let mut text = "<div class=\"wide\"><table>\n<tr><th>median (lowest – highest)</th>".to_owned();
    for of in &engines {
        let _ = write!(text, "<th class=\"n\">{}, {} runs</th>", of.engine.name(), of.samples().count());
    }
    text += "</tr>\n";
    for (name, figure) in ROWS {
        let cells: Vec<_> = engines.iter().map(|of| of.spread(job, figure)).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(text, "<tr><td>{name}</td>");
        for cell in cells {
            match cell {
                Some(spread) => {
                    let (median, min, max) = (short(spread.median), short(spread.min), short(spread.max));
                    let _ = write!(
                        text,
                        "<td class=\"n\">{median} <span class=\"spread\">({min} – {max})</span></td>"
                    );
                }
                None => text += "<td class=\"n\">-</td>",
            }
        }
        text += "</tr>\n";
    }
    text + "</table></div>\n"
}

#[cfg(test)]
mod tests {
    use super::super::demands;
    use super::super::results::tests::compared;
    use super::*;

    fn make(results: &[Compared]) -> String {
        report(results, &demands::judge(results, &Default::default()), 0).expect("a report")
    }

    #[test]
    fn a_report_is_whole_and_needs_nothing() {
        let mut one = compared("seqrewrite");
        one.scenario.description = "a < b".to_owned();
        let text = make(&[one, compared("other")]);
        assert!(text.starts_with("<!DOCTYPE html>") && text.ends_with("</html>\n"));
        assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
        assert_eq!(text.matches("<svg").count(), 5, "one of ratios, and two a job");
        let addresses = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!addresses.contains("http") && !text.contains("<script") && !text.contains(INK_IN_SVG));
        assert!(text.contains("a &lt; b") && text.contains("currentColor") && text.contains("killed"));
    }

    #[test]
    fn nothing_to_draw_is_no_error() {
        assert!(make(&[]).contains("</html>"));
        let mut nothing = compared("x");
        nothing.engines.iter_mut().for_each(|of| of.outcomes.clear());
        assert!(!make(&[nothing]).contains("<svg"));
    }

    #[test]
    fn axes() {
        assert_eq!([0.0, 1.0, 2.0, 3.0, 4.0].map(percent), ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
        assert_eq!([0.5, 100.0, 2000.0, 3e6].map(micros), ["500 ns", "100 µs", "2.00 ms", "3.00 s"]);
    }
}
