//! Files, places in other documents, options and limits that the documents name exist, and are as the documents say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The path and the text of each document for people.
fn documents() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let in_docs = fs::read_dir(root.join("docs")).expect("the documents").flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = in_docs.collect();
    paths.extend(["README.md", "CONTRIBUTING.md"].map(|name| root.join(name)));
    paths.sort();
    assert!(paths.len() > 20, "{paths:?}");
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a document is text");
            (path, text)
        })
        .collect()
}

/// Every file of the repository, as its path from the root.
fn files() -> Vec<String> {
    fn walk(directory: &Path, within: &str, found: &mut Vec<String>) {
        for entry in fs::read_dir(directory).expect("a directory").flatten() {
            let name = entry.file_name().into_string().expect("names of files are ASCII");
            let path = if within.is_empty() { name.clone() } else { format!("{within}/{name}") };
            // What is built, and what git keeps for itself.
            let is_ours = !matches!(path.as_str(), "target" | ".git" | "fuzz/target");
            if is_ours && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), &path, found);
                found.push(path + "/");
            } else {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new(env!("CARGO_MANIFEST_DIR")), "", &mut found);
    found
}

/// Lines of a document, and whether each is in a block of code.
fn lines(text: &str) -> impl Iterator<Item = (bool, &str)> {
    let mut in_code = false;
    text.lines().filter_map(move |line| {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            return None;
        }
        Some((in_code, line))
    })
}

/// Everything between backticks in a document's prose.
fn quoted(text: &str) -> Vec<String> {
    let prose: Vec<&str> = lines(text).map(|(in_code, line)| if in_code { "" } else { line }).collect();
    // Within a paragraph: one that has an odd number of backticks must not turn all others inside out.
    let paragraphs = prose.split(|line| line.trim().is_empty()).map(|lines| lines.join(" "));
    let words =
        |paragraph: String| paragraph.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    paragraphs.flat_map(words).collect()
}

/// Whether that is the name of a file of the repository, as a document names one: from its root, or with as much as
/// tells it from others (`core/fault.rs`).
fn names_a_file(quoted: &str) -> bool {
    const ENDINGS: [&str; 7] = [".rs", ".md", ".toml", ".fio", ".service", ".py", ".rules"];
    const ROOTS: [&str; 12] = [
        ".ci",
        "benches",
        "docs",
        "fuzz",
        "guest",
        "migrate",
        "packaging",
        "preload",
        "process",
        "scripts",
        "swapcore",
        "swapd",
    ];
    let is_path = quoted.chars().all(|c| c.is_ascii_alphanumeric() || "_-./@".contains(c));
    let root = quoted.split_once('/').map(|(root, _)| root);
    let is_ours =
        root.is_some_and(|root| ROOTS.contains(&root) || ["src", "tests", "testkit"].contains(&root));
    // One that a user would make (`/etc/vmemd/qemu.toml`), or an ending alone (`.rs`).
    is_path
        && !quoted.starts_with('/')
        && (is_ours || ENDINGS.iter().any(|ending| quoted.len() > ending.len() && quoted.ends_with(ending)))
}

#[test]
fn every_file_that_a_document_names_exists() {
    /// Names of a user's own file in an example, and of files of other programs.
    const NOT_OURS: [&str; 3] = ["mine.fio", "libvirtd.service", "virtqemud.service"];
    let files = files();
    let exists = |named: &str| files.iter().any(|file| file == named || file.ends_with(&format!("/{named}")));
    let (mut checked, mut missing) = (0, Vec::new());
    for (document, text) in documents() {
        for quoted in quoted(&text) {
            if !names_a_file(&quoted) || NOT_OURS.contains(&quoted.as_str()) {
                continue;
            }
            checked += 1;
            if !exists(&quoted) && !exists(&format!("{quoted}/")) {
                missing.push(format!("{}: {quoted}", document.display()));
            }
        }
    }
    assert!(checked > 200, "{checked}");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn each_answer_to_where_do_i_look_is_where_it_is_said_to_be() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/architecture.md")).expect("a document");
    let (_, table) = text.split_once("## Where do I look?\n").expect("the table");
    let rows = table.lines().skip(3).map_while(|line| line.strip_prefix('|'));
    let files = files();
    let (mut checked, mut missing) = (0, Vec::new());
    for row in rows {
        let cells: Vec<&str> = row.split('|').collect();
        let sources = quoted(cells[1]).into_iter().flat_map(|named| {
            let fits = |file: &&String| file.as_str() == named || file.ends_with(&format!("/{named}"));
            files.iter().filter(fits).collect::<Vec<_>>()
        });
        let sources: Vec<String> =
            sources.map(|file| fs::read_to_string(root.join(file)).expect("a source file")).collect();
        let code: Vec<&str> = sources
            .iter()
            .flat_map(|text| text.lines())
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        for name in quoted(cells[2]) {
            // Both of a path: the type, and what it does.
            let words =
                name.split("::").filter(|word| word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
            for word in words {
                checked += 1;
                let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                if !code.iter().any(|line| line.split(|c| !is_word(c)).any(|part| part == word)) {
                    missing.push(format!("{word} of {name}: {}", cells[1]));
                }
            }
        }
    }
    assert!(checked > 50, "{checked}");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// The name by which a link leads to a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || "_- ".contains(*c)).collect::<String>().replace(' ', "-")
}

#[test]
fn every_link_from_a_document_leads_somewhere() {
    let (mut checked, mut missing) = (0, Vec::new());
    for (document, text) in documents() {
        let prose = lines(&text).filter(|(in_code, _)| !in_code).map(|(_, line)| line);
        let links = prose.flat_map(|line| line.split("](").skip(1)).filter_map(|rest| rest.split_once(')'));
        for (link, _) in links.filter(|(link, _)| !link.contains("://")) {
            checked += 1;
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let path = match file {
                "" => document.clone(),
                file => document.parent().expect("a directory").join(file),
            };
            let found = fs::read_to_string(&path).is_ok_and(|text| {
                let mut headings = lines(&text).filter(|(in_code, line)| !in_code && line.starts_with('#'));
                place.is_empty()
                    || headings.any(|(_, line)| anchor(line.trim_start_matches('#').trim()) == place)
            });
            if !found {
                missing.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(checked > 100, "{checked}");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn every_document_can_be_found_from_the_readme() {
    let readme = include_str!("../README.md");
    for (document, _) in documents() {
        let name = document.file_name().and_then(|name| name.to_str()).expect("a name");
        assert!(name == "README.md" || readme.contains(&format!("{name})")), "{name} is not linked to");
    }
}

/// The time limits of the code, by their names: seconds.
fn limits() -> BTreeMap<String, u64> {
    let sources = files().into_iter().filter(|file| file.ends_with(".rs") && file.contains("src/"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeMap::new();
    for file in sources {
        let text = fs::read_to_string(root.join(file)).expect("a source file");
        for line in text.lines() {
            let limit = line
                .split_once("const ")
                .and_then(|(_, rest)| rest.split_once(": Duration = Duration::from_secs("));
            let Some((name, rest)) = limit else { continue };
            if let Some(seconds) = rest.split(')').next().and_then(|number| number.parse().ok()) {
                found.insert(name.to_owned(), seconds);
            }
        }
    }
    found
}

#[test]
fn limits_on_waiting_are_those_of_the_code() {
    let (manual, limits) = (include_str!("../docs/operating.md"), limits());
    let (_, table) = manual.split_once("## What waits, and how long\n").expect("the table");
    let rows = table.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 10, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let told = cells[2].strip_suffix(" s").and_then(|seconds| seconds.parse().ok()).expect("seconds");
        assert_eq!(limits.get(cells[1].trim_matches('`')), Some(&told), "{row}");
        // Others that the row names, with their values in parentheses.
        for pair in cells[3].split("` (").collect::<Vec<_>>().windows(2) {
            let name = pair[0].rsplit('`').next().expect("a name");
            let told = pair[1].split(" s)").next().and_then(|seconds| seconds.parse().ok());
            assert_eq!(limits.get(name).copied(), told, "{name} in {row}");
        }
    }
}

/// Every option in a text: two dashes and a word.
fn options(text: &str) -> BTreeSet<String> {
    let starts = text.match_indices("--").filter(|(at, _)| {
        let before = text[..*at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '-' && c != '_')
    });
    let words = starts.map(|(at, _)| {
        let word: String =
            text[at + 2..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        word.trim_end_matches('-').to_owned()
    });
    words.filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

/// The options of `vmemd` by its own help, of `vmemd-bench` by its source, and of the scripts.
fn known_options() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let help = |command: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmemd")).args(command).arg("--help").output();
        String::from_utf8(output.expect("vmemd runs").stdout).expect("help is text")
    };
    let mut known = options(&help(&[]));
    for command in [
        &["run"][..],
        &["restore"],
        &["checkpoint"],
        &["qemu-args"],
        &["serve"],
        &["migrate"],
        &["checkpoint"],
        &["pki", "init"],
        &["pki", "issue"],
        &["list"],
        &["stat"],
        &["set"],
        &["pause"],
        &["resume"],
        &["resolve"],
        &["stop"],
        &["doctor"],
    ] {
        let help = help(command);
        assert!(help.contains("--help"), "{command:?}: {help}");
        known.extend(options(&help));
    }
    // A field of clap's is an option's name.
    let fields = |text: &str| {
        let words = text.lines().filter_map(|line| line.trim().split_once(": "));
        let names =
            words.map(|(name, _)| name.trim_start_matches("pub(super) ").trim_start_matches("pub(crate) "));
        let names = names.map(|name| name.trim_start_matches("pub ").replace('_', "-"));
        names.filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '-')).collect::<Vec<_>>()
    };
    for file in fs::read_dir(root.join("benches/src/cli")).expect("its command line").flatten() {
        known.extend(fields(&fs::read_to_string(file.path()).expect("a source file")));
    }
    for file in fs::read_dir(root.join("scripts")).expect("the scripts").flatten() {
        known.extend(options(&fs::read_to_string(file.path()).expect("a script")));
    }
    known
}

#[test]
fn every_option_that_a_document_names_exists() {
    /// Options of cargo and its tests, `blockdev`, `fio-plot` and `systemctl`.
    const OTHERS: [&str; 6] = ["nocapture", "exact", "skip", "setrw", "show-cpu", "now"];
    let known = known_options();
    let (mut checked, mut missing) = (0, Vec::new());
    for (document, text) in documents() {
        let commands =
            lines(&text).filter(|(in_code, line)| *in_code && line.contains("vmemd ")).map(|(_, line)| line);
        // QEMU's own words, and what is said beside it, are not vmemd's.
        let commands = commands.map(|line| line.split(" -- ").next().unwrap_or_default());
        let quoted = quoted(&text);
        let quoted = quoted
            .iter()
            .map(String::as_str)
            .filter(|words| words.starts_with("--") || words.starts_with("vmemd "));
        for words in commands.chain(quoted) {
            for option in options(words) {
                checked += 1;
                if !known.contains(&option) && !OTHERS.contains(&option.as_str()) {
                    missing.push(format!("{}: --{option} in {words:?}", document.display()));
                }
            }
        }
    }
    assert!(checked > 100, "{checked}");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}
