//! `vmemd bench record`: where trace files come from.

use std::path::Path;

use swapd::FaultKind;
use swapd::units::pages_in;
use vmprocess::control::client::VmClient;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::signals;

use super::file::{Entry, Header, TraceKind, TraceWriter, What};
use super::limits::PAGES_MAX;
use super::touches::Touches;
use crate::jobfile;

/// Facts about a finished recording.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Recorded {
    pub(crate) entries: u64,
    /// Faults that came faster than they could be sent, and are missing in the trace.
    pub(crate) dropped: u64,
    pub(crate) file_bytes: u64,
}

/// The touches of a job file's jobs, `count` of them that count.
///
/// # Errors
/// If the job file is wrong, the trace cannot be written, or at a signal.
pub(crate) fn of_jobs(job_file: &Path, count: u64, trace: &Path) -> Result<Recorded, Failure> {
    signals::install()?;
    let scenario = jobfile::read(job_file)?;
    let touches = Touches::of_jobs(&scenario.jobs, scenario.memory_bytes(), count)?;
    let file_bytes = touches.save(trace, pages_in(scenario.ram_bytes).min(touches.pages))?;
    Ok(Recorded { entries: touches.list.len() as u64, dropped: 0, file_bytes })
}

/// The faults of a running VM, for so long. `progress` is told how many there are.
///
/// # Errors
/// If the VM refuses or ends, the trace cannot be written, or at a signal.
pub(crate) fn of_vm(
    vm: &mut VmClient,
    seconds: u64,
    trace: &Path,
    progress: &dyn Fn(u64),
) -> Result<Recorded, Failure> {
    signals::install()?;
    let memory = vm.stat()?.memory;
    let (pages, ram_pages) = (pages_in(memory.memory_bytes), pages_in(memory.ram_budget_bytes));
    if pages > PAGES_MAX {
        return Err(Failure::new(FailureKind::Usage, "a memory of more than 8T cannot be traced"));
    }
    let mut writer = TraceWriter::create(trace, TraceKind::Faults)?;
    let mut dropped = 0;
    vm.record_faults(seconds, &mut |seen| {
        dropped += seen.dropped;
        for fault in &seen.faults {
            let what = match fault.kind {
                FaultKind::Zero => What::ZeroFault,
                FaultKind::Rescue => What::RescueFault,
                FaultKind::Store => What::StoreFault,
            };
            if fault.page.0 >= pages {
                return Err(Failure::new(
                    FailureKind::Vm,
                    format!("the VM reports a fault on {}", fault.page),
                ));
            }
            writer.push(Entry { page: fault.page.0 as u32, what, at_us: fault.at_us })?;
        }
        progress(writer.entries());
        Ok(())
    })?;
    let entries = writer.entries();
    let header = Header {
        kind: TraceKind::Faults,
        pages,
        ram_pages: ram_pages.min(pages),
        entries,
        uncounted: 0,
        dropped,
    };
    let file_bytes = writer.finish(header)?;
    Ok(Recorded { entries, dropped, file_bytes })
}
