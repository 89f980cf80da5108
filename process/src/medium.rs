//! The medium that a store's pages end on: a disk, this host's own RAM, or another host. A store in RAM would move
//! pages from RAM to RAM, so it is refused unless the user insists.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, FailureKind};

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

/// The medium of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A disk, or what could not be looked into.
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
            Err(Failure::new(FailureKind::Usage, text))
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
        let upper = mount_of(path).and_then(|mount| mount.upper());
        return match upper.map(|upper| look(&upper, layer + 1)) {
            Some(Medium::Ram(name)) => Medium::Ram(format!("an overlay on {name}")),
            Some(medium) => medium,
            None => Medium::Disk,
        };
    }
    // The number of a file system over several devices (btrfs) is none of theirs.
    if libc::major(meta.dev()) == 0 {
        let source = mount_of(path).and_then(|mount| mount.device());
        return source.map_or(Medium::Disk, |source| look(&source, layer + 1));
    }
    device(meta.dev(), layer)
}

/// Of a block device, by its number.
fn device(number: u64, layer: u32) -> Medium {
    let link = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    fs::canonicalize(link).map_or(Medium::Disk, |place| block(&place, layer))
}

/// Of a block device, by its directory in sysfs.
fn block(place: &Path, layer: u32) -> Medium {
    if layer > LAYERS_MAX {
        return Medium::Disk;
    }
    let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is = |kind: &&str| {
        name.strip_prefix(*kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    if RAM_DEVICES.iter().any(is) {
        return Medium::Ram(name);
    }
    let below = if let Ok(file) = fs::read_to_string(place.join("loop/backing_file")) {
        look(Path::new(file.trim_end_matches('\n')), layer + 1)
    } else if place.join("partition").exists() {
        place.parent().map_or(Medium::Disk, |whole| block(whole, layer + 1))
    } else {
        worst(slaves(place).map(|slave| block(&slave, layer + 1)))
    };
    match below {
        Medium::Ram(below) => Medium::Ram(format!("{name} over {below}")),
        medium => medium,
    }
}

/// The devices that the device mapper, or a RAID, makes this one of.
fn slaves(place: &Path) -> impl Iterator<Item = PathBuf> {
    let slaves = fs::read_dir(place.join("slaves")).into_iter().flatten();
    slaves.filter_map(|slave| fs::canonicalize(slave.ok()?.path()).ok())
}

/// Of a device made of several: RAM is taken if one of them is in RAM.
fn worst(parts: impl Iterator<Item = Medium>) -> Medium {
    let rank = |medium: &Medium| match medium {
        Medium::Disk => 0,
        Medium::Network(_) => 1,
        Medium::Ram(_) => 2,
    };
    parts.max_by_key(rank).unwrap_or(Medium::Disk)
}

/// The number by which a file system is known.
fn magic(path: &Path) -> Option<u32> {
    rustix::fs::statfs(path).ok().map(|found| found.f_type as u32)
}

/// What is mounted at a place.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    kind: String,
    source: String,
    options: String,
}

impl Mount {
    /// Where what is written to an overlay goes.
    fn upper(&self) -> Option<PathBuf> {
        let upper = self.options.split(',').find_map(|option| option.strip_prefix("upperdir="));
        upper.filter(|_| self.kind == "overlay").map(unescaped)
    }

    /// The block device, or one of those, that the file system is on.
    fn device(&self) -> Option<PathBuf> {
        let source = unescaped(&self.source);
        let is_device = |path: &PathBuf| {
            path.is_absolute() && fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
        };
        Some(source).filter(is_device)
    }
}

fn mount_of(path: &Path) -> Option<Mount> {
    let path = path.canonicalize().ok()?;
    mount_in(&fs::read_to_string("/proc/self/mountinfo").ok()?, &path)
}

/// The last mount that the path is below, in the kernel's list: `… … … root POINT options … - KIND SOURCE options`.
fn mount_in(mounts: &str, path: &Path) -> Option<Mount> {
    let (mut found, mut longest) = (None, 0);
    for line in mounts.lines() {
        let (before, behind) = line.split_once(" - ")?;
        let point = unescaped(before.split(' ').nth(4)?);
        if path.starts_with(&point) && point.as_os_str().len() >= longest {
            longest = point.as_os_str().len();
            let mut parts = behind.split(' ').map(str::to_owned);
            let mut part = || parts.next().unwrap_or_default();
            found = Some(Mount { kind: part(), source: part(), options: part() });
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
                assert_eq!(refused.kind, FailureKind::Usage);
                need_disk(Path::new(dir), true).unwrap();
            }
        }
        assert_eq!(Medium::of(Path::new("/no/such/place")), Medium::Disk);
        need_disk(Path::new("/no/such/place"), false).unwrap();
    }

    #[test]
    fn what_a_file_system_is_on_is_found() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/vda rw\n\
                      30 22 0:9 / /mnt/a\\040b rw,relatime shared:1 - overlay over rw,lowerdir=/l,upperdir=/dev/shm/u\\054x,workdir=/w\n\
                      31 22 0:10 / /mnt/a\\040b/deep rw - ext4 /dev/vdb rw\n";
        let mount = |path| mount_in(mounts, Path::new(path));
        let upper = |path| mount(path).and_then(|mount| mount.upper());
        assert_eq!(upper("/mnt/a b/store"), Some(PathBuf::from("/dev/shm/u,x")));
        assert_eq!(upper("/mnt/a b/deep/store"), None);
        assert_eq!(upper("/srv"), None);
        assert_eq!(mount("/mnt/a b/deep/store").map(|mount| mount.source), Some("/dev/vdb".to_owned()));
        assert_eq!(mount("/srv").map(|mount| mount.source), Some("/dev/vda".to_owned()));
        assert_eq!(mount_in("rubbish\n", Path::new("/")), None);
        // Names that are no devices, or none from here.
        for source in ["tmpfs", "pool/data", "/dev/root-of-nothing", "/", "relative"] {
            let mount = Mount { kind: "zfs".to_owned(), source: source.to_owned(), options: String::new() };
            assert_eq!(mount.device(), None, "{source}");
        }
    }

    /// A directory as the kernel's sysfs has them, which goes with its test.
    struct Sysfs(testkit::TempDir);

    impl Sysfs {
        fn new() -> Sysfs {
            Sysfs(testkit::directory("sysfs"))
        }

        /// A device at that path, made of these.
        fn device(&self, path: &str, slaves: &[&str]) -> PathBuf {
            let place = self.0.path().join(path);
            fs::create_dir_all(place.join("slaves")).unwrap();
            for slave in slaves {
                let name = Path::new(slave).file_name().unwrap();
                std::os::unix::fs::symlink(self.0.path().join(slave), place.join("slaves").join(name))
                    .unwrap();
            }
            place
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn ram_is_found_through_what_devices_are_made_of() {
        let sysfs = Sysfs::new();
        for disk in ["sda", "zram0", "ram7", "nvme0n1", "loop0", "loop1"] {
            sysfs.device(disk, &[]);
        }
        for part in ["sda/sda1", "zram0/zram0p1", "loop0/loop0p1", "nvme0n1/nvme0n1p2"] {
            sysfs.device(part, &[]);
            sysfs.file(&format!("{part}/partition"), "1\n");
        }
        sysfs.file("loop0/loop/backing_file", "/dev/shm/no such file\n");
        sysfs.file("loop1/loop/backing_file", "/dev/shm\n");
        sysfs.device("dm-0", &["sda/sda1"]);
        sysfs.device("dm-1", &["sda", "ram7"]);
        sysfs.device("dm-2", &["dm-1"]);
        sysfs.device("md0", &["nvme0n1/nvme0n1p2", "sda/sda1"]);
        sysfs.device("md1", &["zram0/zram0p1", "sda"]);
        // No kernel makes such a thing.
        sysfs.device("dm-9", &["dm-9"]);
        for (path, ram) in [
            ("sda", None),
            ("sda/sda1", None),
            ("nvme0n1/nvme0n1p2", None),
            ("zram0", Some("zram0")),
            ("zram0/zram0p1", Some("zram0p1")),
            ("loop0/loop0p1", None),
            ("dm-0", None),
            ("dm-1", Some("dm-1 over ram7")),
            ("dm-2", Some("dm-2 over dm-1 over ram7")),
            ("md0", None),
            ("md1", Some("md1 over zram0p1")),
            ("dm-9", None),
        ] {
            let expected = ram.map_or(Medium::Disk, |ram| Medium::Ram(ram.to_owned()));
            assert_eq!(block(&sysfs.0.path().join(path), 0), expected, "{path}");
        }
        if magic(Path::new("/dev/shm")) == Some(IN_RAM[0].0) {
            assert_eq!(block(&sysfs.0.path().join("loop1"), 0), Medium::Ram("loop1 over tmpfs".to_owned()));
        }
    }
}
