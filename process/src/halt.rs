//! Waits that the VM's end ends: of a thread that works beside the VM, and that nobody needs once the VM is to end.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use swapd::{CommandError, PendingAnswer};

/// Whether work beside the VM is to end. Waiting for it, for a time or for an answer of the engine is one wait.
#[derive(Debug, Default)]
pub(crate) struct Halt {
    state: Mutex<HaltState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct HaltState {
    ended: bool,
    /// An answer is there, or may be.
    woken: bool,
}

/// The VM is to end: whatever was being waited for does not count any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Halted;

impl Wake for Halt {
    fn wake(self: Arc<Halt>) {
        self.lock().woken = true;
        self.changed.notify_all();
    }
}

impl Halt {
    fn lock(&self) -> MutexGuard<'_, HaltState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all waits, those to come too.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Whether work is to end.
    pub(crate) fn check(&self) -> Result<(), Halted> {
        if self.lock().ended { Err(Halted) } else { Ok(()) }
    }

    /// Waits for so long.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), Halted> {
        let deadline = Instant::now() + time;
        let mut state = self.lock();
        loop {
            if state.ended {
                return Err(Halted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for an answer of the engine, which serves the VM's faults first, and may wait for a disk.
    pub(crate) fn answer<T>(
        self: &Arc<Halt>,
        mut answer: PendingAnswer<T>,
    ) -> Result<Result<T, CommandError>, Halted> {
        let waker = Waker::from(self.clone());
        let mut context = Context::from_waker(&waker);
        loop {
            self.lock().woken = false;
            if let Poll::Ready(answered) = Pin::new(&mut answer).poll(&mut context) {
                return Ok(answered.unwrap_or(Err(CommandError::Gone)));
            }
            let mut state = self.lock();
            while !state.woken {
                if state.ended {
                    return Err(Halted);
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_ends_every_wait_and_a_time_that_is_over_does_not() {
        let halt = Arc::new(Halt::default());
        assert_eq!(halt.pause(Duration::from_millis(1)), Ok(()));
        assert_eq!(halt.check(), Ok(()));
        let waits = {
            let halt = halt.clone();
            std::thread::spawn(move || halt.pause(Duration::from_secs(3600)))
        };
        halt.end();
        assert_eq!(waits.join().unwrap(), Err(Halted));
        assert_eq!(halt.check(), Err(Halted));
        assert_eq!(halt.pause(Duration::ZERO), Err(Halted));
    }
}
