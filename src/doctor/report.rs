//! The findings, as people and programs read them.

use std::io::{IsTerminal, Write};
use std::path::Path;

use serde::Serialize;
use vmprocess::failure::{Failure, FailureKind};

use super::check::Check;
use super::checks;

#[derive(Serialize)]
struct Account {
    ok: bool,
    checks: Vec<Check>,
}

/// Looks at the host and prints what it found.
///
/// # Errors
/// [`FailureKind::Host`] if something that is needed is missing.
pub fn doctor(store: &Path, json: bool) -> Result<(), Failure> {
    let checks = checks::all(store);
    let ok = checks.iter().all(|check| check.found || !check.needed);
    let missing: Vec<&str> =
        checks.iter().filter(|check| check.needed && !check.found).map(|check| check.name).collect();
    let verdict = match missing.as_slice() {
        [] => Ok(()),
        names => Err(Failure::new(
            FailureKind::Host,
            format!("this host lacks what vmemd needs: {}", names.join(", ")),
        )),
    };
    let text = if json {
        serde_json::to_string_pretty(&Account { ok, checks }).map_err(|error| Failure::other(&error))?
    } else {
        table(&checks, std::io::stdout().is_terminal())
    };
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    verdict
}

/// The first of these requirements that the host lacks, with the remedy.
pub fn lacks(store: &Path, names: &[&str]) -> Option<String> {
    let missing = checks::all(store).into_iter().find(|check| !check.found && names.contains(&check.name))?;
    let remedy = missing.remedy.map(|remedy| format!(": {remedy}")).unwrap_or_default();
    Some(format!("{} ({}){remedy}", missing.name, missing.detail))
}

fn table(checks: &[Check], colour: bool) -> String {
    let paint =
        |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let mut text = String::new();
    for check in checks {
        let mark = match (check.found, check.needed) {
            (true, _) => paint("32", "found  "),
            (false, true) => paint("31", "MISSING"),
            (false, false) => paint("33", "missing"),
        };
        text += &format!("{mark}  {:<22} {}\n", check.name, check.detail);
        if let (false, Some(remedy)) = (check.found, &check.remedy) {
            let need = if check.needed { "" } else { " (not needed to run VMs)" };
            text += &format!("         {:<22} → {remedy}{need}\n", "");
        }
    }
    text
}
