//! Neighbour prefetch: streams with markers, and a careful window for everything else.
//!
//! A *stream* is a row of faults at a constant step, up or down. It owns a frontier, up to which pages were asked for.
//! The first page of each window that it asks for is a *marker*: it is read like the others but stays in
//! staging, so that the guest's arrival there is seen (a rescue, no I/O) and the next window starts before
//! the guest runs out of this one. Windows double while the guest follows (the idea of Linux' PG_readahead
//! marker, `mm/readahead.c`). What is in the guest already is stepped over and does not count.
//!
//! A step of a few pages is taken up at its second fault, a longer one when three faults have it. A fault off the
//! step's grid makes the grid finer (their greatest common divisor), down to every page.
//!
//! A fault that belongs to no stream brings a few neighbours, which wait in staging to prove themselves.
//! How many follows from how many of the last ones were used.

use std::collections::VecDeque;

use crate::units::{PageNo, Run};

/// First window of a stream, in pages.
pub const WINDOW_MIN: u32 = 8;
/// Largest window: 1 MiB.
pub const WINDOW_MAX: u32 = 256;
/// Largest window of a stream that leaves pages out: each of its pages is a read of its own, and two windows keep any
/// SSD busy.
pub const WINDOW_STRIDE_MAX: u32 = 64;
/// Largest window while lone faults wait at the same device: 96 KiB, or they would stand behind megabytes.
pub const WINDOW_POLITE_MAX: u32 = 24;
/// Windows kept ahead of the guest: one that it is about to use, one that comes.
const AHEAD: usize = 2;
/// A window reaches over so many pages at most, to step over those that are in the guest.
pub const SPAN_MAX: u64 = 8192;
/// A stream is active if one of so many last faults was its.
const ACTIVE: u64 = 32;
/// Streams claim nothing of a smaller budget: that of the smallest VM.
const CLAIM_MIN: u64 = 4096;
/// Streams that have had none of so many last faults do not count as being there.
const SIDE_BY_SIDE: u64 = 256;
/// The last fault counts for one in so many in the share of lone ones.
const LONE_WEIGHT: u32 = 64;
/// Streams followed at once; the least recently used one is forgotten.
pub const STREAMS: usize = 16;
/// Neighbours of a lone fault at most: 32 KiB with the page itself, as Linux' page-cluster 3.
pub const SOLO_MAX: u32 = 7;
/// Faults remembered for finding new streams.
const RECENT: usize = 16;
/// So many faults and markers later they do not count any more.
const RECENT_AGE: u64 = 64;
/// Two faults this close are a stream.
const NEAR: u64 = 8;
/// Three faults at the same distance are a stream up to this one: 2 MiB.
const STEP_MAX: u64 = 512;
/// Pages rescued at once, of a row that the guest walks along.
const RESCUE_ROW_MAX: u32 = 64;
/// Every so often neighbours are tried even if they were useless lately.
const PROBE_EVERY: u32 = 256;

#[derive(Clone, Debug)]
struct Stream {
    /// Pages from one touch to the next; below zero for a stream that goes down.
    step: i64,
    /// Next page to ask for; may lie beyond either end of memory.
    frontier: i64,
    window: u32,
    /// Where the guest was last seen.
    at: PageNo,
    /// Windows asked for and not passed by the guest.
    asked: VecDeque<Window>,
    last_used: u64,
    /// As in [`Proof`], since it was last asked for.
    passed: (u32, u32),
}

#[derive(Clone, Copy, Debug)]
struct Window {
    span: Run,
    marker: PageNo,
    /// Pages of the span that had to be brought.
    count: u32,
}

/// What to bring in beside the faulting page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Ascending, whatever the direction.
    pub run: Run,
    /// Every so many pages of the run, from its first; the others are left out.
    pub step: u32,
    /// The page to leave in staging. None: all of them wait there.
    pub marker: Option<PageNo>,
}

impl Plan {
    /// The pages to bring, in ascending order. Those that are in RAM already are among them.
    pub fn pages(&self) -> impl Iterator<Item = PageNo> {
        self.run.pages().step_by(self.step as usize)
    }
}

/// What a fault happens in.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// Whether a page would have to be brought.
    pub stored: &'a dyn Fn(PageNo) -> bool,
    /// Frames that prefetching may have under way, of all streams together.
    pub frames: u32,
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Surroundings {{ frames: {} }}", self.frames)
    }
}

/// Verdict on pages that were prefetched before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Proof {
    /// Pages that the guest has used since the last verdict.
    pub used: u32,
    /// Pages that the guest will not use: their stream was forgotten.
    pub wasted: u32,
    /// Pages that streams went over to find the next ones to bring, and those of them that were in RAM.
    pub passed: (u32, u32),
}

/// All that prefetching remembers of one VM.
#[derive(Debug)]
pub struct Prefetcher {
    streams: Vec<Stream>,
    /// The last faults outside of streams, and when they were.
    recent: VecDeque<(PageNo, u64)>,
    clock: u64,
    /// Moving share of faults that belong to no stream, of SCORE_MAX.
    outside_share: u32,
    /// Moving share of neighbours used, of SCORE_MAX.
    score: u32,
    pages: u64,
    /// Whether pages are read ahead at all.
    on: bool,
    /// The page behind the last rescue, and how many pages that one was to take.
    rescue_row: (PageNo, u32),
}

/// All neighbours used.
const SCORE_MAX: u32 = 1 << 16;
/// The last neighbour counts for one in so many.
const SCORE_WEIGHT: u32 = 64;
/// Below this share of neighbours used none is brought: a neighbour costs a tenth of the fault that it saves.
const SCORE_LOW: u32 = SCORE_MAX / 8;
/// From this share on all are.
const SCORE_HIGH: u32 = SCORE_MAX / 3;
const SCORE_START: u32 = SCORE_HIGH;

impl Prefetcher {
    /// For a memory of so many pages. Nothing is known of them, so the first lone faults bring all their neighbours.
    pub fn new(pages: u64) -> Self {
        Prefetcher {
            streams: Vec::with_capacity(STREAMS),
            recent: VecDeque::with_capacity(RECENT + 1),
            clock: 0,
            outside_share: 0,
            score: SCORE_START,
            pages,
            on: true,
            rescue_row: (PageNo(0), 1),
        }
    }

    /// Whether pages are to be read ahead.
    pub fn turn(&mut self, on: bool) {
        self.on = on;
    }

    /// Whether they are.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Pages to rescue at once from this one on. A guest that walks through standby would fault at every page: it gets
    /// twice as many at each step.
    pub fn rescues_at(&self, page: PageNo) -> u32 {
        let (next, last) = self.rescue_row;
        if page == next { (last * 2).min(RESCUE_ROW_MAX) } else { 1 }
    }

    /// Of the pages before this one, the last ones are rescued; so many were wanted.
    pub fn rescued(&mut self, behind: PageNo, wanted: u32) {
        self.rescue_row = (behind, wanted);
    }

    /// A vCPU faulted on `page` and waits, or touched a marker. Appends what to bring in to `plans`.
    pub fn on_fault(&mut self, page: PageNo, around: Surroundings<'_>, plans: &mut Vec<Plan>) -> Proof {
        self.clock += 1;
        let active =
            self.streams.iter().filter(|stream| self.clock - stream.last_used < ACTIVE).count() as u32;
        let largest = (around.frames / active.max(1) / (AHEAD as u32 + 2)).clamp(WINDOW_MIN, WINDOW_MAX);
        let largest = if self.shares_device() { largest.min(WINDOW_POLITE_MAX) } else { largest };
        self.outside_share -= self.outside_share / LONE_WEIGHT;
        if let Some(at) = self.streams.iter().position(|stream| stream.covers(page)) {
            let (clock, pages) = (self.clock, self.pages);
            let stream = &mut self.streams[at];
            stream.last_used = clock;
            stream.window = stream.window.min(largest);
            let used = stream.follow(page, pages, largest, around.stored, plans);
            return Proof { used, passed: std::mem::take(&mut stream.passed), ..Proof::default() };
        }
        let step = self.step_to(page);
        self.recent.push_back((page, self.clock));
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        match step {
            Some(step) => self.start(step, page, around.stored, plans),
            None => {
                // A guest that runs ahead of its stream is not another one.
                if !self.streams.iter().any(|stream| stream.is_beside(page, SPAN_MAX)) {
                    self.outside_share += SCORE_MAX / LONE_WEIGHT;
                }
                plans.extend(self.solo(page));
                Proof::default()
            }
        }
    }

    /// Whether streams and lone faults come side by side.
    pub fn shares_device(&self) -> bool {
        let alive = self.streams.iter().any(|stream| self.clock - stream.last_used < SIDE_BY_SIDE);
        alive && self.outside_share > SCORE_MAX / 16
    }

    /// Whether a stream that is alive gets to the page soon; of a budget of so many frames, all streams together claim
    /// half at most.
    pub fn is_ahead(&self, page: PageNo, budget: u64) -> bool {
        // Of a handful of frames the rest would go round so fast that a page could leave before it is touched.
        let reach = if budget < CLAIM_MIN { 0 } else { (budget / (2 * STREAMS as u64)).min(SPAN_MAX) };
        let alive = |stream: &&Stream| self.clock - stream.last_used < SIDE_BY_SIDE;
        self.streams.iter().filter(alive).any(|stream| stream.is_beside(page, reach))
    }

    /// The step with which `page` continues faults remembered. Old ones belong to another walk of the guest.
    fn step_to(&self, page: PageNo) -> Option<i64> {
        let young = self.recent.iter().filter(|(_, when)| self.clock - when <= RECENT_AGE);
        let pages = young.map(|(last, _)| last.0 as i64).filter(|last| *last != page.0 as i64);
        let mut steps = pages.clone().map(|last| page.0 as i64 - last);
        let third = |step: i64| pages.clone().any(|last| last == page.0 as i64 - 2 * step);
        let near = steps.clone().find(|step| step.unsigned_abs() <= NEAR);
        near.or_else(|| steps.find(|step| step.unsigned_abs() <= STEP_MAX && third(*step)))
    }

    /// Cancels the part of the plan that found no frame, which begins at `from`. Plans are read in ascending order: an
    /// ascending stream keeps the pages before `from` and goes on there; a descending one keeps nothing, because the
    /// pages nearest to the guest were to come last. The stream asks for the rest again when the guest gets there.
    pub fn withdraw(&mut self, plan: &Plan, from: PageNo) {
        let Some(marker) = plan.marker else { return };
        let owner = |stream: &&mut Stream| stream.asked.iter().any(|window| window.marker == marker);
        let Some(stream) = self.streams.iter_mut().find(owner) else { return };
        while stream.asked.back().is_some_and(|window| window.marker != marker) {
            stream.asked.pop_back();
        }
        let window = stream.asked.back_mut().expect("it has the marker");
        if stream.step > 0 && from > marker {
            window.span.len = (from.0 - window.span.start.0) as u32;
            window.count = window.count.min(window.span.len);
            stream.frontier = from.0 as i64;
        } else {
            let first = if stream.step > 0 { plan.run.start } else { PageNo(plan.run.end().0 - 1) };
            stream.frontier = first.0 as i64;
            stream.asked.pop_back();
        }
        stream.window = (stream.window / 2).max(WINDOW_MIN);
    }

    /// A neighbour of a lone fault was touched, or thrown away untouched.
    pub fn judge_neighbour(&mut self, used: bool) {
        self.score -= self.score.div_ceil(SCORE_WEIGHT);
        self.score += if used { SCORE_MAX / SCORE_WEIGHT } else { 0 };
    }

    fn start(
        &mut self,
        step: i64,
        page: PageNo,
        stored: &dyn Fn(PageNo) -> bool,
        plans: &mut Vec<Plan>,
    ) -> Proof {
        let mut proof = Proof::default();
        if self.streams.len() == STREAMS {
            let oldest =
                (0..STREAMS).min_by_key(|at| self.streams[*at].last_used).expect("there are streams");
            proof.wasted = self.streams.swap_remove(oldest).asked.iter().map(|window| window.count).sum();
        }
        let frontier = page.0 as i64 + step;
        let asked = VecDeque::with_capacity(AHEAD + 2);
        let window = WINDOW_MIN;
        let mut stream =
            Stream { step, frontier, window, at: page, asked, last_used: self.clock, passed: (0, 0) };
        plans.extend(stream.ask(self.pages, stored));
        self.streams.push(stream);
        proof
    }

    fn solo(&self, page: PageNo) -> Option<Plan> {
        let probe = self.clock.is_multiple_of(u64::from(PROBE_EVERY));
        let trust = self.score.clamp(SCORE_LOW, SCORE_HIGH) - SCORE_LOW;
        let want = if probe { SOLO_MAX } else { SOLO_MAX * trust / (SCORE_HIGH - SCORE_LOW) };
        let start = page.plus(1);
        let len = u64::from(want).min(self.pages.saturating_sub(start.0)) as u32;
        (len > 0).then_some(Plan { run: Run::new(start, len), step: 1, marker: None })
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Stream {
    /// How far ahead of `from` the page is, in the stream's direction.
    fn ahead(&self, from: i64, page: PageNo) -> i64 {
        (page.0 as i64 - from) * self.step.signum()
    }

    /// Whether a fault at `page` is the guest following this stream: at a marker, at the frontier, or close to where it
    /// was. Not anywhere in between, or faults at random would keep streams alive that nobody follows.
    fn covers(&self, page: PageNo) -> bool {
        let near = |from: i64| {
            let ahead = self.ahead(from, page);
            (0..=NEAR as i64).contains(&ahead) || ahead == self.step.abs() || ahead == 2 * self.step.abs()
        };
        self.asked.iter().any(|window| window.marker == page) || near(self.frontier) || near(self.at.0 as i64)
    }

    /// Whether the page is within so many of where this stream's guest was last seen, on its way.
    fn is_beside(&self, page: PageNo, reach: u64) -> bool {
        (0..reach as i64).contains(&self.ahead(self.at.0 as i64, page))
    }

    /// The guest is at `page`: windows behind it have been used, and new ones are asked for. Returns the pages used.
    fn follow(
        &mut self,
        page: PageNo,
        pages: u64,
        largest: u32,
        stored: &dyn Fn(PageNo) -> bool,
        plans: &mut Vec<Plan>,
    ) -> u32 {
        let mut used = 0;
        let off = page.0.abs_diff(self.at.0);
        self.at = page;
        if !off.is_multiple_of(self.step.unsigned_abs()) {
            self.step = greatest_common_divisor(self.step.unsigned_abs(), off) as i64 * self.step.signum();
            // As at its start: it has to prove itself again.
            self.asked.clear();
            self.window = WINDOW_MIN;
            self.frontier = page.0 as i64 + self.step;
            plans.extend(self.ask(pages, stored));
            return 0;
        }
        while let Some(Window { span, count, .. }) = self.asked.front() {
            let passed = if self.step > 0 { span.end() <= page } else { span.start > page };
            if !passed {
                break;
            }
            used += count;
            self.asked.pop_front();
        }
        if self.ahead(self.frontier, page) >= 0 {
            self.frontier = page.0 as i64 + self.step;
        }
        if used > 0 {
            let largest = if self.step.abs() == 1 { largest } else { largest.min(WINDOW_STRIDE_MAX) };
            self.window = (self.window * 2).min(largest);
        }
        // The guest is in the first one, if it is in any.
        let inside = usize::from(self.asked.front().is_some_and(|window| window.span.contains(page)));
        while self.asked.len() < AHEAD + inside {
            match self.ask(pages, stored) {
                Some(plan) => plans.push(plan),
                None => break,
            }
        }
        used
    }

    /// The next window: reaches over a window's worth of stored pages, or as far as it may.
    fn ask(&mut self, pages: u64, stored: &dyn Fn(PageNo) -> bool) -> Option<Plan> {
        let (mut count, mut marker) = (0, None);
        let mut span: Option<(PageNo, PageNo)> = None;
        while count < self.window && (0..pages as i64).contains(&self.frontier) {
            let page = PageNo(self.frontier as u64);
            let (first, last) = span.map_or((page, page), |(first, last)| (first.min(page), last.max(page)));
            if last.0 - first.0 >= SPAN_MAX {
                break;
            }
            span = Some((first, last));
            self.frontier += self.step;
            self.passed.0 += 1;
            if stored(page) {
                count += 1;
                marker = marker.or(Some(page));
            } else {
                self.passed.1 += 1;
            }
        }
        let (marker, (first, last)) = (marker?, span?);
        let run = Run::new(first, (last.0 - first.0 + 1) as u32);
        self.asked.push_back(Window { span: run, marker, count });
        Some(Plan { run, step: self.step.unsigned_abs() as u32, marker: Some(marker) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fault(prefetcher: &mut Prefetcher, page: u64) -> (Vec<Plan>, Proof) {
        let mut plans = vec![];
        let around = Surroundings { stored: &|_| true, frames: 2048 };
        let proof = prefetcher.on_fault(PageNo(page), around, &mut plans);
        (plans, proof)
    }

    /// The guest goes up page by page; it faults on what was not brought, and on markers.
    fn walk(prefetcher: &mut Prefetcher, pages: impl Iterator<Item = u64>) -> (u32, usize) {
        let mut brought = std::collections::HashMap::new();
        let mut misses = 0;
        for page in pages {
            let marker = match brought.get(&page) {
                Some(marker) => *marker,
                None => {
                    misses += 1;
                    true
                }
            };
            if marker {
                for plan in fault(prefetcher, page).0 {
                    for page in plan.pages() {
                        brought.insert(page.0, plan.marker.is_none_or(|marker| marker == page));
                    }
                }
            }
        }
        (misses, brought.len())
    }

    #[test]
    fn a_sequential_walk_misses_at_its_start_only() {
        assert!(walk(&mut Prefetcher::new(100_000), 500..60_000).0 <= 3);
        assert!(walk(&mut Prefetcher::new(100_000), (500..60_000).rev()).0 <= 12);
    }

    /// A stream that goes up from page 100 by the step, of which the first window has been asked for.
    fn stream(step: i64) -> Stream {
        let (frontier, asked) = (100 + step, VecDeque::new());
        let mut stream = Stream {
            step,
            frontier,
            window: WINDOW_MIN,
            at: PageNo(100),
            asked,
            last_used: 0,
            passed: (0, 0),
        };
        stream.ask(100_000, &|_| true).expect("a window");
        stream
    }

    #[test]
    fn which_faults_are_a_streams() {
        // (what, step, page, whether it is)
        let cases = [
            ("where it was seen last", 1, 100, true),
            ("its first marker", 1, 101, true),
            ("near behind where it was", 1, 108, true),
            ("its frontier", 1, 109, true),
            ("near behind its frontier", 1, 117, true),
            ("far ahead", 1, 118, false),
            ("before it", 1, 99, false),
            ("one step on", 20, 120, true),
            ("two steps on", 20, 140, true),
            ("within its windows, near nothing", 20, 190, false),
            ("its frontier, by steps", 20, 280, true),
            ("one step down", -20, 80, true),
            ("up again", -20, 120, false),
        ];
        for (what, step, page, is) in cases {
            assert_eq!(stream(step).covers(PageNo(page)), is, "{what}");
        }
    }

    #[test]
    fn what_a_stream_does_when_the_guest_is_seen() {
        // (what, step, page, pages used, step and window from then on, where the next window begins if one is asked
        // for)
        let cases = [
            ("at its marker: the next window comes", 1, 101, 0, (1, 8), Some(109)),
            ("behind its window: that was used, and windows double", 1, 109, 8, (1, 16), Some(110)),
            ("off its grid: a finer one, and it begins anew", 20, 108, 0, (4, 8), Some(112)),
        ];
        for (what, step, page, used, becomes, begins) in cases {
            let (mut stream, mut plans) = (stream(step), vec![]);
            assert_eq!(
                stream.follow(PageNo(page), 100_000, WINDOW_MAX, &|_| true, &mut plans),
                used,
                "{what}"
            );
            assert_eq!((stream.step, stream.window), becomes, "{what}");
            assert_eq!(plans.first().map(|plan| plan.run.start.0), begins, "{what}");
        }
    }

    #[test]
    fn what_is_in_the_guest_is_stepped_over() {
        let mut prefetcher = Prefetcher::new(100_000);
        // Every other 1000 pages are in the guest.
        let stored = |page: PageNo| (page.0 / 1000).is_multiple_of(2);
        let around = Surroundings { stored: &stored, frames: 2048 };
        let mut plans = vec![];
        prefetcher.on_fault(PageNo(980), around, &mut plans);
        prefetcher.on_fault(PageNo(981), around, &mut plans);
        let first = plans.last().unwrap().marker.unwrap();
        plans.clear();
        prefetcher.on_fault(first, around, &mut plans);
        let far = plans.iter().find_map(|plan| plan.run.pages().find(|page| page.0 >= 2000));
        assert!(far.is_some(), "the stream goes on behind what is in the guest: {plans:?}");
    }

    #[test]
    fn what_found_no_frame_is_asked_for_again() {
        let mut prefetcher = Prefetcher::new(100_000);
        fault(&mut prefetcher, 10);
        let plan = fault(&mut prefetcher, 11).0[0];
        assert_eq!(plan.run, Run::new(PageNo(12), WINDOW_MIN));
        prefetcher.withdraw(&plan, PageNo(15));
        let again = fault(&mut prefetcher, 15).0;
        assert_eq!(again[0].run.start, PageNo(16), "{again:?}");
        // Nothing of a window came: all of it is asked for again.
        let next = *again.last().unwrap();
        prefetcher.withdraw(&next, next.run.start);
        let anew = fault(&mut prefetcher, next.run.start.0).0;
        assert_eq!(anew[0].run.start, next.run.start.plus(1), "{anew:?}");
    }

    #[test]
    fn a_strided_walk_brings_its_own_pages_only() {
        for step in [2, 3, 8, 17, 100, 512] {
            let mut prefetcher = Prefetcher::new(1 << 20);
            (0..500).for_each(|_| prefetcher.judge_neighbour(false));
            let (misses, brought) = walk(&mut prefetcher, (7..1 << 20).step_by(step));
            assert!(misses <= 5, "{misses} misses with a step of {step}");
            assert!(brought <= (1 << 20) / step, "{brought} pages brought with a step of {step}");
            let all: Vec<u64> = (0..1 << 20).step_by(step).collect();
            let (misses, _) = walk(&mut Prefetcher::new(1 << 20), all.into_iter().rev());
            assert!(misses <= 12, "{misses} misses with a step of -{step}");
        }
    }

    #[test]
    fn a_fault_off_the_grid_makes_it_finer() {
        let mut prefetcher = Prefetcher::new(100_000);
        fault(&mut prefetcher, 100);
        assert_eq!(fault(&mut prefetcher, 106).0[0].step, 6);
        assert_eq!(fault(&mut prefetcher, 110).0[0].step, 2);
        let plan = fault(&mut prefetcher, 111).0[0];
        assert_eq!((plan.step, plan.run.start), (1, PageNo(112)));
    }

    #[test]
    fn two_walks_at_once_are_two_streams() {
        let both = (0..20_000).flat_map(|step| [1000 + step, 90_000 - step]);
        assert!(walk(&mut Prefetcher::new(100_000), both).0 <= 15);
    }

    #[test]
    fn faults_at_random_keep_no_stream_alive() {
        let mut prefetcher = Prefetcher::new(100_000);
        (0..500).for_each(|_| prefetcher.judge_neighbour(false));
        let mut page = 1u64;
        let brought: u32 = (0..20_000)
            .map(|_| {
                page = page.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                fault(&mut prefetcher, (page >> 33) % 100_000).0.iter().map(|plan| plan.run.len).sum::<u32>()
            })
            .sum();
        // The probes for neighbours, and pairs that are close by chance.
        assert!(brought < 20_000 / 4, "{brought} pages brought for 20 000 faults at random");
    }

    #[test]
    fn useless_neighbours_end() {
        let mut prefetcher = Prefetcher::new(1 << 20);
        (0..500).for_each(|_| prefetcher.judge_neighbour(false));
        let brought: usize =
            (1..64).map(|step| fault(&mut prefetcher, step * 7919 % (1 << 20)).0.len()).sum();
        assert_eq!(brought, 0);
        (0..100).for_each(|_| prefetcher.judge_neighbour(true));
        assert_eq!(fault(&mut prefetcher, 777_777).0[0].run.len, SOLO_MAX);
    }

    #[test]
    fn the_window_grows_to_its_maximum() {
        let mut prefetcher = Prefetcher::new(100_000);
        fault(&mut prefetcher, 10);
        let mut next = fault(&mut prefetcher, 11).0[0].marker.unwrap();
        let mut largest = 0;
        for _ in 0..12 {
            let plans = fault(&mut prefetcher, next.0).0;
            largest = plans.iter().map(|plan| plan.run.len).max().unwrap_or(largest);
            next = plans.last().map_or(next.plus(1), |plan| plan.marker.unwrap());
        }
        assert_eq!(largest, WINDOW_MAX);
    }

    proptest! {
        #[test]
        fn plans_stay_within_memory(faults in prop::collection::vec(0u64..600, 1..300)) {
            let mut prefetcher = Prefetcher::new(600);
            for page in faults {
                for plan in fault(&mut prefetcher, page).0 {
                    prop_assert!(plan.run.len > 0 && plan.run.end().0 <= 600 && plan.step > 0);
                    prop_assert!(plan.marker.is_none_or(|marker| plan.run.contains(marker)));
                }
            }
        }
    }
}
