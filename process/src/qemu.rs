//! The agreement between the program that starts a QEMU and the preload in it: one JSON text in the environment.

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::arrive::ArriveSettings;
use crate::homing::RestoreOptions;
use crate::memory::MemorySpec;

/// The environment variable that holds the [`PreloadSettings`].
pub const VARIABLE: &str = "VMEMD_PRELOAD";
/// File name of the shared object that goes to `LD_PRELOAD`.
pub const LIBRARY: &str = "libvmemd_preload.so";
/// The environment variable of a question: the number of a pipe's descriptor, to which the preload writes an
/// [`PreloadAnswer`] a line, when the program begins and when it exits.
pub const QUESTION: &str = "VMEMD_PRELOAD_QUESTION";
/// Whoever starts a QEMU and the preload in it must be of one version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Guest memory is in files that are not there: the preload opens them for QEMU, and nothing else can, nor make them
/// (in /proc nobody can). A QEMU without the preload prints this name, and ends.
pub const MEMORY_FILES: &str =
    "/proc/libvmemd_preload.so-is-not-in-this-QEMU:LD_PRELOAD-was-lost-or-not-followed:see-docs/qemu.md/ram";

/// The `mem-path` of the backend of that number.
pub fn memory_file(index: usize) -> PathBuf {
    format!("{MEMORY_FILES}{index}").into()
}

/// The preload's word in a program that it was loaded into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreloadAnswer {
    /// The program that the preload is in, without links in its path; empty if the kernel does not say.
    pub program: PathBuf,
    /// [`VERSION`] of the preload.
    pub version: String,
    /// What is wrong with the settings in the environment.
    #[serde(rename = "trouble")]
    pub settings_error: Option<String>,
    /// The program exits, rather than begins: it has not become another one.
    pub exits: bool,
}

/// The settings that the preload is given.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PreloadSettings {
    /// [`VERSION`] of whoever says this.
    pub version: String,
    /// The QEMU binary, without links in its path. Every other program is left alone.
    pub program: PathBuf,
    /// Guest memory, in the order of its page numbers.
    pub backends: Vec<Backend>,
    /// The monitor by which the preload drives the QEMU.
    pub qmp: QmpAddress,
    /// QEMU's arguments, if it is something else than vmemd that starts it: its VM moves only if these are what it
    /// gets.
    pub args: Option<Vec<String>>,
    /// Whether the VM is new, and all that differs by that.
    pub role: Role,
}

/// Whether the VM starts here or comes from elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The VM starts here.
    New {
        /// The run directory in which the preload claims the name.
        run_dir: PathBuf,
        /// What the VM is to be called.
        name: String,
        /// The VM's memory: all backends together, each rounded up to 2 MiB.
        memory: MemorySpec,
        /// What a target needs to start the same machine; opaque here.
        offer: String,
        /// The files of this host that `offer` has as disks.
        disks: Vec<PathBuf>,
        /// Why no target can, if so: the VM runs, and does not move.
        stays: Option<String>,
    },
    /// QEMU was started with `-incoming defer -S`.
    Arriving(Box<ArriveSettings>),
    /// The same; the state comes from a checkpoint.
    Restoring(Box<RestoreSettings>),
}

/// The checkpoint that a VM begins from, and what the VM is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreSettings {
    /// The run directory in which the preload claims the name.
    pub run_dir: PathBuf,
    /// What the VM is to be called.
    pub name: String,
    /// The memory that it is to have.
    pub memory: MemorySpec,
    /// For the VM's way onward; opaque here.
    pub offer: String,
    /// The files of this host that `offer` has as disks.
    pub disks: Vec<PathBuf>,
    /// The directory of checkpoints.
    pub archive: PathBuf,
    /// The checkpoint's name there.
    pub checkpoint: String,
    /// How it begins.
    pub options: RestoreOptions,
    /// Descriptors that this process inherits: locks on the checkpoint, to be closed when it has its own.
    pub locks: Vec<std::os::fd::RawFd>,
    /// Of an encrypted checkpoint: the end of a pipe with the key of its chain, inherited as well, to be read once.
    pub key: Option<std::os::fd::RawFd>,
}

impl Role {
    /// What the VM is called, be it new or from elsewhere.
    pub fn name(&self) -> &str {
        match self {
            Role::New { name, .. } => name,
            Role::Arriving(settings) => &settings.hello.name,
            Role::Restoring(settings) => &settings.name,
        }
    }

    /// The memory that the preload makes for it.
    pub fn memory(&self) -> &MemorySpec {
        match self {
            Role::New { memory, .. } => memory,
            Role::Arriving(settings) => &settings.memory,
            Role::Restoring(settings) => &settings.memory,
        }
    }
}

/// A `memory-backend-file,share=on` of QEMU's command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its `mem-path`: a [`memory_file`].
    pub path: PathBuf,
    /// What QEMU maps: whole pages.
    pub bytes: u64,
}

/// Where a QMP monitor of the QEMU is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QmpAddress {
    /// A socket on which QEMU listens. Removed when it ends.
    Socket(PathBuf),
    /// The ends of a socket pair, both inherited; QEMU knows `theirs`, as `-chardev socket,fd=…`.
    Descriptor {
        /// The preload's end.
        ours: RawFd,
        /// QEMU's end.
        theirs: RawFd,
    },
}
