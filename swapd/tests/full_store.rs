//! A store whose file system fills up while the VM runs: nothing is lost, and it goes on once there is room.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;

use common::{Patience, store_directory};
use swapd::{Engine, Notice};

const MIB: u64 = 1 << 20;

/// A small ext4 file system in a file, mounted as long as this lives.
struct SmallDisk {
    image: PathBuf,
    mount: PathBuf,
}

impl SmallDisk {
    fn new(bytes: u64) -> Result<Self, String> {
        let image = store_directory().join(format!("small-disk-{}.img", std::process::id()));
        let mount = image.with_extension("mnt");
        let disk = SmallDisk { image, mount };
        let file = std::fs::File::create(&disk.image).map_err(|error| error.to_string())?;
        file.set_len(bytes)
            .and_then(|()| std::fs::create_dir_all(&disk.mount))
            .map_err(|error| error.to_string())?;
        run("mkfs.ext4", &["-q".as_ref(), "-m".as_ref(), "0".as_ref(), &disk.image])?;
        run("mount", &["-o".as_ref(), "loop".as_ref(), &disk.image, &disk.mount])?;
        Ok(disk)
    }

    /// Leaves `bytes` free.
    fn fill_up(&self, bytes: u64) -> PathBuf {
        let filler = self.mount.join("filler");
        let output =
            Command::new("df").args(["--output=avail", "-B1"]).arg(&self.mount).output().expect("df runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let free: u64 =
            text.lines().last().and_then(|line| line.trim().parse().ok()).expect("df prints a number");
        let length = free.saturating_sub(bytes).to_string();
        run("fallocate", &["-l".as_ref(), length.as_ref(), &filler]).expect("the filler fits");
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l".as_ref(), &self.mount]);
        let _ = std::fs::remove_dir(&self.mount);
        let _ = std::fs::remove_file(&self.image);
    }
}

fn run(program: &str, arguments: &[&Path]) -> Result<(), String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{program}: {said}")) }
}

#[test]
fn a_full_disk_stops_the_vm_and_loses_nothing() {
    let disk = match SmallDisk::new(256 * MIB) {
        Ok(disk) => disk,
        Err(reason) => {
            return common::skipped(&format_args!("no loop device with a file system here ({reason})"));
        }
    };
    let (sender, notices) = mpsc::channel();
    let notify = Box::new(move |notice| sender.send(notice).expect("the test listens"));
    let engine =
        Engine::start(common::config(128 * MIB, 16 * MIB, disk.mount.clone(), false), notify).unwrap();
    let vm = common::Vm::of(engine);
    let filler = disk.fill_up(32 * MIB);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| vm.write_all(1));
        let Notice::StoreFailed(reason) = notices.recv().expect("the engine tells") else {
            panic!("another notice came first");
        };
        assert!(reason.contains("No space left"), "{reason}");
        assert!(vm.stats().store.failed.is_some());
        // It stands still and keeps what it has; with room it goes on.
        assert!(!writer.is_finished());
        std::fs::remove_file(&filler).unwrap();
        Patience::default().until("the store takes writes again", || {
            vm.handle().retry_store().unwrap();
            writer.is_finished().then_some(())
        });
    });
    assert_eq!(vm.mismatches(1), 0);
    assert!(vm.stats().store.failed.is_none());
    drop(vm);
}
