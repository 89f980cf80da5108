//! What happened in a run, to be told if it fails: the last events and actions that concern the page at fault.

use std::cell::Cell;
use std::fmt::Write;

use crate::units::{PageNo, Run, SlotRun};

/// Lines shown of the page's life.
const SHOWN: usize = 40;

/// One event or action.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    at: u64,
    what: &'static str,
    run: Run,
    slots: Option<SlotRun>,
    /// Content, or whatever the entry is about.
    value: Option<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Trace {
    entries: Vec<Entry>,
    pub(super) now: u64,
    /// The page of the check that failed.
    pub(super) suspect: Cell<Option<PageNo>>,
}

impl Trace {
    pub(super) fn add(&mut self, what: &'static str, run: Run, slots: Option<SlotRun>, value: Option<u64>) {
        self.entries.push(Entry { at: self.now, what, run, slots, value });
    }

    pub(super) fn page(&mut self, what: &'static str, page: PageNo, value: Option<u64>) {
        self.add(what, Run::one(page), None, value);
    }

    /// For all pages.
    pub(super) fn note(&mut self, what: &'static str, value: u64) {
        self.add(what, Run::new(PageNo(0), 0), None, Some(value));
    }

    /// The same entries give the same number: for the test that a seed replays exactly.
    pub(super) fn digest(&self) -> u64 {
        use std::hash::{Hash, Hasher};
        let mut hasher = std::hash::DefaultHasher::new();
        for entry in &self.entries {
            let slots = entry.slots.map(|slots| (slots.start.0, slots.len));
            (entry.at, entry.what, entry.run, slots, entry.value).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// The end of the trace, of the page at fault if it is known: by the check, or by the words of the panic.
    pub(super) fn tell(&self, message: &str) -> String {
        let suspect = self.suspect.get().or_else(|| named_in(message));
        let concerns =
            |entry: &&Entry| entry.run.len == 0 || suspect.is_none_or(|page| entry.run.contains(page));
        let mut lines: Vec<_> = self.entries.iter().rev().filter(concerns).take(SHOWN).collect();
        lines.reverse();
        let mut text = match suspect {
            Some(page) => format!("the last of what concerns {page}:\n"),
            None => String::from("the last of what happened:\n"),
        };
        for Entry { at, what, run, slots, value } in lines {
            let pages = match run.len {
                0 => String::new(),
                1 => format!(" page {}", run.start.0),
                len => format!(" pages {}..{} ({len})", run.start.0, run.end().0),
            };
            let slots =
                slots.map_or(String::new(), |slots| format!(" slots {}+{}", slots.start.0, slots.len));
            let value = value.map_or(String::new(), |value| format!(" = {value:#x}"));
            writeln!(text, "  at {at:>5}: {what}{pages}{slots}{value}").expect("a string takes all");
        }
        text
    }
}

/// The page that a panic of the core is about.
fn named_in(message: &str) -> Option<PageNo> {
    let (_, rest) = message.split_once("page ")?;
    let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next()?;
    digits.parse().ok().map(PageNo)
}
