//! The guest's own counters, readable while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::vmm::limits::VCPUS_MAX;

/// No mismatch so far.
const NONE: u64 = u64::MAX;

/// What the guest program has done so far. Each report covers a batch of pages, so it lags by less than one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCounters {
    /// Passes over the working set (or as many touches) that every vCPU has completed.
    pub rounds: u64,
    /// Pages written at the start, without verifying.
    pub filled_pages: u64,
    /// Touches that found all 512 words of a page right.
    pub verified_pages: u64,
    /// Pages written anew after being verified (or found wrong).
    pub rewritten_pages: u64,
    /// Touches that found wrong content.
    pub mismatched_pages: u64,
    /// Page number of the first wrong content.
    pub first_mismatch: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Counters {
    filled: AtomicU64,
    verified: AtomicU64,
    mismatched: AtomicU64,
    first_mismatch: AtomicU64,
    rounds: [AtomicU64; VCPUS_MAX as usize],
    vcpus: usize,
    writes: bool,
}

/// The counters as they are saved: filled, verified, mismatched, first mismatch (all ones: none), rounds of each vCPU.
pub(super) type Saved = [u64; 4 + VCPUS_MAX as usize];

impl Counters {
    /// Counters at zero; `writes`: whether the workload rewrites the pages that it verifies.
    pub(super) fn new(vcpus: u32, writes: bool) -> Counters {
        let mut zero = [0; 4 + VCPUS_MAX as usize];
        zero[3] = NONE;
        Counters::from_saved(vcpus, writes, &zero)
    }

    pub(super) fn from_saved(vcpus: u32, writes: bool, saved: &Saved) -> Counters {
        Counters {
            filled: AtomicU64::new(saved[0]),
            verified: AtomicU64::new(saved[1]),
            mismatched: AtomicU64::new(saved[2]),
            first_mismatch: AtomicU64::new(saved[3]),
            rounds: std::array::from_fn(|vcpu| AtomicU64::new(saved[4 + vcpu])),
            vcpus: vcpus as usize,
            writes,
        }
    }

    pub(super) fn save(&self) -> Saved {
        let head = [&self.filled, &self.verified, &self.mismatched, &self.first_mismatch];
        let all: Vec<&AtomicU64> = head.into_iter().chain(&self.rounds).collect();
        std::array::from_fn(|at| all[at].load(Ordering::Relaxed))
    }

    pub(super) fn add_filled(&self, pages: u64) {
        self.filled.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn add_verified(&self, pages: u64) {
        self.verified.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn add_round(&self, vcpu: u32) {
        self.rounds[vcpu as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add_mismatch(&self, page: u64) {
        let _ = self.first_mismatch.compare_exchange(NONE, page, Ordering::Relaxed, Ordering::Relaxed);
        self.mismatched.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> GuestCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (verified, mismatched) = (load(&self.verified), load(&self.mismatched));
        GuestCounters {
            rounds: self.rounds[..self.vcpus].iter().map(load).min().unwrap_or(0),
            filled_pages: load(&self.filled),
            verified_pages: verified,
            rewritten_pages: if self.writes { verified + mismatched } else { 0 },
            mismatched_pages: mismatched,
            first_mismatch: Some(load(&self.first_mismatch)).filter(|page| *page != NONE),
        }
    }
}
