//! A restored VM's disks: those of the checkpoint's moment, or what the user says instead.
//!
//! A disk's file is by then what the VM has made of it since, and may be another VM's that still runs. So nothing of it
//! is taken by itself: the user says whether each disk is to be copied as it was, or put back as it was.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use checkpoint::format::{Disk, DiskVersion};
use tracing::info;
use vmprocess::failure::{Failure, FailureKind};

use super::binary;

/// Which disks a restored VM is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DisksWanted {
    /// Nothing was said: only a VM without disks can be restored.
    #[default]
    Unsaid,
    /// Copies of the disks as they were, in this directory.
    Copies(PathBuf),
    /// The disks themselves, put back to what they were: what was written to them since is lost.
    Back,
    /// The disks as they are now.
    AsTheyAre,
}

/// The work on one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// `from` as it was at `snapshot` becomes a new file.
    Extract { from: String, snapshot: String, to: String },
    /// A file as it is becomes a new one: its content comes with the state.
    Copy { from: String, to: String },
    /// The file becomes what it was at `snapshot`.
    Back { file: String, snapshot: String },
}

impl Work {
    /// The old and the new name of the disk, if it has a new one.
    pub(super) fn renamed(&self) -> Option<(String, String)> {
        match self {
            Work::Extract { from, to, .. } | Work::Copy { from, to } => Some((from.clone(), to.clone())),
            Work::Back { .. } => None,
        }
    }
}

/// The work on a checkpoint's disks, for a VM of that name; `named` are those of its command line.
///
/// # Errors
/// If the user has not said what is needed, or it cannot be had.
pub(super) fn plan(
    (disks, left_out): (&[Disk], &[String]),
    wanted: &DisksWanted,
    name: &str,
    named: &[PathBuf],
) -> Result<Vec<Work>, Failure> {
    let usage = |text: String| Err(Failure::new(FailureKind::Usage, text));
    let all = || {
        let disks = disks.iter().map(|disk| format!("{}: {}", disk.name, disk.file));
        disks.chain(left_out.iter().cloned()).collect::<Vec<_>>().join(", ")
    };
    match wanted {
        DisksWanted::AsTheyAre => return Ok(Vec::new()),
        DisksWanted::Unsaid
            if left_out.is_empty() && disks.iter().all(|disk| disk.version == DiskVersion::InState) =>
        {
            return Ok(Vec::new());
        }
        DisksWanted::Unsaid => {
            return usage(format!(
                "the VM has disks, which are not what they were at the checkpoint: {}. Say which it is to have: copies of them as they \
                 were (--disk-copies DIR), themselves as they were, without what was written since (--disks-back), or \
                 as they are now, though its memory is of another moment (--disks-as-they-are)",
                all()
            ));
        }
        DisksWanted::Copies(_) | DisksWanted::Back => {}
    }
    if !left_out.is_empty() {
        return usage(format!(
            "the checkpoint was made without disks: nobody has {} as it was then. --disks-as-they-are takes what is there, though its \
             guest's memory is of another moment",
            left_out.join(", ")
        ));
    }
    let mut work = Vec::new();
    for disk in disks {
        let (from, version) = (disk.file.clone(), &disk.version);
        if !named.iter().any(|path| path.as_os_str() == from.as_str()) {
            return usage(format!("disk {} was in {from}, which the command line does not name", disk.name));
        }
        work.extend(match (wanted, version) {
            (DisksWanted::Copies(dir), DiskVersion::Snapshot(snapshot)) => {
                Some(Work::Extract { from, snapshot: snapshot.clone(), to: copy_of(disk, name, dir)? })
            }
            (DisksWanted::Copies(dir), _) => Some(Work::Copy { from, to: copy_of(disk, name, dir)? }),
            (_, DiskVersion::Snapshot(snapshot)) => {
                Some(Work::Back { file: from, snapshot: snapshot.clone() })
            }
            _ => None,
        });
    }
    Ok(work)
}

/// The name of a disk's copy, which no file has yet.
fn copy_of(disk: &Disk, name: &str, dir: &Path) -> Result<String, Failure> {
    // No name leads out of the directory.
    let plain = |name: &str| -> String {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        name.trim_start_matches('/').chars().map(|c| if fits(c) { c } else { '-' }).collect()
    };
    let path = dir.join(format!("{name}-{}.{}", plain(&disk.name), plain(&disk.format)));
    let Some(text) = path.to_str() else {
        return Err(Failure::new(FailureKind::Usage, format!("{} is not UTF-8: rename it", path.display())));
    };
    if path.exists() {
        let text = format!("disk {}: {text} exists already: remove it, or name another directory", disk.name);
        return Err(Failure::new(FailureKind::Usage, text));
    }
    Ok(text.to_owned())
}

/// Makes the disks. Those that were made are removed again if one cannot be; one that was put back stays so.
///
/// # Errors
/// In qemu-img's words.
pub(super) fn make(work: &[Work], binary: &Path, path: &OsStr) -> Result<(), Failure> {
    if work.is_empty() {
        return Ok(());
    }
    let qemu_img = tool("qemu-img", binary, path)?;
    let mut made: Vec<&str> = Vec::new();
    for one in work {
        let done = match one {
            Work::Extract { from, snapshot, to } => {
                made.push(to);
                info!(disk = %from, %snapshot, %to, "copying the disk as it was");
                // -U: another VM may have it open; a snapshot's clusters do not change under it.
                let snapshot = format!("snapshot.name={snapshot}");
                run(&qemu_img, &["convert", "-U", "-l", &snapshot, "-O", "qcow2", from, to])
            }
            Work::Copy { from, to } => {
                made.push(to);
                let copied = std::fs::copy(from, to).map(drop);
                copied.map_err(|error| Failure::io(format!("copying {from} to {to}"), &error))
            }
            Work::Back { file, snapshot } => {
                info!(disk = %file, %snapshot, "putting the disk back");
                run(&qemu_img, &["snapshot", "-a", snapshot, file])
            }
        };
        if let Err(failure) = done {
            for file in made {
                let _ = std::fs::remove_file(file);
            }
            return Err(failure);
        }
    }
    Ok(())
}

/// As `qemu-img` and QEMU are installed together.
fn tool(name: &str, qemu: &Path, path: &OsStr) -> Result<PathBuf, Failure> {
    let beside = qemu.parent().map(|dir| dir.join(name)).filter(|tool| crate::program::is_program(tool));
    beside.map_or_else(|| binary::find(name, path), Ok).map_err(|failure| {
        let text =
            format!("{name} is needed for the checkpoint's disks (Debian: qemu-utils): {}", failure.text);
        Failure::new(FailureKind::Host, text)
    })
}

fn run(program: &Path, arguments: &[&str]) -> Result<(), Failure> {
    let ran = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let ran = ran.map_err(|error| Failure::io(format!("cannot start {}", program.display()), &error))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    let text = format!("the disks are not as they were: {}", super::words::one_line(said.trim()));
    Err(Failure::new(FailureKind::Host, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, file: &str, version: DiskVersion) -> Disk {
        Disk { name: name.to_owned(), file: file.to_owned(), format: "qcow2".to_owned(), version }
    }

    #[test]
    fn nothing_is_taken_that_was_not_asked_for() {
        let snapshot = || DiskVersion::Snapshot("s".to_owned());
        let disks = [disk("d0", "/d0", snapshot()), disk("pflash0", "/vars", DiskVersion::InState)];
        let named = [PathBuf::from("/d0"), "/vars".into(), "/iso".into()];
        let plan = |disks: &[Disk], wanted: DisksWanted| plan((disks, &[]), &wanted, "web", &named);
        let refused = |disks: &[Disk], wanted| plan(disks, wanted).unwrap_err().text;

        let text = refused(&disks, DisksWanted::Unsaid);
        assert!(text.contains("d0: /d0") && text.contains("--disk-copies DIR"), "{text}");
        assert_eq!(plan(&disks[1..], DisksWanted::Unsaid), Ok(Vec::new()));
        assert_eq!(plan(&disks, DisksWanted::AsTheyAre), Ok(Vec::new()));
        let back = Work::Back { file: "/d0".to_owned(), snapshot: "s".to_owned() };
        assert_eq!(plan(&disks, DisksWanted::Back), Ok(vec![back]));
        let to = |name: &str| format!("/nowhere/web-{name}.qcow2");
        let copies = [
            Work::Extract { from: "/d0".to_owned(), snapshot: "s".to_owned(), to: to("d0") },
            Work::Copy { from: "/vars".to_owned(), to: to("pflash0") },
        ];
        assert_eq!(plan(&disks, DisksWanted::Copies("/nowhere".into())), Ok(copies.to_vec()));

        let left = ["d0: /d0".to_owned()];
        let refused_left = |wanted| super::plan((&[], &left), &wanted, "web", &named).unwrap_err().text;
        assert!(refused_left(DisksWanted::Back).contains("made without disks: nobody has d0"));
        assert!(refused_left(DisksWanted::Unsaid).contains("d0: /d0"));
        let gone = [disk("d1", "/d1", snapshot())];
        assert!(
            refused(&gone, DisksWanted::Back).contains("disk d1 was in /d1, which the command line does not")
        );
        // A name that would lead elsewhere does not.
        let strange = [disk("/machine/../x", "/d0", snapshot())];
        let made = plan(&strange, DisksWanted::Copies("/nowhere".into())).unwrap();
        assert_eq!(made[0].renamed(), Some(("/d0".to_owned(), to("machine-..-x"))));
    }
}
