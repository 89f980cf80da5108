//! `manifest`: what a checkpoint is of, and which files are its own. JSON for people and programs, with a last line
//! that says whether all of it is there.
//!
//! A directory is a checkpoint because it has a manifest, and the manifest names the checkpoint's files with their
//! checksums. So the manifest is written last, and a checkpoint is changed by replacing its manifest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use swapd::units::bytes_of;
use xxhash_rust::xxh3::xxh3_64;

use super::{FormatError, MAX_PAGES, PageCounts};
use crate::key::{CHECK_BYTES, SALT_BYTES};

/// The newest version that is read: that of an encrypted checkpoint. An older vmemd must not take one for plain.
pub const VERSION: u32 = 2;
/// The version of a checkpoint that is not encrypted.
const PLAIN_VERSION: u32 = 1;
/// What a manifest says it is.
const FORMAT: &str = "vmemd checkpoint";
/// Begins the last line, before the checksum of all lines before it.
const SUM_WORD: &str = "xxh3 ";
/// Most bytes of a manifest: an offer is the largest thing in it.
pub const MAX_BYTES: u64 = 1 << 20;
/// Longest name of a checkpoint, and of a file of it.
const MAX_NAME: usize = 64;

/// What a checkpoint is, and of what.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Of the checkpoint, for as long as it exists: it stays when the checkpoint's base is merged into it.
    pub id: CheckpointId,
    /// When the VM stood still for it: milliseconds since 1970, UTC.
    pub made_at_ms: u64,
    /// The vmemd that made it.
    pub made_by: String,
    /// The VM, as it then was.
    pub vm: VmFacts,
    /// The checkpoint that has the pages which this one has not, if there is one.
    pub base: Option<BaseRef>,
    /// How many pages it has of each kind.
    pub pages: PageCounts,
    /// How its pages and its parts are encrypted, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// Its files beside the image.
    pub parts: Parts,
    /// How it was made.
    pub save: Save,
}

/// A VM, as far as it must be known before its state is read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmFacts {
    /// Its name.
    pub name: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Number of its virtual processors.
    pub vcpus: u32,
    /// What it runs on.
    pub machine: Machine,
    /// What must be known to make its machine, as a migration's target is told it; none if its state says it all.
    pub offer: Option<String>,
    /// Bytes of frames that it could have.
    pub budget_bytes: u64,
    /// Whether it stood still by its user's will, and is to stand still when it is restored.
    pub paused: bool,
    /// The disks that it can write to. None of a machine whose state is all that it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Its disks, whose content is not in the checkpoint, with its user's knowledge: a restored guest's file systems
    /// agree with its memory only if whoever restores it has put back that of the same moment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_disks: Vec<String>,
}

/// A disk of a VM that the VM can write to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// As its user calls it.
    pub name: String,
    /// The file of the host that it was in: an absolute path.
    pub file: String,
    /// The file's format, in QEMU's word: `qcow2`.
    pub format: String,
    /// Where the disk's content of the checkpoint's moment is.
    pub version: DiskVersion,
}

/// Where a disk's content of a checkpoint's moment is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskVersion {
    /// In the disk's own file, as an internal snapshot of this name. The file as such is what the VM has made of the
    /// disk since.
    Snapshot(String),
    /// In the state of vCPUs and devices, which writes it into whatever file the disk is given: firmware's flash.
    InState,
}

/// How the name of a checkpoint's snapshot begins.
const SNAPSHOT: &str = "vmemd-";

impl DiskVersion {
    /// The name of the snapshots that are made at a time.
    pub fn snapshot_at(time_ms: u128) -> String {
        format!("{SNAPSHOT}{time_ms}")
    }

    /// Whether a snapshot has a name that is given to those of checkpoints.
    pub fn is_snapshot(name: &str) -> bool {
        name.strip_prefix(SNAPSHOT)
            .is_some_and(|time| time.parse::<u64>().is_ok_and(|ms| ms.to_string() == time))
    }
}

/// A VM's kind of machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Machine {
    /// The built-in one.
    Reference,
    /// QEMU.
    Qemu,
}

/// A checkpoint's base.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BaseRef {
    /// Its name in the archive.
    pub name: String,
    /// Another checkpoint of that name is not it.
    pub id: CheckpointId,
}

/// The files of a checkpoint beside its image, whose pages have checksums of their own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// The [map](super::MemoryMap) of the memory.
    pub map: Part,
    /// Virtual processors and devices, as the machine wrote them.
    pub state: Part,
}

/// How the pages and parts of a checkpoint are encrypted. The same for all of a chain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Encryption {
    /// The way of the pages. The parts are [sealed](super::sealed).
    pub cipher: PageCipher,
    /// With which the chain's key is made of the user's.
    pub salt: Hex<SALT_BYTES>,
    /// Made of the chain's key: another key is told at once.
    pub check: Hex<CHECK_BYTES>,
}

/// A way to encrypt pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PageCipher {
    /// Each page by itself; its number is the tweak.
    #[serde(rename = "aes-256-xts")]
    Aes256Xts,
}

/// A file of a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Part {
    /// Its name in the checkpoint's directory.
    pub file: String,
    /// How long it is.
    pub bytes: u64,
    /// XXH3-64 of its bytes.
    pub xxh3: Sum,
}

/// How a checkpoint was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Save {
    /// Microseconds for which the VM stood still.
    pub pause_us: u64,
    /// Microseconds from the request until all was durable.
    pub total_us: u64,
    /// Rounds over the memory, the last one with the VM standing still among them.
    pub rounds: u32,
    /// Bytes of pages that were put into the image, some of them more than once.
    pub bytes_saved: u64,
}

/// 64 bits that are printed as sixteen hexadecimal digits: a number of JSON may lose some of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum(pub u64);

/// Bytes that are printed as two hexadecimal digits each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hex<const N: usize>(pub [u8; N]);

/// 128 random bits, printed as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CheckpointId(pub u128);

impl CheckpointId {
    /// A new one.
    ///
    /// # Errors
    /// If the kernel has no random bits.
    pub fn random() -> std::io::Result<CheckpointId> {
        let mut bytes = [0; 16];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if filled == bytes.len() {
            Ok(CheckpointId(u128::from_le_bytes(bytes)))
        } else {
            Err(std::io::ErrorKind::UnexpectedEof.into())
        }
    }
}

/// Files of a checkpoint that are none of its parts: whoever changes a part would write over them.
const NOT_PARTS: [&str; 3] = ["memory.img", "manifest", "first-faults"];

/// The parts of a manifest that every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

#[derive(Serialize)]
struct Whole<'a> {
    format: &'static str,
    version: u32,
    #[serde(flatten)]
    manifest: &'a Manifest,
}

impl Manifest {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let version = if self.encryption.is_some() { VERSION } else { PLAIN_VERSION };
        let whole = Whole { format: FORMAT, version, manifest: self };
        let mut text = serde_json::to_string_pretty(&whole).expect("a manifest can be written as JSON");
        text.push('\n');
        let sum = Sum(xxh3_64(text.as_bytes()));
        text += &format!("{SUM_WORD}{sum}\n");
        text.into_bytes()
    }

    /// What the file's bytes say.
    ///
    /// # Errors
    /// If they are no whole manifest, or one of a newer vmemd.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, FormatError> {
        let text = str::from_utf8(bytes).map_err(|_| FormatError::Magic("manifest of a checkpoint"))?;
        let json = summed(text)?;
        let wrong = |error: serde_json::Error| FormatError::Text(error.to_string());
        let head: Head = serde_json::from_str(json).map_err(wrong)?;
        if head.format != FORMAT {
            return Err(FormatError::Magic("manifest of a checkpoint"));
        }
        match head.version {
            0 => return Err(FormatError::Value("no version of the format is 0")),
            found if found > VERSION => return Err(FormatError::Newer { found, known: VERSION }),
            _ => {}
        }
        let manifest: Manifest = serde_json::from_str(json).map_err(wrong)?;
        // A plain one in the place of an encrypted one is to be told, not read.
        if (head.version > PLAIN_VERSION) != manifest.encryption.is_some() {
            return Err(FormatError::Value("its version is not that of how it is encrypted"));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Pages of the VM's memory.
    pub fn memory_pages(&self) -> u64 {
        swapd::units::pages_in(self.vm.memory_bytes)
    }

    fn check(&self) -> Result<(), FormatError> {
        let pages = self.memory_pages();
        if !(1..=MAX_PAGES).contains(&pages) || bytes_of(pages) != self.vm.memory_bytes {
            return Err(FormatError::Value("no VM has so much memory"));
        }
        let PageCounts { zero, here, base, lost } = self.pages;
        let all = [zero, here, base, lost].into_iter().try_fold(0u64, u64::checked_add);
        if all != Some(pages) {
            return Err(FormatError::Value("the pages of all kinds are not those of the VM's memory"));
        }
        if base > 0 && self.base.is_none() {
            return Err(FormatError::Value("it has pages in a base, and no base"));
        }
        let parts = [&self.parts.map.file, &self.parts.state.file];
        if parts.iter().any(|name| NOT_PARTS.contains(&name.as_str())) {
            return Err(FormatError::Value("a part in the place of another file of the checkpoint"));
        }
        let base = self.base.iter().map(|base| &base.name);
        if !parts.into_iter().chain(base).all(|name| is_name(name)) {
            return Err(FormatError::Value("a file's name that is none of a checkpoint's"));
        }
        Ok(())
    }
}

/// The text without its last line, which has been found right.
fn summed(text: &str) -> Result<&str, FormatError> {
    let body = text.strip_suffix('\n').and_then(|body| body.rfind('\n'));
    let (json, last) = text.split_at(body.map_or(0, |at| at + 1));
    let sum = last.strip_suffix('\n').and_then(|last| last.strip_prefix(SUM_WORD));
    match sum.map(str::parse) {
        Some(Ok(Sum(sum))) if sum == xxh3_64(json.as_bytes()) => Ok(json),
        Some(Ok(_)) => Err(FormatError::Sum),
        _ => Err(FormatError::Value(
            "its last line is no checksum: it was cut off, or written by something else",
        )),
    }
}

/// Whether a checkpoint, or a file of one, can have this name. No name leads out of its directory.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=MAX_NAME).contains(&name.len()) && !name.starts_with('.') && name.chars().all(fits)
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A text is not the hexadecimal digits that it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} hexadecimal digits are wanted, in small letters")]
pub struct NotHex(usize);

fn digits(text: &str, count: usize) -> Result<&str, NotHex> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() == count && text.bytes().all(is_digit) { Ok(text) } else { Err(NotHex(count)) }
}

impl FromStr for Sum {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Sum, NotHex> {
        u64::from_str_radix(digits(text, 16)?, 16).map(Sum).map_err(|_| NotHex(16))
    }
}

impl FromStr for CheckpointId {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<CheckpointId, NotHex> {
        u128::from_str_radix(digits(text, 32)?, 16).map(CheckpointId).map_err(|_| NotHex(32))
    }
}

impl<const N: usize> FromStr for Hex<N> {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Hex<N>, NotHex> {
        let text = digits(text, 2 * N)?;
        let mut bytes = [0; N];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| NotHex(2 * N))?;
        }
        Ok(Hex(bytes))
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Hex<N>, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Serialize for CheckpointId {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Sum, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for CheckpointId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<CheckpointId, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
