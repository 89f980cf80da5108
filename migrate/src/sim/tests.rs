use super::bugs::{self, Bug};
use super::coverage::Coverage;
use super::faults::{Class, Step};
use super::{fs, scenario, world};

const SEEDS: u64 = 800;
/// With fewer seeds, cells of the table may stay empty.
const ENOUGH: u64 = 800;
/// Every bug is found within so many seeds.
const WITHIN: u64 = 1000;

/// How sessions must have ended, some of them, at the source and at the target: each named limit, and each way of
/// doubt.
const ENDS: [&[&str]; 2] = [
    &[
        "moved, by asking",
        "in doubt, then",
        "cannot reach is `vmemd serve` running there?: timed out",
        "waiting for it to accept the VM: timed out",
        "waiting for the target to have all pages of the round: timed out",
        "while handing over",
        "cancelled",
        "the name is taken",
        "it would stand still for about",
        "it has stood still for the",
    ],
    &[
        "waiting for its streams: timed out",
        "waiting for its streams: unexpected end",
        "while receiving the VM: timed out",
        "the hand-over could not be recorded",
        "twice or out of range",
        "no Load today",
        "no Start today",
        "does not match its checksum",
        "cannot be kept in",
    ],
];

/// Runs something on a thread of a world without faults.
pub(crate) fn in_a_world(seed: u64, work: impl FnOnce() + 'static) {
    fs::begin();
    let done = std::rc::Rc::new(std::cell::Cell::new(false));
    let ended = done.clone();
    let begin = move || {
        let world = world::world();
        world.spawn(world.process("a test"), move || {
            work();
            ended.set(true);
        });
    };
    world::World::run(seed, begin, move || done.get()).unwrap_or_else(|error| panic!("{error}"));
}

/// No file of this world keeps its content wrongly.
pub(crate) fn sound_disk() {
    fs::heal();
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// Seeds take their turns at the cells of the coverage table; what else goes wrong is drawn.
fn run(seed: u64, coverage: &mut Coverage) -> Result<(), String> {
    let cells = (Step::ALL.len() * Class::ALL.len()) as u64;
    let cell = (seed % (cells + cells / 8)) as usize;
    let target = (cell < cells as usize)
        .then(|| (Step::ALL[cell / Class::ALL.len()], Class::ALL[cell % Class::ALL.len()]));
    scenario::run(seed, target, coverage)
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
        if let Err(error) = testkit::quietly(|| run(seed, &mut coverage)) {
            panic!("seed {seed} failed; replay it with VMEMD_SIM_SEED={seed}\n{error}");
        }
    }
    println!("{seeds} seeds; faults by step:");
    coverage.print();
    if seeds >= ENOUGH {
        assert_eq!(coverage.zeros(), [], "nothing has reached these cells");
        assert_eq!(coverage.missing_ends(ENDS[0], ENDS[1]), [""; 0], "no session has ended like this");
    }
}

fn find(bug: Bug) -> Option<(u64, String)> {
    bugs::plant(Some(bug));
    let found = testkit::quietly(|| {
        (0..WITHIN).find_map(|seed| run(seed, &mut Coverage::default()).err().map(|error| (seed, error)))
    });
    bugs::plant(None);
    found
}

#[test]
fn every_planted_bug_is_found() {
    // A world is one thread's own, so two can be looked into at once.
    let bugs = std::sync::Mutex::new(Bug::ALL.to_vec());
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
