//! `vmemd checkpoint export|import`: a checkpoint as one stream, through a pipe or an object store.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use checkpoint::archive::{Archive, Entry};
use checkpoint::format::{DiskVersion, FormatError, Manifest};
use checkpoint::stream::{self, Export, Exported, Imported, StreamError};
use rustix::fs::Advice;
use serde_json::json;
use swapd::units::bytes_of;
use vmprocess::failure::{Failure, FailureKind, chain};
use vmprocess::signals;
use vmprocess::size::Size;

use super::args::{ExportArgs, ImportArgs};
use super::terminal::{print, print_json, say, warn};
use super::values::StreamPlace;
use super::work::{Work, rounded};
#[cfg(feature = "object-store")]
use crate::object::Store;

/// Of a pipe, if the system allows it: fewer and larger reads and writes.
const PIPE_BYTES: usize = 1 << 20;

pub(super) fn export(args: &ExportArgs) -> Result<(), Failure> {
    signals::install()?;
    match &args.to {
        StreamPlace::Standard if io::stdout().is_terminal() => Err(Failure::new(
            FailureKind::Usage,
            "standard output is a terminal: send the checkpoint into a pipe or a file",
        )),
        StreamPlace::File(path) => Err(Failure::new(
            FailureKind::Usage,
            format!(
                "{} is neither - nor s3://BUCKET/KEY: into a file, `vmemd checkpoint export … - > FILE`",
                path.display()
            ),
        )),
        StreamPlace::Standard => {
            let opened = open(args)?;
            // A reader that stands still keeps a write waiting that no signal ends. It has the stream's end then: the
            // process's.
            let (ended, bell) = io::pipe().map_err(|error| Failure::io("make a pipe", &error))?;
            let written = std::thread::spawn(move || {
                let _bell = bell;
                to_standard_output(&opened)
            });
            while !written.is_finished() && signals::caught().is_none() {
                signals::wait_readable(ended.as_fd(), None);
            }
            match signals::caught() {
                Some(signal) if !written.is_finished() => Err(signals::interrupted(signal)),
                _ => written.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            }
        }
        StreamPlace::Object(url) => to_object(url, args),
    }
}

struct Opened {
    name: String,
    export: Export,
}

fn open(args: &ExportArgs) -> Result<Opened, Failure> {
    let archive = Archive::open(&args.archive)?.with_key(args.key.read()?);
    let entry = archive.find(args.checkpoint.as_deref())?;
    let export = Export::open(archive.chain(&entry)?).map_err(|error| failure(entry.name(), &error))?;
    outside(export.manifest());
    Ok(Opened { name: entry.name().to_owned(), export })
}

fn to_standard_output(opened: &Opened) -> Result<(), Failure> {
    let stdout = io::stdout();
    widen(stdout.as_fd());
    // Not through its buffer of lines.
    let owned = stdout.as_fd().try_clone_to_owned();
    let mut to = File::from(owned.map_err(|error| Failure::io("use standard output", &error))?);
    let work = Work::begin("export");
    let written = opened.export.write(&mut to, &|progress| work.show(progress));
    let took = work.end();
    let Exported { bytes, pages } = written.map_err(|error| failure(&opened.name, &error))?;
    // A file is to be there when this says so; a pipe has nothing to flush.
    match rustix::fs::fsync(&to) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::ROFS) => {}
        Err(error) => return Err(Failure::io("flush standard output", &error.into())),
    }
    say(&summary(&opened.name, bytes, pages, took));
    Ok(())
}

fn summary(name: &str, bytes: u64, pages: u64, took: f64) -> String {
    let rate = (bytes as f64 / took.max(0.001)) as u64;
    let (bytes, pages, rate) = (rounded(bytes), rounded(bytes_of(pages)), rounded(rate));
    format!("{name}: {bytes}, {pages} of it pages, in {took:.1} s ({rate}/s)")
}

#[cfg(not(feature = "object-store"))]
fn no_objects(url: &str) -> Failure {
    let text = format!(
        "{url}: this vmemd was built without object stores: build it with `--features object-store`, or pipe the stream \
         through a program for it (`vmemd checkpoint export … -`)"
    );
    Failure::new(FailureKind::Usage, text)
}

#[cfg(not(feature = "object-store"))]
fn to_object(url: &str, _: &ExportArgs) -> Result<(), Failure> {
    Err(no_objects(url))
}

#[cfg(feature = "object-store")]
fn to_object(url: &str, args: &ExportArgs) -> Result<(), Failure> {
    let store = Store::open(url)?;
    let Opened { name, export } = open(args)?;
    let mut upload = store.upload(export.total())?;
    let work = Work::begin("export");
    let written = export.write(&mut upload, &|progress| work.show(progress));
    let done = match written {
        Ok(exported) => upload.complete().map(|()| exported),
        // What the store has said is the reason for what the stream says.
        Err(error) => Err(upload.failed().unwrap_or_else(|| failure(&name, &error))),
    };
    let took = work.end();
    let Exported { bytes, pages } = done?;
    if args.json.json {
        let pages = bytes_of(pages);
        return print_json(
            &json!({ "name": name, "to": url, "bytes": bytes, "page_bytes": pages, "seconds": took }),
        );
    }
    print(&summary(&name, bytes, pages, took));
    Ok(())
}

pub(super) fn import(args: &ImportArgs) -> Result<(), Failure> {
    signals::install()?;
    match &args.from {
        StreamPlace::Standard if io::stdin().is_terminal() => Err(Failure::new(
            FailureKind::Usage,
            "standard input is a terminal: a checkpoint comes from a pipe or a file",
        )),
        StreamPlace::Standard => {
            let stdin = io::stdin();
            let owned = stdin.as_fd().try_clone_to_owned();
            let from = File::from(owned.map_err(|error| Failure::io("use standard input", &error))?);
            from_file(from, "standard input", args)
        }
        StreamPlace::File(path) => {
            let from = File::open(path);
            let from =
                from.map_err(|error| Failure::io(format!("cannot open {}", path.display()), &error))?;
            from_file(from, &path.display().to_string(), args)
        }
        StreamPlace::Object(url) => from_object(url, args),
    }
}

#[cfg(not(feature = "object-store"))]
fn from_object(url: &str, _: &ImportArgs) -> Result<(), Failure> {
    Err(no_objects(url))
}

#[cfg(feature = "object-store")]
fn from_object(url: &str, args: &ImportArgs) -> Result<(), Failure> {
    let store = Store::open(url)?;
    let mut download = store.download()?;
    let made = take_in(&mut download, url, args);
    // What the store has said is the reason for what the stream says.
    made.map_err(|failure| download.failed().unwrap_or(failure))
}

fn from_file(from: File, name: &str, args: &ImportArgs) -> Result<(), Failure> {
    widen(from.as_fd());
    // Of a pipe there is nothing to advise on.
    let _ = rustix::fs::fadvise(&from, 0, None, Advice::Sequential);
    take_in(Interruptible(from), name, args)
}

fn take_in(from: impl Read, name: &str, args: &ImportArgs) -> Result<(), Failure> {
    let archive = Archive::create(&args.to)?.lock()?;
    let work = Work::begin("import");
    let imported = stream::import(&archive, from, &|progress| work.show(progress));
    let took = work.end();
    let Imported { entry, bytes } = imported.map_err(|error| failure(name, &error))?;
    outside(entry.manifest());
    if args.json.json {
        return print_json(&imported_json(&entry, &args.to, bytes, took));
    }
    print(&format!("imported as {}", summary(entry.name(), bytes, entry.manifest().pages.here, took)));
    Ok(())
}

fn imported_json(entry: &Entry, archive: &Path, bytes: u64, took: f64) -> serde_json::Value {
    json!({
        "name": entry.name(), "vm": entry.manifest().vm.name, "archive": archive, "bytes": bytes,
        "page_bytes": bytes_of(entry.manifest().pages.here), "seconds": took,
    })
}

/// Says what a stream has not.
fn outside(manifest: &Manifest) {
    for disk in &manifest.vm.disks {
        if let DiskVersion::Snapshot(snapshot) = &disk.version {
            warn(&format!(
                "disk {}: its content is no part of the stream; it is the snapshot {snapshot} in {}",
                disk.name, disk.file
            ));
        }
    }
}

fn failure(name: &str, error: &StreamError) -> Failure {
    use FailureKind as K;
    let of_io = |doing: String, error: &io::Error| Failure::io(doing, error);
    // Ctrl-C ends both sides of a pipe, and the other side may be the first.
    let ends = matches!(error, StreamError::Cancelled | StreamError::Read(_) | StreamError::Write(_))
        || matches!(error, StreamError::Format(FormatError::CutOff { .. }));
    if let (true, Some(signal)) = (ends, signals::caught()) {
        return signals::interrupted(signal);
    }
    match error {
        StreamError::Cancelled => Failure::new(K::Interrupted, "cancelled"),
        StreamError::Read(source) => of_io(format!("cannot read {name}"), source),
        StreamError::Write(source) if source.kind() == io::ErrorKind::BrokenPipe => {
            Failure::new(K::Link, format!("{name}: whoever read the stream has gone away before its end"))
        }
        StreamError::Write(source) => of_io(format!("cannot write the stream of {name}"), source),
        StreamError::NoRoom { need, free } => Failure::new(
            K::Resources,
            format!("no room: it takes up to {:#}, and {:#} are free", Size(*need), Size(*free)),
        ),
        StreamError::There(_) => Failure::new(K::Name, chain(error)),
        error if error.is_damage() => {
            Failure::new(K::Damaged, format!("cannot use {name}: {}", chain(error)))
        }
        StreamError::Archive(error) => Failure::from(error),
        error => Failure::new(K::Other, format!("cannot use {name}: {}", chain(error))),
    }
}

/// A pipe takes more at once then. What is none stays as it is.
fn widen(fd: BorrowedFd<'_>) {
    let _ = rustix::pipe::fcntl_setpipe_size(fd, PIPE_BYTES);
}

/// A file or pipe, of which a read that waits ends by a signal.
struct Interruptible(File);

impl Read for Interruptible {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while !signals::wait_readable(self.0.as_fd(), None) {
            if let Err(failure) = signals::check() {
                return Err(io::Error::other(failure));
            }
        }
        self.0.read(bytes)
    }
}
