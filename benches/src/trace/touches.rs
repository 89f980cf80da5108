//! A list of touches in memory, and how one is made from jobs and from trace files.

use std::path::Path;

use swapd::{PageNo, Run};
use vmprocess::failure::{Failure, FailureKind};

use super::file::{self, Entry, Header, TraceKind, TraceWriter, What};
use super::limits::{PAGES_MAX, TOUCHES_MAX};
use crate::job::Job;
use crate::optimum::WRITE;
use crate::pattern::Pattern;

/// Touches of one VM's memory, each a page number with [`WRITE`] set or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Touches {
    /// Pages of the VM's memory.
    pub(crate) pages: u64,
    pub(crate) list: Vec<u32>,
    /// Index of the first touch that counts. Those before it are played as well.
    pub(crate) count_from: usize,
}

impl Touches {
    /// What the jobs of one VM touch, if all their threads are equally fast: each page of jobs with a prefill once,
    /// and then `count` touches after a ramp of a tenth as many.
    ///
    /// # Errors
    /// If these are more than a list can have.
    pub(crate) fn of_jobs(jobs: &[Job], memory_bytes: u64, count: u64) -> Result<Touches, Failure> {
        let page_bytes = swapd::PAGE_SIZE as u64;
        let pages = memory_bytes / page_bytes;
        if pages > PAGES_MAX {
            return Err(Failure::new(FailureKind::Usage, "a memory of more than 8T cannot be traced"));
        }
        let prefilled =
            jobs.iter().filter(|job| job.prefill).map(|job| job.size_bytes / page_bytes).sum::<u64>();
        let total = prefilled + count / 10 + count;
        if total > TOUCHES_MAX {
            let text = format!(
                "{total} touches, with those before the ones that count: at most {TOUCHES_MAX} are possible"
            );
            return Err(Failure::new(FailureKind::Usage, text));
        }
        let (mut list, mut patterns, mut start) = (Vec::with_capacity(total as usize), Vec::new(), 0);
        for job in jobs {
            let len = job.size_bytes / page_bytes;
            let area = Run::new(PageNo(start), len as u32);
            if job.prefill {
                list.extend((start..start + len).map(|page| page as u32 | WRITE));
            }
            patterns.extend((0..job.threads).map(|thread| Pattern::new(job, area, thread)));
            start += len;
        }
        let (turns, threads) = (total as usize - list.len(), patterns.len());
        let touches = (0..turns).map(|turn| patterns[turn % threads].next_touch());
        let touch = |touch: crate::pattern::Touch| touch.page as u32 | if touch.write { WRITE } else { 0 };
        list.extend(touches.map(touch));
        Ok(Touches { pages, list, count_from: (total - count) as usize })
    }

    /// The touches of a trace file, and its header. In a trace of faults each fault is a touch that writes; the pages
    /// that had content before the recording are touched first.
    ///
    /// # Errors
    /// If the file is no trace.
    pub(crate) fn load(path: &Path) -> Result<(Header, Touches), Failure> {
        let (mut list, mut born, mut was_there) = (Vec::new(), PageSet::default(), PageSet::default());
        let header = file::read(path, |entry| {
            list.push(entry.page | if entry.what == What::Read { 0 } else { WRITE });
            match entry.what {
                What::Read | What::Write => {}
                What::ZeroFault => born.insert(entry.page),
                What::RescueFault | What::StoreFault if born.has(entry.page) => {}
                What::RescueFault | What::StoreFault => was_there.insert(entry.page),
            }
        })?;
        let mut count_from = header.uncounted as usize;
        if header.kind == TraceKind::Faults {
            let before = list.len();
            list.splice(0..0, was_there.pages().map(|page| page | WRITE));
            count_from += list.len() - before;
        }
        Ok((header, Touches { pages: header.pages, list, count_from }))
    }

    /// Writes the touches as a trace file, and returns its size.
    ///
    /// # Errors
    /// If there cannot be such a file, or the disk is full.
    pub(crate) fn save(&self, path: &Path, ram_pages: u64) -> Result<u64, Failure> {
        let mut writer = TraceWriter::create(path, TraceKind::Touches)?;
        for (page, write, _) in self.all() {
            let what = if write { What::Write } else { What::Read };
            writer.push(Entry { page, what, at_us: 0 })?;
        }
        writer.finish(Header {
            kind: TraceKind::Touches,
            pages: self.pages,
            ram_pages,
            entries: self.list.len() as u64,
            uncounted: self.count_from as u64,
            dropped: 0,
        })
    }

    /// Each touch: its page, whether it writes, and whether it counts.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u32, bool, bool)> {
        let list = self.list.iter().enumerate();
        list.map(|(at, touch)| (touch & !WRITE, touch & WRITE != 0, at >= self.count_from))
    }

    /// Number of touches at the start that fill memory: they do not count, and each writes another page.
    pub(crate) fn filling(&self) -> usize {
        let mut filled = PageSet::default();
        let mut fills = |touch: &u32| {
            let page = touch & !WRITE;
            let new = touch & WRITE != 0 && !filled.has(page);
            filled.insert(page);
            new
        };
        self.list[..self.count_from.min(self.list.len())]
            .iter()
            .copied()
            .take_while(|touch| fills(touch))
            .count()
    }

    /// Touches that count.
    pub(crate) fn counted(&self) -> u64 {
        self.list.len().saturating_sub(self.count_from) as u64
    }
}

/// A bit a page, as far as pages were seen.
#[derive(Default)]
struct PageSet(Vec<u64>);

impl PageSet {
    fn insert(&mut self, page: u32) {
        let word = page as usize / 64;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (page % 64);
    }

    fn has(&self, page: u32) -> bool {
        self.0.get(page as usize / 64).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    fn pages(&self) -> impl Iterator<Item = u32> {
        (0..self.0.len() as u32 * 64).filter(|page| self.has(*page))
    }
}
