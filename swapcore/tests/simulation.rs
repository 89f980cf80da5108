//! Many seeds of the simulation (`docs/simulation.md`). `VMEMD_SIM_SEEDS` sets how many, and `VMEMD_SIM_FIRST` which is
//! the first; `VMEMD_SIM_SEED` replays one, and `VMEMD_SIM_MUTANT` plants a bug in it.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use swapcore::mutant::{MUTANTS, Mutant, plant};
use swapcore::sim::{Coverage, Depth, Sim};

const STEPS: u32 = 1500;
const SEEDS: u64 = 500;
/// So few leave no transition out.
const SEEDS_FOR_TRANSITIONS: u64 = 200;
/// So many leave no cause of any transition out, and no outcome of any fault.
const SEEDS_FOR_CAUSES: u64 = 10_000;
/// Seeds within which every planted bug is found.
const WITHIN: u64 = 2000;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn number(name: &str) -> Option<u64> {
    variable(name).map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Panics within a run are told by the run, once; a planted bug makes hundreds.
fn keep_panics_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let quiet = PANIC.with_borrow_mut(|kept| match kept {
                Some(kept) => {
                    *kept = info.to_string().replace('\n', " ");
                    true
                }
                None => false,
            });
            if !quiet {
                default(info);
            }
        }));
    });
}

/// The run, or how it failed.
fn run_seed(seed: u64, mutant: Option<Mutant>) -> Result<(Sim, Coverage), String> {
    keep_panics_quiet();
    plant(mutant);
    PANIC.set(Some(String::new()));
    let mut sim = Sim::new(seed);
    let run = catch_unwind(AssertUnwindSafe(|| sim.run(STEPS)));
    let panic = PANIC.take().unwrap_or_default();
    plant(None);
    match run {
        Ok(coverage) => Ok((sim, coverage)),
        Err(_) => {
            let planted = mutant.map_or(String::new(), |mutant| format!("VMEMD_SIM_MUTANT={mutant:?} "));
            let replay = "cargo test -p swapcore --test simulation no_seed_loses_a_page -- --nocapture";
            Err(format!("{}replay it with {planted}VMEMD_SIM_SEED={seed} {replay}", sim.tell(&panic)))
        }
    }
}

/// Runs the seeds on all processors, in ascending order as far as that goes; ends at the first failure.
fn run_seeds(first: u64, seeds: u64) -> Result<Coverage, String> {
    let next = AtomicU64::new(first);
    let end = first + seeds;
    let work = || -> Result<Coverage, String> {
        let mut total = Coverage::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return Ok(total);
            }
            let (_, one) = run_seed(seed, None).inspect_err(|_| next.store(end, Ordering::Relaxed))?;
            total.add(&one);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut total = Coverage::default();
        for worker in workers {
            total.add(&worker.join().expect("a worker keeps its panics")?);
        }
        Ok(total)
    })
}

#[test]
fn no_seed_loses_a_page() {
    if let Some(seed) = number("VMEMD_SIM_SEED") {
        let named = |name: String| {
            let found = MUTANTS.iter().find(|(mutant, _)| format!("{mutant:?}") == name);
            found.unwrap_or_else(|| panic!("there is no mutant {name}")).0
        };
        match run_seed(seed, variable("VMEMD_SIM_MUTANT").map(named)) {
            Ok(_) => println!("seed {seed} passes"),
            Err(story) => panic!("{story}"),
        }
        return;
    }
    let seeds = number("VMEMD_SIM_SEEDS").unwrap_or(SEEDS);
    let start = Instant::now();
    let total =
        run_seeds(number("VMEMD_SIM_FIRST").unwrap_or(0), seeds).unwrap_or_else(|story| panic!("{story}"));
    println!(
        "{seeds} seeds, {} steps, {} checks of all pages in {:.1} s\n\n{total}",
        total.steps,
        total.checks,
        start.elapsed().as_secs_f64()
    );
    let gaps = match seeds {
        ..SEEDS_FOR_TRANSITIONS => return,
        SEEDS_FOR_TRANSITIONS..SEEDS_FOR_CAUSES => total.gaps(Depth::Transitions),
        _ => total.gaps(Depth::Causes),
    };
    assert!(gaps.is_empty(), "the seeds do not reach what the coverage table says:\n{}", gaps.join("\n"));
}

#[test]
fn every_planted_bug_is_caught() {
    println!("| planted bug | what is wrong | caught by seed | by |\n|---|---|---|---|");
    let mut missed = Vec::new();
    for (mutant, what) in MUTANTS {
        let caught = (0..WITHIN).find_map(|seed| Some((seed, run_seed(seed, Some(*mutant)).err()?)));
        match caught {
            Some((seed, story)) => {
                // Behind the seed and the place in the code, up to the figures.
                let by =
                    story.lines().next().and_then(|line| line.splitn(3, ": ").nth(2)).unwrap_or_default();
                let by: String = by.split("   left: ").next().unwrap_or_default().chars().take(90).collect();
                println!("| {mutant:?} |{what} | {seed} | {by} |");
            }
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "not caught in {WITHIN} seeds: {missed:?}");
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..20 {
        let [once, again] = [(); 2].map(|()| run_seed(seed, None).map(|(sim, _)| sim.digest()));
        assert_eq!(once, again, "seed {seed}");
    }
    let [once, again] = [(); 2].map(|()| run_seed(3, Some(Mutant::TrustsReads)).map(|(sim, _)| sim.digest()));
    assert_eq!(once, again, "a failure is the same as well");
}
