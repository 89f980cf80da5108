use proptest::prelude::*;

use super::*;

const HEAD: &str = "[global]\nram=32m\n";

fn good(text: &str) -> Scenario {
    parse("x", text).unwrap_or_else(|faults| panic!("{}", faults.show("x.fio", text)))
}

/// What is said about a job file, from line and column on.
fn bad(text: &str) -> String {
    let said = parse("x", text).expect_err(text).show("x.fio", text);
    said.strip_prefix("x.fio:").expect("the file's name").to_owned()
}

/// What is said about a line of a job that is fine otherwise.
fn bad_line(line: &str) -> String {
    let rest = if line.starts_with("rw=") { "size=64m" } else { "rw=randrw\nsize=64m" };
    let rest = if line.starts_with("size=") { "rw=randrw" } else { rest };
    let said = bad(&format!("{HEAD}[a]\n{line}\n{rest}\n"));
    said.strip_prefix("4:").unwrap_or_else(|| panic!("{line}: {said}")).to_owned()
}

#[test]
fn a_file_with_everything() {
    let text = "# what it shows\n[global]\nram=2G ; half\nengine=vmemd,mem\nstore=/data\ndescription=Two at once\n\
                size=4g\nruntime=10\nramp_time=500ms\ntime_based\ngroup_reporting=1\nthread\n\n\
                [rewrite]\nrw=write\nstride=3\nprefill\n\
                [random]\nreadwrite=randrw\nrwmixread=70\nsize=1t\nworking_set=1g\nblocksize=64k\nnumjobs=8\n\
                random_distribution=zipf:0.99\nprefill=0\nrandseed=42\nruntime=2m\n";
    let found = good(text);
    assert_eq!((found.ram_bytes, &found.engines[..]), (2 << 30, &[BenchEngine::Vmemd, BenchEngine::Mem][..]));
    assert_eq!((found.store, found.description.as_str()), (Some("/data".into()), "Two at once"));
    let rewrite = Job {
        name: "rewrite".to_owned(),
        size_bytes: 4 << 30,
        working_set_bytes: 4 << 30,
        access: Access::Write,
        read_percent: 50,
        order: Order::Sequential,
        stride_pages: 3,
        block_bytes: 4096,
        threads: 1,
        length: Length::Millis(10_000),
        ramp_ms: 500,
        prefill: true,
        seed: 1,
    };
    assert_eq!(found.jobs[0], rewrite);
    let random = Job {
        name: "random".to_owned(),
        size_bytes: 1 << 40,
        working_set_bytes: 1 << 30,
        access: Access::Mixed,
        read_percent: 70,
        order: Order::Zipf(0.99),
        stride_pages: 1,
        block_bytes: 64 << 10,
        threads: 8,
        length: Length::Millis(120_000),
        ramp_ms: 500,
        prefill: false,
        seed: 42,
    };
    assert_eq!(found.jobs[1], random);
}

#[test]
fn every_key_is_documented() {
    let docs = include_str!("../../docs/jobs.md");
    for key in GLOBAL_KEYS.iter().chain(&JOB_KEYS) {
        assert!(docs.contains(&format!("| `{key}`")), "{key}");
    }
}

#[test]
fn the_job_files_that_we_ship_are_good() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/jobs");
    let files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 15);
    for file in files {
        assert!(!read(&file).unwrap().description.is_empty(), "{}", file.display());
    }
}

#[test]
fn defaults() {
    let found = good(&format!("{HEAD}[a]\nsize=64m\nrw=randread"));
    assert_eq!(found.engines, default_engines());
    assert_eq!((found.jobs[0].order, found.jobs[0].length), (Order::Uniform, Length::Loops(1)));
    let found = good(&format!("{HEAD}[a]\nsize=64m\nrw=read\nloops=3\nruntime=1s"));
    assert_eq!(found.jobs[0].length, Length::Millis(1000));
}

#[test]
fn unknown_keys_name_the_nearest() {
    assert!(bad_line("rwmixraed=3").starts_with("1: unknown key `rwmixraed`: did you mean `rwmixread`?"));
    assert!(bad_line("workingset=64k").contains("did you mean `working_set`?"));
    assert!(bad_line("num_jobs=3").contains("did you mean `numjobs`?"));
    assert!(bad_line("ÿ=3").contains("known are ram, engine"));
    assert_eq!(bad_line("prefil").lines().last(), Some("    | ^^^^^^"));
    // Never one that is there already, or does not take the value.
    for line in ["SIZE=64m", "rwmixraed=300", "rwmixraed", "ra=64m", "include=more.fio"] {
        assert!(!bad_line(line).contains("did you mean"), "{line}");
    }
}

#[test]
fn keys_of_fio_that_make_no_sense_say_what_to_write() {
    for key in foreign::keys() {
        assert!(!JOB_KEYS.contains(&canonical(key)) && !GLOBAL_KEYS.contains(&key), "{key}");
        if !matches!(foreign::verdict(key, Some("\u{1}"), true), Some(Ok(()))) {
            assert!(bad_line(&format!("{key}=\u{1}")).contains("leave it out"), "{key}");
        }
    }
    assert!(bad_line("iodepth=4").contains("`numjobs=`"));
    assert!(bad_line("name=x").contains("`[name]`"));
    good(&format!("{HEAD}[a]\nname=a\nsize=64m\nrw=rw"));
    assert!(bad_line("rwmixwrite=30").contains("write `rwmixread=70`"));
    assert!(bad_line("rwmixwrite=x").contains("leave it out"));
    assert!(bad_line("zipf=1.2").contains("write `random_distribution=zipf:1.2`"));
    assert!(bad_line("include more.fio").contains("write the lines of more.fio"));
    assert!(bad_line("ram=64m").contains("leave it out, [global] has it"));
    assert!(bad_line("engine=swap").contains("write it under [global]"));
    // What waits for earlier jobs, where there are none.
    good(&format!("{HEAD}stonewall\n[a]\nstonewall\nsize=64m\nrw=rw"));
    good(&format!("{HEAD}[a]\nstonewall\nsize=64m\nrw=rw\n[b]\nsize=64m\nrw=rw"));
    assert!(
        bad(&format!("{HEAD}[a]\nsize=64m\nrw=rw\n[b]\nstonewall\nsize=64m\nrw=rw"))
            .starts_with("7:1: fio's `stonewall`")
    );
}

#[test]
fn lines_without_an_equals_sign_are_mended() {
    assert!(
        bad_line("runtime 4s").starts_with("1: a line is `key=value`, or `[section]`: write `runtime=4s`")
    );
    let said = bad(&format!("{HEAD}[a]\nsize 64m\nrw randrw"));
    assert_eq!(said.matches("x.fio:").count(), 1, "no size, and no rw, are not missing beside: {said}");
}

/// All at once, each with its line, and nothing that only follows from another fault.
#[test]
fn every_fault_is_told_at_once() {
    let text = "[global]\nioengine=libaio\niodepth=32\ndirect=1\nsize=4q\nrunntime=60\n\n\
                [read job]\nrw=reed\nbs=96\n[read job]\nrw=write\nstride=3\nsize=8k\n";
    let said = parse("x", text).expect_err(text).show("x.fio", text);
    let heads: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("x.fio:")).collect();
    let begins = [
        "1:2: the RAM budget is missing",
        "2:1: fio's `ioengine`",
        "3:1: fio's `iodepth`",
        "4:1: fio's `direct`",
        "5:6: \"4q\" is not a size",
        "6:1: unknown key `runntime`: did you mean `runtime`?",
        "9:4: `rw` is read,",
        "10:4: `bs` is a power of two",
        "11:2: [read job] is there already, in line 8",
        "13:8: `stride` is more than the 2 pages",
    ];
    assert_eq!(heads.len(), begins.len(), "{said}");
    heads.iter().zip(begins).for_each(|(head, begin)| assert!(head.starts_with(begin), "{head}: {begin}"));
    assert_eq!(said.lines().filter(|line| line.ends_with('^')).count(), begins.len(), "{said}");
}

/// Does what a fault's text says.
fn mended(text: &str, fault: &Fault) -> Option<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let at = fault.position.line - 1;
    let put = |lines: &mut Vec<String>, at: usize, new: &str| {
        let at = at.min(lines.len());
        lines.splice(at..at, new.lines().map(str::to_owned));
    };
    let old = lines.get(at).cloned().unwrap_or_default();
    match &fault.mend {
        Mend::Choose => return None,
        Mend::LeaveOut => drop(lines.remove(at)),
        Mend::Write(new) => {
            lines.remove(at);
            put(&mut lines, at, new);
        }
        Mend::Add(new) => put(&mut lines, at + 1, new),
        Mend::UnderGlobal(new) => {
            let global = lines.iter().position(|line| line.trim_start().starts_with("[global]"));
            let own = new.clone().unwrap_or(old.clone());
            // The line itself moves, or one that is nowhere comes.
            if !old.trim_start().starts_with('[') && !old.is_empty() && fault.text.contains("write it under")
            {
                lines.remove(at);
            }
            match global {
                Some(global) => {
                    let global = lines
                        .iter()
                        .position(|line| line.trim_start().starts_with("[global]"))
                        .unwrap_or(global);
                    put(&mut lines, global + 1, &own);
                }
                None => put(&mut lines, 0, &format!("[global]\n{own}")),
            }
        }
    }
    Some(lines.join("\n"))
}

/// A line's words, wherever it stands.
fn told(text: &str) -> Vec<(String, String)> {
    let faults = parse("x", text).map_or_else(|faults| faults.0, |_| Vec::new());
    let line =
        |fault: &Fault| text.lines().nth(fault.position.line - 1).unwrap_or_default().trim().to_owned();
    faults.iter().map(|fault| (fault.text.clone(), line(fault))).collect()
}

/// Every hint gets rid of what it is said of.
fn hints_help(text: &str) {
    let Err(faults) = parse("x", text) else { return };
    let count =
        |told: &[(String, String)], one: &(String, String)| told.iter().filter(|other| *other == one).count();
    let before = told(text);
    for (fault, one) in faults.0.iter().zip(&before) {
        let Some(mended) = mended(text, fault) else { continue };
        let after = told(&mended);
        assert!(
            count(&after, one) < count(&before, one),
            "{one:?} of\n{text}\nis still there after {:?}:\n{mended}",
            fault.mend
        );
        if let Mend::Write(new) = &fault.mend
            && !new.contains('\n')
            && fault.text.contains(": write `")
        {
            assert!(fault.text.contains(&format!("`{new}`")), "{} says nothing of {new}", fault.text);
        }
        if fault.mend == Mend::LeaveOut && !fault.text.contains("include") {
            assert!(fault.text.contains("leave"), "{}", fault.text);
        }
    }
}

#[test]
fn no_hint_fails() {
    for line in [
        "include more.fio",
        "include=more.fio",
        "size 64m",
        "runtime 5",
        "some words here",
        "=4",
        "[b] rw=read",
        "[b",
        "[]",
        "[ # x]",
        "[a]",
        "ram=64m",
        "ram=1",
        "engine=swap",
        "engine",
        "name=b",
        "name",
        "rwmixwrite=30",
        "rwmixwrite=300",
        "filesize=1g",
        "zipf=1",
        "zipf",
        "SIZE=1",
        "strid=3",
        "strid=x",
        "prefil",
        "encrypted",
        "ra=64m",
        "iodepth=32",
        "direct",
        "ioengine=io_uring",
        "stonewall",
        "size=50%",
        "bs=4k,8k",
        "rw=randrw:4",
        "runtime=${T}",
        "size=${SIZE}",
        "numjobs=0",
        "thread=0",
        "rw=read",
        "bs",
        "=",
        "size=6000",
        "loops",
        "random_distribution=pareto:0.9",
        "write_bw_log",
        "verify=md5",
        "description",
        "store=",
        "prefill=maybe",
    ] {
        for file in [
            format!("{HEAD}[a]\n{line}\nrw=randrw\nsize=64m\n"),
            format!("{HEAD}[a]\nrw=randrw\nsize=64m\n[b]\nrw=read\n{line}\nsize=64m\n"),
            format!("[global]\n{line}\n[a]\nrw=randrw\nsize=64m\n"),
            format!("{line}\n[a]\nrw=randrw\nsize=64m\n"),
            format!("[a]\nrw=randrw\n{line}\n[global]\nram=32m"),
            line.to_owned(),
        ] {
            hints_help(&file);
        }
    }
    hints_help("");
}

/// Files as people have them: those that describe what happens here run with a `ram=`, the others are told all there
/// is.
#[test]
fn job_files_of_fio() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/job_file");
    let mut found = 0;
    for (name, faults) in [
        ("fio-random-read", 4),
        ("fio-seq-write", 5),
        ("fio-ssd-test", 9),
        ("fio-iometer", 6),
        ("fio-mixed-env", 4),
        ("fio-zipf", 3),
        ("fio-mmap-harmless", 0),
        ("fio-include", 3),
        ("fio-verify", 6),
        ("fio-latency-profile", 9),
        ("fio-database", 11),
        ("fio-no-global", 5),
    ] {
        let text = std::fs::read_to_string(format!("{dir}/{name}.fio")).expect(name);
        let said = parse("x", &text).map_or_else(|faults| faults.show("x", &text), |_| String::new());
        assert_eq!(said.lines().filter(|line| line.starts_with("x:")).count(), faults, "{name}:\n{said}");
        hints_help(&text);
        found += 1;
    }
    assert_eq!(found, 12);
}

#[test]
fn values_are_checked() {
    for (line, words) in [
        ("size=4q", "6: \"4q\" is not a size"),
        ("size=0", "6: `size` is a multiple"),
        ("size=6000", "6: `size` is a multiple"),
        ("size=16t", "6: all areas together are more than 8T"),
        ("size=99999999t", "6: \"99999999t\" is too large"),
        ("size=", "1: `size` needs a value, as in `size=64m`"),
        ("working_set=65m", "13: `working_set` is more than the area: `size` is 64M"),
        ("rw=trim", "4: `rw` is read, write"),
        ("rwmixread=101", "11: write a whole number from 0 to 100"),
        ("rwmixread=-1", "11: write a whole number from 0 to 100"),
        ("rwmixread", "1: `rwmixread` needs a value"),
        ("numjobs=0", "9: write a whole number from 1 to 64"),
        ("numjobs=65", "9: write a whole number from 1 to 64"),
        ("stride=0", "8: write a whole number from 1"),
        ("stride=3", "8: `stride` is for read, write and rw"),
        ("bs=96", "4: `bs` is a power of two from 64 to 1m"),
        ("bs=2m", "4: `bs` is a power of two"),
        ("runtime=0", "9: `runtime` is longer than nothing"),
        ("runtime=5w", "9: a time is a number of seconds"),
        ("runtime=2d", "9: the longest time is 24h"),
        ("runtime=1.2.3s", "9: write a time such as"),
        ("runtime=25h", "9: the longest time is 24h"),
        ("loops=0", "7: write a whole number from 1"),
        ("random_distribution=zipf:0", "21: zipf's THETA is above 0"),
        ("random_distribution=zipf:nan", "21: zipf's THETA is above 0"),
        ("random_distribution=pareto:0.2", "21: `random_distribution` is random, or zipf:THETA"),
        ("prefill=maybe", "9: write 1 or 0"),
        ("randseed=x", "10: write a whole number"),
    ] {
        let said = bad_line(line);
        assert!(said.starts_with(words), "{line}: {said}");
    }
    let job = |line: &str| bad(&format!("{HEAD}[a]\nrw=write\nsize=64k\n{line}"));
    assert!(job("stride=17").starts_with("6:8: `stride` is more than the 16 pages"));
    assert!(job("stride=3\nbs=8k").starts_with("6:8: with `stride`, `bs`"));
    assert!(job("numjobs=17").starts_with("6:9: the working set is too small"));
    assert!(job("bs=128k").starts_with("3:2: the working set is too small"));
    assert!(job("random_distribution=random").starts_with("6:21: `random_distribution` is for"));
}

#[test]
fn sections_and_global_keys_are_checked() {
    /// Among what is said of the file.
    fn tells(text: &str, begin: &str) {
        let said = bad(text);
        assert!(said.split("x.fio:").any(|fault| fault.starts_with(begin)), "{begin}: {said}");
    }
    tells("", "1:1: the RAM budget is missing");
    tells("[a]\nsize=1m\nrw=rw", "1:1: the RAM budget is missing");
    tells("[global]\nram=15m\n[a]", "2:5: the least RAM budget is 16M");
    tells(HEAD, "2:1: there is no job");
    tells("[global]\nram=32m\nengine=vmemd,disk\n[a]", "3:8: `disk` is no engine");
    tells("[global]\nram=32m\nengine=mem,mem\n[a]", "3:8: `mem` is there twice");
    tells("[a]\n[global]\nram=32m", "2:2: [global] comes first");
    tells(&format!("{HEAD}[a]\n[a]"), "4:2: [a] is there already, in line 3");
    tells(&format!("{HEAD}[a]\nrw=read\nreadwrite=read"), "5:1: `rw` is there already, in line 4");
    tells(&format!("{HEAD}[a]\nrw=read"), "3:2: job [a] has no `size`");
    tells(&format!("{HEAD}[a]\nsize=1m"), "3:2: job [a] has no `rw`");
    // A job that inherits what does not fit is told where that stands.
    tells("[global]\nram=32m\nstride=3\n[a]\nsize=1m\nrw=randread", "3:8: `stride` is for");
}

/// Gives a byte at a time, and is interrupted before each.
struct Slow<'a>(&'a [u8], bool);

impl Read for Slow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.1 = !self.1;
        if self.1 { Err(ErrorKind::Interrupted.into()) } else { self.0.read(&mut buffer[..1]) }
    }
}

#[test]
fn standard_input_is_read_to_its_end() {
    assert!(is_standard_input(Path::new("-")) && !is_standard_input(Path::new("./-")));
    let text = format!("{HEAD}[a]\nsize=64m\nrw=rw");
    let found = read_from(Slow(text.as_bytes(), false), "standard input", "stdin").unwrap();
    assert_eq!((found.name.as_str(), found.jobs.len()), ("stdin", 1));
    let failure = read_from(&b"[a]"[..], "standard input", "stdin").unwrap_err();
    assert!(failure.text.starts_with("standard input:1:1: the RAM budget is missing"), "{}", failure.text);
}

#[test]
fn files_that_are_none() {
    let place = testkit::directory("jobfile");
    let path = place.path().join("x.fio");
    std::fs::write(&path, b"[global]\n\xff\xfe").unwrap();
    assert!(read(&path).unwrap_err().text.ends_with("x.fio:2:1: this is not UTF-8 text"));
    std::fs::write(&path, vec![b'#'; FILE_MAX_BYTES as usize + 1]).unwrap();
    assert!(read(&path).unwrap_err().text.contains("not a job file"));
    std::fs::write(&path, format!("{HEAD}[a]\r\nsize=64m\r\nrw=rw\r\n")).unwrap();
    assert_eq!(read(&path).unwrap().name, "x");
    drop(place);
    assert_eq!(read(&path).unwrap_err().kind, FailureKind::Usage);
}

fn any_job() -> impl Strategy<Value = Job> {
    let access = prop_oneof![Just(Access::Read), Just(Access::Write), Just(Access::Mixed)];
    let order =
        prop_oneof![Just(Order::Sequential), Just(Order::Uniform), (0.01..10.0).prop_map(Order::Zipf)];
    let length =
        prop_oneof![(1..9_000_000u64).prop_map(Length::Millis), (1..9999u64).prop_map(Length::Loops)];
    let sizes = (64..100_000u64, 64..100_000u64, 6..13u32, 1..4u32, 1..=16u32);
    let rest = (0..=100u8, 0..9999u64, any::<bool>(), any::<u64>());
    (access, order, length, sizes, rest).prop_map(|(access, order, length, sizes, rest)| Job {
        name: String::new(),
        size_bytes: sizes.0.max(sizes.1) * PAGE,
        working_set_bytes: sizes.0.min(sizes.1) * PAGE,
        access,
        read_percent: rest.0,
        order,
        stride_pages: if order == Order::Sequential { sizes.3 } else { 1 },
        block_bytes: 1 << sizes.2,
        threads: sizes.4,
        length,
        ramp_ms: rest.1,
        prefill: rest.2,
        seed: rest.3,
    })
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>()) {
        let _ = parse("x", &text).map_err(|faults| faults.show("x.fio", &text));
    }

    #[test]
    fn nothing_like_a_job_file_panics(text in "(\\[[a-z]{0,6}\\]?|(ram|size|rw|bs|stride|numjobs|runtime|é)\
         \\x20?=?[0-9.kmgt:é;#-]{0,9}|\t|\n){0,30}") {
        let _ = parse("x", &format!("[global]\nram=1g\n{text}")).map_err(|faults| faults.show("x.fio", &text));
        hints_help(&text);
    }

    #[test]
    fn what_is_written_reads_back(jobs in prop::collection::vec(any_job(), 1..4), ram in 16u64..1 << 20) {
        let named = jobs.into_iter().enumerate().map(|(at, job)| Job { name: format!("job {at}"), ..job });
        let scenario = Scenario {
            name: "x".to_owned(),
            description: "What it shows".to_owned(),
            ram_bytes: ram << 20,
            engines: vec![BenchEngine::Raw, BenchEngine::Vmemd],
            store: Some("/var/tmp".into()),
            encrypt: true,
            jobs: named.collect(),
        };
        prop_assert_eq!(parse("x", &text(&scenario)), Ok(scenario));
    }
}
