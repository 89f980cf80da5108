//! Directories of a test's own, removed at its end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use tempfile::TempDir;

/// A new directory among the system's temporary files. These may be in RAM, where files have no O_DIRECT.
///
/// # Panics
/// If it cannot be made.
pub fn directory(name: &str) -> TempDir {
    directory_in(std::env::temp_dir(), name)
}

/// A new directory in `parent`; `env!("CARGO_TARGET_TMPDIR")` is one on a disk. Its name is short, because the path
/// of a Unix socket in it may have 107 bytes.
///
/// # Panics
/// If it cannot be made.
pub fn directory_in(parent: impl AsRef<Path>, name: &str) -> TempDir {
    let parent = parent.as_ref();
    let made = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent);
    made.unwrap_or_else(|error| panic!("no directory for a test in {}: {error}", parent.display()))
}

/// Opens the file that this process has open in the directory once more, for direct I/O. A store has no name by which
/// it could be opened.
///
/// # Panics
/// If there is none.
pub fn open_file_in(directory: impl AsRef<Path>) -> File {
    let directory = directory.as_ref().canonicalize().expect("the directory is there");
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("proc is there").flatten();
    let is_here =
        |link: &std::path::PathBuf| std::fs::read_link(link).is_ok_and(|file| file.starts_with(&directory));
    let file = descriptors.map(|descriptor| descriptor.path()).find(is_here);
    let file = file.unwrap_or_else(|| panic!("no file is open in {}", directory.display()));
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(file).expect("what is open can be opened again")
}

/// Has the file or directory to itself until the result is dropped, among all that ask for it by this function: waits
/// for the others. For tests that would disturb each other. These run in processes of their own, so a mutex of one
/// would keep no other away.
///
/// # Panics
/// If there is no such file.
pub fn alone(path: impl AsRef<Path>) -> File {
    let path = path.as_ref();
    let locked = File::open(path).and_then(|file| file.lock().map(|()| file));
    locked.unwrap_or_else(|error| panic!("no lock on {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_with_what_is_in_it_and_no_two_are_the_same() {
        let (one, other) = (directory("place"), directory("place"));
        assert_ne!(one.path(), other.path());
        std::fs::write(one.path().join("file"), "text").unwrap();
        let path = one.path().to_owned();
        drop(one);
        assert!(!path.exists() && other.path().exists());
    }

    #[test]
    fn one_at_a_time_has_a_directory_to_itself() {
        let (place, other) = (directory("alone"), directory("other"));
        let mine = alone(place.path());
        let _other = alone(other.path());
        let (sender, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _turn = alone(place.path());
                sender.send("a turn").unwrap();
            });
            assert!(told.try_recv().is_err());
            drop(mine);
            assert_eq!(told.recv(), Ok("a turn"));
        });
    }
}
