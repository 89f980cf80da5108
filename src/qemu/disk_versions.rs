//! A restored VM's disks: those of the checkpoint's moment, or what the user says instead.
//!
//! A disk's file is by then what the VM has made of it since, and may be another VM's that still runs. So nothing of it
//! is taken by itself: the user says whether each disk is to be copied as it was, or put back as it was.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use checkpoint::format::{Disk, DiskVersion};
use tracing::info;
use vmprocess::failure::{Failure, FailureKind};

use super::img::Img;

/// How the name of the snapshot begins that a disk gets before it is put back.
const BEFORE: &str = "vmemd-before-";

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

    fn back(&self) -> Option<(&str, &str)> {
        match self {
            Work::Back { file, snapshot } => Some((file, snapshot)),
            Work::Extract { .. } | Work::Copy { .. } => None,
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
                Some(Work::Extract { from, snapshot: snapshot.clone(), to: copy_of(disk, name, dir, &work)? })
            }
            (DisksWanted::Copies(dir), _) => Some(Work::Copy { from, to: copy_of(disk, name, dir, &work)? }),
            (_, DiskVersion::Snapshot(snapshot)) => {
                Some(Work::Back { file: from, snapshot: snapshot.clone() })
            }
            _ => None,
        });
    }
    Ok(work)
}

/// The name of a disk's copy, which no file has yet, and none of the other copies.
fn copy_of(disk: &Disk, name: &str, dir: &Path, others: &[Work]) -> Result<String, Failure> {
    // No name leads out of the directory.
    let plain = |name: &str| -> String {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        name.trim_start_matches('/').chars().map(|c| if fits(c) { c } else { '-' }).collect()
    };
    let others: Vec<String> = others.iter().filter_map(Work::renamed).map(|(_, to)| to).collect();
    for number in 1.. {
        let number = if number == 1 { String::new() } else { format!("-{number}") };
        let path = dir.join(format!("{name}-{}{number}.{}", plain(&disk.name), plain(&disk.format)));
        let Some(text) = path.to_str() else {
            let text = format!("{} is not UTF-8: rename it", path.display());
            return Err(Failure::new(FailureKind::Usage, text));
        };
        if others.iter().any(|other| other == text) {
            continue;
        }
        // A link that leads nowhere is there, too.
        if path.symlink_metadata().is_ok() {
            let text =
                format!("disk {}: {text} exists already: remove it, or name another directory", disk.name);
            return Err(Failure::new(FailureKind::Usage, text));
        }
        return Ok(text.to_owned());
    }
    unreachable!("some number is free")
}

/// The work, which has been found possible. Nothing has been done.
pub(super) struct Checked<'a> {
    work: &'a [Work],
    qemu_img: Img,
}

/// Copies that were made, and are removed again unless a QEMU is started with them.
#[derive(Default)]
pub(super) struct Made(Vec<String>);

impl Drop for Made {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Looks whether each disk has its snapshot.
///
/// # Errors
/// If one has it not, or qemu-img is missing or cannot read a disk.
pub(super) fn check<'a>(work: &'a [Work], binary: &Path, path: &OsStr) -> Result<Checked<'a>, Failure> {
    if work.is_empty() {
        return Ok(Checked { work, qemu_img: Img::none() });
    }
    let qemu_img = Img::beside(binary, path)?;
    for one in work {
        let (Work::Extract { from: file, snapshot, .. } | Work::Back { file, snapshot }) = one else {
            continue;
        };
        if !qemu_img.snapshots(file).map_err(not_as_they_were)?.contains(snapshot) {
            let text =
                format!("{file} has no snapshot {snapshot} any more: nobody has this disk as it was then");
            return Err(Failure::new(FailureKind::Damaged, text));
        }
    }
    Ok(Checked { work, qemu_img })
}

impl Checked<'_> {
    /// Makes the disks. Before any is put back, each that will be gets a snapshot of what it is.
    ///
    /// # Errors
    /// In qemu-img's words. Copies that were made are removed again; of a disk that was put back it is told how to undo
    /// that.
    pub(super) fn make(&self) -> Result<Made, Failure> {
        let mut made = Made::default();
        for one in self.work {
            match one {
                Work::Extract { from, snapshot, to } => {
                    create(to, &mut made)?;
                    info!(disk = %from, %snapshot, %to, "copying the disk as it was");
                    // Onto the file that is there, which is ours. -U: another VM may have the disk open; a snapshot's
                    // clusters do not change under it.
                    let snapshot = format!("snapshot.name={snapshot}");
                    run(&self.qemu_img, &["convert", "-U", "-l", &snapshot, "-O", "qcow2", from, to])?;
                }
                Work::Copy { from, to } => {
                    let mut file = create(to, &mut made)?;
                    let copied = File::open(from).and_then(|mut from| std::io::copy(&mut from, &mut file));
                    copied.map_err(|error| Failure::io(format!("copying {from} to {to}"), &error))?;
                }
                Work::Back { .. } => {}
            }
        }
        self.put_back().map(|()| made)
    }

    fn put_back(&self) -> Result<(), Failure> {
        let back: Vec<(&str, &str)> = self.work.iter().filter_map(Work::back).collect();
        if back.is_empty() {
            return Ok(());
        }
        let before = format!("{BEFORE}{}", UNIX_EPOCH.elapsed().unwrap_or_default().as_millis());
        for (at, (file, _)) in back.iter().enumerate() {
            run(&self.qemu_img, &["snapshot", "-c", &before, file]).inspect_err(|_| {
                for (file, _) in &back[..at] {
                    let _ = run(&self.qemu_img, &["snapshot", "-d", &before, file]);
                }
            })?;
        }
        for (at, (file, snapshot)) in back.iter().enumerate() {
            info!(disk = %file, %snapshot, %before, "putting the disk back; what it was until now is in the snapshot `before`");
            run(&self.qemu_img, &["snapshot", "-a", snapshot, file]).map_err(|failure| {
                let done: Vec<&str> = back[..=at].iter().map(|(file, _)| *file).collect();
                let text = format!(
                    "{}; to undo it: qemu-img snapshot -a {before} FILE, of {}",
                    failure.text,
                    done.join(", ")
                );
                Failure::new(failure.kind, text)
            })?;
        }
        Ok(())
    }
}

/// Makes an empty file that nobody else reads. What is there already is left alone, a link to somewhere else as well.
fn create(to: &str, made: &mut Made) -> Result<File, Failure> {
    let mut options = File::options();
    let options = options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(to).map_err(|error| Failure::io(format!("making {to}"), &error))?;
    made.0.push(to.to_owned());
    Ok(file)
}

fn run(qemu_img: &Img, arguments: &[&str]) -> Result<(), Failure> {
    qemu_img.run(arguments).map(drop).map_err(not_as_they_were)
}

fn not_as_they_were(failure: Failure) -> Failure {
    Failure { text: format!("the disks are not as they were: {}", failure.text), ..failure }
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
        // Two disks with one name, once it is a plain one.
        let twins = [disk("a/b", "/d0", snapshot()), disk("a:b", "/vars", DiskVersion::InState)];
        let made = plan(&twins, DisksWanted::Copies("/nowhere".into())).unwrap();
        let names: Vec<String> = made.iter().filter_map(Work::renamed).map(|(_, to)| to).collect();
        assert_eq!(names, [to("a-b"), to("a-b-2")]);
        // A name that would lead elsewhere does not.
        let strange = [disk("/machine/../x", "/d0", snapshot())];
        let made = plan(&strange, DisksWanted::Copies("/nowhere".into())).unwrap();
        assert_eq!(made[0].renamed(), Some(("/d0".to_owned(), to("machine-..-x"))));
    }

    #[test]
    fn only_what_was_made_here_is_removed() {
        let place = testkit::directory("copies");
        let file = |name: &str| place.path().join(name).display().to_string();
        std::fs::write(file("from"), "firmware").unwrap();
        std::fs::write(file("theirs"), "theirs").unwrap();
        std::os::unix::fs::symlink(file("theirs"), file("link")).unwrap();
        for taken in ["theirs", "link"] {
            let copy = |to: &str| Work::Copy { from: file("from"), to: file(to) };
            let work = [copy("made"), copy(taken)];
            let checked = Checked { work: &work, qemu_img: Img::none() };
            assert!(checked.make().is_err());
            assert_eq!(std::fs::read_to_string(file("theirs")).unwrap(), "theirs");
            assert!(!Path::new(&file("made")).exists());
        }
        let work = [Work::Copy { from: file("from"), to: file("made") }];
        let made = Checked { work: &work, qemu_img: Img::none() }.make().unwrap();
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(file("made")).unwrap().permissions());
        assert_eq!(
            (std::fs::read_to_string(file("made")).unwrap().as_str(), mode & 0o777),
            ("firmware", 0o600)
        );
        drop(made);
        assert!(!Path::new(&file("made")).exists());
    }
}
