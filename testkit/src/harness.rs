//! A test harness that tells tests which could not run on this host from those that passed, which `cargo test`'s own
//! cannot.
//!
//! ```text
//! #[test] fn a() ─▶ inventory ─▶ main ─▶ libtest-mimic: arguments, threads, the list of what became of each
//!                                            │ a test
//!                                            ▼
//!                            this program again, --run-one NAME, its output into a file
//!                                            │ the test, on a thread of its name
//!                                            ▼
//!                         0 passed · 77 skipped, the reason in the last line · else failed
//! ```
//! Each test runs in a process of its own: only `cargo test`'s harness can catch what a thread prints, and this one
//! catches what a process prints. With `--nocapture` all tests run in one process, as with `cargo test`'s. A file of
//! tests needs `harness = false` in its Cargo.toml, and begins with
//! ```text
//! #[macro_use]
//! extern crate testkit;
//!
//! testkit::main!();
//! ```
//! The first two lines make `#[test]` this crate's attribute in all modules. The language's own removes a test where
//! `cargo test`'s harness is switched off, and nobody would notice that it does not run.

use std::fs::File;
use std::io::{Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::skip::{self, Skipped};

/// A function with the attribute `#[test]`.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    pub module: &'static str,
    pub name: &'static str,
    /// The reason why the test runs only if it is asked for (`#[ignore]`); none if it always runs.
    pub ignored: Option<&'static str>,
    pub run: fn(),
}

inventory::collect!(Test);

/// The argument with which a process is to run one test.
const RUN_ONE: &str = "--run-one";
/// Its exit code, if the test was skipped.
const SKIPPED: u8 = 77;
/// The last line of its output begins with this, if the test was skipped.
const SKIPPED_LINE: &str = "\u{1}skipped ";

/// The program's `main`. Once in each file of tests, or in a library's `lib.rs` under `cfg(test)`.
#[macro_export]
macro_rules! main {
    () => {
        /// Runs this program's tests.
        fn main() -> ::std::process::ExitCode {
            $crate::harness::main()
        }

        // The language's own attribute: under `cargo test`'s harness this would be the only test.
        #[::core::prelude::v1::test]
        fn harness_is_false() {
            panic!("its Cargo.toml does not say `harness = false`: none of its tests run");
        }
    };
}

/// How a test ended.
enum TestOutcome {
    Passed,
    Skipped(Skipped),
    Failed(String),
}

impl Test {
    /// The test's name with its modules below the crate's root, as `cargo test`'s harness would print it.
    fn path(&self) -> String {
        match self.module.split_once("::") {
            Some((_, module)) => format!("{module}::{}", self.name),
            None => self.name.to_owned(),
        }
    }

    fn run_here(&self) -> TestOutcome {
        match catch_unwind(AssertUnwindSafe(self.run)) {
            Ok(()) => TestOutcome::Passed,
            Err(payload) => match payload.downcast::<Skipped>() {
                Ok(skipped) => TestOutcome::Skipped(*skipped),
                // The panic hook has printed what it was.
                Err(_) => TestOutcome::Failed(String::new()),
            },
        }
    }

    /// Runs the test in a process of its own, which is this program with [`RUN_ONE`].
    fn run_apart(&self) -> TestOutcome {
        let ran = tempfile::tempfile().and_then(|output| {
            let status = self.process(&output)?.status()?;
            Ok((status, output))
        });
        let (status, mut output) = match ran {
            Ok(ran) => ran,
            Err(error) => {
                return TestOutcome::Failed(format!("cannot run it in a process of its own: {error}"));
            }
        };
        let mut said = Vec::new();
        if let Err(error) = output.rewind().and_then(|()| output.read_to_end(&mut said)) {
            return TestOutcome::Failed(format!("cannot read its output: {error}"));
        }
        let said = String::from_utf8_lossy(&said).into_owned();
        match status.code() {
            Some(0) => TestOutcome::Passed,
            Some(code) if code == i32::from(SKIPPED) => match Skipped::read(&said) {
                Some(skipped) => TestOutcome::Skipped(skipped),
                None => TestOutcome::Failed(format!("it ended with {code}\n{said}")),
            },
            // The exit code after a panic; its message is in the output.
            Some(101) => TestOutcome::Failed(said),
            _ => TestOutcome::Failed(format!("{said}\nits process ended: {status}")),
        }
    }

    fn process(&self, output: &File) -> std::io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([RUN_ONE, &self.path()]).stdin(Stdio::null());
        command.stdout(output.try_clone()?).stderr(output.try_clone()?);
        Ok(command)
    }
}

impl Skipped {
    /// The last line of a process's output that says so.
    fn line(&self) -> String {
        format!("{SKIPPED_LINE}{}: {}", self.reason, self.why.trim().replace('\n', "; "))
    }

    fn read(said: &str) -> Option<Skipped> {
        let (word, why) = said.lines().last()?.strip_prefix(SKIPPED_LINE)?.split_once(": ")?;
        let reason = *skip::Reason::ALL.iter().find(|reason| reason.word() == word)?;
        Some(Skipped { reason, why: why.to_owned() })
    }
}

impl TestOutcome {
    fn told(self) -> Result<Completion, Failed> {
        match self {
            TestOutcome::Passed => Ok(Completion::Completed),
            TestOutcome::Skipped(skipped) if skip::must_run().contains(&skipped.reason) => {
                Err(skip::forbidden(&skipped).into())
            }
            TestOutcome::Skipped(skipped) => Ok(Completion::ignored_with(skipped)),
            TestOutcome::Failed(said) if said.is_empty() => Err(Failed::without_message()),
            TestOutcome::Failed(said) => Err(said.into()),
        }
    }
}

/// Runs the tests of this program that its arguments ask for.
///
/// # Panics
/// If the program has none, or is asked for one that it does not have.
pub fn main() -> ExitCode {
    let mut tests: Vec<&'static Test> = inventory::iter::<Test>().collect();
    tests.sort_by_key(|test| test.path());
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(RUN_ONE) {
        let name = arguments.next().expect("the name of a test");
        let test = tests.into_iter().find(|test| test.path() == name);
        return run_one(test.unwrap_or_else(|| panic!("no test {name}")));
    }
    assert!(!tests.is_empty(), "no tests: is `#[macro_use] extern crate testkit;` missing?");
    skip::must_run();
    let mut arguments = Arguments::from_args();
    let set = |name| std::env::var(name).ok().filter(|value| value != "0");
    arguments.test_threads = arguments.test_threads.or_else(|| set("RUST_TEST_THREADS")?.parse().ok());
    let together = arguments.nocapture || set("RUST_TEST_NOCAPTURE").is_some();
    let trial = |test: &'static Test| {
        let run = move || if together { test.run_here() } else { test.run_apart() }.told();
        Trial::ignorable_test(test.path(), run).with_ignored_flag(test.ignored.is_some())
    };
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit_code()
}

/// All that a process does which was started for one test.
fn run_one(test: &'static Test) -> ExitCode {
    // A test must not outlive the harness: it ends when the harness is killed.
    // SAFETY: no memory arguments.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) };
    let thread = std::thread::Builder::new().name(test.path()).spawn(|| test.run_here());
    match thread.expect("a thread").join().expect("it catches all panics") {
        TestOutcome::Passed => ExitCode::SUCCESS,
        TestOutcome::Failed(_) => ExitCode::from(101),
        TestOutcome::Skipped(skipped) => {
            eprintln!("{}", skipped.line());
            ExitCode::from(SKIPPED)
        }
    }
}
