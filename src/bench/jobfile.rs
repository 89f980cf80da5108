//! Job files in fio's INI style: text to a [`Scenario`], and back. `docs/jobs.md` has the keys.

#[cfg(test)]
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use swapd::PAGE_SIZE;
use vmprocess::failure::{Failure, Kind};
use vmprocess::size::Size;

use super::ini::{self, Entry, Fault, Place, Section, Word};
use super::job::{Access, BenchEngine, Job, Length, Order, Scenario};

/// A job file is text of a person; whatever is larger is not one.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// Page numbers have 31 bits in traces.
const MEMORY_MAX_BYTES: u64 = (PAGE_SIZE as u64) << 31;
const THREADS_MAX: u32 = 64;
const BLOCK_MIN_BYTES: u64 = 64;
const BLOCK_MAX_BYTES: u64 = 1 << 20;
const THETA_MAX: f64 = 10.0;
const RUNTIME_MAX_MS: u64 = 24 * 3600 * 1000;
/// A name further away than this from what was written is no help.
const NEAREST_LEAST: f64 = 0.6;

const PAGE: u64 = PAGE_SIZE as u64;

const GLOBAL: &str = "global";
/// These say something about the whole run.
const GLOBAL_KEYS: [&str; 4] = ["ram", "engine", "store", "encrypt"];
const JOB_KEYS: [&str; 15] = [
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
    "name",
];
/// fio's other names of the same.
const ALIASES: [(&str, &str); 2] = [("readwrite", "rw"), ("blocksize", "bs")];
/// fio's keys that say what holds here anyway; their value must be true.
const HARMLESS: [&str; 4] = ["time_based", "group_reporting", "thread", "norandommap"];
/// fio's keys that make no sense here, and what to write instead.
const INSTEAD: [(&str, &str); 22] = [
    ("ioengine", "what holds the memory is chosen by `engine=` (vmemd, swap, raw, mem) under [global]"),
    ("iodepth", "a touch waits for its page: write `numjobs=` for more of them at a time"),
    ("direct", "leave it out: jobs touch memory, and `raw` always reads past the page cache"),
    ("buffered", "leave it out: jobs touch memory"),
    ("filename", "jobs touch memory: `store=` under [global] is the directory on the disk"),
    ("directory", "write `store=` under [global]"),
    ("filesize", "write `size=`"),
    ("io_size", "write `loops=` or `runtime=`"),
    ("number_ios", "write `loops=` or `runtime=`"),
    ("invalidate", "write `prefill=0` to begin with untouched memory"),
    ("rwmixwrite", "write `rwmixread=`, which is the rest to 100"),
    ("zipf", "write `random_distribution=zipf:THETA`"),
    ("blocksize_range", "blocks have one size: write `bs=`"),
    ("bsrange", "blocks have one size: write `bs=`"),
    ("bssplit", "blocks have one size: write `bs=`"),
    ("stonewall", "all jobs of a file run at the same time: write another file"),
    ("wait_for", "all jobs of a file run at the same time: write another file"),
    ("startdelay", "all jobs of a file run at the same time: write another file"),
    ("offset", "each job has an area of its own, `size=` bytes, one after the other"),
    ("fsync", "leave it out: memory is not synced"),
    ("verify", "leave it out: every touch is verified"),
    ("lockmem", "write `ram=` under [global]"),
];

/// Reads a job file.
///
/// # Errors
/// [`Kind::Usage`] with file, line and column of what is wrong with it.
pub(super) fn read(path: &Path) -> Result<Scenario, Failure> {
    let fail =
        |error| Failure::new(Kind::Usage, format!("cannot read the job file {}: {error}", path.display()));
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(fail)?;
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(fail)?;
    let file = path.display().to_string();
    let usage = |text| Failure::new(Kind::Usage, text);
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(usage(format!("{file} is larger than {}: not a job file", Size(FILE_MAX_BYTES))));
    }
    let text =
        std::str::from_utf8(&bytes).map_err(|error| usage(not_text(&file, &bytes, error.valid_up_to())))?;
    let name = path.file_stem().map_or_else(|| file.clone(), |stem| stem.to_string_lossy().into_owned());
    parse(&name, text).map_err(|fault| usage(fault.show(&file, text)))
}

fn not_text(file: &str, bytes: &[u8], at: usize) -> String {
    let before = String::from_utf8_lossy(&bytes[..at]);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{file}:{line}:{column}: this is not UTF-8 text")
}

/// A job file's text, with defaults and what jobs inherit from `[global]`.
pub(crate) fn parse(name: &str, text: &str) -> Result<Scenario, Fault> {
    let sections = ini::sections(text)?;
    check_sections(&sections)?;
    let (global, jobs): (Vec<_>, Vec<_>) = sections.iter().partition(|section| section.name.text == GLOBAL);
    let start = Place { line: 1, column: 1, width: 1 };
    let shared = Keys {
        own: global.first().map_or(&[][..], |global| &global.entries),
        inherited: &[],
        header: global.first().map_or(start, |global| global.name.place),
    };
    let ram = shared.get("ram", size)?;
    let ram = ram.ok_or_else(|| {
        Fault::new(shared.header, "the RAM budget is missing: write `ram=2g` under [global]")
    })?;
    if ram < swapd::Engine::MIN_BUDGET_BYTES {
        let least = Size(swapd::Engine::MIN_BUDGET_BYTES);
        return Err(shared.fault("ram", format!("the least RAM budget is {least}")));
    }
    let [_, ..] = &jobs[..] else {
        return Err(Fault::new(
            shared.header,
            "there is no job: write a section `[name]` with `size=` and `rw=`",
        ));
    };
    let mut scenario = Scenario {
        name: name.to_owned(),
        description: String::new(),
        ram_bytes: ram,
        engines: shared.get("engine", engines)?.unwrap_or_else(default_engines),
        store: shared.get("store", |text| Ok(PathBuf::from(text)))?,
        encrypt: shared.switch("encrypt")?.unwrap_or(false),
        jobs: Vec::with_capacity(jobs.len()),
    };
    scenario.description = shared.get("description", |text| Ok(text.to_owned()))?.unwrap_or_default();
    let mut memory = 0u64;
    for (number, section) in jobs.iter().enumerate() {
        let keys = Keys { own: &section.entries, inherited: shared.own, header: section.name.place };
        let job = keys.job(section.name.text, number as u64 + 1)?;
        check(&job).map_err(|(key, text)| keys.fault(key, text))?;
        memory = memory.saturating_add(job.size_bytes);
        if memory > MEMORY_MAX_BYTES {
            let text = format!("all areas together are more than {}", Size(MEMORY_MAX_BYTES));
            return Err(keys.fault("size", text));
        }
        scenario.jobs.push(job);
    }
    Ok(scenario)
}

fn default_engines() -> Vec<BenchEngine> {
    vec![BenchEngine::Vmemd, BenchEngine::Swap, BenchEngine::Raw]
}

/// Everything that can be said of sections without knowing what their keys mean.
fn check_sections(sections: &[Section]) -> Result<(), Fault> {
    for (number, section) in sections.iter().enumerate() {
        let Word { text: name, place } = section.name;
        if let Some(first) = sections[..number].iter().find(|other| other.name.text == name) {
            let text = format!("[{name}] is there already, in line {}", first.name.place.line);
            return Err(Fault::new(place, text));
        }
        if name == GLOBAL && number > 0 {
            return Err(Fault::new(place, "[global] comes first: it holds for all jobs"));
        }
        for (at, entry) in section.entries.iter().enumerate() {
            check_key(entry, name == GLOBAL)?;
            let key = canonical(entry.key.text);
            if let Some(first) = section.entries[..at].iter().find(|other| canonical(other.key.text) == key) {
                let text = format!("`{key}` is there already, in line {}", first.key.place.line);
                return Err(Fault::new(entry.key.place, text));
            }
        }
    }
    Ok(())
}

fn canonical(key: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key, |(_, known)| known)
}

fn check_key(entry: &Entry, global: bool) -> Result<(), Fault> {
    let (key, place) = (entry.key.text, entry.key.place);
    if GLOBAL_KEYS.contains(&key) {
        return match global {
            true => Ok(()),
            false => {
                Err(Fault::new(place, format!("`{key}` is the same for all jobs: write it under [global]")))
            }
        };
    }
    if key == "name" {
        return Err(Fault::new(place, "a job's name is that of its section: write `[name]`"));
    }
    if JOB_KEYS.contains(&canonical(key)) {
        return Ok(());
    }
    if HARMLESS.contains(&key) {
        let value = entry.value.map_or(Ok(true), |value| boolean(value.text));
        return match value {
            Ok(true) => Ok(()),
            _ => Err(Fault::new(place, format!("`{key}` cannot be switched off here: leave it out"))),
        };
    }
    if let Some((_, instead)) = INSTEAD.iter().find(|(foreign, _)| *foreign == key) {
        return Err(Fault::new(place, format!("fio's `{key}` has no meaning here: {instead}")));
    }
    let known =
        GLOBAL_KEYS.iter().chain(&JOB_KEYS).chain(&HARMLESS).chain(ALIASES.iter().map(|(alias, _)| alias));
    let nearest = known
        .map(|known| (strsim::jaro_winkler(&key.to_ascii_lowercase(), known), *known))
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .filter(|(likeness, _)| *likeness >= NEAREST_LEAST);
    let hint = match nearest {
        Some((_, known)) => format!("did you mean `{known}`?"),
        None => format!("known are {}", [&GLOBAL_KEYS[..], &JOB_KEYS[..14]].concat().join(", ")),
    };
    Err(Fault::new(place, format!("unknown key `{key}`: {hint}")))
}

/// The keys of a section, above those that it inherits.
struct Keys<'a> {
    own: &'a [Entry<'a>],
    inherited: &'a [Entry<'a>],
    header: Place,
}

impl Keys<'_> {
    fn find(&self, key: &str) -> Option<&Entry<'_>> {
        self.own.iter().chain(self.inherited).find(|entry| canonical(entry.key.text) == key)
    }

    /// A fault at the value of this key, or at the section's name if it is not written anywhere.
    fn fault(&self, key: &str, text: impl Into<String>) -> Fault {
        let place = self.find(key).map_or(self.header, |entry| entry.value.unwrap_or(entry.key).place);
        Fault::new(place, text)
    }

    fn get<T>(&self, key: &str, read: impl FnOnce(&str) -> Result<T, String>) -> Result<Option<T>, Fault> {
        let Some(entry) = self.find(key) else { return Ok(None) };
        match entry.value.map(|value| value.text) {
            Some(text) if !text.is_empty() => read(text).map(Some).map_err(|text| self.fault(key, text)),
            _ => Err(Fault::new(entry.key.place, format!("`{key}` needs a value"))),
        }
    }

    /// `key` alone means yes, as in fio.
    fn switch(&self, key: &str) -> Result<Option<bool>, Fault> {
        match self.find(key) {
            Some(Entry { value: None, .. }) => Ok(Some(true)),
            _ => self.get(key, boolean),
        }
    }

    fn job(&self, name: &str, number: u64) -> Result<Job, Fault> {
        let missing = |key, example| {
            Fault::new(
                self.header,
                format!("job [{name}] has no `{key}`: write `{example}`, here or under [global]"),
            )
        };
        let size_bytes = self.get("size", size)?.ok_or_else(|| missing("size", "size=4g"))?;
        let (access, random) = self.get("rw", rw)?.ok_or_else(|| missing("rw", "rw=randrw"))?;
        let distribution = self.get("random_distribution", distribution)?;
        let order = match (random, distribution) {
            (true, order) => order.unwrap_or(Order::Uniform),
            (false, None) => Order::Sequential,
            (false, Some(_)) => {
                let text = "`random_distribution` is for randread, randwrite and randrw: this job's order is sequential";
                return Err(self.fault("random_distribution", text));
            }
        };
        let runtime = self.get("runtime", millis)?;
        let loops = self.get("loops", |text| number_in(text, 1, u64::from(u32::MAX)))?;
        if runtime == Some(0) {
            return Err(self.fault("runtime", "`runtime` is longer than nothing"));
        }
        Ok(Job {
            name: name.to_owned(),
            size_bytes,
            working_set_bytes: self.get("working_set", size)?.unwrap_or(size_bytes),
            access,
            read_percent: self.get("rwmixread", |text| number_in(text, 0, 100))?.unwrap_or(50) as u8,
            order,
            stride_pages: self.get("stride", |text| number_in(text, 1, u64::from(u32::MAX)))?.unwrap_or(1)
                as u32,
            block_bytes: self.get("bs", size)?.unwrap_or(PAGE),
            threads: self.get("numjobs", |text| number_in(text, 1, u64::from(THREADS_MAX)))?.unwrap_or(1)
                as u32,
            length: runtime.map_or(Length::Loops(loops.unwrap_or(1)), Length::Millis),
            ramp_ms: self.get("ramp_time", millis)?.unwrap_or(0),
            prefill: self.switch("prefill")?.unwrap_or(true),
            seed: self.get("randseed", |text| number_in(text, 0, u64::MAX))?.unwrap_or(number),
        })
    }
}

/// What fits together in a job: the key to blame, and why.
pub(super) fn check(job: &Job) -> Result<(), (&'static str, String)> {
    let (size, working_set) = (job.size_bytes, job.working_set_bytes);
    let fail = |key, text: String| Err((key, text));
    for (key, bytes) in [("size", size), ("working_set", working_set)] {
        if bytes == 0 || !bytes.is_multiple_of(PAGE) {
            return fail(key, format!("`{key}` is a multiple of a page of 4k"));
        }
    }
    if working_set > size {
        return fail("working_set", format!("`working_set` is more than the area: `size` is {}", Size(size)));
    }
    let block = job.block_bytes;
    if !block.is_power_of_two() || !(BLOCK_MIN_BYTES..=BLOCK_MAX_BYTES).contains(&block) {
        return fail("bs", "`bs` is a power of two from 64 to 1m".to_owned());
    }
    let sequential = job.order == Order::Sequential;
    let share = if sequential { working_set / PAGE / u64::from(job.threads) * PAGE } else { working_set };
    if share < block.max(PAGE) {
        let text = "the working set is too small: each thread of a sequential job has its own part, of at least one `bs`";
        return fail("numjobs", text.to_owned());
    }
    if job.stride_pages > 1 {
        if !sequential {
            return fail(
                "stride",
                "`stride` is for read, write and rw: this job's order is random".to_owned(),
            );
        }
        if block > PAGE {
            return fail("stride", "with `stride`, `bs` is at most a page of 4k".to_owned());
        }
        if u64::from(job.stride_pages) > share / PAGE {
            return fail(
                "stride",
                format!("`stride` is more than the {} pages that a thread has", share / PAGE),
            );
        }
    }
    Ok(())
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

/// Seconds, or with a unit.
fn millis(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let scale = match unit.trim_start() {
        "ms" => 1.0,
        "" | "s" => 1000.0,
        "m" => 60_000.0,
        "h" => 3_600_000.0,
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
