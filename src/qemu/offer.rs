//! A VM's QEMU as the source describes it, and whether this host can start the same.
//!
//! The description comes over the network: it is bounded and parsed like anything else a stranger says. Still, a QEMU
//! command line can name scripts to start, so whoever may reach the daemon's port can start programs on this host.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmprocess::failure::{Failure, FailureKind};

use super::ask::Ask;
use super::cpu::{self, Cpu};
use super::machine::{Machines, Pinned, Version};
use super::options::CommandLine;
use super::refuse::unmovable;
use super::resources::{self, Host};
use super::rewrite::LinePlan;
use super::rules::Rules;
use super::{accel, binary};

/// The source's description of its QEMU: enough to start the same elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// By the name that the user gave.
    pub binary: String,
    /// What that is a link to, if it is one: a host without the link has this perhaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub real: Option<String>,
    /// As the user gave them, with absolute paths, the machine's version and the accelerator.
    pub args: Vec<String>,
    pub version: Version,
    pub machine: Pinned,
    /// If the guest sees the host's processor.
    pub cpu: Option<Cpu>,
}

/// The QEMU that the target starts.
#[derive(Debug)]
pub struct Accepted {
    pub binary: PathBuf,
    pub plan: LinePlan,
    /// The same machine in the names of this host, for the VM's way onward.
    pub onward: Offer,
}

impl Offer {
    /// Pins the machine in `line`, which otherwise stays as it is. What is offered has the same with absolute paths.
    pub fn of(
        binary: &Path,
        line: &mut CommandLine,
        directory: &Path,
        ask: &dyn Ask,
        host: impl FnOnce() -> Result<Cpu, Failure>,
    ) -> Result<Offer, Failure> {
        let version = Version::of(ask, binary)?;
        let machine = Machines::of(ask, binary)?.pin(line)?;
        let mut offered = line.clone();
        resources::absolute(&mut offered, directory)?;
        accel::pin(&mut offered, ask, binary, kvm_is_usable())?;
        let cpu = if cpu::shows_host(&offered)? {
            let mut cpu = host()?;
            let off = cpu::turned_off(&offered);
            cpu.flags.retain(|flag| !off.contains(flag));
            Some(cpu)
        } else {
            None
        };
        let (binary, real) = names(binary)?;
        Ok(Offer { binary, real, args: offered.print(), version, machine, cpu })
    }

    /// Maps names by the rules, and checks that this host has all of it. `path` is `PATH`, `cpu` this host's.
    pub fn accept(
        &self,
        rules: &Rules,
        host: &dyn Host,
        ask: &dyn Ask,
        path: &OsStr,
        cpu: &Cpu,
    ) -> Result<Accepted, Failure> {
        let mut line = CommandLine::parse(&self.args)?;
        resources::map(&mut line, rules)?;
        let plan = LinePlan::of(&line)?;
        unmovable(&line)?;
        let mut missing = resources::missing(&line, host)?;
        let found = self.find(rules, path).and_then(|binary| {
            let version = Version::of(ask, &binary)?;
            missing.extend(self.unlike(&line, &binary, version, ask)?);
            Ok((binary, version))
        });
        if let Err(failure) = &found {
            missing.insert(0, failure.text.clone());
        }
        if let Some(source) = &self.cpu {
            if !source.is_sane() {
                return Err(Failure::new(
                    FailureKind::Link,
                    "the source names more processor features than there are",
                ));
            }
            missing.extend(source.lost_on(cpu));
        }
        resources::report(&missing)?;
        let (binary, version) = found?;
        let (name, real) = names(&binary)?;
        let onward = Offer { binary: name, real, args: line.print(), version, ..self.clone() };
        Ok(Accepted { binary, plan, onward })
    }

    /// The QEMU binary of this host: of the same (or the mapped) path, else of the same name; else what that is a link
    /// to.
    fn find(&self, rules: &Rules, path: &OsStr) -> Result<PathBuf, Failure> {
        let found = find(&self.binary, rules, path).or_else(|failure| match &self.real {
            Some(real) => find(real, rules, path).map_err(|_| failure),
            None => Err(failure),
        })?;
        binary::check(&found)?;
        Ok(found)
    }

    /// In what this host's QEMU is not the source's.
    fn unlike(
        &self,
        line: &CommandLine,
        binary: &Path,
        version: Version,
        ask: &dyn Ask,
    ) -> Result<Vec<String>, Failure> {
        let mut lines = Vec::new();
        let supported = accel::supported(ask, binary)?;
        for accel in line.accelerators()?.iter().filter(|accel| !supported.contains(accel)) {
            lines.push(format!(
                "{} (version {version}) has no accelerator {accel:?}, by which the VM runs: use a QEMU that has it",
                binary.display()
            ));
        }
        if !Machines::of(ask, binary)?.has(&self.machine.machine) {
            lines.push(format!(
                "{} (version {version}) has no machine {:?}: use a QEMU that has it, the source's is {}",
                binary.display(),
                self.machine.machine,
                self.version
            ));
        }
        if !self.machine.versioned
            && (version.major, version.minor) != (self.version.major, self.version.minor)
        {
            lines.push(format!(
                "machine {:?} has no version, so both hosts need the same QEMU: here is {version}, there {}",
                self.machine.machine, self.version
            ));
        }
        if let Some(model) = cpu::model(line) {
            let known = cpu::check_model(&ask.ask(binary, &["-cpu", "help"])?, model);
            lines.extend(known.err().map(|failure| failure.text));
        }
        Ok(lines)
    }
}

fn find(binary: &str, rules: &Rules, path: &OsStr) -> Result<PathBuf, Failure> {
    let named = rules.path(binary).unwrap_or_else(|| binary.to_owned());
    let name = named.rsplit('/').next().unwrap_or_default();
    let found = if named.starts_with('/') { binary::find(&named, path) } else { binary::find(name, path) };
    let found = found.or_else(|failure| binary::find(name, path).map_err(|_| failure));
    // A binary that a distribution wraps has a dot before its name: `.qemu-system-x86_64-wrapped`.
    let is_qemu = |name: &str| {
        let name = name.strip_prefix('.').unwrap_or(name);
        name.starts_with("qemu") || name == "kvm"
    };
    let leads = |path: &PathBuf| {
        let real = path.canonicalize().ok()?;
        real.file_name()?.to_str().map(is_qemu)
    };
    // A link of any name may lead to one.
    if !is_qemu(name) && found.as_ref().ok().and_then(leads) != Some(true) {
        let text = format!(
            "{named} is not a QEMU by its name (qemu-system-…): it is not started for a VM that arrives"
        );
        return Err(Failure::new(FailureKind::Usage, text));
    }
    found
}

/// Whether this user may use KVM here.
fn kvm_is_usable() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The name of the binary, and what it is a link to.
fn names(binary: &Path) -> Result<(String, Option<String>), Failure> {
    let real = binary.canonicalize().ok().filter(|real| real != binary);
    Ok((utf8(binary)?, real.as_deref().map(utf8).transpose()?))
}

fn utf8(binary: &Path) -> Result<String, Failure> {
    let text = || Failure::new(FailureKind::Usage, format!("{} is not UTF-8: rename it", binary.display()));
    binary.to_str().map(str::to_owned).ok_or_else(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A QEMU of a version, with one family of machines.
    #[derive(Debug)]
    struct Fake(&'static str);

    impl Ask for Fake {
        fn ask(&self, _: &Path, args: &[&str]) -> Result<String, Failure> {
            Ok(match args {
                ["-accel", "help"] => "Accelerators supported in QEMU binary:\ntcg\nkvm\n".to_owned(),
                ["--version"] => format!("QEMU emulator version {}.1 (x)", self.0),
                ["-machine", "help"] => format!(
                    "Supported machines are:\nq35 x (alias of pc-q35-{0})\npc-q35-{0} x (default)\nmicrovm x\n",
                    self.0
                ),
                _ => "Available CPUs:\nx86 qemu64 x\nx86 host x\n".to_owned(),
            })
        }
    }

    /// A host that has every file and no tap.
    #[derive(Debug)]
    struct Rich;

    impl Host for Rich {
        fn is_directory(&self, _: &Path) -> bool {
            true
        }
        fn exists(&self, path: &Path) -> bool {
            !path.starts_with("/missing")
        }
        fn is_program(&self, _: &Path) -> bool {
            true
        }
        fn has_interface(&self, _: &str) -> bool {
            false
        }
        fn is_bound(&self, _: &Path) -> bool {
            false
        }
        fn leads_into_process(&self, _: &Path) -> Option<PathBuf> {
            None
        }
    }

    fn cpu(flags: &str) -> Cpu {
        Cpu::parse(&format!("vendor_id: A\nflags: {flags}\n"))
    }

    /// A directory with a program that is called a QEMU.
    struct Bin(PathBuf, #[allow(dead_code, reason = "held for its end")] testkit::TempDir);

    impl Bin {
        fn new(name: &str) -> Bin {
            let dir = testkit::directory(name);
            std::fs::copy("/proc/self/exe", dir.path().join("qemu-system-x")).unwrap();
            Bin(dir.path().canonicalize().unwrap(), dir)
        }
    }

    fn offer(text: &str) -> Offer {
        let mut line = CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap();
        let binary = Path::new("/elsewhere/qemu-system-x");
        let host = || Ok(cpu("sse avx2 arch_capabilities"));
        let offer = Offer::of(binary, &mut line, Path::new("/home"), &Fake("7.2"), host).unwrap();
        serde_json::from_str(&serde_json::to_string(&offer).unwrap()).unwrap()
    }

    #[test]
    fn what_is_offered_can_be_started_elsewhere() {
        let offer = offer("-m 1G -M q35,accel=kvm -cpu host,-arch-capabilities -drive file=a.img");
        assert_eq!(
            offer.args.join(" "),
            "-m 1G -M pc-q35-7.2,accel=kvm -cpu host,-arch-capabilities -drive file=/home/a.img"
        );
        assert_eq!(offer.cpu, Some(cpu("sse avx2")));
        let bin = Bin::new("same");
        let rules = Rules::parse("[[map]]\nfrom = \"/home\"\nto = \"/mnt\"\n", "rules").unwrap();
        let path = bin.0.as_os_str();
        let accepted = offer.accept(&rules, &Rich, &Fake("7.2"), path, &cpu("sse avx2 more")).unwrap();
        assert_eq!(accepted.binary, bin.0.join("qemu-system-x"));
        assert_eq!(accepted.onward.args.last().unwrap(), "file=/mnt/a.img");
        assert_eq!(Path::new(&accepted.onward.binary), accepted.binary);
        // Back home: what has been mapped is not mapped again, and the processor is still the one that the guest knows.
        let back =
            accepted.onward.accept(&Rules::default(), &Rich, &Fake("7.2"), path, &cpu("sse avx2")).unwrap();
        assert_eq!(back.onward, accepted.onward);
        assert_eq!(accepted.plan.memory().bytes(), 1 << 30);
    }

    #[test]
    fn everything_that_is_not_there_is_told_at_once() {
        let offer = offer(
            "-m 1G -M q35,accel=kvm -cpu host -drive file=/missing/a -netdev tap,id=n,ifname=t,script=no",
        );
        let bin = Bin::new("none");
        let path = bin.0.as_os_str();
        let error = offer.accept(&Rules::default(), &Rich, &Fake("6.0"), path, &cpu("sse")).unwrap_err();
        assert_eq!(error.kind, FailureKind::Host);
        for says in [
            "disk /missing/a is missing here",
            "tap interface t is missing here",
            "has no machine \"pc-q35-7.2\": use a QEMU that has it, the source's is 7.2.1",
            "lacks: arch_capabilities avx2",
        ] {
            assert!(error.text.contains(says), "{says}: {error}");
        }
        let error =
            offer.accept(&Rules::default(), &Rich, &Fake("7.2"), OsStr::new(""), &cpu("")).unwrap_err();
        assert!(error.text.contains("/elsewhere/qemu-system-x: No such file"), "{error}");
    }

    #[test]
    fn what_is_only_alike_is_told() {
        let bin = Bin::new("alike");
        let accept = |offer: Offer, version| {
            offer.accept(&Rules::default(), &Rich, &Fake(version), bin.0.as_os_str(), &cpu("")).map(|_| ())
        };
        let text = |result: Result<(), Failure>| result.unwrap_err().text;
        accept(offer("-m 1G -M microvm"), "7.2").unwrap();
        assert!(text(accept(offer("-m 1G -M microvm"), "8.0")).contains("both hosts need the same QEMU"));
        assert!(text(accept(offer("-m 1G -cpu Next"), "7.2")).contains("no processor model \"Next\""));
        assert!(text(accept(offer("-m 1G -snapshot"), "7.2")).starts_with("this VM cannot be moved"));
        for binary in ["/bin/sh", "/bin/.sh", "/bin/..qemu-system-x", "/bin/not-qemu"] {
            let mut wrong = offer("-m 1G");
            wrong.binary = binary.to_owned();
            let says = format!("{binary} is not a QEMU by its name");
            assert!(text(accept(wrong, "7.2")).contains(&says), "{binary}");
        }
        let mut wrapped = offer("-m 1G");
        wrapped.binary = "/elsewhere/bin/.qemu-system-x-wrapped".to_owned();
        assert!(text(accept(wrapped.clone(), "7.2")).contains("No such file"));
        std::fs::copy("/proc/self/exe", bin.0.join(".qemu-system-x-wrapped")).unwrap();
        accept(wrapped, "7.2").unwrap();
        let mut wrong = offer("-m 1G");
        wrong.args.push("-daemonize".to_owned());
        assert!(text(accept(wrong, "7.2")).contains("vmemd cannot run"));
        let mut wrong = offer("-m 1G");
        let flags = (0..2000).map(|n| n.to_string()).collect();
        wrong.cpu = Some(Cpu { vendor: String::new(), flags });
        assert!(text(accept(wrong, "7.2")).contains("more processor features"));
    }
}
