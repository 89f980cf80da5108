//! A benchmark's worker, one run of every engine at a small size. No time is asserted.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use common::{needs_root, needs_vms};
use serde_json::{Value, json};
use testkit::{OrSkip, Reason, TempDir, skip};
use vmemd_bench::cgroup::{self, MemoryCgroup};
use vmemd_bench::swapfile::SwapFile;

const MEMORY: u64 = 64 << 20;
const RAM: u64 = 32 << 20;
/// Beside the memory under test.
const ALLOWANCE: u64 = 8 << 20;

fn directory(name: &str) -> TempDir {
    testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), name)
}

/// Two jobs in one memory: a strided loop, and random touches in blocks of two pages.
fn request(engine: &str, dir: &TempDir) -> Value {
    let job = |name: &str, order: Value, more: Value| {
        let mut job = json!({
            "name": name, "size_bytes": MEMORY / 2, "working_set_bytes": MEMORY / 2, "access": "mixed",
            "read_percent": 50, "order": order, "stride_pages": 1, "block_bytes": 4096, "threads": 1,
            "length": {"loops": 3}, "ramp_ms": 0, "prefill": true, "seed": 1,
        });
        job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        job
    };
    json!({
        "engine": engine, "dir": dir.path(), "optimum": true,
        "scenario": {
            "name": "two", "description": "", "ram_bytes": RAM, "engines": [engine], "store": null,
            "jobs": [
                job("stride", json!("sequential"), json!({"stride_pages": 3, "threads": 2})),
                job("zipf", json!({"zipf": 0.9}), json!({"block_bytes": 8192, "threads": 2, "ramp_ms": 50})),
            ],
        },
    })
}

fn work(request: &Value, cgroup: Option<&File>) -> Output {
    let mut command = Command::new(common::BENCH);
    command.args(["worker", &request.to_string()]);
    if let Some(fd) = cgroup.map(AsRawFd::as_raw_fd) {
        // SAFETY: between fork and exec only write(2), which is async-signal-safe, on a descriptor that is open over
        // the fork.
        unsafe {
            command.pre_exec(move || match libc::write(fd, b"0".as_ptr().cast(), 1) {
                1 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }
    command.output().expect("it runs")
}

fn sample(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", output.status);
    serde_json::from_slice(&output.stdout).expect("a sample")
}

/// What holds for all engines that touch.
fn check_touched(sample: &Value) {
    let pages = MEMORY / 2 / 4096;
    for (job, operation_pages) in sample["jobs"].as_array().unwrap().iter().zip([1, 2]) {
        assert_eq!(job["verify_errors"], 0, "{job}");
        assert_eq!(job["touches"], 3 * pages, "{job}");
        let operations = |side: &str| job[side]["operations"].as_u64().unwrap();
        assert_eq!(operations("read") + operations("write"), 3 * pages / operation_pages);
        assert!(operations("read").abs_diff(operations("write")) < pages / 4);
        let series: u64 = job["series"].as_array().unwrap().iter().filter_map(Value::as_u64).sum();
        assert_eq!(series, 3 * pages / operation_pages);
        assert!(job["runtime_ns"].as_u64() > Some(0));
    }
    assert!(sample["cpu_ns"].as_u64() > Some(0));
}

fn misses(sample: &Value) -> u64 {
    sample["jobs"].as_array().unwrap().iter().filter_map(|job| job["misses"].as_u64()).sum()
}

#[test]
fn plain_memory_waits_for_no_device() {
    let dir = directory("worker-mem");
    let sample = sample(&work(&request("mem", &dir), None));
    check_touched(&sample);
    assert_eq!((misses(&sample), &sample["pages_read"]), (0, &json!(0)));
}

#[test]
fn the_engine_pages() {
    needs_vms();
    let dir = directory("worker-vmemd");
    let sample = sample(&work(&request("vmemd", &dir), None));
    check_touched(&sample);
    assert!(misses(&sample) > 0);
    let (read, written) = (sample["pages_read"].as_u64().unwrap(), sample["pages_written"].as_u64().unwrap());
    assert!(read > 1000 && written > 1000, "{read} {written}");
    let optimum = sample["optimum_hit_rate"].as_f64().expect("so few touches are looked at again");
    let touches = 6 * MEMORY / 2 / 4096;
    assert!(
        (0.5..1.0).contains(&optimum) && optimum > 1.0 - read as f64 / touches as f64,
        "{optimum} {read}"
    );
}

#[test]
fn the_raw_device_gives_what_the_optimum_needs() {
    needs_vms();
    let dir = directory("worker-raw");
    let sample = sample(&work(&request("raw", &dir), None));
    for job in sample["jobs"].as_array().unwrap() {
        assert_eq!(job["touches"], 3 * MEMORY / 2 / 4096, "{job}");
    }
    let (read, touches) = (sample["pages_read"].as_u64().unwrap() as f64, (6 * MEMORY / 2 / 4096) as f64);
    let optimum = sample["optimum_hit_rate"].as_f64().unwrap();
    assert!((optimum - (1.0 - read / touches)).abs() < 1e-9 && read > 0.0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_kernels_swap_pages() {
    needs_root("a swap file");
    cgroup::available().or_skip(Reason::Cgroup);
    let dir = directory("worker-swap");
    let swap = SwapFile::create(&dir.path().join("swapfile"), 2 * MEMORY).or_skip(Reason::Swap);
    let cgroup = MemoryCgroup::create(&format!("vmemd-test-{}", std::process::id()), RAM + ALLOWANCE)
        .expect("as root");
    let output = work(&request("swap", &dir), Some(&cgroup.entrance().unwrap()));
    let killed = cgroup.oom_kills();
    drop((cgroup, swap));
    if killed > 0 {
        // Of so small a cgroup all pages may be in use at once, and then the kernel gives up.
        skip(Reason::Slow, "the kernel killed it for want of memory");
    }
    let sample = sample(&output);
    check_touched(&sample);
    assert!(misses(&sample) > 0 && sample["pages_read"].as_u64() > Some(1000), "{sample}");
}

#[test]
fn first_touches_are_of_zeros_and_stay_right() {
    needs_vms();
    let dir = directory("worker-first");
    let mut request = request("vmemd", &dir);
    for job in request["scenario"]["jobs"].as_array_mut().unwrap() {
        job["prefill"] = json!(false);
    }
    check_touched(&sample(&work(&request, None)));
}

#[test]
fn what_cannot_be_is_said() {
    let dir = directory("worker-bad");
    let good = request("vmemd", &dir);
    let mut bad = vec![(json!({"no": "request"}), 2, "started by `vmemd bench run`")];
    let mut with = |path: &str, value: Value, code: i32, text: &'static str| {
        let mut request = good.clone();
        *request.pointer_mut(path).unwrap() = value;
        bad.push((request, code, text));
    };
    with("/scenario/jobs", json!([]), 2, "no jobs");
    with("/scenario/jobs/0/size_bytes", json!(0), 2, "whole pages");
    with("/scenario/jobs/0/threads", json!(0), 2, "whole pages");
    with("/scenario/jobs/1/size_bytes", json!(u64::MAX - 4095), 2, "more than 8T");
    with("/scenario/ram_bytes", json!(1 << 20), 2, "minimum");
    for (request, code, text) in bad {
        let output = work(&request, None);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(text) && output.stdout.is_empty(), "{said}");
    }
    // Memory beyond what this host has, and a device that is not needed.
    let mut request = request("mem", &dir);
    request["scenario"]["jobs"][0]["size_bytes"] = json!(1u64 << 42);
    let output = work(&request, None);
    assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
    request = self::request("raw", &dir);
    request["scenario"]["ram_bytes"] = json!(MEMORY);
    let output = work(&request, None);
    assert!(String::from_utf8_lossy(&output.stderr).contains("need no device"));
}
