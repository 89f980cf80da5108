//! The session: what is asked of the VM and when, and what is undone when something fails.
//!
//! The stages are types that consume themselves, so that only the right order of calls compiles. One that fails hands
//! back the error, and the VM goes on as before.

use std::fmt;
use std::future::Future;
use std::io::{self, BufWriter, Write};
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use migrate::pace::{Decision, Rules, Standing, decide};
use migrate::{CancelFlag, Expected, LiveVm};
use swapd::units::pages_in;

use super::error::SaveError;
use super::image::ImageSink;
use super::options::{Base, Files, SaveOptions};
use super::pages::PageTable;
use super::report::{PauseParts, Phase, Progress, Saved};
use super::rounds::{Guard, Rounds};
use super::state::{self, PartFile};
use crate::format::MemoryMap;
use crate::format::sealed::{SealedAs, SealedWriter, sealed_bytes};
use crate::key::ChainKey;
use crate::outside::{self, EngineHandle, File, Instant, Runtime, planted, timeout};

/// So long what was being written is waited for, before a failure is told.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);
/// How fast a state is written, to guess how long that takes: a machine makes it, and the page cache takes it.
const STATE_BYTES_PER_S: f64 = 4e8;

/// A VM was not saved. It goes on as before.
#[derive(Debug)]
pub struct Failed<'a> {
    /// Why.
    pub error: SaveError,
    /// What is not over yet, because a disk does not answer. None: nothing is.
    pub rest: Option<Box<Rest<'a>>>,
}

/// What a failed session leaves: writes under way, which only their disk can end.
#[must_use = "close it: dropping it waits, too, and in no order"]
pub struct Rest<'a> {
    closing: Closing<'a>,
    runtime: Runtime,
}

type Closing<'a> = Pin<Box<dyn Future<Output = ImageSink> + 'a>>;

impl Rest<'_> {
    /// Waits until nothing is in flight, no page is held and no write is tracked. Nobody knows how long that takes.
    pub fn close(self) {
        let Rest { closing, runtime } = self;
        drop(runtime.block_on(closing));
    }
}

impl fmt::Debug for Rest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rest").finish_non_exhaustive()
    }
}

impl From<SaveError> for Failed<'_> {
    fn from(error: SaveError) -> Self {
        Failed { error, rest: None }
    }
}

/// The VM runs, perhaps throttled, and its memory is being written.
pub(super) struct Session<'a, 'v> {
    runtime: Runtime,
    rounds: Rounds<'a>,
    vm: &'v mut dyn LiveVm,
    map: File,
    state: File,
    options: &'v SaveOptions,
    throttle: u8,
    throttle_max: u8,
    expected: Expected,
    started: Instant,
}

/// The VM stands still.
struct Stopped<'a, 'v> {
    session: Session<'a, 'v>,
    /// When it was asked to, and when it did.
    at: Instant,
    made_at: SystemTime,
    parts: PauseParts,
    stood_still: bool,
    state_bytes: u64,
}

impl<'a, 'v> Session<'a, 'v> {
    pub(super) fn start(
        handle: &EngineHandle,
        vm: &'v mut dyn LiveVm,
        Files { image, map, state }: Files,
        base: Option<Base>,
        options: &'v SaveOptions,
        (progress, cancel): (&'a dyn Fn(Progress), &'a CancelFlag),
    ) -> Result<Session<'a, 'v>, SaveError> {
        let started = Instant::now();
        let host = |what| move |source| SaveError::Host { what, source };
        let pages = pages_in(handle.memory_bytes());
        if let Some(base) = base.as_ref().filter(|base| base.map.pages() != pages) {
            let text =
                format!("the base has {} pages, and the VM {pages}: it is of another VM", base.map.pages());
            return Err(SaveError::Options(text));
        }
        let has = image.metadata().map_err(host("looking at the image"))?.len();
        if has != handle.memory_bytes() {
            image
                .set_len(handle.memory_bytes())
                .map_err(|source| SaveError::Write { what: "image", source })?;
        }
        let runtime = outside::runtime().map_err(host("no io_uring is to be had"))?;
        let dirty = handle.subscribe_dirty_in_parts()?;
        let rounds = runtime.block_on(async {
            let table = PageTable::new(pages, base);
            let cipher = options.key.as_ref().map(ChainKey::pages);
            let sink = ImageSink::new(image, outside::stored_reader(handle), table, options.rate, cipher);
            let sink = sink.map_err(host("the image cannot be opened once more"))?;
            Rounds::start(handle, dirty, sink, (progress, cancel))
        })?;
        Ok(Session {
            runtime,
            rounds,
            vm,
            map,
            state,
            options,
            throttle: 0,
            throttle_max: 0,
            expected: Expected::default(),
            started,
        })
    }

    /// From the first round to the map.
    pub(super) fn run(mut self) -> Result<Saved, Failed<'a>> {
        match self.converge() {
            Ok(()) => self.stop()?.save_the_rest()?.finish(),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Writes in rounds, until what is left fits the pause.
    fn converge(&mut self) -> Result<(), SaveError> {
        let rules = Rules {
            downtime_target: self.options.downtime_target,
            max_downtime: None,
            max_rounds: self.options.max_rounds,
            max_throttle: self.options.max_throttle,
        };
        self.expected = self.vm.expected();
        self.first_round()?;
        loop {
            let standing = self.standing();
            let decision = decide(&rules, &standing);
            tracing::debug!(?standing, ?decision, "a round has ended");
            let Decision::Go { throttle } = decision else { return Ok(()) };
            self.set_throttle(throttle);
            self.expected = self.vm.expected();
            if !planted!(SkipsTheDrains) {
                self.vm.drain()?;
            }
            self.on_rounds(async |rounds| rounds.again(throttle).await)?;
        }
    }

    /// Writes all of memory, in portions. Each is protected right before it is read, and the last ones are those that
    /// the guest writes most: so it runs at full speed for most of the time.
    fn first_round(&mut self) -> Result<(), SaveError> {
        self.on_rounds(async |rounds| rounds.watch().await)?;
        while let Some(portion) = self.on_rounds(async |rounds| rounds.next_portion().await)? {
            if !planted!(TracksAfterReading) {
                self.on_rounds(async |rounds| rounds.track(&portion).await)?;
            }
            // What devices had begun before writes to it were tracked.
            if !planted!(ReadsBeforeTheDrain) {
                self.vm.drain()?;
            }
            self.on_rounds(async |rounds| rounds.portion(&portion).await)?;
            if planted!(TracksAfterReading) {
                self.on_rounds(async |rounds| rounds.track(&portion).await)?;
            }
        }
        self.on_rounds(async |rounds| rounds.end_first().await)
    }

    fn standing(&self) -> Standing {
        let Expected { time, state_bytes } = self.expected;
        Standing {
            rounds: self.rounds.round,
            remaining_pages: self.rounds.remaining_pages(),
            sent_per_s: self.rounds.sent_per_s(),
            stopped_per_s: self.rounds.pause_per_s(),
            dirty_per_s: self.rounds.dirty_per_s(),
            throttle: self.throttle,
            // Nobody loads the state here, and the page cache takes it.
            vm_cost: time + Duration::from_secs_f64(state_bytes as f64 / STATE_BYTES_PER_S),
            state_bytes: 0,
            link_cost: self.rounds.scan_took() + self.rounds.pause_latency(),
        }
    }

    fn set_throttle(&mut self, percent: u8) {
        if percent != self.throttle {
            self.vm.throttle(percent);
            self.throttle = percent;
            self.throttle_max = self.throttle_max.max(percent);
        }
    }

    fn on_rounds<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Rounds<'a>) -> Result<T, SaveError>,
    ) -> Result<T, SaveError> {
        self.runtime.block_on(work(&mut self.rounds))
    }

    /// The VM runs on, and nothing is left of the session, unless a disk does not answer.
    fn fail(mut self, error: SaveError) -> Failed<'a> {
        if !planted!(StaysThrottled) {
            self.set_throttle(0);
        }
        let Session { runtime, rounds, .. } = self;
        let closing: Closing<'a> = Box::pin(rounds.close());
        if planted!(KeepsTracking) {
            std::mem::forget(closing);
            return error.into();
        }
        Failed { error, rest: close(runtime, closing) }
    }

    /// Stops the VM.
    fn stop(mut self) -> Result<Stopped<'a, 'v>, Failed<'a>> {
        let at = Instant::now();
        let paused = self.vm.pause();
        let stop_ms = milliseconds(at);
        // Not before the VM stands still: it would write at full speed once more.
        self.set_throttle(0);
        let limit = self.options.pause_limit;
        self.rounds.guard.until = Some((at + limit, limit));
        let parts = PauseParts { stop_ms, ..PauseParts::default() };
        let (made_at, stood_still) = (SystemTime::now(), self.vm.stood_still());
        let stopped = Stopped { session: self, at, made_at, parts, stood_still, state_bytes: 0 };
        match paused {
            Ok(()) => Ok(stopped),
            // A VM that could not be paused may have been paused half-way.
            Err(error) => Err(stopped.fail(error.into())),
        }
    }
}

impl<'a, 'v> Stopped<'a, 'v> {
    /// The VM goes on as before, and nothing is left of the session, unless a disk does not answer.
    fn fail(self, error: SaveError) -> Failed<'a> {
        // Before what is under way is waited for: a disk that does not answer must not take it along.
        let error = if planted!(StaysPaused) { error } else { goes_on(self.session.vm, error) };
        self.session.fail(error)
    }

    /// Writes the last pages and the state, and lets the VM go on.
    fn save_the_rest(mut self) -> Result<Stopped<'a, 'v>, Failed<'a>> {
        if let Err(error) = self.write_the_rest() {
            return Err(self.fail(error));
        }
        if !self.session.options.stop {
            let began = Instant::now();
            if let Err(error) = self.session.vm.resume() {
                let error = migrate::VmError::NotResumed(Box::new(error));
                return Err(self.session.fail(error.into()));
            }
            self.parts.resume_ms = milliseconds(began);
        }
        Ok(self)
    }

    fn write_the_rest(&mut self) -> Result<(), SaveError> {
        let session = &mut self.session;
        let began = Instant::now();
        session.on_rounds(async |rounds| rounds.last_scan().await)?;
        self.parts.scan_ms = milliseconds(began);
        if planted!(ResumesBeforeTheLastPages) {
            session.vm.resume()?;
        }
        let began = Instant::now();
        session.on_rounds(async |rounds| rounds.last().await)?;
        self.parts.pages_ms = milliseconds(began);
        // Behind the pages: the disk is at work on them meanwhile.
        let began = Instant::now();
        let key = session.options.key.as_ref();
        self.state_bytes = state::save(session.vm, &session.state, key, &session.runtime, &session.rounds)?;
        self.parts.state_ms = milliseconds(began);
        let began = Instant::now();
        if !planted!(ResumesBeforeTheDisk) {
            session.on_rounds(async |rounds| rounds.settle().await)?;
        }
        self.parts.disk_ms = milliseconds(began);
        Ok(())
    }

    /// Has only what belongs into the image stay there, and writes the map. The VM runs on meanwhile, or stands still
    /// for no longer than it may.
    fn finish(self) -> Result<Saved, Failed<'a>> {
        let pause_ms = milliseconds(self.at);
        let Stopped { session, made_at, parts, stood_still, state_bytes, .. } = self;
        let Session { runtime, mut rounds, vm, map, options, throttle_max, started, .. } = session;
        rounds.enter(Phase::Finishing);
        let (heat, memory_bytes, round, counts) =
            (rounds.heat(), rounds.memory_bytes(), rounds.round, rounds.sink.counts());
        let limit = options.pause_limit;
        let guard = Guard { until: options.stop.then(|| (Instant::now() + limit, limit)), ..rounds.guard };
        let sink = runtime.block_on(rounds.close());
        let finished = match write_map(&runtime, &sink, guard, &heat, &map, options.key.as_ref()) {
            Ok(finished) => finished,
            Err(error) => {
                // It was to be stopped, and stands still.
                let error = if options.stop { goes_on(vm, error) } else { error };
                let closing: Closing<'a> = Box::pin(async move {
                    sink.settle().await;
                    sink
                });
                return Err(Failed { error, rest: close(runtime, closing) });
            }
        };
        Ok(Saved {
            made_at_ms: made_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
            pause_ms,
            pause_parts: parts,
            downtime_target_ms: options.downtime_target.as_secs_f64() * 1000.0,
            stood_still,
            rounds: round,
            duration_ms: milliseconds(started),
            bytes_total: memory_bytes,
            bytes_written: counts.written,
            pages: finished.counts(),
            pages_shared: counts.shared,
            throttle_max_percent: throttle_max,
            state_bytes,
            map_bytes: match options.key {
                Some(_) => sealed_bytes(finished.file_bytes()),
                None => finished.file_bytes(),
            },
        })
    }
}

/// The VM stands still, and there is no checkpoint: it goes on as before. Returns what is to be told.
fn goes_on(vm: &mut dyn LiveVm, error: SaveError) -> SaveError {
    match vm.resume() {
        Ok(()) => error,
        Err(not_resumed) => {
            tracing::warn!(%error, "the checkpoint failed");
            migrate::VmError::NotResumed(Box::new(not_resumed)).into()
        }
    }
}

/// Waits for what is under way, but not for a disk that does not answer: that is what is left.
fn close(runtime: Runtime, mut closing: Closing<'_>) -> Option<Box<Rest<'_>>> {
    let closed = runtime.block_on(async { timeout(CLOSE_LIMIT, &mut closing).await });
    match closed {
        Ok(_) => None,
        Err(_) => Some(Box::new(Rest { closing, runtime })),
    }
}

/// Has only what belongs into the image stay there, and writes the map.
fn write_map(
    runtime: &Runtime,
    sink: &ImageSink,
    guard: Guard<'_>,
    heat: &[u8],
    map: &File,
    key: Option<&ChainKey>,
) -> Result<MemoryMap, SaveError> {
    if !planted!(LeavesOldContent) {
        let holes = sink.pages(PageTable::holes);
        runtime.block_on(async { sink.punch(holes) });
    }
    let finished = sink.pages(|pages| pages.finish(heat));
    let mut to = PartFile::new("map", map, runtime, sink, guard)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, &mut to);
    let given = match key {
        None => finished.write(&mut buffered),
        Some(key) => seal_map(&finished, &mut buffered, key),
    };
    let given = given.and_then(|()| buffered.flush());
    drop(buffered);
    to.end(given.map_err(|source| SaveError::Write { what: "map", source }))?;
    runtime.block_on(guard.settle(sink))?;
    Ok(finished)
}

fn seal_map(map: &MemoryMap, to: impl Write, key: &ChainKey) -> io::Result<()> {
    let mut sealed = SealedWriter::new(to, key, SealedAs::Map, outside::random()?)?;
    map.write(&mut sealed)?;
    sealed.finish().map(drop)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
