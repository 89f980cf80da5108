//! Results under the names of fio's JSON, so that tools for fio's results read them. `docs/jobs.md` says what each
//! means here.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use vmprocess::size::Size;

use super::job::{BenchEngine, Job, Scenario};
use super::jobfile;
use super::results::Spread;
use super::sample::{JobSample, SERIES_MS, Sample, Side, Times};

/// As in fio's own output.
const PERCENTILES: [f64; 17] =
    [1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];
/// Upper ends of fio's coarse latency classes, the same for ns, us and ms.
const CLASSES: [u64; 10] = [2, 4, 10, 20, 50, 100, 250, 500, 750, 1000];
const KIB: f64 = 1024.0;

/// Percentiles as fio chooses them, with values in ns. Empty without values.
pub(super) fn percentiles(times: &Times) -> Vec<(f64, u64)> {
    if times.0.is_empty() {
        return Vec::new();
    }
    PERCENTILES.iter().map(|at| (*at, times.0.value_at_percentile(*at))).collect()
}

/// The head of a document; `jobs` belongs behind it.
pub(super) fn head(options: Value) -> Map<String, Value> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut head = Map::new();
    head.insert("fio version".to_owned(), json!(format!("vmemd-{}", env!("CARGO_PKG_VERSION"))));
    head.insert("timestamp".to_owned(), json!(now.as_secs()));
    head.insert("timestamp_ms".to_owned(), json!(now.as_millis() as u64));
    head.insert("time".to_owned(), json!(utc(now.as_secs())));
    head.insert("global options".to_owned(), options);
    head
}

/// One run of one engine: a document of its own.
pub(super) fn document(scenario: &Scenario, sample: &Sample) -> Value {
    let mut document = head(global_options(scenario, sample.engine));
    document.insert("jobs".to_owned(), json!(jobs(scenario, sample, 1)));
    Value::Object(document)
}

fn global_options(scenario: &Scenario, engine: BenchEngine) -> Value {
    let ram = Size(scenario.ram_bytes).to_string().to_ascii_lowercase();
    json!({ "ram": ram, "engine": engine.name() })
}

/// The jobs of one run.
pub(super) fn jobs(scenario: &Scenario, sample: &Sample, repetition: usize) -> Vec<Value> {
    let jobs = scenario.jobs.iter().zip(&sample.jobs).enumerate();
    jobs.map(|(group, (job, measured))| self::job(group, job, measured, sample, repetition)).collect()
}

fn job(group: usize, job: &Job, measured: &JobSample, sample: &Sample, repetition: usize) -> Value {
    let mut options: Map<String, Value> =
        jobfile::options(job).into_iter().map(|(key, value)| (key.to_owned(), json!(value))).collect();
    options.insert("name".to_owned(), json!(job.name));
    options.insert("engine".to_owned(), json!(sample.engine.name()));
    options.insert("repetition".to_owned(), json!(repetition.to_string()));
    // One operation at a time: a touch waits for its page.
    options.insert("iodepth".to_owned(), json!("1"));
    let seconds = measured.runtime_ns as f64 / 1e9;
    let all = merged(&[&measured.read.times_ns, &measured.write.times_ns]);
    let cpu = if seconds > 0.0 { sample.cpu_ns as f64 / 1e7 / seconds } else { 0.0 };
    let mut value = json!({
        "jobname": job.name,
        "groupid": group,
        "error": u8::from(measured.verify_errors > 0),
        "eta": 0,
        "elapsed": seconds.ceil(),
        "job options": options,
        "read": side(&measured.read, measured),
        "write": side(&measured.write, measured),
        "trim": side(&Side { operations: 0, bytes: 0, times_ns: Times::default() }, measured),
        "sync": { "total_ios": 0, "lat_ns": stats(&Times::default()) },
        "job_runtime": measured.runtime_ns / 1_000_000,
        "usr_cpu": cpu,
        "sys_cpu": 0.0,
        "ctx": 0,
        "majf": measured.misses,
        "minf": 0,
        "iodepth_level": { "1": 100.0, "2": 0.0, "4": 0.0, "8": 0.0, "16": 0.0, "32": 0.0, ">=64": 0.0 },
        "latency_ns": classes(&all, 1, false),
        "latency_us": classes(&all, 1000, false),
        "latency_ms": classes(&all, 1_000_000, true),
        "latency_depth": 1,
        "latency_target": 0,
        "latency_percentile": 100.0,
        "latency_window": 0,
    });
    value["vmemd"] = json!({
        "engine": sample.engine.name(),
        "touches": measured.touches,
        "misses": measured.misses,
        "verify_errors": measured.verify_errors,
        "miss_ns": detailed(&measured.miss_ns),
        "cpu_ns_of_all_jobs": sample.cpu_ns,
        "pages_read_by_all_jobs": sample.pages_read,
        "pages_written_by_all_jobs": sample.pages_written,
        "optimum_hit_rate": sample.optimum_hit_rate,
        "start_ns": sample.start_ns,
        "engine_store_faults": sample.engine_store_faults,
        "series_ms": SERIES_MS,
        "series": measured.series,
    });
    value
}

/// One direction. fio's kilobytes are 1024 bytes.
fn side(side: &Side, job: &JobSample) -> Value {
    let seconds = job.runtime_ns as f64 / 1e9;
    let a_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let bytes_a_second = a_second(side.bytes);
    let operations = job.read.operations + job.write.operations;
    // The series counts operations of both directions.
    let share = if operations > 0 { side.operations as f64 / operations as f64 } else { 0.0 };
    let block = if side.operations > 0 { side.bytes as f64 / side.operations as f64 } else { 0.0 };
    let rates: Vec<f64> =
        job.series.iter().map(|count| *count as f64 * share * 1000.0 / SERIES_MS as f64).collect();
    let count = rates.len();
    let (mean, deviation) = mean_and_deviation(&rates);
    let spread = Spread::of(rates).unwrap_or(Spread { min: 0.0, median: 0.0, max: 0.0 });
    let kib = |rate: f64| rate * block / KIB;
    json!({
        "io_bytes": side.bytes,
        "io_kbytes": side.bytes / 1024,
        "bw_bytes": bytes_a_second as u64,
        "bw": (bytes_a_second / KIB) as u64,
        "iops": a_second(side.operations),
        "runtime": if side.operations > 0 { job.runtime_ns / 1_000_000 } else { 0 },
        "total_ios": side.operations,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": stats(&Times::default()),
        "clat_ns": detailed(&side.times_ns),
        "lat_ns": stats(&side.times_ns),
        "bw_min": kib(spread.min) as u64,
        "bw_max": kib(spread.max) as u64,
        "bw_agg": if side.operations > 0 { 100.0 } else { 0.0 },
        "bw_mean": kib(mean),
        "bw_dev": kib(deviation),
        "bw_samples": count,
        "iops_min": spread.min as u64,
        "iops_max": spread.max as u64,
        "iops_mean": mean,
        "iops_stddev": deviation,
        "iops_samples": count,
    })
}

fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

fn stats(times: &Times) -> Value {
    let times = &times.0;
    if times.is_empty() {
        return json!({ "min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0 });
    }
    json!({
        "min": times.min(),
        "max": times.max(),
        "mean": times.mean(),
        "stddev": times.stdev(),
        "N": times.len(),
    })
}

/// Times with their percentiles, which fio leaves out where nothing was measured.
fn detailed(times: &Times) -> Value {
    let mut value = stats(times);
    let percentiles = percentiles(times);
    if !percentiles.is_empty() {
        let named = percentiles.into_iter().map(|(at, time)| (format!("{at:.6}"), json!(time)));
        value["percentile"] = Value::Object(named.collect());
    }
    value
}

pub(super) fn merged(times: &[&Times]) -> Times {
    let mut all = Times::default();
    for times in times {
        let added = all.0.add(&times.0);
        debug_assert!(added.is_ok(), "all have the same bounds");
    }
    all
}

/// Share in percent of times up to each class's end, from the end of the class before.
fn classes(times: &Times, unit_ns: u64, open_ended: bool) -> Value {
    let all = times.0.len();
    // Not by `count_between`, which counts values near an end on both of its sides.
    let recorded: Vec<(u64, u64)> =
        times.0.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect();
    let percent = |from: u64, to: u64| {
        let within = recorded.iter().filter(|(value, _)| (from..to).contains(value));
        within.map(|(_, count)| *count).sum::<u64>() as f64 * 100.0 / all.max(1) as f64
    };
    let mut classes = Map::new();
    // A class of a coarser unit begins where the finer unit ends.
    let mut from = if unit_ns == 1 { 0 } else { unit_ns };
    for end in CLASSES {
        classes.insert(end.to_string(), json!(percent(from, end * unit_ns)));
        from = end * unit_ns;
    }
    if open_ended {
        classes.insert("2000".to_owned(), json!(percent(from, 2 * from)));
        classes.insert(">=2000".to_owned(), json!(percent(2 * from, u64::MAX)));
    }
    Value::Object(classes)
}

/// As ctime(3) writes it, in UTC.
pub(super) fn utc(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.unwrap_or(Timestamp::MAX).strftime("%a %b %e %H:%M:%S %Y").to_string()
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::compared;
    use super::*;

    #[test]
    fn a_run_has_fios_fields() {
        let compared = compared("x");
        let sample = compared.engines[0].samples().next().unwrap();
        let document = document(&compared.scenario, sample);
        let job = &document["jobs"][0];
        for field in "io_bytes io_kbytes bw_bytes bw iops runtime total_ios bw_min bw_max bw_mean bw_dev iops_min \
                      iops_max iops_mean iops_stddev clat_ns/min clat_ns/max clat_ns/mean clat_ns/stddev clat_ns/N \
                      lat_ns/mean slat_ns/mean"
            .split_whitespace()
        {
            for direction in ["read", "write", "trim"] {
                let value = job.pointer(&format!("/{direction}/{field}"));
                assert!(value.is_some_and(Value::is_number), "{direction} {field}");
            }
        }
        assert_eq!(job["read"]["iops"], 1000.0);
        assert_eq!(job["read"]["bw"], 4000);
        assert_eq!(job["read"]["iops_mean"], 1000.0);
        assert_eq!(job["read"]["clat_ns"]["percentile"]["99.990000"], job["read"]["clat_ns"]["max"]);
        assert_eq!(job["job options"]["rw"], "randrw");
        assert_eq!(
            (&job["job options"]["numjobs"], &job["job options"]["iodepth"]),
            (&json!("4"), &json!("1"))
        );
        assert_eq!(job["latency_us"]["250"], 100.0);
        assert_eq!(document["global options"]["engine"], "vmemd");
        assert!(job["trim"]["clat_ns"].get("percentile").is_none());
    }

    #[test]
    fn classes_cover_everything_once() {
        let mut times = Times::default();
        for value in [1, 3, 900, 1500, 40_000, 2_000_000, 1_500_000_000, 30_000_000_000] {
            times.0.record(value).unwrap();
        }
        let sum = |value: Value| {
            value.as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum::<f64>()
        };
        let all = sum(classes(&times, 1, false))
            + sum(classes(&times, 1000, false))
            + sum(classes(&times, 1_000_000, true));
        assert!((all - 100.0).abs() < 1e-9, "{all}");
    }

    #[test]
    fn dates() {
        assert_eq!(utc(0), "Thu Jan  1 00:00:00 1970");
        assert_eq!(utc(951_782_400), "Tue Feb 29 00:00:00 2000");
        assert_eq!(utc(1_795_269_906), "Sat Nov 21 14:05:06 2026");
        assert!(utc(u64::MAX).ends_with(" 9999"), "a clock that is wrong is no reason to panic");
    }
}
