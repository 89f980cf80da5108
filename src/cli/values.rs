//! Values of a command line that vmemd's programs have in common, and their defaults.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use checkpoint::archive::ArchiveError;
use checkpoint::key::ArchiveKey;
use vmprocess::control::protocol::EngineKind;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use crate::qemu::budget::check_ram;

#[derive(Debug, clap::Args)]
pub struct JsonArg {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The key of an encrypted checkpoint.
#[derive(Debug, clap::Args)]
pub(super) struct KeyArg {
    /// Of an encrypted checkpoint: the file of its key
    #[arg(long, value_name = "KEYFILE")]
    key: Option<PathBuf>,
}

impl KeyArg {
    pub(super) fn read(&self) -> Result<Option<ArchiveKey>, Failure> {
        self.key.as_deref().map(read_key).transpose()
    }
}

/// With what a checkpoint is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BaseArg {
    /// With nothing: it has all pages itself
    None,
    /// With the newest one in the archive, if there is one
    Latest,
    /// With that one
    Name(String),
}

impl FromStr for BaseArg {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "none" => BaseArg::None,
            "latest" => BaseArg::Latest,
            name => BaseArg::Name(name.to_owned()),
        })
    }
}

/// A key file that the user has named.
pub(super) fn read_key(path: &Path) -> Result<ArchiveKey, Failure> {
    Ok(ArchiveKey::read(path).map_err(ArchiveError::from)?)
}

/// [`EngineKind`] as it is typed.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum EngineArg {
    /// The swap engine: a RAM budget, and a store behind it
    Vmemd,
    /// Ordinary memory with the host's own paging, for comparisons
    Plain,
}

impl From<EngineArg> for EngineKind {
    fn from(engine: EngineArg) -> EngineKind {
        match engine {
            EngineArg::Vmemd => EngineKind::Vmemd,
            EngineArg::Plain => EngineKind::Plain,
        }
    }
}

/// Where a stream goes, or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StreamPlace {
    /// Standard output or input.
    Standard,
    File(PathBuf),
    /// In an object store.
    Object(String),
}

impl FromStr for StreamPlace {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<StreamPlace, Infallible> {
        Ok(match text {
            "-" => StreamPlace::Standard,
            url if url.starts_with("s3://") => StreamPlace::Object(url.to_owned()),
            path => StreamPlace::File(path.into()),
        })
    }
}

/// The directory of the VMs' control sockets: the one given, else `VMEMD_RUN_DIR`'s, else the usual one.
pub fn run_dir(given: Option<PathBuf>) -> PathBuf {
    given
        .or_else(|| std::env::var_os("VMEMD_RUN_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from))
        .unwrap_or_else(RunDir::default_path)
}

/// Where stores are unless the user says otherwise.
pub fn default_store() -> PathBuf {
    let root = rustix::process::geteuid().is_root();
    match std::env::var_os("HOME") {
        Some(home) if !root => PathBuf::from(home).join(".local/share/vmemd"),
        _ => PathBuf::from("/var/lib/vmemd"),
    }
}

/// What can be said about sizes without looking at the host.
///
/// # Errors
/// [`FailureKind::Usage`] if a VM cannot have them.
pub fn check_sizes(memory: Size, ram: Size) -> Result<(), Failure> {
    if memory.bytes() == 0 || !memory.bytes().is_multiple_of(2 << 20) {
        let text = format!("--memory {memory} is not a multiple of 2M: round it up or down");
        return Err(Failure::new(FailureKind::Usage, text));
    }
    check_ram(memory, ram)
}

/// A time as people write it: `50ms`, `1s`, `1.5s`.
///
/// # Errors
/// With how it is written.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let scale = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        _ => return Err("write a number and a unit, such as 50ms or 1s".to_owned()),
    };
    let number: f64 = number.parse().map_err(|_| format!("{number:?} is not a number"))?;
    Duration::try_from_secs_f64(number * scale)
        .ok()
        .filter(|time| !time.is_zero() && *time <= Duration::from_secs(3600))
        .ok_or_else(|| "choose a time between 1ms and 3600s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for text in ["", "50", "ms", "-1s", "0ms", "2h", "1e9s", "9999999s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
