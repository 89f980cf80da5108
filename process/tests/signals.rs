//! Waiting for signals. In a process of its own, because a signal that was caught stays caught.

use std::io::{Write, pipe};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use vmprocess::failure::FailureKind;
use vmprocess::signals::{caught, check, install, interrupted, wait_readable};

#[test]
fn a_signal_wakes_whoever_waits_and_an_ignored_one_stays_ignored() {
    let raise = |signal| kill_process(getpid(), signal).unwrap();
    // What this process's parent ignores (a shell, of a job in the background) would stay ignored too.
    let set = |signal, to| {
        // SAFETY: sets no handler, before this process has any.
        unsafe { libc::signal(signal, to) };
    };
    set(libc::SIGHUP, libc::SIG_IGN);
    [libc::SIGINT, libc::SIGTERM].into_iter().for_each(|signal| set(signal, libc::SIG_DFL));
    install().unwrap();
    install().unwrap();
    let (silent, _writer) = pipe().unwrap();
    raise(Signal::HUP);
    assert!(!wait_readable(silent.as_fd(), Some(Duration::from_millis(10))));
    check().unwrap();

    let waiting = std::thread::spawn(move || {
        let mut readable = false;
        while caught().is_none() {
            readable |= wait_readable(silent.as_fd(), None);
        }
        readable
    });
    raise(Signal::INT);
    assert!(!waiting.join().unwrap(), "woken by the signal: the descriptor has nothing");
    assert_eq!(caught(), Some(libc::SIGINT));

    // The process outlives a second one, which is then the one to be told of.
    raise(Signal::TERM);
    while caught() != Some(libc::SIGTERM) {
        std::thread::yield_now();
    }
    let failure = check().unwrap_err();
    assert_eq!((failure.kind, &failure), (FailureKind::Interrupted, &interrupted(libc::SIGTERM)));
    let (readable, mut writer) = pipe().unwrap();
    writer.write_all(b"x").unwrap();
    assert!(wait_readable(readable.as_fd(), None));
}
