//! A host of a test: a run directory, a store, and `vmemd` processes that do not outlive it.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod disk;
pub(crate) mod limits;
pub(crate) mod slow_disk;

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use serde_json::Value;
pub(crate) use testkit::wait::DEADLINE;
pub(crate) use testkit::wait_for;
use testkit::{Reason, skip, wait_until};

/// A VM counts as gone when so many looks have found nothing: one that takes its name back has none for a moment.
pub(crate) const LOOKS_IN_VAIN: u32 = 20;

/// Waits until a log has these words, and returns all of it. A process writes its log a moment before or after the
/// event that it tells of.
pub(crate) fn wait_said(words: &str, log: impl Fn() -> String) -> String {
    let last = RefCell::new(String::new());
    let what = || format!("{words:?} in {:?}", last.borrow());
    wait_until(DEADLINE, what, || {
        last.replace(log());
        last.borrow().contains(words).then(|| last.borrow().clone())
    })
}

/// The path of `vmemd`. Tests of other crates find it beside the directory into which they are built, if it has been
/// built.
pub(crate) fn vmemd() -> PathBuf {
    if let Some(path) = option_env!("CARGO_BIN_EXE_vmemd") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a test knows where it is");
    let path = test.ancestors().nth(2).expect("tests are built into deps/").join("vmemd");
    assert!(path.exists(), "these tests need {}: cargo build", path.display());
    path
}

/// Ends the test where VMs cannot run.
pub(crate) fn needs_vms() {
    let doctor = Command::new(vmemd()).args(["doctor", "--store", env!("CARGO_TARGET_TMPDIR")]).output();
    let doctor = doctor.expect("vmemd runs");
    if doctor.status.success() {
        return;
    }
    let said = String::from_utf8_lossy(&doctor.stderr);
    // Of several that are missing, one that must not be.
    let missing = [(Reason::Kvm, "/dev/kvm"), (Reason::Uffd, "userfaultfd"), (Reason::Uffd, "io_uring")];
    let mut missing: Vec<Reason> =
        missing.iter().filter(|(_, words)| said.contains(words)).map(|(reason, _)| *reason).collect();
    let must_run = testkit::skip::must_run();
    missing.sort_by_key(|reason| !must_run.contains(reason));
    skip(missing.first().copied().unwrap_or(Reason::Kernel), said.trim())
}

/// Ends the test if this is not root.
pub(crate) fn needs_root(what: &str) {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        skip(Reason::Root, format_args!("{what} needs root"));
    }
}

pub(crate) fn signal(pid: u32, signal: i32) {
    // SAFETY: no memory arguments; the process was started by this test.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Stops a process (SIGSTOP), and waits until every thread of it stands still: a thread that runs goes on until it
/// sees the signal.
pub(crate) fn freeze(pid: u32) {
    signal(pid, libc::SIGSTOP);
    wait_for("a stopped process to stand still", || {
        let mut threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.map(|thread| {
            let stat = fs::read_to_string(thread.ok()?.path().join("stat")).ok()?;
            Some(stat.rsplit_once(") ")?.1.starts_with(['T', 't']))
        });
        threads.all(|stands| stands == Some(true)).then_some(())
    });
}

/// Kills a process, and waits until its last thread has ended.
pub(crate) fn kill(pid: u32) {
    signal(pid, libc::SIGKILL);
    wait_for("a killed process to die", || (!lives(pid)).then_some(()));
}

/// Whether any thread of the process lives: until the last has ended, the process has its files, and with them its
/// locks.
pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie whose parent has not looked yet does not live. The first thread is one before the others have ended.
    let zombie = stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']));
    !zombie || fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

/// The exit code and the output of a command that has ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    /// Runs a command to its end.
    pub(crate) fn by(command: &mut Command) -> Said {
        let output = command.output().expect("it runs");
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The error is one line with these words.
    pub(crate) fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in {self:?}");
        }
    }
}

pub(crate) struct Host {
    pub(crate) root: PathBuf,
    children: Vec<u32>,
    /// Words of a command that starts the host's processes and becomes them, under the same pid.
    starter: Vec<String>,
    /// The `vmemd` that is installed on it.
    program: PathBuf,
    /// The divisor of its processes' limits on waiting for each other (`VMEMD_TEST_HASTE`).
    pub(crate) haste: u32,
}

impl Host {
    /// A host in a network namespace that has been made before.
    pub(crate) fn within(name: &str, namespace: &str) -> Host {
        Host::new(name).started_by(["ip", "netns", "exec", namespace])
    }

    /// Its processes are started by this command, of which they are the last arguments.
    pub(crate) fn started_by<const N: usize>(mut self, starter: [&str; N]) -> Host {
        self.starter = starter.map(str::to_owned).to_vec();
        self
    }

    /// Another `vmemd` is installed on it than the one that is tested.
    pub(crate) fn of(mut self, program: &Path) -> Host {
        self.program = program.to_owned();
        self
    }

    pub(crate) fn new(name: &str) -> Host {
        // Removed when this is dropped, behind the processes that use it.
        let root = testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), name).keep();
        fs::create_dir(root.join("store")).expect("a directory for the test");
        let program = vmemd();
        Host { root, children: Vec::new(), starter: Vec::new(), program, haste: 1 }
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.root.join("run")
    }

    pub(crate) fn store(&self) -> String {
        self.root.join("store").display().to_string()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_of(&self.program, args)
    }

    /// The command of another `vmemd` than the one that is installed on it, or of another program.
    pub(crate) fn command_of(&self, program: &Path, args: &[&str]) -> Command {
        let program = program.to_str().expect("a path that is text");
        let words: Vec<&str> = self.starter.iter().map(String::as_str).chain([program]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command.args(args).env("VMEMD_RUN_DIR", self.run_dir()).stdin(Stdio::null());
        if self.haste > 1 {
            command.env("VMEMD_TEST_HASTE", self.haste.to_string());
        }
        // Tests started in the background of a script inherit an ignored SIGINT; Ctrl-C is to be heard all the same.
        // SAFETY: between fork and exec only this one async-signal-safe call is made, which touches no memory.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                Ok(())
            });
        }
        command
    }

    /// Runs a command to its end.
    pub(crate) fn vmemd(&self, args: &[&str]) -> Said {
        self.vmemd_of(&self.program, args)
    }

    /// Runs a command of another `vmemd` to its end.
    pub(crate) fn vmemd_of(&self, program: &Path, args: &[&str]) -> Said {
        Said::by(&mut self.command_of(program, args))
    }

    /// Starts a command that goes on, in a process group of its own.
    pub(crate) fn start(&mut self, args: &[&str]) -> Running {
        let command = self.command(args);
        self.start_command(command)
    }

    pub(crate) fn start_command(&mut self, mut command: Command) -> Running {
        let log = self.root.join(format!("log-{}", self.children.len()));
        let stderr = fs::File::create(&log).expect("a log file");
        let child =
            command.stdout(Stdio::piped()).stderr(stderr).process_group(0).spawn().expect("vmemd runs");
        self.children.push(child.id());
        Running { child, log }
    }

    /// Starts a VM with 128M of memory and waits until it runs.
    pub(crate) fn start_vm(&mut self, name: &str, guest: &str) -> Running {
        let store = self.store();
        let running =
            self.start(&["run", "--name", name, "--memory", "128M", "--guest", guest, "--store", &store]);
        self.wait_state(name, "running");
        running
    }

    /// Makes a CA, and returns where the certificates of each host are.
    pub(crate) fn pki(&self, ca: &str, hosts: &[&str]) -> Vec<String> {
        let dir = self.root.join(ca).display().to_string();
        let mut args = vec!["pki", "init", &dir];
        hosts.iter().for_each(|host| args.extend(["--host", host]));
        let said = self.vmemd(&args);
        assert_eq!(said.code, 0, "{said:?}");
        hosts.iter().map(|host| format!("{dir}/{}", host.split(',').next().expect("a name"))).collect()
    }

    /// Starts a daemon and returns it with its address.
    pub(crate) fn start_daemon(&mut self, listen: &str, ram: &str, more: &[&str]) -> (Running, String) {
        let store = self.root.join("made/by/serve").display().to_string();
        let mut args = vec!["serve", "--listen", listen, "--ram", ram, "--store", &store];
        args.extend_from_slice(more);
        let mut daemon = self.start(&args);
        let line = daemon.first_line();
        let address =
            line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}: {}", daemon.log()));
        (daemon, address.to_owned())
    }

    /// Starts a daemon that takes QEMU VMs by these rules and keeps their logs, and returns it with its address.
    pub(crate) fn start_qemu_daemon(
        &mut self,
        listen: &str,
        ram: &str,
        rules: &str,
        more: &[&str],
    ) -> (Running, String) {
        let path = self.root.join("rules.toml");
        fs::write(&path, rules).expect("a file of rules");
        let (rules, logs) = (path.display().to_string(), self.root.display().to_string());
        self.start_daemon(listen, ram, &[&["--qemu-rules", &rules, "--log-dir", &logs], more].concat())
    }

    pub(crate) fn stat(&self, name: &str) -> Option<Value> {
        let said = self.vmemd(&["stat", name, "--json"]);
        (said.code == 0).then(|| said.json())
    }

    pub(crate) fn wait_stat(&self, name: &str, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let last = RefCell::new(Value::Null);
        let what = || format!("{what} of {name}: {}", last.borrow());
        wait_until(DEADLINE, what, || {
            let stat = self.stat(name)?;
            let is_done = done(&stat);
            last.replace(stat.clone());
            is_done.then_some(stat)
        })
    }

    pub(crate) fn wait_state(&self, name: &str, state: &str) -> Value {
        self.wait_stat(name, state, |stat| stat["state"] == state)
    }

    /// Waits until the guest has completed so many more rounds, and says that it found nothing wrong.
    pub(crate) fn wait_rounds(&self, name: &str, more: u64) {
        let now = self.wait_stat(name, "its counters", |stat| stat["state"] != "arriving");
        let goal = now["guest"]["rounds"].as_u64().expect("a number") + more;
        let stat = self.wait_stat(name, "rounds", |stat| stat["guest"]["rounds"].as_u64() >= Some(goal));
        assert_eq!(stat["guest"]["mismatched_pages"], 0, "{stat}");
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let list = self.vmemd(&["list", "--json"]).json();
        let rows = list.as_array().expect("a list");
        rows.iter().map(|row| row["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// Nothing is left: no socket, no store, no process that knows of this host's directory.
    pub(crate) fn assert_clean(&self) {
        self.assert_clean_but(&[]);
    }

    /// As [`Host::assert_clean`], but these processes may live.
    pub(crate) fn assert_clean_but(&self, stay: &[u32]) {
        wait_for("sockets to be gone", || self.sockets().is_empty().then_some(()));
        wait_for("processes to be gone", || {
            self.processes().iter().all(|pid| stay.contains(pid)).then_some(())
        });
        for dir in ["store", "made/by/serve"] {
            let left: Vec<_> = fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten().collect();
            assert!(left.is_empty(), "left in {dir}: {left:?}");
        }
    }

    pub(crate) fn sockets(&self) -> Vec<String> {
        let entries = fs::read_dir(self.run_dir()).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.ends_with(".sock")).collect()
    }

    /// Living vmemd processes of this host: those with its directory among their arguments or in their environment.
    pub(crate) fn processes(&self) -> Vec<u32> {
        processes_of(&self.root.display().to_string())
    }
}

/// Living processes with this directory among their arguments or in their environment.
pub(crate) fn processes_of(root: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && lives(*pid))
        .filter(|pid| {
            ["cmdline", "environ"].iter().any(|file| {
                let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                String::from_utf8_lossy(&text).contains(root)
            })
        })
        .collect()
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.processes() {
            signal(pid, libc::SIGKILL);
        }
        if std::thread::panicking() {
            // Those of its commands, and of the VMs that came to its daemons.
            for file in fs::read_dir(&self.root).into_iter().flatten().flatten() {
                let name = file.file_name().display().to_string();
                if name.starts_with("log-") || name.ends_with(".log") {
                    eprintln!("── {name}\n{}", fs::read_to_string(file.path()).unwrap_or_default());
                }
            }
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// A command that goes on. Killed when dropped.
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn first_line(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.child.stdout.as_mut().expect("stdout is piped");
        BufReader::with_capacity(1, stdout).read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    pub(crate) fn signal(&self, number: i32) {
        signal(self.pid(), number);
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        wait_for("a process to end", || self.child.try_wait().expect("a child"))
    }

    pub(crate) fn ends_with(&mut self, code: i32) {
        let status = self.end();
        assert_eq!(status.code(), Some(code), "{}", self.log());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
