//! Directories of a test's own, removed at its end.

use std::path::Path;

pub use tempfile::TempDir;

/// A directory wherever the system keeps passing files; that may be in RAM, where files have no O_DIRECT.
///
/// # Panics
/// If it cannot be made.
pub fn directory(name: &str) -> TempDir {
    directory_in(std::env::temp_dir(), name)
}

/// The same in another directory: `env!("CARGO_TARGET_TMPDIR")` is on a disk. Its path is short enough for sockets below it.
///
/// # Panics
/// If it cannot be made.
pub fn directory_in(parent: impl AsRef<Path>, name: &str) -> TempDir {
    let parent = parent.as_ref();
    let made = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent);
    made.unwrap_or_else(|error| panic!("no directory for a test in {}: {error}", parent.display()))
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
}
