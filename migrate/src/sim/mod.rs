//! The simulation: the real sessions, hand-over, records and questions of both sides, on a simulated network, file system and engine,
//! in virtual time, with faults at every step of the protocol. `docs/simulation-migration.md` says what is checked.

pub(crate) mod bugs;
mod coverage;
mod engine;
mod faults;
mod fs;
mod memory;
mod net;
pub(crate) mod outside;
mod random;
mod runtime;
mod scenario;
mod vm;
mod world;

use bugs::Bug;
use coverage::Coverage;
use faults::{Class, Step};

const SEEDS: u64 = 500;
/// With fewer seeds, cells of the table may stay empty.
const ENOUGH: u64 = 500;
/// Every bug is found within so many seeds.
const WITHIN: u64 = 1000;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// Seeds take their turns at the cells of the coverage table; what else goes wrong is drawn.
fn run(seed: u64, coverage: &mut Coverage) -> Result<(), String> {
    let cells = (Step::ALL.len() * Class::ALL.len()) as u64;
    let cell = (seed % (cells + cells / 8)) as usize;
    let target = (cell < cells as usize).then(|| (Step::ALL[cell / Class::ALL.len()], Class::ALL[cell % Class::ALL.len()]));
    scenario::run(seed, target, coverage)
}

/// A seed that fails says so with its trace, and no panic's message before that.
fn quietly<T>(work: impl FnOnce() -> T) -> T {
    thread_local!(static QUIET: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                tell(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = work();
    QUIET.set(false);
    result
}

#[test]
fn exactly_one_side_runs_the_vm_and_nothing_is_lost() {
    let mut coverage = Coverage::default();
    if let Some(seed) = number("VMEMD_SIM_SEED") {
        if let Err(error) = run(seed, &mut coverage) {
            panic!("seed {seed}: {error}");
        }
        return;
    }
    let seeds = number("VMEMD_SIM_SEEDS").unwrap_or(SEEDS);
    for seed in 0..seeds {
        let began = std::time::Instant::now();
        if let Err(error) = quietly(|| run(seed, &mut coverage)) {
            panic!("seed {seed} failed; replay it with VMEMD_SIM_SEED={seed}\n{error}");
        }
        if began.elapsed().as_millis() > 30 { println!("seed {seed} {:?}", began.elapsed()); }
    }
    println!("{seeds} seeds; faults by step:");
    coverage.print();
    if seeds >= ENOUGH {
        assert_eq!(coverage.zeros(), [], "nothing has reached these cells");
    }
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Bug::ALL {
        bugs::plant(Some(bug));
        let found = quietly(|| (0..WITHIN).find_map(|seed| run(seed, &mut Coverage::default()).err().map(|error| (seed, error))));
        bugs::plant(None);
        let (seed, error) = found.unwrap_or_else(|| panic!("{bug:?} was not found in {WITHIN} seeds"));
        println!("{bug:?}: seed {seed}: {}", error.lines().next().unwrap_or_default());
    }
}
