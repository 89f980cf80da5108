//! Sampling: which resident pages are in use, while memory is plentiful and nothing faults by itself.
//!
//! Each tick a few short runs are moved to staging. One that the guest touches comes back by a rescue and is hot;
//! the others are put back when they have been out for long: they are cold. To be out costs nothing, so that what is
//! touched once in half a minute is seen as well. The cost is one rescue a hot run.
//!
//! A sample costs the same whether or not the VM is idle, so the pace follows what is found: a *credit* that each run
//! taken uses up and each run touched renews. A VM that uses more than 1/64 of what it has is sampled at full pace;
//! one that uses nothing, the more rarely the longer that lasts, until the first touch of a sample. As many samples are
//! out then as ever: each of them stays out longer. At full pace more is taken at once as long as it is missed by
//! nobody.
//!
//! A huge page is moved whole, for to take a run out of it would take it to pieces.

use std::collections::VecDeque;

use crate::policy::clock::may_leave;
use crate::table::PageTable;
use crate::units::{BLOCK_PAGES, PageNo, Run};

/// Pages sampled of a 2 MiB block at a time; they stand for the block.
pub const SAMPLE_PAGES: u32 = 16;
/// Runs taken a tick.
pub const SAMPLES_A_TICK: usize = 8;
/// The same while at most [`QUIET_TOUCHES`] were touched since the last tick: each touch costs the guest a rescue.
const SAMPLES_QUIET: usize = 32;
const QUIET_TOUCHES: usize = 2;
/// Ticks after which an untouched sample is put back. Longer, if samples are rarer than each `IDLE_MIN`.
pub const SAMPLE_TICKS: u64 = 300;
/// The same if there is no room for others: a second.
const SAMPLE_TICKS_MIN: u64 = 10;
/// Ticks between samples of a VM that seems idle: half of the time that has passed since the last touch, within these
/// bounds. Each time costs a wake-up of the engine, and moves of eight runs out and of as many back: next to nothing is
/// to be found by them in a VM that has touched nothing of what is out.
const IDLE_MIN: u64 = 16;
const IDLE_MAX: u64 = 64;
/// Runs taken at full pace for each that was touched.
const CREDIT_A_TOUCH: usize = 64;
/// Runs taken at full pace without any touch, at least: one of each block of the first GiB.
const CREDIT_MAX: usize = 512;

/// Which runs are out, and which block is next.
#[derive(Debug)]
pub struct Sampler {
    next_block: usize,
    pass: u32,
    /// With the tick at which each was taken.
    out: VecDeque<(u64, Run)>,
    /// Pages of these that are not in whole blocks.
    single: u32,
    credit: usize,
    touches: usize,
    /// Tick up to which all touches are known, and that of the first choice behind the last of them.
    now: u64,
    quiet_since: u64,
    /// Victims counted up to the last tick: more of them mean that memory is scarce.
    victims_before: u64,
    /// All that are out go back, some at a time.
    ending: bool,
}

impl Default for Sampler {
    fn default() -> Self {
        Sampler {
            next_block: 0,
            pass: 0,
            out: VecDeque::new(),
            single: 0,
            credit: CREDIT_MAX,
            touches: 0,
            now: 0,
            quiet_since: 0,
            victims_before: 0,
            ending: false,
        }
    }
}

/// Where samples can be.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// Whether there is a place for a huge page; without it, huge pages are no different.
    pub huge: Option<&'a dyn Fn(usize) -> bool>,
    /// Single pages that may be out.
    pub single: u32,
}

impl std::fmt::Debug for Places<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Places {{ huge: {}, single: {} }}", self.huge.is_some(), self.single)
    }
}

impl Sampler {
    /// Ticks until the next samples are due.
    pub fn interval(&self) -> u64 {
        if self.credit > 0 { 1 } else { self.idle_interval() }
    }

    fn idle_interval(&self) -> u64 {
        (self.now.saturating_sub(self.quiet_since) / 2).clamp(IDLE_MIN, IDLE_MAX)
    }

    /// The guest missed a sample, which is not out any more: it is at work.
    pub fn touched(&mut self, page: PageNo) -> Option<Run> {
        self.credit = (self.credit + CREDIT_A_TOUCH).min(CREDIT_MAX);
        self.touches += 1;
        self.quiet_since = self.now;
        let at = self.out.iter().position(|(_, run)| run.contains(page))?;
        let (_, run) = self.out.remove(at)?;
        self.single -= single(run);
        Some(run)
    }

    /// None of a run chosen last could leave: it is not out, and may be chosen again.
    pub fn refused(&mut self, run: Run) {
        if let Some(at) = self.out.iter().rposition(|(_, out)| *out == run) {
            self.out.remove(at);
            self.single -= single(run);
        }
    }

    /// At a tick: so many pages have been victims by now. Whether any have been since the last tick, for then memory is
    /// scarce.
    pub fn note_victims(&mut self, victims: u64) -> bool {
        std::mem::replace(&mut self.victims_before, victims) != victims
    }

    /// Whether any samples may be out.
    pub fn is_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// From now on all go back; none is to be chosen before that has [ended](Sampler::ended).
    pub fn end(&mut self) {
        self.ending = self.is_out();
    }

    /// All are back.
    pub fn ended(&mut self) {
        self.ending = false;
    }

    /// Whether they are on their way back.
    pub fn is_ending(&self) -> bool {
        self.ending
    }

    /// Whether samples are out that are to come back at the next tick, because memory has become scarce.
    pub fn gives_way(&self, victims: u64) -> bool {
        victims != self.victims_before && self.is_out()
    }

    /// Runs to move out at this tick.
    pub fn choose(&mut self, table: &mut PageTable, tick: u64, places: Places<'_>, samples: &mut Vec<Run>) {
        let blocks = table.pages().div_ceil(u64::from(BLOCK_PAGES)) as usize;
        let mut looked_at = 0;
        let before = samples.len();
        self.now = tick;
        let quiet = std::mem::take(&mut self.touches) <= QUIET_TOUCHES && self.credit > 0;
        let most = if quiet { SAMPLES_QUIET } else { SAMPLES_A_TICK };
        // Empty blocks are stepped over, but not without end.
        while samples.len() - before < most && looked_at < SAMPLES_A_TICK * 64 && looked_at < blocks {
            looked_at += 1;
            if let Some(next) = table.skip_empty_region(self.next_block) {
                self.go_to(next, blocks);
                continue;
            }
            let block = table.block_of(PageNo(self.next_block as u64 * u64::from(BLOCK_PAGES)));
            let run = if table.resident_in_block(self.next_block) == 0 || table.is_fresh(self.next_block) {
                None
            } else if let Some(has_place) = places.huge
                && table.is_huge(self.next_block)
            {
                let whole = has_place(self.next_block) && block.pages().all(|page| may_leave(table, page));
                whole.then_some(block)
            } else if self.single + SAMPLE_PAGES > places.single {
                // It goes on here when the oldest are back.
                break;
            } else {
                let at = (self.pass * SAMPLE_PAGES * 7) % BLOCK_PAGES;
                let run =
                    block.part(at.min(block.len - 1), SAMPLE_PAGES.min(block.len - at.min(block.len - 1)));
                let whole = run.pages().take_while(|page| may_leave(table, *page)).count() as u32;
                (whole > 0).then(|| run.part(0, whole))
            };
            if let Some(run) = run {
                samples.push(run);
                self.out.push_back((tick, run));
                self.single += single(run);
            }
            self.go_to(self.next_block + 1, blocks);
        }
        let taken = (samples.len() - before).min(SAMPLES_A_TICK);
        self.credit = self.credit.saturating_sub(taken).min(blocks);
        if taken == 0 {
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

    /// The next run that has been out for long enough, or any if `all`. Sooner, if there is no room for more than so
    /// many single pages.
    pub fn overdue(&mut self, tick: u64, room: u32, all: bool) -> Option<Run> {
        if all {
            // The VM is at work, or moves.
            (self.now, self.quiet_since) = (tick, tick);
        }
        let crowded = self.single + SAMPLE_PAGES * SAMPLES_QUIET as u32 > room;
        let longest = SAMPLE_TICKS * self.idle_interval() / IDLE_MIN;
        let stay = |run: &Run| if crowded && run.len < BLOCK_PAGES { SAMPLE_TICKS_MIN } else { longest };
        // Whole blocks, which are in nobody's way, may be before the single pages that are.
        let at = self.out.iter().position(|(taken, run)| all || tick >= taken + stay(run))?;
        let (_, run) = self.out.remove(at)?;
        self.single -= single(run);
        Some(run)
    }
}

/// How many pages of the run are not in a whole block.
fn single(run: Run) -> u32 {
    if run.len < BLOCK_PAGES { run.len } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Flag;
    use crate::table::PageState::{Arriving, Resident};

    const ROOMY: Places<'_> = Places { huge: None, single: u32::MAX };

    #[test]
    fn samples_walk_through_all_blocks_and_come_back_due() {
        let mut table = PageTable::new(4096);
        for page in (0..4096).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        sampler.choose(&mut table, 0, ROOMY, &mut samples);
        assert_eq!(samples.len(), 8);
        assert!(sampler.overdue(SAMPLE_TICKS - 1, u32::MAX, false).is_none());
        assert_eq!(sampler.overdue(SAMPLE_TICKS, u32::MAX, false), Some(samples[0]));
        assert_eq!(sampler.touched(samples[1].start.plus(3)), Some(samples[1]));
        assert_eq!(sampler.touched(samples[1].start), None, "it is back");
        assert_eq!(sampler.overdue(SAMPLE_TICKS, u32::MAX, false), Some(samples[2]));
        samples.clear();
        sampler.choose(&mut table, 1, ROOMY, &mut samples);
        assert_eq!(samples[0].start, PageNo(112), "another part of each block at the next pass");
    }

    #[test]
    fn what_was_just_touched_for_the_first_time_is_left_alone_once() {
        let mut table = PageTable::new(1024);
        for page in (0..1024).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        table.set_fresh(0);
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        sampler.choose(&mut table, 0, ROOMY, &mut samples);
        assert_eq!(samples, [Run::new(PageNo(512), SAMPLE_PAGES)]);
        samples.clear();
        sampler.choose(&mut table, 1, ROOMY, &mut samples);
        assert_eq!(samples[0], Run::new(PageNo(112), SAMPLE_PAGES));
    }

    #[test]
    fn a_huge_page_is_sampled_whole_if_its_place_is_empty() {
        let mut table = PageTable::new(4096);
        for page in (0..4096).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        (1..4).for_each(|block| table.set_huge(block, true));
        table.put(PageNo(1023), Flag::Held, true);
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        let places = Places { huge: Some(&|block| block != 3), ..ROOMY };
        sampler.choose(&mut table, 0, places, &mut samples);
        let block = Run::new(PageNo(1024), BLOCK_PAGES);
        assert_eq!(samples[..2], [Run::new(PageNo(0), SAMPLE_PAGES), block], "the held one is left out");
        assert_eq!(samples[2].start, PageNo(2048), "that without a place as well");
    }

    #[test]
    fn single_pages_come_back_sooner_where_room_is_short() {
        let mut table = PageTable::new(1 << 16);
        for page in (0..1 << 16).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        let room = SAMPLE_PAGES * 40;
        let places = Places { single: room, ..ROOMY };
        (0..2).for_each(|tick| sampler.choose(&mut table, tick, places, &mut samples));
        assert_eq!(samples.len(), 40);
        assert_eq!(sampler.overdue(SAMPLE_TICKS_MIN - 1, room, false), None);
        let mut back = 0;
        while sampler.overdue(SAMPLE_TICKS_MIN, room, false).is_some() {
            back += 1;
        }
        assert_eq!(back, 32, "room for as many as may be taken next");
    }

    #[test]
    fn single_pages_come_back_though_a_huge_page_went_before_them() {
        let mut table = PageTable::new(1 << 15);
        for page in (0..1 << 15).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        table.set_huge(0, true);
        let mut sampler = Sampler::default();
        let mut samples = vec![];
        let room = SAMPLE_PAGES * 20;
        let places = Places { huge: Some(&|_| true), single: room };
        sampler.choose(&mut table, 0, places, &mut samples);
        assert_eq!((samples.len(), samples[0].len), (21, BLOCK_PAGES), "all the room there is");
        assert_eq!(sampler.overdue(SAMPLE_TICKS_MIN - 1, room, false), None);
        let back: Vec<_> = std::iter::from_fn(|| sampler.overdue(SAMPLE_TICKS_MIN, room, false)).collect();
        assert_eq!(back, samples[1..]);
        assert_eq!(sampler.overdue(SAMPLE_TICKS - 1, room, false), None);
        assert_eq!(sampler.overdue(SAMPLE_TICKS, room, false), Some(samples[0]));
    }

    #[test]
    fn an_idle_vm_is_sampled_more_and_more_rarely_and_as_many_samples_are_out() {
        let mut table = PageTable::new(1 << 18);
        for page in (0..1 << 18).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut sampler = Sampler { credit: 0, ..Sampler::default() };
        let (mut tick, mut samples) = (0, vec![]);
        let mut idle_for = |sampler: &mut Sampler, ticks: u64| {
            let (mut intervals, end) = (vec![], tick + ticks);
            while tick < end {
                intervals.push(sampler.interval());
                tick += sampler.interval();
                while sampler.overdue(tick, u32::MAX, false).is_some() {}
                sampler.choose(&mut table, tick, ROOMY, &mut samples);
            }
            (intervals, sampler.out.len() / SAMPLES_A_TICK)
        };
        let (intervals, _) = idle_for(&mut sampler, 128);
        assert_eq!(intervals, [IDLE_MIN, IDLE_MIN, IDLE_MIN, 24, 36, 54]);
        let (intervals, out) = idle_for(&mut sampler, 2000);
        assert!(intervals.iter().all(|interval| *interval == IDLE_MAX), "{intervals:?}");
        assert_eq!(out as u64, SAMPLE_TICKS.div_ceil(IDLE_MIN));
        sampler.touched(PageNo(0));
        assert_eq!(sampler.interval(), 1, "the first touch ends that");
        sampler.credit = 0;
        assert_eq!(sampler.interval(), IDLE_MIN);
        idle_for(&mut sampler, 2000);
        sampler.overdue(3000, 0, true);
        assert_eq!(sampler.interval(), IDLE_MIN, "so does all else that the VM does");
    }

    #[test]
    fn the_pace_follows_the_touches() {
        let mut table = PageTable::new(1 << 18);
        for page in (0..1 << 18).map(PageNo) {
            table.set(page, Arriving);
            table.set(page, Resident);
        }
        let mut sampler = Sampler::default();
        let mut pass = |sampler: &mut Sampler, touch_every: usize| {
            let (mut samples, mut full_pace) = (vec![], 0);
            for nth in 0..512 / SAMPLES_A_TICK {
                full_pace += usize::from(sampler.interval() == 1);
                sampler.choose(&mut table, nth as u64, ROOMY, &mut samples);
                if nth % touch_every == touch_every - 1 {
                    sampler.touched(PageNo(0));
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
