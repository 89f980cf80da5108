//! Where in the VM's memory each job has its pages.

use swapd::{PageNo, Run};

use crate::job::{Job, Scenario};

/// The jobs' areas, one after the other.
pub(super) fn areas(scenario: &Scenario) -> Vec<Run> {
    let mut start = PageNo(0);
    let area = |job: &Job| {
        let run = Run::new(start, swapd::units::pages_in(job.size_bytes) as u32);
        start = run.end();
        run
    };
    scenario.jobs.iter().map(area).collect()
}
