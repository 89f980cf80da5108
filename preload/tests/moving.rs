//! A running VM moves from one QEMU to another: memory by vmemd, device state by QEMU.

#[macro_use]
extern crate testkit;

testkit::main!();

mod machine;

use machine::target::Target;
use machine::{DEADLINE, Kit, MIB, Plan, Site, Vm};
use serde_json::Value;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{MigrateRequest, Request, State, Trust};
use vmprocess::failure::Failure;

fn migrate(mut client: VmClient, to: &str) -> Result<Value, Failure> {
    let request = Request::Migrate(MigrateRequest {
        to: to.to_owned(),
        ram_bytes: None,
        downtime_target_ms: 50,
        max_downtime_ms: None,
        streams: 2,
        max_rounds: 30,
        max_throttle: 99,
        check_placement: false,
        trust: Trust::default(),
    });
    client.ask(&request, DEADLINE)
}

/// Moves the VM to a QEMU of another plan, and returns what the source says of it.
fn moved(source: &Vm, (kit, site, plan): (&Kit, &Site, &Plan)) -> (Result<Value, Failure>, Vm) {
    let (target, client) = (Target::new(), source.client());
    let to = target.address();
    let asking = std::thread::spawn(move || migrate(client, &to));
    let vm = target.take(kit, site, plan);
    (asking.join().unwrap(), vm)
}

fn plan(kit: &Kit) -> Plan {
    Plan {
        regions: vec![384 * MIB, 128 * MIB],
        budget_bytes: 256 * MIB,
        ..Plan::new(kit, "mover", "checker memory 300M 10")
    }
}

fn checked(said: &str) {
    assert!(said.contains("checker memory done rounds=10 mismatched=0"), "{said}");
}

#[test]
fn a_guest_moves_while_it_checks_its_memory() {
    for qemu in Kit::find().qemus {
        let kit = Kit::find();
        let (here, there) = (Site::new("moving-source"), Site::new("moving-target"));
        let plan = Plan { qemu, ..plan(&kit) };
        let mut source = Vm::start(&kit, &here, &plan);
        source.says("checker memory round=1");
        let there_plan = Plan { budget_bytes: 192 * MIB, ..plan.clone() };
        let (report, mut target) = moved(&source, (&kit, &there, &there_plan));
        let report = match report {
            Ok(report) => report,
            Err(failure) => panic!("{failure}; the target: {:?} {}", target.end(), target.all_said()),
        };
        println!("{report}");
        assert_eq!(source.end().code(), Some(10), "it has moved away");
        assert_eq!(here.files(), Vec::<String>::new());
        let stat = target.stat();
        assert_eq!((stat.state, stat.vcpus), (State::Running, 2));
        let arrival = stat.arrival.unwrap();
        assert_eq!(arrival.pageins_during, 0, "{arrival:?}");
        assert!(stat.memory.resident_bytes <= 192 * MIB);
        assert!(target.end().success());
        checked(&target.all_said());
        assert_eq!(there.files(), Vec::<String>::new());
    }
}

#[test]
fn a_guest_that_another_machine_cannot_take_runs_on_where_it_was() {
    let kit = Kit::find();
    let (here, there) = (Site::new("staying-source"), Site::new("staying-target"));
    let plan = plan(&kit);
    let mut source = Vm::start(&kit, &here, &plan);
    source.says("checker memory round=1");
    // It has a device that the source's state knows nothing of, and lacks nothing: QEMU finds that out while it loads.
    let other = plan.clone().with(&["-device", "virtio-rng-pci", "-smp", "3"]);
    let (refused, mut target) = moved(&source, (&kit, &there, &other));
    let refused = refused.unwrap_err();
    for says in ["QEMU ended before the VM had come", "runs on here"] {
        assert!(refused.text.contains(says), "{says}: {refused}");
    }
    assert!(!target.end().success());
    assert_eq!(there.files(), Vec::<String>::new());
    assert_eq!(source.stat().state, State::Running);
    assert!(source.end().success());
    checked(&source.all_said());
}
