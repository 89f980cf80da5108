//! How long to watch what the VM writes before it moves on: values in, decisions out.
//!
//! The target places pages by heat, and at first a source knows heat only by 2 MiB blocks. If the warm blocks fit into
//! the RAM that the VM gets at the target, nothing more need be known. If they do not, only some of their pages are in
//! use, and the scans for dirty pages find out which. As long as the scans find new pages, the guest has not been once
//! around all that it uses; a target that knew no more would keep the wrong pages in RAM.
//!
//! Nobody knows how long a guest takes for one time around. Therefore *lately* is a share of the time since tracking
//! began: a guest that goes around in half a second is watched for less than one second, a guest that takes 15 s for
//! 20.

use std::time::Duration;

use super::hot_room::hot_room;

/// The last one of so many parts of the time since tracking began is lately.
const LATELY_PARTS: u32 = 4;
/// The guest has been everywhere if lately one page in so many of those that are known was found, or fewer.
const KNOWN_PER_NEW: u64 = 50;
/// No VM is quite idle. What the scans find does not matter if in all the time there is they would find no more than
/// one page in so many of the target's RAM.
const ROOM_PER_NEW: u64 = 50;

/// If so large a share of the pages in dirty blocks is known to be dirty, or more, the guest's pages do not lie
/// scattered: then the blocks of a working set that fits 3/4 of the target's RAM also fit its room for hot pages.
const DENSE_SHARE: f64 = 7.0 / 8.0;

/// What is known of the VM and of the target, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stakes {
    /// The VM's memory.
    pub(crate) memory: u64,
    /// RAM that the VM gets at the target.
    pub(crate) room: u64,
    /// Pages that are not cold, by all that is known.
    pub(crate) warm: u64,
    /// Pages of the blocks in which any page is known to be dirty.
    pub(crate) around: u64,
    /// How long the VM may be watched altogether.
    pub(crate) most: Duration,
}

/// What the scans have found so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Discovery {
    /// Of each scan, when it was, since tracking began, and pages known to be written by then.
    scans: Vec<(Duration, u64)>,
}

impl Discovery {
    /// A scan found so many pages that none before it had found.
    pub(crate) fn scan(&mut self, at: Duration, new: u64, most: Duration) {
        // Rounds may go on for hours.
        if at <= most {
            self.scans.push((at, self.known() + new));
        }
    }

    fn known(&self) -> u64 {
        self.scans.last().map_or(0, |(_, known)| *known)
    }

    /// Pages found since `then`, or since the last scan before it; and the time from which they count.
    fn found_since(&self, then: Duration) -> (u64, Duration) {
        let before = self.scans.partition_point(|(at, _)| *at <= then);
        let (at, known) = before.checked_sub(1).map_or_else(Default::default, |scan| self.scans[scan]);
        (self.known() - known, at)
    }

    /// Whether to watch on.
    pub(crate) fn goes_on(&self, now: Duration, stakes: &Stakes) -> bool {
        let (known, hot_room) = (self.known(), hot_room(stakes.room));
        if now >= stakes.most || stakes.room >= stakes.memory || stakes.warm <= hot_room || known >= hot_room
        {
            return false;
        }
        if known as f64 >= stakes.around as f64 * DENSE_SHARE {
            return false;
        }
        let (found, since) = self.found_since(now - now / LATELY_PARTS);
        let to_be_found = found as f64 * stakes.most.as_secs_f64() / (now - since).as_secs_f64().max(1e-3);
        found > known / KNOWN_PER_NEW && to_be_found > (stakes.room / ROOM_PER_NEW) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const SCAN: Duration = Duration::from_millis(120);
    const STAKES: Stakes =
        Stakes { memory: 131_072, room: 65_536, warm: 98_304, around: 98_304, most: Duration::from_secs(30) };

    /// How long a guest is watched, of which so many pages are known after so long.
    fn watched(stakes: Stakes, known: impl Fn(f64) -> u64) -> (f64, u64) {
        let (mut discovery, mut now, mut before) = (Discovery::default(), SCAN, 0);
        loop {
            let all = known(now.as_secs_f64());
            discovery.scan(now, all - before, stakes.most);
            before = all;
            if !discovery.goes_on(now, &stakes) {
                return (now.as_secs_f64(), all);
            }
            now += SCAN;
        }
    }

    /// Goes through its pages in order, once in so many seconds.
    fn in_order(pages: u64, round_s: f64) -> impl Fn(f64) -> u64 {
        move |now| (pages as f64 * (now / round_s).min(1.0)) as u64
    }

    #[test]
    fn a_guest_is_watched_until_it_has_been_once_around() {
        for (round_s, most_s) in [(0.1, 0.5), (0.5, 1.0), (5.0, 7.0), (15.0, 20.5), (22.0, 30.1)] {
            let (took, known) = watched(STAKES, in_order(49_152, round_s));
            assert!(took >= round_s && took <= most_s, "{round_s} s a round: {took} s");
            assert_eq!(known, 49_152);
        }
        let (took, _) = watched(STAKES, in_order(49_152, 500.0));
        assert!((30.0..30.2).contains(&took), "{took} s: not for ever");
    }

    #[test]
    fn what_is_left_of_random_writes_is_little() {
        for often_s in [0.2, 1.0, 4.0] {
            let random = |now: f64| (49_152.0 * (1.0 - (-now / often_s).exp())) as u64;
            let (took, known) = watched(STAKES, random);
            assert!(known >= 49_152 * 99 / 100, "{known} after {took} s");
            assert!(took <= often_s * 7.0 + 0.5, "{took} s");
        }
    }

    #[test]
    fn nobody_waits_for_what_changes_nothing() {
        let at_once =
            |stakes, known: fn(f64) -> u64| assert_eq!(watched(stakes, known).0, SCAN.as_secs_f64());
        let fast = |now: f64| (now * 3000.0) as u64;
        at_once(Stakes { room: STAKES.memory, ..STAKES }, fast);
        at_once(Stakes { warm: 49_152, ..STAKES }, fast);
        at_once(STAKES, |_| 0);
        // 30 s of it would be 1200 pages.
        at_once(STAKES, |now| (now * 40.0) as u64);
        // Whole blocks, and one in part.
        at_once(Stakes { around: 1024, ..STAKES }, |_| 900);
        // More than RAM can have.
        at_once(STAKES, |_| 60_000);
    }

    #[test]
    fn only_scans_that_may_count_are_kept() {
        let mut discovery = Discovery::default();
        (0..1000).for_each(|scan| discovery.scan(SECOND * scan, 1, STAKES.most));
        assert_eq!((discovery.scans.len(), discovery.known()), (31, 31));
    }
}
