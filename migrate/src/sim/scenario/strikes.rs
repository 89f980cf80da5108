//! What goes wrong: which step of the migration a message belongs to, and what is done at it.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Duration;

use super::{PATIENCE, Story, TARGET};
use crate::session::SessionId;
use crate::sim::faults::{Fault, Later, Planned, Step};
use crate::sim::fs;
use crate::sim::net::{self, Countdown, Said};
use crate::sim::world::{ProcessId, world};
use crate::wire::record::{FLAG_LAST, RecordKind};

const REBOOT: Duration = Duration::from_secs(40);

impl Story {
    pub(super) fn heard(self: &Rc<Self>, said: Said) {
        const SESSION: u8 = 1;
        const STREAM: u8 = 2;
        const RESOLVE: u8 = 3;
        const ACCEPTED: u8 = 65;
        const RESOLVED: u8 = 67;
        let to_target = said.end.side == 0;
        let kind = |kind: RecordKind| said.kind == kind as u8;
        let step = match said.purpose {
            RESOLVE if said.kind == RESOLVE => Step::Asked,
            RESOLVE if said.kind == RESOLVED => Step::Resolved,
            STREAM if kind(RecordKind::RoundEnd) && said.flags & FLAG_LAST != 0 => Step::LastRound,
            SESSION if said.kind == SESSION => Step::Offered,
            SESSION if said.kind == ACCEPTED => Step::Accepted,
            SESSION if to_target && kind(RecordKind::Heat) => Step::HeatSent,
            SESSION if to_target && kind(RecordKind::State) => Step::StateSent,
            SESSION if to_target && kind(RecordKind::Final) => Step::FinalSent,
            SESSION if to_target && kind(RecordKind::Commit) => Step::CommitSent,
            SESSION if kind(RecordKind::HeatTaken) => Step::FirstRound,
            SESSION if kind(RecordKind::RoundDone) => Step::LaterRounds,
            SESSION if kind(RecordKind::Prepared) => Step::Prepared,
            SESSION if kind(RecordKind::Running) || kind(RecordKind::NotStarted) => Step::Answered,
            _ => return,
        };
        self.reached(step);
    }

    pub(super) fn reached(self: &Rc<Self>, step: Step) {
        if step < self.step.get() || (step == self.step.get() && step != Step::Connecting) {
            return;
        }
        self.step.set(step);
        let due: Vec<Planned> =
            self.plan.borrow_mut().extract_if(.., |planned| planned.step == step).collect();
        for Planned { later, fault, .. } in due {
            let story = self.clone();
            let strike = move || story.strike(fault);
            match later {
                Later::Now => world().after(Duration::ZERO, strike),
                Later::Time(time) => world().after(time, strike),
                Later::Bytes { side, count } => {
                    let countdown = Countdown { side, left: count, then: Box::new(strike) };
                    net::with(|net| net.countdown = Some(countdown));
                }
            }
        }
    }

    pub(super) fn receiving(&self) -> Option<(SessionId, ProcessId)> {
        let receivers = self.receivers.borrow();
        let alive = receivers.iter().filter(|(_, it)| world().is_alive(it.process));
        alive.map(|(session, it)| (*session, it.process)).max_by_key(|(_, process)| *process)
    }

    fn strike(self: &Rc<Self>, fault: Fault) {
        if self.done.get() && self.is_quiet() {
            return;
        }
        world().note(|| format!("{fault:?} at {:?}", self.step.get()));
        if let Some(class) = fault.class() {
            self.coverage.borrow_mut().fault(self.step.get(), class);
        }
        match fault {
            Fault::Cut { all } => net::cut(all),
            Fault::Silence { silent, lasts } => {
                net::silence(silent);
                world().after(lasts, || net::silence([false; 2]));
            }
            Fault::SourceDies => {
                self.killed.set(self.killed.get() || self.vm.started.get().is_none());
                world().kill(self.vm.process);
            }
            Fault::TargetDies => {
                if let Some((session, process)) = self.receiving() {
                    self.target_dies(process);
                    self.reap(session);
                }
            }
            Fault::DaemonDies => self.daemon_dies(Duration::from_secs(5)),
            Fault::HostCrashes => {
                net::crash(TARGET);
                net::silence([true; 2]);
                let alive: Vec<ProcessId> = self.receivers.borrow().values().map(|it| it.process).collect();
                alive
                    .into_iter()
                    .filter(|process| world().is_alive(*process))
                    .for_each(|process| self.target_dies(process));
                self.daemon_dies(REBOOT);
                fs::crash();
                world().after(REBOOT, || net::silence([false; 2]));
            }
            Fault::Swept => fs::sweep(),
            Fault::Fails(chore) => self.vm.failing.set(Some(chore)),
            Fault::EngineFails { source: true } => {
                self.vm.engine.fail(true);
                let engine = self.vm.engine.clone();
                world().after(PATIENCE, move || engine.fail(false));
            }
            Fault::EngineFails { source: false } => {
                self.receivers
                    .borrow()
                    .values()
                    .filter_map(|it| it.engine.as_ref())
                    .for_each(|engine| engine.fail(true));
            }
            Fault::Cancel { source: true } => self.cancel.borrow().store(true, Ordering::Relaxed),
            Fault::Cancel { source: false } => {
                self.receivers.borrow().values().for_each(|it| it.cancel.store(true, Ordering::Relaxed));
            }
            Fault::Disk { skip, count } => fs::fail(skip, count),
            Fault::Turned(kind) => self.turned.set(Some(kind)),
            Fault::Spoilt { after } => net::with(|net| net.spoil = Some(after)),
            Fault::Twice => net::with(|net| net.twice = 1),
        }
    }

    fn target_dies(&self, process: ProcessId) {
        // Its source may have given the VM up already, or be about to.
        self.killed.set(true);
        world().kill(process);
    }

    /// And is started again.
    fn daemon_dies(self: &Rc<Self>, away: Duration) {
        if let Some(daemon) = self.daemon.take() {
            for receiver in self.receivers.borrow().values() {
                let mut handed = receiver.streams.borrow_mut();
                handed.daemon = None;
                handed.waiting.take().into_iter().for_each(Waker::wake);
            }
            world().kill(daemon);
            let story = self.clone();
            world().after(away, move || story.serve());
        }
    }
}
