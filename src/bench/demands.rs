//! What the engine has to reach in the jobs of `benches/jobs/`, and whether it did.
//!
//! One table says everything: a row is one line of the verdict, with up to two demands.

use serde::Serialize;

use super::costs::Costs;
use super::job::BenchEngine;
use super::results::{Compared, Figure};

/// What a figure of vmemd is held against.
#[derive(Clone, Copy, Debug)]
enum Against {
    /// Another engine, in the same job: their ratio.
    Engine(BenchEngine),
    /// vmemd itself, in the job of the same name of another file: their ratio.
    Scenario(&'static str),
    /// Nothing: the figure itself.
    Itself,
    /// The optimum's hit rate: the points between them.
    Optimum,
    /// Another engine in all jobs of all files: the worst of the ratios.
    EngineEverywhere(BenchEngine),
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy, Debug)]
struct Demand {
    figure: Figure,
    against: Against,
    bound: Bound,
}

struct Line {
    title: &'static str,
    scenario: &'static str,
    job: &'static str,
    demands: &'static [Demand],
}

const fn at_least(bound: f64, figure: Figure, against: Against) -> Demand {
    Demand { figure, against, bound: Bound::AtLeast(bound) }
}

const fn at_most(bound: f64, figure: Figure, against: Against) -> Demand {
    Demand { figure, against, bound: Bound::AtMost(bound) }
}

const SWAP: Against = Against::Engine(BenchEngine::Swap);
const RAW: Against = Against::Engine(BenchEngine::Raw);
const MEM: Against = Against::Engine(BenchEngine::Mem);
const TOUCHES: Figure = Figure::TouchesPerSecond;

const LINES: [Line; 15] = [
    Line {
        title: "sequential rewrite",
        scenario: "seqrewrite",
        job: "seqrewrite",
        demands: &[at_least(5.0, TOUCHES, SWAP), at_least(0.85, TOUCHES, RAW)],
    },
    Line {
        title: "sequential read of clean pages",
        scenario: "seqread",
        job: "seqread",
        demands: &[at_least(5.0, TOUCHES, SWAP), at_least(0.90, TOUCHES, RAW)],
    },
    Line {
        title: "stride, every 3rd page",
        scenario: "stride3",
        job: "stride3",
        demands: &[at_least(2.0, TOUCHES, SWAP)],
    },
    Line {
        title: "stride, every 17th page",
        scenario: "stride17",
        job: "stride17",
        demands: &[at_least(2.0, TOUCHES, SWAP)],
    },
    Line {
        title: "random read-write, 1 thread: p50 of a miss",
        scenario: "randrw1",
        job: "randrw1",
        demands: &[at_most(0.95, Figure::Miss(500), SWAP), at_most(1.20, Figure::Miss(500), RAW)],
    },
    Line {
        title: "random read-write, 8 threads: misses/s",
        scenario: "randrw8",
        job: "randrw8",
        demands: &[
            at_least(1.5, Figure::MissesPerSecond, SWAP),
            at_least(0.80, Figure::MissesPerSecond, RAW),
        ],
    },
    Line {
        title: "zipf 0.99 read-write, 4 threads",
        scenario: "zipf",
        job: "zipf",
        demands: &[at_least(1.5, TOUCHES, SWAP), at_most(3.0, Figure::HitRate, Against::Optimum)],
    },
    Line {
        title: "looping over 1.1 x the budget",
        scenario: "loop",
        job: "loop",
        demands: &[at_least(3.0, TOUCHES, SWAP), at_most(5.0, Figure::HitRate, Against::Optimum)],
    },
    Line {
        title: "a working set that changes: misses until it is in RAM",
        scenario: "workingset",
        job: "workingset",
        demands: &[at_most(1.0, Figure::MissesPerSecond, SWAP)],
    },
    Line {
        title: "first touch within the budget",
        scenario: "firsttouch",
        job: "firsttouch",
        demands: &[at_least(0.9, TOUCHES, MEM)],
    },
    Line {
        title: "two jobs in one VM: the sequential one",
        scenario: "two",
        job: "seq",
        demands: &[at_least(0.8, TOUCHES, Against::Scenario("two-alone-seq"))],
    },
    Line {
        title: "two jobs in one VM: the random one",
        scenario: "two",
        job: "rand",
        demands: &[at_least(0.8, TOUCHES, Against::Scenario("two-alone-rand"))],
    },
    Line {
        title: "p99.9 of a miss, in the worst job",
        scenario: "",
        job: "",
        demands: &[at_most(1.0, Figure::Miss(999), Against::EngineEverywhere(BenchEngine::Swap))],
    },
    Line {
        title: "a VM of 1 TiB: start, ms",
        scenario: "huge",
        job: "huge",
        demands: &[at_most(1000.0, Figure::StartMillis, Against::Itself)],
    },
    Line {
        title: "a VM of 1 TiB: p50 of a miss",
        scenario: "huge",
        job: "huge",
        demands: &[at_most(1.05, Figure::Miss(500), Against::Scenario("huge-small"))],
    },
];

/// One demand, held against results.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Judged {
    /// What vmemd was compared with.
    pub(super) against: String,
    pub(super) demanded: String,
    /// None if there are no results for it.
    pub(super) measured: Option<f64>,
    /// With what belongs to it.
    pub(super) shown: String,
    pub(super) met: Option<bool>,
}

/// A row of the verdict.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) title: &'static str,
    pub(super) demands: Vec<Judged>,
    /// CPU time a miss of vmemd and of swap, µs.
    pub(super) cpu_us_per_miss: [Option<f64>; 2],
}

impl Row {
    /// None if something was not measured.
    pub(super) fn met(&self) -> Option<bool> {
        let met: Vec<Option<bool>> = self.demands.iter().map(|judged| judged.met).collect();
        if met.contains(&Some(false)) {
            Some(false)
        } else {
            met.into_iter().collect::<Option<Vec<_>>>().map(|_| true)
        }
    }
}

/// What no job shows: a title, the most that it may be in percent, and the figure.
type CostLine = (&'static str, f64, fn(&Costs) -> Option<f64>);

const COST_LINES: [CostLine; 2] = [
    ("an idle VM, of a core", 0.1, |costs| costs.idle_percent),
    ("the engine's books, of the VM's memory", 0.35, |costs| costs.books_percent),
];

/// The rows of which anything was measured.
pub(super) fn judge(results: &[Compared], costs: &Costs) -> Vec<Row> {
    let rows = LINES.iter().map(|line| row(line, results));
    let of_costs = COST_LINES.iter().map(|(title, most, figure)| Row {
        title,
        demands: vec![held(Bound::AtMost(*most), "itself".to_owned(), " %", figure(costs), "")],
        cpu_us_per_miss: [None, None],
    });
    rows.chain(of_costs).filter(|row| row.demands.iter().any(|judged| judged.measured.is_some())).collect()
}

fn find<'a>(results: &'a [Compared], scenario: &str, job: &str) -> Option<(&'a Compared, usize)> {
    let compared = results.iter().find(|compared| compared.scenario.name == scenario)?;
    let (number, _) = compared.jobs().find(|(_, found)| found.name == job)?;
    Some((compared, number))
}

fn row(line: &Line, results: &[Compared]) -> Row {
    let found = find(results, line.scenario, line.job);
    let cpu = |engine| found.and_then(|(compared, job)| compared.median(engine, job, Figure::CpuPerMiss));
    Row {
        title: line.title,
        demands: line.demands.iter().map(|demand| judged(demand, line.job, found, results)).collect(),
        cpu_us_per_miss: [cpu(BenchEngine::Vmemd), cpu(BenchEngine::Swap)],
    }
}

fn judged(demand: &Demand, job: &str, found: Option<(&Compared, usize)>, results: &[Compared]) -> Judged {
    const OURS: BenchEngine = BenchEngine::Vmemd;
    let figure = demand.figure;
    let mut worst_in = String::new();
    let (against, unit, measured) = match demand.against {
        Against::Engine(to) => {
            let ratio = found.and_then(|(compared, number)| compared.ratio(OURS, to, number, figure));
            (to.name().to_owned(), " x", ratio)
        }
        Against::Scenario(name) => {
            let median =
                |at: Option<(&Compared, usize)>| at.and_then(|(of, number)| of.median(OURS, number, figure));
            let (here, there) = (median(found), median(find(results, name, job)));
            let ratio = here.zip(there).filter(|(_, there)| *there > 0.0).map(|(here, there)| here / there);
            (name.to_owned(), " x", ratio)
        }
        Against::Itself => {
            let value = found.and_then(|(compared, number)| compared.median(OURS, number, figure));
            ("itself".to_owned(), "", value)
        }
        Against::Optimum => {
            let gap = found.and_then(|(compared, number)| {
                let optimum = compared.median(OURS, number, Figure::OptimumHitRate)?;
                Some(optimum - compared.median(OURS, number, figure)?)
            });
            ("the optimum".to_owned(), " points below", gap)
        }
        Against::EngineEverywhere(to) => {
            let all = results.iter().flat_map(|compared| {
                let of = move |(number, job): (usize, &super::job::Job)| {
                    let name = format!("{}/{}", compared.scenario.name, job.name);
                    compared.ratio(OURS, to, number, figure).map(|ratio| (ratio, name))
                };
                compared.jobs().filter_map(of)
            });
            let worst = all.max_by(|one, other| one.0.total_cmp(&other.0));
            worst_in = worst.as_ref().map(|(_, name)| format!(" in {name}")).unwrap_or_default();
            (to.name().to_owned(), " x", worst.map(|(ratio, _)| ratio))
        }
    };
    held(demand.bound, against, unit, measured, &worst_in)
}

fn held(bound: Bound, against: String, unit: &str, measured: Option<f64>, place: &str) -> Judged {
    let number = |value: f64| match value.abs() {
        small if small > 0.0 && small < 0.0995 => format!("{value:.3}"),
        middle if middle < 99.95 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    };
    let demanded = match bound {
        Bound::AtLeast(bound) => format!("at least {}{unit}", number(bound)),
        Bound::AtMost(bound) => format!("at most {}{unit}", number(bound)),
    };
    let met = measured.map(|value| match bound {
        Bound::AtLeast(bound) => value >= bound,
        Bound::AtMost(bound) => value <= bound,
    });
    let shown = measured.map_or_else(|| "-".to_owned(), |value| format!("{}{unit}{place}", number(value)));
    Judged { against, demanded, measured, shown, met }
}

/// A table in Markdown.
pub(super) fn table(rows: &[Row]) -> String {
    let head = ["job", "against", "measured", "demanded", "CPU a miss, us (vmemd, swap)", "verdict"]
        .map(str::to_owned);
    let mut lines = vec![head];
    for row in rows {
        let cpu = row.cpu_us_per_miss.map(|us| us.map_or_else(|| "-".to_owned(), |us| format!("{us:.0}")));
        for (number, judged) in row.demands.iter().enumerate() {
            let first = |text: &str| if number == 0 { text.to_owned() } else { String::new() };
            let cpu = if row.cpu_us_per_miss == [None, None] { String::new() } else { cpu.join(", ") };
            let verdict = match judged.met {
                Some(true) => "met",
                Some(false) => "MISSED",
                None => "not measured",
            };
            let (against, shown) = (judged.against.clone(), judged.shown.clone());
            lines.push([
                first(row.title),
                against,
                shown,
                judged.demanded.clone(),
                first(&cpu),
                verdict.to_owned(),
            ]);
        }
    }
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let cells = |line: &[String; 6]| {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(text, width)| format!("{text:<width$}")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut text = cells(&lines[0]) + &format!("| {} |\n", rule.join(" | "));
    lines[1..].iter().for_each(|line| text += &cells(line));
    let met = rows.iter().filter(|row| row.met() == Some(true)).count();
    text + &format!("\n{met} of {} met\n", rows.len())
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::compared;
    use super::*;

    fn named(scenario: &str, jobs: &[&str]) -> Compared {
        let mut compared = compared(scenario);
        let job = compared.scenario.jobs[0].clone();
        compared.scenario.jobs = jobs
            .iter()
            .map(|name| super::super::job::Job { name: (*name).to_owned(), ..job.clone() })
            .collect();
        for of in &mut compared.engines {
            for outcome in &mut of.outcomes {
                if let super::super::results::Outcome::Measured(sample) = outcome {
                    sample.jobs = vec![sample.jobs[0].clone(); jobs.len()];
                }
            }
        }
        compared
    }

    #[test]
    fn every_row_is_judged_and_no_more() {
        assert!(judge(&[], &Costs::default()).is_empty());
        let results =
            [named("seqrewrite", &["seqrewrite"]), named("zipf", &["zipf"]), named("two", &["seq", "rand"])];
        let rows = judge(&results, &Costs::default());
        let titles: Vec<_> = rows.iter().map(|row| row.title).collect();
        assert_eq!(
            titles,
            ["sequential rewrite", "zipf 0.99 read-write, 4 threads", "p99.9 of a miss, in the worst job"]
        );
        // 2.00 x of swap's and 0.50 of raw's.
        assert_eq!((rows[0].demands[0].shown.as_str(), rows[0].demands[0].met), ("2.00 x", Some(false)));
        assert_eq!((rows[0].demands[1].shown.as_str(), rows[0].demands[1].met), ("0.50 x", Some(false)));
        assert_eq!(
            (rows[1].demands[1].shown.as_str(), rows[1].demands[1].met),
            ("5.00 points below", Some(false))
        );
        assert_eq!((rows[1].demands[0].met, rows[2].met()), (Some(true), Some(true)));
        let text = table(&rows);
        assert!(text.contains("MISSED") && text.ends_with("\n1 of 3 met\n"), "{text}");
    }

    #[test]
    fn two_jobs_are_held_against_each_alone() {
        let results = [named("two", &["seq", "rand"]), named("two-alone-seq", &["seq"])];
        let row = &judge(&results, &Costs::default())[0];
        assert_eq!((row.demands[0].measured, row.met()), (Some(1.0), Some(true)));
    }

    #[test]
    fn costs_that_were_measured_have_rows() {
        let rows = judge(&[], &Costs { idle_percent: Some(0.0153), books_percent: Some(0.36) });
        let shown: Vec<_> = rows.iter().map(|row| (row.demands[0].shown.as_str(), row.met())).collect();
        assert_eq!(shown, [("0.015 %", Some(true)), ("0.36 %", Some(false))]);
        assert_eq!(rows[0].demands[0].demanded, "at most 0.10 %");
        let one = judge(&[], &Costs { books_percent: Some(0.35), ..Costs::default() });
        assert!(one.len() == 1 && one[0].title.contains("books") && one[0].met() == Some(true));
    }
}
