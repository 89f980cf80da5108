//! The source's end of a migration: written pages, holds, heat.

use super::Core;
use super::event::{Action, Response, Ticket};
use crate::api::{Piece, Place};
use crate::error::CommandError;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run, runs_of};

/// Heat that a page gains when a scan finds it written.
const HEAT_WRITTEN: u8 = 16;

impl Core {
    pub(super) fn end_tracking(&mut self) {
        self.left_while_tracked = None;
        self.begin_collapse(true);
    }

    /// The page's frame leaves the guest, and its write protection is lost with it: it may have been written.
    pub(super) fn mark_left(&mut self, page: PageNo) {
        if let Some(bits) = &mut self.left_while_tracked {
            bits[page.index() / 64] |= 1 << (page.index() % 64);
        }
    }

    /// A scan has found pages of the run written. Returns those others of the run that have left the guest since the last scan.
    pub(super) fn note_written(&mut self, run: Run, seen: &[Run]) -> Vec<Run> {
        for page in seen.iter().flat_map(|run| run.pages()) {
            self.table.warm(page, HEAT_WRITTEN);
            if let Some(bits) = &mut self.left_while_tracked {
                bits[page.index() / 64] &= !(1 << (page.index() % 64));
            }
        }
        let Some(bits) = &mut self.left_while_tracked else { return Vec::new() };
        // Scans begin at the first page of a block, and end at another or with the memory: a word of bits is in one of them.
        let words = run.indices().start / 64..run.indices().end.div_ceil(64);
        let first_word = words.start as u64;
        let of_run = &mut bits[words];
        let pages =
            (first_word..).zip(of_run.iter()).filter(|(_, word)| **word != 0).flat_map(|(at, word)| {
                (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| PageNo(at * 64 + bit))
            });
        let left = runs_of(pages, u32::MAX).collect();
        of_run.fill(0);
        if mutant!(ForgetsLeftOfOtherSteps) {
            bits.fill(0);
        }
        left
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
}
