//! Sampling: which resident pages are in use, while memory is plentiful and nothing faults by itself.
//!
//! Each tick a few short runs are moved to staging. One that the guest touches comes back by a rescue and is hot;
//! the others are put back after some ticks. The cost is one rescue a hot run.
//!
//! A sample costs the same whether or not the VM is idle, so its pace follows what is found: a *credit* that each run
//! taken uses up and each run touched renews. A VM that uses more than 1/64 of what it has is sampled at full pace;
//! one that uses nothing, rarely, until the first touch of a sample.
//!
//! A huge page is moved whole, for to take a run out of it would take it to pieces. It is out for a shorter time: of so many
//! pages, one is touched sooner.

use std::collections::VecDeque;

use crate::policy::clock::may_leave;
use crate::table::PageTable;
use crate::units::{BLOCK_PAGES, PageNo, Run};

/// Pages sampled of a 2 MiB block at a time; they stand for the block.
pub const SAMPLE_PAGES: u32 = 16;
/// Runs taken a tick.
pub const SAMPLES_A_TICK: usize = 8;
/// Ticks after which an untouched sample is put back.
pub const SAMPLE_TICKS: u64 = 10;
/// The same of a huge page.
const HUGE_TICKS: u64 = 2;
/// Ticks between samples of a VM that seems idle.
const INTERVAL_IDLE: u64 = 16;
/// Runs taken at full pace for each that was touched.
const CREDIT_A_TOUCH: usize = 64;
/// Runs taken at full pace without any touch, at least: one of each block of the first GiB.
const CREDIT_MAX: usize = 512;

const _: () = assert!(INTERVAL_IDLE >= SAMPLE_TICKS, "no sample stays out while the next ones are taken");

/// Which runs are out, and which block is next.
#[derive(Debug)]
pub struct Sampler {
    next_block: usize,
    pass: u32,
    /// With the tick at which each is put back.
    out: VecDeque<(u64, Run)>,
    credit: usize,
}

impl Default for Sampler {
    fn default() -> Self {
        Sampler { next_block: 0, pass: 0, out: VecDeque::new(), credit: CREDIT_MAX }
    }
}

impl Sampler {
    /// Ticks until the next samples are due.
    pub fn interval(&self) -> u64 {
        if self.credit > 0 { 1 } else { INTERVAL_IDLE }
    }

    /// The guest missed a sample: it is at work.
    pub fn touched(&mut self) {
        self.credit = (self.credit + CREDIT_A_TOUCH).min(CREDIT_MAX);
    }

    /// Whether any samples may be out.
    pub fn is_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// Runs to move out at this tick, of these `room` at most that are whole huge pages; without it, huge pages are no different.
    pub fn choose(&mut self, table: &PageTable, tick: u64, mut room: Option<u32>, samples: &mut Vec<Run>) {
        let blocks = table.pages().div_ceil(u64::from(BLOCK_PAGES)) as usize;
        let mut looked_at = 0;
        let before = samples.len();
        // Empty blocks are stepped over, but not without end.
        while samples.len() - before < SAMPLES_A_TICK && looked_at < SAMPLES_A_TICK * 64 && looked_at < blocks
        {
            looked_at += 1;
            if let Some(next) = table.skip_empty_region(self.next_block) {
                self.go_to(next, blocks);
                continue;
            }
            let block = table.block_of(PageNo(self.next_block as u64 * u64::from(BLOCK_PAGES)));
            if let Some(room) = &mut room
                && table.is_huge(self.next_block)
            {
                if *room == 0 {
                    break;
                }
                if block.pages().all(|page| may_leave(table, page)) {
                    *room -= 1;
                    samples.push(block);
                    self.out.push_back((tick + HUGE_TICKS, block));
                }
            } else if table.resident_in_block(self.next_block) > 0 {
                let at = (self.pass * SAMPLE_PAGES * 7) % BLOCK_PAGES;
                let run =
                    block.part(at.min(block.len - 1), SAMPLE_PAGES.min(block.len - at.min(block.len - 1)));
                let whole = run.pages().take_while(|page| may_leave(table, *page)).count() as u32;
                if whole > 0 {
                    let run = run.part(0, whole);
                    samples.push(run);
                    self.out.push_back((tick + SAMPLE_TICKS, run));
                }
            }
            self.go_to(self.next_block + 1, blocks);
        }
        self.credit = self.credit.saturating_sub(samples.len() - before).min(blocks);
        if samples.len() == before {
            self.credit = 0;
        }
    }

    fn go_to(&mut self, block: usize, blocks: usize) {
        self.next_block = block;
        if block >= blocks {
            self.next_block = 0;
            self.pass += 1;
        }
    }

    /// The next run that has been out for long enough, or any if `all`.
    pub fn overdue(&mut self, tick: u64, all: bool) -> Option<Run> {
        let (due, run) = *self.out.front()?;
        if !all && tick < due {
            return None;
        }
        self.out.pop_front();
        Some(run)
    }

    /// The run that `page` was sampled with.
    pub fn run_of(&self, page: PageNo) -> Option<Run> {
        self.out.iter().map(|(_, run)| *run).find(|run| run.contains(page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Flag;
    use crate::table::PageState::{Arriving, Resident};

    #[test]
    fn samples_walk_through_all_blocks_and_come_back_due() {
        let mut table = PageTable::new(4096);
        for page in (0..4096).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        sampler.choose(&table, 0, None, &mut samples);
        assert_eq!(samples.len(), 8);
        assert!(sampler.overdue(SAMPLE_TICKS - 1, false).is_none());
        assert_eq!(sampler.overdue(SAMPLE_TICKS, false), Some(samples[0]));
        assert_eq!(sampler.run_of(samples[1].start.plus(3)), Some(samples[1]));
        samples.clear();
        sampler.choose(&table, 1, None, &mut samples);
        assert_eq!(samples[0].start, PageNo(112), "another part of each block at the next pass");
    }

    #[test]
    fn a_huge_page_is_sampled_whole_and_waits_for_room() {
        let mut table = PageTable::new(4096);
        for page in (0..4096).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        (1..3).for_each(|block| table.set_huge(block, true));
        table.put(PageNo(1023), Flag::Held, true);
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        sampler.choose(&table, 0, Some(1), &mut samples);
        let block = Run::new(PageNo(1024), BLOCK_PAGES);
        assert_eq!(samples[..2], [Run::new(PageNo(0), SAMPLE_PAGES), block], "the held one is left out");
        assert_eq!(samples.len(), 7);
        samples.clear();
        (0..2).for_each(|tick| sampler.choose(&table, tick, Some(0), &mut samples));
        assert_eq!(samples, [Run::new(PageNo(112), SAMPLE_PAGES)], "it stops before the first one");
        sampler.choose(&table, 2, Some(1), &mut samples);
        assert_eq!(samples[1], block);
    }

    #[test]
    fn the_pace_follows_the_touches() {
        let mut table = PageTable::new(1 << 18);
        for page in (0..1 << 18).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut sampler = Sampler::default();
        let pass = |sampler: &mut Sampler, touch_every: usize| {
            let (mut samples, mut full_pace) = (vec![], 0);
            for nth in 0..512 / SAMPLES_A_TICK {
                full_pace += usize::from(sampler.interval() == 1);
                sampler.choose(&table, nth as u64, None, &mut samples);
                if nth % touch_every == touch_every - 1 {
                    sampler.touched();
                }
            }
            full_pace
        };
        assert_eq!(pass(&mut sampler, usize::MAX), 64, "one pass to find out");
        assert_eq!(pass(&mut sampler, usize::MAX), 0, "idle");
        pass(&mut sampler, 8);
        assert_eq!(pass(&mut sampler, 8), 64, "one run in 64 is in use");
        assert_eq!(pass(&mut sampler, 64), 8, "one run in 512 is in use");
    }
}
