//! What the runs of job files have measured, and what it amounts to: medians, spread, ratios.

use serde::{Deserialize, Serialize};

use super::job::{BenchEngine, Job, Scenario};
use super::sample::{JobSample, Sample};

/// How one run ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RunOutcome {
    Measured(Box<Sample>),
    Failed(String),
}

/// All runs of one engine on one job file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct OfEngine {
    pub(super) engine: BenchEngine,
    /// The reason why the engine was not run; none if it was.
    pub(super) left_out: Option<String>,
    pub(super) outcomes: Vec<RunOutcome>,
}

impl OfEngine {
    pub(super) fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.outcomes.iter().filter_map(|outcome| match outcome {
            RunOutcome::Measured(sample) => Some(&**sample),
            RunOutcome::Failed(_) => None,
        })
    }

    pub(super) fn failures(&self) -> impl Iterator<Item = &str> {
        self.outcomes.iter().filter_map(|outcome| match outcome {
            RunOutcome::Measured(_) => None,
            RunOutcome::Failed(text) => Some(text.as_str()),
        })
    }

    /// Median and spread of a figure of the job with this index, over all runs that were measured.
    pub(super) fn spread(&self, job: usize, figure: Figure) -> Option<Spread> {
        let runs = self.samples().filter_map(|sample| Some(Run { sample, job: sample.jobs.get(job)? }));
        Spread::of(runs.filter_map(|run| figure.of(&run)).collect())
    }
}

/// One job file, compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Compared {
    pub(super) scenario: Scenario,
    pub(super) engines: Vec<OfEngine>,
}

impl Compared {
    pub(super) fn of(&self, engine: BenchEngine) -> Option<&OfEngine> {
        self.engines.iter().find(|of| of.engine == engine)
    }

    pub(super) fn median(&self, engine: BenchEngine, job: usize, figure: Figure) -> Option<f64> {
        self.of(engine)?.spread(job, figure).map(|spread| spread.median)
    }

    /// Median of one engine divided by that of another.
    pub(super) fn ratio(&self, of: BenchEngine, to: BenchEngine, job: usize, figure: Figure) -> Option<f64> {
        let (of, to) = (self.median(of, job, figure)?, self.median(to, job, figure)?);
        (to > 0.0).then(|| of / to)
    }

    pub(super) fn any_measured(&self) -> bool {
        self.engines.iter().any(|of| of.samples().next().is_some())
    }

    pub(super) fn jobs(&self) -> impl Iterator<Item = (usize, &Job)> {
        self.scenario.jobs.iter().enumerate()
    }
}

/// One job in one run.
pub(super) struct Run<'a> {
    pub(super) sample: &'a Sample,
    pub(super) job: &'a JobSample,
}

/// A figure of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Figure {
    TouchesPerSecond,
    BytesPerSecond,
    MissesPerSecond,
    /// A miss, in µs, at so many thousandths.
    Miss(u32),
    /// CPU time of the whole process a miss of any job, in µs.
    CpuPerMiss,
    /// CPU time of the whole process a touch of any job, in µs.
    CpuPerTouch,
    /// Hit rate of all jobs together, in percent.
    HitRate,
    OptimumHitRate,
    StartMillis,
}

impl Figure {
    /// The name in JSON.
    pub(super) fn name(self) -> String {
        match self {
            Figure::TouchesPerSecond => "touches_per_s".to_owned(),
            Figure::BytesPerSecond => "bytes_per_s".to_owned(),
            Figure::MissesPerSecond => "misses_per_s".to_owned(),
            Figure::Miss(500) => "miss_p50_us".to_owned(),
            Figure::Miss(990) => "miss_p99_us".to_owned(),
            Figure::Miss(999) => "miss_p999_us".to_owned(),
            Figure::Miss(thousandths) => format!("miss_at_{thousandths}_us"),
            Figure::CpuPerMiss => "cpu_us_per_miss".to_owned(),
            Figure::CpuPerTouch => "cpu_us_per_touch".to_owned(),
            Figure::HitRate => "hit_rate_percent".to_owned(),
            Figure::OptimumHitRate => "optimum_hit_rate_percent".to_owned(),
            Figure::StartMillis => "start_ms".to_owned(),
        }
    }

    pub(super) const ALL: [Figure; 11] = [
        Figure::TouchesPerSecond,
        Figure::BytesPerSecond,
        Figure::MissesPerSecond,
        Figure::Miss(500),
        Figure::Miss(990),
        Figure::Miss(999),
        Figure::CpuPerMiss,
        Figure::CpuPerTouch,
        Figure::HitRate,
        Figure::OptimumHitRate,
        Figure::StartMillis,
    ];

    /// None where it has no meaning: the time of a miss where there was none.
    pub(super) fn of(self, run: &Run) -> Option<f64> {
        let Run { sample, job } = run;
        let a_second = |count: u64| (job.runtime_ns > 0).then(|| count as f64 * 1e9 / job.runtime_ns as f64);
        let all = |count: fn(&JobSample) -> u64| sample.jobs.iter().map(count).sum::<u64>();
        let over = |part: f64, whole: u64| (whole > 0).then(|| part / whole as f64);
        match self {
            Figure::TouchesPerSecond => a_second(job.touches),
            Figure::BytesPerSecond => a_second(job.read.bytes + job.write.bytes),
            Figure::MissesPerSecond => a_second(job.misses),
            Figure::Miss(thousandths) => {
                let times = &job.miss_ns.0;
                let at = f64::from(thousandths) / 1000.0;
                (!times.is_empty()).then(|| times.value_at_quantile(at) as f64 / 1000.0)
            }
            Figure::CpuPerMiss => over(sample.cpu_ns as f64 / 1000.0, all(|job| job.misses)),
            Figure::CpuPerTouch => over(sample.cpu_ns as f64 / 1000.0, all(|job| job.touches)),
            Figure::HitRate => {
                over(sample.pages_read as f64, all(|job| job.touches)).map(|miss| 100.0 - 100.0 * miss)
            }
            Figure::OptimumHitRate => sample.optimum_hit_rate.map(|rate| rate * 100.0),
            Figure::StartMillis => Some(sample.start_ns as f64 / 1e6),
        }
    }
}

/// Lowest, middle and highest of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Spread {
    /// None without values. The median of an even number is the mean of the two in the middle.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let median = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Spread { min, median, max })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::jobfile;
    use super::super::sample::{Side, Times};
    use super::*;

    /// A run whose every operation took `us`.
    pub(in super::super) fn sample(engine: BenchEngine, jobs: &[Job], operations: u64, us: u64) -> Sample {
        let mut times = Times::default();
        times.0.record_n(us * 1000, operations).expect("in bounds");
        let side = Side { operations, bytes: operations * 4096, times_ns: times.clone() };
        let job = |job: &Job| JobSample {
            name: job.name.clone(),
            read: side.clone(),
            write: side.clone(),
            touches: 2 * operations,
            misses: operations,
            verify_errors: 0,
            runtime_ns: 1_000_000_000,
            miss_ns: times.clone(),
            series: vec![operations / 5; 10],
        };
        Sample {
            engine,
            jobs: jobs.iter().map(job).collect(),
            cpu_ns: 5_000_000,
            pages_read: operations / 2,
            pages_written: 3,
            optimum_hit_rate: Some(0.8),
            start_ns: 2_000_000,
            engine_store_faults: None,
        }
    }

    pub(in super::super) fn compared(name: &str) -> Compared {
        let text = "[global]\nram=32m\nengine=vmemd,swap,raw,mem\n[a]\nsize=64m\nrw=randrw\nnumjobs=4\n";
        let scenario = jobfile::parse(name, text).expect("a job file");
        let of = |engine, operations, us| OfEngine {
            engine,
            left_out: None,
            outcomes: vec![
                RunOutcome::Measured(Box::new(sample(engine, &scenario.jobs, operations, us))),
                RunOutcome::Failed("killed".to_owned()),
                RunOutcome::Measured(Box::new(sample(engine, &scenario.jobs, operations * 3, us))),
            ],
        };
        let mut engines = vec![
            of(BenchEngine::Vmemd, 1000, 100),
            of(BenchEngine::Swap, 500, 200),
            of(BenchEngine::Raw, 2000, 90),
        ];
        let left_out = Some("no RAM".to_owned());
        engines.push(OfEngine { engine: BenchEngine::Mem, left_out, outcomes: Vec::new() });
        Compared { scenario, engines }
    }

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0]), Some(Spread { min: 1.0, median: 2.5, max: 4.0 }));
    }

    #[test]
    fn figures_and_ratios() {
        let compared = compared("x");
        let median = |engine, figure| compared.median(engine, 0, figure);
        assert_eq!(median(BenchEngine::Vmemd, Figure::TouchesPerSecond), Some(4000.0));
        assert_eq!(median(BenchEngine::Vmemd, Figure::BytesPerSecond), Some(4000.0 * 4096.0));
        assert_eq!(median(BenchEngine::Vmemd, Figure::HitRate), Some(75.0));
        assert_eq!(median(BenchEngine::Vmemd, Figure::OptimumHitRate), Some(80.0));
        assert_eq!(median(BenchEngine::Mem, Figure::HitRate), None);
        let p50 = median(BenchEngine::Vmemd, Figure::Miss(500)).unwrap();
        assert!((100.0..100.2).contains(&p50), "{p50}");
        let to_swap = |figure| compared.ratio(BenchEngine::Vmemd, BenchEngine::Swap, 0, figure);
        assert_eq!(to_swap(Figure::TouchesPerSecond), Some(2.0));
        assert_eq!(compared.ratio(BenchEngine::Vmemd, BenchEngine::Mem, 0, Figure::TouchesPerSecond), None);
    }

    #[test]
    fn no_division_by_nothing() {
        let mut sample = sample(BenchEngine::Mem, &compared("x").scenario.jobs, 0, 1);
        sample.jobs[0].runtime_ns = 0;
        let run = Run { sample: &sample, job: &sample.jobs[0] };
        for figure in Figure::ALL {
            let value = figure.of(&run);
            assert!(value.is_none_or(f64::is_finite), "{figure:?}: {value:?}");
        }
    }
}
