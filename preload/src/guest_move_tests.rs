//! What a real QEMU must not lose by a move: its user's settings and migrations, and whatever a monitor has changed.

use super::tests::{INCOMING, PATIENCE, memory, qemus, saved, start};
use super::*;

/// A directory that goes with the test.
struct Directory(testkit::TempDir);

impl Directory {
    fn new(name: &str) -> Directory {
        Directory(testkit::directory(name))
    }

    /// A raw image in it.
    fn image(&self, name: &str) -> String {
        let path = self.0.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        path.display().to_string()
    }
}

fn say(qemu: &mut Qemu, line: &str) -> String {
    let said = qemu.ask("human-monitor-command", json!({ "command-line": line })).unwrap();
    said.as_str().unwrap().trim().to_owned()
}

/// All settings of its migration.
fn settings(qemu: &mut Qemu) -> Vec<Value> {
    tuning::QUESTIONS.map(|question| qemu.ask(question, Value::Null).unwrap()).to_vec()
}

/// Sets those of these capabilities that this QEMU knows; returns what it then says of all settings.
fn set(qemu: &mut Qemu, capabilities: &[&str]) -> Vec<Value> {
    let known = qemu.ask("query-migrate-capabilities", Value::Null).unwrap();
    let known: Vec<&str> =
        known.as_array().unwrap().iter().filter_map(|known| known["capability"].as_str()).collect();
    let on = capabilities.iter().filter(|name| known.contains(*name));
    let on: Vec<Value> = on.map(|name| json!({ "capability": name, "state": true })).collect();
    qemu.ask("migrate-set-capabilities", json!({ "capabilities": on })).unwrap();
    let parameters = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 7, "tls-creds": "none-such", "multifd-channels": 3 });
    qemu.ask("migrate-set-parameters", parameters).unwrap();
    settings(qemu)
}

fn migration(qemu: &mut Qemu) -> String {
    let answer = qemu.ask("query-migrate", Value::Null).unwrap();
    answer["status"].as_str().unwrap_or_default().to_owned()
}

/// Waits until QEMU says so of its migration.
fn migration_comes_to(qemu: &mut Qemu, wanted: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !wanted(&migration(qemu)) {
        assert!(Instant::now() < deadline, "it stays {:?}", migration(qemu));
        std::thread::sleep(STATE_POLL);
    }
}

#[test]
fn settings_of_its_migration_are_set_aside_and_put_back() {
    for program in qemus() {
        for capabilities in [&["multifd", "mapped-ram"][..], &["xbzrle", "postcopy-ram", "return-path"]] {
            let memory = memory();
            let (mut source, _process) = start(&program, &memory, &[]);
            let before = set(&mut source, capabilities);
            source.may_move().unwrap();
            source.pause().unwrap();
            let state = saved(&mut source).unwrap();
            assert!(state.len() < 64 << 20, "without guest memory");
            assert_eq!(settings(&mut source), before, "at the source");
            source.resume().unwrap();

            // And where saving fails: nobody may run it, or even end it, with the wrong settings.
            source.pause().unwrap();
            source
                .with_capabilities(&[IGNORE_SHARED], |_| Err::<(), _>(Failure::new(FailureKind::Vm, "")))
                .unwrap_err();
            assert_eq!(settings(&mut source), before, "after a failure");
            let panics =
                std::panic::AssertUnwindSafe(|| source.with_capabilities::<()>(&[], |_| panic!("a bug")));
            std::panic::catch_unwind(panics).unwrap_err();
            assert_eq!(settings(&mut source), before, "after a panic");
            let unknown = source.with_capabilities(&["none-such"], |_| Ok(()));
            assert!(unknown.unwrap_err().text.contains("none-such"));
            assert_eq!(settings(&mut source), before, "what QEMU refuses");

            let (mut target, _target_process) = start(&program, &memory, &INCOMING);
            let before = set(&mut target, capabilities);
            target.take_state(&mut &state[..]).unwrap();
            assert_eq!(settings(&mut target), before, "at the target");
            target.resume().unwrap();
        }
    }
}

#[test]
fn a_migration_of_the_users_own_is_left_alone() {
    for program in qemus() {
        let memory = memory();
        let (mut source, _process) = start(&program, &memory, &[]);
        source.ask("migrate-set-parameters", json!({ "max-bandwidth": 4096 })).unwrap();
        source.ask("migrate", json!({ "uri": "exec:cat > /dev/null" })).unwrap();
        // QEMU says "setup" first, and answers before it has begun.
        migration_comes_to(&mut source, |status| status == "active");
        let before = settings(&mut source);
        let refused = source.may_move().unwrap_err();
        assert_eq!(refused.kind, FailureKind::CannotMove);
        assert!(refused.text.contains("a migration that vmemd did not start"), "{refused}");
        // Begun while memory went.
        source.pause().unwrap();
        assert_eq!(saved(&mut source).unwrap_err().kind, FailureKind::CannotMove);
        // Or in the very last moment.
        assert!(source.write_state(&mut std::io::sink()).is_err());
        assert_eq!((migration(&mut source).as_str(), settings(&mut source)), ("active", before));
        source.resume().unwrap();
        assert_eq!(source.status().unwrap().word, "running");
        source.ask("migrate_cancel", Value::Null).unwrap();
        migration_comes_to(&mut source, |status| !is_busy(status));
        source.may_move().unwrap();
    }
}

/// A machine to be changed by a monitor.
fn changeable(directory: &Directory) -> Vec<String> {
    let drive = |id: &str, file: &str| format!("if=none,id={id},format=raw,file={file}");
    let args = [
        "-smp",
        "1,maxcpus=2",
        "-drive",
        &drive("d0", &directory.image("base")),
        "-device",
        "virtio-blk-pci,drive=d0,id=disk",
        "-drive",
        &(drive("cd", &directory.image("iso")) + ",media=cdrom,readonly=on"),
        "-device",
        "ide-cd,drive=cd,id=tray",
        "-device",
        "virtio-scsi-pci,id=scsi",
        "-netdev",
        "user,id=net",
        "-chardev",
        "null,id=c0",
        "-device",
        "virtio-balloon-pci",
        "-device",
        "virtio-net-pci,netdev=net,romfile=",
    ];
    args.map(str::to_owned).to_vec()
}

fn start_with(
    program: &PathBuf,
    memory: &std::fs::File,
    arguments: &[String],
    more: &[&str],
) -> (Qemu, super::tests::Process) {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
    start(program, memory, &arguments)
}

#[test]
fn a_machine_that_a_monitor_has_changed_is_told_from_that_of_its_command_line() {
    for program in qemus() {
        let (memory, directory) = (memory(), Directory::new("changes"));
        let (mut qemu, _process) = start_with(&program, &memory, &changeable(&directory), &[]);
        qemu.may_move().unwrap();
        let snapshot = directory.0.path().join("snap.qcow2").display().to_string();
        let other = directory.image("other");
        let base = directory.0.path().join("base").display().to_string();
        for (change, undo, says) in [
            ("object_add iothread,id=io9", "object_del io9", "object io9 was added"),
            ("netdev_add user,id=n9", "netdev_del n9", "netdev n9 was added"),
            ("hostfwd_add net tcp:127.0.0.1:0-:22", "", "port TCP 127.0.0.1:"),
            ("chardev-add null,id=c9", "chardev-remove c9", "chardev c9 was added"),
            (
                "chardev-change c0 ringbuf",
                "chardev-change c0 null",
                "chardev c0 is now ringbuf, it was started with null",
            ),
            (
                "block_set_io_throttle d0 0 0 0 100 0 0",
                "block_set_io_throttle d0 0 0 0 0 0 0",
                "I/O limit of disk d0 is now iops=100, it was started with none",
            ),
            ("device_add scsi-hd,drive=late,id=late", "device_del late", "device late was added"),
            (
                &format!("change cd {other} raw"),
                "",
                &format!(
                    "disk cd is now {other} (raw), read-only, it was started with {}",
                    directory.0.path().join("iso").display()
                ),
            ),
            ("eject -f cd", "", "disk cd is now empty, it was started with"),
            (
                &format!("snapshot_blkdev d0 {snapshot} qcow2"),
                "commit d0",
                &format!(
                    "disk d0 is now {snapshot} (qcow2) on {base} (raw), it was started with {base} (raw)"
                ),
            ),
        ] {
            if says.contains("device late") {
                let node = json!({ "driver": "null-co", "node-name": "late", "size": 1 << 20 });
                qemu.ask("blockdev-add", node).unwrap();
            }
            let said = say(&mut qemu, change);
            let Err(refused) = qemu.may_move() else { panic!("{change}: {said}") };
            assert!(
                refused.kind == FailureKind::CannotMove && refused.text.contains(says),
                "{change}: {refused}"
            );
            qemu.pause().unwrap();
            // A device that was unplugged before may only be gone now, so the rest of the words may differ.
            let again = saved(&mut qemu).unwrap_err();
            assert!(
                again.kind == FailureKind::CannotMove && again.text.contains(says),
                "{change}, at rest: {again}"
            );
            qemu.resume().unwrap();
            say(&mut qemu, undo);
        }
        let slots = qemu.ask("query-hotpluggable-cpus", Value::Null).unwrap();
        let slots = slots.as_array().unwrap();
        let free = slots.iter().find(|slot| slot["qom-path"].is_null()).expect("a free slot");
        let mut processor = free["props"].clone();
        (processor["driver"], processor["id"]) = (free["type"].clone(), json!("more"));
        qemu.ask("device_add", processor).unwrap();
        let refused = qemu.may_move().unwrap_err();
        let says = ["device more was added", "number of processors is now 2, it was started with 1"];
        assert!(says.iter().all(|says| refused.text.contains(says)), "{refused}");
    }
}

#[test]
fn what_qemu_itself_cannot_move_is_known_before() {
    for program in qemus() {
        let (memory, directory) = (memory(), Directory::new("blocked"));
        let shared = directory.0.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        let drive = format!("file=fat:rw:{},format=raw,if=virtio", shared.display());
        let (mut qemu, _process) = start(&program, &memory, &["-drive", &drive]);
        let refused = qemu.may_move().unwrap_err();
        assert!(refused.kind == FailureKind::CannotMove && refused.text.contains("vvfat"), "{refused}");

        let (mut qemu, _process) = start_with(&program, &memory, &changeable(&directory), &[]);
        let socket = directory.0.path().join("nbd").display().to_string();
        let server = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        qemu.ask("nbd-server-start", server).unwrap();
        qemu.ask("nbd-server-add", json!({ "device": "d0" })).unwrap();
        let refused = qemu.may_move().unwrap_err();
        assert!(
            refused.kind == FailureKind::CannotMove && refused.text.contains("is exported (nbd, d0)"),
            "{refused}"
        );
        qemu.ask("nbd-server-stop", Value::Null).unwrap();
        qemu.may_move().unwrap();

        let copy = directory.0.path().join("copy").display().to_string();
        let job =
            json!({ "device": "d0", "target": copy, "sync": "full", "speed": 65536, "job-id": "copying" });
        qemu.ask("drive-backup", job).unwrap();
        let refused = qemu.may_move().unwrap_err();
        assert!(
            refused.kind == FailureKind::CannotMove && refused.text.contains("job copying (backup) is"),
            "{refused}"
        );
    }
}

#[test]
fn a_bitmap_that_is_in_no_image_moves_too() {
    for program in qemus() {
        let (memory, directory) = (memory(), Directory::new("bitmap"));
        let machine = changeable(&directory);
        let (mut source, _process) = start_with(&program, &memory, &machine, &[]);
        source.ask("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b0" })).unwrap();
        say(&mut source, "qemu-io d0 \"write 65536 65536\"");
        let count = |qemu: &mut Qemu| {
            let nodes = qemu.ask("query-block", Value::Null).unwrap();
            nodes[0]["inserted"]["dirty-bitmaps"][0]["count"].as_u64()
        };
        assert_eq!(count(&mut source), Some(65536));
        source.may_move().unwrap();
        source.pause().unwrap();
        let state = saved(&mut source).unwrap();
        let (mut target, _target_process) = start_with(&program, &memory, &machine, &INCOMING);
        target.take_state(&mut &state[..]).unwrap();
        source.ask("quit", Value::Null).ok();
        target.resume().unwrap();
        assert_eq!(count(&mut target), Some(65536));
        // It can move on, and be seen to be the same machine.
        target.may_move().unwrap();
    }
}

#[test]
fn a_state_that_was_given_away_is_known_before() {
    let program = qemus().remove(0);
    let memory = memory();
    let (mut qemu, _process) = start(&program, &memory, &[]);
    qemu.pause().unwrap();
    saved(&mut qemu).unwrap();
    let refused = qemu.may_move().unwrap_err();
    assert!(refused.kind == FailureKind::CannotMove && refused.text.contains("postmigrate"), "{refused}");
    qemu.resume().unwrap();
    qemu.may_move().unwrap();
    let stays = qemu.stays(Some("this VM cannot be moved: for a reason".to_owned()));
    let refused = { stays }.may_move().unwrap_err();
    assert_eq!(refused.text, "this VM cannot be moved: for a reason");
}

/// What QEMU's test socket answers.
fn tell_test_socket(path: &str, line: &str) -> String {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = [0; 256];
    let read = socket.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

/// Where the firmware has mapped that region of a PCI device.
fn mapped(qemu: &mut Qemu, id: &str, bar: u64) -> i64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let buses = qemu.ask("query-pci", Value::Null).unwrap();
        let devices = buses[0]["devices"].as_array().unwrap();
        let device = devices.iter().find(|device| device["qdev_id"] == id).unwrap();
        let mut regions = device["regions"].as_array().unwrap().iter();
        match regions.find(|region| region["bar"] == bar).unwrap()["address"].as_i64() {
            Some(address @ 1..) => return address,
            _ => assert!(Instant::now() < deadline, "the firmware does not map it"),
        }
    }
}

#[test]
fn the_size_of_the_state_is_known_while_the_guest_runs() {
    const FRAME_BUFFER: u64 = 256 << 20;
    for program in qemus() {
        let (memory, directory) = (memory(), Directory::new("frames"));
        let socket = directory.0.path().join("qtest").display().to_string();
        let door = format!("unix:{socket},server=on,wait=off");
        let device = "secondary-vga,id=frames,vgamem_mb=256";
        let (mut qemu, process) = start(&program, &memory, &["-device", device, "-qtest", &door]);
        qemu.process = format!("/proc/{}", process.0.id()).into();
        let address = mapped(&mut qemu, "frames", 0);
        let about = |estimate: u64, state: u64| estimate >= state && estimate < state + (8 << 20);
        let empty = qemu.state_bytes().unwrap();
        assert!(empty < 24 << 20, "an empty frame buffer costs nothing: {empty}");
        let line = format!("memset {address:#x} {FRAME_BUFFER:#x} 0x41");
        assert!(tell_test_socket(&socket, &line).starts_with("OK"));
        let began = Instant::now();
        let estimate = qemu.state_bytes().unwrap();
        let looked = began.elapsed();
        qemu.may_move().unwrap();
        qemu.pause().unwrap();
        let began = Instant::now();
        let whole = saved(&mut qemu).unwrap();
        let (state, saving) = (whole.len() as u64, began.elapsed());
        // One of that size goes through QEMU's socket as it is made and as it is taken.
        let (mut target, _target) =
            start(&program, &memory, &[&["-device", device, "-qtest", "null"][..], &INCOMING].concat());
        let began = Instant::now();
        target.take_state(&mut &whole[..]).unwrap();
        eprintln!(
            "{} MiB, of which {} MiB were known in {looked:?}; saved in {saving:?}, loaded in {:?}",
            state >> 20,
            estimate >> 20,
            began.elapsed()
        );
        assert!(state > FRAME_BUFFER && about(estimate, state), "{estimate} for {state}");
    }
}

/// Only the guest's own memory stays out of the state: what a user gives a device goes with it.
#[test]
fn memory_that_is_a_devices_counts() {
    const SHARED: u64 = 64 << 20;
    for program in qemus() {
        let (memory, directory) = (memory(), Directory::new("shared"));
        let socket = directory.0.path().join("qtest").display().to_string();
        let door = format!("unix:{socket},server=on,wait=off");
        let backend = format!("memory-backend-ram,id=mine,size={SHARED}");
        let device = "ivshmem-plain,id=shared,memdev=mine,master=on";
        let more = ["-object", &backend, "-device", device, "-qtest", &door];
        let (mut qemu, process) = start(&program, &memory, &more);
        qemu.process = format!("/proc/{}", process.0.id()).into();
        assert_eq!(qemu.memory, ["ram"]);
        let address = mapped(&mut qemu, "shared", 2);
        assert!(
            tell_test_socket(&socket, &format!("memset {address:#x} {SHARED:#x} 0x41")).starts_with("OK")
        );
        let estimate = qemu.state_bytes().unwrap();
        qemu.pause().unwrap();
        let state = saved(&mut qemu).unwrap().len() as u64;
        assert!(
            state > SHARED && estimate >= state && estimate < state + (24 << 20),
            "{estimate} for {state}"
        );
    }
}
