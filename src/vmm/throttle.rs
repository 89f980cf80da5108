//! Keeps vCPUs out of the guest for a share of the time, so that a guest that writes faster than the network
//! carries can be migrated (QEMU calls it auto-converge).

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::vmm::error::VmmError;
use crate::vmm::gate::Gate;
use crate::vmm::kick;

/// vCPUs are held once in each period.
const PERIOD: Duration = Duration::from_millis(10);
/// vCPUs are never held longer than this at a stretch.
const HELD_MAX: Duration = Duration::from_secs(1);
/// Greatest share: the guest must get on somehow.
pub const THROTTLE_MAX: u8 = 99;

#[derive(Debug, Default)]
struct Setting {
    percent: u8,
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    setting: Mutex<Setting>,
    changed: Condvar,
}

#[derive(Debug)]
pub(super) struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// A throttle at 0 for the vCPUs of those threads.
    pub(super) fn new(gate: Arc<Gate>, vcpus: Arc<Vec<JoinHandle<()>>>) -> Result<Throttle, VmmError> {
        let shared = Arc::new(Shared::default());
        let (ours, theirs) = (shared.clone(), shared);
        let thread = Builder::new()
            .name("vmm-throttle".to_owned())
            .spawn(move || run(&theirs, &gate, &vcpus))
            .map_err(|source| VmmError::Thread { action: "start the throttle's thread", source })?;
        Ok(Throttle { shared: ours, thread: Some(thread) })
    }

    pub(super) fn set(&self, percent: u8) {
        self.change(|setting| setting.percent = percent.min(THROTTLE_MAX));
    }

    /// Ends the thread; vCPUs are held no longer.
    pub(super) fn end(&mut self) {
        self.change(|setting| setting.ended = true);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the throttle's thread does not panic");
        }
    }

    fn change(&self, how: impl FnOnce(&mut Setting)) {
        how(&mut self.shared.setting.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.changed.notify_all();
    }
}

fn run(shared: &Shared, gate: &Gate, vcpus: &[JoinHandle<()>]) {
    let mut setting = shared.setting.lock().unwrap_or_else(PoisonError::into_inner);
    let mut free = Duration::ZERO;
    while !setting.ended {
        if setting.percent == 0 {
            setting = shared.changed.wait(setting).unwrap_or_else(PoisonError::into_inner);
            free = Duration::ZERO;
            continue;
        }
        let percent = setting.percent;
        let held = held_after(free, percent);
        gate.hold(true);
        vcpus.iter().for_each(kick::kick);
        let wait = shared.changed.wait_timeout(setting, held);
        setting = wait.unwrap_or_else(PoisonError::into_inner).0;
        gate.hold(false);
        let opened = Instant::now();
        let wait = shared.changed.wait_timeout(setting, PERIOD * u32::from(100 - percent) / 100);
        setting = wait.unwrap_or_else(PoisonError::into_inner).0;
        free = opened.elapsed();
    }
}

/// How long to hold vCPUs that were free for so long. On a busy host this thread wakes late, while the vCPUs run:
/// what they had is what counts, not what they were to have.
fn held_after(free: Duration, percent: u8) -> Duration {
    let usual = PERIOD * u32::from(percent) / 100;
    (free * u32::from(percent) / u32::from(100 - percent)).clamp(usual, HELD_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_waking_is_made_up_for() {
        assert_eq!(held_after(Duration::from_millis(1), 90), Duration::from_millis(9));
        assert_eq!(held_after(Duration::from_millis(5), 90), Duration::from_millis(45));
        assert_eq!(held_after(Duration::ZERO, 50), Duration::from_millis(5));
        assert_eq!(held_after(Duration::from_secs(1), 99), HELD_MAX);
    }
}
