//! What a store's pages end on: a disk, this host's own RAM, or another host.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Kind};

/// File systems over others, such as a loop device over a file, are looked through so often.
const LAYERS_MAX: u32 = 8;

/// Numbers of file systems, from the kernel's `magic.h` and the file systems' own.
const IN_RAM: &[(u32, &str)] = &[(0x0102_1994, "tmpfs"), (0x8584_58f6, "ramfs"), (0x9584_58f6, "hugetlbfs")];
const OVER_A_NETWORK: &[(u32, &str)] = &[
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x0bd0_0bd0, "Lustre"),
];
const OVERLAY: u32 = 0x794c_7630;
/// Block devices whose content is RAM.
const RAM_DEVICES: &[&str] = &["zram", "ram"];

/// What a store is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    Disk,
    /// This host's RAM, by the name of what keeps it there.
    Ram(String),
    /// A file system whose server may be slow, or gone.
    Network(&'static str),
}

impl Medium {
    /// Of a directory, a file or a block device. What cannot be found out counts as a disk.
    pub fn of(path: &Path) -> Medium {
        look(path, 0)
    }
}

/// Refuses a store in RAM, unless it is `wanted` there.
///
/// # Errors
/// If it is.
pub fn need_disk(store: &Path, wanted: bool) -> Result<(), Failure> {
    match Medium::of(store) {
        Medium::Ram(what) if !wanted => {
            let text = format!(
                "the store {} is in this host's RAM ({what}): pages that leave RAM would stay in it, and the host would run out; \
                 choose a --store on a disk, or give --store-in-ram for a trial",
                store.display()
            );
            Err(Failure::new(Kind::Usage, text))
        }
        _ => Ok(()),
    }
}

fn look(path: &Path, layer: u32) -> Medium {
    let Ok(meta) = fs::metadata(path) else { return Medium::Disk };
    if layer > LAYERS_MAX {
        return Medium::Disk;
    }
    if meta.file_type().is_block_device() {
        return device(meta.rdev(), layer);
    }
    let Some(kind) = magic(path) else { return Medium::Disk };
    let named =
        |list: &[(u32, &'static str)]| list.iter().find(|(magic, _)| *magic == kind).map(|(_, name)| *name);
    if let Some(name) = named(IN_RAM) {
        return Medium::Ram(name.to_owned());
    }
    if let Some(name) = named(OVER_A_NETWORK) {
        return Medium::Network(name);
    }
    if kind == OVERLAY {
        return match upper_of(path).map(|upper| look(&upper, layer + 1)) {
            Some(Medium::Ram(name)) => Medium::Ram(format!("an overlay on {name}")),
            Some(medium) => medium,
            None => Medium::Disk,
        };
    }
    device(meta.dev(), layer)
}

/// Of a block device, by its number.
fn device(number: u64, layer: u32) -> Medium {
    let link = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    let Ok(place) = fs::canonicalize(link) else { return Medium::Disk };
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is = |kind: &&str| {
        name.strip_prefix(*kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    if RAM_DEVICES.iter().any(is) {
        return Medium::Ram(name);
    }
    match fs::read_to_string(place.join("loop/backing_file")) {
        Ok(file) => match look(Path::new(file.trim_end_matches('\n')), layer + 1) {
            Medium::Ram(below) => Medium::Ram(format!("{name} over {below}")),
            medium => medium,
        },
        Err(_) => Medium::Disk,
    }
}

/// The number by which a file system is known.
fn magic(path: &Path) -> Option<u32> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: an all-zero statfs is a valid value of that plain C struct; it is filled by the call below.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string and both arguments outlive the call.
    (unsafe { libc::statfs(path.as_ptr(), &mut found) } == 0).then_some(found.f_type as u32)
}

/// Where what is written to an overlay goes.
fn upper_of(path: &Path) -> Option<PathBuf> {
    let path = path.canonicalize().ok()?;
    upper_in(&fs::read_to_string("/proc/self/mountinfo").ok()?, &path)
}

/// The last mount that the path is below, in the kernel's list: `… … … root POINT options … - overlay NAME options`.
fn upper_in(mounts: &str, path: &Path) -> Option<PathBuf> {
    let (mut found, mut longest) = (None, 0);
    for line in mounts.lines() {
        let (before, behind) = line.split_once(" - ")?;
        let point = unescaped(before.split(' ').nth(4)?);
        if path.starts_with(&point) && point.as_os_str().len() >= longest {
            longest = point.as_os_str().len();
            let mut parts = behind.split(' ');
            let is_overlay = parts.next() == Some("overlay");
            let options = parts.nth(1).unwrap_or_default();
            let upper = options.split(',').find_map(|option| option.strip_prefix("upperdir="));
            found = upper.filter(|_| is_overlay).map(unescaped);
        }
    }
    found
}

/// Blanks and their like are written as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, more)) = rest.split_first() {
        let octal =
            more.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(real) => {
                out.push(real);
                rest = &more[3..];
            }
            None => {
                out.push(byte);
                rest = more;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_told_from_disks() {
        for dir in ["/dev/shm", "/run/user"] {
            if magic(Path::new(dir)) == Some(IN_RAM[0].0) {
                assert_eq!(Medium::of(Path::new(dir)), Medium::Ram("tmpfs".to_owned()), "{dir}");
                let refused = need_disk(Path::new(dir), false).unwrap_err();
                assert!(refused.text.contains("--store-in-ram"), "{refused}");
                assert_eq!(refused.kind, Kind::Usage);
                need_disk(Path::new(dir), true).unwrap();
            }
        }
        assert_eq!(Medium::of(Path::new("/no/such/place")), Medium::Disk);
        need_disk(Path::new("/no/such/place"), false).unwrap();
    }

    #[test]
    fn the_upper_part_of_an_overlay_is_found() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/vda rw\n\
                      30 22 0:9 / /mnt/a\\040b rw,relatime shared:1 - overlay over rw,lowerdir=/l,upperdir=/dev/shm/u\\054x,workdir=/w\n\
                      31 22 0:10 / /mnt/a\\040b/deep rw - ext4 /dev/vdb rw\n";
        let upper = |path| upper_in(mounts, Path::new(path));
        assert_eq!(upper("/mnt/a b/store"), Some(PathBuf::from("/dev/shm/u,x")));
        assert_eq!(upper("/mnt/a b/deep/store"), None);
        assert_eq!(upper("/srv"), None);
        assert_eq!(upper_in("rubbish\n", Path::new("/")), None);
    }
}
