//! Stock QEMUs whose memory is vmemd's, under TCG. A guest that checks its memory finds no wrong byte while its
//! budget changes, a balloon takes memory, disks write into it, or QEMU is killed.

#[macro_use]
extern crate testkit;

testkit::main!();

mod machine;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use machine::{DEADLINE, Kit, MIB, Monitor, Plan, Site, Vm, wait_for};
use serde_json::json;
use swapd::PAGE_SIZE;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{Request, State};
use vmprocess::failure::FailureKind;
use vmprocess::qemu::LIBRARY;

const SANDBOX: [&str; 2] =
    ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];

/// The end of a guest that has checked its memory: nothing differed, QEMU ended well, nothing was left behind.
fn ended_well(mut vm: Vm, site: &Site) {
    assert!(vm.end().success());
    let said = vm.all_said();
    let done = said.lines().find(|line| line.starts_with("checker memory done"));
    assert!(done.is_some_and(|line| line.ends_with("mismatched=0")), "{said}");
    assert_eq!(site.files(), Vec::<String>::new(), "{said}");
}

#[test]
fn a_guest_in_a_quarter_of_its_memory_finds_every_byte_right() {
    let kit = Kit::find();
    for qemu in kit.qemus.clone() {
        let site = Site::new("quarter");
        let plan = Plan { qemu, ..Plan::new(&kit, "quarter", "checker memory 700M 2") };
        let mut vm = Vm::start(&kit, &site, &plan);
        vm.says("checker memory round=1");
        let stat = vm.stat();
        assert_eq!((stat.state, stat.pid, stat.vcpus), (State::Running, vm.pid(), 2));
        assert_eq!(stat.workload, "qemu-system-x86_64");
        assert_eq!(stat.memory.memory_bytes, 1024 * MIB);
        assert!(stat.memory.resident_bytes <= 256 * MIB, "{stat:?}");
        assert!(stat.memory.stored_bytes >= 400 * MIB, "{stat:?}");
        ended_well(vm, &site);
    }
}

#[test]
fn budgets_change_and_the_guest_is_paused_while_it_checks_its_memory() {
    let kit = Kit::find();
    let site = Site::new("changes");
    let mut vm = Vm::start(&kit, &site, &Plan::new(&kit, "changes", "checker memory 500M 6"));
    vm.says("checker memory fill");
    for budget in [128, 512, 64, 384, 96] {
        vm.ask(&Request::SetRam { ram_bytes: budget * MIB });
        let stat = vm.stat();
        assert_eq!(stat.memory.ram_budget_bytes, budget * MIB);
        assert!(stat.memory.resident_bytes <= budget * MIB, "{stat:?}");
        vm.ask(&Request::Pause);
        let paused = vm.stat();
        assert_eq!(paused.state, State::Paused);
        vm.ask(&Request::Resume);
        assert_eq!(vm.stat().state, State::Running);
    }
    ended_well(vm, &site);
}

#[test]
fn a_paused_guest_stands_still() {
    let kit = Kit::find();
    let site = Site::new("paused");
    let plan = Plan::new(&kit, "paused", "while true; do checker memory 100M 1; done");
    let mut vm = Vm::start(&kit, &site, &plan);
    vm.says("checker memory fill");
    vm.ask(&Request::Pause);
    // All of it is written out; nothing comes back in, because nobody touches it.
    vm.ask(&Request::SetRam { ram_bytes: 16 * MIB });
    let before = vm.stat().memory;
    // That nothing happens gives no event: this is how long nothing is watched.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let after = vm.stat().memory;
    assert_eq!(before.faults, after.faults);
    // The last batch may be on its way out still.
    assert!(after.resident_bytes <= before.resident_bytes, "{before:?}, {after:?}");
    vm.ask(&Request::Resume);
    wait_for("a page to come in", || (vm.stat().memory.stored_bytes < after.stored_bytes).then_some(()));
    vm.ask(&Request::Stop);
    assert!(vm.end().success());
    assert_eq!(site.files(), Vec::<String>::new());
}

#[test]
fn sandbox_preallocation_and_two_numa_nodes() {
    let kit = Kit::find();
    for qemu in kit.qemus.clone() {
        let site = Site::new("sandbox");
        let plan = Plan {
            qemu,
            regions: vec![256 * MIB, 128 * MIB],
            budget_bytes: 96 * MIB,
            backend_options: ",prealloc=on",
            ..Plan::new(&kit, "sandbox", "checker memory 200M 2")
        };
        let mut vm = Vm::start(&kit, &site, &plan.with(&SANDBOX));
        vm.says("checker memory round=1");
        assert!(vm.stat().memory.resident_bytes <= 96 * MIB);
        ended_well(vm, &site);
    }
}

#[test]
fn what_a_balloon_takes_is_untouched_and_comes_back_whole() {
    let kit = Kit::find();
    let site = Site::new("balloon");
    let monitor = site.path("monitor");
    let plan = Plan {
        regions: vec![512 * MIB],
        budget_bytes: 128 * MIB,
        ..Plan::new(
            &kit,
            "balloon",
            "checker memory 300M 1; echo checked; read answer; checker memory 300M 1",
        )
    };
    let arguments = ["-device", "virtio-balloon-pci", "-qmp", &Monitor::argument(&monitor)];
    let mut vm = Vm::start(&kit, &site, &plan.with(&arguments));
    vm.says("checked");
    let before = vm.stat().memory;
    let mut monitor = Monitor::connect(&monitor);
    monitor.ask("balloon", json!({ "value": 212 * MIB }));
    // Pages that the checker has written are given back: neither resident nor stored.
    let untouched = |vm: &Vm| vm.stat().memory.untouched_bytes;
    wait_for("the balloon to be inflated", || {
        (untouched(&vm) > before.untouched_bytes + 250 * MIB).then_some(())
    });
    let after = vm.stat().memory;
    assert!(after.resident_bytes + after.stored_bytes < 260 * MIB, "{after:?}");
    monitor.ask("balloon", json!({ "value": 512 * MIB }));
    wait_for("the balloon to be deflated", || {
        (monitor.ask("query-balloon", json!({}))["actual"] == 512 * MIB).then_some(())
    });
    vm.types("go");
    ended_well(vm, &site);
}

/// Of a VM of 768 MiB most is in the store when a balloon takes all but 128 MiB.
#[test]
fn what_a_balloon_takes_leaves_the_store() {
    const SOON: Duration = Duration::from_secs(10);
    let kit = Kit::find();
    for qemu in kit.qemus.clone() {
        let site = Site::new("shrunk");
        let monitor = site.path("monitor");
        let plan = Plan {
            qemu,
            regions: vec![768 * MIB],
            budget_bytes: 96 * MIB,
            ..Plan::new(
                &kit,
                "shrunk",
                "checker memory 500M 1; echo checked; read answer; checker memory 300M 1",
            )
        };
        let arguments = ["-device", "virtio-balloon-pci", "-qmp", &Monitor::argument(&monitor)];
        let mut vm = Vm::start(&kit, &site, &plan.with(&arguments));
        vm.says("checked");
        let before = (site.stored_bytes(&vm), vm.stat().memory.stored_bytes);
        assert!(before.0 >= 256 * MIB && before.1 >= 256 * MIB, "{before:?}");
        let mut monitor = Monitor::connect(&monitor);
        monitor.ask("balloon", json!({ "value": 128 * MIB }));
        let began = Instant::now();
        // The guest's work, page by page, under emulation.
        wait_for("the balloon to be inflated", || {
            (vm.stat().memory.stored_bytes + 250 * MIB < before.1).then_some(())
        });
        let inflated = Instant::now();
        testkit::wait_until(
            SOON,
            || "the store's file to be smaller",
            || (site.stored_bytes(&vm) + 200 * MIB <= before.0).then_some(()),
        );
        let after = site.stored_bytes(&vm);
        println!(
            "inflated in {:?}, {} MiB left the store {:?} later",
            inflated - began,
            (before.0 - after) / MIB,
            inflated.elapsed()
        );
        monitor.ask("balloon", json!({ "value": 768 * MIB }));
        wait_for("the balloon to be deflated", || {
            (monitor.ask("query-balloon", json!({}))["actual"] == 768 * MIB).then_some(())
        });
        vm.types("go");
        ended_well(vm, &site);
    }
}

#[test]
fn a_killed_qemu_leaves_only_what_the_next_one_cleans() {
    let kit = Kit::find();
    let site = Site::new("killed");
    let plan = Plan {
        regions: vec![512 * MIB],
        qmp_socket: true,
        ..Plan::new(&kit, "killed", "checker memory 300M 1")
    };
    let mut vm = Vm::start(&kit, &site, &plan);
    vm.says("checker memory fill");
    let pid = vm.pid();
    // SAFETY: no memory arguments; the process is this test's child.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    vm.end();
    let record = format!("killed-{pid}");
    assert_eq!(site.files(), [&record, "killed.qmp", "killed.sock"]);
    // Daemons count RAM by these records, and remove those of the dead; there is none here.
    std::fs::remove_file(site.path("run").join(".ram").join(record)).unwrap();
    ended_well(Vm::start(&kit, &site, &plan), &site);
}

#[test]
fn what_qemu_starts_sees_nothing_of_the_preload() {
    let kit = Kit::find();
    let site = Site::new("children");
    let (monitor, seen) = (site.path("monitor"), site.path("environment"));
    let plan = Plan {
        regions: vec![128 * MIB],
        budget_bytes: 64 * MIB,
        ..Plan::new(&kit, "children", "echo up; read answer")
    };
    let mut vm = Vm::start(&kit, &site, &plan.with(&["-qmp", &Monitor::argument(&monitor)]));
    vm.says("up");
    let mut monitor = Monitor::connect(&monitor);
    let shell = format!("exec:(env; echo end) > {}; cat > /dev/null", seen.display());
    monitor.ask("migrate", json!({ "uri": shell }));
    let seen = wait_for("a child of QEMU", || {
        std::fs::read_to_string(&seen).ok().filter(|text| text.ends_with("end\n"))
    });
    assert!(seen.contains("PATH="), "{seen}");
    assert!(!seen.contains("PRELOAD") && !seen.contains(LIBRARY), "{seen}");
}

#[test]
fn a_name_that_is_taken_keeps_a_second_qemu_from_starting() {
    let kit = Kit::find();
    let site = Site::new("taken");
    let plan = Plan { regions: vec![512 * MIB], ..Plan::new(&kit, "taken", "echo up; read answer") };
    let mut vm = Vm::start(&kit, &site, &plan);
    vm.says("up");
    let mut second = Vm::start(&kit, &site, &plan);
    assert!(!second.end().success());
    let said = second.all_said();
    assert!(said.contains("QEMU gets no memory") && said.contains("\"taken\" is taken"), "{said}");
    assert_eq!(vm.stat().state, State::Running);
    vm.types("go");
    assert!(vm.end().success());
    assert_eq!(site.files(), Vec::<String>::new());
}

#[test]
fn a_budget_that_cannot_be_is_refused_and_the_guest_goes_on() {
    let kit = Kit::find();
    let site = Site::new("refused");
    let plan = Plan {
        regions: vec![256 * MIB],
        budget_bytes: 64 * MIB,
        ..Plan::new(&kit, "refused", "echo up; read a")
    };
    let mut vm = Vm::start(&kit, &site, &plan);
    vm.says("up");
    let refused = vm.try_ask(&Request::SetRam { ram_bytes: 512 * MIB }).unwrap_err();
    assert_eq!(refused.kind, FailureKind::Usage, "{refused}");
    // SAFETY: no memory arguments; the process is this test's child.
    unsafe { libc::kill(vm.pid() as i32, libc::SIGTERM) };
    // QEMU's own way to end, which takes the socket along.
    assert!(vm.end().success());
    assert_eq!(site.files(), Vec::<String>::new());
}

#[test]
fn a_disk_without_cache_reads_right_while_pages_leave() {
    let kit = Kit::find();
    for aio in ["threads", "native", "io_uring"] {
        let site = Site::new("disk");
        let image = site.path("image");
        let made = Command::new(kit.checker()).arg("image").arg(&image).arg("256M").status();
        assert!(made.unwrap().success());
        let plan = Plan {
            regions: vec![384 * MIB],
            budget_bytes: 96 * MIB,
            ..Plan::new(&kit, "disk", "checker memory 150M 1000s & checker disk /dev/vda 60")
        };
        let drive = format!("file={},format=raw,if=virtio,cache=none,aio={aio}", image.display());
        let mut vm = Vm::start(&kit, &site, &plan.with(&["-drive", &drive]));
        vm.says("checker memory fill");
        let done = AtomicBool::new(false);
        let evicted = std::thread::scope(|scope| {
            let client = vm.client();
            let squeezing = scope.spawn(|| squeeze(client, &done));
            // Told for every look at the disk; the last one says all.
            let said = vm.says("checker disk done");
            done.store(true, Ordering::SeqCst);
            assert!(said.ends_with("mismatched=0") || said.contains("mismatched=0 "), "{aio}: {said}");
            squeezing.join().unwrap()
        });
        assert!(evicted >= 2 * 384 * MIB / PAGE_SIZE as u64, "{aio}: only {evicted} pages left");
        assert!(vm.end().success());
        let said = vm.all_said();
        assert!(!said.contains("mismatch page"), "{aio}: {said}");
    }
}

/// Drives the guest's pages out and lets them in again, until `done`. How many have left.
fn squeeze(mut client: VmClient, done: &AtomicBool) -> u64 {
    let before = client.stat().unwrap().memory.evict.written;
    let mut after = before;
    for budget in [16, 96].into_iter().cycle() {
        if done.load(Ordering::SeqCst) {
            break;
        }
        // Refused, the VM is ending.
        let set = Request::SetRam { ram_bytes: budget * MIB };
        let Ok(stat) = client.ask(&set, DEADLINE).and_then(|_| client.stat()) else { break };
        after = stat.memory.evict.written;
    }
    after - before
}
