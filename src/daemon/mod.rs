//! `vmemd serve`: lets VMs arrive at this host. Holds no VM's memory; VMs outlive it.

mod admission;
mod children;
pub mod door;
mod groups;
mod machine;
mod refusals;
pub mod serve;
mod watch;
