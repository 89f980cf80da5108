//! Tests that pass, are skipped, or fail: `harness.rs` runs this program and checks what it prints. Run by itself, a
//! test that would fail passes.

#[macro_use]
extern crate testkit;

use testkit::{Reason, skip, skip_part};

testkit::main!();

/// Only `harness.rs` wants to see one fail.
fn is_watched() -> bool {
    std::env::var_os("TESTKIT_WATCHED").is_some()
}

#[test]
fn passes() {
    println!("said by one that passes");
}

#[test]
fn fails() {
    println!("said by one that fails");
    assert!(!is_watched(), "as it should");
}

#[test]
fn dies() {
    println!("said by one that dies");
    if is_watched() {
        std::process::abort();
    }
}

#[test]
fn is_skipped() {
    if is_watched() {
        skip(Reason::Kvm, "no /dev/kvm\nhere");
    }
}

#[test]
fn is_skipped_in_part() {
    if is_watched() {
        skip_part(Reason::Root, "half of it needs root");
    }
}

#[test]
#[ignore = "takes long"]
fn is_ignored() {
    println!("said by one that is ignored");
}

mod below {
    #[test]
    fn passes() {
        assert_eq!(std::thread::current().name(), Some("below::passes"), "as under cargo test's own harness");
    }
}
