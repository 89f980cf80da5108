//! Huge pages for memory that has come in single frames: that of a VM which has arrived, or whose budget was smaller.
//! In one go over all of it once none of it need ever leave, and in another when more has come. Memory that is touched
//! for the first time then has them from the start.

use super::Core;
use super::event::Action;
use crate::units::Run;

impl Core {
    /// `all`: writes have been tracked, which takes the mappings of huge pages to pieces.
    pub(super) fn begin_collapse(&mut self, all: bool) {
        self.collapse.begin(all, self.tick, self.counts.pages_read);
    }

    fn could_collapse(&self) -> bool {
        self.frames.cover_memory() && !self.dirty.is_on() && self.receiving.is_none()
    }

    pub(super) fn is_collapsing(&self) -> bool {
        self.collapse.is_on() && self.could_collapse()
    }

    /// The next blocks that are next to each other.
    pub(super) fn collapse(&mut self) {
        // A block of which a sample is out would be passed over.
        if !self.could_collapse() || self.collapse.is_under_way() || self.sampler.is_ending() {
            return;
        }
        let read = self.counts.pages_read;
        if self.collapse.is_due(self.tick, read) {
            // From the next tick on, with every sample back.
            self.end_sampling();
            self.collapse.begin_another(self.tick, read);
        } else if let Some(run) = self.collapse.next_blocks(&self.table) {
            self.actions.push_back(Action::Collapse { run });
        }
    }

    /// The host is told whether memory may have huge pages once every sample is back: huge ones find the way back to
    /// where they were only while it may.
    pub(super) fn tell_huge_pages(&mut self) {
        if !self.sampler.is_ending() {
            self.actions.extend(self.collapse.take_flip().map(Action::HugePages));
        }
    }

    pub(super) fn collapsed(&mut self, block: Run, huge: bool) {
        self.table.set_huge(block.start.block(), huge);
        self.collapse.ended(huge);
    }
}
