//! fio's keys that job files here do not have. One rule: a value that describes what happens here anyway is accepted
//! without a word; a value that would change what is measured is refused, with the reason and what to write instead.

/// Which values of a key are accepted, because they describe what happens here anyway.
#[derive(Clone, Copy, Debug)]
enum Taken {
    /// No value: whatever it is, fio would measure something else.
    Never,
    /// These values, written as [`plain`] writes them.
    Only(&'static [&'static str]),
    /// Any value: it only matters together with another key, which is refused.
    Any,
    /// Any value, in a job with no other job before it.
    Alone,
}
use Taken::{Alone, Any, Never, Only};

const YES: Taken = Only(&["1"]);
const NO: Taken = Only(&["0"]);

/// Keys with a blank between them, which values of theirs are accepted, and why the others are not.
const KEYS: &[(&str, Taken, &str)] = &[
    ("time_based", YES, "a job with `runtime=` runs as long as that"),
    ("group_reporting", YES, "a job's threads are reported together"),
    ("thread", YES, "a job's `numjobs=` are threads"),
    ("norandommap", YES, "any page may be touched again before all were"),
    ("randrepeat allrandrepeat", YES, "each run makes the same choices: `randseed=` makes others"),
    (
        "ioengine",
        Only(&["mmap"]),
        "jobs touch memory, and what holds it is chosen by `engine=` under [global]",
    ),
    (
        "iodepth iodepth_low iodepth_batch iodepth_batch_submit iodepth_batch_complete iodepth_batch_complete_min \
             iodepth_batch_complete_max",
        Only(&["1"]),
        "a touch waits for its page: `numjobs=` has more of them at a time",
    ),
    ("direct atomic", NO, "jobs touch memory, and `raw` always reads past the page cache"),
    ("buffered", YES, "jobs touch memory"),
    (
        "filename filename_format directory opendir nrfiles openfiles file_service_type unique_filename",
        Never,
        "jobs touch memory, and `store=` under [global] is the directory on the disk",
    ),
    ("filesize", Never, "`size=` is the job's memory"),
    ("io_size io_limit number_ios", Never, "`loops=` or `runtime=` says how long a job goes on"),
    ("fill_device fill_fs file_append", NO, "`size=` is the job's memory"),
    ("invalidate", NO, "nothing is dropped before a job: `prefill=0` begins with untouched memory"),
    ("overwrite", Never, "`prefill=` says whether memory is written before"),
    ("pre_read", NO, "`ramp_time=` is time that is not measured"),
    ("rwmixwrite", Never, "`rwmixread=` is the share of reads"),
    ("zipf", Never, "`random_distribution=zipf:THETA` has such an order"),
    ("percentage_random", Never, "an order is sequential or random: `rw=` says which"),
    (
        "random_generator softrandommap",
        Never,
        "`randseed=` and `random_distribution=` say all of a random order",
    ),
    (
        "blocksize_range bsrange bssplit blocksize_unaligned bs_unaligned blockalign ba bs_is_seq_rand",
        Never,
        "blocks have one size, `bs=`, and lie at multiples of it",
    ),
    (
        "stonewall wait_for_previous",
        Alone,
        "all jobs of a file run at the same time: what is to come later needs a file of its own",
    ),
    (
        "wait_for",
        Never,
        "all jobs of a file run at the same time: what is to come later needs a file of its own",
    ),
    ("startdelay start_delay", NO, "all jobs of a file start at the same time"),
    ("exitall", Alone, "each job ends by its own `runtime=` or `loops=`"),
    ("offset offset_increment", NO, "each job has an area of its own, one after the other"),
    ("zonemode", Only(&["none"]), "what is touched begins at the area's start: `working_set=` is its size"),
    (
        "zonesize zonerange zoneskip",
        Never,
        "what is touched begins at the area's start: `working_set=` is its size",
    ),
    (
        "fsync fdatasync end_fsync fsync_on_close sync write_barrier sync_file_range",
        NO,
        "memory is not synced",
    ),
    (
        "verify do_verify verify_only verify_async verify_backlog",
        NO,
        "every touch is verified, and no pass of its own verifies",
    ),
    (
        "verify_fatal verify_dump verify_pattern verify_interval verify_state_save verify_state_load",
        Never,
        "every touch is verified, by a stamp",
    ),
    (
        "zero_buffers buffer_compress_percentage dedupe_percentage refill_buffers",
        NO,
        "memory has content that does not compress, and a touch changes a line of it",
    ),
    ("scramble_buffers", YES, "memory has content that does not compress"),
    ("buffer_pattern buffer_compress_chunk", Never, "memory has content that does not compress"),
    ("unlink", YES, "nothing is left behind"),
    ("fallocate", Only(&["0", "none"]), "jobs touch memory"),
    (
        "fadvise_hint create_serialize create_fsync create_on_open create_only allow_file_create",
        Never,
        "jobs touch memory",
    ),
    (
        "thinktime thinktime_spin rate rate_min rate_iops rate_iops_min",
        NO,
        "a thread touches as fast as it can",
    ),
    // These say only how a `thinktime` or `rate` above zero is spent.
    ("thinktime_blocks thinktime_blocks_type rate_process rate_cycle rate_ignore_thinktime", Any, ""),
    ("lockmem", NO, "`ram=` under [global] says how much memory there is"),
    ("mem iomem hugepage-size", Never, "jobs touch the VM's memory"),
    ("kb_base", Only(&["1024"]), "sizes are binary"),
    ("unit_base", Only(&["0", "8"]), "sizes are bytes"),
    // These say only how fio prints.
    (
        "clat_percentiles percentile_list significant_figures stats unified_rw_reporting lat_percentiles \
             slat_percentiles disk_util eta eta-newline",
        Any,
        "",
    ),
    (
        "gtod_reduce disable_lat disable_clat disable_slat disable_bw disable_bw_measurement",
        NO,
        "times are always measured",
    ),
    (
        "write_bw_log write_lat_log write_iops_log write_hist_log log_avg_msec log_hist_msec log_max_value \
             log_offset per_job_logs write_iolog read_iolog",
        Never,
        "`--output-dir` writes results with a series of each job",
    ),
    (
        "cpus_allowed cpus_allowed_policy cpumask numa_cpu_nodes numa_mem_policy nice prio prioclass ioscheduler \
             cgroup cgroup_weight uid gid",
        Never,
        "threads run where and as the host lets them",
    ),
    (
        "exec_prerun exec_postrun exit_what continue_on_error max_latency latency_target latency_window \
             latency_percentile steadystate steadystate_duration ss ss_dur flow trim_percentage",
        Never,
        "a run has a ramp (`ramp_time=`), and is measured as long as `runtime=` or `loops=` says",
    ),
    (
        "hipri registerfiles fixedbufs sqthread_poll nonvectored userspace_reap force_async cmdprio_percentage",
        NO,
        "jobs touch memory",
    ),
];

/// Whether fio's `key` may have this value. `None`: no key of fio's that is known here. `alone`: the jobs that the
/// key is for have no other job of the file before them.
pub(super) fn verdict(key: &str, value: Option<&str>, alone: bool) -> Option<Result<(), String>> {
    let (_, taken, why) = KEYS.iter().find(|(keys, ..)| keys.split(' ').any(|known| known == key))?;
    let plain = plain(value);
    let holds = match taken {
        Never => false,
        Only(values) => values.contains(&plain.as_str()),
        Any => true,
        Alone => alone || plain == "0",
    };
    Some(if holds { Ok(()) } else { Err(format!("fio's `{key}` has no meaning here: leave it out; {why}")) })
}

/// The key of this format that says the same, and its value.
pub(super) fn instead(key: &str, value: Option<&str>) -> Option<(&'static str, String)> {
    let value = value?;
    match key {
        "filesize" => Some(("size", value.to_owned())),
        "zipf" => Some(("random_distribution", format!("zipf:{value}"))),
        "rwmixwrite" => {
            let writes: u32 = value.parse().ok().filter(|writes| *writes <= 100)?;
            Some(("rwmixread", (100 - writes).to_string()))
        }
        _ => None,
    }
}

/// A value in its plainest form: `yes` is 1; `no` and zero of any unit are 0.
fn plain(value: Option<&str>) -> String {
    let value = value.unwrap_or("1").to_ascii_lowercase();
    let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    match value.as_str() {
        "true" => "1".to_owned(),
        "false" => "0".to_owned(),
        _ if !digits.is_empty() && digits.bytes().all(|byte| byte == b'0') => "0".to_owned(),
        _ => value,
    }
}

#[cfg(test)]
pub(super) fn keys() -> impl Iterator<Item = &'static str> {
    KEYS.iter().flat_map(|(keys, ..)| keys.split(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_verdict() {
        let mut all: Vec<_> = keys().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(verdict("size", Some("1"), true), None);
    }

    #[test]
    fn what_holds_anyway_is_taken_and_nothing_else() {
        let taken = |line: &str, alone| {
            let (key, value) = line.split_once('=').map_or((line, None), |(key, value)| (key, Some(value)));
            verdict(key, value, alone).expect(line).is_ok()
        };
        for line in [
            "iodepth=1",
            "direct=0",
            "buffered=1",
            "buffered",
            "thinktime=0",
            "thinktime=0us",
            "time_based",
            "time_based=1",
            "group_reporting",
            "thread=true",
            "norandommap",
            "randrepeat=1",
            "invalidate=0",
            "end_fsync=0",
            "fsync=0",
            "verify=0",
            "do_verify=0",
            "zero_buffers=0",
            "unlink=1",
            "stonewall",
            "ioengine=mmap",
            "rate_iops=0",
            "offset=0",
            "startdelay=0s",
            "kb_base=1024",
            "percentile_list=50:99",
            "fallocate=none",
        ] {
            assert!(taken(line, true), "{line}");
        }
        for line in [
            "iodepth=32",
            "iodepth=01x",
            "direct=1",
            "direct",
            "buffered=0",
            "thinktime=10",
            "time_based=0",
            "thread=0",
            "norandommap=0",
            "randrepeat=0",
            "invalidate=1",
            "invalidate",
            "end_fsync=1",
            "verify=md5",
            "verify=crc32c",
            "zero_buffers",
            "unlink=0",
            "ioengine=libaio",
            "ioengine=psync",
            "filename=/dev/sdb",
            "filename",
            "rate=1m",
            "offset=4k",
            "direct=",
        ] {
            assert!(!taken(line, true), "{line}");
        }
        assert!(!taken("stonewall", false) && taken("stonewall=0", false));
    }
}
