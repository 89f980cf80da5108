use std::process::Command;
use std::time::Instant;

use vmprocess::Machine;

use super::*;
use crate::guest::tests::{memory, qemus, saved, start};

fn disk(device: &str, qdev: &str, file: &str, drv: &str, ro: bool) -> Value {
    json!({ "device": device, "qdev": qdev,
        "inserted": { "file": file, "drv": drv, "ro": ro, "node-name": format!("node-of-{drv}") } })
}

#[test]
fn what_the_vm_can_write_to_has_a_version() {
    let filtered = r#"json:{"throttle-group": "t", "driver": "throttle", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "/b"}}}"#;
    let disks = json!([
        disk("d0", "/machine/peripheral-anon/device[2]/virtio-backend", "/a", "qcow2", false),
        disk("", "/machine/peripheral/data/virtio-backend", filtered, "throttle", false),
        disk("cd", "x", "/iso", "raw", true),
        { "device": "floppy", "qdev": "f" },
        disk("pflash0", "/machine/system.flash0", "/vars", "raw", false),
        disk("", "/machine/system.flash1", "/more", "raw", false),
        // Called like flash by its user.
        disk("pflash-data", "/machine/peripheral/a/virtio-backend", "/c", "qcow2", false),
        disk("pflash1", "/machine/peripheral/b/virtio-backend", "/d", "qcow2", false),
    ]);
    let nodes = json!([{ "drv": "qcow2", "file": "/b" }, { "drv": "file", "file": "/b" }]);
    let told: Vec<(String, String, String, DiskVersion)> = choose(&disks, &nodes, "s")
        .unwrap()
        .into_iter()
        .map(|Chosen { device, disk }| (device, disk.name, disk.file, disk.version))
        .collect();
    let is = |device: &str, name: &str, file: &str, version| {
        (device.to_owned(), name.to_owned(), file.to_owned(), version)
    };
    let snapshot = || DiskVersion::Snapshot("s".to_owned());
    assert_eq!(
        told,
        [
            is("d0", "d0", "/a", snapshot()),
            is("node-of-throttle", "data", "/b", snapshot()),
            is("pflash0", "pflash0", "/vars", DiskVersion::InState),
            is("node-of-raw", "/machine/system.flash1", "/more", DiskVersion::InState),
            is("pflash-data", "pflash-data", "/c", snapshot()),
            is("pflash1", "pflash1", "/d", snapshot()),
        ]
    );
    assert_eq!(choose(&Value::Null, &Value::Null, "s"), Ok(Vec::new()));
}

#[test]
fn what_keeps_no_version_is_told_with_what_to_do() {
    let disks = json!([
        disk("d0", "", "/a", "qcow2", false),
        disk("d1", "", "/r", "raw", false),
        disk("d2", "", "nbd://host/x", "qcow2", false),
        // Of what is below the filter nothing is known.
        disk("d3", "", "/t", "throttle", false),
        { "device": "d4", "inserted": { "file": "/e", "drv": "qcow2", "ro": false, "encrypted": true } },
    ]);
    let refused = choose(&disks, &Value::Null, "s").unwrap_err();
    for (text, says) in refused.iter().zip([
        "disk d1 is in /r, and the format raw keeps no earlier version of a disk: convert it while the VM is off \
         (qemu-img convert -O qcow2 /r NEW, and the new name in the command line), or make the checkpoint without disks",
        "disk d2 is in \"nbd://host/x\", which is no file of this host",
        "disk d3 is in /t, and the format throttle keeps",
        "disk d4 is in /e, which is encrypted",
    ]) {
        assert!(text.starts_with(says), "{text}");
    }
    assert_eq!(refused.len(), 4);
}

fn qemu_img(arguments: &[&str]) -> String {
    let ran = Command::new("qemu-img").args(arguments).output();
    let ran =
        ran.unwrap_or_else(|_| testkit::skip(testkit::Reason::Qemu, "no qemu-img (scripts/setup --qemu)"));
    assert!(ran.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// Has QEMU write that byte all over the first 64 KiB of a disk.
fn fill(qemu: &mut Qemu, disk: &str, byte: u8) {
    let line = json!({ "command-line": format!("qemu-io {disk} \"write -P {byte} 0 64k\"") });
    let said = qemu.ask("human-monitor-command", line).unwrap();
    assert!(!said.to_string().contains("rror"), "{said}");
}

/// What a disk, or a snapshot of it, begins with.
fn first_byte(dir: &Path, file: &str, snapshot: Option<&str>) -> u8 {
    let to = dir.join("raw").display().to_string();
    let which = snapshot.map(|name| ["-l".to_owned(), format!("snapshot.name={name}")]);
    let which: Vec<&str> = which.iter().flatten().map(String::as_str).collect();
    qemu_img(&[&["convert", "-O", "raw"], &which[..], &[file, &to]].concat());
    std::fs::read(to).unwrap()[4096]
}

#[test]
fn disks_and_state_are_of_one_moment() {
    for program in qemus() {
        let place = testkit::directory("disks");
        let files = ["a", "b"].map(|name| place.path().join(name).display().to_string());
        files.iter().for_each(|file| drop(qemu_img(&["create", "-q", "-f", "qcow2", file, "16M"])));
        qemu_img(&["snapshot", "-c", "taken", &files[1]]);
        let drive = |name: usize| format!("if=virtio,id=d{name},format=qcow2,file={}", files[name]);
        let memory = memory();
        let (mut qemu, mut process) = start(&program, &memory, &["-drive", &drive(0), "-drive", &drive(1)]);

        let told = qemu.disks("now").unwrap();
        fill(&mut qemu, "d0", 5);
        qemu.pause().unwrap();
        // A name that one of them has already: none has it afterwards that had it not.
        let refused = qemu.snapshot_disks("taken").unwrap_err();
        assert!(refused.text.contains("(d0, d1)") && refused.text.contains("already exists"), "{refused}");
        let began = Instant::now();
        assert_eq!(qemu.snapshot_disks("now").unwrap(), told);
        eprintln!("two snapshots: {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
        saved(&mut qemu).unwrap();
        assert_eq!(qemu.snapshot_disks("late").unwrap_err().kind, FailureKind::CannotMove);
        // A QEMU that has given its disks away would end: they stay, and it goes on.
        let stays = qemu.forget_disks(&told).unwrap_err();
        assert!(stays.text.contains(&format!("snapshot now stays in {}", files[0])), "{stays}");
        qemu.resume().unwrap();
        fill(&mut qemu, "d0", 6);
        // It is the machine of its command line still, so that it may move, and be saved again.
        qemu.may_move().unwrap();
        qemu.pause().unwrap();
        let second = qemu.snapshot_disks("second").unwrap();
        qemu.resume().unwrap();
        qemu.forget_disks(&second).unwrap();
        assert!(qemu.forget_disks(&second).unwrap_err().text.contains("snapshot second stays in disk d0"));
        Box::new(qemu).quit().unwrap();
        process.0.wait().unwrap();

        let lists = files.each_ref().map(|file| qemu_img(&["snapshot", "-l", file]));
        assert!(lists[0].contains("now") && lists[1].contains("now"), "{lists:?}");
        assert!(!lists[0].contains("taken") && !lists.concat().contains("second"), "{lists:?}");
        assert_eq!(first_byte(place.path(), &files[0], Some("now")), 5);
        assert_eq!(first_byte(place.path(), &files[0], None), 6);
    }
}
