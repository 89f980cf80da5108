//! What the runs of a benchmark amount to: medians, spread, ratios; as JSON and as a table.

use serde::Serialize;
use serde_json::{Value, json};
use vmprocess::failure::{Failure, FailureKind};

use super::experiment::{Measured, Settings, Target};
use super::results::Spread;

/// How one run ended.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum MigrationOutcome {
    Measured(Measured),
    Failed(String),
}

impl MigrationOutcome {
    pub(super) fn line(&self) -> String {
        match self {
            MigrationOutcome::Measured(run) => format!(
                "migration {:.2} s, downtime {:.1} ms, rewrite {:.2} s, {} page-ins, {} page-outs, {} mismatched",
                run.migration_s,
                run.downtime_ms,
                run.rewrite_s,
                run.pageins_during,
                run.pageouts_during,
                run.mismatched_pages
            ),
            MigrationOutcome::Failed(text) => format!("failed: {text}"),
        }
    }
}

struct OfTarget {
    target: Target,
    left_out: Option<String>,
    outcomes: Vec<MigrationOutcome>,
}

/// All runs so far.
pub(super) struct Results(Vec<OfTarget>);

impl OfTarget {
    fn runs(&self) -> impl Iterator<Item = &Measured> {
        self.outcomes.iter().filter_map(|outcome| match outcome {
            MigrationOutcome::Measured(run) => Some(run),
            MigrationOutcome::Failed(_) => None,
        })
    }

    fn spread(&self, value: fn(&Measured) -> f64) -> Option<Spread> {
        Spread::of(self.runs().map(value).collect())
    }

    fn failures(&self) -> Vec<&str> {
        let failed = self.outcomes.iter().filter_map(|outcome| match outcome {
            MigrationOutcome::Failed(text) => Some(text.as_str()),
            MigrationOutcome::Measured(_) => None,
        });
        failed.collect()
    }
}

const MIGRATION: fn(&Measured) -> f64 = |run| run.migration_s;
const REWRITE: fn(&Measured) -> f64 = |run| run.rewrite_s;
const DOWNTIME: fn(&Measured) -> f64 = |run| run.downtime_ms;

impl Results {
    pub(super) fn new(targets: Vec<(Target, Option<String>)>) -> Results {
        let of = |(target, left_out)| OfTarget { target, left_out, outcomes: Vec::new() };
        Results(targets.into_iter().map(of).collect())
    }

    pub(super) fn is_left_out(&self, target: Target) -> bool {
        self.of(target).is_some_and(|of| of.left_out.is_some())
    }

    pub(super) fn add(&mut self, target: Target, outcome: MigrationOutcome) {
        if let Some(of) = self.0.iter_mut().find(|of| of.target == target) {
            of.outcomes.push(outcome);
        }
    }

    pub(super) fn any_measured(&self) -> bool {
        self.0.iter().any(|of| of.runs().next().is_some())
    }

    fn of(&self, target: Target) -> Option<&OfTarget> {
        self.0.iter().find(|of| of.target == target)
    }

    /// Median of one target divided by that of another.
    fn ratio(&self, of: Target, to: Target, value: fn(&Measured) -> f64) -> Option<f64> {
        let median = |target| self.of(target)?.spread(value).map(|spread| spread.median);
        let (of, to) = (median(of)?, median(to)?);
        (of != to || to != 0.0).then(|| of / to)
    }

    /// A list with one object a target, in the order asked for.
    pub(super) fn json(&self) -> Result<String, Failure> {
        let list: Vec<Value> = self.0.iter().map(|of| self.value(of)).collect();
        serde_json::to_string_pretty(&list)
            .map_err(|error| Failure::new(FailureKind::Other, error.to_string()))
    }

    fn value(&self, of: &OfTarget) -> Value {
        let median = |value| of.spread(value).map(|spread| spread.median);
        let spread = |value| of.spread(value).map(|spread| json!({ "min": spread.min, "max": spread.max }));
        // Not medians, but the worst of all runs: one run with a wrong page must show.
        let most = |value: fn(&Measured) -> u64| of.runs().map(value).max();
        let mut ratios = serde_json::Map::new();
        for to in self.0.iter().filter(|to| to.target != of.target) {
            for (name, value) in [("migration", MIGRATION), ("rewrite", REWRITE)] {
                let ratio = self.ratio(of.target, to.target, value);
                ratios.insert(format!("{name}_to_{}", to.target.name()), json!(ratio));
            }
        }
        json!({
            "target": of.target.name(),
            "migration_s": median(MIGRATION),
            "downtime_ms": median(DOWNTIME),
            "rewrite_s": median(REWRITE),
            "pageins_during": most(|run| run.pageins_during),
            "pageouts_during": most(|run| run.pageouts_during),
            "mismatched_pages": most(|run| run.mismatched_pages),
            "spread": {
                "migration_s": spread(MIGRATION),
                "downtime_ms": spread(DOWNTIME),
                "rewrite_s": spread(REWRITE),
            },
            "ratios": ratios,
            "runs": of.runs().collect::<Vec<_>>(),
            "failed": of.failures(),
            "left_out": of.left_out,
        })
    }

    pub(super) fn table(&self, settings: &Settings) -> String {
        let mut text = format!(
            "A VM of {:#} migrates into {:#} and rewrites half of its memory there: medians of {} (lowest – \
                 highest)\n\n",
            settings.memory, settings.ram, settings.repeat
        );
        text += &format!(
            "{:<7} {:>22} {:>24} {:>22} {:>9} {:>10} {:>11}\n",
            "TARGET", "MIGRATION s", "DOWNTIME ms", "REWRITE s", "PAGE-INS", "PAGE-OUTS", "MISMATCHED"
        );
        for of in &self.0 {
            text += &row(of);
        }
        let ratios = [
            ("migration", MIGRATION, Target::Swap),
            ("migration", MIGRATION, Target::Ram),
            ("rewrite", REWRITE, Target::Swap),
            ("rewrite", REWRITE, Target::Ram),
        ];
        let ratios: Vec<String> = ratios
            .into_iter()
            .filter_map(|(name, value, to)| {
                let ratio = self.ratio(Target::Vmemd, to, value)?;
                Some(format!("{name} {ratio:.2} of {}'s", to.name()))
            })
            .collect();
        if !ratios.is_empty() {
            text += &format!("\nvmemd: {}\n", ratios.join(", "));
        }
        text += &format!(
            "\nswap's limit is {:#} plus {:#} for the process itself",
            settings.ram,
            settings.allowance()
        );
        text
    }
}

fn row(of: &OfTarget) -> String {
    let name = of.target.name();
    if let Some(reason) = &of.left_out {
        return format!("{name:<7} left out: {reason}\n");
    }
    let cell = |value, digits: usize| match of.spread(value) {
        Some(spread) => {
            format!("{:.digits$} ({:.digits$} – {:.digits$})", spread.median, spread.min, spread.max)
        }
        None => "-".to_owned(),
    };
    let most = |value: fn(&Measured) -> u64| {
        of.runs().map(value).max().map_or("-".to_owned(), |most| most.to_string())
    };
    let mut text = format!(
        "{name:<7} {:>22} {:>24} {:>22} {:>9} {:>10} {:>11}\n",
        cell(MIGRATION, 2),
        cell(DOWNTIME, 1),
        cell(REWRITE, 2),
        most(|run| run.pageins_during),
        most(|run| run.pageouts_during),
        most(|run| run.mismatched_pages)
    );
    for failure in of.failures() {
        text += &format!("{:<7} a run failed: {failure}\n", "");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(migration_s: f64, rewrite_s: f64) -> MigrationOutcome {
        MigrationOutcome::Measured(Measured {
            migration_s,
            downtime_ms: 40.0,
            rewrite_s,
            pageins_during: 0,
            pageouts_during: 0,
            mismatched_pages: 0,
            rounds: 3,
            bytes_sent: 1,
            throttle_max_percent: 0,
        })
    }

    #[test]
    fn a_failed_run_and_a_target_left_out_are_told() {
        let mut results =
            Results::new(vec![(Target::Vmemd, None), (Target::Swap, Some("no root".to_owned()))]);
        results.add(Target::Vmemd, run(2.0, 1.0));
        results.add(Target::Vmemd, MigrationOutcome::Failed("killed".to_owned()));
        let list: Value = serde_json::from_str(&results.json().unwrap()).unwrap();
        assert_eq!(list[0]["migration_s"], 2.0);
        assert_eq!(list[0]["failed"][0], "killed");
        assert_eq!(list[1]["left_out"], "no root");
        assert_eq!(list[1]["rewrite_s"], Value::Null);
        assert!(list[0]["ratios"]["migration_to_swap"].is_null());
    }

    #[test]
    fn ratios_are_of_medians() {
        let mut results = Results::new(vec![(Target::Vmemd, None), (Target::Swap, None)]);
        results.add(Target::Vmemd, run(1.0, 1.0));
        results.add(Target::Swap, run(4.0, 2.0));
        assert_eq!(results.ratio(Target::Vmemd, Target::Swap, MIGRATION), Some(0.25));
        assert_eq!(results.ratio(Target::Vmemd, Target::Swap, REWRITE), Some(0.5));
    }
}
