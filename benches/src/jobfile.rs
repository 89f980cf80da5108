//! Job files in fio's INI style: text to a [`Scenario`], and back. `docs/jobs.md` has the keys.

#[cfg(test)]
use std::fmt::Write;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use swapd::PAGE_SIZE;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::signals;
use vmprocess::size::Size;

use super::foreign;
use super::ini::{self, Entry, Fault, Faults, GLOBAL, Mend, Position, Section, Word};
use super::job::{Access, BenchEngine, Job, Length, Order, Scenario};

/// Most bytes of a job file. A larger file was not written by a person, and is something else.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// Most bytes of all areas: page numbers have 31 bits in traces.
const MEMORY_MAX_BYTES: u64 = (PAGE_SIZE as u64) << 31;
const THREADS_MAX: u32 = 64;
const BLOCK_MIN_BYTES: u64 = 64;
const BLOCK_MAX_BYTES: u64 = 1 << 20;
const THETA_MAX: f64 = 10.0;
const RUNTIME_MAX_MS: u64 = 24 * 3600 * 1000;
/// Least similarity of a known name to an unknown one for which it is proposed.
const NEAREST_LEAST: f64 = 0.6;

const PAGE: u64 = PAGE_SIZE as u64;

/// Keys of the whole run, which belong under `[global]`.
const GLOBAL_KEYS: [&str; 4] = ["ram", "engine", "store", "encrypt"];
const JOB_KEYS: [&str; 14] = [
    "size",
    "working_set",
    "rw",
    "rwmixread",
    "numjobs",
    "runtime",
    "ramp_time",
    "loops",
    "random_distribution",
    "bs",
    "stride",
    "prefill",
    "randseed",
    "description",
];
/// fio's second names of some keys, and the names used here.
const ALIASES: [(&str, &str); 2] = [("readwrite", "rw"), ("blocksize", "bs")];
/// Reads a job file; `-` is standard input.
///
/// # Errors
/// [`FailureKind::Usage`] with file, line and column of everything that is wrong with it.
pub(super) fn read(path: &Path) -> Result<Scenario, Failure> {
    if is_standard_input(path) {
        return read_from(std::io::stdin().lock(), "standard input", "stdin");
    }
    let file = path.display().to_string();
    let source = File::open(path).map_err(|error| unreadable(&file, &error))?;
    let name = path.file_stem().map_or_else(|| file.clone(), |stem| stem.to_string_lossy().into_owned());
    read_from(source, &file, &name)
}

fn unreadable(file: &str, error: &std::io::Error) -> Failure {
    Failure::new(FailureKind::Usage, format!("cannot read the job file {file}: {error}"))
}

fn read_from(source: impl Read, file: &str, name: &str) -> Result<Scenario, Failure> {
    let mut bytes = Vec::new();
    let mut source = source.take(FILE_MAX_BYTES + 1);
    let mut part = [0; 8192];
    loop {
        match source.read(&mut part) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&part[..count]),
            // A Ctrl-C while standard input is waited for.
            Err(error) if error.kind() == ErrorKind::Interrupted => signals::check()?,
            Err(error) => return Err(unreadable(file, &error)),
        }
    }
    let usage = |text| Failure::new(FailureKind::Usage, text);
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(usage(format!("{file} is larger than {}: not a job file", Size(FILE_MAX_BYTES))));
    }
    let text =
        std::str::from_utf8(&bytes).map_err(|error| usage(not_text(file, &bytes, error.valid_up_to())))?;
    parse(name, text).map_err(|faults| usage(faults.show(file, text)))
}

/// Whether the path means standard input. (A file of that name is `./-`.)
pub(super) fn is_standard_input(path: &Path) -> bool {
    path == Path::new("-")
}

fn not_text(file: &str, bytes: &[u8], at: usize) -> String {
    let before = String::from_utf8_lossy(&bytes[..at]);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{file}:{line}:{column}: this is not UTF-8 text")
}

/// A job file's text, with defaults and what jobs inherit from `[global]`; or everything that is wrong with it.
pub(crate) fn parse(name: &str, text: &str) -> Result<Scenario, Faults> {
    let mut faults = Faults::default();
    let sections = ini::sections(text, &mut faults);
    check_sections(&sections, &mut faults);
    let (global, jobs): (Vec<_>, Vec<_>) = sections.iter().partition(|section| section.name.text == GLOBAL);
    let start = Position { line: 1, column: 1, width: 1 };
    let shared = Keys {
        own: global.first().map_or(&[][..], |global| &global.entries),
        inherited: &[],
        header: global.first().map_or(start, |global| global.name.position),
    };
    // A key of `[global]` in a job is in the wrong place, and is reported where jobs are read.
    if shared.find("ram").is_none()
        && !jobs.iter().any(|job| job.entries.iter().any(|entry| entry.key.text == "ram"))
    {
        let text = "the RAM budget is missing: write `ram=2g` under [global]";
        faults.add(Fault::new(shared.header, text, Mend::UnderGlobal(Some("ram=2g".to_owned()))));
    }
    if jobs.is_empty() {
        let position = sections
            .last()
            .map_or(start, |section| section.entries.last().map_or(section.name, |entry| entry.key).position);
        let text = "there is no job: write a section `[name]` with `size=` and `rw=` behind this";
        faults.add(Fault::new(position, text, Mend::Add("[job]\nsize=64m\nrw=randrw".to_owned())));
    }
    let mut scenario = Scenario {
        name: name.to_owned(),
        description: shared.get("description", |text| Ok(text.to_owned())).unwrap_or_default(),
        ram_bytes: shared.get("ram", size).unwrap_or_default(),
        engines: shared.get("engine", engines).unwrap_or_else(default_engines),
        store: shared.get("store", |text| Ok(PathBuf::from(text))),
        encrypt: shared.switch("encrypt").unwrap_or(false),
        jobs: Vec::with_capacity(jobs.len()),
    };
    let mut memory = 0u64;
    for (number, section) in jobs.iter().enumerate() {
        let keys = Keys { own: &section.entries, inherited: shared.own, header: section.name.position };
        for (key, example) in [("size", "size=4g"), ("rw", "rw=randrw")] {
            if keys.find(key).is_none() {
                let name = section.name.text;
                let text = format!("job [{name}] has no `{key}`: write `{example}`, here or under [global]");
                faults.add(Fault::new(keys.header, text, Mend::Add(example.to_owned())));
            }
        }
        let job = keys.job(section.name.text, number as u64 + 1);
        let sequential = keys.get("rw", rw).is_some_and(|(_, random)| !random);
        if sequential && keys.find("random_distribution").is_some() && keys.is_good("random_distribution") {
            let text =
                "`random_distribution` is for randread, randwrite and randrw: this job's order is sequential";
            faults.add(Fault::new(keys.position_of("random_distribution"), text, Mend::Choose));
        }
        for misfit in misfits(&job) {
            // A wrong or missing value has been reported. Checks that depend on it are left out.
            if misfit.of.iter().all(|key| keys.is_good(key)) {
                faults.add(Fault::new(keys.position_of(misfit.of[0]), misfit.text, Mend::Choose));
            }
        }
        let before = memory;
        memory = memory.saturating_add(job.size_bytes);
        if memory > MEMORY_MAX_BYTES && before <= MEMORY_MAX_BYTES {
            let text = format!("all areas together are more than {}", Size(MEMORY_MAX_BYTES));
            faults.add(Fault::new(keys.position_of("size"), text, Mend::Choose));
        }
        scenario.jobs.push(job);
    }
    if faults.0.is_empty() { Ok(scenario) } else { Err(faults.sorted()) }
}

fn default_engines() -> Vec<BenchEngine> {
    vec![BenchEngine::Vmemd, BenchEngine::Swap, BenchEngine::Raw]
}

/// Reports faults that each section and key has by itself.
fn check_sections(sections: &[Section], faults: &mut Faults) {
    let jobs = sections.iter().filter(|section| section.name.text != GLOBAL).count();
    for (number, section) in sections.iter().enumerate() {
        if faults.is_full() {
            return;
        }
        let Word { text: name, position } = section.name;
        if let Some(first) = sections[..number].iter().find(|other| other.name.text == name) {
            let line = first.name.position.line;
            let (text, mend) = match name {
                GLOBAL => {
                    (format!("[global] is there already, in line {line}: write its keys there"), Mend::Choose)
                }
                _ => {
                    let other = (2..).map(|nth| format!("{name}-{nth}"));
                    let free = |other: &String| sections.iter().all(|section| section.name.text != other);
                    let other = other.into_iter().find(free).unwrap_or_default();
                    let text = format!(
                        "[{name}] is there already, in line {line}: write another name, as in `[{other}]`"
                    );
                    (text, Mend::Write(format!("[{other}]")))
                }
            };
            faults.add(Fault::new(position, text, mend));
        } else if name == GLOBAL && number > 0 {
            let text = "[global] comes first, for it holds for all jobs: write it before the first of them";
            faults.add(Fault::new(position, text, Mend::Choose));
        }
        // `stonewall` makes a job wait for the jobs before it; the first one has none.
        let first_job = sections[..number].iter().all(|section| section.name.text == GLOBAL);
        let alone = if name == GLOBAL { jobs < 2 } else { first_job };
        for (at, entry) in section.entries.iter().enumerate() {
            if faults.is_full() {
                return;
            }
            let (said, wrong) = match said(entry, section, sections, alone) {
                Ok(()) => (entry.blank.then(|| blank(entry)), false),
                Err(fault) => (Some(fault), true),
            };
            said.into_iter().for_each(|fault| faults.add(fault));
            let key = canonical(entry.key.text);
            let known = JOB_KEYS.contains(&key) || GLOBAL_KEYS.contains(&key);
            let first = section.entries[..at].iter().find(|other| canonical(other.key.text) == key);
            if let Some(first) = first.filter(|_| known && !wrong) {
                let text = format!(
                    "`{key}` is there already, in line {}: leave one of them out",
                    first.key.position.line
                );
                faults.add(Fault::new(entry.key.position, text, Mend::LeaveOut));
            }
        }
    }
}

/// The fault of a line that has a blank where `=` belongs, and whose key and value are right.
fn blank(entry: &Entry) -> Fault {
    let line = line_of(entry.key.text, entry.value.map(|value| value.text));
    Fault::new(
        entry.key.position,
        format!("a line is `key=value`, or `[section]`: write `{line}`"),
        Mend::Write(line),
    )
}

fn line_of(key: &str, value: Option<&str>) -> String {
    value.map_or_else(|| key.to_owned(), |value| format!("{key}={value}"))
}

fn canonical(key: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key, |(_, known)| known)
}

/// The fault of a key and its value. `alone`: the jobs that the key is for have no other job of the file before them.
fn said(entry: &Entry, section: &Section, sections: &[Section], alone: bool) -> Result<(), Fault> {
    let (key, position) = (entry.key.text, entry.key.position);
    let value = entry.value.map(|value| value.text);
    let known = canonical(key);
    let here = |key: &str| section.entries.iter().any(|entry| canonical(entry.key.text) == key);
    let global = sections.iter().find(|section| section.name.text == GLOBAL);
    let in_global = |key: &str| {
        global.is_some_and(|global| global.entries.iter().any(|entry| canonical(entry.key.text) == key))
    };
    if GLOBAL_KEYS.contains(&known) && section.name.text != GLOBAL {
        let (what, mend) = match in_global(known) {
            true => ("leave it out, [global] has it already", Mend::LeaveOut),
            false => ("write it under [global]", Mend::UnderGlobal(Some(line_of(key, value)))),
        };
        return Err(Fault::new(position, format!("`{key}` is the same for all jobs: {what}"), mend));
    }
    if let Some(example) = example(known) {
        let example = line_of(key, Some(example));
        return match value {
            None | Some("") if !(value.is_none() && is_switch(known)) => Err(Fault::new(
                position,
                format!("`{key}` needs a value, as in `{example}`"),
                Mend::Write(example),
            )),
            Some(text) => check_value(known, text).map_err(|wrong| {
                Fault::new(entry.value.unwrap_or(entry.key).position, wrong, Mend::Write(example))
            }),
            None => Ok(()),
        };
    }
    if key == "name" {
        if value == Some(section.name.text) {
            return Ok(());
        }
        let text = "a job's name is that of its section, `[name]`: leave it out";
        return Err(Fault::new(position, text, Mend::LeaveOut));
    }
    if key == "include" {
        let text = format!(
            "there is no `include` here: write the lines of {} instead",
            value.unwrap_or("that file")
        );
        return Err(Fault::new(position, text, Mend::LeaveOut));
    }
    let there = |key: &str| here(key) || in_global(key);
    if let Some(instead) =
        foreign::instead(key, value).filter(|(key, value)| !there(key) && check_value(key, value).is_ok())
    {
        let line = line_of(instead.0, Some(&instead.1));
        return Err(Fault::new(
            position,
            format!("there is no `{key}` here: write `{line}`"),
            Mend::Write(line),
        ));
    }
    if let Some(verdict) = foreign::verdict(key, value, alone) {
        return verdict.map_err(|text| Fault::new(position, text, Mend::LeaveOut));
    }
    Err(unknown(entry, |key| here(key) || (GLOBAL_KEYS.contains(&key) && section.name.text != GLOBAL)))
}

/// The fault of an unknown key. A similar known key is proposed only if it is not `taken` and takes the value.
fn unknown(entry: &Entry, taken: impl Fn(&str) -> bool) -> Fault {
    let (key, position) = (entry.key.text, entry.key.position);
    let value = entry.value.map(|value| value.text);
    let fits = |known: &str| match value {
        Some(text) => check_value(canonical(known), text).is_ok() && !text.is_empty(),
        None => is_switch(known),
    };
    let known = GLOBAL_KEYS.iter().chain(&JOB_KEYS).chain(ALIASES.iter().map(|(alias, _)| alias));
    let nearest = known
        .map(|known| (strsim::jaro_winkler(&key.to_ascii_lowercase(), known), *known))
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .filter(|(likeness, known)| *likeness >= NEAREST_LEAST && !taken(canonical(known)) && fits(known));
    match nearest {
        Some((_, known)) => {
            let text = format!("unknown key `{key}`: did you mean `{known}`?");
            Fault::new(position, text, Mend::Write(line_of(known, value)))
        }
        None => {
            let known = [&GLOBAL_KEYS[..], &JOB_KEYS].concat().join(", ");
            Fault::new(
                position,
                format!("unknown key `{key}`: leave it out; known are {known}"),
                Mend::LeaveOut,
            )
        }
    }
}

/// A key of this format with an example of a value that it takes. None: it is no key of this format.
fn example(key: &str) -> Option<&'static str> {
    Some(match key {
        "ram" => "2g",
        "engine" => "vmemd,swap",
        "store" => "/var/tmp",
        "size" | "working_set" => "64m",
        "rw" => "randrw",
        "rwmixread" => "50",
        "runtime" | "ramp_time" => "10s",
        "random_distribution" => "zipf:1.1",
        "bs" => "4k",
        "description" => "what it shows",
        "encrypt" | "numjobs" | "loops" | "stride" | "prefill" | "randseed" => "1",
        _ => return None,
    })
}

/// Whether the key means yes without a value, as in fio.
fn is_switch(key: &str) -> bool {
    matches!(key, "encrypt" | "prefill")
}

/// Whether a key of this format takes the value, whatever the other keys are.
fn check_value(key: &str, text: &str) -> Result<(), String> {
    if text.contains("${") && key != "description" {
        return Err("variables of the environment are not replaced here: write the value itself".to_owned());
    }
    let holds = |good: bool, text: &str| if good { Ok(()) } else { Err(text.to_owned()) };
    match key {
        "ram" => {
            let least = swapd::Engine::MIN_BUDGET_BYTES;
            holds(size(text)? >= least, &format!("the least RAM budget is {}", Size(least)))
        }
        "size" | "working_set" => check_area(key, size(text)?),
        "bs" => check_block(size(text)?),
        "engine" => engines(text).map(drop),
        "encrypt" | "prefill" => boolean(text).map(drop),
        "rw" => rw(text).map(drop),
        "rwmixread" => number_in(text, 0, 100).map(drop),
        "stride" | "loops" => number_in(text, 1, u64::from(u32::MAX)).map(drop),
        "numjobs" => number_in(text, 1, u64::from(THREADS_MAX)).map(drop),
        "runtime" => holds(millis(text)? > 0, "`runtime` is longer than nothing"),
        "ramp_time" => millis(text).map(drop),
        "random_distribution" => distribution(text).map(drop),
        "randseed" => number_in(text, 0, u64::MAX).map(drop),
        _ => Ok(()),
    }
}

fn check_area(key: &str, bytes: u64) -> Result<(), String> {
    match bytes > 0 && bytes.is_multiple_of(PAGE) {
        true => Ok(()),
        false => Err(format!("`{key}` is a multiple of a page of 4k")),
    }
}

fn check_block(bytes: u64) -> Result<(), String> {
    match bytes.is_power_of_two() && (BLOCK_MIN_BYTES..=BLOCK_MAX_BYTES).contains(&bytes) {
        true => Ok(()),
        false => Err("`bs` is a power of two from 64 to 1m".to_owned()),
    }
}

/// The keys of a section, above those that it inherits.
struct Keys<'a> {
    own: &'a [Entry<'a>],
    inherited: &'a [Entry<'a>],
    header: Position,
}

impl Keys<'_> {
    fn find(&self, key: &str) -> Option<&Entry<'_>> {
        self.own.iter().chain(self.inherited).find(|entry| canonical(entry.key.text) == key)
    }

    /// The value of this key, or the section's name if it is not written anywhere.
    fn position_of(&self, key: &str) -> Position {
        self.find(key).map_or(self.header, |entry| entry.value.unwrap_or(entry.key).position)
    }

    /// Whether nothing is wrong with the key: it has a right value, or is missing and has a default.
    fn is_good(&self, key: &str) -> bool {
        match self.find(key) {
            Some(entry) => entry.value.map_or(is_switch(key), |value| check_value(key, value.text).is_ok()),
            None => !matches!(key, "size" | "rw"),
        }
    }

    /// The key's value. None if it is missing, or wrong, which has been reported.
    fn get<T>(&self, key: &str, read: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.find(key)?
            .value
            .filter(|value| check_value(key, value.text).is_ok())
            .and_then(|value| read(value.text).ok())
    }

    /// The value of a key that means yes without a value, as in fio.
    fn switch(&self, key: &str) -> Option<bool> {
        match self.find(key) {
            Some(Entry { value: None, .. }) => Some(true),
            _ => self.get(key, boolean),
        }
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.get(key, |text| number_in(text, 0, u64::MAX))
    }

    /// The job, with defaults for what is missing or wrong.
    fn job(&self, name: &str, number: u64) -> Job {
        let (access, random) = self.get("rw", rw).unwrap_or((Access::Mixed, true));
        let size_bytes = self.get("size", size).unwrap_or(PAGE);
        let order = match random {
            true => self.get("random_distribution", distribution).unwrap_or(Order::Uniform),
            false => Order::Sequential,
        };
        Job {
            name: name.to_owned(),
            size_bytes,
            working_set_bytes: self.get("working_set", size).unwrap_or(size_bytes),
            access,
            read_percent: self.number("rwmixread").unwrap_or(50) as u8,
            order,
            stride_pages: self.number("stride").unwrap_or(1) as u32,
            block_bytes: self.get("bs", size).unwrap_or(PAGE),
            threads: self.number("numjobs").unwrap_or(1) as u32,
            length: match self.get("runtime", millis) {
                Some(millis) => Length::Millis(millis),
                None => Length::Loops(self.number("loops").unwrap_or(1)),
            },
            ramp_ms: self.get("ramp_time", millis).unwrap_or(0),
            prefill: self.switch("prefill").unwrap_or(true),
            seed: self.number("randseed").unwrap_or(number),
        }
    }
}

/// A fault of keys that do not fit together. It is reported at the first of them.
struct Misfit {
    of: &'static [&'static str],
    text: String,
}

/// Refuses a job whose keys do not fit together, with the key to change and the reason.
pub(super) fn check(job: &Job) -> Result<(), (&'static str, String)> {
    for (key, bytes) in [("size", job.size_bytes), ("working_set", job.working_set_bytes)] {
        check_area(key, bytes).map_err(|text| (key, text))?;
    }
    check_block(job.block_bytes).map_err(|text| ("bs", text))?;
    match misfits(job).into_iter().next() {
        Some(misfit) => Err((misfit.of[0], misfit.text)),
        None => Ok(()),
    }
}

fn misfits(job: &Job) -> Vec<Misfit> {
    let mut misfits = Vec::new();
    let mut fail = |of, text: String| misfits.push(Misfit { of, text });
    let (size, working_set) = (job.size_bytes, job.working_set_bytes);
    if working_set > size {
        fail(
            &["working_set", "size"],
            format!("`working_set` is more than the area: `size` is {}", Size(size)),
        );
        return misfits;
    }
    let sequential = job.order == Order::Sequential;
    let share =
        if sequential { working_set / PAGE / u64::from(job.threads.max(1)) * PAGE } else { working_set };
    if share < job.block_bytes.max(PAGE) {
        let text = "the working set is too small: each thread of a sequential job has its own part, of at least one \
             `bs`";
        fail(&["numjobs", "size", "working_set", "bs", "rw"], text.to_owned());
    }
    if job.stride_pages > 1 {
        if !sequential {
            fail(
                &["stride", "rw"],
                "`stride` is for read, write and rw: this job's order is random".to_owned(),
            );
        } else if job.block_bytes > PAGE {
            fail(&["stride", "bs"], "with `stride`, `bs` is at most a page of 4k".to_owned());
        } else if u64::from(job.stride_pages) > share / PAGE {
            let text = format!("`stride` is more than the {} pages that a thread has", share / PAGE);
            fail(&["stride", "size", "working_set", "numjobs", "rw"], text);
        }
    }
    misfits
}

fn size(text: &str) -> Result<u64, String> {
    Size::from_str(text).map(Size::bytes).map_err(|error| error.to_string())
}

fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err("write 1 or 0".to_owned()),
    }
}

fn number_in(text: &str, least: u64, most: u64) -> Result<u64, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|number| digits && (least..=most).contains(number));
    number.ok_or_else(|| format!("write a whole number from {least} to {most}"))
}

/// A time in seconds, or with a unit.
fn millis(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let scale = match unit.trim_start() {
        "us" | "usec" => 0.001,
        "ms" | "msec" => 1.0,
        "" | "s" => 1000.0,
        "m" => 60_000.0,
        "h" => 3_600_000.0,
        "d" => 86_400_000.0,
        _ => return Err("a time is a number of seconds, or has a unit: 500ms, 10s, 2m".to_owned()),
    };
    let number: f64 = number.parse().map_err(|_| "write a time such as 500ms, 10s or 2m".to_owned())?;
    let millis = (number * scale).round();
    match millis <= RUNTIME_MAX_MS as f64 {
        true => Ok(millis as u64),
        false => Err("the longest time is 24h".to_owned()),
    }
}

fn rw(text: &str) -> Result<(Access, bool), String> {
    Ok(match text {
        "read" => (Access::Read, false),
        "write" => (Access::Write, false),
        "rw" | "readwrite" => (Access::Mixed, false),
        "randread" => (Access::Read, true),
        "randwrite" => (Access::Write, true),
        "randrw" => (Access::Mixed, true),
        _ => return Err("`rw` is read, write, rw, randread, randwrite or randrw".to_owned()),
    })
}

fn distribution(text: &str) -> Result<Order, String> {
    if text == "random" {
        return Ok(Order::Uniform);
    }
    let Some(theta) = text.strip_prefix("zipf:") else {
        return Err("`random_distribution` is random, or zipf:THETA as in zipf:1.1".to_owned());
    };
    match theta.parse() {
        Ok(theta) if theta > 0.0 && theta <= THETA_MAX => Ok(Order::Zipf(theta)),
        _ => Err(format!("zipf's THETA is above 0 and at most {THETA_MAX}")),
    }
}

fn engines(text: &str) -> Result<Vec<BenchEngine>, String> {
    let mut engines = Vec::new();
    for name in text.split(',').map(str::trim) {
        let engine = <BenchEngine as clap::ValueEnum>::from_str(name, false).map_err(|_| {
            format!("`{name}` is no engine: write some of vmemd, swap, raw and mem, with commas")
        })?;
        if engines.contains(&engine) {
            return Err(format!("`{name}` is there twice"));
        }
        engines.push(engine);
    }
    Ok(engines)
}

/// A job's keys and values, as a job file has them.
pub(super) fn options(job: &Job) -> Vec<(&'static str, String)> {
    let random = job.order != Order::Sequential;
    let rw = match (job.access, random) {
        (Access::Read, false) => "read",
        (Access::Write, false) => "write",
        (Access::Mixed, false) => "rw",
        (Access::Read, true) => "randread",
        (Access::Write, true) => "randwrite",
        (Access::Mixed, true) => "randrw",
    };
    let size = |bytes| Size(bytes).to_string().to_ascii_lowercase();
    let mut options = vec![
        ("size", size(job.size_bytes)),
        ("working_set", size(job.working_set_bytes)),
        ("rw", rw.to_owned()),
        ("rwmixread", job.read_percent.to_string()),
        ("bs", size(job.block_bytes)),
        ("stride", job.stride_pages.to_string()),
        ("numjobs", job.threads.to_string()),
        ("ramp_time", format!("{}ms", job.ramp_ms)),
        ("prefill", u8::from(job.prefill).to_string()),
        ("randseed", job.seed.to_string()),
    ];
    match job.order {
        Order::Sequential => {}
        Order::Uniform => options.push(("random_distribution", "random".to_owned())),
        Order::Zipf(theta) => options.push(("random_distribution", format!("zipf:{theta}"))),
    }
    options.push(match job.length {
        Length::Millis(millis) => ("runtime", format!("{millis}ms")),
        Length::Loops(loops) => ("loops", loops.to_string()),
    });
    options
}

/// A job file that says the same, with nothing left to defaults.
#[cfg(test)]
fn text(scenario: &Scenario) -> String {
    let engines: Vec<_> = scenario.engines.iter().map(|engine| engine.name()).collect();
    let ram = Size(scenario.ram_bytes).to_string().to_ascii_lowercase();
    let mut text = format!("[global]\nram={ram}\nengine={}\n", engines.join(","));
    if !scenario.description.is_empty() {
        let _ = writeln!(text, "description={}", scenario.description);
    }
    if let Some(store) = &scenario.store {
        let _ = writeln!(text, "store={}", store.display());
    }
    let _ = writeln!(text, "encrypt={}", u8::from(scenario.encrypt));
    for job in &scenario.jobs {
        let _ = writeln!(text, "[{}]", job.name);
        for (key, value) in options(job) {
            let _ = writeln!(text, "{key}={value}");
        }
    }
    text
}

#[cfg(test)]
#[path = "jobfile_tests.rs"]
mod tests;
