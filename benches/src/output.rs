//! What `vmemd bench run` writes: text that reads like fio's with a comparison behind it, or JSON.
//!
//! The JSON is one document in fio's shape with the jobs of all runs; what fio has no name for is under `vmemd`: a
//! summary, and the raw results, from which reports are made.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::figures::{ROWS, cell, middle, short, usec};
use super::job::{BenchEngine, Job, Scenario};
use super::results::{Compared, Figure, OfEngine, RunOutcome};
use super::sample::{JobSample, Sample, Side};
use super::settings::{ReportSettings, RunSettings, Style};
use super::{costs, demands, fio, html};

/// Changes whenever older readers would misunderstand results.
const FORMAT: u32 = 1;

/// The part of a document that fio's readers do not know: the raw results.
#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    results: Vec<Compared>,
}

#[derive(Deserialize)]
struct Document {
    vmemd: Kept,
}

/// Writes the results as the settings say.
pub(super) fn write(results: &[Compared], settings: &RunSettings) -> Result<(), Failure> {
    if let Some(dir) = &settings.output_dir {
        for compared in results {
            write_runs(compared, dir)?;
        }
    }
    let text = match settings.style {
        Style::Normal => results.iter().map(normal).collect::<Vec<_>>().join("\n"),
        Style::Json => to_text(&combined(results)?)?,
    };
    match &settings.output {
        Some(path) => write_file(path, &text),
        None => {
            let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
            Ok(())
        }
    }
}

/// A document of fio's for every run, `SCENARIO-ENGINE-N.json`.
fn write_runs(compared: &Compared, dir: &Path) -> Result<(), Failure> {
    let scenario = &compared.scenario;
    for of in &compared.engines {
        for (number, outcome) in of.outcomes.iter().enumerate() {
            let RunOutcome::Measured(sample) = outcome else { continue };
            let path = dir.join(format!("{}-{}-{}.json", scenario.name, of.engine.name(), number + 1));
            write_file(&path, &to_text(&fio::document(scenario, sample))?)?;
        }
    }
    Ok(())
}

fn write_file(path: &Path, text: &str) -> Result<(), Failure> {
    let fail = |error| Failure::io(format!("cannot write {}", path.display()), &error);
    let mut file = BufWriter::new(fs::File::create(path).map_err(fail)?);
    writeln!(file, "{}", text.trim_end()).map_err(fail)?;
    file.flush().map_err(fail)
}

fn to_text(value: &Value) -> Result<String, Failure> {
    // Without line breaks: a histogram with one number a line would be very long.
    serde_json::to_string(value).map_err(|error| Failure::new(FailureKind::Other, error.to_string()))
}

/// Reads documents that [`Style::Json`] has written.
pub(super) fn read(path: &Path) -> Result<Vec<Compared>, Failure> {
    let usage = |text| Failure::new(FailureKind::Usage, text);
    let bytes = fs::read(path).map_err(|error| usage(format!("cannot read {}: {error}", path.display())))?;
    let document: Document = serde_json::from_slice(&bytes).map_err(|error| {
        let write = "results are what `vmemd bench run --output-format json` writes";
        usage(format!("{}: {error}: {write}", path.display()))
    })?;
    match document.vmemd.format {
        FORMAT => Ok(document.vmemd.results),
        other => {
            Err(usage(format!("{}: results of format {other}, this vmemd reads {FORMAT}", path.display())))
        }
    }
}

/// Judges results, and writes the report. Of a job file that is there twice, the later results count.
///
/// # Errors
/// If results cannot be read, or the report cannot be written.
pub(crate) fn report(settings: &ReportSettings) -> Result<(), Failure> {
    let mut results: Vec<Compared> = Vec::new();
    for path in &settings.results {
        for compared in read(path)? {
            match results.iter_mut().find(|other| other.scenario.name == compared.scenario.name) {
                Some(other) => *other = compared,
                None => results.push(compared),
            }
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let costs = settings.costs.as_deref().map(costs::read).transpose()?.unwrap_or_default();
    let rows = demands::judge(&results, &costs);
    if let Some(path) = &settings.output {
        write_file(path, &html::report(&results, &rows, now)?)?;
    }
    let text = match settings.json {
        true => to_text(&json!(rows))?,
        false if rows.is_empty() => {
            "none of these results is of a job that anything is demanded of".to_owned()
        }
        false => demands::table(&rows),
    };
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(())
}

fn combined(results: &[Compared]) -> Result<Value, Failure> {
    let mut document = fio::head(json!({}));
    let mut jobs = Vec::new();
    for compared in results {
        for of in &compared.engines {
            for (number, sample) in of.samples().enumerate() {
                jobs.extend(fio::jobs(&compared.scenario, sample, number + 1));
            }
        }
    }
    document.insert("jobs".to_owned(), Value::Array(jobs));
    let kept = Kept { format: FORMAT, results: results.to_vec() };
    let mut kept =
        serde_json::to_value(&kept).map_err(|error| Failure::new(FailureKind::Other, error.to_string()))?;
    kept["summary"] = Value::Array(results.iter().flat_map(summary).collect());
    document.insert("vmemd".to_owned(), kept);
    Ok(Value::Object(document))
}

/// Medians, spread and ratios, one object a job and engine.
fn summary(compared: &Compared) -> Vec<Value> {
    let mut list = Vec::new();
    for (number, job) in compared.jobs() {
        for of in &compared.engines {
            let mut figures = Map::new();
            for figure in Figure::ALL {
                figures.insert(figure.name(), json!(of.spread(number, figure)));
            }
            let mut ratios = Map::new();
            for to in compared.engines.iter().filter(|to| to.engine != of.engine) {
                for figure in RATIOS {
                    let ratio = compared.ratio(of.engine, to.engine, number, figure);
                    ratios.insert(format!("{}_to_{}", figure.name(), to.engine.name()), json!(ratio));
                }
            }
            list.push(json!({
                "scenario": compared.scenario.name,
                "job": job.name,
                "engine": of.engine.name(),
                "left_out": of.left_out,
                "failed": of.failures().collect::<Vec<_>>(),
                "figures": figures,
                "ratios": ratios,
            }));
        }
    }
    list
}

const RATIOS: [Figure; 4] =
    [Figure::TouchesPerSecond, Figure::MissesPerSecond, Figure::Miss(500), Figure::Miss(999)];

fn normal(compared: &Compared) -> String {
    let Scenario { name, description, ram_bytes, .. } = &compared.scenario;
    let memory = Size(compared.scenario.memory_bytes());
    let mut text = format!("{name}: {memory:#} of memory in {:#}\n", Size(*ram_bytes));
    if !description.is_empty() {
        let _ = writeln!(text, "  {description}");
    }
    for of in &compared.engines {
        if let Some(reason) = &of.left_out {
            let _ = writeln!(text, "\n{}: left out: {reason}", of.engine.name());
        }
        for (number, job) in compared.jobs() {
            if let Some((run, sample)) = middle(of, number) {
                text += "\n";
                text += &block(job, number, sample, of, run);
            }
        }
        for failure in of.failures() {
            let _ = writeln!(text, "\n{}: a run failed: {failure}", of.engine.name());
        }
    }
    for (number, job) in compared.jobs() {
        text += "\n";
        text += &table(compared, number, job);
    }
    text
}

/// A job of one run, as fio prints it.
fn block(job: &Job, number: usize, sample: &Sample, of: &OfEngine, run: usize) -> String {
    let measured = &sample.jobs[number];
    let mut text = format!(
        "{}: (groupid={number}, jobs={}): err={:2}: engine={}, run {run} of {}\n",
        job.name,
        job.threads,
        u8::from(measured.verify_errors > 0),
        of.engine.name(),
        of.samples().count()
    );
    for (name, side) in [("read", &measured.read), ("write", &measured.write)] {
        if side.operations > 0 {
            text += &direction(name, side, measured);
        }
    }
    let seconds = measured.runtime_ns as f64 / 1e9;
    let cpu = if seconds > 0.0 { sample.cpu_ns as f64 / 1e7 / seconds } else { 0.0 };
    let _ = writeln!(
        text,
        "  cpu          : usr+sys={cpu:.2}%, misses={}, pages read={}, written={}, wrong={}",
        measured.misses, sample.pages_read, sample.pages_written, measured.verify_errors
    );
    text
}

fn direction(name: &str, side: &Side, job: &JobSample) -> String {
    let seconds = (job.runtime_ns as f64 / 1e9).max(1e-9);
    let (iops, bytes) = (side.operations as f64 / seconds, side.bytes as f64 / seconds);
    let times = &side.times_ns.0;
    let mut text = format!(
        "  {name:<5}: IOPS={}, BW={:.1}MiB/s ({:.1}MB/s)({:.1}MiB/{}msec)\n",
        short(iops),
        bytes / f64::from(1 << 20),
        bytes / 1e6,
        side.bytes as f64 / f64::from(1 << 20),
        job.runtime_ns / 1_000_000
    );
    let _ = writeln!(
        text,
        "    clat (usec): min={}, max={}, avg={:.2}, stdev={:.2}",
        usec(times.min()),
        usec(times.max()),
        times.mean() / 1000.0,
        times.stdev() / 1000.0
    );
    text += "    clat percentiles (usec):\n";
    let percentiles = fio::percentiles(&side.times_ns);
    let rows: Vec<String> = percentiles
        .chunks(4)
        .map(|row| {
            let cells: Vec<String> =
                row.iter().map(|(at, time)| format!("{at:5.2}th=[{:>8}]", usec(*time))).collect();
            format!("     | {}", cells.join(", "))
        })
        .collect();
    text += &rows.join(",\n");
    text += "\n";
    text
}

/// Medians and spread of a job, one column an engine, and vmemd's ratios to the other engines.
fn table(compared: &Compared, number: usize, job: &Job) -> String {
    let engines: Vec<&OfEngine> =
        compared.engines.iter().filter(|of| of.samples().next().is_some()).collect();
    let mut text =
        format!("{}, {}: medians (lowest-highest)\n  {:<16}", compared.scenario.name, job.name, "");
    for of in &engines {
        let _ = write!(text, " {:>26}", format!("{} ({} runs)", of.engine.name(), of.samples().count()));
    }
    text += "\n";
    for (name, figure) in ROWS {
        let cells: Vec<Option<String>> = engines.iter().map(|of| cell(of, number, figure)).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(text, "  {name:<16}");
        for cell in cells {
            let _ = write!(text, " {:>26}", cell.as_deref().unwrap_or("-"));
        }
        text += "\n";
    }
    for to in [BenchEngine::Swap, BenchEngine::Raw, BenchEngine::Mem] {
        let ratio = |figure| compared.ratio(BenchEngine::Vmemd, to, number, figure);
        let parts = [
            ratio(Figure::TouchesPerSecond).map(|ratio| format!("{ratio:.2} x touches/s")),
            ratio(Figure::MissesPerSecond).map(|ratio| format!("{ratio:.2} x misses/s")),
            ratio(Figure::Miss(500)).map(|ratio| format!("{ratio:.2} of a miss's p50")),
            ratio(Figure::Miss(999)).map(|ratio| format!("{ratio:.2} of its p99.9")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        if !parts.is_empty() {
            let _ = writeln!(text, "  vmemd to {:<7} {}", to.name(), parts.join(", "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::compared;
    use super::*;

    #[test]
    fn reads_like_fio_and_compares() {
        let text = normal(&compared("x"));
        for part in [
            "a: (groupid=0, jobs=4): err= 0: engine=vmemd, run 1 of 2",
            "  read : IOPS=1000, BW=3.9MiB/s (4.1MB/s)(3.9MiB/1000msec)",
            " 99.90th=[     100]",
            "mem: left out: no RAM",
            "vmemd: a run failed: killed",
            "4000 (2000-6000)",
            "vmemd to swap    2.00 x touches/s, 2.00 x misses/s, 0.50 of a miss's p50",
            "vmemd to raw     0.50 x touches/s",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn json_is_fios_and_reads_back() {
        let results = vec![compared("x"), compared("y")];
        let document = combined(&results).unwrap();
        assert_eq!(document["jobs"].as_array().unwrap().len(), 12);
        assert_eq!(document["jobs"][0]["read"]["iops"], 1000.0);
        let of_vmemd = &document["vmemd"]["summary"][0];
        assert_eq!(of_vmemd["figures"]["touches_per_s"]["median"], 4000.0);
        assert_eq!(of_vmemd["ratios"]["touches_per_s_to_swap"], 2.0);
        assert_eq!(document["vmemd"]["summary"][3]["left_out"], "no RAM");
        let place = testkit::directory("output");
        let path = place.path().join("results.json");
        write_file(&path, &to_text(&document).unwrap()).unwrap();
        let back = read(&path).unwrap();
        assert_eq!(normal(&back[1]), normal(&results[1]));
        write_file(&path, "{\"jobs\": []}").unwrap();
        assert!(read(&path).unwrap_err().text.contains("--output-format json"));
    }
}
