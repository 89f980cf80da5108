//! Traces, end to end: recorded from jobs and from a running VM, replayed, damaged.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs;

use common::{Bench, Host, needs_vms, wait_for};

const GUEST: &str = "random:rate=200M";

fn job_file(host: &Host) -> String {
    let path = host.root.join("hot.fio");
    let text = "[global]\nram=16m\nsize=32m\n[hot]\nrw=randrw\nrandom_distribution=zipf:0.99\nnumjobs=2\nruntime=1\n";
    fs::write(&path, text).expect("a job file");
    path.display().to_string()
}

fn path(host: &Host, name: &str) -> String {
    host.root.join(name).display().to_string()
}

/// Nothing but the trace itself is beside it.
fn assert_no_partial(host: &Host) {
    let names = fs::read_dir(&host.root).expect("the host's directory").flatten();
    let left: Vec<_> = names
        .map(|entry| entry.file_name())
        .filter(|name| name.to_string_lossy().contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn jobs_are_recorded_and_replayed() {
    let host = Host::new("jobs");
    let (jobs, trace) = (job_file(&host), path(&host, "hot.trace"));
    let recorded = host.bench(&["record", &jobs, "--touches", "50K", "-o", &trace, "--json"]);
    assert_eq!(recorded.code, 0, "{recorded:?}");
    // 8192 pages of the prefill, a ramp of a tenth.
    assert_eq!(recorded.json()["entries"], 8192 + 5000 + 50_000);
    assert_eq!(recorded.json()["file_bytes"], fs::metadata(&trace).expect("the trace").len());
    assert_no_partial(&host);

    let replayed = host.bench(&["replay", &trace, "--json"]);
    let report = replayed.json();
    assert_eq!((&report["memory_bytes"], &report["ram_bytes"]), (&(32 << 20).into(), &(16 << 20).into()));
    let rows = report["policies"].as_array().expect("a list");
    let names: Vec<_> = rows.iter().map(|row| row["policy"].as_str().expect("a name")).collect();
    assert_eq!(names, ["vmemd", "lru", "fifo", "clock", "lfu", "s3-fifo", "optimum"]);
    let rate = |row: &serde_json::Value| row["hit_rate"].as_f64().expect("a number");
    for row in rows {
        assert_eq!(row["touches"], 50_000);
        assert!(rate(row) <= rate(&rows[6]), "nobody beats the optimum: {row}");
    }
    assert_eq!(replayed.out, host.bench(&["replay", &trace, "--json"]).out, "the same again");
    let table = host.bench(&["replay", &trace, "--ram", "24M", "--policy", "optimum"]);
    assert!(table.out.contains("32M in 24M") && table.out.contains("optimum"), "{table:?}");
}

#[test]
fn what_is_no_trace_is_told_in_one_line() {
    let host = Host::new("hostile");
    let (jobs, trace) = (job_file(&host), path(&host, "a.trace"));
    assert_eq!(host.bench(&["record", &jobs, "--touches", "1000", "-o", &trace]).code, 0);
    let good = fs::read(&trace).expect("the trace");
    let refused = |bytes: &[u8], words: &[&str]| {
        fs::write(&trace, bytes).expect("a damaged trace");
        let said = host.bench(&["replay", &trace]);
        said.fails(2, &["cannot read the trace"]);
        said.fails(2, words);
        assert_eq!(said.err.lines().count(), 1, "{said:?}");
    };
    refused(b"", &["no trace"]);
    refused(
        b"ELF and other things that are longer than a header, but no trace at all, whatever",
        &["no trace"],
    );
    refused(&good[..good.len() - 1], &["cut off"]);
    refused(&good[..30], &["cut off"]);
    refused(&[&good, &b"x"[..]].concat(), &["goes on behind its end"]);
    let with = |at: usize, bytes: &[u8]| {
        let mut damaged = good.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        damaged
    };
    refused(&with(8, &[9]), &["version 9"]);
    refused(&with(16, &[0xFF; 8]), &["so much memory"]);
    refused(&with(32, &[0xFF; 8]), &["too many entries"]);
    refused(&with(48, &[0xFF; 8]), &["so many bytes"]);
    refused(&with(72, &[0xFF; 12]), &["entry 0"]);
    refused(&with(56, &[1]), &["checksum"]);
    host.bench(&["replay", "/dev/zero"]).fails(2, &["no regular file"]);
    let nowhere = path(&host, "no/such/directory/x");
    host.bench(&["record", &jobs, "-o", &nowhere]).fails(1, &["cannot make the trace", "No such file"]);
    host.bench(&["record", &trace, "-o", &trace]).fails(2, &["a.trace:"]);
    assert_no_partial(&host);
}

#[test]
fn the_faults_of_a_running_vm() {
    needs_vms();
    let mut host = Host::new("faults");
    let mut run = host.start_vm("web", GUEST);
    assert_eq!(host.vmemd(&["set", "web", "--ram", "32M"]).code, 0);
    let trace = path(&host, "web.trace");
    // A store that stalls holds up all faults of a recording.
    let faults = wait_for("a recording of many faults", || {
        let recorded = host.bench(&["record", "--vm", "web", "--seconds", "2", "-o", &trace, "--json"]);
        assert_eq!(recorded.code, 0, "{recorded:?}");
        recorded.json()["entries"].as_u64().filter(|faults| *faults > 100)
    });
    let bytes = fs::read(&trace).expect("the trace");
    assert_eq!((&bytes[..8], bytes[12]), (&b"VMEMDTRC"[..], 1));
    let report = host.bench(&["replay", &trace, "--policy", "lru", "--json"]).json();
    assert_eq!((&report["memory_bytes"], &report["ram_bytes"]), (&(128 << 20).into(), &(32 << 20).into()));
    assert_eq!(report["policies"][0]["touches"], faults);

    // One recording at a time; Ctrl-C ends one, leaves no file, and the next may begin.
    let lost = path(&host, "lost.trace");
    let mut long = host.start_bench(&["record", "--vm", "web", "--seconds", "600", "-o", &lost]);
    wait_for("the recording to begin", || {
        fs::exists(format!("{lost}.partial")).expect("a look").then_some(())
    });
    wait_for("the recording to be known", || {
        let second = host.bench(&["record", "--vm", "web", "--seconds", "1", "-o", &trace]);
        (second.code == 4 && second.err.contains("being recorded already")).then_some(())
    });
    long.signal(libc::SIGINT);
    long.ends_with(130);
    assert!(!fs::exists(&lost).expect("a look"));
    assert_no_partial(&host);
    wait_for("the recorder to be free", || {
        let next = host.bench(&["record", "--vm", "web", "--seconds", "1", "-o", &trace]);
        (next.code == 0).then_some(())
    });

    host.bench(&["record", "--vm", "nobody", "-o", &trace]).fails(4, &["nobody"]);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    run.ends_with(0);
    host.assert_clean();
}
