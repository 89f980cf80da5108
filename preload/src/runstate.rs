//! QEMU's words for whether a machine runs (`RunState` of its QAPI) and why a QEMU ends (`ShutdownCause`), in vmemd's
//! words.

use vmprocess::RunState;
use vmprocess::control::protocol::State;
use vmprocess::failure::{Failure, FailureKind};

pub(crate) const RUNNING: &str = "running";
/// QEMU's word for a machine that `stop` has stopped.
pub(crate) const PAUSED: &str = "paused";

/// The meaning of one of QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meaning {
    word: &'static str,
    state: State,
    why: &'static str,
    /// QEMU leaves this state without an event.
    unheard: bool,
}

const fn heard(word: &'static str, state: State, why: &'static str) -> Meaning {
    Meaning { word, state, why, unheard: false }
}

const fn unheard(word: &'static str, state: State, why: &'static str) -> Meaning {
    Meaning { word, state, why, unheard: true }
}

/// All of QEMU 7.2's and 10.0's.
const MEANINGS: [Meaning; 16] = [
    heard(RUNNING, State::Running, ""),
    // By whom, the VM's process knows.
    heard(PAUSED, State::Paused, ""),
    heard("prelaunch", State::Paused, "it was started with -S and has not run yet: `vmemd resume` starts it"),
    unheard(
        "inmigrate",
        State::Incoming,
        "it waits for an incoming migration of QEMU's own (inmigrate), and cannot run before that has come",
    ),
    unheard("postmigrate", State::Paused, "QEMU's own migration has taken its state (postmigrate)"),
    unheard("finish-migrate", State::Paused, "QEMU's own migration is taking its state (finish-migrate)"),
    unheard("save-vm", State::Paused, "QEMU is saving a snapshot of it (save-vm)"),
    unheard("restore-vm", State::Paused, "QEMU is loading a snapshot of it (restore-vm)"),
    heard("debug", State::Paused, "a debugger stopped it (debug)"),
    heard("watchdog", State::Paused, "its watchdog stopped it (watchdog)"),
    unheard("colo", State::Paused, "QEMU's own COLO holds it (colo)"),
    heard(
        "suspended",
        State::Suspended,
        "the guest sleeps (suspend to RAM): wake it first (`system_wakeup` on QEMU's monitor)",
    ),
    heard("shutdown", State::Shutdown, "the guest has shut down"),
    heard("guest-panicked", State::Failed, "the guest panicked"),
    heard(
        "internal-error",
        State::Failed,
        "QEMU found the guest in a state that it cannot run (internal-error)",
    ),
    heard(
        "io-error",
        State::Failed,
        "a disk of the guest failed (io-error); see QEMU's log, then `vmemd resume`",
    ),
];

fn meaning(word: &str) -> Option<&'static Meaning> {
    MEANINGS.iter().find(|meaning| meaning.word == word)
}

/// A machine's state by QEMU's word for it. `running`: whether its vCPUs are let into the guest, as QEMU says beside
/// it.
pub(crate) fn of(word: &str, running: bool) -> RunState {
    let (state, why) = match meaning(word) {
        Some(meaning) => (meaning.state, Some(meaning.why).filter(|why| !why.is_empty()).map(str::to_owned)),
        None => {
            let state = if running { State::Running } else { State::Paused };
            (state, Some(format!("QEMU calls it {word:?}, which this vmemd does not know")))
        }
    };
    RunState { word: word.to_owned(), state, why }
}

/// Whether QEMU may have gone on from that state without a word.
pub(crate) fn is_unheard(word: &str) -> bool {
    meaning(word).is_some_and(|meaning| meaning.unheard)
}

/// Why the guest of a machine in that state cannot go on, be it here or elsewhere, if it cannot.
pub(crate) fn why_over(word: &str) -> Option<&'static str> {
    meaning(word)
        .filter(|meaning| matches!(meaning.state, State::Failed | State::Shutdown))
        .map(|meaning| meaning.why)
}

/// Why `cont` does not make the machine run: QEMU refuses it, or takes it and does nothing.
pub(crate) fn why_no_cont(word: &str) -> Option<&'static str> {
    match word {
        // It may be mended meanwhile.
        "io-error" => None,
        word => {
            let states = [State::Failed, State::Shutdown, State::Suspended, State::Incoming];
            meaning(word).filter(|meaning| states.contains(&meaning.state)).map(|meaning| meaning.why)
        }
    }
}

/// Why QEMU ends, by the `reason` of its `SHUTDOWN`.
pub(crate) fn why_ended(cause: &str) -> Failure {
    let (kind, why) = match cause {
        "guest-shutdown" => (FailureKind::Name, "the guest shut down"),
        "guest-reset" => (FailureKind::Name, "the guest rebooted, and its QEMU has -no-reboot"),
        "guest-panic" => (FailureKind::Vm, "the guest panicked"),
        "host-qmp-quit" => (FailureKind::Name, "its QEMU was told to quit"),
        "host-qmp-system-reset" | "subsystem-reset" => {
            (FailureKind::Name, "its machine was reset, and its QEMU has -no-reboot")
        }
        "host-signal" => (FailureKind::Name, "a signal ended its QEMU"),
        "host-ui" => (FailureKind::Name, "its QEMU's window was closed"),
        "host-error" => (FailureKind::Vm, "its QEMU failed: see its log"),
        other => return Failure::new(FailureKind::Vm, format!("its QEMU ended ({other})")),
    };
    Failure::new(kind, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_state_has_its_word() {
        use State::*;
        for (word, state, says) in [
            ("running", Running, None),
            ("paused", Paused, None),
            ("prelaunch", Paused, Some("-S")),
            ("inmigrate", Incoming, Some("incoming migration")),
            ("postmigrate", Paused, Some("has taken its state")),
            ("finish-migrate", Paused, Some("is taking its state")),
            ("save-vm", Paused, Some("saving a snapshot")),
            ("restore-vm", Paused, Some("loading a snapshot")),
            ("debug", Paused, Some("debugger")),
            ("watchdog", Paused, Some("watchdog")),
            ("colo", Paused, Some("COLO")),
            ("suspended", Suspended, Some("system_wakeup")),
            ("shutdown", Shutdown, Some("has shut down")),
            ("guest-panicked", Failed, Some("panicked")),
            ("internal-error", Failed, Some("internal-error")),
            ("io-error", Failed, Some("io-error")),
        ] {
            let found = of(word, word == "running");
            assert_eq!((found.word.as_str(), found.state), (word, state));
            let why = found.why.unwrap_or_default();
            assert_eq!(why.is_empty(), says.is_none(), "{word}: {why}");
            assert!(why.contains(says.unwrap_or_default()), "{word}: {why}");
        }
        assert_eq!(MEANINGS.len(), 16, "each of them is above");
    }

    #[test]
    fn a_word_of_a_newer_qemu_is_shown_as_it_is() {
        let (runs, stands) = (of("rewinding", true), of("rewinding", false));
        assert_eq!((runs.state, stands.state), (State::Running, State::Paused));
        assert!(runs.why.as_ref().is_some_and(|why| why.contains("\"rewinding\"")), "{runs:?}");
        assert_eq!(
            (runs.word.as_str(), why_no_cont("rewinding"), why_over("rewinding")),
            ("rewinding", None, None)
        );
    }

    #[test]
    fn what_cannot_run_is_known() {
        let not = |word| why_no_cont(word).is_some();
        for word in ["inmigrate", "suspended", "shutdown", "guest-panicked", "internal-error"] {
            assert!(not(word), "{word}");
        }
        for word in ["running", "paused", "prelaunch", "postmigrate", "watchdog", "debug", "io-error"] {
            assert!(!not(word), "{word}");
        }
        for word in ["shutdown", "guest-panicked", "internal-error", "io-error"] {
            assert!(why_over(word).is_some(), "{word}");
        }
        assert_eq!((why_over("inmigrate"), why_over("suspended")), (None, None));
    }

    #[test]
    fn each_cause_of_an_end_is_told() {
        for (cause, kind, says) in [
            ("guest-shutdown", FailureKind::Name, "the guest shut down"),
            ("guest-reset", FailureKind::Name, "rebooted"),
            ("guest-panic", FailureKind::Vm, "panicked"),
            ("host-qmp-quit", FailureKind::Name, "told to quit"),
            ("host-qmp-system-reset", FailureKind::Name, "was reset"),
            ("subsystem-reset", FailureKind::Name, "was reset"),
            ("host-signal", FailureKind::Name, "a signal"),
            ("host-ui", FailureKind::Name, "window"),
            ("host-error", FailureKind::Vm, "failed"),
            ("snapshot-load", FailureKind::Vm, "(snapshot-load)"),
            ("", FailureKind::Vm, "ended"),
        ] {
            let why = why_ended(cause);
            assert!(why.kind == kind && why.text.contains(says), "{cause}: {why:?}");
        }
    }
}
