//! Real guests on plain QEMU: that what later tests stand on holds without vmemd.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
mod qemu;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use qemu::{BOOT, Console, Guest, Machine, Qemu, field, free_port, on_host};

/// How long a guest's job of a few seconds may take on a slow, busy machine.
const JOB: Duration = Duration::from_secs(120);

fn start(qemu: &Qemu, machine: &Machine, devices: &[&str]) -> Guest {
    let mut command = Command::new(&qemu.binary);
    command.args(machine.args()).args(devices);
    Guest::start(command)
}

#[test]
fn boots_to_a_shell_that_hears_the_console() {
    for qemu in Qemu::versions() {
        let started = Instant::now();
        let mut guest = start(&qemu, &Machine::new("128M"), &[]);
        guest.wait_for("init ready", BOOT);
        eprintln!("QEMU {}: shell after {:.1} s", qemu.version, started.elapsed().as_secs_f64());
        guest.console().type_line("echo $((6 * 7)) answered; exit");
        guest.wait_for("42 answered", JOB);
        guest.wait_for("init done", JOB);
        assert!(guest.wait_end(JOB).success(), "{}", guest.log());
    }
}

#[test]
fn a_console_goes_on_from_one_qemu_to_the_next() {
    let directory = qemu::directory("console");
    let path = directory.join("console");
    let console = Console::listen(&path);
    let connect = |count| {
        let stream = UnixStream::connect(&path).expect("the console");
        while console.connections() < count {
            std::thread::yield_now();
        }
        stream
    };
    // The second is there before the first has ended, as a migration's target is; the line is cut between them.
    let (mut first, mut second) = (connect(1), connect(2));
    second.write_all(b"t 2\r\nbeat 3\r\nbe").expect("the console");
    first.write_all(b"beat 1\r\nbea").expect("the console");
    console.find(|line| line == "beat 2", JOB).expect("a line of both");
    assert_eq!(console.lines(), ["beat 1", "beat 2", "beat 3"]);
    assert_eq!(console.lines_of_each(), ["beat 1", "t 2", "beat 3"]);
    assert!(!console.is_over());
    std::fs::remove_dir_all(&directory).expect("the test's directory");
}

#[test]
fn a_qemu_that_cannot_start_is_not_waited_for() {
    for qemu in Qemu::versions() {
        let guest = start(&qemu, &Machine::new("128M"), &["-device", "no-such-device"]);
        let waited = Instant::now();
        let said = std::panic::catch_unwind(|| guest.wait_for("init ready", BOOT)).expect_err("no guest");
        assert!(waited.elapsed() < BOOT, "waited to the end");
        let said = said.downcast_ref::<String>().expect("words");
        assert!(said.contains("no-such-device"), "{said}");
    }
}

#[test]
fn memory_is_right_in_order_and_at_random() {
    for qemu in Qemu::versions() {
        let machine = Machine::new("192M").run("checker memory 64M 2; checker memory 32M 2 random");
        let mut guest = start(&qemu, &machine, &[]);
        guest.wait_for("init done", BOOT + JOB);
        let lines = guest.lines();
        let rounds: Vec<_> = lines.iter().filter(|line| line.starts_with("checker memory round=")).collect();
        assert_eq!(rounds.len(), 4, "{lines:?}");
        for line in rounds {
            assert_eq!(field::<u64>(line, "mismatched"), 0, "{lines:?}");
        }
        assert!(guest.wait_end(JOB).success());
    }
}

#[test]
fn what_is_not_right_on_a_disk_is_found() {
    let versions = Qemu::versions();
    if versions.is_empty() {
        return;
    }
    let directory = qemu::directory("disk");
    let image = directory.join("image");
    let path = image.display().to_string();
    on_host(&["image", &path, "48M"]);
    let drive = format!("file={path},format=raw,if=none,id=disk,cache=none,aio=threads");
    let devices = ["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"];
    let machine = Machine::new("256M").run("checker disk /dev/vda 5");
    for qemu in &versions {
        let guest = start(qemu, &machine, &devices);
        let line = guest.wait_for("checker disk done", BOOT + JOB);
        assert_eq!((field::<u64>(&line, "pieces"), field::<u64>(&line, "mismatched")), (5, 0), "{line}");
    }

    // One bit in a page of the second piece, which is read twice.
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(&image).expect("the image");
    let (mut byte, at) = ([0], 17 * 1024 * 1024 + 5);
    file.read_exact_at(&mut byte, at).expect("the image");
    file.write_all_at(&[byte[0] ^ 1], at).expect("the image");
    let guest = start(&versions[0], &machine, &devices);
    let line = guest.wait_for("checker disk done", BOOT + JOB);
    assert_eq!(field::<u64>(&line, "mismatched"), 2, "{line}");
    std::fs::remove_dir_all(&directory).expect("the test's directory");
}

#[test]
fn a_stream_arrives_while_lines_are_counted() {
    for qemu in Qemu::versions() {
        let (stream, echo) = (free_port(), free_port());
        let netdev =
            format!("user,id=net,hostfwd=tcp:127.0.0.1:{stream}-:7000,hostfwd=tcp:127.0.0.1:{echo}-:7001");
        let devices = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=net,romfile="];
        let machine = Machine::new("192M")
            .ip("10.0.2.15/24")
            .run("checker beat & checker echo 7001 & checker stream 7000; checker bench 3");
        let guest = start(&qemu, &machine, &devices);
        guest.wait_for("checker stream listening", BOOT);
        guest.wait_for("checker echo listening", BOOT);
        let mut kept = TcpStream::connect(("127.0.0.1", echo)).expect("the guest's echo");
        let said = on_host(&["send", "127.0.0.1", &stream.to_string(), "2"]);
        let line = guest.wait_for("checker stream done", JOB);
        assert!(field::<u64>(&line, "bytes") > 0, "{line}");
        assert_eq!(field::<u64>(&line, "bytes"), field::<u64>(&said, "bytes"), "{line}, {said}");
        assert_eq!(field::<u64>(&line, "mismatched"), 0, "{line}");
        kept.write_all(b"still there").expect("a connection");
        let mut answer = [0; 11];
        kept.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"still there");
        assert!(field::<f64>(&guest.wait_for("checker bench done", JOB), "score") > 0.0);

        guest.wait_for("init done", JOB);
        let lines = guest.lines();
        let beats = lines.iter().filter(|line| line.starts_with("checker beat"));
        let numbers: Vec<u64> = beats.map(|line| field(line, "number")).collect();
        assert!(numbers.len() > 10, "{lines:?}");
        assert!(numbers.iter().copied().eq(0..numbers.len() as u64), "{numbers:?}");
    }
}
