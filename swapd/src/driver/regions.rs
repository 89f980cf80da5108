//! Where guest memory is mapped: page numbers run on over a few regions, each of them one piece of the address space.
//!
//! A region that its owner has not mapped yet has no address, and its pages are untouched to the core. Each region
//! begins at a page number that is a multiple of a block (2 MiB), so that no block is in two regions; the page
//! numbers between the end of one region and the next belong to no memory. `mapped_parts` is the only way from a run
//! to addresses, so that no kernel call gets a range that crosses a border.

use std::sync::atomic::{AtomicUsize, Ordering};

use swapcore::units::{BLOCK_PAGES, PAGE_SIZE, PageNo, Run, pages_in};

/// Most pages of one run, where a region is told as runs: 4 TiB.
const RUN_MAX: u32 = 1 << 30;

/// Regions in the order of their pages.
#[derive(Debug)]
pub(super) struct Regions(Box<[Region]>);

#[derive(Debug)]
struct Region {
    first: PageNo,
    pages: u64,
    /// Address of the region; 0: not mapped. Only the engine's thread changes it (and before that runs, the thread
    /// that starts it); any thread reads it.
    base: AtomicUsize,
}

impl Region {
    fn base(&self) -> Option<usize> {
        match self.base.load(Ordering::Acquire) {
            0 => None,
            base => Some(base),
        }
    }

    fn address(&self, page: PageNo) -> Option<usize> {
        Some(self.base()? + ((page.0 - self.first.0) as usize) * PAGE_SIZE)
    }

    fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }

    /// First page of the next region.
    fn next(&self) -> PageNo {
        PageNo(self.first.0 + self.pages.next_multiple_of(u64::from(BLOCK_PAGES)))
    }

    /// The region's pages from the `from`th to before the `to`th.
    fn runs(&self, from: u64, to: u64) -> impl Iterator<Item = Run> + use<> {
        let first = self.first.0;
        (from..to)
            .step_by(RUN_MAX as usize)
            .map(move |nth| Run::new(PageNo(first + nth), (to - nth).min(u64::from(RUN_MAX)) as u32))
    }
}

impl Regions {
    /// Regions of such sizes, none of which is mapped yet.
    pub(super) fn new(sizes: &[u64]) -> Self {
        let mut next = PageNo(0);
        let regions = sizes.iter().map(|bytes| {
            let region = Region { first: next, pages: pages_in(*bytes), base: AtomicUsize::new(0) };
            next = region.next();
            region
        });
        Regions(regions.collect())
    }

    /// The length of a region, if there is one of that number.
    pub(super) fn len_of(&self, region: usize) -> Option<usize> {
        self.0.get(region).map(Region::bytes)
    }

    /// All pages of a region.
    pub(super) fn runs_of(&self, region: usize) -> impl Iterator<Item = Run> + use<> {
        self.0.get(region).map(|region| region.runs(0, region.pages)).into_iter().flatten()
    }

    /// All pages of guest memory.
    pub(super) fn all(&self) -> impl Iterator<Item = Run> {
        self.0.iter().flat_map(|region| region.runs(0, region.pages))
    }

    /// Bytes up to the end of the last region's last block, with the page numbers that belong to no memory.
    pub(super) fn bytes(&self) -> usize {
        self.0.last().map_or(0, |region| region.next().offset() as usize)
    }

    /// The pages of each block that is only partly in a region.
    pub(super) fn short_blocks(&self) -> Vec<Run> {
        let block = u64::from(BLOCK_PAGES);
        let short = |region: &Region| {
            let len = region.pages % block;
            (len > 0).then(|| Run::new(PageNo(region.first.0 + region.pages - len), len as u32))
        };
        self.0.iter().filter_map(short).collect()
    }

    pub(super) fn base_of(&self, region: usize) -> Option<usize> {
        self.0.get(region)?.base()
    }

    pub(super) fn are_all_mapped(&self) -> bool {
        self.0.iter().all(|region| region.base().is_some())
    }

    /// From now on the region is at `base`.
    pub(super) fn set_base(&self, region: usize, base: usize) {
        self.0[region].base.store(base, Ordering::Release);
    }

    /// The run, cut at the borders of regions, each part with its address, without those of regions that are not
    /// mapped.
    pub(super) fn mapped_parts(&self, run: Run) -> impl Iterator<Item = (Run, usize)> {
        self.0.iter().filter_map(move |region| {
            let part = common(run, region)?;
            Some((part, region.address(part.start)?))
        })
    }

    /// The page that an address of guest memory belongs to.
    pub(super) fn page_at(&self, address: usize) -> Option<PageNo> {
        self.0.iter().find_map(|region| {
            let nth = address.checked_sub(region.base()?)? / PAGE_SIZE;
            (nth < region.pages as usize).then(|| PageNo(region.first.0 + nth as u64))
        })
    }

    /// The pages that lie wholly within an address range, in ascending runs.
    pub(super) fn runs_in(&self, address: usize, len: usize) -> Vec<Run> {
        let end = address.saturating_add(len);
        let within = self.0.iter().filter_map(|region| {
            let base = region.base()?;
            let first = address.saturating_sub(base).div_ceil(PAGE_SIZE);
            let behind = (end.checked_sub(base)? / PAGE_SIZE).min(region.pages as usize);
            Some(region.runs(first as u64, behind as u64))
        });
        within.flatten().collect()
    }

    /// Whether a mapped region has an address in common with the range.
    pub(super) fn overlap(&self, base: usize, len: usize) -> bool {
        self.0
            .iter()
            .any(|region| region.base().is_some_and(|at| at < base + len && base < at + region.bytes()))
    }
}

fn common(run: Run, region: &Region) -> Option<Run> {
    let (start, end) = (run.start.max(region.first), run.end().0.min(region.first.0 + region.pages));
    (start.0 < end).then(|| Run::new(start, (end - start.0) as u32))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZES: [u64; 3] = [4 << 20, 2 << 20, 6 << 20];
    const BASES: [Option<usize>; 3] = [Some(0x70_0000_1000), None, Some(0x10_0000_3000)];
    const PAGES: u32 = 3072;

    fn regions() -> Regions {
        let regions = Regions::new(&SIZES);
        for (nth, base) in (0..).zip(BASES) {
            base.into_iter().for_each(|base| regions.set_base(nth, base));
        }
        regions
    }

    /// The answer of `mapped_parts`, found page by page in another way.
    fn address(page: PageNo) -> Option<usize> {
        let region = [0, 1024, 1536].iter().rposition(|first| page.0 >= *first).unwrap();
        Some(BASES[region]? + (page.0 as usize - [0, 1024, 1536][region]) * PAGE_SIZE)
    }

    proptest! {
        #[test]
        fn parts_cover_the_run_and_cross_no_border(start in 0..PAGES, len in 0..PAGES) {
            let run = Run::new(PageNo(u64::from(start)), len.min(PAGES - start));
            let mut found = Vec::new();
            for (part, at) in regions().mapped_parts(run) {
                found.extend(part.pages().enumerate().map(|(nth, page)| (page, at + nth * PAGE_SIZE)));
            }
            let right: Vec<_> = run.pages().filter_map(|page| Some((page, address(page)?))).collect();
            prop_assert_eq!(found, right);
        }

        #[test]
        fn whole_pages_of_a_range_are_found_and_no_others(
            region in prop_oneof![Just(0usize), Just(2)],
            skip in -20_000i64..7_000_000,
            len in 0usize..8_000_000,
        ) {
            let from = (BASES[region].unwrap() as i64 + skip) as usize;
            let found: Vec<_> = regions().runs_in(from, len).iter().flat_map(|run| run.pages()).collect();
            let inside = |page: &PageNo| {
                address(*page).is_some_and(|at| at >= from && at + PAGE_SIZE <= from + len)
            };
            let right: Vec<_> = (0..u64::from(PAGES)).map(PageNo).filter(inside).collect();
            prop_assert_eq!(found, right);
        }
    }

    #[test]
    fn regions_begin_with_a_block_of_their_own() {
        let regions = Regions::new(&[4096, 4 << 20, (2 << 20) - 4096, 5 << 20]);
        let firsts: Vec<u64> = (0..4).flat_map(|nth| regions.runs_of(nth)).map(|run| run.start.0).collect();
        assert_eq!(firsts, [0, 512, 1536, 2048]);
        let short = [(0, 1), (1536, 511), (3072, 256)].map(|(start, len)| Run::new(PageNo(start), len));
        assert_eq!(regions.short_blocks(), short);
        assert_eq!(regions.bytes(), 14 << 20);
        regions.set_base(1, 0x4000_0000);
        regions.set_base(0, 0x7000_0000);
        let all: Vec<_> = regions.mapped_parts(Run::new(PageNo(0), 3584)).collect();
        assert_eq!(all, [(Run::new(PageNo(0), 1), 0x7000_0000), (Run::new(PageNo(512), 1024), 0x4000_0000)]);
        assert_eq!((Regions::new(&SIZES).short_blocks(), Regions::new(&[]).bytes()), (vec![], 0));
    }

    #[test]
    fn addresses_belong_to_pages_only_where_memory_is_mapped() {
        let regions = regions();
        for page in (0..u64::from(PAGES)).map(PageNo) {
            if let Some(at) = address(page) {
                assert_eq!(regions.page_at(at), Some(page));
                assert_eq!(regions.page_at(at + PAGE_SIZE - 1), Some(page));
            }
        }
        let (low, high) = (BASES[2].unwrap(), BASES[0].unwrap());
        for outside in [0, low - 1, low + (6 << 20), high - 1, high + (4 << 20), usize::MAX] {
            assert_eq!(regions.page_at(outside), None, "{outside:#x}");
        }
        assert!(
            regions.overlap(low - PAGE_SIZE, 2 * PAGE_SIZE) && !regions.overlap(low - PAGE_SIZE, PAGE_SIZE)
        );
        assert!(!regions.are_all_mapped());
    }
}
