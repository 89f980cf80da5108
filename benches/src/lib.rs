//! The benchmarks that `vmemd bench` starts: measurements of vmemd beside the kernel's swap, the raw device and plain
//! memory, and traces of the pages that VMs touch.

pub mod cgroup;
pub mod cli;
mod compare;
mod confined;
mod costs;
mod demands;
mod experiment;
mod figures;
mod fio;
mod foreign;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod html;
mod ini;
mod job;
mod jobfile;
mod left;
mod migrate;
mod optimum;
mod output;
mod pattern;
mod report;
mod reserve;
mod results;
mod sample;
mod settings;
mod site;
pub mod swapfile;
mod trace;
mod vmstat;
mod worker;
