//! Requests that look at all of memory, in steps.
//!
//! A VM of 1 TiB has 268 million pages: to look at all of them takes the engine's thread from a tenth of a second (its
//! own table) to ten seconds (the kernel's page tables), in which no fault would be served. So such a request is a
//! *walk*: as long as [`Core::is_walking`], the driver hands in one [`Event::Step`](super::Event::Step) a turn of its
//! loop, and serves the faults that have come meanwhile in between. Walks are done one after the other, in the order in
//! which they were asked for, but that a scan for dirty pages and a discard go first; the answer comes behind the last
//! step.
//!
//! What a walk finds is as old as the step that found it. For dirty pages that is enough: a page that is written behind
//! its step is found by the next walk, because the same step has protected it again. Heat and maps are hints.
//!
//! Memory is protected where somebody has asked for it, and only there a scan looks: elsewhere it would find every page
//! written, and protect it. When the last subscriber ends, what is protected is given free in steps, too, or each
//! page's next write would cost the guest a fault of which nobody wants to know.
//!
//! A discard reads as zeros *from its answer on*. Until then each of its pages is as it was, or zeros: a page that is
//! touched before its step is served with what it has, and dropped with the others; one that is touched behind its step
//! is new. Nothing is dropped behind the answer, or what the guest writes then would be lost.
//!
//! Steps are also what evictions are looked at in ([`Core::step_evictions`]), and what samples go back in.

use std::vec::IntoIter;

use super::Core;
use super::event::{Action, Response, Ticket};
use super::state::walks::{Task, WalkStep};
use crate::api::{DirtyPages, SubscriberId};
use crate::error::CommandError;
use crate::table::{PageState, PageTable, REGION_BLOCKS};
use crate::units::{BLOCK_PAGES, PageNo, Run};

const SUBSCRIPTION_ENDED: CommandError = CommandError::NotNow("this subscription to dirty pages has ended");
/// Heat that a page gains when a scan finds it written.
const HEAT_DIRTIED: u8 = 16;
/// Heat of a page of which nothing is known but that it is in RAM, where others had to leave; and how much more those
/// have of which something is, so that they stay above also when a migration halves it.
const HEAT_RESIDENT: u8 = 1;
const HEAT_ABOVE_RESIDENT: u8 = 3;

/// The pages from `from` on at which the kernel looks in one step.
pub(super) fn kernel_part(table: &PageTable, from: PageNo, most: WalkStep) -> Run {
    let (mut at, mut present, mut blocks) = (from, 0, 0);
    while at.0 < table.pages() && present < most.present && blocks < most.blocks {
        if let Some(next) = table.skip_empty_region(at.block()) {
            (at, blocks) = (PageNo(next as u64 * u64::from(BLOCK_PAGES)), blocks + REGION_BLOCKS);
        } else {
            present += u32::from(table.resident_in_block(at.block()));
            (at, blocks) = (at.next_block(), blocks + 1);
        }
    }
    Run::new(from, (at.0.min(table.pages()) - from.0) as u32)
}

impl Core {
    /// Whether [`Event::Step`](super::Event::Step) is to be handed in.
    pub fn is_walking(&self) -> bool {
        self.walks.any()
            || self.evictions.due() > 0
            || self.sampler.is_ending()
            || self.origin.looks
            || self.dirty.is_ending()
    }

    pub(super) fn heat_map(&mut self, ticket: Ticket) {
        self.walks.begin(
            ticket,
            Task::Heat(Vec::with_capacity(self.table.pages() as usize)),
            self.table.pages(),
        );
    }

    pub(super) fn map_of(&mut self, ticket: Ticket, states: &'static [PageState]) {
        self.walks.begin(ticket, Task::Map(states, Vec::new()), self.table.pages());
    }

    pub(super) fn subscribe_dirty(&mut self, ticket: Ticket, runs: Vec<Run>) {
        self.walks.begin(ticket, Task::SubscribeDirty(runs), self.table.pages());
    }

    pub(super) fn track_dirty(&mut self, ticket: Ticket, id: SubscriberId, runs: Vec<Run>) {
        let task = Task::Track { id, rest: self.whole_blocks(runs), joins: false };
        self.walks.begin_next(ticket, task, PageNo(0), PageNo(0));
    }

    fn joining(&self, id: SubscriberId, runs: Vec<Run>) -> Task {
        Task::Track { id, rest: self.whole_blocks(runs), joins: true }
    }

    /// Protection is noted by the block.
    fn whole_blocks(&self, mut runs: Vec<Run>) -> IntoIter<Run> {
        runs.retain(|run| run.len > 0);
        for run in &mut runs {
            let start = PageNo::first_of(run.start.block());
            let end = run.end().0.next_multiple_of(BLOCK_PAGES.into()).min(self.table.pages());
            *run = Run::new(start, (end - start.0) as u32);
        }
        runs.into_iter()
    }

    pub(super) fn collect_dirty(&mut self, ticket: Ticket, id: SubscriberId) {
        let task = Task::CollectDirty(id, DirtyPages::default());
        self.walks.begin_next(ticket, task, PageNo(0), PageNo(self.table.pages()));
    }

    /// At once: of walks for that subscriber, those under way find nothing more.
    pub(super) fn unsubscribe_dirty(&mut self, id: SubscriberId) -> Response {
        if self.dirty.unsubscribe(id) {
            self.begin_collapse(true);
        }
        Response::Done
    }

    /// What a target is told of a page. Where others had to leave, a page in RAM is a little warm though nothing may be
    /// known of it: it is used, or was of late, and pages that never leave never fault. Placed in the store, the first
    /// touch of them would read it.
    fn heat_to_tell(&self, page: PageNo, others_left: bool) -> u8 {
        match self.table.heat(page) {
            0 if others_left && self.table.state(page) == PageState::Resident => HEAT_RESIDENT,
            heat @ 1.. if others_left => heat.saturating_add(HEAT_ABOVE_RESIDENT),
            heat => heat,
        }
    }

    /// The next part of something that is done in parts. Of one thing only: what an eviction has just started on its
    /// way must be in staging before a discard drops it.
    pub(super) fn step(&mut self) {
        if self.sampler.is_ending() {
            self.put_samples_back();
        } else if self.walks.any() {
            self.step_walk();
        } else if self.dirty.is_ending() {
            self.end_tracking();
        } else {
            self.step_evictions();
        }
    }

    /// The next blocks that nobody wants to know of any more.
    fn end_tracking(&mut self) {
        if let Some(from) = self.dirty.next_ending() {
            let part = kernel_part(&self.table, from, self.config.walk);
            let ended = self.dirty.take_ending(part);
            self.actions.extend(ended.into_iter().map(|run| Action::EndTracking { run }));
        }
    }

    /// What the next step drops of memory that the guest has given back: for the drivers' checks.
    pub fn next_discard(&self) -> Option<(Ticket, Run)> {
        let first = self.walks.first().filter(|_| !self.sampler.is_ending());
        let walk = first.filter(|walk| matches!(walk.task, Task::Discard))?;
        let rest = Run::new(walk.next, (walk.end.0 - walk.next.0) as u32);
        Some((walk.ticket, self.discard_part(rest))).filter(|(_, part)| part.len > 0)
    }

    /// One step of the walk that is under way, or its answer.
    fn step_walk(&mut self) {
        let Some(mut walk) = self.walks.take() else { return };
        if let Task::Track { rest, .. } = &mut walk.task
            && walk.next == walk.end
            && let Some(run) = rest.next()
        {
            (walk.next, walk.end) = (run.start, run.end());
        }
        let (pages, rest) = (self.table.pages(), (walk.end.0 - walk.next.0).min(u64::from(u32::MAX)));
        if rest == 0 {
            if mutant!(AnswersDiscardEarly) && matches!(walk.task, Task::Discard) {
                return;
            }
            let response = match walk.task {
                Task::Heat(heat) => Response::Heat(heat),
                Task::Map(_, runs) => Response::Runs(runs),
                Task::CollectDirty(_, mut told) => {
                    // Of a step, what was scanned came behind what was not.
                    told.seen.sort_unstable_by_key(|run| run.start);
                    told.departed.sort_unstable_by_key(|run| run.start);
                    Response::Dirty(told)
                }
                Task::Track { id, joins: true, .. } => Response::Subscribed(id),
                Task::Discard | Task::Track { .. } => Response::Done,
                Task::SubscribeDirty(_) | Task::PutSamplesBack(..) => {
                    unreachable!("it goes on as another task")
                }
                Task::TakeHeat { found, first, .. } => match self.heat_taken(found, first) {
                    Ok(response) => response,
                    Err(error) => return self.answer(walk.ticket, Err(error)),
                },
            };
            return self.answer(walk.ticket, Ok(response));
        }
        let in_table = Run::new(walk.next, self.config.walk.table.min(rest) as u32);
        walk.next = match &mut walk.task {
            Task::Heat(heat) => {
                let others_left = !self.frames.cover_memory() && self.table.count(PageState::Stored) > 0;
                heat.extend(in_table.pages().map(|page| self.heat_to_tell(page, others_left)));
                in_table.end()
            }
            Task::Map(states, runs) => {
                for page in in_table.pages().filter(|page| states.contains(&self.table.state(*page))) {
                    match runs.last_mut() {
                        Some(run) if run.end() == page && run.len < u32::MAX => run.len += 1,
                        _ => runs.push(Run::one(page)),
                    }
                }
                in_table.end()
            }
            Task::SubscribeDirty(runs) => {
                let (first, runs) = (!self.dirty.is_on(), std::mem::take(runs));
                // From here on, so that no page leaves unseen before it is protected.
                let id = self.dirty.subscribe(pages);
                if first {
                    walk.task = Task::PutSamplesBack(id, runs);
                } else {
                    (walk.task, walk.end) = (self.joining(id, runs), walk.next);
                }
                walk.next
            }
            Task::PutSamplesBack(id, runs) => {
                if !self.put_samples_back() {
                    (walk.task, walk.end) = (self.joining(*id, std::mem::take(runs)), walk.next);
                }
                walk.next
            }
            Task::Track { id, .. } if !self.dirty.has(*id) => {
                return self.answer(walk.ticket, Err(SUBSCRIPTION_ENDED));
            }
            Task::Track { .. } => {
                let run = kernel_part(&self.table, walk.next, self.config.walk);
                let run = run.part(0, u64::from(run.len).min(rest) as u32);
                let protect = self.dirty.track(run);
                self.actions.extend(protect.into_iter().map(|run| Action::ArmTracking { run }));
                run.end()
            }
            Task::CollectDirty(id, _) if !self.dirty.has(*id) => {
                return self.answer(walk.ticket, Err(SUBSCRIPTION_ENDED));
            }
            Task::Discard => {
                let part = self.discard_part(Run::new(walk.next, rest as u32));
                self.discard(part);
                part.end()
            }
            Task::TakeHeat { heat, found, .. } => {
                *found += self.take_heat(in_table, &heat[in_table.indices()]);
                in_table.end()
            }
            Task::CollectDirty(id, told) => {
                let run = kernel_part(&self.table, walk.next, self.config.walk);
                let (scans, rest) = self.dirty.tracked_in(run);
                self.actions.extend(scans.into_iter().map(|run| Action::ScanDirty { run }));
                // Pages have left there, too.
                rest.into_iter().for_each(|run| self.dirty.collect(*id, run, told));
                run.end()
            }
        };
        self.walks.put(walk);
    }

    /// What a scan of the last step has found in its run.
    pub(super) fn scanned(&mut self, run: Run, dirty: &[Run]) {
        dirty.iter().flat_map(|run| run.pages()).for_each(|page| self.table.warm(page, HEAT_DIRTIED));
        self.dirty.scanned(dirty);
        let Some((id, told)) = self.walks.scanned() else {
            unreachable!("{run:?} was scanned for a walk, which is the first one until its last step");
        };
        self.dirty.collect(id, run, told);
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<Response, CommandError>) {
        self.actions.push_back(Action::Answer { ticket, answer });
    }
}
