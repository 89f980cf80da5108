//! Wrong command lines of `vmemd bench`, and sizes that no host has, end with one line that says what is wrong, and
//! leave nothing behind.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use common::{Bench, Host};

#[test]
fn bad_command_lines() {
    let host = Host::new("bench-usage");
    let run = |args: &str| host.bench(&args.split(' ').collect::<Vec<_>>());
    run("migrate --memory 64M --ram 65M").fails(2, &["more than the VM's memory of 64M"]);
    run("replay").fails(2, &["TRACE", "--synthetic"]);
    run("replay --synthetic zap").fails(2, &["zipf:0.99"]);
    run("replay --synthetic random --ram 1M").fails(2, &["minimum of 16M"]);
    run("replay --synthetic loop:9 --memory 64M").fails(2, &["--memory 288M"]);
    run("replay --synthetic random --touches 999M").fails(2, &["at most"]);
    run("replay a.trace --touches 5").fails(2, &["--touches"]);
    run("record -o x.trace").fails(2, &["FILE.fio", "--vm"]);
    run("record a.fio --vm web -o x.trace").fails(2, &["--vm"]);
    run("fly").fails(2, &["fly"]);
    host.assert_clean();
}

#[test]
fn more_ram_than_the_host_has() {
    let host = Host::new("bench-ram");
    let store = host.store();
    let migrate = host.bench(&["migrate", "--memory", "4096T", "--ram", "1G", "--store", &store]);
    migrate.fails(5, &["RAM", "free"]);
    host.assert_clean();
}

#[test]
fn the_product_starts_it() {
    let host = Host::new("bench-started");
    for args in [&["--help"][..], &[], &["run", "--help"], &["--version"], &["run"], &["replay", "/no/trace"]]
    {
        let (direct, through) = (host.bench(args), host.vmemd(&[&["bench"], args].concat()));
        assert_eq!((direct.code, &direct.out, &direct.err), (through.code, &through.out, &through.err));
    }
    assert!(host.bench(&["run", "--help"]).out.contains("Usage: vmemd bench run "));
    let names = ["list", "--json"];
    assert_eq!(host.vmemd(&names).code, 0);
    let dir = host.root.join("empty").display().to_string();
    let record = ["bench", "record", "--vm", "web", "--seconds", "1", "-o", "/nowhere/x"];
    for args in [[&["--run-dir", &dir][..], &record].concat(), [&record[..], &["--run-dir", &dir]].concat()] {
        host.vmemd(&args).fails(4, &["web", &dir]);
    }
    host.assert_clean();
}
