//! What the engine has to reach in the jobs of `benches/jobs/`, and whether it did.
//!
//! One table says everything, `benches/demands.toml`: a row of it is one line of the verdict, with up to two demands.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::costs::{Cost, Costs};
use super::job::BenchEngine;
use super::results::{Compared, Figure};

const TEXT: &str = include_str!("../demands.toml");

/// The table as it is built into the program. A test parses it, so that a mistake in it shows there.
static TABLE: LazyLock<Table> =
    LazyLock::new(|| toml::from_str(TEXT).unwrap_or_else(|error| panic!("demands.toml: {error}")));

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    row: Vec<Line>,
    /// Demands on costs that no job shows.
    cost: Vec<CostLine>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    title: String,
    /// The job, by its file's name and its own. None: all jobs.
    #[serde(default)]
    scenario: Option<String>,
    #[serde(default)]
    job: Option<String>,
    demands: Vec<Demand>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CostLine {
    title: String,
    cost: Cost,
    /// The most that it may be, in percent.
    at_most: f64,
}

/// What a figure of vmemd is held against.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Against {
    /// Another engine, in the same job: their ratio.
    Engine(BenchEngine),
    /// vmemd itself, in the job of the same name of another file: their ratio.
    Scenario(String),
    /// Nothing: the figure itself.
    Itself,
    /// The optimum's hit rate: the points between them.
    Optimum,
    /// Another engine in all jobs of all files: the worst of the ratios.
    Everywhere(BenchEngine),
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "WrittenDemand")]
struct Demand {
    figure: Figure,
    against: Against,
    bound: Bound,
}

/// A demand as it is written down.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenDemand {
    /// By its name in JSON.
    figure: String,
    against: Against,
    at_least: Option<f64>,
    at_most: Option<f64>,
}

impl TryFrom<WrittenDemand> for Demand {
    type Error = String;

    fn try_from(written: WrittenDemand) -> Result<Demand, String> {
        let WrittenDemand { figure, against, at_least, at_most } = written;
        let bound = match (at_least, at_most) {
            (Some(bound), None) => Bound::AtLeast(bound),
            (None, Some(bound)) => Bound::AtMost(bound),
            _ => return Err("a demand has either at_least or at_most".to_owned()),
        };
        let known = Figure::ALL.into_iter().find(|known| known.name() == figure);
        Ok(Demand { figure: known.ok_or_else(|| format!("no figure is called {figure}"))?, against, bound })
    }
}

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

/// The rows of which anything was measured.
pub(super) fn judge(results: &[Compared], costs: &Costs) -> Vec<Row> {
    let rows = TABLE.row.iter().map(|line| row(line, results));
    let of_costs = TABLE.cost.iter().map(|CostLine { title, cost, at_most }| Row {
        title,
        demands: vec![held(Bound::AtMost(*at_most), "itself".to_owned(), " %", costs.of(*cost), "")],
        cpu_us_per_miss: [None, None],
    });
    rows.chain(of_costs).filter(|row| row.demands.iter().any(|judged| judged.measured.is_some())).collect()
}

fn find<'a>(results: &'a [Compared], scenario: &str, job: &str) -> Option<(&'a Compared, usize)> {
    let compared = results.iter().find(|compared| compared.scenario.name == scenario)?;
    let (number, _) = compared.jobs().find(|(_, found)| found.name == job)?;
    Some((compared, number))
}

fn row(line: &'static Line, results: &[Compared]) -> Row {
    let job = line.job.as_deref().unwrap_or_default();
    let found = line.scenario.as_deref().and_then(|scenario| find(results, scenario, job));
    let cpu = |engine| found.and_then(|(compared, job)| compared.median(engine, job, Figure::CpuPerMiss));
    Row {
        title: &line.title,
        demands: line.demands.iter().map(|demand| judged(demand, job, found, results)).collect(),
        cpu_us_per_miss: [cpu(BenchEngine::Vmemd), cpu(BenchEngine::Swap)],
    }
}

fn judged(demand: &Demand, job: &str, found: Option<(&Compared, usize)>, results: &[Compared]) -> Judged {
    const OURS: BenchEngine = BenchEngine::Vmemd;
    let figure = demand.figure;
    let mut worst_in = String::new();
    let (against, unit, measured) = match &demand.against {
        Against::Engine(to) => {
            let ratio = found.and_then(|(compared, number)| compared.ratio(OURS, *to, number, figure));
            (to.name().to_owned(), " x", ratio)
        }
        Against::Scenario(name) => {
            let median =
                |at: Option<(&Compared, usize)>| at.and_then(|(of, number)| of.median(OURS, number, figure));
            let (here, there) = (median(found), median(find(results, name, job)));
            let ratio = here.zip(there).filter(|(_, there)| *there > 0.0).map(|(here, there)| here / there);
            (name.clone(), " x", ratio)
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
        Against::Everywhere(to) => {
            let all = results.iter().flat_map(|compared| {
                let of = move |(number, job): (usize, &super::job::Job)| {
                    let name = format!("{}/{}", compared.scenario.name, job.name);
                    compared.ratio(OURS, *to, number, figure).map(|ratio| (ratio, name))
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
    use super::super::jobfile;
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
                if let super::super::results::RunOutcome::Measured(sample) = outcome {
                    sample.jobs = vec![sample.jobs[0].clone(); jobs.len()];
                }
            }
        }
        compared
    }

    #[test]
    fn the_table_is_of_jobs_that_there_are() {
        assert_eq!((TABLE.row.len(), TABLE.cost.len()), (15, 2));
        let jobs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs");
        let has = |scenario: &str, job: &str| {
            let scenario = jobfile::read(&jobs.join(format!("{scenario}.fio"))).expect(scenario);
            assert!(scenario.jobs.iter().any(|found| found.name == job), "{} {job}", scenario.name);
        };
        for line in &TABLE.row {
            assert!((1..=2).contains(&line.demands.len()), "{}", line.title);
            let job = line.job.as_deref().unwrap_or_default();
            let everywhere = line.demands.iter().all(|one| matches!(one.against, Against::Everywhere(_)));
            assert_eq!(
                (line.scenario.is_none(), line.job.is_none()),
                (everywhere, everywhere),
                "{}",
                line.title
            );
            if let Some(scenario) = &line.scenario {
                has(scenario, job);
            }
            for demand in &line.demands {
                if let Against::Scenario(other) = &demand.against {
                    has(other, job);
                }
            }
        }
    }

    #[test]
    fn what_is_no_demand_is_refused() {
        let read = |demand: &str| {
            toml::from_str::<Table>(&format!("cost = []\n[[row]]\ntitle = \"x\"\ndemands = [{demand}]\n"))
        };
        let good = r#"{ figure = "touches_per_s", against = { engine = "swap" }, at_least = 5 }"#;
        let table = read(good).expect(good);
        let demand = &table.row[0].demands[0];
        assert_eq!(demand.figure, Figure::TouchesPerSecond);
        assert!(matches!(demand.against, Against::Engine(BenchEngine::Swap)));
        assert!(matches!(demand.bound, Bound::AtLeast(5.0)));
        for (from, to, said) in [
            ("touches_per_s", "touches", "no figure is called touches"),
            ("at_least = 5", "at_least = 5, at_most = 6", "either at_least or at_most"),
            (", at_least = 5", "", "either at_least or at_most"),
            ("at_least", "atleast", "unknown field"),
            ("swap", "disk", "unknown variant"),
        ] {
            let error = read(&good.replace(from, to)).expect_err(to).to_string();
            assert!(error.contains(said), "{error}");
        }
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
