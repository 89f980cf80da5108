//! How a test says that it cannot run on this host, so that it is not taken for one that passed.
//!
//! `VMEMD_TESTS_MUST_RUN=kvm,uffd` names what this host has for certain. A test that is skipped because it lacks one
//! of these has failed.

use std::fmt::{self, Display};

/// The variable with the reasons for which nothing may be skipped here, with commas between them.
pub const MUST_RUN: &str = "VMEMD_TESTS_MUST_RUN";

macro_rules! reasons {
    ($($(#[$about:meta])* $name:ident = $word:literal,)*) => {
        /// What a host lacks that a test needs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$about])* $name,)*
        }

        impl Reason {
            /// All reasons.
            pub const ALL: &[Reason] = &[$(Reason::$name),*];

            /// The reason's name in the variable and in messages.
            pub fn word(self) -> &'static str {
                match self {
                    $(Reason::$name => $word,)*
                }
            }
        }
    };
}

reasons! {
    /// `/dev/kvm`.
    Kvm = "kvm",
    /// userfaultfd and io_uring with all that the engine needs, and the right to lock memory.
    Uffd = "uffd",
    /// QEMU and the guests that `scripts/setup --qemu` makes.
    Qemu = "qemu",
    Root = "root",
    /// Network namespaces, their devices and their tools.
    Netns = "netns",
    /// Loop devices, and file systems on them.
    Loop = "loop",
    /// Control groups that limit memory or a disk's speed.
    Cgroup = "cgroup",
    /// A swap file of a test's own.
    Swap = "swap",
    /// A build of the last version (`scripts/last-version`).
    LastVersion = "last-version",
    /// Huge pages, as many as are asked for.
    Huge = "huge",
    /// Kernel features that few tests need: KSM, Landlock, compaction, a tmpfs without O_DIRECT.
    Kernel = "kernel",
    /// Programs beside QEMU: a C compiler, setpriv, systemd-analyze.
    Tools = "tools",
    /// Another user's access to what the test has made.
    Users = "users",
    /// The test takes long, and was not asked for.
    Long = "long",
    /// A host that is too slow for a measurement to say anything.
    Slow = "slow",
}

impl Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The payload with which a skipped test unwinds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub reason: Reason,
    pub why: String,
}

impl Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.why.trim())
    }
}

/// Ends the test, because it cannot run on this host. To be called on the test's own thread.
///
/// # Panics
/// Always. Under `cargo test`'s own harness the test has failed then: it cannot count what was skipped.
pub fn skip(reason: Reason, why: impl Display) -> ! {
    let skipped = Skipped { reason, why: why.to_string() };
    eprintln!("skipped: {skipped}");
    // Without the panic hook, which would print a message: nothing is wrong with the test.
    std::panic::resume_unwind(Box::new(skipped))
}

/// For a result that is an error on a host which lacks something.
pub trait OrSkip<T> {
    /// The value; an error ends the test as [`skip`] does.
    fn or_skip(self, reason: Reason) -> T;
}

impl<T, E: Display> OrSkip<T> for Result<T, E> {
    fn or_skip(self, reason: Reason) -> T {
        self.unwrap_or_else(|why| skip(reason, why))
    }
}

/// Notes that the test goes on without a part of itself.
///
/// # Panics
/// If that may not be skipped here ([`MUST_RUN`]).
pub fn skip_part(reason: Reason, why: impl Display) {
    let skipped = Skipped { reason, why: why.to_string() };
    eprintln!("skipped in part: {skipped}");
    assert!(!must_run().contains(&reason), "{}", forbidden(&skipped));
}

/// The message of a test that has failed because it was skipped.
pub(crate) fn forbidden(skipped: &Skipped) -> String {
    format!("not to be skipped here ({MUST_RUN}): {skipped}")
}

/// The reasons for which nothing may be skipped on this host.
///
/// # Panics
/// If the variable has a word that is no reason: a misspelt one would check nothing.
pub fn must_run() -> Vec<Reason> {
    parse(&std::env::var(MUST_RUN).unwrap_or_default()).unwrap_or_else(|error| panic!("{MUST_RUN}: {error}"))
}

fn parse(words: &str) -> Result<Vec<Reason>, String> {
    let words = words.split(',').map(str::trim).filter(|word| !word.is_empty());
    let reason = |word: &str| {
        let known = || Reason::ALL.iter().map(|reason| reason.word()).collect::<Vec<_>>().join(", ");
        let found = Reason::ALL.iter().copied().find(|reason| reason.word() == word);
        found.ok_or_else(|| format!("{word:?} is none of {}", known()))
    };
    words.map(reason).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_read_as_they_are_written() {
        assert_eq!(parse(""), Ok(vec![]));
        assert_eq!(parse("kvm, root,"), Ok(vec![Reason::Kvm, Reason::Root]));
        assert!(parse("kvn").unwrap_err().starts_with("\"kvn\" is none of kvm, uffd"));
        for reason in Reason::ALL {
            assert_eq!(parse(reason.word()), Ok(vec![*reason]));
        }
    }
}
