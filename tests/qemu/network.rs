//! Two network namespaces joined by a cable, with one network for guests over both: as two hosts in one LAN.
//!
//! ```text
//!   namespace A                                  namespace B
//!   tapA ── br0 (10.99.0.1) ── veth ════ veth ── br0 (10.99.0.2) ── tapB
//! ```
#![allow(dead_code, reason = "each test file uses a part")]

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Two namespaces, which go when this is dropped. Whatever runs in them must have ended by then.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) namespaces: [String; 2],
}

impl Network {
    /// The addresses of the hosts, and those that guests may take.
    pub(crate) const HOSTS: [&str; 2] = ["10.99.0.1", "10.99.0.2"];
    pub(crate) const GUEST: &str = "10.99.0.10";
    pub(crate) const TAPS: [&str; 2] = ["tapA", "tapB"];

    /// None, with the reason, where namespaces cannot be made.
    pub(crate) fn new() -> Result<Network, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let names = ["a", "b"].map(|side| format!("vmemd-{}-{number}{side}", std::process::id()));
        ip(&format!("netns add {}", names[0]))?;
        // Dropped when anything fails from here on.
        let network = Network { namespaces: names };
        let [a, b] = &network.namespaces;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add cable netns {a} type veth peer name cable netns {b}"))?;
        for ((namespace, host), tap) in network.namespaces.iter().zip(Self::HOSTS).zip(Self::TAPS) {
            for command in [
                "link set lo up".to_owned(),
                "link add br0 type bridge".to_owned(),
                format!("tuntap add dev {tap} mode tap"),
                "link set cable master br0 up".to_owned(),
                format!("link set {tap} master br0 up"),
                format!("addr add {host}/24 dev br0"),
                "link set br0 up".to_owned(),
            ] {
                ip(&format!("-n {namespace} {command}"))?;
            }
        }
        Ok(network)
    }

    /// Pulls the cable, or puts it back.
    pub(crate) fn cable(&self, state: &str) {
        ip(&format!("-n {} link set cable {state}", self.namespaces[0])).expect("a cable");
    }

    /// A connection from the first host, with patience for a guest that is still starting.
    pub(crate) fn connect(&self, to: &str) -> TcpStream {
        let path = format!("/run/netns/{}", self.namespaces[0]);
        let to: SocketAddr = to.parse().expect("an address");
        let connecting = std::thread::spawn(move || {
            let namespace = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            // SAFETY: takes a descriptor that is open, and changes the network of this thread alone.
            let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(entered, 0, "{path}: {}", std::io::Error::last_os_error());
            TcpStream::connect(to).unwrap_or_else(|error| panic!("{to}: {error}"))
        });
        connecting.join().expect("a connection")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            let _ = ip(&format!("netns del {namespace}"));
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    let output = output.map_err(|error| format!("no `ip`: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
