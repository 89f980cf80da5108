//! After a run: its touches again, in the order in which they came, and the hit rate that Belady's optimum would have
//! had on them.
//!
//! A pattern is a function of its seed, so threads need not write touches down. Each notes once a millisecond how
//! many it has made (a *mark*); its touches between two marks are taken as evenly spread over that time.

use swapd::{Run, units::pages_in};

use super::touch::{Mark, TouchRecord};
use crate::job::{Job, Scenario};
use crate::optimum::{WRITE, optimum};
use crate::pattern::{Pattern, Touch};

/// Most touches for which the optimum is computed: each takes 10 bytes and 0.1 µs.
const TOUCHES_MAX: u64 = 40_000_000;

/// The optimum's hit rate in the measured phase. None if there were no touches, or too many of them.
pub(super) fn hit_rate(scenario: &Scenario, areas: &[Run], records: &[Vec<TouchRecord>]) -> Option<f64> {
    let mut streams: Vec<Stream<'_>> = Vec::new();
    for ((job, area), records) in scenario.jobs.iter().zip(areas).zip(records) {
        let stream = |(thread, record)| Stream::new(Pattern::new(job, *area, thread), record);
        streams.extend((0..).zip(records).map(stream));
    }
    let all = records.iter().flatten().map(TouchRecord::measured);
    let (before, total) = all.fold((0, 0), |sum, (start, end)| (sum.0 + start.touches, sum.1 + end.touches));
    if !(1..=TOUCHES_MAX).contains(&total) || areas.iter().any(|area| area.end().0 >= u64::from(WRITE)) {
        return None;
    }
    let touches = merged(&mut streams, total as usize);
    let frames = pages_in(scenario.ram_bytes) as usize;
    let done = optimum(&touches, &warm(&scenario.jobs, areas), frames, before as usize, |_| {});
    (done.touched > 0).then(|| 1.0 - done.misses as f64 / done.touched as f64)
}

/// The pages that were filled before the run, in the order in which they were filled.
pub(super) fn warm(jobs: &[Job], areas: &[Run]) -> Vec<u32> {
    let filled = jobs.iter().zip(areas).filter(|(job, _)| job.prefill);
    filled.flat_map(|(_, area)| area.pages()).map(|page| page.0 as u32).collect()
}

/// A touch in the form that [`optimum`] takes.
pub(super) fn coded(touch: Touch) -> u32 {
    touch.page as u32 | if touch.write { WRITE } else { 0 }
}

/// The touches of one thread, each with its time.
struct Stream<'a> {
    pattern: Pattern,
    marks: std::slice::Windows<'a, Mark>,
    /// The marks before and after the next touch: time and number of touches of the first, and what the second has
    /// more.
    from: Mark,
    ticks: u64,
    touches: u64,
    /// Touches since `from`.
    done: u64,
}

impl<'a> Stream<'a> {
    fn new(pattern: Pattern, record: &'a TouchRecord) -> Stream<'a> {
        let mut stream = Stream {
            pattern,
            marks: record.marks.windows(2),
            from: Mark::default(),
            ticks: 0,
            touches: 0,
            done: 0,
        };
        stream.next_marks();
        stream
    }

    fn next_marks(&mut self) {
        while self.done == self.touches {
            let Some([from, to]) = self.marks.next() else { return };
            self.from = *from;
            (self.ticks, self.touches, self.done) = (to.ticks - from.ticks, to.touches - from.touches, 0);
        }
    }

    /// When the next touch was.
    fn time(&self) -> Option<u64> {
        (self.done < self.touches).then(|| self.from.ticks + self.ticks * (self.done + 1) / self.touches)
    }

    fn touch(&mut self) -> Touch {
        self.done += 1;
        self.next_marks();
        self.pattern.next_touch()
    }
}

fn merged(streams: &mut [Stream<'_>], total: usize) -> Vec<u32> {
    let mut touches = Vec::with_capacity(total);
    let mut times: Vec<Option<u64>> = streams.iter().map(Stream::time).collect();
    loop {
        let timed = times.iter().enumerate().filter_map(|(index, time)| Some((time.as_ref()?, index)));
        let Some((_, next)) = timed.min() else { return touches };
        touches.push(coded(streams[next].touch()));
        times[next] = streams[next].time();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Access, Length, Order};
    use crate::sample::Times;
    use swapd::PageNo;

    fn record(marks: &[(u64, u64)]) -> TouchRecord {
        let mark =
            |(ticks, touches): &(u64, u64)| Mark { ticks: *ticks, touches: *touches, operations: *touches };
        TouchRecord {
            reads: Times::default(),
            writes: Times::default(),
            misses: Times::default(),
            verify_errors: 0,
            marks: marks.iter().map(mark).collect(),
            measured_from: 0,
        }
    }

    #[test]
    fn touches_come_in_the_order_of_their_times() {
        let job = Job {
            name: "job".into(),
            size_bytes: 64 << 12,
            working_set_bytes: 64 << 12,
            access: Access::Read,
            read_percent: 100,
            order: Order::Sequential,
            stride_pages: 1,
            block_bytes: 4096,
            threads: 2,
            length: Length::Loops(1),
            ramp_ms: 0,
            prefill: true,
            seed: 1,
        };
        let area = Run::new(PageNo(0), 64);
        // The first thread stands still between 10 and 100; the second touches at 20, 40, 60, 80.
        let records = [record(&[(0, 0), (10, 2), (100, 2), (110, 4)]), record(&[(0, 0), (80, 4)])];
        let mut streams: Vec<_> = (0..)
            .zip(&records)
            .map(|(thread, record)| Stream::new(Pattern::new(&job, area, thread), record))
            .collect();
        assert_eq!(merged(&mut streams, 8), [0, 1, 32, 33, 34, 35, 2, 3]);
        let scenario = Scenario {
            name: "s".into(),
            description: String::new(),
            ram_bytes: 64 << 12,
            engines: vec![],
            store: None,
            encrypt: false,
            jobs: vec![job],
        };
        assert_eq!(hit_rate(&scenario, &[area], &[records.into()]), Some(1.0));
    }
}
