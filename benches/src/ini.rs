//! INI text as fio writes it: `[section]`, `key=value` or `key` alone, comments from `;` or `#` to the end of the line.
//!
//! Every word keeps its position in the text, so that a later stage can point at the word that is wrong.

/// The section that holds for all others.
pub(super) const GLOBAL: &str = "global";
/// Lines longer than this are not shown in an error.
const LONGEST_SHOWN: usize = 160;

/// Where some characters of a text are: line and column of the first one, both counted from one, and how many they
/// are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) width: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Word<'a> {
    pub(super) text: &'a str,
    pub(super) position: Position,
}

#[derive(Clone, Debug)]
pub(super) struct Entry<'a> {
    pub(super) key: Word<'a>,
    /// The value; none if the line has no `=`.
    pub(super) value: Option<Word<'a>>,
    /// Key and value have a blank between them where `=` belongs, which is a fault.
    pub(super) blank: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Section<'a> {
    pub(super) name: Word<'a>,
    pub(super) entries: Vec<Entry<'a>>,
}

/// Something that is wrong with a text: what it is, its position, and how it is mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(super) position: Position,
    pub(super) text: String,
    pub(super) mend: Mend,
}

/// The mend that a fault's text describes, in a form that a test can carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mend {
    /// The text says which values are right, and leaves the choice.
    Choose,
    /// The line is to be removed.
    LeaveOut,
    /// These lines are to replace the line.
    Write(String),
    /// This line is to be added after the line.
    Add(String),
    /// The line, or else this one, is to be moved under `[global]`.
    UnderGlobal(Option<String>),
}

impl Fault {
    pub(super) fn new(position: Position, text: impl Into<String>, mend: Mend) -> Fault {
        Fault { position, text: text.into(), mend }
    }

    /// `file:line:column: what`, and below it the line with the place marked.
    pub(crate) fn show(&self, file: &str, text: &str) -> String {
        let Position { line, column, width } = self.position;
        let head = format!("{file}:{line}:{column}: {}", self.text);
        let shown = text.lines().nth(line - 1).map(str::trim_end).unwrap_or_default();
        if shown.is_empty() || shown.chars().count() > LONGEST_SHOWN {
            return head;
        }
        let shown: String = shown.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let gutter = line.to_string();
        let (blank, indent) = (" ".repeat(gutter.len()), " ".repeat(column - 1));
        format!("{head}\n  {gutter} | {shown}\n  {blank} | {indent}{}", "^".repeat(width.max(1)))
    }
}

/// Most faults that are shown: a file that is no job file at all has one in every line.
const SHOWN_MAX: usize = 50;

/// Most faults that are collected: each new one is compared with all before it, so that many would take long.
const FAULTS_MAX: usize = 200;

/// All faults of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults(pub(super) Vec<Fault>);

impl Faults {
    /// Adds a fault. A fault of a line that several jobs inherit is found once for each of them, and counts once.
    pub(super) fn add(&mut self, fault: Fault) {
        if !self.is_full() && !self.0.contains(&fault) {
            self.0.push(fault);
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.0.len() >= FAULTS_MAX
    }

    /// Sorts the faults by their position.
    pub(super) fn sorted(mut self) -> Faults {
        self.0.sort_by_key(|fault| (fault.position.line, fault.position.column));
        self
    }

    pub(crate) fn show(&self, file: &str, text: &str) -> String {
        let shown = self.0.iter().take(SHOWN_MAX).map(|fault| fault.show(file, text));
        let more = self.0.len().saturating_sub(SHOWN_MAX);
        let least = if self.is_full() { "at least " } else { "" };
        let rest = (more > 0).then(|| format!("{file}: and {least}{more} more"));
        shown.chain(rest).collect::<Vec<_>>().join("\n")
    }
}

/// Part of a line without the blanks around it.
fn word(line: usize, whole: &str, start: usize, end: usize) -> Word<'_> {
    let part = &whole[start..end];
    let text = part.trim();
    let lead = part.len() - part.trim_start().len();
    let before = if text.is_empty() { start } else { start + lead };
    let position =
        Position { line, column: whole[..before].chars().count() + 1, width: text.chars().count() };
    Word { text, position }
}

/// The sections of a text, in its order. A line that is wrong is added to `faults`, and read as what was probably
/// meant: so the faults after it are found as well.
pub(super) fn sections<'a>(text: &'a str, faults: &mut Faults) -> Vec<Section<'a>> {
    let mut sections: Vec<Section> = Vec::new();
    let mut homeless: Vec<Entry> = Vec::new();
    for (number, whole) in text.lines().enumerate() {
        let line = number + 1;
        let end = whole.find([';', '#']).unwrap_or(whole.len());
        let said = word(line, whole, 0, end);
        if said.text.is_empty() {
            continue;
        }
        if said.text.starts_with('[') {
            sections.push(Section { name: section_name(line, whole, &said, faults), entries: Vec::new() });
            continue;
        }
        let (key, value) = match whole[..end].find('=') {
            Some(at) => (word(line, whole, 0, at), Some(word(line, whole, at + 1, end))),
            None => (said, None),
        };
        if key.text.is_empty() {
            faults.add(Fault::new(
                said.position,
                "there is no key before `=`: leave the line out",
                Mend::LeaveOut,
            ));
            continue;
        }
        let entry = match (value, key.text.find(char::is_whitespace)) {
            (None, Some(at)) => {
                let start = whole.find(key.text).unwrap_or_default();
                let (first, rest) = (word(line, whole, 0, start + at), word(line, whole, start + at, end));
                Entry { key: first, value: Some(rest), blank: true }
            }
            _ => Entry { key, value, blank: false },
        };
        match sections.last_mut() {
            Some(section) => section.entries.push(entry),
            None => homeless.push(entry),
        }
    }
    let Some(first) = homeless.first().map(|entry| entry.key) else { return sections };
    match sections.iter_mut().find(|section| section.name.text == GLOBAL) {
        Some(global) => {
            for entry in &homeless {
                let text = "this key is in no section: write it under [global]";
                faults.add(Fault::new(entry.key.position, text, Mend::UnderGlobal(None)));
            }
            global.entries.splice(0..0, homeless);
        }
        None => {
            let line = text.lines().nth(first.position.line - 1).unwrap_or_default();
            let told = "this key is in no section: write `[global]` before it, or a job's `[name]`";
            faults.add(Fault::new(first.position, told, Mend::Write(format!("[{GLOBAL}]\n{line}"))));
            sections.insert(
                0,
                Section { name: Word { text: GLOBAL, position: first.position }, entries: homeless },
            );
        }
    }
    sections
}

fn section_name<'a>(line: usize, whole: &'a str, said: &Word<'a>, faults: &mut Faults) -> Word<'a> {
    let open = whole.find('[').unwrap_or_default();
    let end = whole.find([';', '#']).unwrap_or(whole.len());
    let mut wrong = |position, text: &str, mend| faults.add(Fault::new(position, text, mend));
    let close = match whole.find(']') {
        Some(close) if close < end => close,
        close => {
            let name = word(line, whole, open + 1, end);
            let right = if name.text.is_empty() { "job" } else { name.text };
            let text = match close {
                Some(_) => format!("a section's name ends with `]`, before any comment: write `[{right}]`"),
                None => format!("a section's name ends with `]`: write `[{right}]`"),
            };
            wrong(said.position, &text, Mend::Write(format!("[{right}]")));
            return name;
        }
    };
    let name = word(line, whole, open + 1, close);
    let behind = word(line, whole, close + 1, end);
    if !behind.text.is_empty() {
        let lines = format!("[{}]\n{}", name.text, behind.text);
        wrong(
            behind.position,
            "there is something behind the section's name: begin a new line",
            Mend::Write(lines),
        );
    }
    if name.text.is_empty() {
        wrong(
            said.position,
            "a section needs a name: write `[job]`, or another one",
            Mend::Write("[job]".to_owned()),
        );
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_know_their_places() {
        let text = "; a comment\n[global] # more\n\tsize = 4g ; of it\nthread\n[a b]\n";
        let mut faults = Faults::default();
        let sections = sections(text, &mut faults);
        assert_eq!(faults, Faults::default());
        assert_eq!(sections.len(), 2);
        assert_eq!(sections[1].name.text, "a b");
        let [size, thread] = &sections[0].entries[..] else { panic!("{sections:?}") };
        assert_eq!((size.key.text, size.value.unwrap().text), ("size", "4g"));
        assert_eq!(size.value.unwrap().position, Position { line: 3, column: 9, width: 2 });
        assert_eq!((thread.key.text, thread.value.is_none()), ("thread", true));
    }

    #[test]
    fn all_faults_are_told_in_order_and_not_without_end() {
        let text = "[a\n=1\n[b] c\n".repeat(20);
        let mut faults = Faults::default();
        sections(&text, &mut faults);
        let shown = faults.sorted().show("x", &text);
        assert_eq!(shown.lines().filter(|line| line.starts_with("x:")).count(), SHOWN_MAX + 1, "{shown}");
        assert!(shown.starts_with("x:1:1: a section") && shown.ends_with("x: and 10 more"), "{shown}");
    }

    #[test]
    fn faults_are_pointed_at() {
        let show = |text: &str| {
            let mut faults = Faults::default();
            sections(text, &mut faults);
            faults.sorted().show("x.fio", text)
        };
        assert_eq!(
            show("[global\nsize=1"),
            "x.fio:1:1: a section's name ends with `]`: write `[global]`\n  1 | [global\n    | ^^^^^^^"
        );
        assert!(show("[a]\n [b] c").starts_with("x.fio:2:6: there is something behind"));
        assert!(show("[]").starts_with("x.fio:1:1: a section needs a name"));
        assert!(show("[a]\n=4").starts_with("x.fio:2:1: there is no key"));
        assert!(show("size=1").starts_with("x.fio:1:1: this key is in no section"));
        assert!(show("size=1\n[global]").starts_with("x.fio:1:1: this key is in no section: write it under"));
        assert!(show("[a # b]").contains("before any comment"));
    }
}
