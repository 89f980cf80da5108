//! The source's end of a migration: written pages, holds, heat.

use super::Core;
use super::event::{Action, Response, Ticket};
use crate::api::{Piece, Place, Written};
use crate::error::CommandError;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, runs_of};

/// Heat that a page gains when a scan finds it written.
const HEAT_WRITTEN: u8 = 16;

impl Core {
    pub(super) fn track_writes(&mut self, on: bool) -> Response {
        // A sample that comes back would look as if it had been written.
        self.end_sampling();
        if on {
            let words = self.table.pages().div_ceil(64) as usize;
            self.left_while_tracked = Some(vec![0; words]);
            self.actions.push_back(Action::ArmTracking);
        } else {
            self.left_while_tracked = None;
            self.begin_collapse(true);
        }
        Response::Done
    }

    /// The page's frame leaves the guest, and its write protection is lost with it: it may have been written.
    pub(super) fn mark_left(&mut self, page: PageNo) {
        if let Some(bits) = &mut self.left_while_tracked {
            bits[page.index() / 64] |= 1 << (page.index() % 64);
        }
    }

    pub(super) fn collect_written(&mut self, ticket: Ticket) -> Option<Result<Response, CommandError>> {
        if self.left_while_tracked.is_none() {
            return Some(Err(CommandError::NotNow("writes are not tracked")));
        }
        self.actions.push_back(Action::ScanWritten { ticket });
        None
    }

    pub(super) fn written(&mut self, ticket: Ticket, runs: &[Run]) {
        for page in runs.iter().flat_map(|run| run.pages()) {
            self.table.warm(page, HEAT_WRITTEN);
            if let Some(bits) = &mut self.left_while_tracked {
                bits[page.index() / 64] &= !(1 << (page.index() % 64));
            }
        }
        let mut left = Vec::new();
        if let Some(bits) = &mut self.left_while_tracked {
            let pages = bits.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(at, word)| {
                let first = at as u64 * 64;
                (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| PageNo(first + bit))
            });
            left.extend(runs_of(pages, u32::MAX));
            bits.fill(0);
        }
        let written = Written { seen: runs.to_vec(), left };
        self.actions.push_back(Action::Answer { ticket, answer: Ok(Response::Written(written)) });
    }

    pub(super) fn hold(&mut self, run: Run) -> Response {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut rescued = Vec::new();
        for page in run.pages() {
            let place = match self.table.state(page) {
                PageState::Untouched => Place::Zero,
                PageState::Resident => Place::Memory,
                PageState::Stored => Place::Stored,
                PageState::Poisoned => Place::Poisoned,
                PageState::Arriving => Place::Moving,
                PageState::Leaving if mutant!(HoldsLeavingAsStored) => Place::Stored,
                // Nobody waits for a write, nor reads what is at hand: a VM that moves may stand still meanwhile.
                PageState::Leaving | PageState::Standby => Place::Staged,
                // It is in use, as likely as not.
                PageState::Sampled => {
                    self.split_sample(page);
                    self.table.set(page, PageState::Arriving);
                    rescued.push((page, self.slots_of[&page]));
                    Place::Moving
                }
            };
            self.table.put(page, Flag::Held, true);
            match pieces.last_mut() {
                Some(piece) if piece.place == place => piece.run.len += 1,
                _ => pieces.push(Piece { run: Run::one(page), place }),
            }
        }
        self.move_in(rescued);
        Response::Pieces(pieces)
    }

    /// Pages in staging with their content: those that leave or have left, the write under way or not.
    pub(super) fn staged(
        &mut self,
        ticket: Ticket,
        pages: Vec<PageNo>,
    ) -> Option<Result<Response, CommandError>> {
        if let Some(error) = pages.iter().find_map(|page| self.checked(Run::one(*page)).err()) {
            return Some(Err(error));
        }
        let is_there = |page: &PageNo| match self.table.state(*page) {
            PageState::Leaving | PageState::Standby => true,
            PageState::Arriving => mutant!(CopiesWhatArrives),
            _ => false,
        };
        let pages = pages.into_iter().filter(is_there).map(|page| (page, self.slots_of[&page])).collect();
        self.actions.push_back(Action::CopyOut { ticket, pages });
        None
    }

    pub(super) fn release(&mut self, run: Run) -> Response {
        run.pages().for_each(|page| self.table.put(page, Flag::Held, false));
        Response::Done
    }

    pub(super) fn heat_map(&self) -> Response {
        Response::Heat((0..self.table.pages()).map(|page| self.table.heat(PageNo(page))).collect())
    }
}
