//! Paths that are a process's own: `/dev/fd/10`, `/proc/self/fd/10`, and links to these. They look like names, but
//! another process that opens one gets something else of its own, on another host above all.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use super::what::What;

/// As the kernel has it.
const LINKS_MAX: u32 = 40;

/// The meaning of a path that, by its words alone, is a process's own.
pub(super) fn named(path: &str) -> Option<What> {
    let parts = parts(path)?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match parts.as_slice() {
        ["dev", "fd", ..] | ["dev", "stdin" | "stdout" | "stderr"] => Some(What::Descriptor),
        ["proc", process, ..] if is_process(process) => Some(What::Descriptor),
        // Under that name the next host has somebody else's terminal.
        ["dev", "tty" | "console"] | ["dev", "pts", ..] => Some(What::Screen),
        ["dev", name] if is_virtual_terminal(name) => Some(What::Screen),
        _ => None,
    }
}

/// The path of a process's own, if that is where this path leads by the links of this host.
pub(super) fn behind(path: &Path) -> Option<PathBuf> {
    let mut rest: Vec<OsString> = components(path);
    let (mut at, mut links) = (PathBuf::from("/"), 0);
    while let Some(part) = rest.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        at.push(part);
        if at.to_str().and_then(named).is_some() {
            at.extend(rest.into_iter().rev());
            return Some(at);
        }
        if let Ok(target) = at.read_link() {
            links += 1;
            if links > LINKS_MAX {
                return None;
            }
            at = if target.is_absolute() { PathBuf::from("/") } else { at.parent()?.to_owned() };
            rest.extend(components(&target));
        }
    }
    None
}

/// The last one first.
fn components(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter_map(|part| match part {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    parts.collect()
}

/// Of an absolute path, without what means nothing in it.
fn parts(path: &str) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    for part in path.strip_prefix('/')?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part.to_owned()),
        }
    }
    Some(parts)
}

/// Of the host's keyboard and screen; not a serial port.
fn is_virtual_terminal(name: &str) -> bool {
    let number = name.strip_prefix("tty");
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit()))
}

fn is_process(name: &str) -> bool {
    matches!(name, "self" | "thread-self") || (!name.is_empty() && name.bytes().all(|c| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn names_of_a_process_are_told_from_others() {
        for path in [
            "/dev/fd/10",
            "/dev/stdin",
            "/dev/stdout",
            "/dev/stderr",
            "//dev/./fd//3",
            "/tmp/../dev/fd/3",
            "/proc/self/fd/3",
            "/proc/thread-self/fd/3",
            "/proc/self/task/7/fd/3",
            "/proc/1234/fd/3",
            "/proc/self/root/disk",
            "/proc/self/cwd/disk",
            "/../proc/self/fd/0",
        ] {
            assert_eq!(named(path), Some(What::Descriptor), "{path}");
        }
        for path in [
            "/dev/tty",
            "/dev/console",
            "/dev/pts/3",
            "/dev//pts/./12",
            "/dev/pts/ptmx",
            "/dev/tty0",
            "/dev/tty63",
        ] {
            assert_eq!(named(path), Some(What::Screen), "{path}");
        }
        for path in [
            "/dev/sda",
            "/dev/ttyS0",
            "/dev/ttyUSB1",
            "/dev/tty1x",
            "/dev/consoles",
            "/dev/ptsd",
            "/srv/dev/pts/3",
            "/dev/fdx",
            "/dev/stdinx",
            "/proc/cpuinfo",
            "/srv/dev/fd/3",
            "dev/fd/3",
            "fd/3",
            "/dev",
            "/",
            "",
        ] {
            assert_eq!(named(path), None, "{path}");
        }
    }

    #[test]
    fn links_are_followed_to_where_they_lead() {
        let place = testkit::directory("links");
        std::fs::create_dir(place.path().join("deep")).unwrap();
        let dir = place.path().canonicalize().unwrap();
        let link = |to: &str, name: &str| symlink(to, dir.join(name)).unwrap();
        link("/dev/fd/10", "fd");
        link("fd", "again");
        link("../again", "deep/up");
        link("/proc/self/fd", "all");
        link("/dev/stdin", "in");
        link("/dev/pts/3", "screen");
        link("/dev/pts", "screens");
        link("loop", "loop");
        link("nothing", "dangling");
        std::fs::write(dir.join("disk"), "").unwrap();
        link("disk", "plain");
        for (name, leads) in [
            ("fd", "/dev/fd/10"),
            ("again", "/dev/fd/10"),
            ("deep/up", "/dev/fd/10"),
            ("deep/../again", "/dev/fd/10"),
            ("all/7", "/proc/self/fd/7"),
            ("in", "/dev/stdin"),
            ("screen", "/dev/pts/3"),
            ("screens/4", "/dev/pts/4"),
        ] {
            assert_eq!(behind(&dir.join(name)).as_deref(), Some(Path::new(leads)), "{name}");
        }
        for name in ["disk", "plain", "loop", "dangling", "missing", "deep"] {
            assert_eq!(behind(&dir.join(name)), None, "{name}");
        }
    }
}
