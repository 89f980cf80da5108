//! `qemu-img`: what is done with a disk's file of which no running VM is asked.

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use vmprocess::failure::{Failure, FailureKind};

use super::binary;
use super::words::one_line;

const NAME: &str = "qemu-img";
/// Exit code of `check` if only clusters that nobody uses were found: a QEMU that is killed leaves some.
const LEAKS: i32 = 3;
/// Exit code of `check` if what is in the file contradicts itself.
const CORRUPT: i32 = 2;

/// The program.
#[derive(Debug)]
pub(crate) struct Img(PathBuf);

/// What a check of a disk's file has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// Its tables fit each other.
    Whole,
    /// They do not: what qemu-img says of it.
    Corrupt(String),
    /// It was not looked at, such as one that a QEMU has open.
    Not(String),
}

impl Img {
    /// As `qemu-img` and QEMU are installed together.
    pub(super) fn beside(qemu: &Path, path: &OsStr) -> Result<Img, Failure> {
        let beside = qemu.parent().map(|dir| dir.join(NAME)).filter(|tool| crate::program::is_program(tool));
        beside.map_or_else(|| Img::in_path(path), |tool| Ok(Img(tool)))
    }

    /// The one that is installed here.
    pub(crate) fn installed() -> Result<Img, Failure> {
        Img::in_path(&std::env::var_os("PATH").unwrap_or_default())
    }

    fn in_path(path: &OsStr) -> Result<Img, Failure> {
        binary::find(NAME, path).map(Img).map_err(|failure| {
            let text =
                format!("{NAME} is needed for the checkpoint's disks (Debian: qemu-utils): {}", failure.text);
            Failure::new(FailureKind::Host, text)
        })
    }

    /// None, of those checkpoints that have no disks.
    pub(super) fn none() -> Img {
        Img(PathBuf::new())
    }

    fn output(&self, arguments: &[&str]) -> Result<Output, Failure> {
        let ran = Command::new(&self.0).args(arguments).stdin(Stdio::null()).output();
        ran.map_err(|error| Failure::io(format!("cannot start {}", self.0.display()), &error))
    }

    /// What it prints.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<String, Failure> {
        let ran = self.output(arguments)?;
        if ran.status.success() {
            return Ok(String::from_utf8_lossy(&ran.stdout).into_owned());
        }
        Err(Failure::new(FailureKind::Host, said(&ran)))
    }

    /// The names of a file's internal snapshots, also of one that a VM has open.
    pub(crate) fn snapshots(&self, file: &str) -> Result<Vec<String>, Failure> {
        let told = self.run(&["info", "-U", "--output=json", file])?;
        let told: Value = serde_json::from_str(&told).map_err(|error| Failure::other(&error))?;
        let all = told["snapshots"].as_array().into_iter().flatten();
        Ok(all.filter_map(|one| one["name"].as_str().map(str::to_owned)).collect())
    }

    /// Deletes a snapshot. One that is not there is no error. Refused of a file that a VM has open.
    pub(crate) fn delete(&self, file: &str, snapshot: &str) -> Result<(), Failure> {
        // By name of its format: what is in a file of another one is its guest's, and not to be believed.
        let file = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": file } });
        let ran = self.output(&["snapshot", "-q", "-d", snapshot, &format!("json:{file}")])?;
        let text = said(&ran);
        if ran.status.success() || text.to_lowercase().contains("snapshot not found") {
            return Ok(());
        }
        Err(Failure::new(FailureKind::Host, text))
    }

    /// Whether the tables of a file fit each other: not what is on the disk, of which there is no checksum.
    pub(crate) fn check(&self, file: &str) -> Result<Checked, Failure> {
        let ran = self.output(&["check", "-q", "-f", "qcow2", file])?;
        Ok(match ran.status.code() {
            Some(0 | LEAKS) => Checked::Whole,
            Some(CORRUPT) => Checked::Corrupt(said(&ran)),
            _ => Checked::Not(said(&ran)),
        })
    }
}

/// Why it has failed, in its own words.
fn said(ran: &Output) -> String {
    if let Some(signal) = ran.status.signal() {
        return format!("{NAME} was ended by signal {signal}");
    }
    let text = [&ran.stderr, &ran.stdout].map(|said| String::from_utf8_lossy(said).into_owned());
    let text =
        text.iter().map(|text| text.trim()).find(|text| !text.is_empty()).unwrap_or("nothing was said");
    one_line(text)
}
