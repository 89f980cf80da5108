//! With real QEMUs, without vmemd's memory: theirs is a memfd that both sides of a hand-over map.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const MEMORY_BYTES: u64 = 256 << 20;

/// The QEMUs that there are, at least one. Ends the test if there is none.
pub(crate) fn qemus() -> Vec<PathBuf> {
    let newest = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().join("qemu/newest/usr/bin");
    let found = [PathBuf::from("/usr/bin"), newest].map(|dir| dir.join("qemu-system-x86_64"));
    let found: Vec<PathBuf> = found.into_iter().filter(|path| path.exists()).collect();
    if found.is_empty() {
        testkit::skip(testkit::Reason::Qemu, "no QEMU (scripts/setup --qemu)");
    }
    found
}

pub(crate) fn memory() -> File {
    File::from(memfd_create(c"vmemd-test", MemfdFlags::CLOEXEC).unwrap())
}

pub(crate) struct Process(pub(crate) Child);

impl Process {
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "QEMU does not end");
            std::thread::sleep(STATE_POLL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU that runs its firmware, or waits for a state.
pub(crate) fn start(program: &PathBuf, memory: &File, arguments: &[&str]) -> (Qemu, Process) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (memory, theirs_fd) = (memory.as_raw_fd(), theirs.as_raw_fd());
    let path = format!("/proc/self/fd/{memory}");
    let backend = format!("memory-backend-file,id=ram,mem-path={path},size={MEMORY_BYTES},share=on,align=2M");
    let mut command = Command::new(program);
    command.args(["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "std"]);
    command.args(["-m", "256M", "-object", &backend, "-machine", "pc,memory-backend=ram"]).args(arguments);
    command.args(["-chardev", &format!("socket,id=q,fd={theirs_fd}"), "-mon", "chardev=q,mode=control"]);
    // SAFETY: between fork and exec only fcntl and prctl are called, on descriptors that are open here.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::fcntl(memory, libc::F_SETFD, 0);
            libc::fcntl(theirs_fd, libc::F_SETFD, 0);
            Ok(())
        });
    }
    let child = Process(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    drop(theirs);
    let backend = Backend { path: path.into(), bytes: MEMORY_BYTES };
    (Qemu::new(Qmp::over(ours, PATIENCE).unwrap(), &[backend]).unwrap(), child)
}

/// All of its state, as it saves it.
pub(crate) fn saved(machine: &mut dyn Machine) -> Result<Vec<u8>, Failure> {
    let mut state = Vec::new();
    machine.save(&mut state).map(|()| state)
}

pub(super) const INCOMING: [&str; 3] = ["-incoming", "defer", "-S"];

#[test]
fn a_guest_goes_to_another_qemu_or_goes_on_where_it_was() {
    for program in qemus() {
        let memory = memory();
        let (mut source, mut process) = start(&program, &memory, &["-smp", "2"]);
        assert_eq!(source.view().vcpus, 2);
        assert_eq!((source.status().unwrap().word.as_str(), source.runs().unwrap()), ("running", true));
        source.pause().unwrap();
        source.pause().unwrap();
        assert_eq!((source.status().unwrap().word.as_str(), source.runs().unwrap()), ("paused", false));
        let state = saved(&mut source).unwrap();
        assert!((1 << 12..64 << 20).contains(&state.len()), "{} bytes", state.len());
        // It was not taken: it goes on, and can be saved again.
        source.resume().unwrap();
        assert_eq!(source.status().unwrap().word, "running");
        source.pause().unwrap();
        let state = saved(&mut source).unwrap();

        let (target, mut target_process) =
            start(&program, &memory, &[&["-smp", "2"][..], &INCOMING].concat());
        let mut target = Box::new(Incoming(target)).load(&mut &state[..]).unwrap();
        assert!(saved(&mut *target).unwrap_err().text.contains("not run since it arrived"));
        target.resume().unwrap();
        assert_eq!(target.view().failed, None);
        Box::new(source).quit().unwrap();
        assert!(process.end().success());
        target.pause().unwrap();
        target.quit().unwrap();
        assert!(target_process.end().success());
    }
}

#[test]
fn a_state_that_is_rubbish_is_an_error() {
    for program in qemus() {
        let memory = memory();
        let (mut source, _process) = start(&program, &memory, &[]);
        source.pause().unwrap();
        let whole = saved(&mut source).unwrap();
        for mut state in [&b"rubbish"[..], &whole[..whole.len() / 2], &[]] {
            let (target, mut process) = start(&program, &memory, &INCOMING);
            let refused = Box::new(Incoming(target)).load(&mut state).unwrap_err();
            assert_eq!(refused.kind, FailureKind::Vm, "{refused}");
            // Older QEMUs end by themselves, newer ones when nobody holds their monitor any more.
            let _ = process.0.kill();
            process.end();
        }
        source.resume().unwrap();
        assert_eq!(source.status().unwrap().word, "running");
    }
}

#[test]
fn a_qemu_that_is_gone_is_an_error_at_once() {
    for program in qemus() {
        let memory = memory();
        let (mut qemu, mut process) = start(&program, &memory, &[]);
        process.0.kill().unwrap();
        process.end();
        let began = Instant::now();
        assert_eq!(qemu.pause().unwrap_err().kind, FailureKind::Vm);
        assert!(saved(&mut qemu).is_err());
        assert!(Box::new(qemu).quit().is_ok(), "it has ended, which is what was asked");
        assert!(began.elapsed() < COMMAND_TIMEOUT);
    }
}

/// A QEMU that carries everything out, until it hears `cont`: what it says to that is `answer`'s, where `$` stands for
/// the command's number.
fn fake(answer: Option<&'static str>) -> Qemu {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let say = |line: &str| (&theirs).write_all(format!("{line}\n").as_bytes()).unwrap();
        say(r#"{"QMP": {}}"#);
        for line in BufReader::new(&theirs).lines() {
            let Ok(request) = serde_json::from_str::<Value>(&line.unwrap()) else { return };
            match (request["execute"] == "cont", answer) {
                (false, _) => say(&json!({ "return": {}, "id": request["id"] }).to_string()),
                (true, Some("")) => return,
                (true, Some(answer)) => say(&answer.replace('$', &request["id"].to_string())),
                (true, None) => {}
            }
        }
    });
    Qemu::new(Qmp::over(ours, PATIENCE).unwrap(), &[]).unwrap()
}

#[test]
fn a_guest_that_may_yet_run_is_in_doubt() {
    let refusal = r#"{"error": {"desc": "no"}, "id": $}"#;
    assert_eq!(fake(Some(refusal)).resume().unwrap_err().kind, FailureKind::Vm);
    assert_eq!(fake(None).resume().unwrap_err().kind, FailureKind::InDoubt, "no answer");
    let mut gone = fake(Some(""));
    assert_eq!(gone.resume().unwrap_err().kind, FailureKind::InDoubt);
    assert_eq!(gone.resume().unwrap_err().kind, FailureKind::Vm, "it cannot have heard this");
}

/// A disk whose reads take this long.
const SLOW: Duration = Duration::from_secs(2);

#[test]
fn draining_waits_for_the_disk() {
    for program in qemus() {
        let memory = memory();
        let disk =
            format!("null-co,node-name=slow,size=67108864,read-zeroes=on,latency-ns={}", SLOW.as_nanos());
        let devices = ["-blockdev", &disk, "-device", "virtio-blk-pci,drive=slow"];
        let (mut qemu, _process) = start(&program, &memory, &devices);
        let reads = |qemu: &mut Qemu| {
            let stats = qemu.ask("query-blockstats", Value::Null).unwrap();
            stats[0]["stats"]["rd_operations"].as_u64().expect("a number")
        };
        // The firmware looks for something to start. Its first read begins between two of these calls, and ends in the
        // next.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let began = Instant::now();
            qemu.drain().unwrap();
            let took = began.elapsed();
            if reads(&mut qemu) > 0 {
                assert!(took > SLOW / 2, "it waited for {took:?}");
                break;
            }
            assert!(Instant::now() < deadline, "the firmware does not read its disk");
        }
        assert_eq!((reads(&mut qemu), qemu.runs().unwrap()), (1, true));
    }
}

#[test]
fn every_run_state_of_a_real_qemu_has_its_word() {
    for program in qemus() {
        let memory = memory();
        let (mut qemu, _process) = start(&program, &memory, &["-S"]);
        assert_eq!(qemu.run_state().unwrap().word, "prelaunch");
        let schema = qemu.ask("query-qmp-schema", Value::Null).unwrap();
        let enums = schema.as_array().unwrap().iter().filter(|entry| entry["meta-type"] == "enum");
        let with = |word: &str| {
            let mut all = enums.clone().filter_map(|entry| entry["values"].as_array());
            let values = all.find(|values| values.iter().any(|value| value == word)).expect("QEMU's enum");
            values.iter().map(|value| value.as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let states = with("inmigrate");
        assert!(states.len() >= 16, "{states:?}");
        for word in states {
            let why = crate::runstate::of(&word, false).why.unwrap_or_default();
            assert!(!why.contains("does not know"), "{word}: {why}");
        }
        // It runs when it is told to, and says so before anybody asks again.
        qemu.resume().unwrap();
        assert_eq!(qemu.run_state().unwrap().state, State::Running);
        qemu.pause().unwrap();
        assert_eq!(qemu.run_state().unwrap().word, "paused");
    }
}

#[test]
fn a_qemu_that_waits_for_a_state_is_not_told_to_run() {
    for program in qemus() {
        let memory = memory();
        let (mut qemu, _process) = start(&program, &memory, &INCOMING);
        assert_eq!(qemu.run_state().unwrap().state, State::Incoming);
        let refused = qemu.resume().unwrap_err();
        assert!(
            refused.kind == FailureKind::Name && refused.text.contains("incoming migration"),
            "{refused}"
        );
        assert_eq!(qemu.status().unwrap().word, "inmigrate");
    }
}
