//! The mode `files`: files in a directory of a file system are written, made anew and removed, and what is in them
//! follows from the number of steps alone. So the guest knows all that it has written, and whoever has the file system
//! knows it too, from the number of the last step.
//!
//! ```text
//!   step n ──▶ a run of pages of a file, some runs flushed (fsync), others left to the page cache
//!          └─▶ a file anew: beside it, flushed, renamed, its directory flushed
//!          └─▶ a file removed, its directory flushed
//!   then a file is read through the page cache, or past it, and compared
//! ```
//! `tree` looks at such a directory of which a step between two numbers was the last one: what was flushed by the first
//! must be there, and nothing may be there that no step up to the second has written.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::arguments::Failure;
use crate::content::{self, FILES, PAGE};
use crate::differences::{Differences, Mismatched};
use crate::pages::PageBuffer;

/// Files in the directory.
const COUNT: usize = 12;
/// Most pages of a file.
const PAGES: usize = 192;
/// Most pages that a step writes.
const RUN: usize = 24;
/// Steps between two lines.
const SAY_EVERY: u64 = 4;
/// A file that is to take another one's place.
const ANEW: &str = "anew";

/// What a step does to one file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Write { first: usize, count: usize, flush: bool },
    Anew { count: usize },
    Remove,
}

/// The file that a step is about, and what it does.
fn step(number: u64) -> (usize, Step) {
    let mut word = content::mix(FILES.wrapping_add(number));
    let mut below = |limit: usize| {
        word = content::mix(word);
        word as usize % limit
    };
    let file = below(COUNT);
    let step = match below(16) {
        0 => Step::Remove,
        1 | 2 => Step::Anew { count: 1 + below(PAGES) },
        kind => {
            let first = below(PAGES);
            let count = 1 + below(RUN.min(PAGES - first));
            Step::Write { first, count, flush: kind >= 6 }
        }
    };
    (file, step)
}

/// Which step has written a page last: 0 if none has, and it reads as zeroes or is behind the file's end.
type Written = u64;

/// What each page of each file may hold: one step's content, or, if steps may be missing, one of several.
struct Model {
    /// By file and page, the last one the newest.
    pages: Vec<Vec<Vec<Written>>>,
}

impl Model {
    fn new() -> Model {
        Model { pages: vec![vec![vec![0]; PAGES]; COUNT] }
    }

    /// After the step nothing older than it may be seen: in a file system that was never away.
    fn seen(&mut self, number: u64) {
        let (file, step) = step(number);
        self.put(number, file, step);
        self.pages[file].iter_mut().for_each(forget);
    }

    /// After the step, what was flushed is there whatever becomes of the machine.
    fn flushed(&mut self, number: u64) {
        let (file, step) = step(number);
        self.put(number, file, step);
        if !matches!(step, Step::Write { flush: false, .. }) {
            self.pages[file].iter_mut().for_each(forget);
        }
    }

    /// The step may have been taken, in part or whole.
    fn maybe(&mut self, number: u64) {
        let (file, step) = step(number);
        self.put(number, file, step);
    }

    fn put(&mut self, number: u64, file: usize, step: Step) {
        let pages = &mut self.pages[file];
        match step {
            Step::Write { first, count, .. } => {
                pages[first..first + count].iter_mut().for_each(|page| page.push(number));
            }
            Step::Anew { count } => {
                for (at, page) in pages.iter_mut().enumerate() {
                    page.push(if at < count { number } else { 0 });
                }
            }
            Step::Remove => pages.iter_mut().for_each(|page| page.push(0)),
        }
    }

    /// Compares a file's pages, of which `bytes` are those that it has.
    fn check(&self, differences: &mut Differences, file: usize, bytes: &[u8]) {
        for (at, may) in self.pages[file].iter().enumerate() {
            let Some(bytes) = bytes.get(at * PAGE..(at + 1) * PAGE) else {
                // Behind its end is what nobody has written.
                if !may.contains(&0) {
                    differences.check(&[0; PAGE], FILES + may[may.len() - 1], place(file, at));
                }
                continue;
            };
            let right = |written: &Written| match written {
                0 => bytes.iter().all(|&byte| byte == 0),
                written => content::is_right(bytes, FILES + written, place(file, at)),
            };
            if !may.iter().rev().any(right) {
                differences.check(bytes, FILES + may[may.len() - 1], place(file, at));
            }
        }
    }
}

/// Only the newest.
fn forget(page: &mut Vec<Written>) {
    page.drain(..page.len() - 1);
}

/// The number by which a page's content is its own.
fn place(file: usize, page: usize) -> u64 {
    (file * PAGES + page) as u64
}

fn path(dir: &Path, file: usize) -> PathBuf {
    dir.join(format!("file-{file}"))
}

fn fill(file: usize, first: usize, bytes: &mut [u8], number: u64) {
    for (at, bytes) in bytes.chunks_exact_mut(PAGE).enumerate() {
        content::fill(bytes, FILES + number, place(file, first + at));
    }
}

/// Takes a step.
fn take(dir: &Path, number: u64, buffer: &mut PageBuffer) -> Result<(), Failure> {
    let (file, step) = step(number);
    let flush_dir = || File::open(dir)?.sync_all();
    match step {
        Step::Write { first, count, flush } => {
            let bytes = &mut buffer.as_mut_slice()[..count * PAGE];
            fill(file, first, bytes, number);
            let open = OpenOptions::new().write(true).create(true).truncate(false).open(path(dir, file))?;
            open.write_all_at(bytes, (first * PAGE) as u64)?;
            if flush {
                open.sync_all()?;
                // Its name, if it is new.
                flush_dir()?;
            }
        }
        Step::Anew { count } => {
            let bytes = &mut buffer.as_mut_slice()[..count * PAGE];
            fill(file, 0, bytes, number);
            let made = File::create(dir.join(ANEW))?;
            made.write_all_at(bytes, 0)?;
            made.sync_all()?;
            std::fs::rename(dir.join(ANEW), path(dir, file))?;
            flush_dir()?;
        }
        Step::Remove => {
            match std::fs::remove_file(path(dir, file)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed?,
            }
            flush_dir()?;
        }
    }
    Ok(())
}

/// Reads a file; how much of it there is.
fn read(path: &Path, past_the_cache: bool, buffer: &mut PageBuffer) -> Result<usize, Failure> {
    let mut options = OpenOptions::new();
    options.read(true);
    if past_the_cache {
        options.custom_flags(libc::O_DIRECT);
    }
    let file = match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        opened => opened?,
    };
    let mut has = 0;
    while has < PAGES * PAGE {
        match file.read_at(&mut buffer.as_mut_slice()[has..], has as u64)? {
            0 => break,
            more => has += more,
        }
    }
    Ok(has)
}

/// Takes steps in a directory that is empty, and compares what it finds, until a line comes on its input.
pub(crate) fn check(dir: &str) -> Result<Mismatched, Failure> {
    let dir = Path::new(dir);
    let ends = Arc::new(AtomicBool::new(false));
    let told = ends.clone();
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1)) && byte != *b"\n" {}
        told.store(true, Ordering::SeqCst);
    });
    let (mut model, mut buffer) = (Model::new(), PageBuffer::new(PAGES * PAGE));
    let mut differences = Differences::none("files");
    let mut number = 0;
    while !ends.load(Ordering::SeqCst) {
        number += 1;
        take(dir, number, &mut buffer).map_err(|error| format!("step {number}: {error}"))?;
        model.seen(number);
        let file = content::mix(number) as usize % COUNT;
        // What the disk has, too: a read past the page cache has dirty pages written first.
        let has = read(&path(dir, file), number % 3 == 0, &mut buffer)?;
        model.check(&mut differences, file, &buffer.as_slice()[..has]);
        if number % SAY_EVERY == 0 {
            println!("checker files step={number} mismatched={}", differences.count);
        }
    }
    for file in 0..COUNT {
        let has = read(&path(dir, file), true, &mut buffer)?;
        model.check(&mut differences, file, &buffer.as_slice()[..has]);
    }
    println!("checker files done step={number} mismatched={}", differences.count);
    Ok(differences.count)
}

/// Looks at a directory of which some step from `first` to `last` was the last one, and at no file beside its own.
pub(crate) fn tree(dir: &str, first: u64, last: u64) -> Result<Mismatched, Failure> {
    let dir = Path::new(dir);
    let (mut model, mut buffer) = (Model::new(), PageBuffer::new(PAGES * PAGE));
    (1..=last).for_each(|number| if number <= first { model.flushed(number) } else { model.maybe(number) });
    if first == last {
        // It was unmounted: nothing of any step is missing.
        model.pages.iter_mut().flatten().for_each(forget);
    }
    let mut differences = Differences::none("tree");
    let (mut files, mut pages) = (0, 0);
    for file in 0..COUNT {
        let has = read(&path(dir, file), false, &mut buffer)?;
        files += u64::from(has > 0);
        pages += has / PAGE;
        model.check(&mut differences, file, &buffer.as_slice()[..has]);
    }
    for found in std::fs::read_dir(dir)? {
        let name = found?.file_name();
        let ours = (0..COUNT).any(|file| path(dir, file).file_name() == Some(&name));
        if !ours && name != ANEW && name != "lost+found" {
            return Err(format!("{} is none of its files", name.display()).into());
        }
    }
    println!("checker tree done files={files} pages={pages} mismatched={}", differences.count);
    Ok(differences.count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(steps: u64) -> tempdir::Dir {
        let dir = tempdir::Dir::new();
        let mut buffer = PageBuffer::new(PAGES * PAGE);
        (1..=steps).for_each(|number| take(&dir.0, number, &mut buffer).expect("a step"));
        dir
    }

    #[test]
    fn what_steps_have_written_is_what_the_model_says() {
        let dir = taken(300);
        let tree = |first, last| tree(dir.0.to_str().expect("text"), first, last).expect("files");
        assert_eq!(tree(300, 300), 0);
        assert_eq!(tree(280, 320), 0);
        // Steps that it does not have, and steps that nobody has told of.
        assert!(tree(340, 340) > 0 && tree(200, 260) > 0);
    }

    #[test]
    fn a_page_that_was_changed_is_seen() {
        let dir = taken(100);
        let file = (0..COUNT).find(|&file| path(&dir.0, file).exists()).expect("a file");
        let open = OpenOptions::new().read(true).write(true).open(path(&dir.0, file)).expect("a file");
        let mut byte = [0];
        open.read_at(&mut byte, 17).expect("a byte");
        open.write_at(&[byte[0] ^ 1], 17).expect("a byte");
        assert_eq!(tree(dir.0.to_str().expect("text"), 100, 100).expect("files"), 1);
    }

    #[test]
    fn every_kind_of_step_comes() {
        let steps: Vec<Step> = (1..200).map(|number| step(number).1).collect();
        assert!(steps.contains(&Step::Remove));
        assert!(steps.iter().any(|step| matches!(step, Step::Anew { .. })));
        for wanted in [true, false] {
            let is = |step: &Step| matches!(step, Step::Write { flush, .. } if *flush == wanted);
            assert!(steps.iter().any(is));
        }
    }

    mod tempdir {
        use std::path::PathBuf;
        use std::sync::atomic::{AtomicU32, Ordering};

        pub(super) struct Dir(pub(super) PathBuf);

        impl Dir {
            pub(super) fn new() -> Dir {
                static COUNT: AtomicU32 = AtomicU32::new(0);
                let number = COUNT.fetch_add(1, Ordering::Relaxed);
                let dir = std::env::temp_dir().join(format!("checker-{}-{number}", std::process::id()));
                std::fs::create_dir(&dir).expect("a directory");
                Dir(dir)
            }
        }

        impl Drop for Dir {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }
}
