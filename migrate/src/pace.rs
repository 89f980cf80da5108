//! When to stop the VM, and how much to slow it down before: values in, decisions out. For a migration, which sends
//! pages over a link, and for a checkpoint, which writes them to a disk: there, writing is sending.
//!
//! A round sends the pages that became dirty during the one before. Rounds get shorter if pages become dirty more
//! slowly than they are sent. If they do not, the VM is throttled, as in QEMU's auto-converge, but at once to the share
//! at which the next round shrinks to `WANTED_SHRINK`, not step by step.

use std::time::Duration;

/// The next round shall have at most this share of the pages of this one.
const WANTED_SHRINK: f64 = 0.25;
/// Of the downtime that the other costs leave, this share is for sending pages. The rest is for rates that are not
/// quite what they were.
const PAGES_SHARE: f64 = 0.75;
/// This share of the downtime target is for sending pages, whatever the other costs are. With less, no VM that writes
/// would ever be stopped.
const LEAST_SHARE: f64 = 0.1;
/// How fast a machine takes its state: QEMU took 256 MiB of frame buffer in 0.66 and 0.69 s (on a busy host of 2
/// cores, 2026-11-29).
const LOADED_BYTES_PER_S: f64 = 4e8;
/// A round with fewer pages says little about the rate.
const MIN_RATE_PAGES: u64 = 256;

/// What may be done to a VM.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The VM is stopped when it is expected to stand still for no longer than this.
    pub downtime_target: Duration,
    /// The VM is not stopped if it is expected to stand still for longer.
    pub max_downtime: Option<Duration>,
    /// After so many rounds there is no further one.
    pub max_rounds: u32,
    /// Percent, 0 to 99; 0: never throttle.
    pub max_throttle: u8,
}

/// How things stand when a round has ended.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Rounds done.
    pub rounds: u32,
    /// Pages to be sent next.
    pub remaining_pages: u64,
    /// Pages that are sent a second while the VM runs.
    pub sent_per_s: f64,
    /// Pages that are sent a second while it stands still: more, if what is sent while it runs is limited.
    pub stopped_per_s: f64,
    /// Pages that become dirty a second, under the throttle of now.
    pub dirty_per_s: f64,
    /// Percent.
    pub throttle: u8,
    /// What the downtime consists of besides pages and what the state takes by its size: stopping and starting the VM.
    pub vm_cost: Duration,
    /// The VM's state, to be sent before the pages, and loaded behind them.
    pub state_bytes: u64,
    /// The last scan, and questions and answers on their way.
    pub link_cost: Duration,
}

impl Standing {
    /// What is spent besides sending pages.
    fn costs(&self) -> Duration {
        let state_pages = self.state_bytes as f64 / swapd::PAGE_SIZE as f64;
        let loading = seconds(self.state_bytes as f64 / LOADED_BYTES_PER_S);
        self.vm_cost + self.link_cost + loading + seconds(state_pages / self.stopped_per_s)
    }

    /// How long the VM will stand still if it is stopped now.
    pub fn expected(&self) -> Duration {
        self.costs() + seconds(self.remaining_pages as f64 / self.stopped_per_s)
    }
}

/// How long a target may take to load a state of so many bytes: ten times what a machine takes, for what was kept on a
/// slow disk. A target that does not live is found by its silence long before.
pub fn longest_load(state_bytes: u64) -> Duration {
    seconds(state_bytes as f64 / LOADED_BYTES_PER_S * 10.0)
}

/// A time that a rate says, which may be near zero.
fn seconds(seconds: f64) -> Duration {
    const MAX_S: f64 = 1e6;
    Duration::from_secs_f64(if seconds.is_nan() { 0.0 } else { seconds.clamp(0.0, MAX_S) })
}

/// What to do when a round has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Pause the VM: what is left fits, or no further round is allowed.
    Stop,
    /// No further round is allowed, and what is left would take longer than it may.
    GiveUp,
    /// Another round, with this throttle.
    Go {
        /// Percent.
        throttle: u8,
    },
}

/// Decides what comes after a round.
pub fn decide(rules: &Rules, now: &Standing) -> Decision {
    let left = now.remaining_pages as f64;
    let target = rules.max_downtime.map_or(rules.downtime_target, |max| max.min(rules.downtime_target));
    let for_pages = target.saturating_sub(now.costs()).mul_f64(PAGES_SHARE).max(target.mul_f64(LEAST_SHARE));
    let fits = now.stopped_per_s * for_pages.as_secs_f64();
    let allowed = rules.max_downtime.is_none_or(|max| now.expected() <= max);
    let last = now.rounds >= rules.max_rounds;
    if allowed && (left <= fits || now.remaining_pages == 0 || last) {
        return Decision::Stop;
    }
    if last {
        return Decision::GiveUp;
    }
    let next = left * now.dirty_per_s / now.sent_per_s;
    if next <= left * WANTED_SHRINK || next <= fits {
        return Decision::Go { throttle: now.throttle };
    }
    let running = 1.0 - f64::from(now.throttle) / 100.0;
    let unthrottled = now.dirty_per_s / running;
    let wanted = 100.0 * (1.0 - WANTED_SHRINK * now.sent_per_s / unthrottled);
    let throttle = (wanted.ceil() as u8).clamp(now.throttle, rules.max_throttle.max(now.throttle));
    Decision::Go { throttle }
}

/// The rate at which pages go out, from the rounds so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendRate {
    per_s: Option<f64>,
    /// The rate is that of a round with enough pages.
    is_known: bool,
}

impl SendRate {
    /// A round has sent so many pages in this time.
    pub fn round(&mut self, pages: u64, took: Duration) {
        let rate = pages.max(1) as f64 / took.as_secs_f64().max(1e-6);
        let says_much = pages >= MIN_RATE_PAGES;
        if says_much || !self.is_known {
            // Of rounds with few pages the fastest says most: a memory of zeros takes its time, and hardly a page is
            // sent.
            let least = if says_much { 0.0 } else { self.per_s.unwrap_or_default() };
            self.per_s = Some(rate.max(least));
            self.is_known |= says_much;
        }
    }

    /// Pages a second.
    pub fn per_s(&self) -> f64 {
        self.per_s.unwrap_or(1.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules {
        downtime_target: Duration::from_millis(50),
        max_downtime: None,
        max_rounds: 30,
        max_throttle: 99,
    };
    const STANDING: Standing = Standing {
        rounds: 2,
        remaining_pages: 100_000,
        sent_per_s: 100_000.0,
        stopped_per_s: 100_000.0,
        dirty_per_s: 0.0,
        throttle: 0,
        vm_cost: Duration::from_millis(8),
        state_bytes: 0,
        link_cost: Duration::from_millis(2),
    };

    #[test]
    fn stops_when_the_rest_fits_what_the_costs_leave() {
        assert_eq!(decide(&RULES, &Standing { remaining_pages: 3000, ..STANDING }), Decision::Stop);
        let dear = Standing { remaining_pages: 3000, link_cost: Duration::from_millis(3), ..STANDING };
        assert_eq!(decide(&RULES, &dear), Decision::Go { throttle: 0 });
        // 4096 bytes a page: 1000 pages of state take 10 ms more to send, and 10.2 ms to load.
        let with_state = Standing { remaining_pages: 1484, state_bytes: 1000 << 12, ..STANDING };
        assert_eq!(decide(&RULES, &with_state), Decision::Go { throttle: 0 });
        assert_eq!(decide(&RULES, &Standing { remaining_pages: 1480, ..with_state }), Decision::Stop);
        let hopeless = Standing { vm_cost: Duration::from_secs(1), remaining_pages: 500, ..STANDING };
        assert_eq!(decide(&RULES, &hopeless), Decision::Stop, "waiting makes it no shorter");
        let more = Standing { remaining_pages: 3001, ..STANDING };
        assert_eq!(decide(&RULES, &more), Decision::Go { throttle: 0 });
        assert_eq!(decide(&RULES, &Standing { rounds: 30, ..more }), Decision::Stop);
        assert_eq!(
            decide(&RULES, &Standing { remaining_pages: 0, sent_per_s: 0.0, stopped_per_s: 0.0, ..STANDING }),
            Decision::Stop
        );
    }

    #[test]
    fn gives_up_rather_than_stop_it_for_longer_than_allowed() {
        let rules = Rules { max_downtime: Some(Duration::from_millis(100)), ..RULES };
        // 10 ms and 90 ms.
        let longest = Standing { rounds: 30, remaining_pages: 9000, ..STANDING };
        assert_eq!(decide(&rules, &longest), Decision::Stop);
        assert_eq!(decide(&rules, &Standing { remaining_pages: 9001, ..longest }), Decision::GiveUp);
        assert_eq!(decide(&RULES, &Standing { remaining_pages: 9001, ..longest }), Decision::Stop);
        assert_eq!(decide(&rules, &Standing { rounds: 29, ..longest }), Decision::Go { throttle: 0 });
        // A limit below the target is one.
        let strict = Rules { max_downtime: Some(Duration::from_millis(20)), ..RULES };
        assert_eq!(
            decide(&strict, &Standing { remaining_pages: 751, ..STANDING }),
            Decision::Go { throttle: 0 }
        );
        assert_eq!(decide(&strict, &Standing { remaining_pages: 749, ..STANDING }), Decision::Stop);
        // Nothing is left, and it is too dear all the same.
        let dear = Standing { remaining_pages: 0, vm_cost: Duration::from_millis(200), ..STANDING };
        assert_eq!(decide(&rules, &dear), Decision::Go { throttle: 0 });
        assert_eq!(decide(&rules, &Standing { rounds: 30, ..dear }), Decision::GiveUp);
    }

    #[test]
    fn throttles_just_enough() {
        let fast = Standing { dirty_per_s: 200_000.0, ..STANDING };
        assert_eq!(decide(&RULES, &fast), Decision::Go { throttle: 88 });
        // The same VM, seen while it is throttled, gets no more of it.
        let slowed = Standing { dirty_per_s: 200_000.0 * 0.12, throttle: 88, ..STANDING };
        assert_eq!(decide(&RULES, &slowed), Decision::Go { throttle: 88 });
        let gentle = Rules { max_throttle: 40, ..RULES };
        assert_eq!(decide(&gentle, &fast), Decision::Go { throttle: 40 });
        let never = Rules { max_throttle: 0, ..RULES };
        assert_eq!(decide(&never, &fast), Decision::Go { throttle: 0 });
    }

    #[test]
    fn a_limit_that_ends_with_the_stop_does_not_count_behind_it() {
        // 4000 pages take 0.4 s at the limit, and 40 ms without.
        let limited =
            Standing { remaining_pages: 4000, sent_per_s: 10_000.0, dirty_per_s: 9_000.0, ..STANDING };
        assert_eq!(decide(&RULES, &limited), Decision::Go { throttle: 73 });
        assert_eq!(decide(&RULES, &Standing { remaining_pages: 3000, ..limited }), Decision::Stop);
        assert_eq!(limited.expected(), Duration::from_millis(50));
    }

    #[test]
    fn slow_writers_are_left_alone() {
        let slow = Standing { dirty_per_s: 25_000.0, ..STANDING };
        assert_eq!(decide(&RULES, &slow), Decision::Go { throttle: 0 });
    }

    #[test]
    fn rates() {
        let mut sent = SendRate::default();
        sent.round(1000, Duration::from_secs(1));
        sent.round(10, Duration::from_secs(1));
        assert_eq!(sent.per_s(), 1000.0);
        let mut of_zeros = SendRate::default();
        for (pages, ms, per_s) in
            [(10, 1000, 10.0), (10, 10, 1000.0), (10, 1000, 1000.0), (500, 1000, 500.0), (1, 1, 500.0)]
        {
            of_zeros.round(pages, Duration::from_millis(ms));
            assert_eq!(of_zeros.per_s(), per_s);
        }
    }

    proptest! {
        /// A VM that writes at any constant rate is stopped, and its throttle never falls nor passes the limit.
        #[test]
        fn every_vm_is_stopped(write_per_s in 0.0..1e7_f64, send_per_s in 1e3..1e6_f64, pages in 1_u64..10_000_000,
                               state_bytes in 0_u64..1 << 32, max_throttle in 0_u8..=99) {
            let rules = Rules { max_throttle, ..RULES };
            let (mut left, mut throttle, mut rounds) = (pages, 0, 1);
            loop {
                let dirty_per_s = write_per_s * (1.0 - f64::from(throttle) / 100.0);
                let now =
                    Standing { rounds, remaining_pages: left, sent_per_s: send_per_s, stopped_per_s: send_per_s, dirty_per_s, throttle, state_bytes, ..STANDING };
                match decide(&rules, &now) {
                    Decision::Stop => break,
                    Decision::GiveUp => prop_assert!(false, "nothing forbids it"),
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
