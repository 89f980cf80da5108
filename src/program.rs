//! Where vmemd's programs find each other: beside each other, as they are built and installed, else in `PATH`.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use vmprocess::failure::{Failure, FailureKind};

/// The program of this name.
///
/// # Errors
/// [`FailureKind::Host`] if it is neither beside this one nor in `PATH`, with what to do.
pub fn find(name: &str) -> Result<PathBuf, Failure> {
    let this =
        std::env::current_exe().map_err(|error| Failure::io("cannot tell where this program is", &error))?;
    let beside = this.parent().unwrap_or(Path::new("/"));
    find_in(beside, std::env::var_os("PATH").as_deref(), name)
}

fn find_in(beside: &Path, path: Option<&OsStr>, name: &str) -> Result<PathBuf, Failure> {
    let in_path = path.into_iter().flat_map(std::env::split_paths);
    let places = std::iter::once(beside.to_owned()).chain(in_path).map(|dir| dir.join(name));
    let found = places.into_iter().find(|place| is_program(place));
    found.ok_or_else(|| {
        let text = format!(
            "{name} is neither in {} nor in PATH: build it with `cargo build --release`, or install it there",
            beside.display()
        );
        Failure::new(FailureKind::Host, text)
    })
}

pub(crate) fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn beside_comes_before_path_and_what_is_no_program_is_passed_over() {
        let root = testkit::directory("program");
        let [beside, first, second] = ["beside", "first", "second"].map(|name| root.path().join(name));
        for dir in [&beside, &first, &second] {
            fs::create_dir_all(dir).unwrap();
        }
        let make = |dir: &Path, mode| {
            fs::write(dir.join("it"), "").unwrap();
            fs::set_permissions(dir.join("it"), fs::Permissions::from_mode(mode)).unwrap();
        };
        let path = std::env::join_paths([&first, &second]).unwrap();
        let find = || find_in(&beside, Some(&path), "it");
        let missing = find().unwrap_err();
        assert_eq!(missing.kind, FailureKind::Host);
        assert!(
            missing.text.contains("it is neither in ") && missing.text.contains("cargo build"),
            "{missing}"
        );
        assert!(find_in(&beside, None, "it").is_err());
        fs::create_dir(first.join("it")).unwrap();
        make(&second, 0o755);
        assert_eq!(find().unwrap(), second.join("it"));
        make(&beside, 0o644);
        assert_eq!(find().unwrap(), second.join("it"));
        make(&beside, 0o755);
        assert_eq!(find().unwrap(), beside.join("it"));
    }
}
