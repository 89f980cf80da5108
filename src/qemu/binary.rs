//! The QEMU binary: where it is, and whether the dynamic loader will take our shared object into it.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use vmprocess::failure::{Failure, FailureKind};

/// Program headers looked at; real binaries have about a dozen.
const MAX_HEADERS: u16 = 256;
/// A script that only starts QEMU is short.
const SCRIPT_BYTES_MAX: u64 = 4096;
const PT_INTERP: u32 = 3;
/// A program, which is linked to its addresses, or a shared object, which position-independent programs are as well.
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;

/// Finds a binary as a shell does: by `PATH`, unless there is a `/` in its name. Links stay: QEMU goes by the name that
/// it is started by.
pub fn find(name: &str, path: &std::ffi::OsStr) -> Result<PathBuf, Failure> {
    let missing = |why: String| {
        Failure::new(FailureKind::Host, format!("{name}: {why}: install QEMU, or correct the name"))
    };
    let resolve = |path: &Path| {
        let there = path.metadata().and_then(|_| std::path::absolute(path));
        there.map_err(|error| missing(error.to_string()))
    };
    if name.contains('/') {
        return resolve(Path::new(name));
    }
    let runs = |file: &PathBuf| file.metadata().is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0);
    let found = std::env::split_paths(path).map(|dir| dir.join(name)).find(runs);
    resolve(&found.filter(|_| !name.is_empty()).ok_or_else(|| missing("not found in PATH".to_owned()))?)
}

/// Refuses what `LD_PRELOAD` has no effect on.
pub fn check(path: &Path) -> Result<(), Failure> {
    let shown = path.display();
    let refuse = |why: &str| Err(Failure::new(FailureKind::Usage, format!("{shown} {why}")));
    let file = File::open(path).map_err(|error| Failure::io(format_args!("opening {shown}"), &error))?;
    let meta = file.metadata().map_err(|error| Failure::io(format_args!("looking at {shown}"), &error))?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return refuse("is not a program: name a QEMU binary, such as qemu-system-x86_64");
    }
    if meta.permissions().mode() & 0o6000 != 0 {
        return refuse(
            "is set-user-ID or set-group-ID, so the loader ignores the shared object that is to manage its memory: \
             take that off with `chmod ug-s`, and start it as a user who may use /dev/kvm",
        );
    }
    if has_capabilities(path) {
        return refuse(
            "has file capabilities, so the loader ignores the shared object that is to manage its memory: remove them \
             with `setcap -r`, and give the process what it needs from outside (a tap made beforehand, for example)",
        );
    }
    match elf(&file) {
        Elf::Dynamic => Ok(()),
        Elf::Script => match starts(path) {
            Some(words) => refuse(&format!(
                "is a script, which vmemd cannot look into: write `{words} …` in its place, which is what it starts"
            )),
            None => {
                refuse("is a script: name the QEMU binary that it starts, with the arguments that it adds")
            }
        },
        Elf::Static => refuse(
            "is linked statically, so no shared object can be put into it to manage its memory: use a dynamically \
             linked QEMU, such as your distribution's",
        ),
        Elf::Foreign => refuse("is made for another machine than this one: use a QEMU built for this host"),
        Elf::None => {
            refuse("is not a program that Linux can load: name a QEMU binary, such as qemu-system-x86_64")
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Elf {
    Dynamic,
    Static,
    Foreign,
    Script,
    None,
}

/// What the first bytes of a file say of it. It is hostile until proven harmless.
fn elf(file: &File) -> Elf {
    let mut head = Vec::new();
    if file.take(64).read_to_end(&mut head).is_err() {
        return Elf::None;
    }
    if head.starts_with(b"#!") {
        return Elf::Script;
    }
    if !head.starts_with(b"\x7fELF") || head.len() < 64 {
        return Elf::None;
    }
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let machine = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    // Class 2 is 64 bits, data 1 little-endian.
    if head[4] != 2 || head[5] != 1 || half(18) != machine {
        return Elf::Foreign;
    }
    if !matches!(half(16), ET_EXEC | ET_DYN) {
        return Elf::None;
    }
    let table = u64::from_le_bytes(head[32..40].try_into().expect("eight bytes"));
    let (size, count) = (u64::from(half(54)), half(56).min(MAX_HEADERS));
    for index in 0..u64::from(count) {
        let mut kind = [0; 4];
        let Some(at) = table.checked_add(index * size) else { return Elf::None };
        if file.read_exact_at(&mut kind, at).is_err() {
            return Elf::None;
        }
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Elf::Dynamic;
        }
    }
    Elf::Static
}

/// What a script of one command starts, such as Debian's `kvm` of old: `exec qemu-system-x86_64 -enable-kvm "$@"`.
fn starts(script: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(script).ok()?.take(SCRIPT_BYTES_MAX).read_to_string(&mut text).ok()?;
    let mut commands = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let (command, more) = (commands.next()?, commands.next());
    let words: Vec<&str> = command.split_whitespace().collect();
    let words = words.strip_prefix(&["exec"]).unwrap_or(&words);
    let (all, words) = words.split_last()?;
    let is_all = matches!(*all, "\"$@\"" | "$@" | "${1+\"$@\"}" | "$*");
    let plain = |word: &&str| word.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_./,=:+".contains(&c));
    let is_qemu = words.first().is_some_and(|name| name.contains("qemu"));
    (more.is_none() && is_all && is_qemu && words.iter().all(plain)).then(|| words.join(" "))
}

fn has_capabilities(path: &Path) -> bool {
    rustix::fs::getxattr_query(path, c"security.capability").is_ok_and(|length| length > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A directory that is removed in the end.
    struct Dir(PathBuf, #[allow(dead_code, reason = "held for its end")] testkit::TempDir);

    impl Dir {
        fn new(name: &str) -> Dir {
            let dir = testkit::directory(name);
            Dir(dir.path().to_owned(), dir)
        }

        fn file(&self, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    /// An ELF head with one program header of the kind.
    fn image(kind: u32) -> Vec<u8> {
        let mut image = vec![0; 120];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[16] = 3;
        image[18] = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64..68].copy_from_slice(&kind.to_le_bytes());
        image
    }

    #[test]
    fn only_what_the_loader_preloads_into_is_taken() {
        let dir = Dir::new("check");
        let said = |path: &Path| check(path).unwrap_err().text;
        assert_eq!(check(&dir.file("dynamic", &image(PT_INTERP), 0o755)), Ok(()));
        assert_eq!(check(Path::new("/proc/self/exe")), Ok(()), "this test is dynamic itself");
        assert!(said(&dir.file("static", &image(1), 0o755)).contains("is linked statically"));
        assert!(
            said(&dir.file("script", b"#!/bin/sh\nexec qemu\n", 0o755))
                .contains("is a script: name the QEMU")
        );
        for script in [
            "#!/bin/sh\nexec qemu-system-x86_64 -enable-kvm \"$@\"\n",
            "#! /bin/sh\n# as ever\n\n  qemu-system-x86_64 -enable-kvm ${1+\"$@\"}",
        ] {
            let text = said(&dir.file("kvm", script.as_bytes(), 0o755));
            assert!(text.contains("write `qemu-system-x86_64 -enable-kvm …` in its place"), "{text}");
        }
        for script in [
            "#!/bin/sh\nX=1\nexec qemu-system-x86_64 \"$@\"\n",
            "#!/bin/sh\nexec qemu-system-x86_64 $X \"$@\"\n",
            "#!/bin/sh\nexec qemu-system-x86_64\n",
            "#!/bin/sh\nexec rm -rf \"$@\"\n",
        ] {
            let text = said(&dir.file("kvm", script.as_bytes(), 0o755));
            assert!(text.contains("name the QEMU binary that it starts"), "{text}");
        }
        assert!(said(&dir.file("text", b"hello", 0o755)).contains("is not a program that Linux can load"));
        assert!(said(&dir.file("data", &image(PT_INTERP), 0o644)).contains("is not a program: name"));
        assert!(said(&dir.file("suid", &image(PT_INTERP), 0o4755)).contains("set-user-ID"));
        assert!(said(&dir.file("sgid", &image(PT_INTERP), 0o2755)).contains("set-group-ID"));
        assert!(said(&dir.0.join("missing")).contains("opening"));
        let mut foreign = image(PT_INTERP);
        foreign[18] = 40;
        assert!(said(&dir.file("foreign", &foreign, 0o755)).contains("another machine"));
    }

    #[test]
    fn capabilities_are_seen() {
        let dir = Dir::new("caps");
        let file = dir.file("caps", &image(PT_INTERP), 0o755);
        // Version 2, effective, net_admin permitted.
        let mut value = [0u8; 20];
        value[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
        value[4..8].copy_from_slice(&(1u32 << 12).to_le_bytes());
        let flags = rustix::fs::XattrFlags::empty();
        if rustix::fs::setxattr(&file, c"security.capability", &value, flags).is_ok() {
            assert!(check(&file).unwrap_err().text.contains("has file capabilities"));
        } else {
            eprintln!("not run: setting file capabilities needs root and a file system that has them");
        }
    }

    #[test]
    fn damaged_images_are_refused() {
        let dir = Dir::new("damaged");
        let whole = image(PT_INTERP);
        for length in 0..whole.len() {
            let file = dir.file("cut", &whole[..length], 0o755);
            // The kind of its only header is at 64..68.
            assert_eq!(check(&file).is_ok(), length >= 68, "{length}");
        }
        let mut far = image(1);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        far[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(check(&dir.file("far", &far, 0o755)).is_err());
    }

    #[test]
    fn found_by_path_and_by_the_name_that_was_given() {
        let dir = Dir::new("find");
        let file = dir.file("qemu-real", &image(PT_INTERP), 0o755);
        dir.file("not-executable", b"", 0o644);
        symlink(&file, dir.0.join("qemu")).unwrap();
        let path = dir.0.as_os_str();
        let link = dir.0.join("qemu");
        assert_eq!(find("qemu", path).unwrap(), link);
        assert_eq!(find("qemu-real", path).unwrap(), file);
        assert_eq!(find(link.to_str().unwrap(), std::ffi::OsStr::new("")).unwrap(), link);
        symlink("nothing", dir.0.join("dangling")).unwrap();
        let dangling = dir.0.join("dangling");
        assert!(find(dangling.to_str().unwrap(), path).unwrap_err().text.contains("No such file"));
        for name in ["not-executable", "nothing", ""] {
            assert!(find(name, path).unwrap_err().text.contains("not found in PATH: install QEMU"), "{name}");
        }
        assert!(find("/nowhere/qemu", path).unwrap_err().text.starts_with("/nowhere/qemu: No such file"));
    }
}
