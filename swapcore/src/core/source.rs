//! The source's end of a migration: holds, and copies of what is in staging.

use super::Core;
use super::event::{Action, Response, Ticket};
use crate::api::{Piece, Place};
use crate::error::CommandError;
use crate::table::{Flag, PageState};
use crate::units::{PageNo, Run};

impl Core {
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
                    rescued.push((page, self.frames.slot(page)));
                    Place::Moving
                }
            };
            self.table.put(page, Flag::Held, true);
            let tier = if place == Place::Stored { self.tier_of(page) } else { self.home_of(page) };
            match pieces.last_mut() {
                Some(piece) if (piece.place, piece.tier) == (place, tier) => piece.run.len += 1,
                _ => pieces.push(Piece { run: Run::one(page), place, tier }),
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
        let pages = pages.into_iter().filter(is_there).map(|page| (page, self.frames.slot(page))).collect();
        self.actions.push_back(Action::CopyOut { ticket, pages });
        None
    }

    pub(super) fn release(&mut self, run: Run) -> Response {
        for page in run.pages() {
            self.table.put(page, Flag::Held, false);
            self.may_give_way(page);
        }
        Response::Done
    }
}
