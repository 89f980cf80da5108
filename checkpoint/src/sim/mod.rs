//! The simulation: live sessions as they are, on a simulated disk, engine and guest, in virtual time, with faults at
//! every step. What they have written then goes through a real archive that crashes. `docs/simulation-checkpoint.md`
//! says what is checked.

pub(crate) mod bugs;
mod coverage;
mod disk;
mod faults;
mod machine;
mod named;
mod oracle;
pub(crate) mod outside;
mod store;
mod story;

use bugs::Any;
use coverage::Coverage;

const SEEDS: u64 = 300;
/// With fewer seeds, some causes may not have occurred.
const ENOUGH: u64 = 300;
/// Every bug is found within so many seeds.
const WITHIN: u64 = 1500;
/// So many seeds are run twice.
const TWICE: u64 = 20;
/// One seed in so many has its checkpoints named in a real archive.
const NAMED: u64 = 2;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// One seed, with everything checked on the way, and an account of it.
fn run(seed: u64) -> Result<String, String> {
    let (done, told) = story::run(seed)?;
    if seed.is_multiple_of(NAMED) {
        let named = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| named::check(seed, &done)));
        // A panic in the middle of an operation leaves its crash behind.
        crate::archive::crash::join(None);
        named.map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            text.or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("a panic without words")
                .to_string()
        })?;
    }
    Ok(told)
}

#[test]
fn each_image_is_what_the_guest_had_at_the_pause() {
    coverage::take();
    if let Some(seed) = number("VMEMD_SIM_SEED") {
        match run(seed) {
            Ok(told) => println!("{told}"),
            Err(error) => panic!("seed {seed}: {error}"),
        }
        return;
    }
    let seeds = number("VMEMD_SIM_SEEDS").unwrap_or(SEEDS);
    let mut coverage = Coverage::default();
    let mut failed = Vec::new();
    for seed in 0..seeds {
        if let Err(error) = testkit::quietly(|| run(seed)) {
            println!("seed {seed} failed; replay it with VMEMD_SIM_SEED={seed}\n{error}");
            failed.push(seed);
        }
        coverage.add(coverage::take());
    }
    assert_eq!(failed, [0; 0], "these seeds have failed");
    println!("{seeds} seeds:");
    coverage.print();
    if seeds >= ENOUGH {
        assert_eq!(coverage.missing(), [""; 0], "nothing like this has occurred");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..TWICE {
        let [first, second] = [(); 2].map(|()| testkit::quietly(|| run(seed)).expect("it is a good one"));
        assert_eq!(first, second, "seed {seed}");
    }
}

fn find(bug: Any) -> Option<(u64, String)> {
    bugs::plant(Some(bug));
    let found = testkit::quietly(|| (0..WITHIN).find_map(|seed| run(seed).err().map(|error| (seed, error))));
    bugs::plant(None);
    found
}

#[test]
fn every_planted_bug_is_found() {
    // A world is one thread's own, so two can be looked into at once.
    let bugs = std::sync::Mutex::new(bugs::ALL.to_vec());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(bug) = bugs.lock().expect("nobody panicked").pop() else { return };
                    match find(bug) {
                        Some((seed, error)) => {
                            println!("{bug:?}: seed {seed}: {}", error.lines().next().unwrap_or_default());
                        }
                        None => panic!("{bug:?} was not found in {WITHIN} seeds"),
                    }
                }
            });
        }
    });
}
