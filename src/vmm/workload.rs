//! What the guest program does with its memory, and the text form of it: `PATTERN[:KEY=VALUE,...]`.

use std::fmt;
use std::str::FromStr;

use vmprocess::size::{Size, SizeError};

/// Skew of `zipf` unless the text says otherwise, as in the YCSB benchmark.
pub const THETA_DEFAULT: f64 = 0.99;
/// Greatest skew: beyond it nearly every touch is of one page.
pub const THETA_MAX: f64 = 4.0;

const KEYS: [&str; 5] = ["working-set", "rate", "theta", "scatter", "fill"];
/// Pages from one touch to the next at most: one in a large page.
const SCATTER_MAX: u64 = 512;
const PATTERNS: [&str; 6] = ["fill", "rewrite", "random", "zipf", "read", "idle"];
const FILLS: [&str; 3] = ["all", "working-set", "none"];

/// The order in which the working set is touched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Write every page once in order, then wait.
    Fill,
    /// Verify and rewrite in order, round after round.
    Rewrite,
    /// Verify and rewrite pages at random.
    Random,
    /// Verify and rewrite pages by Zipf's law, hot pages scattered over the working set.
    Zipf {
        /// The skew: the page of rank r (from 1) is touched in proportion to r^-theta.
        theta: f64,
    },
    /// Verify in order without writing.
    Read,
    /// Fill the working set, then wait.
    Idle,
}

/// Which part of memory is written before the pattern starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillScope {
    /// All usable memory: a VM that uses what it has.
    All,
    /// Only the working set; the rest stays untouched.
    WorkingSet,
    /// Nothing: the working set's pages are taken as zero at their first touch.
    Nothing,
}

/// What the guest does: a pattern, on how much memory, how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// The order of touches.
    pub pattern: Pattern,
    /// Bytes that the pattern goes over; none: all usable memory.
    pub working_set: Option<Size>,
    /// Bytes of pages touched in a second, all vCPUs together; none: as fast as they can.
    pub rate: Option<Size>,
    /// Of `rewrite` and `read`: one page in so many of the working set is touched.
    pub scatter: u64,
    /// What is written first.
    pub fill: FillScope,
}

/// Why a text is not a workload.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WorkloadError {
    /// No such pattern.
    #[error(
        "unknown workload {found:?}, did you mean {nearest:?}? Known are fill, rewrite, random, zipf, read and idle"
    )]
    Pattern {
        /// What was written.
        found: String,
        /// The known word nearest to it.
        nearest: &'static str,
    },
    /// No such key.
    #[error(
        "unknown key {found:?} in the workload, did you mean {nearest:?}? Known are working-set, rate, theta, scatter and fill"
    )]
    Key {
        /// What was written.
        found: String,
        /// The known word nearest to it.
        nearest: &'static str,
    },
    /// A key without a value.
    #[error("{0:?} lacks a value: write {0}=VALUE, as in rewrite:working-set=1500M,rate=200M")]
    NoValue(String),
    /// A key that occurs twice.
    #[error("{0:?} is given twice: keep one of them")]
    Twice(String),
    /// A value that is no size.
    #[error("{key}: {error}")]
    Size {
        /// The key it belongs to.
        key: &'static str,
        /// What is wrong with it.
        error: SizeError,
    },
    /// A size of zero.
    #[error("{0}=0 is not possible: leave the key out, or give a size such as 64M")]
    Zero(&'static str),
    /// A skew out of range.
    #[error("theta={0} is not possible: choose a number above 0 and up to {THETA_MAX}, such as 0.99")]
    Theta(String),
    /// A skew for a workload without one.
    #[error("theta is for zipf only: write zipf:theta=0.99, or leave it out")]
    ThetaElsewhere,
    /// A step out of range.
    #[error("scatter={0} is not possible: choose a number from 1 to {SCATTER_MAX}, such as 4")]
    Scatter(String),
    /// A step for a workload without one.
    #[error("scatter is for rewrite and read only: leave it out; random and zipf are scattered as they are")]
    ScatterElsewhere,
    /// No such scope of filling.
    #[error("fill={found} is not possible, did you mean fill={nearest}? Known are all, working-set and none")]
    Fill {
        /// What was written.
        found: String,
        /// The known word nearest to it.
        nearest: &'static str,
    },
}

impl Pattern {
    fn name(self) -> &'static str {
        match self {
            Pattern::Fill => "fill",
            Pattern::Rewrite => "rewrite",
            Pattern::Random => "random",
            Pattern::Zipf { .. } => "zipf",
            Pattern::Read => "read",
            Pattern::Idle => "idle",
        }
    }

    fn default_fill(self) -> FillScope {
        if self == Pattern::Idle { FillScope::WorkingSet } else { FillScope::All }
    }
}

impl Workload {
    /// The pattern over all usable memory, unlimited, after the fill that is usual for it.
    pub fn new(pattern: Pattern) -> Workload {
        Workload { pattern, working_set: None, rate: None, scatter: 1, fill: pattern.default_fill() }
    }
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Workload, WorkloadError> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let pattern = match name.trim() {
            "fill" => Pattern::Fill,
            "rewrite" => Pattern::Rewrite,
            "random" => Pattern::Random,
            "zipf" => Pattern::Zipf { theta: THETA_DEFAULT },
            "read" => Pattern::Read,
            "idle" => Pattern::Idle,
            found => {
                return Err(WorkloadError::Pattern {
                    found: found.to_owned(),
                    nearest: nearest(found, &PATTERNS),
                });
            }
        };
        let mut workload = Workload::new(pattern);
        let mut seen: Vec<&str> = Vec::new();
        for item in rest.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (key, value) = item.split_once('=').map_or((item, None), |(k, v)| (k.trim(), Some(v.trim())));
            if !KEYS.contains(&key) {
                return Err(WorkloadError::Key { found: key.to_owned(), nearest: nearest(key, &KEYS) });
            }
            if seen.contains(&key) {
                return Err(WorkloadError::Twice(key.to_owned()));
            }
            seen.push(key);
            let Some(value) = value.filter(|value| !value.is_empty()) else {
                return Err(WorkloadError::NoValue(key.to_owned()));
            };
            match key {
                "working-set" => workload.working_set = Some(size("working-set", value)?),
                "rate" => workload.rate = Some(size("rate", value)?),
                "scatter" => workload.scatter = scatter(pattern, value)?,
                "theta" => workload.pattern = Pattern::Zipf { theta: theta(pattern, value)? },
                _ => workload.fill = fill(value)?,
            }
        }
        Ok(workload)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut items = Vec::new();
        items.extend(self.working_set.map(|size| format!("working-set={size}")));
        items.extend(self.rate.map(|size| format!("rate={size}")));
        if let Pattern::Zipf { theta } = self.pattern
            && theta != THETA_DEFAULT
        {
            items.push(format!("theta={theta}"));
        }
        items.extend((self.scatter != 1).then(|| format!("scatter={}", self.scatter)));
        if self.fill != self.pattern.default_fill() {
            let word = match self.fill {
                FillScope::All => FILLS[0],
                FillScope::WorkingSet => FILLS[1],
                FillScope::Nothing => FILLS[2],
            };
            items.push(format!("fill={word}"));
        }
        let colon = if items.is_empty() { "" } else { ":" };
        write!(f, "{}{colon}{}", self.pattern.name(), items.join(","))
    }
}

fn size(key: &'static str, value: &str) -> Result<Size, WorkloadError> {
    match value.parse() {
        Ok(Size(0)) => Err(WorkloadError::Zero(key)),
        Ok(size) => Ok(size),
        Err(error) => Err(WorkloadError::Size { key, error }),
    }
}

fn theta(pattern: Pattern, value: &str) -> Result<f64, WorkloadError> {
    if !matches!(pattern, Pattern::Zipf { .. }) {
        return Err(WorkloadError::ThetaElsewhere);
    }
    let in_range = |theta: &f64| *theta > 0.0 && *theta <= THETA_MAX;
    value.parse().ok().filter(in_range).ok_or_else(|| WorkloadError::Theta(value.to_owned()))
}

fn scatter(pattern: Pattern, value: &str) -> Result<u64, WorkloadError> {
    if !matches!(pattern, Pattern::Rewrite | Pattern::Read) {
        return Err(WorkloadError::ScatterElsewhere);
    }
    let in_range = |step: &u64| (1..=SCATTER_MAX).contains(step);
    value.parse().ok().filter(in_range).ok_or_else(|| WorkloadError::Scatter(value.to_owned()))
}

fn fill(value: &str) -> Result<FillScope, WorkloadError> {
    match value {
        "all" => Ok(FillScope::All),
        "working-set" => Ok(FillScope::WorkingSet),
        "none" => Ok(FillScope::Nothing),
        found => Err(WorkloadError::Fill { found: found.to_owned(), nearest: nearest(found, &FILLS) }),
    }
}

/// The known word with the fewest changed letters.
fn nearest(found: &str, known: &[&'static str]) -> &'static str {
    known.iter().min_by_key(|word| distance(found, word)).copied().unwrap_or("")
}

/// Levenshtein's distance, by its usual table of one row.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_gives_back() {
        for text in [
            "rewrite:working-set=1500M,rate=200M",
            "random",
            "random:working-set=64K",
            "zipf:working-set=1G,theta=1.2",
            "zipf",
            "read:fill=working-set",
            "fill",
            "idle:fill=all",
            "rewrite:working-set=32M,fill=none",
            "read:rate=30M,scatter=4",
        ] {
            let workload: Workload = text.parse().unwrap();
            assert_eq!(workload.to_string(), text);
        }
        let zipf: Workload = "zipf:working-set=1G,theta=0.99".parse().unwrap();
        assert_eq!(zipf.pattern, Pattern::Zipf { theta: 0.99 });
        assert_eq!(zipf.working_set, Some(Size(1 << 30)));
        assert_eq!("idle".parse::<Workload>().unwrap().fill, FillScope::WorkingSet);
        assert_eq!(" rewrite : rate = 1G , ".parse::<Workload>().unwrap().rate, Some(Size(1 << 30)));
    }

    #[test]
    fn names_what_is_wrong() {
        let text = |workload: &str| workload.parse::<Workload>().unwrap_err().to_string();
        assert!(text("rewrite:workingset=1G").contains("did you mean \"working-set\""));
        assert!(text("rewrite:speed=1G").contains("unknown key \"speed\""));
        assert!(text("rewite").contains("did you mean \"rewrite\""));
        assert!(text("rewrite:working-set=1X").starts_with("working-set: \"1X\" is not a size"));
        assert!(text("rewrite:rate").contains("rate=VALUE"));
        assert!(text("rewrite:rate=1M,rate=2M").contains("twice"));
        assert!(text("rewrite:rate=0").contains("rate=0"));
        assert!(text("rewrite:theta=1").contains("zipf only"));
        assert!(text("zipf:theta=NaN").contains("theta=NaN"));
        assert!(
            text("rewrite:scatter=0").contains("scatter=0") && text("read:scatter=513").contains("to 512")
        );
        assert!(text("zipf:scatter=2").contains("rewrite and read only"));
        assert!(text("read:fill=nothing").contains("fill=none"));
    }
}
