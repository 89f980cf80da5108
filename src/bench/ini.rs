//! INI text as fio writes it: `[section]`, `key=value` or `key` alone, comments from `;` or `#` to the end of the line.
//!
//! Every word keeps its place, so that whoever makes sense of it can point at what is wrong.

/// Lines longer than this are not shown in an error.
const LONGEST_SHOWN: usize = 160;

/// Characters of a text: line and column of the first, both counted from one, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) width: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Word<'a> {
    pub(super) text: &'a str,
    pub(super) place: Place,
}

#[derive(Clone, Debug)]
pub(super) struct Entry<'a> {
    pub(super) key: Word<'a>,
    /// None without `=`.
    pub(super) value: Option<Word<'a>>,
}

#[derive(Clone, Debug)]
pub(super) struct Section<'a> {
    pub(super) name: Word<'a>,
    pub(super) entries: Vec<Entry<'a>>,
}

/// What is wrong with a text, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(super) place: Place,
    pub(super) text: String,
}

impl Fault {
    pub(super) fn new(place: Place, text: impl Into<String>) -> Fault {
        Fault { place, text: text.into() }
    }

    /// `file:line:column: what`, and below it the line with the place marked.
    pub(crate) fn show(&self, file: &str, text: &str) -> String {
        let Place { line, column, width } = self.place;
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

/// Part of a line without the blanks around it.
fn word(line: usize, whole: &str, start: usize, end: usize) -> Word<'_> {
    let part = &whole[start..end];
    let text = part.trim();
    let lead = part.len() - part.trim_start().len();
    let before = if text.is_empty() { start } else { start + lead };
    let place = Place { line, column: whole[..before].chars().count() + 1, width: text.chars().count() };
    Word { text, place }
}

/// The sections of a text, in its order.
pub(super) fn sections(text: &str) -> Result<Vec<Section<'_>>, Fault> {
    let mut sections: Vec<Section> = Vec::new();
    for (number, whole) in text.lines().enumerate() {
        let line = number + 1;
        let end = whole.find([';', '#']).unwrap_or(whole.len());
        let said = word(line, whole, 0, end);
        if said.text.is_empty() {
            continue;
        }
        if said.text.starts_with('[') {
            sections.push(Section { name: section_name(line, whole, &said)?, entries: Vec::new() });
            continue;
        }
        let (key, value) = match whole[..end].find('=') {
            Some(at) => (word(line, whole, 0, at), Some(word(line, whole, at + 1, end))),
            None => (said, None),
        };
        if key.text.is_empty() {
            return Err(Fault::new(said.place, "there is no key before `=`"));
        }
        if let Some(blank) = key.text.find(char::is_whitespace) {
            let (first, rest) = key.text.split_at(blank);
            let text = format!("a line is `key=value`, or `[section]`: write `{first}={}`?", rest.trim());
            return Err(Fault::new(said.place, text));
        }
        let Some(section) = sections.last_mut() else {
            return Err(Fault::new(
                key.place,
                "this key is in no section: begin with `[global]`, or a job's `[name]`",
            ));
        };
        section.entries.push(Entry { key, value });
    }
    Ok(sections)
}

fn section_name<'a>(line: usize, whole: &'a str, said: &Word<'a>) -> Result<Word<'a>, Fault> {
    let Some(close) = whole.find(']') else {
        return Err(Fault::new(said.place, "a section's name ends with `]`"));
    };
    let open = whole.find('[').unwrap_or_default();
    let end = whole.find([';', '#']).unwrap_or(whole.len());
    if end < close {
        return Err(Fault::new(said.place, "a section's name ends with `]`, before any comment"));
    }
    let behind = word(line, whole, close + 1, end);
    if !behind.text.is_empty() {
        return Err(Fault::new(
            behind.place,
            "there is something behind the section's name: begin a new line",
        ));
    }
    let name = word(line, whole, open + 1, close);
    if name.text.is_empty() {
        return Err(Fault::new(said.place, "a section needs a name"));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_know_their_places() {
        let sections =
            sections("; a comment\n[global] # more\n\tsize = 4g ; of it\nthread\n[a b]\n").unwrap();
        assert_eq!(sections.len(), 2);
        assert_eq!(sections[1].name.text, "a b");
        let [size, thread] = &sections[0].entries[..] else { panic!("{sections:?}") };
        assert_eq!((size.key.text, size.value.unwrap().text), ("size", "4g"));
        assert_eq!(size.value.unwrap().place, Place { line: 3, column: 9, width: 2 });
        assert_eq!((thread.key.text, thread.value.is_none()), ("thread", true));
    }

    #[test]
    fn faults_are_pointed_at() {
        let show = |text: &str| sections(text).unwrap_err().show("x.fio", text);
        assert_eq!(
            show("[global\nsize=1"),
            "x.fio:1:1: a section's name ends with `]`\n  1 | [global\n    | ^^^^^^^"
        );
        assert!(show("[a]\n [b] c").starts_with("x.fio:2:6: there is something behind"));
        assert!(show("[]").starts_with("x.fio:1:1: a section needs a name"));
        assert!(show("[a]\n=4").starts_with("x.fio:2:1: there is no key"));
        assert!(show("size=1").starts_with("x.fio:1:1: this key is in no section"));
        assert!(
            show("[a]\n\nsize 4g")
                .contains("x.fio:3:1: a line is `key=value`, or `[section]`: write `size=4g`?")
        );
        assert!(show("[a # b]").contains("before any comment"));
    }
}
