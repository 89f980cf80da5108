//! Reads pages that are in a tier alone, the store or the origin, beside the engine: no page comes into the guest for
//! it.
//!
//! A page that cannot be read is read again for a while, as the engine does, because the device may have had a hiccup.
//! It is given up as lost only on evidence: [`BROKEN_TRIES`] readings of it have failed, and before each of them the
//! same tier has given another page. A tier that gives nothing at all says nothing about the page; if that lasts for
//! [`STORE_LIMIT`], the reading ends, and no page is taken for lost. The origin never changes: a page that it has given
//! once is fit for evidence for ever, whatever has become of the page in the VM.

use std::cell::Cell;

use swapd::units::TIERS_MAX;
use swapd::{CommandError, IoError, IoErrorKind, PageNo, Run, TierId, answered};

use super::buffer::PageBuffer;
use super::error::ReadError;
use super::outside::{EngineHandle, Instant, StoredReader, planted, sleep};
use crate::limits::{BROKEN_TRIES, REREAD_EVERY, REREAD_WAITS, STORE_LIMIT, scaled_for_tests};

/// Pages that are asked for to see whether a tier gives any.
const PROBES: usize = 16;

/// Access to stored pages, for one session.
pub(super) struct StoredPages {
    handle: EngineHandle,
    reader: StoredReader,
    /// How many more waits there may be for a store that does not give a page.
    rereads_left: Cell<u32>,
    /// The page that each tier gave last, with its checksum then.
    last_given: Cell<[Option<(PageNo, u64)>; TIERS_MAX]>,
}

/// Held pages of a tier, with their checksums.
pub(super) struct Stored {
    tier: TierId,
    run: Run,
    sums: Vec<u64>,
}

impl Stored {
    pub(super) fn sums_of(&self, part: Run) -> &[u64] {
        let from = (part.start.0 - self.run.start.0) as usize;
        &self.sums[from..from + part.len as usize]
    }
}

impl StoredPages {
    pub(super) fn of(handle: &EngineHandle) -> Result<StoredPages, ReadError> {
        Ok(StoredPages {
            handle: handle.clone(),
            reader: StoredReader::of(handle).map_err(ReadError::Store)?,
            rereads_left: REREAD_WAITS.into(),
            last_given: [None; TIERS_MAX].into(),
        })
    }

    /// Asks for the checksums of pages, which must be held.
    pub(super) async fn look_up(&self, tier: TierId, run: Run) -> Result<Stored, ReadError> {
        let sums = answered(self.handle.sums_async(run)).await?;
        Ok(Stored { tier, run, sums })
    }

    /// So much has been read again that nobody waits for a bad page any more: much of the store is broken.
    pub(super) fn is_worn_out(&self) -> bool {
        self.rereads_left.get() == 0
    }

    /// Reads pages into the buffer, behind its last.
    ///
    /// # Errors
    /// They are not there, or not all of them as they were written. Nothing was added.
    pub(super) async fn read(&self, run: Run, stored: &Stored, into: &mut PageBuffer) -> Result<(), IoError> {
        let sums = stored.sums_of(run);
        let (result, _region) = self.reader.read(stored.tier, run, sums, into.tail(run.len)).await;
        if let Err(error) = result {
            let mismatch = error.kind == IoErrorKind::Mismatch;
            if !mismatch && !self.is_worn_out() {
                tracing::warn!(?run, "{error}");
            }
            if !(mismatch && planted!(TrustsTheStore)) {
                return Err(error);
            }
        }
        run.pages().zip(sums).for_each(|(page, sum)| into.keep(page, *sum));
        self.has_given(stored.tier, run.start, sums[0]);
        Ok(())
    }

    /// Reads a page that was bad, again and again for a while. False: it is lost.
    ///
    /// # Errors
    /// The tier gives nothing.
    pub(super) async fn read_again(
        &self,
        page: PageNo,
        stored: &Stored,
        into: &mut PageBuffer,
    ) -> Result<bool, ReadError> {
        let deadline = Instant::now() + scaled_for_tests(STORE_LIMIT);
        let (mut counted, mut fair) = (0, false);
        loop {
            let Err(error) = self.read(Run::one(page), stored, into).await else { return Ok(true) };
            let of_medium = matches!(error.kind, IoErrorKind::Broken(_) | IoErrorKind::Mismatch);
            counted += u32::from(of_medium && fair);
            if counted == BROKEN_TRIES {
                return Ok(false);
            }
            fair = self.gives_another(page, stored, into).await? || planted!(TakesSilenceForBroken);
            if !(fair && of_medium) && Instant::now() >= deadline {
                return Err(CommandError::Store(error).into());
            }
            match self.rereads_left.get() {
                // Where much is broken, pages are given up without waiting, but not on less evidence.
                0 if fair && of_medium => {}
                0 => sleep(REREAD_EVERY).await,
                left => {
                    self.rereads_left.set(left - 1);
                    sleep(REREAD_EVERY).await;
                }
            }
        }
    }

    /// Whether the page's tier gives any other page, as it was written. Pages beyond those that are held with this one
    /// are not held when they are asked for: one that is just being changed, or is in another tier, does not count.
    async fn gives_another(
        &self,
        page: PageNo,
        held: &Stored,
        scratch: &mut PageBuffer,
    ) -> Result<bool, ReadError> {
        let tier = held.tier;
        if let Some((last, sum)) = self.last_given.get()[tier.index()]
            && last != page
        {
            let sum = if tier == TierId::ORIGIN { sum } else { self.sum_of(last).await? };
            if self.gives(tier, last, sum, scratch).await {
                return Ok(true);
            }
        }
        // At the origin there may be few pages left, of which a look at all that is stored finds none.
        for other in [held.run.start, held.run.start.plus(held.run.len - 1)] {
            if other != page && self.gives(tier, other, held.sums_of(Run::one(other))[0], scratch).await {
                return Ok(true);
            }
        }
        // To know what is stored takes a look at all of memory.
        let stored = answered(self.handle.stored_map_async()).await?;
        let count: u64 = stored.iter().map(|run| u64::from(run.len)).sum();
        for part in 0..PROBES as u64 {
            if let Some(other) = nth_page(&stored, part * count / PROBES as u64)
                && other != page
                && self.gives(tier, other, self.sum_of(other).await?, scratch).await
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn sum_of(&self, page: PageNo) -> Result<u64, ReadError> {
        Ok(answered(self.handle.sums_async(Run::one(page))).await?[0])
    }

    async fn gives(&self, tier: TierId, page: PageNo, sum: u64, scratch: &mut PageBuffer) -> bool {
        let given = self.reader.probe(tier, page, sum, scratch.tail(1)).await.is_ok();
        if given {
            self.has_given(tier, page, sum);
        }
        given
    }

    fn has_given(&self, tier: TierId, page: PageNo, sum: u64) {
        let mut given = self.last_given.get();
        given[tier.index()] = Some((page, sum));
        self.last_given.set(given);
    }
}

fn nth_page(runs: &[Run], nth: u64) -> Option<PageNo> {
    let mut before = 0;
    runs.iter().find_map(|run| {
        let at = nth - before;
        before += u64::from(run.len);
        (at < u64::from(run.len)).then(|| run.start.plus(at as u32))
    })
}
