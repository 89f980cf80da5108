//! Which blocks the guest is writing, by a look at a few pages of each, now and again.
//!
//! A block is protected right before it is read, and the blocks that the guest writes come last: from then on each of
//! its writes there costs it a fault. The engine's heat does not tell them apart where all of memory is in RAM and
//! nothing ever faults. Protection would tell, and cost the very faults that are to be saved. To find an order, less
//! will do: pages whose sum has changed since the last look have been written. What this misses is read too early, and
//! once more later; nothing but time depends on it.

use swapd::digest::page_sum;
use swapd::{BLOCK_PAGES, PAGE_SIZE, PageNo, Piece, Place, Run};

use super::outside::EngineHandle;

/// Pages looked at, of all of a VM: 4 KiB in about 1 us each.
const SAMPLES: usize = 1 << 14;
/// Of a block, in which they lie evenly.
const SAMPLES_A_BLOCK: usize = 8;

#[derive(Debug)]
pub(super) struct Watch {
    /// Pages looked at, of each block.
    samples: usize,
    /// Their sums, by block, at the last look. 0: not known.
    sums: Vec<u64>,
    /// How many looks have found any of them changed, by block.
    changes: Vec<u8>,
    /// Pages that have been touched, by block.
    touched: Vec<u16>,
    /// By block: some of it is in the store.
    stored: Vec<bool>,
}

impl Watch {
    pub(super) fn new(blocks: u32) -> Watch {
        let blocks = blocks as usize;
        let samples = (SAMPLES / blocks.max(1)).clamp(1, SAMPLES_A_BLOCK);
        Watch {
            samples,
            sums: vec![0; blocks * samples],
            changes: vec![0; blocks],
            touched: vec![0; blocks],
            stored: vec![false; blocks],
        }
    }

    pub(super) fn changes(&self, block: u32) -> u8 {
        self.changes[block as usize]
    }

    pub(super) fn touched(&self, block: u32) -> u16 {
        self.touched[block as usize]
    }

    pub(super) fn is_stored(&self, block: u32) -> bool {
        self.stored[block as usize]
    }

    /// Pages that have been touched, of all.
    pub(super) fn touched_pages(&self) -> u64 {
        self.touched.iter().map(|pages| u64::from(*pages)).sum()
    }

    /// Blocks that have been seen to change.
    pub(super) fn changing(&self) -> usize {
        self.changes.iter().filter(|changes| **changes > 0).count()
    }

    /// Looks at a run of whole blocks, whose pages are held and are where the pieces say.
    pub(super) fn look(&mut self, run: Run, pieces: &[Piece], handle: &EngineHandle) {
        for block in run.blocks().map(|part| part.start.block()) {
            (self.touched[block], self.stored[block]) = (0, false);
        }
        let mut changed = None;
        for piece in pieces {
            for part in piece.run.blocks().filter(|_| piece.place != Place::Zero) {
                let block = part.start.block();
                self.touched[block] += part.len as u16;
                self.stored[block] |= matches!(piece.place, Place::Stored | Place::Staged);
                for nth in 0..self.samples {
                    let page = self.sample(block, nth);
                    if part.contains(page) && piece.place == Place::Memory {
                        let sum = sum_of(page, handle.page_address(page));
                        let before = std::mem::replace(&mut self.sums[block * self.samples + nth], sum);
                        // A block that lies in several pieces has changed once.
                        if before != 0 && before != sum && changed.replace(block) != Some(block) {
                            self.changes[block] = self.changes[block].saturating_add(1);
                        }
                    }
                }
            }
        }
    }

    /// Elsewhere in each block: a guest may write to the first page of every block.
    fn sample(&self, block: usize, nth: usize) -> PageNo {
        let shift = (block as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let even = (nth * BLOCK_PAGES as usize / self.samples) as u64;
        PageNo::first_of(block).plus(((even + shift) % u64::from(BLOCK_PAGES)) as u32)
    }
}

/// The sum of a page that is held and in memory. The guest may be writing to it: then it is the sum of no version, and
/// differs from the last, as it should.
fn sum_of(page: PageNo, from: *const u8) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    // SAFETY: the page is held and in memory, so it stays mapped until it is released. The copy is ours.
    unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE_SIZE) };
    page_sum(page, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_all_over_a_block() {
        for (blocks, samples) in [(1, 8), (2048, 8), (5000, 3), (1 << 20, 1)] {
            let watch = Watch::new(blocks);
            assert_eq!(watch.samples, samples);
            for block in [0, blocks as usize - 1] {
                let mut pages: Vec<_> = (0..samples).map(|nth| watch.sample(block, nth).0).collect();
                pages.sort_unstable();
                assert!(pages.iter().all(|page| PageNo(*page).block() == block));
                let close = pages.windows(2).any(|two| two[1] - two[0] < 512 / samples as u64);
                assert!(!close, "{pages:?}");
            }
        }
    }
}
