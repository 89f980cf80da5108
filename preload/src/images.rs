//! Whether the disks are those of the command line, when QEMU is first asked.
//!
//! A monitor may be heard before that: a snapshot that it takes is then what "the machine was started with", and the
//! target would open the file of before it, without what was written since.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vmprocess::failure::Failure;

use crate::guest::Qemu;

impl Qemu {
    /// Why the VM stays, if a disk is in a file that is none of `named`.
    pub(crate) fn unnamed_disk(&mut self, named: &[PathBuf]) -> Result<Option<String>, Failure> {
        Ok(unnamed(&self.ask("query-block", Value::Null)?, named))
    }
}

/// From QEMU's answer to `query-block`.
fn unnamed(disks: &Value, named: &[PathBuf]) -> Option<String> {
    let real: Vec<PathBuf> = named.iter().map(|path| real(path)).collect();
    let mut disks = disks.as_array().into_iter().flatten();
    let (disk, image) = disks.find_map(|disk| {
        let image = file(disk["inserted"]["file"].as_str()?)?;
        (!named.contains(&image) && !real.contains(&self::real(&image))).then_some((disk, image))
    })?;
    let name =
        [&disk["device"], &disk["qdev"]].into_iter().filter_map(Value::as_str).find(|name| !name.is_empty());
    let names: Vec<String> = named.iter().map(|path| path.display().to_string()).collect();
    let names = if names.is_empty() { "no file".to_owned() } else { names.join(", ") };
    Some(format!(
        "this VM cannot be moved: disk {} is in {}, and its command line names {names}: a monitor changed that while QEMU started; \
         start it with a command line that says so",
        name.unwrap_or("without a name"),
        image.display()
    ))
}

/// The file of this host that an image is, by QEMU's name of it; none of what is on the network, or was given as a
/// descriptor.
pub(crate) fn file(name: &str) -> Option<PathBuf> {
    if let Some(options) = name.strip_prefix("json:") {
        let options: Value = serde_json::from_str(options).ok()?;
        let mut nodes = std::iter::successors(Some(&options), |node| node.get("file"));
        return file(nodes.find_map(|node| node["filename"].as_str())?);
    }
    // As QEMU tells a protocol from a path.
    let is_protocol = name.find([':', '/']).is_some_and(|at| name[at..].starts_with(':'));
    if name.is_empty() || is_protocol || name.starts_with("/dev/fdset/") {
        return None;
    }
    Some(std::env::current_dir().unwrap_or_default().join(name))
}

/// Without links, as far as this user may look.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_disk_is_in_a_file_that_the_line_names() {
        let place = testkit::directory("images");
        let dir = place.path();
        let path = |name: &str| dir.join(name).display().to_string();
        std::fs::write(dir.join("base"), "").unwrap();
        std::fs::write(dir.join("snap"), "").unwrap();
        std::os::unix::fs::symlink("base", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("snap", dir.join("other")).unwrap();
        let of = |file: &str, named: &[&str]| {
            let named: Vec<PathBuf> = named.iter().map(|name| dir.join(name)).collect();
            unnamed(&json!([{ "device": "cd" }, { "device": "d0", "inserted": { "file": file } }]), &named)
        };
        let nested =
            |name: &str| json!({ "driver": "raw", "file": { "driver": "file", "filename": path(name) } });
        for (file, named) in [
            (path("base"), &["base"][..]),
            (path("base"), &["snap", "base"]),
            (path("link"), &["base"]),
            (path("base"), &["link"]),
            (format!("json:{}", nested("link")), &["base"]),
            // Unlinked since, or not to be looked at.
            (path("gone"), &["gone"]),
            // Not of this host's files, or a descriptor, which does not move anyway.
            ("nbd://host/x".to_owned(), &[]),
            ("fat:rw:/dir".to_owned(), &[]),
            ("/dev/fdset/3".to_owned(), &[]),
            ("json:{\"driver\":\"null-co\"}".to_owned(), &[]),
            ("json:rubbish".to_owned(), &[]),
            (String::new(), &[]),
        ] {
            assert_eq!(of(&file, named), None, "{file}");
        }
        for (file, named, is) in [
            (path("snap"), &["base"][..], "snap"),
            (path("other"), &["base", "link"], "other"),
            (path("snap"), &[], "snap"),
            (path("gone"), &["base"], "gone"),
            (format!("json:{}", nested("snap")), &["base"], "snap"),
        ] {
            let why = of(&file, named).unwrap();
            assert!(why.contains(&format!("disk d0 is in {}, and", path(is))), "{file}: {why}");
        }
        assert!(of(&path("snap"), &[]).unwrap().contains("names no file"));
        assert!(of(&path("snap"), &["base"]).unwrap().contains(&format!("names {}:", path("base"))));
        // As a relative name is QEMU's, from where it was started.
        let named = [std::env::current_dir().unwrap().join("a.img")];
        assert_eq!(unnamed(&json!([{ "device": "d", "inserted": { "file": "a.img" } }]), &named), None);
        assert_eq!(unnamed(&json!([{ "device": "d", "inserted": { "file": "./a.img" } }]), &named), None);
        assert!(
            unnamed(&json!([{ "qdev": "v", "inserted": { "file": "b.img" } }]), &named)
                .unwrap()
                .contains("disk v is in")
        );
        assert_eq!(unnamed(&Value::Null, &named), None);
    }
}
