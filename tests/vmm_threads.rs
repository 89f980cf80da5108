//! The threads of a machine, in a process where no other machine is.

#[macro_use]
extern crate testkit;

testkit::main!();

mod guest;

use std::collections::BTreeSet;

use guest::Guest;

fn thread_names() -> BTreeSet<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("vcpu") || name.starts_with("vmm-throttle"))
        .collect()
}

#[test]
fn they_have_names_and_end_with_the_machine() {
    for workload in ["rewrite:working-set=4M", "idle:working-set=4M", "rewrite:working-set=4M,rate=4K"] {
        let mut guest = Guest::new("32M", 2, workload);
        guest.machine.start().unwrap();
        guest.wait("the fill", |counters| counters.filled_pages >= 1024);
        guest.wait("the names", |_| thread_names().into_iter().eq(["vcpu0", "vcpu1", "vmm-throttle"]));
        drop(guest);
        assert!(thread_names().is_empty(), "{workload}: {:?}", thread_names());
    }
}
