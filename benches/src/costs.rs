//! What the engine costs beside its work, as the tests `idle` and `bookkeeping` have measured it and `scripts/bench`
//! has written it down.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use vmprocess::failure::{Failure, FailureKind};

/// A cost by its name in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Cost {
    IdlePercent,
    BooksPercent,
}

/// The costs that were measured. None: this host could not measure it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Costs {
    /// Share of a core that a VM takes which does nothing: the worst of those measured, in percent.
    pub(super) idle_percent: Option<f64>,
    /// Share of a VM's memory that the engine's bookkeeping takes, in percent.
    pub(super) books_percent: Option<f64>,
}

impl Costs {
    pub(super) fn of(&self, cost: Cost) -> Option<f64> {
        match cost {
            Cost::IdlePercent => self.idle_percent,
            Cost::BooksPercent => self.books_percent,
        }
    }
}

/// Reads `{"idle_percent": 0.015, "books_percent": 0.32}`.
pub(super) fn read(path: &Path) -> Result<Costs, Failure> {
    let usage = |text| Failure::new(FailureKind::Usage, format!("{}: {text}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| usage(format!("cannot be read: {error}")))?;
    let costs: Costs = serde_json::from_str(&text)
        .map_err(|error| usage(format!("{error}: costs are what `scripts/bench` writes")))?;
    let percent = |cost: Option<f64>| cost.is_none_or(|percent| (0.0..=100.0).contains(&percent));
    match percent(costs.idle_percent) && percent(costs.books_percent) {
        true => Ok(costs),
        false => Err(usage("a share is from 0 to 100 percent".to_owned())),
    }
}
