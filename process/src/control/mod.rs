//! The control socket of a VM's process: names, protocol, server and client.

pub mod client;
pub mod lines;
mod peer;
pub mod protocol;
pub mod rundir;
pub mod server;
pub mod versions;
