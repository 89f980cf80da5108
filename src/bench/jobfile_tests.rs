use proptest::prelude::*;

use super::*;

const HEAD: &str = "[global]\nram=32m\n";

fn good(text: &str) -> Scenario {
    parse("x", text).unwrap_or_else(|fault| panic!("{}", fault.show("x.fio", text)))
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
    for key in GLOBAL_KEYS.iter().chain(&JOB_KEYS).filter(|key| **key != "name") {
        assert!(docs.contains(&format!("| `{key}`")), "{key}");
    }
    assert!(HARMLESS.iter().all(|key| docs.contains(&format!("`{key}`"))));
}

#[test]
fn the_job_files_that_we_ship_are_good() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/jobs");
    let files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 14);
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
    assert!(bad_line("workingset=3").contains("did you mean `working_set`?"));
    assert!(bad_line("SIZE=3").contains("did you mean `size`?"));
    assert!(bad_line("num_jobs=3").contains("did you mean `numjobs`?"));
    assert!(bad_line("ÿ=3").contains("known are ram, engine"));
    assert_eq!(bad_line("strid=3").lines().last(), Some("    | ^^^^^"));
}

#[test]
fn keys_of_fio_that_make_no_sense_say_what_to_write() {
    for (key, words) in INSTEAD {
        assert!(bad_line(&format!("{key}=1")).contains(words), "{key}");
        assert!(!JOB_KEYS.contains(&key) && !GLOBAL_KEYS.contains(&key));
    }
    assert!(bad_line("thread=0").contains("leave it out"));
    assert!(bad_line("name=x").contains("[name]"));
    assert!(bad_line("ram=64m").contains("under [global]"));
}

#[test]
fn values_are_checked() {
    for (line, words) in [
        ("size=4q", "6: \"4q\" is not a size"),
        ("size=0", "6: `size` is a multiple"),
        ("size=6000", "6: `size` is a multiple"),
        ("size=16t", "6: all areas together are more than 8T"),
        ("size=99999999t", "6: \"99999999t\" is too large"),
        ("size=", "1: `size` needs a value"),
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
        ("runtime=5d", "9: a time is a number of seconds"),
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
    assert!(bad("").starts_with("1:1: the RAM budget is missing"));
    assert!(bad("[a]\nsize=1m\nrw=rw").starts_with("1:1: the RAM budget is missing"));
    assert!(bad("[global]\nram=15m\n[a]").starts_with("2:5: the least RAM budget is 16M"));
    assert!(bad(HEAD).starts_with("1:2: there is no job"));
    assert!(bad("[global]\nram=32m\nengine=vmemd,disk\n[a]").starts_with("3:8: `disk` is no engine"));
    assert!(bad("[global]\nram=32m\nengine=mem,mem\n[a]").starts_with("3:8: `mem` is there twice"));
    assert!(bad("[a]\n[global]\nram=32m").starts_with("2:2: [global] comes first"));
    assert!(bad(&format!("{HEAD}[a]\n[a]")).starts_with("4:2: [a] is there already, in line 3"));
    assert!(
        bad(&format!("{HEAD}[a]\nrw=read\nreadwrite=read"))
            .starts_with("5:1: `rw` is there already, in line 4")
    );
    assert!(bad(&format!("{HEAD}[a]\nrw=read")).starts_with("3:2: job [a] has no `size`"));
    assert!(bad(&format!("{HEAD}[a]\nsize=1m")).starts_with("3:2: job [a] has no `rw`"));
    // A job that inherits what does not fit is told where that stands.
    assert!(
        bad("[global]\nram=32m\nstride=3\n[a]\nsize=1m\nrw=randread").starts_with("3:8: `stride` is for")
    );
}

#[test]
fn files_that_are_none() {
    let dir = std::env::temp_dir().join(format!("vmemd-jobfile-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("x.fio");
    std::fs::write(&path, b"[global]\n\xff\xfe").unwrap();
    assert!(read(&path).unwrap_err().text.ends_with("x.fio:2:1: this is not UTF-8 text"));
    std::fs::write(&path, vec![b'#'; FILE_MAX_BYTES as usize + 1]).unwrap();
    assert!(read(&path).unwrap_err().text.contains("not a job file"));
    std::fs::write(&path, format!("{HEAD}[a]\r\nsize=64m\r\nrw=rw\r\n")).unwrap();
    assert_eq!(read(&path).unwrap().name, "x");
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(read(&path).unwrap_err().kind, Kind::Usage);
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
        let _ = parse("x", &text).map_err(|fault| fault.show("x.fio", &text));
    }

    #[test]
    fn nothing_like_a_job_file_panics(text in "(\\[[a-z]{0,6}\\]?|(ram|size|rw|bs|stride|numjobs|runtime|é) ?=?[0-9.kmgt:é;#-]{0,9}|\t|\n){0,30}") {
        let _ = parse("x", &format!("[global]\nram=1g\n{text}")).map_err(|fault| fault.show("x.fio", &text));
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
