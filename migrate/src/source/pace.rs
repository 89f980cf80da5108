//! When to stop the VM, and how much to slow it down before: values in, decisions out.
//!
//! A round sends what was written during the one before. It converges if pages are written more slowly than
//! they are sent. If they are not, the VM is throttled, as in QEMU's auto-converge, but straight to the
//! share at which the next round shrinks to [`WANTED_SHRINK`], not step by step.

use std::time::Duration;

/// The next round shall have at most this share of the pages of this one.
pub(crate) const WANTED_SHRINK: f64 = 0.25;
/// Share of the downtime target that is for sending pages; the rest is for stopping, state and hand-over.
pub(crate) const DOWNTIME_SHARE: f64 = 0.5;
/// A state that takes all of this time leaves this share of it to pages: no further round makes the state smaller.
const LEAST_SHARE: f64 = 0.25;
/// A round with fewer pages says little about the rate.
const MIN_RATE_PAGES: u64 = 256;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) downtime_target: Duration,
    pub(crate) max_rounds: u32,
    /// 0 to 99.
    pub(crate) max_throttle: u8,
}

/// How things stand when a round has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    /// Rounds done.
    pub(crate) rounds: u32,
    /// Pages to be sent next.
    pub(crate) left_pages: u64,
    /// As many pages' worth of state goes in the pause as well, whenever that is.
    pub(crate) state_pages: u64,
    pub(crate) sent_per_s: f64,
    /// Distinct pages written, under the throttle of now.
    pub(crate) written_per_s: f64,
    pub(crate) throttle: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Decision {
    /// Pause the VM: what is left fits, or no further round is allowed.
    Stop,
    /// Another round, with this throttle.
    Go { throttle: u8 },
}

pub(crate) fn decide(rules: &Rules, now: &Standing) -> Decision {
    let left = now.left_pages as f64;
    let all = now.sent_per_s * rules.downtime_target.as_secs_f64() * DOWNTIME_SHARE;
    let fits = (all - now.state_pages as f64).max(all * LEAST_SHARE);
    if left <= fits || now.left_pages == 0 || now.rounds >= rules.max_rounds {
        return Decision::Stop;
    }
    let next = left * now.written_per_s / now.sent_per_s;
    if next <= left * WANTED_SHRINK || next <= fits {
        return Decision::Go { throttle: now.throttle };
    }
    let running = 1.0 - f64::from(now.throttle) / 100.0;
    let unthrottled = now.written_per_s / running;
    let wanted = 100.0 * (1.0 - WANTED_SHRINK * now.sent_per_s / unthrottled);
    let throttle = (wanted.ceil() as u8).clamp(now.throttle, rules.max_throttle.max(now.throttle));
    Decision::Go { throttle }
}

/// The rate at which pages go out, from the rounds so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SendRate {
    per_s: Option<f64>,
}

impl SendRate {
    pub(crate) fn round(&mut self, pages: u64, took: Duration) {
        if pages >= MIN_RATE_PAGES || self.per_s.is_none() {
            self.per_s = Some(pages.max(1) as f64 / took.as_secs_f64().max(1e-6));
        }
    }

    /// Pages a second.
    pub(crate) fn per_s(&self) -> f64 {
        self.per_s.unwrap_or(1.0)
    }
}

/// The rate at which pages are written, from the last few scans.
#[derive(Clone, Debug, Default)]
pub(crate) struct WriteRate {
    scans: [(u64, Duration); WriteRate::SCANS],
    count: usize,
}

impl WriteRate {
    const SCANS: usize = 4;

    pub(crate) fn scan(&mut self, pages: u64, since_last: Duration) {
        self.scans[self.count % Self::SCANS] = (pages, since_last);
        self.count += 1;
    }

    /// The throttle changed: what was seen before no longer holds.
    pub(crate) fn forget(&mut self) {
        *self = WriteRate::default();
    }

    /// Pages a second; None before the first scan.
    pub(crate) fn per_s(&self) -> Option<f64> {
        let known = &self.scans[..self.count.min(Self::SCANS)];
        let (pages, time) =
            known.iter().fold((0, Duration::ZERO), |all, scan| (all.0 + scan.0, all.1 + scan.1));
        (!time.is_zero()).then(|| pages as f64 / time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules =
        Rules { downtime_target: Duration::from_millis(50), max_rounds: 30, max_throttle: 99 };
    const STANDING: Standing = Standing {
        rounds: 2,
        left_pages: 100_000,
        state_pages: 0,
        sent_per_s: 100_000.0,
        written_per_s: 0.0,
        throttle: 0,
    };

    #[test]
    fn stops_when_the_rest_fits_half_of_the_downtime() {
        assert_eq!(decide(&RULES, &Standing { left_pages: 2500, ..STANDING }), Decision::Stop);
        let more = Standing { left_pages: 2501, ..STANDING };
        assert_eq!(decide(&RULES, &more), Decision::Go { throttle: 0 });
        assert_eq!(decide(&RULES, &Standing { rounds: 30, ..more }), Decision::Stop);
        assert_eq!(decide(&RULES, &Standing { left_pages: 0, sent_per_s: 0.0, ..STANDING }), Decision::Stop);
    }

    #[test]
    fn what_the_state_takes_is_not_there_for_pages() {
        let with =
            |state_pages, left_pages| decide(&RULES, &Standing { state_pages, left_pages, ..STANDING });
        assert_eq!(with(1000, 1500), Decision::Stop);
        assert_eq!(with(1000, 1501), Decision::Go { throttle: 0 });
        // A state that does not fit at all: pages take no more than a quarter of what they would.
        assert_eq!(with(1_000_000, 625), Decision::Stop);
        assert_eq!(with(1_000_000, 626), Decision::Go { throttle: 0 });
    }

    #[test]
    fn throttles_just_enough() {
        let fast = Standing { written_per_s: 200_000.0, ..STANDING };
        assert_eq!(decide(&RULES, &fast), Decision::Go { throttle: 88 });
        // The same VM, seen while it is throttled, gets no more of it.
        let slowed = Standing { written_per_s: 200_000.0 * 0.12, throttle: 88, ..STANDING };
        assert_eq!(decide(&RULES, &slowed), Decision::Go { throttle: 88 });
        let gentle = Rules { max_throttle: 40, ..RULES };
        assert_eq!(decide(&gentle, &fast), Decision::Go { throttle: 40 });
        let never = Rules { max_throttle: 0, ..RULES };
        assert_eq!(decide(&never, &fast), Decision::Go { throttle: 0 });
    }

    #[test]
    fn slow_writers_are_left_alone() {
        let slow = Standing { written_per_s: 25_000.0, ..STANDING };
        assert_eq!(decide(&RULES, &slow), Decision::Go { throttle: 0 });
    }

    #[test]
    fn rates() {
        let mut sent = SendRate::default();
        sent.round(1000, Duration::from_secs(1));
        sent.round(10, Duration::from_secs(1));
        assert_eq!(sent.per_s(), 1000.0);
        let mut written = WriteRate::default();
        assert_eq!(written.per_s(), None);
        (0..9).for_each(|pages| written.scan(pages, Duration::from_secs(1)));
        assert_eq!(written.per_s(), Some(6.5));
    }

    proptest! {
        /// A VM that writes at any constant rate is stopped, and its throttle never falls nor passes the limit.
        #[test]
        fn every_vm_is_stopped(write_per_s in 0.0..1e7_f64, send_per_s in 1e3..1e6_f64, pages in 1_u64..10_000_000,
                               state_pages in 0_u64..1_000_000, max_throttle in 0_u8..=99) {
            let rules = Rules { max_throttle, ..RULES };
            let (mut left, mut throttle, mut rounds) = (pages, 0, 1);
            loop {
                let written_per_s = write_per_s * (1.0 - f64::from(throttle) / 100.0);
                let now = Standing { rounds, left_pages: left, state_pages, sent_per_s: send_per_s, written_per_s, throttle };
                match decide(&rules, &now) {
                    Decision::Stop => break,
                    Decision::Go { throttle: next } => {
                        prop_assert!(next >= throttle && next <= max_throttle);
                        throttle = next;
                    }
                }
                let written = write_per_s * (1.0 - f64::from(throttle) / 100.0) * left as f64 / send_per_s;
                left = (written as u64).min(pages);
                rounds += 1;
                prop_assert!(rounds <= rules.max_rounds);
            }
        }
    }
}
