//! `vmemd checkpoint list|show|verify|merge|remove`: what is done with an archive alone, without any VM.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use checkpoint::archive::{Archive, ArchiveError, Damage, Entry, Verified};
use checkpoint::format::DiskVersion;
use serde::Serialize;
use serde_json::json;
use swapd::units::bytes_of;
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::signals;

use super::archive_args::{MergeArgs, RemoveArgs, VerifyArgs};
use super::args::{ArchiveArgs, ArchiveCommand, NamedArgs};
use super::snapshots::{self, Looked};
use super::streams;
use super::terminal::{print, print_json, warn};
use super::work::{Work, rounded};

/// A line of `list`, and the beginning of `show`.
#[derive(Serialize)]
struct Row {
    name: String,
    vm: String,
    made_at_ms: u64,
    age_seconds: u64,
    memory_bytes: u64,
    /// Of pages that are in its own image.
    image_bytes: u64,
    /// Of pages that are in a base.
    base_bytes: u64,
    disk_bytes: Option<u64>,
    base: Option<String>,
    encrypted: bool,
}

impl Row {
    fn of(entry: &Entry) -> Row {
        let manifest = entry.manifest();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        Row {
            name: entry.name().to_owned(),
            vm: manifest.vm.name.clone(),
            made_at_ms: manifest.made_at_ms,
            age_seconds: now.saturating_sub(manifest.made_at_ms) / 1000,
            memory_bytes: manifest.vm.memory_bytes,
            image_bytes: bytes_of(manifest.pages.here),
            base_bytes: bytes_of(manifest.pages.base),
            disk_bytes: entry.disk_bytes().ok(),
            base: manifest.base.as_ref().map(|base| base.name.clone()),
            encrypted: entry.is_encrypted(),
        }
    }
}

pub(super) fn run(command: ArchiveCommand, run_dir: &Path) -> Result<(), Failure> {
    match command {
        ArchiveCommand::List(args) => list(&args),
        ArchiveCommand::Show(args) => show(&args),
        ArchiveCommand::Verify(args) => verify(&args),
        ArchiveCommand::Merge(args) => merge(&args),
        ArchiveCommand::Remove(args) => remove(&args, run_dir),
        ArchiveCommand::Export(args) => streams::export(&args),
        ArchiveCommand::Import(args) => streams::import(&args),
    }
}

fn list(args: &ArchiveArgs) -> Result<(), Failure> {
    let archive = Archive::open(&args.archive)?;
    let listing = archive.list()?;
    let rows: Vec<Row> = listing.entries.iter().map(Row::of).collect();
    if args.json.json {
        let unreadable: Vec<_> = listing
            .unreadable
            .iter()
            .map(|(name, error)| json!({ "name": name, "error": chain(error) }))
            .collect();
        return print_json(
            &json!({ "archive": archive.path(), "checkpoints": rows, "unreadable": unreadable }),
        );
    }
    for (name, error) in &listing.unreadable {
        warn(&format!("{name} is not usable: {}", chain(error)));
    }
    if rows.is_empty() {
        print(&format!("there is no checkpoint in {}", archive.path().display()));
        return Ok(());
    }
    print(&format!("{:<24} {:>6} {:>8} {:>8} {:>8}  BASE", "NAME", "AGE", "MEMORY", "SAVED", "DISK"));
    for row in rows {
        print(&format!(
            "{:<24} {:>6} {:>8} {:>8} {:>8}  {}{}",
            row.name,
            age(row.age_seconds),
            rounded(row.memory_bytes),
            rounded(row.image_bytes),
            row.disk_bytes.map_or("?".to_owned(), rounded),
            row.base.as_deref().unwrap_or("-"),
            if row.encrypted { "  encrypted" } else { "" }
        ));
    }
    Ok(())
}

fn show(args: &NamedArgs) -> Result<(), Failure> {
    let archive = Archive::open(&args.archive.archive)?;
    let entry = archive.find(args.checkpoint.as_deref())?;
    let (row, manifest) = (Row::of(&entry), entry.manifest());
    let bases = archive
        .chain(&entry)
        .map(|chain| chain.entries()[1..].iter().map(|entry| entry.name().to_owned()).collect::<Vec<_>>());
    let known_order = entry.first_faults().is_some();
    if args.archive.json.json {
        let (bases, wrong) = match &bases {
            Ok(bases) => (bases.as_slice(), None),
            Err(error) => (&[][..], Some(chain(error))),
        };
        return print_json(&json!({
            "name": row.name, "age_seconds": row.age_seconds, "disk_bytes": row.disk_bytes, "bases": bases,
            "unusable": wrong, "first_faults_known": known_order, "manifest": manifest,
        }));
    }
    let pages = manifest.pages;
    let kind = match manifest.vm.machine {
        checkpoint::format::Machine::Reference => "the reference guest",
        checkpoint::format::Machine::Qemu => "QEMU",
    };
    let line = |what: &str, text: String| print(&format!("{what:<12} {text}"));
    line("checkpoint", format!("{} ({} ago), by {}", row.name, age(row.age_seconds), manifest.made_by));
    line("id", manifest.id.to_string());
    let paused = if manifest.vm.paused { ", paused by its user" } else { "" };
    line("VM", format!("{}, {kind}, {} vCPUs{paused}", row.vm, manifest.vm.vcpus));
    line("memory", format!("{}, in {} of RAM", rounded(row.memory_bytes), rounded(manifest.vm.budget_bytes)));
    let lost =
        if pages.lost > 0 { format!(", {} lost", rounded(bytes_of(pages.lost))) } else { String::new() };
    line(
        "pages",
        format!(
            "{} here, {} in a base, {} zero{lost}",
            rounded(row.image_bytes),
            rounded(row.base_bytes),
            rounded(bytes_of(pages.zero))
        ),
    );
    if !manifest.vm.without_disks.is_empty() {
        line("without", format!("the content of its disks: {}", manifest.vm.without_disks.join(", ")));
    }
    for disk in &manifest.vm.disks {
        let text = match &disk.version {
            DiskVersion::Snapshot(snapshot) => format!("{}: snapshot {snapshot} in {}", disk.name, disk.file),
            DiskVersion::InState => format!("{}: in the state, for {}", disk.name, disk.file),
        };
        line("disk", text);
    }
    if row.encrypted {
        line("encrypted", "memory, map and state; what is shown here is not".to_owned());
    }
    line("state", rounded(manifest.parts.state.bytes));
    line("on the disk", row.disk_bytes.map_or("?".to_owned(), rounded));
    let save = manifest.save;
    line(
        "took",
        format!(
            "{:.1} s in {} rounds, the VM stood still for {:.1} ms",
            save.total_us as f64 / 1e6,
            save.rounds,
            save.pause_us as f64 / 1e3
        ),
    );
    line("order", if known_order { "known from an earlier restore" } else { "not known yet" }.to_owned());
    match bases {
        Ok(bases) if bases.is_empty() => line("bases", "none: it stands alone".to_owned()),
        Ok(bases) => line("bases", bases.join(", ")),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let key = args.key.read()?;
    signals::install()?;
    let archive = Archive::open(&args.archive)?.with_key(key);
    let (entries, unreadable) = match &args.checkpoint {
        Some(name) => (vec![archive.find(Some(name))?], Vec::new()),
        None => {
            let listing = archive.list()?;
            (listing.entries, listing.unreadable)
        }
    };
    if entries.is_empty() && unreadable.is_empty() {
        return Err(ArchiveError::Empty { path: archive.path().to_owned() }.into());
    }
    let work = Work::begin("verify");
    let verified = archive.verify(&entries, &|progress| work.show(progress));
    let took = work.end();
    let verified = verified.map_err(stopped)?;
    let disks = snapshots::look(&entries, args.without_disks);
    signals::check()?;
    let Verified { checkpoints, pages, damaged_pages, mut damage, unread } = verified;
    damage.extend(unreadable.into_iter().map(|(checkpoint, error)| Damage::File { checkpoint, error }));
    let of_disks = disks.damage.iter().map(|(checkpoint, why)| format!("{checkpoint}: {why}"));
    let texts: Vec<String> = damage.iter().map(told).chain(of_disks).collect();
    if args.json.json {
        let of_disks =
            disks.damage.iter().map(|(checkpoint, why)| json!({ "checkpoint": checkpoint, "error": why }));
        let damage = damage.iter().map(|damage| match damage {
            Damage::Page { checkpoint, page } => json!({ "checkpoint": checkpoint, "page": page.0 }),
            Damage::File { checkpoint, error } => json!({ "checkpoint": checkpoint, "error": chain(error) }),
        });
        print_json(&json!({
            "checkpoints": checkpoints, "pages": pages, "bytes": bytes_of(pages), "seconds": took,
            "damaged_pages": damaged_pages, "damage": damage.chain(of_disks).collect::<Vec<_>>(),
            "unread": unread.iter().map(ToString::to_string).collect::<Vec<_>>(), "disks_whole": disks.whole,
            "disks_not_looked_at": Looked::json(&disks.not_looked_at), "disks_not_checked": Looked::json(&disks.not_checked),
        }))?;
    } else {
        disks.tell();
    }
    if texts.is_empty() {
        if !args.json.json && (checkpoints > 0 || unread.is_empty()) {
            let what = if checkpoints == 1 { "checkpoint is" } else { "checkpoints are" };
            print(&format!("{checkpoints} {what} whole: {} read in {took:.1} s", rounded(bytes_of(pages))));
        }
        return only_looked_at(&unread);
    }
    let more =
        damaged_pages as usize - damage.iter().filter(|one| matches!(one, Damage::Page { .. })).count();
    let more = if more > 0 { format!("\n  and {more} pages more") } else { String::new() };
    Err(Failure::new(FailureKind::Damaged, format!("damaged:\n  {}{more}", texts.join("\n  "))))
}

/// Fails if checkpoints were not read for want of their key: nobody knows whether their pages are whole.
fn only_looked_at(unread: &[ArchiveError]) -> Result<(), Failure> {
    if unread.is_empty() {
        return Ok(());
    }
    let each: Vec<String> = unread.iter().map(ToString::to_string).collect();
    let text = format!(
        "not all was read: of these only the lengths, and the checksums of map and state as they are encrypted, were \
         compared:\n  {}",
        each.join("\n  ")
    );
    Err(Failure::new(FailureKind::Usage, text))
}

fn told(damage: &Damage) -> String {
    match damage {
        Damage::Page { checkpoint, page } => format!("{checkpoint}: {page} is not what was saved"),
        Damage::File { checkpoint, error } => format!("{checkpoint}: {}", chain(error)),
    }
}

fn merge(args: &MergeArgs) -> Result<(), Failure> {
    let key = args.key.read()?;
    signals::install()?;
    let archive = Archive::open(&args.archive)?.with_key(key).lock()?;
    let work = Work::begin("merge");
    let merged = archive.merge(&args.checkpoint, &|progress| work.show(progress));
    let took = work.end();
    let merged = merged.map_err(stopped)?;
    if args.json.json {
        return print_json(&json!({
            "name": args.checkpoint, "shared_bytes": bytes_of(merged.shared), "copied_bytes": bytes_of(merged.copied),
            "seconds": took,
        }));
    }
    print(&format!(
        "{} stands alone: {} copied, {} shared, in {took:.1} s",
        args.checkpoint,
        rounded(bytes_of(merged.copied)),
        rounded(bytes_of(merged.shared))
    ));
    Ok(())
}

fn remove(args: &RemoveArgs, run_dir: &Path) -> Result<(), Failure> {
    let archive = Archive::open(&args.archive)?.lock()?;
    let before = archive.list()?;
    archive.remove(&args.checkpoint)?;
    let deleted = match args.leave_snapshots {
        true => None,
        false => Some(snapshots::delete_gone(&archive, &before, run_dir)?),
    };
    if args.json.json {
        return print_json(&json!({ "name": args.checkpoint, "removed": true, "snapshots": deleted }));
    }
    print(&format!("{} is gone", args.checkpoint));
    if let Some(gone) = deleted.and_then(|deleted| deleted.summary()) {
        print(&format!("with the snapshots {gone}"));
    }
    Ok(())
}

/// Ctrl-C is told as itself.
fn stopped(error: ArchiveError) -> Failure {
    match (&error, signals::caught()) {
        (ArchiveError::Cancelled, Some(signal)) => signals::interrupted(signal),
        _ => error.into(),
    }
}

/// A time as one reads it at a glance: its largest unit alone.
fn age(seconds: u64) -> String {
    let units = [("d", 86_400), ("h", 3600), ("min", 60)];
    let found = units.into_iter().find(|(_, unit)| seconds >= 2 * unit);
    found.map_or(format!("{seconds}s"), |(name, unit)| format!("{}{name}", seconds / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        for (seconds, text) in [(0, "0s"), (119, "119s"), (120, "2min"), (7200, "2h"), (400_000, "4d")] {
            assert_eq!(age(seconds), text);
        }
    }
}
