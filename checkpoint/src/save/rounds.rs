//! The rounds of a checkpoint: drives the reader, waits for the disk at the end of each, and reports progress.

use std::future::Future;
use std::time::Duration;

use migrate::CancelFlag;
use migrate::limits::{CANCEL_POLL, PROGRESS_EVERY};
use migrate::pace::SendRate;
use swapd::Run;
use swapd::units::bytes_of;

use super::error::SaveError;
use super::image::ImageSink;
use super::rate::{PauseRate, Work};
use super::report::{Phase, Progress};
use crate::outside::reader::{ReadError, Reader};
use crate::outside::{DirtySubscription, EngineHandle, Instant, planted, sleep};

/// Between two scans for written pages in the middle of a round that is not the first. A scan costs the guest a fault
/// (about 2 µs) at the next write to each page that it has found, and saves writing pages that would be written again.
/// A disk takes less harm from those than a link, so scans are rarer than a migration's.
const SCAN_EVERY: Duration = Duration::from_secs(1);
/// Between two looks at what the guest writes, before anything is protected.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The looks before the first portion end when one has found less than this share of what is known, or after that time.
const LOOK_SHARE: usize = 16;
const LOOK_MOST: Duration = Duration::from_secs(1);
/// Between two looks while portions are read.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Whether the session is to go on.
#[derive(Clone, Copy)]
pub(super) struct Guard<'a> {
    pub(super) cancel: &'a CancelFlag,
    /// When the VM has stood still for as long as it may, and how long that is.
    pub(super) until: Option<(Instant, Duration)>,
}

impl Guard<'_> {
    pub(super) fn check(&self, sink: &ImageSink) -> Result<(), SaveError> {
        if let Some(error) = sink.take_error() {
            return Err(error);
        }
        if self.cancel.load(std::sync::atomic::Ordering::Relaxed) && !planted!(IgnoresCancel) {
            return Err(SaveError::Cancelled);
        }
        match self.until {
            Some((until, limit)) if Instant::now() >= until && !planted!(WaitsForever) => {
                Err(SaveError::StoodTooLong(limit))
            }
            _ => Ok(()),
        }
    }

    /// Waits until the disk has all that the sink has taken.
    pub(super) async fn settle(&self, sink: &ImageSink) -> Result<(), SaveError> {
        self.wait(sink, sink.settle()).await?;
        self.check(sink)
    }

    /// Waits for `work`, which must bear being dropped half-way.
    async fn wait<T>(&self, sink: &ImageSink, work: impl Future<Output = T>) -> Result<T, SaveError> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                result = &mut work => return Ok(result),
                () = sleep(CANCEL_POLL) => {}
            }
            self.check(sink)?;
        }
    }
}

/// Everything of a session that is on the runtime. [`close`](Self::close) it, whatever happens.
pub(super) struct Rounds<'a> {
    reader: Reader<ImageSink>,
    pub(super) sink: ImageSink,
    pub(super) guard: Guard<'a>,
    /// Rounds done.
    pub(super) round: u32,
    send_rate: SendRate,
    /// As it would be while the VM stands still.
    pause_rate: PauseRate,
    progress: &'a dyn Fn(Progress),
    phase: Phase,
    throttle: u8,
    last_progress: Instant,
    last_scan: Instant,
    last_look: Instant,
    /// When the round began, and what had been done by then.
    began: (Instant, Work),
}

impl<'a> Rounds<'a> {
    /// Must be called on the runtime.
    pub(super) fn start(
        handle: &EngineHandle,
        dirty: DirtySubscription,
        sink: ImageSink,
        (progress, cancel): (&'a dyn Fn(Progress), &'a CancelFlag),
    ) -> Result<Rounds<'a>, SaveError> {
        Ok(Rounds {
            reader: Reader::in_portions(handle, dirty, sink.clone())?,
            sink,
            guard: Guard { cancel, until: None },
            round: 0,
            send_rate: SendRate::default(),
            pause_rate: PauseRate::default(),
            progress,
            phase: Phase::Copying,
            throttle: 0,
            last_progress: Instant::now(),
            last_scan: Instant::now(),
            last_look: Instant::now(),
            began: (Instant::now(), Work::default()),
        })
    }

    /// Finds out what is cold, and what the guest writes: as long as looks find more of that.
    pub(super) async fn watch(&mut self) -> Result<(), SaveError> {
        let began = Instant::now();
        let asked = self.guard.wait(&self.sink, self.reader.ask_heat()).await?.map(|_| ());
        self.read(asked)?;
        self.look().await?;
        loop {
            let known = self.reader.blocks_changing();
            self.guard.wait(&self.sink, sleep(LOOK_EVERY)).await?;
            self.look().await?;
            self.report_if_due();
            let found = self.reader.blocks_changing();
            if (found - known) * LOOK_SHARE <= found || began.elapsed() >= LOOK_MOST {
                break;
            }
        }
        self.began = (Instant::now(), self.work());
        Ok(())
    }

    async fn look(&mut self) -> Result<(), SaveError> {
        loop {
            let looked = self.guard.wait(&self.sink, self.reader.look()).await?;
            if !self.read(looked)? {
                self.last_look = Instant::now();
                return Ok(());
            }
        }
    }

    /// What of the first round comes next; None: nothing, all of memory has been read.
    pub(super) async fn next_portion(&mut self) -> Result<Option<Vec<Run>>, SaveError> {
        if self.last_look.elapsed() >= LOOK_AGAIN {
            self.look().await?;
        }
        Ok(self.reader.next_portion())
    }

    /// Has writes to a portion noted, from now on.
    pub(super) async fn track(&mut self, portion: &[Run]) -> Result<(), SaveError> {
        let tracked = self.guard.wait(&self.sink, self.reader.track(portion.to_vec())).await?;
        self.read(tracked)
    }

    /// Reads a portion: pages that were never touched, then all others. Without a scan: what the guest has written of
    /// it meanwhile would be protected again, and cost it another fault each.
    pub(super) async fn portion(&mut self, portion: &[Run]) -> Result<(), SaveError> {
        self.reader.open(portion);
        loop {
            let surveyed = self.guard.wait(&self.sink, self.reader.survey()).await?;
            if !self.read(surveyed)? {
                break;
            }
        }
        self.reader.begin_first_round();
        self.finish_round(false).await
    }

    /// The first round ends, all portions of it.
    pub(super) async fn end_first(&mut self) -> Result<(), SaveError> {
        self.end_measured().await?;
        // Most of what was written meanwhile was not noted.
        self.reader.forget_dirty_rate();
        Ok(())
    }

    /// A later round: the pages that scans have found dirty before it.
    pub(super) async fn again(&mut self, throttle: u8) -> Result<(), SaveError> {
        if throttle != self.throttle {
            self.throttle = throttle;
            self.reader.forget_dirty_rate();
        }
        self.reader.begin_round();
        self.enter(Phase::Converging);
        self.measured().await
    }

    /// The last look for written pages, while the VM stands still.
    pub(super) async fn last_scan(&mut self) -> Result<(), SaveError> {
        self.sink.vm_stands_still();
        self.throttle = 0;
        self.enter(Phase::Stopped);
        if planted!(SkipsTheLastScan) {
            return Ok(());
        }
        self.scan().await
    }

    /// The last round: leaves nothing. What it has found may still be on its way to the disk.
    pub(super) async fn last(&mut self) -> Result<(), SaveError> {
        self.reader.begin_last_round();
        self.finish_round(false).await?;
        self.round += 1;
        Ok(())
    }

    /// Waits until the disk has all that was found.
    pub(super) async fn settle(&self) -> Result<(), SaveError> {
        self.guard.settle(&self.sink).await
    }

    /// A round that is not the last, and how fast it was.
    async fn measured(&mut self) -> Result<(), SaveError> {
        self.began = (Instant::now(), self.work());
        self.finish_round(true).await?;
        self.end_measured().await
    }

    async fn end_measured(&mut self) -> Result<(), SaveError> {
        let (began, before) = self.began;
        if !planted!(LetsRoundsOverlap) {
            self.settle().await?;
        }
        let (work, took) = (self.work().since(before), began.elapsed());
        self.send_rate.round(work.found, took);
        self.pause_rate.round(work, took);
        self.round += 1;
        self.scan().await
    }

    /// What was done so far. Found are pages with content that needed work, or none because the base has them.
    fn work(&self) -> Work {
        Work { found: self.reader.pages_given() + self.sink.counts().same, ..self.sink.work() }
    }

    /// Reads the round that has begun to its end, and scans meanwhile if that is asked for.
    async fn finish_round(&mut self, scans: bool) -> Result<(), SaveError> {
        loop {
            let stepped = self.step().await?;
            if !self.read(stepped)? {
                return Ok(());
            }
            if scans && self.last_scan.elapsed() >= SCAN_EVERY {
                self.scan().await?;
            }
            self.report_if_due();
        }
    }

    /// Waits until the round has come further, or for a moment.
    async fn step(&mut self) -> Result<Result<bool, ReadError>, SaveError> {
        let stepped = tokio::select! {
            biased;
            more = self.reader.step() => more,
            () = sleep(CANCEL_POLL) => Ok(true),
        };
        self.guard.check(&self.sink)?;
        Ok(stepped)
    }

    async fn scan(&mut self) -> Result<(), SaveError> {
        let scanned = self.guard.wait(&self.sink, self.reader.scan()).await?;
        self.last_scan = Instant::now();
        self.read(scanned).map(|_| ())
    }

    /// Of a sink that takes nothing any more, its own reason is told.
    fn read<T>(&self, result: Result<T, ReadError>) -> Result<T, SaveError> {
        result.map_err(|error| self.sink.take_error().unwrap_or_else(|| error.into()))
    }

    /// Another phase begins: reports it at once.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.report();
    }

    fn report_if_due(&mut self) {
        if self.last_progress.elapsed() >= PROGRESS_EVERY {
            self.report();
        }
    }

    fn report(&mut self) {
        self.last_progress = Instant::now();
        let total = self.reader.memory_bytes();
        let open = bytes_of(self.reader.pages_left() + self.reader.pages_for_next());
        (self.progress)(Progress {
            phase: self.phase,
            round: self.round + 1,
            bytes_total: total,
            bytes_done: total.saturating_sub(open),
            bytes_left: bytes_of(self.reader.pages_left()),
            bytes_written: self.sink.counts().written,
            throttle_percent: self.throttle,
        });
    }

    pub(super) fn remaining_pages(&self) -> u64 {
        self.reader.pages_for_next()
    }

    /// Pages that become dirty a second, as far as that is known.
    pub(super) fn dirty_per_s(&self) -> f64 {
        self.reader.dirty_per_s().unwrap_or(0.0)
    }

    pub(super) fn sent_per_s(&self) -> f64 {
        self.send_rate.per_s()
    }

    /// The same while the VM stands still.
    pub(super) fn pause_per_s(&self) -> f64 {
        self.pause_rate.per_s()
    }

    /// What the disk takes for the last pages of a round, however few these are.
    pub(super) fn pause_latency(&self) -> Duration {
        self.pause_rate.latency()
    }

    pub(super) fn scan_took(&self) -> Duration {
        self.reader.scan_took()
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.reader.memory_bytes()
    }

    /// The heat of each page, by all that is known.
    pub(super) fn heat(&self) -> Vec<u8> {
        self.reader.known_heat()
    }

    /// Ends everything, and waits until nothing is in flight, no page is held and no write is tracked.
    pub(super) async fn close(self) -> ImageSink {
        self.sink.close();
        drop(self.reader.close().await);
        self.sink.settle().await;
        self.sink
    }
}
