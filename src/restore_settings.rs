//! What `vmemd restore` is told, for either kind of machine.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

use checkpoint::key::ArchiveKey;
use vmprocess::RestoreOptions;
use vmprocess::size::Size;

use crate::qemu::disk_versions::DisksWanted;
use crate::qemu::rules::Rules;

/// The settings of `vmemd restore`.
#[derive(Clone, Debug)]
pub struct RestoreSettings {
    pub run_dir: PathBuf,
    pub archive: PathBuf,
    /// The latest without it.
    pub checkpoint: Option<String>,
    /// Of an encrypted one.
    pub key: Option<ArchiveKey>,
    /// As it was called when it was saved without it.
    pub name: Option<String>,
    /// What it had when it was saved without it.
    pub ram: Option<Size>,
    pub store: PathBuf,
    pub store_overcommit: bool,
    pub store_encrypt: bool,
    pub prealloc: bool,
    pub lock: bool,
    pub options: RestoreOptions,
    /// One line of JSON is to say when it runs.
    pub json: bool,
    /// Of a QEMU VM: a binary and its arguments, in the place of what the checkpoint says.
    pub qemu: Vec<OsString>,
    /// Of a QEMU VM: this host's names, if a file of them was given.
    pub rules: Option<Rules>,
    /// Of a QEMU VM: which disks it is to have.
    pub disks: DisksWanted,
    /// Of a QEMU VM: it may have the addresses of the VM that it is a copy of, though that runs.
    pub same_addresses: bool,
    /// When the command was begun.
    pub began: Instant,
}

impl RestoreSettings {
    /// What was said that only a QEMU VM heeds, as it was typed.
    pub fn only_for_qemu(&self) -> Vec<&'static str> {
        let disks = match self.disks {
            DisksWanted::Unsaid => None,
            DisksWanted::Copies(_) => Some("--disk-copies"),
            DisksWanted::Back => Some("--disks-back"),
            DisksWanted::AsTheyAre => Some("--disks-as-they-are"),
        };
        let others = [
            (self.same_addresses, "--same-addresses"),
            (self.rules.is_some(), "--qemu-rules"),
            (!self.qemu.is_empty(), "what is behind --"),
        ];
        disks.into_iter().chain(others.into_iter().filter_map(|(said, what)| said.then_some(what))).collect()
    }
}
