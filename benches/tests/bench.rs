//! `vmemd bench run`: bad input, Ctrl-C in the middle, and a short run of every engine and job file. No time is
//! asserted.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Bench, Host, needs_root, needs_vms, wait_for};
use serde_json::Value;
use testkit::{OrSkip, Reason, skip, skip_part};

const JOB: &str = "[global]\nram=32m\nruntime=300ms\nsize=64m\n[a]\nrw=randrw\nnumjobs=2\n";

fn job_file(host: &Host, name: &str, text: &str) -> String {
    let path = host.root.join(name);
    fs::write(&path, text).expect("a job file");
    path.display().to_string()
}

fn job_files() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs");
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir).expect("job files").flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

#[test]
fn a_job_file_that_is_wrong() {
    let host = Host::new("jobs-wrong");
    let store = host.store();
    let said = |text: &str| host.bench(&["run", &job_file(&host, "x.fio", text), "--store", &store]);
    let wrong = said("[global]\nram=32m\n[a]\nsize=64m\nrw=randrw\nrwmixraed=70\n");
    wrong.fails(
        2,
        &["x.fio:6:1: unknown key `rwmixraed`: did you mean `rwmixread`?", "6 | rwmixraed=70", "^^^^^^^^^"],
    );
    said("[global\n").fails(2, &["x.fio:1:1: a section's name ends with `]`"]);
    said("size=4g\n").fails(2, &["x.fio:1:1:", "[global]"]);
    said("[global]\nram=32m\n[a]\nrw=randrw\nsize=4q\n").fails(2, &["x.fio:5:6:", "not a size"]);
    said("[global]\nram=32m\n[a]\nrw=randrw\nsize=4m\niodepth=4\n").fails(2, &["x.fio:6:1:", "numjobs="]);
    said("[global]\nram=32m\nengine=disk\n[a]\nrw=randrw\nsize=4m\n")
        .fails(2, &["x.fio:3:8:", "`disk` is no engine"]);
    said("[global]\nram=8m\n[a]\nrw=rw\nsize=64m\n").fails(2, &["x.fio:2:5:", "16M"]);
    said("").fails(2, &["x.fio:1:1:", "ram="]);
    host.bench(&["run", "/no/such/file.fio"]).fails(2, &["/no/such/file.fio"]);
    host.bench(&["run"]).fails(2, &["FILE"]);
    host.assert_clean();
}

#[test]
fn overrides_that_make_no_sense() {
    let host = Host::new("jobs-overrides");
    let (store, file) = (host.store(), job_file(&host, "x.fio", JOB));
    let with = |more: &[&str]| host.bench(&[&["run", &file, "--store", &store][..], more].concat());
    with(&["--engine", "disk"]).fails(2, &["disk", "vmemd"]);
    with(&["--ram", "1M"]).fails(2, &["x.fio", "minimum of 16M"]);
    with(&["--scale", "2"]).fails(2, &["1/N"]);
    with(&["--scale", "1/32"]).fails(2, &["x.fio", "2M", "16M", "--scale"]);
    with(&["--runtime", "5"]).fails(2, &["50ms"]);
    with(&["--repeat", "0"]).fails(2, &["--repeat"]);
    with(&["--output-format", "xml"]).fails(2, &["xml", "json"]);
    with(&[&file]).fails(2, &["same name"]);
    host.bench(&["report", &file]).fails(2, &["x.fio", "--output-format json"]);
    host.bench(&["worker", "{}"]).fails(2, &["bench run"]);
    host.assert_clean();
}

#[test]
fn sizes_that_do_not_fit_are_told_before_anything_starts() {
    let host = Host::new("jobs-size");
    let (store, fits) = (host.store(), job_file(&host, "fits.fio", JOB));
    let said = |text: &str, engine: &str| {
        let file = job_file(&host, "x.fio", text);
        host.bench(&["run", &fits, &file, "--engine", engine, "--store", &store])
    };
    let ram = said("[global]\nram=4t\n[a]\nsize=4t\nrw=rw\n", "vmemd");
    ram.fails(5, &["x: this benchmark needs 4", "of RAM", "free"]);
    let disk = said("[global]\nram=32m\n[a]\nsize=4t\nrw=rw\n", "raw");
    disk.fails(5, &["x: the store needs up to 4T", "free"]);
    said("[global]\nram=32m\n[a]\nsize=9t\nrw=rw\n", "raw").fails(2, &["x.fio:4:6:", "more than 8T"]);
    for said in [ram, disk] {
        assert!(!said.err.contains("[1/"), "something was run: {said:?}");
    }
    host.assert_clean();
}

#[test]
fn an_engine_without_permission_is_left_out_and_the_others_run() {
    needs_vms();
    needs_root("giving a permission up");
    let host = Host::new("jobs-permission");
    let file = job_file(&host, "x.fio", JOB);
    fs::set_permissions(&host.root, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("permissions");
    // Somebody who may write here, and nothing else.
    let mut command = std::process::Command::new("setpriv");
    let store = host.root.join("theirs");
    fs::create_dir(&store).expect("a directory");
    std::os::unix::fs::chown(&store, Some(65534), Some(65534)).expect("root may");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", common::BENCH]);
    command.args(["run", &file, "--engine", "swap,mem", "--repeat", "1", "--store"]).arg(&store);
    let output = command.output().or_skip(Reason::Tools);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if err.contains("ermission denied") && !err.contains("left out") {
        skip(Reason::Users, format_args!("others cannot get here: {err}"));
    }
    assert!(output.status.success(), "{out}{err}");
    assert!(err.contains("swap is left out: memory cgroups and swap files need root"), "{err}");
    assert!(out.contains("swap: left out") && out.contains("engine=mem, run 1 of 1"), "{out}");
    fs::remove_dir(&store).expect("nothing is left in it");
}

#[test]
fn ctrl_c_leaves_nothing() {
    needs_vms();
    needs_root("a swap file");
    for engine in ["swap", "vmemd", "raw"] {
        let mut host = Host::new("jobs-interrupt");
        let store = host.store();
        let file = job_file(&host, "x.fio", &JOB.replace("300ms", "600s"));
        let mut bench = host.start_bench(&["run", &file, "--engine", engine, "--store", &store]);
        let pid = bench.pid();
        let log = host.root.join(format!("store/vmemd-bench-{pid}/1-{engine}/log"));
        wait_for("the worker, or the end", || (log.exists() || !common::lives(pid)).then_some(()));
        if bench.log().contains("left out") {
            skip_part(Reason::Swap, format_args!("{engine} is not to be had here: {}", bench.log()));
            continue;
        }
        let swap_file = format!("vmemd-bench-{pid}/1-swap/swapfile");
        let swaps = || fs::read_to_string("/proc/swaps").unwrap_or_default();
        assert_eq!(swaps().contains(&swap_file), engine == "swap", "{}", swaps());
        assert_eq!(cgroups(pid).is_empty(), engine != "swap");
        let worker = || host.processes().into_iter().find(|other| *other != pid);
        wait_for("the worker's process", worker);
        bench.signal(libc::SIGINT);
        bench.ends_with(130);
        assert!(bench.log().contains("interrupted"), "{}", bench.log());
        assert!(!swaps().contains(&swap_file), "{}", swaps());
        assert!(cgroups(pid).is_empty(), "{:?}", cgroups(pid));
        host.assert_clean();
    }
}

#[test]
fn ctrl_c_keeps_the_results_of_the_files_that_are_done() {
    let mut host = Host::new("jobs-keep");
    let (store, results) = (host.store(), host.root.join("results.json"));
    let short = job_file(&host, "short.fio", JOB);
    let long = job_file(&host, "long.fio", &JOB.replace("300ms", "600s"));
    let last = job_file(&host, "last.fio", JOB);
    let args = ["run", &short, &long, &last, "--engine", "mem", "--repeat", "1", "--store", &store];
    let to_file = ["--output-format", "json", "--output", &results.display().to_string()];
    for more in [&[][..], &to_file] {
        let mut bench = host.start_bench(&[&args, more].concat());
        let log = host.root.join(format!("store/vmemd-bench-{}/2-mem/log", bench.pid()));
        wait_for("the second file's worker", || log.exists().then_some(()));
        bench.signal(libc::SIGINT);
        bench.ends_with(130);
        assert!(bench.log().contains("1 of 3 files were done"), "{}", bench.log());
        if more.is_empty() {
            assert_eq!(bench.first_line(), "short: 64M of memory in 32M");
        }
    }
    let report = host.bench(&["report", &results.display().to_string()]);
    assert_eq!((report.code, report.err.as_str()), (0, ""), "{report:?}");
    let document: Value = serde_json::from_str(&fs::read_to_string(results).expect("results")).expect("JSON");
    let summary = document["vmemd"]["summary"].as_array().expect("a summary");
    assert!(summary.len() == 1 && summary[0]["scenario"] == "short", "{summary:?}");
    host.assert_clean();
}

#[test]
fn a_run_that_was_killed_is_cleaned_up_by_the_next() {
    needs_vms();
    needs_root("a swap file");
    let mut host = Host::new("jobs-left");
    let store = host.store();
    let file = job_file(&host, "x.fio", &JOB.replace("300ms", "600s"));
    let mut bench = host.start_bench(&["run", &file, "--engine", "swap", "--store", &store]);
    let pid = bench.pid();
    let site = host.root.join(format!("store/vmemd-bench-{pid}"));
    wait_for("the worker, or the end", || {
        (site.join("1-swap/log").exists() || !common::lives(pid)).then_some(())
    });
    if !common::lives(pid) || bench.log().contains("left out") {
        skip(Reason::Swap, format_args!("no swap file here: {}", bench.log()));
    }
    // From its end on whichever benchmark of this host starts next removes its cgroup, one of another test as well.
    assert!(!cgroups(pid).is_empty());
    bench.signal(libc::SIGKILL);
    bench.end();
    wait_for("its worker to die with it", || host.processes().is_empty().then_some(()));
    assert!(site.exists());
    let next = job_file(&host, "y.fio", JOB);
    let said = host.bench(&["run", &next, "--engine", "mem", "--repeat", "1", "--store", &store]);
    assert_eq!(said.code, 0, "{said:?}");
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    assert!(!swaps.contains(&format!("vmemd-bench-{pid}")), "{swaps}");
    assert!(cgroups(pid).is_empty(), "{:?}", cgroups(pid));
    host.assert_clean();
}

/// Memory cgroups of a benchmark.
fn cgroups(pid: u32) -> Vec<PathBuf> {
    let name = format!("vmemd-bench-{pid}-");
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"];
    let entries = roots.iter().flat_map(|root| fs::read_dir(root).into_iter().flatten().flatten());
    let of_it = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&name));
    of_it.map(|entry| entry.path()).collect()
}

/// Runs job files at a small size, and returns where the results are.
fn smoke(host: &Host, name: &str, files: &[String], more: &[&str]) -> String {
    let results = host.root.join(name).display().to_string();
    let (store, runs) = (host.store(), host.root.join("runs").display().to_string());
    let mut args = vec!["run"];
    args.extend(files.iter().map(String::as_str));
    args.extend("--scale 1/64 --runtime 150ms --ramp-time 50ms --repeat 1 --output-format json".split(' '));
    args.extend(["--output", &results, "--output-dir", &runs, "--store", &store]);
    args.extend(more);
    let said = host.bench(&args);
    assert_eq!(said.code, 0, "{said:?}");
    results
}

#[test]
fn every_job_file_runs_on_every_engine() {
    needs_vms();
    let host = Host::new("jobs-smoke");
    let files: Vec<String> = job_files().iter().map(|path| path.display().to_string()).collect();
    // Of 1 TiB even a small part is more than a test may ask of plain memory.
    let (huge, small): (Vec<_>, Vec<_>) = files.into_iter().partition(|path| path.contains("huge"));
    assert!(huge.len() == 2 && small.len() >= 12);
    let all = smoke(&host, "all.json", &small, &["--engine", "vmemd,swap,raw,mem"]);
    let own = smoke(&host, "own.json", &huge, &[]);
    let mut measured = 0;
    for results in [&all, &own] {
        let document: Value =
            serde_json::from_str(&fs::read_to_string(results).expect("results")).expect("JSON");
        let summary = document["vmemd"]["summary"].as_array().expect("a summary");
        // What this host lacks for it, it lacks for every file.
        let swap_out =
            summary.iter().filter(|row| row["engine"] == "swap").map(|row| !row["left_out"].is_null());
        let swap_out: Vec<bool> = swap_out.collect();
        assert!(swap_out.iter().all(|out| *out == swap_out[0]), "{summary:?}");
        for row in summary {
            assert_eq!(row["failed"].as_array().map(Vec::len), Some(0), "{row}");
            if row["left_out"].is_null() {
                // So short a run of the raw device may end before its first read on a busy machine.
                let touches = row["figures"]["touches_per_s"]["median"].as_f64().expect("a number");
                assert!(touches > 0.0 || row["engine"] == "raw", "{row}");
                measured += 1;
            }
        }
        measured -= two_jobs_in_a_file(summary);
        for job in document["jobs"].as_array().expect("jobs") {
            assert_eq!(job["error"], 0, "wrong content: {job}");
        }
    }
    assert!(measured >= 2 * small.len(), "{measured}");
    let runs = fs::read_dir(host.root.join("runs")).expect("a file a run");
    assert_eq!(runs.count(), measured);

    let html = host.root.join("report.html");
    let report = host.bench(&["report", &all, &own, "--output", &html.display().to_string()]);
    assert_eq!(report.code, 0, "{report:?}");
    for row in ["first touch", "two jobs in one VM", "a VM of 1 TiB: start"] {
        assert!(report.out.contains(row), "{row}: {}", report.out);
    }
    let html = fs::read_to_string(html).expect("a report");
    assert!(html.contains("</html>") && html.matches("<svg").count() > small.len());
    let rows = host.bench(&["report", &all, "--json"]).json();
    assert!(rows[0]["title"].is_string(), "{rows}");
    host.assert_clean();
}

#[test]
fn files_take_turns_if_asked_to() {
    let host = Host::new("jobs-turns");
    let jobs = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs");
    let files = ["stride3.fio", "stride17.fio"].map(|name| jobs.join(name).display().to_string());
    let store = host.store();
    let mut args = vec!["run", &files[0], &files[1], "--turns", "--engine", "mem", "--store", &store];
    args.extend("--scale 1/64 --runtime 50ms --ramp-time 10ms --repeat 2".split(' '));
    let said = host.bench(&args);
    assert_eq!(said.code, 0, "{said:?}");
    let runs = said.err.lines().filter_map(|line| line.split_once("] ")?.1.split_once(": "));
    let order: Vec<&str> = runs.map(|(run, _)| run).collect();
    assert_eq!(order, ["stride3 mem #1", "stride17 mem #1", "stride3 mem #2", "stride17 mem #2"], "{said:?}");
    host.assert_clean();
}

/// A run of two jobs writes one file for two rows.
fn two_jobs_in_a_file(summary: &[Value]) -> usize {
    let second =
        |row: &&Value| row["job"] == "untouched" || (row["scenario"] == "two" && row["job"] == "rand");
    summary.iter().filter(second).filter(|row| row["left_out"].is_null()).count()
}

#[test]
fn normal_output_reads_like_fio() {
    needs_vms();
    let host = Host::new("jobs-normal");
    let (store, file) = (host.store(), job_file(&host, "x.fio", JOB));
    let said = host.bench(&["run", &file, "--engine", "vmemd,mem", "--repeat", "2", "--store", &store]);
    assert_eq!(said.code, 0, "{said:?}");
    for part in [
        "x: 64M of memory in 32M",
        "a: (groupid=0, jobs=2): err= 0: engine=vmemd, run ",
        "  read : IOPS=",
        "  write: IOPS=",
        "clat percentiles (usec):",
        "medians (lowest-highest)",
        "vmemd to mem",
    ] {
        assert!(said.out.contains(part), "{part:?} is not in {}", said.out);
    }
    assert!(said.err.contains("[4/4] x mem #2: a: "), "{}", said.err);
    host.assert_clean();
}
