//! What the seeds have reached.

use std::collections::BTreeMap;
use std::error::Error;

use super::faults::{Class, Step, is_impossible};

#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    faults: BTreeMap<(Step, Class), u64>,
    source: BTreeMap<String, u64>,
    target: BTreeMap<String, u64>,
    pub(crate) peak_bytes: u64,
}

/// An error without its particulars: which it is, and when.
pub(crate) fn summary(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    // Numbers and names differ from seed to seed.
    text = text
        .split(' ')
        .filter(|word| !word.chars().any(|c| c.is_ascii_digit() || c == '/'))
        .collect::<Vec<_>>()
        .join(" ");
    text.truncate(text.char_indices().nth(110).map_or(text.len(), |(at, _)| at));
    text
}

impl Coverage {
    pub(crate) fn fault(&mut self, step: Step, class: Class) {
        *self.faults.entry((step, class)).or_default() += 1;
    }

    pub(crate) fn source(&mut self, how: String) {
        *self.source.entry(how).or_default() += 1;
    }

    pub(crate) fn target(&mut self, how: String) {
        *self.target.entry(how).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Coverage) {
        other.faults.iter().for_each(|(cell, count)| *self.faults.entry(*cell).or_default() += count);
        other.source.iter().for_each(|(how, count)| *self.source.entry(how.clone()).or_default() += count);
        other.target.iter().for_each(|(how, count)| *self.target.entry(how.clone()).or_default() += count);
    }

    /// Cells of the table that nothing reached.
    pub(crate) fn zeros(&self) -> Vec<(Step, Class)> {
        let cells = Step::ALL.into_iter().flat_map(|step| Class::ALL.map(|class| (step, class)));
        cells
            .filter(|(step, class)| {
                !is_impossible(*step, *class) && !self.faults.contains_key(&(*step, *class))
            })
            .collect()
    }

    /// Endings that are part of the protocol, and of which none was seen.
    pub(crate) fn missing_ends(&self, source: &[&str], target: &[&str]) -> Vec<String> {
        let missing = |wanted: &[&str], seen: &BTreeMap<String, u64>| {
            let lacks = |text: &&&str| !seen.keys().any(|how| how.contains(**text));
            wanted.iter().filter(lacks).map(ToString::to_string).collect::<Vec<_>>()
        };
        [missing(source, &self.source), missing(target, &self.target)].concat()
    }

    pub(crate) fn print(&self) {
        print!("{:<12}", "");
        Class::ALL.iter().for_each(|class| print!("{:>12}", format!("{class:?}")));
        println!();
        for step in Step::ALL {
            print!("{:<12}", format!("{step:?}"));
            for class in Class::ALL {
                let count = self.faults.get(&(step, class)).copied().unwrap_or(0);
                let cell = if is_impossible(step, class) { "-".to_string() } else { count.to_string() };
                print!("{cell:>12}");
            }
            println!();
        }
        for (side, ends) in [("source", &self.source), ("target", &self.target)] {
            println!("how the {side}'s sessions ended:");
            ends.iter().for_each(|(how, count)| println!("  {count:>7}  {how}"));
        }
        println!("most memory at once: {} KiB", self.peak_bytes >> 10);
    }
}
