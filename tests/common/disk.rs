//! Disks of a test that fail in earnest: loop devices, bare or with a file system, over a sparse file that can be cut
//! short.
//!
//! ```text
//!   store ─▶ ext4, or the bare device ─▶ loop device ─▶ image, a sparse file
//!              full: ENOSPC                cut: EIO       truncated: EIO where it was
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A loop device of a test, which goes with it.
#[derive(Debug)]
pub(crate) struct Disk {
    image: PathBuf,
    /// `/dev/loopN`.
    device: PathBuf,
    mount: Option<PathBuf>,
    /// Bytes free when there was nothing on it.
    room: u64,
}

impl Disk {
    /// A device of so many bytes with nothing on it.
    ///
    /// # Errors
    /// Why this host or this user makes no such devices.
    pub(crate) fn bare(directory: &Path, bytes: u64) -> Result<Disk, String> {
        let image = directory.join("disk.img");
        let file = fs::File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(bytes).map_err(|error| error.to_string())?;
        let device = run("losetup", &["--find", "--show", "--direct-io=on", text(&image)])?;
        // The kernel keeps that from a device of this number that a test left behind when it was killed.
        run("blockdev", &["--setrw", &device])?;
        Ok(Disk { image, device: device.into(), mount: None, room: 0 })
    }

    /// A device with ext4 on it, mounted. It has no journal, whose own writes would fail as well.
    ///
    /// # Errors
    /// As [`Disk::bare`].
    pub(crate) fn ext4(directory: &Path, bytes: u64) -> Result<Disk, String> {
        let mut disk = Disk::bare(directory, bytes)?;
        run("mkfs.ext4", &["-q", "-m", "0", "-O", "^has_journal", text(&disk.device)])?;
        let mount = directory.join("disk");
        fs::create_dir_all(&mount).map_err(|error| error.to_string())?;
        run("mount", &[text(&disk.device), text(&mount)])?;
        disk.mount = Some(mount);
        disk.room = disk.free_bytes();
        Ok(disk)
    }

    /// With xfs on it, mounted: files can share blocks there.
    ///
    /// # Errors
    /// As [`Disk::bare`].
    pub(crate) fn xfs(directory: &Path, bytes: u64) -> Result<Disk, String> {
        let mut disk = Disk::bare(directory, bytes)?;
        run("mkfs.xfs", &["-q", text(&disk.device)])?;
        let mount = directory.join("disk");
        fs::create_dir_all(&mount).map_err(|error| error.to_string())?;
        run("mount", &[text(&disk.device), text(&mount)])?;
        disk.mount = Some(mount);
        Ok(disk)
    }

    /// What `--store` is to name: the file system, or else the device.
    pub(crate) fn store(&self) -> String {
        text(self.mount.as_ref().unwrap_or(&self.device)).to_owned()
    }

    /// Major and minor number, as cgroups name it.
    pub(crate) fn numbers(&self) -> String {
        let name = self.device.file_name().expect("a device").to_str().expect("ASCII");
        fs::read_to_string(format!("/sys/block/{name}/dev")).expect("a block device").trim().to_owned()
    }

    fn free_bytes(&self) -> u64 {
        let df = run("df", &["--output=avail", "-B1", &self.store()]).expect("df runs");
        df.lines().last().and_then(|line| line.trim().parse().ok()).expect("df prints a number")
    }

    /// Fills the empty file system with ballast until so many bytes are free.
    pub(crate) fn leave_free(&self, bytes: u64) {
        // A process that has ended may still have its file: the kernel closes what an io_uring used by and by,
        // on a busy machine within a minute.
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.free_bytes() < self.room {
            assert!(Instant::now() < deadline, "the last store stays");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.fill(bytes);
    }

    /// Fills the file system with ballast until so many bytes are free, whatever is there already.
    pub(crate) fn fill(&self, bytes: u64) {
        let length = self.free_bytes().saturating_sub(bytes).to_string();
        run("fallocate", &["-l", &length, text(&self.ballast())]).expect("the ballast fits");
    }

    /// Takes so many bytes of the ballast away.
    pub(crate) fn give(&self, bytes: u64) {
        let ballast = fs::OpenOptions::new().write(true).open(self.ballast()).expect("there is ballast");
        let length = ballast.metadata().expect("its length").len();
        ballast.set_len(length - bytes).expect("less ballast");
    }

    fn ballast(&self) -> PathBuf {
        self.mount.as_ref().expect("a file system").join("ballast")
    }

    pub(crate) fn drop_ballast(&self) {
        fs::remove_file(self.ballast()).expect("there is ballast");
    }

    /// The device loses its data from there on: reads of it fail. (A write brings a block back, as a disk's spare
    /// sectors do.)
    pub(crate) fn lose_behind(&self, bytes: u64) {
        self.resize_image(bytes);
    }

    /// The device ends there: reads and writes beyond that fail, and the data there is lost.
    pub(crate) fn cut(&self, bytes: u64) {
        self.resize_image(bytes);
        run("losetup", &["--set-capacity", text(&self.device)]).expect("a smaller device");
    }

    /// The device has that length again.
    pub(crate) fn mend(&self, bytes: u64) {
        self.cut(bytes);
    }

    /// Whether a bare device takes writes.
    pub(crate) fn set_writable(&self, writable: bool) {
        let how = if writable { "--setrw" } else { "--setro" };
        run("blockdev", &[how, text(&self.device)]).expect("a device that can be set so");
    }

    fn resize_image(&self, bytes: u64) {
        let image = fs::OpenOptions::new().write(true).open(&self.image).expect("the image");
        image.set_len(bytes).expect("a file system that truncates");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(mount) = &self.mount {
            let _ = run("umount", &["--lazy", text(mount)]);
        }
        // The kernel lets go of it when its last user has.
        let _ = run("losetup", &["--detach", text(&self.device)]);
        let _ = fs::remove_file(&self.image);
    }
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("a path of the test's own")
}

pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(said(&output.stdout)),
        false => Err(format!("{program}: {}", said(&output.stderr))),
    }
}
