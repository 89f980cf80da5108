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
//! A discard reads as zeros *from its answer on*. Until then each of its pages is as it was, or zeros: a page that is
//! touched before its step is served with what it has, and dropped with the others; one that is touched behind its step
//! is new. Nothing is dropped behind the answer, or what the guest writes then would be lost.
//!
//! Steps are also what evictions are looked at in ([`Core::step_evictions`]), and what samples go back in.

use super::Core;
use super::event::{Action, Response, Ticket};
use super::state::walks::{Task, WalkStep};
use crate::api::{DirtyPages, SubscriberId};
use crate::error::CommandError;
use crate::table::{PageState, PageTable, REGION_BLOCKS};
use crate::units::{BLOCK_PAGES, PageNo, Run};

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
        self.walks.any() || self.evictions.due() > 0 || self.sampler.is_ending() || self.origin.looks
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

    pub(super) fn subscribe_dirty(&mut self, ticket: Ticket) {
        self.walks.begin(ticket, Task::SubscribeDirty, self.table.pages());
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
        } else {
            self.step_evictions();
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
        let (pages, rest) = (self.table.pages(), (walk.end.0 - walk.next.0).min(u64::from(u32::MAX)));
        if rest == 0 {
            if mutant!(AnswersDiscardEarly) && matches!(walk.task, Task::Discard) {
                return;
            }
            let response = match walk.task {
                Task::Heat(heat) => Response::Heat(heat),
                Task::Map(_, runs) => Response::Runs(runs),
                Task::CollectDirty(_, dirty) => Response::Dirty(dirty),
                Task::PutSamplesBack(id) | Task::Protect(id) => Response::Subscribed(id),
                Task::SubscribeDirty => unreachable!("it goes on as another task"),
                Task::Discard => Response::Done,
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
            Task::SubscribeDirty => {
                let first = !self.dirty.is_on();
                // From here on, so that no page leaves unseen before it is protected.
                walk.task = Task::PutSamplesBack(self.dirty.subscribe(pages));
                if first { walk.next } else { PageNo(pages) }
            }
            Task::PutSamplesBack(id) => {
                if !self.put_samples_back() {
                    walk.task = Task::Protect(*id);
                }
                walk.next
            }
            Task::Protect(_) => {
                let run = kernel_part(&self.table, walk.next, self.config.walk);
                self.actions.push_back(Action::ArmTracking { run });
                run.end()
            }
            Task::CollectDirty(id, _) if !self.dirty.has(*id) => {
                let ended = CommandError::NotNow("this subscription to dirty pages has ended");
                return self.answer(walk.ticket, Err(ended));
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
            Task::CollectDirty(..) => {
                let run = kernel_part(&self.table, walk.next, self.config.walk);
                self.actions.push_back(Action::ScanDirty { run });
                run.end()
            }
        };
        self.walks.put(walk);
    }

    /// What the scan of the last step has found in its run.
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
