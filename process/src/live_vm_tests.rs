use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use swapd::Notice;

use super::*;
use crate::checkpointing::Checkpointing;
use crate::control::protocol::EngineKind;
use crate::control::rundir::RunDir;
use crate::facts::Facts;
use crate::granted::{Granted, Share};
use crate::hold::{Hold, Whereabouts};
use crate::machine::GuestView;
use crate::vm::lock;

/// What a machine does, and what was done to it.
#[derive(Default)]
struct Doings {
    runs: bool,
    sleeps: bool,
    resumed: u32,
    /// Done while it is being let go on.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
}

#[derive(Clone, Default)]
struct Told(Arc<Mutex<Doings>>);

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Told")
    }
}

impl Machine for Told {
    fn drain(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Failure> {
        let mut doings = lock(&self.0);
        if doings.sleeps {
            return Err(Failure::new(FailureKind::Name, "it sleeps"));
        }
        doings.runs = false;
        Ok(())
    }

    fn runs(&mut self) -> Result<bool, Failure> {
        Ok(lock(&self.0).runs)
    }

    fn resume(&mut self) -> Result<(), Failure> {
        let meanwhile = lock(&self.0).meanwhile.take();
        meanwhile.into_iter().for_each(|work| work());
        let mut doings = lock(&self.0);
        (doings.runs, doings.resumed) = (true, doings.resumed + 1);
        Ok(())
    }

    fn save(&mut self, _: &mut dyn Write) -> Result<(), Failure> {
        Ok(())
    }

    fn throttle(&mut self, _: u8) {}

    fn view(&self) -> GuestView {
        GuestView::default()
    }

    fn quit(self: Box<Self>) -> Result<(), Failure> {
        Ok(())
    }
}

struct Place {
    vm: Arc<Vm>,
    machine: Told,
    _directory: testkit::TempDir,
}

/// A VM that runs, and of which a checkpoint is under way.
fn place() -> Place {
    let directory = testkit::directory("live-vm");
    let dir = RunDir::open(directory.path()).unwrap();
    let facts = Facts {
        name: "web".to_owned(),
        memory_bytes: 32 << 20,
        budget_bytes: 16 << 20,
        engine: EngineKind::Vmemd,
        daemon: None,
        offer: None,
    };
    let (claim, _) = dir.claim_name("web").unwrap();
    let granted = Granted::new(&dir, "web-1", Share::of(&facts)).unwrap();
    let vm = Arc::new(Vm::new(facts, Whereabouts::Here, (claim, granted), channel().0));
    let machine = Told::default();
    lock(&machine.0).runs = true;
    vm.set_machine(Box::new(machine.clone()));
    vm.locked(|state| state.checkpoint = Some(Checkpointing::default()));
    Place { vm, machine, _directory: directory }
}

impl Place {
    fn runs(&self) -> bool {
        lock(&self.machine.0).runs
    }

    fn hold(&self) -> Hold {
        self.vm.locked(|state| state.hold.clone())
    }

    fn starves(&self) {
        self.vm.notice(Notice::Starved("full".to_owned()));
    }
}

#[test]
fn a_stall_in_the_pause_waits_for_nothing_and_ends_by_itself() {
    let place = place();
    let mut saving = Saving::begin(&place.vm, None);
    saving.pause().unwrap();
    assert!(!place.runs());
    // On this thread, which keeps the machine: if that waited for it, it would be for ever.
    place.starves();
    saving.resume().unwrap();
    assert!(!place.runs() && place.hold().is_stalled(), "{:?}", place.hold());
    place.vm.notice(Notice::Relieved);
    assert!(place.runs());
    assert_eq!(place.hold(), Hold::Free);
}

#[test]
fn a_stall_that_begins_and_ends_in_the_pause_leaves_it_running() {
    let place = place();
    let mut saving = Saving::begin(&place.vm, None);
    saving.pause().unwrap();
    place.starves();
    place.vm.notice(Notice::Relieved);
    assert!(!place.runs());
    saving.resume().unwrap();
    assert!(place.runs());
    assert_eq!(place.hold(), Hold::Free);
}

/// The checkpoint has seen no reason to keep it paused, and the stall has found that the checkpoint has it.
#[test]
fn a_stall_that_comes_while_it_goes_on_has_it_paused_again() {
    let place = place();
    let mut saving = Saving::begin(&place.vm, None);
    saving.pause().unwrap();
    let vm = place.vm.clone();
    let starve = move || vm.notice(Notice::Starved("full".to_owned()));
    lock(&place.machine.0).meanwhile = Some(Box::new(starve));
    saving.resume().unwrap();
    assert!(!place.runs() && place.hold().is_stalled(), "{:?}", place.hold());
    place.vm.notice(Notice::Relieved);
    assert!(place.runs());
}

#[test]
fn a_guest_that_sleeps_when_it_is_to_be_paused_is_not_told_to_go_on() {
    let place = place();
    lock(&place.machine.0).sleeps = true;
    let mut saving = Saving::begin(&place.vm, None);
    saving.pause().unwrap_err();
    saving.resume().unwrap();
    assert_eq!((lock(&place.machine.0).resumed, place.hold()), (0, Hold::Free));
}

#[test]
fn a_machine_that_is_kept_is_waited_for_no_longer_than_that() {
    let place = place();
    let kept = place.vm.keep_machine();
    let limit = Duration::from_millis(50);
    assert!(place.vm.machine_within(limit, |machine| machine.pause()).is_none());
    drop(kept);
    assert!(place.vm.machine_within(limit, |machine| machine.pause()).is_some_and(|paused| paused.is_ok()));
    assert!(!place.runs());
}
