//! Many seeds of the simulation. `VMEMD_SIM_SEEDS` sets how many, `VMEMD_SIM_SEED` replays one.

use std::panic::{AssertUnwindSafe, catch_unwind};

use swapd::core::Mutant;
use swapd::sim::{Coverage, Sim};
use swapd::table::{LEGAL, STATES};

const STEPS: u32 = 3000;
const SEEDS: u64 = 500;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

fn run_seed(seed: u64) -> Coverage {
    let run = catch_unwind(AssertUnwindSafe(|| Sim::new(seed, None).run(STEPS)));
    run.unwrap_or_else(|cause| {
        eprintln!("seed {seed} failed; replay it with VMEMD_SIM_SEED={seed}");
        std::panic::resume_unwind(cause)
    })
}

#[test]
fn no_seed_loses_a_page() {
    if let Some(seed) = number("VMEMD_SIM_SEED") {
        run_seed(seed);
        return;
    }
    let seeds = number("VMEMD_SIM_SEEDS").unwrap_or(SEEDS);
    let mut total = Coverage::default();
    for seed in 0..seeds {
        let one = run_seed(seed);
        for from in 0..STATES {
            for to in 0..STATES {
                total.transitions[from][to] += one.transitions[from][to];
            }
        }
        total.poisoned += one.poisoned;
        total.store_failures += one.store_failures;
    }
    println!("{seeds} seeds of {STEPS} steps; transitions taken:");
    for (from, to) in LEGAL {
        let taken = total.transitions[*from as usize][*to as usize];
        println!("  {from:>9?} -> {to:<9?} {taken}");
        assert!(taken > 0 || seeds < 100, "no seed took {from:?} -> {to:?}");
    }
    println!("pages poisoned: {}, store failures: {}", total.poisoned, total.store_failures);
}

#[test]
fn every_planted_bug_is_caught() {
    const WITHIN: u64 = 1000;
    for mutant in [
        Mutant::DropsChangedPages,
        Mutant::RescuesUnderWrite,
        Mutant::TrustsFailedWrites,
        Mutant::TrustsReads,
    ] {
        let caught = (0..WITHIN).find(|seed| {
            catch_unwind(AssertUnwindSafe(|| Sim::new(*seed, Some(mutant)).run(STEPS))).is_err()
        });
        println!("{mutant:?}: caught by seed {caught:?}");
        assert!(caught.is_some(), "{mutant:?} was not caught in {WITHIN} seeds");
    }
}
