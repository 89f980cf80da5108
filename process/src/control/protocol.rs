//! The messages of a VM's control socket: one JSON value a line. `docs/control.md` describes every field.

use std::sync::Arc;

use migrate::tls::{Client, Credentials, Security, TlsError};
use serde::{Deserialize, Serialize};

use super::lines::LINE_MAX;
use crate::failure::Failure;

/// A client's request, tagged by `op`. [`versions`](super::versions) adds the versions of the protocol that it fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// The facts of the VM, answered with a [`VmStat`]. Means the same in every version.
    Stat,
    /// Stop the VM. Answered when no vCPU is in the guest any more.
    Pause,
    /// Let the VM go on. One that is in doubt asks its target first.
    Resume,
    /// What became of a hand-over in doubt: asks the target again.
    Resolve {
        /// What to do if it does not answer; without it the doubt stays.
        #[serde(default)]
        force: Option<Force>,
    },
    /// Answered when it is known what became of the VM.
    Stop,
    /// Of a migration under way, on its own connection: the migration's answer is then what became of it.
    Cancel,
    /// Change the RAM budget. Answered when no more frames are held.
    SetRam {
        /// The new budget. It holds even if frames above it do not leave in time.
        ram_bytes: u64,
    },
    /// Move the VM to another host. Answered when it runs there (or stays paused).
    Migrate(MigrateRequest),
    /// Save the VM into files, which the client passes when it is told to ([`Reply::Files`]). Told when the VM goes on
    /// ([`Reply::Saved`]), and answered when the client has said what became of the files.
    Checkpoint(CheckpointRequest),
    /// The files of a checkpoint, on its own connection, are durable and have a name.
    Checkpointed {
        /// Of the checkpoint.
        name: String,
        /// What it takes on its disk.
        bytes: u64,
    },
    /// Delete the internal snapshot of a checkpoint that is gone, if a disk of the VM's is in that file.
    RemoveSnapshot {
        /// An absolute path.
        file: String,
        /// One that vmemd has made.
        snapshot: String,
    },
    /// Tell every fault for so long.
    RecordFaults {
        /// How long, 1 to 86400.
        seconds: u64,
    },
}

/// How a doubt is to end of which its target says nothing: somebody knows what the target would say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Force {
    /// It does not run there, and never will: it goes on here.
    RunHere,
    /// It runs there: it ends here.
    Gone,
}

/// How a VM shall move away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// `HOST:PORT` of the target's daemon.
    pub to: String,
    /// RAM budget at the target; the daemon's choice without it.
    #[serde(default)]
    pub ram_bytes: Option<u64>,
    /// The VM is stopped when it is expected to stand still for no longer than this.
    pub downtime_target_ms: u64,
    /// It is not stopped for longer: it stays instead, and the request fails.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// Connections that carry pages, 1 to [`MAX_STREAMS`](migrate::wire::opening::MAX_STREAMS).
    pub streams: u32,
    /// After so many rounds the VM is stopped even if that misses the downtime target; if it would miss
    /// `max_downtime_ms`, it stays.
    pub max_rounds: u32,
    /// Highest share of time, in percent, for which the guest may be held back; 0: never.
    pub max_throttle: u8,
    /// Have the target measure how much of what the VM touches in its first second there is in RAM.
    pub check_placement: bool,
    /// How to be sure of the target. In JSON, its fields are among the others.
    #[serde(flatten)]
    pub trust: Trust,
}

/// How a VM shall be saved. The files are passed in this order: image, map, state, the base's map if there is one, and a
/// pipe with the key if it is encrypted: no key is ever in a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRequest {
    /// The VM is stopped when it is expected to stand still for no longer than this.
    pub downtime_target_ms: u64,
    /// After so many rounds it is stopped even if that misses the target.
    pub max_rounds: u32,
    /// Highest share of time, in percent, for which the guest may be held back; 0: never.
    pub max_throttle: u8,
    /// Bytes a second that may be written while it runs; as many as can be without it.
    #[serde(default)]
    pub rate: Option<u64>,
    /// The earlier checkpoint with which it is compared.
    #[serde(default)]
    pub base: Option<CheckpointBase>,
    /// It stays paused when it has been saved: it is to be stopped when the files are durable.
    #[serde(default)]
    pub stop: bool,
    /// Of a VM with disks, save memory and state alone.
    #[serde(default)]
    pub without_disks: bool,
    /// Of a VM whose store is encrypted, save it unencrypted.
    #[serde(default)]
    pub plain: bool,
    /// Encrypt all that is written. A process that knows nothing of it wants fewer files, and so saves nothing.
    #[serde(default)]
    pub encrypted: bool,
}

impl CheckpointRequest {
    /// How many files are passed.
    pub fn files(&self) -> u32 {
        3 + u32::from(self.base.is_some()) + u32::from(self.encrypted)
    }
}

/// Where the pages of a base are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointBase {
    /// In its own image.
    Apart,
    /// In the new image as well, which began as a clone of it.
    Cloned,
}

/// How to be sure of a target. Without either: only if it is on this very host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trust {
    /// TLS with these; what they hold, so that the VM's process need not read files.
    #[serde(default)]
    pub tls: Option<Credentials>,
    /// Name in the target's certificate; the host in its address without it.
    #[serde(default)]
    pub tls_name: Option<String>,
    /// Unencrypted, to whoever answers.
    #[serde(default)]
    pub plain: bool,
}

// With what JSON adds for the ends of lines.
const _: () = assert!(Credentials::BYTES_MAX + Credentials::BYTES_MAX / 16 < LINE_MAX - (4 << 10));

impl Trust {
    /// The same for [`migrate::SourceOptions`], with the credentials understood.
    ///
    /// # Errors
    /// If the credentials are of no use.
    pub fn security(&self) -> Result<Security, TlsError> {
        match &self.tls {
            Some(credentials) => {
                Ok(Security::Tls(Arc::new(Client::new(credentials, self.tls_name.as_deref())?)))
            }
            None if self.plain => Ok(Security::Plain),
            None => Ok(Security::ThisHost),
        }
    }
}

/// A message of the VM's process. `Progress` and `Faults` may come any number of times before `Ok` or `Error`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The version of all that follows: comes first, and only to a client that has said which versions it knows.
    Version(u16),
    /// How far the migration is.
    Progress(MigrationStat),
    /// The client is to pass so many files now, each with its number ([`passing`](crate::passing)).
    Files(u32),
    /// How far the checkpoint is.
    Saving(CheckpointStat),
    /// The files are written, and the VM goes on, or stays paused: [`Saved`](checkpoint::save::Saved), and the VM's
    /// facts. The client makes the files durable, and says so.
    Saved(serde_json::Value),
    /// Part of a recording.
    Faults(swapd::FaultsSeen),
    /// Done. What the value holds depends on the request.
    Ok(serde_json::Value),
    /// Not done, and why. Means the same in every version.
    Error(Failure),
}

/// Where a VM is in its life, as `stat` and `list` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Memory is being received; the VM runs elsewhere.
    Arriving,
    /// The vCPUs are let into the guest.
    Running,
    /// Somebody had it stopped; `reason` says who.
    Paused,
    /// It waits for a migration of the machine's own (QEMU's), not of vmemd's.
    Incoming,
    /// The guest sleeps.
    Suspended,
    /// The guest has shut down, and its machine stays.
    Shutdown,
    /// The store failed and the VM stands still; `reason` says why.
    Stalled,
    /// Running here, and on its way to elsewhere.
    Migrating,
    /// A hand-over broke at the moment at which either side may have the VM: it stands still here.
    InDoubt,
    /// It runs elsewhere now; this process is about to end.
    Moved,
    /// The guest has failed; `reason` says why.
    Failed,
}

impl State {
    /// The word for it in JSON and in tables.
    pub const fn name(self) -> &'static str {
        match self {
            State::Arriving => "arriving",
            State::Running => "running",
            State::Paused => "paused",
            State::Incoming => "incoming",
            State::Suspended => "suspended",
            State::Shutdown => "shutdown",
            State::Stalled => "stalled",
            State::Migrating => "migrating",
            State::InDoubt => "in_doubt",
            State::Moved => "moved",
            State::Failed => "failed",
        }
    }
}

/// What holds a VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// The swap engine: a RAM budget, and a store behind it.
    Vmemd,
    /// Ordinary memory with the host's own paging, for comparisons.
    Plain,
}

/// `stat`: the facts of one VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmStat {
    /// The name under which it is reached in the run directory.
    pub name: String,
    /// Where it is in its life.
    pub state: State,
    /// Why it does not run, or what is wrong with its store.
    pub reason: Option<String>,
    /// What its machine does, as QEMU calls it (`prelaunch`, `io-error`); None of the reference guest.
    #[serde(default)]
    pub run_state: Option<String>,
    /// The VM's process.
    pub pid: u32,
    /// What holds its memory; of a plain VM most of `memory` is zero.
    pub engine: EngineKind,
    /// 0 until there is a machine.
    pub vcpus: u32,
    /// What the guest runs, in a word: the reference guest's workload, or the file name of the QEMU.
    pub workload: String,
    /// Since the process began to serve the control socket: of a VM that came from elsewhere, since it began to arrive.
    pub uptime_ms: u64,
    /// Listen address of the daemon that received the VM, if one did.
    pub daemon: Option<String>,
    /// What the engine counts. In JSON, its fields are among the others.
    #[serde(flatten)]
    pub memory: swapd::Stats,
    /// What the guest reports itself; zeros of one that does not.
    pub guest: GuestStat,
    /// What it waits for, and how long at most.
    pub waiting: Option<WaitStat>,
    /// The migration under way.
    pub migration: Option<MigrationStat>,
    /// The checkpoint under way.
    #[serde(default)]
    pub checkpoint: Option<CheckpointStat>,
    /// The last one that became durable, since this process began.
    #[serde(default)]
    pub last_checkpoint: Option<LastCheckpointStat>,
    /// How the memory was received, if it was.
    pub arrival: Option<ArrivalStat>,
    /// The checkpoint that it began from, if it did, and what is still done for that.
    #[serde(default)]
    pub restore: Option<RestoreStat>,
}

/// What the guest itself reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStat {
    /// Passes over the working set (or as many touches) that every vCPU has completed.
    pub rounds: u64,
    /// Touches that found the whole page right.
    pub verified_pages: u64,
    /// Touches that found wrong content: more than 0 means that memory was corrupted.
    pub mismatched_pages: u64,
    /// Pages written at the start, without verifying.
    pub filled_pages: u64,
    /// Touches that wrote a page anew after looking at it.
    pub rewritten_pages: u64,
    /// Page number of the first mismatch.
    pub first_mismatch: Option<u64>,
}

/// A migration under way, seen from the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationStat {
    /// `HOST:PORT` of the target.
    pub to: String,
    /// The [`migrate::Phase`] as in JSON, such as `hand_over`.
    pub phase: String,
    /// From 1; 0 before the first.
    pub round: u32,
    /// On all connections, since the start.
    pub bytes_sent: u64,
    /// Bytes of guest memory dealt with, and in all.
    pub bytes_done: u64,
    /// What this round has still to look at.
    pub bytes_left: u64,
    /// The VM's memory.
    pub bytes_total: u64,
    /// How fast bytes are sent now, on all connections.
    pub bytes_per_second: u64,
    /// Share of the time for which the guest is held back now, 0 to 99 percent.
    pub throttle_percent: u8,
    /// Since the migration began.
    pub elapsed_ms: u64,
}

/// A checkpoint under way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointStat {
    /// What it is doing.
    pub phase: checkpoint::save::Phase,
    /// From 1; 0 before the first.
    pub round: u32,
    /// Into the image, since the start.
    pub bytes_written: u64,
    /// Bytes of guest memory dealt with.
    pub bytes_done: u64,
    /// What this round has still to look at.
    pub bytes_left: u64,
    /// The VM's memory.
    pub bytes_total: u64,
    /// How fast memory is dealt with now.
    pub bytes_per_second: u64,
    /// Share of the time for which the guest is held back now, 0 to 99 percent.
    pub throttle_percent: u8,
    /// Since it began.
    pub elapsed_ms: u64,
}

/// A checkpoint that was made of the VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LastCheckpointStat {
    /// Its name in its archive.
    pub name: String,
    /// Since the VM stood still for it.
    pub age_ms: u64,
    /// What it took on its disk when it was made.
    pub bytes: u64,
}

/// A wait within a VM's hand-over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitStat {
    /// In words, to stand behind "waiting for".
    #[serde(rename = "for")]
    pub what: String,
    /// The name of the limit that ends the waiting (`docs/operating.md` lists them), and its value.
    pub limit: String,
    /// The value of that limit: what is left is this less `elapsed_ms`.
    pub limit_ms: u64,
    /// Since the waiting began.
    pub elapsed_ms: u64,
}

/// How a VM's memory was received.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ArrivalStat {
    /// The attempt, 32 hexadecimal digits, as in the source's report.
    pub session: String,
    /// Bytes that came on all connections.
    pub bytes_received: u64,
    /// Pages that were placed in RAM.
    pub pages_ram: u64,
    /// Pages that were placed in the store alone.
    pub pages_store: u64,
    /// Pages that read as zeros, with neither a frame nor room in the store.
    pub pages_zero: u64,
    /// Page-ins of the VM's own paging while it was received.
    pub pageins_during: u64,
    /// Page-outs of the VM's own paging while it was received.
    pub pageouts_during: u64,
}

/// A VM that began from a checkpoint. Bytes that are still there are `origin_bytes` of its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreStat {
    /// The checkpoint's directory.
    pub from: String,
    /// What is done with what is still there.
    pub phase: RestorePhase,
    /// Brought into RAM ahead of any touch.
    pub fetched_bytes: u64,
    /// Bytes a second that are taken home at most; null: as fast as it goes.
    pub rate_bytes: Option<u64>,
    /// Why nothing is brought or taken at this moment.
    pub waits: Option<String>,
}

/// What is done with a restored VM's pages that are in the checkpoint still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestorePhase {
    /// The VM does not run yet.
    Loading,
    /// What it needs first is brought into RAM.
    Fetching,
    /// All of it is moved to the VM's own store.
    TakingHome,
    /// They stay there for as long as they do not change.
    Kept,
    /// Nothing is there any more: the checkpoint may be removed.
    Done,
}

impl RestorePhase {
    /// In words, to stand behind "it is".
    pub const fn words(self) -> &'static str {
        match self {
            RestorePhase::Loading => "being loaded",
            RestorePhase::Fetching => "fetching",
            RestorePhase::TakingHome => "taking home",
            RestorePhase::Kept => "kept there",
            RestorePhase::Done => "done",
        }
    }
}
