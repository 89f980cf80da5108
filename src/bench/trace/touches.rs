//! A list of touches in memory, and how one is made from jobs.

use swapd::{PageNo, Run};

use crate::bench::job::Job;
use crate::bench::optimum::WRITE;
use crate::bench::pattern::Pattern;
use crate::failure::{Failure, Kind};

/// Most touches of one list: 1 GiB of them.
pub(crate) const TOUCHES_MAX: u64 = 1 << 28;
/// Page numbers have 31 bits: 8 TiB.
pub(crate) const PAGES_MAX: u64 = 1 << 31;

/// Touches of one VM's memory, each a page number with [`WRITE`] set or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Touches {
    /// Of the VM.
    pub(crate) pages: u64,
    /// Pages written before, in this order.
    pub(crate) warm: Vec<u32>,
    pub(crate) list: Vec<u32>,
    /// The touches before this one are played, but not counted.
    pub(crate) count_from: usize,
}

impl Touches {
    /// What the jobs of one VM touch, if all their threads are equally fast: `count` touches after a ramp of a tenth as many.
    pub(crate) fn of_jobs(jobs: &[Job], memory_bytes: u64, count: u64) -> Result<Touches, Failure> {
        let pages = memory_bytes / swapd::PAGE_SIZE as u64;
        let ramp = count / 10;
        if count == 0 || ramp + count > TOUCHES_MAX {
            let text = format!("{count} touches: choose between 1 and {}", TOUCHES_MAX / 11 * 10);
            return Err(Failure::new(Kind::Usage, text));
        }
        if pages > PAGES_MAX {
            return Err(Failure::new(Kind::Usage, "a memory of more than 8T cannot be traced"));
        }
        let (mut warm, mut patterns, mut start) = (Vec::new(), Vec::new(), 0);
        for job in jobs {
            let len = job.size_bytes / swapd::PAGE_SIZE as u64;
            let area = Run::new(PageNo(start), len as u32);
            if job.prefill {
                warm.extend((start..start + len).map(|page| page as u32));
            }
            patterns.extend((0..job.threads).map(|thread| Pattern::new(job, area, thread)));
            start += len;
        }
        let total = (ramp + count) as usize;
        let mut list = Vec::with_capacity(total + patterns.len());
        while list.len() < total {
            list.extend(patterns.iter_mut().map(|pattern| {
                let touch = pattern.next_touch();
                touch.page as u32 | if touch.write { WRITE } else { 0 }
            }));
        }
        list.truncate(total);
        Ok(Touches { pages, warm, list, count_from: ramp as usize })
    }

    /// The warm pages as writes, then the rest; with whether it counts.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u32, bool, bool)> {
        let warm = self.warm.iter().map(|page| (*page, true, false));
        let list = self.list.iter().enumerate();
        warm.chain(list.map(|(at, touch)| (touch & !WRITE, touch & WRITE != 0, at >= self.count_from)))
    }

    /// Touches that count.
    pub(crate) fn counted(&self) -> u64 {
        self.list.len().saturating_sub(self.count_from) as u64
    }
}
