//! `vmemd checkpoint NAME`: has the archive, passes the VM's process the files, and makes a checkpoint of what it has
//! written.
//!
//! Nothing has a name before all of it is durable. What this command leaves behind when it is killed is removed by the
//! next one, and the VM's process sees the connection close, and goes on as before. From the rename on there is a
//! checkpoint: nothing that fails behind it cancels, for that would take the snapshots of its disks.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use checkpoint::archive::{Archive, ArchiveError, Chain, Entry, Kept, Locked, MAX_CHAIN, Made, Pending};
use checkpoint::format::{Disk, DiskVersion, Machine, Save, VmFacts};
use checkpoint::save::{PauseParts, Phase, Saved};
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::{Value, json};
use swapd::units::{bytes_of, pages_in};
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{CheckpointBase, CheckpointRequest, CheckpointStat, VmStat};
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::signals;
use vmprocess::size::Size;

use super::args::MakeArgs;
use super::snapshots::{self, Deleted};
use super::terminal::{bar, print, print_json, say, warn};
use super::values::{BaseArg, read_key};
use super::vms;

/// Highest share of time for which a guest is held back so that the checkpoint ends.
const THROTTLE_MAX: u8 = 99;
/// How long a cancelled checkpoint may take to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);
/// Room for what is not pages: the state of vCPUs and devices, and what a file system needs itself.
const REST_BYTES: u64 = 16 << 20;
/// Of a map, a page with content.
const MAP_BYTES_A_PAGE: u64 = 9;

/// What the VM's process tells when it has written all.
#[derive(Deserialize)]
struct Report {
    saved: Saved,
    vm: Told,
}

/// The VM's own account of itself.
#[derive(Deserialize)]
struct Told {
    memory_bytes: u64,
    budget_bytes: u64,
    vcpus: u32,
    machine: Machine,
    offer: Option<String>,
    paused: bool,
    disks: Vec<Disk>,
    without_disks: Vec<String>,
}

/// What was made, for a person or a program.
struct Done {
    entry: Entry,
    base: Option<String>,
    saved: Saved,
    total: Duration,
    kept: Option<(Kept, Option<Deleted>)>,
}

/// Why a checkpoint was not made as it should be.
enum Unmade {
    /// There is none.
    No(Failure),
    /// There is one, which may be gone after a power failure.
    NotFlushed(Failure),
}

impl From<ArchiveError> for Unmade {
    fn from(error: ArchiveError) -> Unmade {
        match error {
            ArchiveError::NotFlushed { .. } => Unmade::NotFlushed(error.into()),
            error => Unmade::No(error.into()),
        }
    }
}

impl From<Failure> for Unmade {
    fn from(failure: Failure) -> Unmade {
        Unmade::No(failure)
    }
}

pub(super) fn checkpoint(dir: &RunDir, args: &MakeArgs) -> Result<(), Failure> {
    if let Some(rate) = args.rate.filter(|rate| rate.bytes() == 0) {
        let text = format!("--rate {rate}: nothing would ever be saved; leave --rate out for no limit");
        return Err(Failure::new(FailureKind::Usage, text));
    }
    let key = args.encrypt_to.as_deref().map(read_key).transpose()?;
    signals::install()?;
    let began = Instant::now();
    let mut vm = VmClient::connect(dir, &args.name)?;
    let stat = vm.stat()?;
    let archive = Archive::create(&args.to)?.with_key(key).lock()?;
    archive.clean()?;
    is_meant(&archive, args)?;
    let base = base(&archive, args)?;
    has_room(&archive, &stat, base.as_ref(), args)?;
    let memory_bytes = stat.memory.memory_bytes;
    let mut pending = archive.new_checkpoint(&args.name, memory_bytes, base.as_ref())?;
    let (entry, report) = make(&mut vm, &mut pending, base.as_ref(), args)
        .map_err(Unmade::No)
        .and_then(|report| finish(pending, &args.name, report, began))
        .map_err(|unmade| match unmade {
            Unmade::No(failure) => ended(&args.name, &mut vm, failure),
            // Cancelled, its disks' snapshots would go. The VM's process sees the connection close, and keeps them.
            Unmade::NotFlushed(failure) => failure,
        })?;
    let total = began.elapsed();
    let disk_bytes = entry.disk_bytes().unwrap_or_default();
    if let Err(failure) = vm.checkpointed(entry.name(), disk_bytes) {
        // There is a checkpoint all the same.
        warn(&format!("{failure}: the checkpoint {} is whole", entry.name()));
    }
    let behind = |what: &str, failure: Failure| behind(entry.name(), what, failure);
    let stopped = if args.stop { vms::end(dir, &args.name).map(|_| ()) } else { Ok(()) };
    let stopped =
        stopped.map_err(|failure| behind(&format!("{:?} could not be stopped", args.name), failure));
    let made_at_ms = entry.manifest().made_at_ms;
    if made_at_ms > report.saved.made_at_ms {
        warn(&format!(
            "the clock is behind that of the checkpoint before: {} is named by a time {} s ahead, so that it is the latest",
            entry.name(),
            (made_at_ms - report.saved.made_at_ms).div_ceil(1000)
        ));
    }
    let kept = args.keep.map(|count| keep(&archive, count, (entry.name(), args, dir))).transpose();
    let kept = kept.map_err(|failure| behind("the older ones could not all be removed", failure));
    let base = entry.manifest().base.as_ref().map(|base| base.name.clone());
    let (kept, keep_failed) = match kept {
        Ok(kept) => (kept, Ok(())),
        Err(failure) => (None, Err(failure)),
    };
    let done = Done { entry, base, saved: report.saved, total, kept };
    if args.json {
        print_json(&done.json(&args.to, disk_bytes))?;
    } else {
        print(&done.summary(&args.name, disk_bytes));
    }
    stopped.and(keep_failed)
}

/// Whoever has encrypted checkpoints, and forgets the key once, is not to have a plain one beside them.
fn is_meant(archive: &Locked, args: &MakeArgs) -> Result<(), Failure> {
    if args.encrypt_to.is_some() || args.plain {
        return Ok(());
    }
    match archive.list()?.entries.first().filter(|latest| latest.is_encrypted()) {
        None => Ok(()),
        Some(latest) => {
            let text = format!(
                "{}, the latest checkpoint, is encrypted: name its key (--encrypt-to KEYFILE), or give --plain to have \
                 this one written as it is",
                latest.name()
            );
            Err(Failure::new(FailureKind::Usage, text))
        }
    }
}

/// The checkpoint with which the new one is compared.
fn base(archive: &Locked, args: &MakeArgs) -> Result<Option<Chain>, Failure> {
    let wanted = &args.base;
    let entry = match wanted {
        BaseArg::None => return Ok(None),
        BaseArg::Name(name) => archive.find(Some(name))?,
        BaseArg::Latest => match archive.find(None) {
            Err(ArchiveError::Empty { .. }) => return Ok(None),
            found => found?,
        },
    };
    if matches!(wanted, BaseArg::Latest) && !shares_key(&entry, args)? {
        say(&format!(
            "{} is not encrypted with the same key, or not at all: this checkpoint has all pages itself",
            entry.name()
        ));
        return Ok(None);
    }
    let chain = archive.chain(&entry)?;
    if matches!(wanted, BaseArg::Latest) && chain.entries().len() >= MAX_CHAIN {
        say(&format!("{} stands on too many others: this checkpoint has all pages itself", entry.name()));
        return Ok(None);
    }
    Ok(Some(chain))
}

/// Whether the new checkpoint and that one can have pages in common.
fn shares_key(entry: &Entry, args: &MakeArgs) -> Result<bool, Failure> {
    match entry.chain_key() {
        Ok(key) => Ok(key.is_some() == args.encrypt_to.is_some()),
        Err(ArchiveError::KeyNeeded { .. } | ArchiveError::WrongKey { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Refuses what cannot fit. Against a base, or where blocks may be shared, nobody knows before.
fn has_room(archive: &Archive, stat: &VmStat, base: Option<&Chain>, args: &MakeArgs) -> Result<(), Failure> {
    if base.is_some() {
        return Ok(());
    }
    let shares = args.encrypt_to.is_none() && archive.shares_blocks();
    let stored = if shares { 0 } else { stat.memory.stored_bytes };
    let pages = stat.memory.resident_bytes + stored;
    let need = pages + pages_in(pages) * MAP_BYTES_A_PAGE + REST_BYTES;
    let free = archive.free_bytes()?;
    if free >= need {
        return Ok(());
    }
    let text = format!(
        "no room in {}: a checkpoint of {:?} takes up to {:#}, and {:#} are free: make room, remove older ones (`vmemd \
         checkpoint remove`, --keep), or save against one (--base latest)",
        archive.path().display(),
        stat.name,
        Size(need),
        Size(free)
    );
    Err(Failure::new(FailureKind::Resources, text))
}

/// Has the VM saved into the files.
fn make(
    vm: &mut VmClient,
    pending: &mut Pending<'_>,
    base: Option<&Chain>,
    args: &MakeArgs,
) -> Result<Report, Failure> {
    let cloned = base.map(|base| pending.share_base(base)).transpose()?;
    let base_map = base.map(|base| base.top().map_file()).transpose()?;
    let request = CheckpointRequest {
        downtime_target_ms: (args.downtime_target.as_millis() as u64).max(1),
        max_rounds: args.max_rounds,
        max_throttle: if args.no_throttle { 0 } else { THROTTLE_MAX },
        rate: args.rate.map(Size::bytes),
        base: cloned.map(|cloned| if cloned { CheckpointBase::Cloned } else { CheckpointBase::Apart }),
        stop: args.stop,
        without_disks: args.without_disks,
        plain: args.plain,
        encrypted: pending.key().is_some(),
    };
    let key = pending.key().map(|key| key.to_pipe()).transpose();
    let key = key.map_err(|error| Failure::io("passing the key to the VM's process", &error))?;
    let files = [pending.image(), pending.map(), pending.state()];
    let files: Vec<&File> = files.into_iter().chain(&base_map).chain(&key).collect();
    let bar = Bar(bar(&args.name));
    let report = vm.checkpoint(&request, &files, &mut |stat| bar.show(&stat))?;
    serde_json::from_value(report).map_err(|error| {
        Failure::new(FailureKind::Other, format!("the VM {:?} runs another vmemd: {error}", args.name))
    })
}

/// Makes a checkpoint of the files. From the rename on there is one, whatever comes.
fn finish(
    pending: Pending<'_>,
    name: &str,
    report: Report,
    began: Instant,
) -> Result<(Entry, Report), Unmade> {
    let bar = bar(name);
    bar.set_message("making it durable");
    for file in [pending.image(), pending.map(), pending.state()] {
        file.sync_all().map_err(|error| Failure::io("the checkpoint cannot be made durable", &error))?;
        signals::check()?;
    }
    let Report { saved, vm } = &report;
    let made = Made {
        made_at_ms: saved.made_at_ms,
        made_by: concat!("vmemd ", env!("CARGO_PKG_VERSION")).to_owned(),
        vm: VmFacts {
            name: name.to_owned(),
            memory_bytes: vm.memory_bytes,
            vcpus: vm.vcpus,
            machine: vm.machine,
            offer: vm.offer.clone(),
            budget_bytes: vm.budget_bytes,
            paused: vm.paused,
            disks: vm.disks.clone(),
            without_disks: vm.without_disks.clone(),
        },
        save: Save {
            pause_us: (saved.pause_ms * 1000.0) as u64,
            total_us: began.elapsed().as_micros() as u64,
            rounds: saved.rounds,
            bytes_saved: saved.bytes_written,
        },
    };
    let entry = pending.finish(made)?;
    bar.finish_and_clear();
    Ok((entry, report))
}

/// There is no checkpoint. Waits until the VM's process has seen that, and goes on: it says where the VM is.
fn ended(name: &str, vm: &mut VmClient, failure: Failure) -> Failure {
    let interrupted = failure.kind == FailureKind::Interrupted && signals::caught().is_some();
    match vm.cancel(CANCEL_TIMEOUT) {
        Err(said) if interrupted && said.kind == FailureKind::Interrupted => said,
        Err(said) if interrupted && said.kind == FailureKind::Other => Failure::new(
            FailureKind::Interrupted,
            format!("asked to cancel, but {name:?} may still be at it ({said})"),
        ),
        _ => failure,
    }
}

/// What the new checkpoint was to be followed by has failed. Whoever only looks at the exit code is not to take it for
/// a checkpoint that was not made.
fn behind(name: &str, what: &str, failure: Failure) -> Failure {
    let kind = match failure.kind {
        FailureKind::Interrupted => FailureKind::Interrupted,
        _ => FailureKind::Behind,
    };
    Failure::new(kind, format!("the new checkpoint {name} is whole and durable, but {what}: {failure}"))
}

/// Removes older checkpoints, and their disks' snapshots: also of those that were removed before something failed.
fn keep(
    archive: &Locked,
    count: u32,
    (made, args, dir): (&str, &MakeArgs, &RunDir),
) -> Result<(Kept, Option<Deleted>), Failure> {
    let before = archive.list()?;
    let kept = archive.keep(count as usize, Some(made), &|_| signals::caught().is_none());
    let deleted = match args.leave_snapshots {
        true => None,
        false => Some(snapshots::delete_gone(archive, &before, dir.path())?),
    };
    let kept = kept?;
    for name in &kept.in_use {
        say(&format!("{name} stays: a VM that was restored from it still uses it"));
    }
    Ok((kept, deleted))
}

impl Done {
    fn json(&self, archive: &Path, disk_bytes: u64) -> Value {
        let mut value = serde_json::to_value(&self.saved).unwrap_or_default();
        value["checkpoint"] = self.entry.name().into();
        value["archive"] = archive.display().to_string().into();
        value["base"] = json!(self.base);
        value["encrypted"] = self.entry.is_encrypted().into();
        value["disk_bytes"] = disk_bytes.into();
        value["total_ms"] = (self.total.as_secs_f64() * 1000.0).into();
        value["disks"] = json!(self.entry.manifest().vm.disks);
        value["without_disks"] = json!(self.entry.manifest().vm.without_disks);
        if let Some((Kept { merged, removed, in_use }, snapshots)) = &self.kept {
            value["kept"] =
                json!({ "merged": merged, "removed": removed, "in_use": in_use, "snapshots": snapshots });
        }
        value
    }

    fn summary(&self, name: &str, disk_bytes: u64) -> String {
        let Saved { pages, pause_ms, pause_parts, rounds, downtime_target_ms, .. } = self.saved;
        let saved = &self.saved;
        let size = |bytes: u64| format!("{:#}", Size(bytes));
        let mut text = format!(
            "{name} is saved as {}\n  written    {} of {} memory, in {rounds} rounds\n  \
             took       {:.2} s until it was durable; {name} stood still for {pause_ms:.1} ms\n  \
             pages      {} here, {} in a base, {} zero\n  on disk    {}",
            self.entry.name(),
            size(saved.bytes_written),
            size(saved.bytes_total),
            self.total.as_secs_f64(),
            size(bytes_of(pages.here)),
            size(bytes_of(pages.base)),
            size(bytes_of(pages.zero)),
            size(disk_bytes),
        );
        if saved.pages_shared > 0 {
            text += &format!(", {} of it shared with the store", size(bytes_of(saved.pages_shared)));
        }
        if let Some(base) = &self.base {
            text += &format!("\n  base       {base}");
        }
        if self.entry.is_encrypted() {
            text += "\n  encrypted  nobody restores it without the key: keep a copy of the key elsewhere";
        }
        text += &format!("\n  pause      {}", parts(&pause_parts));
        if pause_ms > downtime_target_ms && !saved.stood_still {
            text += &format!("\n  missed     the downtime target of {downtime_target_ms:.0} ms");
        }
        if saved.throttle_max_percent > 0 {
            text += &format!("\n  throttle   up to {} %", saved.throttle_max_percent);
        }
        if pages.lost > 0 {
            text += &format!("\n  lost       {} pages: the store did not give them back", pages.lost);
        }
        for disk in &self.entry.manifest().vm.disks {
            if let DiskVersion::Snapshot(snapshot) = &disk.version {
                text += &format!("\n  disk       {}: snapshot {snapshot} in {}", disk.name, disk.file);
            }
        }
        let disks = &self.entry.manifest().vm.without_disks;
        if !disks.is_empty() {
            text += &format!("\n  no disks   the content of these is not in it: {}", disks.join(", "));
        }
        if let Some(kept) = self.kept.as_ref().filter(|(kept, _)| !kept.removed.is_empty()) {
            let (kept, snapshots) = kept;
            text += &format!("\n  removed    {}", kept.removed.join(", "));
            if let Some(gone) = snapshots.as_ref().and_then(Deleted::summary) {
                text += &format!("\n             with the snapshots {gone}");
            }
        }
        text
    }
}

fn parts(parts: &PauseParts) -> String {
    let parts = parts.named().map(|(part, took)| format!("{part} {took:.1}"));
    format!("{} ms", parts.join(", "))
}

/// The progress bar, cleared however the work ends.
struct Bar(ProgressBar);

impl Bar {
    fn show(&self, stat: &CheckpointStat) {
        self.0.set_length(stat.bytes_total.max(1));
        self.0.set_position(stat.bytes_done.min(stat.bytes_total));
        let phase = match stat.phase {
            Phase::Copying => "copying",
            Phase::Converging => "converging",
            Phase::Stopped => "stopped",
            Phase::Finishing => "finishing",
        };
        let mut message = format!("{:#}/s  {phase}", Size(stat.bytes_per_second));
        if stat.round > 1 {
            message += &format!(", round {}, {:#} left", stat.round, Size(stat.bytes_left));
        }
        if let Some(left) = stat.bytes_left.checked_div(stat.bytes_per_second) {
            message += &format!(", {left} s");
        }
        if stat.throttle_percent > 0 {
            message += &format!(", guest held back {} %", stat.throttle_percent);
        }
        self.0.set_message(message);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
