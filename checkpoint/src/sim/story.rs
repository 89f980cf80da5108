//! One seed's story: a VM that is saved three times while it lives, the later times against what was saved before, and
//! faults on the way. The last time has none.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write;
use std::io::Read;
use std::rc::Rc;
use std::time::Duration;

use migrate::CancelFlag;
use migrate::sim::guest::Guest;
use migrate::sim::runtime::pause;
use migrate::sim::world::{World, world};
use swapd::{PageNo, Run};

use super::coverage::{Cause, count, count_end};
use super::disk::{self, File, Page};
use super::faults::{self, Fault, Victims, When};
use super::machine::Machine;
use super::oracle;
use super::store::{self, WAYS};
use crate::format::MemoryMap;
use crate::format::sealed::{SealedAs, SealedReader};
use crate::key::{ChainKey, KEY_BYTES};
use crate::save::{Base, Files, SaveError, SaveOptions, Saved, save};

const SESSIONS: u32 = 3;
/// No session takes longer, whatever happens to it.
const SESSION_MAX: Duration = Duration::from_secs(600);
/// Between two sessions the guest changes some pages.
const BETWEEN: Duration = Duration::from_secs(4);

/// A checkpoint.
pub(crate) struct Done {
    pub(crate) image: File,
    pub(crate) map: MemoryMap,
    pub(crate) map_bytes: Vec<u8>,
    pub(crate) state: Vec<u8>,
    /// Of all checkpoints of the story, the one whose pages it needs.
    pub(crate) base: Option<usize>,
    /// What each page had at the pause.
    pub(crate) truth: Vec<u64>,
    /// What the store had lost when it ended.
    pub(crate) lost: BTreeSet<PageNo>,
    pub(crate) saved: Saved,
    /// Of the chain, if it is encrypted.
    pub(crate) key: Option<ChainKey>,
    /// Bytes of the state's file.
    pub(crate) state_bytes: u64,
}

impl Done {
    /// What the image has of a page, as the guest wrote it.
    pub(crate) fn page(&self, page: PageNo) -> Option<Rc<Page>> {
        let bytes = self.image.page(page.0)?;
        let Some(key) = &self.key else { return Some(bytes) };
        let mut plain = *bytes;
        key.pages().decrypt(Run::one(page), &mut plain);
        Some(Rc::new(plain))
    }
}

/// What was sealed, if there is a key.
fn opened(bytes: Vec<u8>, key: Option<&ChainKey>, purpose: SealedAs) -> Vec<u8> {
    let Some(key) = key else { return bytes };
    let mut plain = Vec::new();
    let reader = SealedReader::new(&bytes[..], bytes.len() as u64, key, purpose);
    reader.expect("it was sealed").read_to_end(&mut plain).expect("its seal is whole");
    plain
}

#[derive(Default)]
struct Story {
    done: RefCell<Vec<Done>>,
    over: Cell<bool>,
    /// All of its checkpoints are encrypted with this.
    key: RefCell<Option<ChainKey>>,
    /// What happened, but for the clock of the host.
    told: RefCell<String>,
}

/// One seed, with everything checked on the way. Returns what has come of it, and an account of the run.
pub(crate) fn run(seed: u64) -> Result<(Vec<Done>, String), String> {
    let story = Rc::new(Story::default());
    let (living, ending) = (story.clone(), story.clone());
    let begin = move || {
        let world = world();
        let process = world.process("the VM");
        let pages = 512 * (2 + world.random.below(2));
        disk::begin(!world.random.one_in(8), world.random.pick(&disk::SPEEDS));
        store::set_way(world.random.pick(&WAYS));
        if world.random.one_in(4) {
            let bytes: [u8; KEY_BYTES] = std::array::from_fn(|_| world.random.next() as u8);
            *living.key.borrow_mut() = Some(ChainKey::from_pipe(&bytes[..]).expect("as many as a key has"));
        }
        let machine = Machine::new(Guest::new(process, pages));
        world.spawn(process, move || living.live(machine));
    };
    World::run(seed, begin, move || ending.over.get())?;
    Ok((story.done.take(), story.told.take()))
}

impl Story {
    fn live(&self, machine: Machine) {
        for nth in 1..=SESSIONS {
            let plan = if nth == SESSIONS { Vec::new() } else { faults::draw() };
            self.session(&machine, plan, nth == SESSIONS);
            pause(world().delay(BETWEEN));
        }
        // A write that came late has changed nothing.
        let done = self.done.borrow();
        (0..done.len()).for_each(|nth| oracle::check(&done, nth));
        self.tell(format!("{:?}: {:?}", world().now(), oracle::digest(&done)));
        self.over.set(true);
    }

    fn tell(&self, what: String) {
        world().note(|| what.clone());
        writeln!(self.told.borrow_mut(), "{what}").expect("a string takes all");
    }

    /// The checkpoint that this one is compared with, and whether its image begins as that one's clone.
    fn base(&self) -> Option<(usize, bool)> {
        let (random, done) = (&world().random, self.done.borrow());
        let nth = done.len().checked_sub(1)?;
        // Where blocks can be shared no checkpoint needs another.
        let can_clone = done[nth].base.is_none();
        (!random.one_in(4)).then(|| (nth, can_clone && random.one_in(2)))
    }

    fn session(&self, machine: &Machine, plan: Vec<(When, Fault)>, last: bool) {
        let (guest, cancel) = (&machine.guest, Rc::new(CancelFlag::new(false)));
        let over = Rc::new(Cell::new(false));
        let victims = Victims { guest: guest.clone(), cancel: cancel.clone(), over: over.clone() };
        self.tell(format!("{:?}: {plan:?}", world().now()));
        machine.begin(plan, victims);
        let base = self.base();
        let image = match base {
            Some((nth, true)) => File::clone_of(&self.done.borrow()[nth].image),
            _ => File::new(),
        };
        let (map, state) = (File::new(), File::new());
        let files = Files { image: again(&image), map: again(&map), state: again(&state) };
        let given = base.map(|(nth, cloned)| Base { map: self.done.borrow()[nth].map.clone(), cloned });
        let options = SaveOptions { key: self.key.borrow().clone(), ..options(last) };
        let began = world().now();
        let mut vm = machine;
        let result = save(&guest.engine, &mut vm, files, given, &options, &|_| {}, &cancel);
        over.set(true);
        let took = world().now() - began;
        self.tell(format!(
            "a session has ended after {took:?}: {:?}",
            result.as_ref().map(|saved| saved.pages)
        ));
        assert!(took < SESSION_MAX, "a session took {took:?}");
        machine.check_end(result.as_ref().err(), options.stop);
        count_end(result.as_ref().map_or_else(summary, |_| "saved".to_owned()));
        assert_eq!(disk::under_way(), 0, "a session has ended, and its writes have not");
        match result {
            Err(error) => assert!(!last, "not saved, and nothing was wrong: {error:?}"),
            Ok(saved) => {
                assert!(!machine.cancelled_before_pause(), "cancelled in time, and saved all the same");
                let map_bytes = map.bytes();
                let plain_map = opened(map_bytes.clone(), options.key.as_ref(), SealedAs::Map);
                let state_bytes = state.bytes().len() as u64;
                let done = Done {
                    map: MemoryMap::decode(&plain_map).expect("the map was written"),
                    map_bytes,
                    image,
                    state: opened(state.bytes(), options.key.as_ref(), SealedAs::State),
                    state_bytes,
                    key: options.key.clone(),
                    base: base.and_then(|(nth, cloned)| (!cloned).then_some(nth)),
                    truth: machine.at_pause(),
                    lost: guest.lost(),
                    saved,
                };
                assert_eq!(done.state, *guest.state.borrow(), "the state is not what was saved");
                for (is, cause) in [
                    (base.is_some_and(|(_, cloned)| !cloned), Cause::WithBase),
                    (base.is_some_and(|(_, cloned)| cloned), Cause::WithClone),
                    (options.stop, Cause::Stopped),
                    (options.rate.is_some(), Cause::Limited),
                    (guest.stood_still, Cause::StoodStill),
                    (options.key.is_some(), Cause::Encrypted),
                    (done.saved.throttle_max_percent > 0, Cause::Throttled),
                    (!disk::makes_holes(), Cause::WithoutHoles),
                ] {
                    if is {
                        count(cause);
                    }
                }
                let mut all = self.done.borrow_mut();
                all.push(done);
                oracle::check(&all, all.len() - 1);
            }
        }
        // Whatever was wrong is mended, and the user lets the VM run.
        disk::heal();
        guest.engine.fail(false);
        guest.engine.be_away(0);
        guest.failing.set(None);
        guest.runs.set(!guest.stood_still);
    }
}

fn again(file: &File) -> File {
    file.try_clone().expect("it can")
}

fn options(last: bool) -> SaveOptions {
    let random = &world().random;
    SaveOptions {
        downtime_target: Duration::from_millis(random.below(50)),
        max_rounds: 1 + random.below(5) as u32,
        max_throttle: random.pick(&[0, 60, 99]),
        rate: random.one_in(3).then(|| 200_000 + random.below(4_000_000)),
        stop: !last && random.one_in(8),
        ..SaveOptions::default()
    }
}

/// An error with its causes, without its numbers.
fn summary(error: &SaveError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.retain(|letter| !letter.is_ascii_digit());
    text
}
