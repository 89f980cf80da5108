//! A QEMU with the preload in it, started as `vmemd run` would: its monitor is one end of a socket pair.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod target;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmprocess::MemorySpec;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{EngineKind, Request, VmStat};
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::Failure;
use vmprocess::qemu::{Backend, LIBRARY, PreloadSettings, QmpAddress, Role, VARIABLE, VERSION, memory_file};

/// How long anything that a test waits for may take on a slow, busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);
pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    testkit::wait_until(DEADLINE, || what, look)
}

/// What `scripts/setup --qemu` has made, and the QEMUs that there are; the test ends if there is nothing.
#[derive(Debug)]
pub(crate) struct Kit {
    dir: PathBuf,
    pub(crate) qemus: Vec<PathBuf>,
}

impl Kit {
    pub(crate) fn find() -> Kit {
        let dir = target_dir().join("qemu");
        let installed = PathBuf::from("/usr/bin/qemu-system-x86_64");
        let newest = dir.join("newest/usr/bin/qemu-system-x86_64");
        let qemus: Vec<PathBuf> = [installed, newest].into_iter().filter(|path| path.exists()).collect();
        if dir.join("vmlinuz").exists() && dir.join("initramfs.gz").exists() && !qemus.is_empty() {
            return Kit { dir, qemus };
        }
        testkit::skip(testkit::Reason::Qemu, "no QEMU, kernel or initramfs (scripts/setup --qemu)")
    }
}

impl Kit {
    /// The checker, for the host's side.
    pub(crate) fn checker(&self) -> PathBuf {
        self.dir.join("checker")
    }
}

/// The directory that holds this test's profile directory.
fn target_dir() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(3).expect("tests are in target/PROFILE/deps").to_owned()
}

/// The shared object, made with this test.
fn library() -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name(LIBRARY);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// A run directory and a store of one test, removed at its end.
#[derive(Debug)]
pub(crate) struct Site {
    dir: PathBuf,
    /// Removes it.
    owns: bool,
}

impl Site {
    pub(crate) fn new(name: &str) -> Site {
        let dir = testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), name).keep();
        std::fs::create_dir(dir.join("run")).unwrap();
        std::fs::create_dir(dir.join("store")).unwrap();
        Site { dir, owns: true }
    }

    /// The same site, for another thread.
    pub(crate) fn same(&self) -> Site {
        Site { dir: self.dir.clone(), owns: false }
    }

    pub(crate) fn run_dir(&self) -> RunDir {
        RunDir::open(&self.dir.join("run")).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn memory(&self, memory_bytes: u64, budget_bytes: u64) -> MemorySpec {
        MemorySpec {
            engine: EngineKind::Vmemd,
            memory_bytes,
            budget_bytes,
            store: self.path("store"),
            store_overcommit: false,
            store_encrypt: false,
            prealloc: false,
            lock: false,
        }
    }

    /// What the file system has given the VM's store, which has no name: by the descriptor that its QEMU has.
    pub(crate) fn stored_bytes(&self, vm: &Vm) -> u64 {
        let store = self.path("store").canonicalize().unwrap();
        let open = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().flatten();
        let file = open
            .map(|entry| entry.path())
            .find(|path| std::fs::read_link(path).is_ok_and(|file| file.starts_with(&store)));
        std::fs::metadata(file.expect("a store")).unwrap().blocks() * 512
    }

    /// What lies in the run directory, among the records of RAM there, and in the store's, but for the lock.
    pub(crate) fn files(&self) -> Vec<String> {
        let of = |dir: &str| std::fs::read_dir(self.dir.join(dir)).into_iter().flatten();
        let names =
            ["run", "run/.ram", "store"].into_iter().flat_map(of).map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.retain(|name| ![".lock", ".ram", ".sessions"].contains(&name.as_str()));
        names.sort();
        names
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.owns {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// What a machine shall be.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) qemu: PathBuf,
    pub(crate) name: &'static str,
    pub(crate) regions: Vec<u64>,
    pub(crate) budget_bytes: u64,
    /// A line of shell that the guest runs before it powers off.
    pub(crate) jobs: &'static str,
    /// Of each memory backend.
    pub(crate) backend_options: &'static str,
    pub(crate) arguments: Vec<String>,
    /// The monitor is a socket in the run directory.
    pub(crate) qmp_socket: bool,
}

impl Plan {
    pub(crate) fn new(kit: &Kit, name: &'static str, jobs: &'static str) -> Plan {
        Plan {
            qemu: kit.qemus[0].clone(),
            name,
            regions: vec![1024 * MIB],
            budget_bytes: 256 * MIB,
            jobs,
            backend_options: "",
            arguments: Vec::new(),
            qmp_socket: false,
        }
    }

    pub(crate) fn with(mut self, arguments: &[&str]) -> Plan {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }
}

/// A running QEMU. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Vm {
    child: Child,
    dir: RunDir,
    name: &'static str,
    lines: Receiver<String>,
    console: ChildStdin,
    /// All that the console and the log said so far.
    said: String,
}

impl Vm {
    /// A new VM.
    pub(crate) fn start(kit: &Kit, site: &Site, plan: &Plan) -> Vm {
        let role = Role::New {
            run_dir: site.path("run"),
            name: plan.name.to_owned(),
            memory: site.memory(plan.regions.iter().sum(), plan.budget_bytes),
            offer: String::new(),
            disks: Vec::new(),
            stays: None,
        };
        Vm::start_as(kit, site, plan, role, &[])
    }

    /// A VM of any role, which is passed those descriptors.
    pub(crate) fn start_as(kit: &Kit, site: &Site, plan: &Plan, role: Role, descriptors: &[RawFd]) -> Vm {
        let total: u64 = plan.regions.iter().sum();
        let (ours, qemus) = UnixStream::pair().unwrap();
        let backends = plan.regions.iter().enumerate();
        let backends: Vec<Backend> =
            backends.map(|(index, bytes)| Backend { path: memory_file(index), bytes: *bytes }).collect();
        let mut command = Command::new(&plan.qemu);
        command.args(["-accel", "tcg", "-smp", "2", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-serial", "stdio", "-no-reboot", "-m", &format!("{}M", total / MIB)]);
        command.args([
            "-kernel".into(),
            kit.dir.join("vmlinuz"),
            "-initrd".into(),
            kit.dir.join("initramfs.gz"),
        ]);
        command.args(["-append", &format!("console=ttyS0 quiet panic=-1 vmemd.run=\"{}\"", plan.jobs)]);
        for (index, Backend { path, bytes }) in backends.iter().enumerate() {
            let (path, options) = (path.display(), plan.backend_options);
            command.args([
                "-object",
                &format!(
                    "memory-backend-file,id=vmemd{index},mem-path={path},size={bytes},share=on,align=2M{options}"
                ),
            ]);
        }
        match backends.len() {
            1 => drop(command.args(["-machine", "memory-backend=vmemd0"])),
            many => (0..many).for_each(|index| {
                command.args(["-numa", &format!("node,nodeid={index},memdev=vmemd{index}")]);
            }),
        }
        let socket = site.path("run").join(format!("{}.qmp", plan.name));
        let (chardev, qmp) = if plan.qmp_socket {
            (format!("path={},server=on,wait=off", socket.display()), QmpAddress::Socket(socket))
        } else {
            (
                format!("fd={}", qemus.as_raw_fd()),
                QmpAddress::Descriptor { ours: ours.as_raw_fd(), theirs: qemus.as_raw_fd() },
            )
        };
        command.args(["-chardev", &format!("socket,id=vmemd-qmp,{chardev}")]);
        command.args(["-mon", "chardev=vmemd-qmp,mode=control"]).args(&plan.arguments);
        let (version, program) = (VERSION.to_owned(), plan.qemu.canonicalize().unwrap());
        let settings = PreloadSettings { version, program, backends, qmp, args: None, role };
        command.env("LD_PRELOAD", library()).env(VARIABLE, serde_json::to_string(&settings).unwrap());
        let mut passed = vec![ours.as_raw_fd(), qemus.as_raw_fd()];
        passed.extend(descriptors);
        // SAFETY: between fork and exec only fcntl and prctl are called, on descriptors that are open here.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                passed.iter().for_each(|fd| {
                    libc::fcntl(*fd, libc::F_SETFD, 0);
                });
                Ok(())
            });
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        for stream in [File::from(OwnedFd::from(out)), File::from(OwnedFd::from(err))] {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
                }
            });
        }
        let console = child.stdin.take().unwrap();
        Vm { child, dir: site.run_dir(), name: plan.name, lines, console, said: String::new() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line with these words, of the guest's console or of the log, and returns it.
    pub(crate) fn says(&mut self, words: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.said += &line;
                    self.said.push('\n');
                    if line.contains(words) {
                        return line;
                    }
                }
                Err(error) => panic!("{:?} was not said ({error}):\n{}", words, self.said),
            }
        }
    }

    pub(crate) fn types(&mut self, line: &str) {
        self.console.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub(crate) fn try_ask(&self, request: &Request) -> Result<Value, Failure> {
        self.client().ask(request, DEADLINE)
    }

    pub(crate) fn client(&self) -> VmClient {
        VmClient::connect(&self.dir, self.name).unwrap()
    }

    pub(crate) fn ask(&self, request: &Request) -> Value {
        self.try_ask(request).unwrap_or_else(|failure| panic!("{request:?}: {failure}"))
    }

    pub(crate) fn stat(&self) -> VmStat {
        serde_json::from_value(self.ask(&Request::Stat)).unwrap()
    }

    pub(crate) fn end(&mut self) -> ExitStatus {
        wait_for("QEMU's end", || self.child.try_wait().unwrap())
    }

    /// All that was said, once QEMU has ended.
    pub(crate) fn all_said(mut self) -> String {
        let mut said = std::mem::take(&mut self.said);
        while let Ok(line) = self.lines.recv_timeout(DEADLINE) {
            said += &line;
            said.push('\n');
        }
        said
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A second monitor of a QEMU, for what a test asks of it by itself.
#[derive(Debug)]
pub(crate) struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    pub(crate) fn argument(path: &Path) -> String {
        format!("unix:{},server=on,wait=off", path.display())
    }

    pub(crate) fn connect(path: &Path) -> Monitor {
        let stream = wait_for("the monitor", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut monitor = Monitor { reader: BufReader::new(stream) };
        monitor.ask("qmp_capabilities", json!({}));
        monitor
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).unwrap() > 0, "the monitor is gone");
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }
}
