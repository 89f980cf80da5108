//! The harness itself, by what a program of tests says and how it ends (`suite.rs`).

#[macro_use]
extern crate testkit;

use std::path::PathBuf;
use std::process::Command;

testkit::main!();

/// The program of `suite.rs` lies beside this one.
fn suite() -> PathBuf {
    let own = std::env::current_exe().expect("this program");
    let entries = std::fs::read_dir(own.parent().expect("a directory")).expect("it can be read").flatten();
    let named = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("suite-") && !name.contains('.')
    });
    named
        .max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok())
        .expect("it is built with this one")
}

/// What it says, and its exit code.
fn run(arguments: &str, must_run: &str) -> (String, Option<i32>) {
    let mut command = Command::new(suite());
    command
        .args(arguments.split_whitespace())
        .env("TESTKIT_WATCHED", "1")
        .env("VMEMD_TESTS_MUST_RUN", must_run);
    let output = command.env_remove("RUST_TEST_NOCAPTURE").output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (said.into_owned(), output.status.code())
}

#[test]
fn every_end_of_a_test_is_told() {
    let (said, code) = run("--color never", "");
    assert_eq!(code, Some(101), "{said}");
    let line = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(&format!("test {name} ")));
        line.unwrap_or_else(|| panic!("{name}: {said}")).to_owned()
    };
    for name in ["passes", "below::passes", "is_skipped_in_part"] {
        assert!(line(name).ends_with("... ok"), "{said}");
    }
    for name in ["fails", "dies"] {
        assert!(line(name).ends_with("... FAILED"), "{said}");
        assert!(said.contains(&format!("---- {name} ----")), "{said}");
    }
    assert!(line("is_skipped").ends_with("... ignored (kvm: no /dev/kvm; here)"), "{said}");
    assert!(line("is_ignored").ends_with("... ignored"), "{said}");
    assert!(said.contains("3 passed; 2 failed; 2 ignored"), "{said}");
    // What those say that fail is told, and nothing else.
    for told in ["said by one that fails", "as it should", "said by one that dies", "SIGABRT"] {
        assert!(said.contains(told), "{told}: {said}");
    }
    assert!(!said.contains("said by one that passes"), "{said}");
}

#[test]
fn what_must_run_fails_if_it_is_skipped() {
    let (said, code) = run("is_skipped --exact", "uffd,root");
    assert!(code == Some(0) && said.contains("0 passed; 0 failed; 1 ignored"), "{said}");
    let (said, code) = run("is_skipped --exact", "uffd,kvm");
    assert_eq!(code, Some(101), "{said}");
    assert!(said.contains("not to be skipped here (VMEMD_TESTS_MUST_RUN): kvm: no /dev/kvm"), "{said}");
    let (said, code) = run("is_skipped_in_part", "root");
    assert!(code == Some(101) && said.contains("root: half of it needs root"), "{said}");
    let (said, code) = run("passes", "rot");
    assert!(code == Some(101) && said.contains("\"rot\" is none of kvm,"), "{said}");
}

#[test]
fn arguments_mean_what_they_mean_to_cargo_tests_own_harness() {
    let counted = |arguments: &str, counts: &str| {
        let (said, _) = run(arguments, "");
        assert!(said.contains(counts), "{arguments}: {said}");
        said
    };
    counted("passes", "2 passed; 0 failed; 0 ignored");
    counted("passes --exact", "1 passed; 0 failed; 0 ignored");
    counted("below:: --test-threads 1", "1 passed");
    counted("--skip fails --skip dies", "3 passed; 0 failed; 2 ignored; 0 measured; 2 filtered out");
    counted("--ignored", "1 passed; 0 failed; 0 ignored");
    counted("is_ignored --include-ignored", "1 passed; 0 failed; 0 ignored");
    let said = counted("passes --exact --nocapture", "1 passed");
    assert!(said.contains("said by one that passes"), "{said}");
    let said = counted("is_skipped --exact --nocapture", "1 ignored");
    assert!(said.contains("skipped: kvm: no /dev/kvm"), "{said}");
    let (said, code) = run("--list", "");
    assert!(code == Some(0) && said.contains("below::passes: test\n"), "{said}");
    assert_eq!(said.lines().filter(|line| line.ends_with(": test")).count(), 7, "{said}");
}
