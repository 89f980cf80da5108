//! The kernel, initramfs and checker that `scripts/setup --qemu` has made, and QEMU's arguments to run them.

use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::{Reason, skip};

/// The directory in which `scripts/setup --qemu` has made them; none if it has not been run.
fn directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory").join("qemu")
}

/// The checker, for the host.
pub(crate) fn checker() -> PathBuf {
    directory().join("checker")
}

/// Runs the checker on the host (`image`, `send`); its line.
pub(crate) fn on_host(arguments: &[&str]) -> String {
    let output = Command::new(checker()).args(arguments).output().expect("the checker runs");
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// A QEMU to test with.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    pub(crate) binary: PathBuf,
    /// The version as QEMU says it: `7.2.22`.
    pub(crate) version: String,
}

impl Qemu {
    /// The installed one, and the newest of Debian's packages if it was fetched. Ends the test if guests cannot run
    /// here.
    pub(crate) fn versions() -> Vec<Qemu> {
        let kit = directory();
        let made = ["vmlinuz", "initramfs.gz", "checker"].iter().all(|file| kit.join(file).exists());
        let newest = kit.join("newest/usr/bin/qemu-system-x86_64");
        let found: Vec<Qemu> =
            [PathBuf::from("qemu-system-x86_64"), newest].map(Qemu::at).into_iter().flatten().collect();
        if !made || found.is_empty() {
            skip(Reason::Qemu, "run scripts/setup --qemu");
        }
        found
    }

    fn at(binary: PathBuf) -> Option<Qemu> {
        let output = Command::new(&binary).arg("--version").output().ok()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = said.split_once("version ")?.1.split_whitespace().next()?.to_owned();
        Some(Qemu { binary, version })
    }
}

/// A machine that boots the kit's kernel, as small as it can be. Devices are added after its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    memory: String,
    cpus: u32,
    parameters: String,
}

impl Machine {
    /// `memory` as QEMU reads it: `256M`.
    pub(crate) fn new(memory: &str) -> Machine {
        Machine { memory: memory.to_owned(), cpus: 1, parameters: String::new() }
    }

    pub(crate) fn cpus(mut self, cpus: u32) -> Machine {
        self.cpus = cpus;
        self
    }

    /// The guest's jobs: a line of shell without double quotes. Without it, there is a shell on the console.
    pub(crate) fn run(mut self, jobs: &str) -> Machine {
        assert!(!jobs.contains('"'), "double quotes end the kernel's parameter: {jobs}");
        self.parameters += &format!(" vmemd.run=\"{jobs}\"");
        self
    }

    /// The address of the guest's first network device: `10.0.2.15/24`.
    pub(crate) fn ip(mut self, address: &str) -> Machine {
        self.parameters += &format!(" vmemd.ip={address}");
        self
    }

    /// QEMU's arguments, without the console (which `Guest::start` adds).
    pub(crate) fn args(&self) -> Vec<String> {
        let kit = directory();
        let file = |name: &str| kit.join(name).display().to_string();
        // Nothing that is probed, waited for or mitigated for nothing: it would be paid in emulated instructions.
        let append = format!(
            "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check 8250.nr_uarts=1{}",
            self.parameters
        );
        #[rustfmt::skip]
        let args = [
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35", "-accel", "tcg,thread=multi",
            "-smp", &self.cpus.to_string(), "-m", &self.memory,
            "-kernel", &file("vmlinuz"), "-initrd", &file("initramfs.gz"), "-append", &append,
        ];
        args.map(str::to_owned).to_vec()
    }
}
