//! The place where a benchmark works: a directory, and processes that must not outlive it.
//!
//! Everything that is made carries the benchmark's process id in its name, so that the next run finds what one that was
//! killed has left. Processes started here get a process group of their own (a Ctrl-C is for the benchmark, which then
//! ends them in order) and die with it; those that they start in turn fall to it as the subreaper.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};
use vmemd::program;
use vmprocess::control::client::VmClient;
use vmprocess::control::rundir::RunDir;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::host::children_of;
use vmprocess::medium::Medium;
use vmprocess::signals;

use super::left::{PREFIX, SWAP_FILE, is_left, kill};
use super::{cgroup, swapfile};

/// Bytes read at a time of a process's output.
const OUTPUT_BYTES: usize = 64 << 10;
/// Time between two looks whether a process that prints nothing has exceeded its limit.
const POLL: Duration = Duration::from_millis(500);

/// The directory of one benchmark.
#[derive(Debug)]
pub(super) struct Site {
    path: PathBuf,
}

impl Site {
    /// Removes what dead benchmarks have left, and makes a new site on the disk of `store`.
    pub(super) fn open(store: &Path) -> Result<Site, Failure> {
        fs::create_dir_all(store)
            .map_err(|error| Failure::io(format!("cannot make {}", store.display()), &error))?;
        if let Medium::Ram(what) = Medium::of(store) {
            let text = format!(
                "the store {} is in RAM ({what}), and what is measured there says nothing of a disk: choose a \
                     --store on one",
                store.display()
            );
            return Err(Failure::new(FailureKind::Usage, text));
        }
        remove_left(store);
        set_child_subreaper(Some(getpid()))
            .map_err(|error| Failure::io("cannot become the subreaper", &error.into()))?;
        let path = store.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&path)
            .map_err(|error| Failure::io(format!("cannot make {}", path.display()), &error))?;
        Ok(Site { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A fresh directory of one experiment.
    pub(super) fn fresh(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(name);
        let made = fs::create_dir(&path);
        made.map_err(|error| Failure::io(format!("cannot make {}", path.display()), &error))?;
        Ok(path)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        end_descendants();
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn remove_left(store: &Path) {
    for entry in fs::read_dir(store).into_iter().flatten().flatten() {
        if !entry.file_name().to_str().is_some_and(is_left) {
            continue;
        }
        for experiment in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            end_vms(&experiment.path().join("target"));
            let _ = swapfile::swap_off(&experiment.path().join(SWAP_FILE));
        }
        let _ = fs::remove_dir_all(entry.path());
    }
    cgroup::remove_left(is_left);
}

/// Ends the VMs of a run directory whose benchmark is dead.
fn end_vms(run_dir: &Path) {
    if !run_dir.is_dir() {
        return;
    }
    let Ok(dir) = RunDir::open(run_dir) else { return };
    for socket in dir.sockets().unwrap_or_default() {
        if let Ok(stat) = VmClient::connect_to(&dir, &socket).and_then(|mut vm| vm.stat()) {
            kill(stat.pid as i32);
        }
    }
}

/// Ends and reaps every process that has this one as its parent, until there are none.
pub(super) fn end_descendants() {
    loop {
        let children = children_of(std::process::id());
        if children.is_empty() {
            return;
        }
        for pid in children.into_iter().map(|pid| pid as i32) {
            kill(pid);
            let _ = waitpid(Pid::from_raw(pid), WaitOptions::empty());
        }
    }
}

/// A directory of one experiment. Removed when dropped.
#[derive(Debug)]
pub(super) struct Dir(pub(super) PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a process of an experiment runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// The command under test: beside this one, or in `PATH`.
    Vmemd,
    /// This program once more.
    Worker,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Program::Vmemd => "vmemd",
            Program::Worker => "vmemd-bench",
        }
    }

    fn path(self) -> Result<PathBuf, Failure> {
        match self {
            Program::Vmemd => program::find(self.name()),
            // Even if its file has been replaced.
            Program::Worker => Ok("/proc/self/exe".into()),
        }
    }
}

/// A process of an experiment. Ended when dropped.
#[derive(Debug)]
pub(super) struct Proc {
    child: Child,
    log: PathBuf,
}

impl Proc {
    /// Starts a program with these arguments, in the cgroup whose entrance is given. Its stderr goes to a file.
    pub(super) fn start(
        program: Program,
        args: &[String],
        log: &Path,
        entrance: Option<&fs::File>,
    ) -> Result<Proc, Failure> {
        let fail = |error| Failure::io(format!("cannot start {}", program.name()), &error);
        let stderr = fs::File::create(log).map_err(fail)?;
        let entrance = entrance.map(AsRawFd::as_raw_fd);
        let parent = std::process::id() as libc::pid_t;
        let mut command = Command::new(program.path()?);
        command
            .arg0(program.name())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0);
        // SAFETY: between fork and exec the closure only makes async-signal-safe system calls and allocates nothing;
        // the cgroup's descriptor is open over the fork.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                // A benchmark that was killed before that is not waited for: its process would run for ever.
                if libc::getppid() != parent {
                    libc::_exit(1);
                }
                match entrance {
                    Some(fd) if libc::write(fd, b"0".as_ptr().cast(), 1) != 1 => {
                        Err(std::io::Error::last_os_error())
                    }
                    _ => Ok(()),
                }
            });
        }
        let child = command.spawn().map_err(fail)?;
        Ok(Proc { child, log: log.to_owned() })
    }

    /// The first line of its stdout.
    pub(super) fn first_line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        if let Some(stdout) = self.child.stdout.as_mut() {
            let _ = BufReader::new(stdout).read_line(&mut line);
        }
        if line.is_empty() { Err(self.ended()) } else { Ok(line.trim().to_owned()) }
    }

    /// All of its stdout, once it has ended well.
    pub(super) fn output(&mut self, deadline: Instant) -> Result<String, Failure> {
        let mut stdout = self.child.stdout.take().ok_or_else(|| self.ended())?;
        let (mut said, mut buffer) = (Vec::new(), vec![0; OUTPUT_BYTES]);
        loop {
            signals::check()?;
            if Instant::now() >= deadline {
                return Err(Failure::new(FailureKind::Vm, "it did not end within the time allowed"));
            }
            if !signals::wait_readable(stdout.as_fd(), Some(POLL)) {
                continue;
            }
            match stdout.read(&mut buffer) {
                Ok(0) => break,
                Ok(bytes) => said.extend_from_slice(&buffer[..bytes]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::io("cannot read what a process says", &error)),
            }
        }
        match self.child.wait() {
            Ok(status) if status.success() => Ok(String::from_utf8_lossy(&said).into_owned()),
            _ => Err(self.ended()),
        }
    }

    /// Fails if it has ended, with the last line of its log.
    pub(super) fn check(&mut self) -> Result<(), Failure> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(self.ended()),
        }
    }

    fn ended(&self) -> Failure {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().last().unwrap_or("it said nothing");
        let last = last.strip_prefix("vmemd: ").unwrap_or(last);
        Failure::new(FailureKind::Vm, format!("a process of the experiment ended: {last}"))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
