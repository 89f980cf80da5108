//! A recording of faults: which was served when, for a client that has asked for it.
//!
//! Switched off, it costs one look at an `Option` a fault. Switched on, it allocates nothing on the way of a fault
//! either: it has room for a fixed number of faults between two requests, and counts those for which there is none.

use std::collections::VecDeque;
use std::time::Instant;

use swapcore::api::{FaultKind, FaultsSeen, SeenFault};
use swapcore::units::PageNo;

/// Faults kept until they are asked for: 1.5 MiB.
pub(super) const SEEN_MAX: usize = 1 << 16;
/// Faults in one answer.
const ANSWER_MAX: usize = 512;

#[derive(Debug, Default)]
pub(super) struct Recorder {
    recording: Option<Recording>,
}

#[derive(Debug)]
struct Recording {
    since: Instant,
    seen: VecDeque<SeenFault>,
    dropped: u64,
}

impl Recorder {
    pub(super) fn note(&mut self, page: PageNo, kind: FaultKind) {
        let Some(recording) = &mut self.recording else { return };
        if recording.seen.len() == SEEN_MAX {
            recording.dropped += 1;
            return;
        }
        let at_us = recording.since.elapsed().as_micros() as u64;
        recording.seen.push_back(SeenFault { at_us, page, kind });
    }

    /// The next faults that were seen since recording began. With `on`, it begins or goes on; without, it ends, and
    /// what was seen and not asked for is forgotten.
    pub(super) fn record(&mut self, on: bool) -> FaultsSeen {
        let begin =
            || Recording { since: Instant::now(), seen: VecDeque::with_capacity(SEEN_MAX), dropped: 0 };
        if !on {
            self.recording = None;
            return FaultsSeen::default();
        }
        let recording = self.recording.get_or_insert_with(begin);
        let count = recording.seen.len().min(ANSWER_MAX);
        FaultsSeen {
            faults: recording.seen.drain(..count).collect(),
            left: recording.seen.len() as u64,
            dropped: std::mem::take(&mut recording.dropped),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_comes_in_order_and_what_is_too_much_is_counted() {
        let mut recorder = Recorder::default();
        recorder.note(PageNo(1), FaultKind::Zero);
        assert_eq!(recorder.record(true), FaultsSeen::default(), "nothing from before");
        let room = recorder.recording.as_ref().unwrap().seen.capacity();
        let all = SEEN_MAX as u64 + 5;
        (0..all).for_each(|page| recorder.note(PageNo(page), FaultKind::Store));
        assert_eq!(recorder.recording.as_ref().unwrap().seen.capacity(), room, "no memory was taken");
        let (mut next, mut dropped) = (0, 0);
        loop {
            let seen = recorder.record(true);
            dropped += seen.dropped;
            for fault in &seen.faults {
                assert_eq!(fault.page, PageNo(next));
                next += 1;
            }
            if seen.left == 0 {
                break;
            }
        }
        assert_eq!((next, dropped), (SEEN_MAX as u64, 5));
        recorder.note(PageNo(9), FaultKind::Rescue);
        assert_eq!(recorder.record(false), FaultsSeen::default());
        assert_eq!(recorder.record(true), FaultsSeen::default(), "forgotten");
    }
}
