//! `vmemd serve`: lets VMs arrive at this host. Holds no VM's memory; VMs outlive it.

mod admission;
mod children;
mod machine;
pub mod serve;
