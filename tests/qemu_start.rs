//! A QEMU that does not get vmemd's engine does not run, because it has no memory; vmemd, the preload or QEMU says
//! why.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Host, needs_root};
use qemu::{BOOT, Guest, Machine, Qemu, qemus};
use testkit::{Reason, skip};
use vmprocess::qemu::{LIBRARY, MEMORY_FILES, VARIABLE};

/// The time that a QEMU without memory may take to end: what `docs/qemu.md` promises, and more for a loaded machine.
const AT_ONCE: Duration = Duration::from_secs(10);
/// The promise itself: one of [`TRIES`] tries must keep it.
const PROMISED: Duration = Duration::from_secs(1);
const TRIES: usize = 5;

/// A copy of vmemd with its preload beside it, so that the latter can be spoiled.
struct Installed {
    vmemd: PathBuf,
    library: PathBuf,
}

impl Installed {
    fn new(directory: &Path) -> Installed {
        let vmemd = Path::new(env!("CARGO_BIN_EXE_vmemd"));
        let library = [vmemd.with_file_name(LIBRARY), vmemd.with_file_name("deps").join(LIBRARY)];
        let library = library.into_iter().find(|path| path.exists()).expect("the preload is built");
        let copy = |from: &Path| {
            let to = directory.join(from.file_name().expect("a file"));
            std::fs::copy(from, &to).expect("a copy");
            to
        };
        std::fs::create_dir_all(directory).expect("a directory");
        Installed { vmemd: copy(vmemd), library: copy(&library) }
    }

    fn command(&self, host: &Host, words: &[&str]) -> Command {
        let mut command = Command::new(&self.vmemd);
        command.args(words).env("VMEMD_RUN_DIR", host.run_dir()).stdin(Stdio::null());
        command
    }

    /// Refuses to start the VM, with these words, within the promised time. Nothing of it is left.
    fn refuses(&self, host: &Host, binary: &str, code: i32, says: &[&str]) {
        let store = host.store();
        let run = ["run", "--name", "vm", "--ram", "32M", "--store", &store, "--", binary, "-m", "64M"];
        let mut fastest = Duration::MAX;
        for _ in 0..TRIES {
            if fastest < PROMISED {
                break;
            }
            let began = Instant::now();
            let output = self.command(host, &run).args(["-display", "none"]).output().expect("vmemd runs");
            fastest = fastest.min(began.elapsed());
            assert_fails(&output, code, says);
        }
        assert!(fastest < PROMISED, "it took {fastest:?}");
        host.assert_clean();
    }
}

fn assert_fails(output: &Output, code: i32, says: &[&str]) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{err}");
    for says in says {
        assert!(err.contains(says), "{says:?} is not in {err}");
    }
}

/// What `vmemd qemu-args` prints for this QEMU: its environment, and its words.
fn arguments(host: &Host, qemu: &Qemu) -> (Vec<(String, String)>, Vec<String>) {
    let (binary, store) = (qemu.binary.display().to_string(), host.store());
    let mut words = vec![
        "qemu-args",
        "--name",
        "vm",
        "--ram",
        "32M",
        "--store",
        &store,
        "--format",
        "json",
        "--",
        &binary,
    ];
    let machine = Machine::new("256M").args();
    words.extend(machine.iter().map(String::as_str));
    let said = host.vmemd(&words);
    assert_eq!(said.code, 0, "{said:?}");
    let made = said.json();
    let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
    let environment = made["env"].as_object().expect("an object");
    let environment = environment.iter().map(|(name, value)| (name.clone(), text(value))).collect();
    let words = made["args"].as_array().expect("a list").iter().map(text);
    (environment, std::iter::once(text(&made["binary"])).chain(words).collect())
}

/// QEMU, however it was started, has no memory: it prints the name that only the preload knows, and ends.
fn ends_without_memory(command: &mut Command, more: &[&str]) {
    let began = Instant::now();
    let output = command.stdin(Stdio::null()).output().expect("it can be started");
    assert!(began.elapsed() < AT_ONCE, "it ran for {:?}", began.elapsed());
    let says =
        [&["can't open backing store", MEMORY_FILES, "LD_PRELOAD-was-lost", "docs/qemu.md"], more].concat();
    assert_fails(&output, 1, &says);
}

#[test]
fn a_preload_that_the_loader_does_not_take_keeps_qemu_from_starting() {
    for qemu in qemus() {
        let host = Host::new("start-library");
        let installed = Installed::new(&host.root.join("bin"));
        let whole = std::fs::read(&installed.library).expect("the preload");
        let refuses = |says: &[&str]| {
            let says = [&[LIBRARY, "reinstall it"], says].concat();
            installed.refuses(&host, &qemu.binary.display().to_string(), 3, &says);
        };
        // As the kernel and the loader say it.
        std::fs::write(&installed.library, b"").expect("a file");
        refuses(&["QEMU's memory would have no budget", "file too short"]);
        // Cut within what is loaded: behind its headers, which the loader believes.
        for bytes in [100, 4096, 1 << 20] {
            std::fs::write(&installed.library, &whole[..bytes]).expect("a file");
            refuses(&[]);
        }
        std::fs::write(&installed.library, b"#!/bin/sh\n".repeat(100)).expect("a file");
        refuses(&["QEMU's memory would have no budget", "invalid ELF header"]);
        // Of 32 bits.
        let mut other = whole.clone();
        other[4] = 1;
        std::fs::write(&installed.library, &other).expect("a file");
        refuses(&["wrong ELF class"]);
        std::fs::write(&installed.library, &whole).expect("a file");
        std::fs::remove_file(&installed.library).expect("a file");
        let output = installed
            .command(&host, &["run", "--name", "vm", "--store", &host.store(), "--"])
            .args([qemu.binary.as_os_str(), "-m".as_ref(), "64M".as_ref()])
            .output()
            .expect("vmemd runs");
        assert_fails(&output, 3, &["libvmemd_preload.so is neither in"]);
    }
}

/// A file system of its own, mounted so, until this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: PathBuf, options: &str) -> Mounted {
        std::fs::create_dir_all(&at).expect("a directory");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "vmemd-test"]).arg(&at).status();
        assert!(done.expect("mount").success());
        Mounted(at)
    }

    fn again(&self, options: &str) {
        let done = Command::new("mount").args(["-o", options]).arg(&self.0).status();
        assert!(done.expect("mount").success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_preload_on_a_file_system_without_programs_keeps_qemu_from_starting() {
    needs_root("a mount");
    for qemu in qemus() {
        let host = Host::new("start-noexec");
        let library = Mounted::tmpfs(host.root.join("lib"), "size=512M");
        let installed = Installed::new(&host.root.join("bin"));
        // The command is where it can run; what it finds beside it is not.
        let there = library.0.join(LIBRARY);
        std::fs::copy(&installed.library, &there).expect("a copy");
        std::fs::remove_file(&installed.library).expect("a file");
        std::os::unix::fs::symlink(&there, &installed.library).expect("a link");
        library.again("remount,noexec");
        let binary = qemu.binary.display().to_string();
        installed.refuses(&host, &binary, 3, &["failed to map segment", "not mounted noexec"]);
        library.again("remount,exec");
        let mut command = installed
            .command(&host, &["run", "--name", "vm", "--ram", "32M", "--store", &host.store(), "--"]);
        command.arg(&qemu.binary).args(Machine::new("256M").args());
        let guest = Guest::start(command);
        host.wait_state("vm", "running");
        drop(guest);
    }
}

#[test]
fn a_preload_that_this_user_may_not_read_keeps_qemu_from_starting() {
    needs_root("another user");
    let qemu = qemus().remove(0);
    // Under a directory that any user may look into.
    let host = Host::new("start-unreadable");
    let place = testkit::directory("start");
    let directory = place.path();
    let installed = Installed::new(directory);
    for name in ["run", "store"] {
        let path = directory.join(name);
        std::fs::create_dir_all(&path).expect("a directory");
        std::os::unix::fs::chown(&path, Some(65534), Some(65534)).expect("root");
        std::fs::set_permissions(&path, Permissions::from_mode(0o700)).expect("root");
    }
    std::fs::set_permissions(&installed.library, Permissions::from_mode(0o600)).expect("its owner");
    let store = directory.join("store").display().to_string();
    let mut command = installed
        .command(&host, &["run", "--name", "vm", "--no-lock", "--ram", "32M", "--store", &store, "--"]);
    use std::os::unix::process::CommandExt;
    command.env("VMEMD_RUN_DIR", directory.join("run")).uid(65534).gid(65534);
    let output = command.args([qemu.binary.as_os_str(), "-m".as_ref(), "64M".as_ref()]).output();
    assert_fails(&output.expect("vmemd runs"), 3, &["would have no budget", "readable for this user"]);
}

/// A program of a few lines of C. Ends the test if there is no compiler.
fn compiled(directory: &Path, name: &str, source: &str) -> PathBuf {
    let (from, to) = (directory.join(format!("{name}.c")), directory.join(name));
    std::fs::write(&from, source).expect("a source file");
    let made = Command::new("cc").arg("-o").arg(&to).arg(&from).status();
    if !made.is_ok_and(|status| status.success()) {
        skip(Reason::Tools, "no C compiler");
    }
    to
}

#[test]
fn a_wrapper_is_told_as_such() {
    for qemu in qemus() {
        let host = Host::new("start-wrapper");
        let installed = Installed::new(&host.root.join("bin"));
        let real = qemu.binary.display().to_string();
        let script = host.root.join("qemu.sh");
        std::fs::write(&script, format!("#!/bin/sh\nexec env -i {real} \"$@\"\n")).expect("a script");
        std::fs::set_permissions(&script, Permissions::from_mode(0o755)).expect("its owner");
        installed.refuses(&host, &script.display().to_string(), 2, &["is a script: name the QEMU binary"]);
        installed.refuses(&host, "/usr/bin/env", 2, &["name the QEMU binary itself", "this one said"]);
        let path = which(&real);
        let source = |call: &str| {
            format!(
                "#include <unistd.h>\n#include <stdlib.h>\nint main(int n, char **v) {{ (void)n; char *none[] = \
                 {{NULL}}; (void)none; {call}; return 9; }}\n"
            )
        };
        let scrubs = source(&format!("execve(\"{path}\", v, none)"));
        let passes = source(&format!("execv(\"{path}\", v)"));
        let scrubs = compiled(&host.root, "scrubs", &scrubs);
        let passes = compiled(&host.root, "passes", &passes);
        let [scrubs, passes] = [scrubs, passes].map(|path| path.display().to_string());
        installed.refuses(&host, &scrubs, 2, &["becomes another program", "name the QEMU binary itself"]);
        installed.refuses(&host, &passes, 2, &["is a wrapper that starts", &path]);
    }
}

/// The file that a name means, without links.
fn which(name: &str) -> String {
    let found = if name.contains('/') {
        PathBuf::from(name)
    } else {
        let path = std::env::var_os("PATH").expect("a PATH");
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.exists()).expect("a program")
    };
    found.canonicalize().expect("a file").display().to_string()
}

#[test]
fn arguments_without_the_preload_give_a_qemu_without_memory() {
    for qemu in qemus() {
        let host = Host::new("start-args");
        let (environment, words) = arguments(&host, &qemu);
        let plain = || {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]);
            command
        };
        let set = |names: &[&str]| {
            let mut command = plain();
            command.envs(environment.iter().filter(|(name, _)| names.contains(&name.as_str())).cloned());
            command
        };
        ends_without_memory(&mut plain(), &[]);
        // sudo and its like keep the one and drop the other, or the other way round.
        ends_without_memory(&mut set(&[VARIABLE]), &[]);
        ends_without_memory(&mut set(&["LD_PRELOAD"]), &["VMEMD_PRELOAD is missing in its environment"]);
        // The emulator is another program than the one that the arguments were made for.
        let copy = host.root.join("qemu-copy");
        std::fs::copy(which(&words[0]), &copy).expect("a copy");
        let mut other = Command::new(&copy);
        other.args(&words[1..]).envs(environment.clone());
        let (meant, is) =
            (format!("VMEMD_PRELOAD is for {}", which(&words[0])), format!("this is {}", copy.display()));
        ends_without_memory(&mut other, &[&meant, &is]);
        // Settings that are garbled, or of another version: in nobody's name.
        let settings = &environment.iter().find(|(name, _)| name == VARIABLE).expect("settings").1;
        let version = format!("\"version\":\"{}\"", env!("CARGO_PKG_VERSION"));
        assert!(settings.contains(&version), "{settings}");
        for (settings, says) in [
            (settings[..settings.len() / 2].to_owned(), "VMEMD_PRELOAD cannot be read"),
            (settings.replace(&version, "\"version\":\"0.0.1\""), "VMEMD_PRELOAD is of vmemd 0.0.1"),
            (settings.replace(&version, "\"old\":1"), "VMEMD_PRELOAD is of vmemd another version"),
            (settings.replace("\"backends\"", "\"back\""), "missing field `backends`"),
        ] {
            let output = set(&["LD_PRELOAD"]).env(VARIABLE, settings).output().expect("it can be started");
            assert_fails(&output, 2, &[says]);
        }
        // And with all of it, behind another object: it runs.
        let mut whole = set(&[VARIABLE]);
        let library = &environment.iter().find(|(name, _)| name == "LD_PRELOAD").expect("a list").1;
        whole.env("LD_PRELOAD", format!("libm.so.6:{library}"));
        let guest = Guest::start(whole);
        guest.wait_for("init ready", BOOT);
        host.wait_state("vm", "running");
        assert_eq!(host.vmemd(&["stop", "vm"]).code, 0);
        drop(guest);
        host.assert_clean();
    }
}

/// Options that are added after vmemd's arguments cannot give the guest memory that is not vmemd's.
#[test]
fn memory_that_is_not_vmemds_is_refused_at_the_start() {
    for qemu in qemus() {
        let host = Host::new("start-memory");
        let (environment, words) = arguments(&host, &qemu);
        for (more, says) in [
            (
                &["-object", "memory-backend-ram,id=other,size=256M", "-machine", "memory-backend=other"][..],
                "the guest's memory is /objects/other, which is not vmemd's",
            ),
            (
                &[
                    "-m",
                    "256M,slots=2,maxmem=1G",
                    "-object",
                    "memory-backend-ram,id=more,size=128M",
                    "-device",
                    "pc-dimm,memdev=more",
                ],
                "134217728 of memory devices",
            ),
        ] {
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).args(more).envs(environment.clone());
            let mut guest = Guest::start(command);
            assert_eq!(guest.wait_end(BOOT).code(), Some(2), "{}", guest.log());
            assert!(guest.log().contains(says), "{says}: {}", guest.log());
            host.assert_clean();
        }
    }
}

/// Of copied arguments some may be left out. Without vmemd's monitor a VM would be arriving for ever, so its QEMU
/// ends, or is warned of.
#[test]
fn a_qemu_without_vmemds_monitor_is_told_what_it_lacks() {
    for qemu in qemus() {
        let host = Host::new("start-monitor");
        let (environment, words) = arguments(&host, &qemu);
        let without = |options: &[&str]| {
            let mut command = Command::new(&words[0]);
            let mut left = words[1..].iter().peekable();
            while let Some(word) = left.next() {
                let ours = left.peek().is_some_and(|value| value.contains("vmemd-qmp"));
                if ours && options.contains(&word.as_str()) {
                    left.next();
                } else {
                    command.arg(word);
                }
            }
            command.envs(environment.clone());
            Guest::start(command)
        };
        // Its socket would be there by now, so it ends, before its guest runs.
        let mut guest = without(&["-chardev", "-mon"]);
        assert_eq!(guest.wait_end(BOOT).code(), Some(2), "{}", guest.log());
        let socket = host.run_dir().join(".monitors/vm.qmp").display().to_string();
        assert!(
            guest.log().contains(&format!("QEMU has not made {socket}: are `-chardev")),
            "{}",
            guest.log()
        );
        assert!(guest.lines().is_empty(), "{:?}", guest.lines());
        host.assert_clean();
        // Its monitor might come yet: it is waited for, and the log says so.
        let guest = without(&["-mon"]);
        let says = format!("QEMU does not answer on {socket} after 10s");
        common::wait_for("the warning", || guest.log().contains(&says).then_some(()));
        assert!(guest.log().contains("is `-mon chardev=vmemd-qmp,mode=control` on its command line"));
        drop(guest);
        common::wait_for("its name to be free", || host.names().is_empty().then_some(()));
    }
}

/// The preload is damaged on the daemon's host: the source is told, and keeps its VM.
#[test]
fn a_preload_that_the_targets_loader_does_not_take_is_told_to_the_source() {
    for qemu in qemus() {
        let (host, there) = (Host::new("start-source"), Host::new("start-target"));
        let installed = Installed::new(&there.root.join("bin"));
        let (store, rules) = (there.store(), there.root.join("rules.toml").display().to_string());
        std::fs::write(&rules, "").expect("a file");
        let serve =
            ["serve", "--listen", "127.0.0.1:0", "--ram", "192M", "--store", &store, "--qemu-rules", &rules];
        let mut daemon = installed.command(&there, &serve);
        let mut daemon = daemon.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("vmemd runs");
        let mut line = String::new();
        let out = daemon.stdout.take().expect("a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::with_capacity(1, out), &mut line)
            .expect("a line");
        let address = line.trim().strip_prefix("listening on ").expect("an address").to_owned();
        let whole = std::fs::read(&installed.library).expect("the preload");
        std::fs::write(&installed.library, b"").expect("a file");
        let mut command =
            host.command(&["run", "--name", "vm", "--ram", "32M", "--store", &host.store(), "--"]);
        command.arg(&qemu.binary).args(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "64M"]);
        let mut guest = Guest::start(command);
        host.wait_state("vm", "running");
        let migrate = || host.vmemd(&["migrate", "vm", "--to", &address]);
        migrate().fails(6, &["the loader does not take", "file too short", "\"vm\" runs on here"]);
        assert!(there.names().is_empty(), "nothing was started for it");
        std::fs::write(&installed.library, &whole).expect("a file");
        assert_eq!(migrate().code, 0);
        guest.wait_end(BOOT);
        there.wait_state("vm", "running");
        assert_eq!(there.vmemd(&["stop", "vm"]).code, 0);
        daemon.kill().expect("a child");
        daemon.wait().expect("a child");
        there.assert_clean();
        host.assert_clean();
    }
}
