//! A restored VM's pages on their way from the checkpoint: what it needs first, then all of it, while it runs.
//!
//! ```text
//!   Fetching: into RAM, in the order known or by heat ──▶ TakingHome: to its store, at a rate ──▶ Done
//!                                                    │     ▲ room │ none left
//!                                                    │     └──────▼
//!                                                    └──▶ Kept (--keep-origin)
//! ```
//! A page that stays in the checkpoint leaves RAM without a write for as long as it does not change. So the room of the
//! store is for what the VM changes: pages are taken home only while there is more than the VM itself may have to
//! write. Else a VM that could run from the checkpoint for ever would be starved by the copy of it.
//!
//! All of it gives way: to the VM's own faults, to other programs that are short of memory, to a migration of the VM.
//! Meanwhile the order in which pages come in is recorded for the next restore, if this is the first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use checkpoint::restore::{Hold, Image, order};
use migrate::limits::scaled_for_tests;
use serde::{Deserialize, Serialize};
use swapd::units::bytes_of;
use swapd::{CommandError, EngineHandle, IoErrorKind, PendingAnswer, Run, Stats};
use tracing::{info, warn};

use crate::control::protocol::{RestorePhase, State};
use crate::failure::{Failure, FailureKind};
use crate::halt::Halted;
use crate::hold::Whereabouts;
use crate::host;
use crate::size::Size;
use crate::vm::Vm;

mod recording;

use recording::Recording;

/// Parts of up to 2 MiB that the engine is asked to bring ahead of any touch, at a time: as many as keep the device
/// busy where they are small.
const FETCHES: usize = 16;
/// So many such parts are brought from one look at what frames are left to the next.
const LOOK_AT_FRAMES: u32 = 4;
/// Pages that are taken home at once: with one such piece under way, a fault never waits for more than that.
const HOME_PAGES: u32 = 256;
/// Between two such pieces while the guest waits for pages itself: it has the device for itself for so long.
const GIVE_WAY: Duration = Duration::from_millis(10);
/// Until it is looked again whether a VM that migrates, or a host that is short of memory, has room for this.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// So often in a row nothing is taken home until `stat` says that something is wrong with what is left.
const STUCK: u32 = 6;
/// Between two attempts from then on, if what is left is damaged or the store takes nothing.
const STUCK_AGAIN: Duration = Duration::from_secs(10);
/// The same, if the VM is only busy.
const BUSY_AGAIN: Duration = Duration::from_secs(2);
/// Until a store without room is looked at again. Twice as long each time, if it is full though its file system says
/// that there is room: others want it as well, or there is a quota.
const ROOM_AGAIN: Duration = Duration::from_secs(60);
const ROOM_AGAIN_MAX: Duration = Duration::from_secs(3600);
/// Between two looks at the host's memory.
const LOOK_AT_HOST: Duration = Duration::from_millis(100);
/// The host is short of memory if less of it than one part in so many is free.
const FREE_PART: u64 = 32;
/// How a VM is to begin from a checkpoint.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RestoreOptions {
    /// It is to stand still, whatever it did when it was saved.
    pub paused: bool,
    /// It runs when all of its memory is here, not at once.
    pub eager: bool,
    /// Bytes a second that are taken home at most.
    pub rate: Option<u64>,
    /// Pages stay in the checkpoint for as long as they do not change.
    pub keep_origin: bool,
    /// Frames are taken before it runs, for memory that has no content.
    pub prealloc: bool,
}

/// Why work on the origin ended early.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// The VM is to end.
    Halted,
    /// The engine does not do it.
    Engine(CommandError),
}

impl From<Halted> for Stopped {
    fn from(_: Halted) -> Stopped {
        Stopped::Halted
    }
}

impl Stopped {
    pub(crate) fn failure(self, vm: &Vm) -> Failure {
        match self {
            Stopped::Halted => stopped(vm),
            Stopped::Engine(error) => error.into(),
        }
    }
}

/// Somebody ended the VM before it ran.
pub(crate) fn stopped(vm: &Vm) -> Failure {
    Failure::new(FailureKind::Interrupted, format!("{:?} was stopped before it was restored", vm.facts.name))
}

/// The work that a restored VM leaves behind it.
#[derive(Debug)]
pub(crate) struct Homing {
    vm: Arc<Vm>,
    engine: EngineHandle,
    image: Image,
    hold: Hold,
    options: RestoreOptions,
    recording: Option<Recording>,
    looked_at_host: Option<Instant>,
    fetched_pages: u64,
    /// All that is to come ahead of any touch has come.
    fetched: bool,
    /// How often in a row nothing could be taken home.
    stuck: u32,
    /// Meanwhile, a page could not be read, or was not what had been saved.
    damaged: bool,
    room_again: Duration,
}

/// What came of an attempt to take pages home.
#[derive(Debug)]
enum Taken {
    /// So many pages are in the checkpoint still.
    Left(u64),
    /// The store has no room for more than what the VM itself may have to write.
    NoRoom(String),
}

/// Shows it in `stat`.
pub(crate) fn note(vm: &Vm, phase: RestorePhase, waits: Option<String>) {
    vm.locked(|state| {
        if let Some(stat) = &mut state.restore {
            (stat.phase, stat.waits) = (phase, waits);
        }
    });
}

impl Homing {
    pub(crate) fn new(
        vm: Arc<Vm>,
        engine: EngineHandle,
        image: Image,
        hold: Hold,
        options: RestoreOptions,
    ) -> Homing {
        Homing {
            vm,
            engine,
            image,
            hold,
            options,
            recording: None,
            looked_at_host: None,
            fetched_pages: 0,
            fetched: false,
            stuck: 0,
            damaged: false,
            room_again: ROOM_AGAIN,
        }
    }

    /// Brings all of it, before the guest runs: what is known to be needed first, then the rest, into RAM as long as
    /// there are frames, and to the VM's store what has none.
    pub(crate) fn bring_all(&mut self) -> Result<(), Stopped> {
        note(&self.vm, RestorePhase::Fetching, None);
        let budget = self.budget_pages()?;
        let everything = order(&self.image, budget).into_iter().chain(self.image.stored_runs());
        self.fetch_all(everything.collect(), |_| Ok(()))?;
        let stats = self.stats()?;
        if stats.stored_bytes > 0 && !self.options.keep_origin {
            note(&self.vm, RestorePhase::TakingHome, None);
            let mut left = u64::MAX;
            // Neither damaged pages nor the store's state keep the VM from running.
            while left > 0 && self.stuck < STUCK {
                match self.take_some_home(left)? {
                    Taken::Left(now) => left = now,
                    Taken::NoRoom(why) => {
                        note(&self.vm, RestorePhase::Kept, Some(why));
                        break;
                    }
                }
            }
            if left > 0 {
                let left = Size(self.stats()?.origin_bytes);
                warn!(vm = %self.vm.facts.name, "it runs though {left:#} of its memory are in the checkpoint still: see `vmemd stat`");
            }
        }
        Ok(())
    }

    /// Takes frames from the host for memory without content, if that is wanted: as many as will be left when what is
    /// in the checkpoint has come.
    pub(crate) fn prealloc(&mut self) -> Result<(), Stopped> {
        if !self.options.prealloc {
            return Ok(());
        }
        let stats = self.stats()?;
        let to_come = if self.options.eager { 0 } else { stats.stored_bytes };
        let free = stats.ram_budget_bytes.saturating_sub(stats.frames_bytes).saturating_sub(to_come);
        let mut left = free >> swapd::PAGE_SHIFT;
        let mut asked: VecDeque<PendingAnswer<()>> = VecDeque::with_capacity(FETCHES);
        let runs: Vec<Run> = self.image.empty_runs().collect();
        for run in runs.into_iter().flat_map(Run::blocks) {
            if left == 0 {
                break;
            }
            if asked.len() == FETCHES
                && let Some(oldest) = asked.pop_front()
            {
                self.filled(oldest)?;
            }
            let run = run.part(0, u64::from(run.len).min(left) as u32);
            left -= u64::from(run.len);
            asked.push_back(self.engine.fill_async(run));
        }
        asked.into_iter().try_for_each(|answer| self.filled(answer))
    }

    fn filled(&self, answer: PendingAnswer<()>) -> Result<(), Stopped> {
        match self.answer(answer) {
            // Behind a region of a QEMU whose length is not of whole blocks are pages that nobody has.
            Ok(()) | Err(Stopped::Engine(CommandError::OutOfRange(_))) => Ok(()),
            Err(stopped) => Err(stopped),
        }
    }

    /// While the VM runs.
    pub(crate) fn run(mut self) {
        self.begin_recording();
        let ended = self.fetch_first().and_then(|()| self.take_home()).and_then(|()| self.end_recording());
        // Whoever records next is not to find this one under way.
        self.stop_recording();
        match ended {
            Ok(()) => {}
            Err(Stopped::Halted | Stopped::Engine(CommandError::Gone)) => {}
            Err(Stopped::Engine(error)) => {
                warn!(vm = %self.vm.facts.name, %error, "its pages stay in the checkpoint");
                note(&self.vm, RestorePhase::Kept, Some(error.to_string()));
            }
        }
    }

    fn answer<T>(&self, answer: PendingAnswer<T>) -> Result<T, Stopped> {
        self.vm.halt.answer(answer)?.map_err(Stopped::Engine)
    }

    fn stats(&self) -> Result<Stats, Stopped> {
        // Answered at once, whatever the store does.
        self.engine.stats().map_err(Stopped::Engine)
    }

    fn budget_pages(&self) -> Result<u64, Stopped> {
        let stats = self.stats()?;
        Ok(stats.ram_budget_bytes >> swapd::PAGE_SHIFT)
    }

    /// The working set, as far as it is known. Ends when frames are scarce: from then on the guest's own touches
    /// decide what stays.
    fn fetch_first(&mut self) -> Result<(), Stopped> {
        if self.options.eager {
            self.fetched = true;
            self.forget_image();
            return Ok(());
        }
        note(&self.vm, RestorePhase::Fetching, None);
        let runs = order(&self.image, self.budget_pages()?);
        self.fetch_all(runs, |homing| {
            homing.give_way(RestorePhase::Fetching)?;
            homing.look_at_faults()
        })?;
        info!(vm = %self.vm.facts.name, fetched = %Size(bytes_of(self.fetched_pages)), "its working set, as far as it is known, is here or on its way");
        self.fetched = true;
        self.forget_image();
        Ok(())
    }

    /// Brings runs ahead of any touch, in this order; `before` is called before each. Ends early when frames are
    /// scarce.
    fn fetch_all(
        &mut self,
        runs: Vec<Run>,
        mut before: impl FnMut(&mut Homing) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        let mut parts = runs.into_iter().flat_map(Run::blocks);
        // The engine does one at a time, as many pages of it as a fault may stand behind: the next one waits there
        // already, so that the device is never idle.
        let mut asked: VecDeque<(Run, PendingAnswer<u64>)> = VecDeque::with_capacity(FETCHES);
        let mut done = 0;
        loop {
            while asked.len() < FETCHES
                && let Some(part) = parts.next()
            {
                before(self)?;
                asked.push_back((part, self.engine.fetch_origin_async(part)));
            }
            let Some((part, answer)) = asked.pop_front() else { return Ok(()) };
            let pages = self.answer(answer)?;
            self.note_fetched(pages);
            if pages > 0 && pages < u64::from(part.len) {
                // While a vCPU waits, the engine brings less than a part at a time.
                asked.push_front((part, self.engine.fetch_origin_async(part)));
                continue;
            }
            if let Some(recording) = &mut self.recording {
                recording.came(&self.image, part);
            }
            done += 1;
            if done % LOOK_AT_FRAMES == 0 && self.is_short_of_frames()? {
                return Ok(());
            }
        }
    }

    /// Gives its map back, 9 bytes for each page with content, if nobody needs it any more.
    fn forget_image(&mut self) {
        if self.fetched && self.recording.is_none() {
            self.image = Image::nothing();
        }
    }

    fn note_fetched(&mut self, pages: u64) {
        self.fetched_pages += pages;
        let fetched_bytes = bytes_of(self.fetched_pages);
        self.vm.locked(|state| {
            if let Some(stat) = &mut state.restore {
                stat.fetched_bytes = fetched_bytes;
            }
        });
    }

    /// Less than a sixteenth of the budget is left: what is brought now would push out what came before.
    fn is_short_of_frames(&self) -> Result<bool, Stopped> {
        let stats = self.stats()?;
        Ok(stats.frames_bytes + stats.ram_budget_bytes / 16 >= stats.ram_budget_bytes)
    }

    /// Moves what is at the origin to the VM's store, at the rate, until nothing is left there.
    fn take_home(&mut self) -> Result<(), Stopped> {
        let name = self.vm.facts.name.clone();
        if self.options.keep_origin {
            note(&self.vm, RestorePhase::Kept, None);
            return Ok(());
        }
        note(&self.vm, RestorePhase::TakingHome, None);
        let (mut left, mut faults) = (u64::MAX, None);
        while left > 0 {
            self.give_way(RestorePhase::TakingHome)?;
            self.look_at_faults()?;
            let began = Instant::now();
            match self.take_some_home(left)? {
                Taken::Left(now) => left = now,
                Taken::NoRoom(why) => {
                    self.wait_for_room(why)?;
                    continue;
                }
            }
            let now = self.stats()?.faults.store;
            let waits = faults.replace(now).is_some_and(|before| now > before);
            let paced = self.options.rate.map_or(Duration::ZERO, |rate| pace(HOME_PAGES, rate));
            let rest =
                paced.saturating_sub(began.elapsed()).max(if waits { GIVE_WAY } else { Duration::ZERO });
            self.vm.halt.pause(rest)?;
        }
        self.hold.let_go();
        // Else its disk would have its room back only when the VM ends.
        if let Err(Stopped::Engine(error)) = self.answer(self.engine.close_origin_async()) {
            warn!(vm = %name, %error, "the checkpoint's files stay open");
        }
        note(&self.vm, RestorePhase::Done, None);
        info!(vm = %name, "all of its memory is its own: the checkpoint is not needed any more");
        Ok(())
    }

    /// Takes a piece home, when so many pages are left at the origin.
    fn take_some_home(&mut self, before: u64) -> Result<Taken, Stopped> {
        let stats = self.stats()?;
        if let Some(why) = self.no_room(&stats) {
            return Ok(Taken::NoRoom(why));
        }
        let bad = bad_reads(&stats);
        match self.answer(self.engine.take_home_async(HOME_PAGES)) {
            Ok(left) if left == 0 || left < before => {
                if self.stuck > 0 {
                    note(&self.vm, RestorePhase::TakingHome, None);
                }
                (self.stuck, self.damaged, self.room_again) = (0, false, ROOM_AGAIN);
                Ok(Taken::Left(left))
            }
            Ok(left) => {
                self.damaged |= bad_reads(&self.stats()?) > bad;
                let silent = self.vm.locked(|state| state.hold.stall_reason());
                let why = match (self.damaged, silent) {
                    (true, _) => format!(
                        "{left} pages cannot be read in the checkpoint now: they are read again, and lost if that fails when they are touched"
                    ),
                    (false, Some(why)) => why,
                    (false, None) => format!(
                        "{left} pages cannot be moved at this moment: the VM needs all of its RAM, or they are in motion; it is tried again"
                    ),
                };
                self.is_stuck(why, self.damaged)?;
                Ok(Taken::Left(left))
            }
            Err(Stopped::Engine(CommandError::Store(error))) if error.kind == IoErrorKind::Full => {
                Ok(Taken::NoRoom(error.to_string()))
            }
            Err(Stopped::Engine(CommandError::Store(why))) => {
                self.is_stuck(why.to_string(), true)?;
                Ok(Taken::Left(before))
            }
            Err(stopped) => Err(stopped),
        }
    }

    /// Nothing could be taken home once more: says so in `stat` if that goes on, and waits. A `defect` is told in the
    /// log, too.
    fn is_stuck(&mut self, why: String, defect: bool) -> Result<(), Stopped> {
        self.stuck = self.stuck.saturating_add(1);
        if self.stuck == STUCK && defect {
            warn!(vm = %self.vm.facts.name, "{why}");
        }
        if self.stuck >= STUCK {
            note(&self.vm, RestorePhase::TakingHome, Some(why));
        }
        let again = match defect {
            _ if self.stuck < STUCK => LOOK_AGAIN,
            true => STUCK_AGAIN,
            false => BUSY_AGAIN,
        };
        Ok(self.vm.halt.pause(again)?)
    }

    /// Why nothing may be taken home now, if the store has no room for it beside what the VM may have to write.
    fn no_room(&self, stats: &Stats) -> Option<String> {
        let free = self.engine.store_free_bytes()?;
        let needed = room_needed(stats);
        let (free_size, needed_size) = (Size(free), Size(needed));
        (free < needed).then(|| {
            format!(
                "the store has {free_size:#} left, and {needed_size:#} may be needed for what the VM changes: pages stay in the \
                 checkpoint until there is more"
            )
        })
    }

    /// The VM can do without: its pages stay where they are until there is room.
    fn wait_for_room(&mut self, why: String) -> Result<(), Stopped> {
        warn!(vm = %self.vm.facts.name, "{why}");
        note(&self.vm, RestorePhase::Kept, Some(why));
        loop {
            let again = Instant::now() + scaled_for_tests(self.room_again);
            while Instant::now() < again {
                let poll = self.recording.as_ref().map_or(LOOK_AGAIN, Recording::poll);
                self.vm.halt.pause(poll)?;
                self.look_at_faults()?;
            }
            if self.no_room(&self.stats()?).is_none() {
                // If it is full all the same.
                self.room_again = (self.room_again * 2).min(ROOM_AGAIN_MAX);
                note(&self.vm, RestorePhase::TakingHome, None);
                return Ok(());
            }
        }
    }

    /// Waits for as long as others come first, and says in `stat` for whom.
    fn give_way(&mut self, phase: RestorePhase) -> Result<(), Stopped> {
        let mut waited = false;
        while let Some(why) = self.comes_first() {
            note(&self.vm, phase, Some(why));
            waited = true;
            self.vm.halt.pause(LOOK_AGAIN)?;
        }
        if waited {
            note(&self.vm, phase, None);
        }
        Ok(self.vm.halt.check()?)
    }

    fn comes_first(&mut self) -> Option<String> {
        let (here, saved) = self
            .vm
            .locked(|state| (matches!(state.whereabouts, Whereabouts::Here), state.checkpoint.is_some()));
        if !here {
            return Some("the VM is on its way to another host".to_owned());
        }
        if saved {
            return Some("a checkpoint of the VM is being made".to_owned());
        }
        if self.looked_at_host.is_some_and(|then| then.elapsed() < LOOK_AT_HOST) {
            return None;
        }
        let short = short_of_memory(host::available_ram().ok()?, host::total_ram().ok()?);
        if !short {
            self.looked_at_host = Some(Instant::now());
        }
        short.then(|| "the host is short of memory".to_owned())
    }

    // ── the order of the first faults ─────────────────────────────────────────────────────

    /// Of a VM that runs, and whose checkpoint does not have it yet.
    fn begin_recording(&mut self) {
        let runs = self.vm.state().0 == State::Running;
        if !runs || self.options.eager || !self.hold.wants_first_faults() {
            return;
        }
        let Ok(budget) = self.budget_pages() else { return };
        if self.vm.recording.swap(true, Ordering::SeqCst) {
            return;
        }
        self.recording = Some(Recording::begin(&self.image, budget));
    }

    /// Takes what was recorded meanwhile. Ends the recording when it is time.
    fn look_at_faults(&mut self) -> Result<(), Stopped> {
        let Some(mut recording) = self.recording.take_if(|recording| recording.is_due()) else {
            return Ok(());
        };
        let looked = recording.look(
            &self.image,
            || self.engine.record_faults(true).map_err(Stopped::Engine),
            || self.answer(self.engine.resident_map_async()),
        );
        let over = recording.is_over();
        self.recording = Some(recording);
        looked?;
        if over {
            self.write_order();
        }
        Ok(())
    }

    /// Waits for the end of a recording when there is nothing else to do.
    fn end_recording(&mut self) -> Result<(), Stopped> {
        while let Some(recording) = &self.recording {
            let poll = recording.poll();
            self.vm.halt.pause(poll)?;
            self.look_at_faults()?;
        }
        Ok(())
    }

    fn write_order(&mut self) {
        self.stop_recording_with(|homing, recording| {
            let runs = recording.runs();
            if runs.is_empty() {
                return;
            }
            let name = &homing.vm.facts.name;
            match homing.hold.write_first_faults(homing.image.pages(), runs.to_vec()) {
                Ok(()) => info!(vm = %name, runs = runs.len(), "the checkpoint knows in which order its pages are needed"),
                Err(error) => info!(vm = %name, %error, "the order in which pages are needed is not kept"),
            }
        });
    }

    fn stop_recording(&mut self) {
        self.stop_recording_with(|_, _| {});
    }

    fn stop_recording_with(&mut self, keep: impl FnOnce(&mut Homing, &Recording)) {
        let Some(recording) = self.recording.take() else { return };
        let _ = self.engine.record_faults(false);
        self.vm.recording.store(false, Ordering::SeqCst);
        keep(self, &recording);
        self.forget_image();
    }
}

/// Whether other programs need memory more urgently than a VM that could run as it is.
fn short_of_memory(free: u64, total: u64) -> bool {
    free < total / FREE_PART
}

/// Reads that have failed, and pages that were not what had been written or saved.
fn bad_reads(stats: &Stats) -> u64 {
    stats.store.read_errors + stats.store.checksum_mismatches
}

/// Bytes that the store's file system must have for a piece to be taken home: what may be outside of RAM and has no
/// place in the store yet. A piece that is taken home is a part of that.
fn room_needed(stats: &Stats) -> u64 {
    let outside = stats.memory_bytes.saturating_sub(stats.ram_budget_bytes);
    outside.saturating_sub(stats.store.used_bytes).max(bytes_of(u64::from(HOME_PAGES)))
}

/// How long so many pages take at that rate.
fn pace(pages: u32, rate: u64) -> Duration {
    Duration::from_secs_f64(bytes_of(u64::from(pages)) as f64 / rate.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_keeps_room_for_what_the_vm_may_write() {
        let mut stats = Stats { memory_bytes: 64 << 20, ram_budget_bytes: 16 << 20, ..Stats::default() };
        assert_eq!(room_needed(&stats), 48 << 20);
        stats.store.used_bytes = 40 << 20;
        assert_eq!(room_needed(&stats), 8 << 20);
        // A VM that fits into RAM may fill the store to its end, and no further.
        stats.store.used_bytes = 60 << 20;
        assert_eq!(room_needed(&stats), 1 << 20);
    }

    #[test]
    fn a_rate_is_kept_and_a_host_without_memory_comes_first() {
        assert_eq!(pace(256, 1 << 20), Duration::from_secs(1));
        assert!(pace(256, 0) > Duration::from_secs(1000));
        assert!(short_of_memory(1 << 28, 16 << 30) && !short_of_memory(1 << 30, 16 << 30));
    }
}
